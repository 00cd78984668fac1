"""What can be done to a running migration: one libvirt call each on the source, within a deadline.

They work on migrations that others started too. Nothing here sends a signal to a process that is not the API's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from virtmig.errors import VirtError
from virtmig.integrations.api.jobs import Job, Jobs
from virtmig.integrations.api.migrations import Found, Migrations, NotNow
from virtmig.integrations.api.problems import failure
from virtmig.progress import Phase, Status, Whereabouts
from virtmig.request import MigrationRequest
from virtmig.virt import verbs
from virtmig.virt.connection import connected
from virtmig.virt.hosts import NoAnswerError, answer_within

#: a daemon that has not answered by then may still do it: the answer says so
ACTION_S = 20.0
_POSTCOPY = (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED)
_RECOVERY_OPTIONS = ("domain", "desturi", "p2p", "agent", "destination-agent")

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """MiB/s and ms; what is None stays as it is."""

    bandwidth: int | None = None
    postcopy_bandwidth: int | None = None
    max_downtime: int | None = None


def abort(found: Found, jobs: Jobs) -> str:
    """The words for what was done. Raises NotNow where an abort would lose the guest, VirtError, Failure."""
    _must_run(found)
    if found.phase in _POSTCOPY:
        raise NotNow(
            f"{_name(found)} already runs on {_destination(found)} and needs the rest of its memory from the source; "
            "an abort would lose it",
            hint="let it finish; if it broke, POST recover",
        )
    job = found.job
    if found.head is not None and found.phase is not None:
        try:
            _on_source(found, lambda connection, domain: verbs.abort_job(connection, domain, postcopy=False))
            return "aborting; the guest stays on the source"
        except VirtError:
            if job is None or found.phase is not Phase.PREPARING:
                raise
    if job is not None and jobs.ask_to_stop(job):
        return "it will stop before anything moves; the guest stays on the source"
    if job is None:
        raise NotNow(
            "nothing moves yet, and another process runs this migration",
            hint="try again when it has begun, or stop that process",
        )
    raise NotNow("it has just ended")


def start_postcopy(found: Found) -> None:
    """Raises NotNow, VirtError, Failure."""
    _must_run(found)
    if found.phase in _POSTCOPY:
        raise NotNow("it runs in postcopy already")
    if not found.request.get("postcopy"):
        raise NotNow("it was not started with postcopy", hint='start it with "postcopy": true; abort this one first')
    if found.phase is not Phase.PRECOPY:
        raise NotNow("QEMU switches only while memory moves", hint="try again in a moment")
    _on_source(found, verbs.start_postcopy)


def set_limits(found: Found, limits: Limits) -> None:
    """Raises NotNow, VirtError, Failure. What was set before an error stays set."""
    _must_run(found)
    if limits.max_downtime is not None:
        downtime = limits.max_downtime
        _on_source(found, lambda connection, domain: verbs.set_max_downtime(connection, domain, downtime))
    for value, postcopy in ((limits.bandwidth, False), (limits.postcopy_bandwidth, True)):
        if value is not None:
            _on_source(found, _speed(value, postcopy))


def _speed(mib_s: int, postcopy: bool) -> Callable[[Any, str], None]:
    return lambda connection, domain: verbs.set_speed(connection, domain, mib_s, postcopy=postcopy)


def recover(found: Found, migrations: Migrations, *, key: str = "") -> tuple[Job, bool]:
    """Go on with a broken postcopy in a new process; asked twice it is one. Raises NotNow, KeyConflict, NotKept."""
    outcome = found.outcome
    broken = outcome is not None and (outcome.status is Status.INTERRUPTED or outcome.guest is Whereabouts.SPLIT)
    if found.running and found.phase is not Phase.POSTCOPY_PAUSED:
        raise NotNow("it runs", hint="nothing needs to be recovered")
    if not broken and found.ending != "broken off" and found.phase is not Phase.POSTCOPY_PAUSED:
        raise NotNow(f"it has ended: {found.ending}; only a broken postcopy can be recovered")
    if not found.request.get("postcopy"):
        raise NotNow("it was not started with postcopy: there is nothing to recover")
    request = MigrationRequest({name: value for name, value in found.request.items() if name in _RECOVERY_OPTIONS})
    transport = found.head.began.plan.transport if found.head is not None else "direct"
    request = request.replace(
        live=True, postcopy=True, postcopy_resume=True, transport="relay" if transport == "relay" else "direct"
    )
    before = sum(job.ticket.of == found.id and not job.running for job in migrations.jobs.all())
    return migrations.jobs.start(
        request,
        source_uri=found.source_uri,
        key=key or f"recover {found.id} {before}",
        body=f"recover {found.id}".encode(),
        of=found.id,
    )


def _must_run(found: Found) -> None:
    if not found.running:
        raise NotNow(f"it has ended: {found.ending or found.status}")


def _name(found: Found) -> str:
    return str(found.request.get("domain", ""))


def _destination(found: Found) -> str:
    return found.head.began.destination if found.head is not None else str(found.request.get("desturi", ""))


def _on_source(found: Found, call: Callable[[Any, str], T]) -> T:
    guest = found.head.began.guest if found.head is not None else None
    domain = guest.uuid if guest is not None and guest.uuid else _name(found)

    def act() -> T:
        with connected(found.source_uri or None) as connection:
            return call(connection, domain)

    try:
        return answer_within(ACTION_S, act, "virtmig-action")
    except NoAnswerError:
        raise failure(
            "late", f"the source's libvirt daemon has not answered within {ACTION_S:g} s; it may still do it",
            hint="GET the migration to see what became of it",
        ) from None  # fmt: skip
