"""`virtmig inspect`: every recording, save files, mapped-ram, pipes and packings; cut, damaged and wrong files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.streams import CAPTURES, JSON, RAW, STREAM
from tests.support.vectors import VECTORS, Recording, recordings
from virtmig.cli.main import main
from virtmig.stream.encoder import encode_event
from virtmig.stream.events import EndOfRam, SectionBegin, SectionFooter, StreamHeader
from virtmig.stream.mapped_ram import BlockPlan, PageRun, lay_out, present_pages, read_blocks, write_blocks, write_pages
from virtmig.stream.multifd_compression import zstd_module
from virtmig.stream.save_file import SaveFormat, SaveHeader, encode_save_header, read_save_header
from virtmig.stream.wire import Dialect, Item

ALL = recordings()
FILES = [each for each in ALL if "file" in each.channels]
STREAMS = [each for each in ALL if "file" not in each.channels]
XML = b"<domain type='qemu'><name>web01</name></domain>\0" + bytes(80)


def name_of(value: object) -> str:
    return value.name if isinstance(value, Recording) else str(value)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `virtmig inspect`: (exit status, standard output, standard error)."""

    def inspect(*words: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        status = main(["inspect", *map(str, words)])
        return status, *capfd.readouterr()

    return inspect


@pytest.fixture
def shown(run: Any, tmp_path: Path) -> Any:
    """The same of bytes in a file, with --json."""

    def inspect(raw: bytes, *words: str) -> tuple[int, dict[str, Any], str]:
        path = tmp_path / "some.file"
        path.write_bytes(raw)
        status, out, err = run(path, "--json", *words)
        return status, json.loads(out), err

    return inspect


def events_of(out: str) -> list[tuple[str, int, str]]:
    """(channel, offset, event) of the lines of --events."""
    found = [re.match(r"(.*?)  0x([0-9a-f]+)  (\S+)", line) for line in out.splitlines()]
    return [(match[1], int(match[2], 16), match[3]) for match in found if match]


# -- recordings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_a_recording_as_json(recording: Recording, run: Any) -> None:
    status, out, err = run(recording.folder, "--json")
    report = json.loads(out)
    cut = recording.about["ending"] == "recovery"
    assert (status, report["whole"], err == "") in ([(0, True, True), (1, False, False)] if cut else [(0, True, True)])
    assert report["machine"] == recording.about["machine"]
    ram = recording.about["ram"]
    if not cut and not recording.has("compress") and "file" not in recording.channels:
        assert (report["normal"], report["duplicate"]) == (ram["normal"], ram["duplicate"])
    names = {channel["name"] for channel in report["channels"]}
    back = {f"{name} (back)" for name in recording.channels if recording.answered(name)}
    assert names == {name for name in recording.channels if (recording.folder / f"{name}.s2d.xz").exists()
                     or name == "file"} | back  # fmt: skip
    for channel in report["channels"]:
        if channel["role"] == "multifd":
            assert channel["name"] == f"multifd-{channel['multifd']['channel_id']}"
            assert channel["multifd"]["packets"] >= channel["multifd"]["syncs"] > 0


@pytest.mark.parametrize("recording", ALL, ids=name_of)
def test_a_recording_for_people(recording: Recording, run: Any) -> None:
    status, out, _ = run(recording.folder)
    lines = out.splitlines()
    assert re.search(rf"^  machine +{re.escape(recording.about['machine'])}$", out, re.MULTILINE)
    assert re.search(r"^  QEMU version +\d+\.[\dx]+ (to|or) ", out, re.MULTILINE)
    assert all(line == line.rstrip() and line.isprintable() for line in lines)
    for device in recording.about["device_sections"]:
        name, _, instance = device.rpartition("/")
        assert re.search(rf"^    0x[0-9a-f]+ +{re.escape(name)} +{instance} ", out, re.MULTILINE)
        assert (f"fields of {device}" in lines) == (not recording.has("postcopy-ram"))
    assert lines[-1].startswith("damaged: " if status else "whole: ")


#: every third: a line an event takes long for many thousand pages
LINED = [each for at, each in enumerate(STREAMS) if at % 3 == 0]


@pytest.mark.parametrize("recording", LINED, ids=name_of)
def test_event_lines_follow_each_other(recording: Recording, run: Any) -> None:
    _, out, _ = run(recording.folder, "--events")
    events = events_of(out)
    assert len(events) == len(out.splitlines())
    for channel in recording.channels:
        raw = recording.sent(channel)
        offsets = [offset for name, offset, _ in events if name == channel]
        assert offsets == sorted(offsets)
        assert not offsets or (offsets[0] == 0 and offsets[-1] < len(raw))
    marks = {"SECTION_FULL": 4, "SECTION_PART": 2, "SectionFooter": 0x7E, "PING": 8, "EndOfStream": 0, "Description": 6}
    for channel, offset, event in events:
        if event in marks and channel.startswith("main") and not channel.endswith("(back)"):
            assert recording.sent(channel)[offset] == marks[event]


def test_events_as_json_lines(run: Any) -> None:
    folder = VECTORS / "10.0-multifd"
    _, lines, _ = run(folder, "--events")
    status, out, _ = run(folder, "--events", "--json")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["channel"], row["offset"], row["event"]) for row in rows] == events_of(lines)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("7.2-recovery-preempt/*2?.xz")), ids=lambda path: path.name)
