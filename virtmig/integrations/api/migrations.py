"""A migration as the API shows it: Nova's field names and statuses where Nova has them, and what Nova does not say.

Nova: api-ref server-migrations (memory_*_bytes, disk_*_bytes, source_node, dest_node, status) and
nova/objects/migration.py for the statuses. KubeVirt's phase stands beside it.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from virtmig.cli.display import NOVA_STATUS
from virtmig.errors import MigrationError
from virtmig.integrations.api.history import KILLED, Ending, Head, History, ending_of
from virtmig.integrations.api.jobs import Job, Jobs
from virtmig.progress import Outcome, Phase, Status, Whereabouts

log = logging.getLogger("virtmig.api")

NovaStatus = Literal["queued", "preparing", "running", "post-migrating", "completed", "failed", "error", "cancelled"]
KubevirtPhase = Literal["Pending", "PreparingTarget", "Running", "Succeeded", "Failed"]
_KUBEVIRT: dict[str, KubevirtPhase] = {
    "queued": "Pending",
    "preparing": "PreparingTarget",
    "running": "Running",
    "post-migrating": "Running",
    "completed": "Succeeded",
}
#: from the ticket to its process; longer only when the API was killed between the two
QUEUED_S = 30.0
#: for hosts that were never asked about a postcopy that was let go of
_LOOK_S = 3.0
#: the first and the last second that a date can have
_FIRST_S, _LAST_S = 0.0, 253402300799.0
#: places from which nobody but a person can help
_ATTENTION = (Whereabouts.SPLIT, Whereabouts.DOUBLED, Whereabouts.LOST, Whereabouts.UNKNOWN)

Time = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]


class NotThere(MigrationError):
    """No migration of that id."""


class NotNow(MigrationError):
    """What was asked does not fit the state of that migration."""


class Reason(msgspec.Struct, frozen=True):
    """Why not, and what can be done about it. `what` is a feature or an option."""

    what: str
    reason: str
    way_out: str = ""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """`id` names its record too, for `virtmig show`; `record_id` is null until that is begun.

    Bytes and rates are of the last sample. A postcopy that virtmig has let go of is `post-migrating`, with the ending
    `detached`, until the hosts have said how it ended.
    """

    id: str
    status: NovaStatus
    kubevirt_phase: KubevirtPhase
    running: bool
    domain: str
    uuid: str | None = None
    source_node: str
    dest_node: str
    source_uri: str
    dest_uri: str
    created_at: Time
    updated_at: Time
    record_id: str | None = None
    started_by: Literal["api", "command"] = "command"
    recovers: str | None = None
    phase: Phase | None = None
    percent: float = 0.0
    memory_total_bytes: int | None = None
    memory_processed_bytes: int | None = None
    memory_remaining_bytes: int | None = None
    disk_total_bytes: int | None = None
    disk_processed_bytes: int | None = None
    disk_remaining_bytes: int | None = None
    memory_bytes_per_s: int | None = None
    dirty_bytes_per_s: int | None = None
    throttle_percent: int | None = None
    downtime_limit_ms: int | None = None
    full_passes: int | None = None
    elapsed_s: float | None = None
    eta_low_s: float | None = None
    eta_high_s: float | None = None
    converging: bool | None = None
    transport: str | None = None
    postcopy_allowed: bool = False
    ending: Ending | None = None
    guest: Whereabouts | None = None
    sentence: str | None = None
    error: str | None = None
    hint: str | None = None
    reasons: tuple[Reason, ...] = ()
    downtime_ms: int | None = None
    observed_downtime_ms: int | None = None


class Found(msgspec.Struct, frozen=True):
    """One migration with what it is known from: a ticket, a record, or both."""

    id: str
    job: Job | None
    head: Head | None

    @property
    def request(self) -> dict[str, Any]:
        return self.head.began.request if self.head is not None else self.job.ticket.request if self.job else {}

    @property
    def source_uri(self) -> str:
        if self.job is not None and self.job.ticket.source_uri:
            return self.job.ticket.source_uri
        facts = self.head.began.source_facts if self.head is not None else None
        return facts.uri if facts is not None else ""

    @property
    def running(self) -> bool:
        if self.head is not None:
            return not self.head.over
        return self.job is not None and self.job.running

    @property
    def queued(self) -> bool:
        """Its ticket is written and its process is not made yet; after QUEUED_S it counts as never made."""
        job = self.job
        if self.head is not None or job is None or job.running or job.pid:
            return False
        return time.time() - job.ticket.time < QUEUED_S

    @property
    def phase(self) -> Phase | None:
        return self.head.sample.progress.phase if self.head is not None and self.head.sample is not None else None

    @property
    def outcome(self) -> Outcome | None:
        return self.head.outcome if self.head is not None else None

    @property
    def ending(self) -> Ending | None:
        if self.head is not None and self.head.ending != "broken off":
            return self.head.ending
        if self.running or self.queued:
            return None
        code = self.job.exit_code if self.job is not None else None
        if code is not None:
            return "broken off" if code >= KILLED else ending_of(code)
        return "failed" if self.job is not None and _errors(self.job.said)[0] else "broken off"

    @property
    def status(self) -> NovaStatus:
        outcome = self.outcome
        if outcome is not None:
            if outcome.status is Status.COMPLETED:
                return "completed"
            if outcome.status is Status.DETACHED:
                return "post-migrating" if self.running else "error"
            if outcome.guest in _ATTENTION:
                return "error"
            return "cancelled" if outcome.status is Status.ABORTED else "failed"
        if self.running:
            status: Any = NOVA_STATUS[self.phase] if self.phase is not None else "preparing"
            return "post-migrating" if status in ("completed", "failed", "cancelled") else status
        if self.queued:
            return "queued"
        if self.ending == "completed":
            return "completed"
        return "failed" if self.ending in ("refused", "failed") else "error"


class Migrations:
    """Every migration that has a ticket or a record, whoever started it."""

    def __init__(self, jobs: Jobs, history: History) -> None:
        self.jobs = jobs
        self.history = history

    def all(self) -> list[Found]:
        """The newest first. A ticket and its record have one id."""
        heads = {head.id: head for head in self.history.heads()}
        found = [Found(job.ticket.id, job, heads.pop(job.ticket.id, None)) for job in self.jobs.all()]
        found += [Found(head.id, None, head) for head in heads.values()]
        return sorted(found, key=lambda each: each.id, reverse=True)

    def find(self, wanted: str) -> Found:
        """Raises NotThere."""
        for each in self.all():
            if wanted == each.id:
                if each.head is not None and each.head.detached:
                    return Found(each.id, each.job, self.history.head(each.id, wait_s=_LOOK_S) or each.head)
                return each
        raise NotThere(f"no migration is called '{wanted}'", hint="GET /v1/migrations lists them")

    def newer(self, found: Found) -> Found | None:
        """A migration of the same guest that runs and began later: what is done to the guest now is done to that."""
        if found.head is None:
            return None
        for each in self.all():
            if each.id <= found.id:
                return None
            if each.running and each.head is not None and _same_guest(each.head, found.head):
                return each
        return None

    def again(self, found: Found) -> Found:
        """The same one as it is now, without a look at all others. Raises NotThere."""
        if found.head is None:
            return self.find(found.id)
        job = self.jobs.now(found.job) if found.job is not None else None
        return Found(found.id, job, self.history.head(found.head.id) or found.head)


def _same_guest(one: Head, other: Head) -> bool:
    mine, theirs = one.began.guest, other.began.guest
    if mine is not None and theirs is not None and mine.uuid and theirs.uuid:
        return mine.uuid == theirs.uuid
    return (one.began.domain, one.began.source) == (other.began.domain, other.began.source)


def shown_all(found: Iterable[Found]) -> list[Migration]:
    """Those that can be shown: one damaged record does not hide the others."""
    shown_ones = []
    for each in found:
        try:
            shown_ones.append(shown(each))
        except Exception as error:
            log.warning("%s cannot be shown: %s: %s", each.id, type(error).__name__, error)
    return shown_ones


def shown(found: Found) -> Migration:
    """As JSON has it."""
    head, job, outcome = found.head, found.job, found.outcome
    request = found.request
    created = job.ticket.time if job is not None else head.began.time if head is not None else 0.0
    sample = head.sample if head is not None else None
    progress = sample.progress if sample is not None else None
    updated = head.began.time + head.last_at_s if head is not None else created
    began = head.began if head is not None else None
    status = found.status
    error, hint = _words(found)
    numbers: dict[str, Any] = {}
    if progress is not None:
        numbers = {name: getattr(progress, name) for name in _PROGRESS_FIELDS}
    if outcome is not None:
        numbers["elapsed_s"] = outcome.elapsed_s
    if sample is not None and found.running:
        numbers |= {name: getattr(sample, name) for name in ("eta_low_s", "eta_high_s", "converging")}
    refused = head.refused.reasons if head is not None and head.refused is not None else ()
    return Migration(
        id=found.id,
        status=status,
        kubevirt_phase=_KUBEVIRT.get(status, "Failed"),
        running=found.running,
        domain=began.domain if began else str(request.get("domain", "")),
        uuid=began.guest.uuid or None if began and began.guest else None,
        source_node=began.source if began else "",
        dest_node=began.destination if began else "",
        source_uri=found.source_uri,
        dest_uri=str(request.get("desturi", "")),
        created_at=_time(created),
        updated_at=_time(max(updated, created)),
        record_id=head.id if head is not None else None,
        started_by="api" if job is not None else "command",
        recovers=job.ticket.of or None if job is not None else None,
        phase=found.phase,
        percent=100.0 if status == "completed" else round(head.percent, 2) if head is not None else 0.0,
        transport=began.plan.transport if began else None,
        postcopy_allowed=bool(request.get("postcopy")),
        ending=found.ending,
        guest=outcome.guest if outcome is not None else None,
        sentence=_sentence(found),
        error=error or None,
        hint=hint or None,
        reasons=tuple(Reason(*row) for row in refused),
        downtime_ms=outcome.downtime_ms if outcome is not None else None,
        observed_downtime_ms=outcome.observed_downtime_ms if outcome is not None else None,
        **numbers,
    )


_PROGRESS_FIELDS = (
    "memory_total_bytes", "memory_processed_bytes", "memory_remaining_bytes", "disk_total_bytes",
    "disk_processed_bytes", "disk_remaining_bytes", "memory_bytes_per_s", "dirty_bytes_per_s", "throttle_percent",
    "downtime_limit_ms", "full_passes", "elapsed_s",
)  # fmt: skip


def _sentence(found: Found) -> str | None:
    domain = str(found.request.get("domain", ""))
    match found.ending:
        case None:
            return None
        case "refused":
            return f"{domain} was left alone: the plan was refused before anything started"
        case "broken off":
            return f"whoever migrated {domain} was killed; where it runs, both hosts can tell"
        case "completed" if found.outcome is None:
            return f"the migration of {domain} was completed; its record had stopped before"
        case "failed" if found.outcome is None:
            return f"the migration of {domain} ended before its record was finished"
    return found.outcome.sentence if found.outcome is not None else None


def _words(found: Found) -> tuple[str, str]:
    if found.outcome is not None:
        return found.outcome.error, found.outcome.hint
    if found.running or found.ending == "completed":
        return "", ""
    error, hint = _errors(found.job.said) if found.job is not None else ("", "")
    if not error and found.ending == "broken off":
        hint = "ask both hosts: virsh -c URI domstate DOMAIN"
    return error, hint


def _errors(said: str) -> tuple[str, str]:
    """The error: and hint: lines of a process's last words."""
    lines = [line for line in said.splitlines() if line]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    return "; ".join(errors or lines[-1:]), "; ".join(hints)


def _time(seconds: float) -> str:
    """Of a damaged record too, whose time no calendar has."""
    date = datetime.datetime.fromtimestamp(min(max(seconds, _FIRST_S), _LAST_S), datetime.UTC)
    return date.isoformat(timespec="milliseconds").replace("+00:00", "Z")
