"""A manifest from anywhere: it can be used as it is, or it is an ImageError that names the field."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.engine.image import MANIFEST, Image, ImageWriter, new_manifest
from virtmig.engine.lazy import PageReader
from virtmig.engine.manifest import MOST_SECTIONS, check_manifest
from virtmig.errors import ImageError
from virtmig.stream.encoder import MainEncoder, encode_event
from virtmig.stream.events import DeviceSection, RamBlock, StreamHeader
from virtmig.stream.wire import Item

PAGE = 4096
SECTIONS = [DeviceSection(Item.SECTION_FULL, 4, "timer", 0, 2, b"abc", 0),
            DeviceSection(Item.SECTION_FULL, 5, "cpu", 1, 12, b"defg", 3)]  # fmt: skip
HEADER = StreamHeader(3, "pc-i440fx-7.2", (("configuration/uuid", 1, bytes(16)),))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="m") as made:
        writer = ImageWriter(Path(made) / "image")
        memory = writer.create_memory({"pc.ram": 64 * PAGE, "huge": 2 << 20}, {"huge": 2 << 20})
        memory.place("pc.ram", np.array([3], np.uint64), memoryview(bytes(range(256)) * 16))
        writer.save_devices(SECTIONS)
        writer.commit(
            new_manifest(HEADER, SECTIONS, description=b"{}", uuid="00" * 16, sections_before_ram=1,
                         origin={"transfer": "precopy"}), b"{}",
        )  # fmt: skip
        (Path(made) / "image" / "whole.json").write_bytes((Path(made) / "image" / MANIFEST).read_bytes())
        yield Path(made) / "image"


def use(folder: Path) -> None:
    """Everything that a sender does with a manifest before a byte goes out."""
    with Image(folder) as image:
        manifest = image.manifest
        image.verify()
        assert PageReader(image).units
        encoder = MainEncoder(ram_section_id=manifest.ram_section_id, footers=manifest.footers)
        bytes(encoder.begin(manifest.machine, manifest.subsections))
        encoder.ram_begin([RamBlock(each.name, each.length, None, None) for each in manifest.blocks])
        for block in manifest.blocks:
            image.nonzero(block.name)
            assert block.page_size.to_bytes(8, "big")
        for section in image.device_sections():
            bytes(encode_event(section))
        assert len(bytes.fromhex(manifest.uuid)) in (0, 16)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "whole.json").read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_unchanged_it_is_read(folder: Path) -> None:
    changed(folder, lambda m: None)
    use(folder)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *way, last, value = path

    def change(manifest: Any) -> None:
        for key in way:
            manifest = manifest[key]
        manifest[last] = value

    return change


HOSTILE = [
    ("blocks[0].file", _set("blocks", 0, "file", "..")),
    ("blocks[0].file", _set("blocks", 0, "file", "")),
    ("blocks[0].file", _set("blocks", 0, "file", "a\0b")),
    ("blocks[0].file", _set("blocks", 0, "file", "a/b")),
    ("blocks[0].file", _set("blocks", 0, "file", "x" * 5000)),
    ("blocks[1].file", _set("blocks", 1, "file", "ram-0")),
    ("blocks[0].name", _set("blocks", 0, "name", "é")),
    ("blocks[0].name", _set("blocks", 0, "name", "")),
    ("blocks[0].name", _set("blocks", 0, "name", "x" * 256)),
    ("blocks[1].name", _set("blocks", 1, "name", "pc.ram")),
    *(("blocks[0].page_size", _set("blocks", 0, "page_size", size)) for size in (0, 3, -1, 1 << 21, 1 << 62, 1 << 70)),
    ("blocks[0].length", _set("blocks", 0, "length", 1 << 64)),
    ("blocks[0].crc32", _set("blocks", 0, "crc32", {"-5": 1})),
    ("blocks[0].crc32", _set("blocks", 0, "crc32", {"1": 1})),
    ("blocks[0].crc32", _set("blocks", 0, "crc32", {"0": 1 << 32})),
    ("crc32", _set("blocks", 0, "crc32", {"x": 3})),
    ("uuid", _set("uuid", "hello")),
    ("uuid", _set("uuid", "00" * 15)),
    ("ram_section_id", _set("ram_section_id", -1)),
    ("ram_section_id", _set("ram_section_id", 1 << 40)),
    ("machine", _set("machine", "m" * 100_000)),
    ("machine", _set("machine", "é")),
    ("machine", _set("machine", "")),
    ("created", _set("created", 1e300)),
    ("devices_bytes", _set("devices_bytes", 1 << 50)),
    ("description_bytes", _set("description_bytes", -1)),
    ("devices_crc32", _set("devices_crc32", -1)),
    ("sections", _set("sections", [{"kind": 4, "section_id": 1, "idstr": "x", "instance_id": 0, "version_id": 1,
                                    "start": 0, "length": 0}] * (MOST_SECTIONS + 1))),
    ("sections[0].idstr", _set("sections", 0, "idstr", "x" * 300)),
    ("sections[0].idstr", _set("sections", 0, "idstr", "é\ud7ff")),
    ("sections_before_ram", _set("sections_before_ram", 3)),
    ("sections_before_switch", _set("sections_before_switch", 2)),
    ("subsections[0]", _set("subsections", [["configuration/x", -1, ""]])),
    ("subsections[0]", _set("subsections", [["c" * 300, 1, "AAAA"]])),
    ("subsections", _set("subsections", [["c", 1, ""]] * 17)),
    ("blocks", _set("blocks", [{"name": str(n), "file": str(n), "length": PAGE} for n in range(4097)])),
    ("origin", _set("origin", {str(n): n for n in range(1000)})),
    ("version", _set("version", 1 << 200)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "change"), HOSTILE, ids=[f"{n} {field}" for n, (field, _) in enumerate(HOSTILE)])
def test_hostile_value_is_named(field: str, change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    changed(folder, change)
    with pytest.raises(ImageError) as error:
        use(folder)
    assert field in error.value.message
    assert len(error.value.message) < 1000
    assert error.value.message.isprintable()


@pytest.mark.parametrize("text", ["", "[" * 200_000, '{"x":' + "[" * 200_000, "null", '{"format": "\\ud800"}'])
def test_what_is_no_manifest_at_all(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ImageError, match=r"manifest\.json' is"):
        use(folder)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    manifest = new_manifest(StreamHeader(3, "m" * 256), SECTIONS)
    with pytest.raises(ImageError, match="machine"):
        check_manifest(manifest, tmp_path / MANIFEST)


VALUES = st.one_of(
    st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20),
    st.sampled_from([-(1 << 70), -1, 0, 1, 3, PAGE, 1 << 21, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 64, 1 << 200]),
    st.sampled_from(["", ".", "..", "ram-0", "devices", "a\0b", "é", "\ud800", "x" * 300, "0" * 32, "AAAA"]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
)  # fmt: skip


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*way, key)
        yield from _places(each, (*way, key))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_ends_in_an_image_error_or_in_an_image(folder: Path, data: st.DataObject) -> None:
    manifest = json.loads((folder / "whole.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        way = data.draw(st.sampled_from(list(_places(manifest))))
        where: Any = manifest
        for key in way[:-1]:
            where = where[key]
        match data.draw(st.sampled_from(["set", "set", "set", "remove", "double"])):
            case "set":
                where[way[-1]] = data.draw(VALUES)
            case "remove":
                del where[way[-1]]
            case _ if isinstance(where, list):
                where.append(copy.deepcopy(where[way[-1]]))
            case _:
                where[f"{way[-1]}x"] = where[way[-1]]
        if not manifest:
            return
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        use(folder)
    except ImageError as error:
        assert str(folder) in error.message
