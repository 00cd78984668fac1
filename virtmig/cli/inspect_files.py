"""Where inspected bytes come from: a file or standard input, perhaps packed, in pieces of at most 1 MiB."""

from __future__ import annotations

import bz2
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from virtmig.stream.channel import describe_bytes
from virtmig.stream.multifd_compression import zstd_module
from virtmig.stream.save_file import is_save_file
from virtmig.stream.wire import (
    MULTIFD_MAGIC,
    QEMU_VM_FILE_MAGIC,
    RETURN_PATH_LONGEST,
    TARGET_PAGE_BYTES,
    Item,
    RamFlag,
    ReturnPath,
)

PIECE_BYTES = 1 << 20
#: how many first bytes tell what it is
KNOWN_STARTS = 32
#: what an unpacker is given at once: what it could not give out before damaged data is lost
_PACKED_PIECE = 1024

_PACKED = (("xz", b"\xfd7zXZ\x00"), ("gzip", b"\x1f\x8b\x08"), ("bzip2", b"BZh"), ("zstd", b"\x28\xb5\x2f\xfd"))
_FIRST_RECORDS = (RamFlag.PAGE, RamFlag.ZERO, RamFlag.EOS)


class BrokenSource(Exception):
    """Reading failed, or the packing is damaged, at `offset` of the file; what was before it was given out."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class Source:
    """Bytes to be read once, from the beginning. `offset` is where the next piece begins."""

    def __init__(self, name: str, stream: IO[bytes] | None, pieces: Iterator[bytes] | None = None) -> None:
        self.name = name
        self.offset = 0
        self._stream = stream
        self._waiting: list[bytes] = []
        self._rest = pieces if pieces is not None else self._read()

    def pieces(self) -> Iterator[bytes]:
        """What is left, in pieces that are never empty. Raises BrokenSource."""
        while True:
            piece = self._waiting.pop(0) if self._waiting else next(self._rest, b"")
            if not piece:
                return
            self.offset += len(piece)
            yield piece

    def push_back(self, piece: bytes) -> None:
        """Bytes that were read too far, to be read next."""
        if piece:
            self._waiting.insert(0, piece)
            self.offset -= len(piece)

    def head(self, count: int) -> bytes:
        """The next `count` bytes, or all that there are, without taking them."""
        found = b""
        for piece in self.pieces():
            found += piece
            if len(found) >= count:
                break
        self.push_back(found)
        return found[:count]

    def tail(self, most: int) -> bytes:
        """The last bytes of a plain file that is not longer than what can be read ahead; else nothing."""
        size = self._size()
        return (self.read_again(max(self.offset, size - most), most) or b"") if size else b""

    def read_again(self, offset: int, count: int) -> bytes | None:
        """Bytes of a plain file; None where the source cannot go back."""
        if self._stream is None or not self._size():
            return None
        return os.pread(self._stream.fileno(), count, offset)

    def _size(self) -> int:
        """Of a plain file, in bytes; 0 for anything else."""
        if self._stream is None:
            return 0
        try:
            about = os.fstat(self._stream.fileno())
        except OSError:
            return 0
        return about.st_size if stat.S_ISREG(about.st_mode) else 0

    def _read(self) -> Iterator[bytes]:
        at = 0
        while self._stream is not None:
            try:
                piece = self._stream.read(PIECE_BYTES)
            except OSError as error:
                raise BrokenSource(f"it cannot be read: {error.strerror}", at) from None
            if not piece:
                return
            at += len(piece)
            yield piece


class _Gunzip:
    """zlib with the interface of lzma.LZMADecompressor."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, most)

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def inflated(source: Source, packing: str) -> Source:
    """The same source unpacked; its offsets begin at 0. Raises LocalProtocolError when this Python has no zstd."""
    makers: dict[str, Callable[[], Any]] = {
        "xz": lambda: lzma.LZMADecompressor(memlimit=512 << 20),
        "gzip": _Gunzip,
        "bzip2": bz2.BZ2Decompressor,
    }
    if packing == "zstd":
        zstd = zstd_module()
        return Source(source.name, None, _unpack(source, packing, zstd.ZstdDecompressor, (zstd.ZstdError,)))
    return Source(source.name, None, _unpack(source, packing, makers[packing], (lzma.LZMAError, zlib.error, OSError)))


def _unpack(
    source: Source, packing: str, make: Callable[[], Any], errors: tuple[type[Exception], ...]
) -> Iterator[bytes]:
    """The unpacked pieces; several packed streams one behind the other are one, as the tools have it."""
    unpacker = make()
    begun = False
    at = source.offset
    for data in _cut(source.pieces(), _PACKED_PIECE):
        at += len(data)
        while data or not (unpacker.needs_input or unpacker.eof):
            if unpacker.eof:
                unpacker, begun = make(), False
                data = data.lstrip(b"\0")  # xz pads with zeros
                if not data:
                    break
            try:
                piece = unpacker.decompress(data, PIECE_BYTES)
            except errors as error:
                raise BrokenSource(f"the {packing} data cannot be unpacked: {error}", at - len(data)) from None
            begun = True
            data = unpacker.unused_data if unpacker.eof else b""
            if piece:
                yield piece
    if begun and not unpacker.eof:
        raise BrokenSource(f"the {packing} data is cut off", at)


def _cut(pieces: Iterator[bytes], most: int) -> Iterator[bytes]:
    return (piece[at : at + most] for piece in pieces for at in range(0, len(piece), most))


def kind_of_start(head: bytes) -> str:
    """What a file is that begins so: a packing, save, main, resumed, multifd, return path, preempt, or ""."""
    for packing, magic in _PACKED:
        if head.startswith(magic):
            return packing
    if is_save_file(head):
        return "save"
    if len(head) < 4:
        return ""
    word, length = int.from_bytes(head[:8], "big"), int.from_bytes(head[2:4], "big")
    first = int.from_bytes(head[:4], "big")
    if first == QEMU_VM_FILE_MAGIC:
        return "main"
    if first == MULTIFD_MAGIC:
        return "multifd"
    if head[0] == Item.COMMAND and head[1] == 0:
        return "resumed"
    kind = int.from_bytes(head[:2], "big")
    if kind in list(ReturnPath)[1:]:
        return "return path" if length <= RETURN_PATH_LONGEST else ""
    if len(head) >= 8 and not kind and word & (TARGET_PAGE_BYTES - 1) in _FIRST_RECORDS:
        return "preempt"
    return ""


def head_of(head: bytes) -> str:
    """The first bytes in words, for who expected others."""
    shown = describe_bytes(head)
    text = head.decode("ascii", "replace")
    return f"{shown} (text: {text.splitlines()[0]!r})" if text.isprintable() or text.strip().isprintable() else shown
