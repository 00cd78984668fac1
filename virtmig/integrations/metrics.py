"""Metrics for Prometheus, made from the records when they are asked for. Needs prometheus-client (`virtmig[api]`).

Names follow KubeVirt's stems (docs/observability/metrics.md: kubevirt_vmi_migration_data_processed_bytes becomes
virtmig_migration_data_processed_bytes); units are base units. A migration's own series are there while it runs and
KEPT_S longer, for MOST_MIGRATIONS at most. The counters count what the records hold at the start and what ends later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from virtmig.features import FEATURES
from virtmig.integrations.api.history import Head, History
from virtmig.options import BY_NAME
from virtmig.progress import Progress, Status

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
except ImportError as error:
    from virtmig.errors import RequestError

    raise RequestError(
        f"metrics need {error.name}, which is not installed", hint="pip install 'virtmig[api]'"
    ) from None  # fmt: skip

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
#: Prometheus scrapes every 15 s to a minute: the end of a migration is seen a few times
KEPT_S = 300.0
#: of each; a host runs a few at once
MOST_MIGRATIONS = 100
MOST_CHANNELS = 32
LABELS = ("domain", "source", "destination")
_LABEL_LONGEST = 128
_MS = 0.001
#: clocks of hosts differ; a record that ends later than this from now is damaged
_AHEAD_S = 3600.0

#: what a refusal may be counted under; anything else is "other"
REASONS = frozenset(BY_NAME) | frozenset(row.name for row in FEATURES)
RESULTS = (*(status.value for status in Status), "broken off")

DOWNTIME_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0, 30.0)
DURATION_BUCKETS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)


class _Gauge(msgspec.Struct, frozen=True):
    name: str
    help: str
    value: Callable[[Progress], float | None]


#: of the last sample
GAUGES = (
    _Gauge("virtmig_migration_data_total_bytes", "Memory and disks of the guest", lambda p: p.total_bytes),
    _Gauge("virtmig_migration_data_processed_bytes", "Sent so far", lambda p: p.processed_bytes),
    _Gauge("virtmig_migration_data_remaining_bytes", "To be sent as far as is known", lambda p: p.remaining_bytes),
    _Gauge("virtmig_migration_dirty_memory_rate_bytes", "What the guest writes, bytes per second",
           lambda p: p.dirty_bytes_per_s),
    _Gauge("virtmig_migration_memory_transfer_rate_bytes", "Memory over the wire, bytes per second",
           lambda p: p.memory_bytes_per_s),
    _Gauge("virtmig_migration_disk_transfer_rate_bytes", "Disks over the wire, bytes per second",
           lambda p: p.disk_bytes_per_s),
    _Gauge("virtmig_migration_full_passes", "Passes over all of memory that are done", lambda p: p.full_passes),
    _Gauge("virtmig_migration_throttle_ratio", "Share of CPU time that auto-converge takes from the guest",
           lambda p: p.throttle_percent / 100 if p.throttle_percent is not None else None),
    _Gauge("virtmig_migration_downtime_limit_seconds", "How long the guest may be stopped at the switchover",
           lambda p: p.downtime_limit_ms * _MS if p.downtime_limit_ms is not None else None),
    _Gauge("virtmig_migration_postcopy_requests", "Pages that the destination had to ask for",
           lambda p: p.postcopy_requests),
)  # fmt: skip


class Metrics:
    """A Prometheus collector over the records of one folder. Every method may be called from any thread."""

    def __init__(self, history: History, *, clock: Callable[[], float] = time.time) -> None:
        self._history = history
        self._clock = clock
        self._lock = threading.Lock()
        self._counted: set[str] = set()
        self._results: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self._reasons: Counter[str] = Counter()
        self._downtimes = _Observed(DOWNTIME_BUCKETS_S)
        self._observed_downtimes = _Observed(DOWNTIME_BUCKETS_S)
        self._durations = _Observed(DURATION_BUCKETS_S)

    def refused(self, reasons: Iterable[str]) -> None:
        """A plan that was refused and left no record."""
        with self._lock:
            self._refused(reasons)

    def exposition(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return bytes(generate_latest(registry))

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks of a collector."""
        heads = list(self._history.heads())
        with self._lock:
            for head in heads:
                self._count(head)
            self._counted &= {head.id for head in heads}
            totals = list(self._totals())
        yield from totals
        yield from self._own_series(heads)

    # -- counters ---------------------------------------------------------------------------------------------------

    def _count(self, head: Head) -> None:
        if head.id in self._counted or not head.over:
            return
        self._counted.add(head.id)
        if head.refused is not None:
            self._refused(reason for reason, _, _ in head.refused.reasons)
            return
        outcome = head.outcome
        self._results[head.ending or "broken off"] += 1
        if outcome is None:
            return
        self._durations.add(outcome.elapsed_s)
        if outcome.downtime_ms is not None:
            self._downtimes.add(outcome.downtime_ms * _MS)
        if outcome.observed_downtime_ms is not None:
            self._observed_downtimes.add(outcome.observed_downtime_ms * _MS)

    def _refused(self, reasons: Iterable[str]) -> None:
        self._results["refused"] += 1
        for reason in sorted({reason if reason in REASONS else "other" for reason in reasons}):
            self._reasons[reason] += 1

    def _totals(self) -> Iterator[Any]:
        results = CounterMetricFamily("virtmig_migrations", "Migrations that have ended", labels=["result"])
        for result, count in sorted(self._results.items()):
            results.add_metric([result], count)
        yield results
        refusals = CounterMetricFamily(
            "virtmig_migration_refusals", "Plans that were refused; one with two reasons counts in both",
            labels=["reason"],
        )  # fmt: skip
        for reason, count in sorted(self._reasons.items()):
            refusals.add_metric([reason], count)
        yield refusals
        yield self._downtimes.family("virtmig_migration_downtime_seconds", "Downtime by QEMU's own count")
        yield self._observed_downtimes.family(
            "virtmig_migration_observed_downtime_seconds", "From the source's stop to the destination's start"
        )
        yield self._durations.family("virtmig_migration_duration_seconds", "From the start to the end")

    # -- series of each ---------------------------------------------------------------------------------------------

    def _own_series(self, heads: Sequence[Head]) -> Iterator[Any]:
        now = self._clock()
        running = [head for head in heads if not head.over]
        yield GaugeMetricFamily("virtmig_migrations_in_running_phase", "Migrations that run now", value=len(running))
        ended = [head for head in heads if head.over and not head.refused and _lately(head.end_time or 0.0, now)]
        chosen: dict[tuple[str, ...], Head] = {}
        for head in [*running, *ended]:  # the newest first: an older one with the same labels is left out
            if len(chosen) < MOST_MIGRATIONS:
                chosen.setdefault(_labels(head), head)
        for gauge in GAUGES:
            yield _family(gauge.name, gauge.help, chosen, _of_sample(gauge.value))
        yield _family("virtmig_migration_start_time_seconds", "When it began, in Unix time", chosen,
                      lambda head: head.began.time)  # fmt: skip
        yield _family("virtmig_migration_end_time_seconds", "When it ended, in Unix time", chosen,
                      lambda head: head.end_time)  # fmt: skip
        for status, name in ((True, "succeeded"), (False, "failed")):
            yield _family(f"virtmig_migration_{name}", f"1 if it has {name}", chosen, _ended_so(status))
        channels = GaugeMetricFamily(
            "virtmig_migration_channel_transfer_rate_bytes", "Over one channel, bytes per second",
            labels=[*LABELS, "channel"],
        )  # fmt: skip
        for labels, head in chosen.items():
            rates = head.sample.progress.channel_bytes_per_s if head.sample is not None and not head.over else ()
            for number, rate in enumerate(rates[:MOST_CHANNELS]):
                channels.add_metric([*labels, str(number)], rate)
        yield channels


