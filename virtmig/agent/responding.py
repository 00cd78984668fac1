"""A session that another host's agent has begun: who may, what is answered, where QEMU will listen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from virtmig.agent.access import Identity
from virtmig.agent.greetings import Greeting
from virtmig.agent.handover import LocalLibvirt
from virtmig.agent.journal import Entry
from virtmig.agent.logs import get_logger
from virtmig.agent.meeting import DestinationPlace, Shape, dialect_of
from virtmig.agent.session import WRITE_S, Session
from virtmig.engine.lines import Line
from virtmig.errors import MigrationError, PlanRefused
from virtmig.facts import Finding, GuestFacts, HostFacts
from virtmig.link.asking import HANDOVER, SessionRecord
from virtmig.link.frames import Control, FrameDecoder
from virtmig.link.judge import Hosts, judge_by
from virtmig.link.messages import Answer, Message, Proposal, Reason, Verdict, channel_order, clip
from virtmig.link.responder import Responder
from virtmig.link.side import Action, Over
from virtmig.link.states import FINAL, State
from virtmig.plan import negotiate

if TYPE_CHECKING:
    from virtmig.agent.server import Agent

log = get_logger("agent")

#: the source waits 30 s for the answer (DEADLINE_S[PROPOSED])
FACTS_WITHIN_S = 15.0

#: an older session ends in milliseconds, unless its thread writes to a peer that takes nothing
OLDER_S = WRITE_S + 1


def reasons_of(error: MigrationError) -> tuple[Reason, ...]:
    """An error of ours as the peer is told it."""
    rows = error.reasons if isinstance(error, PlanRefused) else (("agent", error.message, error.hint),)
    return tuple(Reason(clip(feature, 64), clip(reason), clip(way_out)) for feature, reason, way_out in rows)


def _refusals(error: MigrationError) -> tuple[Verdict, ...]:
    return tuple(
        Verdict(feature=row.feature, outcome="refused", reason=row.reason, way_out=row.way_out)
        for row in reasons_of(error)
    )


def end_older(sessions: Iterable[Session], newer: Session, guest: GuestFacts) -> None:
    """A recovery begins anew what an earlier session of the same two may still wait for: QEMU pauses when that ends."""
    for each in sessions:
        known = each.side.proposal.guest if each.side.proposal is not None else None
        if each is newer or known is None or type(each.side) is not type(newer.side):
            continue
        same = known.uuid == guest.uuid if known.uuid and guest.uuid else known.name == guest.name
        if same and each.side.peer == newer.side.peer:
            each.fail("a recovery of the same guest has begun")
            each.over.wait(OLDER_S)


def answer_session(
    agent: Agent, line: Line, decoder: FrameDecoder, first: Control, identity: Identity, greeting: Greeting
) -> None:
    """Begin to answer. Whoever may not send guests here is told so, with the row of agent.toml to add.

    Until its proposal is here, which proves the key, the peer is a stranger: it takes a place among those, and none of
    the migrations that run at once.
    """
    stack = contextlib.ExitStack()
    stack.callback(greeting.done)
    refusal: tuple[Reason, ...] = ()
    try:
        agent.allow.check(identity, "send")
    except MigrationError as error:
        refusal = reasons_of(error)
    responding = _Responding(agent, identity, line.peer, greeting, stack)
    terms = agent.terms(_with_agent(agent.facts()[1]))
    side = Responder(terms, line, time.monotonic(), judge=responding.judge, peer=identity.peer)
    session = Session(side, line, decoder, follower=responding, cleanup=lambda: _ended(agent, session, stack))
    responding.session = session
    agent.add(session, line.peer)
    greeting.give_up = lambda: session.fail(greeting.given_up)
    if greeting.given_up:
        refusal = (Reason("agent", greeting.given_up, "try again in a moment"),)

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

    def __init__(
        self, agent: Agent, identity: Identity, peer: str, greeting: Greeting, stack: contextlib.ExitStack
    ) -> None:
        self._agent = agent
        self._greeting = greeting
        self._stack = stack
        self._identity = identity
        self._peer = peer
        self._log = log.bind(peer=peer, role="destination")
        self._entry: Entry | None = None
        self._libvirt: LocalLibvirt | None = None

    def judge(self, proposal: Proposal, hosts: Hosts) -> Answer:
        """What the plan says, with this host's limits, and a place for QEMU. Called in the session's thread."""
        self._greeting.done()
        try:
            self._stack.enter_context(self._agent.limits.migration("in"))
        except MigrationError as error:
            return Answer(verdicts=_refusals(error))
        facts = _with_agent(self._agent.discovery.host_facts(proposal.guest, within_s=FACTS_WITHIN_S))
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
            if shape.recovery:
                end_older(self._agent.sessions(), self.session, proposal.guest)
            place = DestinationPlace(proposal.attachments, self._agent.config, self._agent.qemu_user())
        except MigrationError as error:
            return msgspec.structs.replace(answer, verdicts=(*answer.verdicts, *_refusals(error)), channels=())
        self.session.connect_to(place, shape)
        return msgspec.structs.replace(answer, attachment=place.attachment)

    # -- follower ----------------------------------------------------------------------------------------------------

    def said(self, session: Session, message: Message, *, here: bool) -> None:
        self._log.debug("said" if here else "heard", message=type(message).__name__)
        if isinstance(message, Proposal):
            self._log = self._log.bind(domain=message.guest.name)

    def changed(self, session: Session, state: State, words: str) -> None:
        if state in FINAL:  # `over` has said it, with reasons
            return
        level = self._log.warning if state is State.RECONNECTING else self._log.info
        level(str(state), **({"detail": words} if words else {}))
        proposal = session.side.proposal
        if state is State.ESTABLISHED and proposal is not None:
            record = SessionRecord(
                session=session.side.session.hex(),
                role="destination",
                domain=proposal.guest.name,
                uuid=proposal.guest.uuid,
                peer=self._identity.label,
                request=dict(proposal.request),
                began=time.time(),
            )
            self._entry = Entry(self._agent.journal, record)
            self._libvirt = LocalLibvirt(self._agent.config, proposal.guest.uuid)
        self._note(str(state))

    def handover(self, session: Session) -> str:
        return (self._libvirt.silent() if self._libvirt is not None else "") or self._note(HANDOVER)

    def over(self, session: Session, over: Over) -> None:
        reasons = tuple(row.reason for row in over.reasons)
        level = self._log.info if over.state is State.FINISHED else self._log.warning
        level("over", **{**session.facts(), "state": str(over.state), "reasons": list(reasons), "peer": self._peer})
        self._note(str(over.state), reasons)
        if self._libvirt is not None:
            self._libvirt.close()

    def _note(self, state: str, reasons: tuple[str, ...] = ()) -> str:
        return self._entry.note(state, reasons) if self._entry is not None else ""
