"""Recording never hurts: a disk that hangs, one that is full for a while, a process that is killed, a reused pid."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.report.test_records import NOTHING, curve, outcome, recorded
from tests.support.hosts import ask, plan
from virtmig.progress import Phase
from virtmig.report import records
from virtmig.report.recorder import PATIENCE_S, Recorder
from virtmig.report.records import SUFFIX, Said, alive, find_record, forget_old, read_record, start_ticks
from virtmig.watchers import MOST_WAITING

AT_ONCE_S = 5.0


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", *options, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe that takes nothing more and blocks whoever writes."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b" " * 4096)
    os.set_blocking(writing, True)
    return reading, writing


def drain(reading: int, seconds: float = 0) -> bytes:
    found = b""
    while select.select([reading], [], [], seconds)[0] and (more := os.read(reading, 1 << 16)):
        found += more
    return found


def test_a_disk_that_hangs_costs_nothing_but_samples(tmp_path: Path) -> None:
    said: list[str] = []
    recorder = Recorder(tmp_path, warn=said.append)
    recorder.begin(ask("live"), plan(ask("live")))
    assert recorder.flush()
    reading, writing = full_pipe()
    os.dup2(writing, recorder._fd)
    os.close(writing)
    threads = threading.active_count()
    began = time.monotonic()
    for number in range(2 * MOST_WAITING):
        recorder._began -= 0.5  # as if they were that far apart: none is left out for being too many
        recorder.sample(msgspec.structs.replace(curve(1)[0], elapsed_s=float(number), phase=Phase.PRECOPY), NOTHING)
        if number % 1000 == 7:
            recorder.message(f"kept {number}")
    assert time.monotonic() - began < 2 * AT_ONCE_S
    assert threading.active_count() == threads
    assert said == ["the record does not keep up with the migration; samples are left out"]
    began = time.monotonic()
    recorder.finish(outcome())
    assert PATIENCE_S - 0.1 < time.monotonic() - began < PATIENCE_S + AT_ONCE_S
    assert "is not complete" in said[1]
    text = b""
    while not recorder.flush(0.01):  # it goes on as soon as the disk does
        text += drain(reading)
    text += drain(reading)
    os.close(reading)
    for words in (b"kept 7", b"kept 1007", b'"row":"ended"'):
        assert words in text
    assert text.count(b'"row":"sample"') < MOST_WAITING + 2


@pytest.mark.root
def test_a_frozen_file_system_holds_up_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    said: list[str] = []
    with mounted(tmp_path / "frozen", "-o", "loop", str(image)) as folder:
        running = recorded(folder, samples=[])
        late = Recorder(folder, warn=said.append)
        subprocess.run(["fsfreeze", "-f", folder], check=True)
        try:
            began = time.monotonic()
            for number in range(20):
                Recorder._put(running, Said(text=f"while it is frozen, {number}"))
            assert time.monotonic() - began < AT_ONCE_S
            late.begin(ask("live"), plan(ask("live")))
            assert time.monotonic() - began < PATIENCE_S + 2 * AT_ONCE_S
            assert "may be missing" in said[0]
            assert late.id == ""
        finally:
            subprocess.run(["fsfreeze", "-u", folder], check=True)
        late.finish(outcome())
        running.finish(outcome())
        assert [row.text for row in find_record(running.id, folder).rows if isinstance(row, Said)] == [
            f"while it is frozen, {number}" for number in range(20)
        ]  # fmt: skip
        assert find_record(late.id, folder).status == "completed"  # made as soon as it could be


@pytest.mark.root
def test_a_disk_that_is_full_for_a_while_costs_rows_and_never_the_end(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=512k", "none") as folder:
        recorder, other = recorded(folder, samples=[]), recorded(folder, samples=[])
        fill(folder)
        long = "x" * 9000
        for number in range(20):
            recorder.message(f"{number} {long}")
            other.message(f"{number} {long}")
        other.finish(outcome())  # into the room that was set aside: there is none else
        (folder / "filler").unlink()
        recorder.message("there is room again")
        recorder.finish(outcome())
        record = find_record(recorder.id, folder)
        texts = [row.text for row in record.rows if isinstance(row, Said)]
        kept = sum(text.endswith(long) for text in texts)
        assert kept < 20
        assert texts[kept:] == [
            f"rows are missing here, which could not be written: {20 - kept}", "there is room again",
        ]  # fmt: skip
        ended = find_record(other.id, folder)
        assert record.status == ended.status == "completed"
        assert "rows are missing here" in str(ended.rows[-2])
        for each in (record, ended):
            size = each.path.stat()
            assert size.st_blocks * 512 < size.st_size + 8192  # what was set aside is given back


def test_a_torn_row_costs_only_itself(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a write in the middle, as a full disk does."""
    script = """
import resource, signal, sys
from pathlib import Path
from tests.report.test_records import outcome, recorded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = recorded(Path(sys.argv[1]), samples=[])
recorder._reserved_to = 1 << 30
resource.setrlimit(resource.RLIMIT_FSIZE, (recorder.path.stat().st_size + 30, resource.RLIM_INFINITY))
recorder.message("this is cut")
assert not recorder.path.read_bytes().endswith(b"\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recorder.message("this is whole")
recorder.finish(outcome())
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    record = find_record("last", tmp_path)
    assert [row.text for row in record.rows if isinstance(row, Said)] == [
        "rows are missing here, which could not be written: 1", "this is whole",
    ]  # fmt: skip
    assert record.status == "completed"


def test_a_killed_process_has_written_what_it_said(tmp_path: Path) -> None:
    script = """
