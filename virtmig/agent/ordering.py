"""A destination alone puts a source's connections in order: no agent at the source, no handshake, any QEMU.

    source's QEMU  ->  LISTEN: named by stream/channel.py  ->  QEMU's address, one by one

QEMU 7.2 takes the first connection for main and looks at nothing, and a network may deliver them in any order. What
comes here is named by its first bytes and held until its turn. One order suits every age: main, then each multifd
channel behind its hello, then the preempt channel; so nobody has to say which QEMU this is.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from virtmig.agent.access import QemuUser
from virtmig.agent.meeting import DestinationMeeting, Shape, channel_of
from virtmig.engine.channels import Arrivals
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import ChannelError, MigrationError, RequestError
from virtmig.link.messages import ChannelName
from virtmig.progress import Whereabouts
from virtmig.stream.channel import Identity, Role
from virtmig.stream.wire import Dialect

BUFFER_BYTES = 256 * 1024
MAIN = ChannelName("main")
_LOOK_S = 1.0
#: a peer that has vanished is noticed after 20 s of silence and five unanswered questions, 5 s apart
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 5))


@dataclass(frozen=True, slots=True)
class Ordered:
    """What was carried, over which connections, in the order in which QEMU was connected to."""

    channels: tuple[ChannelName, ...]
    bytes_to_qemu: int
    bytes_from_qemu: int
    #: connections that did not end as both ends wanted, in words
    broken: tuple[str, ...]
    refused: tuple[str, ...]


class Pipe:
    """One of the source's connections and, when its turn has come, QEMU's: two threads, half-closed as each ends."""

    def __init__(
        self,
        channel: ChannelName,
        source: socket.socket,
        *,
        attached: Callable[[ChannelName], None],
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called in the pipe's threads: the first bytes of a direction went on, or it ended."""
        self.channel = channel
        self.bytes_to_qemu = 0
        self.bytes_from_qemu = 0
        self.broken = ""
        self._source = source
        self._qemu: socket.socket | None = None
        self._attached, self._changed = attached, changed
        self._threads: list[threading.Thread] = []
        source.setblocking(True)
        _keep_alive(source)

    @property
    def attached(self) -> bool:
        return self._qemu is not None

    @property
    def done(self) -> bool:
        return self.attached and not any(thread.is_alive() for thread in self._threads)

    def attach(self, qemu: socket.socket) -> None:
        """QEMU's connection; the pipe owns it."""
        self._qemu = qemu
        qemu.setblocking(True)
        _keep_alive(qemu)
        for way, come, go in (("to QEMU", self._source, qemu), ("from QEMU", qemu, self._source)):
            thread = threading.Thread(target=self._carry, args=(way, come, go), name=f"order {self.channel} {way}")
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()
        self._attached(self.channel)

    def close(self) -> None:
        """Both ends see the end; the threads have ended when this returns."""
        for each in (self._source, self._qemu):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._source, self._qemu):
            if each is not None:
                each.close()

    def _carry(self, way: str, come: socket.socket, go: socket.socket) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        try:
            while count := come.recv_into(buffer):
                go.sendall(buffer[:count])
                self._count(way, count)
        except OSError as error:
            self.broken = self.broken or f"{self.channel} {way}: {error.strerror or error}"
            with contextlib.suppress(OSError):
                come.shutdown(socket.SHUT_RD)
        with contextlib.suppress(OSError):
            go.shutdown(socket.SHUT_WR)
        self._changed()

    def _count(self, way: str, count: int) -> None:
        if way == "to QEMU":
            first, self.bytes_to_qemu = not self.bytes_to_qemu, self.bytes_to_qemu + count
        else:
            first, self.bytes_from_qemu = not self.bytes_from_qemu, self.bytes_from_qemu + count
        if first:
            self._changed()


