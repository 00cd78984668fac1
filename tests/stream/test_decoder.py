"""The main stream: whole, bytewise, cut at every byte, followed by more, and broken in every way QEMU checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.streams import (
    BLOCKS,
    DEVICE_ID,
    HEADER,
    PAGE,
    POSTCOPY,
    RAM_ID,
    RAW,
    STREAM,
    decode,
    kinds,
    page_run,
    zero_run,
)
from virtmig.errors import RemoteProtocolError
from virtmig.stream.commands import advise, command, discard, ping, recv_bitmap
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import encode_event, encode_events
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
from virtmig.stream.ram import ALL_RECORDS, LONGEST_RUN_PAGES
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item, RamFlag


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
    events = [*STREAM[:9], discard("pc.ram", [(0, 0x200000)]),
              Package(len(raw), tuple(inside)), SectionBegin(Item.SECTION_PART, RAM_ID, "ram"),
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
    ("page bits", lambda: RAW[:24] + b"\x05\x1econfiguration/target-page-bits" + b"\0\0\0\1" + b"\0\0\0\x10",
     "target pages of 16 bits"),
    ("unknown capability", lambda: RAW[:24] + b"\x05\x1aconfiguration/capabilities" + b"\0\0\0\1\0\0\0\1\x03new",
     "unknown or repeated capability 'new'"),
    ("capability twice", lambda: RAW[:24] + b"\x05\x1aconfiguration/capabilities" + b"\0\0\0\1\0\0\0\2"
     + b"\x0amapped-ram" * 2, "unknown or repeated"),
    ("subsection version", lambda: RAW[:24] + b"\x05\x12configuration/uuid" + b"\0\0\0\2" + bytes(16), "version 2"),
    ("footer missing", lambda: start(STREAM[9], EndOfRam()) + b"\0", "0x00 where the footer of section 5"),
    ("RAM in one piece", lambda: HEAD + encode_event(SectionBegin(Item.SECTION_FULL, 1, "ram", 0, 4)), "of one piece"),
    ("RAM twice", lambda: start(SectionBegin(Item.SECTION_START, 1, "ram", 0, 4)), "RAM begins twice"),
    ("RAM too old", lambda: HEAD + encode_event(SectionBegin(Item.SECTION_START, 1, "ram", 0, 3)), "version 3"),
    ("ping without return path", lambda: HEAD + encode_event(ping(1)), "no return path was opened"),
    ("resume when not paused", lambda: start(command(Number.POSTCOPY_RESUME)), "no postcopy is paused"),
    ("bitmap when not paused", lambda: start(recv_bitmap("pc.ram")), "no postcopy is paused"),
    ("bitmap of an unknown block", lambda: start(recv_bitmap("vga")), "unknown RAM block 'vga'"),
    ("advise twice", lambda: start(advise()), "POSTCOPY_ADVISE in postcopy state 'advise'"),
    ("advise, target page", lambda: HEAD + cmd(3, bytes(6) + b"\x10\0" + bytes(6) + b"\x20\0"), "target pages of 8192"),
    ("advise, host page", lambda: HEAD + cmd(3, bytes(14) + b"\x10\0"), "host page sizes 0x0"),
    ("listen without advise", lambda: HEAD + cmd(4, b""), "POSTCOPY_LISTEN in postcopy state 'none'"),
    ("run without listen", lambda: start(discard("pc.ram", [(0, PAGE)]), command(Number.POSTCOPY_RUN)),
     "POSTCOPY_RUN in postcopy state 'discard'"),
    ("run without a discard", lambda: start(command(Number.POSTCOPY_LISTEN), command(Number.POSTCOPY_RUN)),
     "POSTCOPY_RUN in postcopy state 'discard'"),
    ("discard before advise", lambda: HEAD + b"".join(encode_events([*STREAM[4:9], discard("pc.ram", [(0, PAGE)])])),
     "POSTCOPY_RAM_DISCARD in postcopy state 'none'"),
    ("discard of an unknown block", lambda: start(discard("vga", [(0, PAGE)])), "unknown RAM block 'vga'"),
    ("discard of nothing", lambda: start(discard("pc.ram", [(0, 0)])), "unaligned"),
    ("discard that wraps", lambda: start(discard("pc.ram", [(0xFFFFFFFFFFFFF000, 0x2000)])), "outside of 'pc.ram'"),
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
    ("zero page filled", lambda: part(bytes(encode_event(zero_run(0, 1, named=True)))[:-1] + b"\7"), "fill byte"),
    ("zero run filled", lambda: part(bytes(encode_event(zero_run(0, 40, named=True)))[:-1] + b"\7"), "fill byte"),
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


@pytest.mark.parametrize(
    "record",
    [MultifdFlush(), BLOCKS, EncodedPage("pc.ram", False, 7 * PAGE | 0x60, b"\x05\x01\x3c")],
    ids=["flush", "blocks", "xbzrle"],
)
def test_from_listen_on_only_pages_are_left(record: Any) -> None:
    good = [*POSTCOPY, zero_run(0, 3, named=True), page_run(3, 1)]
    assert kinds(decode(b"".join(encode_events([*good, EndOfRam(), SectionFooter(RAM_ID)]))))[-4:-2] == kinds(good[-2:])
    with pytest.raises(RemoteProtocolError, match=r"RAM flags.*\(postcopy\)"):
        decode(b"".join(encode_events([*good, record])))


def test_records_that_were_not_agreed_on_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="not agreed on: MULTIFD_FLUSH"):
        decode(RAW, records=ALL_RECORDS & ~RamFlag.MULTIFD_FLUSH)
    with pytest.raises(RemoteProtocolError, match="not agreed on: XBZRLE"):
        decode(RAW, records=ALL_RECORDS & ~RamFlag.XBZRLE)


def test_a_broken_package_is_at_its_place_in_main() -> None:
    raw = start(discard("pc.ram", [(0, PAGE)]), command(Number.POSTCOPY_LISTEN))
    inside = cmd(5, b"") + b"\x42"
    with pytest.raises(RemoteProtocolError, match="unknown item 0x42") as broken:
        decode(raw + cmd(7, len(inside).to_bytes(4, "big")) + inside)
    assert (broken.value.channel, broken.value.offset) == ("main", len(raw) + 9 + 5)


def test_sections_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtmig.stream.decoder.MOST_SECTIONS", 3)
    sections = [
        part
        for number in range(4)
        for part in (DeviceSection(Item.SECTION_FULL, number, "d", number, 1, b"x", 0), SectionFooter(number))
    ]
    with pytest.raises(RemoteProtocolError, match="more than 3 sections"):
        decode(b"".join(encode_events([HEADER, *sections, EndOfStream()])))


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
