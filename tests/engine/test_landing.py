"""A guest that lands in an image: a disk that fills up, huge pages, sections in their order, acks; with real QEMUs."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.test_incoming import POSTCOPY, Receiving, fails, receiving, same_memory
from tests.support.emulators import LabQemu, dialect, lab_source
from tests.support.lab import eventually
from tests.support.recorder import Emulator
from virtmig.engine import memory as memory_module
from virtmig.engine import patience
from virtmig.engine.image import Image
from virtmig.engine.interrupted import interrupted
from virtmig.engine.landing import ImageLanding
from virtmig.engine.loading import Loading
from virtmig.engine.memory import NoRoom
from virtmig.engine.switchover_ack import EMPTY_PARTS, SwitchoverAcks
from virtmig.errors import MigrationAborted
from virtmig.progress import Whereabouts
from virtmig.stream.encoder import MainEncoder, encode_event
from virtmig.stream.events import Description, DeviceSection, EndOfStream, RamBlock, SectionFooter
from virtmig.stream.wire import Dialect, Item

PAGE = 4096


class Told:
    """What a destination tells, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, words: str, **facts: str | int) -> None:
        assert words
        self.names.append(name)

    def wait(self, name: str) -> None:
        eventually(lambda: name in self.names, f"'{name}' is told, among {self.names}")


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A tmpfs; the file "fill" in it may be made by `fill`."""
    if os.getuid():
        pytest.skip("needs root: mounts a small tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "fill").open("wb", buffering=0) as file:
        for size in (1 << 20, PAGE):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def start_postcopy(source: LabQemu, destination: Receiving) -> None:
    source.qmp.execute("migrate", uri=str(destination.listener.address))
    source.qmp.wait_status("active")
    source.qmp.execute("migrate-start-postcopy")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "ROOM_S", 0.05)


@pytest.mark.root
def test_postcopy_that_might_not_fit_is_refused_before_it_begins(
    emulator: Emulator, tmp_path: Path, nothing_left: None
) -> None:
    with (
        small_disk(tmp_path, 40),
        lab_source(emulator, capabilities=POSTCOPY) as (source, _),
        receiving(tmp_path / "image") as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        with pytest.raises(NoRoom, match=r"needs room .* MiB, '.*' has 40\.0 MiB") as error:
            destination.result()
        assert error.value.guest is Whereabouts.SOURCE
        assert "postcopy-ram off" in error.value.hint
        fails(source)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_disk_that_fills_up_after_the_switch_harms_nothing(
    emulator: Emulator, tmp_path: Path, nothing_left: None
) -> None:
    """All that is awaited has its room, the manifest too; what comes as zero gives its room back."""
    told = Told()
    slow = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 8 << 20}
    with (
        small_disk(tmp_path, 70),
        lab_source(emulator, capabilities=POSTCOPY, **slow) as (source, _),
        receiving(tmp_path / "image", tell=told) as destination,
    ):
        start_postcopy(source, destination)
        told.wait("postcopy")
        fill(tmp_path)
        destination.result()
        source.qmp.wait_status("completed")
        assert told.names == ["postcopy"]
        same_memory(source, tmp_path / "image")
        assert os.stat(tmp_path / "image" / "ram-0").st_blocks * 512 < 16 << 20


@pytest.mark.root
def test_full_disk_at_the_switch_is_waited_for(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    told = Told()
    with (
        small_disk(tmp_path, 70),
        lab_source(emulator, capabilities=POSTCOPY, **{"max-bandwidth": 2 << 20}) as (source, _),
        receiving(tmp_path / "image", tell=told) as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        eventually(lambda: destination.incoming.loading.pages_normal, "pages")
        fill(tmp_path)
        source.qmp.execute("migrate-start-postcopy")
        told.wait("no-room")
        assert destination.incoming.loading.split is (dialect(emulator) is not Dialect.QEMU_11_1)
        (tmp_path / "fill").unlink()
        destination.result()
        source.qmp.wait_status("completed")
        assert told.names == ["no-room", "room", "postcopy"]
        same_memory(source, tmp_path / "image")


@pytest.mark.root
def test_full_disk_at_the_switch_and_a_stop(emulator: Emulator, tmp_path: Path, nothing_left: None) -> None:
    """A source that can go back runs its guest again; an older one is paused, and its guest is recovered."""
    told = Told()
    with (
        small_disk(tmp_path, 70),
        lab_source(
            emulator, capabilities=POSTCOPY, **{"max-bandwidth": 2 << 20, "max-postcopy-bandwidth": 1 << 16}
        ) as (source, _),
    ):
        with receiving(tmp_path / "image", tell=told) as destination:
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            eventually(lambda: destination.incoming.loading.pages_normal, "pages")
            fill(tmp_path)
            source.qmp.execute("migrate-start-postcopy")
            told.wait("no-room")
            destination.stop.request()
            with pytest.raises(MigrationAborted) as error:
                destination.result()
        if dialect(emulator) is Dialect.QEMU_11_1:
            assert error.value.guest is Whereabouts.SOURCE
            fails(source)
            assert [path.name for path in tmp_path.iterdir()] == ["fill"]
            return
        assert error.value.guest is Whereabouts.SPLIT
        source.qmp.wait_status("postcopy-paused")
        [left] = interrupted(tmp_path / "image")
        assert left.manifest is not None


@pytest.mark.root
def test_full_disk_without_a_promise_keeps_the_connection(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    """A file system without fallocate (NFS 3): each write waits for room, the source never comes again."""
    told = Told()

    def refused(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(memory_module, "_fallocate", refused)
    slow = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 4 << 20}
    with (
        small_disk(tmp_path, 70),
        lab_source(emulator, capabilities=POSTCOPY, **slow) as (source, _),
        receiving(tmp_path / "image", tell=told) as destination,
    ):
        start_postcopy(source, destination)
        told.wait("postcopy")
        fill(tmp_path)
        told.wait("no-room")
        (tmp_path / "fill").unlink()
        received = destination.result()
        source.qmp.wait_status("completed")
        assert told.names == ["postcopy", "no-room", "room"]
        assert (received.recoveries, received.pages_twice) == (0, 0)
        same_memory(source, tmp_path / "image")


@pytest.mark.root
def test_commit_that_finds_no_room_is_tried_again(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    """The source has sent all and could not send it again; stopped, what is here is finished without it."""
    told = Told()
    commit = ImageLanding.commit

    def without_reserve(self: ImageLanding, *words: Any) -> None:
        (self.writer.partial / "reserve").unlink(missing_ok=True)
        if not (tmp_path / "fill").exists() and "no-room" not in told.names:
            fill(tmp_path)
        commit(self, *words)

    monkeypatch.setattr(ImageLanding, "commit", without_reserve)
    with small_disk(tmp_path, 70), lab_source(emulator, capabilities=POSTCOPY) as (source, _):
        source.set_parameters({"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 0})
        with receiving(tmp_path / "image", tell=told) as destination:
            start_postcopy(source, destination)
            told.wait("no-room")
            assert source.qmp.execute("query-migrate")["status"] == "postcopy-active"  # it waits for SHUT
            destination.stop.request()
            with pytest.raises(MigrationAborted) as error:
                destination.result()
            assert error.value.guest is Whereabouts.UNKNOWN
        (tmp_path / "fill").unlink()
        monkeypatch.undo()
        [left] = interrupted(tmp_path / "image")
        assert left.arrived
        landing, manifest, _ = ImageLanding.recover(tmp_path / "image")
        landing.finish(manifest)
        with Image(tmp_path / "image") as image:
            image.verify()
            assert image.manifest.origin["transfer"] == "postcopy"
        # what became of the source is what the command's hint says
        if dialect(emulator) is Dialect.QEMU_7_2:
            assert source.qmp.execute("query-migrate")["status"] == "postcopy-active"
        else:
            fails(source)


# -- switchover-ack ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-7.2", "pc-i440fx-10.0"])
def test_source_that_waits_for_an_ack_gets_it_and_no_other(
    emulator: Emulator, machine: str, asked: bool, tmp_path: Path
) -> None:
    if dialect(emulator) is Dialect.QEMU_7_2 and (asked or machine.endswith("10.0")):
        pytest.skip("7.2 has neither")
    capabilities = ("return-path", *(("switchover-ack",) if asked else ()))
    with (
        lab_source(emulator, capabilities=capabilities, machine=machine) as (source, _),
        receiving(tmp_path / "image") as destination,
    ):
        source.qmp.execute("migrate", uri=str(destination.listener.address))
        destination.result()
        source.qmp.wait_status("completed")


def test_acks_by_machine_type() -> None:
    assert [SwitchoverAcks().due_at_open(f"pc-q35-{release}") for release in ("8.0", "8.1", "11.0.1", "11.1")] == [
        False, True, True, False,
    ]  # fmt: skip
    for name in ("pc-q35-rhel9.6.0", "microvm", None, "pc-i440fx-7.2"):
        acks = SwitchoverAcks()
        assert not acks.due_at_open(name)
        assert not any(acks.due_after_part(number) for number in range(1000))  # it sends pages
        waits = [acks.due_after_part(1000) for _ in range(3 * EMPTY_PARTS)]
        assert waits.count(True) == 1
        assert waits.index(True) >= EMPTY_PARTS
    xbzrle = SwitchoverAcks()
    xbzrle.due_at_open("pc-i440fx-7.2")
    xbzrle.never()
    assert not any(xbzrle.due_after_part(0) for _ in range(1000))


# -- huge pages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """40 pages of 2 MiB more than there were, or a skip."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    if os.getuid() or not setting.exists():
        pytest.skip("needs root and a kernel with hugetlb")
    before = int(setting.read_text())
    setting.write_text(str(before + 40))
    try:
        if int(setting.read_text()) < before + 40:
            pytest.skip("the kernel has no 40 huge pages left")
        yield
    finally:
        setting.write_text(str(before))


