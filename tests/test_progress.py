from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.curves import MIB, PaperMigration, recorded
from virtmig.progress import PassCounter, Phase, Progress

GUESTS = {
    "still": {"dirty": 20},
    "slow writer": {"dirty": 512},
    "fast writer": {"dirty": 900},
    "faster than the link": {"dirty": 1300},
    "hot set": {"dirty": 3000, "hot": 600},
}


def count(migration: PaperMigration, *, every_s: float = 0.2, until_s: float = 40.0) -> PassCounter:
    counter = PassCounter()
    for progress in migration.samples(every_s=every_s, until_s=until_s):
        counter.update(progress)
    return counter


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("every_s", [0.1, 0.2, 0.5])
def test_passes_are_counted_the_same_way_for_old_and_new_qemu(guest: str, sync: str, every_s: float) -> None:
    migration = PaperMigration(sync=sync, **GUESTS[guest])
    counted = count(migration, every_s=every_s).full_passes
    # never too many; passes not much longer than a sample (the hot set's are) may be missed
    assert 0.65 * migration.true_passes - 1 <= counted <= migration.true_passes


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("lacking", [{"pages": False}, {"counted_share": 0.1}, {"iteration": False}])
def test_missing_and_partial_counters_never_count_too_much(guest: str, sync: str, lacking: dict) -> None:
    migration = PaperMigration(sync=sync, **GUESTS[guest], **lacking)
    counted = count(migration).full_passes
    assert 1 <= counted <= migration.true_passes


@pytest.mark.parametrize("sync", ["pass", "100ms"])
@pytest.mark.parametrize("guest", GUESTS)
def test_the_first_pass_is_over_when_all_memory_went_over_once(guest: str, sync: str) -> None:
    migration = PaperMigration(sync=sync, limit_ms=10, **GUESTS[guest])
    counter = PassCounter()
    for progress in migration.samples(every_s=0.1, until_s=30):
        if counter.update(progress):
            break
    # 98 % of memory at the earliest, and noticed within two samples of the end of the pass
    assert migration.sent >= 0.98 * migration.memory - 1
    assert migration.now <= migration.memory / migration.rate + 0.2 + 1e-6


def test_iterations_every_100_ms_are_not_passes() -> None:
    """QEMU 11: by the time one pass is over its own count is far ahead."""
    migration = PaperMigration(sync="100ms", dirty=200)
    samples = list(migration.samples(until_s=2.0))
    counter = PassCounter()
    assert [counter.update(s) for s in samples] == [0] * len(samples)
    assert samples[-1].iteration is not None
    assert samples[-1].iteration > 10


def test_boundaries_hold_what_remained_when_each_pass_began() -> None:
    migration = PaperMigration(dirty=3000, hot=600, memory=4096, limit_ms=10)
    boundaries = list(count(migration, every_s=0.1).boundaries)
    assert boundaries[0].remaining_bytes == 4096 * MIB
    assert [b.full_passes for b in boundaries] == list(range(len(boundaries)))
    # after the first two the whole hot set is written during every pass, and nothing else
    for boundary in boundaries[4:12]:
        assert boundary.remaining_bytes / MIB == pytest.approx(600, rel=0.15)


def test_boundaries_fall_by_the_ratio_of_the_rates() -> None:
    """R(k+1) / R(k) = D / B, whatever the moment of the samples."""
    migration = PaperMigration(dirty=820, rate=1024, limit_ms=20)
    remaining = [b.remaining_bytes for b in count(migration, every_s=0.1).boundaries][:6]
    for before, after in itertools.pairwise(remaining[1:]):
        assert after / before == pytest.approx(0.8, rel=0.12)


def test_a_job_joined_half_way_counts_what_was_done_before() -> None:
    migration = PaperMigration(dirty=900, limit_ms=20)
    samples = list(migration.samples(until_s=12))
    first_pass_over = next(i for i, s in enumerate(samples) if (s.normal_pages or 0) * 4096 / 0.75 >= 4096 * MIB)
    early, late = PassCounter(), PassCounter()
    for sample in samples[first_pass_over - 3 :]:
        early.update(sample)
    assert early.full_passes >= 2
    assert late.update(samples[first_pass_over + 2]) == 1, "all of memory has been counted by QEMU already"


