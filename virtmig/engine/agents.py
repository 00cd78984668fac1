"""Asking this host's agent: the client's end of link/asking.py."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from virtmig.errors import ChannelError, MigrationError, PlanRefused, RemoteProtocolError
from virtmig.facts import GuestFacts, HostFacts
from virtmig.link.asking import (
    Agreed,
    Asked,
    Begin,
    Carried,
    Changed,
    Ended,
    Exchanged,
    Facts,
    GiveUp,
    HostSaid,
    Lines,
    Problem,
    Refused,
    Said,
    SessionRecord,
    Sessions,
    SessionsSaid,
    decode_said,
    encode_line,
)
from virtmig.link.messages import Values

#: next to libvirt's TLS port 16514, outside its migration ports 49152-49215
DEFAULT_PORT = 16515
#: the agent may first have to ask a QEMU and libvirt about themselves
ANSWER_S = 60.0


def runs_as_system() -> bool:
    """Root, or a service of the system with a user of its own: it uses the files of the system, not of a home."""
    return os.geteuid() == 0 or ("RUNTIME_DIRECTORY" in os.environ and "XDG_RUNTIME_DIR" not in os.environ)


def runtime_folder() -> Path:
    """Where this user's agent keeps its sockets: /run/virtmig, of an ordinary user $XDG_RUNTIME_DIR/virtmig.

    Under systemd $RUNTIME_DIRECTORY, so that the unit's own user needs no settings.
    """
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/run/virtmig")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "virtmig"


def default_socket() -> Path:
    """Where this host's agent listens for clients, unless its settings say otherwise."""
    return runtime_folder() / "agent.sock"


def reachable(address: str, *, within_s: float = 1.0) -> str:
    """Whether anything listens at an agent's address: "" or why not; where it takes ssh to know, it is believed."""
    kind, _, rest = address.partition(":")
    if kind not in ("tcp", "unix"):
        return ""
    try:
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(within_s)
                probe.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            host, port = (host, port) if port.isdecimal() else (rest, str(DEFAULT_PORT))
            socket.create_connection((host.strip("[]"), int(port)), within_s).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class AgentConnection:
    """One question to an agent, and what it says to it."""

    def __init__(self, path: str | Path, *, timeout_s: float = ANSWER_S) -> None:
        """Raises ChannelError when no agent listens there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = Lines()
        self._waiting: list[bytes] = []
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ChannelError(
                f"no agent of virtmig at {path}: {error.strerror or error}",
                hint="start one on this host: systemctl start virtmig-agent.socket, or virtmig agent",
            ) from None

    def ask(self, question: Asked) -> None:
        try:
            self._socket.sendall(encode_line(question))
        except OSError as error:
            raise ChannelError(f"the agent has gone: {error.strerror or error}") from None

    def hear(self, timeout_s: float | None = ANSWER_S) -> Said:
        """The next thing it says. Raises ChannelError at the end, RemoteProtocolError; what it reports as an error."""
        self._socket.settimeout(timeout_s)
        while not self._waiting:
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise ChannelError(f"the agent has not answered within {timeout_s:g} s") from None
            except OSError as error:
                raise ChannelError(f"the agent has gone: {error.strerror or error}") from None
            if not data:
                raise ChannelError("the agent has closed the connection", hint="its log says why")
            self._waiting += self._lines.feed(data)
        said = decode_said(self._waiting.pop(0))
        if isinstance(said, Problem):
            raise ChannelError(plain_text(said.text), hint=plain_text(said.hint))
        if isinstance(said, Refused):
            rows = [(row.feature, row.reason, row.way_out) for row in said.reasons]
            raise PlanRefused([(plain_text(one), plain_text(two), plain_text(three)) for one, two, three in rows])
        return said

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def plain_text(text: str) -> str:
    """In one line and without control characters: another host's words stay where they are printed."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def ask_facts(path: str | Path) -> HostSaid:
    """What an agent says of its host."""
    connection = AgentConnection(path)
    try:
        connection.ask(Facts())
        said = connection.hear()
    finally:
        connection.close()
    if not isinstance(said, HostSaid):
        raise ChannelError(f"the agent answered with {type(said).__name__}")
    return said


def ask_sessions(path: str | Path) -> tuple[SessionRecord, ...]:
    """The sessions that an agent knows of."""
    connection = AgentConnection(path)
    try:
        connection.ask(Sessions())
        said = connection.hear()
    finally:
        connection.close()
    if not isinstance(said, SessionsSaid):
        raise ChannelError(f"the agent answered with {type(said).__name__}")
    return said.sessions


#: what is heard of a session that was agreed on
Followed = Changed | Carried | Ended


class RelaySession:
    """A session that was agreed on, and is followed until it ends. `tell` hears every change, in another thread."""

    def __init__(self, connection: AgentConnection, agreed: Agreed, tell: Callable[[Followed], None]) -> None:
        self.agreed = agreed
        self.ended: Ended | None = None
        self.over = threading.Event()
        self._connection = connection
        self._tell = tell
        self._thread = threading.Thread(target=self._follow, name="virtmig-agent", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with contextlib.suppress(MigrationError):
            while self.ended is None:
                try:
                    said = self._connection.hear(timeout_s=None)
                except RemoteProtocolError:
                    continue  # what only a newer agent says
                if isinstance(said, Ended):
                    self.ended = said
                if isinstance(said, Followed):
                    self._tell(said)
        self.over.set()

    def kept_by_source(self, within_s: float) -> bool:
        """Whether it has ended, or does now, before the source let go of the guest."""
        self.over.wait(within_s)
        return self.ended is not None and self.ended.state != "finished" and self.ended.guest == "source"

    def leave(self) -> None:
        """Let it go on by itself: what a postcopy still has to carry is needed, whatever became of libvirt's call."""
        self._connection.close()
        self._thread.join()

    def close(self, reason: str = "", *, guest: str = "unknown", settle_s: float = 5.0) -> None:
        """The job is over: wait a moment for the session to end by itself, give it up if it does not."""
        if not reason and self.over.wait(settle_s):
            self._connection.close()
        else:
            with contextlib.suppress(MigrationError):
                self._connection.ask(GiveUp(reason=reason or "libvirt's job is over", guest=guest))
                self.over.wait(settle_s)
            self._connection.close()
        self._thread.join()


def shake_hands(
    path: str | Path,
    destination: str,
    *,
    request: Values,
    guest: GuestFacts,
    facts: HostFacts | None = None,
    fixed: tuple[str, ...] = (),
    only_handshake: bool = False,
    heard: Callable[[Exchanged], None] = lambda message: None,
) -> tuple[AgentConnection, Agreed]:
    """Have the agent at `path` begin a session with the one at `destination`.

    Raises PlanRefused with the destination's reasons, ChannelError.
    """
    connection = AgentConnection(path)
    try:
        connection.ask(Begin(destination=destination, request=request, guest=guest, facts=facts, fixed=fixed,
                             only_handshake=only_handshake))  # fmt: skip
        while True:
            said = connection.hear()
            if isinstance(said, Exchanged):
                heard(said)
            elif isinstance(said, Agreed):
                return connection, said
            elif isinstance(said, Ended):
                words = "; ".join(plain_text(row.reason) for row in said.reasons) or f"the session is {said.state}"
                raise ChannelError(f"no agreement with the agent at {destination}: {words}")
    except BaseException:
        connection.close()
        raise
