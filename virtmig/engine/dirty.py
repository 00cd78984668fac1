"""Which pages a process wrote since last asked: userfaultfd's asynchronous write protection, read by PAGEMAP_SCAN.

The tracked process registers its memory (`watch_writes`); anybody who may trace it then takes the written pages and
protects them again in one call (`WriteTracker`). Nobody waits: the kernel itself lifts the protection at a write.

Seen: writes through the tracked process's own mappings, by itself or by the kernel for it (read(2) into the memory).
Anonymous memory and memory files mapped shared or private work, pages that were never touched included. Not seen:
writes through another mapping of the same memory file, and what a device does to pages it has pinned.
A page that the process only read for the first time may be reported too; a written one is never left out.

Linux 6.7: include/uapi/linux/fs.h (struct pm_scan_arg), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from virtmig.engine.userfault import (
    UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED,
    GuestGone,
    Userfault,
    available,
    feature_names,
)
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageNumbers, PageSet

PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1

#: WP_UNPOPULATED: pages that are not there yet can be protected as well, so that their first write shows
TRACKING_FEATURES = (
    UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC
)

#: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, _mask, _anyof_mask, return_mask
_PM_SCAN_ARG = struct.Struct("=12Q")
_WALK_END = 4
#: struct page_region for one call. The kernel collects 512 at a time (PAGEMAP_WALK_SIZE); asked for more, it goes on
#: after the first 512 but still returns where those ended (walk_end, seen on 6.18), and the rest is scanned twice.
_REGIONS = 512

#: rows of (first page, how many), ascending
Runs = npt.NDArray[np.uint64]


class TrackingFacts(msgspec.Struct, frozen=True):
    """Whether writes can be tracked here, tried out on a page of each kind of memory."""

    available: bool
    reason: str
    hint: str = ""
    anonymous: bool = False
    shared_file: bool = False


def watch_writes(ranges: Iterable[tuple[int, int]]) -> Userfault:
    """Register (address, length) ranges of this process. Tracking lasts as long as what is returned is open."""
    watch = Userfault.open(TRACKING_FEATURES)
    try:
        for start, length in ranges:
            watch.register(start, length, wp=True)
    except BaseException:
        watch.close()
        raise
    return watch


class WriteTracker:
    """Takes the written pages of another process, or of this one. `blocks`: name -> (address there, bytes).

    `take` and `peek` belong to one thread. Pages that were written before the first `start` (or `take`) are nobody's
    promise: whoever copies memory starts the tracker first and copies everything after that once.
    An error while taking means that the answer is lost: everything has to be copied again.
    """

    def __init__(self, pid: int, blocks: Mapping[str, tuple[int, int]]) -> None:
        self._blocks = dict(blocks)
        self._regions = np.empty((_REGIONS, 3), np.uint64)
        self._pagemap = self._process = -1
        try:
            self._process = os.pidfd_open(pid)
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except ProcessLookupError:
            self.close()
            raise GuestGone(f"no process {pid}") from None
        except OSError as error:
            self.close()
            raise GuestMemoryError(
                f"cannot read the page map of process {pid}: {error.strerror}",
                hint="the same user, or CAP_SYS_PTRACE and a kernel without yama's restriction",
            ) from None

    def close(self) -> None:
        """The memory stays registered; that belongs to who holds what `watch_writes` returned."""
        for fd in (self._pagemap, self._process):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._process = -1

    def __enter__(self) -> WriteTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Protect everything, forget what was written before."""
        for name in self._blocks:
            self.take_range(name)

    def take(self) -> dict[str, Runs]:
        """The pages written since last taken, for each block; they are protected again in the same step."""
        return {name: self.take_range(name) for name in self._blocks}

    def take_range(self, block: str, first_page: int = 0, page_count: int | None = None) -> Runs:
        """The same for a part of a block: taken just before it is sent, a page is sent fewer times."""
        return self._scan(block, first_page, page_count, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC)

    def peek(self) -> dict[str, Runs]:
        """What `take` would return, without taking it."""
        return {name: self._scan(name, 0, None, PM_SCAN_CHECK_WPASYNC) for name in self._blocks}

    def _scan(self, block: str, first_page: int, page_count: int | None, flags: int) -> Runs:
        address, length = self._range(block, first_page, page_count)
        at, end = address, address + length
        regions = self._regions
        parts: list[Runs] = []
        while at < end:
            argument = bytearray(
                _PM_SCAN_ARG.pack(
                    *(_PM_SCAN_ARG.size, flags, at, end, 0, regions.ctypes.data, len(regions), 0),
                    # only with exactly these masks the kernel takes its quick path and reports holes alike
                    *(0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN),
                )
            )
            try:
                found = fcntl.ioctl(self._pagemap, PAGEMAP_SCAN, argument)
            except OSError as error:
                self._still_there(block)
                raise GuestMemoryError(
                    f"PAGEMAP_SCAN of '{block}' failed at {at:#x}: {error.strerror}",
                    hint="EPERM: the memory is not registered by watch_writes; ENOTTY: the kernel is older than 6.7",
                ) from None
            if found:
                parts.append(regions[:found, :2].copy())
            walked = _PM_SCAN_ARG.unpack(argument)[_WALK_END]
            if walked <= at:
                raise GuestMemoryError(f"PAGEMAP_SCAN of '{block}' made no progress at {at:#x}")
            at = walked
        self._still_there(block)
        return self._runs(parts, self._blocks[block][0])

    def _still_there(self, block: str) -> None:
        """The page map of a process that has ended is empty and says so without an error."""
        if select.select([self._process], [], [], 0)[0]:
            raise GuestGone(f"the process that held '{block}' has ended")

    def _range(self, block: str, first_page: int, page_count: int | None) -> tuple[int, int]:
        known = self._blocks.get(block)
        if known is None:
            raise GuestMemoryError(f"no RAM block '{block}'")
        address, length = known
        pages = length // PAGE_BYTES
        count = pages - first_page if page_count is None else page_count
        if first_page < 0 or count < 0 or first_page + count > pages:
            raise GuestMemoryError(f"pages {first_page}+{count} of '{block}', which has {pages}")
        return address + first_page * PAGE_BYTES, count * PAGE_BYTES

    @staticmethod
    def _runs(parts: list[Runs], address: int) -> Runs:
        """struct page_region's start and end as pages of the block, ascending; what touches or overlaps becomes one."""
        if not parts:
            return np.empty((0, 2), np.uint64)
        bounds = (np.concatenate(parts) - np.uint64(address)) // np.uint64(PAGE_BYTES)
        bounds = bounds[np.argsort(bounds[:, 0], kind="stable")]
        reach = np.maximum.accumulate(bounds[:, 1])
        breaks = np.flatnonzero(bounds[1:, 0] > reach[:-1])
        first = bounds[np.concatenate(([0], breaks + 1)), 0]
        last = reach[np.concatenate((breaks, [len(bounds) - 1]))]
        return np.stack((first, last - first), axis=1)


