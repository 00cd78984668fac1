"""How a migration will go, asked before it begins: the guest's writing is sampled, the path's rate is remembered."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

from virtmig.agreement import Plan
from virtmig.estimate import Estimate, estimate, written_text
from virtmig.facts import GuestFacts
from virtmig.progress import DEFAULT_DOWNTIME_MS, Phase
from virtmig.report.records import Record, all_records
from virtmig.virt.dirty_rate import dirty_rate

_MIB = 1 << 20
#: of the newest migrations between the same two hosts
_REMEMBERED = 10


class Outlook(NamedTuple):
    """`estimate` None: it cannot be told, and `words` says why."""

    estimate: Estimate | None
    words: str
    advice: str = ""


def outlook(connection: Any, domain: Any, plan: Plan, guest: GuestFacts) -> Outlook | None:
    """None where there is nothing to tell: a guest that does not run, or does not run meanwhile.

    Takes a second, or a few for a guest that writes little: the guest runs on.
    """
    request = plan.request
    if not guest.running or not guest.memory_bytes or "live" not in request or "offline" in request:
        return None
    writes = dirty_rate(connection, domain)
    rate, evidence = path_rate(plan, all_records()[:200])
    if writes is None:
        return Outlook(None, "cannot be told: libvirt or QEMU does not tell how fast the guest writes")
    if rate is None:
        return Outlook(
            None,
            f"cannot be told: {evidence} ({written_text(*writes)})",
            "--bandwidth MIB_S gives a rate to reckon with",
        )
    found = estimate(
        memory_bytes=guest.memory_bytes,
        dirty_bytes_per_s=writes.bytes_per_s,
        dirty_step_bytes_per_s=writes.step_bytes_per_s,
        rate_bytes_per_s=rate,
        rate_evidence=evidence,
        downtime_limit_ms=request.number("max-downtime") or DEFAULT_DOWNTIME_MS,
        postcopy="postcopy-after-precopy" in request or bool(request.number("postcopy-after-passes")),
    )
    return Outlook(found, found.sentence, found.advice)


def path_rate(plan: Plan, records: list[Record]) -> tuple[float | None, str]:
    """Bytes per second that memory will go at, at most --bandwidth; or why that is not known.

    As past migrations between these hosts did: those over the same transport and as many connections, else any.
    """
    way = _way(plan)
    seen: list[float] = []
    otherwise: list[float] = []
    for record in records:
        began = record.began
        if {began.source, began.destination} != {plan.source, plan.destination} or "bandwidth" in began.request:
            continue
        if rate := _rate_of(record):
            (seen if _way(began.plan) == way else otherwise).append(rate)
    limit = plan.request.number("bandwidth")
    other = "" if seen else " in another way (transport, connections)"
    reached_by = (seen or otherwise)[:_REMEMBERED]
    if not reached_by:
        words = "no migration between these hosts is known"
        return (float(limit * _MIB), f"--bandwidth {limit}") if limit else (None, words)
    reached = median(reached_by)
    if limit and limit * _MIB < reached:
        return float(limit * _MIB), f"--bandwidth {limit}"
    many = f"{len(reached_by)} migrations" if len(reached_by) > 1 else "one migration"
    return reached, f"as {many} between these hosts reached{other}"


def _way(plan: Plan) -> tuple[object, ...]:
    """What the rate of a path depends on: transport, connections, TLS. Of a record too, whose values nobody checked."""
    connections = plan.values.get("parallel-connections", 2) if plan.values.get("parallel") else 1
    return plan.transport, connections, bool(plan.values.get("tls"))


def _rate_of(record: Record) -> float | None:
    rates = [
        float(row.progress.memory_bytes_per_s)
        for row in record.samples
        if row.progress.phase in (Phase.PRECOPY, Phase.POSTCOPY) and row.progress.memory_bytes_per_s
    ]
    return median(rates) if rates else None
