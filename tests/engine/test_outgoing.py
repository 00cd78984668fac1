"""Images into real QEMUs: every way to send, whole, broken, cancelled, and recovered."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.emulators import dialect
from tests.support.images import Waiting, image_from, own_emulator, recording, waiting
from tests.support.proxy import RecordingProxy
from tests.support.qemu import QemuError
from tests.support.recorder import Emulator
from virtmig.engine.image import Image
from virtmig.engine.lazy import NEAR_PAGES, PageReader, Remaining
from virtmig.engine.outgoing import SendProgress, SendResult, SendSettings, send_image
from virtmig.engine.transport import Address, Connection, Stop
from virtmig.errors import ChannelError, MigrationAborted, MigrationError, RequestError
from virtmig.lab.guest import FIRST_BYTE, PAGE_BYTES
from virtmig.lab.memory_check import check_memory
from virtmig.progress import Whereabouts
from virtmig.stream.wire import Dialect

Modes = tuple[tuple[str, ...], dict[str, int | str], dict[str, Any]]


def multifd(channels: int, method: str) -> Modes:
    parameters: dict[str, int | str] = {"multifd_channels": channels, "multifd_compression": method}
    return ("multifd",), parameters, {"multifd_channels": channels, "compression": method}


#: (destination's capabilities, its parameters, our settings)
PRECOPY: Modes = ((), {}, {})
POSTCOPY: Modes = (("postcopy-ram",), {}, {"postcopy": True})
PREEMPT: Modes = (("postcopy-ram", "postcopy-preempt"), {}, {"postcopy": True, "preempt": True})
MODES: dict[str, Modes] = {
    "precopy": PRECOPY,
    **{f"multifd-{n}-{method}": multifd(n, method) for n in (1, 2, 4) for method in ("none", "zlib", "zstd")},
    "postcopy": POSTCOPY,
    "preempt": PREEMPT,
}
LAZY = {"postcopy": POSTCOPY, "preempt": PREEMPT}
#: a background so slow that the guest has to ask, and a broken connection finds much unsent
SLOW_BYTES_PER_S = 600_000


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The image of a recorded guest, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = image_from(recording(name), tmp_path_factory.mktemp("image") / name)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no descriptor more than before, when QEMUs and peers have gone too."""
    gc.collect()
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # the sockets of tests.support.qemu
    for thread in set(threading.enumerate()) - threads:
        assert thread.name.startswith("qmp-")
        thread.join(20)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == descriptors


def sending_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("return path", "multifd", "main", "preempt"))]


def send(
    folder: Path,
    address: Address,
    stop: Stop | None = None,
    progress: Callable[[SendProgress], None] | None = None,
    **settings: Any,
) -> SendResult:
    """send_image, and no thread, socket or mapping of it is left."""
    try:
        with Image(folder) as image:
            chosen = SendSettings(**{"stall_s": 20.0, **settings})
            return send_image(image, address, chosen, stop or Stop(), progress=progress)
    except MigrationError as error:
        failure = error
    finally:
        assert not sending_threads()
        assert "/ram-" not in Path("/proc/self/maps").read_text()
    raise failure


def arrived(waits: Waiting) -> None:
    """The destination has exactly the recorded memory, and its guest goes on."""
    waits.qemu.qmp.wait_status("completed")
    assert waits.memory_differs() == []
    waits.qemu.qmp.execute("cont")
    waits.qemu.wait_heartbeat(2)


#: with one QEMU at hand these are enough; `./dev compat` takes all
FEW = ("precopy", "multifd-1-none", "multifd-2-zlib", "multifd-4-zstd", "postcopy", "preempt")


@pytest.mark.parametrize(
    "mode", [mode if mode in FEW else pytest.param(mode, marks=pytest.mark.compat) for mode in MODES]
)
def test_each_way_brings_the_guest(mode: str, emulator: Emulator, folder_of: Callable[[str], Path]) -> None:
    name = f"{emulator.version_name}-plain"
    capabilities, parameters, settings = MODES[mode]
    with waiting(emulator, recording(name), *capabilities, **parameters) as waits:
        result = send(folder_of(name), waits.address, destination=dialect(emulator), **settings)
        assert result.pages_normal + result.pages_zero == sum(recording(name).about["blocks"].values()) // PAGE_BYTES
        assert 0 < result.switch_s <= result.elapsed_s
        arrived(waits)


@pytest.mark.compat
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_7_2_goes_into_11_1(mode: str, folder_of: Callable[[str], Path]) -> None:
    capabilities, parameters, settings = MODES[mode]
    with waiting(own_emulator("11.1"), recording("7.2-plain"), *capabilities, **parameters) as waits:
        send(folder_of("7.2-plain"), waits.address, destination=Dialect.QEMU_11_1, **settings)
        arrived(waits)


