"""One sample of a running migration, its passes over memory, where a guest is, and how it ended. Plain data.

The fields of Progress carry libvirt's meaning (virDomainGetJobStats) with the unit in the name. `None` means
"not known (yet)", never zero: libvirt leaves fields out until QEMU has reported them, and QEMU 11 reports
INT64_MAX for a downtime it has not computed.
"""

from __future__ import annotations

import enum
from collections import deque

import msgspec

#: QEMU's downtime-limit when nobody has set one (migration/options.c, DEFAULT_MIGRATE_SET_DOWNTIME)
DEFAULT_DOWNTIME_MS = 300


class Whereabouts(enum.StrEnum):
    """Where the guest is. UNKNOWN is an honest answer: a lost reply is never taken for a no."""

    SOURCE = "source"
    DESTINATION = "destination"
    SPLIT = "split"  # postcopy under way or broken: CPUs on the destination, memory on both
    DOUBLED = "doubled"  # running on both hosts: must never be, is reported loudly
    NEITHER = "neither"  # on no host: destroyed, or it powered itself off
    LOST = "lost"  # one side died in postcopy: the newest memory is gone, what is left must not be resumed
    UNKNOWN = "unknown"


class Phase(enum.StrEnum):
    """What the migration is doing, as a person would say it. QEMU's own state is in Progress.qemu_status if known."""

    PREPARING = "preparing"  # the destination is being prepared; libvirt reports sizes of zero
    STORAGE = "storage"  # disks are being copied, memory has not started
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"  # the guest is stopped, the last bytes move
    POSTCOPY = "postcopy"
    POSTCOPY_PAUSED = "postcopy-paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One sample. Bytes are cumulative over memory and disks unless the name says otherwise."""

    elapsed_s: float  # since virtmig started the job, monotonic
    phase: Phase = Phase.PREPARING
    total_bytes: int | None = None
    processed_bytes: int | None = None
    remaining_bytes: int | None = None
    memory_total_bytes: int | None = None
    memory_processed_bytes: int | None = None
    memory_remaining_bytes: int | None = None
    disk_total_bytes: int | None = None
    disk_processed_bytes: int | None = None
    disk_remaining_bytes: int | None = None
    memory_bytes_per_s: int | None = None  # what went over the wire
    disk_bytes_per_s: int | None = None
    #: what the guest writes: libvirt's pages per second times the page size; unknown in the first pass and in postcopy
    dirty_bytes_per_s: int | None = None
    iteration: int | None = None  # QEMU's dirty-sync-count; on QEMU 11 it grows every 100 ms, not once per pass
    full_passes: int = 0  # how many times all of memory has gone over once, counted from bytes, QEMU-independent
    expected_downtime_ms: int | None = None
    downtime_limit_ms: int | None = None
    bandwidth_limit_bytes_per_s: int | None = None  # set while it runs (migrate-setspeed); 0: none
    postcopy_bandwidth_limit_bytes_per_s: int | None = None
    setup_ms: int | None = None
    throttle_percent: int | None = None  # auto-converge: share of CPU time taken from the guest
    postcopy_requests: int | None = None  # pages the destination had to ask for
    constant_pages: int | None = None
    normal_pages: int | None = None
    page_size_bytes: int | None = None
    channel_bytes_per_s: tuple[int, ...] = ()  # per channel, where known

    @property
    def percent(self) -> float | None:
        """100 * (1 - remaining/total), as virsh computes it. Goes backwards at a new pass: show a monotone one."""
        if not self.total_bytes or self.remaining_bytes is None:
            return None
        return 100.0 * (1.0 - min(self.remaining_bytes, self.total_bytes) / self.total_bytes)


class PassBoundary(msgspec.Struct, frozen=True, kw_only=True):
    """The moment a pass over memory ended and the next began. Boundary 0 is the start of the first pass."""

    full_passes: int
    elapsed_s: float
    remaining_bytes: int  # guest memory to send when the next pass begins
    sent_bytes: int  # guest memory gone over since the job began, as far as could be counted
    throttle_percent: int | None = None


