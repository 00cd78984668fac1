"""A carrier: one of QEMU's connections, carried unchanged by a named, resumable channel to the agent of the other host.

    QEMU  <- socket ->  carrier  <- line ->  carrier  <- socket ->  QEMU

One thread owns both sockets and never waits for one of them alone. What was read from QEMU is kept until the peer has
written it on; when the line breaks QEMU notices a pause, and the rest goes over the next line. Directions end one by
one, as QEMU ends them: half-closed, never both at once. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from virtmig.engine.lines import Line, drop
from virtmig.engine.transport import Buffer
from virtmig.errors import ChannelError, MigrationError
from virtmig.link.channel import EndReceived, Received, ResumableChannel
from virtmig.link.frames import FrameDecoder, FrameType
from virtmig.link.messages import ChannelName

#: a unix socket hands out what its sender may have in flight: 208 KiB; larger reads find nothing more
BUFFER_BYTES = 256 * 1024
#: less room than this in a buffer and the next one is taken: a read should be worth its call
_LEAST_READ_BYTES = 64 * 1024
LINE_BUFFER_BYTES = 512 * 1024
#: acknowledged so often, that what is kept stays in the processor's cache
ACK_EVERY_BYTES = 1 << 20
OPEN_FRAMES = frozenset({FrameType.DATA, FrameType.ACK, FrameType.END})


@dataclass(frozen=True, slots=True)
class Arrived:
    """The first bytes came and no QEMU is there to take them."""

    channel: ChannelName


@dataclass(frozen=True, slots=True)
class Moved:
    """The first bytes went to QEMU, or the first came from it: what an order of connections may wait for."""

    channel: ChannelName


@dataclass(frozen=True, slots=True)
class LineBroke:
    channel: ChannelName
    line: Line
    why: str


@dataclass(frozen=True, slots=True)
class QemuClosed:
    """QEMU reads no more on this connection, and `undelivered_bytes` at least were for it."""

    channel: ChannelName
    undelivered_bytes: int


@dataclass(frozen=True, slots=True)
class PeerBroke:
    """The peer broke a rule of the link."""

    channel: ChannelName
    error: MigrationError


@dataclass(frozen=True, slots=True)
class Done:
    """Ended both ways, and everything acknowledged."""

    channel: ChannelName


@dataclass(frozen=True, slots=True)
class Withheld:
    """A watch has said why some bytes may not go on. Nothing follows them."""

    channel: ChannelName
    why: str


@dataclass(frozen=True, slots=True)
class CarrierFailed:
    """A defect of ours: the thread has ended."""

    channel: ChannelName
    error: Exception


CarrierEvent = Arrived | Moved | LineBroke | QemuClosed | PeerBroke | Done | Withheld | CarrierFailed
#: bytes before they go on; "" or why they may not
Watch = Callable[[memoryview], str]
#: how many seconds to wait before `count` bytes may be read
Throttle = Callable[[int], float]


class Carrier:
    """The thread "relay CHANNEL". Its methods are called from one other thread; `report` is called in it."""

    def __init__(
        self,
        name: ChannelName,
        window_bytes: int,
        report: Callable[[CarrierEvent], None],
        *,
        throttle: Throttle | None = None,
        watch_from_qemu: Watch | None = None,
        watch_to_qemu: Watch | None = None,
    ) -> None:
        """The watches are called in the carrier's thread, which carries nothing meanwhile."""
        self.name = name
        self.bytes_to_qemu = 0
        self.bytes_from_qemu = 0
        self.done = False
        self._report = report
        self._throttle = throttle
        self._window_bytes = window_bytes
        self._watch_from_qemu, self._watch_to_qemu = watch_from_qemu, watch_to_qemu
        self._withheld = False
        self._channel = ResumableChannel(
            str(name), window_bytes, ack_every_bytes=min(ACK_EVERY_BYTES, window_bytes // 4)
        )
        self._qemu: socket.socket | None = None
        self._qemu_ended = False  # it writes no more
        self._qemu_deaf = False  # it reads no more
        self._nobody = False  # and none will come
        self._line: Line | None = None
        self._decoder = FrameDecoder()
        self._to_line: list[memoryview] = []
        self._to_qemu: list[memoryview] = []
        self._pool = _Pool()
        self._line_buffer = memoryview(bytearray(LINE_BUFFER_BYTES))
        self._end_to_qemu = False
        self._paused_until = 0.0  # time.monotonic; 0: not paused
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._poll = select.poll()
        self._polled: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._run, name=f"relay {name}", daemon=True)
        self._thread.start()

    # -- from other threads ----------------------------------------------------------------------------------------

    def attach(self, qemu: socket.socket) -> None:
        """This is QEMU's connection; it belongs to the carrier now."""
        self._tell(lambda: self._attach(qemu))

    def connect(self, line: Line, decoder: FrameDecoder) -> None:
        """The channel is open on this line; `decoder` has read everything up to here."""
        self._tell(lambda: self._connect(line, decoder, None))

    def resume(self, line: Line, decoder: FrameDecoder, received_up_to: int) -> None:
        """The channel goes on over this line; the peer has everything before `received_up_to`."""
        self._tell(lambda: self._connect(line, decoder, received_up_to))

    def detach(self) -> int:
        """Use the line no more; how far this side has received, which stays so until the next line."""
        answer: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._tell(lambda: answer.put(self._detach()))
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                return answer.get(timeout=0.2)
        return self._channel.received_up_to

    def nobody_comes(self) -> None:
        """No QEMU will use this channel: it ends, when nothing is to be carried."""
        self._tell(self._expect_nobody)

    def close(self) -> None:
        """End the thread, both connections with it."""
        if self._wake >= 0:
            self._stopping = True
            self._tell(lambda: None)
            self._thread.join()
            os.close(self._wake)
            self._wake = -1

    def _tell(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:
            self._report(CarrierFailed(self.name, error))
            raise
        finally:
            if self._qemu is not None:
                self._qemu.close()
            if self._line is not None:
                self._line.close()

    def _turn(self) -> None:
        reads_qemu = self._reads_qemu()
        line, qemu = self._line, self._qemu
        line_events = qemu_events = 0
        ready_already = False
        if line is not None:
            reads_line = self._reads_line()
            ready_already = reads_line and line.waiting_bytes > 0
            line_events = line.events(read=reads_line, write=bool(self._to_line))
        if qemu is not None:
            qemu_events = (select.POLLIN if reads_qemu else 0) | (select.POLLOUT if self._to_qemu else 0)
        poll = self._poll_for(
            line.fileno() if line is not None and line_events else -1, line_events,
            qemu.fileno() if qemu is not None and qemu_events else -1, qemu_events,
        )  # fmt: skip
        ready = [fd for fd, _ in poll.poll(0 if ready_already else self._timeout_ms())]
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            while not self._commands.empty():
                self._commands.get()()
            return
        if qemu is not None and qemu.fileno() in ready:
            self._serve_qemu(qemu, reads_qemu)
        if line is not None and line is self._line and (ready_already or line.fileno() in ready):
            self._serve_line(line)

    def _poll_for(self, *wanted: int) -> select.poll:
        """File descriptors and their events, -1 for none; mostly the same as before."""
        if wanted != self._polled:
            self._poll = select.poll()
            self._poll.register(self._wake, select.POLLIN)
            for fd, events in (wanted[:2], wanted[2:]):
                if fd >= 0:
                    self._poll.register(fd, events)
            self._polled = wanted
        return self._poll

    def _timeout_ms(self) -> float | None:
        if not self._paused_until:
            return None
        left = self._paused_until - time.monotonic()
        if left <= 0:
            self._paused_until = 0.0
            return 0
        return left * 1000

    def _reads_qemu(self) -> bool:
        """While the line lives, what was read goes out first; without one, reading goes on until the window is full."""
        if self._qemu is None or self._qemu_ended or self._paused_until or self._withheld:
            return False
        return not self._to_line and self._channel.outgoing.room_bytes > 0

    def _reads_line(self) -> bool:
        """What came goes to QEMU first. But if we wait for an ACK, it must not wait behind what QEMU does not take:
        the directions are each other's business no more than those of a connection. The peer's window bounds it.
        """
        if not self._to_qemu:
            return True
        return not self._channel.outgoing.room_bytes and sum(map(len, self._to_qemu)) <= self._window_bytes

    def _serve_qemu(self, qemu: socket.socket, reads: bool) -> None:
        if self._to_qemu:
            self._write_qemu(qemu)
        if not reads:
            return
        view = self._pool.room(self._channel.outgoing.room_bytes)
        try:
            count = qemu.recv_into(view)
        except BlockingIOError:
            return
        except OSError:
            count = 0  # whatever it was, nothing more comes
        if not count:
            self._qemu_ended = True
            self._queue(self._channel.end())
            return
        if self._watch_from_qemu is not None and self._withhold(self._watch_from_qemu(view[:count])):
            return
        first = not self.bytes_from_qemu
        self.bytes_from_qemu += count
        data = self._pool.take(count, self.bytes_from_qemu)
        self._queue(self._channel.write(data))
        if first:
            self._report(Moved(self.name))
        if self._line is not None and self._to_line:
            self._write_line(self._line)
        if self._throttle is not None and (wait_s := self._throttle(count)) > 0:
            self._paused_until = time.monotonic() + wait_s

    def _serve_line(self, line: Line) -> None:
        if self._to_line:
            self._write_line(line)
        if self._line is not line or not self._reads_line():
            return
        buffer = self._line_buffer
        if self._to_qemu:  # which is in that buffer
            buffer = memoryview(bytearray(_LEAST_READ_BYTES))
        try:
            count = line.recv_into(buffer)
        except ChannelError as error:
            self._lose(line, str(error))
            return
        if count is None:
            return
        if not count:
            self._lose(line, "closed by the peer")
            return
        try:
            self._decoder.feed(buffer[:count])
            for event in self._decoder.events():
                self._heard(self._channel.receive(event))
        except MigrationError as error:
            self._line = None
            line.close()
            self._channel.broken()
            self._report(PeerBroke(self.name, error))
            return
        self._after_receiving()

    def _withhold(self, why: str) -> bool:
        if why and not self._withheld:
            self._withheld = True
            self._report(Withheld(self.name, why))
        return self._withheld

    def _heard(self, event: object) -> None:
        if isinstance(event, Received):
            if self._watch_to_qemu is None or not self._withhold(self._watch_to_qemu(event.data)):
                self._to_qemu.append(event.data)
        elif isinstance(event, EndReceived):
            self._end_to_qemu = True
        else:
            self._pool.free(min(self._channel.outgoing.acknowledged, self.bytes_from_qemu))

    def _after_receiving(self) -> None:
        if self._qemu is not None:
            self._write_qemu(self._qemu)
        elif self._to_qemu:
            if self._nobody:
                self._discard()
            else:
                self._report(Arrived(self.name))
        else:
            self._finish_receiving()
        if self._line is not None and self._to_line:
            self._write_line(self._line)
        self._check_done()

    def _write_qemu(self, qemu: socket.socket) -> None:
        first = not self.bytes_to_qemu
        while self._to_qemu and not self._qemu_deaf:
            try:
                count = qemu.sendmsg(self._to_qemu[:1024])
            except BlockingIOError:
                break
            except OSError:
                self._qemu_deaf = True
                self._report(QemuClosed(self.name, sum(map(len, self._to_qemu))))
                break
            self.bytes_to_qemu += count
            drop(self._to_qemu, count)
            self._queue(self._channel.consumed(count))
        if self._qemu_deaf:
            self._discard()
        if first and self.bytes_to_qemu:
            self._report(Moved(self.name))
        self._finish_receiving()
        if self._line is not None and self._to_line:
            self._write_line(self._line)

    def _discard(self) -> None:
        """Nobody reads it any more."""
        count = sum(map(len, self._to_qemu))
        self._to_qemu.clear()
        if count:
            self._queue(self._channel.consumed(count))
        self._finish_receiving()

    def _finish_receiving(self) -> None:
        """The peer's end, once all before it went to QEMU."""
        if not self._end_to_qemu or self._to_qemu:
            return
        if self._qemu is None and not self._nobody:
            self._nobody = True  # the other side's QEMU never came, or has gone: none is needed here
        self._end_to_qemu = False
        if self._qemu is not None:
            with contextlib.suppress(OSError):
                self._qemu.shutdown(socket.SHUT_WR)
        self._queue(self._channel.consumed(1))
        if self._nobody and self._qemu is None:
            self._end_without_qemu()
        self._check_done()

    def _write_line(self, line: Line) -> None:
        while self._to_line:
            try:
                count = line.send(self._to_line)
            except ChannelError as error:
                self._lose(line, str(error))
                return
            if count is None:
                return
            drop(self._to_line, count)
        self._check_done()

    def _queue(self, frames: Sequence[Buffer]) -> None:
        self._to_line += [memoryview(frame) for frame in frames]

    def _lose(self, line: Line, why: str) -> None:
        self._detach()
        self._report(LineBroke(self.name, line, why))

    def _check_done(self) -> None:
        if not self.done and self._channel.done and not self._to_line:
            self.done = True
            self._report(Done(self.name))

    # -- commands, in the thread -----------------------------------------------------------------------------------

    def _attach(self, qemu: socket.socket) -> None:
        if self._qemu is not None or self._nobody or self._stopping:
            qemu.close()
            return
        qemu.setblocking(False)
        self._qemu = qemu
        self._write_qemu(qemu)

    def _connect(self, line: Line, decoder: FrameDecoder, received_up_to: int | None) -> None:
        if self._line is not None:
            self._detach()
        decoder.accept = OPEN_FRAMES
        decoder.channel = str(self.name)
        self._line, self._decoder = line, decoder
        if received_up_to is not None:
            try:
                self._queue(self._channel.resume(received_up_to))
            except MigrationError as error:
                self._line = None
                line.close()
                self._report(PeerBroke(self.name, error))
                return
        self._write_line(line)

    def _detach(self) -> int:
        if self._line is not None:
            self._line.close()
            self._line = None
            self._to_line.clear()
            self._channel.broken()
        return self._channel.received_up_to

    def _expect_nobody(self) -> None:
        if self._qemu is None and not self._nobody:
            self._nobody = True
            self._discard()
            self._end_without_qemu()
            if self._line is not None and self._to_line:
                self._write_line(self._line)

    def _end_without_qemu(self) -> None:
        if not self._channel.outgoing.ended:
            self._queue(self._channel.end())


class _Pool:
    """Buffers that are read into and kept until the peer has what is in them; the last one freed is used first."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []
        self._full: deque[tuple[int, memoryview]] = deque()  # where in the direction each buffer ends
        self._open: memoryview | None = None
        self._used = 0
        self._end = 0

    def room(self, most_bytes: int) -> memoryview:
        """Where to read into; at most `most_bytes`."""
        if self._open is not None and len(self._open) - self._used < _LEAST_READ_BYTES:
            self._full.append((self._end, self._open))
            self._open = None
        if self._open is None:
            self._open = self._free.pop() if self._free else memoryview(bytearray(BUFFER_BYTES))
            self._used = 0
        return self._open[self._used : self._used + most_bytes]

    def take(self, count: int, end: int) -> memoryview:
        """The first `count` bytes of that, which end at position `end`."""
        assert self._open is not None
        taken = self._open[self._used : self._used + count]
        self._used += count
        self._end = end
        return taken

    def free(self, up_to: int) -> None:
        """Everything before position `up_to` is of no more use."""
        while self._full and self._full[0][0] <= up_to:
            self._free.append(self._full.popleft()[1])
        if self._open is not None and not self._full and self._end <= up_to:
            self._used = 0