@pytest.mark.compat
@pytest.mark.parametrize("mode", LAZY)
@pytest.mark.parametrize("name", ["7.2-plain", "11.1-plain"], ids=["image of 7.2", "image of 11.1"])
def test_multifd_may_be_on_with_postcopy_since_10_1(name: str, mode: str, folder_of: Callable[[str], Path]) -> None:
    capabilities, _, settings = LAZY[mode]
    emulator = own_emulator("11.1")
    with waiting(emulator, recording(name), *capabilities, "multifd", multifd_channels=2) as waits:
        send(folder_of(name), waits.address, destination=dialect(emulator), multifd_channels=2, **settings)
        arrived(waits)


@pytest.mark.parametrize("mode", LAZY)
def test_a_guest_runs_while_its_memory_comes(mode: str, emulator: Emulator, folder_of: Callable[[str], Path]) -> None:
    name = f"{emulator.version_name}-plain"
    capabilities, _, settings = LAZY[mode]
    with waiting(emulator, recording(name), *capabilities, runs=True) as waits:
        result = send(
            folder_of(name), waits.address, destination=dialect(emulator), bandwidth_bytes_per_s=SLOW_BYTES_PER_S,
            **settings,
        )  # fmt: skip
        waits.qemu.qmp.wait_status("completed")
        waits.qemu.wait_heartbeat(2)
        assert result.requests_served > 10
        assert result.switch_s < result.elapsed_s / 4
        waits.qemu.qmp.execute("stop")
        count = 128  # tests/support/recorder.py: walk_pages
        _, content = waits.qemu.read_guest_block(0, FIRST_BYTE + count * PAGE_BYTES)
        assert check_memory(content[FIRST_BYTE:], count).counter > recording(name).about["memory"]["walk_counter"]


def test_a_unix_socket_will_do(emulator: Emulator, folder_of: Callable[[str], Path]) -> None:
    name = f"{emulator.version_name}-plain"
    with waiting(emulator, recording(name), *PREEMPT[0], unix=True) as waits:
        send(folder_of(name), waits.address, destination=dialect(emulator), **PREEMPT[2])
        arrived(waits)


def test_pages_near_a_request_come_next_and_each_page_once(folder_of: Callable[[str], Path]) -> None:
    with Image(folder_of("7.2-plain")) as image:
        remaining = Remaining(PageReader(image))
        total = len(remaining)
        taken: list[tuple[str, int]] = []
        requested = remaining.take_requested("pc.ram", 5000 * PAGE_BYTES, 2 * PAGE_BYTES)
        assert requested.tolist() == [5000, 5001]
        assert not len(remaining.take_requested("pc.ram", 5000 * PAGE_BYTES, PAGE_BYTES))
        taken += [("pc.ram", page) for page in requested.tolist()]
        following = remaining.take_next()
        assert following is not None
        assert following[1].tolist() == list(range(5002, 5002 + NEAR_PAGES))
        while following is not None:
            taken += [(following[0], page) for page in following[1].tolist()]
            following = remaining.take_next()
        assert len(taken) == len(set(taken)) == total
        assert len(remaining) == 0


def test_a_host_page_of_2_mib_goes_whole(folder_of: Callable[[str], Path]) -> None:
    with Image(folder_of("7.2-plain")) as image:
        reader = PageReader(image)
        reader.units["pc.ram"] = 512
        remaining = Remaining(reader)
        assert remaining.take_requested("pc.ram", 600 * PAGE_BYTES, PAGE_BYTES).tolist() == list(range(512, 1024))
        near, first = remaining.take_next(), remaining.take_next()
        assert near is not None
        assert near[1].tolist() == list(range(1024, 1536))
        assert first is not None
        assert first[1].tolist() == list(range(512))


