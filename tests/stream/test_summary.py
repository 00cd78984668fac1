"""Summaries: every recording against QEMU's own counts and a second reader; passes, versions, fields by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tests.stream.test_vectors import read_all
from tests.support.streams import BLOCKS, HEADER, PAGE, RAM_ID, STREAM, decode, page_run, words, zero_run
from tests.support.vectors import Recording, recordings
from virtmig.errors import RemoteProtocolError
from virtmig.stream.commands import command, discard, ping
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.encoder import encode_event
from virtmig.stream.events import (
    Description,
    DeviceSection,
    EncodedPage,
    EndOfRam,
    MultifdFlush,
    OpaqueDevices,
    Package,
    Pages,
    SectionBegin,
    SectionFooter,
    StreamHeader,
)
from virtmig.stream.multifd import DeviceState, MultifdDecoder
from virtmig.stream.return_path import RequestPages, ReturnPathDecoder, SwitchoverAck
from virtmig.stream.summary import MOST_ROWS, StreamSummary, fields_of, unpacked
from virtmig.stream.summary_rows import Channel, Counts, Entry, Role, passes_of, together
from virtmig.stream.version_guess import ANY, Evidence, guess_version
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item

ALL = [each for each in recordings() if "file" not in each.channels]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Recording) else str(value)


def summarised(recording: Recording) -> list[Channel]:
    """All channels of a recording; one that was cut, up to there."""
    blocks, found = recording.about["blocks"], []
    for name in recording.channels:
        for way, raw in (("s2d", recording.sent(name)), ("d2s", recording.answered(name))):
            if not raw:
                continue
            decoder: Any
            resumed = name.endswith("-recovery")
            if way == "d2s":
                role, decoder = Role.RETURN_PATH, ReturnPathDecoder(blocks=blocks)
            elif name.startswith("multifd"):
                role, decoder = Role.MULTIFD, MultifdDecoder(blocks=blocks)
            elif name.startswith("preempt"):
                role, decoder = Role.PREEMPT, PreemptDecoder(name)
            else:
                role, decoder = Role.MAIN, QemuStreamDecoder(name, recovery=resumed)
            summary = StreamSummary(name, role, resumed=resumed)
            decoder.feed(raw)
            decoder.end()
            try:
                for event in decoder.events():
                    summary.add(event, 0)
                    if isinstance(event, Package):
                        for at, inner in unpacked(event, 0):
                            summary.add(inner, at)
            except RemoteProtocolError:
                assert recording.about["ending"] == "recovery"
            found.append(summary.result(len(raw)))
    return found


def release(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")
    return int(major), ANY if minor == "x" else int(minor)


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_the_counts_are_those_of_a_second_reader_and_of_query_migrate(recording: Recording) -> None:
    report, seen = together(recording.name, summarised(recording)), read_all(recording)
    counts = seen.counts
    assert (report.normal, report.duplicate) == (counts["normal"], counts["zero"])
    assert (report.ram.xbzrle, report.ram.compressed) == (counts["xbzrle"], counts["compressed"])
    assert report.ram.normal_bytes == report.normal * PAGE
    if recording.about["ending"] != "recovery" and not recording.has("compress"):
        ram = recording.about["ram"]
        assert (report.normal, report.duplicate) == (ram["normal"], ram["duplicate"])
    assert report.machine == recording.about["machine"]
    main = report.channels[0]
    assert {block.name: block.used_length_bytes for block in main.blocks} == recording.about["blocks"]


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_commands_and_devices_in_order(recording: Recording) -> None:
    mains = [channel for channel in summarised(recording) if channel.role is Role.MAIN]
    seen = read_all(recording)
    entries = [entry for channel in mains for entry in channel.commands]
    assert sum(entry.count for entry in entries) == len(seen.commands)
    numbers = [Number[entry.name] for entry in entries]
    assert numbers == [number for number, _ in seen.commands if number != Number.POSTCOPY_RAM_DISCARD] or (
        recording.has("postcopy-ram") and set(numbers) == {number for number, _ in seen.commands}
    )
    devices = [f"{device.name}/{device.instance_id}" for channel in mains for device in channel.devices]
    assert devices == recording.about["device_sections"]
    described = [device.fields for device in mains[0].devices]
    assert all(fields for fields in described) == (not recording.has("postcopy-ram"))
    for device in mains[0].devices:
        assert device.fields is None or sum(field.bytes for field in device.fields) <= device.bytes


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_what_is_guessed_is_true(recording: Recording) -> None:
    report = together(recording.name, summarised(recording))
    wrote = release(recording.about["qemu"].rpartition(".")[0])
    since, until = release(report.version.since), release(report.version.until)
    assert since is not None
    assert wrote is not None
    assert since <= wrote
    assert until is None or wrote <= until
    assert report.version.reasons
    listed = set(recording.about["capabilities"])
    # a postcopy opens a return path without that capability
    assert set(report.capabilities) == listed | ({"return-path"} if "postcopy-ram" in listed else set())


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_the_passes_add_up_and_are_plausible(recording: Recording) -> None:
    channels = summarised(recording)
    report = together(recording.name, channels)
    total = Counts()
    for row in report.passes:
        total.add(row.counts)
    assert total == report.ram
    kinds = list(dict.fromkeys(row.kind for row in report.passes))
    assert kinds == (["precopy", "postcopy"] if recording.has("postcopy-ram") else ["precopy", "end"])
    if recording.about["ending"] == "precopy":
        assert len(report.passes) <= recording.about["ram"]["dirty_sync_count"] + 1
    if recording.name.endswith("-plain"):
        assert len(report.passes) >= recording.about["passes_before_the_end"]
    # the first pass has the whole memory: every page that was not zero, and all the zero ones
    if recording.about["ending"] == "precopy" and not recording.has("compress"):
        assert report.passes[0].counts.duplicate == max(row.counts.duplicate for row in report.passes)
    again = msgspec.json.decode(msgspec.json.encode(report))
    assert (again["normal"], again["duplicate"]) == (report.normal, report.duplicate)


# -- by hand -----------------------------------------------------------------------------------------------------------


def main_of(events: list[Any], *, resumed: bool = False) -> Channel:
    summary, at = StreamSummary("main", Role.MAIN, resumed=resumed), 0
    for event in events:
        summary.add(event, at)
        if isinstance(event, Package):
            for inner_at, inner in unpacked(event, at):
                summary.add(inner, inner_at)
        at += len(encode_event(event))
    return summary.result(at)


def part(*events: Any, kind: Item = Item.SECTION_PART) -> list[Any]:
    return [SectionBegin(kind, RAM_ID, "ram"), *events, EndOfRam(), SectionFooter(RAM_ID)]


START = [HEADER, SectionBegin(Item.SECTION_START, RAM_ID, "ram", 0, 4), BLOCKS, EndOfRam(), SectionFooter(RAM_ID)]


def kinds_of(channel: Channel) -> list[tuple[str, int]]:
    return [(row.kind, row.counts.pages) for row in passes_of([channel])]


def test_the_made_stream() -> None:
    channel = main_of(STREAM)
    counts = channel.counts
    assert (counts.normal, counts.duplicate, counts.xbzrle, counts.compressed) == (3, 3, 1, 1)
    assert counts.wire_bytes == 3 * PAGE + 3 + 3 + len(b"\x78\x01compressed")
    assert [entry.name for entry in channel.commands] == [
        "OPEN_RETURN_PATH", "PING", "POSTCOPY_ADVISE", "POSTCOPY_RAM_DISCARD", "SWITCHOVER_START",
    ]  # fmt: skip
    assert channel.commands[3] == Entry(
        channel.commands[3].offset, "POSTCOPY_RAM_DISCARD", "pc.ram", "", 1, 2, 3 * PAGE
    )
    assert channel.uuid == "00" * 16
    assert channel.ended
    assert channel.described
    assert channel.devices[0].fields is None  # the description knows no such device


def test_a_pass_begins_where_the_pages_jump_back() -> None:
    both = Pages("pc.ram", False, words(5, 6, 2, 3, flags=0x28), memoryview(bytes(4 * PAGE)))
    channel = main_of(
        [
            *START,
            *part(page_run(0, 3, named=True)),
            *part(zero_run(3, 4), page_run(0, 1, named=True, block="pc.rom")),
            *part(page_run(1, 1, named=True), both),
            *part(page_run(4, 2), kind=Item.SECTION_END),
        ]
    )
    assert kinds_of(channel) == [("precopy", 8), ("precopy", 3), ("precopy", 2), ("end", 2)]
    last = [row for row in channel.passes if row.kind == "precopy"][-1]
    assert last.offset % 8 == (last.offset - 2 * (8 + PAGE)) % 8


def test_the_offset_of_a_pass_inside_a_run_is_its_records() -> None:
    run = Pages("pc.ram", True, words(5, 6, 2, 3, flags=0x08), memoryview(bytes(4 * PAGE)))
    run.words[1:] |= np.uint64(0x20)
    events = [*START, *part(run)]
    begin = sum(len(encode_event(event)) for event in [*START, events[len(START)]])
    channel = main_of(events)
    assert [row.offset for row in channel.passes if row.counts.pages] == [
        begin,
        begin + 2 * (8 + PAGE) + 1 + len("pc.ram"),
    ]


def test_flush_words_end_passes_and_jumps_count_no_more() -> None:
    channel = main_of(
        [
            *START[:3], MultifdFlush(), *START[3:],
            *part(zero_run(5, 2, named=True), MultifdFlush()),
            *part(zero_run(3, 1), zero_run(1, 1), MultifdFlush(), MultifdFlush()),
            *part(MultifdFlush(), zero_run(0, 1), MultifdFlush(), kind=Item.SECTION_END),
        ]
    )  # fmt: skip
    assert kinds_of(channel) == [("precopy", 2), ("precopy", 2), ("end", 1)]
    assert sum(row.flushes for row in channel.passes) == 6


def test_compressed_pages_are_one_pass_until_the_end() -> None:
    compressed = [EncodedPage("pc.ram", False, page * PAGE | 0x120, b"xx") for page in (9, 3, 5, 1)]
    channel = main_of(
        [*START, *part(zero_run(9, 1, named=True), zero_run(2, 1), *compressed), *part(kind=Item.SECTION_END)]
    )
    assert kinds_of(channel) == [("precopy", 6), ("end", 0)]
    assert channel.counts.compressed == 4
    assert channel.inferred["compress"]


def test_from_listen_on_everything_is_postcopy() -> None:
    listen = [command(Number.POSTCOPY_LISTEN), command(Number.POSTCOPY_RUN)]
    length = sum(len(encode_event(event)) for event in listen)
    channel = main_of(
        [
            *START,
            *part(page_run(0, 2, named=True)),
            discard("pc.ram", [(0, PAGE)]),
            discard("pc.ram", [(PAGE, PAGE)]),
            discard("pc.rom", [(0, PAGE)]),
            Package(length, tuple(listen)),
            *part(page_run(1, 1), page_run(0, 1)),
            *part(kind=Item.SECTION_END),
        ]
    )
    assert kinds_of(channel) == [("precopy", 2), ("postcopy", 2)]
    assert [(entry.name, entry.block, entry.count, entry.ranges, entry.bytes) for entry in channel.commands[:2]] == [
        ("POSTCOPY_RAM_DISCARD", "pc.ram", 2, 2, 2 * PAGE),
        ("POSTCOPY_RAM_DISCARD", "pc.rom", 1, 1, PAGE),
    ]
    package, inner = channel.commands[2:4]
    assert (package.name, inner.name) == ("PACKAGED", "POSTCOPY_LISTEN")
    assert inner.offset == package.offset + 9


def test_rows_are_bounded() -> None:
    summary = StreamSummary("back", Role.RETURN_PATH)
    for number in range(MOST_ROWS + 10):
        summary.add(RequestPages(f"block{number % 2}", 0, PAGE, True), number * 12)
    entries = summary.result(0).commands
    assert len(entries) == MOST_ROWS
    assert sum(entry.count for entry in entries) == MOST_ROWS + 10
    assert sum(entry.bytes for entry in entries) == (MOST_ROWS + 10) * PAGE


def test_opaque_devices_and_a_cut_description_are_noted() -> None:
    channel = main_of([*START, OpaqueDevices(b"12345", 99), Description(b"{", 9)])
    assert any("5 bytes of device sections" in note for note in channel.notes)
    assert any("cut off" in note for note in channel.notes)
    assert not channel.described


# -- fields ------------------------------------------------------------------------------------------------------------


def test_neighbours_of_one_array_are_one_field() -> None:
    described = {
        "fields": [
            {"name": "a", "size": 2},
            {"name": "regs", "size": 4, "array_len": 3},
            {"name": "one", "size": 1, "index": 7},
            {"name": "s", "struct": {"fields": [{"name": "x", "size": 1}]}, "array_len": 2},
        ]
    }
    fields, why = fields_of(described, bytes(range(17)))
    assert why == ""
    assert [(field.name, field.bytes, field.value) for field in fields] == [
        ("a", 2, "0001"),
        ("regs[0..2]", 12, "02030405060708090a0b0c0d"),
        ("one[7]", 1, "0e"),
        ("s[0].x", 1, "0f"),
        ("s[1].x", 1, "10"),
    ]


def test_fields_that_do_not_fit_are_shown_up_to_there() -> None:
    fields, why = fields_of({"fields": [{"name": "a", "size": 2}, {"name": "b", "size": 9}]}, b"12345")
    assert [field.name for field in fields] == ["a"]
    assert "b of 9 bytes" in why
    many = {"fields": [{"name": f"f{number}", "size": 1} for number in range(9)]}
    fields, why = fields_of(many, bytes(9), 5)
    assert (len(fields), why) == (5, "more fields are not shown")


def test_long_values_are_cut() -> None:
    fields, _ = fields_of({"fields": [{"name": "buffer", "size": 100}]}, bytes(100))
    assert (fields[0].bytes, fields[0].value) == (100, "00" * 32)


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        ([], "not known: nothing here came or went with a release"),
        ([Evidence("a", since=(7, 2))], "7.2 or newer"),
        ([Evidence("a", until=(9, 0))], "9.0 or older"),
        ([Evidence("a", since=(7, 2)), Evidence("b", since=(2, 12)), Evidence("c", until=(9, ANY))], "7.2 to 9.x"),
        ([Evidence("a", since=(10, 1)), Evidence("b", until=(10, 1))], "10.1"),
        ([Evidence("a", since=(10, 0)), Evidence("b", until=(8, ANY))],
         "the bytes contradict each other: 10.0 or newer, and 8.x or older"),
    ],
)  # fmt: skip
def test_version_ranges(evidence: list[Evidence], text: str) -> None:
    guess = guess_version(evidence)
    assert guess.text == text
    assert set(guess.reasons) == {each.words for each in evidence}


@pytest.mark.parametrize(
    ("event", "since", "until"),
    [
        (StreamHeader(3, "pc-q35-9.1"), "9.1", None),
        (StreamHeader(3, "pc-i440fx-rhel7.6.0"), None, None),
        (StreamHeader(3, None), None, None),
        (StreamHeader(3, "x", (), frozenset({"mapped-ram"})), "9.0", None),
        (ping(0x42), "10.2", None),
        (ping(3), None, None),
        (command(Number.SWITCHOVER_START), "10.0", None),
        (command(Number.ENABLE_COLO), None, "10.1"),
        (MultifdFlush(), "8.1", None),
        (EncodedPage("pc.ram", False, 0x120, b""), None, "9.0"),
        (EncodedPage("pc.ram", False, 0x60, b""), None, None),
        (DeviceState(0x40, b"vfio" + bytes(252), 0, 0), "10.0", None),
        (SwitchoverAck(), "8.1", None),
    ],
)
def test_what_one_event_tells(event: object, since: str | None, until: str | None) -> None:
    role = Role.MULTIFD if isinstance(event, DeviceState) else Role.MAIN
    summary = StreamSummary("x", role)
    summary.add(event, 0)
    guess = guess_version(summary.result(0).evidence)
    assert (guess.since, guess.until) == (since, until)


def test_events_of_a_package_have_their_own_offsets() -> None:
    section = DeviceSection(Item.SECTION_FULL, 9, "cpu", 0, 1, b"abc", 0)
    inside: list[object] = [command(Number.POSTCOPY_LISTEN), section, SectionFooter(9), command(Number.POSTCOPY_RUN)]
    package = Package(sum(len(encode_event(event)) for event in inside), tuple(inside))
    assert [at for at, _ in unpacked(package, 1000)] == [1009, 1014, 1014 + 17 + 3, 1014 + 25]


def test_nothing_is_kept_of_the_pages() -> None:
    summary = StreamSummary("main", Role.MAIN)
    for event in decode(b"".join(bytes(encode_event(event)) for event in STREAM)):
        summary.add(event, 0)
    assert len(msgspec.json.encode(summary.result(0))) < 4000
