"""The real virsh and `virtmig-virsh` beside each other: both called alike, and on terminals of their own."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

REAL = shutil.which("virsh") or ""
virsh_needed = pytest.mark.skipif(not REAL, reason="virsh is not installed")
TEST = "-c test:///default"
Answer = subprocess.CompletedProcess[str]
ENVIRONMENT = {"LC_ALL": "C", "HOME": "/nonexistent", "PATH": os.environ["PATH"]}


def install_shim(folder: Path) -> Path:
    """A folder with a `virsh` that is ours, as pip installs it and a symbolic link names it."""
    script = folder / "virtmig-virsh"
    root = Path(__file__).parents[2]
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
        "from virtmig.integrations.virsh_shim import run\nif __name__ == '__main__':\n    sys.exit(run())\n"
    )
    script.chmod(0o755)
    (folder / "virsh").symlink_to("virtmig-virsh")
    return folder


def environment(shim: Path | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    path = ENVIRONMENT["PATH"] if shim is None else f"{shim}{os.pathsep}{ENVIRONMENT['PATH']}"
    return {**ENVIRONMENT, **(more or {}), "PATH": path}


def virsh(shim: Path | None, *words: str, stdin: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """The real virsh for None, else the one that is first in a PATH that begins with the shim's folder."""
    done = subprocess.run(
        ["virsh", *words],
        executable=REAL if shim is None else str(shim / "virsh"),
        env=environment(shim, more),
        stdin=subprocess.DEVNULL if stdin is None else None,
        input=None if stdin is None else stdin.encode(),
        capture_output=True,
        timeout=30,
        check=False,
    )
    return Answer(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def errors_of(text: str) -> list[str]:
    return re.findall(r"^error: (.*)$", text, re.MULTILINE)


def listening(pid: int) -> bool:
    """Whether a real virsh, the process `pid` or one below it, has begun to catch SIGINT."""
    with contextlib.suppress(OSError):
        if os.path.samefile(f"/proc/{pid}/exe", REAL):
            caught = re.findall(r"SigCgt:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
            return bool(int(caught[0], 16) & 1 << (signal.SIGINT - 1))
        return any(listening(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return False


class Terminal:
    """A program on a terminal of its own, in its foreground; what it shows is kept in `seen`."""

    def __init__(self, shim: Path | None, *words: str, program: str = "", **more: str) -> None:
        program = program or (REAL if shim is None else str(shim / "virsh"))
        given = environment(shim, {"TERM": "dumb", **more})
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            with contextlib.suppress(OSError):
                os.execve(program, [os.path.basename(program), *words], given)
            os._exit(99)
        self.seen = ""

    def expect(self, text: str, seconds: float = 20.0) -> None:
        """Read on until `text` was shown; what comes before is forgotten."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.file], [], [], max(until - time.monotonic(), 0))
            assert ready, f"{text!r} was not shown, but {self.seen!r}"
            try:
                got = os.read(self.file, 65536)
            except OSError:
                got = b""  # the last one closed it
            assert got, f"it ended before {text!r}: {self.seen!r}"
            self.seen += got.decode()
        self.seen = self.seen.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def wait(self) -> int:
        """Its status as subprocess has it; its output is read away until then."""
        with contextlib.suppress(OSError):
            while os.read(self.file, 65536):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.file)
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
