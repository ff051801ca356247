"""The hub: what a repository holds, and ranges of its files' bytes, through every failure that passes.

huggingface_hub answers for repositories, revisions, addresses and tokens. The bytes are moved here: a cut, a stall, a
busy or confused server is waited out and the request made again from where the bytes ended. Each wait is longer, and too
many in a row without progress are one clear line. Redirects are followed by hand, as the first answer has the hub's own
ETag, and whoever the second comes from must not get the token.
"""

import email.utils
import hashlib
import http.client
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors, utils

from .checkpoint import INDEX, RECORD, header_length, parse_header, parse_index
from .config import LARGEST_JSON, K2Config, K2Error, without_repeats
from .part import Layout, Part

BLOCK = 2**20  # bytes read at a time
PROGRESS = 2**20  # bytes after which a connection counts as one that works, and failures are counted anew
KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md", "LICENSE")  # no code, no pickles: nothing here runs them
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)  # owner/name
BUSY = (408, 429, 500, 502, 503, 504)


class HubFile(NamedTuple):
    """A file of a repository; its digest is "sha256:..." for a large one, and git's own "git-sha1:..." for a small one."""

    name: str
    size: int
    digest: str


class Repository(NamedTuple):
    """A repository at one commit: the files that are fetched, and the names of those that are not."""

    name: str
    commit: str
    files: dict[str, HubFile]
    left_out: list[str]


@dataclass(frozen=True)
class Patience:
    """How often a failure is tried again in a row, and how many seconds are waited before."""

    tries: int = 8
    first: float = 1.0
    longest: float = 60.0
    timeout: float = 30.0  # seconds without a byte after which a connection is given up

    def seconds(self, failures: int, asked: float | None) -> float:
        """The wait after so many failures in a row: what the server asked for, within reason, or twice as long each time."""
        return min(asked, 5 * self.longest) if asked is not None else min(self.first * 2 ** (failures - 1), self.longest)


class Passing(Exception):
    """A failure that may pass. `after` is how many seconds the server asked to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Changed(Exception):
    """The file on the hub is not the one that was begun."""


class Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C: this one ends where it is."""


class Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are followed by hand, since the first answer has the hub's ETag and the second must not get the token."""

    def http_error_302(self, *arguments):
        """None lets the redirect come back as an HTTPError, whatever its address looks like."""
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class Hashes:
    """The running hash of a file that arrives: the hub's kind, and SHA-256 where the hub has none."""

    def __init__(self, file: HubFile | None):
        self.kind = file.digest.partition(":")[0] if file else "sha256"
        self.hash = hashlib.sha1(usedforsecurity=False) if self.kind == "git-sha1" else hashlib.sha256()
        if self.kind == "git-sha1":
            self.hash.update(f"blob {file.size}\0".encode())

    def update(self, chunk: bytes):
        """Take the next bytes."""
        self.hash.update(chunk)

    def digest(self) -> str:
        """As HubFile writes it."""
        return f"{self.kind}:{self.hash.hexdigest()}"


