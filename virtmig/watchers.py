"""Who is told what happens while a migration runs: a display, a recorder, a test."""

from __future__ import annotations

from typing import Protocol

from virtmig.agreement import Plan
from virtmig.forecast import Forecast
from virtmig.policy import Decision
from virtmig.progress import Outcome, Progress


class Watcher(Protocol):
    """Who is told what happens: a display, a recorder, a test."""

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None: ...
    def sample(self, progress: Progress, expected: Forecast) -> None: ...
    def decided(self, decision: Decision) -> None: ...
    def message(self, text: str, level: str = "info") -> None: ...
    def finish(self, outcome: Outcome) -> None: ...


class Silent:
    """A watcher that says nothing."""

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None: ...
    def sample(self, progress: Progress, expected: Forecast) -> None: ...
    def decided(self, decision: Decision) -> None: ...
    def message(self, text: str, level: str = "info") -> None: ...
    def finish(self, outcome: Outcome) -> None: ...


class Both:
    """Two watchers: the recorder hears first, so that a display that fails has been recorded."""

    def __init__(self, first: Watcher, second: Watcher) -> None:
        self._watchers = (first, second)

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None:
        for watcher in self._watchers:
            watcher.start(domain, source, destination, plan)

    def sample(self, progress: Progress, expected: Forecast) -> None:
        for watcher in self._watchers:
            watcher.sample(progress, expected)

    def decided(self, decision: Decision) -> None:
        for watcher in self._watchers:
            watcher.decided(decision)

    def message(self, text: str, level: str = "info") -> None:
        for watcher in self._watchers:
            watcher.message(text, level)

    def finish(self, outcome: Outcome) -> None:
        for watcher in self._watchers:
            watcher.finish(outcome)
