"""A record in sentences: what was decided and why, what bounded it; two records side by side; another policy's word."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median

import msgspec

from virtmig.link.asking import Changed, Exchanged
from virtmig.link.asking import Ended as AgentsEnded
from virtmig.link.messages import Verdict
from virtmig.policy import Decision, History, Policy, decide
from virtmig.progress import DEFAULT_DOWNTIME_MS, Phase, Progress, Whereabouts
from virtmig.quantities import duration_text, rate_text, size_text
from virtmig.report.records import Agents, AgentsWord, Decided, Ended, Event, Record, Said, Sampled

#: the share of a limit at which it is what bounded the migration
_AT_LIMIT = 0.9
_MIB = 1 << 20


def log_lines(record: Record) -> Iterator[str]:
    """Everything that happened, with its second; samples where the phase or pass changes."""
    seen: tuple[Phase | None, int] = (None, -1)
    told: dict[str, Event] = {}  # by host: libvirt says some things twice
    for row in record.rows:
        stamp = f"{row.at_s:8.2f} s  "
        if isinstance(row, Sampled):
            progress = row.progress
            if (progress.phase, progress.full_passes) == seen:
                continue
            seen = progress.phase, progress.full_passes
            yield stamp + _sample_words(progress)
        elif isinstance(row, Decided):
            yield stamp + f"{row.decision.action}: {row.decision.reason}"
        elif isinstance(row, Said):
            yield stamp + (f"{row.level}: " if row.level != "info" else "") + row.text
        elif isinstance(row, Event):
            last = told.get(row.host)
            if last is None or (last.what, last.detail) != (row.what, row.detail):
                told[row.host] = row
                yield stamp + f"{row.host}: {row.what}" + _detail_words(row)
        elif isinstance(row, Agents):
            if words := _agents_words(row.said):
                yield stamp + "agents: " + words
        elif isinstance(row, Ended):
            yield stamp + row.outcome.sentence
    for _, reason, way_out in record.refusals:
        yield f"{0:8.2f} s  refused: {reason}" + (f" -> {way_out}" if way_out else "")


#: virDomainEventSuspendedDetailType, virDomainEventResumedDetailType
_DETAILS = {
    "suspended": ("paused", "migrated", "I/O error", "watchdog", "restored", "from a snapshot", "API error",
                  "postcopy", "postcopy failed"),
    "resumed": ("unpaused", "migrated", "from a snapshot", "postcopy", "postcopy failed"),
}  # fmt: skip


def _detail_words(row: Event) -> str:
    known = _DETAILS.get(row.what, ())
    return f" ({known[row.detail]})" if 0 <= row.detail < len(known) else ""


def _agents_words(said: AgentsWord) -> str:
    """Empty for what the charts show better, and for the agreement, of which the migration itself gives a line."""
    match said:
        case Exchanged():
            return f"{'to' if said.source else 'from'} the destination: {said.name}"
        case Changed():
            return said.state + (f", {said.words}" if said.words else "")
        case AgentsEnded():
            reasons = "; ".join(row.reason for row in said.reasons)
            return f"the session is {said.state}" + (f": {reasons}" if reasons else "")
    return ""


def _sample_words(progress: Progress) -> str:
    words = [str(progress.phase)]
    if progress.phase is Phase.PRECOPY:
        words.append(f"pass {progress.full_passes + 1}")
    if progress.memory_remaining_bytes is not None:
        words.append(f"{size_text(progress.memory_remaining_bytes)} remain")
    if progress.memory_bytes_per_s:
        words.append(rate_text(progress.memory_bytes_per_s))
    if progress.dirty_bytes_per_s:
        words.append(f"guest writes {rate_text(progress.dirty_bytes_per_s)}")
    return ", ".join(words)


def explain(record: Record) -> list[str]:
    """In sentences, the end first."""
    began, outcome = record.began, record.outcome
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began.time))
    said = [f"{began.domain} from {began.source} to {began.destination}, begun {when}: {record.status}."]
    if record.refusals:
        said.append("It was refused before anything started:")
        said += [
            f"  {reason}" + (f"; a way out: {way_out}" if way_out else "") for _, reason, way_out in record.refusals
        ]
        return said
    if outcome is not None:
        said.append(f"{outcome.sentence}.")
        if outcome.error:
            said.append(f"The reason: {outcome.error}" + (f"; next: {outcome.hint}" if outcome.hint else ""))
    elif record.status == "broken off":
        said.append(
            "The record ends in the middle: virtmig was killed, or could not write. Where the guest is, the hosts tell."
        )
    said += ["", "What was planned:", f"  transport {began.plan.transport}: {began.plan.transport_reason}"]
    said += [f"  {choice.feature}: {choice.reason}" for choice in began.plan.choices if choice.on]
    said += [f"  --{row.option} {row.asked} became {row.planned}: {row.reason}" for row in began.plan.adjustments]
    if (agreed := record.agreed) is not None:
        channels = ", ".join(map(str, agreed.channels))
        said += ["", f"What the agents agreed on, with {agreed.peer} in {agreed.round_trips} round trips, {channels}:"]
        said += [f"  {verdict_words(row)}" for row in agreed.answer.verdicts]
    said += [f"  in the domain XML: {change}" for change in began.changes]
    if began.estimate is not None:
        said += ["", "What was foretold:", f"  {began.estimate.sentence}"]
        if outcome is not None:
            came = f"  it took {duration_text(outcome.elapsed_s)}"
            said.append(came + (f", the guest away for {outcome.downtime_ms} ms" if outcome.downtime_ms else ""))
    if decisions := [row for row in record.decisions if row.decision.notable]:
        said += ["", "What was decided on the way:"]
        said += [
            f"  after {duration_text(row.at_s)}: {row.decision.action}: {row.decision.reason}" for row in decisions
        ]
    if bounds := list(bounds_of(record)):
        said += ["", "What bounded it:", *(f"  {sentence}" for sentence in bounds)]
    return said


def verdict_words(row: Verdict) -> str:
    """One row of an answer, in one line."""
    became = f" {row.asked} -> {row.given}" if row.outcome == "adjusted" else ""
    return f"{row.feature}: {row.outcome}{became}" + (f", {row.reason}" if row.reason else "")


def bounds_of(record: Record) -> Iterator[str]:
    """Why it took as long as it took, as far as the samples show it."""
    moving = [row.progress for row in record.samples if row.progress.phase in (Phase.PRECOPY, Phase.POSTCOPY)]
    rates = [progress.memory_bytes_per_s for progress in moving if progress.memory_bytes_per_s]
    outcome = record.outcome
    postcopy = any(progress.phase is Phase.POSTCOPY for progress in moving)
    for row in record.interventions:
        yield f"after {duration_text(row.at_s)} somebody else stepped in: {row.text}"
    if rates:
        rate = median(rates)
        limit = record.began.request.get("bandwidth")
        changed = any(row.what == "bandwidth" for row in record.interventions)
        if not changed and isinstance(limit, int) and limit and rate >= _AT_LIMIT * limit * _MIB:
            yield f"--bandwidth {limit}: the memory went at {rate_text(int(rate))}, as fast as that allows"
        else:
            yield f"the memory went at {rate_text(int(rate))} (median of {len(rates)} samples)"
        writes = [progress.dirty_bytes_per_s for progress in moving if progress.dirty_bytes_per_s]
        if writes and median(writes) > _AT_LIMIT * rate:
            helped = "more bandwidth" if postcopy else "--postcopy, more bandwidth or a longer --max-downtime"
            yield (
                f"the guest wrote {rate_text(int(median(writes)))}, about as fast as its memory went: precopy alone "
                f"does not end then; {helped} would have helped"
            )
    elif record.sent_bytes and outcome is not None:
        yield f"{size_text(record.sent_bytes)} in all: it was over before a rate could be told"
    throttled = max((progress.throttle_percent or 0 for progress in moving), default=0)
    if throttled:
        yield f"auto-converge took up to {throttled} % of the guest's CPU time"
    if outcome is not None and outcome.downtime_ms is not None:
        observed = outcome.observed_downtime_ms
        words = f"the guest was stopped for {outcome.downtime_ms} ms by QEMU's own count"
        yield words + (f", {observed} ms as both hosts saw it" if observed is not None else "")
        allowed = _downtime_limit_ms(record)
        if not postcopy and outcome.downtime_ms > allowed:
            yield (
                f"that is over the limit of {allowed} ms, which is for the memory that is left: devices, libvirt's own "
                "part, or a rate that fell at the end took the rest"
            )


def _downtime_limit_ms(record: Record) -> int:
    """The last one known: what samples say, else what was asked, else QEMU's own."""
    known = [row.progress.downtime_limit_ms for row in record.samples if row.progress.downtime_limit_ms]
    asked = record.began.request.get("max-downtime")
    return known[-1] if known else asked if isinstance(asked, int) and asked else DEFAULT_DOWNTIME_MS


