from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.curves import MIB, PaperMigration, recorded
from virtmig.forecast import Forecast, forecast, needed_downtime_ms, passes_to_go, precopy_bytes
from virtmig.policy import Action, Decision, History, Policy, decide
from virtmig.progress import PassBoundary, Phase, Progress

GIB = 1 << 30


def watched(migration: PaperMigration, policy: Policy | None = None, **how: float) -> list[tuple[Progress, Forecast]]:
    """Every sample of a migration with its forecast; nothing acts."""
    policy, history, found = policy or Policy(), History(), []
    for progress in migration.samples(**how):
        history.add(progress, decide(Policy(), history, progress, progress.elapsed_s), progress.elapsed_s)
        found.append((progress, forecast(history, policy)))
    return found


# -- the laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "passes", "seconds"),
    [(0.1, 1, 2.7), (0.25, 2, 3.3), (0.5, 4, 5.0), (0.8, 10, 11.9), (0.9, 21, 23.8), (0.95, 43, 47.45)],
)
def test_passes_and_time_of_precopy(ratio: float, passes: int, seconds: float) -> None:
    """B = 1.5 GiB/s, M = 4 GiB, L = 0.3 s."""
    rate, memory = 1.5 * GIB, 4 * GIB
    assert passes_to_go(memory, ratio, rate * 0.3) == passes
    assert precopy_bytes(memory, ratio, passes) / rate == pytest.approx(seconds, abs=0.06)


@given(st.floats(1, 1e12), st.floats(0.01, 0.99), st.floats(1e-6, 2))
def test_the_closed_forms_are_the_sum_of_the_passes(memory: float, ratio: float, fits_share: float) -> None:
    fits = memory * fits_share
    remaining, total, passes = memory, 0.0, 0
    while remaining > fits * (1 + 1e-9):
        remaining, total, passes = remaining * ratio, total + remaining, passes + 1
    assert passes_to_go(memory, ratio, fits) == passes
    assert precopy_bytes(memory, ratio, passes) == pytest.approx(total)


def test_ratios_at_the_edge() -> None:
    assert passes_to_go(100, 1.0, 50) is None
    assert passes_to_go(100, 2.0, 50) is None
    assert passes_to_go(100, 2.0, 100) == 0
    assert passes_to_go(100, 0.0, 50) == 1
    assert passes_to_go(100, 0.5, 0) is None
    assert precopy_bytes(100, 1.0, 3) == 300


# -- whole migrations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty", [100, 300, 512, 700, 820])
def test_the_end_lies_in_the_range(dirty: int) -> None:
    migration = PaperMigration(dirty=dirty, limit_ms=100)
    seen = watched(migration)
    later = [(p, f) for p, f in seen if p.phase is Phase.PRECOPY and f.converging]
    assert migration.ended_at is not None
    assert later, "after the first pass there is a range"
    hits = 0
    for progress, expected in later:
        left_s = migration.ended_at - progress.elapsed_s
        assert expected.eta_low_s is not None
        assert expected.eta_high_s is not None
        hits += expected.eta_low_s - 0.2 <= left_s <= expected.eta_high_s + 0.2
    assert hits >= 0.8 * len(later)
    assert all(f.converging is not False for _, f in seen)


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("dirty", [0, 100, 512, 900])
def test_in_the_first_pass_the_low_end_is_a_low_end(dirty: int, sync: str) -> None:
    migration = PaperMigration(dirty=dirty, sync=sync)
    seen = [(p, f) for p, f in watched(migration) if p.elapsed_s < 3.6]
    assert migration.ended_at is not None
    assert any(f.eta_low_s for _, f in seen)
    for progress, expected in seen:
        if expected.eta_low_s is not None:
            assert expected.eta_low_s <= migration.ended_at - progress.elapsed_s + 0.1


