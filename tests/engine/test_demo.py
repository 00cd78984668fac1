"""The demo without a hypervisor: there and back, with all that the kernel gives and with less; nothing is left."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from virtmig.engine import demo as demo_module
from virtmig.engine.dirty import PAGEMAP_SCAN, tracking_available
from virtmig.engine.userfault import SYSCALL_NUMBERS, USERFAULTFD_IOC_NEW

COMMAND = [sys.executable, "-m", "virtmig.engine.demo", "--memory", "8", "--rate", "16", "--channels", "2"]
TOP = Path(__file__).resolve().parents[2]
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
IOCTL = 16  # of x86-64

_facts = tracking_available()
complete = pytest.mark.skipif(not _facts.available, reason=f"writes cannot be tracked: {_facts.reason}")
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter has the system calls of x86-64")


def refuse(*refused: tuple[int, int | None, int]) -> Callable[[], None]:
    """For a child to run: (system call, its second argument or None for any, errno) is refused from then on."""
    code = []
    for number, argument, error in refused:
        code.append((0x20, 0, 0, 0))  # seccomp_data.nr
        code.append((0x15, 0, 1 if argument is None else 3, number))
        if argument is not None:
            code += [(0x20, 0, 0, 24), (0x15, 0, 1, argument)]  # the low half of args[1]
        code.append((0x06, 0, 0, 0x00050000 | error))
    code.append((0x06, 0, 0, 0x7FFF0000))
    program = b"".join(struct.pack("=HBBI", *each) for each in code)
    libc = ctypes.CDLL(None, use_errno=True)

    def install() -> None:
        buffer = ctypes.create_string_buffer(program)
        header = struct.pack("@HP", len(code), ctypes.addressof(buffer))
        if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, header, 0, 0):
            raise OSError(ctypes.get_errno(), "no filter")

    return install


def run(tmp_path: Path, preexec: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        COMMAND, cwd=TOP, env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, preexec_fn=preexec,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []
    return result


def processes_in(folder: Path) -> list[str]:
    """The demo's processes: all of them inherited its TMPDIR."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}".encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.parent.name)
        except OSError:
            continue
    return found


def went_well(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].startswith("virtmig demo without a hypervisor: ")
    assert "`./dev demo`" in lines[0]
    assert lines[-1].startswith("the guest went there and back: it ran on engine A")
    assert lines[-1].endswith("nothing is left running.")
    assert len([line for line in lines if "8 MiB checked word for word, all as it must be" in line]) == 2
    assert len([line for line in lines if re.match(r"  downtime: \d+ ms", line)]) == 2
    return lines


@complete
def test_there_by_precopy_and_back_by_postcopy(tmp_path: Path) -> None:
    lines = went_well(run(tmp_path))
    assert "engine A -> engine B: precopy over 2 multifd channels" in lines
    back = "one pass of precopy over 2 multifd channels, then postcopy with a preempt channel"
    assert f"engine B -> engine A: {back}" in lines
    assert any(line.startswith("  pass 1: 8.00 MiB at ") for line in lines)
    assert any(re.match(r"  faults: [1-9]", line) for line in lines)


@complete
@x86_64
def test_without_write_tracking_postcopy_takes_all_of_it(tmp_path: Path) -> None:
    lines = went_well(run(tmp_path, refuse((IOCTL, PAGEMAP_SCAN, errno.ENOTTY))))
    assert any(line.startswith("  no live precopy: ") for line in lines)
    assert "engine A -> engine B: the guest is paused, moved over 2 multifd channels, and resumed" in lines
    assert "engine B -> engine A: postcopy from the first byte, with a preempt channel" in lines
    assert any(re.match(r"  faults: \d+, [1-9]\d* pages asked for", line) for line in lines)


@x86_64
def test_without_userfaultfd_the_guest_is_paused_on_its_way(tmp_path: Path) -> None:
    refused = [(SYSCALL_NUMBERS["x86_64"], None, errno.EPERM), (IOCTL, USERFAULTFD_IOC_NEW, errno.EPERM)]
    lines = went_well(run(tmp_path, refuse(*refused)))
    assert any(line.startswith("  no live precopy, no postcopy: userfaultfd is not permitted") for line in lines)
    for way in ("A -> engine B", "B -> engine A"):
        assert f"engine {way}: the guest is paused, moved over 2 multifd channels, and resumed" in lines
    assert not any("faults:" in line for line in lines)


@pytest.mark.parametrize(
    ("number", "marker"),
    [
        (signal.SIGTERM, "virtmig demo"),
        (signal.SIGINT, "  up in"),
        (signal.SIGTERM, "engine A"),
        (signal.SIGHUP, "  downtime"),
        (signal.SIGINT, "engine B"),
    ],
)
def test_a_signal_ends_all_of_it(number: signal.Signals, marker: str, tmp_path: Path) -> None:
    command = [*COMMAND, "--memory", "32"]
    with subprocess.Popen(
        command, cwd=TOP, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith(marker):
                process.send_signal(number)
                break
        process.stdout.read()
        trouble = process.stderr.read()
        assert process.wait(30) == 128 + number
    assert trouble == (f"stopped by {number.name}; the guest and both engines have ended, nothing is left running\n")
    assert processes_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_dies_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        COMMAND, cwd=TOP, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if found := re.match(r"  up in .*guest \(pid (\d+)\)", line):
                engine = int(Path(f"/proc/{found[1]}/stat").read_text().rpartition(")")[2].split()[1])
                os.kill(engine, signal.SIGKILL)
                break
        process.stdout.read()
        trouble = process.stderr.read()
        assert process.wait(30) == 1
    assert trouble.startswith("error: ")
    assert trouble.endswith("nothing is left running\n")
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--memory", "0"], ["--rate", "0"], ["--channels", "256"], ["--channels", "-1"]])
def test_numbers_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo_module.demo(arguments)
    assert caught.value.code == 2
    assert "0 to 255 channels" in capsys.readouterr().err


@pytest.mark.parametrize("here", [True, False])
def test_the_first_line_says_what_is_missing(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module.shutil, "which", lambda name: f"/usr/bin/{name}" if here else None)
    monkeypatch.setattr(demo_module.os, "access", lambda path, mode: here)
    monkeypatch.setattr(demo_module.importlib.util, "find_spec", lambda name: name if here else None)
    line = demo_module.first_line()
    assert ("no QEMU, no libvirt, no libvirt's Python binding here" in line) is not here
    assert ("QEMU and libvirt are not used" in line) is here
    assert ("./dev setup" in line) is not here
