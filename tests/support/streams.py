"""Main streams made by hand, and a way to read them whole or in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from virtmig.stream.commands import advise, command, discard, ping
from virtmig.stream.decoder import QemuStreamDecoder
from virtmig.stream.encoder import encode_events
from virtmig.stream.events import (
    Description,
    DeviceSection,
    EncodedPage,
    EndOfRam,
    EndOfStream,
    MultifdFlush,
    Pages,
    RamBlock,
    RamBlocks,
    SectionBegin,
    SectionFooter,
    StreamHeader,
    ZeroPages,
)
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item

PAGE = 4096
CAPTURES = Path(__file__).parent.parent / "stream" / "captures"
RAM_ID, DEVICE_ID = 5, 77  # no QEMU's own numbers


def words(*pages: int, flags: int) -> Any:
    return np.array([page * PAGE | flags for page in pages], dtype=np.uint64)


def page_run(first: int, count: int, *, named: bool = False, block: str = "pc.ram", seed: int = 3) -> Pages:
    numbers = words(*range(first, first + count), flags=0x28)
    if named:
        numbers[0] &= ~np.uint64(0x20)
    data = np.random.default_rng(seed).integers(1, 255, count * PAGE, dtype=np.uint8)
    return Pages(block, named, numbers, data.data)


def zero_run(first: int, count: int, *, named: bool = False, block: str = "pc.ram") -> ZeroPages:
    numbers = words(*range(first, first + count), flags=0x22)
    if named:
        numbers[0] &= ~np.uint64(0x20)
    return ZeroPages(block, named, numbers)


BLOCKS = RamBlocks(0x204000 | 4, (RamBlock("pc.ram", 0x200000), RamBlock("pc.rom", 0x4000)))
JSON = b'{"page_size":4096,"devices":[]}'
HEADER = StreamHeader(3, "pc-test-1.0", (("configuration/uuid", 1, bytes(16)),))

STREAM: list[Any] = [
    HEADER,
    command(Number.OPEN_RETURN_PATH),
    ping(1),
    advise(),
    SectionBegin(Item.SECTION_START, RAM_ID, "ram", 0, 4),
    BLOCKS,
    MultifdFlush(),
    EndOfRam(),
    SectionFooter(RAM_ID),
    SectionBegin(Item.SECTION_PART, RAM_ID, "ram"),
    zero_run(0, 3, named=True),
    page_run(3, 2),
    EncodedPage("pc.ram", False, 7 * PAGE | 0x60, b"\x05\x01\x3c"),
    EncodedPage("pc.ram", False, 8 * PAGE | 0x120, b"\x78\x01compressed"),
    page_run(0, 1, named=True, block="pc.rom"),
    EndOfRam(),
    SectionFooter(RAM_ID),
    discard("pc.ram", [(0, PAGE), (3 * PAGE, 2 * PAGE)]),
    command(Number.SWITCHOVER_START),
    SectionBegin(Item.SECTION_END, RAM_ID, "ram"),
    EndOfRam(),
    SectionFooter(RAM_ID),
    DeviceSection(
        Item.SECTION_FULL, DEVICE_ID, "cpu", 0, 12, b"state" + b"\x7e" + DEVICE_ID.to_bytes(4, "big") + b"!", 0
    ),
    SectionFooter(DEVICE_ID),
    EndOfStream(),
    Description(JSON, len(JSON)),
]
RAW = b"".join(encode_events(STREAM))


def decode(raw: bytes, step: int = 0, **options: Any) -> list[Any]:
    decoder = QemuStreamDecoder(**options)
    found: list[Any] = []
    for at in range(0, len(raw), step or max(len(raw), 1)):
        decoder.feed(raw[at : at + (step or len(raw))])
        found += decoder.events()
    decoder.end()
    return [*found, *decoder.events()]


def kinds(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


POSTCOPY = [*STREAM[:9], discard("pc.ram", [(0, 0x200000)]), command(Number.POSTCOPY_LISTEN), STREAM[9]]
