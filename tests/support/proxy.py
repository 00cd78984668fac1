"""A TCP proxy that records: every connection, both directions, and the order in which bytes arrived."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field

_PIECE_BYTES = 1 << 16


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass
class Connection:
    """What one connection carried: `s2d` from the side that connected, `d2s` from the side it was passed to."""

    s2d: bytearray = field(default_factory=bytearray)
    d2s: bytearray = field(default_factory=bytearray)


class RecordingProxy:
    """Listens on `port`, passes each connection on to `target_port`, both on 127.0.0.1, one after the other.

    A side's end of file is passed on as a half-close. `arrivals` holds (connection number, "s2d" or "d2s", bytes) with
    neighbours merged. Bytes are recorded when they arrive, whether or not they could be passed on.
    """

    def __init__(self) -> None:
        self.target_port = 0
        self.connections: list[Connection] = []
        self.arrivals: list[tuple[int, str, int]] = []
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="proxy-accept")

    def __enter__(self) -> RecordingProxy:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # close alone would not wake accept
        self._server.close()
        self._acceptor.join()
        self.cut()
        self.wait_closed()

    def freeze(self) -> None:
        """Carry nothing any more and tell nobody, as a link that drops everything; `cut` ends it."""
        self._flowing.clear()

    def cut(self) -> None:
        """Break all connections, as a network failure would."""
        self._flowing.set()
        with self._changed:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def wait_closed(self, timeout_s: float = 20.0) -> None:
        """Wait until both ends have closed all connections. Raises TimeoutError."""
        for thread in list(self._threads):
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} is still open")

    def wait_carried(self, way: str, count: int, timeout_s: float = 60.0, *, together: bool = False) -> None:
        """Wait until the first connection, or all `together`, carried `count` bytes `s2d` or `d2s`. TimeoutError."""

        def carried() -> bool:
            counted = self.connections if together else self.connections[:1]
            return sum(len(getattr(connection, way)) for connection in counted) >= count

        with self._changed:
            if not self._changed.wait_for(carried, timeout_s):
                raise TimeoutError(f"fewer than {count} bytes {way}")

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target_port))
            with self._changed:
                number = len(self.connections)
                self.connections.append(Connection())
                self._sockets += [near, far]
            for way, come, go in (("s2d", near, far), ("d2s", far, near)):
                name = f"proxy-{number}-{way}"
                self._threads.append(threading.Thread(target=self._pump, name=name, args=(number, way, come, go)))
                self._threads[-1].start()

    def _pump(self, number: int, way: str, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := come.recv(_PIECE_BYTES):
                with self._changed:
                    getattr(self.connections[number], way).extend(data)
                    merged = self.arrivals[-1][2] if self.arrivals and self.arrivals[-1][:2] == (number, way) else 0
                    if merged:
                        self.arrivals.pop()
                    self.arrivals.append((number, way, merged + len(data)))
                    self._changed.notify_all()
                self._flowing.wait()
                go.sendall(data)
        with contextlib.suppress(OSError):
            go.shutdown(socket.SHUT_WR)
