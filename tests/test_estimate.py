"""The estimate before a migration: the laws of the model, and what it says of guests nobody should wait for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmig.estimate import STOP_MS, Estimate, chance_text, estimate

MIB = 1 << 20
GIB = 1 << 30


def told(ratio: float, *, memory: int = 4 * GIB, rate: float = 1000 * MIB, postcopy: bool = False) -> Estimate:
    return estimate(memory_bytes=memory, dirty_bytes_per_s=ratio * rate, rate_bytes_per_s=rate, postcopy=postcopy)


def test_a_still_guest_takes_one_pass() -> None:
    found = told(0.0)
    assert found.low_s == pytest.approx(4096 / 1000)
    assert found.high_s == pytest.approx(found.low_s, abs=1.0)
    assert found.chance == 1.0
    assert found.downtime_ms == STOP_MS
    assert not found.advice


def test_time_grows_with_memory_and_falls_with_the_rate() -> None:
    assert told(0.5, memory=8 * GIB).low_s > 1.9 * told(0.5).low_s - 0.5
    assert told(0.5, rate=2000 * MIB).low_s < told(0.5).low_s


def test_half_the_rate_takes_about_two_passes_worth_of_bytes() -> None:
    found = told(0.5)
    assert found.high_s is not None
    assert 1.3 * 4.096 < found.low_s < 2.0 * 4.096 < found.high_s < 5.0 * 4.096
    assert found.chance > 0.97


@pytest.mark.parametrize(
    ("ratio", "least", "most"),
    [(0.25, 0.999, 1), (0.8, 0.7, 0.8), (1.0, 0.5, 0.5), (1.2, 0.2, 0.4), (3, 0, 0.001)],
)
def test_the_chance_to_converge(ratio: float, least: float, most: float) -> None:
    assert least <= told(ratio).chance <= most


def test_a_guest_that_writes_faster_than_the_link_is_told_ways_out() -> None:
    found = told(1.2)
    assert found.high_s is None
    assert "without an end" in found.sentence
    assert "--postcopy" in found.advice
    assert "1.46 GiB/s of bandwidth" in found.advice or "1500 MiB/s" in found.advice


def test_a_small_guest_fits_into_the_downtime_whatever_it_writes() -> None:
    found = told(2.0, memory=100 * MIB)
    assert found.high_s is not None
    assert found.downtime_ms <= 300 + STOP_MS


def test_postcopy_is_sure_to_end() -> None:
    found = told(5.0, postcopy=True)
    assert found.chance == 1.0
    assert found.high_s is not None
    assert found.high_s < 2.2 * found.low_s


@given(st.floats(0, 10), st.integers(1, 1 << 42), st.floats(1e5, 1e11))
def test_the_range_is_a_range_and_the_chance_falls_with_the_guests_writing(r: float, memory: int, rate: float) -> None:
    found = told(r, memory=memory, rate=rate)
    assert found.low_s >= memory / rate * 0.999
    assert found.high_s is None or found.high_s >= found.low_s * 0.999
    assert 0 <= told(r + 0.1, memory=memory, rate=rate).chance <= found.chance <= 1


@pytest.mark.parametrize(("memory", "rate"), [(0, 1.0), (1, 0.0)])
def test_nothing_is_told_of_nothing(memory: int, rate: float) -> None:
    with pytest.raises(ValueError, match="memory and a rate"):
        estimate(memory_bytes=memory, dirty_bytes_per_s=0, rate_bytes_per_s=rate)


def sampled(seen: int, *, seconds: int = 1, rate: float = 48 * MIB) -> Estimate:
    """Of a guest of 128 MiB, whose 64 sampled pages stand for 2 MiB each."""
    step = 2 * MIB / seconds
    return estimate(memory_bytes=128 * MIB, dirty_bytes_per_s=seen * step, dirty_step_bytes_per_s=step,
                    rate_bytes_per_s=rate)  # fmt: skip


def test_few_sampled_pages_leave_much_open() -> None:
    """A guest that writes 8 MiB/s shows one page or nine of a second's sample: each range has to hold the true time."""
    exact = estimate(memory_bytes=128 * MIB, dirty_bytes_per_s=8 * MIB, rate_bytes_per_s=48 * MIB)
    for seen in (1, 2, 4, 7):
        found = sampled(seen)
        assert found.high_s is not None
        assert found.low_s <= exact.low_s + 0.2
        assert found.high_s >= exact.low_s
    assert sampled(4).high_s > exact.high_s  # type: ignore[operator]
    assert "(4 of the sampled pages)" in sampled(4).sentence


def test_none_seen_written_is_not_nothing_written() -> None:
    found, longer = sampled(0), sampled(0, seconds=4)
    assert found.high_s is not None
    assert found.high_s > found.low_s + 1.0
    assert longer.high_s is not None
    assert longer.high_s < found.high_s
    assert "writes little" in found.sentence
    assert 0.9 < found.chance < longer.chance <= 1.0


def test_the_more_is_seen_the_surer_it_is() -> None:
    wide, narrow = sampled(4, seconds=1), sampled(40, seconds=10)
    assert wide.dirty_bytes_per_s == narrow.dirty_bytes_per_s
    assert wide.high_s is not None
    assert narrow.high_s is not None
    assert wide.high_s - wide.low_s > narrow.high_s - narrow.low_s
    assert "sampled pages" not in narrow.sentence


def test_nothing_is_called_certain() -> None:
    assert [chance_text(chance) for chance in (0.0, 0.004, 0.5, 0.98, 0.999, 1.0)] == [
        "1 % or less", "1 % or less", "50%", "98%", "99 % or more", "99 % or more",
    ]  # fmt: skip
    assert "100%" not in told(0.0).sentence
