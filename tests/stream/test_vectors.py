"""The recordings of real QEMUs: read and written again byte for byte, and the guest's memory found in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from tests.support.recorder import SCENARIOS
from tests.support.reference import PAGE_BYTES, ReferenceReader, Seen
from tests.support.vectors import Recording, page_digest, recordings
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import encode_events
from virtmig.stream.mapped_ram import read_blocks, read_pages
from virtmig.stream.multifd import MultifdDecoder, MultifdHello, MultifdPacket, encode_multifd
from virtmig.stream.return_path import ReceivedBitmap, RequestPages, ReturnPathDecoder, Shut, encode_return_path
from virtmig.stream.wire import Command

ALL = recordings()
STREAMS = [each for each in ALL if "file" not in each.channels]
FILES = [each for each in ALL if "file" in each.channels]
MULTIFD = [(each, name) for each in STREAMS for name in each.channels if name.startswith("multifd-")]
RETURN_PATHS = [(each, name) for each in STREAMS for name in each.channels if each.answered(name)]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Recording) else str(value)


def decode_multifd(recording: Recording, channel: str) -> Iterator[MultifdHello | MultifdPacket]:
    decoder = MultifdDecoder(channel=channel, blocks=recording.about["blocks"], channels=2, uuid=bytes(16))
    decoder.feed(recording.sent(channel))
    decoder.end()
    for event in decoder.events():
        assert isinstance(event, MultifdHello | MultifdPacket)
        yield event


def epochs_of(recording: Recording, channel: str) -> list[list[MultifdPacket]]:
    """The packets of a channel, cut behind each SYNC; what a destination places between two syncs."""
    epochs: list[list[MultifdPacket]] = [[]]
    for event in decode_multifd(recording, channel):
        if isinstance(event, MultifdPacket):
            epochs[-1].append(event)
            if event.is_sync:
                epochs.append([])
    return epochs


def place_packet(seen: Seen, packet: MultifdPacket) -> None:
    for number, offset in enumerate(packet.normal_offsets.tolist()):
        page = bytes(packet.data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
        seen.counts["normal"] += 1
        seen.place(packet.block, offset, page)
    for offset in packet.zero_offsets.tolist():
        seen.counts["zero"] += 1
        seen.place(packet.block, offset, bytes(PAGE_BYTES))


def read_all(recording: Recording) -> Seen:
    """All channels of a recording, in the order that QEMU's own destination keeps."""
    seen = Seen()
    waiting = [epochs_of(recording, name) for name in recording.channels if name.startswith("multifd-")]
    version = tuple(map(int, recording.about["machine"].removeprefix("pc-i440fx-").split(".")))
    wanted = "eos" if version <= (8, 0) else "flush"

    def marker(kind: str) -> None:
        if kind == wanted and not (postcopy and seen.eof):
            for epochs in waiting:
                if epochs:
                    for packet in epochs.pop(0):
                        place_packet(seen, packet)

    postcopy = recording.has("postcopy-ram")
    for name in recording.channels:
        if not name.startswith("multifd-"):
            reader = ReferenceReader(recording.sent(name), seen, gpa=recording.has("x-ignore-shared"), marker=marker)
            (reader.read_main if name.startswith("main") else reader.read_preempt)()
    left = [packet for epochs in waiting for epoch in epochs for packet in epoch]
    assert not any(packet.normal_count or packet.zero_count for packet in left)
    return seen


