"""The agent: listens, greets whoever comes, and starts sessions. One port for control and all channels.

A connection is greeted in a thread of its own, with a deadline and a bounded number at once, so that port scanners and
slow peers hold up nobody. Its first frame says what it is: HELLO begins a session, OPEN_CHANNEL and RESUME belong to
one; a line of JSON on a unix socket is a client of this host.
"""

from __future__ import annotations

import contextlib
import grp
import importlib.metadata
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from virtmig.agent.access import AllowList, Identity, QemuUser, qemu_user
from virtmig.agent.clients import Client
from virtmig.agent.config import AgentConfig
from virtmig.agent.discovery import AgentFacts, Discovery
from virtmig.agent.journal import Journal
from virtmig.agent.limits import Limits
from virtmig.agent.logs import get_logger
from virtmig.agent.notify import ActivatedSocket, Notifier
from virtmig.agent.peers import Peers
from virtmig.agent.responding import answer_session
from virtmig.agent.session import Session
from virtmig.engine.agents import runtime_folder
from virtmig.engine.lines import Line
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import MigrationError
from virtmig.facts import HostFacts
from virtmig.link.frames import FIRST, PREFACE, Control, FrameDecoder, encode_message
from virtmig.link.messages import Hello, OpenChannel, Reason, Refuse, Resume
from virtmig.link.side import Terms
from virtmig.link.states import State

#: from the accepted connection to its whole first frame, TLS included
GREETING_S = 10.0
#: connections being greeted at once: those of two large migrations, and room for strangers
MOST_GREETINGS = 128
#: what libvirt and QEMU said of this host is asked again after so long
FACTS_KEPT_S = 30.0
_TURN_S = 1.0

log = get_logger("agent")


