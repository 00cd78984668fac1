"""The compression methods of multifd: one stream per channel for the whole migration, flushed after every packet.

A packet's body must give exactly its pages: a body that gives less, or wants to give more, breaks the rules. The
stream is never ended by QEMU. QPL, UADK and QATzip need hardware and formats of their own; they are refused by name.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any, Protocol

from virtmig.errors import LocalProtocolError
from virtmig.stream.wire import MultifdFlag

METHOD_NAME: dict[int, str] = {
    int(MultifdFlag.NOCOMP): "none",
    int(MultifdFlag.ZLIB): "zlib",
    int(MultifdFlag.ZSTD): "zstd",
    int(MultifdFlag.QPL): "qpl",
    int(MultifdFlag.UADK): "uadk",
    int(MultifdFlag.QATZIP): "qatzip",
}
METHOD_FLAG: dict[str, int] = {name: flag for flag, name in METHOD_NAME.items()}

#: QEMU's zstd levels go to 20, and level 20 looks back 32 MiB; a frame that wants more memory is refused
ZSTD_WINDOW_LOG_MAX = 25
#: the modules that have the interface of Python 3.14's compression.zstd, in order of preference
ZSTD_MODULES = ("compression.zstd", "backports.zstd")


class Inflater(Protocol):
    def inflate(self, body: memoryview, wanted: int) -> bytes:
        """`wanted` bytes from one packet's body. Raises ValueError when it holds less, more, or garbage."""
        ...


class Deflater(Protocol):
    def deflate(self, pages: bytes | memoryview) -> bytes:
        """One packet's body."""
        ...


def zstd_module() -> Any:
    """The zstd module of this Python. Raises LocalProtocolError that names the package to install."""
    for name in ZSTD_MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise LocalProtocolError(
        "zstd is not available to this Python", hint="install the package backports.zstd (Python 3.14 has it built in)"
    )


def make_inflater(method: str) -> Inflater | None:
    """The decompressor of one channel; None for `none`. Raises LocalProtocolError for a method we cannot read."""
    if method == "none":
        return None
    if method == "zlib":
        return _ZlibInflater()
    if method == "zstd":
        return _ZstdInflater(zstd_module())
    raise _refused(method)


def make_deflater(method: str, level: int | None = None) -> Deflater | None:
    """The compressor of one channel; None for `none`. `level` None is QEMU's default, 1 for both methods."""
    if method == "none":
        return None
    if method == "zlib":
        return _ZlibDeflater(1 if level is None else level)
    if method == "zstd":
        return _ZstdDeflater(zstd_module(), 1 if level is None else level)
    raise _refused(method)


def _refused(method: str) -> LocalProtocolError:
    if method in METHOD_FLAG:
        return LocalProtocolError(
            f"multifd compression {method} needs hardware of its own and is not supported",
            hint="use multifd-compression none, zlib or zstd",
        )
    return LocalProtocolError(f"unknown multifd compression {method!r}", hint="use none, zlib or zstd")


class _ZlibInflater:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def inflate(self, body: memoryview, wanted: int) -> bytes:
        try:
            pages = self._stream.decompress(body, wanted)
            # what is left must be the end mark of the flush; it also shows output that zlib still holds back
            more = self._stream.decompress(self._stream.unconsumed_tail, 1)
        except zlib.error as broken:
            raise ValueError(f"not a zlib stream: {broken}") from None
        if self._stream.eof:
            raise ValueError("the zlib stream ended, which no QEMU does")
        _check_output(len(pages), wanted, bool(more or self._stream.unconsumed_tail))
        return pages


class _ZlibDeflater:
    def __init__(self, level: int) -> None:
        self._stream = zlib.compressobj(level)

    def deflate(self, pages: bytes | memoryview) -> bytes:
        return self._stream.compress(pages) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class _ZstdInflater:
    def __init__(self, zstd: Any) -> None:
        self._zstd = zstd
        self._stream = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})

    def inflate(self, body: memoryview, wanted: int) -> bytes:
        stream = self._stream
        try:
            pages: bytes = stream.decompress(body, wanted)
            more = b"" if stream.needs_input or stream.eof else stream.decompress(b"", 1)
        except (self._zstd.ZstdError, EOFError) as broken:
            raise ValueError(f"not a zstd stream: {broken}") from None
        if stream.eof:
            raise ValueError("the zstd frame ended, which no QEMU does")
        _check_output(len(pages), wanted, bool(more) or not stream.needs_input)
        return pages


class _ZstdDeflater:
    def __init__(self, zstd: Any, level: int) -> None:
        self._stream = zstd.ZstdCompressor(level=level)
        self._flush = zstd.ZstdCompressor.FLUSH_BLOCK

    def deflate(self, pages: bytes | memoryview) -> bytes:
        body: bytes = self._stream.compress(pages, mode=self._flush)
        return body


def _check_output(got: int, wanted: int, more: bool) -> None:
    if got < wanted:
        raise ValueError(f"the packet's body gave {got} bytes, its pages are {wanted}")
    if more:
        raise ValueError(f"the packet's body gives more than its pages, which are {wanted} bytes")