# -- a broken postcopy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["here", "in a new process"])
@pytest.mark.parametrize("mode", LAZY)
def test_a_broken_connection_pauses_the_guest_and_a_recovery_brings_the_rest(
    mode: str, again: str, emulator: Emulator, folder_of: Callable[[str], Path]
) -> None:
    name = f"{emulator.version_name}-plain"
    capabilities, _, settings = LAZY[mode]
    total = sum(recording(name).about["blocks"].values()) // PAGE_BYTES
    with waiting(emulator, recording(name), *capabilities) as waits, RecordingProxy() as proxy:
        proxy.target_port = waits.address.port
        sent = 0

        def cut(report: SendProgress) -> None:
            nonlocal sent
            sent = report.pages_sent
            if report.guest_runs and sent > 200:
                proxy.cut()

        with pytest.raises(ChannelError) as failure:
            send(
                folder_of(name), Address("127.0.0.1", proxy.port), destination=dialect(emulator), progress=cut,
                bandwidth_bytes_per_s=SLOW_BYTES_PER_S, **settings,
            )  # fmt: skip
        assert failure.value.guest is Whereabouts.SPLIT
        assert f"virtmig send --recover {folder_of(name)} tcp:127.0.0.1:" in failure.value.hint
        assert 200 < sent < total

        address = waits.recover()
        if again == "here":
            result = send(folder_of(name), address, destination=dialect(emulator), recover=True, **settings)
            assert 0 < result.pages_normal + result.pages_zero < total
        else:
            code = (
                "import sys; from pathlib import Path; from virtmig.engine.image import Image\n"
                "from virtmig.engine.transport import Address, Stop\n"
                "from virtmig.engine.outgoing import SendSettings, send_image\n"
                "from virtmig.stream.wire import Dialect\n"
                "preempt = sys.argv[4] == 'True'\n"
                "settings = SendSettings(recover=True, destination=Dialect(sys.argv[3]), preempt=preempt)\n"
                "with Image(Path(sys.argv[1])) as image:\n"
                "    send_image(image, Address.parse(sys.argv[2]), settings, Stop())\n"
            )
            subprocess.run(
                [sys.executable, "-c", code, str(folder_of(name)), str(address), dialect(emulator),
                 str("preempt" in settings)],
                check=True,
            )  # fmt: skip
        arrived(waits)


def test_a_recovery_that_breaks_can_be_tried_again(emulator: Emulator, folder_of: Callable[[str], Path]) -> None:
    name = f"{emulator.version_name}-plain"
    folder = folder_of(name)
    with waiting(emulator, recording(name), *POSTCOPY[0]) as waits:
        address = waits.address
        for recover in (False, True, True):
            stop = Stop()

            def enough(report: SendProgress, stop: Stop = stop) -> None:
                if report.guest_runs and report.pages_sent > 100:
                    stop.request()

            since = len(waits.qemu.qmp.events)
            with pytest.raises(MigrationAborted) as failure:
                send(folder, address, stop, enough, destination=dialect(emulator), postcopy=True, recover=recover,
                     bandwidth_bytes_per_s=SLOW_BYTES_PER_S)  # fmt: skip
            assert failure.value.guest is Whereabouts.SPLIT
            waits.qemu.qmp.wait_status("postcopy-paused", since=since)
            address = waits.recover()
        send(folder, address, destination=dialect(emulator), recover=True)
        arrived(waits)


# -- broken in order ---------------------------------------------------------------------------------------------------


