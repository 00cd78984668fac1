"""One migration job: start it, sample it, act on it, hear its events.

    JobView        any job of a domain, also one that plain virsh started: samples and actions
    MigrationJob   a JobView that starts the job itself, in a thread with connections of its own

libvirt's traps handled here (each was seen live): sizes of zero while the destination is prepared; a downtime of
INT64_MAX before QEMU has computed one; zeros for a second or two after an abort; completed statistics that come only
with the JOB_COMPLETED event; a migrate call that stalls every other call on its connection.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import libvirt
import msgspec

from virtmig.errors import VirtError
from virtmig.progress import Phase, Progress
from virtmig.virt.connection import (
    close_connection,
    lookup_domain,
    open_connection,
    translated,
    virt_error,
)
from virtmig.virt.hosts import Host, NoAnswerError, answer_within
from virtmig.virt.parameters import MigrateCall

log = logging.getLogger("virtmig.virt")

#: QEMU 11 reports INT64_MAX for a downtime it has not computed; anything above a day is no downtime
_DOWNTIME_NONSENSE_MS = 86_400_000
#: others may change the limits of a job too: read so often, and waited for so long
LIMITS_EVERY_S = 1.5
_LIMITS_PATIENCE_S = 0.5
_MIB = 1 << 20


class Limits(msgspec.Struct, frozen=True):
    """Of a running job. A bandwidth (MiB/s) of None is the one that it was started with."""

    downtime_ms: int | None = None
    bandwidth_mib_s: int | None = None
    postcopy_bandwidth_mib_s: int | None = None


class Event(msgspec.Struct, frozen=True):
    """A lifecycle or job event of one host; `at` is time.monotonic() when it arrived here."""

    at: float
    host: str  # "source" or "destination"
    what: str  # "suspended", "resumed", "stopped", "iteration", "job-completed", ...
    detail: int = 0


def observed_downtime_ms(events: Sequence[Event]) -> int | None:
    """From the source's last stop to the destination's first start after it; None where an event is missing.

    In postcopy either host says it twice: the source that it is stopped, and then that it is stopped for postcopy
    (libvirt corrects the reason); the destination when the guest starts there, and at the end that it has all of it.
    """
    stopped: Event | None = None
    for event in events:
        match event.host, event.what:
            case "source", "suspended":
                stopped = stopped or event
            case "source", "resumed":  # a switchover that was given up
                stopped = None
            case "destination", "resumed":
                return round(1000 * (event.at - stopped.at)) if stopped is not None else None
    return None


_LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
}


def progress_from_stats(
    stats: Mapping[str, Any],
    *,
    state: int,
    reason: int,
    elapsed_s: float,
    limits: Limits | None = None,
) -> Progress:
    """virDomainGetJobStats + virDomainGetState of the source -> Progress. Absent keys stay None.

    QEMU measures what the guest writes when it looks for dirty pages again (migration/ram.c, migration_update_rates):
    its zero before the second look is no measurement, and in postcopy it repeats its last one.
    """
    limits = limits or Limits()

    def number(key: str) -> int | None:
        value = stats.get(key)
        return int(value) if isinstance(value, int) else None

    total = number("data_total") or None
    page_size = number("memory_page_size")
    dirty_pages = number("memory_dirty_rate")
    downtime = number("downtime")
    measured = total is not None
    phase, iteration = _phase(stats, state, reason), number("memory_iteration")
    if phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED) or (not dirty_pages and (iteration or 0) < 2):
        dirty_pages = None
    return Progress(
        elapsed_s=elapsed_s,
        phase=phase,
        total_bytes=total,
        processed_bytes=number("data_processed") if measured else None,
        remaining_bytes=number("data_remaining") if measured else None,
        memory_total_bytes=number("memory_total") or None,
        memory_processed_bytes=number("memory_processed") if measured else None,
        memory_remaining_bytes=number("memory_remaining") if measured else None,
        disk_total_bytes=number("disk_total") or None,
        disk_processed_bytes=number("disk_processed") if number("disk_total") else None,
        disk_remaining_bytes=number("disk_remaining") if number("disk_total") else None,
        memory_bytes_per_s=number("memory_bps"),
        disk_bytes_per_s=number("disk_bps"),
        dirty_bytes_per_s=dirty_pages * page_size if dirty_pages is not None and page_size else None,
        iteration=iteration,
        expected_downtime_ms=downtime if downtime is not None and downtime < _DOWNTIME_NONSENSE_MS else None,
        downtime_limit_ms=limits.downtime_ms,
        bandwidth_limit_bytes_per_s=_bytes(limits.bandwidth_mib_s),
        postcopy_bandwidth_limit_bytes_per_s=_bytes(limits.postcopy_bandwidth_mib_s),
        setup_ms=number("setup_time"),
        throttle_percent=number("auto_converge_throttle"),
        postcopy_requests=number("memory_postcopy_requests"),
        constant_pages=number("memory_constant"),
        normal_pages=number("memory_normal"),
        page_size_bytes=page_size,
    )


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * _MIB


def _phase(stats: Mapping[str, Any], state: int, reason: int) -> Phase:
    kind = stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE)
    if kind == libvirt.VIR_DOMAIN_JOB_COMPLETED:
        return Phase.COMPLETED
    if kind == libvirt.VIR_DOMAIN_JOB_FAILED:
        return Phase.FAILED
    if kind == libvirt.VIR_DOMAIN_JOB_CANCELLED:
        return Phase.CANCELLED
    if state == libvirt.VIR_DOMAIN_PAUSED:
        if reason == libvirt.VIR_DOMAIN_PAUSED_POSTCOPY:
            return Phase.POSTCOPY
        if reason == libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED:
            return Phase.POSTCOPY_PAUSED
        if reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION:
            return Phase.SWITCHOVER
    if not stats.get("data_total"):
        return Phase.PREPARING
    if stats.get("disk_remaining") and not stats.get("memory_processed"):
        return Phase.STORAGE
    return Phase.PRECOPY


def _moved(before: Progress | None, now: Progress) -> bool:
    return before is not None and (now.processed_bytes or 0) > (before.processed_bytes or 0)


def _number_of(call: Callable[[], Any]) -> int | None:
    """Some versions of the binding give None where they should raise."""
    with contextlib.suppress(libvirt.libvirtError):
        value = call()
        return None if value is None else int(value)
    return None


def _changed(before: int | None, now: int | None, known: int | None) -> int | None:
    """What is in force: `known`, unless two answers differ."""
    return known if before is None or now in (None, before) else now


class JobView:
    """Samples of, and actions on, the outgoing migration job of a domain; `host` is the source.

    Every action raises VirtError with libvirt's words when libvirt refuses it.
    """

    def __init__(self, host: Host, uuid: str) -> None:
        self.host = host
        self.uuid = uuid
        self.started_at = time.monotonic()
        self.limits = Limits()
        self._speeds_before: tuple[int | None, int | None] | None = None
        self._limits_read_at = self.started_at
        self._last: Progress | None = None

    @property
    def domain(self) -> Any:
        with translated():
            return self.host.connection.lookupByUUIDString(self.uuid)

    def sample(self, seconds: float = 2.0) -> Progress | None:
        """The job now; the last sample again when the daemon does not answer in time, None when there is no job."""

        def look() -> tuple[Mapping[str, Any], tuple[int, int]]:
            domain = self.host.connection.lookupByUUIDString(self.uuid)
            return domain.jobStats(0), domain.state(0)

        try:
            stats, (state, reason) = answer_within(seconds, look, "virtmig-sample")
        except NoAnswerError:
            return self._last
        except libvirt.libvirtError as error:
            log.debug("sample: %s", error)
            return None
        if stats.get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        before, elapsed_s = self._last, time.monotonic() - self.started_at
        if _phase(stats, state, reason) in (Phase.PRECOPY, Phase.POSTCOPY):
            self._read_limits()
        self._last = progress_from_stats(stats, state=state, reason=reason, elapsed_s=elapsed_s, limits=self.limits)
        if self._last.phase is Phase.POSTCOPY_PAUSED and _moved(before, self._last):
            # the client of a managed migration is gone: libvirt calls the source failed, QEMU goes on and finishes
            self._last = msgspec.structs.replace(self._last, phase=Phase.POSTCOPY)
        return self._last

    def read_downtime_limit(self) -> int | None:
        """The domain's downtime limit in ms, None where libvirt cannot say (inactive domain, old daemon)."""
        with contextlib.suppress(libvirt.libvirtError, VirtError, NoAnswerError):
            limit_ms = int(answer_within(2.0, lambda: self.domain.migrateGetMaxDowntime(0)))
            self.limits = msgspec.structs.replace(self.limits, downtime_ms=limit_ms)
        return self.limits.downtime_ms

    def set_downtime_limit(self, milliseconds: int) -> None:
        with translated():
            self.domain.migrateSetMaxDowntime(milliseconds, 0)
        self.limits = msgspec.structs.replace(self.limits, downtime_ms=milliseconds)

    def _read_limits(self) -> None:
        """As they are now, every LIMITS_EVERY_S; what does not come in time stays as it was.

        virDomainMigrateGetMaxSpeed may give what virDomainMigrateSetMaxSpeed has set, and not what the job was started
        with: only a change tells what is in force.
        """
        if time.monotonic() - self._limits_read_at < LIMITS_EVERY_S and self._speeds_before is not None:
            return

        def look() -> tuple[int | None, int | None, int | None]:
            domain = self.domain
            speed = _number_of(lambda: domain.migrateGetMaxSpeed(0))
            # asked behind it: at precopy's end libvirt brings back the one of before the job (qemuMigrationSrcRun)
            if domain.state(0)[0] == libvirt.VIR_DOMAIN_PAUSED:
                speed = None
            return (
                _number_of(lambda: domain.migrateGetMaxDowntime(0)),
                speed,
                _number_of(lambda: domain.migrateGetMaxSpeed(libvirt.VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY)),
            )

        try:
            downtime_ms, *speeds = answer_within(_LIMITS_PATIENCE_S, look, "virtmig-limits")
        except (libvirt.libvirtError, VirtError, NoAnswerError) as error:
            log.debug("limits: %s", error)
            return
        finally:
            self._limits_read_at = time.monotonic()
        known = self.limits
        (before, postcopy_before), (speed, postcopy_speed) = self._speeds_before or speeds, speeds
        self.limits = Limits(
            downtime_ms=known.downtime_ms if downtime_ms is None else downtime_ms,
            bandwidth_mib_s=_changed(before, speed, known.bandwidth_mib_s),
            postcopy_bandwidth_mib_s=_changed(postcopy_before, postcopy_speed, known.postcopy_bandwidth_mib_s),
        )
        self._speeds_before = (
            before if speed is None else speed,
            postcopy_before if postcopy_speed is None else postcopy_speed,
        )

    def start_postcopy(self) -> None:
        with translated():
            self.domain.migrateStartPostCopy(0)

    def suspend(self) -> None:
        with translated():
            self.domain.suspend()

    def abort(self, *, postcopy: bool = False) -> None:
        """Ask libvirt to cancel (virDomainAbortJob); returns before the job has ended. In postcopy it is refused
        unless `postcopy`, which only pauses the migration and leaves the guest split.
        """
        with translated():
            if postcopy:
                self.domain.abortJobFlags(libvirt.VIR_DOMAIN_ABORT_JOB_POSTCOPY)
            else:
                self.domain.abortJob()


