"""Processes by pid and start time, so that a recycled pid is never taken for the old one; waiting with a deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from virtmig.errors import LabError


class Process(msgspec.Struct, frozen=True):
    """`started` is field 22 of /proc/PID/stat, in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, _start_time(pid) or 0)

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.started

    def signal(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL when it has not ended in time."""
        self.signal(signal.SIGTERM)
        try:
            await_true(lambda: not self.alive, seconds, f"the end of process {self.pid}")
        except LabError:
            self.signal(signal.SIGKILL)
            await_true(lambda: not self.alive, 5.0, f"the end of process {self.pid}")


def _start_time(pid: int) -> int | None:
    """None when there is no such process, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def await_true(condition: Callable[[], object], seconds: float, what: str, log: Path | None = None) -> None:
    """Poll until `condition` holds. Raises LabError that names `what` and ends with the log's tail."""
    deadline = time.monotonic() + seconds
    pause = 0.005
    while not condition():
        if time.monotonic() > deadline:
            tail = ""
            if log is not None and log.exists():
                tail = ": " + " / ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
            raise LabError(f"{what} did not come within {seconds:g} s{tail}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
