"""`virtmig send` as a person or a script runs it: what it says, what it refuses, and what no terminal can change."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.destination_peer import destination_peer
from tests.support.images import image_from, recording
from virtmig.cli.main import main
from virtmig.engine.outgoing import SendSettings
from virtmig.engine.sent import SentImage, sendings
from virtmig.stream.return_path import Shut
from virtmig.stream.wire import Dialect

VIRTMIG = [sys.executable, "-c", "from virtmig.cli.main import run; run()"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_from(recording("7.2-plain"), tmp_path_factory.mktemp("image") / "guest")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-a", "--sparse=always", made, tmp_path / "guest"], check=True)
    return tmp_path / "guest"


@contextmanager
def sending(*words: object, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    process = subprocess.Popen([*VIRTMIG, "send", *map(str, words)], text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def result(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run it in this process: the status, what it said on standard output, and on standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        status = main(["send", *map(str, words)])
        return status, *capfd.readouterr()

    return run


Result = Callable[..., tuple[int, str, str]]


def test_a_second_copy_and_a_recovery_of_nothing_are_refused_with_the_record(folder: Path, result: Result) -> None:
    with destination_peer(end=Shut(0)) as (_, address):
        status, out, err = result(folder, address)
        assert (status, out, err) == (0, "", f"the guest of {folder} is at {address}\n")
    status, _, err = result(folder, "tcp:127.0.0.1:9")
    assert status == 1
    assert f"may run elsewhere: it was sent to {address} at 20" in err
    assert "--again" in err
    status, _, err = result(folder, "tcp:127.0.0.1:9", "--recover")
    assert status == 1
    assert "no postcopy of" in err
    assert "(precopy, completed)" in err
    with destination_peer(end=Shut(0)) as (_, other):
        assert result(folder, other, "--again")[0] == 0
    assert [each.address for each in sendings(folder)] == [str(address), str(other)]


def test_a_recovery_uses_what_the_first_sending_used(folder: Path, result: Result) -> None:
    settings = SendSettings(postcopy=True, preempt=True, destination=Dialect.QEMU_7_2)
    with contextlib.suppress(KeyboardInterrupt), SentImage(folder, "tcp:host-b:4444", settings) as sent:
        sent.may_run()
        raise KeyboardInterrupt
    # only a 7.2 is connected to twice before it has answered
    with destination_peer(accepts=1, answers=0) as (peer, address):
        status, _, err = result(folder, address, "--recover", "--stall-timeout", "1")
        assert len(peer.others) == 1
    assert status == 1
    assert f"'virtmig send --recover {folder} {address} --qemu 7.2 --postcopy-preempt'" in err


def test_failures_are_json_lines_too(folder: Path, result: Result) -> None:
    status, out, err = result(folder, "tcp:127.0.0.1:9", "--json")
    assert status == 1
    (line,) = out.splitlines()
    event = msgspec.json.decode(line)
    assert (event["event"], event["guest"]) == ("failed", "source")
    assert "cannot connect" in event["message"]
    assert "can be sent again" in event["hint"]
    assert all(line.startswith(("error: ", "hint: ")) for line in err.splitlines())
    assert event["message"] in err


@pytest.mark.parametrize("json", [True, False], ids=["json", "words"])
def test_nobody_who_reads_changes_what_came_of_it(json: bool, folder: Path) -> None:
    more = ["--json"] if json else []
    with (
        open("/dev/full", "w") as full,
        destination_peer(end=Shut(0)) as (_, address),
        sending(folder, address, *more, stdout=full, stderr=full) as process,
    ):
        assert process.wait(30) == 0
    assert sendings(folder)[-1].state == "completed"


def test_a_signal_in_postcopy_ends_nothing_where_nobody_can_be_warned(folder: Path) -> None:
    """The terminal was closed: HUP, and nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    try:
        with destination_peer(end=Shut(0)) as (peer, address):
            words = (folder, address, "--postcopy", "--bandwidth", "1")
            with sending(*words, stderr=writes) as process:
                assert peer.ran.wait(30)
                process.send_signal(signal.SIGHUP)
                assert process.wait(30) == 0
            assert peer.ended.is_set()
    finally:
        os.close(writes)


def test_the_second_signal_leaves_a_split_guest_and_the_command(folder: Path) -> None:
    words = (folder, "--postcopy", "--bandwidth", "1", "--json")
    with destination_peer() as (peer, address), sending(*words, address) as process:
        assert peer.ran.wait(30)
        assert process.stderr is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert "once more" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 1
        event = msgspec.json.decode(process.stdout.readline())
    assert event["guest"] == "split"
    assert f"virtmig send --recover {folder} {address}" in event["hint"]
    assert sendings(folder)[-1].state == "split"
