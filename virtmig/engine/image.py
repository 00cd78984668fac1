"""A guest at rest in a folder: a checkpoint that can be restored, lazily too, and that says when it is damaged.

    FOLDER/manifest.json     machine, RAM blocks, what each file must hold
           ram-0, ram-1 ...  one sparse file a RAM block, the page at its own offset
           devices           the payloads of the device sections, one behind the other in the order they came
           description.json  QEMU's description of the device sections; absent after a postcopy

It is made beside its place, as .NAME.*.incoming, and gets its name when everything is on the disk: a folder of that
name is a whole image or was never one of ours. The source learns of success only afterwards. In a postcopy what is
being received is the guest: it stays where it is after a failure, and `ImageWriter.reopen` goes on with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from virtmig.engine.memory import LARGEST_RAM_BYTES, GuestMemory, holes_and_data, nonzero_pages
from virtmig.errors import ImageError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.stream.events import DeviceSection, StreamHeader
from virtmig.stream.wire import Item

FORMAT = "virtmig-image"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DEVICES = "devices"
PARTIAL = "incoming.json"  # a manifest without sums, while a postcopy is received
DESCRIPTION = "description.json"
#: RAM is summed in pieces of this size, so that damage can be placed, and pieces that are all zero are left out
CHUNK_BYTES = 4 << 20
_MOST_SUMMING = 8
#: what was received goes to the disk while more comes, so that little is left when the source's guest stands still
WRITE_BACK_S = 0.5


class SectionEntry(msgspec.Struct, frozen=True):
    """One device section in the file `devices`: its payload is `length` bytes from `start`."""

    kind: int
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    start: int
    length: int


class BlockFile(msgspec.Struct, frozen=True):
    """One RAM block. `crc32` maps the number of a 4 MiB piece to its sum; absent pieces are zero."""

    name: str
    file: str
    length: int
    page_size: int = PAGE_BYTES
    crc32: dict[int, int] = {}


class Manifest(msgspec.Struct, frozen=True):
    """What the image holds. `subsections` are those of the stream's configuration, (name, version, payload)."""

    format: str
    version: int
    machine: str | None
    uuid: str
    created: float
    blocks: tuple[BlockFile, ...]
    devices_bytes: int
    devices_crc32: int
    description_bytes: int
    description_crc32: int
    sections: tuple[SectionEntry, ...] = ()
    footers: bool = True
    ram_section_id: int = 1
    subsections: tuple[tuple[str, int, bytes], ...] = ()
    #: how it came: precopy or postcopy, channels; for people
    origin: dict[str, str | int] = {}

    @property
    def ram_bytes(self) -> int:
        return sum(block.length for block in self.blocks)


