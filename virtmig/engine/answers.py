"""What a destination says on the return path, read in a thread of its own, and the waits for it."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Mapping

from virtmig.engine.transport import Connection, Stop
from virtmig.errors import ChannelError, RemoteProtocolError
from virtmig.stream.return_path import (
    Pong,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathDecoder,
    ReturnPathEvent,
    Shut,
)


class Silent(ChannelError):
    """It is connected, and does not say what is waited for."""


class Answers:
    """`read` is the thread's work. `on_request` and `on_bitmap` are called in it; `changed` guards the rest.

    The destination may be silent as long as nobody waits for it; a `wait` lasts `stall_s` at most.
    """

    def __init__(
        self,
        stop: Stop,
        lengths: Mapping[str, int],
        stall_s: float,
        *,
        on_request: Callable[[RequestPages], None],
        on_bitmap: Callable[[ReceivedBitmap], None],
    ) -> None:
        self.changed = threading.Condition()
        self.pongs: set[int] = set()
        #: the blocks whose bitmaps came
        self.told: set[str] = set()
        self.resumed = False
        self.arrived = False
        #: the end of the stream goes out: from here on SHUT 0 is no surprise
        self.finished = False
        #: it said SHUT with an error
        self.refused = False
        self._stop = stop
        self._lengths = lengths
        self._stall_s = stall_s
        self._on_request = on_request
        self._on_bitmap = on_bitmap
        self._forget = stop.on_request(self._wake)

    def read(self, connection: Connection) -> None:
        """Until SHUT 0. Raises ChannelError, RemoteProtocolError, the stop's error."""
        decoder = ReturnPathDecoder(blocks=self._lengths)
        buffer = memoryview(bytearray(1 << 16))
        poll = select.poll()
        poll.register(connection.socket.fileno(), select.POLLIN)
        while not self.arrived:
            poll.poll()
            count = connection.recv_into(buffer)
            if count:
                decoder.feed(buffer[:count])
            else:
                decoder.end()
            for event in decoder.events():
                self._take(event)
            if not count and not self.arrived:
                self._stop.check()
                raise ChannelError("main: the destination closed the connection before it was done")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Until `done`, the stop, or the end of patience: nothing from the destination that `what`."""
        with self.changed:
            self.changed.wait_for(lambda: done() or self._stop.requested.is_set(), self._stall_s)
            if done():
                return
        self._stop.check()
        raise Silent(f"main: for {self._stall_s:g} s nothing from the destination that {what}")

    def close(self) -> None:
        self._forget()

    def _take(self, event: ReturnPathEvent) -> None:
        match event:
            case RequestPages():
                self._on_request(event)
                return
            case Shut() if event.value:
                self.refused = True
                raise ChannelError(f"main: the destination says that it failed ({event.value})")
            case Shut() if not self.finished:
                raise RemoteProtocolError("SHUT before the end of the stream", channel="return path")
            case ReceivedBitmap():
                self._on_bitmap(event)
        with self.changed:
            match event:
                case Pong():
                    self.pongs.add(event.value)
                case ReceivedBitmap():
                    self.told.add(event.block)
                case ResumeAck():
                    self.resumed = True
                case Shut():
                    self.arrived = True
            self.changed.notify_all()

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()
