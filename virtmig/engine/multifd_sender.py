"""The sending side of multifd: one thread a channel, fed in pieces by the thread that reads the image."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from virtmig.engine.lazy import PageReader, page_buffer
from virtmig.engine.memory import Bytes
from virtmig.engine.transport import Connection, Stop
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.stream.multifd_encoder import MultifdEncoder
from virtmig.stream.wire import Dialect

#: pieces that wait for a channel
_MOST_WAITING = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """`data` None: the pages are sent from the memory that is mapped."""

    name: str
    pages: PageNumbers
    data: memoryview | None
    buffer: Bytes | None


class MultifdSender:
    """`put` waits while every channel is busy. Between `sync` calls the channels' order is free.

    What is read from a file is read once, into a buffer that goes with the pages and comes back when they are sent.

    The threads end with `close`, or by the stop.
    """

    def __init__(
        self, reader: PageReader, dialect: Dialect, count: int, *, uuid: bytes, method: str, stop: Stop
    ) -> None:
        numbers = itertools.count()  # its next() is atomic: QEMU counts packets over all channels
        self.encoders = [
            MultifdEncoder(index, dialect=dialect, uuid=uuid, method=method, packet_numbers=numbers)
            for index in range(count)
        ]
        self.connections: list[Connection] = []
        self.normal = 0
        self._reader = reader
        self._stop = stop
        self._changed = threading.Condition()
        self._work: deque[_Piece] = deque()
        self._free = [page_buffer() for _ in range(count + _MOST_WAITING + 1)]
        self._busy = 0
        self._closed = False
        self._forget = stop.on_request(self._wake)

    def start(self, start: Callable[[str, Callable[[], None]], None]) -> None:
        """`start` makes a named thread of each channel's work."""
        for connection, encoder in zip(self.connections, self.encoders, strict=True):
            start(connection.name, lambda c=connection, e=encoder: self._send(c, e))  # type: ignore[misc]

    def read(self, name: str, pages: PageNumbers) -> PageNumbers:
        """Read ascending `pages` and `put` those with contents; returns the zero ones. At most a `page_buffer`."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or bool(self._free))
            self._stop.check()
            buffer = self._free.pop()
        normal, zero, data = self._reader.read(name, pages, buffer)
        if len(normal):
            self._put(_Piece(name, normal, data, buffer))
        else:
            self._free.append(buffer)  # nobody but this thread waits for one
        return zero

    def put(self, name: str, pages: PageNumbers) -> None:
        """Pages with contents of one block, for whichever channel is free first; from the memory that is mapped."""
        if len(pages):
            self._put(_Piece(name, pages, None, None))

    def _put(self, piece: _Piece) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._work) < _MOST_WAITING)
            self._stop.check()
            self._work.append(piece)
            self.normal += len(piece.pages)
            self._changed.notify_all()

    def sync(self) -> None:
        """A SYNC on every channel, behind all that was put (multifd_send_sync_main)."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not (self._work or self._busy))
            self._stop.check()
        for connection, encoder in zip(self.connections, self.encoders, strict=True):
            connection.send(*encoder.sync())  # the channels' threads are idle

    def close(self) -> None:
        """Let the threads end; who started them joins them."""
        self._closed = True
        self._wake()
        self._forget()

    @property
    def _over(self) -> bool:
        return self._closed or self._stop.requested.is_set()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send(self, connection: Connection, encoder: MultifdEncoder) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or bool(self._work))
                if self._over:
                    return
                piece = self._work.popleft()
                self._busy += 1
                self._changed.notify_all()
            offsets = piece.pages * np.uint64(PAGE_BYTES)
            if piece.data is None:
                packets = encoder.pages_of_memory(piece.name, offsets, self._reader.block(piece.name))
            else:
                packets = encoder.pages(piece.name, offsets, piece.data)
            connection.send(*packets)
            with self._changed:  # after a failure it stays busy: `sync` must not pass before the stop is asked for
                self._busy -= 1
                if piece.buffer is not None:
                    self._free.append(piece.buffer)
                self._changed.notify_all()
