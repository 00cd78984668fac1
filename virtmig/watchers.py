"""Who is told what happens while a migration runs: a display, a recorder, a test.

Nobody who listens may hold up a migration. A terminal stopped with Ctrl-S, a pager nobody scrolls and a disk that does
not answer all block whoever writes to them, so a thread of their own writes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, Self

from virtmig.agreement import Plan
from virtmig.forecast import Forecast
from virtmig.policy import Action, Decision
from virtmig.progress import Outcome, Phase, Progress
from virtmig.quantities import rate_text
from virtmig.verbs import UNLIMITED_MIB_S

log = logging.getLogger("virtmig")

#: what libvirt takes for no limit (QEMU_DOMAIN_MIG_BANDWIDTH_MAX)
UNLIMITED_BYTES_PER_S = UNLIMITED_MIB_S << 20
#: calls that wait at most; more than a migration makes in minutes, and a few megabytes
MOST_WAITING = 1000


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


class Later:
    """Calls, made one after the other by a daemon thread: whoever asks for one never waits, and hears no error.

    When MOST_WAITING of them wait, the oldest that may be left out makes room; if there is none, the new one is left
    out. `warn` is told of the first one left out; it must not wait either.
    """

    def __init__(self, what: str, warn: Callable[[str], object]) -> None:
        self.left_out = 0
        self._what = what
        self._warn = warn
        self._changed = threading.Condition()
        self._waiting: deque[tuple[bool, Callable[[], object]]] = deque()
        self._busy = False
        self._closed = False
        self._failed = False
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[[], object], *, may_be_left_out: bool = False) -> None:
        """Nothing is done any more after close()."""
        with self._changed:
            if self._closed:
                return
            left_out = len(self._waiting) >= MOST_WAITING
            if not left_out or self._make_room():
                self._waiting.append((may_be_left_out, call))
            self.left_out += left_out
            first = left_out and self.left_out == 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"virtmig-{self._what}", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if first:  # with the lock released: whom we warn may be told of by a Later that warns us
            self._warn(f"the {self._what} does not keep up with the migration; samples are left out")

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything asked for so far and since is done; None: as long as it takes."""
        ends = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while self._waiting or self._busy:
                remaining = None if ends is None else ends - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                self._changed.wait(remaining)
        return True

    def close(self, seconds: float | None = None) -> bool:
        """Take nothing more, and flush(). What is not done in time is done by the thread if it still can."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return self.flush(seconds)

    def _make_room(self) -> bool:
        for number, (may_be_left_out, _) in enumerate(self._waiting):
            if may_be_left_out:
                del self._waiting[number]
                return True
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                _, call = self._waiting.popleft()
                self._busy = True
            try:
                call()
            except Exception as error:
                if not self._failed:
                    log.warning("the %s failed: %s: %s", self._what, type(error).__name__, error)
                self._failed = True


class Behind:
    """A watcher that is told everything in order by a thread of its own; samples may be left out.

    `finish`, and leaving it as a context, wait until all was told, however long that takes: the migration is over
    then. An error of the watcher costs a warning, not the migration.
    """

    def __init__(self, watcher: Watcher, warn: Callable[[str], object] = log.warning) -> None:
        self._watcher = watcher
        self._later = Later("display", warn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._later.close()

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None:
        self._later.put(partial(self._watcher.start, domain, source, destination, plan))

    def sample(self, progress: Progress, expected: Forecast) -> None:
        self._later.put(partial(self._watcher.sample, progress, expected), may_be_left_out=True)

    def decided(self, decision: Decision) -> None:
        self._later.put(partial(self._watcher.decided, decision))

    def message(self, text: str, level: str = "info") -> None:
        self._later.put(partial(self._watcher.message, text, level))

    def finish(self, outcome: Outcome) -> None:
        self._later.put(partial(self._watcher.finish, outcome))
        self._later.close()


class Interventions:
    """What somebody else did to our migration (virsh, the API, a cloud manager), seen between two samples.

    `postcopy`: it is one from the beginning, so that its start is nobody's doing.
    """

    def __init__(self, *, postcopy: bool = False) -> None:
        self._postcopy = postcopy
        self._limit_ms: int | None = None
        self._speeds: dict[str, int | None] = {}
        self._at_s = -1.0

    def ours(self, decision: Decision) -> None:
        """What we have done ourselves just now."""
        if decision.action is Action.SET_DOWNTIME:
            self._limit_ms = decision.value
        elif decision.action is Action.START_POSTCOPY:
            self._postcopy = True

    def update(self, progress: Progress) -> Iterator[tuple[str, str, int | None]]:
        """One sample; each intervention as (words, what, value), with Said's `what` and `value`."""
        if progress.elapsed_s <= self._at_s:  # the last sample again, of before what we have done since
            return
        self._at_s = progress.elapsed_s
        before, now_ms = self._limit_ms, progress.downtime_limit_ms
        if now_ms is not None:
            self._limit_ms = now_ms
            if before is not None and before != now_ms:
                words = f"the downtime limit was changed by somebody else: {before} -> {now_ms} ms"
                yield words, "max-downtime", now_ms
        for what, speed in (("bandwidth", progress.bandwidth_limit_bytes_per_s),
                            ("postcopy-bandwidth", progress.postcopy_bandwidth_limit_bytes_per_s)):  # fmt: skip
            if speed is not None and speed != self._speeds.get(what):
                self._speeds[what] = speed
                words = rate_text(speed) if 0 < speed < UNLIMITED_BYTES_PER_S else "unlimited"
                yield f"the {what.replace('-', ' ')} was changed by somebody else: {words} from now on", what, speed
        if progress.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED) and not self._postcopy:
            self._postcopy = True
            yield "postcopy was started by somebody else", "postcopy", None
