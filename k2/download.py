"""A folder that fills with a repository's files, or with a part of its checkpoint, and in which nothing wrong ever stands.

    NAME.part         what has arrived so far of a file, in order
    NAME.part.json    what it is a part of: ETag, size, ranges; if one of these is another now, it starts again. Of a part
                      of a checkpoint also the hash of what has arrived, since the hub has none that would tell later
    NAME              put there by rename, after its hash was found to be the hub's
    k2-download.json  repository, commit, part, the names of all files to come, and every finished file's hash

Of a part of a checkpoint only the ranges of its tensors cross the network. They are written behind a smaller header, and
the hash of that file is recorded, since the hub has none of a range. huggingface_hub's own download is not used for the
bytes: it compares sizes and not hashes, and starts a file of 17 GB anew when the program dies.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import INDEX, RECORD, parse_index
from .config import K2Error, read_json_object
from .hub import BLOCK, REPOSITORY, Changed, Hashes, Hub, HubFile, Repository, Stopped, is_kept, layout_of
from .part import Part, check_layout

SPARE = 2**26  # bytes of disk to leave free
NOTED = 1.0  # seconds after which the hash of what has arrived of a part is noted again: so much is lost by a kill
DIGEST = re.compile("sha256:[0-9a-f]{64}|git-sha1:[0-9a-f]{40}")


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
        lock = os.fdopen(opened(folder / ".k2-download.lock", os.O_RDWR | os.O_CREAT), "r+")
    with lock:
        try:
            lock_file(lock)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise K2Error(f"{folder}: expected a file system with locks, found: {error.strerror}. Choose a --local-dir on another.") from None
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


def opened(path: Path, flags: int) -> int:
    """A file opened for this program's own use; a symlink in its place is refused, or its target would be written."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)  # Windows lacks the first, and needs the second


def put(path: Path, content: bytes):
    """Write a file in one step, through a new one beside it: whatever stood there, a symlink too, is replaced and not followed."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(opened(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def known_file(raw: dict) -> dict:
    """A finished file of a record, its types looked at. Raises ValueError, KeyError or TypeError."""
    found = {key: raw[key] for key in ("size", "digest", "mtime_ns", "source")}
    if type(found["size"]) is not int or type(found["mtime_ns"]) is not int or not isinstance(found["source"], str) or not DIGEST.fullmatch(found["digest"]):
        raise ValueError("a file of other types")
    return found


@dataclass
class Record:
    """What is known of a folder's finished files: {name: size, digest, time of writing, digest of the source}; and which
    files there are to be, {name: digest of the source}."""

    folder: Path
    repository: str
    commit: str
    part: Part
    files: dict[str, dict] = field(default_factory=dict)
    planned: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record that a download left in the folder, if any. Raises K2Error for one that nobody wrote."""
        if not (folder / RECORD).exists():
            return None
        raw = read_json_object(folder / RECORD)
        try:
            part = Part() if raw["part"] is None else Part.from_dict(raw["part"])
            files = {name: known_file(known) for name, known in raw["files"].items()}
            planned = dict(raw.get("planned", {}).items())
            if not REPOSITORY.fullmatch(raw["repository"]) or not re.fullmatch("[0-9a-f]{40}", raw["commit"]) or not all(isinstance(source, str) for source in planned.values()):
                raise ValueError("other types")
            record = cls(folder, raw["repository"], raw["commit"], part, files, planned)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise K2Error(f"{folder / RECORD}: expected the record of a download, found something else. Remove it and run the download again: what is right stays.") from None
        if not all(is_kept(name) for name in [*files, *planned]):
            raise K2Error(f"{folder / RECORD}: expected names of files in this folder, found others. Remove it and run the download again.")
        return record

    def write(self):
        """Put the record beside the files, in one step."""
        raw = {"repository": self.repository, "commit": self.commit, "part": None if self.part.whole() else self.part.to_dict(), "planned": self.planned, "files": dict(sorted(self.files.items()))}
        with writing(self.folder / RECORD):
            put(self.folder / RECORD, (json.dumps(raw, indent=1) + "\n").encode())

    def add(self, name: str, digest: str, source: str):
        """A file is finished."""
        status = (self.folder / name).stat()
        with self.lock:
            self.files[name] = {"size": status.st_size, "digest": digest, "mtime_ns": status.st_mtime_ns, "source": source}
            self.write()

    def command(self) -> str:
        """What to type to finish or to mend the folder."""
        return shlex.join(["python", "download_weights.py", self.repository, "--local-dir", str(self.folder), "--revision", self.commit, *self.part.flags().split()])

    def distrust(self, name: str):
        """A file is not what it was: it is ours to replace, and is not taken for whole before it was hashed again."""
        with self.lock:
            self.files[name]["mtime_ns"] = 0
            self.write()


def digest_of(path: Path, like: HubFile | None, size: int | None = None) -> str:
    """The hash of a file on the disk, or of its first bytes, of the hub's kind for that file."""
    hashes, left = Hashes(like), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (chunk := file.read(min(left, BLOCK))):
            hashes.update(chunk)
            left -= len(chunk)
    return hashes.digest()


