"""Where the API listens and who may come in; uvicorn does the rest.

unix:PATH   0660 from its first moment, of local.group in agent.toml; whoever may open it may do everything
tcp:...     mutual TLS, with the certificates and the allow rows of agent.toml: a peer needs the right `manage`
            plain text only on loopback and only when it is asked for: then every user of this host may come in
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import shutil
import socket
import stat
import struct
from asyncio import SelectorEventLoop, Server, TimerHandle, Transport
from collections import Counter
from pathlib import Path
from typing import Any

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from virtmig.agent.access import AllowList
from virtmig.agent.certificates import find_tls_files, server_context, tls_identity
from virtmig.agent.config import Address, AgentConfig
from virtmig.errors import ChannelError, MigrationError, RequestError

log = logging.getLogger("virtmig.api")

DEFAULT_PORT = 16516
SOCKET_MODE = 0o660
#: connections at once; uvicorn answers 503 beyond
MOST_CONNECTIONS = 400
#: a connection without a whole request's head is let go after so long, and earlier when a peer has too many of them
HEAD_S = 10.0
MOST_WAITING = 200
MOST_WAITING_OF_PEER = 50
#: SIGTERM: requests may finish that long, event streams are cut
STOP_S = 3
_BACKLOG = 128
#: what a browser may call the plain address; any other name is a DNS answer that somebody has bent
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def parse_address(text: str) -> Address:
    """Raises RequestError."""
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise RequestError(str(error), option="listen", hint="unix:PATH or tcp:HOST:PORT") from None
    named = address.kind == "unix" or re.search(r"[^:]:\d+$", text.removeprefix("tcp:"))
    return address if named else msgspec.structs.replace(address, port=DEFAULT_PORT)


def listen(address: Address, *, plain: bool, group: str = "") -> socket.socket:
    """A listening socket. Raises RequestError for plain text beyond loopback, ChannelError when it cannot be had."""
    if address.kind == "unix":
        return _listen_unix(Path(address.path), group)
    if plain and not _is_loopback(address.host):
        raise RequestError(
            f"{address}: plain text is for loopback addresses only",
            option="plain",
            hint="leave out --plain: mutual TLS, with the agent's certificates",
        )
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ChannelError(f"cannot listen on {address}: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _listen_unix(path: Path, group: str) -> socket.socket:
    """Bound beside its place and moved there with its rights set; one that nobody listens on is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    part = path.with_name(f".{path.name[:20]}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise ChannelError(f"cannot listen on unix:{path}: a file that is no socket is there")
        if _answers(path):
            raise ChannelError(f"cannot listen on unix:{path}: another one listens there", hint="virtmig api runs")
        sock.bind(str(part))
        part.chmod(0o600)
        if group:
            shutil.chown(part, group=group)
        part.chmod(SOCKET_MODE)
        sock.listen(_BACKLOG)
        part.rename(path)
    except OSError as error:
        sock.close()
        part.unlink(missing_ok=True)
        raise ChannelError(f"cannot listen on unix:{path}: {error.strerror or error}") from None
    except (ChannelError, LookupError) as error:
        sock.close()
        part.unlink(missing_ok=True)
        if isinstance(error, ChannelError):
            raise
        raise RequestError(f"local.group: {error}", option="config", hint="a group of this host") from None
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


class Peered:
    """The application as one connection sees it: with who its peer is, and how to cut it."""

    def __init__(self, app: Any, known: dict[str, Any]) -> None:
        self._app = app
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, **self._known}, receive, send)


