"""The agent: listens, greets whoever comes, and starts sessions. One port for control and all channels.

A connection is greeted in a thread of its own, with a deadline and a bounded number at once (greetings.py). Its first
frame says what it is: HELLO begins a session, OPEN_CHANNEL and RESUME belong to one; a line of JSON on a unix socket is
a client of this host.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import select
import socket
import threading
import time
import weakref
from pathlib import Path

from virtmig.agent.access import AllowList, Identity, QemuUser, group_id, qemu_user, unix_identity
from virtmig.agent.clients import Client
from virtmig.agent.config import Address as ConfigAddress
from virtmig.agent.config import AgentConfig
from virtmig.agent.discovery import AgentFacts, Discovery
from virtmig.agent.greetings import Greeting, Greetings, Refusals
from virtmig.agent.journal import Journal
from virtmig.agent.limits import Limits
from virtmig.agent.logs import get_logger
from virtmig.agent.meeting import sweep_places
from virtmig.agent.metrics import AgentMetrics, MetricsServer
from virtmig.agent.notify import ActivatedSocket, Notifier
from virtmig.agent.peers import Peers, peer_address
from virtmig.agent.responding import answer_session
from virtmig.agent.session import Session
from virtmig.engine.agents import runtime_folder
from virtmig.engine.lines import Line
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import MigrationError, RequestError
from virtmig.facts import HostFacts
from virtmig.link.frames import FIRST, PREFACE, Control, FrameDecoder, encode_message
from virtmig.link.messages import Hello, OpenChannel, Reason, Refuse, Resume
from virtmig.link.side import Terms
from virtmig.link.states import State

#: from the accepted connection to its whole first frame, TLS included
GREETING_S = 10.0
#: places for strangers; besides, all channels of two migrations may come at once
STRANGERS = 96
_BACKLOG = 512
#: a peer waits 10 s for our HELLO (DEADLINE_S[HELLO]): by then we say what we know
FACTS_WITHIN_S = 4.0
#: facts of this host are looked at again after so long, sooner when some are missing
FACTS_KEPT_S = 30.0
FACTS_MISSING_KEPT_S = 2.0
_TURN_S = 1.0
#: a session that is given up tells its peer
_LAST_WORDS_S = 10.0
#: no descriptors, no threads: a pause, so that it does not become worse
_BREATH_S = 0.2

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
        self.greetings = Greetings(STRANGERS + 2 * config.limits.parallel_connections)
        self.addresses: list[Address] = []
        self.implementation = f"virtmig {_version()}"
        self.stopping = threading.Event()
        self._listeners: list[Listener] = []
        self._sessions: dict[Session, str] = {}
        self._over: weakref.WeakSet[Session] = weakref.WeakSet()  # they answer a peer that dials again, for a while
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._facts: tuple[float, AgentFacts, HostFacts] | None = None
        self._facts_lock = threading.Lock()
        self.refusals = Refusals()
        self.metrics = AgentMetrics(self)
        self._metrics_server: MetricsServer | None = None
        self._quiet_since = time.monotonic()
        self._notifier = Notifier({})
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # -- what it knows ----------------------------------------------------------------------------------------------

    def facts(self) -> tuple[AgentFacts, HostFacts]:
        """Of this host; what is not known within FACTS_WITHIN_S stands in `unanswered`."""
        with self._facts_lock:
            if self._facts is None or time.monotonic() > self._facts[0]:
                found = self.discovery.look(within_s=FACTS_WITHIN_S)
                kept_s = FACTS_MISSING_KEPT_S if found[0].unanswered else FACTS_KEPT_S
                self._facts = (time.monotonic() + kept_s, *found)
            return self._facts[1:]

    def qemu_user(self) -> QemuUser:
        return qemu_user(self.config.qemu, libvirt_uid=self.facts()[1].qemu_uid)

    def terms(self, facts: HostFacts | None = None, *, hello_s: float | None = None) -> Terms:
        """`hello_s`: how long the peer may take for its HELLO, where that is longer than usual."""
        deadline_s = {State.RECONNECTING: self.config.deadlines.reconnect_s}
        if hello_s is not None:
            deadline_s[State.HELLO] = hello_s
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
        with self.metrics.ending(session), self._changed:
            if self._sessions.pop(session, None) is not None:
                self._over.add(session)
                self._quiet_since = time.monotonic()
            self._changed.notify_all()

    def sessions(self) -> tuple[Session, ...]:
        with self._lock:
            return tuple(self._sessions)

    @property
    def idle_s(self) -> float:
        """Since when nothing was to be done: no session, and nobody came."""
        with self._lock:
            return 0.0 if self._sessions else time.monotonic() - self._quiet_since

    def _session_of(self, number: bytes) -> Session | None:
        with self._lock:
            return next((each for each in (*self._sessions, *self._over) if each.side.session == number), None)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self, notifier: Notifier | None = None, sockets: tuple[ActivatedSocket, ...] = ()) -> None:
        """Listen. Raises ChannelError, RequestError."""
        try:
            self._listen(sockets)
            if self.config.metrics.listen:
                self._metrics_server = MetricsServer(self.metrics, ConfigAddress.parse(self.config.metrics.listen))
        except BaseException:
            self._close_listeners()
            raise
        if swept := sweep_places(self.config):
            log.info("removed what a killed agent has left", places=swept)
        self._notifier = notifier or Notifier()
        self._notifier.ready("listening on " + ", ".join(map(str, self.addresses)))
        self._quiet_since = time.monotonic()
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._thread.start()
        threading.Thread(target=self.facts, name="facts", daemon=True).start()
        log.info("listening", addresses=[str(address) for address in self.addresses], security=self.config.security)
        on_tcp = any(not address.path for address in self.addresses)
        if self.config.security == "plain" and on_tcp:
            log.warning("plain text, and nobody proves who he is: whoever reaches the port can read the guest's memory")
        elif self.config.security == "key" and on_tcp:
            log.warning("plain text: whoever can listen on the network can read the guest's memory")

    def stop(self, within_s: float | None = None) -> None:
        """No new sessions; those that run may finish for `within_s`, then they are given up, and the guest stays.

        Until then connections are accepted: a broken channel of such a session may come back.
        """
        self.stopping.set()
        wait = self.config.deadlines.stop_s if within_s is None else within_s
        for session in self.sessions():
            if not session.running:
                session.fail("the agent stops")
        deadline = time.monotonic() + wait
        said = None
        with self._changed:
            while self._sessions and time.monotonic() < deadline:
                if said != len(self._sessions):
                    said = len(self._sessions)
                    log.info("stopping", migrations=said, within_s=round(deadline - time.monotonic()))
                self._notifier.stopping(f"{said} migrations may finish")
                self._notifier.extend_timeout(30)
                self._changed.wait(min(5.0, max(0.01, deadline - time.monotonic())))
        left = self.sessions()
        for session in left:
            session.fail("the agent stops, and the time to finish is over")
        for session in left:
            session.over.wait(_LAST_WORDS_S)
        for session in tuple(self._over):
            session.forget()
        self._closing.set()
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        self._close_listeners()
        if self._metrics_server is not None:
            self._metrics_server.close()
        self.refusals.close()
        log.info("stopped")

    def _listen(self, sockets: tuple[ActivatedSocket, ...]) -> None:
        """systemd's sockets in the place of our own: those it gave for unix, those it gave for tcp."""
        # nobody stops a listener by its Stop: that would shut down what systemd goes on listening on
        stop = Stop()
        self._listeners += [Listener.of(each.socket, stop) for each in sockets]
        families = {each.socket.family == socket.AF_UNIX for each in sockets}
        if True not in families:
            self._listeners.append(_local_listener(self.config, stop))
        if False not in families:
            for address in self.config.addresses:
                host = "" if address.host == "::" else address.host  # both families, or IPv4 where there is no IPv6
                self._listeners.append(Listener(Address(host, address.port, address.path), stop, backlog=_BACKLOG))
        self.addresses = [listener.address for listener in self._listeners]

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    # -- who comes --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """The thread "accept". It waits for nothing else, so its beat is the service's."""
        poll = select.poll()
        by_fd = {listener.socket.fileno(): listener for listener in self._listeners}
        for fd in (self._wake, *by_fd):
            poll.register(fd, select.POLLIN)
        turn_s = min(_TURN_S, self._notifier.watchdog_s or _TURN_S)
        beat_at = 0.0
        while not self._closing.is_set():
            if self._notifier.watchdog_s is not None and time.monotonic() >= beat_at:
                with self._lock:  # who holds it for ever has stopped the service
                    beat_at = time.monotonic() + turn_s
                self._notifier.watchdog()
            for fd, _ in poll.poll(turn_s * 1000):
                if fd not in by_fd:
                    continue
                try:
                    connection = by_fd[fd].accept()
                    if connection is not None:
                        self._greet(connection)
                except (MigrationError, OSError, RuntimeError) as error:  # no descriptors, no threads
                    self.refusals.say("here", "", f"a connection cannot be accepted: {error}")
                    self._closing.wait(_BREATH_S)

    def _greet(self, connection: socket.socket) -> None:
        try:
            peer = _peer_of(connection)
            source = peer.rpartition(":")[0] or peer
            greeting = self.greetings.admit(source, lambda: _shut(connection))
        except OSError:  # it has gone already
            connection.close()
            return
        try:
            words = (connection, greeting, peer)
            threading.Thread(target=self._greeting, args=words, name="greeting", daemon=True).start()
        except RuntimeError:
            greeting.done()
            connection.close()
            raise

    def _greeting(self, connection: socket.socket, greeting: Greeting, peer: str) -> None:
        line: Line | None = None
        taken = False

        def met(sock: socket.socket) -> None:
            greeting.give_up = lambda: _shut(sock)
            if greeting.given_up:
                _shut(sock)

        try:
            deadline = time.monotonic() + GREETING_S
            line, identity = self.peers.accepted(connection, within_s=GREETING_S, met=met)
            peer = line.peer
            first = _first_byte(line, deadline)
            if first == b"{" and connection.family == socket.AF_UNIX:
                Client(self, line, identity, first, greeted=greeting.done).serve()
                return
            decoder = FrameDecoder("a new connection", FIRST)
            decoder.feed(first)
            for _ in decoder.events():
                pass
            event = line.read_frame(decoder, deadline)
            assert isinstance(event, Control)
            taken = self._dispatch(line, decoder, event, identity, greeting)
        except MigrationError as error:
            self.refusals.say(greeting.source, peer, greeting.given_up or str(error), error.hint)
        except Exception:  # a defect of ours: that connection is lost, and the log has it
            log.exception("internal error with a new connection", peer=peer)
        finally:
            if not taken:
                greeting.done()
                connection.close()
                if line is not None:
                    line.close()
            with self._lock:
                self._quiet_since = time.monotonic()

    def _dispatch(
        self, line: Line, decoder: FrameDecoder, first: Control, identity: Identity, greeting: Greeting
    ) -> bool:
        """Whether a session has taken the line over; for HELLO its place too, until the peer has proved itself."""
        message = first.message
        if isinstance(message, Hello):
            if self.stopping.is_set():
                _refuse(line, [Reason("agent", "the agent is being stopped", "try again in a moment")])
                return False
            answer_session(self, line, decoder, first, identity, greeting)
            return True
        assert isinstance(message, (OpenChannel, Resume))
        session = self._session_of(message.session)
        if session is None or session.side.peer != identity.peer:
            self.refusals.say(greeting.source, line.peer, f"no such session for {message.channel}")
            _refuse(line, [Reason("channel", "no such session for this peer", "")])
            return False
        greeting.done()
        session.opened(line, decoder, message, identity.peer)
        return True


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


def _peer_of(connection: socket.socket) -> str:
    """Before anything is proved. Raises OSError."""
    if connection.family == socket.AF_UNIX:
        return unix_identity(connection).label
    return peer_address(connection)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # SSLSocket's own takes TLS away from who reads


def _local_listener(config: AgentConfig, stop: Stop) -> Listener:
    """The clients' socket, with its folder and its rights. Raises RequestError, ChannelError."""
    path, group = config.local_socket, config.local.group
    gid = group_id(group) if group else None
    if group and gid is None:
        raise RequestError(f"local.group: this host has no group {group}", option="local.group")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"{path.parent}: the folder of the clients' socket cannot be made: {error.strerror}",
            option="local.socket", hint="local.socket in agent.toml names another place",
        ) from None  # fmt: skip
    listener = Listener(Address(path=str(path)), stop, backlog=_BACKLOG)
    try:
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(int(config.local.mode, 8))
    except OSError as error:
        listener.close()
        raise RequestError(
            f"{path}: it cannot be given to group {group or 'of its own'} with mode {config.local.mode}: "
            f"{error.strerror}", option="local.group", hint="the agent must be a member of that group, or run as root",
        ) from None  # fmt: skip
    return listener
