"""A folder that fills with a repository's files, or with a part of its checkpoint, and in which nothing wrong ever stands.

    NAME.part         what has arrived so far of a file, in order
    NAME.part.json    what it is a part of: ETag, size, ranges; if one of these is another now, it starts again
    NAME              put there by rename, after its hash was found to be the hub's
    k2-download.json  repository, commit, part, and every finished file's hash

Of a part of a checkpoint only the ranges of its tensors cross the network. They are written behind a smaller header, and
the hash of that file is recorded, since the hub has none of a range. huggingface_hub's own download is not used for the
bytes: it compares sizes and not hashes, and starts a file of 17 GB anew when the program dies.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import INDEX, write_through
from .config import K2Error, read_json_object
from .hub import BLOCK, Changed, Hashes, Hub, HubFile, Repository, Stopped, is_kept, layout_of
from .part import RECORD, Part, check_layout

SPARE = 2**26  # bytes of disk to leave free


# ---- what to fetch ----


@dataclass(frozen=True)
class Job:
    """One file to make: `head`, and behind it these ranges of a file of the hub. A whole file is one range and no head."""

    name: str
    source: HubFile
    head: bytes = b""
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def whole(self) -> bool:
        """True if the file is the hub's, so that the hub has its hash."""
        return not self.head

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return len(self.head) + self.remote

    @property
    def remote(self) -> int:
        """Bytes of it that come over the network."""
        return sum(end - begin for begin, end in self.runs)

    def identity(self, etag: str) -> dict:
        """What must be the same for a half-done file to be gone on with."""
        return {"etag": etag, "size": self.size, "ranges": hashlib.sha256(json.dumps([self.head.hex(), self.runs]).encode()).hexdigest()}

    def remaining(self, done: int):
        """The ranges that are missing when so many bytes of the remote ones are there."""
        for begin, end in self.runs:
            if done < end - begin:
                yield begin + max(done, 0), end
            done -= end - begin


def whole_job(file: HubFile) -> Job:
    """The job of fetching a file as it is."""
    return Job(file.name, file, b"", ((0, file.size),))


