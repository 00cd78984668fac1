"""Strangers: connections that have not proved yet what they are. How many at once, and what the log has of them.

A port scan, a slow peer or a half-open TLS handshake takes one place for a few seconds. When all places are taken, the
oldest of whoever holds the most is given up: a crowd from one address crowds out itself, and not the other hosts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from virtmig.agent.logs import get_logger

#: refusals of one source that get a line of their own, in so many seconds; the others are counted
LOGGED_MOST = 20
LOGGED_WINDOW_S = 10.0

log = get_logger("agent")


class Greeting:
    """One place that is taken, until `done`. `given_up`: why it had to go."""

    def __init__(self, greetings: Greetings, source: str, give_up: Callable[[], None]) -> None:
        self.source = source
        self.given_up = ""
        self.give_up = give_up  # whoever takes the connection over puts its own way in here
        self._greetings = greetings

    def done(self) -> None:
        """It has proved itself, or has gone. May be called twice."""
        self._greetings._remove(self)


class Greetings:
    """At most `most` at once. Thread-safe; `give_up` is called in the thread of whoever came last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._present: dict[Greeting, None] = {}  # the oldest first

    def __len__(self) -> int:
        with self._lock:
            return len(self._present)

    def admit(self, source: str, give_up: Callable[[], None]) -> Greeting:
        """One more of `source` (an address, a uid); somebody else has to go when it is one too many."""
        greeting = Greeting(self, source, give_up)
        surplus = None
        with self._lock:
            self._present[greeting] = None
            if len(self._present) > self.most:
                [(crowd, count)] = Counter(each.source for each in self._present).most_common(1)
                surplus = next(each for each in self._present if each.source == crowd)
                surplus.given_up = f"more than {self.most} connections wait to be greeted, {count} of them from {crowd}"
                del self._present[surplus]
        if surplus is not None:
            surplus.give_up()
        return greeting

    def _remove(self, greeting: Greeting) -> None:
        with self._lock:
            self._present.pop(greeting, None)


class Refusals:
    """One line of the log for each connection that was refused; of a flood the first ones, and how many followed."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._count: Counter[str] = Counter()
        self.total = 0

    def say(self, source: str, peer: str, reason: str, hint: str = "") -> None:
        unlogged: dict[str, int] = {}
        with self._lock:
            if self._clock() - self._since > LOGGED_WINDOW_S:
                unlogged = self._unlogged()
                self._since = self._clock()
                self._count.clear()
            self._count[source] += 1
            self.total += 1
            loud = self._count[source] <= LOGGED_MOST
        _say_unlogged(unlogged)
        if loud:
            log.warning("refused", peer=peer, reason=reason, **({"hint": hint} if hint else {}))

    def close(self) -> None:
        """Say what is still unsaid."""
        with self._lock:
            unlogged = self._unlogged()
            self._count.clear()
        _say_unlogged(unlogged)

    def _unlogged(self) -> dict[str, int]:
        return {source: count - LOGGED_MOST for source, count in self._count.items() if count > LOGGED_MOST}


def _say_unlogged(counts: dict[str, int]) -> None:
    for source, count in counts.items():
        log.warning("refused as well, without a line for each", source=source, connections=count)