class PassCounter:
    """Counts full passes over memory in the same way for every QEMU, and keeps what remained at each boundary.

    QEMU's own count cannot be used: `iteration` grows once per pass up to QEMU 10 and every 100 ms on QEMU 11. A pass
    is over when as much memory has been gone over as remained at its beginning. What was gone over between two samples
    is the largest of three lower bounds: the pages counted (constant and normal; xbzrle pages are in neither), the
    bytes on the wire (zero and compressed pages are small there), and the fall of memory remaining (it may have risen
    in between). Where all lose something, memory remaining that rises after it was near zero ends the pass too.

    One update ends at most one pass, so guests so small that a pass fits between two samples are counted slowly, never
    too fast. A job joined half way counts from 1 at most; nothing is counted once postcopy has begun.
    """

    #: a pass is over at 98 %: ROM and device memory is in the total and may never be sent
    SLACK = 0.02
    #: below this share of a pass, memory remaining is "near zero"
    LOW = 0.05
    #: a migration that never converges must not fill memory with boundaries
    KEPT = 4096

    def __init__(self) -> None:
        self.full_passes = 0
        self.boundaries: deque[PassBoundary] = deque(maxlen=self.KEPT)
        self._gone_over_bytes = 0
        self._previous: Progress | None = None
        self._low_bytes = 0
        self._awaiting_rise = False
        self._last_rise: tuple[int, int] | None = None  # memory remaining after it, memory gone over until then
        self._postcopy = False

    def update(self, progress: Progress) -> int:
        """Take one sample; returns how many full passes are over. Samples without memory sizes change nothing."""
        if progress.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
            self._postcopy = True
        total, remaining = progress.memory_total_bytes, progress.memory_remaining_bytes
        moving = progress.phase in (Phase.PRECOPY, Phase.SWITCHOVER, Phase.COMPLETED)
        if self._postcopy or not moving or not total or remaining is None:
            return self.full_passes
        previous, self._previous = self._previous, progress
        if previous is None:
            # every page that is clean by now was gone over; zero remaining may also be "not known yet"
            clean_bytes = total - remaining if 0 < remaining < total else 0
            self._gone_over_bytes = max(_counted_bytes(progress) or 0, clean_bytes)
            self.boundaries.append(self._boundary(progress, total))
            # the first pass has all of memory to go over, however much of it was done before the first sample
            self._begin_pass(start_bytes=0, begin_bytes=total)
            self._low_bytes = remaining
            rising = False
        else:
            remaining_before = previous.memory_remaining_bytes or 0
            gone_over = max(_gone_over_bytes(previous, progress), remaining_before - remaining, 0)
            self._gone_over_bytes += gone_over
            rising = remaining > remaining_before
            if rising:
                # QEMU looked at some moment between the samples: half of what may have been sent since is added back
                since = (max(gone_over - remaining_before, 0) + gone_over) // 2
                self._last_rise = (min(remaining + since, total), self._gone_over_bytes - since)
        self._count(progress, remaining, rising)
        return self.full_passes

    def _count(self, progress: Progress, remaining: int, rising: bool) -> None:
        if self._awaiting_rise:
            if rising:
                self._settle(progress, remaining)
            return
        done = self._gone_over_bytes - self._pass_start_bytes
        rebound = remaining - self._low_bytes
        turned = (
            self._low_bytes <= self.LOW * self._pass_begin_bytes
            and rebound >= max(self._low_bytes, 0.01 * self._pass_begin_bytes)
            and rebound > 0
        )
        self._low_bytes = min(self._low_bytes, remaining)
        if not turned and done < (1 - self.SLACK) * self._pass_begin_bytes:
            return
        self.full_passes += 1
        # QEMU up to 10 looks for new dirty pages only when a pass is over: next to nothing remaining then means
        # "it has not looked yet", and the next pass begins with what the rise will show
        if turned or remaining > self.LOW * self._pass_begin_bytes:
            self._settle(progress, remaining)
        else:
            self._awaiting_rise = True

    def _settle(self, progress: Progress, remaining: int) -> None:
        """Begin the next pass. What went beyond the end of the last one since then is part of this one."""
        self._awaiting_rise = False
        start_bytes = min(self._pass_start_bytes + self._pass_begin_bytes, self._gone_over_bytes)
        total = progress.memory_total_bytes or remaining
        begin_bytes = max(min(remaining + self._gone_over_bytes - start_bytes, total), remaining)
        self._begin_pass(start_bytes=self._gone_over_bytes - (begin_bytes - remaining), begin_bytes=begin_bytes)
        self.boundaries.append(self._boundary(progress, max(begin_bytes, self._last_look_bytes(remaining))))

    def _last_look_bytes(self, remaining: int) -> int:
        """What remained when QEMU last looked for dirty pages, where it has not looked since; else 0.

        QEMU up to 10 looks as soon as what it knows of fits into the downtime, so that a pass by our count may end in
        the middle of a fall. Since the last look, memory remaining falls by just what is sent.
        """
        if self._last_rise is None:
            return 0
        top_bytes, gone_over_then = self._last_rise
        return top_bytes if top_bytes - remaining >= 0.9 * (self._gone_over_bytes - gone_over_then) else 0

    def _begin_pass(self, *, start_bytes: int, begin_bytes: int) -> None:
        self._pass_start_bytes = start_bytes
        self._pass_begin_bytes = begin_bytes
        self._low_bytes = begin_bytes

    def _boundary(self, progress: Progress, remaining: int) -> PassBoundary:
        return PassBoundary(
            full_passes=self.full_passes,
            elapsed_s=progress.elapsed_s,
            remaining_bytes=remaining,
            sent_bytes=self._gone_over_bytes,
            throttle_percent=progress.throttle_percent,
        )


