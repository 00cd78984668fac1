"""Clients of this host on the agent's socket: facts, sessions, and `begin`, which opens a session to another host."""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from virtmig.agent.access import Identity
from virtmig.agent.journal import Entry
from virtmig.agent.logs import get_logger
from virtmig.agent.meeting import Shape, SourcePlaces, dialect_of
from virtmig.agent.peers import SSH_HELLO_S, SshLine
from virtmig.agent.responding import end_older, reasons_of
from virtmig.agent.session import Session
from virtmig.engine.lines import Line
from virtmig.engine.transport import Stop
from virtmig.errors import ChannelError, MigrationError, PlanRefused, RemoteProtocolError
from virtmig.facts import Finding
from virtmig.link.asking import (
    HANDOVER,
    Agreed,
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
    decode_asked,
    encode_line,
)
from virtmig.link.frames import FrameDecoder
from virtmig.link.initiator import Initiator
from virtmig.link.messages import Failed, Message, Ping, Pong, channel_order
from virtmig.link.side import Over
from virtmig.link.states import FINAL, State

if TYPE_CHECKING:
    from virtmig.agent.server import Agent

log = get_logger("agent")

QUESTION_S = 10.0
WRITE_S = 2.0
CARRIED_EVERY_S = 1.0
#: what stands in no log and on no screen
_SECRET = {"proof": None, "nonce": None, "secret": None}


class Client:
    """One connection of a client, served in the thread that greeted it."""

    def __init__(
        self, agent: Agent, line: Line, identity: Identity, first: bytes, *, greeted: Callable[[], None]
    ) -> None:
        """`greeted` is called when it has asked something and may."""
        self._agent = agent
        self._greeted = greeted
        self._line = line
        self._identity = identity
        self._lines = Lines()
        self._waiting = self._lines.feed(first)
        self._write_lock = threading.Lock()
        self._gone = False

    def serve(self) -> None:
        try:
            question = self._question(time.monotonic() + QUESTION_S)
            self._agent.allow.check(self._identity, "manage")
            self._greeted()
            if isinstance(question, Facts):
                details, facts = self._agent.facts()
                self.say(HostSaid(facts=facts, implementation=self._agent.implementation, details=details))
            elif isinstance(question, Sessions):
                self.say(SessionsSaid(sessions=self._agent.journal.records()))
            elif isinstance(question, Begin):
                self._begin(question)
            else:
                raise ChannelError("there is no session to give up in this connection")
        except PlanRefused as error:
            self.say(Refused(reasons=reasons_of(error), by_peer=False))
        except MigrationError as error:
            self.say(Problem(text=error.message, hint=error.hint, kind=type(error).__name__))
        finally:
            self._line.close()

    def say(self, message: Said) -> None:
        """Nothing is done about a client that does not listen: the session goes on without it."""
        with self._write_lock:
            if self._gone:
                return
            try:
                self._line.write_all([encode_line(message)], time.monotonic() + WRITE_S)
            except MigrationError:
                self._gone = True

    def _question(self, deadline: float) -> Any:
        while not self._waiting:
            if not self._read(max(0.0, deadline - time.monotonic())) or time.monotonic() >= deadline:
                raise ChannelError(f"a client that asks nothing within {QUESTION_S:g} s")
            if self._gone:
                raise ChannelError("the client has gone")
        return decode_asked(self._waiting.pop(0))

    def _read(self, wait_s: float) -> bool:
        poll = select.poll()
        poll.register(self._line.fileno(), select.POLLIN)
        if not poll.poll(wait_s * 1000):
            return False
        buffer = memoryview(bytearray(65536))
        count = self._line.recv_into(buffer)
        if count == 0:
            self._gone = True
        elif count:
            self._waiting += self._lines.feed(bytes(buffer[:count]))
        return bool(count)

    # -- a session -------------------------------------------------------------------------------------------------

    def _begin(self, question: Begin) -> None:
        agent, request = self._agent, question.request
        if agent.stopping.is_set():
            raise ChannelError("the agent is being stopped", hint="try again in a moment")
        with contextlib.ExitStack() as stack:
            stack.enter_context(agent.limits.migration("out"))
            addresses = tuple(part.strip() for part in question.destination.split(",") if part.strip())
            if not addresses:
                raise ChannelError("no address of a destination's agent was given", hint="tcp:HOST:PORT")
            line, peer = self._first_line(addresses)
            facts = question.facts or agent.facts()[1]
            facts = msgspec.structs.replace(
                facts,
                agent=Finding("yes", "it has asked"),
                parallel_connections_max=agent.config.limits.parallel_connections,
            )
            places = None
            if not question.only_handshake:
                try:
                    places = SourcePlaces(agent.config, agent.qemu_user(), Stop(), disks=_copies_disks(question))
                except BaseException:
                    line.close()
                    raise
            following = _Following(agent, self, question, peer)
            hello_s = SSH_HELLO_S if isinstance(line, SshLine) else None
            side = Initiator(
                agent.terms(facts, hello_s=hello_s), line, time.monotonic(), request=request, guest=question.guest,
                fixed=question.fixed, attachments=places.offers if places else (), peer=peer,
            )  # fmt: skip
            dial = agent.peers.dialler(addresses, agent.config.deadlines.reconnect_s, asked_by=self._identity)
            session = Session(
                side,
                line,
                FrameDecoder("control"),
                follower=following,
                dial=lambda channel, needed: dial(needed),
                throttle=agent.limits.outgoing.take if agent.limits.outgoing.bytes_per_s else None,
                cleanup=lambda: agent.remove(session),
            )
            if places is not None:
                session.meet_source(places)
            if request.get("postcopy-resume"):
                end_older(agent.sessions(), session, question.guest)
            agent.add(session, peer)
            session.start(lambda: side.begin(time.monotonic()))
            self._follow(session)

    def _first_line(self, addresses: tuple[str, ...]) -> tuple[Line, str]:
        problems = []
        for address in addresses:
            try:
                line, identity = self._agent.peers.dial(address, asked_by=self._identity)
                return line, identity.label
            except ChannelError as error:
                problems.append(error)
        raise problems[0] if len(problems) == 1 else ChannelError("; ".join(error.message for error in problems))

    def _follow(self, session: Session) -> None:
        """Until it is over. A client that goes before anything has moved takes its session along."""
        told = time.monotonic()
        while not session.over.is_set():
            if session.running and time.monotonic() >= told + CARRIED_EVERY_S:
                told = time.monotonic()
                self.say(Carried(channels=session.carried(), ms=round(told * 1000, 2)))
            if self._gone:
                if not session.running:
                    session.fail("the client has gone before anything was sent", guest="source")
                session.over.wait(0.5)
                continue
            try:
                self._read(0.2)
            except MigrationError:
                self._gone = True
            while self._waiting:
                try:
                    asked = decode_asked(self._waiting.pop(0))
                except RemoteProtocolError as error:  # as if it had gone; the session has its place until it is over
                    self.say(Problem(text=error.message, kind=type(error).__name__))
                    self._gone = True
                    self._waiting.clear()
                    break
                if isinstance(asked, GiveUp):
                    session.fail(asked.reason or "given up", guest=asked.guest)


