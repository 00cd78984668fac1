"""Mapped-ram files (QEMU 9.0 and later): the RAM blocks of a seekable stream, every page at its own place.

    string name, u64 used length, [u64 gpa], header of 28 bytes, bitmap, hole up to 1 MiB, pages | next block ...

(mapped_ram_setup_ramblock and parse_ramblock_mapped_ram in migration/ram.c.) The header is big-endian; the bitmap is
an array of the host's longs, which on little-endian hosts is bit i of byte i/8, LSB first. A page whose bit is clear
is zero and a hole in the file. Blocks that x-ignore-shared leaves out: 11.1 writes both offsets 0 and no area, 10.0
reserves bitmap and area all the same.

Nothing is opened here: the caller gives `pread(count, offset) -> bytes` (fewer bytes mean the end of the file) and
`pwrite(data, offset)`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.return_path import bitmap_bytes
from virtmig.stream.wire import (
    MAPPED_RAM_FILE_OFFSET_ALIGNMENT,
    MAPPED_RAM_HDR_VERSION,
    MAPPED_RAM_HEADER_BYTES,
    TARGET_PAGE_BYTES,
    Dialect,
    RamFlag,
)

Pread = Callable[[int, int], bytes]
Pwrite = Callable[[bytes | memoryview, int], object]
Pages = npt.NDArray[np.uint64]

_HEADER = struct.Struct(">IQQQ")
_WORD = struct.Struct(">Q")
#: pages are read and written in pieces of at most this size
PIECE_BYTES = 4 * 1024 * 1024
#: a guest of 16 TiB; QEMU takes what its own block list has
USED_LENGTH_LONGEST_BYTES = 16 << 40
#: the bitmap of one block, read in one go: a block of 4 TiB
BITMAP_LONGEST_BYTES = 128 * 1024 * 1024
BLOCKS_MOST = 4096
CHANNEL = "mapped-ram"


@dataclass(frozen=True, slots=True)
class MappedRamHeader:
    """struct MappedRamHeader: offsets are bytes from the start of the file; both 0 when the block has no pages here."""

    page_bytes: int
    bitmap_offset: int
    pages_offset: int

    @property
    def is_absent(self) -> bool:
        return self.bitmap_offset == 0 and self.pages_offset == 0


@dataclass(frozen=True, slots=True)
class MappedRamBlock:
    """One entry of the block list. `at` is where the entry starts; `gpa` only with x-ignore-shared."""

    name: str
    used_length_bytes: int
    header: MappedRamHeader
    at: int
    gpa: int | None = None

    @property
    def page_count(self) -> int:
        return self.used_length_bytes // self.header.page_bytes

    @property
    def next_at(self) -> int:
        """Where the stream goes on after this entry."""
        if self.header.is_absent:
            return _entry_bytes(self.name, self.gpa is not None) + self.at
        return self.header.pages_offset + self.used_length_bytes


@dataclass(frozen=True, slots=True)
class PageRun:
    """Neighbouring pages of one block: `first_page` is a page number, `data` their contents."""

    block: str
    first_page: int
    data: bytes | memoryview


def decode_header(raw: bytes, *, at: int = 0) -> MappedRamHeader:
    """The 28 bytes behind a block's used length. Raises RemoteProtocolError."""
    if len(raw) < MAPPED_RAM_HEADER_BYTES:
        raise _broken(f"a header of {len(raw)} bytes, expected {MAPPED_RAM_HEADER_BYTES}", at)
    version, page_bytes, bitmap_offset, pages_offset = _HEADER.unpack_from(raw)
    if version != MAPPED_RAM_HDR_VERSION:
        raise _broken(f"mapped-ram version {version}, expected {MAPPED_RAM_HDR_VERSION}", at)
    if page_bytes < 1024 or page_bytes & (page_bytes - 1) or page_bytes > 1 << 20:
        raise _broken(f"mapped-ram page size {page_bytes}", at + 4)
    return MappedRamHeader(page_bytes, bitmap_offset, pages_offset)


def encode_header(header: MappedRamHeader) -> bytes:
    return _HEADER.pack(MAPPED_RAM_HDR_VERSION, header.page_bytes, header.bitmap_offset, header.pages_offset)


