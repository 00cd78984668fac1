"""Where streams and sections end: descriptions, cut or deceived; machine types without them; mapped-ram files."""

from __future__ import annotations

import json
import lzma

import pytest

from tests.support.streams import (
    CAPTURES,
    DEVICE_ID,
    JSON,
    POSTCOPY,
    RAM_ID,
    RAW,
    STREAM,
    decode,
    kinds,
)
from tests.support.vectors import Recording, recordings
from virtmig.errors import RemoteProtocolError
from virtmig.stream.commands import command
from virtmig.stream.decoder import QemuStreamDecoder
from virtmig.stream.device import find_description, read_description, walk
from virtmig.stream.encoder import encode_event, encode_events
from virtmig.stream.events import (
    Description,
    DeviceSection,
    EndOfRam,
    EndOfStream,
    MappedArea,
    MappedEntry,
    OpaqueDevices,
    SectionFooter,
)
from virtmig.stream.wire import Command as Number
from virtmig.stream.wire import Item

FILES = [each for each in recordings() if "file" in each.channels]


def test_finished_tells_when_nothing_more_is_to_come() -> None:
    decoder = QemuStreamDecoder()
    end_of_stream = len(RAW) - 5 - len(JSON)
    for at in range(len(RAW)):
        assert not decoder.finished
        decoder.feed(RAW[at : at + 1])
        list(decoder.events())
    assert decoder.finished
    without = QemuStreamDecoder(expect_description=False)
    without.feed(RAW[:end_of_stream])
    assert kinds(list(without.events()))[-1] == "EndOfStream"
    assert without.finished
    postcopy = QemuStreamDecoder()
    postcopy.feed(b"".join(encode_events([*POSTCOPY, EndOfRam(), SectionFooter(RAM_ID), EndOfStream()])))
    assert kinds(list(postcopy.events()))[-1] == "EndOfStream"
    assert postcopy.finished


@pytest.mark.parametrize("left", range(1, 5 + len(JSON)))
def test_a_description_that_is_cut_off_is_kept(left: int) -> None:
    """A source without a return path closes at once: QEMU warns and goes on."""
    raw = RAW[: len(RAW) - left]
    events = decode(raw)
    assert b"".join(encode_events(events)) == raw
    assert isinstance(events[-1], Description)
    assert not events[-1].complete


def test_a_description_that_says_otherwise_is_told() -> None:
    text = json.dumps({"devices": [{"name": "cpu", "instance_id": 0, "fields": [{"name": "x", "size": 3}]}]}).encode()
    events = decode(b"".join(encode_events([*STREAM[:-1], Description(text, len(text))])))
    assert events[-1].disagreements == ("section 'cpu' (0) has 11 bytes, 3 are described",)
    right = text.replace(b"3}", b"11}")
    assert decode(b"".join(encode_events([*STREAM[:-1], Description(right, len(right))])))[-1].disagreements == ()


def test_a_description_read_ahead_cuts_where_footers_deceive() -> None:
    """A footer and a plausible next item inside a device: only the description knows better."""
    data = b"ab" + encode_event(SectionFooter(DEVICE_ID)) + encode_event(command(Number.SWITCHOVER_START)) + b"cd"
    device = DeviceSection(Item.SECTION_FULL, DEVICE_ID, "cpu", 0, 12, data, 0)
    text = json.dumps({"devices": [{"name": "cpu", "instance_id": 0, "fields": [{"name": "x", "size": len(data)}]}]})
    events = [*STREAM[:22], device, SectionFooter(DEVICE_ID), EndOfStream(), Description(text.encode(), len(text))]
    raw = b"".join(encode_events(events))
    with pytest.raises(RemoteProtocolError, match="unknown item"):
        decode(raw)
    found = find_description(raw[-len(text) - 100 :])
    assert found is not None
    assert [event.data for event in decode(raw, saved=found[1]) if isinstance(event, DeviceSection)] == [data]
    with pytest.raises(RemoteProtocolError, match="where the footer of section 77"):
        decode(raw.replace(b"cd\x7e", b"cde\x7e"), saved=found[1])


@pytest.mark.parametrize("step", [0, 100, 1])
@pytest.mark.parametrize("name", ["pc-i440fx-2.3", "pc-i440fx-2.2", "suppress-vmdesc"])
def test_streams_of_old_machine_types_by_a_real_qemu(name: str, step: int) -> None:
    """2.3: no configuration and no footers; 2.2: no description either."""
    raw = lzma.decompress((CAPTURES / f"main-7.2-{name}.xz").read_bytes())
    events = decode(raw, step, expect_description=name != "suppress-vmdesc")
    assert b"".join(encode_events(events)) == raw
    devices = [event for event in events if isinstance(event, DeviceSection)]
    if name == "pc-i440fx-2.2":
        (opaque,) = [event for event in events if isinstance(event, OpaqueDevices)]
        assert opaque.data == raw[opaque.begins_at : -1]
    else:
        assert [device.idstr for device in devices][:3] == ["timer", "cpu_common", "cpu"]
        assert all(raw[device.begins_at] == Item.SECTION_FULL for device in devices)
    assert any(isinstance(event, SectionFooter) for event in events) == (name == "suppress-vmdesc")
    if name == "pc-i440fx-2.3":
        (description,) = [event for event in events if isinstance(event, Description)]
        described = read_description(description.text)["devices"]
        assert [device["name"] for device in described] == [device.idstr for device in devices]
        for device, about in zip(devices, described, strict=True):
            assert sum(len(content) for _, content in walk(about, device.data)) > 0 or not device.data


@pytest.mark.parametrize(
    "recording", [each for each in recordings() if "file" in each.channels], ids=lambda each: each.name
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_mapped_ram_file_of_a_real_qemu(recording: Recording, ahead: bool) -> None:
    raw = recording.sent("file")
    found = find_description(raw[-(1 << 18) :])
    assert found is not None
    decoder, at, seen = QemuStreamDecoder(saved=found[1] if ahead else None), 0, []
    for start in range(0, len(raw), 1 << 20):
        decoder.feed(raw[start : start + (1 << 20)])
        for event in decoder.events():
            (part,) = encode_events([event])
            assert raw[at : at + len(part)] == part
            at += len(part)
            if not isinstance(event, MappedArea):
                seen.append(event)
    assert (at, decoder.finished) == (len(raw), True)
    blocks = {event.block.name: event.block.used_length for event in seen if isinstance(event, MappedEntry)}
    assert blocks == recording.about["blocks"]
    assert "mapped-ram" in seen[0].capabilities
