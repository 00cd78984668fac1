"""A guest at rest in a folder: a checkpoint that can be restored, lazily too, and that says when it is damaged.

    FOLDER/manifest.json     machine, RAM blocks, what each file must hold
           ram-0, ram-1 ...  one sparse file a RAM block, the page at its own offset
           devices           the payloads of the device sections, one behind the other in the order they came
           description.json  QEMU's description of the device sections; absent after a postcopy

It is made beside its place, as .NAME.ID.incoming, and gets its name when everything is on the disk: a folder of that
name is a whole image or was never one of ours. The source learns of success only afterwards. In a postcopy what is
being received is the guest: it stays where it is after a failure, and `ImageWriter.reopen` goes on with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from virtmig.engine.interrupted import ARRIVED, LOCK, PARTIAL, choose, folder_name, held, hold, interrupted, place_of
from virtmig.engine.manifest import (
    CHUNK_BYTES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    BlockFile,
    Manifest,
    SectionEntry,
    check_manifest,
    new_manifest,
    open_file,
    read_file,
    read_manifest,
    sections_of,
)
from virtmig.engine.memory import LARGEST_RAM_BYTES, GuestMemory, NoRoom, holes_and_data, nonzero_pages, read_block
from virtmig.errors import GuestMemoryError, ImageError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.quantities import size_text
from virtmig.stream.events import DeviceSection

__all__ = ["CHUNK_BYTES", "DESCRIPTION", "DEVICES", "FORMAT", "FORMAT_VERSION", "MANIFEST", "BlockFile", "Image",
           "ImageWriter", "Manifest", "SectionEntry", "new_manifest", "read_manifest"]  # fmt: skip

DEVICES = "devices"
DESCRIPTION = "description.json"
#: room for the device state and the manifest, held while a postcopy may come: a full disk does not keep it from them
RESERVE = "reserve"
_MOST_SUMMING = 8
#: what was received goes to the disk while more comes, so that little is left when the source's guest stands still
WRITE_BACK_S = 0.5
_SCAN_BYTES = 1 << 20
# what these take, generously: the devices of a PC with their JSON, the sum of a piece, the entry of a block
_RESERVE_BYTES, _SUM_BYTES, _BLOCK_BYTES = 1 << 20, 32, 1024


class ImageWriter:
    """An image that is being received. `commit` makes it one; `abandon` leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self._prepare(folder.absolute())
        _check_place(self.folder)
        try:
            made = tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".incoming", dir=self.folder.parent)
        except OSError as error:
            raise ImageError(f"cannot write in '{self.folder.parent}': {error.strerror}") from None
        self.partial = Path(made)
        try:
            self._lock = hold(self.partial)
            self._come_first()
        except ImageError:
            self.abandon()
            raise

    def _come_first(self) -> None:
        """Of two that begin at the same moment the later one is refused."""
        working = [each for each in interrupted(self.folder) if each.holder is not None]
        first = min(working, key=lambda each: (each.holder is not None and each.holder.since, each.folder))
        if first.folder != self.partial and first.holder is not None:
            raise held(first.folder, first.holder)

    def _prepare(self, folder: Path) -> None:
        self.folder = folder
        self.memory: GuestMemory | None = None
        #: all of it is here: only `finish` is left to do
        self.arrived = self.committed = False
        self._lock = -1
        self._page_sizes: dict[str, int] = {}
        self._settled = threading.Event()
        self._writer: threading.Thread | None = None
        self._lost: OSError | None = None
        self._reserved_bytes = 0
        self._summed: dict[str, dict[int, int]] = {}

    @classmethod
    def reopen(cls, folder: Path) -> tuple[ImageWriter, Manifest, list[DeviceSection]]:
        """What a postcopy into `folder` left behind when its process ended; `folder` may name what was left itself.

        Raises ImageError when there is nothing, more than one, another process that works on it, or no place.
        """
        found = choose(folder)
        writer = cls.__new__(cls)
        writer._prepare(place_of(folder)[0])
        _check_place(writer.folder)
        writer.partial, writer.arrived = found.folder, found.arrived
        manifest = found.manifest
        assert manifest is not None
        writer._lock = hold(found.folder)
        try:
            data = read_file(found.folder / DEVICES, manifest.devices_bytes, f"'{found.folder / DEVICES}'")
            if zlib.crc32(data) != manifest.devices_crc32:
                raise ImageError(f"'{found.folder / DEVICES}' is damaged")
            writer._page_sizes = {block.name: block.page_size for block in manifest.blocks}
            writer.memory = _map(found.folder, manifest, writable=True)
        except ImageError:
            writer._unlock()
            raise
        writer.memory.touch_what_is_held()
        writer._write_back([block.fd for block in writer.memory.blocks.values()])
        return writer, manifest, sections_of(manifest, data)

    def expect(self, blocks: Mapping[str, int]) -> None:
        """A postcopy may come: room for all of it, and for what is written beside RAM. Raises NoRoom."""
        self._check_room(sum(blocks.values()))
        pieces = sum(-(-length // CHUNK_BYTES) for length in blocks.values())
        self._reserved_bytes = _RESERVE_BYTES + _SUM_BYTES * pieces + _BLOCK_BYTES * len(blocks)
        self._reserve()

    def _check_room(self, size_bytes: int) -> None:
        free = _free_bytes(self.partial)
        if free is not None and free < size_bytes + _RESERVE_BYTES:
            raise NoRoom(
                f"a postcopy needs room for what is still to come: {size_text(size_bytes)}, "
                f"'{self.folder.parent}' has {size_text(free)}"
            )

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
                    try:
                        os.fdatasync(fd)
                    except OSError as error:  # the kernel tells it once: commit's own fsync would not hear of it again
                        self._lost = self._lost or error

        self._writer = threading.Thread(target=work, name="write back", daemon=True)
        self._writer.start()

    def _settle(self) -> None:
        self._settled.set()
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def save_devices(self, sections: Sequence[DeviceSection], partial: Manifest | None = None) -> None:
        """The device state, on the disk when this returns; with `partial` also what `reopen` needs. May be repeated."""
        files = {DEVICES: b"".join(section.data for section in sections)}
        if partial is not None:
            whole = msgspec.structs.replace(partial, blocks=self._block_files())
            check_manifest(whole, self.partial / PARTIAL)
            files[PARTIAL] = msgspec.json.encode(whole)
        try:
            self._write_all(files)
        except NoRoom:
            if not (self.partial / RESERVE).exists():
                raise
            (self.partial / RESERVE).unlink()
            self._write_all(files)
        self._reserve()

    def _write_all(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self._write(name, data)
        try:
            _sync_folder(self.partial)
            _sync_folder(self.partial.parent)
        except OSError as error:
            raise _unwritable(error, f"cannot write '{self.partial}'") from None

    def _reserve(self) -> None:
        if not self._reserved_bytes:
            return
        try:
            fd = os.open(self.partial / RESERVE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._reserved_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            raise _unwritable(error, f"'{self.partial / RESERVE}' cannot be written") from None

    def reserve(self, awaited: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        """Room for the pages that are True, if the file system can promise it. Raises NoRoom, and may be repeated."""
        if self.memory is None:
            raise GuestMemoryError("pages before the list of RAM blocks")
        for name, pages in awaited.items():
            if not self.memory.reserve(name, pages):
                self._check_room(int(np.count_nonzero(pages & ~self.memory.touched(name))) * PAGE_BYTES)

    def commit(self, manifest: Manifest, description: bytes = b"") -> Manifest:
        """Everything durable, then the name. `manifest` comes without its blocks; the finished one is returned.

        Raises NoRoom when it may be repeated as it is.
        """
        memory = self.memory
        if memory is None:
            raise ImageError("an image without RAM")
        self._settle()
        if description:
            self._write(DESCRIPTION, description)
        if self._lost is not None:
            raise GuestMemoryError(f"the guest's memory could not be written to the disk: {self._lost.strerror}")
        memory.flush()
        try:
            if (self.partial / PARTIAL).exists():  # a rename needs no room
                os.rename(self.partial / PARTIAL, self.partial / ARRIVED)
                _sync_folder(self.partial)
            self.arrived = True
            whole = msgspec.structs.replace(manifest, blocks=self._block_files(summed=True), created=time.time())
            check_manifest(whole, self.partial / MANIFEST)
            (self.partial / RESERVE).unlink(missing_ok=True)
            self._write(MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")
            _sync_folder(self.partial)
            os.rename(self.partial, self.folder)
            for name in (ARRIVED, LOCK):  # not before: what is interrupted must be found again
                (self.folder / name).unlink(missing_ok=True)
            _sync_folder(self.folder.parent)
        except OSError as error:
            raise _unwritable(error, f"cannot write '{self.folder}'") from None
        self.committed = True
        memory.close()
        self._unlock()
        return whole

    def _block_files(self, *, summed: bool = False) -> tuple[BlockFile, ...]:
        memory = self.memory
        assert memory is not None
        for name in memory.blocks if summed else ():
            if name not in self._summed:
                self._summed[name] = _sums(memory, name)
        return tuple(
            BlockFile(name, f"ram-{number}", block.length, self._page_sizes.get(name, PAGE_BYTES),
                      self._summed.get(name, {}))
            for number, (name, block) in enumerate(memory.blocks.items())
        )  # fmt: skip

    def keep(self) -> None:
        """Leave what is there to `reopen`."""
        self._settle()
        if self.memory is not None:
            self.memory.close()
        self._unlock()

    def abandon(self) -> None:
        """Remove what is there, unless it was committed."""
        self._settle()
        if self.memory is not None:
            self.memory.close()
        shutil.rmtree(self.partial, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _write(self, name: str, data: bytes) -> None:
        try:
            with (self.partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(error, f"cannot write '{self.partial / name}'") from None


class Image:
    """An image to read: RAM mapped read-only, device sections, description. Close it, or use `with`.

    A file that is cut off while it is mapped is a SIGBUS for who reads the mapping; `verify` and `nonzero` read files.
    """

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
        buffer = np.empty(_SCAN_BYTES, np.uint8)
        found = []
        for start, end in _pieces_of_data(block.fd, block.length):
            here = buffer[: end - start]
            with self._named(name):
                read_block(block.fd, start, here.data)
            found.append(np.flatnonzero(nonzero_pages(here)) + start // PAGE_BYTES)
        return np.concatenate(found).astype(np.uint64) if found else np.empty(0, np.uint64)

    def verify(self) -> None:
        """Read all RAM and compare the sums. Raises ImageError that names the block and the piece."""
        for words in self.damages():
            raise ImageError(words)

    def damages(self) -> Iterator[str]:
        """Read all RAM and compare the sums: what is wrong, piece by piece."""
        for block in self.manifest.blocks:
            try:
                with self._named(block.name):
                    sums = _sums(self.memory, block.name)
            except ImageError as error:
                yield str(error)
                continue
            for piece in sorted(sums.keys() | block.crc32.keys()):
                if sums.get(piece) != block.crc32.get(piece):
                    yield (
                        f"'{self.folder / block.file}' is damaged at {piece * CHUNK_BYTES:#x}: RAM block "
                        f"'{block.name}', {CHUNK_BYTES >> 20} MiB from there do not match their sum"
                    )

    def device_sections(self) -> list[DeviceSection]:
        """The saved sections, to be sent as they are."""
        return sections_of(self.manifest, self.devices)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except GuestMemoryError as error:
            file = next(block.file for block in self.manifest.blocks if block.name == name)
            raise ImageError(f"'{self.folder / file}' is damaged: RAM block '{name}': {error}") from None

    def _file(self, name: str, length: int, crc32: int) -> bytes:
        path = self.folder / name
        data = read_file(path, length, f"'{path}' is damaged or not there")
        if len(data) != length or zlib.crc32(data) != crc32:
            raise ImageError(f"'{path}' is damaged: its {len(data)} bytes do not match the sum of the {length} saved")
        return data


def _check_place(folder: Path) -> None:
    """Raises ImageError unless an image can get that name."""
    if folder.name in ("", ".."):
        raise ImageError(f"'{folder}' names no folder that could be made", hint="name a folder that does not exist")
    if place_of(folder)[1] is not None:
        raise ImageError(f"'{folder.name}' is how an unfinished image is called", hint="name another folder")
    parent = folder.parent
    try:
        there: os.stat_result | None = os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        there = None
    except OSError as error:
        raise ImageError(f"'{folder}': {error.strerror}") from None
    if there is not None:
        raise ImageError(f"'{folder}' exists already: {_kind(folder, there)}", hint="name a folder that does not exist")
    if not parent.is_dir():
        raise ImageError(f"'{parent}' is no folder", hint="create it, or name another place")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    if len(os.fsencode(folder_name(folder.name, "x" * 8))) > longest:
        raise ImageError(f"the name '{folder.name:.60}...' is too long", hint=f"at most {longest - 19} bytes")
    for each in interrupted(folder):
        if each.holder is not None:
            raise held(each.folder, each.holder)


def _kind(folder: Path, there: os.stat_result) -> str:
    if stat.S_ISLNK(there.st_mode):
        return f"a symbolic link to '{os.readlink(folder)}'{'' if folder.exists() else ', which is not there'}"
    if not stat.S_ISDIR(there.st_mode):
        return "a file"
    with contextlib.suppress(OSError):
        return "an empty folder" if not os.listdir(folder) else "a folder that is not empty"
    return "a folder"


def _free_bytes(folder: Path) -> int | None:
    """What may still be written there; None where the file system does not say."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _unwritable(error: OSError, what: str) -> ImageError | NoRoom:
    return (NoRoom if NoRoom.means(error) else ImageError)(f"{what}: {error.strerror}")


def _map(folder: Path, manifest: Manifest, *, writable: bool) -> GuestMemory:
    files: dict[str, tuple[int, int]] = {}
    try:
        for block in manifest.blocks:
            fd = open_file(folder / block.file, os.O_RDWR if writable else os.O_RDONLY)
            files[block.name] = (fd, block.length)
            if os.fstat(fd).st_size != block.length:
                raise ImageError(f"'{folder / block.file}' has {os.fstat(fd).st_size} bytes, not {block.length}")
    except ImageError:
        for fd, _ in files.values():
            os.close(fd)
        raise
    try:
        return GuestMemory(files, writable=writable)
    except GuestMemoryError as error:
        raise ImageError(f"'{folder}': {error}") from None


def _pieces_of_data(fd: int, length: int) -> Iterator[tuple[int, int]]:
    """What is no hole, in whole pages and pieces of at most _SCAN_BYTES."""
    for start, end in holes_and_data(fd, length):
        last = -(-end // PAGE_BYTES) * PAGE_BYTES
        for at in range(start // PAGE_BYTES * PAGE_BYTES, last, _SCAN_BYTES):
            yield at, min(at + _SCAN_BYTES, last)


def _sums(memory: GuestMemory, name: str) -> dict[int, int]:
    """By as many threads as there are processors: the source's guest stands still meanwhile."""
    block = memory.block(name)
    pieces = dict.fromkeys(
        piece
        for start, end in holes_and_data(block.fd, block.length)
        for piece in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES))
    )
    buffers = threading.local()

    def sum_of(piece: int) -> int | None:
        if not hasattr(buffers, "bytes"):
            buffers.bytes = np.empty(CHUNK_BYTES, np.uint8)
        start = piece * CHUNK_BYTES
        data: npt.NDArray[np.uint8] = buffers.bytes[: min(CHUNK_BYTES, block.length - start)]
        read_block(block.fd, start, data.data)
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
