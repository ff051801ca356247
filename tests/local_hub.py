"""A hub of one repository on 127.0.0.1, which speaks the real one's endpoints and misbehaves as it is told.

    GET  /api/models/REPO/revision/REV      what the repository is, and its commit
    GET  /api/models/REPO/tree/COMMIT       its files, their sizes and hashes
    HEAD, GET /REPO/resolve/COMMIT/FILE     small files; for large ones a redirect to
    GET  /cdn/FILE                          the bytes, by Range, under an ETag of its own

`faults[FILE]` is a list of functions; each request for the file's bytes takes the first and lets it answer.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REPO, COMMIT = "made/k2", "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """Serves a folder's files until it is closed; `digests` spares it to hash what is too large."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, folder: Path, digests: dict[str, str] | None = None, limit: int = 20_000):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.digests, self.left, self.commit = Path(folder), dict(digests or {}), limit, COMMIT
        self.faults: dict[str, list] = {}
        self.token, self.revisions, self.extra = None, {"main"}, []
        self.requests: list[tuple[str, str, str | None, str | None]] = []  # method, path, Range, Authorization
        self.sent, self.lock = 0, threading.Lock()
        self.opened = threading.Event()  # what `gate` waits for
        self.arrived = threading.Event()  # set when a request is at the gate
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage(self) -> str:
        """Where large files lie: the same server under another host's name."""
        return f"http://localhost:{self.server_address[1]}"

    def large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".model"))

    def digest(self, name: str) -> str:
        """SHA-256 of a large file, git's hash of a small one."""
        if name not in self.digests:
            raw = (self.folder / name).read_bytes()
            self.digests[name] = hashlib.sha256(raw).hexdigest() if self.large(name) else hashlib.sha1(f"blob {len(raw)}\0".encode() + raw).hexdigest()
        return self.digests[name]

    def tree(self) -> list[dict]:
        found = []
        for path in sorted(self.folder.iterdir()):
            size, digest = path.stat().st_size, self.digest(path.name)
            large = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if self.large(path.name) else {}
            found.append({"type": "file", "path": path.name, "size": size, "oid": "f" * 40 if large else digest, **large})
        return [*found, *self.extra]

    def handle_error(self, request, client_address):
        """A client that hangs up is a part of these tests."""

    def close(self):
        self.opened.set()
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    server: LocalHub

    def log_message(self, *arguments):
        """Silence."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, urlsplit(self.path).path
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
            hub.left -= 1
        if hub.left < 0:
            return self.plain(500, b"too many requests for a test")
        if found := re.fullmatch(r"/cdn/([\w.-]+)", path):
            return self.file(found[1])
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.plain(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if hub.faults.get(path):
            return hub.faults[path].pop(0)(self, path, 0, 0)
        if found := re.fullmatch(rf"/api/models/{REPO}(/revision/(.+))?", path):
            known = not found[2] or found[2] in hub.revisions | {hub.commit}
            return self.json({"id": REPO, "sha": hub.commit, "siblings": []}) if known else self.plain(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path == f"/api/models/{REPO}/tree/{hub.commit}":
            return self.json(hub.tree())
        if (found := re.fullmatch(rf"/{REPO}/resolve/{hub.commit}/([\w.-]+)", path)) and (hub.folder / found[1]).is_file():
            return self.resolve(found[1])
        return self.plain(404, b"", {"X-Error-Code": "RepoNotFound" if REPO not in path else "EntryNotFound"})

    def resolve(self, name: str):
        hub, size = self.server, (self.server.folder / name).stat().st_size
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hub.digest(name)}"'}
        if hub.large(name):
            headers |= {"X-Linked-Etag": f'"{hub.digest(name)}"', "X-Linked-Size": str(size), "Location": f"{hub.storage}/cdn/{name}"}
            return self.plain(302, b"", headers)
        if self.command == "HEAD":
            self.head(200, {**headers, "Content-Length": str(size)})
        else:
            self.file(name, headers)

    def file(self, name: str, headers=None):
        """Bytes of a file by Range, or what its next fault makes of the request."""
        size = (self.server.folder / name).stat().st_size
        begin, end = 0, size
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        with self.server.lock:
            fault = self.server.faults[name].pop(0) if self.server.faults.get(name) else ranged
        fault(self, name, begin, end, headers or {"ETag": '"the-cdn-has-its-own"'})

    # ---- ways to answer ----

    def head(self, status: int, headers: dict):
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key, text)
        self.end_headers()

    def plain(self, status: int, body: bytes, headers=None):
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.plain(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def body(self, name: str, begin: int, end: int, change=lambda chunk, at: chunk):
        """Bytes of a file, changed on the way, counted."""
        with open(self.server.folder / name, "rb") as file:
            file.seek(begin)
            while begin < end:
                chunk = file.read(min(2**20, end - begin))
                with self.server.lock:  # before, so that whoever has the bytes finds them counted
                    self.server.sent += len(chunk)
                self.wfile.write(change(chunk, begin))
                begin += len(chunk)

    def reset(self):
        """End the connection as a broken cable does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def ranged(answer, name, begin, end, headers, **changes):
    """As the real one does."""
    size = (answer.server.folder / name).stat().st_size
    if answer.headers.get("Range") and begin >= end:
        return answer.plain(416, b"", {"Content-Range": f"bytes */{size}"})
    partial = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if answer.headers.get("Range") else {}
    answer.head(206 if partial else 200, {"Content-Length": str(end - begin), **partial, **headers})
    answer.body(name, begin, end, **changes)


