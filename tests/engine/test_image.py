"""A guest at rest: whole or not there, durable, and damage is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from virtmig.engine import image as module
from virtmig.engine.image import CHUNK_BYTES, MANIFEST, Image, ImageWriter, new_manifest
from virtmig.errors import GuestMemoryError, ImageError
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


def test_place_that_is_taken_meanwhile(tmp_path: Path) -> None:
    """Somebody else made the folder: it keeps the name, and what was received is not mixed into it."""
    late = ImageWriter(tmp_path / "a")
    late.create_memory({"pc.ram": PAGE})
    late.save_devices(DEVICES)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with pytest.raises(ImageError, match="cannot write"):
        late.commit(new_manifest(StreamHeader(3, "pc"), DEVICES))
    late.abandon()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_error_of_the_disk_that_the_writer_behind_hears_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    """The kernel tells an error of writing back once for a descriptor: commit's own fsync would succeed."""
    heard = threading.Event()

    def broken_disk(_: int) -> None:
        heard.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", broken_disk)
    monkeypatch.setattr(module, "WRITE_BACK_S", 0.01)
    writer = ImageWriter(tmp_path / "a")
    writer.create_memory({"pc.ram": PAGE})
    assert heard.wait(10)
    with pytest.raises(GuestMemoryError, match="Input/output error"):
        writer.commit(new_manifest(StreamHeader(3, "pc"), DEVICES))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    with Image(write(tmp_path / "a")) as image:
        os.truncate(tmp_path / "a" / "ram-0", 2000 * PAGE + 5)  # its last data is cut, a hole would read as zero
        with pytest.raises(ImageError, match=r"ram-0' is damaged: RAM block 'pc\.ram': it ends at 0x7d0005"):
            image.verify()


@pytest.mark.root
def test_full_tmpfs_is_read_without_filling_its_holes(tmp_path: Path, nothing_left: None) -> None:
    """Through the mapping a hole of a full tmpfs is a SIGBUS, and of one that is not full it takes memory."""
    if os.getuid():
        pytest.skip("needs root: mounts a small tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        folder = write(tmp_path / "a")
        with (tmp_path / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        held = os.stat(folder / "ram-0").st_blocks
        with Image(folder) as image:
            image.verify()
            assert image.nonzero("pc.ram").tolist() == [3, 2000]
        assert os.stat(folder / "ram-0").st_blocks == held
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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


def _fifo(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def _device(folder: Path) -> None:
    (folder / "ram-0").unlink()
    (folder / "ram-0").symlink_to("/dev/zero")


def _folder(folder: Path) -> None:
    (folder / "ram-0").unlink()
    (folder / "ram-0").mkdir()


@pytest.mark.parametrize(
    "damage", [*map(_fifo, ("ram-0", "devices", "description.json", MANIFEST)), _device, _folder],
    ids=["ram", "devices", "description", "manifest", "device", "folder"],
)  # fmt: skip
def test_what_is_no_plain_file_is_refused_and_not_waited_for(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    damage(folder)
    with pytest.raises(ImageError, match="is no plain file"):
        Image(folder)


def _link(place: Path) -> None:
    place.symlink_to(place.parent / "nowhere")


def _full_folder(place: Path) -> None:
    place.mkdir()
    (place / "file").touch()


@pytest.mark.parametrize(
    ("name", "there", "told"),
    [
        ("a", _full_folder, "exists already: a folder that is not empty"),
        ("a", Path.mkdir, "exists already: an empty folder"),
        ("a", Path.touch, "exists already: a file"),
        ("a", _link, "exists already: a symbolic link to .*nowhere', which is not there"),
        ("b/c", None, "is no folder"),
        ("b/..", None, "names no folder that could be made"),
        ("n" * 240, None, "is too long"),
        (".a.12345678.incoming", None, "how an unfinished image is called"),
    ],
)
def test_places_that_cannot_be(name: str, there: Callable[[Path], None] | None, told: str, tmp_path: Path) -> None:
    if there is not None:
        there(tmp_path / name)
    before = list(tmp_path.iterdir())
    with pytest.raises(ImageError, match=told):
        ImageWriter(tmp_path / name)
    assert list(tmp_path.iterdir()) == before