class ImageWriter:
    """An image that is being received. `commit` makes it one; `abandon` leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._prepare()
        if self.folder.exists():
            raise ImageError(f"'{folder}' exists already", hint="name a folder that does not exist")
        if not self.folder.parent.is_dir():
            raise ImageError(f"'{self.folder.parent}' is no folder", hint="create it, or name another place")
        try:
            self.partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".incoming",
                                                 dir=self.folder.parent))  # fmt: skip
        except OSError as error:
            raise ImageError(f"cannot write in '{self.folder.parent}': {error.strerror}") from None

    def _prepare(self) -> None:
        self.memory: GuestMemory | None = None
        self._page_sizes: dict[str, int] = {}
        self._settled = threading.Event()
        self._writer: threading.Thread | None = None

    @classmethod
    def reopen(cls, folder: Path) -> tuple[ImageWriter, Manifest, list[DeviceSection]]:
        """What a postcopy into `folder` left behind when its process ended. Raises ImageError when there is nothing."""
        mine = re.compile(rf"\.{re.escape(folder.name)}\.[^.]+\.incoming")
        beside = folder.absolute().parent
        left = (
            sorted(each / PARTIAL for each in beside.iterdir() if mine.fullmatch(each.name)) if beside.is_dir() else []
        )
        left = [each for each in left if each.exists()]
        if len(left) != 1:
            raise ImageError(
                f"{len(left) or 'no'} interrupted postcopies into '{folder}'"
                + (f": {left[0].parent} ..." if left else ""),
                hint="the folder that was given to `virtmig receive` when it was interrupted",
            )
        writer = cls.__new__(cls)
        writer._prepare()
        writer.folder, writer.partial = folder.absolute(), left[0].parent
        manifest = _decode(left[0])
        devices = writer.partial / DEVICES
        data = devices.read_bytes() if devices.exists() else b""
        if zlib.crc32(data) != manifest.devices_crc32:
            raise ImageError(f"'{devices}' is damaged")
        writer._page_sizes = {block.name: block.page_size for block in manifest.blocks}
        writer.memory = _map(writer.partial, manifest, writable=True)
        for block in manifest.blocks:
            writer.memory.touched(block.name)[:] = True  # what is there is unknown: zero pages are written
        return writer, manifest, _sections(manifest, data)

    def create_memory(self, blocks: Mapping[str, int], page_sizes: Mapping[str, int] | None = None) -> GuestMemory:
        """Sparse files for the blocks, mapped. Raises ImageError when the disk cannot hold their length."""
        if sum(blocks.values()) > LARGEST_RAM_BYTES:
            raise ImageError(f"a guest of {sum(blocks.values())} bytes of RAM")
        files: dict[str, tuple[int, int]] = {}
        try:
            for number, (name, length) in enumerate(blocks.items()):
                fd = os.open(self.partial / f"ram-{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                files[name] = (fd, length)
                os.ftruncate(fd, length)
        except OSError as error:
            for fd, _ in files.values():
                os.close(fd)
            raise ImageError(f"cannot write in '{self.partial}': {error.strerror}") from None
        self._page_sizes = dict(page_sizes or {})
        self.memory = GuestMemory(files)
        self._write_back([fd for fd, _ in files.values()])
        return self.memory

    def _write_back(self, descriptors: Sequence[int]) -> None:
        def work() -> None:
            while not self._settled.wait(WRITE_BACK_S):
                for fd in descriptors:
                    with contextlib.suppress(OSError):  # commit's fsync says it
                        os.fdatasync(fd)

        self._writer = threading.Thread(target=work, name="write back", daemon=True)
        self._writer.start()

    def _settle(self) -> None:
        self._settled.set()
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def save_devices(self, sections: Sequence[DeviceSection], partial: Manifest | None = None) -> None:
        """The device state, on the disk when this returns; with `partial` also what `reopen` needs."""
        self._write(DEVICES, b"".join(section.data for section in sections))
        if partial is not None and self.memory is not None:
            blocks = tuple(
                BlockFile(name, f"ram-{number}", block.length, self._page_sizes.get(name, PAGE_BYTES))
                for number, (name, block) in enumerate(self.memory.blocks.items())
            )
            self._write(PARTIAL, msgspec.json.encode(msgspec.structs.replace(partial, blocks=blocks)))
            _sync_folder(self.partial)
            _sync_folder(self.partial.parent)

    def commit(self, manifest: Manifest, description: bytes = b"") -> Manifest:
        """Everything durable, then the name. `manifest` comes without its blocks; the finished one is returned."""
        memory = self.memory
        if memory is None:
            raise ImageError("an image without RAM")
        self._settle()
        if description:
            self._write(DESCRIPTION, description)
        memory.flush()
        blocks = tuple(
            BlockFile(name, f"ram-{number}", block.length, self._page_sizes.get(name, PAGE_BYTES),
                      _sums(memory, name))
            for number, (name, block) in enumerate(memory.blocks.items())
        )  # fmt: skip
        whole = msgspec.structs.replace(manifest, blocks=blocks, created=time.time())
        try:
            self._write(MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")
            _sync_folder(self.partial)
            os.rename(self.partial, self.folder)
            (self.folder / PARTIAL).unlink(missing_ok=True)  # not before: what is interrupted must be found again
            _sync_folder(self.folder.parent)
        except OSError as error:
            raise ImageError(f"cannot write '{self.folder}': {error.strerror}") from None
        memory.close()
        return whole

    def keep(self) -> None:
        """Leave what is there to `reopen`."""
        self._settle()
        if self.memory is not None:
            self.memory.close()

    def abandon(self) -> None:
        """Remove what is there, unless it was committed."""
        self._settle()
        if self.memory is not None:
            self.memory.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write(self, name: str, data: bytes) -> None:
        try:
            with (self.partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ImageError(f"cannot write '{self.partial / name}': {error.strerror}") from None


class Image:
    """An image to read: RAM mapped read-only, device sections, description. Close it, or use `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.devices = self._file(DEVICES, self.manifest.devices_bytes, self.manifest.devices_crc32)
        self.description = b""
        if self.manifest.description_bytes:
            self.description = self._file(DESCRIPTION, self.manifest.description_bytes, self.manifest.description_crc32)
        self.memory = _map(folder, self.manifest, writable=False)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.memory.close()

    def nonzero(self, name: str) -> PageNumbers:
        """The pages of a block that are not zero, ascending; holes of the file are not read."""
        block = self.memory.block(name)
        found = [
            np.flatnonzero(nonzero_pages(block.bytes, start // PAGE_BYTES, -(-end // PAGE_BYTES) - start // PAGE_BYTES))
            + start // PAGE_BYTES
            for start, end in holes_and_data(block.fd, block.length)
        ]
        return np.concatenate(found).astype(np.uint64) if found else np.empty(0, np.uint64)

    def verify(self) -> None:
        """Read all RAM and compare the sums. Raises ImageError that names the block and the piece."""
        for block in self.manifest.blocks:
            sums = _sums(self.memory, block.name)
            for piece in sorted(sums.keys() | block.crc32.keys()):
                if sums.get(piece) != block.crc32.get(piece):
                    raise ImageError(
                        f"'{self.folder / block.file}' is damaged at {piece * CHUNK_BYTES:#x}: RAM block "
                        f"'{block.name}', {CHUNK_BYTES >> 20} MiB from there do not match their sum"
                    )

    def device_sections(self) -> list[DeviceSection]:
        """The saved sections, to be sent as they are."""
        return _sections(self.manifest, self.devices)

    def _file(self, name: str, length: int, crc32: int) -> bytes:
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ImageError(f"'{path}': {error.strerror}") from None
        if len(data) != length or zlib.crc32(data) != crc32:
            raise ImageError(f"'{path}' is damaged: its {len(data)} bytes do not match the sum of the {length} saved")
        return data


def read_manifest(folder: Path) -> Manifest:
    """Raises ImageError for whatever is no image."""
    return _decode(folder / MANIFEST)


def _decode(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise ImageError(f"'{path.parent}' is no image of a guest: {path.name}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ImageError(f"'{path}' is damaged: {error}") from None
    if manifest.format != FORMAT or manifest.version != FORMAT_VERSION:
        raise ImageError(
            f"'{path}' is '{manifest.format}' version {manifest.version}, this program reads {FORMAT} {FORMAT_VERSION}"
        )
    names = [block.name for block in manifest.blocks]
    if not names or len(set(names)) != len(names) or manifest.ram_bytes > LARGEST_RAM_BYTES:
        raise ImageError(f"'{path}' is damaged: RAM blocks {names}")
    for block in manifest.blocks:
        if Path(block.file).name != block.file or block.length <= 0 or block.length % PAGE_BYTES:
            raise ImageError(f"'{path}' is damaged: RAM block '{block.name}'")
    known = {int(kind) for kind in (Item.SECTION_START, Item.SECTION_PART, Item.SECTION_END, Item.SECTION_FULL)}
    for entry in manifest.sections:
        inside = 0 <= entry.start <= entry.start + entry.length <= manifest.devices_bytes
        numbers = (entry.section_id, entry.instance_id, entry.version_id)
        if not inside or entry.kind not in known or not all(0 <= number < 1 << 32 for number in numbers):
            raise ImageError(f"'{path}' is damaged: device section '{entry.idstr:.60}'")
    return manifest


def new_manifest(
    header: StreamHeader,
    sections: Sequence[DeviceSection],
    *,
    description: bytes = b"",
    uuid: str = "",
    footers: bool = True,
    ram_section_id: int = 1,
    origin: dict[str, str | int] | None = None,
) -> Manifest:
    """A manifest whose blocks `ImageWriter.commit` fills in."""
    entries = []
    at = 0
    for section in sections:
        entries.append(
            SectionEntry(int(section.kind), section.section_id, section.idstr, section.instance_id,
                         section.version_id, at, len(section.data))
        )  # fmt: skip
        at += len(section.data)
    devices = b"".join(section.data for section in sections)
    return Manifest(
        FORMAT, FORMAT_VERSION, header.machine, uuid, 0.0, (), len(devices), zlib.crc32(devices), len(description),
        zlib.crc32(description), tuple(entries), footers, ram_section_id, header.subsections, origin or {},
    )  # fmt: skip


def _map(folder: Path, manifest: Manifest, *, writable: bool) -> GuestMemory:
    files: dict[str, tuple[int, int]] = {}
    try:
        for block in manifest.blocks:
            fd = os.open(folder / block.file, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            files[block.name] = (fd, block.length)
            if os.fstat(fd).st_size != block.length:
                raise ImageError(f"'{folder / block.file}' has {os.fstat(fd).st_size} bytes, not {block.length}")
    except (OSError, ImageError) as error:
        for fd, _ in files.values():
            os.close(fd)
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"'{error.filename}': {error.strerror}") from None
    return GuestMemory(files, writable=writable)


def _sections(manifest: Manifest, data: bytes) -> list[DeviceSection]:
    return [
        DeviceSection(
            Item(entry.kind), entry.section_id, entry.idstr, entry.instance_id, entry.version_id,
            data[entry.start : entry.start + entry.length], entry.start,
        )
        for entry in manifest.sections
    ]  # fmt: skip


def _sums(memory: GuestMemory, name: str) -> dict[int, int]:
    """By as many threads as there are processors: the source's guest stands still meanwhile."""
    block = memory.block(name)
    pieces = dict.fromkeys(
        piece
        for start, end in holes_and_data(block.fd, block.length)
        for piece in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES))
    )

    def sum_of(piece: int) -> int | None:
        data = block.bytes[piece * CHUNK_BYTES : (piece + 1) * CHUNK_BYTES]
        return zlib.crc32(data.data) if bool(nonzero_pages(data).any()) else None

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_SUMMING), "sums") as pool:
        found = list(pool.map(sum_of, pieces))
    return {piece: value for piece, value in zip(pieces, found, strict=True) if value is not None}


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
