"""A place in a byte stream that arrives in pieces: pull what is there, or go back and say "need more".

A decoder owns one Cursor. It feeds bytes in, then reads one element inside `with cursor.element():`; when bytes run
out NeedData is raised and the cursor stands again where the element began, so that the same read can be repeated when
more has come. Bytes behind the cursor are dropped. All integers are big-endian, as QEMU's qemu_get_be* functions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from virtmig.errors import RemoteProtocolError

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
#: dropped bytes are cut off the buffer only in pieces of this size, so that small elements do not move large buffers
_COMPACT_BYTES = 1 << 20


class NeedData(Exception):
    """The element is not here in full. `missing` is at least how many bytes more it takes."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


class Cursor:
    """`channel` names the stream in errors; `offset` is the absolute position of the next byte to be pulled."""

    def __init__(self, channel: str = "main", origin: int = 0) -> None:
        """`origin`: the offset of the first byte to be fed, for a stream that lies inside another."""
        self.channel = channel
        self.ended = False
        self._buffer = bytearray()
        self._at = 0
        self._dropped = origin

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes. Must not be called while a memoryview from `peek_view` is alive."""
        if self._at >= _COMPACT_BYTES or self._at == len(self._buffer):
            del self._buffer[: self._at]
            self._dropped += self._at
            self._at = 0
        self._buffer += data

    def end(self) -> None:
        """No more bytes will come."""
        self.ended = True

    @property
    def offset(self) -> int:
        return self._dropped + self._at

    @property
    def available(self) -> int:
        return len(self._buffer) - self._at

    @contextmanager
    def element(self) -> Iterator[None]:
        """Roll back to here when NeedData is raised inside."""
        begin = self._at
        try:
            yield
        except NeedData:
            self._at = begin
            raise

    def need(self, count: int) -> None:
        if self.available < count:
            raise NeedData(count - self.available)

    def pull_u8(self) -> int:
        self.need(1)
        value = self._buffer[self._at]
        self._at += 1
        return value

    def pull_u16(self) -> int:
        return self._pull(_U16)

    def pull_u32(self) -> int:
        return self._pull(_U32)

    def pull_u64(self) -> int:
        return self._pull(_U64)

    def _pull(self, number: struct.Struct) -> int:
        self.need(number.size)
        value: int = number.unpack_from(self._buffer, self._at)[0]
        self._at += number.size
        return value

    def pull_bytes(self, count: int, limit: int, what: str) -> bytes:
        """`count` bytes, copied. `limit` bounds a length that came from the peer; beyond it is the peer's error."""
        if count > limit:
            raise self.broken(f"{what} of {count} bytes, at most {limit} are accepted")
        self.need(count)
        value = bytes(self._buffer[self._at : self._at + count])
        self._at += count
        return value

    def pull_string(self) -> str:
        """u8 length and as many bytes, no NUL (qemu_get_counted_string). Bytes outside ASCII are the peer's error."""
        length = self.pull_u8()
        raw = self.pull_bytes(length, 255, "a counted string")
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            raise self.broken(f"a name that is not ASCII: {raw!r}") from None

    def peek_u8(self, ahead: int = 0) -> int:
        self.need(ahead + 1)
        return self._buffer[self._at + ahead]

    def peek_view(self, count: int | None = None) -> memoryview:
        """What is here (or the next `count` bytes, NeedData if fewer), without moving. Release it before `feed`."""
        if count is not None:
            self.need(count)
        return memoryview(self._buffer)[self._at : None if count is None else self._at + count]

    def window(self) -> tuple[bytearray, int]:
        """The buffer itself and where the cursor stands in it, for numpy. No view may live when `feed` is called."""
        return self._buffer, self._at

    def find(self, needle: bytes, ahead: int = 0) -> int:
        """How far ahead of the cursor `needle` begins, looked for from `ahead` on; -1 when it is not here."""
        found = self._buffer.find(needle, self._at + ahead)
        return found if found < 0 else found - self._at

    def skip(self, count: int) -> None:
        self.need(count)
        self._at += count

    def broken(self, message: str, *, at: int | None = None) -> RemoteProtocolError:
        """The error to raise when the peer broke a rule; it carries this channel and the offset."""
        return RemoteProtocolError(message, channel=self.channel, offset=self.offset if at is None else at)
