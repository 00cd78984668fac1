"""What `virtmig inspect` prints: aligned text that reads well when piped, and a line an event. Pure but for the stream.

Names in a stream may hold anything that is ASCII: what cannot be printed is escaped as in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import TextIO

import numpy as np

from virtmig.quantities import size_text
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EncodedPage,
    MappedArea,
    MappedEntry,
    MappedList,
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
from virtmig.stream.return_path import Pong, ReceivedBitmap, RequestPages, Shut
from virtmig.stream.summary_rows import Block, Channel, Counts, Device, Entry, Multifd, Report, Role
from virtmig.stream.wire import TARGET_PAGE_BYTES, Item
from virtmig.stream.wire import Command as Number

_MOST_BLOCKS_IN_A_LINE = 8


def clean(text: str) -> str:
    """Text from a file, fit for a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# -- one line an event -------------------------------------------------------------------------------------------------


def event_line(event: object) -> tuple[str, str]:
    """An event's name and what it says, in one line."""
    name = type(event).__name__
    match event:
        case Command():
            name, words = Number(event.number).name, _command_words(event)
        case SectionBegin() | DeviceSection():
            name = Item(event.kind).name
            version = f" version {event.version_id}" if name in ("SECTION_START", "SECTION_FULL") else ""
            words = f"{event.idstr}/{event.instance_id}{version} id {event.section_id}"
            if isinstance(event, DeviceSection):
                words += f", {len(event.data)} bytes"
        case Pages() | ZeroPages() | EncodedPage():
            name, words = _pages_words(event)
        case StreamHeader():
            listed = f", capabilities {', '.join(sorted(event.capabilities))}" if event.capabilities else ""
            words = f"version {event.version}, machine {event.machine or '(no configuration)'}{listed}"
        case MultifdPacket():
            words = _packet_words(event)
        case RamBlocks():
            first = ", ".join(f"{block.name} {block.used_length:#x}" for block in event.blocks[:_MOST_BLOCKS_IN_A_LINE])
            more = ", ..." if len(event.blocks) > _MOST_BLOCKS_IN_A_LINE else ""
            words = f"{len(event.blocks)} blocks, {event.total_bytes:#x} bytes: {first}{more}"
        case _:
            words = _other_words(event)
    return name, clean(words)


def _command_words(command: Command) -> str:
    if command.value is not None:
        return f"{command.value:#x}"
    if command.ranges:
        shown = " ".join(f"{start:#x}+{length:#x}" for start, length in command.ranges)
        return f"{command.name} {shown}"
    if command.page_sizes is not None:
        return f"host pages {command.page_sizes[0]:#x}, target pages {command.page_sizes[1]:#x}"
    return command.name


def _pages_words(event: Pages | ZeroPages | EncodedPage) -> tuple[str, str]:
    if isinstance(event, EncodedPage):
        return (
            "XBZRLE" if event.xbzrle else "COMPRESS_PAGE",
            f"{event.block} {event.offset:#x}, {len(event.data)} bytes",
        )
    places = event.offsets
    first, last, count = int(places[0]), int(places[-1]), len(places)
    name = "PAGE" if isinstance(event, Pages) else "ZERO"
    if count == 1:
        return name, f"{event.block} {first:#x}"
    lined_up = bool((np.diff(places) == TARGET_PAGE_BYTES).all())
    return name, f"{event.block} {first:#x}{'-' if lined_up else ' ... '}{last:#x}, {count} pages"


def _packet_words(packet: MultifdPacket) -> str:
    words = [f"number {packet.packet_num}"]
    if packet.is_sync:
        words.append("SYNC")
    if packet.normal_count or packet.zero_count:
        words.append(f"{packet.block}: {packet.normal_count} normal, {packet.zero_count} zero")
    if packet.normal_count:
        words.append(f"{len(packet.body)} bytes {METHOD_NAME.get(packet.method, hex(packet.method))}")
    return ", ".join(words)


