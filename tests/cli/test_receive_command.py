"""`virtmig receive` for a person and a script: what it says and when, whoever reads it, and where the guest is."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.cli.test_engine_commands import VIRTMIG, next_event, virtmig
from tests.support.emulators import emulators, lab_source
from tests.support.images import image_from, recording
from virtmig.cli.main import main
from virtmig.engine.image import Image, ImageWriter, new_manifest
from virtmig.engine.interrupted import ARRIVED, PARTIAL
from virtmig.stream.events import DeviceSection, StreamHeader
from virtmig.stream.wire import Item

qemu = pytest.mark.skipif(not emulators(), reason="no qemu-system-x86_64")
DEVICES = [DeviceSection(Item.SECTION_FULL, 4, "timer", 0, 2, b"abc", 0)]


@contextmanager
def running(*words: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*VIRTMIG, *words], text=True, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupt(folder: Path) -> Path:
    writer = ImageWriter(folder)
    memory = writer.create_memory({"pc.ram": 8 << 20})
    memory.place("pc.ram", np.array([3], np.uint64), memoryview(b"x" * 4096))
    writer.save_devices(DEVICES, new_manifest(StreamHeader(3, "pc-i440fx-7.2"), DEVICES))
    writer.keep()
    return writer.partial


def events(text: str) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in text.splitlines()]


# -- who reads ---------------------------------------------------------------------------------------------------------


def test_output_that_takes_nothing_at_the_start_leaves_nothing(tmp_path: Path) -> None:
    """A program that cannot hear where to connect to hears of no guest either."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*VIRTMIG, "receive", "tcp:127.0.0.1:0", "--into", str(tmp_path / "image"), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=20,
        )  # fmt: skip
    assert done.returncode == 1
    assert "standard output takes no lines" in done.stderr
    assert list(tmp_path.iterdir()) == []


