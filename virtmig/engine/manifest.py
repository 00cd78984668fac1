"""What an image says of itself: manifest.json, read without trust and written once.

A manifest may come from anywhere. Whatever is in it, reading ends in a Manifest whose every value can be used as it
is (file names, lengths, numbers that go on the wire), or in an ImageError that names the field.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from virtmig.engine.memory import LARGEST_RAM_BYTES
from virtmig.errors import ImageError
from virtmig.pages import PAGE_BYTES
from virtmig.stream.decoder import DESCRIPTION_LIMIT_BYTES
from virtmig.stream.events import DeviceSection, StreamHeader
from virtmig.stream.ram import MOST_BLOCKS
from virtmig.stream.wire import Item

FORMAT = "virtmig-image"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
#: RAM is summed in pieces of this size, so that damage can be placed, and pieces that are all zero are left out
CHUNK_BYTES = 4 << 20
#: a sum takes about 20 bytes of JSON: enough for 25 TiB of RAM that is nowhere zero
MANIFEST_LIMIT_BYTES = 128 << 20
DEVICES_LIMIT_BYTES = 1 << 30
MOST_SECTIONS = 1 << 16
MOST_SUBSECTIONS = 16
_MOST_ORIGINS = 64
_LONGEST_NAME_BYTES = 255  # u8 on the wire
_LARGEST_PAGE_BYTES = 16 << 30  # hugetlb of POWER
_LAST_SECOND = 1 << 40
_UUID = re.compile(r"(?:[0-9a-f]{32})?")
_KINDS = {int(kind) for kind in (Item.SECTION_START, Item.SECTION_PART, Item.SECTION_END, Item.SECTION_FULL)}


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
    """What the image holds. `subsections` are those of the stream's configuration, (name, version, payload).

    `sections` are in the order they came. The first `sections_before_ram` of them came before RAM's START, the next
    `sections_before_switch` behind it and before RAM's END (early_setup of virtio-mem), the rest at the switchover.
    """

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
    sections_before_ram: int = 0
    sections_before_switch: int = 0

    @property
    def ram_bytes(self) -> int:
        return sum(block.length for block in self.blocks)


def read_manifest(folder: Path) -> Manifest:
    """Raises ImageError for whatever is no image."""
    return decode_manifest(folder / MANIFEST)


def decode_manifest(path: Path) -> Manifest:
    """A manifest, also of an image that is not whole. Raises ImageError."""
    if not path.parent.is_dir():
        there = "no folder" if os.path.lexists(path.parent) else "not there"
        raise ImageError(f"'{path.parent}' is no image of a guest: it is {there}")
    data = read_file(path, MANIFEST_LIMIT_BYTES, f"'{path.parent}' is no image of a guest: {path.name}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ImageError(f"'{path}' is damaged: {error}") from None
    except RecursionError:
        raise ImageError(f"'{path}' is damaged: it is nested too deep") from None
    if manifest.format != FORMAT or manifest.version != FORMAT_VERSION:
        raise ImageError(
            f"'{path}' is {_shown(manifest.format)} version {_shown(manifest.version)}, "
            f"this program reads {FORMAT} {FORMAT_VERSION}"
        )
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Raises ImageError that names the first field which cannot be used as it is. Also done before one is written."""
    for field, words in _wrong(manifest):
        raise ImageError(f"'{path}' is damaged: {field}: {words}")


def read_file(path: Path, limit_bytes: int, what: str) -> bytes:
    """All of a small file. Raises ImageError that begins with `what` when it is no file, or longer than the limit."""
    fd = open_file(path, what=what)
    try:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise ImageError(f"{what}: {size} bytes, at most {limit_bytes} are read")
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit_bytes + 1)
    except OSError as error:
        raise ImageError(f"{what}: {error.strerror}") from None
    finally:
        os.close(fd)


def open_file(path: Path, flags: int = os.O_RDONLY, *, what: str = "") -> int:
    """The descriptor of a plain file, which the caller closes. A FIFO or a device is an ImageError, never a wait."""
    what = what or f"'{path}'"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a device may act on that alone
            raise ImageError(f"{what}: it is no plain file")
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(f"{what}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{what}: it is no plain file")
    return fd


def new_manifest(
    header: StreamHeader,
    sections: Sequence[DeviceSection],
    *,
    description: bytes = b"",
    uuid: str = "",
    footers: bool = True,
    ram_section_id: int = 1,
    sections_before_ram: int = 0,
    sections_before_switch: int = 0,
    origin: Mapping[str, str | int] | None = None,
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
        zlib.crc32(description), tuple(entries), footers, ram_section_id, header.subsections, dict(origin or {}),
        sections_before_ram, sections_before_switch,
    )  # fmt: skip


def sections_of(manifest: Manifest, data: bytes) -> list[DeviceSection]:
    """The sections as they came; `data` is the file `devices`."""
    return [
        DeviceSection(
            Item(entry.kind), entry.section_id, entry.idstr, entry.instance_id, entry.version_id,
            data[entry.start : entry.start + entry.length], entry.start,
        )
        for entry in manifest.sections
    ]  # fmt: skip


# -- what may not be believed ------------------------------------------------------------------------------------------


