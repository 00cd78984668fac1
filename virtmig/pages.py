"""Pages of a guest, many at a time: runs, batches and sets. Page numbers count target pages from a RAM block's start.

PageRun     neighbouring pages of one block and their contents
PageBatch   any pages of one block: those with contents, and apart from them the zero ones
PageSet     which pages of each block: received, missing, dirty; as bitmaps, QEMU's own way
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from virtmig.errors import GuestMemoryError

PAGE_BYTES = 4096
PageNumbers = npt.NDArray[np.uint64]

_NONE: PageNumbers = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Neighbouring pages: `first_page` is a page number, `data` whole pages. Whoever made it owns it."""

    block: str
    first_page: int
    data: memoryview

    @property
    def page_count(self) -> int:
        return len(self.data) // PAGE_BYTES

    @property
    def offset_bytes(self) -> int:
        """Where the run begins in its block."""
        return self.first_page * PAGE_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class PageBatch:
    """Pages of one block. `data` holds the contents of `pages` one behind the other, in that order."""

    block: str
    pages: PageNumbers
    data: memoryview
    zero_pages: PageNumbers = field(default_factory=lambda: _NONE)

    def __post_init__(self) -> None:
        if len(self.data) != len(self.pages) * PAGE_BYTES:
            raise GuestMemoryError(f"{len(self.pages)} pages of '{self.block}' with {len(self.data)} bytes of contents")

    @property
    def page_count(self) -> int:
        """All pages, with contents and zero."""
        return len(self.pages) + len(self.zero_pages)

    def runs(self, longest_pages: int = 1 << 20) -> Iterator[PageRun]:
        """The pages with contents as runs of at most `longest_pages`, in the batch's order, sharing its memory."""
        at = 0
        for first, count in runs_of(self.pages, longest_pages):
            yield PageRun(self.block, first, self.data[at * PAGE_BYTES : (at + count) * PAGE_BYTES])
            at += count


def runs_of(pages: PageNumbers, longest: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Neighbouring page numbers as (first, count), in the order given, none longer than `longest`."""
    if not len(pages):
        return
    cuts = np.flatnonzero(pages[1:] - pages[:-1] != 1) + 1
    starts = pages[np.concatenate(([0], cuts))].tolist()
    counts = np.diff(np.concatenate(([0], cuts, [len(pages)]))).tolist()
    for start, count in zip(starts, counts, strict=True):
        for first in range(start, start + count, longest):
            yield first, min(longest, start + count - first)


class PageSet:
    """A set of pages over the blocks of a guest. `blocks` are their used lengths in bytes.

    Raises GuestMemoryError for a block it does not have and for pages outside of a block.
    """

    def __init__(self, blocks: Mapping[str, int]) -> None:
        self._bits = {name: np.zeros(length // PAGE_BYTES, np.bool_) for name, length in blocks.items()}

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(self._bits)

    def add(self, block: str, pages: PageNumbers) -> int:
        """How many of them were new."""
        bits = self._of(block, pages)
        before = int(np.count_nonzero(bits))
        bits[pages] = True
        return int(np.count_nonzero(bits)) - before

    def discard(self, block: str, pages: PageNumbers) -> None:
        self._of(block, pages)[pages] = False

    def add_range(self, block: str, start_bytes: int, length_bytes: int) -> None:
        self._range(block, start_bytes, length_bytes)[:] = True

    def discard_range(self, block: str, start_bytes: int, length_bytes: int) -> None:
        """What POSTCOPY_RAM_DISCARD says of a (start, length) pair."""
        self._range(block, start_bytes, length_bytes)[:] = False

    def among(self, block: str, pages: PageNumbers) -> npt.NDArray[np.bool_]:
        """For each of `pages` whether it is in the set."""
        return self._of(block, pages)[pages]

    def __contains__(self, page: tuple[str, int]) -> bool:
        block, number = page
        bits = self._bits.get(block)
        return bits is not None and 0 <= number < len(bits) and bool(bits[number])

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(bits)) for bits in self._bits.values())

    def pages(self, block: str) -> PageNumbers:
        """In ascending order."""
        return np.flatnonzero(self._of(block, _NONE)).astype(np.uint64)

    def missing(self, block: str) -> PageNumbers:
        """The pages of the block that are not in the set, in ascending order."""
        return np.flatnonzero(~self._of(block, _NONE)).astype(np.uint64)

    def to_bitmap(self, block: str) -> bytes:
        """LSB first, as many bytes as RECV_BITMAP sends: one bit a page, rounded up to 8 bytes."""
        packed = np.packbits(self._of(block, _NONE), bitorder="little").tobytes()
        return packed + bytes(-len(packed) % 8)

    def add_bitmap(self, block: str, bitmap: bytes | memoryview) -> None:
        """The other way; bits behind the block's end mean nothing."""
        bits = self._of(block, _NONE)
        if len(bitmap) * 8 < len(bits):
            raise GuestMemoryError(f"a bitmap of {len(bitmap)} bytes for the {len(bits)} pages of '{block}'")
        bits |= np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[: len(bits)].astype(np.bool_)

    def _of(self, block: str, pages: PageNumbers) -> npt.NDArray[np.bool_]:
        bits = self._bits.get(block)
        if bits is None:
            raise GuestMemoryError(f"no RAM block '{block}'")
        if len(pages) and int(pages.max()) >= len(bits):
            raise GuestMemoryError(f"page {int(pages.max())} of '{block}', which has {len(bits)}")
        return bits

    def _range(self, block: str, start_bytes: int, length_bytes: int) -> npt.NDArray[np.bool_]:
        bits = self._of(block, _NONE)
        stop_bytes = start_bytes + length_bytes
        if start_bytes % PAGE_BYTES or length_bytes % PAGE_BYTES or not 0 <= start_bytes <= stop_bytes:
            raise GuestMemoryError(f"{start_bytes:#x}+{length_bytes:#x} of '{block}' is not whole pages")
        if stop_bytes > len(bits) * PAGE_BYTES:
            raise GuestMemoryError(f"{start_bytes:#x}+{length_bytes:#x} is outside of '{block}'")
        return bits[start_bytes // PAGE_BYTES : stop_bytes // PAGE_BYTES]
