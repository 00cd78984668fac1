"""The sending side of multifd: one thread a channel, fed in pieces by the thread that reads the image."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from virtmig.engine.lazy import PageReader
from virtmig.engine.transport import Connection, Stop
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.stream.multifd_encoder import MultifdEncoder
from virtmig.stream.wire import Dialect

#: pieces that wait for a channel; they name pages and hold none
_MOST_WAITING = 2


class MultifdSender:
    """`put` waits while every channel is busy. Between `sync` calls the channels' order is free.

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
        self._work: deque[tuple[str, PageNumbers]] = deque()
        self._busy = 0
        self._closed = False
        self._forget = stop.on_request(self._wake)

    def start(self, start: Callable[[str, Callable[[], None]], None]) -> None:
        """`start` makes a named thread of each channel's work."""
        for connection, encoder in zip(self.connections, self.encoders, strict=True):
            start(connection.name, lambda c=connection, e=encoder: self._send(c, e))  # type: ignore[misc]

    def put(self, name: str, pages: PageNumbers) -> None:
        """Pages with contents of one block, for whichever channel is free first."""
        if not len(pages):
            return
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._work) < _MOST_WAITING)
            self._stop.check()
            self._work.append((name, pages))
            self.normal += len(pages)
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
        memory: dict[str, memoryview] = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or bool(self._work))
                if self._over:
                    return
                name, pages = self._work.popleft()
                self._busy += 1
                self._changed.notify_all()
            if name not in memory:
                memory[name] = self._reader.block(name)
            connection.send(*encoder.pages_of_memory(name, pages * np.uint64(PAGE_BYTES), memory[name]))
            with self._changed:  # after a failure it stays busy: `sync` must not pass before the stop is asked for
                self._busy -= 1
                self._changed.notify_all()