def is_done(job: Job, record: Record) -> bool:
    """Whether the job's file is there and right. One of ours that is damaged is taken away at once, so that nothing loads
    it; one that is whole and of another commit stays until the new one takes its place; a stranger's is left alone, and
    refused."""
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
    if not ours and path.is_file() and (known["size"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
        return False
    record.distrust(job.name)
    path.unlink()
    return False


def arrived(part: Path, note: Path, identity: dict, job: Job) -> int:
    """How many bytes of a half-done file are a part of the file that is wanted now. A whole file is hashed in the end by
    the hub's value; of a part of a checkpoint only what still has its noted hash is taken."""
    try:
        noted = read_json_object(note)
    except K2Error:  # the note is missing, or half a note
        return 0
    if part.is_symlink() or not part.is_file() or part.stat().st_size > job.size or {key: noted.get(key) for key in identity} != identity:
        return 0
    size = part.stat().st_size if job.whole else noted.get("arrived")
    if type(size) is not int or not 0 <= size <= part.stat().st_size:
        return 0
    return size if job.whole or digest_of(part, None, size=size) == noted.get("digest") else 0


def fetch(hub: Hub, repository: Repository, job: Job, folder: Path, moved: Callable[[int], None]) -> str:
    """Make one file, going on where an earlier run ended; returns its digest. Raises K2Error, and leaves what arrived."""
    what, problem = f"{repository.name}: {job.source.name}", ""
    part, note = folder / f"{job.name}.part", folder / f"{job.name}.part.json"
    for _ in range(3):
        identity = job.identity(hub.etag(repository, job.source))
        with writing(part):
            if size := arrived(part, note, identity, job):
                os.truncate(part, size)
            else:
                part.unlink(missing_ok=True)
                put(note, json.dumps(identity).encode())
        try:
            found = filled_part(hub, what, hub.url(repository, job.source.name), job, part, identity, moved)
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


def filled_part(hub: Hub, what: str, url: str, job: Job, path: Path, identity: dict, moved: Callable[[int], None]) -> str:
    """Append to a .part what is missing, from the network; the digest of the whole, what was there already included."""
    hashes = Hashes(job.source if job.whole else None)

    def write_note():
        if not job.whole:
            file.flush()
            put(path.with_name(f"{path.name}.json"), json.dumps({**identity, "arrived": file.tell(), "digest": hashes.digest()}).encode())

    with writing(path), os.fdopen(opened(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        done = file.seek(0, os.SEEK_END)
        if done < len(job.head):
            file.truncate(0)
            file.seek(0)
            file.write(job.head)
            done = len(job.head)
        file.seek(0)
        while chunk := file.read(BLOCK):
            hashes.update(chunk)
        noted = time.monotonic()
        try:
            for begin, end in job.remaining(done - len(job.head)):
                for chunk in hub.stream(what, url, begin, end, job.source, identity["etag"]):
                    file.write(chunk)
                    hashes.update(chunk)
                    moved(len(chunk))
                    if time.monotonic() - noted >= NOTED:
                        write_note()
                        noted = time.monotonic()
        finally:
            write_note()
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
    planned = planned_names(download)
    files = {name: known for name, known in old.files.items() if name in planned or (folder / name).exists()} if old else {}  # what is gone on the hub and here is gone
    return Record(folder, download.repository.name, download.repository.commit, download.part, files, planned)


def planned_names(download: Download) -> dict[str, str]:
    """The files that a finished download has, and the digests of what they are made from."""
    return {**{job.name: job.source.digest for job in download.jobs}, **({INDEX: ""} if download.index is not None else {})}


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
    if absent := absent_shards(record):
        raise K2Error(f"{record.repository}: its index names {absent[0]}; expected all shards in its list of files, found {len(absent)} absent. What there is was fetched; this revision is incomplete: try another, or later.")
    if download.index is not None:
        path = record.folder / INDEX
        with writing(path):
            put(path, index_bytes(download.index))
        record.add(INDEX, digest_of(path, None), "")


def absent_shards(record: "Record") -> list[str]:
    """The shards that the folder's index names and that no download of this repository brings: its list of files lacked them."""
    path = record.folder / INDEX
    if not record.part.whole() or INDEX not in record.planned or not path.is_file():
        return []
    return sorted(set(parse_index(read_json_object(path), str(path)).values()) - record.planned.keys())


def verify(folder: Path, seen: Callable[[str], None]) -> tuple[list[str], str]:
    """Hash every file of a folder against its record; what is wrong or has not arrived, one line each, and the command
    that mends it: it fetches only those."""
    record = Record.read(folder)
    if record is None:
        raise K2Error(f"{folder / RECORD}: expected the record that a download leaves, found none. Run the download: it keeps what is right.")
    problems, damaged = [], []
    for name in sorted({*record.files, *record.planned}):
        seen(name)
        known = record.files.get(name)
        if line := problem_of(folder / name, known, record.planned.get(name)):
            problems.append(f"{name}: {line}")
            damaged += [name] if known and line != OTHER_COMMIT else []
    problems += [f"{name}: named by {INDEX}, and not in the list of files that the repository gave" for name in absent_shards(record)]
    for name in damaged:
        record.distrust(name)
    return problems, record.command()


OTHER_COMMIT = "of another commit than the one begun last"


def problem_of(path: Path, known: dict | None, source: str | None) -> str:
    """What is wrong with a file that is recorded as finished, as planned, or both; nothing if it is as it was fetched."""
    part = path.with_name(f"{path.name}.part")
    if not path.is_file():
        return f"missing; {part.stat().st_size:,} bytes of it are in {part.name}" if part.is_file() else "missing"
    if known is None:
        return "expected a recorded hash, found none"
    if path.stat().st_size != known["size"]:
        return f"expected {known['size']} bytes, found {path.stat().st_size}"
    if digest_of(path, HubFile(path.name, known["size"], known["digest"])) != known["digest"]:
        return f"expected {known['digest']}, found other bytes"
    return OTHER_COMMIT if source is not None and source != known["source"] else ""
