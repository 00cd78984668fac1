"""The main stream, written: events to the bytes they came from, or what a source sends.

`encode_events` writes any events. MainEncoder is for a source: it keeps what the wire remembers (which block was named
last, which section is open) and refuses what a destination would refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from virtmig.errors import LocalProtocolError
from virtmig.stream.commands import command, counted, discard, ping
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EncodedPage,
    EndOfRam,
    EndOfStream,
    MultifdFlush,
    OpaqueDevices,
    Package,
    Pages,
    RamBlock,
    RamBlocks,
    SectionBegin,
    SectionFooter,
    StreamHeader,
    Words,
    ZeroPages,
)
from virtmig.stream.ram import encode_ram
from virtmig.stream.wire import (
    QEMU_VM_FILE_MAGIC,
    QEMU_VM_FILE_VERSION,
    RAM_IDSTR,
    RAM_VERSION,
    TARGET_PAGE_BYTES,
    Item,
    RamFlag,
)
from virtmig.stream.wire import Command as Number

__all__ = ["MainEncoder", "PreemptEncoder", "command", "discard", "encode_event", "encode_events", "ping"]

Buffer = bytes | memoryview


def encode_events(events: Iterable[object]) -> Iterator[Buffer]:
    """The bytes of each event in turn. For decoded events these are exactly the bytes they came from."""
    for event in events:
        yield encode_event(event)


def encode_event(event: object) -> Buffer:
    """One event as bytes. Raises LocalProtocolError for what is no event of a main stream."""
    match event:
        case StreamHeader():
            return _header(event)
        case Command():
            if len(event.payload) > 0xFFFF:
                raise LocalProtocolError(f"a command with {len(event.payload)} bytes")
            return bytes([Item.COMMAND]) + _u16(event.number) + _u16(len(event.payload)) + event.payload
        case Package():
            inside = b"".join(encode_events(event.events))
            if len(inside) != event.length:
                raise LocalProtocolError(f"a package of {len(inside)} bytes that says {event.length}")
            return bytes([Item.COMMAND]) + _u16(Number.PACKAGED) + _u16(4) + _u32(event.length) + inside
        case SectionBegin() | DeviceSection():
            data = event.data if isinstance(event, DeviceSection) else b""
            head = bytes([event.kind]) + _u32(event.section_id)
            if event.kind in (Item.SECTION_START, Item.SECTION_FULL):
                head += counted(event.idstr) + _u32(event.instance_id) + _u32(event.version_id)
            return head + data
        case SectionFooter():
            return bytes([Item.SECTION_FOOTER]) + _u32(event.section_id)
        case OpaqueDevices():
            return event.data
        case EndOfStream():
            return bytes([Item.EOF])
        case Description():
            head = _u32(event.length) if event.head is None else event.head
            return bytes([Item.VMDESCRIPTION]) + head + event.text
    return encode_ram(event)  # type: ignore[arg-type]


def _header(event: StreamHeader) -> bytes:
    parts = [_u32(QEMU_VM_FILE_MAGIC), _u32(event.version)]
    if event.machine is not None:
        raw = event.machine.encode("ascii", "replace")
        if not event.machine.isascii() or not 0 < len(raw) < 256:
            raise LocalProtocolError(f"{event.machine!r:.60} is no name of a machine type")
        parts += [bytes([Item.CONFIGURATION]), _u32(len(raw)), raw]
        for name, version, payload in event.subsections:
            parts += [bytes([Item.SUBSECTION]), counted(name), _u32(version), payload]
    return b"".join(parts)


def _u16(value: int) -> bytes:
    return int(value).to_bytes(2, "big")


def _u32(value: int) -> bytes:
    return int(value).to_bytes(4, "big")


class PreemptEncoder:
    """Bare RAM records: which block was named last is remembered for this channel alone."""

    def __init__(self, channel: str = "preempt") -> None:
        self.channel = channel
        self._block = ""

    def pages(self, block: str, page_numbers: Words | Sequence[int], data: Buffer) -> Buffer:
        """PAGE records; `data` holds the pages one behind the other, in the order of `page_numbers`."""
        words, named = self._words(block, page_numbers, RamFlag.PAGE)
        view = memoryview(data).cast("B")
        return encode_event(Pages(block, named, words, view))

    def zero_pages(self, block: str, page_numbers: Words | Sequence[int]) -> Buffer:
        words, named = self._words(block, page_numbers, RamFlag.ZERO)
        return encode_event(ZeroPages(block, named, words))

    def end(self) -> bytes:
        """The final EOS: a 7.2 destination waits for it, newer ones do not want it."""
        return bytes(encode_event(EndOfRam()))

    def forget(self) -> None:
        """Name the block again: the start of postcopy, a recovery, a change of the block list."""
        self._block = ""

    def _words(self, block: str, page_numbers: Words | Sequence[int], kind: RamFlag) -> tuple[Words, bool]:
        numbers = np.asarray(page_numbers, np.uint64)
        if not numbers.size:
            raise LocalProtocolError("a run of no pages", channel=self.channel)
        self._check(block, numbers)
        words = numbers * np.uint64(TARGET_PAGE_BYTES) | np.uint64(kind | RamFlag.CONTINUE)
        named = block != self._block
        if named:
            words[0] = int(numbers[0]) * TARGET_PAGE_BYTES | int(kind)
        self._block = block
        return words, named

    def _check(self, block: str, numbers: Words) -> None:
        """Nothing is known of the blocks here."""


class MainEncoder(PreemptEncoder):
    """What a source writes on main, piece by piece: each call gives the bytes to send.

        begin, [commands], ram_begin, ram_part / pages / ram_section_end ..., ram_end, device ..., eof

    `footers` False and no `machine` in `begin` is what machine types up to 2.3 do. Raises LocalProtocolError for what a
    destination would refuse.
    """

    def __init__(self, *, ram_section_id: int = 1, footers: bool = True) -> None:
        super().__init__("main")
        self.ram_section_id = ram_section_id
        self.footers = footers
        self.blocks: dict[str, int] = {}
        self._state = "new"  # new, items, ram (inside a section), over

    def begin(self, machine: str | None, subsections: Sequence[tuple[str, int, bytes]] = ()) -> Buffer:
        """The header. Capabilities that change the layout (x-ignore-shared) go into `subsections`."""
        self._go("new", "items")
        return encode_event(StreamHeader(QEMU_VM_FILE_VERSION, machine, tuple(subsections)))

    def begin_recovery(self, blocks: dict[str, int]) -> bytes:
        """No header: the connection of a resumed postcopy goes on where the old one broke."""
        self._go("new", "items")
        self.blocks = dict(blocks)
        return b""

    def command(self, what: Command) -> Buffer:
        """A command between sections; see commands.py for those with a payload."""
        self._go("items", "items")
        if what.number == Number.PACKAGED:
            raise LocalProtocolError("a package goes out with package()", channel=self.channel)
        if what.number == Number.POSTCOPY_LISTEN:
            self.forget()
        return encode_event(what)

    def package(self, events: Iterable[object]) -> Buffer:
        """PACKAGED with these commands and device sections in it."""
        self._go("items", "items")
        inside = tuple(events)
        if any(isinstance(event, Package | EndOfStream | StreamHeader) for event in inside):
            raise LocalProtocolError("a package holds commands and sections only", channel=self.channel)
        self.forget()
        return encode_event(Package(sum(len(encode_event(event)) for event in inside), inside))

    def ram_begin(self, blocks: Sequence[RamBlock], *, flush: bool = False) -> bytes:
        """The START section of RAM: the block list, [MULTIFD_FLUSH], EOS, footer."""
        if self.blocks:
            raise LocalProtocolError("RAM begins twice", channel=self.channel)
        self._go("items", "items")
        names = [block.name for block in blocks]
        total = sum(block.used_length for block in blocks)
        if len(set(names)) != len(names) or any(block.used_length % TARGET_PAGE_BYTES for block in blocks):
            raise LocalProtocolError("a RAM block twice, or one that is not whole pages", channel=self.channel)
        self.blocks = {block.name: block.used_length for block in blocks}
        return self._join(
            SectionBegin(Item.SECTION_START, self.ram_section_id, RAM_IDSTR, 0, RAM_VERSION),
            RamBlocks(total | RamFlag.MEM_SIZE, tuple(blocks)),
            *([MultifdFlush()] if flush else []),
            EndOfRam(),
            *self._footer(self.ram_section_id),
        )

    def ram_part(self) -> Buffer:
        """Open a PART section; pages go inside."""
        return self._open(Item.SECTION_PART)

    def ram_end(self) -> Buffer:
        """Open the END section, RAM's last."""
        return self._open(Item.SECTION_END)

    def multifd_flush(self) -> Buffer:
        """The word 0x200 between pages (machine types from 8.1, with multifd)."""
        self._go("ram", "ram")
        return encode_event(MultifdFlush())

    def xbzrle_page(self, block: str, page_number: int, encoded: bytes) -> Buffer:
        """`encoded` as from xbzrle.encode_xbzrle."""
        words, named = self._words(block, [page_number], RamFlag.XBZRLE)
        return encode_event(EncodedPage(block, named, int(words[0]), encoded))

    def ram_section_end(self) -> bytes:
        """EOS and footer: closes what ram_part or ram_end opened."""
        self._go("ram", "items")
        return self._join(EndOfRam(), *self._footer(self.ram_section_id))

    def device(self, section: DeviceSection) -> bytes:
        """A whole section of a device with its footer, as it was received or built."""
        self._go("items", "items")
        return self._join(section, *self._footer(section.section_id))

    def eof(self, description: bytes | None = None) -> bytes:
        """The end; the JSON description behind it in precopy, unless the machine has suppress-vmdesc."""
        self._go("items", "over")
        return self._join(EndOfStream(), *([Description(description, len(description))] if description else []))

    def end(self) -> bytes:
        raise LocalProtocolError("main ends with eof()", channel=self.channel)

    def _open(self, kind: Item) -> Buffer:
        if not self.blocks:
            raise LocalProtocolError("RAM has not begun", channel=self.channel)
        self._go("items", "ram")
        return encode_event(SectionBegin(kind, self.ram_section_id, RAM_IDSTR))

    def _footer(self, section_id: int) -> list[SectionFooter]:
        return [SectionFooter(section_id)] if self.footers else []

    def _go(self, expected: str, after: str) -> None:
        if self._state != expected:
            raise LocalProtocolError(
                f"the stream is at '{self._state}' and would have to be at '{expected}'", channel=self.channel
            )
        self._state = after

    def _check(self, block: str, numbers: Words) -> None:
        self._go("ram", "ram")
        length = self.blocks.get(block)
        if length is None or int(numbers.max()) >= length // TARGET_PAGE_BYTES:
            raise LocalProtocolError(
                f"page {int(numbers.max())} of '{block}', which {'is not listed' if length is None else 'is smaller'}",
                channel=self.channel,
            )

    @staticmethod
    def _join(*events: object) -> bytes:
        return b"".join(encode_events(events))
