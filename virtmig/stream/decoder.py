"""The main stream and the preempt channel, read: bytes in, events out (migration/savevm.c qemu_loadvm_state_main).

    decoder = QemuStreamDecoder()
    decoder.feed(data); for event in decoder.events(): ...; decoder.end()

A decoder says "need more" by yielding nothing, and ends with one RemoteProtocolError on the first broken rule. What it
keeps is bounded by its limits, never by a number from the peer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from virtmig.errors import RemoteProtocolError
from virtmig.stream.commands import Order, decode_command
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.device import Sizes, described_sizes, find_end, read_description, split_tail
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EndOfRam,
    EndOfStream,
    OpaqueDevices,
    Package,
    RamEvent,
    SectionBegin,
    SectionFooter,
    StreamHeader,
)
from virtmig.stream.ram import ALL_RECORDS, RamReader
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

#: what QEMU's own devices stay far below; its reader would take 4 GiB
SECTION_LIMIT_BYTES = 64 << 20
PACKAGE_LIMIT_BYTES = 64 << 20
DESCRIPTION_LIMIT_BYTES = 16 << 20
MOST_SECTIONS = 1 << 16
_MOST_SUBSECTIONS = 16
_SUBSECTIONS = ("configuration/target-page-bits", "configuration/capabilities", "configuration/uuid")
#: the capabilities that QEMU lists, because each changes the layout; any other one would change it unknown to us
_LISTED_CAPABILITIES = ("x-ignore-shared", "mapped-ram")

Event = (
    StreamHeader
    | Command
    | Package
    | SectionBegin
    | SectionFooter
    | DeviceSection
    | OpaqueDevices
    | EndOfStream
    | Description
    | RamEvent
)


class QemuStreamDecoder:
    """One main stream.

    `recovery`: the connection of a resumed postcopy, which begins without a header; `ram` is then handed on from the
    first connection, so that the blocks are known (their names and lengths are not checked without it).
    `saved`: the JSON description of a stream that lies whole in a file, read ahead (device.find_description): sections
    end where it says. `expect_description` False: the machine has suppress-vmdesc, the stream is over at EOF.
    `records`: what the two sides were set up for, see RamReader.
    """

    def __init__(
        self,
        channel: str = "main",
        *,
        recovery: bool = False,
        ram: RamReader | None = None,
        saved: dict[str, Any] | None = None,
        expect_description: bool = True,
        records: RamFlag = ALL_RECORDS,
        section_limit_bytes: int = SECTION_LIMIT_BYTES,
        package_limit_bytes: int = PACKAGE_LIMIT_BYTES,
        description_limit_bytes: int = DESCRIPTION_LIMIT_BYTES,
    ) -> None:
        self.cursor = Cursor(channel)
        self.ram = ram or RamReader(known=None if recovery else {}, records=records)
        self.order = Order(resumed=recovery)
        if recovery:
            self.ram.restart()
        self.section_limit_bytes = section_limit_bytes
        self.package_limit_bytes = package_limit_bytes
        self.description_limit_bytes = description_limit_bytes
        #: id -> (name, instance) of the sections that have begun
        self.sections: dict[int, tuple[str, int]] = {}
        #: whether sections end with footers; None until the first one ended
        self.footers: bool | None = None
        self._expect_description = expect_description
        self._sizes: Sizes | None = described_sizes(saved) if saved is not None else None
        self._lengths: list[tuple[str, int, int]] = []  # of the FULL sections read: name, instance, bytes
        self._eof = False
        self._over = False
        self._dead = False
        self._nested = False
        self._live: int | None = None  # id of the RAM section whose records are being read
        self._closing: int | None = None  # id of the section whose footer comes next
        self._searched = 0  # how far the data of a section was looked through
        self._ready: deque[Event] = deque()
        self._begun = recovery

    @property
    def finished(self) -> bool:
        """Nothing more is to come, as far as the stream itself says."""
        return self._over or (self._eof and (self.order.listening or not self._expect_description))

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if not self._dead:
            self.cursor.feed(data)

    def end(self) -> None:
        """No more bytes will come: `events()` then gives what is left, or raises for what is cut off."""
        self.cursor.end()

    def events(self) -> Iterator[Event]:
        """What can be read now. Raises RemoteProtocolError once; afterwards the decoder is dead and yields nothing."""
        while not self._dead:
            try:
                event = self._ready.popleft() if self._ready else self._next()
            except NeedData:
                if not self.cursor.ended:
                    return
                self._dead = True
                if self._ends_well():
                    return
                raise self.cursor.broken(f"the stream ends inside {self._doing()}") from None
            except RemoteProtocolError:
                self._dead = True
                raise
            yield event

    def _next(self) -> Event:
        if self._live is not None:
            return self._in_ram(self._live)
        if self._closing is not None:
            footer = self._close(self._closing)
            if footer is not None:
                return footer
        if not self._begun:
            return self._header()
        if self._eof:
            return self._description()
        if self.footers is False and self._sizes is None and self._is_full():
            return self._tail()
        return self._item()

    def _ends_well(self) -> bool:
        """EOF was read; or a package is over; or the connection of a postcopy broke between two items."""
        between = self._live is None and (self._closing is None or self.footers is False)
        return self.cursor.available == 0 and (self._eof or (between and (self._nested or self.order.listening)))

    def _doing(self) -> str:
        if self._live is not None:
            return "the RAM section"
        return "an item" if self._begun else "the header"

    # -- header ----------------------------------------------------------------------------------------------------

    def _header(self) -> Event:
        cursor = self.cursor
        with cursor.element():
            magic = cursor.pull_u32()
            if magic != QEMU_VM_FILE_MAGIC:
                raise cursor.broken(f"not a migration stream: {magic:#010x} where QEVM was expected", at=0)
            version = cursor.pull_u32()
            if version != QEMU_VM_FILE_VERSION:
                obsolete = " (obsolete)" if version == 2 else ""
                raise cursor.broken(f"stream version {version}{obsolete}, {QEMU_VM_FILE_VERSION} is supported", at=4)
            machine: str | None = None
            subsections: list[tuple[str, int, bytes]] = []
            capabilities: frozenset[str] = frozenset()
            if cursor.peek_u8() == Item.CONFIGURATION:
                cursor.skip(1)
                length = cursor.pull_u32()
                if not 0 < length <= 255:
                    raise cursor.broken(f"a machine type name of {length} bytes")
                raw = cursor.pull_bytes(length, 255, "a machine type name")
                if not raw.isascii():
                    raise cursor.broken(f"a machine type name that is not ASCII: {raw!r}")
                machine = raw.decode()
                while cursor.peek_u8() == Item.SUBSECTION:
                    if len(subsections) >= _MOST_SUBSECTIONS:
                        raise cursor.broken(f"more than {_MOST_SUBSECTIONS} subsections of the configuration")
                    name, subversion, payload, found = self._subsection()
                    subsections.append((name, subversion, payload))
                    capabilities |= found
        self.ram.capabilities = capabilities
        self._begun = True
        return StreamHeader(version, machine, tuple(subsections), capabilities)

    def _subsection(self) -> tuple[str, int, bytes, frozenset[str]]:
        cursor = self.cursor
        cursor.skip(1)
        name = cursor.pull_string()
        version = cursor.pull_u32()
        if name not in _SUBSECTIONS or version != 1:
            raise cursor.broken(f"an unknown subsection of the configuration: '{name}' version {version}")
        if name == "configuration/target-page-bits":
            payload = cursor.pull_bytes(4, 4, name)
            if 1 << min(int.from_bytes(payload, "big"), 64) != TARGET_PAGE_BYTES:
                bits = int.from_bytes(payload, "big")
                raise cursor.broken(f"target pages of {bits} bits; {TARGET_PAGE_BYTES} bytes are supported")
            return name, version, payload, frozenset()
        if name == "configuration/uuid":
            return name, version, cursor.pull_bytes(16, 16, name), frozenset()
        count = cursor.pull_u32()
        if count > len(_LISTED_CAPABILITIES):
            raise cursor.broken(f"{count} capabilities in the configuration")
        names = [cursor.pull_string() for _ in range(count)]
        for each in names:
            if each not in _LISTED_CAPABILITIES or names.count(each) > 1:
                raise cursor.broken(f"an unknown or repeated capability '{each}' in the configuration")
        payload = count.to_bytes(4, "big") + b"".join(bytes([len(n)]) + n.encode() for n in names)
        return name, version, payload, frozenset(names)

    # -- items -----------------------------------------------------------------------------------------------------

    def _item(self) -> Event:
        cursor = self.cursor
        with cursor.element():
            begin = cursor.offset
            kind = cursor.pull_u8()
            if kind == Item.COMMAND:
                return self._command(begin)
            if kind in (Item.SECTION_START, Item.SECTION_FULL):
                return self._section(Item(kind), begin)
            if kind in (Item.SECTION_PART, Item.SECTION_END):
                section_id = cursor.pull_u32()
                if section_id not in self.sections and self.order.resumed and not self.sections:
                    self.sections[section_id] = (RAM_IDSTR, 0)  # what a resumed postcopy goes on with is RAM
                if section_id not in self.sections:
                    raise cursor.broken(f"a part of section {section_id}, which never began", at=begin)
                name, instance = self.sections[section_id]
                if name != RAM_IDSTR:
                    return self._device(Item(kind), section_id, name, instance, 0, begin)
                self._live = section_id
                return SectionBegin(Item(kind), section_id, RAM_IDSTR)
            if kind == Item.SECTION_FOOTER:
                section_id = cursor.pull_u32()
                raise cursor.broken(f"a footer of section {section_id}, which never began", at=begin)
            if kind == Item.EOF and not self._nested:
                self._eof = True
                return EndOfStream()
            raise cursor.broken(f"an unknown item {kind:#04x}", at=begin)

    def _section(self, kind: Item, begin: int) -> Event:
        cursor = self.cursor
        section_id = cursor.pull_u32()
        idstr = cursor.pull_string()
        instance_id, version_id = cursor.pull_u32(), cursor.pull_u32()
        if not idstr:
            raise cursor.broken("a section without a name", at=begin)
        if kind == Item.SECTION_START and section_id in self.sections:
            raise cursor.broken(f"section {section_id} begins twice", at=begin)
        if len(self._lengths) >= MOST_SECTIONS or len(self.sections) >= MOST_SECTIONS:
            raise cursor.broken(f"more than {MOST_SECTIONS} sections", at=begin)
        if idstr != RAM_IDSTR:
            event = self._device(kind, section_id, idstr, instance_id, version_id, begin)
            self.sections[section_id] = (idstr, instance_id)
            return event
        if kind == Item.SECTION_FULL:
            raise cursor.broken("RAM in a section of one piece", at=begin)
        if version_id != RAM_VERSION:
            raise cursor.broken(f"RAM of version {version_id}, {RAM_VERSION} is supported", at=begin)
        if (idstr, instance_id) in self.sections.values():
            raise cursor.broken("RAM begins twice", at=begin)
        self.sections[section_id] = (idstr, instance_id)
        self._live = section_id
        return SectionBegin(kind, section_id, idstr, instance_id, version_id)

    def _in_ram(self, section_id: int) -> Event:
        event = self.ram.read(self.cursor)
        if isinstance(event, EndOfRam):
            self._live, self._closing = None, section_id
        return event

    def _close(self, section_id: int) -> SectionFooter | None:
        """The footer of the section that was read. Streams of machine types up to 2.3 have none; all or no section."""
        cursor = self.cursor
        with cursor.element():
            begin = cursor.offset
            if self.footers is False or (self.footers is None and cursor.peek_u8() != Item.SECTION_FOOTER):
                self.footers, self._closing = False, None
                return None
            kind = cursor.pull_u8()
            if kind != Item.SECTION_FOOTER:
                raise cursor.broken(f"{kind:#04x} where the footer of section {section_id} was expected", at=begin)
            found = cursor.pull_u32()
            if found != section_id:
                raise cursor.broken(f"the footer of section {found} behind section {section_id}", at=begin)
        self.footers, self._closing = True, None
        return SectionFooter(section_id)

    # -- devices ---------------------------------------------------------------------------------------------------

    def _device(
        self, kind: Item, section_id: int, idstr: str, instance_id: int, version_id: int, begin: int
    ) -> DeviceSection:
        cursor = self.cursor
        described = self._sizes.get((idstr, instance_id)) if self._sizes and kind == Item.SECTION_FULL else None
        if described:
            length = described[0]
        else:
            found, length = find_end(
                cursor, section_id, self._searched, sections={*self.sections, section_id},
                ends_open=not self._expect_description or self.order.listening, nested=self._nested,
            )  # fmt: skip
            if not found:
                self._searched = length
                if cursor.available > self.section_limit_bytes:
                    limit = self.section_limit_bytes
                    raise cursor.broken(f"section '{idstr}' has no end within {limit} bytes", at=begin)
                raise NeedData(1)
        data = cursor.pull_bytes(length, self.section_limit_bytes, f"section '{idstr}'")
        if described:
            described.pop(0)
        if kind == Item.SECTION_FULL:
            self._lengths.append((idstr, instance_id, length))
        self._closing, self._searched = section_id, 0
        return DeviceSection(kind, section_id, idstr, instance_id, version_id, data, begin)

    def _is_full(self) -> bool:
        return self.cursor.peek_u8() == Item.SECTION_FULL

    def _tail(self) -> Event:
        """What is left of a stream without footers: its device sections are cut when the description has come."""
        cursor = self.cursor
        at = cursor.find(b"\x00\x06", self._searched)
        while at >= 0:
            self._searched = at
            with cursor.peek_view() as view:
                head = bytes(view[at : at + 8])
            length = int.from_bytes(head[2:6], "big")
            if len(head) < 8 and not cursor.ended:
                raise NeedData(8 - len(head))
            if len(head) == 8 and head[6:] == b'{"' and length <= self.description_limit_bytes:
                if cursor.available < at + 6 + length and not cursor.ended:
                    raise NeedData(at + 6 + length - cursor.available)
                if cursor.available >= at + 6 + length:
                    with cursor.peek_view() as view:
                        tail, text = bytes(view[:at]), bytes(view[at + 6 : at + 6 + length])
                    try:
                        sections = split_tail(tail, read_description(text), cursor.offset)
                    except RemoteProtocolError:
                        pass  # not the description; if none is found the devices stay opaque
                    else:
                        cursor.skip(at + 6 + length)
                        self._eof = self._over = True
                        self._ready.extend([*sections, EndOfStream(), Description(text, length)])
                        return self._ready.popleft()
            at = cursor.find(b"\x00\x06", at + 1)
        self._searched = max(self._searched, cursor.available - 1)
        if cursor.available > self.section_limit_bytes + self.description_limit_bytes:
            raise cursor.broken(f"device sections without an end within {cursor.available} bytes")
        if not cursor.ended:
            raise NeedData(1)
        if cursor.peek_u8(cursor.available - 1) != Item.EOF:
            raise cursor.broken("the stream ends inside the device sections", at=cursor.offset + cursor.available)
        begins_at = cursor.offset
        data = cursor.pull_bytes(cursor.available - 1, cursor.available, "the device sections")
        return OpaqueDevices(data, begins_at)

    def _description(self) -> Event:
        cursor = self.cursor
        if self.finished:
            cursor.need(1)
            raise cursor.broken(f"{cursor.available} bytes behind the end of the stream")
        with cursor.element():
            begin = cursor.offset
            kind = cursor.pull_u8()
            if kind != Item.VMDESCRIPTION:
                raise cursor.broken(f"{kind:#04x} behind the end of the stream", at=begin)
            if cursor.ended and cursor.available < 4:
                self._over = True
                return Description(b"", 0, cursor.pull_bytes(cursor.available, 4, "a description"))
            length = cursor.pull_u32()
            limit = self.description_limit_bytes
            if length > limit:
                raise cursor.broken(f"a description of {length} bytes, at most {limit} are accepted")
            if cursor.ended and cursor.available < length:
                text = cursor.pull_bytes(cursor.available, length, "a description")
            else:
                text = cursor.pull_bytes(length, length, "a description")
        self._over = True
        return Description(text, length, disagreements=self._disagreements(text) if len(text) == length else ())

    def _disagreements(self, text: bytes) -> tuple[str, ...]:
        """The sections were cut by their footers; the description says whether that was right."""
        try:
            sizes = described_sizes(read_description(text))
        except RemoteProtocolError as error:
            return (str(error),)
        found = []
        for name, instance, length in self._lengths:
            described = sizes.get((name, instance))
            if described and described[0] != length:
                found.append(f"section '{name}' ({instance}) has {length} bytes, {described[0]} are described")
            if described:
                described.pop(0)
        return tuple(found)

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, begin: int) -> Event:
        command = decode_command(self.cursor, self.ram.known)
        if command.number == Number.PACKAGED:
            return self._package(command.value or 0, begin)
        self.order.check(self.cursor, command.number, begin)
        self.ram.postcopy = self.order.listening
        return command

    def _package(self, length: int, begin: int) -> Package:
        cursor = self.cursor
        if self._nested:
            raise cursor.broken("a package inside a package", at=begin)
        if length == 0 or length > self.package_limit_bytes:
            raise cursor.broken(
                f"a package of {length} bytes, at most {self.package_limit_bytes} are accepted", at=begin
            )
        origin = cursor.offset
        inside = cursor.pull_bytes(length, self.package_limit_bytes, "a package")
        nested = QemuStreamDecoder(ram=self.ram, section_limit_bytes=length)
        nested.cursor = Cursor(cursor.channel, origin)
        nested.order, nested.sections, nested.footers = self.order, self.sections, self.footers
        nested._lengths, nested._nested, nested._begun = self._lengths, True, True
        nested.feed(inside)
        nested.end()
        return Package(length, tuple(nested.events()))


class PreemptDecoder:
    """The preempt channel: bare RAM records, with or without a final EOS. `known` are the blocks of the main stream.

    `main` is the reader of the main stream's RAM, when there is one: blocks and huge pages are those it was told.
    """

    def __init__(
        self, channel: str = "preempt", known: dict[str, int] | None = None, *, main: RamReader | None = None
    ) -> None:
        self.cursor = Cursor(channel)
        self.ram = RamReader(known=main.known if main is not None else known)
        self.ram.postcopy = True
        self._main = main
        self._dead = False
        self._eos = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if not self._dead:
            self.cursor.feed(data)

    def end(self) -> None:
        self.cursor.end()

    def events(self) -> Iterator[RamEvent]:
        """What can be read now. Raises RemoteProtocolError once; afterwards the decoder is dead and yields nothing."""
        while not self._dead and self.cursor.available:
            try:
                if self._eos:
                    raise self.cursor.broken(f"{self.cursor.available} bytes behind the end of the channel")
                if self._main is not None:
                    self.ram.huge = self._main.huge
                event = self.ram.read(self.cursor)
                self._eos = isinstance(event, EndOfRam)
            except NeedData:
                if not self.cursor.ended:
                    return
                self._dead = True
                raise self.cursor.broken("the channel ends inside a record") from None
            except RemoteProtocolError:
                self._dead = True
                raise
            yield event
