"""Write tracking against this kernel: exactly the written pages, each once, and none lost while somebody writes."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.leftovers import leftovers
from virtmig.engine import dirty, userfault
from virtmig.engine.dirty import Runs, WriteTracker, add_runs, page_count, pages_of, tracking_available, watch_writes
from virtmig.engine.guest_walk import check_memory
from virtmig.engine.process_guest import GuestSettings, ProcessGuest
from virtmig.engine.userfault import GuestGone, UserfaultFacts
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageSet

FACTS = tracking_available()
pytestmark = pytest.mark.skipif(not FACTS.available, reason=FACTS.reason)
PAGES = 2048  # four page tables of 512
KINDS = ("anonymous", "shared file", "private file")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = leftovers()
    yield
    assert leftovers() == before


@contextlib.contextmanager
def memory(kind: str, *, populated: bool = True) -> Iterator[tuple[np.ndarray, int]]:
    """(rows of pages, address)"""
    fd = -1
    if kind != "anonymous":
        fd = os.memfd_create("virtmig-test", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGES * PAGE_BYTES)
    flags = {
        "anonymous": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        "shared file": mmap.MAP_SHARED,
        "private file": mmap.MAP_PRIVATE,
    }[kind]
    mapping = mmap.mmap(fd, PAGES * PAGE_BYTES, flags)
    rows = np.frombuffer(mapping, np.uint8).reshape(-1, PAGE_BYTES)
    if populated:
        rows[:, 0] = 1
    try:
        yield rows, int(rows.ctypes.data)
    finally:
        if fd >= 0:
            os.close(fd)
        del rows


@contextlib.contextmanager
def tracked(address: int) -> Iterator[WriteTracker]:
    length = PAGES * PAGE_BYTES
    with watch_writes([(address, length)]), WriteTracker(os.getpid(), {"ram": (address, length)}) as tracker:
        tracker.start()
        yield tracker


@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    def test_exactly_the_written_pages_and_only_once(self, kind: str) -> None:
        with memory(kind) as (rows, address), tracked(address) as tracker:
            assert tracker.take()["ram"].tolist() == []
            rows[5, 17] = 9
            rows[510:515, 4095] = 9  # over the end of a page table
            rows[PAGES - 1, 0] = 9
            expected = [[5, 1], [510, 5], [PAGES - 1, 1]]
            assert tracker.peek()["ram"].tolist() == expected
            assert tracker.take()["ram"].tolist() == expected
            assert tracker.take()["ram"].tolist() == []
            rows[512, 1] = 8
            assert tracker.take()["ram"].tolist() == [[512, 1]]
            rows[:] = 3
            assert tracker.take()["ram"].tolist() == [[0, PAGES]]

    def test_first_writes_into_holes_are_seen(self, kind: str) -> None:
        """In a page table that is not there, and in one that is, protected before and not."""
        with memory(kind, populated=False) as (rows, address):
            rows[600, 0] = 1  # the second page table exists
            with tracked(address) as tracker:
                assert tracker.take()["ram"].tolist() == []
                for page in (601, 1300, 1301, 600, 3):
                    rows[page, 9] = 1
                    assert page in pages_of(tracker.take()["ram"])
                    rows[page, 9] = 2
                    assert tracker.take()["ram"].tolist() == [[page, 1]]

    def test_reading_holes_hides_no_later_write(self, kind: str) -> None:
        with memory(kind, populated=False) as (rows, address), tracked(address) as tracker:
            assert int(rows[::3].sum()) == 0
            tracker.take()
            rows[::3, 1] = 1
            assert set(range(0, PAGES, 3)) <= set(pages_of(tracker.take()["ram"]).tolist())

    def test_more_runs_than_one_call_returns(self, kind: str) -> None:
        with memory(kind) as (rows, address), tracked(address) as tracker:
            for step in (2, 3, 1):
                rows[::step, 0] += 1
                runs = tracker.take()["ram"]
                assert pages_of(runs).tolist() == list(range(0, PAGES, step))
                assert page_count(runs) == len(range(0, PAGES, step))

    def test_no_write_of_a_thread_is_lost(self, kind: str) -> None:
        """A copy that is brought up to date with the taken pages, time and again, ends equal to the memory."""
        generator = np.random.default_rng(3)
        targets = generator.integers(PAGES * PAGE_BYTES, size=4096).tolist()
        stop = threading.Event()
        with memory(kind) as (rows, address), tracked(address) as tracker:

            def write() -> None:
                for turn in itertools.count():
                    ctypes.memset(address + targets[turn % 4096], turn & 255, 1)
                    if stop.is_set():
                        return

            copy = rows.copy()
            writer = threading.Thread(target=write)
            writer.start()
            taken = 0
            for turn in itertools.count():
                if turn >= 300 and taken >= 300:
                    break
                pages = pages_of(tracker.take()["ram"])
                copy[pages] = rows[pages]
                taken += len(pages)
            stop.set()
            writer.join()
            pages = pages_of(tracker.take()["ram"])
            copy[pages] = rows[pages]
            assert np.array_equal(copy, rows)


@pytest.mark.parametrize("pattern", ["sequential", "random", "hot"])
def test_no_write_of_another_process_is_lost(pattern: str) -> None:
    """Hundreds of rounds beside a guest that writes as fast as it can, its memory full of holes at first."""
    blocks = {"low": 4 << 20, "high": 1 << 20}
    settings = GuestSettings(pattern=pattern, hot_pages=200)
    with ProcessGuest.incoming(blocks) as copy, ProcessGuest.start(blocks, settings) as guest:
        guest.track_writes()
        with WriteTracker(guest.pid, guest.ranges) as tracker:
            tracker.start()

            def bring(block: str, runs: Runs) -> None:
                for first, count in runs.tolist():
                    data = os.pread(guest.memfds[block], count * PAGE_BYTES, first * PAGE_BYTES)
                    os.pwrite(copy.memfds[block], data, first * PAGE_BYTES)

            for block, length in blocks.items():
                bring(block, np.array([[0, length // PAGE_BYTES]], np.uint64))
            for turn in itertools.count():
                if turn >= 200 and guest.pages_written > 3000:
                    break
                for block in blocks:
                    bring(block, tracker.take_range(block, *((turn % 4 * 64, 64) if turn % 2 else ())))
            guest.pause()
            for block, runs in tracker.take().items():
                bring(block, runs)
            assert page_count(tracker.take()["low"]) == 0
            state = guest.state()
            files = {name: (copy.memfds[name], length) for name, length in blocks.items()}
            checked = check_memory(files, state)
            assert checked.ok, checked
            assert guest.check().ok
        guest.stop_tracking()
        guest.track_writes()


class TestRanges:
    def test_a_part_is_taken_and_the_rest_stays(self) -> None:
        with memory("shared file") as (rows, address), tracked(address) as tracker:
            rows[100:200, 0] = 5
            assert tracker.take_range("ram", 90, 20).tolist() == [[100, 10]]
            assert tracker.take_range("ram", 150, 0).tolist() == []
            assert tracker.take()["ram"].tolist() == [[110, 90]]

    @pytest.mark.parametrize("part", [(-1, 1), (0, PAGES + 1), (PAGES, 1), (5, -1)])
    def test_outside_of_the_block(self, part: tuple[int, int]) -> None:
        with memory("anonymous") as (_, address), tracked(address) as tracker:
            with pytest.raises(GuestMemoryError, match=f"which has {PAGES}"):
                tracker.take_range("ram", *part)
            with pytest.raises(GuestMemoryError, match="no RAM block 'rom'"):
                tracker.take_range("rom")

    def test_runs_as_pages_and_sets(self) -> None:
        runs = np.array([[3, 2], [9, 1], [500, 3]], np.uint64)
        assert pages_of(runs).tolist() == [3, 4, 9, 500, 501, 502]
        assert len(pages_of(np.empty((0, 2), np.uint64))) == 0
        pages = PageSet({"ram": 600 * PAGE_BYTES})
        add_runs(pages, {"ram": runs})
        assert pages.pages("ram").tolist() == [3, 4, 9, 500, 501, 502]

    def test_regions_that_overlap_are_reported_once(self) -> None:
        """What 6.18 answers when asked for more than 512 regions: the walk's end is that of its first 512."""
        regions = np.array([[0, 2], [4, 6], [6, 8], [2048, 2050], [4, 5], [7, 9], [2048, 2049]], np.uint64)
        parts = [(regions * np.uint64(PAGE_BYTES) + np.uint64(1 << 30))[:4], regions[4:] * PAGE_BYTES + (1 << 30)]
        assert WriteTracker._runs(parts, 1 << 30).tolist() == [[0, 2], [4, 5], [2048, 2]]


