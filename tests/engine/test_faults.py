"""The fault handler with a guest of its own process that runs before its memory is there."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from tests.support.lab import eventually
from tests.support.leftovers import leftovers
from virtmig.engine.faults import FaultBlock, FaultHandler
from virtmig.engine.guest_walk import DeviceState, Walker, first_walks
from virtmig.engine.process_guest import GuestSettings, ProcessGuest
from virtmig.engine.userfault import (
    UFFD_FEATURE_MINOR_SHMEM,
    UFFD_FEATURE_MISSING_SHMEM,
    GuestGone,
    Userfault,
    available,
)
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES

FACTS = available()
pytestmark = pytest.mark.skipif(not FACTS.has(UFFD_FEATURE_MISSING_SHMEM), reason=FACTS.reason)
MINOR = pytest.param(
    True, marks=pytest.mark.skipif(not FACTS.has(UFFD_FEATURE_MINOR_SHMEM), reason="no UFFD_FEATURE_MINOR_SHMEM")
)
both_ways = pytest.mark.parametrize("minor", [MINOR, False], ids=["minor", "missing"])

BLOCKS = {"low": 100 * PAGE_BYTES, "high": 412 * PAGE_BYTES}
PAGES = 512
Request = Callable[[str, int], None]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = leftovers()
    yield
    assert leftovers() == before


def at_rest(settings: GuestSettings, *, pages_written: int) -> tuple[dict[str, np.ndarray], bytes]:
    """The memory and the device state of a guest that stands still at a source, made without a process."""
    memory = {name: np.zeros((length // PAGE_BYTES, 512), np.uint64) for name, length in BLOCKS.items()}
    walker = Walker(list(memory.values()), settings, first_walks(settings, PAGES))
    walker.fill()
    written = 0
    while written < pages_written:
        written += walker.step(settings.batch_pages)
    state = DeviceState(settings, walker.walks, walker.batches, 1, 0, 0, written, 0, None, "another boot")
    return memory, msgspec.msgpack.encode(state)


class Postcopy:
    """A source at rest, and a destination that has its state, none of its memory, and waits to run."""

    def __init__(self, stack: contextlib.ExitStack, minor: bool, settings: GuestSettings) -> None:
        self.minor = minor
        self.memory, self.state = at_rest(settings, pages_written=700)
        self.guest = stack.enter_context(ProcessGuest.incoming(BLOCKS))
        self.guest.load(self.state)
        self.watch: Userfault = stack.enter_context(contextlib.closing(self.guest.arm_postcopy(minor=minor)))

    def handler(self, request: Request, **options: object) -> FaultHandler:
        blocks = [
            FaultBlock(name, address, length, self.guest.memfds[name] if self.minor else None)
            for name, (address, length) in self.guest.ranges.items()
        ]
        return FaultHandler(self.watch, blocks, request, pid=self.guest.pid, **options)  # type: ignore[arg-type]

    def read(self, block: str, first: int, count: int = 1) -> bytes:
        return self.memory[block][first : first + count].tobytes()

    def place_all(self, handler: FaultHandler, most: int = 16) -> None:
        for block, length in BLOCKS.items():
            for first in range(0, length // PAGE_BYTES, most):
                handler.place(block, first, self.read(block, first, min(most, length // PAGE_BYTES - first)))


@contextlib.contextmanager
def postcopy(minor: bool, settings: GuestSettings | None = None) -> Iterator[Postcopy]:
    with contextlib.ExitStack() as stack:
        yield Postcopy(stack, minor, settings or GuestSettings(pattern="random", fill="random", batch_pages=8))


@both_ways
class TestPostcopy:
    def test_all_pages_on_demand(self, minor: bool) -> None:
        asked: list[tuple[str, int]] = []
        with postcopy(minor) as run:

            def request(block: str, page: int) -> None:
                asked.append((block, page))
                assert handler.place(block, page, run.read(block, page)) == 1

            handler = run.handler(request)
            with handler:
                assert handler.remaining_pages == PAGES
                run.guest.resume()
                eventually(lambda: handler.remaining_pages == 0, "all pages")
            assert handler.failure is None
            assert sorted(asked) == sorted(
                (name, page) for name in BLOCKS for page in range(BLOCKS[name] // PAGE_BYTES)
            )
            stats = handler.stats()
            assert (stats.faults, stats.requests, stats.placed_pages, stats.duplicates) == (PAGES, PAGES, PAGES, 0)
            assert 0 < stats.p50_us <= stats.p99_us <= stats.max_us
            assert run.guest.check().ok
            assert handler.outstanding() == []

    def test_in_the_background_while_answers_come_in_between(self, minor: bool) -> None:
        answers: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        with postcopy(minor, GuestSettings(pattern="sequential", batch_pages=4)) as run:
            handler = run.handler(lambda block, page: answers.put((block, page)), busy_poll_us=50)

            def answer() -> None:
                while (wanted := answers.get()) is not None:
                    block, page = wanted
                    handler.place(block, page, run.read(block, page))

            thread = threading.Thread(target=answer)
            thread.start()
            with handler:
                run.guest.resume()
                eventually(lambda: handler.stats().faults > 20, "faults")
                run.place_all(handler)
                answers.put(None)
                thread.join()
                assert handler.remaining_pages == 0
                eventually(lambda: run.guest.pages_written > 700 + 2 * PAGES, "another round")
            assert handler.failure is None
            stats = handler.stats()
            assert stats.placed_pages == PAGES
            assert stats.duplicates > 0
            assert run.guest.check().ok
            run.watch.close()
            goal = run.guest.pages_written + PAGES
            eventually(lambda: run.guest.pages_written > goal, "a life after postcopy")
            assert run.guest.check().ok

    def test_what_comes_again_never_undoes_the_guest_s_writes(self, minor: bool) -> None:
        with postcopy(minor) as run, run.handler(lambda block, page: None) as handler:
            run.place_all(handler)
            assert handler.stats().duplicates == 0
            run.guest.resume()
            goal = run.guest.pages_written + 2 * PAGES
            eventually(lambda: run.guest.pages_written > goal, "two rounds")
            run.place_all(handler, most=64)
            assert handler.place("low", 0, None, 100) == 0
            assert handler.stats().duplicates == PAGES + 100
            assert run.guest.check().ok

    def test_only_the_missing_ones_of_a_run_are_placed(self, minor: bool) -> None:
        with postcopy(minor) as run, run.handler(lambda block, page: None) as handler:
            for page in (3, 4, 9):
                assert handler.place("high", page, run.read("high", page)) == 1
            assert handler.place("high", 0, run.read("high", 0, 12)) == 9
            assert handler.missing("high").tolist() == list(range(12, 412))
            assert handler.stats().duplicates == 3
            run.place_all(handler)
            run.guest.resume()
            assert run.guest.check().ok

    def test_zero_pages_are_there_and_can_be_written(self, minor: bool) -> None:
        """Of a guest that never ran, all pages are zero; one request each all the same."""
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(ProcessGuest.incoming(BLOCKS))
            guest.load(at_rest(GuestSettings(), pages_written=0)[1])
            watch = stack.enter_context(contextlib.closing(guest.arm_postcopy(minor=minor)))
            blocks = [
                FaultBlock(n, a, length, guest.memfds[n] if minor else None) for n, (a, length) in guest.ranges.items()
            ]
            handler = FaultHandler(watch, blocks, lambda block, page: handler.place(block, page, None) and None)
            with handler:
                assert handler.place("high", 400, None, 12) == 12
                guest.resume()
                eventually(lambda: handler.remaining_pages == 0, "all pages")
            assert handler.stats().requests == PAGES - 12
            assert guest.check().ok

    def test_stopped_with_a_waiting_guest_and_taken_up_by_the_next(self, minor: bool) -> None:
        asked: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        with postcopy(minor) as run:
            handler = run.handler(lambda block, page: asked.put((block, page)))
            handler.start()
            run.guest.resume()
            first = asked.get(timeout=10)
            assert handler.outstanding() == [first]
            handler.stop()
            handler.stop()
            handler.start()
            assert handler.outstanding() == [first]  # asked for once; a new connection has to ask again
            run.place_all(handler)
            assert handler.outstanding() == []
            assert run.guest.check().ok
            handler.stop()

    def test_a_guest_that_ends_is_a_failure_and_leaves_its_pages_missing(self, minor: bool) -> None:
        told: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        with postcopy(minor) as run, run.handler(lambda block, page: None, failed=told.put) as handler:
            run.guest.resume()
            eventually(handler.outstanding, "a fault")
            os.kill(run.guest.pid, signal.SIGKILL)
            failure = told.get(timeout=10)
            assert isinstance(failure, GuestGone)
            assert handler.failure is failure
            eventually(lambda: not run.guest.alive, "its end")
            (block, page), *_ = handler.outstanding()
            with pytest.raises(GuestMemoryError):
                handler.place(block, page, None)
            assert handler.outstanding() == [(block, page)]
            assert page in handler.missing(block)
            assert handler.remaining_pages == PAGES

    def test_a_request_that_raises_ends_the_thread(self, minor: bool) -> None:
        def request(block: str, page: int) -> None:
            raise RuntimeError("out of order")

        with postcopy(minor) as run, run.handler(request) as handler:
            run.guest.resume()
            eventually(lambda: handler.failure is not None, "the failure")
            assert str(handler.failure) == "out of order"
            assert len(handler.outstanding()) == 1


@pytest.mark.skipif(not FACTS.has(UFFD_FEATURE_MINOR_SHMEM), reason="no UFFD_FEATURE_MINOR_SHMEM")
class TestMemoryFile:
    def test_pages_that_precopy_brought_are_mapped_without_asking(self) -> None:
        asked: list[int] = []
        with postcopy(True) as run:
            os.pwrite(run.guest.memfds["high"], run.read("high", 0, 412), 0)
            os.pwrite(run.guest.memfds["low"], b"stale" * 4096, 0)  # sent once, and written since

            def request(block: str, page: int) -> None:
                assert block == "low"
                asked.append(page)
                handler.place(block, page, run.read(block, page))

            handler = run.handler(request)
            handler.mark_present("high", np.arange(412, dtype=np.uint64))
            handler.mark_present("high", np.arange(0, dtype=np.uint64))
            assert handler.remaining_pages == 100
            with handler:
                run.guest.resume()
                eventually(lambda: handler.remaining_pages == 0, "all pages")
                goal = run.guest.pages_written + PAGES
                eventually(lambda: run.guest.pages_written > goal, "a round")
            assert sorted(asked) == list(range(100))
            assert run.guest.check().ok
            with pytest.raises(GuestMemoryError, match="page 412 of 'high'"):
                handler.mark_present("high", np.array([412], np.uint64))

    def test_what_the_guest_had_mapped_before_shows_no_more(self) -> None:
        """It ran here, its memory was replaced behind its back, and it is armed: every page faults again."""
        with postcopy(True) as run:
            run.watch.close()
            copied = {name: run.read(name, 0, length // PAGE_BYTES) for name, length in BLOCKS.items()}
            for name, data in copied.items():
                os.pwrite(run.guest.memfds[name], data, 0)
            run.guest.resume()
            goal = run.guest.pages_written + PAGES
            eventually(lambda: run.guest.pages_written > goal, "a round")
            run.guest.pause()
            run.guest.load(run.state)
            run.watch = run.guest.arm_postcopy()
            handler = run.handler(lambda block, page: handler.place(block, page, run.read(block, page)) and None)
            with handler, contextlib.closing(run.watch):
                run.guest.resume()
                eventually(lambda: handler.remaining_pages == 0, "all pages")
                assert run.guest.check().ok

    def test_received_straight_into_the_file(self) -> None:
        with postcopy(True) as run:
            mapping = mmap.mmap(run.guest.memfds["low"], BLOCKS["low"])
            memory = np.frombuffer(mapping, np.uint8)
            (low, _), (high, length) = run.guest.ranges["low"], run.guest.ranges["high"]
            blocks = [
                FaultBlock("low", low, BLOCKS["low"], run.guest.memfds["low"], memory),
                FaultBlock("high", high, length, run.guest.memfds["high"]),
            ]
            handler = FaultHandler(run.watch, blocks, lambda block, page: None)
            with handler:
                assert handler.claim("high", 0, 4) is None  # no mapping of it here
                run.guest.resume()
                eventually(handler.outstanding, "a fault")
                where = handler.claim("low", 0, 100)
                assert where is not None
                assert handler.claim("low", 99, 1) is None
                assert handler.place("low", 5, bytes(PAGE_BYTES)) == 0  # somebody else is at it
                where[:PAGE_BYTES] = b"x" * PAGE_BYTES
                del where
                handler.abandon("low", 0, 100)
                assert len(handler.missing("low")) == 100
                where = handler.claim("low", 0, 100)
                assert where is not None
                where[:] = run.read("low", 0, 100)
                del where
                handler.publish("low", 0, 100)
                assert len(handler.missing("low")) == 0
                handler.place("high", 0, run.read("high", 0, 412))
                assert run.guest.check().ok
            del memory, blocks, handler
            mapping.close()

    def test_a_page_that_is_taken_away_again_is_mapped_again(self) -> None:
        """As swapping does: the file keeps the page, the guest's mapping loses it."""
        with postcopy(True) as run, run.handler(lambda block, page: None) as handler:
            run.place_all(handler)
            run.guest.resume()
            run.guest.pause()
            faults = handler.stats().faults
            libc = ctypes.CDLL(None, use_errno=True)
            process = os.pidfd_open(run.guest.pid)
            address, length = run.guest.ranges["high"]
            vector = (ctypes.c_uint64 * 2)(address, length)
            madv_pageout, nr_process_madvise = 21, 440
            if libc.syscall(nr_process_madvise, process, ctypes.byref(vector), 1, madv_pageout, 0) < 0:
                os.close(process)
                pytest.skip("process_madvise(MADV_PAGEOUT) is refused here")
            os.close(process)
            run.guest.resume()
            goal = run.guest.pages_written + PAGES
            eventually(lambda: run.guest.pages_written > goal, "a round")
            assert run.guest.check().ok
            assert handler.failure is None
            assert handler.stats().faults > faults  # how many of them is the kernel's choice