class Ordering:
    """One migration. `run` is called once, in the owner's thread; everything else happens in threads that it joins."""

    def __init__(
        self,
        listener: Listener,
        qemu: Address,
        stop: Stop,
        *,
        multifd_channels: int = 0,
        preempt: bool = False,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        """The number and `preempt` are the source's settings; nothing on the wire tells them. Raises RequestError.

        `tell` hears of each connection that QEMU was connected to, and of each that was turned away.
        """
        if multifd_channels and preempt:
            raise RequestError(
                "a QEMU before 10.1 loses the guest when multifd and postcopy are both on, a newer one needs no order",
                option="postcopy-preempt",
                hint="one of both; or two QEMUs since 10.1, straight to each other",
            )
        channels = [MAIN, *(ChannelName("parallel", index) for index in range(multifd_channels))]
        channels += [ChannelName("priority")] if preempt else []
        # the strictest of the orders: an early preempt channel, and a destination that peeks at every connection
        shape = Shape(source=Dialect.QEMU_7_2, destination=Dialect.QEMU_11_1, channels=tuple(channels))
        self._qemu = qemu
        self.user = QemuUser(evidence="whoever listens at the address that was given")
        self._stop = stop
        self._tell = tell
        self._pipes: dict[ChannelName, Pipe] = {}
        self._order: list[ChannelName] = []
        self._told: list[str] = []
        self._box: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._meeting = DestinationMeeting(self, shape, self._pipes)
        self._arrivals = Arrivals(listener, shape.expected(), stop, self._named)
        self._expected = frozenset(channels) - {ChannelName("priority")}

    def address(self, channel: ChannelName) -> Address:
        """Where QEMU listens: one address for all."""
        return self._qemu

    def run(self) -> Ordered:
        """Carry until every connection has ended both ways.

        Raises ChannelError when QEMU takes none, MigrationAborted when told to stop; every connection is closed then.
        """
        forget = self._stop.on_request(self._poke)
        self._arrivals.start()
        try:
            while not self._done():
                with contextlib.suppress(queue.Empty):
                    self._box.get(timeout=_LOOK_S)()
                self._stop.check()
                self._look()
        except MigrationError as error:
            error.guest, words = Whereabouts.SOURCE, "the guest stays at its source"
            if self._begun:
                error.guest, words = Whereabouts.UNKNOWN, "only both QEMUs know where the guest is: ask them"
            error.message = f"{error.message}; {words}"
            error.args = (error.message,)
            raise
        finally:
            forget()
            self._arrivals.close()
            for pipe in self._pipes.values():
                pipe.close()
        pipes = self._pipes.values()
        return Ordered(
            channels=tuple(self._order),
            bytes_to_qemu=sum(pipe.bytes_to_qemu for pipe in pipes),
            bytes_from_qemu=sum(pipe.bytes_from_qemu for pipe in pipes),
            broken=tuple(pipe.broken for pipe in pipes if pipe.broken),
            refused=tuple(self._told),
        )

    def _poke(self) -> None:
        self._box.put(lambda: None)

    @property
    def _begun(self) -> bool:
        """Every channel that carries the guest has its way: from here on only both QEMUs know how far it is."""
        return all(channel in self._pipes and self._pipes[channel].attached for channel in self._expected)

    def _done(self) -> bool:
        main = self._pipes.get(MAIN)
        return main is not None and main.done and all(pipe.done or not pipe.attached for pipe in self._pipes.values())

    def _named(self, identity: Identity, connection: socket.socket) -> None:
        """In the thread that accepts."""

        def take() -> None:
            channel = channel_of(identity)
            self._pipes[channel] = Pipe(channel, connection, attached=self._reached, changed=self._poke)
            reach = self._meeting.announced if identity.role is Role.PREEMPT else self._meeting.arrived
            self._reach(lambda: reach(channel))

        self._box.put(take)

    def _look(self) -> None:
        self._reach(self._meeting.go_on)
        for words in (words for words in list(self._arrivals.refused) if words not in self._told):
            self._told.append(words)
            self._tell(words)

    def _reached(self, channel: ChannelName) -> None:
        self._order.append(channel)
        self._tell(f"{channel}: connected to QEMU")

    def _reach(self, call: Callable[[], None]) -> None:
        try:
            call()
        except ChannelError as error:
            error.hint = "start the destination's QEMU with -incoming on that address before the source migrates"
            raise


def _keep_alive(connection: socket.socket) -> None:
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
