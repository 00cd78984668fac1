"""libvirt's job statistics become one Progress; what is not known stays None."""

from __future__ import annotations

from typing import Any

import libvirt

from virtmig.progress import Phase
from virtmig.virt.job import LIMITS_EVERY_S, Event, JobView, Limits, observed_downtime_ms, progress_from_stats

RUNNING = {"state": libvirt.VIR_DOMAIN_RUNNING, "reason": 1, "elapsed_s": 3.0}

#: as a 9.0 daemon with QEMU 7.2 reports a running job; the numbers are nobody's defaults
STATS = {
    "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED,
    "operation": 5,
    "time_elapsed": 2741,
    "data_total": 285_000_000,
    "data_processed": 91_000_001,
    "data_remaining": 77_000_003,
    "memory_total": 285_000_000,
    "memory_processed": 91_000_001,
    "memory_remaining": 77_000_003,
    "memory_bps": 123_456_789,
    "memory_constant": 31_337,
    "memory_normal": 22_222,
    "memory_dirty_rate": 1009,
    "memory_page_size": 4096,
    "memory_iteration": 3,
    "memory_postcopy_requests": 0,
    "downtime": 417,
    "setup_time": 13,
}


def test_a_running_job() -> None:
    progress = progress_from_stats(STATS, **RUNNING, limits=Limits(downtime_ms=300))
    assert progress.phase is Phase.PRECOPY
    assert (progress.total_bytes, progress.processed_bytes, progress.remaining_bytes) == (
        285_000_000,
        91_000_001,
        77_000_003,
    )
    assert progress.dirty_bytes_per_s == 1009 * 4096
    assert progress.memory_bytes_per_s == 123_456_789
    assert (progress.iteration, progress.expected_downtime_ms, progress.downtime_limit_ms) == (3, 417, 300)
    assert progress.disk_total_bytes is None
    assert progress.throttle_percent is None


def test_zeros_while_the_destination_is_prepared_are_not_known_yet() -> None:
    stats = {"type": 2, "operation": 5, "time_elapsed": 12, "data_total": 0, "data_processed": 0, "data_remaining": 0}
    progress = progress_from_stats(stats, **RUNNING)
    assert progress.phase is Phase.PREPARING
    assert progress.total_bytes is progress.remaining_bytes is progress.processed_bytes is None
    assert progress.percent is None


def test_qemu_11_says_int64_max_before_it_knows_a_downtime() -> None:
    assert progress_from_stats({**STATS, "downtime": (1 << 63) - 1}, **RUNNING).expected_downtime_ms is None


def test_disks_first() -> None:
    stats = {
        **STATS,
        "memory_processed": 0,
        "disk_total": 10 << 20,
        "disk_processed": 3 << 20,
        "disk_remaining": 7 << 20,
    }
    progress = progress_from_stats(stats, **RUNNING)
    assert progress.phase is Phase.STORAGE
    assert progress.disk_remaining_bytes == 7 << 20


def test_phases_by_the_state_of_the_source() -> None:
    def phase(reason: int) -> Phase:
        return progress_from_stats(STATS, state=libvirt.VIR_DOMAIN_PAUSED, reason=reason, elapsed_s=1.0).phase

    assert phase(libvirt.VIR_DOMAIN_PAUSED_MIGRATION) is Phase.SWITCHOVER
    assert phase(libvirt.VIR_DOMAIN_PAUSED_POSTCOPY) is Phase.POSTCOPY
    assert phase(libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED) is Phase.POSTCOPY_PAUSED
    assert phase(libvirt.VIR_DOMAIN_PAUSED_USER) is Phase.PRECOPY


def test_ended_jobs() -> None:
    for kind, phase in (
        (libvirt.VIR_DOMAIN_JOB_COMPLETED, Phase.COMPLETED),
        (libvirt.VIR_DOMAIN_JOB_FAILED, Phase.FAILED),
        (libvirt.VIR_DOMAIN_JOB_CANCELLED, Phase.CANCELLED),
    ):
        assert progress_from_stats({**STATS, "type": kind}, **RUNNING).phase is phase