def announced(answer, name, begin, end, headers):
    size = (answer.server.folder / name).stat().st_size
    answer.head(206, {"Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{size}", **headers})


# ---- ways to misbehave ----


def cut(share: float):
    """The connection is reset after a share of what was asked for."""

    def fault(answer, name, begin, end, headers):
        announced(answer, name, begin, end, headers)
        answer.body(name, begin, begin + int((end - begin) * share))
        answer.reset()

    return fault


def short(share: float):
    """The answer ends in good order before all of it came."""

    def fault(answer, name, begin, end, headers):
        announced(answer, name, begin, end, headers)
        answer.body(name, begin, begin + int((end - begin) * share))
        answer.wfile.flush()
        answer.close_connection = True

    return fault


def endless(answer, name, begin, end, headers):
    """All that was asked for, and then more and more of it."""
    size = (answer.server.folder / name).stat().st_size
    answer.head(206, {"Content-Range": f"bytes {begin}-{end - 1}/{size}", "Connection": "close", **headers})
    try:
        while not answer.server.opened.is_set():
            answer.body(name, begin, end)
    except OSError:
        answer.server.arrived.set()  # the client has had enough


def brief(answer, name, begin, end, headers):
    """The answer has less than was asked for, and says so in its length."""
    size = (answer.server.folder / name).stat().st_size
    middle = (begin + end) // 2
    answer.head(206, {"Content-Length": str(middle - begin), "Content-Range": f"bytes {begin}-{end - 1}/{size}", **headers})
    answer.body(name, begin, middle)


def stall(share: float):
    """Nothing more comes, and the line stays open."""

    def fault(answer, name, begin, end, headers):
        announced(answer, name, begin, end, headers)
        answer.body(name, begin, begin + int((end - begin) * share))
        answer.wfile.flush()
        answer.server.opened.wait(10)

    return fault


def gate(share: float):
    """A part comes, then nothing until the test opens the gate; says when it is there."""

    def fault(answer, name, begin, end, headers):
        middle = begin + int((end - begin) * share)
        announced(answer, name, begin, end, headers)
        answer.body(name, begin, middle)
        answer.wfile.flush()
        answer.server.arrived.set()
        answer.server.opened.wait(20)
        answer.body(name, middle, end)

    return fault


def flip(at: int):
    """One bit of the file is another."""

    def change(chunk, begin):
        if begin <= at < begin + len(chunk):
            chunk = bytearray(chunk)
            chunk[at - begin] ^= 1
        return chunk

    return lambda answer, name, begin, end, headers: ranged(answer, name, begin, end, headers, change=change)


def status(code: int, **extra):
    """An error, with headers."""
    return lambda answer, *rest: answer.plain(code, b"no", {key.replace("_", "-"): text for key, text in extra.items()})


def whole(answer, name, begin, end, headers):
    """Range is ignored."""
    size = (answer.server.folder / name).stat().st_size
    answer.head(200, {"Content-Length": str(size), **headers})
    answer.body(name, 0, size)


def shifted(answer, name, begin, end, headers):
    """The bytes one further, under the range that was asked for."""
    announced(answer, name, begin, end, headers)
    answer.body(name, min(begin + 1, end - 1), end)
    answer.wfile.write(b"\0")


def other_range(answer, name, begin, end, headers):
    """Another range, and it says so."""
    size = (answer.server.folder / name).stat().st_size
    answer.head(206, {"Content-Length": "1", "Content-Range": f"bytes 0-0/{size}", **headers})
    answer.body(name, 0, 1)


def page(answer, *rest):
    """A page of a login wall in the place of the data."""
    answer.plain(200, b"<html>log in</html>", {"Content-Type": "text/html"})


def away(location: str):
    """A redirect to somewhere."""
    return lambda answer, *rest: answer.plain(302, b"", {"Location": location})


def garbage(answer, *rest):
    """No HTTP at all."""
    answer.wfile.write(b"\x00\x01\x02 what?\r\n\r\n")
    answer.close_connection = True