def _other_words(event: object) -> str:
    match event:
        case SectionFooter():
            return f"id {event.section_id}"
        case Package():
            return f"{event.length} bytes, {len(event.events)} events"
        case MappedList():
            return f"{event.word & ~(TARGET_PAGE_BYTES - 1):#x} bytes"
        case MappedEntry():
            return _mapped_words(event.block)
        case MappedArea() | OpaqueDevices():
            return f"{len(event.data)} bytes"
        case Description():
            return f"{len(event.text)} bytes" + ("" if event.complete else " (cut off)")
        case MultifdHello():
            return f"channel {event.channel_id}, guest {event.uuid.hex()}"
        case DeviceState():
            return f"{event.idstr}/{event.instance_id}, {event.size} bytes"
        case DeviceStateData():
            return f"{len(event.data)} bytes, {event.remaining} to come"
        case Shut() | Pong():
            return f"{event.value:#x}"
        case RequestPages():
            return f"{event.block} {event.start_bytes:#x}+{event.length_bytes:#x}"
        case ReceivedBitmap():
            return f"{event.block}, {len(event.bitmap)} bytes"
    return ""


def _mapped_words(block: RamBlock) -> str:
    if block.mapped is None or block.mapped[2:] == (0, 0):
        return f"{block.name} {block.used_length:#x} bytes, no pages here"
    return f"{block.name} {block.used_length:#x} bytes, bitmap at {block.mapped[2]:#x}, pages at {block.mapped[3]:#x}"


def item_words(there: bytes) -> str:
    """What these bytes would be at the place of an item of the main stream; "" when nothing is recognised."""
    if there[0] in (Item.SECTION_START, Item.SECTION_FULL) and len(there) > 6:
        name = there[6 : 6 + there[5]]
        if name and name.isascii() and name.decode().isprintable():
            return f"{Item(there[0]).name} '{name.decode()}'"
    if there[0] in (Item.SECTION_PART, Item.SECTION_END, Item.SECTION_FOOTER) and len(there) >= 5:
        return f"{Item(there[0]).name} of section {int.from_bytes(there[1:5], 'big')}?"
    if there[0] == Item.COMMAND and len(there) >= 3:
        number = int.from_bytes(there[1:3], "big")
        return Number(number).name if number in list(Number) else ""
    return ""


# -- the report --------------------------------------------------------------------------------------------------------


def print_report(report: Report, stream: TextIO) -> None:
    """Parts with a heading each, two blanks before what belongs to it; long lists (fields) come last."""
    for line in report_lines(report):
        stream.write(clean(line).rstrip() + "\n")


def report_lines(report: Report) -> Iterator[str]:
    yield report.source
    yield from pairs(_head(report))
    if report.passes or report.ram.pages:
        yield ""
        yield "pages by kind (on the wire: what stood for the contents, without the records' heads)"
        rows = [
            (str(number), row.kind, *_count_cells(row.counts), str(row.sections))
            for number, row in enumerate(report.passes, 1)
        ]
        rows.append(("all", "", *_count_cells(report.ram), ""))
        yield from table(("pass", "", "normal", "zero", "xbzrle", "compressed", "on the wire", "RAM sections"), rows)
        yield from wrap(report.counted, 110, initial_indent="  ", subsequent_indent="  ")
    for channel in report.channels:
        yield ""
        yield from _channel_lines(channel)
    for channel in report.channels:
        yield from _field_lines(channel)
    yield ""
    for words in report.damage:
        yield f"damaged: {words}"
    if report.whole:
        yield "whole: read to the end, nothing is damaged"