@pytest.mark.root
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("postcopy", [False, True], ids=["multifd", "postcopy"])
def test_guest_in_huge_pages(emulator: Emulator, postcopy: bool, tmp_path: Path) -> None:
    backend = "memory-backend-memfd,id=pc.ram,size=64M,hugetlb=on,hugetlbsize=2M"
    with (
        emulator.folder() as folder,
        LabQemu(
            emulator, folder, "-object", backend, machine="pc,memory-backend=pc.ram", memory_kib=64 << 10
        ) as source,
    ):
        source.wait_heartbeat(2)
        if dialect(emulator) is Dialect.QEMU_7_2:
            source.qmp.execute("stop")  # TCG of 7.2 loses dirty pages at this size (tests/support/recorder.py)
        source.set_capabilities(["events", *(POSTCOPY if postcopy else ("return-path", "multifd"))])
        source.set_parameters({"max-bandwidth": 4 << 20, "downtime-limit": 1} if postcopy else {"multifd-channels": 2})
        with receiving(tmp_path / "image", multifd_channels=0 if postcopy else 2) as destination:
            source.qmp.execute("migrate", uri=str(destination.listener.address))
            if postcopy:
                source.qmp.wait_status("active")
                source.qmp.execute("migrate-start-postcopy")
            received = destination.result()
            source.qmp.wait_status("completed")
            assert received.postcopy is postcopy
        same_memory(source, tmp_path / "image")
        with Image(tmp_path / "image") as image:
            sizes = {block.name: block.page_size for block in image.manifest.blocks}
        assert sizes["pc.ram"] == (2 << 20 if postcopy else PAGE)  # only a source with postcopy-ram tells it
        assert sizes["pc.bios"] == PAGE


