"""Unfinished images: one process at a time works on one, what is left over is found, and the right one is meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from virtmig.engine.image import Image, ImageWriter, new_manifest
from virtmig.engine.interrupted import ARRIVED, LOCK, PARTIAL, interrupted, words
from virtmig.engine.landing import ImageLanding
from virtmig.errors import ImageError
from virtmig.stream.events import DeviceSection, StreamHeader
from virtmig.stream.wire import Item

PAGE = 4096
DEVICES = [DeviceSection(Item.SECTION_FULL, 4, "timer", 0, 2, b"abc", 0)]
HEADER = StreamHeader(3, "pc-i440fx-7.2")
RAM = 8 << 20


def interrupt(folder: Path, pages: tuple[int, ...] = (3, 2000)) -> Path:
    """A postcopy into `folder` that is interrupted: what is left."""
    writer = ImageWriter(folder)
    memory = writer.create_memory({"pc.ram": RAM})
    memory.place("pc.ram", np.array(pages, np.uint64), memoryview(np.random.default_rng(1).bytes(len(pages) * PAGE)))
    writer.save_devices(DEVICES, new_manifest(HEADER, DEVICES, uuid="01" * 16, ram_section_id=2))
    writer.keep()
    return writer.partial


def test_what_is_received_into_is_not_touched_by_another_process(tmp_path: Path) -> None:
    """Neither a second receive nor a recovery; when the process has ended, however it did, it is free."""
    code = (
        "import sys; from pathlib import Path; from virtmig.engine.image import ImageWriter, new_manifest\n"
        "from virtmig.stream.events import StreamHeader\n"
        "writer = ImageWriter(Path(sys.argv[1])); writer.create_memory({'pc.ram': 4096})\n"
        "writer.save_devices([], new_manifest(StreamHeader(3, 'pc'), []))\n"
        "print(writer.partial, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        partial = process.stdout.readline().strip()
        told = rf"process {process.pid} on \S+ receives into '{partial}' since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        for begin in (ImageWriter, ImageWriter.reopen, lambda _: ImageWriter.reopen(Path(partial))):
            with pytest.raises(ImageError, match=told):
                begin(tmp_path / "a")
        found = interrupted(tmp_path / "a")
        assert [each.holder is not None and each.holder.pid for each in found] == [process.pid]
    finally:
        process.kill()
        process.communicate()
    writer, manifest, _ = ImageWriter.reopen(tmp_path / "a")
    with pytest.raises(ImageError, match=f"process {os.getpid()} on"):
        ImageWriter.reopen(tmp_path / "a")
    assert manifest.machine == "pc"
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_two_that_are_left_are_listed_and_chosen_by_their_folder(tmp_path: Path, nothing_left: None) -> None:
    first, second = interrupt(tmp_path / "a"), interrupt(tmp_path / "a", (7,))
    interrupt(tmp_path / "a.b")  # of another place
    with pytest.raises(ImageError) as error:
        ImageWriter.reopen(tmp_path / "a")
    told = f"{error.value.message}\n{error.value.hint}"
    for each in (first, second):
        assert each.name.split(".")[-2] in error.value.message
        assert f"--into '{each}'" in told
    assert "2 interrupted postcopies" in told
    assert "pc-i440fx-7.2, 8 MiB of RAM" in told
    writer, _, _ = ImageWriter.reopen(second)
    assert writer.folder == tmp_path / "a"
    writer.commit(new_manifest(HEADER, DEVICES))
    with Image(tmp_path / "a") as image:
        assert image.nonzero("pc.ram").tolist() == [7]
    with pytest.raises(ImageError, match="exists already"):
        ImageWriter.reopen(first)


def test_leftover_of_a_precopy_cannot_be_gone_on_with(tmp_path: Path, nothing_left: None) -> None:
    writer = ImageWriter(tmp_path / "a")
    writer.create_memory({"pc.ram": PAGE})
    writer.keep()
    with pytest.raises(ImageError, match="no interrupted postcopies"):
        ImageWriter.reopen(tmp_path / "a")
    assert [each.manifest for each in interrupted(tmp_path / "a")] == [None]
    assert "nothing that can be gone on with" in words(interrupted(tmp_path / "a")[0])
    again = ImageWriter(tmp_path / "a")  # nor is it in the way
    again.abandon()


def test_damage_of_what_is_left_is_said(tmp_path: Path, nothing_left: None) -> None:
    left = interrupt(tmp_path / "a")
    (left / PARTIAL).write_text("{")
    with pytest.raises(ImageError, match=r"incoming\.json' is damaged"):
        ImageWriter.reopen(tmp_path / "a")
    left = interrupt(tmp_path / "b")
    (left / "devices").write_bytes(b"abX")
    with pytest.raises(ImageError, match="devices' is damaged"):
        ImageWriter.reopen(tmp_path / "b")


def test_recovered_image_stays_sparse(tmp_path: Path, nothing_left: None) -> None:
    """Every page comes again: those that are zero take no room, also where something was."""
    interrupt(tmp_path / "a", (3, 4, 5, 2000))
    landing, manifest, sections = ImageLanding.recover(tmp_path / "a")
    assert landing.memory.touched("pc.ram").nonzero()[0].tolist() == [3, 4, 5, 2000]
    landing.place("pc.ram", np.array([3], np.uint64), memoryview(b"x" * PAGE))
    landing.zero("pc.ram", np.array([*range(3), *range(4, RAM // PAGE)], np.uint64))
    landing.commit(HEADER, sections, b"", {"ram_section_id": manifest.ram_section_id, "uuid": manifest.uuid})
    with Image(tmp_path / "a") as image:
        image.verify()
        assert image.nonzero("pc.ram").tolist() == [3]
        assert image.manifest.ram_section_id == 2
        assert image.manifest.uuid == "01" * 16
    assert os.stat(tmp_path / "a" / "ram-0").st_blocks * 512 == PAGE


def test_what_was_whole_needs_no_source(tmp_path: Path, nothing_left: None) -> None:
    """Killed between the last page and the name: what is there is finished without anybody."""
    left = interrupt(tmp_path / "a")
    (left / PARTIAL).rename(left / ARRIVED)
    (left / "manifest.json").write_text("{")  # the process was killed while it wrote
    landing, manifest, _ = ImageLanding.recover(tmp_path / "a")
    assert landing.writer.arrived
    landing.finish(manifest)
    with Image(tmp_path / "a") as image:
        image.verify()
        assert image.device_sections() == DEVICES
        assert image.nonzero("pc.ram").tolist() == [3, 2000]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["devices", "manifest.json", "ram-0"]
    assert not any(path.name == LOCK for path in tmp_path.rglob("*"))
