"""A guest at rest: whole or not there, durable, and damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from virtmig.engine.image import CHUNK_BYTES, MANIFEST, Image, ImageWriter, new_manifest
from virtmig.errors import ImageError
from virtmig.stream.events import DeviceSection, StreamHeader
from virtmig.stream.wire import Item

PAGE = 4096
DEVICES = [DeviceSection(Item.SECTION_FULL, 4, "timer", 0, 2, b"abc", 0),
           DeviceSection(Item.SECTION_FULL, 5, "cpu", 1, 12, b"defg", 3)]  # fmt: skip


def write(folder: Path, **options: Any) -> Path:
    writer = ImageWriter(folder)
    memory = writer.create_memory({"pc.ram": 16 << 20, "/rom@x/y": PAGE})
    memory.place("pc.ram", np.array([3, 2000], np.uint64), memoryview(np.random.default_rng(1).bytes(2 * PAGE)))
    writer.save_devices(DEVICES)
    writer.commit(new_manifest(StreamHeader(3, "pc-i440fx-7.2"), DEVICES, description=b"{}", **options), b"{}")
    return folder


def test_there_and_back(tmp_path: Path, nothing_left: None) -> None:
    with Image(write(tmp_path / "a")) as image:
        image.verify()
        assert image.manifest.machine == "pc-i440fx-7.2"
        assert image.device_sections() == DEVICES
        assert image.description == b"{}"
        assert image.nonzero("pc.ram").tolist() == [3, 2000]
        assert image.nonzero("/rom@x/y").tolist() == []
    assert os.stat(tmp_path / "a" / "ram-0").st_blocks * 512 < 4 << 20  # sparse


def test_nothing_is_there_before_the_commit_and_nothing_after_abandon(tmp_path: Path, nothing_left: None) -> None:
    writer = ImageWriter(tmp_path / "a")
    writer.create_memory({"pc.ram": PAGE})
    writer.save_devices(DEVICES)
    assert not (tmp_path / "a").exists()
    writer.abandon()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_two_into_one_folder(tmp_path: Path, nothing_left: None) -> None:
    """The first to be whole gets the name, the other one fails; none is mixed."""
    late = ImageWriter(tmp_path / "a")
    late.create_memory({"pc.ram": PAGE})
    late.save_devices(DEVICES)
    write(tmp_path / "a")
    with pytest.raises(ImageError, match="cannot write"):
        late.commit(new_manifest(StreamHeader(3, "pc"), DEVICES))
    late.abandon()
    with Image(tmp_path / "a") as image:
        image.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_wrong_byte_is_found_and_placed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with (folder / "ram-0").open("r+b") as file:
        file.seek(2000 * PAGE + 5)
        byte = file.read(1)
        file.seek(2000 * PAGE + 5)
        file.write(bytes([byte[0] ^ 1]))
    piece = 2000 * PAGE // CHUNK_BYTES * CHUNK_BYTES
    with Image(folder) as image, pytest.raises(ImageError, match=f"damaged at {piece:#x}: RAM block 'pc.ram'"):
        image.verify()


def _cut(folder: Path) -> None:
    os.truncate(folder / "ram-0", PAGE)


def _devices(folder: Path) -> None:
    (folder / "devices").write_bytes(b"abcdefG")


def _manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _devices,
        lambda folder: (folder / "ram-1").unlink(),
        lambda folder: (folder / "description.json").unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / MANIFEST).unlink(),
        _manifest(lambda m: m.update(version=2)),
        _manifest(lambda m: m.update(format="other")),
        _manifest(lambda m: m.update(blocks=[])),
        _manifest(lambda m: m["blocks"].append(m["blocks"][0])),
        _manifest(lambda m: m["blocks"][0].update(file="../../etc/passwd")),
        _manifest(lambda m: m["blocks"][0].update(file="/etc/passwd")),
        _manifest(lambda m: m["blocks"][0].update(length=-4096)),
        _manifest(lambda m: m["blocks"][0].update(length=1 << 60)),
        _manifest(lambda m: m["blocks"][0].update(length=100)),
        _manifest(lambda m: m["blocks"][0].update(length="much")),
        _manifest(lambda m: m["sections"][0].update(start=-1)),
        _manifest(lambda m: m["sections"][1].update(length=1 << 40)),
        _manifest(lambda m: m["sections"][0].update(kind=99)),
        _manifest(lambda m: m["sections"][0].update(section_id=1 << 32)),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    damage: Callable[[Path], None], tmp_path: Path, nothing_left: None
) -> None:
    folder = write(tmp_path / "a")
    damage(folder)
    with pytest.raises(ImageError) as error:
        Image(folder)
    assert str(folder) in error.value.message


@pytest.mark.parametrize("name", ["a", "a/b/c"])
def test_places_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ImageError):
        ImageWriter(tmp_path / name)