def test_one_channel_alone_is_recognised(path: Path, run: Any) -> None:
    status, out, _ = run(path, "--json")
    (channel,) = json.loads(out)["channels"]
    expected = "return path" if ".d2s." in path.name else path.name.split(".")[0].split("-")[0]
    assert channel["role"] == expected
    assert status == (0 if channel["damage"] is None else 1)


def test_a_multifd_channel_alone(run: Any) -> None:
    status, out, _ = run(VECTORS / "7.2-multifd" / "multifd-1.s2d.xz", "--json")
    report = json.loads(out)
    assert (status, report["channels"][0]["role"], report["machine"]) == (0, "multifd", None)
    assert report["version"]["text"] == "8.x or older"


@pytest.mark.parametrize("recording", FILES, ids=name_of)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "xz"])
def test_mapped_ram(recording: Recording, plain: bool, run: Any, tmp_path: Path) -> None:
    content = recording.sent("file")
    path = recording.folder / "file.xz"
    if plain:
        path = tmp_path / "mapped"
        path.write_bytes(content)

    def pread(count: int, offset: int) -> bytes:
        return content[offset : offset + count]

    at = content.index(b"\x03ram" + bytes(4) + (4).to_bytes(4, "big")) + 12
    shared = recording.has("x-ignore-shared")
    blocks, _ = read_blocks(pread, at, file_bytes=len(content), ignore_shared=shared)
    present = {block.name: len(present_pages(pread, block)) for block in blocks}
    status, out, _ = run(path, "--json")
    report = json.loads(out)
    channel = report["channels"][0]
    assert status == 0
    assert {block["name"]: block["present_pages"] for block in channel["blocks"]} == present
    assert report["normal"] == sum(present.values())
    assert report["duplicate"] == sum(
        block.page_count - present[block.name] for block in blocks if not block.header.is_absent
    )
    assert report["duplicate"] == recording.about["ram"]["duplicate"]
    assert report["capabilities"]["mapped-ram"]


# -- save files and packings -------------------------------------------------------------------------------------------


def packed(raw: bytes, format_: SaveFormat) -> bytes:
    if format_ is SaveFormat.ZSTD:
        return bytes(zstd_module().compress(raw))
    pack = {SaveFormat.GZIP: gzip.compress, SaveFormat.BZIP2: bz2.compress, SaveFormat.XZ: lzma.compress}
    return pack[format_](raw) if format_ in pack else raw


@pytest.mark.parametrize("format_", [each for each in SaveFormat if each not in (SaveFormat.LZOP, SaveFormat.SPARSE)])
def test_a_save_file(format_: SaveFormat, shown: Any) -> None:
    recording = next(each for each in ALL if each.name == "7.2-plain")
    raw = recording.sent("main")
    header = encode_save_header(SaveHeader(XML, 1, format_))
    status, report, err = shown(header + packed(raw, format_))
    assert (status, err) == (0, "")
    assert (report["container"]["domain"], report["container"]["format"]) == ("web01", format_.name.lower())
    assert report["container"]["was running"] is True
    ram = recording.about["ram"]
    assert (report["normal"], report["duplicate"]) == (ram["normal"], ram["duplicate"])
    (channel,) = report["channels"]
    first = channel["devices"][0]["offset"]
    assert raw[first - (len(header) if format_ is SaveFormat.RAW else 0)] == 4


