"""How a migration will go, asked before it begins: the guest's writing is sampled, the path's rate is remembered."""

from __future__ import annotations

from statistics import median
from typing import Any

from virtmig.estimate import Estimate, estimate
from virtmig.facts import GuestFacts
from virtmig.progress import DEFAULT_DOWNTIME_MS, Phase
from virtmig.report.records import Record, all_records
from virtmig.request import MigrationRequest
from virtmig.virt.dirty_rate import dirty_rate

_MIB = 1 << 20
#: of the newest migrations between the same two hosts
_REMEMBERED = 10


def outlook(
    connection: Any, domain: Any, request: MigrationRequest, guest: GuestFacts, *, source: str, destination: str
) -> Estimate | None:
    """None where it cannot be told: no running guest, no dirty rate from libvirt, no rate known for this path.

    Takes a second: the guest runs on meanwhile.
    """
    if not guest.running or not guest.memory_bytes or "live" not in request or "offline" in request:
        return None
    rate, evidence = path_rate(request, source, destination, all_records()[:200])
    if rate is None:
        return None
    writes = dirty_rate(connection, domain)
    if writes is None:
        return None
    return estimate(
        memory_bytes=guest.memory_bytes,
        dirty_bytes_per_s=writes,
        rate_bytes_per_s=rate,
        rate_evidence=evidence,
        downtime_limit_ms=request.number("max-downtime") or DEFAULT_DOWNTIME_MS,
        postcopy="postcopy-after-precopy" in request or bool(request.number("postcopy-after-passes")),
    )


def path_rate(
    request: MigrationRequest, source: str, destination: str, records: list[Record]
) -> tuple[float | None, str]:
    """Bytes per second that memory will go at: as past migrations between these hosts did, at most --bandwidth."""
    seen = [
        rate
        for record in records
        if {record.began.source, record.began.destination} == {source, destination}
        and "bandwidth" not in record.began.request
        and (rate := _rate_of(record))
    ][:_REMEMBERED]
    limit = request.number("bandwidth")
    if not seen:
        return (float(limit * _MIB), f"--bandwidth {limit}") if limit else (None, "no migration between them is known")
    reached = median(seen)
    if limit and limit * _MIB < reached:
        return float(limit * _MIB), f"--bandwidth {limit}"
    return reached, f"as {len(seen)} migrations between these hosts reached"


def _rate_of(record: Record) -> float | None:
    rates = [
        float(row.progress.memory_bytes_per_s)
        for row in record.samples
        if row.progress.phase in (Phase.PRECOPY, Phase.POSTCOPY) and row.progress.memory_bytes_per_s
    ]
    return median(rates) if rates else None