def expected_commands(recording: Recording) -> list[tuple[int, bytes]]:
    """The commands in order, discards and bitmaps counted once, as wire.py's notes and the capabilities have it."""
    about = recording.about
    postcopy = recording.has("postcopy-ram")
    new_machine = not about["machine"].endswith("-7.2")
    commands: list[tuple[int, bytes]] = []

    def ping(value: int) -> None:
        commands.append((Command.PING, value.to_bytes(4, "big")))

    if postcopy or recording.has("return-path"):
        commands.append((Command.OPEN_RETURN_PATH, b""))
        ping(1)
    if postcopy:
        commands.append((Command.POSTCOPY_ADVISE, PAGE_BYTES.to_bytes(8, "big") * 2))
    if new_machine:
        commands.append((Command.SWITCHOVER_START, b""))
    if postcopy:
        commands.append((Command.POSTCOPY_RAM_DISCARD, b""))
        ping(2)
        commands += [(Command.PACKAGED, b""), (Command.POSTCOPY_LISTEN, b"")]
        ping(3)
        if about["qemu"].startswith("11."):
            ping(0x42)
        commands.append((Command.POSTCOPY_RUN, b""))
        ping(4)
    if about["ending"] == "recovery":
        commands += [(Command.RECV_BITMAP, b""), (Command.POSTCOPY_RESUME, b"")]
    return commands