def read_blocks(
    pread: Pread,
    at: int,
    *,
    file_bytes: int,
    ignore_shared: bool = False,
    page_bytes: int = TARGET_PAGE_BYTES,
    base: int = 0,
) -> tuple[tuple[MappedRamBlock, ...], int]:
    """The block list whose MEM_SIZE word is at `at`; also where the stream goes on (the EOS after the last area).

    `base` is the `offset=` of QEMU's `file:` address, if the stream does not begin at the file's beginning. Every
    offset is checked against `file_bytes` and against the areas before it. Raises RemoteProtocolError.
    """
    (word,) = _WORD.unpack(_exactly(pread, 8, at, "the block list"))
    flags, total = word & (page_bytes - 1), word & ~(page_bytes - 1)
    if flags != RamFlag.MEM_SIZE:
        raise _broken(f"expected a block list, got the word {word:#x}", at)
    blocks: list[MappedRamBlock] = []
    names: set[str] = set()
    left, at = total, at + 8
    while left:
        if len(blocks) == BLOCKS_MOST:
            raise _broken(f"more than {BLOCKS_MOST} RAM blocks", at)
        block = _read_block(pread, at, ignore_shared, page_bytes, file_bytes, base)
        if block.name in names:
            raise _broken(f"RAM block {block.name!r} twice", at)
        if block.used_length_bytes > left:
            raise _broken(f"RAM block {block.name!r} of {block.used_length_bytes:#x} bytes, {left:#x} are left", at)
        names.add(block.name)
        blocks.append(block)
        left -= block.used_length_bytes
        at = block.next_at
    return tuple(blocks), at


def _read_block(
    pread: Pread, at: int, ignore_shared: bool, page_bytes: int, file_bytes: int, base: int
) -> MappedRamBlock:
    length = _exactly(pread, 1, at, "a block's name")[0]
    if not length:
        raise _broken("an empty block name", at)
    raw_name = _exactly(pread, length, at + 1, "a block's name")
    try:
        name = raw_name.decode("ascii")
    except UnicodeDecodeError:
        raise _broken(f"a block name that is not ASCII: {raw_name[:64]!r}", at + 1) from None
    place = at + 1 + length
    (used,) = _WORD.unpack(_exactly(pread, 8, place, "a block's length"))
    place += 8
    if not 0 < used <= USED_LENGTH_LONGEST_BYTES or used % page_bytes:
        raise _broken(f"RAM block {name!r} of {used:#x} bytes", place - 8)
    gpa = None
    if ignore_shared:
        (gpa,) = _WORD.unpack(_exactly(pread, 8, place, "a block's address"))
        place += 8
    header = decode_header(_exactly(pread, MAPPED_RAM_HEADER_BYTES, place, "a mapped-ram header"), at=place)
    block = MappedRamBlock(name, used, header, at, gpa)
    if header.page_bytes != page_bytes:
        raise _broken(f"mapped-ram page size {header.page_bytes}, the guest's is {page_bytes}", place + 4)
    if header.is_absent:
        if not ignore_shared:
            raise _broken(f"RAM block {name!r} has no pages here, and x-ignore-shared is off", place + 12)
        return block
    after_header = place + MAPPED_RAM_HEADER_BYTES
    bitmap_end = header.bitmap_offset + bitmap_bytes(used, page_bytes)
    if header.bitmap_offset < after_header or bitmap_end > file_bytes:
        raise _broken(f"the bitmap of {name!r} at {header.bitmap_offset:#x} is outside its place", place + 12)
    if header.pages_offset < bitmap_end:
        raise _broken(f"the pages of {name!r} at {header.pages_offset:#x} overlap its bitmap", place + 20)
    if (header.pages_offset - base) % page_bytes and header.pages_offset % page_bytes:
        raise _broken(f"the pages of {name!r} at {header.pages_offset:#x} are not aligned", place + 20)
    if header.pages_offset + used > file_bytes:
        raise _broken(
            f"the pages of {name!r} end at {header.pages_offset + used:#x}, the file at {file_bytes:#x}", place + 20
        )
    return block


def present_pages(pread: Pread, block: MappedRamBlock) -> Pages:
    """The numbers of the pages that are in the file; all others are zero. Raises RemoteProtocolError."""
    if block.header.is_absent:
        return np.empty(0, np.uint64)
    count = bitmap_bytes(block.used_length_bytes, block.header.page_bytes)
    if count > BITMAP_LONGEST_BYTES:
        raise _broken(f"a bitmap of {count} bytes, at most {BITMAP_LONGEST_BYTES} are read", block.header.bitmap_offset)
    raw = np.frombuffer(_exactly(pread, count, block.header.bitmap_offset, "a bitmap"), np.uint8)
    pages = np.flatnonzero(np.unpackbits(raw, bitorder="little")).astype(np.uint64)
    if pages.size and int(pages[-1]) >= block.page_count:
        raise _broken(
            f"the bitmap of {block.name!r} has page {int(pages[-1])}, the block {block.page_count} pages",
            block.header.bitmap_offset + int(pages[-1]) // 8,
        )
    return pages