def _head(report: Report) -> Iterator[tuple[str, str]]:
    for name, value in report.container.items():
        yield name, {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    yield "machine", report.machine or "not said"
    yield "QEMU version", report.version.text
    for reason in report.version.reasons:
        yield "", f"because {reason}"
    names = [f"{name} ({why})" for name, why in report.capabilities.items()]
    yield "capabilities", names[0] if names else "none is listed, none shows"
    for name in names[1:]:
        yield "", name
    yield "normal", f"{report.normal} pages"
    yield "duplicate", f"{report.duplicate} pages (zero pages, in query-migrate's word)"
    for note in report.notes:
        yield "note", note


def _channel_lines(channel: Channel) -> Iterator[str]:
    yield f"channel {channel.name}: {channel.role.value}, {channel.bytes} bytes ({size_text(channel.bytes)})"
    if channel.role is not Role.MAIN and channel.counts.pages:
        counts = channel.counts
        yield f"  {counts.normal} normal and {counts.duplicate} zero pages, {size_text(counts.wire_bytes)} on the wire"
    if channel.multifd is not None:
        yield from _multifd_lines(channel.multifd)
    if channel.uuid:
        yield f"  guest {channel.uuid}"
    if channel.blocks:
        yield "  RAM blocks"
        yield from table(("name", "bytes", ""), [_block_cells(block) for block in channel.blocks], "    ")
    if channel.commands:
        yield "  messages in order" if channel.role is Role.RETURN_PATH else "  commands in order"
        yield from table(("offset", "", ""), [_entry_cells(entry) for entry in channel.commands], "    ")
    if channel.devices:
        yield "  device sections"
        heads = ("offset", "section", "instance", "version", "bytes", "fields", "")
        yield from table(heads, [_device_cells(device) for device in channel.devices], "    ")
    if channel.role is Role.MAIN and not channel.described and channel.devices:
        yield "  no description in this stream, so the fields have no names"
    for note in channel.notes:
        yield f"  note: {note}"
    if channel.damage is not None:
        damage = channel.damage
        yield f"  damaged at offset {damage.offset:#x} ({damage.offset}): {damage.message}"
        yield f"    expected  {damage.expected}"
        yield f"    there is  {damage.found}"
        if damage.ends_at is not None:
            yield f"    it ends   at offset {damage.ends_at:#x} ({damage.ends_at})"


def _multifd_lines(multifd: Multifd) -> Iterator[str]:
    named = f"channel id {multifd.channel_id}" if multifd.channel_id is not None else "no hello"
    yield f"  {named}{f', guest {multifd.uuid}' if multifd.uuid else ''}"
    methods = ", ".join(f"{count} {method}" for method, count in multifd.methods.items())
    yield (
        f"  {multifd.packets} packets: {multifd.with_pages} with pages{f' ({methods})' if methods else ''}, "
        f"{multifd.syncs} with SYNC, {size_text(multifd.body_bytes)} of bodies"
    )
    for name, size in multifd.device_states.items():
        yield f"  device state of {name}: {size} bytes"


def _field_lines(channel: Channel) -> Iterator[str]:
    for device in channel.devices:
        if device.fields is None and not device.why:
            continue
        yield ""
        yield f"fields of {device.name}/{device.instance_id}{f' ({device.why})' if device.why else ''}"
        rows = [
            (field.name, str(field.bytes), field.value + ("..." if 2 * field.bytes > len(field.value) else ""))
            for field in device.fields or ()
        ]
        yield from table(("name", "bytes", "value"), rows)


def _count_cells(counts: Counts) -> tuple[str, ...]:
    numbers = (counts.normal, counts.duplicate, counts.xbzrle, counts.compressed)
    return (*map(str, numbers), size_text(counts.wire_bytes))


def _block_cells(block: Block) -> tuple[str, ...]:
    words = []
    if block.page_size_bytes is not None:
        words.append(f"pages of {size_text(block.page_size_bytes)}")
    if block.address is not None:
        words.append(f"guest address {block.address:#x}")
    if block.pages_offset:
        words.append(
            f"bitmap at {block.bitmap_offset:#x}, pages at {block.pages_offset:#x}, {block.present_pages} here"
        )
    elif block.pages_offset == 0:
        words.append("no pages here (x-ignore-shared)")
    return block.name, str(block.used_length_bytes), ", ".join(words)


def _entry_cells(entry: Entry) -> tuple[str, ...]:
    words = [part for part in (entry.block, entry.detail) if part]
    if entry.count > 1:
        words.append(f"{entry.count} times")
    if entry.ranges:
        words.append(f"{entry.ranges} ranges")
    if entry.bytes:
        words.append(f"{entry.bytes} bytes")
    return f"{entry.offset:#x}", entry.name, ", ".join(words)


def _device_cells(device: Device) -> tuple[str, ...]:
    fields = "" if device.fields is None else str(len(device.fields))
    kind = "" if device.kind == "FULL" else device.kind
    numbers = (device.instance_id, device.version_id, device.bytes)
    return f"{device.offset:#x}", device.name, *map(str, numbers), fields, kind


def pairs(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Names and values in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"  {name:<{width}}  {value}"


def table(heads: Sequence[str], rows: Sequence[tuple[str, ...]], indent: str = "  ") -> Iterator[str]:
    """Columns as wide as their widest cell; numbers to the right. A column without anything is left out."""
    used = [at for at in range(len(heads)) if any(row[at] not in ("", "0") for row in rows) or heads[at] == "normal"]
    widths = [max(len(heads[at]), *(len(row[at]) for row in rows)) for at in used]
    right = [all(row[at].isdigit() or not row[at] for row in rows) and at > 0 for at in used]
    for row in [tuple(heads), *rows]:
        cells = (f"{row[at]:>{w}}" if r else f"{row[at]:<{w}}" for at, w, r in zip(used, widths, right, strict=True))
        yield indent + "  ".join(cells)
