"""A session that another host's agent has begun: who may, what is answered, where QEMU will listen."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec

from virtmig.agent.access import Identity
from virtmig.agent.logs import get_logger
from virtmig.agent.meeting import DestinationPlace, Shape, dialect_of
from virtmig.agent.session import Session
from virtmig.engine.lines import Line
from virtmig.errors import MigrationError, PlanRefused
from virtmig.facts import Finding, HostFacts
from virtmig.link.asking import SessionRecord
from virtmig.link.frames import Control, FrameDecoder
from virtmig.link.judge import Hosts, judge_by
from virtmig.link.messages import Answer, Message, Proposal, Reason, Verdict, channel_order, clip
from virtmig.link.responder import Responder
from virtmig.link.side import Action, Over
from virtmig.link.states import State
from virtmig.plan import negotiate

if TYPE_CHECKING:
    from virtmig.agent.server import Agent

log = get_logger("agent")


def reasons_of(error: MigrationError) -> tuple[Reason, ...]:
    """An error of ours as the peer is told it."""
    rows = error.reasons if isinstance(error, PlanRefused) else (("agent", error.message, error.hint),)
    return tuple(Reason(clip(feature, 64), clip(reason), clip(way_out)) for feature, reason, way_out in rows)


def answer_session(agent: Agent, line: Line, decoder: FrameDecoder, first: Control, identity: Identity) -> None:
    """Begin to answer. Whoever may not send guests here is told so, with the row of agent.toml to add."""
    stack = contextlib.ExitStack()
    refusal: tuple[Reason, ...] = ()
    try:
        agent.allow.check(identity, "send")
        stack.enter_context(agent.limits.migration("in"))
    except MigrationError as error:
        refusal = reasons_of(error)
    responding = _Responding(agent, identity, line.peer)
    terms = agent.terms(_with_agent(agent.facts()[1]))
    side = Responder(terms, line, time.monotonic(), judge=responding.judge, peer=identity.peer)
    session = Session(side, line, decoder, follower=responding, cleanup=lambda: _ended(agent, session, stack))
    responding.session = session
    agent.add(session, line.peer)

    def begin() -> list[Action]:
        if refusal:
            log.warning("refused", peer=line.peer, reasons=[row.reason for row in refusal])
            return side.refuse(refusal, time.monotonic())
        return side.receive(first, time.monotonic())

    session.start(begin)


def _ended(agent: Agent, session: Session, stack: contextlib.ExitStack) -> None:
    stack.close()
    agent.remove(session)


def _with_agent(facts: HostFacts) -> HostFacts:
    return msgspec.structs.replace(facts, agent=Finding("yes", "it has answered"))


class _Responding:
    """The destination's judge, and the follower of its session."""

    session: Session

    def __init__(self, agent: Agent, identity: Identity, peer: str) -> None:
        self._agent = agent
        self._identity = identity
        self._log = log.bind(peer=peer, role="destination")
        self._record: SessionRecord | None = None

    def judge(self, proposal: Proposal, hosts: Hosts) -> Answer:
        """What the plan says, with this host's limits, and a place for QEMU. Called in the session's thread."""
        facts = _with_agent(self._agent.discovery.host_facts(proposal.guest))
        source = msgspec.structs.replace(hosts.source, local=None)  # local to its agent, not to us
        answer = judge_by(negotiate)(proposal, Hosts(source, facts))
        if answer.refusals or not proposal.attachments:
            return answer
        try:
            settled = answer.settled
            shape = Shape(
                source=dialect_of(proposal.guest.qemu_version or source.qemu_version),
                destination=dialect_of(facts.qemu_version),
                channels=channel_order(answer.channels),
                postcopy=bool(settled.get("postcopy")),
                recovery=bool(settled.get("postcopy-resume")),
            )
            shape.order()
            place = DestinationPlace(proposal.attachments, self._agent.config, self._agent.qemu_user())
        except MigrationError as error:
            verdicts = tuple(
                Verdict(feature=row.feature, outcome="refused", reason=row.reason, way_out=row.way_out)
                for row in reasons_of(error)
            )
            return msgspec.structs.replace(answer, verdicts=(*answer.verdicts, *verdicts), channels=())
        self.session.connect_to(place, shape)
        return msgspec.structs.replace(answer, attachment=place.attachment)

    # -- follower ----------------------------------------------------------------------------------------------------

    def said(self, session: Session, message: Message, *, here: bool) -> None:
        self._log.debug("said" if here else "heard", message=type(message).__name__)
        if isinstance(message, Proposal):
            self._log = self._log.bind(domain=message.guest.name)

    def changed(self, session: Session, state: State, words: str) -> None:
        level = self._log.warning if state is State.RECONNECTING else self._log.info
        level(str(state), **({"detail": words} if words else {}))
        proposal = session.side.proposal
        if state is State.ESTABLISHED and proposal is not None:
            self._record = SessionRecord(
                session=session.side.session.hex(),
                role="destination",
                domain=proposal.guest.name,
                uuid=proposal.guest.uuid,
                peer=self._identity.label,
                request=dict(proposal.request),
                began=time.time(),
            )
        self._write(state, ())

    def over(self, session: Session, over: Over) -> None:
        reasons = tuple(row.reason for row in over.reasons)
        level = self._log.info if over.state is State.FINISHED else self._log.warning
        level("over", state=str(over.state), reasons=list(reasons), **session.facts())
        self._write(over.state, reasons)

    def _write(self, state: State, reasons: tuple[str, ...]) -> None:
        if self._record is None:
            return
        if state is State.FINISHED:
            self._agent.journal.remove(self._record.session)
            return
        self._record = msgspec.structs.replace(self._record, state=str(state), reasons=reasons)
        self._agent.journal.write(self._record)