@pytest.mark.parametrize("sync", ["pass", "100ms"])
def test_the_first_pass_says_nothing_about_a_guest_that_writes_fast(sync: str) -> None:
    """It may write the same few pages again and again."""
    for _, expected in watched(PaperMigration(dirty=5000, hot=200, sync=sync), until_s=3.6):
        assert expected.converging is not False


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("hot", [600, 1500])
def test_a_hot_set_does_not_converge_and_the_limit_that_would_help_is_named(hot: int, sync: str) -> None:
    migration = PaperMigration(dirty=50_000, hot=hot, sync=sync)
    expected = watched(migration, until_s=30)[-1][1]
    assert expected.converging is False
    assert expected.eta_low_s is None
    assert "not converging: the guest writes" in expected.sentence
    assert "(now 0.3 s), or --postcopy" in expected.sentence
    # downtime >= H / B
    assert expected.downtime_ms == pytest.approx(1000 * hot / migration.rate, rel=0.15)


def test_the_named_limit_does_help() -> None:
    def tried(limit_ms: int) -> tuple[PaperMigration, History]:
        migration = PaperMigration(dirty=50_000, hot=900, limit_ms=limit_ms)
        history = History()
        for progress in migration.samples(every_s=0.1, until_s=30):
            history.add(progress, decide(Policy(), history, progress, progress.elapsed_s), progress.elapsed_s)
        return migration, history

    stuck, history = tried(300)
    assert stuck.ended_at is None
    needed_ms = needed_downtime_ms(history.boundaries, stuck.rate * MIB)
    assert needed_ms is not None
    assert needed_ms < 1.4 * 1000 * 900 / stuck.rate
    assert tried(needed_ms)[0].ended_at is not None


def test_postcopy_is_offered_in_the_words_of_what_was_asked() -> None:
    def last(policy: Policy) -> str:
        return watched(PaperMigration(dirty=50_000, hot=900), policy, until_s=20)[-1][1].sentence

    assert last(Policy()).endswith("or --postcopy")
    assert last(Policy(postcopy_allowed=True)).endswith("or switching to postcopy")


def test_postcopy_takes_what_is_left_over_the_rate_whatever_the_guest_writes() -> None:
    for dirty in (100, 5000):
        migration = PaperMigration(dirty=dirty)
        history, switched = History(), False
        ends = []
        for progress in migration.samples(until_s=30):
            history.add(progress, decide(Policy(), history, progress, progress.elapsed_s), progress.elapsed_s)
            if not switched and progress.elapsed_s >= 1.5:
                migration.act(Decision(action=Action.START_POSTCOPY, reason="test"))
                switched = True
            if progress.phase is Phase.POSTCOPY:
                ends.append((progress.elapsed_s, forecast(history, Policy())))
        assert migration.ended_at is not None
        assert len(ends) > 3
        for elapsed_s, expected in ends[1:]:
            assert expected.converging is True
            assert expected.eta_low_s is not None
            assert expected.eta_high_s is not None
            assert expected.eta_low_s - 0.1 <= migration.ended_at - elapsed_s <= expected.eta_high_s + 0.1


def test_a_suspended_guest_converges() -> None:
    migration, history = PaperMigration(dirty=50_000, hot=3000), History()
    policy = Policy(timeout_s=8)
    ranges = []
    for progress in migration.samples(until_s=30):
        decision = decide(policy, history, progress, progress.elapsed_s)
        history.add(progress, decision, progress.elapsed_s)
        migration.act(decision)
        if history.guest_suspended and progress.phase is Phase.PRECOPY:
            ranges.append(forecast(history, policy))
    assert ranges
    assert all(expected.converging for expected in ranges)
    assert "suspended" in ranges[0].sentence


def test_a_real_migration_ends_in_the_range() -> None:
    samples, history = recorded("qemu-7.2-converging"), History()
    ended_s = samples[-1].elapsed_s + 0.2
    hits = []
    for progress in samples:
        history.add(progress, decide(Policy(), history, progress, progress.elapsed_s), progress.elapsed_s)
        expected = forecast(history, Policy())
        if expected.eta_low_s is not None:
            assert expected.eta_low_s <= ended_s - progress.elapsed_s + 0.5
        if expected.eta_low_s is not None and expected.eta_high_s is not None:
            hits.append(expected.eta_low_s - 0.5 <= ended_s - progress.elapsed_s <= expected.eta_high_s + 0.5)
    assert len(hits) > 5
    assert sum(hits) >= 0.8 * len(hits)