def _gone_over_bytes(before: Progress, after: Progress) -> int:
    """Guest memory gone over between two samples, as far as counters tell; zero where they went back or are missing."""
    counted_before, counted_after = _counted_bytes(before), _counted_bytes(after)
    counted = counted_after - counted_before if counted_after is not None and counted_before is not None else 0
    wire_before, wire_after = before.memory_processed_bytes, after.memory_processed_bytes
    wire = wire_after - wire_before if wire_after is not None and wire_before is not None else 0
    return max(counted, wire, 0)


def _counted_bytes(progress: Progress) -> int | None:
    if progress.normal_pages is None or progress.page_size_bytes is None:
        return None
    return (progress.normal_pages + (progress.constant_pages or 0)) * progress.page_size_bytes


class Status(enum.StrEnum):
    COMPLETED = "completed"
    ABORTED = "aborted"
    FAILED = "failed"
    REFUSED = "refused"
    DETACHED = "detached"  # we stopped watching; the job goes on without us
    INTERRUPTED = "postcopy-interrupted"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. `guest` is what both hosts said afterwards; `sentence` is the last line a person reads."""

    status: Status
    guest: Whereabouts
    domain: str
    source: str  # host names for people
    destination: str
    sentence: str
    elapsed_s: float
    downtime_ms: int | None = None  # QEMU's own number, from the completed statistics
    observed_downtime_ms: int | None = None  # from the source's stop event to the destination's resume event
    total_bytes: int | None = None
    processed_bytes: int | None = None
    iterations: int | None = None
    actions: tuple[str, ...] = ()  # what the policy or the person did on the way, with reasons
    error: str = ""
    error_code: int = -1  # libvirt's VIR_ERR_* when libvirt said no
    error_domain: int = -1
    hint: str = ""
    started: bool = False  # whether any byte of the guest had moved
    report_id: str = ""
