"""The main stream, written: events to the bytes they came from, or that a source would send."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from virtmig.errors import LocalProtocolError
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EndOfStream,
    Package,
    SectionBegin,
    SectionFooter,
    StreamHeader,
)
from virtmig.stream.ram import encode_ram
from virtmig.stream.wire import QEMU_VM_FILE_MAGIC, Item
from virtmig.stream.wire import Command as Command_


def encode_events(events: Iterable[object]) -> Iterator[bytes]:
    """The bytes of each event in turn. For decoded events these are exactly the bytes they came from."""
    for event in events:
        yield encode_event(event)


def encode_event(event: object) -> bytes:
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
            return bytes([Item.COMMAND]) + _u16(Command_.PACKAGED) + _u16(4) + _u32(event.length) + inside
        case SectionBegin() | DeviceSection():
            data = event.data if isinstance(event, DeviceSection) else b""
            head = bytes([event.kind]) + _u32(event.section_id)
            if event.kind in (Item.SECTION_START, Item.SECTION_FULL):
                head += _string(event.idstr) + _u32(event.instance_id) + _u32(event.version_id)
            return head + data
        case SectionFooter():
            return bytes([Item.SECTION_FOOTER]) + _u32(event.section_id)
        case EndOfStream():
            return bytes([Item.EOF])
        case Description():
            return bytes([Item.VMDESCRIPTION]) + _u32(event.length) + event.text
    return encode_ram(event)  # type: ignore[arg-type]


def command(number: Command_, payload: bytes = b"") -> Command:
    """A command to be sent, without the parsed parts that only a reader needs."""
    return Command(int(number), payload)


def ping(value: int) -> Command:
    return Command(int(Command_.PING), _u32(value), value=value)


def discard(block: str, ranges: Iterable[tuple[int, int]]) -> Command:
    """POSTCOPY_RAM_DISCARD of at most MAX_DISCARDS_PER_COMMAND (start, length) pairs in bytes."""
    pairs = tuple(ranges)
    if not 0 < len(pairs) <= 12:
        raise LocalProtocolError(f"a discard of {len(pairs)} ranges; 1 to 12 fit into one command")
    body = b"".join(start.to_bytes(8, "big") + length.to_bytes(8, "big") for start, length in pairs)
    return Command(int(Command_.POSTCOPY_RAM_DISCARD), b"\0" + _string(block) + b"\0" + body, name=block, ranges=pairs)


def _header(event: StreamHeader) -> bytes:
    parts = [_u32(QEMU_VM_FILE_MAGIC), _u32(event.version)]
    if event.machine is not None:
        raw = event.machine.encode("ascii")
        parts += [bytes([Item.CONFIGURATION]), _u32(len(raw)), raw]
        for name, version, payload in event.subsections:
            parts += [bytes([Item.SUBSECTION]), _string(name), _u32(version), payload]
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode("ascii")
    if len(raw) > 255:
        raise LocalProtocolError(f"a name of {len(raw)} bytes")
    return bytes([len(raw)]) + raw


def _u16(value: int) -> bytes:
    return int(value).to_bytes(2, "big")


def _u32(value: int) -> bytes:
    return int(value).to_bytes(4, "big")
