"""`virtmig receive` and `virtmig send` as a person runs them: a checkpoint of the lab's guest, restored lazily."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.support.emulators import LabQemu, dialect, emulators, lab_source
from tests.support.proxy import free_port
from virtmig.engine.image import MANIFEST

VIRTMIG = [sys.executable, "-c", "from virtmig.cli.main import run; run()"]


@contextmanager
def virtmig(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*VIRTMIG, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_event(process: subprocess.Popen[str], name: str) -> dict[str, object]:
    assert process.stdout is not None
    line = process.stdout.readline()
    event: dict[str, object] = msgspec.json.decode(line) if line else {}
    assert event.get("event") == name, (event, process.stderr.read() if process.stderr and not line else "")
    return event


@pytest.mark.skipif(not emulators(), reason="no qemu-system-x86_64")
@pytest.mark.parametrize("way", [[], ["--postcopy"], ["--parallel-connections", "2"]], ids=["", "lazy", "multifd"])
def test_checkpoint_of_a_live_guest_and_its_restore(way: list[str], tmp_path: Path) -> None:
    emulator = emulators()[0]
    folder = tmp_path / "guest.image"
    multifd = {"multifd-channels": 2}
    with lab_source(emulator, capabilities=("return-path", "multifd"), **multifd) as (source, here):
        with virtmig("receive", "tcp:127.0.0.1:0", "--into", str(folder), "--parallel-connections", "2", "--json") as r:
            address = str(next_event(r, "listening")["address"])
            source.qmp.execute("migrate", uri=address)
            received = next_event(r, "received")
            assert received["folder"] == str(folder)
            assert r.wait(20) == 0
        source.qmp.wait_status("completed")
        walked = source.check_walk().counter
        source.qmp.execute("cont")  # a checkpoint: the guest lives on
        source.wait_heartbeat(1)
        source.qmp.execute("stop")  # and may not meet its copy in the lab's check below
        (here[0] / "again").mkdir()
        machine = msgspec.json.decode((folder / MANIFEST).read_bytes())["machine"]
        with LabQemu(emulator, here, "-incoming", "defer", name="restored", machine=machine) as restored:
            capabilities = ["postcopy-ram"] if "--postcopy" in way else ["multifd"] if way else []
            restored.set_capabilities(["events", *capabilities])
            if "--parallel-connections" in way:
                restored.set_parameters({"multifd-channels": 2})
            port = free_port()
            restored.qmp.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
            words = ["send", str(folder), f"tcp:127.0.0.1:{port}", "--qemu", str(dialect(emulator)), "--verify", *way]
            with virtmig(*words, "--json") as sending:
                assert next_event(sending, "sent")["folder"] == str(folder)
                assert sending.wait(20) == 0
            restored.qmp.wait_status("completed")
            restored.wait_heartbeat(3)
            restored.qmp.execute("stop")
            for _ in range(30):  # on a busy machine a heartbeat is not yet a walk
                if restored.check_walk().counter > walked:
                    break
                restored.qmp.execute("cont")
                restored.wait_heartbeat(1)
                restored.qmp.execute("stop")
            assert restored.check_walk().counter > walked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_listening_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with virtmig("receive", f"unix:{tmp_path}/s", "--into", str(tmp_path / "image"), "--json") as process:
        next_event(process, "listening")
        process.send_signal(number)
        assert process.wait(10) == 1
        assert process.stderr is not None
        assert f"stopped by {number.name}" in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["receive", "tcp:nowhere", "--into", "{}/x"], "no address of a migration"),
        (["receive", "unix:" + "x" * 120, "--into", "{}/x"], "the kernel takes 107"),
        (["receive", "tcp:127.0.0.1:0", "--into", "{}"], "exists already"),
        (["receive", "tcp:127.0.0.1:0", "--into", "{}/no/x"], "is no folder"),
        (["receive", "tcp:127.0.0.1:0", "--into", "{}/x", "--recover"], "no interrupted postcopies"),
        (["send", "{}", "tcp:127.0.0.1:1"], "is no image of a guest"),
        (["send", "{}/none", "tcp:127.0.0.1:1"], "is no image of a guest"),
    ],
)
def test_bad_input_is_named(words: list[str], told: str, tmp_path: Path) -> None:
    with virtmig(*(word.replace("{}", str(tmp_path)) for word in words)) as process:
        assert process.wait(10) == 1
        assert process.stderr is not None
        text = process.stderr.read()
    assert told in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
