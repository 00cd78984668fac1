"""The main stream and the preempt channel, read: bytes in, events out (migration/savevm.c qemu_loadvm_state_main).

    decoder = QemuStreamDecoder()
    decoder.feed(data); for event in decoder.events(): ...; decoder.end()

A decoder says "need more" by yielding nothing, and ends with one RemoteProtocolError on the first broken rule. What it
keeps is bounded by its limits, never by a number from the peer.
"""

from __future__ import annotations

from collections.abc import Iterator

from virtmig.errors import RemoteProtocolError
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.device import find_end
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EndOfRam,
    EndOfStream,
    Package,
    RamEvent,
    SectionBegin,
    SectionFooter,
    StreamHeader,
)
from virtmig.stream.ram import RamReader
from virtmig.stream.wire import (
    COMMAND_LENGTH,
    POSTCOPY_RAM_DISCARD_VERSION,
    QEMU_VM_FILE_MAGIC,
    QEMU_VM_FILE_VERSION,
    RAM_IDSTR,
    RAM_VERSION,
    TARGET_PAGE_BYTES,
    Item,
)
from virtmig.stream.wire import Command as Command_

#: what QEMU's own devices stay far below; its reader would take 4 GiB
SECTION_LIMIT_BYTES = 64 << 20
PACKAGE_LIMIT_BYTES = 64 << 20
DESCRIPTION_LIMIT_BYTES = 16 << 20
_MOST_CAPABILITIES = 64
_MOST_SUBSECTIONS = 16

Event = (
    StreamHeader
    | Command
    | Package
    | SectionBegin
    | SectionFooter
    | DeviceSection
    | EndOfStream
    | Description
    | RamEvent
)


