"""What a guest without a hypervisor writes, and what its memory must therefore hold.

A page: word 0 how often it was written, word 1 and 511 a check word of (page number, that counter, seed); between them
filler that never changes. Pages are numbered through all blocks, in their order. From the device state follows what
every page must hold, so that one lost, late or doubled write shows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES

Words = npt.NDArray[np.uint64]

WORDS = PAGE_BYTES // 8
TAIL = WORDS - 1
#: pages checked at a time: 1 MiB
_CHECK_PAGES = 256


class GuestSettings(msgspec.Struct, frozen=True):
    """How the guest writes. Each round visits each page of the range once, in the pattern's order."""

    rate_mib_s: float | None = None  # written pages count whole; None: as fast as it can
    pattern: Literal["sequential", "random", "hot"] = "sequential"
    first_page: int = 0
    page_count: int | None = None  # None: to the end
    hot_pages: int = 0  # "hot": the first of the range, written by hot_batches of hot_batches + 1 batches
    hot_batches: int = 9
    batch_pages: int = 64  # between two looks at the clock and at what is asked
    fill: Literal["none", "random"] = "none"  # none: pages stay untouched until first written
    seed: int = 1


class Walk(msgspec.Struct):
    """One walk over `count` pages. A scrambled one visits each of them once a round as well, far from one another."""

    first: int
    count: int
    scrambled: bool = False
    position: int = 0
    round: int = 0

    def next(self, most: int) -> tuple[Words, int]:
        """The next pages and how often each was written before; moves on."""
        stop = min(self.position + most, self.count)
        pages, before = self.at(np.arange(self.position, stop, dtype=np.uint64)), self.round
        self.position = stop
        if stop == self.count:
            self.position, self.round = 0, before + 1
        return pages, before

    def at(self, positions: Words) -> Words:
        if not self.scrambled:
            return positions + np.uint64(self.first)
        stride = max(int(self.count * 0.618), 1)
        while math.gcd(stride, self.count) > 1:
            stride += 1
        return (positions * np.uint64(stride) + np.uint64(self.round * 7919)) % np.uint64(self.count) + np.uint64(
            self.first
        )

    def counters(self) -> Words:
        """How often each of its pages has been written, by page."""
        expected = np.full(self.count, self.round, np.uint64)
        expected[self.at(np.arange(self.position, dtype=np.uint64)) - np.uint64(self.first)] += np.uint64(1)
        return expected


class Corruption(msgspec.Struct, frozen=True):
    """The first page that did not hold what was written there. `found_tail` is the check word at the page's end."""

    page: int
    expected_counter: int
    expected_check: int
    found_counter: int
    found_check: int
    found_tail: int


class DeviceState(msgspec.Struct):
    """All that is not memory. Beats are monotonic times of one boot; from another host they mean nothing."""

    settings: GuestSettings
    walks: list[Walk]
    batches: int
    beats: int
    last_beat_ns: int
    largest_gap_ns: int
    pages_written: int
    bad_pages: int
    first_bad: Corruption | None
    boot_id: str
    version: int = 1


class GuestCheck(msgspec.Struct, frozen=True):
    """The whole memory against the device state. `counter` is the lowest, `step_page` where the first walk stands."""

    pages: int
    counter: int
    step_page: int
    bad_pages: int
    corruption: Corruption | None  # the first seen by the guest itself, or else by this check

    @property
    def ok(self) -> bool:
        return self.corruption is None