ROWS = ("status", "transport", "duration", "sent", "passes", "rate", "guest writes", "downtime", "seen downtime")


def facts_of(record: Record) -> dict[str, tuple[str, float | None]]:
    """Of `compare`: (text, number to make a ratio of)."""
    outcome = record.outcome
    rates = [row.progress.memory_bytes_per_s for row in record.samples if row.progress.memory_bytes_per_s]
    writes = [row.progress.dirty_bytes_per_s for row in record.samples if row.progress.dirty_bytes_per_s]
    passes = max((row.progress.full_passes for row in record.samples), default=0)

    def number(value: float | None, text: str) -> tuple[str, float | None]:
        return (text, float(value)) if value else ("-", None)

    elapsed = outcome.elapsed_s if outcome else None
    sent = record.sent_bytes
    down, seen = (outcome.downtime_ms, outcome.observed_downtime_ms) if outcome else (None, None)
    return {
        "status": (record.status, None),
        "transport": (record.began.plan.transport, None),
        "duration": number(elapsed, duration_text(elapsed or 0)),
        "sent": number(sent, size_text(sent or 0)),
        "passes": number(passes, str(passes)),
        "rate": number(median(rates) if rates else None, rate_text(int(median(rates))) if rates else ""),
        "guest writes": number(median(writes) if writes else None, rate_text(int(median(writes))) if writes else ""),
        "downtime": number(down, f"{down} ms"),
        "seen downtime": number(seen, f"{seen} ms"),
    }