class Agent:
    """The service of one host. `start` returns when it listens; `stop` lets running sessions finish first."""

    def __init__(self, config: AgentConfig, *, sessions_folder: Path | None = None) -> None:
        """Raises RequestError for a configuration that cannot be carried out here."""
        self.config = config
        self.peers = Peers(config)
        self.allow = AllowList(config.allow)
        self.limits = Limits(config.limits)
        self.journal = Journal(sessions_folder or runtime_folder() / "sessions")
        self.discovery = Discovery(config)
        self.addresses: list[Address] = []
        self._stop = Stop()
        self._listeners: list[tuple[Listener, bool]] = []
        self._sessions: dict[Session, str] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._greetings = threading.BoundedSemaphore(MOST_GREETINGS)
        self._facts: tuple[float, AgentFacts, HostFacts] | None = None
        self._facts_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.implementation = f"virtmig {_version()}"
        self._beat: Callable[[], object] = lambda: None

    # -- what it knows ----------------------------------------------------------------------------------------------

    def facts(self) -> tuple[AgentFacts, HostFacts]:
        """Of this host; at most FACTS_KEPT_S old."""
        with self._facts_lock:
            if self._facts is None or time.monotonic() - self._facts[0] > FACTS_KEPT_S:
                self._facts = (time.monotonic(), *self.discovery.look())
            return self._facts[1:]

    def qemu_user(self) -> QemuUser:
        return qemu_user(self.config.qemu, libvirt_uid=self.facts()[1].qemu_uid)

    def terms(self, facts: HostFacts | None = None) -> Terms:
        deadline_s = {State.RECONNECTING: self.config.deadlines.reconnect_s}
        return Terms(
            facts=facts or self.facts()[1],
            random=secrets.token_bytes,
            implementation=self.implementation,
            key=self.peers.key,
            deadline_s=deadline_s,
        )

    # -- sessions ---------------------------------------------------------------------------------------------------

    def add(self, session: Session, words: str) -> None:
        with self._lock:
            self._sessions[session] = words

    def remove(self, session: Session) -> None:
        with self._changed:
            self._sessions.pop(session, None)
            self._changed.notify_all()

    def sessions(self) -> tuple[Session, ...]:
        with self._lock:
            return tuple(self._sessions)

    def _session_of(self, number: bytes) -> Session | None:
        with self._lock:
            return next((each for each in self._sessions if number and each.side.session == number), None)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self, notifier: Notifier | None = None, sockets: tuple[ActivatedSocket, ...] = ()) -> None:
        """Listen. Raises ChannelError, RequestError."""
        try:
            self._listen(sockets)
        except BaseException:
            self._close_listeners()
            raise
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._thread.start()
        threading.Thread(target=self.facts, name="facts", daemon=True).start()
        notifier = notifier or Notifier()
        notifier.ready("listening on " + ", ".join(map(str, self.addresses)))
        if notifier.watchdog_s is not None:
            self._beat = notifier.watchdog
        log.info("listening", addresses=[str(address) for address in self.addresses], security=self.config.security)
        if self.config.security == "plain":
            log.warning("plain text: whoever reaches the port can read the guest's memory")

    def stop(self, within_s: float | None = None, *, notifier: Notifier | None = None) -> None:
        """No new sessions; those that run may finish for `within_s`, then they are given up, and the guest stays."""
        self._stop.request()
        if self._thread is not None:
            self._thread.join()
        self._close_listeners()
        wait = self.config.deadlines.stop_s if within_s is None else within_s
        for session in self.sessions():
            if not session.running:
                session.fail("the agent stops")
        deadline = time.monotonic() + wait
        with self._changed:
            while self._sessions and time.monotonic() < deadline:
                if notifier is not None:
                    notifier.stopping(f"{len(self._sessions)} migrations may finish")
                    notifier.extend_timeout(30)
                self._changed.wait(min(5.0, max(0.01, deadline - time.monotonic())))
        for session in self.sessions():
            session.fail("the agent stops, and the time to finish is over")
        for session in self.sessions():
            session.join(10.0)

    def _listen(self, sockets: tuple[ActivatedSocket, ...]) -> None:
        local = self.config.local_socket
        given_local = [each for each in sockets if each.socket.family == socket.AF_UNIX]
        given = [each for each in sockets if each.socket.family != socket.AF_UNIX]
        for each in sockets:
            self._listeners.append((Listener.of(each.socket, self._stop), each.socket.family == socket.AF_UNIX))
        if not given_local:
            local.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._listeners.append((Listener(Address.parse(f"unix:{local}"), self._stop), True))
            _set_rights(local, self.config)
        if not given:
            for address in self.config.addresses:
                where = Address(host=address.host, port=address.port, path=address.path)
                self._listeners.append((Listener(where, self._stop), address.kind == "unix"))
        self.addresses = [listener.address for listener, _ in self._listeners]

    def _close_listeners(self) -> None:
        for listener, _ in self._listeners:
            listener.close()
        self._listeners.clear()

    def _accept(self) -> None:
        poll = select.poll()
        by_fd = {listener.socket.fileno(): listener for listener, _ in self._listeners}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while not self._stop.requested.is_set():
            self._beat()
            for fd, _ in poll.poll(_TURN_S * 1000):
                with contextlib.suppress(MigrationError):
                    connection = by_fd[fd].accept()
                    if connection is not None:
                        self._greet(connection)

    def _greet(self, connection: socket.socket) -> None:
        if not self._greetings.acquire(blocking=False):
            log.warning("refused: too many connections are being greeted", most=MOST_GREETINGS)
            connection.close()
            return
        threading.Thread(target=self._greeting, args=(connection,), name="greeting", daemon=True).start()

    def _greeting(self, connection: socket.socket) -> None:
        line: Line | None = None
        try:
            deadline = time.monotonic() + GREETING_S
            line, identity = self.peers.accepted(connection)
            decoder = FrameDecoder("a new connection", FIRST)
            first = _first_byte(line, deadline)
            if first == b"{" and connection.family == socket.AF_UNIX:
                self._greetings.release()
                try:
                    Client(self, line, identity, first).serve()
                finally:
                    self._greetings.acquire()
                return
            decoder.feed(first)
            for _ in decoder.events():
                pass
            event = line.read_frame(decoder, deadline)
            assert isinstance(event, Control)
            self._dispatch(line, decoder, event, identity)
        except MigrationError as error:
            log.warning("refused", peer=line.peer if line is not None else "", reason=str(error))
            if line is not None:
                line.close()
        finally:
            self._greetings.release()

    def _dispatch(self, line: Line, decoder: FrameDecoder, first: Control, identity: Identity) -> None:
        message = first.message
        if isinstance(message, Hello):
            if self._stop.requested.is_set():
                _refuse(line, [Reason("agent", "the agent is being stopped", "try again in a moment")])
                return
            answer_session(self, line, decoder, first, identity)
            return
        assert isinstance(message, (OpenChannel, Resume))
        session = self._session_of(message.session)
        if session is None or session.side.peer != identity.peer:
            log.warning("refused", peer=line.peer, reason=f"no such session for {message.channel}")
            _refuse(line, [Reason("channel", "no such session for this peer", "")])
            return
        session.opened(line, decoder, message, identity.peer)


def _version() -> str:
    try:
        return importlib.metadata.version("virtmig")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _first_byte(line: Line, deadline: float) -> bytes:
    byte = bytearray(1)
    line.read_exactly(memoryview(byte), deadline)
    return bytes(byte)


def _refuse(line: Line, reasons: list[Reason]) -> None:
    with contextlib.suppress(MigrationError):
        line.write_all([PREFACE, encode_message(Refuse(reasons=tuple(reasons)))], time.monotonic() + 2.0)
    line.close()


def _set_rights(path: Path, config: AgentConfig) -> None:
    path.chmod(int(config.local.mode, 8))
    if config.local.group:
        with contextlib.suppress(KeyError, OSError):
            os.chown(path, -1, grp.getgrnam(config.local.group).gr_gid)
