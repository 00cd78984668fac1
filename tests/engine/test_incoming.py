"""A destination for real QEMUs: what arrives is the guest, byte for byte, or the source's guest runs on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.emulators import dialect, lab_source
from tests.support.lab import eventually
from tests.support.proxy import RecordingProxy
from tests.support.qemu import Qemu, QemuError
from tests.support.recorder import Emulator
from virtmig.engine import incoming as module
from virtmig.engine.image import Image
from virtmig.engine.incoming import Incoming, Received
from virtmig.engine.landing import ImageLanding
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import ChannelError, GuestMemoryError, MigrationAborted, MigrationError, RemoteProtocolError
from virtmig.progress import Whereabouts
from virtmig.stream.wire import Dialect

POSTCOPY = ("postcopy-ram",)
PREEMPT = ("postcopy-ram", "postcopy-preempt")
MULTIFD = ("return-path", "multifd")


class Receiving:
    """An Incoming in a thread of its own."""

    def __init__(self, folder: Path, address: Address | None = None, **options: Any) -> None:
        self.stop = Stop()
        self.listener = Listener(address or Address("127.0.0.1"), self.stop)
        self.landing = ImageLanding(folder)
        self.incoming = Incoming(self.listener, self.landing, self.stop, **options)
        self._outcome: list[Received | BaseException] = []
        self._thread = threading.Thread(target=self._run, name="receiving")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self.incoming.run())
        except BaseException as error:
            self._outcome.append(error)

    def result(self) -> Received:
        self._thread.join(30)
        assert self._outcome, "the destination did not come to an end"
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        self.stop.request()
        self._thread.join(30)
        self.listener.close()


@contextmanager
def receiving(folder: Path, address: Address | None = None, **options: Any) -> Iterator[Receiving]:
    made = Receiving(folder, address, **options)
    try:
        yield made
    finally:
        made.close()


def same_memory(source: Qemu, folder: Path) -> None:
    """Every byte of the stopped source is in the image."""
    with Image(folder) as image:
        image.verify()
        for name, content in source.memory().items():  # type: ignore[attr-defined]
            file = next(block.file for block in image.manifest.blocks if block.name == name)
            here = np.fromfile(folder / file, np.uint8)  # not by the mapping: holes of a full disk
            differing = np.flatnonzero((here != np.frombuffer(content, np.uint8)).reshape(-1, 4096).any(axis=1))
            assert not differing.size, f"{name}: pages {differing[:5]} of {differing.size} differ"


PRECOPY = [
    pytest.param(("return-path",), {}, id="precopy"),
    pytest.param(("events",), {}, id="without return path"),
    # with one QEMU at hand 1 and 4 are enough; `./dev compat` takes all
    *(
        pytest.param(MULTIFD, {"multifd-channels": n}, id=f"multifd {n}", marks=[pytest.mark.compat] * (n in (2, 8)))
        for n in (1, 2, 4, 8)
    ),
    *(
        pytest.param(MULTIFD, {"multifd-channels": 2, "multifd-compression": method}, id=f"multifd {method}")
        for method in ("zlib", "zstd")
    ),
]


@pytest.mark.parametrize(("capabilities", "parameters"), PRECOPY)
def test_precopy(
    emulator: Emulator,
    tmp_path: Path,
    capabilities: tuple[str, ...],
    parameters: dict[str, int | str],
    nothing_left: None,
) -> None:
    channels = int(parameters.get("multifd-channels", 0))
    with (
        lab_source(emulator, capabilities=capabilities, **parameters) as (source, _),
        receiving(tmp_path / "image", multifd_channels=channels) as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        received = destination.result()
        source.qmp.wait_status("completed")
        same_memory(source, tmp_path / "image")
        assert len(received.channels) == 1 + channels
        assert not received.postcopy
        source.check_walk()
        # a checkpoint: the source goes on
        source.qmp.execute("cont")
        source.wait_heartbeat(2)


def test_xbzrle(emulator: Emulator, tmp_path: Path) -> None:
    """Several slow passes, so that pages really come as differences."""
    with (
        lab_source(emulator, capabilities=("xbzrle", "return-path"), **{"max-bandwidth": 4 << 20, "downtime-limit": 1})
        as (source, _),
        receiving(tmp_path / "image") as destination,
    ):  # fmt: skip
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        source.qmp.wait_pass(2)
        eventually(lambda: source.qmp.execute("query-migrate")["xbzrle-cache"]["pages"] > 20, "pages as differences")
        source.set_parameters({"max-bandwidth": 1 << 30, "downtime-limit": 5000})
        destination.result()
        source.qmp.wait_status("completed")
        same_memory(source, tmp_path / "image")


def test_compress_of_old_qemus(emulator: Emulator, tmp_path: Path) -> None:
    """One zlib stream a page; the capability went with 9.1, so newer ones only show that it is gone."""
    if dialect(emulator) is not Dialect.QEMU_7_2:
        with lab_source(emulator) as (source, _), pytest.raises(QemuError, match="compress"):
            source.set_capabilities(["compress"])
        return
    with (
        lab_source(emulator, capabilities=("compress", "return-path")) as (source, _),
        receiving(tmp_path / "image") as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        destination.result()
        source.qmp.wait_status("completed")
        assert source.qmp.execute("query-migrate")["compression"]["pages"] > 0
        same_memory(source, tmp_path / "image")


def test_memory_that_would_not_come_is_refused(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    with (
        lab_source(emulator, capabilities=("x-ignore-shared", "return-path"), shared=True) as (source, _),
        receiving(tmp_path / "image") as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        with pytest.raises(MigrationError, match=r"leaves out shared memory \(pc\.ram") as error:
            destination.result()
        assert "x-ignore-shared" in error.value.hint
        fails(source)
        assert list(tmp_path.iterdir()) == []


def postcopy_cases(emulator: Emulator) -> list[tuple[tuple[str, ...], int]]:
    cases: list[tuple[tuple[str, ...], int]] = [(POSTCOPY, 0), (PREEMPT, 0)]
    if dialect(emulator) is Dialect.QEMU_11_1:
        cases.append(((*PREEMPT, "multifd"), 2))
    return cases


def test_postcopy(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    for number, (capabilities, channels) in enumerate(postcopy_cases(emulator)):
        parameters: dict[str, int | str] = {"max-bandwidth": 4 << 20}
        if channels:
            parameters["multifd-channels"] = channels
        with (
            lab_source(emulator, capabilities=capabilities, **parameters) as (source, _),
            receiving(tmp_path / f"image{number}", multifd_channels=channels) as destination,
        ):
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            source.qmp.wait_pass(1)
            source.qmp.execute("migrate-start-postcopy")
            received = destination.result()
            source.qmp.wait_status("completed")
            assert received.postcopy
            assert received.pages_twice == 0
            same_memory(source, tmp_path / f"image{number}")


@pytest.mark.parametrize("preempt", [False, True], ids=["", "preempt"])
def test_broken_postcopy_is_recovered(emulator: Emulator, tmp_path: Path, preempt: bool) -> None:
    with (
        lab_source(emulator, capabilities=PREEMPT if preempt else POSTCOPY,
                   **{"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 1 << 20}) as (source, _),
        receiving(tmp_path / "image") as destination,
        RecordingProxy() as proxy,
    ):  # fmt: skip
        proxy.target_port = destination.listener.address.port
        source.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{proxy.port}")
        source.qmp.wait_pass(1)
        source.qmp.execute("migrate-start-postcopy")
        source.qmp.wait_status("postcopy-active")
        # behind the package: 7.2 fails where it breaks while that is sent
        proxy.wait_carried("s2d", len(proxy.connections[0].s2d) + 600_000)
        if dialect(emulator) is Dialect.QEMU_7_2:
            source.qmp.execute("migrate-pause")
        else:
            proxy.cut()
        source.qmp.wait_status("postcopy-paused")
        eventually(lambda: destination.incoming.paused, "a pause at the destination")
        source.set_parameters({"max-postcopy-bandwidth": 0})
        source.qmp.execute("migrate", uri=str(destination.listener.address), resume=True)
        received = destination.result()
        source.qmp.wait_status("completed")
        assert received.recoveries == 1
        assert received.pages_twice == 0
        same_memory(source, tmp_path / "image")


def test_postcopy_goes_on_in_another_process(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    """The receiving process is gone, with all it knew: the folder and the source's memory are enough."""
    with lab_source(
        emulator, capabilities=POSTCOPY, **{"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 1 << 20}
    ) as (source, _):
        with receiving(tmp_path / "image") as destination:
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            source.qmp.wait_pass(1)
            source.qmp.execute("migrate-start-postcopy")
            source.qmp.wait_status("postcopy-active")
            eventually(lambda: destination.incoming.loading.split, "the switch")
            destination.stop.request()
            with pytest.raises(MigrationAborted) as error:
                destination.result()
            assert error.value.guest is Whereabouts.SPLIT
        source.qmp.wait_status("postcopy-paused")
        assert not (tmp_path / "image").exists()
        source.set_parameters({"max-postcopy-bandwidth": 0})
        landing, manifest, sections = ImageLanding.recover(tmp_path / "image")
        stop = Stop()
        listener = Listener(Address("127.0.0.1"), stop)
        incoming = Incoming(listener, landing, stop)
        incoming.continue_from(manifest, sections)
        source.qmp.execute("migrate", uri=str(listener.address), resume=True)
        received = incoming.run()
        listener.close()
        source.qmp.wait_status("completed")
        assert received.recoveries == 1
        same_memory(source, tmp_path / "image")
        assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_unix_socket(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    with lab_source(emulator, capabilities=MULTIFD, **{"multifd-channels": 2}) as (source, (here, there)):
        with receiving(tmp_path / "image", Address(path=f"{here}/s"), multifd_channels=2) as destination:
            source.qmp.execute("migrate", uri=f"unix:{there}/s")
            destination.result()
            source.qmp.wait_status("completed")
            same_memory(source, tmp_path / "image")
        assert not (here / "s").exists()


def fails(source: Qemu) -> None:
    """The migration failed at the source, and its guest runs."""
    with pytest.raises(QemuError):
        source.qmp.wait_status("completed")
    eventually(lambda: source.qmp.execute("query-migrate")["status"] == "failed", "'failed' behind 11.1's 'failing'")
    eventually(lambda: source.qmp.execute("query-status")["running"], "the source's guest runs again")
    source.wait_heartbeat(2)


def test_refusal_before_the_commit_leaves_the_source_running(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    def full_disk(*_: object) -> None:
        raise MigrationError("No space left on device")

    monkeypatch.setattr(ImageLanding, "commit", full_disk)
    with lab_source(emulator) as (source, _), receiving(tmp_path / "image") as destination:
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        with pytest.raises(MigrationError, match="No space left") as error:
            destination.result()
        assert error.value.guest is Whereabouts.SOURCE
        fails(source)
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()


def test_cancel_then_migrate_again(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    with lab_source(emulator, **{"max-bandwidth": 2 << 20}) as (source, _):
        with receiving(tmp_path / "image") as destination:
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            source.qmp.wait_status("active")
            destination.stop.request()
            with pytest.raises(MigrationAborted):
                destination.result()
            fails(source)
        assert list(tmp_path.iterdir()) == []
        since = len(source.qmp.events)
        source.set_parameters({"max-bandwidth": 1 << 30})
        with receiving(tmp_path / "image") as destination:
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            destination.result()
            source.qmp.wait_status("completed", since=since)
            same_memory(source, tmp_path / "image")


def test_cancel_at_the_source(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    with (
        lab_source(emulator, **{"max-bandwidth": 2 << 20}) as (source, _),
        receiving(tmp_path / "image") as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        source.qmp.wait_status("active")
        source.qmp.execute("migrate_cancel")
        with pytest.raises((ChannelError, RemoteProtocolError)) as error:
            destination.result()
        assert error.value.guest is Whereabouts.SOURCE
        assert list(tmp_path.iterdir()) == []
        source.wait_heartbeat(2)


def test_multifd_that_nobody_announced_is_refused_with_the_way_out(emulator: Emulator, tmp_path: Path) -> None:
    with (
        lab_source(emulator, capabilities=MULTIFD, **{"multifd-channels": 2}) as (source, _),
        receiving(tmp_path / "image") as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        with pytest.raises(MigrationError) as error:
            destination.result()
        told = f"{error.value} {error.value.hint}"
        assert "multifd" in told
        fails(source)


def test_more_channels_expected_than_come(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    with (
        lab_source(emulator, capabilities=MULTIFD, **{"multifd-channels": 2}) as (source, _),
        receiving(tmp_path / "image", multifd_channels=3, stall_s=1.0) as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        with pytest.raises(ChannelError, match=r"no byte on any channel, while the others wait for multifd 2") as error:
            destination.result()
        assert "--parallel-connections" in error.value.hint
        fails(source)


@pytest.mark.root
@pytest.mark.parametrize("channels", [0, 2])
def test_full_disk_fails_and_leaves_nothing(
    emulator: Emulator, tmp_path: Path, channels: int, nothing_left: None
) -> None:
    if os.getuid():
        pytest.skip("needs root: mounts a small tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=True)
    try:
        capabilities = MULTIFD if channels else ("return-path",)
        parameters = {"multifd-channels": channels} if channels else {}
        with (
            lab_source(emulator, capabilities=capabilities, **parameters) as (source, _),
            receiving(tmp_path / "image", multifd_channels=channels) as destination,
        ):
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            with pytest.raises(GuestMemoryError, match=r"No space left|disk or the memory full") as error:
                destination.result()
            assert error.value.guest is Whereabouts.SOURCE
            fails(source)
            assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# -- without a QEMU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"SSH-2.0-x\r\n", b"\0" * 64, b""],
    ids=["http", "tls", "ssh", "zeros", "a probe"],
)
def test_strangers_end_nothing(tmp_path: Path, greeting: bytes, nothing_left: None) -> None:
    with receiving(tmp_path / "image") as destination:
        with socket.create_connection(("127.0.0.1", destination.listener.address.port)) as stranger:
            stranger.settimeout(10)
            with contextlib.suppress(OSError):  # it may be reset at any time: its bytes are never taken
                stranger.sendall(greeting)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
        assert destination.incoming._first is None
        destination.stop.request()
        with pytest.raises(MigrationAborted):
            destination.result()


def test_silent_source_is_noticed(tmp_path: Path, nothing_left: None) -> None:
    with (
        receiving(tmp_path / "image", stall_s=0.3) as destination,
        socket.create_connection(("127.0.0.1", destination.listener.address.port)) as source,
    ):
        source.sendall(b"QEVM\0\0\0\3")
        with pytest.raises(ChannelError, match=r"main: the peer sends nothing for 0.3 s"):
            destination.result()


@pytest.mark.parametrize("length", range(9))
def test_source_that_ends_early(tmp_path: Path, length: int, nothing_left: None) -> None:
    with receiving(tmp_path / "image", stall_s=5) as destination:
        with socket.create_connection(("127.0.0.1", destination.listener.address.port)) as source:
            source.sendall(b"QEVM\0\0\0\3\7"[:length])
        if length < 4:  # nobody that could be named: the next one may be the source
            destination.stop.request()
        with pytest.raises(MigrationError) as error:
            destination.result()
        assert error.value.guest is Whereabouts.SOURCE
        assert list(tmp_path.iterdir()) == []


def test_defect_of_ours_is_raised_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    monkeypatch.setattr(module, "QemuStreamDecoder", lambda **_: 1 / 0)
    with receiving(tmp_path / "image") as destination:
        with socket.create_connection(("127.0.0.1", destination.listener.address.port)) as source:
            source.sendall(b"QEVM")
            with pytest.raises(ZeroDivisionError):
                destination.result()
        assert list(tmp_path.iterdir()) == []