def _family(
    name: str, help: str, heads: dict[tuple[str, ...], Head], value: Callable[[Head], float | None]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help, labels=list(LABELS))
    for labels, head in heads.items():
        found = value(head)
        with contextlib.suppress(OverflowError):  # a number of a damaged record
            if found is not None:
                family.add_metric(list(labels), float(found))
    return family


def _of_sample(value: Callable[[Progress], float | None]) -> Callable[[Head], float | None]:
    return lambda head: value(head.sample.progress) if head.sample is not None else None


def _lately(end_time: float, now: float) -> bool:
    return end_time - _AHEAD_S <= now <= end_time + KEPT_S


def _ended_so(succeeded: bool) -> Callable[[Head], float | None]:
    def value(head: Head) -> float | None:
        if not head.over:
            return None
        if head.ending == "detached":  # it went on, and nobody knows how it ended
            return None
        return float((head.ending == "completed") is succeeded)

    return value


def _labels(head: Head) -> tuple[str, ...]:
    began = head.began
    return tuple(_label(text) for text in (began.domain, began.source, began.destination))


def _label(text: str) -> str:
    return text[:_LABEL_LONGEST].encode("utf-8", "replace").decode()


class _Observed:
    """A histogram's numbers."""

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum = 0.0

    def add(self, value_s: float) -> None:
        self._sum += value_s
        self._counts[sum(value_s > bound for bound in self._bounds)] += 1

    def family(self, name: str, help: str) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(name, help)
        family.add_metric([], buckets=buckets, sum_value=self._sum)
        return family
