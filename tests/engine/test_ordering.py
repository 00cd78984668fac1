"""A QEMU 7.2 whose connections come in the wrong order, and a destination that alone puts them right."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.emulators import LabQemu, lab_source
from tests.support.recorder import Emulator
from virtmig.agent.ordering import Ordered, Ordering
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import ChannelError, MigrationAborted, MigrationError, RequestError
from virtmig.link.messages import ChannelName
from virtmig.progress import Whereabouts
from virtmig.stream.wire import QEMU_VM_FILE_MAGIC

CHANNELS = 4
WAIT_S = 30.0


class Front:
    """Where the source connects: main is passed on last of all, as a network may deliver it."""

    def __init__(self, target: Address, after: int) -> None:
        self.order: list[str] = []
        self._target, self._after = target, after
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept)

    def __enter__(self) -> Front:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._acceptor.join()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                self._sockets.append(near)
                self._start(self._pass, near)

    def _start(self, call: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=call, args=arguments))
        self._threads[-1].start()

    def _pass(self, near: socket.socket) -> None:
        first = near.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)
        main = int.from_bytes(first, "big") == QEMU_VM_FILE_MAGIC
        with self._changed:
            if main:
                self._changed.wait_for(lambda: len(self.order) == self._after, WAIT_S)
            far = socket.create_connection((self._target.host, self._target.port))
            self._sockets.append(far)
            far.sendall(near.recv(4))
            self.order.append("main" if main else "multifd")
            self._changed.notify_all()
        self._start(_carry, near, far)
        self._start(_carry, far, near)


def _carry(come: socket.socket, go: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := come.recv(1 << 16):
            go.sendall(data)
    with contextlib.suppress(OSError):
        go.shutdown(socket.SHUT_WR)


class Running:
    """An Ordering in a thread of its own, on loopback."""

    def __init__(self, qemu: Address, *, multifd_channels: int = 0, preempt: bool = False) -> None:
        self.stop = Stop()
        self.told: list[str] = []
        self.result: Ordered | MigrationError | None = None
        self._listener = Listener(Address("127.0.0.1", 0), self.stop)
        self.address = self._listener.address
        self._ordering = Ordering(self._listener, qemu, self.stop, multifd_channels=multifd_channels, preempt=preempt,
                                  tell=self.told.append)  # fmt: skip
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.result = self._ordering.run()
        except MigrationError as error:
            self.result = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.request()
        self._thread.join()
        self._listener.close()

    def wait(self) -> Ordered | MigrationError:
        self._thread.join(WAIT_S)
        assert self.result is not None, "it goes on"
        return self.result


@pytest.fixture
def qemu_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "q"))
        server.listen(8)
        server.settimeout(WAIT_S)
        yield server


def multifd_hello(index: int) -> bytes:
    return b"\x11\x22\x33\x44" + b"\0\0\0\1" + bytes(16) + bytes([index])


def test_main_is_first_whatever_came_first_and_strangers_are_turned_away(qemu_socket: socket.socket) -> None:
    qemu = Address(path=qemu_socket.getsockname())
    with Running(qemu, multifd_channels=2) as running:
        where = (running.address.host, running.address.port)
        with contextlib.ExitStack() as stack:
            stranger, second, first, main = (stack.enter_context(socket.create_connection(where)) for _ in range(4))
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                stranger.recv(1)
            second.sendall(multifd_hello(1) + b"two")
            first.sendall(multifd_hello(0) + b"one")
            main.sendall(b"QEVM\0\0\0\3")
            taken = []
            for _ in range(3):
                connection, _ = qemu_socket.accept()
                taken.append(stack.enter_context(connection))
            assert [each.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)[:4] for each in taken] == [
                b"QEVM", b"\x11\x22\x33\x44", b"\x11\x22\x33\x44"]  # fmt: skip
            assert taken[1].recv(28, socket.MSG_WAITALL) == multifd_hello(0) + b"one"
            assert taken[2].recv(28, socket.MSG_WAITALL) == multifd_hello(1) + b"two"
            main.shutdown(socket.SHUT_WR)  # one direction ends, the other goes on
            assert taken[0].recv(16, socket.MSG_WAITALL) == b"QEVM\0\0\0\3"
            taken[0].sendall(b"shut")
            assert main.recv(4, socket.MSG_WAITALL) == b"shut"
        done = running.wait()
    assert isinstance(done, Ordered)
    assert done.channels == (ChannelName("main"), ChannelName("parallel", 0), ChannelName("parallel", 1))
    assert (done.bytes_to_qemu, done.bytes_from_qemu) == (8 + 2 * 28, 4)
    assert [words for words in done.refused if "HTTP" in words]
    assert "main: connected to QEMU" in running.told


def test_a_silent_preempt_channel_comes_to_qemu_after_main(qemu_socket: socket.socket) -> None:
    with Running(Address(path=qemu_socket.getsockname()), preempt=True) as running, contextlib.ExitStack() as stack:
        where = (running.address.host, running.address.port)
        preempt = stack.enter_context(socket.create_connection(where))
        main = stack.enter_context(socket.create_connection(where))
        main.sendall(b"QEVM\0\0\0\3")
        taken = [stack.enter_context(qemu_socket.accept()[0]) for _ in range(2)]
        assert taken[0].recv(8, socket.MSG_WAITALL) == b"QEVM\0\0\0\3"
        preempt.sendall(b"page")
        assert taken[1].recv(4, socket.MSG_WAITALL) == b"page"


def test_what_cannot_be_is_said(qemu_socket: socket.socket, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="loses the guest"):
        Running(Address(path=str(tmp_path / "q")), multifd_channels=2, preempt=True)
    with Running(Address(path=str(tmp_path / "nobody"))) as running:
        with socket.create_connection((running.address.host, running.address.port)) as main:
            main.sendall(b"QEVM\0\0\0\3")
            result = running.wait()
        assert isinstance(result, ChannelError)
        assert "does not take the connection" in result.message
        assert "-incoming" in result.hint
        assert result.message.endswith("; the guest stays at its source")
        assert result.guest is Whereabouts.SOURCE
    with Running(Address(path=qemu_socket.getsockname())) as running:
        running.stop.request(MigrationAborted("stopped by SIGTERM"))
        assert isinstance(running.wait(), MigrationAborted)
    with Running(Address(path=qemu_socket.getsockname())) as running:
        with socket.create_connection((running.address.host, running.address.port)) as main:
            main.sendall(b"QEVM\0\0\0\3")
            with qemu_socket.accept()[0] as taken:
                assert taken.recv(8, socket.MSG_WAITALL) == b"QEVM\0\0\0\3"
                running.stop.request(MigrationAborted("stopped by SIGTERM"))
                result = running.wait()
                assert taken.recv(1) == b""
        assert isinstance(result, MigrationAborted)
        assert result.guest is Whereabouts.UNKNOWN


def test_a_qemu_whose_parallel_channels_arrive_before_main(emulator: Emulator) -> None:
    capabilities = ("return-path", "multifd")
    with (
        lab_source(emulator, capabilities=capabilities, **{"multifd-channels": CHANNELS}) as (here, _),
        emulator.folder() as folder,
        LabQemu(emulator, folder, "-incoming", "defer", name="destination") as there,
    ):
        there.set_capabilities([*capabilities, "events"])
        there.set_parameters({"multifd-channels": CHANNELS})
        path = folder[1] + "/in"
        there.qmp.execute("migrate-incoming", uri=f"unix:{path}")
        with (
            Running(Address(path=str(folder[0] / "in")), multifd_channels=CHANNELS) as running,
            Front(running.address, CHANNELS) as front,
        ):
            here.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{front.port}")
            here.qmp.wait_status("completed")
            there.qmp.wait_status("completed")
            assert front.order == ["multifd"] * CHANNELS + ["main"]
            assert here.qmp.execute("query-status")["running"] is False
            there.wait_heartbeat(2)
            there.qmp.execute("stop")
            there.check_walk()
            done = running.wait()
    assert isinstance(done, Ordered)
    assert done.channels == (ChannelName("main"), *(ChannelName("parallel", index) for index in range(CHANNELS)))
    assert not done.broken


def test_the_command_says_what_it_does_and_how_it_ended(qemu_socket: socket.socket, tmp_path: Path) -> None:
    words = ("order", f"unix:{tmp_path}/l", f"unix:{qemu_socket.getsockname()}")
    command = [sys.executable, "-m", "virtmig.cli.main", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on unix:{tmp_path}/l\n"
        with socket.socket(socket.AF_UNIX) as main:
            main.connect(str(tmp_path / "l"))
            main.sendall(b"QEVM\0\0\0\3")
            with qemu_socket.accept()[0] as taken:
                assert taken.recv(8, socket.MSG_WAITALL) == b"QEVM\0\0\0\3"
                assert process.stdout.readline() == "main: connected to QEMU\n"
        assert process.stdout.readline() == "8 B over main; both QEMUs know how it ended\n"
        assert process.wait(WAIT_S) == 0
    assert not (tmp_path / "l").exists()
