"""What a channel says, counted for people: fed with its events and their offsets, nothing of the pages is kept.

    summary = StreamSummary("main", Role.MAIN)
    summary.add(event, offset) ...; channel = summary.result(end)

A stream does not say where a pass over memory begins. `Pass` rows are a guess, and COUNTED says by what. Offsets are
bytes from where the caller's offsets begin. The QEMU that wrote it is guessed in version_guess.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from virtmig.errors import RemoteProtocolError
from virtmig.stream.device import read_description, walk
from virtmig.stream.encoder import encode_event
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EncodedPage,
    EndOfRam,
    EndOfStream,
    MappedArea,
    MappedEntry,
    MultifdFlush,
    OpaqueDevices,
    Package,
    Pages,
    RamBlock,
    RamBlocks,
    SectionBegin,
    SectionFooter,
    StreamHeader,
    ZeroPages,
)
from virtmig.stream.multifd import DeviceState, DeviceStateData, MultifdHello, MultifdPacket
from virtmig.stream.multifd_compression import METHOD_NAME
from virtmig.stream.return_path import (
    Pong,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    Shut,
    SwitchoverAck,
    bitmap_bytes,
)
from virtmig.stream.summary_rows import (
    Block,
    Channel,
    Counts,
    Damage,
    Device,
    Entry,
    Field,
    Multifd,
    Pass,
    Role,
)
from virtmig.stream.version_guess import Evidence, from_event
from virtmig.stream.wire import PING_PACKAGE_LOADED, TARGET_PAGE_BYTES, Item
from virtmig.stream.wire import Command as Number

#: rows beyond are added to the last one, so that a hostile stream cannot make the result grow for ever
MOST_ROWS = 20_000
#: data of device sections kept until the description comes; sections beyond are shown without fields
DEVICE_DATA_LIMIT_BYTES = 64 << 20
MOST_FIELDS = 100_000
MAPPED_NOTE = (
    "mapped-ram: normal are the pages in the file, duplicate those left out as zero; QEMU's own counts have a page as "
    "often as it was written"
)
VALUE_BYTES = 32
PACKAGE_HEAD_BYTES = 1 + 2 + 2 + 4
_INDEXED = re.compile(r"(.*)\[(\d{1,9})\]")


class StreamSummary:
    """One channel's events, added up."""

    def __init__(self, name: str, role: Role, *, resumed: bool = False) -> None:
        """`resumed`: a connection of a paused postcopy that goes on."""
        multifd = Multifd() if role is Role.MULTIFD else None
        self._channel = Channel(name=name, role=role, bytes=0, counts=Counts(), multifd=multifd)
        self._evidence: dict[str, Evidence] = {}
        self._data: list[tuple[Device, bytes]] = []
        self._kept_bytes = 0
        self._order: dict[str, int] = {}  # block -> its place in the list
        self._last = (-1, -1)  # place and offset of main's last page
        self._postcopy = resumed or role is Role.PREEMPT
        self._closed = True  # the next page begins a new pass
        self._flushing = False
        self._part = Item.SECTION_START
        self._area: tuple[Block, int, int] | None = None  # mapped-ram: block, where its bitmap begins and ends
        #: what should come next, in words, for who meets something else
        self.expecting = {
            Role.MAIN: "a command or a section" if resumed else "the header (QEVM, version 3, configuration)",
            Role.MULTIFD: "a multifd hello",
            Role.PREEMPT: "a page record",
            Role.RETURN_PATH: "a message of the return path",
        }[role]

    def add(self, event: object, offset: int) -> None:
        """The events of a Package must follow it, see `unpacked`."""
        for evidence in from_event(event):
            self._evidence.setdefault(evidence.words, evidence)
        match event:
            case Pages() | ZeroPages() | EncodedPage():
                self._pages(event, offset)
            case MultifdPacket():
                self._packet(event)
            case SectionBegin() | EndOfRam() | SectionFooter() | EndOfStream() | MultifdFlush():
                self._mark(event, offset)
            case StreamHeader() | RamBlocks() | MappedEntry() | MappedArea():
                self._layout(event, offset)
            case Command():
                self._command(event, offset)
            case Package():
                self._entry(Entry(offset, "PACKAGED", detail="the devices of a postcopy", bytes=event.length))
            case DeviceSection() | OpaqueDevices() | Description():
                self._device(event, offset)
            case MultifdHello() | DeviceState() | DeviceStateData():
                self._multifd(event)
            case Shut() | Pong() | RequestPages() | ReceivedBitmap() | ResumeAck() | SwitchoverAck():
                self._answer(event, offset)

    def fail(self, damage: Damage) -> None:
        self._channel.damage = damage

    def note(self, words: str) -> None:
        self._channel.notes.append(words)

    def result(self, end: int) -> Channel:
        """What was added, with `end` bytes read in all. The summary must not be fed afterwards."""
        channel = self._channel
        channel.bytes = end
        channel.evidence = list(self._evidence.values())
        self._data.clear()
        return channel

    # -- main: the frame -----------------------------------------------------------------------------------------

    def _layout(self, event: StreamHeader | RamBlocks | MappedEntry | MappedArea, offset: int) -> None:
        channel = self._channel
        match event:
            case StreamHeader():
                channel.machine = event.machine
                channel.capabilities = sorted(event.capabilities)
                for name, _, payload in event.subsections:
                    if name == "configuration/uuid":
                        channel.uuid = payload.hex()
                        self._infer("validate-uuid", "the configuration has the guest's UUID")
                self.expecting = "a command or a section"
            case RamBlocks():
                for block in event.blocks:
                    self._block(block)
                self.expecting = "a RAM record"
            case MappedEntry():
                self._block(event.block)
            case MappedArea():
                self._bitmap(event.data, offset)

    def _block(self, block: RamBlock) -> None:
        row = Block(block.name, block.used_length, block.page_size_bytes, block.address)
        self._order[block.name] = len(self._order)
        self._channel.blocks.append(row)
        if block.mapped is not None:
            _, page_bytes, row.bitmap_offset, row.pages_offset = block.mapped
            row.present_pages = 0
            if len(self._order) == 1:
                self.note(MAPPED_NOTE)
            end = row.bitmap_offset + bitmap_bytes(block.used_length, page_bytes or TARGET_PAGE_BYTES)
            self._area = (row, row.bitmap_offset, end) if row.pages_offset else None

    def _bitmap(self, data: bytes, offset: int) -> None:
        """mapped-ram: the pages in the file are those whose bit is set, the others are zero."""
        if self._area is None or offset >= self._area[2]:
            return
        row, begin, end = self._area
        part = data[max(0, begin - offset) : max(0, end - offset)]
        present = int(np.unpackbits(np.frombuffer(part, np.uint8)).sum())
        row.present_pages = (row.present_pages or 0) + present
        counts = Counts()
        counts.count("normal", present, present * TARGET_PAGE_BYTES)
        if offset + len(data) >= end:
            counts.duplicate = max(0, row.used_length_bytes // TARGET_PAGE_BYTES - row.present_pages)
        self._row(offset).add(counts)
        self._channel.counts.add(counts)

    def _mark(self, event: SectionBegin | EndOfRam | SectionFooter | EndOfStream | MultifdFlush, offset: int) -> None:
        rows = self._channel.passes
        match event:
            case SectionBegin():
                self._part = event.kind
                if event.kind is Item.SECTION_END and not self._postcopy:
                    self._closed = True
                    self._row(offset)
                self.expecting = "a RAM record"
            case MultifdFlush():
                self._infer("multifd", "MULTIFD_FLUSH words")
                if self._part is Item.SECTION_START:
                    self._begin_row(offset)
                else:
                    self._row(offset)
                rows[-1].flushes += 1
                self._flushing = True
                self._closed = self._part is not Item.SECTION_END
            case EndOfRam():
                if not rows:
                    self._begin_row(offset)
                rows[-1].sections += 1
                if self._part is Item.SECTION_START:
                    self._closed = True
                self.expecting = "the footer of the RAM section"
            case SectionFooter():
                self.expecting = "a command, a section or EOF"
            case EndOfStream():
                self._channel.ended = True
                self.expecting = "the description, or nothing"

    def _begin_row(self, offset: int) -> None:
        rows = self._channel.passes
        kind = "postcopy" if self._postcopy else "precopy"
        if self._part is Item.SECTION_END and not self._postcopy:
            kind = "end"
        if len(rows) < MOST_ROWS:
            rows.append(Pass(kind, offset, Counts()))
        self._closed = False

    def _row(self, offset: int) -> Counts:
        rows = self._channel.passes
        if self._closed or not rows or (self._postcopy and rows[-1].kind != "postcopy"):
            self._begin_row(offset)
        return rows[-1].counts

    # -- main: pages ---------------------------------------------------------------------------------------------

    def _pages(self, event: Pages | ZeroPages | EncodedPage, offset: int) -> None:
        counts = Counts()
        if isinstance(event, EncodedPage):
            first = last = event.offset
            cuts: list[int] = []
            kind = "xbzrle" if event.xbzrle else "compressed"
            self._infer(*(("xbzrle", "XBZRLE records") if event.xbzrle else ("compress", "COMPRESS_PAGE records")))
            counts.count(kind, 1, len(event.data))
        else:
            places = event.offsets
            first, last = int(places[0]), int(places[-1])
            cuts = (np.flatnonzero(places[1:] <= places[:-1]) + 1).tolist()
            zero = isinstance(event, ZeroPages)
            counts.count(
                "duplicate" if zero else "normal", len(places), len(places) * (1 if zero else TARGET_PAGE_BYTES)
            )
        self._channel.counts.add(counts)
        mixed = "compress" in self._channel.inferred
        if mixed and sum(row.kind == "precopy" for row in self._channel.passes[-2:]) > 1:
            self._merge_precopy()
        place = self._order.get(event.block, len(self._order))
        jumps = not (self._postcopy or self._flushing or mixed or self._part is Item.SECTION_END)
        if jumps and (place, first) <= self._last:
            self._closed = True
        self._last = (place, last)
        if jumps and cuts and not isinstance(event, EncodedPage):
            self._cut_run(event, offset, cuts)
        else:
            self._row(offset).add(counts)

    def _cut_run(self, event: Pages | ZeroPages, offset: int, cuts: list[int]) -> None:
        """A run in which the pages jump back; each record of it has the same length but for a first with a name."""
        zero = isinstance(event, ZeroPages)
        size = 1 if zero else TARGET_PAGE_BYTES
        ends = [*cuts, len(event.words)]
        for begin, end in zip([0, *cuts], ends, strict=True):
            named = 1 + len(event.block) if event.named and begin else 0
            self._closed = self._closed or begin > 0
            row = self._row(offset + begin * (8 + size) + named)
            row.count("duplicate" if zero else "normal", end - begin, (end - begin) * size)

    def _merge_precopy(self) -> None:
        rows = self._channel.passes
        first = next(index for index, row in enumerate(rows) if row.kind == "precopy" and row.counts.pages)
        for row in rows[first + 1 :]:
            rows[first].counts.add(row.counts)
            rows[first].sections += row.sections
        del rows[first + 1 :]

    # -- main: commands and devices --------------------------------------------------------------------------------

    def _command(self, command: Command, offset: int) -> None:
        number = Number(command.number)
        entry = Entry(offset, number.name, command.name)
        if number is Number.PING:
            known = " (is the package loaded?)" if command.value == PING_PACKAGE_LOADED else ""
            entry.detail = f"{command.value:#x}{known}"
        elif number is Number.POSTCOPY_RAM_DISCARD:
            entry.ranges, entry.bytes = len(command.ranges), sum(length for _, length in command.ranges)
        elif command.page_sizes is not None:
            entry.detail = f"host pages {command.page_sizes[0]:#x}, target pages {command.page_sizes[1]:#x}"
            self._infer("postcopy-ram", "POSTCOPY_ADVISE with page sizes")
        elif number is Number.POSTCOPY_ADVISE:
            self._infer("dirty-bitmaps", "POSTCOPY_ADVISE without page sizes")
        elif number is Number.OPEN_RETURN_PATH:
            self._infer("return-path", "OPEN_RETURN_PATH")
        elif number is Number.POSTCOPY_LISTEN:
            self._postcopy = True
        self._entry(entry)
        self.expecting = "a command, a section or EOF"

    def _entry(self, entry: Entry) -> None:
        entries = self._channel.commands
        last = entries[-1] if entries else None
        repeats = entry.name in ("POSTCOPY_RAM_DISCARD", "REQ_PAGES")
        if last is not None and (
            len(entries) >= MOST_ROWS or (repeats and (last.name, last.block) == (entry.name, entry.block))
        ):
            last.count += 1
            last.ranges += entry.ranges
            last.bytes += entry.bytes
        else:
            entries.append(entry)

    def _device(self, event: DeviceSection | OpaqueDevices | Description, offset: int) -> None:
        channel = self._channel
        if isinstance(event, DeviceSection):
            kind = event.kind.name.removeprefix("SECTION_")
            device = Device(offset, event.idstr, event.instance_id, event.version_id, len(event.data), kind)
            channel.devices.append(device)
            if kind == "FULL" and self._kept_bytes + len(event.data) <= DEVICE_DATA_LIMIT_BYTES:
                self._data.append((device, event.data))
                self._kept_bytes += len(event.data)
            elif kind == "FULL":
                device.why = f"more than {DEVICE_DATA_LIMIT_BYTES} bytes of devices before it"
            self.expecting = f"the footer of section '{event.idstr}'"
        elif isinstance(event, OpaqueDevices):
            self.note(f"{len(event.data)} bytes of device sections at {offset:#x} cannot be told apart: no footers, "
                      "no description")  # fmt: skip
            self.expecting = "EOF"
        else:
            self._describe(event)

    def _describe(self, event: Description) -> None:
        self.expecting = "nothing"
        if not event.complete:
            self.note("the description is cut off (a source without a return path closes at once): no fields")
            return
        try:
            description = read_description(event.text)
        except RemoteProtocolError as error:
            self.note(str(error))
            return
        self._channel.described = True
        if self._channel.machine is not None:
            evidence = Evidence.of_description("configuration" in description)
            self._evidence.setdefault(evidence.words, evidence)
        entries: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for entry in description["devices"]:
            if isinstance(entry, dict):
                entries.setdefault((str(entry.get("name")), str(entry.get("instance_id"))), []).append(entry)
        left = MOST_FIELDS
        for device, data in self._data:
            found = entries.get((device.name, str(device.instance_id)))
            if found and left > 0:
                device.fields, device.why = fields_of(found.pop(0), data, left)
                left -= len(device.fields)
        self._data.clear()

    # -- the other channels ----------------------------------------------------------------------------------------

    def _multifd(self, event: MultifdHello | DeviceState | DeviceStateData) -> None:
        multifd = self._channel.multifd = self._channel.multifd or Multifd()
        if isinstance(event, MultifdHello):
            multifd.channel_id, multifd.uuid = event.channel_id, event.uuid.hex() if any(event.uuid) else ""
        elif isinstance(event, DeviceState):
            multifd.packets += 1
            if len(multifd.device_states) < MOST_ROWS or event.idstr in multifd.device_states:
                multifd.device_states[event.idstr] = multifd.device_states.get(event.idstr, 0) + event.size
        self.expecting = "a multifd packet"

    def _packet(self, packet: MultifdPacket) -> None:
        multifd = self._channel.multifd = self._channel.multifd or Multifd()
        counts = Counts()
        counts.count("normal", packet.normal_count, len(packet.body))
        counts.count("duplicate", packet.zero_count, 0)
        self._channel.counts.add(counts)
        multifd.packets += 1
        multifd.body_bytes += len(packet.body)
        multifd.epochs[-1].add(counts)
        if packet.normal_count + packet.zero_count:
            multifd.with_pages += 1
            method = METHOD_NAME.get(packet.method, f"{packet.method:#x}")
            multifd.methods[method] = multifd.methods.get(method, 0) + 1
        if packet.is_sync:
            multifd.syncs += 1
            if len(multifd.epochs) < MOST_ROWS:
                multifd.epochs.append(Counts())

    def _answer(self, event: object, offset: int) -> None:
        match event:
            case Shut():
                detail = "success" if event.value == 0 else "the destination failed"
                entry = Entry(offset, "SHUT", detail=f"{event.value}: {detail}")
            case Pong():
                entry = Entry(offset, "PONG", detail=f"{event.value:#x}")
            case RequestPages():
                entry = Entry(offset, "REQ_PAGES", event.block, bytes=event.length_bytes)
            case ReceivedBitmap():
                pages = int(np.unpackbits(np.frombuffer(event.bitmap, np.uint8)).sum())
                entry = Entry(offset, "RECV_BITMAP", event.block, f"{pages} pages are there")
            case ResumeAck():
                entry = Entry(offset, "RESUME_ACK")
            case _:
                entry = Entry(offset, "SWITCHOVER_ACK")
        self._entry(entry)

    def _infer(self, capability: str, why: str) -> None:
        self._channel.inferred.setdefault(capability, why)


def unpacked(package: Package, offset: int) -> Iterator[tuple[int, object]]:
    """The events inside a package whose command begins at `offset`, each with its own offset."""
    at = offset + PACKAGE_HEAD_BYTES
    for event in package.events:
        yield at, event
        at += len(encode_event(event))


def fields_of(described: dict[str, Any], data: bytes, most: int = MOST_FIELDS) -> tuple[list[Field], str]:
    """A section's fields by name (device.walk); neighbours of one array as `name[0..7]`. Also what went wrong."""
    fields: list[Field] = []
    run: tuple[str, int, int, int, bytes] | None = None  # name, first and last index, bytes, the first values

    def close() -> None:
        if run is not None:
            name, first, last, size, value = run
            label = f"{name}[{first}]" if first == last else f"{name}[{first}..{last}]"
            fields.append(Field(label, size, value.hex()))

    why = ""
    try:
        for label, value in walk(described, data):
            found = _INDEXED.fullmatch(label)
            index = int(found[2]) if found else -1
            if run is not None and found and (found[1], index) == (run[0], run[2] + 1):
                run = (run[0], run[1], index, run[3] + len(value), (run[4] + value)[:VALUE_BYTES])
                continue
            close()
            run = (found[1], index, index, len(value), value[:VALUE_BYTES]) if found else None
            if len(fields) >= most:
                why, run = "more fields are not shown", None
                break
            if not found:
                fields.append(Field(label, len(value), value[:VALUE_BYTES].hex()))
    except RemoteProtocolError as error:
        why = str(error)
    close()
    return fields, why
