"""A line: one connection between two agents, plain or TLS, used without waiting by the one thread that owns it.

While a session is opened, frames are read one at a time and not a byte beyond (`read_frame`), so that whoever takes
the connection over next finds everything that follows.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterable, Sequence

from virtmig.engine.transport import Buffer
from virtmig.errors import ChannelError
from virtmig.link.frames import FrameDecoder, FrameEvent

#: UIO_MAXIOV
_MOST_BUFFERS = 1024


class Line:
    """Errors are ChannelErrors that name the peer. None from a call means: not now, poll for `events`."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.bytes_received = 0
        self.bytes_sent = 0
        self._socket = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._turned = 0  # what TLS waits for instead: it may have to write in order to read
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waiting_bytes(self) -> int:
        """Decrypted already: poll does not tell of them."""
        return self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0

    def events(self, *, read: bool, write: bool) -> int:
        """What to poll for."""
        wanted = (select.POLLIN if read else 0) | (select.POLLOUT if write else 0)
        return wanted | self._turned if wanted else 0

    def recv_into(self, view: memoryview) -> int | None:
        """Some bytes; 0 is the peer's end. Raises ChannelError."""
        if not self._tls:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._failed(error, "reading") from None
            self.bytes_received += count
            return count
        at = 0
        self._turned = 0
        while at < len(view):  # a record at a time: 16 KiB
            try:
                count = self._socket.recv_into(view[at:])
            except ssl.SSLWantReadError:
                break
            except ssl.SSLWantWriteError:
                self._turned = select.POLLOUT
                break
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                count = 0
            except OSError as error:
                raise self._failed(error, "reading") from None
            if not count:
                if not at:
                    return 0
                break
            at += count
        self.bytes_received += at
        return at or None

    def send(self, buffers: Sequence[Buffer]) -> int | None:
        """As much of `buffers` as goes now, in bytes. Raises ChannelError."""
        if not self._tls:
            try:
                count = self._socket.sendmsg(buffers[:_MOST_BUFFERS])
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._failed(error, "writing") from None
            self.bytes_sent += count
            return count
        sent = 0
        self._turned = 0
        try:
            for buffer in buffers:
                view = memoryview(buffer)
                while len(view):
                    count = self._socket.send(view)
                    sent += count
                    view = view[count:]
        except ssl.SSLWantWriteError:
            pass
        except ssl.SSLWantReadError:
            self._turned = select.POLLIN
        except OSError as error:
            raise self._failed(error, "writing") from None
        self.bytes_sent += sent
        return sent or None

    # -- while a session is opened: with a deadline, and exactly ---------------------------------------------------

    def write_all(self, buffers: Iterable[Buffer], deadline: float) -> None:
        """All of it before `deadline` (time.monotonic). Raises ChannelError."""
        pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while pending:
            count = self.send(list(pending))
            if count is None:
                self._wait(self.events(read=False, write=True), deadline, "takes nothing")
                continue
            drop(pending, count)

    def read_exactly(self, view: memoryview, deadline: float) -> None:
        """All of `view` before `deadline`. Raises ChannelError."""
        while len(view):
            count = self.recv_into(view)
            if count is None:
                self._wait(self.events(read=True, write=False), deadline, "says nothing")
            elif count:
                view = view[count:]
            else:
                raise ChannelError(f"{self.peer} closed the connection")

    def read_frame(self, decoder: FrameDecoder, deadline: float) -> FrameEvent:
        """The next frame and nothing behind it. Raises ChannelError, RemoteProtocolError."""
        while True:
            view = memoryview(bytearray(decoder.wanted_bytes))
            count = self.recv_into(view)
            if count is None:
                self._wait(self.events(read=True, write=False), deadline, "says nothing")
                continue
            if not count:
                raise ChannelError(f"{self.peer} closed the connection")
            decoder.feed(view[:count])
            for event in decoder.events():
                return event

    def _wait(self, events: int, deadline: float, what: str) -> None:
        poll = select.poll()
        poll.register(self.fileno(), events)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise ChannelError(f"{self.peer} {what} in time")

    # -- the end ---------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Wake whoever waits; may be called from any thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def _failed(self, error: OSError, doing: str) -> ChannelError:
        return ChannelError(f"{self.peer}: {doing}: {error.strerror or error}")


def drop(pending: list[memoryview], count: int) -> None:
    """Take the first `count` bytes off."""
    at = 0
    while at < len(pending) and count >= len(pending[at]):
        count -= len(pending[at])
        at += 1
    del pending[:at]
    if count:
        pending[0] = pending[0][count:]