class MigrationJob(JobView):
    """A job that we start. The migrate call blocks in its own thread, on connections of its own.

    After `wait()` returned True, `error` is None for success or the VirtError of the call, `completed` the
    statistics of libvirt's JOB_COMPLETED event, and `events` everything that both hosts reported meanwhile.
    """

    def __init__(
        self,
        source: Host,
        destination: Host | None,
        uuid: str,
        destination_uri: str,
        call: MigrateCall,
        *,
        keepalive: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(source, uuid)
        self.destination = destination
        self.destination_uri = destination_uri
        self.call = call
        self.keepalive = keepalive
        self.events: list[Event] = []
        self.completed: dict[str, Any] = {}
        self.error: VirtError | None = None
        self.abort_asked = False
        self._call_destination: Any = None
        self._call_lock = threading.Lock()  # asking a connection that is being closed would touch freed memory
        self._finished = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._registered: list[tuple[Any, int]] = []

    def start(self) -> None:
        """Subscribe to the events of both hosts, then start the migrate call. Returns at once."""
        self._subscribe(self.host.connection, "source")
        if self.destination is not None:
            self._subscribe(self.destination.connection, "destination")
        self.started_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="virtmig-migrate-call", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether the migrate call has ended; returns after `seconds`, or at once when an event arrived."""
        self._wake.wait(seconds)
        self._wake.clear()
        return self._finished.is_set()

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    def abort(self, *, postcopy: bool = False) -> None:
        self.abort_asked = True
        super().abort(postcopy=postcopy)

    @property
    def destination_lost(self) -> bool:
        """Managed only: the connection over which the destination is to be told to finish is dead. libvirt notices
        that at the very end, and never when memory does not converge; in p2p the source daemon watches it itself.
        """
        with self._call_lock, contextlib.suppress(libvirt.libvirtError):
            return self._call_destination is not None and self._call_destination.isAlive() == 0
        return True

    def saw(self, host: str, what: str, detail: int | None = None) -> Event | None:
        """The last such event, if there was one."""
        for event in reversed(self.events):
            if event.host == host and event.what == what and detail in (None, event.detail):
                return event
        return None

    def observed_downtime_ms(self) -> int | None:
        """From the source's stop to the destination's start, by the events of both hosts as they arrived here.

        A recovery of a broken postcopy stops nobody: it has none.
        """
        if self.call.flags & libvirt.VIR_MIGRATE_POSTCOPY_RESUME:
            return None
        return observed_downtime_ms(self.events)

    def close(self) -> None:
        for connection, number in self._registered:
            with contextlib.suppress(libvirt.libvirtError, NoAnswerError):
                answer_within(1.0, partial(connection.domainEventDeregisterAny, number), "virtmig-close")
        self._registered.clear()
        if self._thread is not None:
            self._thread.join(timeout=0.5 if self.finished else 0.0)

    # -- the migrate call ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        connections: list[Any] = []
        try:
            source = open_connection(self.host.uri)
            connections.append(source)
            domain = lookup_domain(source, self.uuid)
            if self.call.to_uri:
                domain.migrateToURI3(self.destination_uri, self.call.params, self.call.flags)
            else:
                destination = open_connection(self.destination_uri, keepalive=self.keepalive)
                connections.append(destination)
                self._call_destination = destination
                domain.migrate3(destination, self.call.params, self.call.flags)
        except libvirt.libvirtError as error:
            self.error = virt_error(error)
        except VirtError as error:
            self.error = error
        except Exception as error:  # a binding that refuses a parameter's type must not leave the caller waiting
            self.error = VirtError(f"{type(error).__name__}: {error}")
        finally:
            self._finished.set()
            self._wake.set()
            with self._call_lock:
                self._call_destination = None
            for connection in connections:
                close_connection(connection)

    # -- events ----------------------------------------------------------------------------------------------------

    def _subscribe(self, connection: Any, host: str) -> None:
        def lifecycle(_connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
            if domain.UUIDString() == self.uuid:
                self._note(host, _LIFECYCLE.get(event, str(event)), detail)

        def iteration(_connection: Any, domain: Any, count: int, _opaque: Any) -> None:
            if domain.UUIDString() == self.uuid:
                self._note(host, "iteration", count)

        def job_completed(_connection: Any, domain: Any, params: dict[str, Any], _opaque: Any) -> None:
            if domain.UUIDString() == self.uuid:
                self.completed = dict(params)
                self._note(host, "job-completed")

        wanted: list[tuple[int, Any]] = [(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle)]
        if host == "source":
            wanted += [
                (libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, iteration),
                (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, job_completed),
            ]
        for kind, callback in wanted:
            try:
                self._registered.append((connection, connection.domainEventRegisterAny(None, kind, callback, None)))
            except libvirt.libvirtError as error:
                log.debug("event %d is not offered by the %s: %s", kind, host, error)

    def _note(self, host: str, what: str, detail: int = 0) -> None:
        self.events.append(Event(time.monotonic(), host, what, detail))
        if what != "iteration":  # QEMU 11 announces one every 100 ms
            self._wake.set()
        log.debug("event: %s %s %d", host, what, detail)
