"""Where a device's section ends, and what the description says is in it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.vectors import Recording, recordings
from virtmig.errors import RemoteProtocolError
from virtmig.stream.decoder import QemuStreamDecoder
from virtmig.stream.device import (
    DESCRIPTION_PARSED_BYTES,
    described_sizes,
    find_description,
    may_follow,
    read_description,
    split_tail,
    walk,
)
from virtmig.stream.encoder import encode_event
from virtmig.stream.events import Description, DeviceSection
from virtmig.stream.wire import Item

DESCRIBED = [each for each in recordings() if "main" in each.channels and not each.has("postcopy-ram")]
SECTION = b"\x04\0\0\0\x07\x03cpu\0\0\0\0\0\0\0\x0c"


@pytest.mark.parametrize("recording", DESCRIBED, ids=lambda each: each.name)
def test_footers_and_the_description_of_a_real_qemu_agree(recording: Recording) -> None:
    decoder = QemuStreamDecoder()
    raw = recording.sent("main")
    decoder.feed(raw)
    decoder.end()
    devices, description = [], None
    for event in decoder.events():
        if isinstance(event, DeviceSection):
            devices.append(event)
        if isinstance(event, Description):
            description = event
    assert description is not None
    assert description.disagreements == ()
    about = read_description(description.text)
    ahead = find_description(raw[-(1 << 18) :])
    assert ahead is not None
    assert ahead[1] == about
    assert len(devices) == len(about["devices"])
    for device, entry in zip(devices, about["devices"], strict=True):
        assert (entry["name"], entry["instance_id"]) == (device.idstr, device.instance_id)
        fields = dict(walk(entry, device.data))
        if device.idstr == "globalstate":  # what QEMU wrote into it is known
            assert int.from_bytes(fields["size"], "big") == len(fields["runstate"].split(b"\0", 1)[0]) + 1
            assert fields["runstate"].startswith(b"running\0")


@pytest.mark.parametrize(
    ("behind", "verdict"),
    [
        (b"", None),
        (b"\0", None),
        (b"\0\6", None),
        (b'\0\6\0\0\0\x09{"', True),
        (b"\0\6\0\0\0\x09[1", False),
        (b"\0\1", False),
        (SECTION, True),
        (SECTION[:7], None),
        (SECTION[:5], None),
        (SECTION.replace(b"cpu", b"c\0u"), False),
        (SECTION.replace(b"\x03cpu", b"\0"), False),
        (SECTION[:-4] + b"\x00\x01\x00\x00", False),
        (b"\x02\0\0\0\x05", True),
        (b"\x03\0\0\0\x06", False),
        (b"\x03\0\0", None),
        (b"\x08\0\x02\0\x04", True),
        (b"\x08\0\x02\0\x05", False),
        (b"\x08\0\x00\0\x00", False),
        (b"\x08\0\x0c\0\x00", False),
        (b"\x08\1\x02\0\x04", False),
        (b"\x08\0\x02", None),
        (b"\x7e\0\0\0\5", False),
        (b"\xff", False),
    ],
)
def test_what_may_follow_a_footer(behind: bytes, verdict: bool | None) -> None:
    assert may_follow(behind, sections={5, 7}) is verdict
    if verdict is None and behind not in (b"", b"\0", b"\0\6"):
        assert may_follow(behind, sections={5, 7}, ended=True) is False
    if verdict is None and behind in (b"", b"\0", b"\0\6"):
        assert may_follow(behind, sections={5, 7}, ended=True) is True


def test_an_end_alone_is_enough_where_no_description_comes() -> None:
    assert may_follow(b"\0", ends_open=True) is True
    assert may_follow(b"\0", nested=True, ended=True) is False


DEVICE: dict[str, Any] = {
    "name": "dev",
    "instance_id": 0,
    "fields": [
        {"name": "a", "size": 2},
        {"name": "list", "array_len": 2, "size": 1},
        {"name": "one", "index": 4, "size": 1},
        {"name": "in", "array_len": 2, "struct": {"fields": [{"name": "x", "size": 1}]}},
    ],
    "subsections": [{"vmsd_name": "dev/sub", "fields": [{"name": "y", "size": 3}]}],
}
DATA = b"AAbcdXY" + b"\x05\x07dev/sub" + b"\0\0\0\1" + b"yyy"


def test_fields_by_name() -> None:
    assert list(walk(DEVICE, DATA)) == [
        ("a", b"AA"),
        ("list[0]", b"b"),
        ("list[1]", b"c"),
        ("one[4]", b"d"),
        ("in[0].x", b"X"),
        ("in[1].x", b"Y"),
        ("dev/sub.y", b"yyy"),
    ]
    assert described_sizes({"devices": [DEVICE, DEVICE]}) == {("dev", 0): [len(DATA)] * 2}


def test_data_that_does_not_fit() -> None:
    with pytest.raises(RemoteProtocolError, match="lies outside"):
        list(walk(DEVICE, DATA[:-1]))
    with pytest.raises(RemoteProtocolError, match=f"covers {len(DATA)} bytes of {len(DATA) + 1}"):
        list(walk(DEVICE, DATA + b"!"))
    with pytest.raises(RemoteProtocolError, match="is not in the section"):
        list(walk(DEVICE, DATA.replace(b"dev/sub", b"dev/sup")))


def deep(levels: int) -> dict[str, Any]:
    part: dict[str, Any] = {"name": "d", "instance_id": 0, "fields": [{"name": "x", "size": 0}]}
    for _ in range(levels):
        part = {"name": "d", "instance_id": 0, "fields": [{"name": "s", "array_len": 1000, "struct": part}]}
    return part


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ({"fields": 5}, "no list of objects"),
        ({"fields": [5]}, "no list of objects"),
        ({"fields": [{"name": "a"}]}, "has the size None"),
        ({"fields": [{"name": "a", "size": -1}]}, "has the size -1"),
        ({"fields": [{"name": "a", "size": "9"}]}, "has the size '9'"),
        ({"fields": [{"name": "a", "size": 1, "array_len": -1}]}, "repeated -1 times"),
        ({"fields": [{"name": "a", "size": 1, "array_len": [1]}]}, "repeated"),
        ({"subsections": [7]}, "no list of objects"),
        ({"subsections": {}}, "no list of objects"),
        (deep(40), "nested deeper|repeated too often"),
        (deep(5), "repeated too often"),
    ],
)
def test_a_broken_description_of_a_device(device: dict[str, Any], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        list(walk(device, b"abc"))


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([5], "no object"),
        ([{"instance_id": 0}], "without name"),
        ([{"name": "a", "instance_id": "0"}], "without name"),
        ([deep(40)], "nested deeper"),
    ],
)
def test_broken_lists_of_devices(devices: list[Any], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        described_sizes({"devices": devices})


def test_sizes_of_nested_arrays_are_not_counted_one_by_one() -> None:
    nested = deep(20)
    nested["fields"][0]["struct"]["fields"].append({"name": "z", "size": 3})
    assert described_sizes({"devices": [nested]}) == {("d", 0): [3000]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b"[]", "no list of devices"),
        (b"{}", "no list of devices"),
        (b'{"devices": 5}', "no list of devices"),
        (b" " * (DESCRIPTION_PARSED_BYTES + 1), "only"),
    ],
)
def test_a_broken_description(text: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        read_description(text)


def test_the_description_at_the_end_of_a_file() -> None:
    text = json.dumps({"devices": [DEVICE]}).encode()
    decoy = b'\0\6\0\0\0\5{"'
    raw = b"stream" + decoy + b"\0\6" + len(text).to_bytes(4, "big") + text
    assert find_description(raw) == (6 + len(decoy), {"devices": [DEVICE]})
    assert find_description(raw[:-1]) is None
    assert find_description(b"stream") is None


def test_a_tail_without_footers_is_cut_by_the_description() -> None:
    sections = [DeviceSection(Item.SECTION_FULL, number, "dev", 0, 3, DATA, 100 + 32 * number) for number in range(2)]
    tail = b"".join(bytes(encode_event(section)) for section in sections)
    found = split_tail(tail, {"devices": [DEVICE, DEVICE]}, 100)
    assert [(each.section_id, each.data, each.version_id) for each in found] == [(0, DATA, 3), (1, DATA, 3)]
    assert [tail[each.begins_at - 100] for each in found] == [Item.SECTION_FULL] * 2
    for broken in (tail[:-1], tail + b"\x04", tail.replace(b"dev\0", b"div\0"), b"\x01" + tail[1:]):
        with pytest.raises(RemoteProtocolError, match="does not fit the sections"):
            split_tail(broken, {"devices": [DEVICE, DEVICE]}, 100)
