"""Guest memory: RAM blocks that are mapped from files, written in runs of pages.

Zero pages are written only where something else was before, so that what the guest never used costs nothing. Files
that may be full are read and written by pread and pwrite: a page that cannot be had is an error then, through the
mapping it is a SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageNumbers, runs_of

Bytes = npt.NDArray[np.uint8]
#: all blocks together; a list of blocks that says more is not a guest's
LARGEST_RAM_BYTES = 64 << 40
#: zero pages are looked for in pieces of this size, which stay in the processor's cache
_SCAN_BYTES = 1 << 20
_ZEROS = memoryview(bytes(1 << 20))
#: more runs are not reserved one by one: the guest stands still meanwhile (about 5 us each)
_MOST_RESERVED_RUNS = 1 << 16
# linux/falloc.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class NoRoom(GuestMemoryError):
    """The disk is full. Nothing is lost: what could not be written can be written again when there is room."""

    @staticmethod
    def means(error: OSError) -> bool:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True, eq=False)
class MappedBlock:
    """One RAM block: `bytes` is all of it, `pages` the same as rows of 4096. `fd` stays its owner's."""

    name: str
    length: int
    fd: int
    mapping: mmap.mmap
    bytes: Bytes
    pages: Bytes


class GuestMemory:
    """The RAM of one guest: a mapping for each block. The descriptors are kept open and closed by `close`.

    `written` are the pages that have been placed with contents or as zero. Different threads may place different
    pages at the same time; the sets are only exact for pages that one thread at a time places.
    """

    def __init__(self, files: Mapping[str, tuple[int, int]], *, writable: bool = True) -> None:
        """`files`: block name -> (descriptor, length in bytes); the descriptors are owned from here on."""
        self.blocks: dict[str, MappedBlock] = {}
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            for name, (fd, length) in files.items():
                if length <= 0 or length % PAGE_BYTES:
                    raise GuestMemoryError(f"RAM block '{name}' of {length} bytes is not whole pages")
                mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, access)
                view = np.frombuffer(mapping, np.uint8)
                self.blocks[name] = MappedBlock(name, length, fd, mapping, view, view.reshape(-1, PAGE_BYTES))
        except (OSError, GuestMemoryError) as error:
            self._descriptors = [fd for fd, _ in files.values()]
            self.close()
            if isinstance(error, GuestMemoryError):
                raise
            raise GuestMemoryError(f"cannot map the guest's memory: {error.strerror or error}") from None
        self._descriptors = [fd for fd, _ in files.values()]
        placed = self.blocks.items() if writable else ()  # nothing is placed in an image that is read, however large
        self._touched = {name: np.zeros(block.length // PAGE_BYTES, np.bool_) for name, block in placed}

    @property
    def lengths(self) -> dict[str, int]:
        return {name: block.length for name, block in self.blocks.items()}

    def block(self, name: str) -> MappedBlock:
        """Raises GuestMemoryError for a block that is not the guest's."""
        found = self.blocks.get(name)
        if found is None:
            raise GuestMemoryError(f"no RAM block '{name}'")
        return found

    def place(self, name: str, pages: PageNumbers, data: memoryview | Bytes) -> None:
        """Write `pages`, whose contents follow one another in `data`."""
        block = self.block(name)
        count = len(pages)
        if not count:
            return
        self._check(block, pages)
        touched = self._touched[name]
        source = data if isinstance(data, memoryview) else data.data
        at = 0
        for first, run in runs_of(pages):
            _write(block, first, source[at * PAGE_BYTES : (at + run) * PAGE_BYTES])
            at += run
        touched[pages] = True

    def room(self, name: str, first_page: int, count: int) -> memoryview:
        """The memory of neighbouring pages, to read a packet straight into it; they count as placed."""
        block = self.block(name)
        if first_page + count > len(block.pages):
            raise GuestMemoryError(f"page {first_page + count - 1} of '{name}', which has {len(block.pages)}")
        self._touched[name][first_page : first_page + count] = True
        found: Bytes = block.bytes[first_page * PAGE_BYTES : (first_page + count) * PAGE_BYTES]
        return found.data

    def zero(self, name: str, pages: PageNumbers) -> None:
        """Make `pages` zero."""
        block = self.block(name)
        if not len(pages):
            return
        self._check(block, pages)
        dirty = pages[self._touched[name][pages]]
        for first, count in runs_of(dirty, len(_ZEROS) // PAGE_BYTES):
            _write(block, first, _ZEROS[: count * PAGE_BYTES])

    def reserve(self, name: str, awaited: npt.NDArray[np.bool_]) -> bool:
        """Room on the disk for the pages that are True. False: this file system cannot promise it. Raises NoRoom."""
        block = self.block(name)
        bounds = np.flatnonzero(np.diff(np.concatenate(([False], awaited, [False]))))
        if len(bounds) > 2 * _MOST_RESERVED_RUNS:
            return False
        for first, end in zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True):
            try:
                _fallocate(block.fd, _KEEP_SIZE, first * PAGE_BYTES, (end - first) * PAGE_BYTES)
            except OSError as error:
                if NoRoom.means(error):
                    raise NoRoom(f"RAM block '{name}': no room for what is still to come: {error.strerror}") from None
                return False
        return True

    def release(self, name: str, pages: PageNumbers) -> None:
        """Make `pages` zero and give their room on the disk back; whatever they held, and reserved ones too."""
        block = self.block(name)
        if not len(pages):
            return
        self._check(block, pages)
        for first, count in runs_of(pages):
            try:
                _fallocate(block.fd, _PUNCH_HOLE | _KEEP_SIZE, first * PAGE_BYTES, count * PAGE_BYTES)
            except OSError:  # a file system without holes
                self.zero(name, np.arange(first, first + count, dtype=np.uint64))

    def touch_what_is_held(self) -> None:
        """For files that somebody else has filled: what is no hole counts as placed."""
        for name, block in self.blocks.items():
            for start, end in holes_and_data(block.fd, block.length):
                self._touched[name][start // PAGE_BYTES : -(-end // PAGE_BYTES)] = True

    def touched(self, name: str) -> npt.NDArray[np.bool_]:
        """For each page whether it was ever placed with contents (it may have become zero since)."""
        return self._touched[name]

    def flush(self) -> None:
        """Everything on the disk (msync, then fsync of each block's file). An error is final: what was lost is lost."""
        for block in self.blocks.values():
            try:
                block.mapping.flush()
                os.fsync(block.fd)
            except OSError as error:
                raise GuestMemoryError(f"RAM block '{block.name}' cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Unmap and close. Arrays that were handed out must not be used any more."""
        blocks, self.blocks = self.blocks, {}
        mappings = [block.mapping for block in blocks.values()]
        del blocks
        for mapping in mappings:
            try:
                mapping.close()
            except BufferError:  # an array of somebody else is alive; the mapping goes with it
                continue
        descriptors, self._descriptors = self._descriptors, []
        for fd in descriptors:
            os.close(fd)

    @staticmethod
    def _check(block: MappedBlock, pages: PageNumbers) -> None:
        if int(pages.max()) >= len(block.pages):
            raise GuestMemoryError(f"page {int(pages.max())} of '{block.name}', which has {len(block.pages)}")


def _write(block: MappedBlock, first_page: int, data: memoryview) -> None:
    """By pwrite, not through the mapping: a full disk is an error then, and not a SIGBUS; new pages come faster too."""
    at = 0
    try:
        while at < len(data):
            at += os.pwrite(block.fd, data[at:], first_page * PAGE_BYTES + at)
    except OSError as error:
        kind = NoRoom if NoRoom.means(error) else GuestMemoryError
        raise kind(
            f"RAM block '{block.name}' cannot be written at {first_page * PAGE_BYTES + at:#x}: {error.strerror}"
        ) from None


def _fallocate(fd: int, mode: int, start_bytes: int, length_bytes: int) -> None:
    """fallocate(2), which Python has only without a mode. Raises OSError."""
    while _libc.fallocate(fd, mode, start_bytes, length_bytes):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def read_block(fd: int, start_bytes: int, into: memoryview) -> None:
    """Fill `into` from a block's file. Raises GuestMemoryError when the file ends before, or cannot be read."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done:]], start_bytes + done)
        except OSError as error:
            raise GuestMemoryError(f"it cannot be read at {start_bytes + done:#x}: {error.strerror}") from None
        if not count:
            raise GuestMemoryError(f"it ends at {start_bytes + done:#x}")
        done += count


def nonzero_pages(block: Bytes, first_page: int = 0, count: int | None = None) -> npt.NDArray[np.bool_]:
    """For each page of a run whether it holds anything else than zeros.

    Three words of each page tell most that hold something (buffer_is_zero does the same); where some page passes, its
    whole MiB is looked at in one pass without copies: picking out single pages would be slower (performance.md 2.2).
    """
    end = len(block) if count is None else (first_page + count) * PAGE_BYTES
    words = block[first_page * PAGE_BYTES : end].view(np.uint64).reshape(-1, PAGE_BYTES // 8)
    found: npt.NDArray[np.bool_] = np.not_equal(words[:, 0] | words[:, 257] | words[:, 511], 0)
    step = _SCAN_BYTES // PAGE_BYTES
    for at in range(0, len(words), step):
        if not found[at : at + step].all():
            np.not_equal(np.bitwise_or.reduce(words[at : at + step], axis=1), 0, out=found[at : at + step])
    return found


def holes_and_data(fd: int, length: int) -> Iterator[tuple[int, int]]:
    """The (start, end) byte ranges of a sparse file that may hold data (SEEK_DATA, SEEK_HOLE); the rest is zero.

    Ascending. Each step walks the file as far as its data goes: to be asked of a whole file, not of its parts.
    """
    at = 0
    while at < length:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        if start >= length:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), length)
        yield start, end
        at = end
