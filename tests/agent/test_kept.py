"""An answer that is asked for in the background."""

from __future__ import annotations

import itertools
import threading

import pytest

from tests.support.two_agents import PATIENCE_S, eventually, threads
from virtmig.agent import kept
from virtmig.agent.kept import Kept


def test_it_is_kept_and_asked_again_when_old() -> None:
    now, numbers = [100.0], itertools.count(1)
    answers = Kept("test-ask", lambda: next(numbers), kept_s=30.0, clock=lambda: now[0])
    assert answers.get() == (1, "")
    now[0] += 30.0
    assert answers.get() == (1, "")
    now[0] += 1.0
    assert answers.get() == (2, "")


def test_a_hung_one_is_asked_once_and_the_old_answer_stays() -> None:
    hangs, numbers = threading.Event(), itertools.count(1)
    hangs.set()

    def ask() -> int:
        assert hangs.wait(PATIENCE_S)
        return next(numbers)

    answers = Kept("test-ask", ask, kept_s=0.0)
    assert answers.get(PATIENCE_S)[0] == 1
    hangs.clear()
    for _ in range(3):
        assert answers.get(0.01) == (1, "no answer for 0 s")
        assert threads("test-ask") == ["test-ask"]
    hangs.set()
    eventually(lambda: answers.get(PATIENCE_S)[0] == 2)


def test_nothing_yet() -> None:
    hangs = threading.Event()
    answers = Kept("test-ask", lambda: hangs.wait(PATIENCE_S), kept_s=9.0)
    assert answers.get(0) == (None, "no answer for 0 s")
    hangs.set()
    assert answers.get() == (True, "")


def test_an_error_is_raised_to_everybody_who_waits_and_then_asked_again() -> None:
    wrong = [ZeroDivisionError("first"), None]

    def ask() -> str:
        if error := wrong.pop(0):
            raise error
        return "well"

    answers = Kept("test-ask", ask, kept_s=9.0)
    with pytest.raises(ZeroDivisionError):
        answers.get()
    assert answers.get() == ("well", "")


def test_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Kept("test-ask", lambda: 1, kept_s=9.0)
    with monkeypatch.context() as poor:
        poor.setattr(kept.threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("none left")))
        assert answers.get() == (None, "not asked: none left")
    assert answers.get() == (1, "")
