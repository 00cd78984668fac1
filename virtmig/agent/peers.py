"""Connections between agents: dialled and accepted, with whatever proves who the other is.

tcp:HOST:PORT   mutual TLS, or as `security` says
unix:PATH       the peer's user, by the kernel's word
ssh:[USER@]HOST `virtmig agent --stdio` there; ssh has let us in
"""

from __future__ import annotations

import shlex
import socket
import ssl
import subprocess
import time
from collections.abc import Callable

from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from virtmig.agent.access import ANYBODY, KEY_HOLDER, Identity, read_key, unix_identity
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
from virtmig.errors import ChannelError, RequestError

CONNECT_S = 10.0
#: dialling again while reconnecting: from 0.1 s on, at most 2 s apart, jittered
_AGAIN = wait_random_exponential(multiplier=0.1, max=2.0)
_STDIO = ("virtmig", "agent", "--stdio")


class Peers:
    """What this host's configuration says about the way to other agents, and from them."""

    def __init__(self, config: AgentConfig) -> None:
        """Raises RequestError for files that are missing or wrong, when something on tcp needs them."""
        self._config = config
        self.key = read_key(config.key_file) if config.key_file else b""
        self._client: tuple[ssl.SSLContext, TlsFiles] | None = None
        self._server: tuple[ssl.SSLContext, TlsFiles] | None = None
        if config.security == "tls" and any(address.kind == "tcp" for address in config.addresses):
            files = find_tls_files(config.tls, "server")
            self._server = server_context(files), files

    # -- in ---------------------------------------------------------------------------------------------------------

    def accepted(self, connection: socket.socket) -> tuple[Line, Identity]:
        """Who that is. Raises ChannelError; the connection is then closed."""
        try:
            if connection.family == socket.AF_UNIX:
                identity = unix_identity(connection)
                return Line(connection, identity.label), identity
            where = "{}:{}".format(*connection.getpeername()[:2])
            if self._config.security == "tls":
                return self._accepted_tls(connection, where)
            return Line(connection, where), KEY_HOLDER if self.key else ANYBODY
        except OSError as error:
            connection.close()
            raise ChannelError(f"a connection was lost at once: {error.strerror or error}") from None
        except BaseException:
            connection.close()
            raise

    def _accepted_tls(self, connection: socket.socket, where: str) -> tuple[Line, Identity]:
        if self._server is None:
            files = find_tls_files(self._config.tls, "server")
            self._server = server_context(files), files
        context, files = self._server
        connection.settimeout(CONNECT_S)
        try:
            wrapped = context.wrap_socket(connection, server_side=True)
        except (OSError, ValueError) as error:
            raise tls_refusal(error, peer=where, files=files) from None
        identity = tls_identity(wrapped)
        return Line(wrapped, f"{identity.label} ({where})"), identity

    # -- out --------------------------------------------------------------------------------------------------------

    def dial(self, text: str) -> tuple[Line, str]:
        """(a line to the agent there, who it has proved to be). Raises ChannelError, RequestError."""
        kind, _, rest = text.partition(":")
        if kind == "ssh":
            return self._dial_ssh(rest), f"ssh {rest}"
        try:
            address = Address.parse(text)
        except ValueError as error:
            raise RequestError(
                str(error), option="destination-agent", hint="tcp:HOST:PORT, unix:PATH or ssh:HOST"
            ) from None
        try:
            if address.kind == "unix":
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(CONNECT_S)
                connection.connect(address.path)
                return Line(connection, f"the agent at {text}"), unix_identity(connection).label
            connection = socket.create_connection((address.host, address.port), CONNECT_S)
        except OSError as error:
            raise ChannelError(
                f"no agent at {address}: {error.strerror or error}",
                hint="does virtmig-agent run there, and may this host reach its port?",
                retryable=True,
            ) from None
        if self._config.security != "tls":
            return Line(connection, f"the agent at {address}"), "key" if self.key else "nobody"
        return self._dial_tls(connection, address)

    def _dial_tls(self, connection: socket.socket, address: Address) -> tuple[Line, str]:
        if self._client is None:
            files = find_tls_files(self._config.tls, "client")
            self._client = client_context(files), files
        context, files = self._client
        try:
            wrapped = context.wrap_socket(connection, server_hostname=address.host)
        except (OSError, ValueError) as error:
            connection.close()
            raise tls_refusal(error, peer=f"{address}", files=files) from None
        return Line(wrapped, f"the agent at {address}"), tls_identity(wrapped).label

    def _dial_ssh(self, where: str) -> Line:
        host, *command = shlex.split(where)
        ours, theirs = socket.socketpair()
        words = ["ssh", "-o", "BatchMode=yes", "-T", "--", host, shlex.join(command or _STDIO)]
        try:
            # it ends with its socket
            subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True)
        except OSError as error:
            ours.close()
            raise ChannelError(f"ssh cannot be started: {error.strerror or error}") from None
        finally:
            theirs.close()
        return Line(ours, f"the agent at ssh:{host}")

    def dialler(self, addresses: tuple[str, ...], within_s: float) -> Callable[[Callable[[], bool]], Line]:
        """Dials until it works, over the next address each time, as long as `needed()` and at most `within_s`."""

        def dial(needed: Callable[[], bool]) -> Line:
            number = 0

            def once() -> Line:
                nonlocal number
                if not needed():
                    raise RequestError("no longer needed")
                text = addresses[number % len(addresses)]
                number += 1
                return self.dial(text)[0]

            begun = time.monotonic()
            try:
                return Retrying(
                    retry=retry_if_exception_type(ChannelError), wait=_AGAIN, stop=stop_after_delay(within_s)
                )(once)
            except RetryError as error:
                reason = error.last_attempt.exception()
                raise ChannelError(f"not reached within {time.monotonic() - begun:.0f} s: {reason}") from None

        return dial