# -- without a QEMU ----------------------------------------------------------------------------------------------------


def test_sections_before_ram_keep_their_place(tmp_path: Path, nothing_left: None) -> None:
    """virtio-mem's early_setup: a whole section before RAM's START, or before its END."""
    encoder = MainEncoder(ram_section_id=2)
    footer = [bytes(encode_event(SectionFooter(number))) for number in (7, 8, 9)]

    def section(number: int, name: str) -> bytes:
        event = DeviceSection(Item.SECTION_FULL, number, name, 0, 1, b"state of " + name.encode(), 0)
        return bytes(encode_event(event)) + footer[number - 7]

    stream = [
        bytes(encoder.begin("pc-q35-10.0")), section(7, "virtio-mem-early"),
        encoder.ram_begin([RamBlock("pc.ram", 16 * PAGE, None, None)]), section(8, "setup"),
        encoder.ram_end(), encoder.ram_section_end(), section(9, "timer"),
        bytes(encode_event(EndOfStream())), bytes(encode_event(Description(b"{}", 2))),
    ]  # fmt: skip
    with (
        receiving(tmp_path / "image") as destination,
        socket.create_connection(("127.0.0.1", destination.listener.address.port)) as source,
    ):
        source.sendall(b"".join(bytes(each) for each in stream))
        source.shutdown(socket.SHUT_WR)
        destination.result()
    with Image(tmp_path / "image") as image:
        manifest = image.manifest
        assert [each.idstr for each in manifest.sections] == ["virtio-mem-early", "setup", "timer"]
        assert (manifest.sections_before_ram, manifest.sections_before_switch) == (1, 1)
        assert image.device_sections()[0].data == b"state of virtio-mem-early"