def fail_send(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the `number`th send fail; what comes back fills with the names of the channels that were written to."""
    written: list[str] = []
    original = Connection.send

    def failing(self: Connection, *buffers: Any) -> None:
        written.append(self.name)
        if len(written) == number:
            raise ChannelError(f"{self.name}: this send was made to fail")
        original(self, *buffers)

    monkeypatch.setattr(Connection, "send", failing)
    return written


@pytest.mark.parametrize("mode", ["precopy", "multifd-2-none", "preempt"])
def test_whichever_send_fails(
    mode: str, emulator: Emulator, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In precopy the destination has then failed; after RUN it is paused, and is recovered."""
    name = f"{emulator.version_name}-plain"
    folder = folder_of(name)
    capabilities, parameters, settings = MODES[mode]
    number, succeeded = 0, False
    while not succeeded:
        # the first sends one by one; between the pages all are alike
        number += 1 if number < 8 else 9
        with (
            waiting(emulator, recording(name), *capabilities, **parameters) as waits,
            monkeypatch.context() as m,
        ):
            written = fail_send(m, number)
            try:
                send(folder, waits.address, destination=dialect(emulator), **settings)
                succeeded = True
            except ChannelError as error:
                assert "made to fail" in error.message
                m.undo()
                if error.guest is Whereabouts.SPLIT:
                    assert mode == "preempt"
                    if "never ran" in error.hint and not is_paused(waits):
                        continue
                    send(folder, waits.recover(), destination=dialect(emulator), recover=True, preempt=True)
                    arrived(waits)
                elif error.guest is Whereabouts.SOURCE:
                    assert len(written) == number or mode != "precopy"
                    assert "completed" not in waits.qemu.qmp.statuses()
                else:
                    assert error.guest is Whereabouts.UNKNOWN
                    assert mode != "preempt"
    assert number > 8


def is_paused(waits: Waiting) -> bool:
    """What a QEMU has made of a connection that broke about the time of RUN.

    Between LISTEN and RUN 7.2 exits, crashes, or stands still: its devices wait for a page that does not come.
    """
    try:
        return waits.qemu.qmp.wait_status("postcopy-paused", "failed") == "postcopy-paused"
    except QemuError:
        assert waits.qemu.process.wait(20) != 0
        return False


STAGES = ["connecting", "switching", "pages", "finishing"]


@pytest.mark.parametrize("mode", ["precopy", pytest.param("multifd-2-zlib", marks=pytest.mark.compat), "preempt"])
@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_at_any_stage(mode: str, stage: str, emulator: Emulator, folder_of: Callable[[str], Path]) -> None:
    name = f"{emulator.version_name}-plain"
    capabilities, parameters, settings = MODES[mode]
    if stage == "switching" and mode != "preempt":
        stage = "pages"
    stop = Stop()

    def cancel(report: SendProgress) -> None:
        if report.stage == stage:
            stop.request()

    with waiting(emulator, recording(name), *capabilities, **parameters) as waits:
        with pytest.raises(MigrationAborted) as failure:
            send(folder_of(name), waits.address, stop, cancel, destination=dialect(emulator),
                 bandwidth_bytes_per_s=SLOW_BYTES_PER_S if stage == "pages" else None, **settings)  # fmt: skip
        split = mode == "preempt" and stage in ("pages", "finishing")
        assert failure.value.guest is (Whereabouts.SPLIT if split else Whereabouts.SOURCE)


# -- peers that misbehave ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rude_peer(reads_bytes: int, answer: bytes = b"", closes: bool = True) -> Iterator[Address]:
    """Reads so many bytes of the first connection, answers, and then closes it or stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    left = reads_bytes
                    while left > 0 and (data := connection.recv(min(left, 1 << 16))):
                        left -= len(data)
                    connection.sendall(answer)
                    if not closes:
                        over.wait()

        thread = threading.Thread(target=serve, name="rude-peer")
        thread.start()
        try:
            yield Address("127.0.0.1", server.getsockname()[1])
        finally:
            over.set()
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join()


WAYS: list[dict[str, Any]] = [
    {"destination": Dialect.QEMU_7_2},
    {"destination": Dialect.QEMU_11_1, "postcopy": True, "preempt": True},
    {"destination": Dialect.QEMU_11_1, "multifd_channels": 2, "compression": "zlib"},
    {"destination": Dialect.QEMU_11_1, "recover": True},
]


@pytest.mark.parametrize("settings", WAYS, ids=["precopy", "preempt", "multifd", "recover"])
@pytest.mark.parametrize("reads_bytes", [0, 1, 40])
def test_a_peer_that_closes(settings: dict[str, Any], reads_bytes: int, folder_of: Callable[[str], Path]) -> None:
    with rude_peer(reads_bytes) as address, pytest.raises(ChannelError) as failure:
        send(folder_of("7.2-plain"), address, **settings)
    assert failure.value.guest is not None


@pytest.mark.parametrize("settings", WAYS, ids=["precopy", "preempt", "multifd", "recover"])
@pytest.mark.parametrize("reads_bytes", [0, 41, 1 << 30])
def test_a_peer_that_stalls(settings: dict[str, Any], reads_bytes: int, folder_of: Callable[[str], Path]) -> None:
    began = time.monotonic()
    with rude_peer(reads_bytes, closes=False) as address, pytest.raises(ChannelError, match=r"0\.2 s"):
        send(folder_of("7.2-plain"), address, stall_s=0.2, **settings)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"\0\1\0\4\0\0\0\1", "says that it failed"),
        (b"\0\1\0\4\0\0\0\0", "SHUT before the end"),
        (b"\0\x09\0\0", "invalid message"),
        (b"\0\4\0\x0c" + bytes(8) + b"\0\0\x10\0", "before any request that names a block"),
        (b"\0\3\0\x13" + bytes(8) + b"\0\0\x10\0\6pc.ram", "no postcopy runs"),
    ],
)
def test_a_peer_that_breaks_the_rules(answer: bytes, says: str, folder_of: Callable[[str], Path]) -> None:
    settings = {"destination": Dialect.QEMU_11_1, "postcopy": True, "preempt": True}
    with rude_peer(10, answer, closes=False) as address, pytest.raises(MigrationError, match=says) as failure:
        send(folder_of("7.2-plain"), address, **settings)
    assert failure.value.guest is Whereabouts.SOURCE


def test_nobody_listens(folder_of: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
    with pytest.raises(ChannelError, match="cannot connect") as failure:
        send(folder_of("7.2-plain"), address)
    assert failure.value.retryable
    assert failure.value.guest is Whereabouts.SOURCE


def test_a_stop_that_came_before(folder_of: Callable[[str], Path]) -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(MigrationAborted):
        send(folder_of("7.2-plain"), Address("127.0.0.1", 9), stop)


@pytest.mark.parametrize(
    "settings",
    [
        {"preempt": True},
        {"multifd_channels": 256},
        {"multifd_channels": 2, "compression": "lzma"},
        {"compression": "zlib"},
        {"bandwidth_bytes_per_s": 0},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SendSettings(**settings)