def test_a_sparse_save_file(shown: Any) -> None:
    """Libvirt's sparse format is mapped-ram, whose offsets count from the beginning of the file."""
    listed = (1).to_bytes(4, "big") + b"\x0amapped-ram"
    capabilities = frozenset({"mapped-ram"})
    raw = bytearray(encode_save_header(SaveHeader(XML, 1, SaveFormat.SPARSE)))
    raw += encode_event(StreamHeader(3, "pc-1.0", (("configuration/capabilities", 1, listed),), capabilities))
    raw += encode_event(SectionBegin(Item.SECTION_START, 5, "ram", 0, 4))
    plans = [BlockPlan("pc.ram", 64 * 4096), BlockPlan("pc.rom", 8 * 4096)]
    blocks, end = lay_out(plans, len(raw), dialect=Dialect.QEMU_10_0)
    at = len(raw)
    raw += bytes(end - at)

    def pwrite(data: bytes | memoryview, offset: int) -> None:
        raw[offset : offset + len(data)] = data

    write_blocks(pwrite, at, blocks)
    write_pages(pwrite, blocks[0], [PageRun("pc.ram", 3, b"\xff" * 4096 * 5)])
    for event in (EndOfRam(), SectionFooter(5), SectionBegin(Item.SECTION_END, 5, "ram"), EndOfRam(), SectionFooter(5)):
        raw += encode_event(event)
    status, report, _ = shown(bytes(raw + bytes(1)))
    assert (status, report["normal"], report["duplicate"]) == (0, 5, 59 + 8)
    found = report["channels"][0]["blocks"]
    assert [block["pages_offset"] for block in found] == [block.header.pages_offset for block in blocks]


def test_a_real_header_of_libvirt(shown: Any) -> None:
    real = lzma.decompress((CAPTURES / "save-file-head-libvirt-9.0.xz").read_bytes())
    begin = read_save_header(real).stream_offset
    status, report, _ = shown(real[:begin] + RAW)
    assert (status, report["container"]["domain"], report["machine"]) == (0, "guest", "pc-test-1.0")
    assert report["channels"][0]["commands"][0]["offset"] == begin + len(encode_event(STREAM[0]))


