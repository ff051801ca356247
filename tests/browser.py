"""Chromium without a window, driven over a pipe by its DevTools protocol: no package, no port, no network."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. `errors` are the exceptions of its scripts, `requests` the addresses that it asked for."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="k2-browser-")
        (child_in, self.out), (self.come, child_out) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{child_in} 4>&{child_out}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run", f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", command, CHROMIUM, *flags], pass_fds=(child_in, child_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        self.received, self.count, self.errors, self.requests, self.session = b"", 0, [], [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.come)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method: str, **parameters) -> dict:
        """One command and its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self) -> dict:
        """The next message; what a page did wrong is noted."""
        while b"\0" not in self.received:
            assert select.select([self.come], [], [], 60)[0], "the browser has been silent for a minute"
            piece = os.read(self.come, 2**20)
            assert piece, "the browser ended"
            self.received += piece
        raw, _, self.received = self.received.partition(b"\0")
        message = json.loads(raw)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, path: Path, width: int = 1000, height: int = 900, dark: bool = False):
        """Load a file, in a window of this size and this theme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        address, end = path.resolve().as_uri(), time.monotonic() + 60
        self.send("Page.navigate", url=address)
        while not self.run(f"location.href === {json.dumps(address)} && document.readyState === 'complete'"):
            assert time.monotonic() < end, f"{address} does not load"

    def run(self, script: str):
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str):
        """A key, pressed and released. Its code number is all that the page's own keys need."""
        number = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key if key != " " else "Space", windowsVirtualKeyCode=number, **({"text": text} if text and kind == "keyDown" else {}))

    def picture(self, path: Path, whole: bool = True):
        """The page as a PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": self.box()} if whole else {}))["data"]
        path.write_bytes(base64.b64decode(data))

    def box(self) -> dict:
        """All of the page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
