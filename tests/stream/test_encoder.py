"""What a source writes: read back by the decoder, refused where a destination would refuse it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from virtmig.errors import LocalProtocolError
from virtmig.stream.commands import advise, command, discard, ping, recv_bitmap
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import MainEncoder, PreemptEncoder, encode_event, encode_events
from virtmig.stream.events import (
    DeviceSection,
    EncodedPage,
    Pages,
    RamBlock,
    SectionBegin,
    SectionFooter,
    StreamHeader,
    ZeroPages,
)
from virtmig.stream.wire import Command, Item
from virtmig.stream.xbzrle import decode_xbzrle, encode_xbzrle

PAGE = 4096
BLOCKS = (RamBlock("pc.ram", 64 * PAGE), RamBlock("pc.rom", 4 * PAGE))
DEVICE = DeviceSection(Item.SECTION_FULL, 9, "cpu", 0, 12, b"state", 0)


def contents(*pages: int) -> bytes:
    return b"".join(bytes([page + 1]) * PAGE for page in pages)


def decode(raw: bytes, **options: Any) -> list[Any]:
    decoder = QemuStreamDecoder(**options)
    decoder.feed(raw)
    decoder.end()
    events = list(decoder.events())
    assert b"".join(encode_events(events)) == raw
    return events


def begun(**options: Any) -> tuple[MainEncoder, list[Any]]:
    encoder = MainEncoder(**options)
    return encoder, [encoder.begin("pc-i440fx-7.2"), encoder.ram_begin(BLOCKS, flush=True)]


def test_a_precopy_from_begin_to_end() -> None:
    source = MainEncoder(ram_section_id=7)
    old, new = contents(1), contents(1)[:-9] + b"different"
    encoded = encode_xbzrle(old, new)
    assert encoded
    raw = b"".join(
        (
            source.begin("pc-i440fx-7.2"),
            source.command(command(Command.OPEN_RETURN_PATH)),
            source.command(ping(1)),
            source.ram_begin(BLOCKS),
            source.ram_part(),
            source.pages("pc.ram", np.arange(3, 9, dtype=np.uint64), contents(*range(3, 9))),
            source.zero_pages("pc.ram", [0, 2]),
            source.multifd_flush(),
            source.ram_section_end(),
            source.ram_part(),
            source.pages("pc.ram", [1], old),
            source.pages("pc.rom", [3], contents(3)),
            source.zero_pages("pc.ram", [63]),
            source.ram_section_end(),
            source.ram_end(),
            source.xbzrle_page("pc.ram", 1, encoded),
            source.ram_section_end(),
            source.device(DEVICE),
            source.eof(b'{"devices": []}'),
        )
    )
    events = decode(raw)
    assert events[0] == StreamHeader(3, "pc-i440fx-7.2")
    pages = [event for event in events if isinstance(event, Pages | ZeroPages)]
    assert [(event.block, event.named, event.page_numbers.tolist()) for event in pages] == [
        ("pc.ram", True, [3, 4, 5, 6, 7, 8]),
        ("pc.ram", False, [0, 2]),
        ("pc.ram", False, [1]),
        ("pc.rom", True, [3]),
        ("pc.ram", True, [63]),
    ]
    assert bytes(pages[0].data) == contents(*range(3, 9))
    (difference,) = [event for event in events if isinstance(event, EncodedPage)]
    assert (difference.offset, decode_xbzrle(difference.data, old)) == (PAGE, new)
    assert [event.kind for event in events if isinstance(event, SectionBegin)] == [1, 2, 2, 3]
    assert {event.section_id for event in events if isinstance(event, SectionBegin)} == {7}


def test_a_postcopy_names_the_block_again_behind_the_package() -> None:
    source, parts = MainEncoder(), []
    parts += [source.begin("pc"), source.command(command(Command.OPEN_RETURN_PATH)), source.command(advise())]
    parts += [source.ram_begin(BLOCKS), source.ram_part(), source.zero_pages("pc.ram", [0]), source.ram_section_end()]
    parts += [source.command(discard("pc.ram", [(0, 64 * PAGE)]))]
    inside = [command(Command.POSTCOPY_LISTEN), DEVICE, *_footer(9), ping(3), command(Command.POSTCOPY_RUN)]
    parts += [source.package(inside)]
    parts += [source.ram_part(), source.pages("pc.ram", [5], contents(5)), source.ram_section_end()]
    parts += [source.ram_end(), source.ram_section_end(), source.eof()]
    events = decode(b"".join(parts))
    assert [event.named for event in events if isinstance(event, Pages | ZeroPages)] == [True, True]


def _footer(section_id: int) -> list[SectionFooter]:
    return [SectionFooter(section_id)]


def test_a_recovery_has_no_header() -> None:
    source = MainEncoder(ram_section_id=2)
    raw = b"".join(
        (
            source.begin_recovery({"pc.ram": 64 * PAGE}),
            source.command(recv_bitmap("pc.ram")),
            source.command(command(Command.POSTCOPY_RESUME)),
            source.ram_part(),
            source.pages("pc.ram", [5], contents(5)),
            source.ram_section_end(),
        )
    )
    assert decode(raw, recovery=True)[0].name == "pc.ram"


def test_a_stream_of_an_old_machine_type_has_no_footers() -> None:
    source = MainEncoder(footers=False)
    raw = b"".join((source.begin(None), source.ram_begin(BLOCKS), source.ram_end(), source.ram_section_end()))
    assert b"\x7e" not in raw
    events = decode(raw + source.device(DEVICE) + source.eof())
    assert events[-2].data == encode_event(DEVICE)


def test_the_preempt_channel_has_a_memory_of_its_own() -> None:
    source = PreemptEncoder()
    parts = [source.pages("pc.ram", [5], contents(5)), source.pages("pc.ram", [9], contents(9))]
    source.forget()
    parts += [source.zero_pages("pc.ram", [6]), source.end()]
    decoder = PreemptDecoder(known={"pc.ram": 64 * PAGE})
    decoder.feed(b"".join(parts))
    decoder.end()
    events = list(decoder.events())
    assert [event.named for event in events[:-1] if isinstance(event, Pages | ZeroPages)] == [True, True]
    assert pages_in(events) == [5, 9, 6]
    assert b"".join(encode_events(events)) == b"".join(parts)


def pages_in(events: list[Any]) -> list[int]:
    return [page for event in events if isinstance(event, Pages | ZeroPages) for page in event.page_numbers.tolist()]


WRONG: dict[str, Any] = {
    "pages outside of a section": lambda source: source.pages("pc.ram", [0], contents(0)),
    "a block that is not listed": lambda source: (source.ram_part(), source.pages("vga", [0], contents(0))),
    "a page outside of the block": lambda source: (source.ram_part(), source.zero_pages("pc.ram", [64])),
    "no pages": lambda source: (source.ram_part(), source.zero_pages("pc.ram", [])),
    "half a page": lambda source: (source.ram_part(), source.pages("pc.ram", [0], bytes(9))),
    "a section in a section": lambda source: (source.ram_part(), source.ram_part()),
    "a command in a section": lambda source: (source.ram_part(), source.command(ping(1))),
    "the end in a section": lambda source: (source.ram_part(), source.eof()),
    "an end without a section": lambda source: source.ram_section_end(),
    "a second header": lambda source: source.begin("pc"),
    "RAM twice": lambda source: source.ram_begin(BLOCKS),
    "anything behind the end": lambda source: (source.eof(), source.device(DEVICE)),
    "a package as a command": lambda source: source.command(command(Command.PACKAGED, bytes(4))),
    "an end in a package": lambda source: source.package([StreamHeader(3, "pc")]),
    "a bare EOS": lambda source: source.end(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_a_destination_would_refuse_is_not_written(wrong: Any) -> None:
    source, _ = begun()
    with pytest.raises(LocalProtocolError):
        wrong(source)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MainEncoder().command(ping(1)),
        lambda: MainEncoder().begin("m" * 256),
        lambda: MainEncoder().begin(""),
        lambda: MainEncoder().begin("é"),
        lambda: discard("pc.ram", []),
        lambda: discard("pc.ram", [(0, PAGE)] * 13),
        lambda: discard("", [(0, PAGE)]),
        lambda: recv_bitmap("n" * 256),
        lambda: command(Command.PING),
        lambda: command(Command.POSTCOPY_RAM_DISCARD, bytes(0x10000)),
        lambda: encode_event(object()),
        lambda: MainEncoder().ram_begin(BLOCKS),
    ],
)
def test_other_wrongs(make: Any) -> None:
    with pytest.raises(LocalProtocolError):
        make()


def test_blocks_that_are_no_list() -> None:
    for blocks in ([RamBlock("a", PAGE)] * 2, [RamBlock("a", PAGE - 1)]):
        source = MainEncoder()
        source.begin("pc")
        with pytest.raises(LocalProtocolError, match="a RAM block twice, or one that is not whole pages"):
            source.ram_begin(blocks)