def read_pages(pread: Pread, block: MappedRamBlock, pages: Pages | None = None) -> Iterator[PageRun]:
    """The pages in the file (or those of `pages`, sorted), in runs of at most 4 MiB. Raises RemoteProtocolError."""
    numbers = present_pages(pread, block) if pages is None else np.asarray(pages, np.uint64)
    size = block.header.page_bytes
    for first, count in _runs(numbers, PIECE_BYTES // size):
        data = _exactly(pread, count * size, block.header.pages_offset + first * size, f"the pages of {block.name!r}")
        yield PageRun(block.name, first, data)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A block to be written. `ignored`: shared memory that x-ignore-shared leaves out; `gpa` with x-ignore-shared."""

    name: str
    used_length_bytes: int
    gpa: int | None = None
    ignored: bool = False


def lay_out(
    plans: Sequence[BlockPlan], at: int, *, dialect: Dialect, page_bytes: int = TARGET_PAGE_BYTES
) -> tuple[tuple[MappedRamBlock, ...], int]:
    """Where QEMU of that age puts each block when the MEM_SIZE word is at `at`; also where the stream goes on."""
    if dialect is Dialect.QEMU_7_2:
        raise LocalProtocolError("QEMU 7.2 has no mapped-ram; it came with 9.0", channel=CHANNEL)
    blocks = []
    at += 8
    for plan in plans:
        if not 0 < len(plan.name) < 256 or not plan.name.isascii():
            raise LocalProtocolError(f"{plan.name!r} is no name of a RAM block", channel=CHANNEL)
        if plan.used_length_bytes <= 0 or plan.used_length_bytes % page_bytes:
            raise LocalProtocolError(f"RAM block {plan.name!r} of {plan.used_length_bytes} bytes", channel=CHANNEL)
        if plan.ignored and plan.gpa is None:
            raise LocalProtocolError(f"{plan.name!r} is left out, but x-ignore-shared is off", channel=CHANNEL)
        if plan.ignored and dialect is Dialect.QEMU_11_1:
            header = MappedRamHeader(page_bytes, 0, 0)
        else:
            bitmap_at = at + _entry_bytes(plan.name, plan.gpa is not None)
            bitmap_end = bitmap_at + bitmap_bytes(plan.used_length_bytes, page_bytes)
            alignment = MAPPED_RAM_FILE_OFFSET_ALIGNMENT
            header = MappedRamHeader(page_bytes, bitmap_at, -(-bitmap_end // alignment) * alignment)
        block = MappedRamBlock(plan.name, plan.used_length_bytes, header, at, plan.gpa)
        blocks.append(block)
        at = block.next_at
    return tuple(blocks), at


def write_blocks(pwrite: Pwrite, at: int, blocks: Sequence[MappedRamBlock]) -> None:
    """The MEM_SIZE word at `at` and the entries with their headers. Bitmaps and pages follow with `write_pages`."""
    total = sum(block.used_length_bytes for block in blocks)
    pwrite(_WORD.pack(total | RamFlag.MEM_SIZE), at)
    for block in blocks:
        gpa = b"" if block.gpa is None else _WORD.pack(block.gpa)
        name = block.name.encode("ascii")
        entry = bytes([len(name)]) + name + _WORD.pack(block.used_length_bytes) + gpa + encode_header(block.header)
        pwrite(entry, block.at)


def write_pages(pwrite: Pwrite, block: MappedRamBlock, runs: Iterable[PageRun]) -> int:
    """Pages at their places and then the block's bitmap; how many pages were written. Absent pages stay holes.

    Raises LocalProtocolError for pages outside the block, or of another block.
    """
    if block.header.is_absent:
        raise LocalProtocolError(f"{block.name!r} has no place for pages in this file", channel=CHANNEL)
    size = block.header.page_bytes
    present = np.zeros(bitmap_bytes(block.used_length_bytes, size) * 8, np.bool_)
    for run in runs:
        count, rest = divmod(len(run.data), size)
        if rest or run.block != block.name or run.first_page < 0 or run.first_page + count > block.page_count:
            raise LocalProtocolError(
                f"{len(run.data)} bytes at page {run.first_page} of {run.block!r} do not fit {block.name!r}",
                channel=CHANNEL,
            )
        pwrite(run.data, block.header.pages_offset + run.first_page * size)
        present[run.first_page : run.first_page + count] = True
    pwrite(np.packbits(present, bitorder="little").tobytes(), block.header.bitmap_offset)
    return int(present.sum())


def _runs(numbers: Pages, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring page numbers as (first, count), none longer than `most`."""
    if not len(numbers):
        return
    cuts = np.flatnonzero(numbers[1:] - numbers[:-1] != 1) + 1
    starts = numbers[np.concatenate(([0], cuts))].tolist()
    counts = np.diff(np.concatenate(([0], cuts, [len(numbers)]))).tolist()
    for start, count in zip(starts, counts, strict=True):
        for first in range(start, start + count, most):
            yield first, min(most, start + count - first)


def _entry_bytes(name: str, with_gpa: bool) -> int:
    return 1 + len(name) + 8 + (8 if with_gpa else 0) + MAPPED_RAM_HEADER_BYTES


def _exactly(pread: Pread, count: int, at: int, what: str) -> bytes:
    data = pread(count, at)
    if len(data) < count:
        raise _broken(f"the file ends inside {what}", at + len(data))
    return data


def _broken(message: str, at: int) -> RemoteProtocolError:
    return RemoteProtocolError(message, channel=CHANNEL, offset=at)
