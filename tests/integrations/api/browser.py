"""Chromium without a window, over a pipe: the DevTools protocol with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One page. Every request, console error and violation of the page's policy is kept."""

    def __init__(self, *, width: int = 1000, height: int = 900) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._number = 0
        self._buffer = b""
        self._folder = tempfile.mkdtemp(prefix="vmc-")
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # Chromium reads its commands from 3 and writes to 4
        to_read, to_write = _high(to_read), _high(to_write)
        words = f"{CHROMIUM} {' '.join(_FLAGS)} --remote-debugging-pipe --user-data-dir={self._folder} about:blank"
        script = f"exec {words} 3<&{to_read} 4>&{to_write}"
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script], pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._session = ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = ""
            self.send("Browser.close", within_s=5.0)
        os.close(self._to)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(10)
        os.close(self._from)
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, method: str, *, within_s: float = 30.0, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + within_s
        while True:
            answer = self._next(deadline)
            assert answer is not None, f"{method} was not answered within {within_s:g} s"
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, deadline: float) -> dict[str, Any] | None:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._from, 1 << 16)
            assert data, "chromium has gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
        return message

    def resize(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=2 if phone else 1, mobile=phone)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Wait until it is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} did not come true; errors: {self.errors}"
            self._next(time.monotonic() + 0.05)
        return value

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        more = {"text": text} if text else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key if key != " " else "Space",
                  windowsVirtualKeyCode=code, **more)  # fmt: skip
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key if key != " " else "Space",
                  windowsVirtualKeyCode=code)  # fmt: skip

    def screenshot(self, path: Path) -> None:
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=False)["data"]
        path.write_bytes(base64.b64decode(data))


def _high(number: int) -> int:
    """The same descriptor with a number that the two above cannot collide with."""
    high = fcntl.fcntl(number, fcntl.F_DUPFD, 20)
    os.close(number)
    return high