def test_a_save_file_that_was_never_finished(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.save"
    path.write_bytes(encode_save_header(SaveHeader(XML, 0, is_complete=False)) + RAW[:-500])
    status, out, err = run(path)
    assert status == 1
    assert "libvirt never finished this file" in out
    assert f"error: {path}: main: offset " in err


@pytest.mark.parametrize("left", [10, 60, 100])
def test_a_save_file_that_ends_in_its_header(left: int, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.save"
    path.write_bytes(encode_save_header(SaveHeader(XML, 0))[: 16 + left])
    status, out, err = run(path)
    assert (status, out) == (1, "")
    assert "the file ends inside libvirt's header" in err


def test_lzop_is_named(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.save"
    path.write_bytes(encode_save_header(SaveHeader(XML, 0, SaveFormat.LZOP)) + b"\x89LZO")
    status, _, err = run(path)
    assert status == 2
    assert "is compressed with lzop" in err


def test_a_packed_file_with_damage_is_shown_up_to_there(shown: Any) -> None:
    path = VECTORS / "10.0-plain" / "main.s2d.xz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 3 // 4] ^= 0x55
    status, report, err = shown(bytes(raw))
    assert (status, "packed with xz" in report["notes"][0]) == (1, True)
    assert 0 < report["normal"] < 550
    assert "the xz data cannot be unpacked" in report["channels"][0]["damage"]["message"] in err
    status, report, _ = shown(path.read_bytes()[:-3000])
    assert (status, report["channels"][0]["damage"]["message"]) == (1, "the xz data is cut off")


# -- pipes -------------------------------------------------------------------------------------------------------------


def test_standard_input(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(RAW)
    status, out, _ = run("-", "--json", stdin=RAW)
    piped = json.loads(out)
    whole = json.loads(run(path, "--json")[1])
    assert (status, piped["source"]) == (0, "standard input")
    assert piped["channels"] == whole["channels"]


def test_a_real_pipe_into_a_closed_pipe() -> None:
    """`virtmig inspect - --events | head -1` ends quietly, and memory does not grow with the stream."""
    code = (
        "import re, sys; from virtmig.cli.main import main; status = main(['inspect', '-', '--json']);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    )
    feeder = [sys.executable, "-c", _FEEDER]
    with subprocess.Popen(feeder, stdout=subprocess.PIPE) as source:
        result = subprocess.run([sys.executable, "-c", code], stdin=source.stdout, capture_output=True, timeout=100)
    assert json.loads(result.stdout)["normal"] == 150_000
    assert int(result.stderr.split()[-1]) < 150 << 10  # KiB; the stream has 600 MiB
    first = [sys.executable, "-c", "from virtmig.cli.main import run; run()", "inspect", "-", "--events"]
    with subprocess.Popen(feeder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as source:
        reader = subprocess.Popen(first, stdin=source.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert reader.stdout is not None
        assert reader.stderr is not None
        assert b"StreamHeader" in reader.stdout.readline()
        reader.stdout.close()
        assert source.stdout is not None
        source.stdout.close()
        assert b"Traceback" not in reader.stderr.read()
        assert reader.wait(60) == 1
        reader.stderr.close()


_FEEDER = """
import struct, sys
out = sys.stdout.buffer
name, end = bytes([6]) + b"pc.ram", struct.pack(">QBI", 0x10, 0x7e, 5)
out.write(b"QEVM" + struct.pack(">IBI", 3, 7, 6) + b"pc-1.0" + struct.pack(">BIB3sII", 1, 5, 3, b"ram", 0, 4))
out.write(struct.pack(">Q", 150000 * 4096 | 4) + name + struct.pack(">Q", 150000 * 4096) + end)
out.write(struct.pack(">BIQ", 2, 5, 8) + name + bytes(4096))
for page in range(1, 150000):
    out.write(struct.pack(">Q", page * 4096 | 0x28) + b"x" * 4096)
out.write(end + struct.pack(">BI", 3, 5) + end + bytes(1))
"""


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", range(9, len(RAW) - len(JSON) - 6, 97))
def test_a_stream_cut_anywhere_is_shown_up_to_there(left: int, shown: Any) -> None:
    status, report, err = shown(RAW[:left])
    damage = report["channels"][0]["damage"]
    begins = np.cumsum([0, *(len(encode_event(event)) for event in STREAM)]).tolist()
    assert status == 1
    assert (damage["ends_at"], report["channels"][0]["bytes"]) == (left, left)
    assert max(begin for begin in begins if begin <= left) - 4105 <= damage["offset"] <= left
    assert damage["expected"]
    assert (
        damage["found"] == "the end"
        or bytes.fromhex(re.match(r"[0-9a-f ]+", damage["found"])[0])
        == (RAW[damage["offset"] : min(damage["offset"] + 16, left)])
    )
    assert "error: " in err


COMMAND_AT = len(encode_event(STREAM[0]))


@pytest.mark.parametrize(
    ("at", "value", "offset", "words"),
    [
        (7, 9, 4, "stream version 9"),
        (COMMAND_AT + 2, 99, COMMAND_AT, "an unknown command 0x63"),
        (COMMAND_AT, 0x55, COMMAND_AT, "an unknown item 0x55"),
    ],
)
def test_a_wrong_byte(at: int, value: int, offset: int, words: str, run: Any, tmp_path: Path) -> None:
    raw = bytearray(RAW)
    raw[at] = value
    path = tmp_path / "bad"
    path.write_bytes(raw)
    status, out, err = run(path)
    assert (status, words in err) == (1, True)
    lines = out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("  damaged at offset"))
    assert lines[place].startswith(f"  damaged at offset {offset:#x} ({offset}): ")
    assert lines[place + 1].startswith("    expected  ")
    assert lines[place + 2].startswith(f"    there is  {raw[offset : offset + 16].hex(' ')}")


@pytest.mark.parametrize("packing", ["plain", "save"])
def test_the_offset_of_damage_is_that_of_the_file(packing: str, shown: Any) -> None:
    header = encode_save_header(SaveHeader(XML, 1)) if packing == "save" else b""
    raw = bytearray(next(each for each in ALL if each.name == "7.2-plain").sent("main"))
    footer = bytes(raw).index(b"\x7e\x00\x00\x00\x02\x02")  # of the START section, before the first PART
    raw[footer + 4] ^= 0x40
    status, report, _ = shown(header + bytes(raw))
    damage = report["channels"][0]["damage"]
    assert status == 1
    assert damage["offset"] == len(header) + footer
    assert "footer" in damage["expected"]
    assert damage["found"].startswith("7e 00 00 00 42 02")


def test_a_damaged_package_is_shown_up_to_the_damage(shown: Any) -> None:
    raw = bytearray(next(each for each in ALL if each.name == "7.2-postcopy").sent("main"))
    whole = shown(bytes(raw))[1]["channels"][0]
    tenth = whole["devices"][10]
    raw[tenth["offset"]] = 0x55
    status, report, _ = shown(bytes(raw))
    channel = report["channels"][0]
    assert status == 1
    assert channel["devices"] == whole["devices"][:9]  # the footer of the tenth is not followed by an item
    assert whole["devices"][9]["offset"] <= channel["damage"]["offset"] <= tenth["offset"]
    status, report, _ = shown(bytes(raw[: tenth["offset"] + 3]))
    assert (status, report["channels"][0]["devices"][:9]) == (1, whole["devices"][:9])


def test_a_damaged_multifd_channel(shown: Any) -> None:
    raw = bytearray(next(each for each in ALL if each.name == "10.0-multifd").sent("multifd-1"))
    second = 64 + 1344  # behind the hello and the first SYNC
    raw[second] = 0x99
    status, report, _ = shown(bytes(raw))
    (channel,) = report["channels"]
    assert (status, channel["damage"]["offset"], channel["multifd"]["packets"]) == (1, second, 1)
    assert channel["damage"]["found"].startswith("99 22 33 44")
    assert channel["damage"]["expected"] == "a multifd packet"


def test_a_damaged_channel_of_a_folder_leaves_the_others(run: Any, tmp_path: Path) -> None:
    for path in (VECTORS / "10.0-multifd").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "multifd-0.s2d.xz").write_bytes(b"\xfd7zXZ\x00nonsense")
    (tmp_path / "about.toml").write_text("= broken")
    status, out, err = run(tmp_path, "--json")
    report = json.loads(out)
    assert status == 1
    assert [channel["name"] for channel in report["channels"] if channel["damage"]] == ["multifd-0"]
    assert report["channels"][-1]["multifd"]["packets"] == 56
    assert "about.toml cannot be read" in report["notes"][0]
    assert "multifd-0: offset 0x0" in err


def test_a_description_that_says_otherwise_is_damage(run: Any) -> None:
    text = JSON.replace(b"[]", b'[{"name":"cpu","instance_id":0,"fields":[{"name":"x","size":3}]}]')
    raw = RAW[: -len(JSON) - 4] + len(text).to_bytes(4, "big") + text
    status, out, _ = run("-", stdin=raw)
    assert status == 1
    assert "section 'cpu' (0) has 11 bytes, 3 are described" in out


@pytest.mark.parametrize("left", [1, len(JSON), len(JSON) + 2])
def test_a_file_cut_in_its_description_is_not_whole(left: int, shown: Any) -> None:
    status, report, err = shown(RAW[:-left])
    damage = report["channels"][0]["damage"]
    assert (status, damage["offset"], damage["ends_at"]) == (1, len(RAW) - len(JSON) - 5, len(RAW) - left)
    assert "the stream ends inside the description" in err
    assert len(report["channels"][0]["devices"]) == 1


def test_a_read_ahead_description_cuts_where_footers_deceive(shown: Any) -> None:
    size = len(STREAM[22].data)
    text = JSON.replace(b"[]", b'[{"name":"cpu","instance_id":0,"fields":[{"name":"x","size":%d}]}]' % size)
    status, report, _ = shown(RAW[: -len(JSON) - 4] + len(text).to_bytes(4, "big") + text)
    (device,) = report["channels"][0]["devices"]
    assert (status, device["bytes"], device["fields"][0]["name"]) == (0, size, "x")


# -- what is no recording ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; expected a migration stream"),
        (b"hello, this is a text\n", "it begins with 68 65 6c 6c 6f 2c 20 74 (text: 'hello, this is a text')"),
        (b"\x7fELF\x02\x01\x01" + bytes(9), "it begins with 7f 45 4c 46"),
        (b"GET / HTTP/1.1\r\n\r\n", "(HTTP)"),
        (b"QE", "expected QEVM"),
        (lzma.compress(b"a text in xz"), "(text: 'a text in xz')"),
    ],
)
def test_a_wrong_file(content: bytes, words: str, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "wrong"
    path.write_bytes(content)
    status, out, err = run(path)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: '{path}' ")
    assert words in err


def test_names_and_folders_that_are_wrong(run: Any, tmp_path: Path) -> None:
    assert run(tmp_path / "none")[0] == 2
    status, _, err = run(tmp_path)
    assert (status, "it is empty; expected CHANNEL.s2d.xz" in err) == (2, True)
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no recording: notes.txt; expected" in run(tmp_path)[2]
    assert "unexpected data" in run(tmp_path, "again")[2]
    assert "requires <file> option" in run()[2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(RAW)
    path.chmod(0)
    status, _, err = run(path)
    assert (status, err) == (2, f"error: '{path}' cannot be read: Permission denied\n")


def test_names_from_a_file_cannot_move_the_terminal(run: Any) -> None:
    evil = RAW.replace(b"pc-test-1.0", b"pc\x1b[2J-1.00")
    for options in ([], ["--events"]):
        status, out, err = run("-", *options, stdin=evil)
        assert (status, err) == (0, "")
        assert "\x1b" not in out
        assert "pc\\x1b[2J-1.00" in out
