"""Counters that refuse, and a rate that makes wait. No test sleeps: the clock is a number."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading

import pytest

from virtmig.agent.config import LimitsSection
from virtmig.agent.limits import BURST_S, QUANTUM_BYTES, Limits, TokenBucket, Usage
from virtmig.errors import PlanRefused


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(**values: int) -> Limits:
    return Limits(LimitsSection(**{"migrations_in": 2, "migrations_out": 3, "parallel_connections": 5, **values}))


def test_what_runs_is_counted_and_given_back() -> None:
    counted = limits()
    with counted.migration("in", 5) as slot, counted.migration("out"), slot.channels(7), slot.channels():
        assert counted.usage == Usage(migrations_in=1, migrations_out=1, channels=8)
    assert counted.usage == Usage(migrations_in=0, migrations_out=0, channels=0)
    with pytest.raises(ZeroDivisionError), counted.migration("in") as slot, slot.channels(3):
        _ = 1 // 0
    assert counted.usage == Usage(migrations_in=0, migrations_out=0, channels=0)


def test_the_one_too_many_is_refused_with_limit_use_and_key() -> None:
    counted = limits()
    with counted.migration("in"), counted.migration("in"):
        with pytest.raises(PlanRefused) as refused, counted.migration("in"):
            pass
        assert "2 migrations to this host run already, it allows 2 at once" in str(refused.value)
        assert refused.value.reasons[0][0] == "limits.migrations_in"
        assert "limits.migrations_in" in refused.value.hint
        with counted.migration("out"):  # the other direction has its own limit
            assert counted.usage.migrations_in == 2
    with counted.migration("in"):
        assert counted.usage.migrations_in == 1


def test_a_limit_of_zero_says_so() -> None:
    closed = limits(migrations_in=0, migrations_out=0)
    for direction, words in (("in", "accepts no guests"), ("out", "gives no guests away")):
        with pytest.raises(PlanRefused, match=words), closed.migration(direction):  # type: ignore[arg-type]
            pass


def test_too_many_connections_are_refused_together_with_the_rest() -> None:
    counted = limits(migrations_in=1)
    with counted.migration("in", 5):
        with pytest.raises(PlanRefused) as refused, counted.migration("in", 6):
            pass
        assert [reason[0] for reason in refused.value.reasons] == ["limits.migrations_in", "multifd"]
        assert "6 parallel connections are asked for, this host allows 5" in str(refused.value)
        assert "limits.parallel_connections" in refused.value.hint


def test_many_threads_never_pass_the_limit() -> None:
    counted = limits(migrations_in=3)
    begin, seen, refusals = threading.Barrier(12), [], itertools.count()

    def run() -> None:
        begin.wait(20)
        for _ in range(200):
            try:
                with counted.migration("in"):
                    seen.append(counted.usage.migrations_in)
            except PlanRefused:
                next(refusals)

    threads = [threading.Thread(target=run) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen
    assert max(seen) <= 3
    assert counted.usage.migrations_in == 0
    assert len(seen) + next(refusals) == 12 * 200


# -- the rate ------------------------------------------------------------------------------------------------------


def test_no_rate_means_no_waiting() -> None:
    bucket = TokenBucket(0, clock=Clock())
    assert [bucket.take(1 << 30) for _ in range(5)] == [0.0] * 5


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock)
    assert bucket.take(int(1000 * BURST_S)) == 0.0
    assert bucket.take(500) == 0.0  # begins now, and lasts half a second
    assert bucket.take(250) == pytest.approx(0.5)
    assert bucket.take(1) == pytest.approx(0.75)
    clock.now += 0.751
    assert bucket.take(1) == pytest.approx(0.0, abs=1e-6)
    clock.now += 3600  # an hour of silence saves up no more than the burst
    assert bucket.take(1000) == 0.0
    assert bucket.take(1) == pytest.approx(1 - BURST_S)


def test_a_rate_that_changes_keeps_what_was_taken() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock)
    bucket.take(int(1000 * BURST_S) + 2000)
    assert bucket.take(0) == pytest.approx(2.0)
    bucket.set_rate(4000)
    assert bucket.bytes_per_s == 4000
    assert bucket.take(0) == pytest.approx(0.5)
    bucket.set_rate(0)
    assert bucket.take(1 << 40) == 0.0
    bucket.set_rate(1000)
    assert bucket.take(1000) == 0.0
    assert bucket.take(0) == pytest.approx(1.0 - BURST_S, abs=BURST_S)


def test_takers_that_wait_as_told_share_alike_and_keep_the_rate() -> None:
    """Seven takers in simulated time; one more joins in the middle and gets its share at once."""
    clock, rate = Clock(), 50 * QUANTUM_BYTES
    bucket = TokenBucket(rate, clock=clock)
    sent = [0] * 8
    queue = [(clock.now, taker) for taker in range(7)] + [(clock.now + 50.0, 7)]
    heapq.heapify(queue)
    while (at := queue[0][0]) < 1100.0:
        clock.now, taker = heapq.heappop(queue)
        wait = bucket.take(QUANTUM_BYTES)
        sent[taker] += QUANTUM_BYTES
        heapq.heappush(queue, (at + wait, taker))
    assert sum(sent) == pytest.approx(rate * 100.0, rel=0.02)
    # who came first had the burst
    assert max(sent[:7]) - min(sent[:7]) <= rate * BURST_S + 2 * QUANTUM_BYTES
    expected_of_the_late = rate * 50.0 / 8
    assert sent[7] == pytest.approx(expected_of_the_late, rel=0.03)


def test_threads_take_every_byte_once() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock)
    bucket.take(int(1000 * BURST_S))
    waits: list[float] = []

    def run() -> None:
        for _ in range(500):
            waits.append(bucket.take(10))

    with contextlib.ExitStack() as stack:
        for _ in range(4):
            thread = threading.Thread(target=run)
            thread.start()
            stack.callback(thread.join)
    assert sorted(waits) == pytest.approx([at * 0.01 for at in range(2000)])
