"""A destination that speaks QEMU's protocol as far as a test wants, and then misbehaves."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from virtmig.engine.transport import Address
from virtmig.errors import MigrationError
from virtmig.stream.decoder import QemuStreamDecoder
from virtmig.stream.events import Command, Package, SectionBegin
from virtmig.stream.return_path import Pong, RequestPages, ReturnPathEvent, Shut, encode_return_path
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item


class DestinationPeer:
    """Answers so many PINGs. `accepts`: connections beside main that it takes; others stay waiting.

    `ran`, `asked`, `ended` are set at RUN, when the pages were asked for, and at RAM's END.
    """

    def __init__(
        self, listener: socket.socket, *, ask: RequestPages | None, end: Shut | None, accepts: int, answers: int
    ) -> None:
        self.ran, self.asked, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.others: list[socket.socket] = []
        self._listener = listener
        self._ask = ask
        self._end = end
        self._accepts = accepts
        self._answers = answers
        self._main: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="peer")
        self._thread.start()

    def turn_away(self) -> None:
        """What waits is accepted and closed, as QEMU does with a connection too many."""
        self._listener.accept()[0].close()

    def close(self) -> None:
        for each in (self._listener, *([self._main] if self._main is not None else []), *self.others):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *([self._main] if self._main is not None else []), *self.others):
            each.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError, MigrationError):
            self._main = self._listener.accept()[0]
            self.others += [self._listener.accept()[0] for _ in range(self._accepts)]
            for each in self.others:
                threading.Thread(target=_drain, args=(each,), name="peer drains", daemon=True).start()
            decoder = QemuStreamDecoder()
            while data := self._main.recv(1 << 16):
                decoder.feed(data)
                for event in decoder.events():
                    self._take(event)

    def _take(self, event: object) -> None:
        match event:
            case Package():
                for each in event.events:
                    self._take(each)
                if self._ask is not None:
                    self._say(self._ask)
                    self.asked.set()
            case Command() if event.number == Number.PING and self._answers:
                self._answers -= 1
                self._say(Pong(event.value or 0))
            case Command() if event.number == Number.POSTCOPY_RUN:
                self.ran.set()
            case SectionBegin() if event.kind == Item.SECTION_END:
                self.ended.set()
                if self._end is not None:
                    self._say(self._end)

    def _say(self, event: ReturnPathEvent) -> None:
        assert self._main is not None
        self._main.sendall(encode_return_path(event))


def _drain(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass


@contextlib.contextmanager
def destination_peer(
    path: Path | None = None,
    *,
    ask: RequestPages | None = None,
    end: Shut | None = None,
    accepts: int = 0,
    answers: int = 1 << 30,
) -> Iterator[tuple[DestinationPeer, Address]]:
    """The peer, and where it listens: tcp, or that path. `ask` after the package, `end` at RAM's END, so many PONGs."""
    if path is not None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(8)
        address = Address(path=str(path))
    else:
        listener = socket.create_server(("127.0.0.1", 0), backlog=8)
        address = Address("127.0.0.1", listener.getsockname()[1])
    peer = DestinationPeer(listener, ask=ask, end=end, accepts=accepts, answers=answers)
    try:
        yield peer, address
    finally:
        peer.close()
