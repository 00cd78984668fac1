"""The destination's side of a page fault: read where the guest waits, ask for the page once, place it when it comes.

The guest's process registered its memory and passed on its userfaultfd. Its faults are read by one thread here, which
asks for a page and never waits for it; any thread places pages. A page is written into the memory file, where the guest
does not see it yet, and then mapped into the guest (UFFDIO_CONTINUE). Without a file (private anonymous memory) it is
copied there (UFFDIO_COPY, UFFDIO_ZEROPAGE). Once the guest has a page it is the guest's: whatever comes again for it is
counted and dropped.
"""

from __future__ import annotations

import bisect
import enum
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from virtmig.engine.userfault import GuestGone, PageExists, Userfault
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageNumbers, runs_of

Bytes = npt.NDArray[np.uint8]

#: the longest a handler may spin for the next fault before it sleeps. Off unless asked for: where another thread of
#: this process places the pages, spinning takes the interpreter lock from it (two cores: 94 us for 90).
BUSY_POLL_MOST_US = 50
#: the newest latencies that are kept for the percentiles
_LATENCIES = 1 << 16
_ZEROS = np.zeros(1 << 20, np.uint8)


class PageState(enum.IntEnum):
    """Of one page, in the order it goes through them; `MISSING` and `REQUESTED` can be placed."""

    MISSING = 0
    REQUESTED = 1  # the guest waits for it, and it was asked for
    PLACING = 2  # somebody is writing it
    PRESENT = 3  # in the memory file, from before postcopy, and not mapped yet: a fault maps it, nobody is asked
    PLACED = 4  # the guest's own


@dataclass(frozen=True, slots=True, eq=False)
class FaultBlock:
    """One RAM block: `address` in the guest's process; its memory file, whose descriptor stays its owner's, or None.

    `memory` is all of the file, mapped here: only who wants to receive into it (`claim`) needs that. Pages are written
    by pwrite, which fills a page that was never there 1.5 times as fast as a store through a mapping.
    """

    name: str
    address: int
    length: int
    fd: int | None
    memory: Bytes | None = None


class FaultStats(msgspec.Struct, frozen=True):
    """`faults` were read, latencies run from there to the page's placing. `duplicates` are pages that came again."""

    faults: int
    requests: int
    placed_pages: int
    duplicates: int
    remaining_pages: int
    p50_us: float | None
    p99_us: float | None
    max_us: float | None


Request = Callable[[str, int], None]
Failed = Callable[[Exception], None]