def test_what_the_guest_writes_is_not_known_before_it_was_measured() -> None:
    def writes(**changes: object) -> int | None:
        return progress_from_stats({**STATS, **changes}, **RUNNING).dirty_bytes_per_s

    assert writes(memory_iteration=1, memory_dirty_rate=0) is None
    assert writes(memory_iteration=1, memory_dirty_rate=7) == 7 * 4096
    assert writes(memory_iteration=2, memory_dirty_rate=0) == 0
    postcopy = {"state": libvirt.VIR_DOMAIN_PAUSED, "reason": libvirt.VIR_DOMAIN_PAUSED_POSTCOPY, "elapsed_s": 3.0}
    assert progress_from_stats(STATS, **postcopy).dirty_bytes_per_s is None


def events(*rows: tuple[float, str, str, int]) -> list[Event]:
    return [Event(at, host, what, detail) for at, host, what, detail in rows]


def test_downtime_ends_when_the_guest_starts_there_not_when_its_memory_has_arrived() -> None:
    postcopy = events(
        (50.0, "source", "suspended", 1),
        (50.013, "source", "suspended", 7),
        (50.031, "destination", "resumed", 3),
        (74.6, "destination", "resumed", 1),
        (74.7, "source", "stopped", 3),
    )
    assert observed_downtime_ms(postcopy) == 31
    again = events(
        (3.0, "source", "suspended", 1),
        (3.5, "source", "resumed", 1),
        (9.0, "source", "suspended", 1),
        (9.25, "destination", "resumed", 1),
    )
    assert observed_downtime_ms(again) == 250
    assert observed_downtime_ms(again[:3]) is None
    assert observed_downtime_ms(events((9.0, "destination", "resumed", 1), (9.1, "source", "suspended", 1))) is None


class Limited(JobView):
    """A job of a domain whose limits somebody changes; only what is asked of the domain is there."""

    def __init__(self) -> None:
        super().__init__(None, "")  # type: ignore[arg-type]
        self.values: list[int | None] = [313, 8796093022207, 0]
        self.paused = False

    @property
    def domain(self) -> Any:
        return self

    def state(self, flags: int) -> list[int]:
        return [libvirt.VIR_DOMAIN_PAUSED, 0] if self.paused else [libvirt.VIR_DOMAIN_RUNNING, 0]

    def migrateGetMaxDowntime(self, flags: int) -> int | None:
        return self.values[0]

    def migrateGetMaxSpeed(self, flags: int) -> int | None:
        return self.values[2 if flags else 1]

    def read(self) -> Limits:
        self._limits_read_at -= LIMITS_EVERY_S
        self._read_limits()
        return self.limits


def test_limits_that_others_change_are_seen_and_a_speed_only_when_it_changes() -> None:
    job = Limited()
    assert job.read() == Limits(downtime_ms=313)
    job.values = [907, 17, 0]
    assert job.read() == Limits(downtime_ms=907, bandwidth_mib_s=17)
    job.values = [None, 8796093022207, 23]
    assert job.read() == Limits(downtime_ms=907, bandwidth_mib_s=8796093022207, postcopy_bandwidth_mib_s=23)
    job.values = [419, None, None]
    before = job.limits
    job._read_limits()
    assert job.limits is before, "it was read just now"


def test_the_bandwidth_that_libvirt_brings_back_when_precopy_has_ended_is_nobodys_change() -> None:
    job = Limited()
    job.values = [313, 64, 0]
    job.paused = True
    job.read()
    job.paused = False
    limits = job.read()
    assert limits == Limits(downtime_ms=313), "the first one is nobody's change either"
    job.paused, job.values = True, [313, 8796093022207, 0]
    assert job.read() == limits
    job.values = [313, 8796093022207, 7]
    assert job.read().postcopy_bandwidth_mib_s == 7
