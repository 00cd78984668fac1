"""What can be done to a running migration: one libvirt call each on the source, within a deadline.

They work on migrations that others started too. Nothing here sends a signal to a process that is not the API's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from virtmig.errors import MigrationError, VirtError
from virtmig.integrations.api.history import Head, Looked
from virtmig.integrations.api.jobs import Job
from virtmig.integrations.api.migrations import Found, Migrations, NotNow
from virtmig.integrations.api.problems import failure
from virtmig.progress import Phase, Status, Whereabouts
from virtmig.request import MigrationRequest
from virtmig.virt import verbs
from virtmig.virt.connection import connected
from virtmig.virt.hosts import Host, NoAnswerError, answer_within, silent
from virtmig.virt.job import JobView
from virtmig.whereabouts import HostAnswer, Presence, judge, sentence

#: a daemon that has not answered by then may still do it: the answer says so
ACTION_S = 20.0
#: between two samples that tell whether memory still moves
_BETWEEN_S = 1.0
_POSTCOPY = (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED)
_RECOVERY_OPTIONS = ("domain", "desturi", "p2p", "agent", "destination-agent")

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """MiB/s and ms; what is None stays as it is."""

    bandwidth: int | None = None
    postcopy_bandwidth: int | None = None
    max_downtime: int | None = None


def abort(found: Found, migrations: Migrations) -> str:
    """The words for what was done. Raises NotNow where an abort would lose the guest, VirtError, Failure."""
    _must_run(found, migrations)
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
    if job is not None and migrations.jobs.ask_to_stop(job):
        return "it will stop before anything moves; the guest stays on the source"
    if job is None:
        raise NotNow(
            "nothing moves yet, and another process runs this migration",
            hint="try again when it has begun, or stop that process",
        )
    raise NotNow("it has just ended")


def start_postcopy(found: Found, migrations: Migrations) -> None:
    """Raises NotNow, VirtError, Failure."""
    _must_run(found, migrations)
    if found.phase in _POSTCOPY:
        raise NotNow("it runs in postcopy already")
    if not found.request.get("postcopy"):
        raise NotNow("it was not started with postcopy", hint='start it with "postcopy": true; abort this one first')
    if found.phase is not Phase.PRECOPY:
        raise NotNow("QEMU switches only while memory moves", hint="try again in a moment")
    _on_source(found, verbs.start_postcopy)


def set_limits(found: Found, limits: Limits, migrations: Migrations) -> None:
    """Raises NotNow, VirtError, Failure. What was set before an error stays set.

    The process that migrates reads its limits again and again: a change gets into the record by it. Where there is no
    such process any more, it gets in here.
    """
    _must_run(found, migrations)
    if limits.max_downtime is not None and found.phase in _POSTCOPY:
        raise NotNow(
            f"{_name(found)} runs on {_destination(found)} already: its downtime is over",
            hint="leave out max_downtime",
        )
    if limits.max_downtime is not None:
        downtime = limits.max_downtime
        _on_source(found, lambda connection, domain: verbs.set_max_downtime(connection, domain, downtime))
    for value, postcopy in ((limits.bandwidth, False), (limits.postcopy_bandwidth, True)):
        if value is None:
            continue
        _on_source(found, _speed(value, postcopy))
        if found.head is not None and found.head.detached:
            what = "postcopy-bandwidth" if postcopy else "bandwidth"
            words = f"{what.replace('-', ' ')}: {value} MiB/s from now on"
            migrations.history.said(found.head, words, what, value << 20)


def _speed(mib_s: int, postcopy: bool) -> Callable[[Any, str], None]:
    return lambda connection, domain: verbs.set_speed(connection, domain, mib_s, postcopy=postcopy)


def recover(found: Found, migrations: Migrations, *, key: str = "") -> tuple[Job, bool]:
    """Go on with a broken postcopy in a new process; asked twice it is one. Raises NotNow, KeyConflict, NotKept.

    Whether a postcopy is broken that nobody watched to its end, the hosts are asked now.
    """
    outcome = found.outcome
    unwatched = found.ending == "broken off" or (found.head is not None and found.head.detached)
    broken = outcome is not None and (outcome.status is Status.INTERRUPTED or outcome.guest is Whereabouts.SPLIT)
    if found.running and found.phase is not Phase.POSTCOPY_PAUSED and not unwatched:
        raise NotNow("it runs", hint="nothing needs to be recovered")
    if not broken and not unwatched and found.phase is not Phase.POSTCOPY_PAUSED:
        raise NotNow(f"it has ended: {found.ending}; only a broken postcopy can be recovered")
    if unwatched and found.head is not None and found.request.get("postcopy"):
        _must_be_broken(found.head, look(found.head))
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


def _must_be_broken(head: Head, looked: Looked | None) -> None:
    if looked is None or looked.guest is Whereabouts.UNKNOWN:
        if not head.detached:
            return  # nobody knows better: the recovery itself will tell
        words = looked.sentence if looked is not None else "the hosts cannot be asked"
        raise NotNow(f"whether its postcopy is broken is not certain: {words}", hint="try again when the hosts answer")
    if looked.guest is not Whereabouts.SPLIT:
        raise NotNow(f"{looked.sentence}; only a broken postcopy can be recovered")
    if looked.goes_on:
        raise NotNow("its postcopy goes on by itself", hint="nothing needs to be recovered")


def look(head: Head) -> Looked | None:
    """Both hosts asked about a postcopy that nobody watches any more; None where the record does not name them."""
    began = head.began
    uuid = began.guest.uuid if began.guest is not None else ""
    source_uri = began.source_facts.uri if began.source_facts is not None else ""
    destination_uri = str(began.request.get("desturi", ""))
    if not uuid or not source_uri or not destination_uri:
        return None
    source, goes_on = _ask(source_uri, began.source, uuid, incoming=False)
    destination, _ = _ask(destination_uri, began.destination, uuid, incoming=True)
    place = judge(source, destination)
    return Looked(guest=place, sentence=sentence(began.domain, place, source, destination), goes_on=goes_on)


def _ask(uri: str, name: str, uuid: str, *, incoming: bool) -> tuple[HostAnswer, bool]:
    """What a host says, and whether it still sends memory.

    libvirt calls the source of a postcopy failed when its client has gone, though QEMU goes on: two samples tell.
    """
    try:
        host = answer_within(ACTION_S, lambda: Host(uri), "virtmig-look-open", own=True)
    except (MigrationError, NoAnswerError) as error:
        return silent(name, str(error)), False
    try:
        found = host.ask(uuid, incoming=incoming)
        answer = HostAnswer(name, found.presence, found.detail)
        if incoming or answer.presence is not Presence.POSTCOPY_FAILED:
            return answer, answer.presence is Presence.POSTCOPY
        view = JobView(host, uuid)
        view.sample()
        time.sleep(_BETWEEN_S)
        sample = view.sample()
        return answer, sample is not None and sample.phase is Phase.POSTCOPY
    finally:
        host.close()


def _must_run(found: Found, migrations: Migrations) -> None:
    if not found.running:
        raise NotNow(f"it has ended: {found.ending or found.status}")
    newer = migrations.newer(found)
    if newer is not None:
        raise NotNow(f"a later migration of {_name(found)} runs, {newer.id}", hint=f"act on {newer.id}")


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
        return answer_within(ACTION_S, act, "virtmig-action", own=True)
    except NoAnswerError:
        raise failure(
            "late", f"the source's libvirt daemon has not answered within {ACTION_S:g} s; it may still do it",
            hint="GET the migration to see what became of it",
        ) from None  # fmt: skip
