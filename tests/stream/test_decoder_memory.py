"""What the decoder gives of a recording is the guest's memory; what the encoder makes of memory is what QEMU sent."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.vectors import Recording, page_digest, recordings
from virtmig.stream.commands import Order
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import MainEncoder, encode_events
from virtmig.stream.events import EncodedPage, EndOfRam, EndOfStream, Pages, RamBlocks, SectionBegin, ZeroPages
from virtmig.stream.xbzrle import decode_xbzrle, encode_xbzrle

PAGE = 4096
ZERO = bytes(PAGE)
STREAMS = [each for each in recordings() if "file" not in each.channels and not each.has("multifd")]
PLAIN = [each for each in STREAMS if each.name.endswith("-plain")]


def events_of(recording: Recording) -> Iterator[Any]:
    """Of main, preempt and what recovered them, in the order in which they were opened."""
    main = None
    for channel in recording.channels:
        if channel.startswith("preempt"):
            assert main is not None
            decoder: Any = PreemptDecoder(channel, main=main.ram)
        else:
            decoder = QemuStreamDecoder(channel, recovery=main is not None, ram=main.ram if main else None)
            main = main or decoder
        decoder.feed(recording.sent(channel))
        if recording.about["ending"] != "recovery":
            decoder.end()
        yield from decoder.events()


class Memory:
    def __init__(self) -> None:
        self.pages: dict[str, dict[int, bytes]] = {}
        self.xbzrle: list[tuple[bytes, bytes, bytes]] = []

    def take(self, event: Any) -> None:
        if not isinstance(event, Pages | ZeroPages | EncodedPage):
            return
        pages = self.pages.setdefault(event.block, {})
        if isinstance(event, Pages):
            for run in event.batch().runs():
                for number in range(run.page_count):
                    pages[run.first_page + number] = bytes(run.data[number * PAGE : (number + 1) * PAGE])
        elif isinstance(event, ZeroPages):
            pages.update(dict.fromkeys(event.page_numbers.tolist(), ZERO))
        elif event.xbzrle:
            old = pages.get(event.offset // PAGE, ZERO)
            new = pages[event.offset // PAGE] = decode_xbzrle(event.data, old)
            self.xbzrle.append((old, new, event.data))
        else:
            pages[event.offset // PAGE] = zlib.decompress(event.data)

    def digests(self, block: str) -> dict[int, str]:
        return {number: page_digest(page) for number, page in self.pages[block].items() if page != ZERO}


@pytest.mark.parametrize("recording", STREAMS, ids=lambda each: each.name)
def test_the_pages_are_the_guests_memory(recording: Recording) -> None:
    memory, blocks, ended = Memory(), None, False
    for event in events_of(recording):
        memory.take(event)
        blocks = event if isinstance(event, RamBlocks) else blocks
        ended = ended or isinstance(event, EndOfStream)
    digests = recording.page_digests()
    if recording.has("x-ignore-shared"):
        del digests["pc.ram"]
    assert {block: memory.digests(block) for block in digests} == digests
    assert blocks is not None
    assert {block.name: block.used_length for block in blocks.blocks} == recording.about["blocks"]
    assert ended
    assert bool(memory.xbzrle) == recording.has("xbzrle")


@pytest.mark.parametrize("recording", recordings("xbzrle"), ids=lambda each: each.name)
def test_xbzrle_is_written_as_qemu_writes_it(recording: Recording) -> None:
    memory = Memory()
    for event in events_of(recording):
        memory.take(event)
    for old, new, encoded in memory.xbzrle:
        assert encode_xbzrle(old, new) == encoded


@pytest.mark.parametrize("recording", PLAIN, ids=lambda each: each.name)
def test_the_encoder_makes_the_ram_sections_that_qemu_made(recording: Recording) -> None:
    """Precopy without the tricks: the same calls in the same order give the same bytes."""
    made, source, sent = [], None, []
    for event in events_of(recording):
        if isinstance(event, SectionBegin):
            if source is None:
                source = MainEncoder(ram_section_id=event.section_id)
                source.begin("pc")
            else:
                made.append(source.ram_part() if event.kind == 2 else source.ram_end())
                sent.append(event)
        elif isinstance(event, RamBlocks):
            assert source is not None
            source.ram_begin(event.blocks)
        elif isinstance(event, Pages | ZeroPages) and source is not None:
            numbers = event.page_numbers
            if isinstance(event, Pages):
                made.append(source.pages(event.block, numbers, event.data))
            else:
                made.append(source.zero_pages(event.block, numbers))
            sent.append(event)
        elif isinstance(event, EndOfRam) and sent:
            assert source is not None
            made.append(source.ram_section_end()[:8])
            sent.append(event)
    pages = sum(len(event.words) for event in sent if isinstance(event, Pages | ZeroPages))
    assert pages == recording.about["ram"]["normal"] + recording.about["ram"]["duplicate"]
    assert b"".join(made) == b"".join(encode_events(sent))


def test_the_order_of_commands_is_kept_over_a_recovery() -> None:
    assert Order(resumed=True).listening
    assert not Order().listening
