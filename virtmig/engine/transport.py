"""Sockets of a migration: connect, listen, accept, peek. Every wait ends: by its bytes, the peer, a stall or a stop.

Sockets stay blocking with a timeout, since a large read or write is then one system call; a Stop wakes them by shutting
them down. A closed or broken connection is a ChannelError that names the channel, never a bare OSError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import socket
import stat
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from virtmig.errors import ChannelError, GuestMemoryError, MigrationAborted, MigrationError, RequestError

#: a peer that neither sends nor takes a byte for so long is taken for dead
STALL_S = 60.0
CONNECT_S = 10.0
#: sockaddr_un.sun_path has 108 bytes, the last one is NUL
UNIX_PATH_LONGEST_BYTES = 107
#: how many buffers one sendmsg takes (UIO_MAXIOV)
_MOST_BUFFERS = 1024
_TCP = re.compile(r"tcp:(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]]*)):(?P<port>\d{1,5})")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Address:
    """`tcp:HOST:PORT` or `unix:PATH`, as QEMU writes migration URIs."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str, option: str = "address") -> Address:
        """Raises RequestError with the form that is expected."""
        if text.startswith("unix:"):
            path = text[5:]
            if not path:
                raise RequestError(f"'{text}' names no path", option=option, hint="unix:/run/guest.sock")
            if len(os.fsencode(path)) > UNIX_PATH_LONGEST_BYTES:
                raise RequestError(
                    f"the socket's path has {len(os.fsencode(path))} bytes, the kernel takes {UNIX_PATH_LONGEST_BYTES}",
                    option=option,
                    hint="a shorter path, or a symbolic link to the folder",
                )
            return cls(path=path)
        match = _TCP.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            raise RequestError(
                f"'{text}' is no address of a migration",
                option=option,
                hint="tcp:HOST:PORT, tcp:[::1]:PORT or unix:PATH",
            )
        return cls(host=match["v6"] or match["host"], port=int(match["port"]))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


class Stop:
    """One migration's end, asked for by anybody: a person, a signal, or the first thread that failed.

    `request` may be called from any thread and from a signal handler; the first error stays. What has to be woken is
    registered with `on_request`, and is called at once when the stop has come already.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._wake: dict[int, Callable[[], None]] = {}
        self._next = 0
        self.requested = threading.Event()
        self.error: MigrationError | None = None
        self._sealed = False

    def request(self, error: MigrationError | None = None) -> None:
        with self._lock:
            if self._sealed or self.requested.is_set():
                return
            self.error = error or MigrationAborted("stopped as asked")
            self.requested.set()
            wake = list(self._wake.values())
        for call in wake:
            call()

    @contextlib.contextmanager
    def sealed(self) -> Iterator[None]:
        """Nobody's request counts inside. Raises the error of a stop that came before."""
        with self._lock:
            self.check()
            self._sealed = True
        try:
            yield
        finally:
            self._sealed = False

    def on_request(self, call: Callable[[], None]) -> Callable[[], None]:
        """Register `call`; what comes back takes it off again."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._wake[number] = call
            late = self.requested.is_set()
        if late:
            call()
        return lambda: self._forget(number)

    def check(self) -> None:
        """Raises the error of the stop when it was asked for."""
        if self.error is not None:
            raise self.error

    def _forget(self, number: int) -> None:
        with self._lock:
            self._wake.pop(number, None)


class Connection:
    """One connected socket of one channel. One thread reads, one writes; `close` is for the owner.

    `name` is the channel's (main, multifd 3, preempt), for errors. `stall_s` None: this channel may be silent.
    """

    def __init__(self, sock: socket.socket, stop: Stop, *, name: str, stall_s: float | None = STALL_S) -> None:
        self.socket = sock
        self.name = name
        self.bytes_received = 0
        self.bytes_sent = 0
        self._stop = stop
        self._stall_s = stall_s
        sock.settimeout(stall_s)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._forget = stop.on_request(self.shutdown)

    def stall_after(self, seconds: float | None) -> None:
        """Change how long the peer may be silent."""
        self._stall_s = seconds
        self.socket.settimeout(seconds)

    def recv_into(self, view: memoryview) -> int:
        """Some bytes; 0 is the peer's end."""
        try:
            count = self.socket.recv_into(view)
        except OSError as error:
            raise self._failed(error, "reading") from None
        self.bytes_received += count
        return count

    def recv_exactly(self, view: memoryview) -> None:
        """All of `view`. Raises ChannelError when the peer ends before."""
        at = 0
        while at < len(view):
            count = self.recv_into(view[at:])
            if not count:
                raise ChannelError(f"{self.name}: the peer closed the connection, {len(view) - at} bytes short")
            at += count

    def send(self, *buffers: Buffer) -> None:
        """All bytes of all buffers, in as few system calls as the kernel allows. Nothing is copied."""
        pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
        at = 0
        try:
            while at < len(pending):
                sent = self.socket.sendmsg(pending[at : at + _MOST_BUFFERS])
                self.bytes_sent += sent
                while at < len(pending) and sent >= len(pending[at]):
                    sent -= len(pending[at])
                    at += 1
                if sent:
                    pending[at] = pending[at][sent:]
        except OSError as error:
            raise self._failed(error, "writing") from None

    def gone(self, within_s: float = 0.0) -> bool:
        """Whether the peer has closed it, or does so within that time: what is written then is read by nobody."""
        poll = select.poll()
        poll.register(self.socket.fileno(), select.POLLRDHUP)
        return bool(poll.poll(within_s * 1000))

    def untaken_bytes(self) -> int:
        """What was written and has not reached the peer's kernel; on a unix socket, its process (SIOCOUTQ, tcp(7))."""
        try:
            found = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError as error:
            raise self._failed(error, "writing") from None
        return int(struct.unpack("i", found)[0])

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Wake whoever waits on it; the peer sees the end. May be called from any thread, more than once."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(how)

    def close(self) -> None:
        self._forget()
        self.socket.close()

    def _failed(self, error: OSError, doing: str) -> MigrationError:
        if self._stop.error is not None:
            return self._stop.error
        if error.errno == errno.EFAULT:
            what = "what came cannot be stored" if doing == "reading" else "the guest's memory cannot be read any more"
            return GuestMemoryError(f"{self.name}: {what}: is the disk or the memory full?")
        if isinstance(error, TimeoutError):
            what = "sends nothing" if doing == "reading" else "takes nothing"
            return ChannelError(f"{self.name}: the peer {what} for {self._stall_s:g} s")
        return ChannelError(f"{self.name}: {doing}: {error.strerror or error}")


