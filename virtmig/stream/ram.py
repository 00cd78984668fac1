"""RAM records, both ways: runs of pages by numpy, never one by one (migration/ram.c ram_load_precopy, ram_save_*)."""

from __future__ import annotations

import numpy as np

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
_PAGE_AGAIN = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_AGAIN = int(RamFlag.ZERO | RamFlag.CONTINUE)
#: how many records the first look at a run covers; each further look covers eight times as many
_FIRST_LOOK = 8
#: a run handed on at once: half a MiB is one good system call, and memory that the allocator can use again
LONGEST_RUN_PAGES = 128
#: a block list is bounded by this many blocks, not by the total that the peer names
MOST_BLOCKS = 4096
_HUGE_PAGES = frozenset(1 << bit for bit in range(13, 35))
_MAPPED_PIECE = 1 << 20


class RamReader:
    """The records of one channel. Remembers the block across sections, as QEMU does (per channel).

    `capabilities` are those of the stream's configuration: only x-ignore-shared and mapped-ram change the layout.
    `known` is filled by the block list; a reader of a preempt or recovery channel gets it from the main one, or None.
    """

    def __init__(self, capabilities: frozenset[str] = frozenset(), known: dict[str, int] | None = None) -> None:
        self.capabilities = capabilities
        self.known = known
        self.block: str | None = None
        self._skip = 0  # mapped-ram: bytes left of an area
        self._list: tuple[list[RamBlock], int] | None = None  # mapped-ram: blocks so far, bytes left of the total

    def read(self, cursor: Cursor) -> RamEvent:
        """The next record or run. Raises NeedData, RemoteProtocolError."""
        if self._skip:
            return self._area(cursor)
        with cursor.element():
            if self._list is not None:
                return self._mapped_entry(cursor, *self._list)
            begin = cursor.offset
            word = cursor.pull_u64()
            flags = word & _FLAGS
            kind = flags & ~RamFlag.CONTINUE
            if flags == RamFlag.EOS:
                if word != RamFlag.EOS:
                    raise cursor.broken(f"an end of RAM with an address: {word:#x}", at=begin)
                return EndOfRam()
            if kind in (RamFlag.PAGE, RamFlag.ZERO, RamFlag.XBZRLE, RamFlag.COMPRESS_PAGE):
                return self._page(cursor, word, flags, kind, begin)
            if flags == RamFlag.MEM_SIZE:
                if self.capabilities & {"mapped-ram"}:
                    self._list = ([], word & ~_FLAGS)
                    return MappedList(word)
                return self._blocks(cursor, word, begin)
            if word == RamFlag.MULTIFD_FLUSH:
                return MultifdFlush()
            raise cursor.broken(f"an unknown combination of RAM flags: {flags:#x}", at=begin)

    # -- pages -----------------------------------------------------------------------------------------------------

    def _page(self, cursor: Cursor, word: int, flags: int, kind: int, begin: int) -> RamEvent:
        named = not flags & RamFlag.CONTINUE
        if named:
            name = cursor.pull_string()
            if self.known is not None and name not in self.known:
                raise cursor.broken(f"a page of an unknown RAM block '{name}'", at=begin)
        elif self.block is None:
            raise cursor.broken("a page that continues a block, and none was named yet", at=begin)
        else:
            name = self.block
        self._check_offset(cursor, name, word & ~_FLAGS, begin)
        event: RamEvent
        if kind == RamFlag.XBZRLE:
            event = self._xbzrle(cursor, name, named, word, begin)
        elif kind == RamFlag.COMPRESS_PAGE:
            length = cursor.pull_u32()
            body = cursor.pull_bytes(length, 2 * TARGET_PAGE_BYTES, "a compressed page")
            event = EncodedPage(name, named, word, body)
        elif kind == RamFlag.ZERO:
            fill = cursor.pull_u8()
            if fill:
                raise cursor.broken(f"a zero page with the fill byte {fill:#x}", at=begin)
            words = self._more(cursor, word, _ZERO_RECORD, _ZERO_AGAIN, name)
            event = ZeroPages(name, named, words)
        else:
            cursor.need(TARGET_PAGE_BYTES)
            event = self._run(cursor, word, name, named)
        self.block = name
        return event

    def _xbzrle(self, cursor: Cursor, name: str, named: bool, word: int, begin: int) -> EncodedPage:
        encoding = cursor.pull_u8()
        if encoding != ENCODING_FLAG_XBZRLE:
            raise cursor.broken(f"an unknown page encoding {encoding:#x}", at=begin)
        length = cursor.pull_u16()
        return EncodedPage(name, named, word, cursor.pull_bytes(length, TARGET_PAGE_BYTES, "an xbzrle page"))

    def _run(self, cursor: Cursor, word: int, name: str, named: bool) -> Pages:
        first = bytes(cursor.peek_view(TARGET_PAGE_BYTES))
        cursor.skip(TARGET_PAGE_BYTES)
        count = self._same(cursor, _PAGE_RECORD, _PAGE_AGAIN)
        if count == 0:
            return Pages(name, named, np.array([word], dtype=np.uint64), memoryview(first))
        with cursor.peek_view(count * _PAGE_RECORD) as view:
            records = np.frombuffer(view, dtype=np.uint8).reshape(count, _PAGE_RECORD)
            words = np.empty(count + 1, dtype=np.uint64)
            words[0] = word
            words[1:] = np.ascontiguousarray(records[:, :8]).view(">u8").reshape(count)
            data = np.empty((count + 1, TARGET_PAGE_BYTES), dtype=np.uint8)
            data[0] = np.frombuffer(first, dtype=np.uint8)
            data[1:] = records[:, 8:]
            del records
        self._check_offsets(cursor, name, words)
        cursor.skip(count * _PAGE_RECORD)
        return Pages(name, named, words, data.reshape(-1).data)

    def _more(self, cursor: Cursor, word: int, record: int, again: int, name: str) -> Words:
        count = self._same(cursor, record, again)
        words = np.empty(count + 1, dtype=np.uint64)
        words[0] = word
        if count:
            with cursor.peek_view(count * record) as view:
                records = np.frombuffer(view, dtype=np.uint8).reshape(count, record)
                words[1:] = np.ascontiguousarray(records[:, :8]).view(">u8").reshape(count)
                filled = records[:, 8].any()
                del records
            if filled:
                raise cursor.broken("a zero page with a fill byte that is not zero")
            self._check_offsets(cursor, name, words)
            cursor.skip(count * record)
        return words

    @staticmethod
    def _same(cursor: Cursor, record: int, again: int) -> int:
        """How many whole records of exactly these flags come next."""
        most = min(cursor.available // record, LONGEST_RUN_PAGES)
        count, look = 0, _FIRST_LOOK
        with cursor.peek_view() as view:
            while count < most:
                take = min(look, most - count)
                part = np.frombuffer(view, dtype=np.uint8, count=take * record, offset=count * record)
                records = part.reshape(take, record)
                flags = (records[:, 6].astype(np.uint16) << 8 | records[:, 7]) & _FLAGS
                other = np.flatnonzero(flags != again)
                del part, records
                if other.size:
                    return count + int(other[0])
                count += take
                look *= 8
        return count

    def _check_offset(self, cursor: Cursor, name: str, offset: int, at: int) -> None:
        if self.known is not None and offset + TARGET_PAGE_BYTES > self.known[name]:
            raise cursor.broken(
                f"a page at {offset:#x} outside of RAM block '{name}' of {self.known[name]:#x} bytes", at=at
            )

    def _check_offsets(self, cursor: Cursor, name: str, words: Words) -> None:
        if self.known is not None and words.size:
            self._check_offset(cursor, name, int(words.max()) & ~_FLAGS, cursor.offset)

    # -- the block list --------------------------------------------------------------------------------------------

    def _blocks(self, cursor: Cursor, word: int, begin: int) -> RamBlocks:
        left = word & ~_FLAGS
        blocks: list[RamBlock] = []
        while left:
            block = self._block(cursor, left, blocks, begin)
            left -= block.used_length
            blocks.append(block)
        return self._listed(RamBlocks(word, tuple(blocks)))

    def _block(self, cursor: Cursor, left: int, blocks: list[RamBlock], begin: int) -> RamBlock:
        name = cursor.pull_string()
        length = cursor.pull_u64()
        if not name:
            raise cursor.broken("a RAM block without a name", at=begin)
        if len(blocks) >= MOST_BLOCKS:
            raise cursor.broken(f"more than {MOST_BLOCKS} RAM blocks", at=begin)
        if any(block.name == name for block in blocks):
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
        plain = self._block(cursor, left, blocks, begin)
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
        if self.known is not None:
            self.known.clear()
            self.known.update((block.name, block.used_length) for block in event.blocks)
        return event


# -- the other way ---------------------------------------------------------------------------------------------------


def encode_pages(event: Pages) -> bytes:
    """PAGE records in one buffer: one vectorised copy, whatever their number."""
    count = len(event.words)
    if len(event.data) != count * TARGET_PAGE_BYTES:
        raise LocalProtocolError(f"{count} pages with {len(event.data)} bytes of data")
    name = _name(event.block) if event.named else b""
    records = np.empty((count, _PAGE_RECORD), dtype=np.uint8)
    records[:, :8] = event.words.astype(">u8").view(np.uint8).reshape(count, 8)
    records[:, 8:] = np.frombuffer(event.data, dtype=np.uint8).reshape(count, TARGET_PAGE_BYTES)
    if not name:
        return records.tobytes()
    flat = records.reshape(-1)
    return b"".join((flat[:8].tobytes(), name, flat[8:].data))


def encode_zero_pages(event: ZeroPages) -> bytes:
    count = len(event.words)
    records = np.zeros((count, _ZERO_RECORD), dtype=np.uint8)
    records[:, :8] = event.words.astype(">u8").view(np.uint8).reshape(count, 8)
    raw = records.tobytes()
    return raw[:8] + _name(event.block) + raw[8:] if event.named else raw


def encode_ram(event: RamEvent) -> bytes:
    """One RAM event as bytes; the inverse of RamReader.read."""
    match event:
        case Pages():
            return encode_pages(event)
        case ZeroPages():
            return encode_zero_pages(event)
        case EncodedPage():
            name = _name(event.block) if event.named else b""
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
