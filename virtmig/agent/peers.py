"""Connections between agents: dialled and accepted, with whatever proves who the other is.

tcp:HOST:PORT   mutual TLS, or as `security` says
unix:PATH       the peer's user, by the kernel's word
ssh:[USER@]HOST `virtmig agent --stdio` there; ssh has let us in, and has checked that host's key

Whoever is dialled must have the right "receive", and is told nothing before.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from virtmig.agent.access import ANYBODY, KEY_HOLDER, AllowList, Identity, read_key, unix_identity
from virtmig.agent.certificates import (
    TlsFiles,
    client_context,
    find_tls_files,
    server_context,
    tls_identity,
    tls_refusal,
)
from virtmig.agent.config import Address, AgentConfig
from virtmig.engine.lines import Line
from virtmig.errors import ChannelError, PlanRefused, RequestError

CONNECT_S = 10.0
#: ssh, Python and perhaps an agent are started there before anything can answer
SSH_HELLO_S = 30.0
#: dialling again while reconnecting: from 0.1 s on, at most 2 s apart, jittered
_AGAIN = wait_random_exponential(multiplier=0.1, max=2.0)
_STDIO = ("virtmig", "agent", "--stdio")
#: nobody is there to answer a question; a master connection that stays behind would keep our pipes
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ControlMaster=no", "-T", "--")
_WORDS_BYTES = 2000
_ENDS_S = 5.0
_ALERT_S = 1.0


class TlsLine(Line):
    """TLS tells late: whoever dials hears that its certificate was refused at its first read (TLS 1.3)."""

    def __init__(self, sock: ssl.SSLSocket, peer: str, files: TlsFiles) -> None:
        super().__init__(sock, peer)
        self._files = files

    def _failed(self, error: OSError, doing: str) -> ChannelError:
        if not self.bytes_received and doing == "writing":  # what the peer said before it closed
            try:
                self._socket.recv(1)
            except ssl.SSLWantReadError:
                pass
            except OSError as said:
                error = said if isinstance(said, ssl.SSLError) else error
        if isinstance(error, ssl.SSLError):
            return tls_refusal(error, peer=self.peer, files=self._files)
        return super()._failed(error, doing)


class SshLine(Line):
    """The standard input and output of ssh. What it says when it ends before the other agent has spoken is an error."""

    def __init__(self, host: str, command: tuple[str, ...]) -> None:
        """Raises ChannelError when there is no ssh."""
        ours, theirs = socket.socketpair()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the line
        try:
            self._process = subprocess.Popen(
                [*_SSH, host, shlex.join(command)], stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=self._words,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            self._words.close()
            raise ChannelError(f"ssh cannot be started: {error.strerror or error}") from None
        finally:
            theirs.close()
        super().__init__(ours, f"the agent at ssh:{host}")

    def recv_into(self, view: memoryview) -> int | None:
        count = super().recv_into(view)
        if count == 0 and not self.bytes_received:
            raise self._ended()
        return count

    def _failed(self, error: OSError, doing: str) -> ChannelError:
        return super()._failed(error, doing) if self.bytes_received else self._ended()

    def _ended(self) -> ChannelError:
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0)
        ended = f"ssh has ended{f' with status {status}' if status else ''}"
        return ChannelError(
            f"{self.peer}: {ended}: {self._said() or 'without a word'}",
            hint="does `ssh -o BatchMode=yes HOST virtmig agent --stdio` work for the agent's user?",
        )

    def close(self) -> None:
        """ssh ends with its standard input; one that does not is ended."""
        super().close()
        threading.Thread(target=self._reap, name="end of ssh", daemon=True).start()

    def _reap(self) -> None:
        try:
            self._process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._words.close()

    def _said(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            end = self._words.seek(0, os.SEEK_END)
            text = os.pread(self._words.fileno(), _WORDS_BYTES, max(0, end - _WORDS_BYTES))
            return "; ".join(text.decode("utf-8", "replace").split("\n")).strip("; \r")
        return ""


class Peers:
    """What this host's configuration says about the way to other agents, and from them."""

    def __init__(self, config: AgentConfig) -> None:
        """Raises RequestError for files that are missing or wrong, when something on tcp needs them."""
        self._config = config
        self._allow = AllowList(config.allow)
        self.key = read_key(config.key_file) if config.key_file else b""
        self._client: tuple[ssl.SSLContext, TlsFiles] | None = None
        self._server: tuple[ssl.SSLContext, TlsFiles] | None = None
        if config.security == "tls" and any(address.kind == "tcp" for address in config.addresses):
            self._server_side()

    # -- in ---------------------------------------------------------------------------------------------------------

    def accepted(
        self,
        connection: socket.socket,
        *,
        within_s: float = CONNECT_S,
        met: Callable[[socket.socket], None] = lambda sock: None,
    ) -> tuple[Line, Identity]:
        """Who that is. Raises ChannelError, RequestError; the connection is then closed.

        `met` is called with the socket that stands for the connection from then on: TLS takes the given one over.
        """
        try:
            met(connection)
            if connection.family == socket.AF_UNIX:
                identity = unix_identity(connection)
                return Line(connection, identity.label), identity
            where = peer_address(connection)
            if self._config.security == "tls":
                return self._accepted_tls(connection, where, within_s, met)
            return Line(connection, where), KEY_HOLDER if self.key else ANYBODY
        except OSError as error:
            connection.close()
            raise ChannelError(f"a connection was lost at once: {error.strerror or error}") from None
        except BaseException:
            connection.close()
            raise

    def _server_side(self) -> tuple[ssl.SSLContext, TlsFiles]:
        if self._server is None:
            files = find_tls_files(self._config.tls, "server")
            self._server = server_context(files), files
        return self._server

    def _accepted_tls(
        self, connection: socket.socket, where: str, within_s: float, met: Callable[[socket.socket], None]
    ) -> tuple[Line, Identity]:
        context, files = self._server_side()
        connection.settimeout(within_s)
        wrapped = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        met(wrapped)
        try:
            wrapped.do_handshake()
            identity = tls_identity(wrapped)
        except (OSError, ValueError) as error:
            if isinstance(error, ssl.SSLError):
                _let_it_read(wrapped)
            wrapped.close()
            raise tls_refusal(error, peer=where, files=files) from None
        except ChannelError:
            wrapped.close()
            raise
        return TlsLine(wrapped, f"{identity.label} ({where})", files), identity

    # -- out --------------------------------------------------------------------------------------------------------

    def dial(self, text: str, *, asked_by: Identity | None = None) -> tuple[Line, Identity]:
        """(a line to the agent there, who it has proved to be).

        `asked_by` is the client for whom it is done: where ssh goes is limited for those who could not go themselves.
        Raises ChannelError, RequestError, PlanRefused for one that may not be given guests of this host.
        """
        kind, _, rest = text.partition(":")
        if kind == "ssh":
            return self._dial_ssh(rest, asked_by)
        try:
            address = Address.parse(text)
        except ValueError as error:
            raise RequestError(
                str(error), option="destination-agent", hint="tcp:HOST:PORT, unix:PATH or ssh:HOST"
            ) from None
        connection = self._connect(address)
        try:
            if address.kind == "unix":
                identity = unix_identity(connection)
                line = Line(connection, f"the agent at {text}")
            elif self._config.security == "tls":
                line, identity = self._dial_tls(connection, address)
            else:
                identity = KEY_HOLDER if self.key else ANYBODY
                line = Line(connection, f"the agent at {address}")
        except OSError as error:
            connection.close()
            raise ChannelError(f"{address}: {error.strerror or error}", retryable=True) from None
        except BaseException:
            connection.close()
            raise
        self._check_receive(identity, line)
        return line, identity

    def _connect(self, address: Address) -> socket.socket:
        try:
            if address.kind == "tcp":
                return socket.create_connection((address.host, address.port), CONNECT_S)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(CONNECT_S)
                connection.connect(address.path)
            except BaseException:
                connection.close()
                raise
            return connection
        except (OSError, ValueError) as error:  # ValueError: a host name that no encoding takes
            words = getattr(error, "strerror", None) or str(error)
            raise ChannelError(
                f"no agent at {address}: {words}",
                hint="does virtmig-agent run there, and may this host reach its port?",
                retryable=True,
            ) from None

    def _dial_tls(self, connection: socket.socket, address: Address) -> tuple[Line, Identity]:
        if self._client is None:
            files = find_tls_files(self._config.tls, "client")
            self._client = client_context(files), files
        context, files = self._client
        try:
            wrapped = context.wrap_socket(connection, server_hostname=address.host)
        except (OSError, ValueError) as error:
            raise tls_refusal(error, peer=f"{address}", files=files) from None
        try:
            identity = tls_identity(wrapped)
        except ChannelError:
            wrapped.close()
            raise
        return TlsLine(wrapped, f"the agent at {address}", files), identity

    def _dial_ssh(self, where: str, asked_by: Identity | None) -> tuple[Line, Identity]:
        try:
            host, *command = shlex.split(where)
        except ValueError:
            host, command = "", []
        if not host or host.startswith("-"):
            raise RequestError(f"'ssh:{where}' names no host", option="destination-agent", hint="ssh:[USER@]HOST")
        identity = Identity(kind="ssh", names=(host,))
        trusted = asked_by is None or self._allow.owns(asked_by)
        if command and not trusted:
            raise RequestError(
                f"ssh:{host}: which command runs there is chosen by root or the agent's own user alone",
                option="destination-agent", hint=f"ssh:{host}",
            )  # fmt: skip
        if not trusted:
            self._check_receive(identity, None)
        return SshLine(host, tuple(command) or _STDIO), identity

    def _check_receive(self, identity: Identity, line: Line | None) -> None:
        try:
            self._allow.check(identity, "receive")
        except ChannelError as error:
            if line is not None:
                line.close()
            raise PlanRefused([("receive", error.message, error.hint)]) from None

    def dialler(
        self, addresses: tuple[str, ...], within_s: float, *, asked_by: Identity | None = None
    ) -> Callable[[Callable[[], bool]], Line]:
        """Dials until it works, over the next address each time, as long as `needed()` and at most `within_s`."""

        def dial(needed: Callable[[], bool]) -> Line:
            number = 0

            def once() -> Line:
                nonlocal number
                if not needed():
                    raise RequestError("no longer needed")
                text = addresses[number % len(addresses)]
                number += 1
                return self.dial(text, asked_by=asked_by)[0]

            begun = time.monotonic()
            try:
                return Retrying(
                    retry=retry_if_exception_type(ChannelError), wait=_AGAIN, stop=stop_after_delay(within_s)
                )(once)
            except RetryError as error:
                reason = error.last_attempt.exception()
                raise ChannelError(f"not reached within {time.monotonic() - begun:.0f} s: {reason}") from None

        return dial


def _let_it_read(wrapped: ssl.SSLSocket) -> None:
    """The peer has begun to talk, as TLS 1.3 lets it: closed with that unread, it would never see our alert."""
    deadline = time.monotonic() + _ALERT_S
    with contextlib.suppress(OSError):
        socket.socket.shutdown(wrapped, socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            wrapped.settimeout(left)
            if not socket.socket.recv(wrapped, 65536):
                return


def peer_address(connection: socket.socket) -> str:
    """`192.0.2.7:41234`, `[2001:db8::7]:41234`; a mapped IPv4 address as IPv4. Raises OSError when it has gone."""
    host, port = connection.getpeername()[:2]
    host = host.removeprefix("::ffff:") if "." in host else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
