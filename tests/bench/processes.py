"""The processes of a benchmark: an engine's side, a QEMU whose memory is filled from outside, and what they cost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.workloads import Pattern
from tests.support.emulators import LabQemu
from tests.support.proxy import free_port
from tests.support.recorder import Emulator
from virtmig.lab.guest import GuestSettings

TOP = Path(__file__).parents[2]
#: QEMU's `max-bandwidth` for none at all: 1 TiB/s
UNLIMITED = 1 << 40
_SAMPLE_S = 0.05
RAM = "m0"


class SideFailed(Exception):
    """An engine's side said what went wrong."""


class Side:
    """`python -m tests.bench.side`, asked line by line."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.side"],
            cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises SideFailed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it has ended"}
        if "error" in answer:
            raise SideFailed(f"{do}: {answer['error']}")
        return answer

    def fill(self, pattern: Pattern, fd: int) -> None:
        """The side's memory file, which is its guest's RAM."""
        _fill(pattern, f"/proc/{self.pid}/fd/{fd}", 0)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def qemu(
    emulator: Emulator,
    mib: int,
    name: str,
    *more: str,
    capabilities: Sequence[str] = (),
    parameters: Mapping[str, int | str] | None = None,
    touched: bool = False,
    shared: bool = True,
    boot: bytes | None = None,
    guest: GuestSettings | None = None,
) -> Iterator[LabQemu]:
    """A QEMU with `mib` of RAM in a memory file (`shared`) that is `touched` beforehand, in a folder of its own."""
    kind = "memory-backend-memfd,share=on" if shared else "memory-backend-ram"
    memory = f"{kind},id={RAM},size={mib}M,prealloc={'on' if touched else 'off'}"
    with emulator.folder() as folder:
        if boot is not None:
            (folder[0] / "boot.img").write_bytes(boot)
        made = LabQemu(
            emulator, folder, "-object", memory, *more, name=name, settings=guest or GuestSettings(memory_mib=64),
            machine=f"pc,memory-backend={RAM}", memory_kib=mib << 10,
        )  # fmt: skip
        made.folder = folder  # type: ignore[attr-defined]
        with made:
            made.set_capabilities([*capabilities, "events"])
            made.set_parameters({"max-bandwidth": UNLIMITED, **(parameters or {})})
            yield made


def fill_qemu(machine: LabQemu, pattern: Pattern, first_byte: int = 0) -> None:
    fill_process(machine.process.pid, pattern, first_byte)


def fill_process(pid: int, pattern: Pattern, first_byte: int = 0) -> None:
    """A QEMU's RAM, through the memory file that the process holds."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("/memfd:") and os.stat(path).st_size == pattern.length:
                _fill(pattern, path, first_byte)
                return
    raise SideFailed(f"process {pid} has no memory file of {pattern.length} bytes")


def listen(machine: LabQemu) -> str:
    address = f"tcp:127.0.0.1:{free_port()}"
    machine.qmp.execute("migrate-incoming", uri=address)
    return address


def _fill(pattern: Pattern, path: str, first_byte: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        pattern.fill(fd, first_byte)
    finally:
        os.close(fd)


def cpu_s(pid: int) -> float:
    """User and system time of all its threads, also of those that have ended; 0 when it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED of a process, see clock_getcpuclockid
    except OSError:
        return 0.0


def private_kib(pid: int) -> int:
    """RssAnon: memory that is not the guest's RAM."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


class Meter:
    """CPU time and peak memory of some processes by name, while the block runs."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self._end = threading.Event()
        self._peaks = {name: private_kib(pid) for name, pid in pids.items()}
        self.begin_kib = dict(self._peaks)
        self._cpu = {name: cpu_s(pid) for name, pid in pids.items()}
        self._thread = threading.Thread(target=self._sample, name="meter", daemon=True)
        self._thread.start()
        self.began = time.monotonic()

    def stop(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, pid in self._pids.items():
            found[f"cpu_{name}_s"] = cpu_s(pid) - self._cpu[name]
        self._end.set()
        self._thread.join()
        for name, pid in self._pids.items():
            found[f"peak_{name}_mib"] = max(self._peaks[name], private_kib(pid)) / 1024
            found[f"grown_{name}_mib"] = found[f"peak_{name}_mib"] - self.begin_kib[name] / 1024
        return found

    def _sample(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            for name, pid in self._pids.items():
                self._peaks[name] = max(self._peaks[name], private_kib(pid))
