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
from asyncio import Transport
from pathlib import Path
from typing import Any

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


def protocol(allow: AllowList | None, names: tuple[str, ...] | None) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 for one listener. `allow`: rights of peers with a certificate; `names`: Host headers taken."""

    class Protocol(H11Protocol):
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

    return Protocol


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
                loop="asyncio",
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