def _wrong(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of everything that cannot be used as it is."""
    machine = manifest.machine
    if machine is not None and not _is_name(machine):
        yield "machine", _shown(machine)
    if not _UUID.fullmatch(manifest.uuid):
        yield "uuid", f"{_shown(manifest.uuid)}, expected 32 hexadecimal digits or nothing"
    if not 0 <= manifest.created < _LAST_SECOND:
        yield "created", f"{_shown(manifest.created)} is no time"
    if not _is_u32(manifest.ram_section_id):
        yield "ram_section_id", _shown(manifest.ram_section_id)
    for field, value, limit in (
        ("devices_bytes", manifest.devices_bytes, DEVICES_LIMIT_BYTES),
        ("description_bytes", manifest.description_bytes, DESCRIPTION_LIMIT_BYTES),
    ):
        if not 0 <= value <= limit:
            yield field, f"{_shown(value)}, at most {limit}"
    for field, value in (("devices_crc32", manifest.devices_crc32), ("description_crc32", manifest.description_crc32)):
        if not _is_u32(value):
            yield field, _shown(value)
    if len(manifest.origin) > _MOST_ORIGINS:
        yield "origin", f"{len(manifest.origin)} entries, at most {_MOST_ORIGINS}"
    yield from _wrong_blocks(manifest)
    yield from _wrong_sections(manifest)
    if len(manifest.subsections) > MOST_SUBSECTIONS:
        yield "subsections", f"{len(manifest.subsections)}, at most {MOST_SUBSECTIONS}"
    for number, (name, version, payload) in enumerate(manifest.subsections):
        if not _is_name(name):
            yield f"subsections[{number}]", f"the name {_shown(name)}"
        if not _is_u32(version):
            yield f"subsections[{number}]", f"version {_shown(version)}"
        if len(payload) > DESCRIPTION_LIMIT_BYTES:
            yield f"subsections[{number}]", f"{len(payload)} bytes"


def _wrong_blocks(manifest: Manifest) -> Iterator[tuple[str, str]]:
    if not 0 < len(manifest.blocks) <= MOST_BLOCKS:
        yield "blocks", f"{len(manifest.blocks)}, expected 1 to {MOST_BLOCKS}"
        return
    names: set[str] = set()
    files: set[str] = set()
    for number, block in enumerate(manifest.blocks):
        field = f"blocks[{number}]"
        if not _is_name(block.name) or block.name in names:
            yield f"{field}.name", f"{_shown(block.name)}{' is there twice' if block.name in names else ''}"
        if not _is_file_name(block.file) or block.file in files:
            yield f"{field}.file", f"{_shown(block.file)}{' is there twice' if block.file in files else ''}"
        names.add(block.name)
        files.add(block.file)
        if block.length <= 0 or block.length % PAGE_BYTES or block.length > LARGEST_RAM_BYTES:
            yield f"{field}.length", f"{_shown(block.length)} bytes are not whole pages of a guest"
            continue
        size = block.page_size
        if not PAGE_BYTES <= size <= _LARGEST_PAGE_BYTES or size & (size - 1) or block.length % size:
            yield f"{field}.page_size", f"{_shown(size)} bytes for a block of {block.length}"
        pieces = -(-block.length // CHUNK_BYTES)
        bad = next((key for key, value in block.crc32.items() if not 0 <= key < pieces or not _is_u32(value)), None)
        if bad is not None:
            yield f"{field}.crc32", f"piece {_shown(bad)}, sum {_shown(block.crc32[bad])}; the block has {pieces}"
    if manifest.ram_bytes > LARGEST_RAM_BYTES:
        yield "blocks", f"{_shown(manifest.ram_bytes)} bytes of RAM, at most {LARGEST_RAM_BYTES}"


def _wrong_sections(manifest: Manifest) -> Iterator[tuple[str, str]]:
    count = len(manifest.sections)
    if count > MOST_SECTIONS:
        yield "sections", f"{count}, at most {MOST_SECTIONS}"
        return
    before, setup = manifest.sections_before_ram, manifest.sections_before_switch
    if not 0 <= before <= count:
        yield "sections_before_ram", f"{_shown(before)} of {count}"
    elif not 0 <= setup <= count - before:
        yield "sections_before_switch", f"{_shown(setup)} of {count - before}"
    for number, entry in enumerate(manifest.sections):
        field = f"sections[{number}]"
        if entry.kind not in _KINDS:
            yield f"{field}.kind", _shown(entry.kind)
        if not _is_name(entry.idstr):
            yield f"{field}.idstr", _shown(entry.idstr)
        for name in ("section_id", "instance_id", "version_id"):
            if not _is_u32(getattr(entry, name)):
                yield f"{field}.{name}", _shown(getattr(entry, name))
        if not 0 <= entry.start <= entry.start + entry.length <= manifest.devices_bytes:
            yield field, f"{_shown(entry.length)} bytes from {_shown(entry.start)} of {manifest.devices_bytes}"


def _is_u32(value: int) -> bool:
    return 0 <= value < 1 << 32


def _is_name(text: str) -> bool:
    return text.isascii() and 0 < len(text) <= _LONGEST_NAME_BYTES


def _is_file_name(text: str) -> bool:
    return _is_name(text) and text not in (".", "..") and "/" not in text and "\0" not in text


def _shown(value: object) -> str:
    """A value that somebody made up, short and printable."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