class TestPrivateMemory:
    def test_anonymous_memory_of_several_threads(self) -> None:
        """Two threads wait for one page: it is asked for once, and both go on."""
        with contextlib.closing(mmap.mmap(-1, 8 * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as mapping:
            address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
            asked: queue.SimpleQueue[int] = queue.SimpleQueue()
            with Userfault.open() as watch:
                watch.register(address, 8 * PAGE_BYTES, missing=True)
                block = FaultBlock("ram", address, 8 * PAGE_BYTES, None)
                with FaultHandler(watch, [block], lambda _, page: asked.put(page)) as handler:
                    threads = [
                        threading.Thread(target=ctypes.memset, args=(address + 2 * PAGE_BYTES + at, 7, 1))
                        for at in range(4)
                    ]
                    for thread in threads:
                        thread.start()
                    assert asked.get(timeout=10) == 2
                    eventually(lambda: handler.stats().faults == 4, "four faults")
                    handler.place("ram", 1, b"\x01" * 3 * PAGE_BYTES)
                    for thread in threads:
                        thread.join(10)
                    handler.place("ram", 4, None, 4)
                    assert asked.empty()
                    stats = handler.stats()
                    assert (stats.requests, stats.placed_pages, stats.remaining_pages) == (1, 7, 1)
                handler.place("ram", 0, None)
            assert mapping[2 * PAGE_BYTES : 2 * PAGE_BYTES + 6] == b"\x07\x07\x07\x07\x01\x01"
            assert mapping[4 * PAGE_BYTES :] == bytes(4 * PAGE_BYTES)

    def test_a_fault_outside_of_every_block_is_a_failure(self) -> None:
        with contextlib.closing(mmap.mmap(-1, 2 * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as mapping:
            address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
            watch = Userfault.open()
            watch.register(address, 2 * PAGE_BYTES, missing=True)
            block = FaultBlock("ram", address, PAGE_BYTES, None)
            with FaultHandler(watch, [block], lambda _, page: None) as handler:
                thread = threading.Thread(target=ctypes.memset, args=(address + PAGE_BYTES, 7, 1))
                thread.start()
                eventually(lambda: handler.failure is not None, "the failure")
                assert "in no RAM block" in str(handler.failure)
            watch.close()
            thread.join(10)
            assert not thread.is_alive()


class TestRefusals:
    @pytest.fixture
    def handler(self) -> Iterator[FaultHandler]:
        with Userfault.open() as watch:
            yield FaultHandler(watch, [FaultBlock("ram", 1 << 20, 8 * PAGE_BYTES, None)], lambda block, page: None)

    def test_pages_that_are_not_the_guest_s(self, handler: FaultHandler) -> None:
        for wrong in (
            lambda: handler.place("rom", 0, None),
            lambda: handler.place("ram", 8, None),
            lambda: handler.place("ram", 7, bytes(2 * PAGE_BYTES)),
            lambda: handler.place("ram", -1, None),
            lambda: handler.place("ram", 0, None, -1),
            lambda: handler.place("ram", 0, bytes(PAGE_BYTES + 1)),
            lambda: handler.claim("ram", 5, 4),
            lambda: handler.missing("rom"),
        ):
            with pytest.raises(GuestMemoryError):
                wrong()
        assert handler.remaining_pages == 8
        assert handler.stats().p50_us is None

    def test_a_placing_that_fails_leaves_the_pages_missing(self, handler: FaultHandler) -> None:
        with pytest.raises(GuestMemoryError, match="UFFDIO_COPY"):
            handler.place("ram", 2, bytes(2 * PAGE_BYTES))  # nothing is registered there
        assert handler.missing("ram").tolist() == list(range(8))
        assert handler.stats().placed_pages == 0

    @pytest.mark.parametrize("failing", ["eventfd", "pidfd_open"])
    def test_a_start_that_fails_leaves_nothing(
        self, handler: FaultHandler, failing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> int:
            raise OSError(24, "Too many open files")

        handler._pid = os.getpid()
        monkeypatch.setattr(os, failing, refuse)
        with pytest.raises(GuestMemoryError, match="cannot start the fault handler"):
            handler.start()
        monkeypatch.undo()