def part_job(source: HubFile, header: dict[str, dict], start: int) -> Job:
    """The job of making a smaller shard of some tensors of a shard: neighbours are one range, and keep their order."""
    entries, runs, reached = {}, [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        entries[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [reached, reached + end - begin]}
        reached += end - begin
        if runs and runs[-1][1] == start + begin:
            runs[-1] = (runs[-1][0], start + end)
        elif end > begin:
            runs.append((start + begin, start + end))
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return Job(f"part-{source.name}", source, len(raw).to_bytes(8, "little") + raw, tuple(runs))


@dataclass(frozen=True)
class Download:
    """All that a command will do: the files to make, and for a part the index that goes with them."""

    repository: Repository
    part: Part
    jobs: list[Job]
    index: dict | None = None


def plan_download(hub: Hub, repository: Repository, part: Part, workers: int = 8) -> Download:
    """What to fetch of a repository; for a part this reads the index and the headers of the shards that have it."""
    beside = [whole_job(file) for file in repository.files.values() if not file.name.endswith(".safetensors") and file.name != INDEX]
    if part.whole():
        return Download(repository, part, [whole_job(file) for file in sorted(repository.files.values(), key=lambda file: (file.name.endswith(".safetensors"), file.name))])
    if part.kinds == ("tokenizer",):
        return Download(repository, part, beside)
    layout, starts = layout_of(hub, repository, part, workers)
    check_layout(repository.name, layout, part)
    shards = [part_job(repository.files[file], header, starts[file]) for file, header in layout.headers.items()]
    if not shards:
        raise K2Error(f"{part.flags()}: expected a tensor that this checkpoint has, found none. Choose another part.")
    weight_map = {name: f"part-{file}" for name, file in layout.weight_map.items()}
    return Download(repository, part, beside + shards, {"metadata": {"total_size": sum(job.remote for job in shards)}, "weight_map": weight_map})


# ---- a folder ----


@contextmanager
def locked(folder: Path):
    """The folder is this program's alone while the context lasts; the system lets go even if the program is killed."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".k2-download.lock", "a+")
    with lock:
        try:
            lock_file(lock)
        except OSError:
            raise K2Error(f"{folder}: expected to work alone here, found another download at work. Wait for it, or choose another --local-dir.") from None
        yield


def lock_file(file):
    """Take the system's lock on an open file, or raise OSError at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def writing(path: Path):
    """What the disk refuses is told in a line."""
    try:
        yield
    except OSError as error:
        raise K2Error(f"{path}: could not be written: {error.strerror}. What has arrived is kept: make room or mend it, and run the same command again.") from None


@dataclass
class Record:
    """What is known of a folder's finished files: {name: size, digest, time of writing, digest of the source}."""

    folder: Path
    repository: str
    commit: str
    part: Part
    files: dict[str, dict] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record that a download left in the folder, if any. Raises K2Error for one that nobody wrote."""
        if not (folder / RECORD).exists():
            return None
        raw = read_json_object(folder / RECORD)
        try:
            part = Part() if raw["part"] is None else Part.from_dict(raw["part"])
            files = {name: {key: raw["files"][name][key] for key in ("size", "digest", "mtime_ns", "source")} for name in raw["files"]}
            record = cls(folder, str(raw["repository"]), str(raw["commit"]), part, files)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise K2Error(f"{folder / RECORD}: expected the record of a download, found something else. Remove it and run the download again: what is right stays.") from None
        if not all(is_kept(name) for name in files):
            raise K2Error(f"{folder / RECORD}: expected names of files in this folder, found others. Remove it and run the download again.")
        return record

    def write(self):
        """Put the record beside the files, in one step."""
        raw = {"repository": self.repository, "commit": self.commit, "part": None if self.part.whole() else self.part.to_dict(), "files": dict(sorted(self.files.items()))}
        with writing(self.folder / RECORD):
            write_through(self.folder / f".{RECORD}.new", (json.dumps(raw, indent=1) + "\n").encode())
            os.replace(self.folder / f".{RECORD}.new", self.folder / RECORD)

    def add(self, name: str, digest: str, source: str):
        """A file is finished."""
        status = (self.folder / name).stat()
        with self.lock:
            self.files[name] = {"size": status.st_size, "digest": digest, "mtime_ns": status.st_mtime_ns, "source": source}
            self.write()

    def distrust(self, name: str):
        """A file is not what it was: it is ours to replace, and is not taken for whole before it was hashed again."""
        with self.lock:
            self.files[name]["mtime_ns"] = 0
            self.write()


def digest_of(path: Path, like: HubFile | None, stop: threading.Event | None = None) -> str:
    """The hash of a file on the disk, of the hub's kind for that file."""
    hashes = Hashes(like)
    with open(path, "rb") as file:
        while chunk := file.read(BLOCK):
            hashes.update(chunk)
            if stop is not None and stop.is_set():
                raise Stopped
    return hashes.digest()


def is_done(job: Job, record: Record) -> bool:
    """Whether the job's file is there and right. One of ours that is wrong is taken away at once, so that nothing loads it;
    a stranger's is left alone, and refused."""
    path, known = record.folder / job.name, record.files.get(job.name)
    if not path.exists():
        return False
    status = path.stat()
    ours = known if known and known["source"] == job.source.digest else None
    if ours and (ours["size"], ours["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
        return True
    expected = job.source.digest if job.whole else ours and ours["digest"]
    if path.is_file() and status.st_size == job.size and digest_of(path, job.source if job.whole else None) == expected:
        record.add(job.name, expected, job.source.digest)
        return True
    if not known:
        raise K2Error(f"{path}: expected no file of this name, or the hub's own, found another. Move it away, or choose another --local-dir.")
    record.distrust(job.name)
    path.unlink()
    return False


def resumable(part: Path, note: Path, identity: dict, size: int) -> bool:
    """Whether what has arrived of a file is a part of the file that is wanted now."""
    try:
        return part.is_file() and part.stat().st_size <= size and read_json_object(note) == identity
    except K2Error:  # the note is missing, or half a note
        return False


def fetch(hub: Hub, repository: Repository, job: Job, folder: Path, moved: Callable[[int], None]) -> str:
    """Make one file, going on where an earlier run ended; returns its digest. Raises K2Error, and leaves what arrived."""
    what, problem = f"{repository.name}: {job.source.name}", ""
    part, note = folder / f"{job.name}.part", folder / f"{job.name}.part.json"
    for _ in range(3):
        identity = job.identity(hub.etag(repository, job.source))
        with writing(part):
            if not resumable(part, note, identity, job.size):
                part.unlink(missing_ok=True)
                write_through(note, json.dumps(identity).encode())
        try:
            found = filled_part(hub, what, hub.url(repository, job.source.name), job, part, identity["etag"], moved)
        except Changed as error:
            problem = str(error)
        else:
            if not job.whole or found == job.source.digest:
                with writing(folder / job.name):
                    os.replace(part, folder / job.name)
                    note.unlink(missing_ok=True)
                return found
            problem = f"what arrived has {found}"
        part.unlink(missing_ok=True)
    raise K2Error(f"{what}: expected {job.source.digest}, and three times over {problem}. Check the network, or use another HF_ENDPOINT; nothing of it was kept.")


def filled_part(hub: Hub, what: str, url: str, job: Job, path: Path, etag: str, moved: Callable[[int], None]) -> str:
    """Append to a .part what is missing, from the network; the digest of the whole, what was there already included."""
    hashes = Hashes(job.source if job.whole else None)
    with writing(path), open(path, "ab+") as file:
        done = file.seek(0, os.SEEK_END)
        if done < len(job.head):
            file.truncate(0)
            file.write(job.head)
            done = len(job.head)
        file.seek(0)
        while chunk := file.read(BLOCK):
            hashes.update(chunk)
        for begin, end in job.remaining(done - len(job.head)):
            for chunk in hub.stream(what, url, begin, end, job.source, etag):
                file.write(chunk)
                hashes.update(chunk)
                moved(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return hashes.digest()


def missing_jobs(download: Download, record: Record) -> list[Job]:
    """The jobs whose files are not there or not right."""
    return [job for job in download.jobs if not is_done(job, record)]


def missing_bytes(jobs: list[Job], folder: Path) -> int:
    """How many bytes they have still to write."""
    parts = [folder / f"{job.name}.part" for job in jobs]
    return sum(job.size for job in jobs) - sum(path.stat().st_size for path in parts if path.is_file())


def check_room(jobs: list[Job], folder: Path):
    """Raise K2Error if the disk has no room for what is missing."""
    wanted, free = missing_bytes(jobs, folder), shutil.disk_usage(folder).free
    if jobs and free < wanted + SPARE:
        raise K2Error(f"{folder}: {free:,} bytes are free; expected {wanted + SPARE:,} for what is missing. Make room, choose another --local-dir, or fetch a part with --layers, --experts or --part.")


def open_record(download: Download, folder: Path) -> Record:
    """The folder's record, of this repository and part, at this commit. Raises K2Error where another lies there."""
    old = Record.read(folder)
    if old and (old.repository, old.part) != (download.repository.name, download.part):
        held = " ".join(filter(None, [old.repository, old.part.flags()]))
        raise K2Error(f"{folder}: holds {held}; expected a folder for {' '.join(filter(None, [download.repository.name, download.part.flags()]))}. Choose another --local-dir.")
    return Record(folder, download.repository.name, download.repository.commit, download.part, old.files if old else {})


def check_index(download: Download, record: Record):
    """Raise K2Error if writing a part's index would take the place of one that is not ours: it makes another checkpoint whole."""
    path = record.folder / INDEX
    if download.index is None or INDEX in record.files or not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file() or path.read_bytes() != index_bytes(download.index):
        raise K2Error(f"{path}: expected no index, or this part's own, found another checkpoint's. Choose another --local-dir.")


def index_bytes(index: dict) -> bytes:
    """An index as it is written."""
    return (json.dumps(index, indent=1) + "\n").encode()


def run_download(hub: Hub, download: Download, jobs: list[Job], record: Record, workers: int, moved: Callable[[int], None]):
    """Fetch the files, so many at once; the first that fails ends the others, which keep what they have."""

    def one(job: Job):
        record.add(job.name, fetch(hub, download.repository, job, record.folder, moved), job.source.digest)

    record.write()
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(one, job) for job in jobs]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            hub.stop.set()
            pool.shutdown(cancel_futures=True)
            hub.stop.clear()
    failed = [future.exception() for future in running if not future.cancelled() and future.exception() is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, Stopped)):
        raise error
    if download.index is not None:
        path = record.folder / INDEX
        with writing(path):
            write_through(record.folder / f"{INDEX}.part", index_bytes(download.index))
            os.replace(record.folder / f"{INDEX}.part", path)
        record.add(INDEX, digest_of(path, None), "")


def verify(folder: Path, seen: Callable[[str], None]) -> list[str]:
    """Hash every file of a folder against its record; what is wrong, one line each. Those are fetched by the next download."""
    record = Record.read(folder)
    if record is None:
        raise K2Error(f"{folder / RECORD}: expected the record that a download leaves, found none. Run the download: it keeps what is right.")
    problems = []
    for name, known in sorted(record.files.items()):
        seen(name)
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != known["size"]:
            problems.append(f"{name}: expected {known['size']} bytes, found {path.stat().st_size}")
        elif digest_of(path, HubFile(name, known["size"], known["digest"])) != known["digest"]:
            problems.append(f"{name}: expected {known['digest']}, found other bytes")
    for line in problems:
        record.distrust(line.partition(":")[0])
    return problems