def page_count(runs: Runs) -> int:
    return int(runs[:, 1].sum())


def pages_of(runs: Runs) -> PageNumbers:
    """Every page of the runs, ascending."""
    counts = runs[:, 1].astype(np.int64)
    if not len(counts):
        return np.empty(0, np.uint64)
    before = np.cumsum(counts) - counts
    return np.repeat(runs[:, 0] - before.astype(np.uint64), counts) + np.arange(counts.sum(), dtype=np.uint64)


def add_runs(pages: PageSet, taken: Mapping[str, Runs]) -> None:
    """Add what `take` returned to a set of pages."""
    for block, runs in taken.items():
        for first, count in runs.tolist():
            pages.add_range(block, first * PAGE_BYTES, count * PAGE_BYTES)


def tracking_available() -> TrackingFacts:
    """Write one page of each kind of memory and see whether just that page is reported."""
    facts = available()
    if not facts.available:
        return TrackingFacts(False, facts.reason, facts.hint)
    if not facts.has(TRACKING_FEATURES):
        missing = ", ".join(feature_names(TRACKING_FEATURES & ~facts.features))
        return TrackingFacts(False, f"userfaultfd of this kernel lacks {missing}", "Linux 6.7 or newer on x86-64")
    anonymous, reason, hint = _try_out(-1)
    fd = os.memfd_create("virtmig-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 2 * PAGE_BYTES)
        shared, shared_reason, shared_hint = _try_out(fd)
    finally:
        os.close(fd)
    if anonymous and shared:
        return TrackingFacts(True, "written pages are tracked by PAGEMAP_SCAN", "", True, True)
    kinds = "memory files" if anonymous else "anonymous memory"
    return TrackingFacts(False, f"{kinds}: {reason or shared_reason}", hint or shared_hint, anonymous, shared)


def _try_out(fd: int) -> tuple[bool, str, str]:
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with contextlib.closing(mmap.mmap(fd, 2 * PAGE_BYTES, flags)) as memory:
        memory[0] = 1
        view = np.frombuffer(memory, np.uint8)
        address = int(view.ctypes.data)
        del view
        try:
            with (
                watch_writes([(address, 2 * PAGE_BYTES)]),
                WriteTracker(os.getpid(), {"probe": (address, 2 * PAGE_BYTES)}) as tracker,
            ):
                tracker.start()
                memory[PAGE_BYTES] = 1
                seen = tracker.take()["probe"].tolist()
        except GuestMemoryError as error:
            return False, error.message, error.hint
    return seen == [[1, 1]], f"a write to one page was reported as {seen}", ""