def retry_after(headers) -> float | None:
    """Seconds that a busy server asks to wait: a number, or a date."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,6}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    except (ValueError, TypeError, OverflowError):
        return None


def joined(url: str, other: str) -> str:
    """The address that a page at `url` means by `other`; "" for what is none."""
    try:
        return urllib.parse.urljoin(url, other)
    except ValueError:
        return ""


def is_address(url: str) -> bool:
    """Whether a text is an address of the web, in the letters that a request may have."""
    try:
        found = urllib.parse.urlsplit(url)
        return found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, a host that is no address
        return False


def plain_etag(text: str | None) -> str | None:
    """An ETag without its quotes and without the mark of a weak one."""
    return text.removeprefix("W/").strip('"') if text else None


class Hub:
    """An endpoint of the hub. `received` counts the bytes of answers, all threads together; `stop` ends all of them."""

    def __init__(self, endpoint: str | None = None, token: str | None = None, patience: Patience | None = None):
        if constants.is_offline_mode():
            raise K2Error("HF_HUB_OFFLINE is set: expected a network to download from. Unset it; --verify works without.")
        utils.logging.set_verbosity_error()  # of what it tries again we hear in the end, in one line
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        if not is_address(self.endpoint):
            raise K2Error(f"HF_ENDPOINT: expected an address such as https://huggingface.co, found {self.endpoint[:200]!r}. Mend or unset it.")
        self.patience = patience or Patience()
        self.api = huggingface_hub.HfApi(endpoint=self.endpoint, token=token)
        self.headers = utils.build_hf_headers(token=token, library_name="k2")
        self.opener = urllib.request.build_opener(Stay)
        self.received, self.lock, self.stop, self.waited = 0, threading.Lock(), threading.Event(), False

    def rest(self, failures: int, asked: float | None, reason: object = ""):
        """Wait before the next try, the first time with a word to who looks on; raises Stopped when there is to be none."""
        with self.lock:
            first, self.waited = not self.waited, True
        if first and sys.stderr.isatty():
            print(f"\n{self.endpoint}: {str(reason)[:200]!r}; waiting to try again, {self.patience.tries} times at most", file=sys.stderr)
        if self.stop.wait(self.patience.seconds(failures, asked)):
            raise Stopped

    # ---- what is there ----

    def repository(self, name: str, revision: str = "main") -> Repository:
        """The files of a repository at a revision, pinned to its commit. Raises K2Error."""
        info = self.asked(name, revision, lambda: self.api.model_info(name, revision=revision, timeout=self.patience.timeout))
        if not (isinstance(info.id, str) and REPOSITORY.fullmatch(info.id) and isinstance(info.sha, str) and re.fullmatch("[0-9a-f]{40}", info.sha)):
            raise K2Error(f"{name}: expected a repository's name and a commit of 40 digits, found {str(info.id)[:80]!r} and {str(info.sha)[:80]!r}. Check HF_ENDPOINT.")
        files, left_out = {}, []
        for entry in self.tree(info.id, info.sha):
            path = entry.get("path") if isinstance(entry, dict) else None
            if not isinstance(path, str):
                raise K2Error(f"{name}: expected a list of files with their paths, found {str(entry)[:80]!r} in it. Check HF_ENDPOINT.")
            if entry.get("type") == "file" and is_kept(path):
                files[path] = hub_file(name, entry)
            else:
                left_out.append(path)
        if "config.json" not in files:
            raise K2Error(f"{name}: expected a model with config.json, found {', '.join(sorted(files)[:5]) or 'no file'}. Check the name of the repository.")
        return Repository(info.id, info.sha, files, left_out)

    def tree(self, name: str, commit: str) -> list:
        """The entries of a repository's top folder, page by page. A page may name the next one, and only here: the token
        goes along, which huggingface_hub's own paging would carry to any host that the page names."""
        url, entries = f"{self.endpoint}/api/models/{name}/tree/{commit}", []
        for _ in range(100):
            answer = self.asked(name, commit, lambda url=url: self.page(url))
            value = answer.json()
            if not isinstance(value, list):
                raise K2Error(f"{name}: expected a list of its files, found {type(value).__name__}. Check HF_ENDPOINT.")
            entries += value
            following = answer.links.get("next", {}).get("url")
            if not following:
                return entries
            url = joined(url, following)
            if not self.at_home(url):
                raise K2Error(f"{name}: the list of files goes on at {url[:200]!r}; expected a page of {self.endpoint}, as the token goes along. Check HF_ENDPOINT.")
        raise K2Error(f"{name}: expected a list of files that ends, found 100 pages. Check the repository.")

    def page(self, url: str):
        """One page of a list, its JSON looked at, or one of huggingface_hub's errors."""
        answer = utils.get_session().get(url, headers=self.headers, timeout=self.patience.timeout)
        utils.hf_raise_for_status(answer)
        answer.json()
        return answer

    def at_home(self, url: str) -> bool:
        """Whether an address is of the endpoint's own origin, the only one that may see the token."""
        return urllib.parse.urlsplit(url)[:2] == urllib.parse.urlsplit(self.endpoint)[:2]

    def asked(self, name: str, revision: str, call):
        """The answer of one of huggingface_hub's calls, its errors told in this project's lines, passing ones waited out."""
        for failures in range(1, self.patience.tries + 1):
            try:
                return call()
            except errors.HFValidationError as error:
                raise K2Error(f"{name}: expected the name of a repository, such as moonshotai/Kimi-K2-Instruct, found: {str(error).splitlines()[0]}") from None
            except errors.RevisionNotFoundError:
                raise K2Error(f"{name}: expected a revision {revision}, found none. Name a branch, a tag or a commit of it.") from None
            except errors.HTTPError as error:
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                if status is not None and status not in BUSY:
                    raise self.refusal(name, status) from None
                reason, after = next(iter(str(error).splitlines()), type(error).__name__), retry_after(response.headers) if status else None
            except (OSError, ValueError) as error:
                reason, after = next(iter(str(error).splitlines()), type(error).__name__), None
            except (KeyError, TypeError, AttributeError):  # how huggingface_hub says that JSON is not of the kind it knows
                raise K2Error(f"{self.endpoint}: expected the hub's answer about {name}, found JSON of another kind. Check HF_ENDPOINT.") from None
            if failures < self.patience.tries:
                self.rest(failures, after, reason)
        raise K2Error(f"{self.endpoint}: expected an answer about {name}, found {self.patience.tries} times: {reason}. Check the network and HF_ENDPOINT, then run the same command again.")

    def refusal(self, what: str, status: int) -> K2Error:
        """The line for an answer that no waiting changes."""
        if status in (401, 403):
            return K2Error(f"{what}: the hub says {status}, so it is gated, private or not there. Accept its terms at {self.endpoint}/{what.split(':')[0]} and set HF_TOKEN to a token of that account, or check the name.")
        if status == 404:
            return K2Error(f"{what}: the hub says 404, there is no such thing. Check the name and the revision.")
        return K2Error(f"{what}: the hub says {status}; expected the file or a redirect to it. Run the same command again later.")

    def url(self, repository: Repository, name: str) -> str:
        """The address of a file at the repository's commit."""
        return huggingface_hub.hf_hub_url(repository.name, name, revision=repository.commit, endpoint=self.endpoint)

    def etag(self, repository: Repository, file: HubFile) -> str:
        """The hub's ETag of a file. Raises K2Error if its size there is not the one that the list of files has."""
        what, url = f"{repository.name}: {file.name}", self.url(repository, file.name)
        found = self.asked(what, repository.commit, lambda: huggingface_hub.get_hf_file_metadata(url, token=self.api.token, timeout=self.patience.timeout, endpoint=self.endpoint))
        if found.size is not None and found.size != file.size:
            raise K2Error(f"{what}: expected {file.size} bytes as the hub lists it, found {found.size}. Run the same command again later.")
        return found.etag or file.digest

    # ---- bytes ----

    def open(self, url: str, begin: int, end: int):
        """The answer to one request for a range, and the hub's ETag of the file if it said one."""
        etag, headers, redirected = None, {**self.headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}, False
        for _ in range(6):
            at_home = self.at_home(url)
            request = urllib.request.Request(url, headers={name: text for name, text in headers.items() if at_home or name != "authorization"})
            try:
                answer = self.opener.open(request, timeout=self.patience.timeout)
                return answer, etag or plain_etag(answer.headers.get("X-Linked-Etag") or (None if redirected else answer.headers.get("ETag")))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in (301, 302, 303, 307, 308):
                        raise
                    etag, redirected = etag or plain_etag(error.headers.get("X-Linked-Etag")), True
                    url = self.next_url(url, error.headers.get("Location") or "")
        raise Passing("a redirect to a redirect, and so on")

    def next_url(self, url: str, location: str) -> str:
        """Where a redirect points; only to the web, and never from encrypted to open."""
        found = joined(url, location)
        if not location or not is_address(found) or (url.startswith("https://") and not found.startswith("https://")):
            raise K2Error(f"{url}: redirected to {found[:200]!r}; expected another https address. Check HF_ENDPOINT.")
        return found

    def once(self, what: str, url: str, begin: int, end: int, file: HubFile, etag: str | None):
        """Yield what one request for bytes `begin` to `end` brings, or raise Passing, Changed or K2Error."""
        try:
            answer, found = self.open(url, begin, end)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                raise Changed("the hub says 416, the range is not in the file") from None
            if error.code not in BUSY:
                raise self.refusal(what, error.code) from None
            raise Passing(f"the hub says {error.code}", retry_after(error.headers)) from None
        with answer:
            if etag and found and found != etag:
                raise Changed(f"its ETag was {etag} and is {found}")
            skip = begin - self.first_byte(what, answer, begin, end, file)
            while chunk := answer.read1(BLOCK):
                if self.stop.is_set():
                    raise Stopped
                with self.lock:
                    self.received += len(chunk)
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def first_byte(self, what: str, answer, begin: int, end: int, file: HubFile) -> int:
        """Where in the file an answer's body begins. A server that ignores Range sends it from 0."""
        if answer.status == 206:
            expected = f"bytes {begin}-{end - 1}/{file.size}"
            if answer.headers.get("Content-Range") != expected:
                raise Passing(f"asked for {expected}, the answer is {answer.headers.get('Content-Range')}")
            return begin
        if end != file.size:
            raise K2Error(f"{what}: the server ignores Range, so that a part of the file cannot be had from it. Use another HF_ENDPOINT, or download the whole.")
        if answer.headers.get("Content-Length") not in (None, str(file.size)):
            raise Passing(f"expected {file.size} bytes, the answer has {answer.headers.get('Content-Length')}")
        return 0

    def stream(self, what: str, url: str, begin: int, end: int, file: HubFile, etag: str | None = None):
        """Yield bytes `begin` to `end` of a file, through every failure that passes. Raises Changed or K2Error."""
        position, working, failures = begin, begin, 0
        while position < end:
            try:
                for chunk in self.once(what, url, position, end, file, etag):
                    chunk = chunk[: end - position]
                    position += len(chunk)
                    yield chunk
                    if position == end:
                        return  # a server may go on for ever
                if position < end:
                    raise Passing(f"the connection ended at {position} of {end}")
            except (Passing, OSError, http.client.HTTPException) as error:
                failures = 1 if position - working >= PROGRESS else failures + 1
                working = position if failures == 1 else working
                if failures >= self.patience.tries:
                    raise K2Error(f"{what}: {failures} failures in a row, the last: {error or type(error).__name__}. What has arrived is kept: run the same command again.") from None
                self.rest(failures, getattr(error, "after", None), error)

    def small(self, repository: Repository, name: str) -> bytes:
        """A whole small file in memory, its hash checked."""
        file = repository.files.get(name)
        if file is None or file.size > LARGEST_JSON:
            raise K2Error(f"{repository.name}: expected {name} of at most {LARGEST_JSON} bytes, found {'none' if file is None else file.size}. Check the repository.")
        for _ in range(3):
            try:
                raw = b"".join(self.stream(f"{repository.name}: {name}", self.url(repository, name), 0, file.size, file))
            except Changed:
                continue
            hashes = Hashes(file)
            hashes.update(raw)
            if hashes.digest() == file.digest:
                return raw
        raise K2Error(f"{repository.name}: {name}: expected {file.digest}, found another hash three times. Check the network, or use another HF_ENDPOINT.")

    def json(self, repository: Repository, name: str) -> dict:
        """A JSON object of the repository."""
        try:
            value = json.loads(self.small(repository, name), object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise K2Error(f"{repository.name}: {name}: expected JSON, found: {error}. Check the repository.") from None
        if not isinstance(value, dict):
            raise K2Error(f"{repository.name}: {name}: expected a JSON object, found {type(value).__name__}. Check the repository.")
        return value

    def header(self, repository: Repository, name: str) -> tuple[dict, int]:
        """A shard's header, and where its tensors begin, by two small ranges."""
        what = f"{repository.name}: {name}"
        if name not in repository.files:
            raise K2Error(f"{what}: the index names this shard, and the repository has no such file. Check the repository.")
        file, url = repository.files[name], self.url(repository, name)
        try:
            first = b"".join(self.stream(what, url, 0, min(8, file.size), file))
            length = header_length(first, file.size, what)
            return parse_header(b"".join(self.stream(what, url, 8, 8 + length, file)), file.size, what), 8 + length
        except Changed as error:
            raise K2Error(f"{what}: {error}. Run the same command again later.") from None


def hub_file(where: str, entry: dict) -> HubFile:
    """A file of the hub's list, its types looked at. Raises K2Error."""
    size, lfs, oid = entry.get("size"), entry.get("lfs"), entry.get("oid")
    large = lfs is not None
    oid = lfs.get("oid") if isinstance(lfs, dict) else None if large else oid
    if type(size) is not int or size < 0 or not isinstance(oid, str) or not re.fullmatch("[0-9a-f]{64}" if large else "[0-9a-f]{40}", oid):
        raise K2Error(f"{where}: {entry['path']}: expected a size and a hash, found {str(size)[:40]!r} and {str(oid)[:80]!r}. Check HF_ENDPOINT.")
    return HubFile(entry["path"], size, f"sha256:{oid}" if large else f"git-sha1:{oid}")


def is_kept(name: str) -> bool:
    """Whether a file of a repository is fetched: one of the top folder, of a known kind, under a plain name that is not ours."""
    plain = re.fullmatch(r"[\w-][\w.-]{0,200}", name) and not name.lower().endswith((".part", ".part.json")) and name.lower() != RECORD
    return bool(plain) and name.endswith(KEPT)


def layout_of(hub: Hub, repository: Repository, part: Part, workers: int = 8) -> tuple[Layout, dict[str, int]]:
    """What a repository's checkpoint holds of a part, by its config, its index and the headers of the shards needed; and
    where in each shard the tensors begin."""
    config = K2Config.from_dict(hub.json(repository, "config.json"), f"{repository.name}: config.json")
    part.check(config)
    index = parse_index(hub.json(repository, INDEX), f"{repository.name}: {INDEX}")
    weight_map = {name: file for name, file in index.items() if part.takes(name)}
    files = sorted(set(weight_map.values()))
    with ThreadPoolExecutor(workers) as pool:
        headers = dict(zip(files, pool.map(lambda file: hub.header(repository, file), files)))
    chosen = {file: {name: entry for name, entry in header.items() if part.takes(name)} for file, (header, _) in headers.items()}
    layout = Layout(config, weight_map, chosen)
    return layout, {file: start for file, (_, start) in headers.items()}