class Listener:
    """A listening socket. A unix socket's file is made by it and removed by `close`."""

    def __init__(self, address: Address, stop: Stop, *, backlog: int = 64) -> None:
        self._stop = stop
        try:
            self.socket = _listen(address, backlog)
        except OSError as error:
            # strerror of create_server says the address once more
            words = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
            raise ChannelError(f"cannot listen on {address}: {words}", hint=_listen_hint(error)) from None
        self.address = address if address.path else Address(address.host, self.socket.getsockname()[1])
        self.socket.setblocking(False)  # accept only what is there: who waits, waits for many
        self._made = os.stat(address.path).st_ino if address.path else None
        self._forget = stop.on_request(self._wake)

    @classmethod
    def of(cls, listening: socket.socket, stop: Stop) -> Listener:
        """One that somebody else has made (systemd); its unix path is not removed by us."""
        listener = cls.__new__(cls)
        listener._stop = stop
        listener.socket = listening
        name = listening.getsockname()
        unix = listening.family == socket.AF_UNIX
        listener.address = Address(path=str(name)) if unix else Address(name[0], name[1])
        listening.setblocking(False)
        listener._made = None
        listener._forget = stop.on_request(listener._wake)
        return listener

    def accept(self) -> socket.socket | None:
        """A waiting connection, None when there is none."""
        try:
            return self.socket.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            self._stop.check()
            if error.errno in (errno.ECONNABORTED, errno.EINTR):
                return None
            raise ChannelError(f"accepting on {self.address}: {error.strerror or error}") from None

    def close(self) -> None:
        self._forget()
        self.socket.close()
        if self._made is not None:
            with contextlib.suppress(OSError):
                if os.stat(self.address.path).st_ino == self._made:
                    os.unlink(self.address.path)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def connect(
    address: Address, stop: Stop, *, name: str, stall_s: float | None = STALL_S, within_s: float = CONNECT_S
) -> Connection:
    """A connection to a listening peer. Raises ChannelError, or the stop's error."""
    stop.check()
    deadline = time.monotonic() + within_s
    failure: OSError | None = None
    try:
        candidates = _resolve(address)
    except OSError as error:
        raise ChannelError(f"{name}: {address}: {error.strerror or error}", retryable=True) from None
    for family, where in candidates:
        sock = socket.socket(family, socket.SOCK_STREAM)
        forget = stop.on_request(lambda sock=sock: _shut(sock))  # type: ignore[misc]
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(where)
        except OSError as error:
            failure = error
            sock.close()
            continue
        finally:
            forget()
        return Connection(sock, stop, name=name, stall_s=stall_s)
    stop.check()
    reason = (failure.strerror or str(failure)) if failure is not None else "no address"
    raise ChannelError(f"{name}: cannot connect to {address}: {reason}", retryable=True)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _resolve(address: Address) -> Iterable[tuple[int, str | tuple[object, ...]]]:
    if address.path:
        return [(socket.AF_UNIX, address.path)]
    found = socket.getaddrinfo(address.host or "localhost", address.port, type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in found]


def _listen(address: Address, backlog: int) -> socket.socket:
    if not address.path:
        if not address.host and socket.has_dualstack_ipv6():  # both families, as QEMU does
            with contextlib.suppress(OSError):  # no IPv6 on this host; whatever else is wrong is said below
                return socket.create_server(
                    ("", address.port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
                )
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        if address.host and family == socket.AF_INET:
            family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address.host, address.port), family=family, backlog=backlog)
    _remove_dead(address.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address.path)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_dead(path: str) -> None:
    """A socket's file that nobody listens on any more is in the way; anything else there is not ours to remove."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _listen_hint(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process listens there, or the path exists: choose another address"
    if error.errno == errno.EADDRNOTAVAIL:
        return "an address of this host, or no host at all: tcp::PORT"
    return ""