@qemu
@pytest.mark.parametrize("gone", ["standard error", "standard output"])
def test_reader_that_went_away_changes_nothing_of_a_success(gone: str, tmp_path: Path) -> None:
    """A terminal that was closed, a pipe whose reader ended, a log on a full disk."""
    as_json = gone == "standard output"
    words = ["receive", f"unix:{tmp_path}/s", "--into", str(tmp_path / "image"), *(["--json"] if as_json else [])]
    with (
        lab_source(emulators()[0]) as (source, _),
        running(*words, **{"stdout" if as_json else "stderr": subprocess.PIPE}) as process,
    ):
        stream = process.stdout if as_json else process.stderr
        assert stream is not None
        assert "listening" in stream.readline()
        stream.close()
        process.stdout = process.stderr = None
        source.qmp.execute("migrate", uri=f"unix:{tmp_path}/s")
        source.qmp.wait_status("completed")
        assert process.wait(20) == 0
    with Image(tmp_path / "image") as image:
        image.verify()


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tcp:nowhere", "--into", "{}/x"], "no address of a migration"),
        (["tcp:127.0.0.1:0", "--into", "{}/no/x"], "is no folder"),
        (["tcp:127.0.0.1:0", "--into", "{}/there"], "exists already: a file"),
        (["tcp:127.0.0.1:0", "--into", "{}/link"], "a symbolic link to"),
        (["tcp:192.0.2.1:1", "--into", "{}/x"], "cannot listen on tcp:192.0.2.1:1: Cannot assign requested address; n"),
        (["tcp:127.0.0.1:0", "--into", "{}/x", "--recover"], "no interrupted postcopies"),
    ],
)  # fmt: skip
def test_failure_is_a_line_of_json_and_no_empty_line(words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    words = [word.replace("{}", str(tmp_path)) for word in words]
    for as_json in [["--json"]] if "tcp:nowhere" not in words else [[], ["--json"]]:
        with virtmig("receive", *words, *as_json) as process:
            assert process.wait(10) == 1
            assert process.stdout is not None
            assert process.stderr is not None
            said, errors = process.stdout.read(), process.stderr.read()
        assert all(line.startswith(("error: ", "hint: ")) for line in errors.splitlines()), errors
        assert told in errors
        if as_json:
            [event] = events(said)
            assert event["event"] == "failed"
            assert told in event["message"]
        else:
            assert said == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_stopped_before_anybody_came_says_that_no_guest_has_come(tmp_path: Path) -> None:
    with virtmig("receive", "tcp:127.0.0.1:0", "--into", str(tmp_path / "image"), "--json") as process:
        next_event(process, "listening")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
        failed = next_event(process, "failed")
    assert failed["message"] == "stopped by SIGTERM; no guest has come"
    assert failed["guest"] == "source"
    assert list(tmp_path.iterdir()) == []


def test_source_that_breaks_off_says_where_the_guest_is(tmp_path: Path) -> None:
    with virtmig("receive", f"unix:{tmp_path}/s", "--into", str(tmp_path / "image"), "--json") as process:
        next_event(process, "listening")
        with socket.socket(socket.AF_UNIX) as source:
            source.connect(f"{tmp_path}/s")
            source.sendall(b"QEVM\0\0\0\3\7")
        assert process.wait(10) == 1
        assert str(next_event(process, "failed")["message"]).endswith("; the guest stays at its source")


def test_any_host_is_both_families(tmp_path: Path) -> None:
    """As QEMU does for tcp::PORT."""
    with virtmig("receive", "tcp::0", "--into", str(tmp_path / "image"), "--json") as process:
        port = int(str(next_event(process, "listening")["address"]).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            pass
        if socket.has_dualstack_ipv6():
            with socket.create_connection(("::1", port)):
                pass
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 1


@qemu
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_pause_and_resume_are_seen(as_json: bool, tmp_path: Path) -> None:
    words = ["receive", f"unix:{tmp_path}/s", "--into", str(tmp_path / "image"), *(["--json"] if as_json else [])]
    slow = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 1 << 18}
    with lab_source(emulators()[0], capabilities=("postcopy-ram",), **slow) as (source, _), virtmig(*words) as process:
        stream = process.stdout if as_json else process.stderr
        assert stream is not None

        def line(name: str, words: str) -> str:
            text = stream.readline()
            assert (f'"event":"{name}"' if as_json else words) in text
            return text

        line("listening", "listening on")
        source.qmp.execute("migrate", uri=f"unix:{tmp_path}/s")
        source.qmp.wait_status("active")
        source.qmp.execute("migrate-start-postcopy")
        line("postcopy", "the guest is here, ")
        source.qmp.execute("migrate-pause")
        source.qmp.wait_status("postcopy-paused")
        paused = line("paused", "paused: the connection is broken: ")
        assert "split" in paused
        assert as_json or "migrate -r" in paused
        source.set_parameters({"max-postcopy-bandwidth": 0})
        source.qmp.execute("migrate", uri=f"unix:{tmp_path}/s", resume=True)
        line("resumed", "the source is here again, ")
        line("received", "the guest is at rest in")
        assert process.wait(20) == 0


# -- what is left ------------------------------------------------------------------------------------------------------


def test_leftovers_are_named_with_what_to_do(tmp_path: Path) -> None:
    left = interrupt(tmp_path / "image")
    useless = ImageWriter(tmp_path / "image")
    useless.create_memory({"ram": 4096})
    useless.keep()
    address = f"unix:{tmp_path}/s"
    with virtmig("receive", address, "--into", str(tmp_path / "image")) as process:
        assert process.stderr is not None
        said = "".join(process.stderr.readline() for _ in range(3))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 1
    assert f"'virtmig receive {address} --into {left} --recover' goes on with it" in said
    assert "pc-i440fx-7.2, 8 MiB of RAM" in said
    assert f"rm -r '{useless.partial}'" in said
    assert "listening" in said
    assert {left, useless.partial} == set(tmp_path.iterdir())


def test_recovery_that_another_process_has_begun_is_refused(tmp_path: Path) -> None:
    left = interrupt(tmp_path / "image")
    words = ("receive", "tcp:127.0.0.1:0", "--into", str(tmp_path / "image"), "--recover", "--json")
    with virtmig(*words) as first:
        next_event(first, "listening")
        for more in (words, (*words[:4], "--json"), (*words[:3], str(left), *words[4:])):
            with virtmig(*more) as second:
                assert second.wait(10) == 1
                assert f"process {first.pid} on " in str(next_event(second, "failed")["message"])
        first.send_signal(signal.SIGTERM)  # a split guest: only a second one stops it
        assert first.stderr is not None
        assert "once more" in first.stderr.readline()
        first.send_signal(signal.SIGTERM)
        assert first.wait(10) == 1
        failed = next_event(first, "failed")
    assert failed["guest"] == "split"
    assert "--recover', then at the source: migrate -r" in str(failed["hint"])


def test_what_had_all_arrived_is_finished_without_a_source(tmp_path: Path) -> None:
    left = interrupt(tmp_path / "image")
    (left / PARTIAL).rename(left / ARRIVED)
    with virtmig("receive", "tcp:127.0.0.1:0", "--into", str(tmp_path / "image"), "--recover", "--json") as process:
        assert "7.2 stays in postcopy-active" in str(next_event(process, "finished")["source"])
        assert process.wait(10) == 0
    with Image(tmp_path / "image") as image:
        image.verify()
        assert image.nonzero("pc.ram").tolist() == [3]


# -- virtmig inspect ---------------------------------------------------------------------------------------------------


Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """`virtmig inspect` in this process: exit status, what it prints, errors."""

    def run(folder: Path, *words: str) -> tuple[int, str, str]:
        status = main(["inspect", str(folder), *words])
        return (status, *capsys.readouterr())

    return run


def test_inspect_of_a_whole_image(inspect: Inspect, tmp_path: Path) -> None:
    folder = image_from(recording("7.2-plain"), tmp_path / "image")
    (folder / "sent.json").write_text('{"to": "tcp:192.0.2.7:4444", "postcopy": true}')
    status, text, errors = inspect(folder)
    assert (status, errors) == (0, "")
    for words in ("pc-i440fx-7.2", "pc.ram", "globalstate", "match, all others are zero", "tcp:192.0.2.7:4444"):
        assert words in text
    status, text, _ = inspect(folder, "--json")
    report = msgspec.json.decode(text)
    assert (status, report["state"], report["damage"]) == (0, "whole", [])
    assert report["sent"]["to"] == "tcp:192.0.2.7:4444"
    assert report["blocks"][0]["held_bytes"] < report["blocks"][0]["bytes"]
    assert report["devices"][0]["came"] == "at the switchover"
    status, _, errors = inspect(folder, "--events")
    assert status == 2
    assert "has no events" in errors


def test_inspect_of_a_damaged_image(inspect: Inspect, tmp_path: Path) -> None:
    folder = image_from(recording("7.2-plain"), tmp_path / "image")
    with (folder / "ram-0").open("r+b") as file:
        file.seek(10 << 20)
        file.write(b"damage")
    status, text, errors = inspect(folder)
    assert status == 1
    assert "damaged at 0x800000: RAM block 'pc.ram'" in text
    assert "damaged at 0x800000" in errors
    (folder / "ram-0").unlink()
    status, _, errors = inspect(folder)
    assert status == 1
    assert "ram-0': No such file" in errors


def test_inspect_of_what_is_not_whole(inspect: Inspect, tmp_path: Path) -> None:
    left = interrupt(tmp_path / "image")
    status, text, _ = inspect(left)
    assert status == 1
    assert "its receive was interrupted" in text
    assert "timer" in text
    assert "4.00 KiB" in text
    status, _, errors = inspect(tmp_path / "image")
    assert status == 2
    assert f"a guest on its way there is in {left}" in errors
    with virtmig("receive", "tcp:127.0.0.1:0", "--into", str(tmp_path / "image"), "--recover", "--json") as process:
        next_event(process, "listening")
        status, text, _ = inspect(left)
        assert status == 1
        assert f"process {process.pid} on" in text
    (left / PARTIAL).unlink()
    status, text, _ = inspect(left, "--json")
    assert status == 1
    assert "never left the source" in msgspec.json.decode(text)["damage"][0]