def test_a_job_joined_half_way_without_page_counts() -> None:
    migration = PaperMigration(dirty=100, pages=False, limit_ms=20)
    samples = list(migration.samples())
    counter = PassCounter()
    counts = [counter.update(s) for s in samples[len(samples) // 2 :]]
    assert counts[0] == 0
    assert counts[-1] >= 1


def test_a_tiny_guest_whose_passes_fit_between_two_samples() -> None:
    migration = PaperMigration(memory=16, rate=1024, dirty=900, hot=8, limit_ms=1)
    counter, before = PassCounter(), 0
    for progress in migration.samples(every_s=0.5, until_s=10):
        after = counter.update(progress)
        assert after - before in (0, 1)
        before = after
    assert before >= 10


def test_a_guest_that_is_done_at_the_first_sample() -> None:
    done = PaperMigration(memory=64)
    list(done.samples())
    assert PassCounter().update(done.progress()) == 1


def test_samples_without_sizes_change_nothing() -> None:
    counter = PassCounter()
    assert counter.update(Progress(elapsed_s=0.1)) == 0
    assert counter.update(Progress(elapsed_s=0.2, phase=Phase.PRECOPY, total_bytes=0, memory_total_bytes=0)) == 0
    assert counter.update(Progress(elapsed_s=0.3, phase=Phase.STORAGE, disk_total_bytes=MIB)) == 0
    assert list(counter.boundaries) == []


def test_nothing_is_counted_once_postcopy_runs() -> None:
    migration = PaperMigration(dirty=900)
    counter = PassCounter()
    samples = list(migration.samples(until_s=6))
    for sample in samples[:15]:
        counter.update(sample)
    before = counter.full_passes
    counter.update(msgspec.structs.replace(samples[15], phase=Phase.POSTCOPY))
    for sample in samples[16:]:
        counter.update(sample)
    assert counter.full_passes == before


@pytest.mark.parametrize("name", ["qemu-7.2-converging", "qemu-7.2-hot-set"])
def test_on_qemu_7_2_the_count_agrees_with_its_own_iterations(name: str) -> None:
    """There each pass is one iteration, so that the two may differ by the one that is under way."""
    counter = PassCounter()
    for progress in recorded(name):
        passes = counter.update(progress)
        if progress.iteration:
            assert progress.iteration - 2 <= passes <= progress.iteration
    assert counter.full_passes >= 3


def test_boundaries_of_a_real_hot_set() -> None:
    counter = PassCounter()
    for progress in recorded("qemu-7.2-hot-set"):
        counter.update(progress)
    later = [boundary.remaining_bytes / MIB for boundary in list(counter.boundaries)[1:]]
    assert len(later) >= 8
    # a sample comes up to 200 ms, here 20 MiB, after QEMU looked
    assert later == pytest.approx([96] * len(later), rel=0.15)


COUNTS = st.none() | st.integers(min_value=0, max_value=1 << 40)


@settings(max_examples=200)
@given(
    st.lists(
        st.builds(
            Progress,
            elapsed_s=st.floats(0, 1e6),
            phase=st.sampled_from(Phase),
            memory_total_bytes=COUNTS,
            memory_remaining_bytes=COUNTS,
            memory_processed_bytes=COUNTS,
            normal_pages=COUNTS,
            constant_pages=COUNTS,
            page_size_bytes=st.sampled_from([None, 4096, 65536]),
            iteration=COUNTS,
        ),
        max_size=30,
    )
)
def test_any_samples_count_up_by_one_at_most(samples: list[Progress]) -> None:
    counter, before = PassCounter(), 0
    for sample in samples:
        after = counter.update(sample)
        assert after in (before, before + 1)
        assert after == counter.full_passes
        before = after
    assert all(boundary.remaining_bytes >= 0 for boundary in counter.boundaries)
    assert len(counter.boundaries) <= before + 1
