"""The main stream: whole, bytewise, cut at every byte, followed by more, and broken in every way QEMU checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import RemoteProtocolError
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import command, discard, encode_event, encode_events, ping
from virtmig.stream.events import (
    Command,
    Description,
    DeviceSection,
    EncodedPage,
    EndOfRam,
    EndOfStream,
    MultifdFlush,
    Package,
    Pages,
    RamBlock,
    RamBlocks,
    SectionBegin,
    SectionFooter,
    StreamHeader,
    ZeroPages,
)
from virtmig.stream.ram import LONGEST_RUN_PAGES
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item

PAGE = 4096
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
    command(Number.POSTCOPY_ADVISE, bytes(16)),
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


def test_whole() -> None:
    events = decode(RAW)
    assert b"".join(encode_events(events)) == RAW
    assert kinds(events) == kinds(STREAM)
    assert events[0] == HEADER
    assert events[5] == BLOCKS
    assert [event.value for event in events if isinstance(event, Command) and event.value is not None] == [1]
    (dropped,) = [event for event in events if isinstance(event, Command) and event.ranges]
    assert (dropped.name, dropped.ranges) == ("pc.ram", ((0, PAGE), (3 * PAGE, 2 * PAGE)))


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_in_pieces_the_bytes_are_the_same(step: int) -> None:
    assert b"".join(encode_events(decode(RAW, step))) == RAW


def test_cut_at_every_byte_it_needs_more_or_says_truncated() -> None:
    for cut in range(len(RAW)):
        decoder = QemuStreamDecoder()
        decoder.feed(RAW[:cut])
        before = list(decoder.events())
        assert RAW.startswith(b"".join(encode_events(before)))
        decoder.end()
        try:
            after = list(decoder.events())
        except RemoteProtocolError as error:
            assert "ends inside" in str(error)
            assert error.channel == "main"
        else:  # only a stream that lost its description, or part of it, still ends well
            assert isinstance((before + after)[-1], (EndOfStream, Description))


def test_bytes_behind_the_end() -> None:
    with pytest.raises(RemoteProtocolError, match="behind the end"):
        decode(RAW + b"\x00")


def test_runs_are_runs() -> None:
    """Neighbouring records come in few events, whatever their number, and are bounded."""
    count = 3 * LONGEST_RUN_PAGES + 5
    size = (count + 1) * PAGE
    blocks = RamBlocks(size | 4, (RamBlock("big", size),))
    events = [HEADER, SectionBegin(Item.SECTION_START, RAM_ID, "ram", 0, 4), blocks,
              page_run(0, count, named=True, block="big"), zero_run(0, count, block="big"), EndOfRam()]  # fmt: skip
    found = decode(b"".join(encode_events([*events, SectionFooter(RAM_ID), EndOfStream()])))
    pages = [event for event in found if isinstance(event, Pages)]
    assert len(pages) <= 5
    assert max(len(event.words) for event in pages) <= LONGEST_RUN_PAGES + 1
    assert np.concatenate([event.offsets for event in pages]).tolist() == [n * PAGE for n in range(count)]
    assert b"".join(bytes(event.data) for event in pages) == bytes(events[3].data)
    assert sum(len(event.words) for event in found if isinstance(event, ZeroPages)) == count


def test_hugetlb_page_sizes_are_told_apart_from_names_and_from_the_next_record() -> None:
    blocks = RamBlocks(0x800000 | 4, (RamBlock("huge", 0x400000, 0x200000), RamBlock("also", 0x400000, 0x200000)))
    events = [HEADER, SectionBegin(Item.SECTION_START, RAM_ID, "ram", 0, 4), blocks, EndOfRam(),
              SectionFooter(RAM_ID), EndOfStream()]  # fmt: skip
    assert decode(b"".join(encode_events(events)))[2] == blocks


def test_ignore_shared_addresses() -> None:
    payload = (1).to_bytes(4, "big") + bytes([15]) + b"x-ignore-shared"
    header = StreamHeader(3, "pc", (("configuration/capabilities", 1, payload),), frozenset({"x-ignore-shared"}))
    blocks = RamBlocks(0x2000 | 4, (RamBlock("a", 0x1000, None, 0xC0000), RamBlock("b", 0x1000, None, 0)))
    events = [header, SectionBegin(Item.SECTION_START, RAM_ID, "ram", 0, 4), blocks, EndOfRam(),
              SectionFooter(RAM_ID), EndOfStream()]  # fmt: skip
    found = decode(b"".join(encode_events(events)))
    assert (found[0], found[2]) == (header, blocks)


def test_a_package_and_the_pages_behind_it() -> None:
    inside = [
        command(Number.POSTCOPY_LISTEN),
        STREAM[22],
        SectionFooter(DEVICE_ID),
        ping(3),
        command(Number.POSTCOPY_RUN),
    ]
    raw = b"".join(encode_events(inside))
    events = [*STREAM[:9], Package(len(raw), tuple(inside)), SectionBegin(Item.SECTION_PART, RAM_ID, "ram"),
              page_run(1, 4, named=True), EndOfRam(), SectionFooter(RAM_ID)]  # fmt: skip
    whole = b"".join(encode_events(events))
    found = decode(whole)
    assert b"".join(encode_events(found)) == whole
    (package,) = [event for event in found if isinstance(event, Package)]
    assert kinds(list(package.events)) == ["Command", "DeviceSection", "SectionFooter", "Command", "Command"]
    assert package.events[1].data == STREAM[22].data


def test_a_recovery_connection_has_no_header() -> None:
    events = [command(Number.RECV_BITMAP, b"\x06pc.ram"), command(Number.POSTCOPY_RESUME),
              SectionBegin(Item.SECTION_PART, 2, "ram"), page_run(1, 2, named=True), EndOfRam(),
              SectionFooter(2)]  # fmt: skip
    raw = b"".join(encode_events(events))
    found = decode(raw, recovery=True)
    assert b"".join(encode_events(found)) == raw
    assert found[0].name == "pc.ram"


@pytest.mark.parametrize("with_end", [True, False])
def test_the_preempt_channel(with_end: bool) -> None:
    events = [page_run(9, 1, named=True), page_run(4, 1), zero_run(5, 1), *([EndOfRam()] if with_end else [])]
    raw = b"".join(encode_events(events))
    decoder = PreemptDecoder(known={"pc.ram": 0x200000})
    found: list[Any] = []
    for at in range(len(raw)):
        decoder.feed(raw[at : at + 1])
        found += decoder.events()
    decoder.end()
    found += decoder.events()
    assert b"".join(encode_events(found)) == raw


def start(*events: Any) -> bytes:
    return b"".join(encode_events([*STREAM[:9], *events]))


def part(raw: bytes) -> bytes:
    return start(SectionBegin(Item.SECTION_PART, RAM_ID, "ram")) + raw


def cmd(number: int, payload: bytes, length: int | None = None) -> bytes:
    return (
        b"\x08"
        + number.to_bytes(2, "big")
        + (length if length is not None else len(payload)).to_bytes(2, "big")
        + payload
    )


PAGES_OF = encode_event
HEAD = encode_event(HEADER)
BEGIN = HEAD + encode_event(SectionBegin(Item.SECTION_START, RAM_ID, "ram", 0, 4))


def block(name: bytes, length: int) -> bytes:
    return bytes([len(name)]) + name + length.to_bytes(8, "big")


#: cases.md 4.4: (what is wrong, the bytes, what the error says)
BROKEN: list[tuple[str, Callable[[], bytes], str]] = [
    ("magic", lambda: b"QEMU" + RAW[4:], "not a migration stream"),
    ("obsolete version", lambda: RAW[:4] + b"\0\0\0\2" + RAW[8:], "obsolete"),
    ("future version", lambda: RAW[:4] + b"\0\0\0\4" + RAW[8:], "stream version 4"),
    ("machine name of 0", lambda: RAW[:9] + bytes(4) + RAW[13:], "machine type name of 0 bytes"),
    ("huge machine name", lambda: RAW[:9] + b"\xff" * 4, "machine type name of 4294967295 bytes"),
    ("machine not ASCII", lambda: RAW[:13] + b"\xff" + RAW[14:], "not ASCII"),
    ("4 G capabilities", lambda: RAW[:24] + b"\x05\x1aconfiguration/capabilities" + b"\0\0\0\1" + b"\xff" * 4,
     "4294967295 capabilities"),
    ("unknown subsection", lambda: RAW[:24] + b"\x05\x03abc" + bytes(8), "unknown subsection"),
    ("unknown item", lambda: HEAD + b"\x42", "unknown item 0x42"),
    ("part of nothing", lambda: HEAD + b"\x02\0\0\0\x09", "section 9, which never began"),
    ("end of nothing", lambda: HEAD + b"\x03\0\0\0\x09", "section 9, which never began"),
    ("footer of nothing", lambda: HEAD + b"\x7e\0\0\0\x09", "section 9, which never began"),
    ("footer of another", lambda: start(STREAM[9], EndOfRam()) + b"\x7e\0\0\0\x63",
     "footer of section 99 behind section 5"),
    ("begins twice", lambda: start(STREAM[4]), "begins twice"),
    ("nameless section", lambda: HEAD + b"\x04\0\0\0\x09\0" + bytes(8), "without a name"),
    ("RAM too new", lambda: HEAD + encode_event(SectionBegin(Item.SECTION_START, 1, "ram", 0, 5)), "version 5"),
    ("unknown command", lambda: HEAD + cmd(12, b""), "unknown command 0xc"),
    ("command 0", lambda: HEAD + cmd(0, b""), "INVALID"),
    ("short ping", lambda: HEAD + cmd(2, b"abc"), "PING of 3 bytes"),
    ("long open", lambda: HEAD + cmd(1, b"a"), "OPEN_RETURN_PATH of 1 bytes"),
    ("advise of 8", lambda: HEAD + cmd(3, bytes(8)), "POSTCOPY_ADVISE of 8 bytes"),
    ("discard version", lambda: HEAD + cmd(6, b"\1\1a\0" + bytes(16)), "malformed POSTCOPY_RAM_DISCARD"),
    ("discard unterminated", lambda: HEAD + cmd(6, b"\0\1aa" + bytes(16)), "malformed POSTCOPY_RAM_DISCARD"),
    ("discard of 15", lambda: HEAD + cmd(6, b"\0\1a\0" + bytes(15)), "malformed POSTCOPY_RAM_DISCARD"),
    ("discard without ranges", lambda: HEAD + cmd(6, b"\0\1a\0"), "malformed POSTCOPY_RAM_DISCARD"),
    ("discard outside", lambda: start(discard("pc.ram", [(0x1FF000, 2 * PAGE)])), "outside of 'pc.ram'"),
    ("discard unaligned", lambda: start(discard("pc.ram", [(1, PAGE)])), "unaligned"),
    ("bitmap name lies", lambda: HEAD + cmd(10, b"\x09abc"), "RECV_BITMAP"),
    ("package of 0", lambda: HEAD + cmd(7, bytes(4)), "package of 0 bytes"),
    ("package of 4 G", lambda: HEAD + cmd(7, b"\xff" * 4), "package of 4294967295 bytes"),
    ("package in a package", lambda: HEAD + cmd(7, (9).to_bytes(4, "big")) + cmd(7, (1).to_bytes(4, "big")),
     "package inside a package"),
    ("EOF in a package", lambda: HEAD + cmd(7, (1).to_bytes(4, "big")) + b"\0", "unknown item 0x00"),
    ("section cut in a package", lambda: HEAD + cmd(7, (3).to_bytes(4, "big")) + b"\x04\0\0", "ends inside"),
    ("unknown block", lambda: part(encode_event(page_run(0, 1, named=True, block="vga"))), "unknown RAM block 'vga'"),
    ("continue before a block", lambda: part(encode_event(page_run(0, 1))), "none was named yet"),
    ("page outside", lambda: part(encode_event(page_run(0x200, 1, named=True))), "outside of RAM block"),
    ("run that leaves the block", lambda: part(encode_event(page_run(0x1FE, 9, named=True))), "outside of RAM block"),
    ("zero page outside", lambda: part(encode_event(zero_run(0x1FE, 9, named=True))), "outside of RAM block"),
    ("zero page filled", lambda: part(encode_event(zero_run(0, 1, named=True))[:-1] + b"\7"), "fill byte"),
    ("zero run filled", lambda: part(encode_event(zero_run(0, 40, named=True))[:-1] + b"\7"), "fill byte"),
    ("unknown flags", lambda: part((0xA << 12 | 0xF).to_bytes(8, "big")), "unknown combination of RAM flags: 0xf"),
    ("hook", lambda: part((0x80).to_bytes(8, "big")), "unknown combination"),
    ("end with an address", lambda: part((0x1010).to_bytes(8, "big")), "end of RAM with an address"),
    ("flush with an address", lambda: part((0x1200).to_bytes(8, "big")), "unknown combination"),
    ("xbzrle encoding", lambda: part((0x40).to_bytes(8, "big") + b"\6pc.ram\2\0\1a"), "page encoding 0x2"),
    ("xbzrle too long", lambda: part((0x40).to_bytes(8, "big") + b"\6pc.ram\1\x10\1"), "xbzrle page of 4097 bytes"),
    ("compressed too long", lambda: part((0x100).to_bytes(8, "big") + b"\6pc.ram" + b"\xff" * 4), "compressed page of"),
    ("blocks over the total", lambda: BEGIN + (0x1004).to_bytes(8, "big") + block(b"a", 0x2000), "left of the total"),
    ("block of 0", lambda: BEGIN + (0x1004).to_bytes(8, "big") + block(b"a", 0), "left of the total"),
    ("block unaligned", lambda: BEGIN + (0x1004).to_bytes(8, "big") + block(b"a", 0x800), "left of the total"),
    ("block twice", lambda: BEGIN + (0x2004).to_bytes(8, "big") + block(b"a", 0x1000) + block(b"a", 0x1000), "twice"),
    ("block nameless", lambda: BEGIN + (0x1004).to_bytes(8, "big") + block(b"", 0x1000), "without a name"),
    ("name not ASCII", lambda: BEGIN + (0x1004).to_bytes(8, "big") + block(b"\xe9", 0x1000), "not ASCII"),
    ("no description", lambda: start(EndOfStream()) + b"\x01", "behind the end"),
    ("description of 4 G", lambda: start(EndOfStream()) + b"\x06" + b"\xff" * 4, "description of 4294967295 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "raw", "words_"), BROKEN, ids=[row[0] for row in BROKEN])
def test_each_broken_rule_is_one_typed_error_with_its_offset(what: str, raw: Callable[[], bytes], words_: str) -> None:
    data = raw()
    for step in (0, 1):
        with pytest.raises(RemoteProtocolError, match=words_.replace("(", r"\(")) as caught:
            decode(data, step)
        assert caught.value.channel.startswith("main")
        assert caught.value.offset is not None
        assert 0 <= caught.value.offset <= len(data)


def test_a_section_without_an_end_is_bounded() -> None:
    head = HEAD + b"\x04\0\0\0\x09\x03abc" + bytes(8)
    with pytest.raises(RemoteProtocolError, match="no end within 1000 bytes"):
        decode(head + bytes([1]) * 5000, 100, section_limit_bytes=1000)


def test_after_an_error_a_decoder_is_dead() -> None:
    decoder = QemuStreamDecoder()
    decoder.feed(b"QEMU")
    with pytest.raises(RemoteProtocolError):
        list(decoder.events())
    decoder.feed(RAW)
    assert list(decoder.events()) == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_streams_end_in_events_or_one_typed_error(data: st.DataObject) -> None:
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=9))
        if not raw:
            return
    try:
        events = decode(bytes(raw), data.draw(st.sampled_from([0, 3, 1000])))
    except RemoteProtocolError as error:
        assert error.offset is not None
    else:
        assert b"".join(encode_events(events)) == bytes(raw)
