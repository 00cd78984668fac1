"""What libvirt writes before the stream in a file of `virsh save`, both ways (src/qemu/qemu_saveimage.h).

    16 bytes magic, u32 version, data length, was running, format, cookie offset, 14 unused | XML, NUL, cookie, NULs |
    the migration stream, piped through a compressor unless the format is raw or sparse (sparse is mapped-ram)

The numbers have the byte order of the host that saved. libvirt pads the XML so that it can be edited in place. A file
that is still being written, or never was finished, has the magic `LibvirtQemudPart`.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Literal

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.cursor import Cursor, NeedData

SAVE_MAGIC = b"LibvirtQemudSave"
PARTIAL_MAGIC = b"LibvirtQemudPart"
SAVE_VERSION = 2
HEADER_BYTES = 92
#: libvirt pads by 64 KiB, and refuses XML over its own limits long before this
DATA_LONGEST_BYTES = 32 * 1024 * 1024
CHANNEL = "save file"

_LAYOUT = "16s5I56s"


class SaveFormat(enum.IntEnum):
    """enum virQEMUSaveFormat: how the stream behind the header is compressed. 2 to 5 are piped through that program."""

    RAW = 0
    GZIP = 1
    BZIP2 = 2
    XZ = 3
    LZOP = 4
    ZSTD = 5  # since libvirt 11.2
    SPARSE = 6  # since libvirt 11.2: mapped-ram


@dataclass(frozen=True, slots=True)
class SaveHeader:
    """The header and its data. `data` is XML, NUL, the cookie if there is one, and padding; `version` 1 has no cookie.

    `format` stays a number, since a newer libvirt may write one that SaveFormat lacks. `is_complete`: libvirt finished
    the file.
    """

    data: bytes
    was_running: int
    format: int = SaveFormat.RAW
    cookie_offset: int = 0
    version: int = SAVE_VERSION
    is_complete: bool = True
    byte_order: Literal["little", "big"] = "little"
    unused: bytes = bytes(56)

    @property
    def xml(self) -> str:
        return _text(self.data)

    @property
    def cookie(self) -> str:
        """libvirt's save cookie (CPU model, slirp state); "" without one."""
        return _text(self.data[self.cookie_offset :]) if self.cookie_offset else ""

    @property
    def stream_offset(self) -> int:
        """Where the migration stream begins in the file, in bytes."""
        return HEADER_BYTES + len(self.data)

    @property
    def format_name(self) -> str:
        return SaveFormat(self.format).name.lower() if self.format in list(SaveFormat) else f"unknown ({self.format})"


def is_save_file(first: bytes) -> bool:
    """Whether a file that begins so (16 bytes are enough) is one of `virsh save`."""
    return first[: len(SAVE_MAGIC)] in (SAVE_MAGIC, PARTIAL_MAGIC)


def decode_save_header(cursor: Cursor, *, limit_bytes: int = DATA_LONGEST_BYTES) -> SaveHeader:
    """The header; the cursor then stands where the stream begins.

    Raises NeedData (cursor rolled back), RemoteProtocolError.
    """
    begin = cursor.offset
    with cursor.element():
        raw = cursor.pull_bytes(HEADER_BYTES, HEADER_BYTES, "the header of a save file")
        if not is_save_file(raw):
            raise cursor.broken(f"not a file of virsh save: it begins with {raw[:16]!r}", at=begin)
        order: Literal["little", "big"] = "little"
        magic, version, length, was_running, format_, cookie_offset, unused = struct.unpack("<" + _LAYOUT, raw)
        if version > SAVE_VERSION:  # as libvirt: perhaps a host of the other byte order wrote it
            order = "big"
            magic, version, length, was_running, format_, cookie_offset, unused = struct.unpack(">" + _LAYOUT, raw)
        if not 1 <= version <= SAVE_VERSION:
            raise cursor.broken(f"save file version {raw[16:20].hex()}, at most {SAVE_VERSION} is known", at=begin + 16)
        if not length:
            raise cursor.broken("a save file without a domain XML", at=begin + 20)
        data = cursor.pull_bytes(length, limit_bytes, "the domain XML of a save file")
        if cookie_offset and (cookie_offset >= length or data[cookie_offset - 1]):
            raise cursor.broken(f"a cookie at {cookie_offset}, inside or behind the XML", at=begin + 32)
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise cursor.broken(
                "the domain XML of a save file is not UTF-8", at=begin + HEADER_BYTES + error.start
            ) from None
    return SaveHeader(data, was_running, format_, cookie_offset, version, magic == SAVE_MAGIC, order, unused)


def read_save_header(first: bytes) -> SaveHeader:
    """The header from a file's first bytes, all of it. Raises RemoteProtocolError, also when it is cut off."""
    cursor = Cursor(CHANNEL)
    cursor.feed(first)
    try:
        return decode_save_header(cursor)
    except NeedData:
        raise RemoteProtocolError("the file ends inside libvirt's header", channel=CHANNEL, offset=len(first)) from None


def encode_save_header(header: SaveHeader) -> bytes:
    """The inverse of `decode_save_header`. Raises LocalProtocolError for what libvirt would not read."""
    if not 0 < len(header.data) < 1 << 32 or b"\0" not in header.data:
        raise LocalProtocolError("the XML of a save file ends with a NUL", channel=CHANNEL)
    if header.cookie_offset and not 0 < header.cookie_offset < len(header.data):
        raise LocalProtocolError(f"a cookie at {header.cookie_offset} of {len(header.data)}", channel=CHANNEL)
    return (
        struct.pack(
            ("<" if header.byte_order == "little" else ">") + _LAYOUT,
            SAVE_MAGIC if header.is_complete else PARTIAL_MAGIC,
            header.version,
            len(header.data),
            header.was_running,
            header.format,
            header.cookie_offset,
            header.unused,
        )
        + header.data
    )


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")