import signal, sys
from pathlib import Path
from tests.support.hosts import ask, plan
from virtmig.report.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]))
recorder.begin(ask("live"), plan(ask("live")))
recorder.message("said")
print("done", flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        select.select([], [], [], 0.1)  # a fraction of a second may be lost, no more
        assert find_record("last", tmp_path).status == "running"
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        record = find_record("last", tmp_path)
        assert record.status == "broken off"  # though its zombie still has the pid
    assert [row.text for row in record.rows if isinstance(row, Said)] == ["said"]


def test_a_pid_alone_is_not_believed(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    began = find_record("last", tmp_path).began
    replace = msgspec.structs.replace
    assert began.boot_id == records.boot_id()
    assert began.start_ticks == start_ticks(os.getpid())
    assert alive(began)
    assert not alive(replace(began, boot_id="11111111-2222-3333-4444-555555555555"))
    assert not alive(replace(began, start_ticks=began.start_ticks - 1))  # the pid of another one since
    assert not alive(replace(began, pid=0))
    assert alive(replace(began, boot_id="", start_ticks=0))  # of an older virtmig
    assert start_ticks(1 << 30) is None
    recorder.finish(outcome())


def test_a_name_with_brackets_has_a_start_too() -> None:
    script = "open('/proc/self/comm', 'w').write('a) S 1 (b'); print(open('/proc/self/stat').read()); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        stat = child.stdout.readline()
        assert b"(a) S 1 (b)" in stat
        assert start_ticks(child.pid) == int(stat.split()[21 + 3])
        child.communicate(b"\n")


def names(folder: Path, count: int, text: bytes, *, day: int) -> list[Path]:
    found = [folder / f"202001{day:02d}-{number:06d}-aaaaaa{SUFFIX}" for number in range(count)]
    for path in found:
        path.write_bytes(text)
    return found


def test_refusals_are_forgotten_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT_RECORDS", 10)
    monkeypatch.setattr(records, "KEPT_REFUSALS", 3)
    real = names(tmp_path, 6, b'{"row":"began"}\n{"row":"ended"}\n', day=1)
    refusals = names(tmp_path, 20, b'{"row":"began"}\n{"row":"refused","reasons":[]}\n', day=2)
    dangling = tmp_path / f"20190101-000000-aaaaaa{SUFFIX}"
    dangling.symlink_to(tmp_path / "nowhere")
    forget_old(tmp_path)
    left = sorted(tmp_path.iterdir())
    assert left == [dangling, *real, *refusals[-3:]]
    assert len(left) == 10


def test_many_forget_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT_RECORDS", 20)
    names(tmp_path, 400, b"{}\n", day=1)
    script = "import sys; from pathlib import Path; from virtmig.report import records as r; r.KEPT_RECORDS = 20; " \
             "input(); r.forget_old(Path(sys.argv[1]))"  # fmt: skip
    children = [subprocess.Popen([sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE) for _ in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
        assert child.returncode == 0
    assert recorded(tmp_path, samples=[]).id
    assert 15 <= len(list(tmp_path.iterdir())) <= 21


def test_what_somebody_else_did_is_kept(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    recorder.intervened("the downtime limit was changed by somebody else: 300 -> 900 ms", "max-downtime", 900)
    recorder.message("no intervention")
    recorder.finish(outcome())
    assert recorder.path is not None
    record = read_record(recorder.path)
    assert record is not None
    assert [(row.what, row.value) for row in record.interventions] == [("max-downtime", 900)]