def _copies_disks(question: Begin) -> bool:
    return any(question.request.get(name) for name in ("copy-storage-all", "copy-storage-inc"))


class _Following:
    """Tells the client, the log and the journal of a source's session."""

    def __init__(self, agent: Agent, client: Client, question: Begin, peer: str) -> None:
        self._agent = agent
        self._client = client
        self._question = question
        self._log = log.bind(peer=peer, role="source", domain=question.guest.name)
        self._began = time.monotonic()
        self._entry: Entry | None = None
        self._flights = 0
        self._ours_last = False

    def said(self, session: Session, message: Message, *, here: bool) -> None:
        if session.running or isinstance(message, (Ping, Pong, Failed)):
            return
        if here and not self._ours_last:
            self._flights += 1
        self._ours_last = here
        content = msgspec.to_builtins(message, builtin_types=(bytes,)) | _SECRET
        content = {name: value for name, value in content.items() if value not in (None, "", [], {})}
        if isinstance(content.get("session"), bytes):
            content["session"] = content["session"].hex()
        self._client.say(Exchanged(source=here, name=type(message).__name__, ms=self._ms(), content=content))

    def changed(self, session: Session, state: State, words: str) -> None:
        if state in FINAL:  # `over` has said it, with reasons
            return
        level = self._log.warning if state is State.RECONNECTING else self._log.info
        level(str(state), **({"detail": words} if words else {}))
        if state is State.ESTABLISHED:
            self._established(session)
        elif state is not State.OPENING or self._entry:
            self._client.say(Changed(state=str(state), words=words))
        self._note(str(state))

    def handover(self, session: Session) -> str:
        return self._note(HANDOVER)

    def _established(self, session: Session) -> None:
        side, question = session.side, self._question
        assert side.answer is not None
        assert side.peer_hello is not None
        answer = side.answer
        record = SessionRecord(
            session=side.session.hex(),
            role="source",
            domain=question.guest.name,
            uuid=question.guest.uuid,
            peer=side.peer,
            destination=question.destination,
            request=dict(answer.settled),
            source_uri=question.facts.uri if question.facts else "",
            began=time.time(),
        )
        if not question.only_handshake:
            self._entry = Entry(self._agent.journal, record)
        if answer.attachment is not None:
            source_version = question.guest.qemu_version or side.terms.facts.qemu_version
            shape = Shape(
                source=dialect_of(source_version),
                destination=dialect_of(side.peer_hello.facts.qemu_version),
                channels=channel_order(answer.channels),
                postcopy=bool(answer.settled.get("postcopy")),
                recovery=bool(answer.settled.get("postcopy-resume")),
            )
            session.accept_from(answer.attachment.uri, shape)
        self._client.say(
            Agreed(session=side.session.hex(), answer=answer, channels=side.channels, peer=side.peer,
                   ms=self._ms(), attachment=answer.attachment, round_trips=self._flights + 1)
        )  # fmt: skip
        if question.only_handshake:
            session.fail("only a handshake was asked for", guest="source")

    def over(self, session: Session, over: Over) -> None:
        reasons = tuple(row.reason for row in over.reasons)
        level = self._log.info if over.state is State.FINISHED else self._log.warning
        level("over", state=str(over.state), reasons=list(reasons), **session.facts())
        self._note(str(over.state), reasons)
        if over.state is State.REFUSED:
            self._client.say(Refused(reasons=over.reasons))
        else:
            kept = over.guest == "unknown" and self._entry is not None and self._entry.source_keeps
            guest = "source" if kept else over.guest
            self._client.say(Ended(state=str(over.state), reasons=over.reasons, guest=guest))

    def _ms(self) -> float:
        return round((time.monotonic() - self._began) * 1000, 2)

    def _note(self, state: str, reasons: tuple[str, ...] = ()) -> str:
        return self._entry.note(state, reasons) if self._entry is not None else ""
