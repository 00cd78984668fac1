"""An answer that is asked for in the background: nobody waits longer than wanted, and a hung one is not asked twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The newest answer of `ask`, which may take as long as it likes, in a thread of its own. Thread-safe."""

    def __init__(
        self, name: str, ask: Callable[[], T], *, kept_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`kept_s`: how old an answer may be before it is asked for again."""
        self._name = name
        self._ask = ask
        self._kept_s = kept_s
        self._clock = clock
        self._changed = threading.Condition()
        self._asked: float | None = None  # since when an answer is waited for
        self._answer: tuple[T, float] | None = None
        self._failure: BaseException | None = None

    def get(self, within_s: float | None = None) -> tuple[T | None, str]:
        """(the newest answer, ""), after `within_s` at most (None: as long as it takes).

        Where none came in time, the one before and since when it is waited for. Raises what `ask` raised.
        """
        with self._changed:
            if self._answer is not None and self._clock() - self._answer[1] <= self._kept_s:
                return self._answer[0], ""
            if self._asked is None:
                try:
                    threading.Thread(target=self._run, name=self._name, daemon=True).start()
                except RuntimeError as error:  # no threads
                    return (self._answer[0] if self._answer is not None else None), f"not asked: {error}"
                self._asked, self._failure = self._clock(), None
            # counted from the question: who comes later does not wait for a hung one once more
            deadline = None if within_s is None else self._asked + within_s
            while self._asked is not None:
                left = None if deadline is None else deadline - self._clock()
                if left is not None and left <= 0:
                    words = f"no answer for {self._clock() - self._asked:.0f} s"
                    return (self._answer[0] if self._answer is not None else None), words
                self._changed.wait(left)
            if self._failure is not None:
                raise self._failure
            assert self._answer is not None
            return self._answer[0], ""

    def _run(self) -> None:
        answer: tuple[T, float] | None = None
        failure: BaseException | None = None
        try:
            answer = self._ask(), self._clock()
        except Exception as error:
            failure = error
        with self._changed:
            self._asked, self._failure = None, failure
            if answer is not None:
                self._answer = answer
            self._changed.notify_all()
