"""Whoever watches never holds up a migration: a reader that has stopped, a display that fails; and interventions."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest

from tests.report.test_records import NOTHING, curve, outcome
from tests.support.hosts import ask, plan
from virtmig.cli.display import make_display
from virtmig.policy import Action, Decision
from virtmig.progress import Outcome, Phase, Progress
from virtmig.watchers import MOST_WAITING, Behind, Interventions, Later, Silent

AT_ONCE_S = 5.0


def test_a_reader_that_has_stopped_holds_up_nothing_until_the_end() -> None:
    said: list[str] = []
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as out, open(os.devnull, "w", encoding="utf-8") as nowhere:
        display = Behind(make_display("json", stream_out=out, stream_err=nowhere), said.append)
        began = time.monotonic()
        display.start("opal", "amber", "beryl", plan(ask("live")))
        display.message("before " + "x" * (1 << 16))  # fills the pipe: from here on it blocks
        for progress in curve(2 * MOST_WAITING):
            display.sample(progress, NOTHING)
        display.decided(Decision(action=Action.ABORT, reason="enough"))
        display.message("after")
        assert time.monotonic() - began < 2 * AT_ONCE_S
        assert said == ["the display does not keep up with the migration; samples are left out"]
        found: list[bytes] = []

        def read() -> None:
            with open(reading, "rb") as file:
                found.extend(file)

        reader = threading.Thread(target=read)
        reader.start()
        display.finish(outcome())
    reader.join()
    text = b"".join(found)
    places = [text.index(words) for words in (b"before xx", b"enough", b'"after"', b"opal now runs on beryl")]
    assert places == sorted(places)
    assert b"opal now runs on beryl" in found[-1]
    assert 0 < text.count(b'"dirty_bytes_per_s"') <= MOST_WAITING + 1


class Failing(Silent):
    def __init__(self) -> None:
        self.outcome: Outcome | None = None

    def sample(self, progress: Progress, expected: object) -> None:
        raise ZeroDivisionError("in the display")

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome


def test_a_display_that_fails_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    watcher = Failing()
    with Behind(watcher) as display:
        for progress in curve(5):
            display.sample(progress, NOTHING)
        display.finish(outcome())
    assert watcher.outcome == outcome()
    assert [row.message for row in caplog.records] == ["the display failed: ZeroDivisionError: in the display"]


def test_leaving_it_waits_until_all_was_told() -> None:
    told: list[str] = []

    class Slow(Silent):
        def message(self, text: str, level: str = "info") -> None:
            gate.wait()
            told.append(text)

    gate = threading.Event()
    with contextlib.suppress(RuntimeError), Behind(Slow()) as display:
        for number in range(3):
            display.message(str(number))
        assert told == []
        gate.set()
        raise RuntimeError
    assert told == ["0", "1", "2"]


def test_what_must_be_kept_is_kept_in_order_and_bounded() -> None:
    done: list[int] = []
    said: list[str] = []
    gate, running = threading.Event(), threading.Event()
    later = Later("test", said.append)
    later.put(lambda: (running.set(), gate.wait()))
    assert running.wait(10)
    for number in range(MOST_WAITING):
        later.put(lambda number=number: done.append(number), may_be_left_out=number % 2 == 0)
    for number in range(MOST_WAITING, 2 * MOST_WAITING):
        later.put(lambda number=number: done.append(number))
    assert not later.flush(0.01)
    gate.set()
    assert later.close(10)
    half = MOST_WAITING // 2
    assert done == [*range(1, MOST_WAITING, 2), *range(MOST_WAITING, MOST_WAITING + half)]
    assert later.left_out == MOST_WAITING
    assert len(said) == 1
    later.put(lambda: done.append(-1))
    assert later.flush(10)
    assert -1 not in done


def test_interventions() -> None:
    def at(second: float, limit_ms: int | None, phase: Phase = Phase.PRECOPY) -> list[tuple[str, str, int | None]]:
        return list(seen.update(Progress(elapsed_s=second, phase=phase, downtime_limit_ms=limit_ms)))

    seen = Interventions()
    assert at(1, None) == at(2, 313) == at(3, 313) == []
    seen.ours(Decision(action=Action.SET_DOWNTIME, value=419, reason="a step"))
    assert at(3, 313) == []  # the sample of before, again: the daemon was slow
    assert at(4, 419) == []
    assert at(5, 907) == [("the downtime limit was changed by somebody else: 419 -> 907 ms", "max-downtime", 907)]
    assert at(6, None) == at(7, 907) == []
    assert at(8, 907, Phase.POSTCOPY) == [("postcopy was started by somebody else", "postcopy", None)]
    assert at(9, 907, Phase.POSTCOPY) == []
    seen = Interventions()
    seen.ours(Decision(action=Action.START_POSTCOPY, reason="a stall"))
    assert at(1, 313, Phase.POSTCOPY) == []
    seen = Interventions(postcopy=True)
    assert at(1, 313, Phase.POSTCOPY) == []


def test_a_speed_that_somebody_set_is_told_once() -> None:
    def at(second: float, speed: int | None, postcopy_speed: int | None = None) -> list[tuple[str, str, int | None]]:
        now = Progress(elapsed_s=second, bandwidth_limit_bytes_per_s=speed,
                       postcopy_bandwidth_limit_bytes_per_s=postcopy_speed)  # fmt: skip
        return list(seen.update(now))

    seen = Interventions()
    assert at(1, None) == []
    told = "the bandwidth was changed by somebody else: 17.0 MiB/s from now on"
    assert at(2, 17 << 20) == [(told, "bandwidth", 17 << 20)]
    assert at(3, 17 << 20) == []
    ((words, what, value),) = at(4, 17 << 20, 0)
    assert (words, what, value) == (
        "the postcopy bandwidth was changed by somebody else: unlimited from now on", "postcopy-bandwidth", 0
    )  # fmt: skip
    ((words, _, _),) = at(5, 8796093022207 << 20, 0)
    assert "unlimited" in words