def folded(commands: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Runs of discards and bitmaps as one, without the payloads that no one can foresee."""
    short: list[tuple[int, bytes]] = []
    for number, payload in commands:
        unforeseen = number in (Command.POSTCOPY_RAM_DISCARD, Command.RECV_BITMAP, Command.PACKAGED)
        entry = (number, b"" if unforeseen else payload)
        if not (unforeseen and short and short[-1] == entry):
            short.append(entry)
    return short


def test_every_scenario_of_every_version_was_recorded() -> None:
    expected = {f"{version}-{scenario.name}" for scenario in SCENARIOS for version in scenario.versions}
    assert {each.name for each in ALL} == expected


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_a_recording_is_what_was_recorded(recording: Recording) -> None:
    for entry in recording.about["connections"]:
        for way, content in (("s2d", recording.sent(entry["name"])), ("d2s", recording.answered(entry["name"]))):
            if f"{way}_bytes" in entry:
                assert len(content) == entry[f"{way}_bytes"]
                assert hashlib.blake2b(content, digest_size=16).hexdigest() == entry[f"{way}_blake2b"]
    for block in ("pc.ram", "pc.bios"):  # a paused destination had the source's memory, says QEMU itself
        memory = recording.about["memory"][block]
        assert memory.get("destination_blake2b", memory["blake2b"]) == memory["blake2b"]


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_arrivals_add_up_to_the_connections(recording: Recording) -> None:
    total: dict[tuple[str, str], int] = {}
    for channel, way, count in recording.arrivals():
        total[channel, way] = total.get((channel, way), 0) + count
    for entry in recording.about["connections"]:
        assert total.get((entry["name"], "s2d"), 0) == entry["s2d_bytes"]
        assert total.get((entry["name"], "d2s"), 0) == entry["d2s_bytes"]


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_the_pages_sent_are_the_guests_memory(recording: Recording) -> None:
    seen = read_all(recording)
    blocks = recording.page_digests()
    if recording.has("x-ignore-shared"):
        assert not seen.pages.get("pc.ram")
        del blocks["pc.ram"]
    for block, digests in blocks.items():
        assert {number: page_digest(page) for number, page in seen.pages[block].items()} == digests
    assert seen.blocks == recording.about["blocks"]
    assert seen.machine == recording.about["machine"]


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_page_counts_are_those_of_query_migrate(recording: Recording) -> None:
    seen, ram = read_all(recording), recording.about["ram"]
    counts = seen.counts
    if recording.about["ending"] == "recovery":  # what the source had counted but not got out is sent again
        assert 0 < counts["normal"] <= ram["normal"]
        assert 0 < counts["zero"] <= ram["duplicate"]
    elif recording.has("compress"):  # what a thread's buffer still holds is counted again at a flush
        assert counts["normal"] == ram["normal"]
        assert 0 < counts["zero"] <= ram["duplicate"]
        assert 0 < counts["compressed"] <= recording.about["compression"]["pages"]
    else:
        assert (counts["normal"], counts["zero"]) == (ram["normal"], ram["duplicate"])
    if recording.has("xbzrle"):
        cache = recording.about["xbzrle_cache"]
        assert counts["xbzrle_bytes"] == cache["bytes"]
        assert 0 < counts["xbzrle"] <= cache["pages"]  # unchanged pages are counted and not sent


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_commands_and_device_sections(recording: Recording) -> None:
    seen = read_all(recording)
    assert folded(seen.commands) == expected_commands(recording)
    assert [f"{name}/{instance}" for name, instance in seen.sections] == recording.about["device_sections"]
    assert bool(seen.description) == (not recording.has("postcopy-ram"))
    assert seen.eof


@pytest.mark.parametrize(("recording", "channel"), MULTIFD, ids=name_of)
def test_a_multifd_channel_is_written_again_byte_for_byte(recording: Recording, channel: str) -> None:
    again = b"".join(bytes(part) for event in decode_multifd(recording, channel) for part in encode_multifd(event))
    assert again == recording.sent(channel)


@pytest.mark.parametrize(("recording", "channel"), RETURN_PATHS, ids=name_of)
def test_a_return_path_is_written_again_byte_for_byte(recording: Recording, channel: str) -> None:
    answered = recording.answered(channel)
    decoder = ReturnPathDecoder(blocks=recording.about["blocks"])
    decoder.feed(answered)
    decoder.end()
    events = list(decoder.events())
    assert b"".join(map(encode_return_path, events)) == answered
    paused = recording.about["ending"] == "recovery" and channel == "main"
    assert (Shut(0) in events) == (not paused)
    if recording.has("postcopy-ram") and channel == "main":
        assert any(isinstance(event, RequestPages) for event in events)
    if channel == "main-recovery":
        bitmaps = [event.block for event in events if isinstance(event, ReceivedBitmap)]
        assert bitmaps == list(recording.about["blocks"])


@pytest.mark.parametrize("recording", FILES, ids=name_of)
def test_a_mapped_ram_file_holds_the_guests_memory(recording: Recording) -> None:
    content = recording.sent("file")

    def pread(count: int, offset: int) -> bytes:
        return content[offset : offset + count]

    at = content.index(b"\x03ram" + bytes(4) + (4).to_bytes(4, "big")) + 12
    shared = recording.has("x-ignore-shared")
    blocks, _ = read_blocks(pread, at, file_bytes=len(content), ignore_shared=shared)
    assert {block.name: block.used_length_bytes for block in blocks} == recording.about["blocks"]
    seen = Seen()
    for block in blocks:
        for run in read_pages(pread, block):
            for number in range(len(run.data) // PAGE_BYTES):
                page = bytes(run.data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
                seen.place(run.block, (run.first_page + number) * PAGE_BYTES, page)
    digests = recording.page_digests()
    if shared:
        assert not seen.pages.get("pc.ram")
        del digests["pc.ram"]
    for name, expected in digests.items():
        assert {number: page_digest(page) for number, page in seen.pages[name].items()} == expected


@pytest.mark.parametrize(
    ("recording", "channel"),
    [(each, name) for each in STREAMS for name in each.channels if not name.startswith("multifd-")],
    ids=name_of,
)
def test_a_main_or_preempt_channel_is_written_again_byte_for_byte(recording: Recording, channel: str) -> None:
    """Up to where the recording was cut, when it was."""
    sent = recording.sent(channel)
    preempt = channel.startswith("preempt")
    decoder = PreemptDecoder(channel) if preempt else QemuStreamDecoder(channel, recovery=channel.endswith("-recovery"))
    pieces = []
    for at in range(0, len(sent), 10_007):
        decoder.feed(sent[at : at + 10_007])
        pieces += encode_events(decoder.events())
    again = b"".join(pieces)
    was_cut = recording.about["ending"] == "recovery" and not channel.endswith("-recovery")
    assert sent.startswith(again) if was_cut else again == sent