class TestRefusals:
    def test_memory_that_is_not_registered(self) -> None:
        with memory("anonymous") as (_, address), WriteTracker(os.getpid(), {"ram": (address, PAGE_BYTES)}) as tracker:
            with pytest.raises(GuestMemoryError, match="PAGEMAP_SCAN of 'ram' failed") as caught:
                tracker.take()
            assert "watch_writes" in caught.value.hint

    def test_a_process_that_has_ended_has_no_clean_pages(self) -> None:
        """The kernel's answer for it is an empty one, without an error."""
        with ProcessGuest.start({"ram": 1 << 20}) as guest:
            guest.track_writes()
            with WriteTracker(guest.pid, guest.ranges) as tracker:
                tracker.start()
                os.kill(guest.pid, 9)
                guest._process.wait()
                with pytest.raises(GuestGone, match="has ended"):
                    tracker.take()

    def test_no_such_process(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        with pytest.raises(GuestGone, match=f"no process {child.pid}"):
            WriteTracker(child.pid, {})

    def test_a_page_map_that_may_not_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(dirty.os, "open", refuse)
        with pytest.raises(GuestMemoryError, match="Permission denied"):
            WriteTracker(os.getpid(), {})
        monkeypatch.undo()

    def test_registering_what_cannot_be_leaves_nothing_open(self) -> None:
        with pytest.raises(GuestMemoryError, match="UFFDIO_REGISTER"):
            watch_writes([(PAGE_BYTES, PAGE_BYTES)])

    def test_why_there_is_no_tracking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        old = UserfaultFacts(True, "", "", dirty.TRACKING_FEATURES & ~userfault.UFFD_FEATURE_WP_ASYNC)
        monkeypatch.setattr(dirty, "available", lambda: old)
        assert "lacks UFFD_FEATURE_WP_ASYNC" in tracking_available().reason
        monkeypatch.setattr(dirty, "available", lambda: UserfaultFacts(False, "not permitted", "ask root"))
        facts = tracking_available()
        assert (facts.available, facts.reason, facts.hint) == (False, "not permitted", "ask root")

    def test_a_kernel_that_reports_nothing_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dirty, "PM_SCAN_WP_MATCHING", 0)
        facts = tracking_available()
        assert not facts.available
        assert "reported as" in facts.reason