def compare(one: Record, other: Record) -> list[tuple[str, str, str, str]]:
    """(what, in one, in the other, ratio of the second to the first), then the options that differ."""
    mine, theirs = facts_of(one), facts_of(other)
    rows = []
    for name in ROWS:
        (text, value), (text_2, value_2) = mine[name], theirs[name]
        ratio = f"{value_2 / value:.2f}" if value and value_2 else ""
        rows.append((name, text, text_2, ratio))
    for name in sorted(one.began.request.keys() | other.began.request.keys()):
        first, second = one.began.request.get(name), other.began.request.get(name)
        if first != second and name not in ("domain", "desturi"):
            rows.append((f"--{name}", _option(first), _option(second), ""))
    return rows


def _option(value: object) -> str:
    return "-" if value is None else "given" if value is True else str(value)


def replay(record: Record, policy: Policy) -> list[tuple[float, Decision]]:
    """What `policy` would have decided on the same curve: (second, decision). It ends with the first that ends it."""
    history, found = History(), []
    for row in record.samples:
        decision = decide(policy, history, row.progress, row.at_s)
        history.add(row.progress, decision, row.at_s)
        if decision.notable:
            found.append((row.at_s, decision))
        if decision.action in ("start-postcopy", "suspend", "abort"):
            break
    return found


def policy_from_toml(text: bytes) -> Policy:
    """The fields of Policy by name; raises msgspec.MsgspecError for others."""
    known = {field.name for field in msgspec.structs.fields(Policy)}
    content = msgspec.toml.decode(text)
    if unknown := set(content) - known:
        raise msgspec.ValidationError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return msgspec.convert(content, Policy)


def running(records: Sequence[Record]) -> list[Record]:
    """Those whose guest may be between two hosts now."""
    return [
        record
        for record in records
        if record.status == "running"
        or (record.outcome is not None and record.outcome.guest in (Whereabouts.SPLIT, Whereabouts.UNKNOWN))
    ]