class QemuStreamDecoder:
    """One main stream. `recovery`: the connection of a resumed postcopy, which begins without a header.

    `ram` may be handed in by a recovery, so that the blocks of the first connection are known.
    """

    def __init__(
        self,
        channel: str = "main",
        *,
        recovery: bool = False,
        ram: RamReader | None = None,
        section_limit_bytes: int = SECTION_LIMIT_BYTES,
        package_limit_bytes: int = PACKAGE_LIMIT_BYTES,
    ) -> None:
        self.cursor = Cursor(channel)
        self.ram = ram or RamReader(known={} if not recovery else None)
        self.section_limit_bytes = section_limit_bytes
        self.package_limit_bytes = package_limit_bytes
        self.sections: dict[int, tuple[str, int]] = {}
        self.finished = False
        self._dead = False
        self._nested = False
        self._postcopy = False
        self._recovery = recovery
        self._next = self._item if recovery else self._header
        self._live: int | None = None  # id of the RAM section whose records are being read

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self.cursor.feed(data)

    def end(self) -> None:
        """No more bytes will come: `events()` then gives what is left, or raises for what is cut off."""
        self.cursor.end()

    def events(self) -> Iterator[Event]:
        """What can be read now. Raises RemoteProtocolError once; afterwards the decoder is dead and yields nothing."""
        while not self._dead:
            try:
                if self.finished and self.cursor.available == 0:
                    return
                yield self._next()
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

    def _ends_well(self) -> bool:
        return self.cursor.available == 0 and (self.finished or (self._postcopy and self._live is None))

    def _doing(self) -> str:
        if self._live is not None:
            return "the RAM section"
        return {self._header: "the header", self._description: "the description"}.get(self._next, "an item")

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
                    name, payload, found = self._subsection()
                    subsections.append((name[0], name[1], payload))
                    capabilities |= found
        self.ram.capabilities = capabilities
        self._next = self._item
        return StreamHeader(version, machine, tuple(subsections), capabilities)

    def _subsection(self) -> tuple[tuple[str, int], bytes, frozenset[str]]:
        cursor = self.cursor
        cursor.skip(1)
        name = cursor.pull_string()
        version = cursor.pull_u32()
        if name == "configuration/target-page-bits":
            return (name, version), cursor.pull_bytes(4, 4, name), frozenset()
        if name == "configuration/uuid":
            return (name, version), cursor.pull_bytes(16, 16, name), frozenset()
        if name == "configuration/capabilities":
            count = cursor.pull_u32()
            if count > _MOST_CAPABILITIES:
                raise cursor.broken(f"{count} capabilities in the configuration")
            names = [cursor.pull_string() for _ in range(count)]
            payload = count.to_bytes(4, "big") + b"".join(bytes([len(n)]) + n.encode() for n in names)
            return (name, version), payload, frozenset(names)
        raise cursor.broken(f"an unknown subsection of the configuration: '{name}'")

    # -- items -----------------------------------------------------------------------------------------------------

    def _item(self) -> Event:
        cursor = self.cursor
        if self._live is not None:
            return self._in_ram()
        with cursor.element():
            begin = cursor.offset
            kind = cursor.pull_u8()
            if kind == Item.COMMAND:
                return self._command(begin)
            if kind in (Item.SECTION_START, Item.SECTION_FULL):
                return self._section(Item(kind), begin)
            if kind in (Item.SECTION_PART, Item.SECTION_END):
                section_id = cursor.pull_u32()
                if section_id not in self.sections and self._recovery:
                    self.sections[section_id] = (RAM_IDSTR, 0)  # what a resumed postcopy goes on with is RAM
                if section_id not in self.sections:
                    raise cursor.broken(f"a part of section {section_id}, which never began", at=begin)
                if self.sections[section_id][0] != RAM_IDSTR:
                    return self._device(Item(kind), section_id, "", 0, 0, begin)
                self._live = section_id
                return SectionBegin(Item(kind), section_id, RAM_IDSTR)
            if kind == Item.SECTION_FOOTER:
                return self._footer(begin)
            if kind == Item.EOF and not self._nested:
                self.finished = True
                self._next = self._description
                return EndOfStream()
            raise cursor.broken(f"an unknown item {kind:#04x}", at=begin)

    def _footer(self, begin: int) -> SectionFooter:
        section_id = self.cursor.pull_u32()
        if section_id not in self.sections:
            raise self.cursor.broken(f"a footer of section {section_id}, which never began", at=begin)
        return SectionFooter(section_id)

    def _in_ram(self) -> Event:
        assert self._live is not None
        event = self.ram.read(self.cursor)
        if isinstance(event, EndOfRam):
            self._expect_footer(self._live)
        return event

    def _expect_footer(self, section_id: int) -> None:
        """After the records comes the footer of this very section; streams of machine types up to 2.3 have none."""

        def footer() -> Event:
            cursor = self.cursor
            with cursor.element():
                if cursor.peek_u8() == Item.SECTION_FOOTER:
                    begin = cursor.offset
                    cursor.skip(1)
                    found = cursor.pull_u32()
                    if found != section_id:
                        raise cursor.broken(f"the footer of section {found} behind section {section_id}", at=begin)
                    self._next = self._item
                    return SectionFooter(section_id)
            self._next = self._item
            return self._item()

        self._live = None
        self._next = footer

    def _section(self, kind: Item, begin: int) -> Event:
        cursor = self.cursor
        section_id = cursor.pull_u32()
        idstr = cursor.pull_string()
        instance_id, version_id = cursor.pull_u32(), cursor.pull_u32()
        if not idstr:
            raise cursor.broken("a section without a name", at=begin)
        if kind == Item.SECTION_START and section_id in self.sections:
            raise cursor.broken(f"section {section_id} begins twice", at=begin)
        if idstr != RAM_IDSTR:
            event = self._device(kind, section_id, idstr, instance_id, version_id, begin)
            self.sections[section_id] = (idstr, instance_id)
            return event
        if version_id > RAM_VERSION:
            raise cursor.broken(f"RAM of version {version_id}, at most {RAM_VERSION} is known", at=begin)
        self.sections[section_id] = (idstr, instance_id)
        self._live = section_id
        return SectionBegin(kind, section_id, idstr, instance_id, version_id)

    def _device(
        self, kind: Item, section_id: int, idstr: str, instance_id: int, version_id: int, begin: int
    ) -> DeviceSection:
        cursor = self.cursor
        with cursor.peek_view() as view:
            length = find_end(view, section_id, ended=cursor.ended, nested=self._nested)
        if length is None:
            if cursor.available > self.section_limit_bytes:
                raise cursor.broken(f"section '{idstr}' has no end within {self.section_limit_bytes} bytes", at=begin)
            raise NeedData(1)
        data = cursor.pull_bytes(length, self.section_limit_bytes, f"section '{idstr}'")
        self._expect_footer(section_id)
        return DeviceSection(kind, section_id, idstr, instance_id, version_id, data, begin)

    def _description(self) -> Event:
        cursor = self.cursor
        with cursor.element():
            begin = cursor.offset
            kind = cursor.pull_u8()
            if kind != Item.VMDESCRIPTION:
                raise cursor.broken(f"{kind:#04x} behind the end of the stream", at=begin)
            length = cursor.pull_u32()
            if length > DESCRIPTION_LIMIT_BYTES:
                raise cursor.broken(f"a description of {length} bytes, at most {DESCRIPTION_LIMIT_BYTES} are accepted")
            if cursor.ended and cursor.available < length:
                return Description(cursor.pull_bytes(cursor.available, length, "a description"), length)
            text = cursor.pull_bytes(length, DESCRIPTION_LIMIT_BYTES, "a description")
        self._next = self._over
        return Description(text, length)

    def _over(self) -> Event:
        raise self.cursor.broken(f"{self.cursor.available} bytes behind the end of the stream")

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, begin: int) -> Event:
        cursor = self.cursor
        number, length = cursor.pull_u16(), cursor.pull_u16()
        try:
            command = Command_(number)
        except ValueError:
            raise cursor.broken(f"an unknown command {number:#x} of {length} bytes", at=begin) from None
        expected = COMMAND_LENGTH.get(command)
        if command is Command_.INVALID or (expected is not None and length != expected):
            raise cursor.broken(f"{command.name} of {length} bytes, {expected or 0} are expected", at=begin)
        payload = cursor.pull_bytes(length, 0xFFFF, command.name)
        if command is Command_.PACKAGED:
            return self._package(payload, begin)
        if command is Command_.PING:
            return Command(number, payload, value=int.from_bytes(payload, "big"))
        if command is Command_.POSTCOPY_ADVISE and length not in (0, 16):
            raise cursor.broken(f"POSTCOPY_ADVISE of {length} bytes, 0 or 16 are expected", at=begin)
        if command is Command_.RECV_BITMAP:
            if length < 2 or payload[0] != length - 1 or not payload.isascii():
                raise cursor.broken("RECV_BITMAP whose name does not fill it", at=begin)
            return Command(number, payload, name=payload[1:].decode())
        if command is Command_.POSTCOPY_RAM_DISCARD:
            return self._discard(number, payload, begin)
        if command in (Command_.POSTCOPY_RUN, Command_.POSTCOPY_RESUME):
            self._postcopy = True
        return Command(number, payload)

    def _discard(self, number: int, payload: bytes, begin: int) -> Command:
        cursor = self.cursor
        name_length = payload[1] if len(payload) > 1 else 0
        head = 3 + name_length
        if (
            len(payload) < head + 16
            or payload[0] != POSTCOPY_RAM_DISCARD_VERSION
            or payload[head - 1] != 0
            or (len(payload) - head) % 16
            or not payload[2 : head - 1].isascii()
        ):
            raise cursor.broken("a malformed POSTCOPY_RAM_DISCARD", at=begin)
        name = payload[2 : head - 1].decode()
        pairs = [
            (int.from_bytes(payload[at : at + 8], "big"), int.from_bytes(payload[at + 8 : at + 16], "big"))
            for at in range(head, len(payload), 16)
        ]
        size = None if self.ram.known is None else self.ram.known.get(name)
        for start, length in pairs:
            if start % TARGET_PAGE_BYTES or length % TARGET_PAGE_BYTES or (size is not None and start + length > size):
                raise cursor.broken(f"a discard of {start:#x}+{length:#x} outside of '{name}' or unaligned", at=begin)
        return Command(number, payload, name=name, ranges=tuple(pairs))

    def _package(self, payload: bytes, begin: int) -> Package:
        cursor = self.cursor
        if self._nested:
            raise cursor.broken("a package inside a package", at=begin)
        length = int.from_bytes(payload, "big")
        if length == 0 or length > self.package_limit_bytes:
            raise cursor.broken(
                f"a package of {length} bytes, at most {self.package_limit_bytes} are accepted", at=begin
            )
        inside = cursor.pull_bytes(length, self.package_limit_bytes, "a package")
        nested = QemuStreamDecoder(f"{cursor.channel} package", recovery=True, ram=self.ram)
        nested._nested, nested._recovery = True, False
        nested.sections = self.sections
        nested.feed(inside)
        nested.end()
        nested.finished = True
        events = tuple(nested.events())
        self._postcopy = self._postcopy or nested._postcopy
        return Package(length, events)


class PreemptDecoder:
    """The preempt channel: bare RAM records, with or without a final EOS. `known` are the blocks of the main stream."""

    def __init__(self, channel: str = "preempt", known: dict[str, int] | None = None) -> None:
        self.cursor = Cursor(channel)
        self.ram = RamReader(known=known)
        self._dead = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self.cursor.feed(data)

    def end(self) -> None:
        self.cursor.end()

    def events(self) -> Iterator[RamEvent]:
        while not self._dead and (self.cursor.available or not self.cursor.ended):
            try:
                yield self.ram.read(self.cursor)
            except NeedData:
                if not self.cursor.ended:
                    return
                self._dead = True
                raise self.cursor.broken("the channel ends inside a record") from None
            except RemoteProtocolError:
                self._dead = True
                raise