class Slow(ImageLanding):
    """A landing whose next `place` does what it is told first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.before: list[Any] = []

    def place(self, block: str, pages: Any, data: memoryview) -> None:
        if self.before:
            self.before.pop(0)()
        super().place(block, pages, data)


def loading_into(landing: Slow, no_room: Any) -> Loading:
    loading = Loading(landing, lambda _: None, None, lambda: None, no_room)
    lengths: Mapping[str, int] = {"ram": 16 * PAGE}
    landing.begin(lengths, {})
    loading.restore(loading.header, dict(lengths), [])
    return loading


def test_page_that_finds_no_room_is_missing_until_it_is_placed(tmp_path: Path, nothing_left: None) -> None:
    """A source that comes again while the disk is full must be told that it lacks."""
    missing: list[int] = []
    landing = Slow(tmp_path / "image")
    loading = loading_into(landing, lambda error: missing.append(loading.missing_pages()))

    def full() -> None:
        raise NoRoom("full")

    landing.before = [full, full]
    loading.place("ram", np.array([3], np.uint64), memoryview(b"x" * PAGE))
    assert missing == [16, 16]
    assert loading.missing_pages() == 15
    assert loading.pages_twice == 0
    landing.abandon()


def test_commit_waits_for_pages_that_another_channel_places(tmp_path: Path, nothing_left: None) -> None:
    landing = Slow(tmp_path / "image")
    loading = loading_into(landing, lambda error: None)
    loading.zero("ram", np.arange(1, 16, dtype=np.uint64))
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(20)

    landing.before = [hold]
    page = (np.array([0], np.uint64), memoryview(b"x" * PAGE))
    channel = threading.Thread(target=loading.place, args=("ram", *page), name="preempt")
    channel.start()
    assert inside.wait(20)
    assert loading.missing_pages() == 0
    settled = threading.Event()
    waiter = threading.Thread(target=lambda: (loading.settle(20), settled.set()), name="main")
    waiter.start()
    assert not settled.wait(0.1)
    go_on.set()
    for thread in (channel, waiter):
        thread.join(20)
    assert settled.is_set()
    assert landing.memory.block("ram").bytes[0] == ord("x")
    landing.abandon()