class Waiting:
    """The connections of one listener on which no request is under way, the oldest first. For the event loop alone.

    Whoever opens too many loses the oldest of its own, and never the place of somebody else.
    """

    def __init__(self) -> None:
        self._peers: dict[Transport, str] = {}

    def add(self, transport: Transport, peer: str) -> None:
        if transport in self._peers:
            return
        self._peers[transport] = peer
        mine = [each for each, whose in self._peers.items() if whose == peer]
        if len(mine) > MOST_WAITING_OF_PEER:
            self._let_go(mine[0])
        elif len(self._peers) > MOST_WAITING:
            most, _ = Counter(self._peers.values()).most_common(1)[0]
            self._let_go(next(each for each, whose in self._peers.items() if whose == most))

    def discard(self, transport: Transport) -> None:
        self._peers.pop(transport, None)

    def _let_go(self, transport: Transport) -> None:
        self.discard(transport)
        transport.abort()


def _peer(transport: Transport) -> str:
    """Who it is: the address over TCP, the process on a local socket (SO_PEERCRED)."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_UNIX:
        size = struct.calcsize("3i")
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return f"process {pid} of user {uid}"
    return str((transport.get_extra_info("peername") or ("",))[0])


def protocol(allow: AllowList | None, names: tuple[str, ...] | None) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 for one listener. `allow`: rights of peers with a certificate; `names`: Host headers taken.

    uvicorn waits for a request's head as long as it takes; here HEAD_S are enough.
    """
    waiting = Waiting()

    class Protocol(H11Protocol):
        head_timer: TimerHandle | None = None

        def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            known: dict[str, Any] = {"virtmig.abort": transport.abort, "virtmig.names": names}
            connection = transport.get_extra_info("ssl_object")
            if allow is not None:
                try:
                    allow.check(tls_identity(connection), "manage")
                except MigrationError as error:
                    known["virtmig.refusal"] = f"{error}; {error.hint}"
            self.app = Peered(self.app, known)
            self.peer = _peer(transport)
            self._wait(begun=True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look_again()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look_again()

        def connection_lost(self, exc: Exception | None) -> None:
            self._heard()
            super().connection_lost(exc)

        def _look_again(self) -> None:
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._wait(begun=bool(self.conn.trailing_data[0]))
            else:
                self._heard()

        def _wait(self, *, begun: bool) -> None:
            """For a head; one that has not begun after a request is uvicorn's own to wait for."""
            waiting.add(self.transport, self.peer)
            if begun and self.head_timer is None:
                self.head_timer = self.loop.call_later(HEAD_S, self.transport.abort)
            elif not begun:
                self._stop_timer()

        def _heard(self) -> None:
            waiting.discard(self.transport)
            self._stop_timer()

        def _stop_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return Protocol


class Loop(SelectorEventLoop):
    """A TLS handshake gets HEAD_S too, for which uvicorn has no setting."""

    async def create_server(self, *where: Any, **more: Any) -> Server:
        if more.get("ssl") is not None:
            more["ssl_handshake_timeout"] = HEAD_S
        return await super().create_server(*where, **more)


class Listening:
    """One server on one address; a context manager. Raises RequestError, ChannelError when it cannot be had."""

    def __init__(self, app: ASGIApp, address: Address, config: AgentConfig, *, plain: bool = False) -> None:
        tls = address.kind == "tcp" and not plain
        context = server_context(find_tls_files(config.tls, "server")) if tls else None
        names = LOOPBACK_NAMES if address.kind == "tcp" and plain else None
        self._socket = listen(address, plain=plain, group=config.local.group)
        self.address = address
        if address.kind == "tcp":
            self.address = msgspec.structs.replace(address, port=self._socket.getsockname()[1])
        self._made = os.stat(address.path).st_ino if address.path else None
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol(AllowList(config.allow) if tls else None, names),
                ws="none",
                lifespan="off",
                loop=f"{__name__}:Loop",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=STOP_S,
                ssl_context_factory=(lambda _config, _usual: context) if context is not None else None,
            )
        )

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        if self._made is not None:
            with contextlib.suppress(OSError):
                if os.stat(self.address.path).st_ino == self._made:
                    os.unlink(self.address.path)

    def run(self) -> None:
        """Serve until `stop`, or until a signal when this is the main thread."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """From any thread, or a signal handler."""
        self._server.should_exit = True
