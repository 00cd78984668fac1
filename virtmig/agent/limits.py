"""How much at once: migrations in and out, channels of each, and bytes per second of all together.

A limit that is reached refuses (PlanRefused, so that a handshake can pass on the reason); the bandwidth makes wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

from virtmig.agent.config import LimitsSection
from virtmig.errors import PlanRefused

Direction = Literal["in", "out"]

#: a taker asks for at most this much at once: who takes more per turn would get a larger share
QUANTUM_BYTES = 256 * 1024
#: what may go at once after a pause; the shortest time in which a rate can be told from a burst
BURST_S = 0.1


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What runs now."""

    migrations_in: int
    migrations_out: int
    channels: int


class Limits:
    """Counters that never exceed the configuration. Thread-safe."""

    def __init__(self, section: LimitsSection, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.section = section
        self.outgoing = TokenBucket(section.bandwidth_bytes_per_s, clock=clock)
        self._lock = threading.Lock()
        self._migrations: dict[Direction, int] = {"in": 0, "out": 0}
        self._channels = 0

    @property
    def usage(self) -> Usage:
        with self._lock:
            return Usage(
                migrations_in=self._migrations["in"],
                migrations_out=self._migrations["out"],
                channels=self._channels,
            )

    @contextmanager
    def migration(self, direction: Direction, parallel: int = 0) -> Iterator[MigrationSlot]:
        """One more migration with `parallel` multifd channels, until the block is left.

        Raises PlanRefused with the limit, what runs now, and the key to change; nothing is counted then.
        """
        slot = MigrationSlot(self, parallel)
        limit = self.section.migrations_in if direction == "in" else self.section.migrations_out
        reasons = self._too_many_connections(parallel)
        with self._lock:
            running = self._migrations[direction]
            if running >= limit:
                reasons.insert(0, _too_many_migrations(direction, running, limit))
            if reasons:
                raise PlanRefused(reasons)
            self._migrations[direction] += 1
        try:
            yield slot
        finally:
            with self._lock:
                self._migrations[direction] -= 1

    def _too_many_connections(self, parallel: int) -> list[tuple[str, str, str]]:
        limit = self.section.parallel_connections
        if parallel <= limit:
            return []
        reason = f"{parallel} parallel connections are asked for, this host allows {limit}"
        way_out = f"--parallel-connections {limit}, or limits.parallel_connections in its agent.toml"
        return [("multifd", reason, way_out)]

    def _count_channels(self, difference: int) -> None:
        with self._lock:
            self._channels += difference


def _too_many_migrations(direction: Direction, running: int, limit: int) -> tuple[str, str, str]:
    key = f"limits.migrations_{direction}"
    if limit == 0:
        reason = "this host accepts no guests" if direction == "in" else "this host gives no guests away"
        return key, reason, f"{key} in its agent.toml is 0"
    way = "to" if direction == "in" else "away from"
    reason = f"{running} migrations {way} this host run already, it allows {limit} at once"
    return key, reason, f"wait until one has ended, or raise {key} in its agent.toml"


class MigrationSlot:
    """A migration that is counted; its channels are counted with it."""

    def __init__(self, limits: Limits, parallel: int) -> None:
        self.parallel = parallel
        self._limits = limits

    @contextmanager
    def channels(self, count: int = 1) -> Iterator[None]:
        """`count` open channels, until the block is left."""
        self._limits._count_channels(count)
        try:
            yield
        finally:
            self._limits._count_channels(-count)


class TokenBucket:
    """A rate that many threads share. Thread-safe; nobody sleeps here.

    Each taker is given the next free stretch of time and told how long it is until then: first come, first served.
    So threads that ask for like amounts and wait as told get like shares, however many there are.
    """

    def __init__(self, bytes_per_s: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes_per_s = bytes_per_s
        self._free_at = clock() - BURST_S

    @property
    def bytes_per_s(self) -> int:
        """0: no limit."""
        return self._bytes_per_s

    def set_rate(self, bytes_per_s: int) -> None:
        """From now on; what was promised already stays as it was told, in the new rate's measure."""
        with self._lock:
            now = self._clock()
            promised_s = max(0.0, self._free_at - now)
            if self._bytes_per_s and bytes_per_s:
                promised_s *= self._bytes_per_s / bytes_per_s
            self._free_at = now + promised_s if bytes_per_s and self._bytes_per_s else now
            self._bytes_per_s = bytes_per_s

    def take(self, count: int) -> float:
        """Seconds to wait before sending `count` bytes; they are taken now."""
        with self._lock:
            if self._bytes_per_s == 0:
                return 0.0
            now = self._clock()
            begin = max(self._free_at, now - BURST_S)
            self._free_at = begin + count / self._bytes_per_s
            return max(0.0, begin - now)