def test_a_real_hot_set_needs_a_second() -> None:
    """96 MiB at 100 MiB/s."""
    history = History()
    for progress in recorded("qemu-7.2-hot-set"):
        history.add(progress, decide(Policy(), history, progress, progress.elapsed_s), progress.elapsed_s)
    expected = forecast(history, Policy())
    assert expected.converging is False
    needed_ms = needed_downtime_ms(history.boundaries, 100 * MIB)
    assert needed_ms is not None
    assert 960 <= needed_ms <= 1300
    assert "a downtime limit of 1" in expected.sentence


# -- the other phases --------------------------------------------------------------------------------------------------


class Seen:
    def __init__(self, *samples: Progress) -> None:
        self.samples, self.boundaries, self.guest_suspended = samples, list[PassBoundary](), False


def at(phase: Phase, **fields: object) -> Forecast:
    return forecast(Seen(msgspec.convert({"elapsed_s": 1.0, "phase": phase, **fields}, Progress)), Policy())


def test_storage() -> None:
    expected = at(Phase.STORAGE, disk_remaining_bytes=50 * GIB, disk_bytes_per_s=GIB)
    assert (expected.converging, expected.eta_low_s, expected.eta_high_s) == (None, 50.0, None)
    assert expected.sentence == "disks take 50 s more at 1.00 GiB/s, then memory"


def test_switchover_lasts_the_downtime_limit_at_most() -> None:
    expected = at(Phase.SWITCHOVER, downtime_limit_ms=700, expected_downtime_ms=120)
    assert (expected.eta_low_s, expected.eta_high_s, expected.downtime_ms) == (0.0, 0.7, 120)


def test_qemus_own_downtime_is_taken_where_there_is_one() -> None:
    migration, history = PaperMigration(dirty=600), History()
    for progress in migration.samples(until_s=6):
        told = msgspec.structs.replace(progress, expected_downtime_ms=1234)
        history.add(told, decide(Policy(), history, told, told.elapsed_s), told.elapsed_s)
    expected = forecast(history, Policy())
    assert expected.downtime_ms == 1234
    assert expected.downtime_limit_ms == 300


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_without_any_number(phase: Phase) -> None:
    expected = at(phase)
    assert expected.sentence
    assert expected.eta_high_s is None or math.isfinite(expected.eta_high_s)


def test_nothing_seen() -> None:
    assert forecast(Seen(), Policy()).converging is None


COUNTS = st.none() | st.integers(0, 1 << 45)


@given(
    st.lists(
        st.builds(
            Progress,
            elapsed_s=st.floats(0, 1e5),
            phase=st.sampled_from([Phase.PRECOPY] * 5 + list(Phase)),
            total_bytes=COUNTS,
            remaining_bytes=COUNTS,
            memory_total_bytes=COUNTS,
            memory_remaining_bytes=COUNTS,
            memory_processed_bytes=COUNTS,
            memory_bytes_per_s=COUNTS,
            disk_remaining_bytes=COUNTS,
            disk_bytes_per_s=COUNTS,
            dirty_bytes_per_s=COUNTS,
            expected_downtime_ms=COUNTS,
            downtime_limit_ms=st.none() | st.integers(0, 2_000_000),
            normal_pages=COUNTS,
            constant_pages=COUNTS,
            page_size_bytes=st.none() | st.just(4096),
        ),
        max_size=20,
    )
)
def test_any_samples_give_a_forecast_that_makes_sense(samples: list[Progress]) -> None:
    history = History()
    for progress in samples:
        history.add(progress, decide(Policy(), history, progress, 0.0), 0.0)
        expected = forecast(history, Policy())
        low_s, high_s = expected.eta_low_s, expected.eta_high_s
        assert low_s is None or (low_s >= 0 and math.isfinite(low_s))
        assert high_s is None or (low_s is not None and low_s <= high_s)
        assert expected.converging is not False or low_s is None
