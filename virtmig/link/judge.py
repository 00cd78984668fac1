"""The default answer to a proposal, made from a plan; and what a source checks before it accepts an answer.

The rule: what was asked is done or refused; less of the same (5 connections of 10) is an adjustment, which is said so,
and is refused where the option is fixed or under --strict. Planning is the caller's: plan.negotiate is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from virtmig.agreement import Plan
from virtmig.errors import RequestError
from virtmig.facts import GuestFacts, HostFacts
from virtmig.link.messages import Answer, Attachment, ChannelCount, Proposal, Reason, Value, Verdict, clip
from virtmig.request import MigrationRequest


@dataclass(frozen=True, slots=True)
class Hosts:
    """The facts of both ends, as each said them."""

    source: HostFacts
    destination: HostFacts


Judge = Callable[[Proposal, Hosts], Answer]
Negotiate = Callable[[MigrationRequest, HostFacts, HostFacts, GuestFacts], Plan]


def judge_by(negotiate: Negotiate) -> Judge:
    """A judge that answers what `negotiate` plans."""

    def judge(proposal: Proposal, hosts: Hosts) -> Answer:
        try:
            request = MigrationRequest(proposal.request)
        except RequestError as error:
            return Answer(verdicts=tuple(_refused(*problem) for problem in error.problems[:256]))
        return answer_of(negotiate(request, hosts.source, hosts.destination, proposal.guest), proposal, hosts)

    return judge


def answer_of(plan: Plan, proposal: Proposal, hosts: Hosts) -> Answer:
    """A plan in the words of an answer."""
    verdicts = [_refused(row.feature, row.reason, row.way_out) for row in plan.refusals]
    refused = {row.feature for row in verdicts}
    for change in plan.adjustments:
        names = {change.option, "threads"} if change.option == "parallel-connections" else {change.option}
        if names & set(proposal.fixed):
            reason = f"--{change.option} {change.asked} is fixed, {change.reason}"
            verdicts.append(_refused(change.option, reason, f"--{change.option} {change.planned}, or do not fix it"))
            continue
        verdicts.append(
            Verdict(
                feature=clip(change.option, 64),
                outcome="adjusted",
                reason=clip(change.reason),
                asked=clip(change.asked),
                given=clip(change.planned),
            )
        )
    for choice in plan.choices:
        if choice.on and choice.feature not in refused:
            verdicts.append(Verdict(feature=clip(choice.feature, 64), outcome="accepted", reason=clip(choice.reason)))
    limit = hosts.destination.parallel_connections_max
    return Answer(
        verdicts=tuple(verdicts[:256]),
        settled=dict(plan.values),
        channels=() if plan.refusals else tuple(ChannelCount(row.role, row.count) for row in plan.channels),
        limits={} if limit is None else {"parallel-connections": limit},
        warnings=tuple(Reason(clip(row.feature, 64), clip(row.text), clip(row.way_out)) for row in plan.warnings[:64]),
    )


def _refused(feature: str, reason: str, way_out: str) -> Verdict:
    return Verdict(feature=clip(feature, 64), outcome="refused", reason=clip(reason), way_out=clip(way_out))


def objections(proposal: Proposal, answer: Answer) -> list[Reason]:
    """What the source cannot accept: anything other than asked that was not said, or was fixed."""
    return list(_objections(proposal, answer))[:64]


def _objections(proposal: Proposal, answer: Answer) -> Iterator[Reason]:
    adjusted = {row.feature for row in answer.verdicts if row.outcome == "adjusted"}
    if "parallel-connections" in adjusted:
        adjusted.add("threads")  # the same number under another name
    for name in sorted(adjusted):
        if name in proposal.fixed or proposal.request.get("strict"):
            yield Reason(name, f"{name} was adjusted, and may not be", "leave out --strict, or ask for less")
    for name in sorted(proposal.request.keys() | answer.settled.keys()):
        asked, given = proposal.request.get(name), answer.settled.get(name)
        if name not in adjusted and not _alike(asked, given):
            yield Reason(name, f"{name} was changed from {_text(asked)} to {_text(given)} without a word")
    if not any(row.role == "main" and row.count == 1 for row in answer.channels):
        yield Reason("main", "the answer has no main channel")
    if proposal.attachments or answer.attachment is not None:
        chosen = answer.attachment
        # libvirt is told every part of it; only where QEMU listens over there is the destination's to choose
        if chosen is None or all(_elsewhere(chosen) != _elsewhere(row) for row in proposal.attachments):
            words = " ".join(filter(None, _elsewhere(chosen))) if chosen is not None else "missing attachment"
            yield Reason("attachment", clip(f"the answer's {words} is none of those offered"))
        elif not _on_loopback(chosen.listen_address):
            words = clip(chosen.listen_address, 64)
            yield Reason("attachment", f"the answer has QEMU listen on {words}, where others than its agent reach it")
    if len({row.role for row in answer.channels}) != len(answer.channels):
        yield Reason("channels", "the answer counts a role twice")


def _elsewhere(attachment: Attachment) -> tuple[str, str]:
    return attachment.uri, attachment.disks_uri


def _on_loopback(address: str) -> bool:
    return not address or (address.startswith("127.") and set(address) <= set("0123456789."))


def _alike(asked: Value | None, given: Value | None) -> bool:
    return asked == given or (not asked and not given)


def _text(value: Value | None) -> str:
    return clip(repr(value), 200)
