"""Pages of an image on their way out: which are left, which come next, what they look like on a channel.

Remaining      each page is given out once: to a request, or to the background, which goes on near the last request
PageReader     a window of pages as those with contents and those that are zero
RecordWriter   pages as RAM records on main or preempt
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from virtmig.engine.image import Image
from virtmig.engine.memory import Bytes, holes_and_data, nonzero_pages, read_block
from virtmig.engine.transport import Buffer, Connection
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES, PageNumbers, runs_of
from virtmig.stream.encoder import MainEncoder, PreemptEncoder

#: pages with contents that are given out at a time: long enough for one large system call, short enough for a request
WINDOW_PAGES = 128
#: zero pages at a time: records of 9 bytes, but each is an ioctl of the destination
_HOLE_WINDOW_PAGES = 1024
#: behind a requested page these come next: a guest that reads on meets them already there
NEAR_PAGES = 64
#: requests whose neighbours are remembered, the newest first; older ones wait for the background
_MOST_NEAR = 64
#: runs of pages that are looked at one by one for zeros
_MOST_RUNS = 8
#: how far one look for the next page goes that is left
_LOOK_PAGES = 1 << 16


def page_buffer() -> Bytes:
    """Room for what one `PageReader.read` can want, as rows of 4096; only what is written in it takes memory."""
    return np.empty((_HOLE_WINDOW_PAGES, PAGE_BYTES), np.uint8)


def pieces(pages: PageNumbers) -> Iterator[PageNumbers]:
    """So few at a time that a `page_buffer` holds them: a host page may be 2 MiB or 1 GiB."""
    if len(pages) <= _HOLE_WINDOW_PAGES:
        yield pages
        return
    for at in range(0, len(pages), WINDOW_PAGES):
        yield pages[at : at + WINDOW_PAGES]


class PageReader:
    """An image's pages by number. Holes of its files are zero without being read (a read would fill the page cache).

    `read` takes them from the file: one that was cut off, or cannot be read, is an error then. `split` and `data` look
    at the mapping, where that is a SIGBUS: for memory whose files nobody else has.
    """

    def __init__(self, image: Image) -> None:
        self._memory = image.memory
        self.lengths = image.memory.lengths
        #: host pages of the guest's memory, in target pages: 512 for a block of 2 MiB pages
        self.units = {block.name: max(1, block.page_size // PAGE_BYTES) for block in image.manifest.blocks}
        self._known: dict[str, npt.NDArray[np.bool_]] = {}

    def refresh(self) -> None:
        """Look for holes anew: for memory that changes, once a pass and after its pages were taken from the tracker.

        What is written into a hole from now on is in the next pass. Raises GuestMemoryError for a file that was cut.
        """
        for name, block in self._memory.blocks.items():
            held = np.zeros(block.length // PAGE_BYTES, np.bool_)
            for start, end in holes_and_data(block.fd, block.length):
                held[start // PAGE_BYTES : -(-end // PAGE_BYTES)] = True
            size = os.fstat(block.fd).st_size
            if size < block.length:  # what is behind the end of a file looks like a hole
                raise _unreadable(name, f"it ends at {size:#x}")
            self._known[name] = held

    def held(self, name: str) -> npt.NDArray[np.bool_]:
        """For each page of a block whether it may hold something, as of the last `refresh`."""
        if not self._known:
            self.refresh()
        return self._known[name]

    def window(self, name: str, first: int) -> int:
        """How many pages from `first` on make a good piece: all in a hole, or few enough that may hold something."""
        everything = self.held(name)
        held = everything[first : first + _HOLE_WINDOW_PAGES]
        count = int(held.argmax()) or (WINDOW_PAGES if held[0] else len(held))
        unit = self.units[name]
        return min(-(-count // unit) * unit, len(everything) - first)

    def read(
        self, name: str, pages: PageNumbers, buffer: Bytes, *, whole: bool = False
    ) -> tuple[PageNumbers, PageNumbers, memoryview]:
        """(with contents, zero, the contents one behind the other) of ascending `pages`, at most a buffer's worth.

        The contents lie in `buffer`, or in a copy of its parts. `whole`: all of these pages hold something, or none.
        Raises GuestMemoryError that names the block and the place.
        """
        holds = self.held(name)[pages]
        if not holds.any():
            return pages[:0], pages, memoryview(b"")
        some = pages if whole else pages[holds]
        rows = buffer[: len(some)]
        fd, at = self._memory.block(name).fd, 0
        for first, count in runs_of(some):
            try:
                read_block(fd, first * PAGE_BYTES, rows[at : at + count].reshape(-1).data)
            except GuestMemoryError as error:
                raise _unreadable(name, str(error)) from None
            at += count
        full = nonzero_pages(rows.reshape(-1))
        if whole and full.any():
            full[:] = True
        if whole:
            holds[:] = full
        else:
            holds[holds] = full
        return pages[holds], pages[~holds], (rows if full.all() else rows[full]).reshape(-1).data

    def split(self, name: str, pages: PageNumbers) -> tuple[PageNumbers, PageNumbers]:
        """(with contents, zero) of ascending `pages` that lie close together."""
        holds = self.held(name)[pages]
        if holds.any():
            some = pages[holds]
            block = self._memory.block(name)
            runs = list(runs_of(some))
            if (
                len(runs) > _MOST_RUNS
            ):  # a copy of these pages alone: what lies between may be a hole, which a read fills
                holds[holds] = nonzero_pages(block.pages[some].reshape(-1))
            else:
                holds[holds] = np.concatenate([nonzero_pages(block.bytes, first, count) for first, count in runs])
        return pages[holds], pages[~holds]

    def data(self, name: str, pages: PageNumbers) -> memoryview:
        """The contents of ascending `pages`, one behind the other: the mapping itself when they are neighbours."""
        block = self._memory.block(name)
        first, last = int(pages[0]), int(pages[-1])
        if last - first == len(pages) - 1:
            return block.bytes[first * PAGE_BYTES : (last + 1) * PAGE_BYTES].data
        return block.pages[pages].reshape(-1).data

    def block(self, name: str) -> memoryview:
        """All of a block."""
        return self._memory.block(name).bytes.data


def _unreadable(name: str, words: str) -> GuestMemoryError:
    return GuestMemoryError(
        f"RAM block '{name}' cannot be sent: {words}", hint="its file was changed while it was sent, or is damaged"
    )


class Remaining:
    """The pages that are still to be sent. Any thread takes; what was taken must be sent, by whoever took it."""

    def __init__(self, reader: PageReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._left = {name: np.ones(length // PAGE_BYTES, np.bool_) for name, length in reader.lengths.items()}
        self._near: deque[tuple[str, int, int]] = deque(maxlen=_MOST_NEAR)
        self._order = list(self._left)
        self._at = 0

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(left)) for left in self._left.values())

    def drop(self, name: str, pages: PageNumbers) -> None:
        """These are there already: what a paused destination's bitmap says."""
        with self._lock:
            self._left[name][pages] = False

    def take_requested(self, name: str, start_bytes: int, length_bytes: int) -> PageNumbers:
        """The host pages of a request that were not taken yet; their neighbours become the next background."""
        unit = self._reader.units[name]
        first = start_bytes // PAGE_BYTES // unit * unit
        end = -(-(start_bytes + length_bytes) // PAGE_BYTES // unit) * unit
        with self._lock:
            pages = self._take(name, first, end - first)
            if len(pages):
                self._near.append((name, end, -(-NEAR_PAGES // unit) * unit))
        return pages

    def take_next(self) -> tuple[str, PageNumbers] | None:
        """The next piece of the background, None when nothing is left."""
        with self._lock:
            while self._near:
                name, first, count = self._near.pop()
                pages = self._take(name, first, count)
                if len(pages):
                    return name, pages
            while self._order:
                name = self._order[0]
                left = self._left[name]
                look = left[self._at : self._at + _LOOK_PAGES]
                if not len(look):
                    self._order.pop(0)
                    self._at = 0
                    continue
                skip = int(look.argmax())
                if not look[skip]:
                    self._at += len(look)
                    continue
                first = self._at + skip
                self._at = first + self._reader.window(name, first)
                return name, self._take(name, first, self._at - first)
        return None

    def _take(self, name: str, first: int, count: int) -> PageNumbers:
        left = self._left[name][first : first + count]
        pages = np.flatnonzero(left).astype(np.uint64) + np.uint64(first)
        left[:] = False
        return pages


class RecordWriter:
    """Pages as RAM records on one channel; one thread at a time writes."""

    def __init__(self, connection: Connection, encoder: PreemptEncoder, reader: PageReader) -> None:
        self.connection = connection
        self.encoder = encoder
        self.normal = self.zero = 0
        self._reader = reader
        self._buffer = page_buffer()

    def write(self, name: str, pages: PageNumbers) -> None:
        """Bare records, or a whole PART section on main."""
        # ram_load_postcopy gathers a host page from its target pages in ascending order, whatever they hold
        whole = self._reader.units[name] > 1
        for piece in pieces(pages):
            begin = self.encoder.ram_part() if isinstance(self.encoder, MainEncoder) else b""
            records = self._records(name, piece, whole)
            if isinstance(self.encoder, MainEncoder):
                self.connection.send(begin, *records, self.encoder.ram_section_end())
            else:
                self.connection.send(*records)

    def write_records(self, name: str, pages: PageNumbers) -> None:
        """Records inside a section of main that is open; at most a `page_buffer` of them."""
        self.connection.send(*self._records(name, pages, False))

    def zero_pages(self, name: str, pages: PageNumbers) -> None:
        """ZERO records inside a section of main that is open."""
        if len(pages):
            self.zero += len(pages)
            self.connection.send(self.encoder.zero_pages(name, pages))

    def _records(self, name: str, pages: PageNumbers, whole: bool) -> list[Buffer]:
        normal, zero, data = self._reader.read(name, pages, self._buffer, whole=whole)
        self.normal += len(normal)
        self.zero += len(zero)
        records: list[Buffer] = []
        if len(normal):
            records.append(self.encoder.pages(name, normal, data))
        if len(zero):
            records.append(self.encoder.zero_pages(name, zero))
        return records