def check_words(pages: Words, counters: Words | int, seed: int) -> Words:
    """The check word of each page: splitmix64 of its number and counter, never zero."""
    mixed: Words = pages * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(seed * 0xD1B54A32D192ED03 % (1 << 64))
    mixed = (mixed + np.asarray(counters, np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return (mixed ^ mixed >> np.uint64(31)) | np.uint64(1)


def first_walks(settings: GuestSettings, pages: int) -> list[Walk]:
    """Where a guest begins. Raises GuestMemoryError for a range that is not the guest's."""
    count = pages - settings.first_page if settings.page_count is None else settings.page_count
    hot = settings.hot_pages if settings.pattern == "hot" else 0
    if settings.first_page < 0 or count <= 0 or settings.first_page + count > pages or settings.batch_pages < 1:
        raise GuestMemoryError(f"pages {settings.first_page}+{count} of a guest with {pages}")
    if settings.pattern == "hot" and not 0 < hot < count:
        raise GuestMemoryError(f"{hot} hot pages of {count}")
    scrambled = settings.pattern == "random"
    cold = Walk(settings.first_page + hot, count - hot, scrambled)
    return [cold] if not hot else [Walk(settings.first_page, hot, True), cold]


def decode_state(data: bytes, pages: int) -> DeviceState:
    """Raises GuestMemoryError for bytes that are no state, and for one of a guest with other memory."""
    try:
        state = msgspec.msgpack.decode(data, type=DeviceState)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise GuestMemoryError(f"this is no device state: {error}") from None
    fresh = [(walk.first, walk.count, walk.scrambled) for walk in first_walks(state.settings, pages)]
    if fresh != [(walk.first, walk.count, walk.scrambled) for walk in state.walks] or state.version != 1:
        raise GuestMemoryError("the device state is of a guest with other memory")
    if not all(0 <= walk.position < walk.count and walk.round >= 0 for walk in state.walks):
        raise GuestMemoryError("the device state has a walk that stands outside of its pages")
    return state


class PageRules:
    """What a page must hold, for a guest's settings."""

    def __init__(self, settings: GuestSettings) -> None:
        self.seed = settings.seed
        self.filled = settings.fill == "random"
        self._filler = check_words(np.arange(2, TAIL, dtype=np.uint64), 1, settings.seed)

    def filler(self, pages: Words) -> Words:
        return self._filler ^ check_words(pages, 0, ~self.seed)[:, None]

    def wanted(self, pages: Words, counters: Words) -> Words:
        """The check words; zero where a page was never written."""
        words = check_words(pages, counters, self.seed)
        return words if self.filled else np.where(counters == 0, np.uint64(0), words)

    def wrong(self, pages: Words, counters: Words, rows: Words) -> npt.NDArray[np.bool_]:
        wanted = self.wanted(pages, counters)
        bad: npt.NDArray[np.bool_] = (rows[:, 0] != counters) | (rows[:, 1] != wanted) | (rows[:, TAIL] != wanted)
        return bad

    def wrong_filler(self, pages: Words, rows: Words) -> npt.NDArray[np.bool_]:
        middle = rows[:, 2:TAIL]
        if not self.filled:
            used: npt.NDArray[np.bool_] = np.bitwise_or.reduce(middle, axis=1) != 0
            return used
        bad: npt.NDArray[np.bool_] = (middle != self.filler(pages)).any(axis=1)
        return bad

    def describe(self, page: np.uint64, counter: int, row: Words) -> Corruption:
        check = self.wanted(np.array([page], np.uint64), np.array([counter], np.uint64))
        return Corruption(int(page), counter, int(check[0]), int(row[0]), int(row[1]), int(row[TAIL]))


class Walker:
    """Writes and checks one guest's memory: `blocks` are its words, a row a page, in the guest's order."""

    def __init__(self, blocks: Sequence[Words], settings: GuestSettings, walks: list[Walk], batches: int = 0) -> None:
        self.settings = settings
        self.walks = walks
        self.batches = batches
        self.bad_pages = 0
        self.first_bad: Corruption | None = None
        self._rules = PageRules(settings)
        self._blocks = list(blocks)
        self._ends = np.cumsum([len(words) for words in blocks]).tolist()

    def fill(self) -> None:
        """Give every page its filler, unless they are to stay untouched."""
        if not self._rules.filled:
            return
        for words, end in zip(self._blocks, self._ends, strict=True):
            for at in range(0, len(words), _CHECK_PAGES):
                rows = words[at : at + _CHECK_PAGES]
                numbers = np.arange(len(rows), dtype=np.uint64) + np.uint64(end - len(words) + at)
                rows[:, 2:TAIL] = self._rules.filler(numbers)
                check = self._rules.wanted(numbers, np.zeros(len(rows), np.uint64))
                rows[:, 1] = check
                rows[:, TAIL] = check

    def step(self, most: int) -> int:
        """One batch of at most `most` pages; returns how many."""
        walks = self.walks
        hot = len(walks) > 1 and self.batches % (self.settings.hot_batches + 1) != self.settings.hot_batches
        self.batches += 1
        walk = walks[0 if hot else -1]
        pages, before = walk.next(most)
        for words, end in zip(self._blocks, self._ends, strict=True):
            start = end - len(words)
            inside = (pages >= start) & (pages < end)
            numbers = pages if inside.all() else pages[inside]
            if len(numbers):
                first = int(numbers[0]) - start
                rows = numbers - np.uint64(start) if walk.scrambled else slice(first, first + len(numbers))
                self._write(words, rows, numbers, before)
        return len(pages)

    def _write(self, words: Words, rows: slice | Words, numbers: Words, before: int) -> None:
        """Check each page, then add one to it."""
        counters = np.full(len(numbers), before, np.uint64)
        wanted = self._rules.wanted(numbers, counters)
        bad = (words[rows, 0] != counters) | (words[rows, 1] != wanted) | (words[rows, TAIL] != wanted)
        if bad.any():
            worst = int(np.flatnonzero(bad)[0])
            self.bad_pages += int(np.count_nonzero(bad))
            self.first_bad = self.first_bad or self._rules.describe(numbers[worst], before, words[rows][worst])
        counters += np.uint64(1)
        check = self._rules.wanted(numbers, counters)
        words[rows, 0] = counters
        words[rows, 1] = check
        words[rows, TAIL] = check


def check_memory(files: Mapping[str, tuple[int, int]], state_data: bytes) -> GuestCheck:
    """Every word of memory files (block -> (descriptor, bytes), in the guest's order) that nobody writes.

    Reads by pread, which leaves the holes of a memory file holes.
    """
    total = sum(length for _, length in files.values()) // PAGE_BYTES
    state = decode_state(state_data, total)
    expected = np.zeros(total, np.uint64)
    for walk in state.walks:
        expected[walk.first : walk.first + walk.count] = walk.counters()
    rules, bad_pages, worst = PageRules(state.settings), state.bad_pages, state.first_bad
    buffer = np.empty((_CHECK_PAGES, WORDS), np.uint64)
    first_page = 0
    for name, (fd, length) in files.items():
        for offset in range(0, length, buffer.nbytes):
            rows = buffer[: min(length - offset, buffer.nbytes) // PAGE_BYTES]
            if os.preadv(fd, [rows.data.cast("B")], offset) != rows.nbytes:
                raise GuestMemoryError(f"RAM block '{name}' is shorter than {length} bytes")
            numbers = np.arange(len(rows), dtype=np.uint64) + np.uint64(first_page + offset // PAGE_BYTES)
            counters = expected[numbers]
            bad = np.flatnonzero(rules.wrong(numbers, counters, rows) | rules.wrong_filler(numbers, rows))
            bad_pages += len(bad)
            if len(bad) and worst is None:
                worst = rules.describe(numbers[bad[0]], int(counters[bad[0]]), rows[bad[0]])
        first_page += length // PAGE_BYTES
    walk = state.walks[0]
    step_page = int(walk.at(np.array([walk.position], np.uint64))[0])
    lowest = min(int(expected[walk.first : walk.first + walk.count].min()) for walk in state.walks)
    return GuestCheck(total, lowest, step_page, bad_pages, worst)
