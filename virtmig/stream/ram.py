"""RAM records, both ways: runs of pages by numpy, never one by one (migration/ram.c ram_load_precopy, ram_save_*)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from virtmig.errors import LocalProtocolError
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.events import (
    EncodedPage,
    EndOfRam,
    MappedArea,
    MappedEntry,
    MappedList,
    MultifdFlush,
    Pages,
    RamBlock,
    RamBlocks,
    RamEvent,
    Words,
    ZeroPages,
)
from virtmig.stream.wire import (
    ENCODING_FLAG_XBZRLE,
    MAPPED_RAM_HDR_VERSION,
    TARGET_PAGE_BYTES,
    RamFlag,
)

_FLAGS = TARGET_PAGE_BYTES - 1
_PAGE_RECORD = 8 + TARGET_PAGE_BYTES
_ZERO_RECORD = 9
# plain numbers, since the operators of an IntFlag are too slow for every record
_PAGE, _ZERO, _XBZRLE, _COMPRESS = int(RamFlag.PAGE), int(RamFlag.ZERO), int(RamFlag.XBZRLE), int(RamFlag.COMPRESS_PAGE)
_EOS, _CONTINUE, _MEM_SIZE, _FLUSH = (
    int(RamFlag.EOS), int(RamFlag.CONTINUE), int(RamFlag.MEM_SIZE), int(RamFlag.MULTIFD_FLUSH)
)  # fmt: skip
#: a run handed on at once: half a MiB is one good system call, and memory that the allocator can use again
LONGEST_RUN_PAGES = 128
#: zero pages have no contents to hand on: their runs may be as long as what is there
LONGEST_ZERO_RUN_PAGES = 1 << 16
#: how many records the first look at a run covers; the second covers all
_FIRST_LOOK = 8
#: a block list is bounded by this many blocks, not by the total that the peer names
MOST_BLOCKS = 4096
_LOW_MASK = np.uint16(_FLAGS >> 8 | (_FLAGS & 0xFF) << 8)
_HUGE_PAGES = frozenset(1 << bit for bit in range(13, 35))
_MAPPED_PIECE = 1 << 20
#: every record that some QEMU writes; what a reader was not set up for can be left out
ALL_RECORDS = (
    RamFlag.ZERO | RamFlag.MEM_SIZE | RamFlag.PAGE | RamFlag.XBZRLE | RamFlag.COMPRESS_PAGE | RamFlag.MULTIFD_FLUSH
)


class RamReader:
    """The records of one channel. Remembers the block across sections, as QEMU does (per channel).

    `capabilities` are those of the stream's configuration: only x-ignore-shared and mapped-ram change the layout.
    `known` is filled by the block list; a reader of a preempt or recovery channel gets it from the main one, or None.
    `records` are those that the two sides were set up for: no XBZRLE without the capability, no MULTIFD_FLUSH without
    multifd or from machine types up to 8.0. `postcopy` is set from LISTEN on: ZERO and PAGE alone are left then, and
    the target pages of one huge page come in order and without others between them (`huge`: block -> its page size).
    """

    def __init__(
        self,
        capabilities: frozenset[str] = frozenset(),
        known: dict[str, int] | None = None,
        *,
        records: RamFlag = ALL_RECORDS,
    ) -> None:
        self.capabilities = capabilities
        self.known = known
        self.records = records
        self.postcopy = False
        self.huge: dict[str, int] = {}
        self.block: str | None = None
        self._open: tuple[str, int] | None = None  # postcopy: block and offset that an unfinished huge page wants next
        self._skip = 0  # mapped-ram: bytes left of an area
        self._list: tuple[list[RamBlock], int] | None = None  # mapped-ram: blocks so far, bytes left of the total

    def restart(self) -> None:
        """The connection of a resumed postcopy: the source names its blocks again and begins a huge page anew."""
        self.block, self._open, self.postcopy = None, None, True

    def read(self, cursor: Cursor) -> RamEvent:
        """The next record or run. Raises NeedData, RemoteProtocolError."""
        if self._skip:
            return self._area(cursor)
        if self._list is None:
            buffer, at = cursor.window()
            here = len(buffer) - at
            # what each piece from a socket ends in: told apart without a roll back
            if here < 8:
                raise NeedData(8 - here)
            if here < _PAGE_RECORD and (buffer[at + 6] << 8 | buffer[at + 7]) & _FLAGS == _PAGE | _CONTINUE:
                raise NeedData(_PAGE_RECORD - here)
        with cursor.element():
            if self._list is not None:
                return self._mapped_entry(cursor, *self._list)
            begin = cursor.offset
            word = cursor.pull_u64()
            flags = word & _FLAGS
            kind = flags & ~_CONTINUE
            if flags == _EOS:
                if word != _EOS:
                    raise cursor.broken(f"an end of RAM with an address: {word:#x}", at=begin)
                return EndOfRam()
            self._check_kind(cursor, flags, kind, begin)
            if kind in (_PAGE, _ZERO, _XBZRLE, _COMPRESS):
                return self._page(cursor, word, flags, kind, begin)
            if flags == _MEM_SIZE:
                if "mapped-ram" in self.capabilities:
                    self._list = ([], word & ~_FLAGS) if word & ~_FLAGS else None
                    return MappedList(word)
                return self._blocks(cursor, word, begin)
            if word == _FLUSH:
                return MultifdFlush()
            raise cursor.broken(f"an unknown combination of RAM flags: {flags:#x}", at=begin)

    def _check_kind(self, cursor: Cursor, flags: int, kind: int, at: int) -> None:
        if kind & int(ALL_RECORDS) and not kind & int(self.records):
            raise cursor.broken(f"a RAM record that was not agreed on: {RamFlag(kind).name}", at=at)
        if self.postcopy and kind not in (_PAGE, _ZERO):
            raise cursor.broken(f"an unknown combination of RAM flags: {flags:#x} (postcopy)", at=at)
        if "mapped-ram" in self.capabilities and flags != _MEM_SIZE:
            raise cursor.broken(f"an unexpected RAM record in a mapped-ram file: {flags:#x}", at=at)

    # -- pages -----------------------------------------------------------------------------------------------------

    def _page(self, cursor: Cursor, word: int, flags: int, kind: int, begin: int) -> RamEvent:
        named = not flags & _CONTINUE
        if named:
            name = cursor.pull_string()
            if not name or (self.known is not None and name not in self.known):
                raise cursor.broken(f"a page of an unknown RAM block '{name}'", at=begin)
        elif self.block is None:
            raise cursor.broken("a page that continues a block, and none was named yet", at=begin)
        else:
            name = self.block
        event: RamEvent
        if kind == _PAGE:
            event = self._pages(cursor, word, name, named, begin)
        elif kind == _ZERO:
            event = self._zero_pages(cursor, word, name, named, begin)
        else:
            self._check_offset(cursor, name, word & ~_FLAGS, begin)
            if kind == _XBZRLE:
                encoding = cursor.pull_u8()
                if encoding != ENCODING_FLAG_XBZRLE:
                    raise cursor.broken(f"an unknown page encoding {encoding:#x}", at=begin)
                body = cursor.pull_bytes(cursor.pull_u16(), TARGET_PAGE_BYTES, "an xbzrle page")
            else:
                body = cursor.pull_bytes(cursor.pull_u32(), 2 * TARGET_PAGE_BYTES, "a compressed page")
            event = EncodedPage(name, named, word, body)
        self.block = name
        return event

    def _pages(self, cursor: Cursor, word: int, name: str, named: bool, begin: int) -> Pages:
        """The cursor stands behind the head of the first record; the contents lie a record apart from there on."""
        cursor.need(TARGET_PAGE_BYTES)
        buffer, at = cursor.window()
        most = min((len(buffer) - at + 8) // _PAGE_RECORD, LONGEST_RUN_PAGES)
        count = _run(buffer, at + TARGET_PAGE_BYTES, most - 1, _PAGE_RECORD, _PAGE | _CONTINUE) + 1
        words = _words(buffer, word, at + TARGET_PAGE_BYTES, count, _PAGE_RECORD)
        count = self._check_run(cursor, name, words, begin, _PAGE_RECORD)
        if count == 1:
            data = memoryview(bytes(buffer[at : at + TARGET_PAGE_BYTES]))
        else:
            apart: npt.NDArray[np.uint8] = np.ndarray(
                (count, TARGET_PAGE_BYTES), np.uint8, buffer, at, (_PAGE_RECORD, 1)
            )
            data = np.ascontiguousarray(apart).reshape(-1).data.toreadonly()
        cursor.skip(count * _PAGE_RECORD - 8)
        return Pages(name, named, words, data)

    def _zero_pages(self, cursor: Cursor, word: int, name: str, named: bool, begin: int) -> ZeroPages:
        cursor.need(1)
        buffer, at = cursor.window()
        most = min((len(buffer) - at + 8) // _ZERO_RECORD, LONGEST_ZERO_RUN_PAGES)
        count = _run(buffer, at + 1, most - 1, _ZERO_RECORD, _ZERO | _CONTINUE) + 1
        words = _words(buffer, word, at + 1, count, _ZERO_RECORD)
        count = self._check_run(cursor, name, words, begin, _ZERO_RECORD)
        fills = bytes(buffer[at : at + (count - 1) * _ZERO_RECORD + 1 : _ZERO_RECORD])
        if fills.count(0) != count:
            bad = next(number for number, fill in enumerate(fills) if fill)
            at_fill = cursor.offset + bad * _ZERO_RECORD
            raise cursor.broken(f"a zero page with the fill byte {fills[bad]:#x}", at=at_fill)
        cursor.skip(count * _ZERO_RECORD - 8)
        return ZeroPages(name, named, words)

    def _check_run(self, cursor: Cursor, name: str, words: Words, begin: int, record: int) -> int:
        """How many pages the run has. Raises where the first one lies outside of the block or breaks a huge page."""
        if self.known is not None:
            top = int(words.max()) & ~_FLAGS
            if top + TARGET_PAGE_BYTES > self.known[name]:
                bad = int(np.argmax(words > np.uint64(self.known[name] - TARGET_PAGE_BYTES | _FLAGS)))
                at = begin if not bad else cursor.offset + bad * record - 8
                self._check_offset(cursor, name, int(words[bad]) & ~_FLAGS, at)
        if self.postcopy and (self._open is not None or name in self.huge):
            self._check_huge(cursor, name, words, begin)
        return len(words)

    def _check_offset(self, cursor: Cursor, name: str, offset: int, at: int) -> None:
        if self.known is not None and offset + TARGET_PAGE_BYTES > self.known[name]:
            raise cursor.broken(
                f"a page at {offset:#x} outside of RAM block '{name}' of {self.known[name]:#x} bytes", at=at
            )

    def _check_huge(self, cursor: Cursor, name: str, words: Words, begin: int) -> None:
        """ram_load_postcopy places whole host pages only: their target pages come one behind the other."""
        offsets = words & np.uint64(_MASK)
        first = int(offsets[0])
        if self._open is not None and self._open != (name, first):
            block, offset = self._open
            raise cursor.broken(
                f"a page of '{name}' at {first:#x} inside the huge page that '{block}' goes on with at {offset:#x}",
                at=begin,
            )
        size = self.huge.get(name)
        if size is None:
            return
        starts = offsets % np.uint64(size) == 0
        follows = np.empty(len(offsets), np.bool_)
        follows[0] = self._open is not None
        follows[1:] = offsets[1:] == offsets[:-1] + np.uint64(TARGET_PAGE_BYTES)
        open_before = np.empty(len(offsets), np.bool_)
        open_before[0] = self._open is not None
        open_before[1:] = (offsets[:-1] + np.uint64(TARGET_PAGE_BYTES)) % np.uint64(size) != 0
        wrong = np.flatnonzero(np.where(open_before, ~follows, ~starts))
        if wrong.size:
            raise cursor.broken(
                f"a page of '{name}' at {int(offsets[int(wrong[0])]):#x} out of order in a huge page", at=begin
            )
        last = int(offsets[-1]) + TARGET_PAGE_BYTES
        self._open = (name, last) if last % size else None

    # -- the block list --------------------------------------------------------------------------------------------

    def _blocks(self, cursor: Cursor, word: int, begin: int) -> RamBlocks:
        left = word & ~_FLAGS
        blocks: list[RamBlock] = []
        names: set[str] = set()
        while left:
            block = self._block(cursor, left, names, begin)
            left -= block.used_length
            blocks.append(block)
            names.add(block.name)
        return self._listed(RamBlocks(word, tuple(blocks)))

    def _block(self, cursor: Cursor, left: int, names: set[str], begin: int) -> RamBlock:
        name = cursor.pull_string()
        length = cursor.pull_u64()
        if not name:
            raise cursor.broken("a RAM block without a name", at=begin)
        if len(names) >= MOST_BLOCKS:
            raise cursor.broken(f"more than {MOST_BLOCKS} RAM blocks", at=begin)
        if name in names:
            raise cursor.broken(f"RAM block '{name}' is listed twice", at=begin)
        if length == 0 or length % TARGET_PAGE_BYTES or length > left:
            raise cursor.broken(f"RAM block '{name}' of {length:#x} bytes, {left:#x} are left of the total", at=begin)
        address = cursor.pull_u64() if "x-ignore-shared" in self.capabilities else None
        page_size = None
        if address is None and "mapped-ram" not in self.capabilities and cursor.peek_u8() == 0:
            # a name is never empty, so a zero byte begins a page size, or the record behind the last block
            with cursor.peek_view(8) as view:
                value = int.from_bytes(view, "big")
            if value in _HUGE_PAGES:
                page_size = value
                cursor.skip(8)
        return RamBlock(name, length, page_size, address)

    def _mapped_entry(self, cursor: Cursor, blocks: list[RamBlock], left: int) -> MappedEntry:
        begin = cursor.offset
        plain = self._block(cursor, left, {block.name for block in blocks}, begin)
        version = cursor.pull_u32()
        page_size, bitmap_offset, pages_offset = cursor.pull_u64(), cursor.pull_u64(), cursor.pull_u64()
        if version != MAPPED_RAM_HDR_VERSION:
            raise cursor.broken(f"a mapped-ram header of version {version}", at=begin)
        if pages_offset and not (page_size and cursor.offset <= bitmap_offset <= pages_offset):
            raise cursor.broken(f"a mapped-ram header of '{plain.name}' that points backwards", at=begin)
        block = RamBlock(
            plain.name, plain.used_length, None, plain.address, (version, page_size, bitmap_offset, pages_offset)
        )
        if pages_offset:
            self._skip = pages_offset + block.used_length - cursor.offset
        blocks.append(block)
        left -= block.used_length
        self._list = (blocks, left) if left else None
        if not left:
            self._listed(RamBlocks(0, tuple(blocks)))
        return MappedEntry(block)

    def _area(self, cursor: Cursor) -> MappedArea:
        size = min(self._skip, _MAPPED_PIECE, cursor.available)
        if size == 0:
            raise NeedData(1)
        data = cursor.pull_bytes(size, size, "a mapped-ram area")
        self._skip -= size
        return MappedArea(data)

    def _listed(self, event: RamBlocks) -> RamBlocks:
        self.huge = {block.name: block.page_size_bytes for block in event.blocks if block.page_size_bytes is not None}
        if self.known is not None:
            self.known.clear()
            self.known.update((block.name, block.used_length) for block in event.blocks)
        return event


_MASK = ~_FLAGS & 0xFFFF_FFFF_FFFF_FFFF


def _run(buffer: bytearray, at: int, most: int, record: int, flags: int) -> int:
    """How many of the next `most` records, which lie `record` bytes apart from `at` on, have exactly these flags."""
    if most <= 0:
        return 0
    for look in (_FIRST_LOOK, most):
        take = min(look, most)
        # the two low bytes of each word, swapped, so that numpy compares them as they lie
        low: npt.NDArray[np.uint16] = np.ndarray((take,), "<u2", buffer, at + 6, (record,))
        other = (low & _LOW_MASK) != np.uint16(flags >> 8 | (flags & 0xFF) << 8)
        first = int(other.argmax())
        if other[first]:
            return first
    return most


def _words(buffer: bytearray, first: int, at: int, count: int, record: int) -> Words:
    words = np.empty(count, np.uint64)
    words[0] = first
    if count > 1:
        words[1:] = np.ndarray((count - 1,), ">u8", buffer, at, (record,))
    return words


# -- the other way ---------------------------------------------------------------------------------------------------


def encode_pages(event: Pages) -> memoryview:
    """PAGE records in one buffer: one vectorised copy, whatever their number."""
    count = len(event.words)
    if not count or len(event.data) != count * TARGET_PAGE_BYTES:
        raise LocalProtocolError(f"{count} pages with {len(event.data)} bytes of data")
    out, at = _records(event.words, event.block if event.named else "", _PAGE_RECORD)
    place: npt.NDArray[np.uint8] = np.ndarray((count, TARGET_PAGE_BYTES), np.uint8, out, at, (_PAGE_RECORD, 1))
    place[:] = np.frombuffer(event.data, np.uint8).reshape(count, TARGET_PAGE_BYTES)
    return out.data


def encode_zero_pages(event: ZeroPages) -> memoryview:
    count = len(event.words)
    if not count:
        raise LocalProtocolError("a run of no zero pages")
    out, at = _records(event.words, event.block if event.named else "", _ZERO_RECORD)
    out[at::_ZERO_RECORD] = 0
    return out.data


def _records(words: Words, block: str, record: int) -> tuple[npt.NDArray[np.uint8], int]:
    """A buffer with the words (and the block's name behind the first) in it, and where the first one's body goes."""
    name = _name(block) if block else b""
    out = np.empty(len(name) + len(words) * record, np.uint8)
    at = 8 + len(name)
    out[:8] = np.frombuffer(int(words[0]).to_bytes(8, "big"), np.uint8)
    if name:
        out[8:at] = np.frombuffer(name, np.uint8)
    if len(words) > 1:
        np.ndarray((len(words) - 1,), ">u8", out, at + record - 8, (record,))[:] = words[1:]
    return out, at


def encode_ram(event: RamEvent) -> bytes | memoryview:
    """One RAM event as bytes; the inverse of RamReader.read."""
    match event:
        case Pages():
            return encode_pages(event)
        case ZeroPages():
            return encode_zero_pages(event)
        case EncodedPage():
            name = _name(event.block) if event.named else b""
            if len(event.data) > (TARGET_PAGE_BYTES if event.xbzrle else 2 * TARGET_PAGE_BYTES):
                raise LocalProtocolError(f"an encoded page of {len(event.data)} bytes")
            if event.xbzrle:
                head = bytes([ENCODING_FLAG_XBZRLE]) + len(event.data).to_bytes(2, "big")
            else:
                head = len(event.data).to_bytes(4, "big")
            return event.word.to_bytes(8, "big") + name + head + event.data
        case EndOfRam():
            return int(RamFlag.EOS).to_bytes(8, "big")
        case MultifdFlush():
            return int(RamFlag.MULTIFD_FLUSH).to_bytes(8, "big")
        case RamBlocks():
            return event.word.to_bytes(8, "big") + b"".join(_encode_block(block) for block in event.blocks)
        case MappedList():
            return event.word.to_bytes(8, "big")
        case MappedEntry():
            return _encode_block(event.block)
        case MappedArea():
            return event.data
    raise LocalProtocolError(f"no event of a stream: {type(event).__name__}")


def _encode_block(block: RamBlock) -> bytes:
    parts = [_name(block.name), block.used_length.to_bytes(8, "big")]
    if block.page_size_bytes is not None:
        parts.append(block.page_size_bytes.to_bytes(8, "big"))
    if block.address is not None:
        parts.append(block.address.to_bytes(8, "big"))
    if block.mapped is not None:
        version, page_size, bitmap_offset, pages_offset = block.mapped
        parts.append(version.to_bytes(4, "big"))
        parts += [number.to_bytes(8, "big") for number in (page_size, bitmap_offset, pages_offset)]
    return b"".join(parts)


def _name(name: str) -> bytes:
    raw = name.encode("ascii")
    if not 0 < len(raw) < 256:
        raise LocalProtocolError(f"a RAM block name of {len(raw)} bytes")
    return bytes([len(raw)]) + raw
