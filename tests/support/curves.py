"""Curves of migrations: on paper, and recorded from real ones.

On paper: a guest that writes, a link that sends, and the samples libvirt would give of it.

Written from QEMU's behaviour, not from our counting: up to QEMU 10 the dirty bitmap is looked at when what it holds
fits into the downtime (`sync="pass"`), on QEMU 11 also every 100 ms (`sync="100ms"`). `true_passes` is the definition:
as much was sent as remained when the pass began, to the nearest step of 10 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from virtmig.policy import Action, Decision, History, Policy, decide
from virtmig.progress import Phase, Progress

MIB = 1 << 20
PAGE = 4096
STEP_S = 0.01
ZERO_SHARE = 0.25  # of all pages; they cost next to nothing on the wire


class PaperMigration:
    """Rates in MiB/s, sizes in MiB, times in seconds. `dirty` may be a function of time."""

    def __init__(
        self,
        *,
        memory: float = 4096,
        rate: float = 1024,
        dirty: float | Callable[[float], float] = 0,
        hot: float | None = None,
        limit_ms: int = 300,
        sync: str = "pass",
        iteration: bool = True,
        pages: bool = True,
        counted_share: float = 1.0,
        throttle: Callable[[float], int | None] = lambda now: None,
    ) -> None:
        self.memory, self.rate, self.hot = memory, rate, memory if hot is None else hot
        self.dirty = dirty if callable(dirty) else (lambda now: dirty)
        self.limit_ms, self.sync = limit_ms, sync
        self.show_iteration, self.show_pages = iteration, pages
        self.counted_share = counted_share  # of the pages of later passes: the rest is xbzrle
        self.throttle = throttle
        self.now = 0.0
        self.hot_dirty, self.cold_dirty = self.hot, memory - self.hot  # what the bitmap holds
        self.unseen = 0.0  # written since the bitmap was last looked at
        self.sent = self.counted = self.wire = 0.0
        self.iterations, self.true_passes = 1, 0
        self.pass_start, self.pass_begin = 0.0, memory
        self.first_pass_ended_at: float | None = None
        self.last_sync = 0.0
        self.measured_dirty: float | None = None
        self.suspended = False
        self.phase = Phase.PRECOPY
        self.ended_at: float | None = None
        self.stopped_for: float | None = None

    @property
    def fits(self) -> float:
        return self.rate * self.limit_ms / 1000

    @property
    def remaining(self) -> float:
        return self.hot_dirty + self.cold_dirty

    def step(self) -> None:
        self.now += STEP_S
        if self.phase is Phase.COMPLETED:
            return
        self._send(min(self.rate * STEP_S, self.remaining))
        if self.phase is Phase.POSTCOPY:
            if self.remaining <= 0:
                self._complete(stopped_for=0.0)
            return
        if not self.suspended:
            self.unseen = min(self.unseen + self.dirty(self.now) * STEP_S, self.hot)
        if self.remaining <= self.fits or (self.sync == "100ms" and self.now - self.last_sync >= 0.1 - 1e-9):
            self._look()
        if self.sent - self.pass_start >= self.pass_begin:
            self.true_passes += 1
            self.pass_start, self.pass_begin = self.sent, self.remaining
            self.first_pass_ended_at = self.first_pass_ended_at or self.now

    def _send(self, amount: float) -> None:
        share = amount / self.remaining if self.remaining else 0.0
        self.hot_dirty -= self.hot_dirty * share
        self.cold_dirty -= self.cold_dirty * share
        self.sent += amount
        seen_before = 1.0 if self.true_passes == 0 else self.counted_share
        self.counted += amount * seen_before
        self.wire += amount * (1 - ZERO_SHARE) * seen_before

    def _look(self) -> None:
        since = self.now - self.last_sync
        new = self.unseen * (1 - self.hot_dirty / self.hot)  # some of it had not been sent yet anyway
        self.hot_dirty += new
        self.measured_dirty = self.unseen / since
        self.unseen, self.last_sync = 0.0, self.now
        self.iterations += 1
        if self.remaining <= self.fits:
            self._complete(stopped_for=self.remaining / self.rate)

    def _complete(self, *, stopped_for: float) -> None:
        self._send(self.remaining)
        self.phase, self.stopped_for, self.ended_at = Phase.COMPLETED, stopped_for, self.now + stopped_for

    def act(self, decision: Decision) -> None:
        match decision.action:
            case Action.SET_DOWNTIME:
                self.limit_ms = decision.value or 0
            case Action.SUSPEND:
                self.suspended = True
            case Action.START_POSTCOPY:
                self.phase = Phase.POSTCOPY
                self.hot_dirty = min(self.hot_dirty + self.unseen, self.hot)

    def progress(self) -> Progress:
        total, remaining = round(self.memory * MIB), round(self.remaining * MIB)
        return Progress(
            elapsed_s=self.now,
            phase=self.phase,
            total_bytes=total,
            remaining_bytes=remaining,
            processed_bytes=round(self.wire * MIB),
            memory_total_bytes=total,
            memory_remaining_bytes=remaining,
            memory_processed_bytes=round(self.wire * MIB),
            memory_bytes_per_s=round(self.rate * (1 - ZERO_SHARE) * MIB),
            dirty_bytes_per_s=None if self.measured_dirty is None else round(self.measured_dirty * MIB),
            iteration=self.iterations if self.show_iteration else None,
            downtime_limit_ms=self.limit_ms,
            throttle_percent=self.throttle(self.now),
            normal_pages=round(self.counted * MIB / PAGE * (1 - ZERO_SHARE)) if self.show_pages else None,
            constant_pages=round(self.counted * MIB / PAGE * ZERO_SHARE) if self.show_pages else None,
            page_size_bytes=PAGE if self.show_pages else None,
        )

    def samples(self, *, every_s: float = 0.2, until_s: float = 120.0) -> Iterator[Progress]:
        """One sample every `every_s`, the completed one last; ends at `until_s` in any case."""
        steps = max(1, round(every_s / STEP_S))
        while self.phase is not Phase.COMPLETED and self.now < until_s:
            for _ in range(steps):
                self.step()
            yield self.progress()


def play(
    migration: PaperMigration, policy: Policy, *, every_s: float = 0.2, until_s: float = 120.0
) -> tuple[History, list[Decision]]:
    """Watch, decide and act as the loop of a migration does; the notable decisions come back in order."""
    history, said = History(), []
    for progress in migration.samples(every_s=every_s, until_s=until_s):
        decision = decide(policy, history, progress, progress.elapsed_s)
        history.add(progress, decision, progress.elapsed_s)
        migration.act(decision)
        if decision.notable:
            said.append(decision)
        if decision.action is Action.ABORT:
            break
    return history, said


def recorded(name: str) -> list[Progress]:
    """Samples of a real migration from tests/vectors; the .toml beside them tells where they come from."""
    path = Path(__file__).parents[1] / "vectors" / f"samples-{name}.jsonl"
    return [msgspec.json.decode(line, type=Progress) for line in path.read_bytes().splitlines()]