class FaultHandler:
    """One thread for one userfaultfd, which stays its owner's: stop the handler first, then close it.

    `request(block, page)` is called from that thread, once a page. What it raises ends the thread, as does the end of
    the process `pid`: `failure` then says why, and `failed` is called with it. A broken connection is no reason to
    raise: what the guest waits for stays in `outstanding`, to be asked for again.
    """

    def __init__(
        self,
        userfault: Userfault,
        blocks: Sequence[FaultBlock],
        request: Request,
        *,
        pid: int | None = None,
        failed: Failed | None = None,
        busy_poll_us: int = 0,
    ) -> None:
        self._userfault = userfault
        self._blocks = {block.name: block for block in blocks}
        self._by_address = sorted(blocks, key=lambda block: block.address)
        self._starts = [block.address for block in self._by_address]
        self._request = request
        self._failed = failed
        several_cores = len(os.sched_getaffinity(0)) > 1
        self._busy_poll_ns = min(busy_poll_us, BUSY_POLL_MOST_US) * 1000 if several_cores else 0
        self._lock = threading.Lock()
        self._states = {block.name: np.zeros(block.length // PAGE_BYTES, np.uint8) for block in blocks}
        self._waiting: dict[str, dict[int, int]] = {block.name: {} for block in blocks}
        self._latencies_ns = np.zeros(_LATENCIES, np.int64)
        self._measured = self._longest_ns = 0
        self._faults = self._requests = self._placed = self._duplicates = 0
        self._remaining = sum(len(states) for states in self._states.values())
        self._thread: threading.Thread | None = None
        self._stop_fd = self._process_fd = -1
        self._pid = pid
        self.failure: Exception | None = None

    def start(self) -> None:
        try:
            self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._process_fd = os.pidfd_open(self._pid) if self._pid is not None else -1
            self._thread = threading.Thread(target=self._run, name="virtmig-faults", daemon=True)
            self._thread.start()
        except (OSError, RuntimeError) as error:
            self._thread = None
            self._close()
            raise GuestMemoryError(f"cannot start the fault handler: {error}") from None

    def stop(self) -> None:
        """Faults that come later wait for another handler, or for the userfaultfd's close."""
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            thread.join()
        self._close()

    def __enter__(self) -> FaultHandler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def mark_present(self, block: str, pages: PageNumbers) -> None:
        """Pages that the memory file holds already and that do not change any more."""
        states = self._states_of(block, int(pages.min()) if len(pages) else 0, 0)
        if len(pages) and int(pages.max()) >= len(states):
            raise GuestMemoryError(f"page {int(pages.max())} of '{block}', which has {len(states)}")
        with self._lock:
            fresh = pages[states[pages] == PageState.MISSING]
            states[fresh] = PageState.PRESENT
            self._remaining -= len(fresh)

    def place(self, block: str, first_page: int, data: memoryview | bytes | Bytes | None, page_count: int = 1) -> int:
        """Give the guest neighbouring pages: their contents, or None for `page_count` zero pages.

        Returns how many it did not have yet; the others are dropped and counted.
        Raises GuestGone when there is no guest any more, and GuestMemoryError; the pages in question stay missing then.
        """
        contents = None if data is None else np.frombuffer(data, np.uint8)
        if contents is not None:
            page_count, rest = divmod(len(contents), PAGE_BYTES)
            if rest:
                raise GuestMemoryError(f"{len(contents)} bytes for '{block}' are not whole pages")
        states = self._states_of(block, first_page, page_count)[first_page : first_page + page_count]
        with self._lock:
            wanted = states <= PageState.REQUESTED
            states[wanted] = PageState.PLACING
            fresh = int(np.count_nonzero(wanted))
            self._duplicates += page_count - fresh
        pages = np.flatnonzero(wanted).astype(np.uint64)
        for at, count in runs_of(pages):
            part = None if contents is None else contents[at * PAGE_BYTES : (at + count) * PAGE_BYTES]
            try:
                self._put(self._blocks[block], first_page + at, count, part)
            except BaseException:
                self._give_back(block, pages[pages >= at] + np.uint64(first_page))
                raise
            self._publish(block, first_page + at, count)
        return fresh

    def claim(self, block: str, first_page: int, page_count: int) -> memoryview | None:
        """The memory of these pages to receive into, if all of them are still to come; then `publish` or `abandon`."""
        states = self._states_of(block, first_page, page_count)[first_page : first_page + page_count]
        memory = self._blocks[block].memory
        if memory is None:
            return None
        with self._lock:
            if (states > PageState.REQUESTED).any():
                return None
            states[:] = PageState.PLACING
        return memory[first_page * PAGE_BYTES : (first_page + page_count) * PAGE_BYTES].data

    def publish(self, block: str, first_page: int, page_count: int) -> None:
        """Claimed pages hold their contents now."""
        try:
            self._map(self._blocks[block], first_page, page_count)
        except BaseException:
            self.abandon(block, first_page, page_count)
            raise
        self._publish(block, first_page, page_count)

    def abandon(self, block: str, first_page: int, page_count: int) -> None:
        """Claimed pages that did not come: they are missing again, and `outstanding` where the guest waits."""
        self._give_back(block, np.arange(first_page, first_page + page_count, dtype=np.uint64))

    def outstanding(self) -> list[tuple[str, int]]:
        """Every page the guest waits for: what a new connection has to ask for again."""
        with self._lock:
            return [(name, page) for name, waiting in self._waiting.items() for page in waiting]

    def missing(self, block: str) -> PageNumbers:
        """The pages that have not come."""
        with self._lock:
            return np.flatnonzero(self._states_of(block, 0, 0) < PageState.PRESENT).astype(np.uint64)

    @property
    def remaining_pages(self) -> int:
        return self._remaining

    def stats(self) -> FaultStats:
        with self._lock:
            latencies = self._latencies_ns[: self._measured].copy()
            p50, p99 = (np.percentile(latencies, (50, 99)) / 1000).tolist() if len(latencies) else (None, None)
            return FaultStats(
                faults=self._faults,
                requests=self._requests,
                placed_pages=self._placed,
                duplicates=self._duplicates,
                remaining_pages=self._remaining,
                p50_us=p50,
                p99_us=p99,
                max_us=self._longest_ns / 1000 if self._measured else None,
            )

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self.failure = error
            if self._failed is not None:
                self._failed(error)

    def _serve(self) -> None:
        poller = select.poll()
        for fd in (self._userfault.fd, self._stop_fd, self._process_fd):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._stop_fd in ready:
                return
            if self._process_fd in ready:
                raise GuestGone("the process whose faults were served has ended")
            awake_until = 0
            while True:
                faults = self._userfault.faults()
                now = time.monotonic_ns()
                if faults:
                    self._answer([fault.address for fault in faults], now)
                    awake_until = now + self._busy_poll_ns
                elif now >= awake_until:
                    break

    def _answer(self, addresses: Sequence[int], now_ns: int) -> None:
        wanted: list[tuple[str, int]] = []
        mapped: list[tuple[FaultBlock, int]] = []
        with self._lock:
            self._faults += len(addresses)
            for address in addresses:
                block = self._block_at(address)
                page = (address - block.address) // PAGE_BYTES
                states = self._states[block.name]
                state = states[page]
                if state >= PageState.PRESENT:
                    mapped.append((block, page))
                    continue
                self._waiting[block.name].setdefault(page, now_ns)
                if state == PageState.MISSING:
                    states[page] = PageState.REQUESTED
                    self._requests += 1
                    wanted.append((block.name, page))
        for block, page in mapped:
            self._map_again(block, page, now_ns)
        for name, page in wanted:  # outside of the lock: it may write to a socket, and answers must get in meanwhile
            self._request(name, page)

    def _map_again(self, block: FaultBlock, page: int, now_ns: int) -> None:
        """The page is there: it came before postcopy, or was swapped out, or this fault was read after its placing."""
        if block.fd is None:
            self._userfault.wake(block.address + page * PAGE_BYTES, PAGE_BYTES)
            return
        self._map(block, page, 1)
        with self._lock:
            self._states[block.name][page] = PageState.PLACED
            self._measure(now_ns, time.monotonic_ns())

    def _block_at(self, address: int) -> FaultBlock:
        index = bisect.bisect_right(self._starts, address) - 1
        block = self._by_address[index] if index >= 0 else None
        if block is None or address >= block.address + block.length:
            raise GuestMemoryError(f"a fault at {address:#x}, which is in no RAM block")
        return block

    def _put(self, block: FaultBlock, first_page: int, page_count: int, contents: Bytes | None) -> None:
        address, length = block.address + first_page * PAGE_BYTES, page_count * PAGE_BYTES
        if block.fd is not None:
            _write(block.fd, first_page * PAGE_BYTES, length, contents)
            self._map(block, first_page, page_count)
        elif contents is not None:
            self._userfault.copy(address, int(contents.ctypes.data), length)
        else:
            self._userfault.zeropage(address, length)

    def _map(self, block: FaultBlock, first_page: int, page_count: int) -> None:
        """UFFDIO_CONTINUE; what is mapped already is stepped over, and whoever waits there is woken."""
        at, end = block.address + first_page * PAGE_BYTES, block.address + (first_page + page_count) * PAGE_BYTES
        while at < end:
            try:
                self._userfault.continue_(at, end - at)
                return
            except PageExists as error:
                at += error.done_bytes
                self._userfault.wake(at, PAGE_BYTES)
                at += PAGE_BYTES

    def _publish(self, block: str, first_page: int, page_count: int) -> None:
        now_ns = time.monotonic_ns()
        with self._lock:
            self._states[block][first_page : first_page + page_count] = PageState.PLACED
            self._placed += page_count
            self._remaining -= page_count
            waiting = self._waiting[block]
            if not waiting:
                return
            end = first_page + page_count
            few = range(first_page, end) if page_count < len(waiting) else tuple(waiting)
            for page in few:
                if first_page <= page < end and (since_ns := waiting.pop(page, None)) is not None:
                    self._measure(since_ns, now_ns)

    def _give_back(self, block: str, pages: PageNumbers) -> None:
        """Pages that are PLACING by the caller and could not be placed."""
        with self._lock:
            states, waiting = self._states[block], self._waiting[block]
            for page in pages.tolist():
                states[page] = PageState.REQUESTED if page in waiting else PageState.MISSING

    def _measure(self, since_ns: int, now_ns: int) -> None:
        self._latencies_ns[self._measured % _LATENCIES] = now_ns - since_ns
        self._measured += 1
        self._longest_ns = max(self._longest_ns, now_ns - since_ns)

    def _states_of(self, block: str, first_page: int, page_count: int) -> npt.NDArray[np.uint8]:
        states = self._states.get(block)
        if states is None:
            raise GuestMemoryError(f"no RAM block '{block}'")
        if first_page < 0 or page_count < 0 or first_page + page_count > len(states):
            raise GuestMemoryError(f"pages {first_page}+{page_count} of '{block}', which has {len(states)}")
        return states

    def _close(self) -> None:
        for fd in (self._stop_fd, self._process_fd):
            if fd >= 0:
                os.close(fd)
        self._stop_fd = self._process_fd = -1


def _write(fd: int, offset: int, length: int, contents: Bytes | None) -> None:
    """All of `contents`, or that many zeros: a page that never was must be there before it can be mapped."""
    done = 0
    while done < length:
        piece = (_ZEROS[: length - done] if contents is None else contents[done:]).data
        try:
            done += os.pwrite(fd, piece, offset + done)
        except OSError as error:
            raise GuestMemoryError(f"cannot write the guest's memory: {error.strerror}") from None
