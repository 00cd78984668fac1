"""RAM records: runs of any shape against a reader that goes one by one, the block list, mapped-ram, huge pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.events import EncodedPage, EndOfRam, MappedArea, MappedEntry, MappedList, Pages, RamBlock, ZeroPages
from virtmig.stream.ram import LONGEST_RUN_PAGES, MOST_BLOCKS, RamReader, encode_ram

PAGE = 4096
BLOCKS = {"a": 600 * PAGE, "b": 600 * PAGE}


def record(block: str, page: int, content: bytes | None, named: bool) -> bytes:
    """One ZERO (content None) or PAGE record, made by hand."""
    word = page * PAGE | (2 if content is None else 8) | (0 if named else 0x20)
    return word.to_bytes(8, "big") + (bytes([len(block)]) + block.encode() if named else b"") + (content or b"\0")


def content(page: int) -> bytes:
    return page.to_bytes(2, "big") * (PAGE // 2)


def read_all(raw: bytes, step: int = 0, reader: RamReader | None = None) -> list[Any]:
    reader, cursor, found = reader or RamReader(known=dict(BLOCKS)), Cursor("ram"), []
    for at in range(0, len(raw), step or len(raw) or 1):
        cursor.feed(raw[at : at + (step or len(raw))])
        while cursor.available:
            try:
                found.append(reader.read(cursor))
            except NeedData:
                break
    assert cursor.available == 0
    return found


def pages_of(events: list[Any]) -> list[tuple[str, int, bytes | None]]:
    found: list[tuple[str, int, bytes | None]] = []
    for event in events:
        if isinstance(event, Pages):
            for number, page in enumerate(event.page_numbers.tolist()):
                found.append((event.block, page, bytes(event.data[number * PAGE : (number + 1) * PAGE])))
        elif isinstance(event, ZeroPages):
            found += [(event.block, page, None) for page in event.page_numbers.tolist()]
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 590), st.integers(1, 30), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0, 1 << 16, 5000, 4103]),
)  # fmt: skip
def test_runs_of_any_shape(runs: list[tuple[str, int, int, bool, bool]], step: int) -> None:
    raw, expected, last = b"", [], ""
    for block, first, count, zero, always_named in runs:
        for page in range(first, min(first + count, 600)):
            what = None if zero else content(page)
            raw += record(block, page, what, always_named or block != last)
            expected.append((block, page, what))
            last = block
    events = read_all(raw, step)
    assert pages_of(events) == expected
    assert b"".join(encode_ram(event) for event in events) == raw


def test_a_long_run_is_few_events() -> None:
    raw = b"".join(record("a", page, content(page), page == 0) for page in range(3 * LONGEST_RUN_PAGES))
    assert [len(event.words) for event in read_all(raw)] == [LONGEST_RUN_PAGES] * 3
    raw = b"".join(record("a", page, None, page == 0) for page in range(600))
    assert [len(event.words) for event in read_all(raw)] == [600]


def test_the_data_of_a_run_cannot_be_written_to() -> None:
    for count in (1, 5):
        (event,) = read_all(b"".join(record("a", page, content(page), page == 0) for page in range(count)))
        assert event.data.readonly
        batch = event.batch()
        assert batch.pages.tolist() == list(range(count))
        assert batch.data is event.data


@pytest.mark.parametrize("bad", [0, 1, 7, 8, 60])
def test_the_offset_of_a_fault_inside_a_run(bad: int) -> None:
    head = len(record("a", 0, None, True))
    records = [record("a", page, None, page == 0) for page in range(80)]
    records[bad] = records[bad][:-1] + b"\x07"
    with pytest.raises(RemoteProtocolError, match="fill byte 0x7") as broken:
        read_all(b"".join(records))
    assert broken.value.offset == head + bad * 9 - 1
    records = [record("a", 600 if page == bad else page, None, page == 0) for page in range(80)]
    with pytest.raises(RemoteProtocolError, match="0x258000 outside of RAM block 'a' of 0x258000 bytes") as broken:
        read_all(b"".join(records))
    assert broken.value.offset == (head + (bad - 1) * 9 if bad else 0)


def huge_reader() -> RamReader:
    reader = RamReader(known=dict(BLOCKS))
    reader.huge, reader.postcopy = {"a": 4 * PAGE}, True
    return reader


def huge_run(*pages: int, named: bool = True, block: str = "a") -> bytes:
    return b"".join(record(block, page, content(page), named and number == 0) for number, page in enumerate(pages))


@pytest.mark.parametrize(
    "raw",
    [
        huge_run(4, 5, 6, 7),
        huge_run(4, 5, 6, 7, 12, 13, 14, 15, 0, 1, 2, 3),
        huge_run(4, 5) + record("a", 6, None, False) + huge_run(7, named=False),
        huge_run(0, 1, 2, 3) + huge_run(9, 3, block="b") + huge_run(8, 9, 10, 11),
    ],
)
def test_huge_pages_in_order(raw: bytes) -> None:
    for step in (0, PAGE):
        assert b"".join(encode_ram(event) for event in read_all(raw, step, huge_reader())) == raw


@pytest.mark.parametrize(
    "raw",
    [
        huge_run(5),
        huge_run(4, 6),
        huge_run(4, 5, 6, 8),
        huge_run(4, 5, 6, 7, 9),
        huge_run(4, 5, 5),
        huge_run(4, 5) + huge_run(6, block="b"),
        huge_run(4, 5) + huge_run(8),
    ],
)
def test_pieces_of_two_huge_pages(raw: bytes) -> None:
    for step in (0, PAGE):
        with pytest.raises(RemoteProtocolError, match="huge page"):
            read_all(raw, step, huge_reader())


def test_a_resumed_postcopy_begins_a_huge_page_anew() -> None:
    reader = huge_reader()
    read_all(huge_run(4, 5), 0, reader)
    reader.restart()
    assert pages_of(read_all(huge_run(4, 5, 6, 7), 0, reader))[0][1] == 4
    reader.restart()
    with pytest.raises(RemoteProtocolError, match="none was named yet"):
        read_all(huge_run(0, named=False), 0, reader)


def listing(*blocks: tuple[str, int], total: int | None = None) -> bytes:
    word = sum(length for _, length in blocks) if total is None else total
    entries = (bytes([len(name)]) + name.encode() + length.to_bytes(8, "big") for name, length in blocks)
    return (word | 4).to_bytes(8, "big") + b"".join(entries)


def test_the_block_list_is_bounded_in_number() -> None:
    names = [(f"block{number}", PAGE) for number in range(MOST_BLOCKS + 1)]
    eos = (0x10).to_bytes(8, "big")
    (found, _) = read_all(listing(*names[:-1]) + eos)
    assert len(found.blocks) == MOST_BLOCKS
    with pytest.raises(RemoteProtocolError, match=f"more than {MOST_BLOCKS} RAM blocks"):
        read_all(listing(*names) + eos)


def test_an_empty_block_list() -> None:
    reader = RamReader(known={"old": PAGE})
    assert read_all(listing(), reader=reader)[0].blocks == ()
    assert reader.known == {}


def mapped(*, version: int = 1, bitmap: int = 0, pages: int = 0) -> bytes:
    numbers = (number.to_bytes(8, "big") for number in (PAGE, bitmap, pages))
    return version.to_bytes(4, "big") + b"".join(numbers)


def test_mapped_ram_areas_are_passed_through() -> None:
    entry_end = 8 + 10 + 28
    head = listing(("a", 2 * PAGE), total=3 * PAGE) + mapped(bitmap=entry_end, pages=0x2000)
    area = b"\x03" + bytes(0x2000 - entry_end - 1) + content(1) + content(2)
    second = b"\x01b" + PAGE.to_bytes(8, "big") + mapped()
    raw = head + area + second + (0x10).to_bytes(8, "big")
    for step in (0, 1000, 1):
        events = read_all(raw, step, RamReader(frozenset({"mapped-ram"}), {}))
        assert b"".join(encode_ram(event) for event in events) == raw
        kept = [event for event in events if not isinstance(event, MappedArea)]
        assert isinstance(kept[0], MappedList)
        assert [entry.block.name for entry in kept if isinstance(entry, MappedEntry)] == ["a", "b"]
        assert isinstance(kept[-1], EndOfRam)
    for broken, words in (
        (mapped(version=2, bitmap=entry_end, pages=0x2000), "version 2"),
        (mapped(bitmap=entry_end - 1, pages=0x2000), "points backwards"),
        (mapped(bitmap=0x3000, pages=0x2000), "points backwards"),
    ):
        with pytest.raises(RemoteProtocolError, match=words):
            read_all(raw.replace(head[18:], broken), 0, RamReader(frozenset({"mapped-ram"}), {}))
    with pytest.raises(RemoteProtocolError, match="unexpected RAM record in a mapped-ram file"):
        read_all(raw + record("a", 0, None, True), 0, RamReader(frozenset({"mapped-ram"}), {}))


def test_what_cannot_be_written_is_refused() -> None:
    words = np.array([8], np.uint64)
    for event in (
        Pages("a", True, words, memoryview(bytes(PAGE - 1))),
        Pages("a", True, words[:0], memoryview(b"")),
        ZeroPages("a", False, words[:0]),
        ZeroPages("n" * 256, True, words),
        EncodedPage("a", False, 0x60, bytes(PAGE + 1)),
        "no event",
    ):
        with pytest.raises(LocalProtocolError):
            encode_ram(event)  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError):
        encode_ram(MappedEntry(RamBlock("", PAGE)))
