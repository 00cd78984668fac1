"""The return path, bytes <-> events: what a destination says to its source on main's other direction.

    u16 type, u16 length, payload          (migration/migration.c: migrate_send_rp_message, source_return_path_thread)

RECV_BITMAP is followed, outside its length, by u64 size, the bitmap and an end mark (ramblock_recv_bitmap_send). A
request without a name means the block of the request before it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.wire import (
    MIGRATION_RESUME_ACK_VALUE,
    RAMBLOCK_RECV_BITMAP_ENDING,
    RETURN_PATH_LONGEST,
    TARGET_PAGE_BYTES,
    ReturnPath,
)

#: one bit a page: enough for a RAM block of 4 TiB
RECV_BITMAP_LONGEST_BYTES = 128 * 1024 * 1024

#: payload length of the messages that have one fixed length (rp_cmd_args in migration/migration.c)
_LENGTH: dict[ReturnPath, int] = {
    ReturnPath.SHUT: 4,
    ReturnPath.PONG: 4,
    ReturnPath.REQ_PAGES: 12,
    ReturnPath.RESUME_ACK: 4,
    ReturnPath.SWITCHOVER_ACK: 0,
}


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination is done: 0 is success and commits the migration; anything else is its failure."""

    value: int


@dataclass(frozen=True, slots=True)
class Pong:
    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """Send these pages first. `named`: the block's name was in the message, else it is the last request's."""

    block: str
    start_bytes: int
    length_bytes: int
    named: bool


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """The pages of a block that are here, after a broken postcopy: bit i (LSB first) is page i. Padded to 8 bytes."""

    block: str
    bitmap: bytes

    def pages(self, page_count: int) -> npt.NDArray[np.uint64]:
        """The numbers of the pages that were received; bits past `page_count` mean nothing."""
        bits = np.unpackbits(np.frombuffer(self.bitmap, np.uint8), bitorder="little")[:page_count]
        return np.flatnonzero(bits).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class ResumeAck:
    value: int = MIGRATION_RESUME_ACK_VALUE


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """A device of the destination is ready for the switchover (since 8.1)."""


ReturnPathEvent = Shut | Pong | RequestPages | ReceivedBitmap | ResumeAck | SwitchoverAck


class ReturnPathDecoder:
    """Bytes from a destination to events.

    `blocks` maps RAM block names to used lengths in bytes, None leaves names and ranges unchecked; it may be set later.
    `host_page_bytes` is what offsets and lengths of requests must be multiples of. `bitmap_limit_bytes` bounds the only
    long message. `switchover_acks` is how many are due; one more is an error (None: any number).
    """

    def __init__(
        self,
        *,
        channel: str = "return path",
        blocks: Mapping[str, int] | None = None,
        host_page_bytes: int = TARGET_PAGE_BYTES,
        bitmap_limit_bytes: int = RECV_BITMAP_LONGEST_BYTES,
        switchover_acks: int | None = None,
    ) -> None:
        self.blocks = blocks
        self._cursor = Cursor(channel)
        self._host_page_bytes = host_page_bytes
        self._bitmap_limit = bitmap_limit_bytes
        self._switchover_acks = switchover_acks
        self._last_block: str | None = None
        self._failure: RemoteProtocolError | None = None

    @property
    def offset(self) -> int:
        return self._cursor.offset

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes, of any number."""
        self._cursor.feed(data)

    def end(self) -> None:
        """No more bytes."""
        self._cursor.end()

    def events(self) -> Iterator[ReturnPathEvent]:
        """What is complete. Raises RemoteProtocolError on the first broken rule, and again on every later call."""
        if self._failure is not None:
            raise self._failure
        while self._cursor.available:
            try:
                with self._cursor.element():
                    event = self._message()
            except NeedData as need:
                if not self._cursor.ended:
                    return
                self._failure = self._cursor.broken(f"ended inside a message, {need.missing} bytes short")
                raise self._failure from None
            except RemoteProtocolError as broken:
                self._failure = broken
                raise
            yield event

    def _message(self) -> ReturnPathEvent:
        cursor = self._cursor
        at = cursor.offset
        number, length = cursor.pull_u16(), cursor.pull_u16()
        try:
            kind = ReturnPath(number)
        except ValueError:
            kind = ReturnPath.INVALID
        if kind is ReturnPath.INVALID:
            raise cursor.broken(f"received invalid message {number:#06x} of length {length}", at=at)
        if length > RETURN_PATH_LONGEST:
            raise cursor.broken(f"{kind.name} of {length} bytes, at most {RETURN_PATH_LONGEST} are accepted", at=at + 2)
        fixed = _LENGTH.get(kind)
        if fixed is not None and length != fixed:
            raise cursor.broken(f"{kind.name} of {length} bytes, expected {fixed}", at=at + 2)
        if kind is ReturnPath.SHUT:
            return Shut(cursor.pull_u32())
        if kind is ReturnPath.PONG:
            return Pong(cursor.pull_u32())
        if kind is ReturnPath.RESUME_ACK:
            value = cursor.pull_u32()
            if value != MIGRATION_RESUME_ACK_VALUE:
                raise cursor.broken(f"RESUME_ACK {value:#x}, expected {MIGRATION_RESUME_ACK_VALUE}", at=at + 4)
            return ResumeAck(value)
        if kind is ReturnPath.SWITCHOVER_ACK:
            return self._switchover_ack(at)
        if kind is ReturnPath.RECV_BITMAP:
            return self._bitmap(length, at)
        return self._request(kind, length, at)

    def _switchover_ack(self, at: int) -> SwitchoverAck:
        if self._switchover_acks is not None:
            if not self._switchover_acks:
                raise self._cursor.broken("a SWITCHOVER_ACK that nobody waits for", at=at)
            self._switchover_acks -= 1
        return SwitchoverAck()

    def _name(self, expected_bytes: int, kind: ReturnPath, at: int) -> str:
        cursor = self._cursor
        length = cursor.peek_u8()
        if 1 + length != expected_bytes:
            raise cursor.broken(
                f"{kind.name}: a name of {length} bytes in the place of {expected_bytes - 1}", at=at + 2
            )
        name = cursor.pull_string()
        if not name:
            raise cursor.broken(f"{kind.name} without a block name", at=at)
        if self.blocks is not None and name not in self.blocks:
            raise cursor.broken(f"{kind.name} for unknown RAM block {name!r}", at=at)
        return name

    def _request(self, kind: ReturnPath, length: int, at: int) -> RequestPages:
        cursor = self._cursor
        named = kind is ReturnPath.REQ_PAGES_ID
        if named and length < 13:
            raise cursor.broken(f"REQ_PAGES_ID of {length} bytes, at least 13 are expected", at=at + 2)
        cursor.need(length)
        start, size = cursor.pull_u64(), cursor.pull_u32()
        block = self._name(length - 12, kind, at) if named else self._last_block
        if block is None:
            raise cursor.broken("REQ_PAGES before any request that names a block", at=at)
        if not size:
            raise cursor.broken("a request for no pages", at=at + 12)
        if start % self._host_page_bytes or size % self._host_page_bytes:
            raise cursor.broken(
                f"a request for {size:#x} bytes at {start:#x}, not whole pages of {self._host_page_bytes:#x}", at=at + 4
            )
        if self.blocks is not None and start + size > self.blocks[block]:
            raise cursor.broken(
                f"a request for {size:#x} bytes at {start:#x} of {block}, which has {self.blocks[block]:#x}", at=at + 4
            )
        self._last_block = block
        return RequestPages(block, start, size, named)

    def _bitmap(self, length: int, at: int) -> ReceivedBitmap:
        cursor = self._cursor
        if length < 1:
            raise cursor.broken("RECV_BITMAP without a block name", at=at + 2)
        cursor.need(length)
        block = self._name(length, ReturnPath.RECV_BITMAP, at)
        size_at = cursor.offset
        size = cursor.pull_u64()
        if self.blocks is not None:
            expected = bitmap_bytes(self.blocks[block])
            if size != expected:
                raise cursor.broken(f"a bitmap of {size} bytes for {block}, expected {expected}", at=size_at)
        if size % 8:
            raise cursor.broken(f"a bitmap of {size} bytes, not a multiple of 8", at=size_at)
        bitmap = cursor.pull_bytes(size, self._bitmap_limit, "a received bitmap")
        ending = cursor.pull_u64()
        if ending != RAMBLOCK_RECV_BITMAP_ENDING:
            raise cursor.broken(
                f"end mark {ending:#018x} after a bitmap, expected {RAMBLOCK_RECV_BITMAP_ENDING:#018x}",
                at=cursor.offset - 8,
            )
        return ReceivedBitmap(block, bitmap)


def bitmap_bytes(used_length_bytes: int, page_bytes: int = TARGET_PAGE_BYTES) -> int:
    """The length of a block's bitmap: a bit a page, rounded up to 8 bytes."""
    pages = -(-used_length_bytes // page_bytes)
    return -(-pages // 64) * 8


def encode_return_path(event: ReturnPathEvent) -> bytes:
    """One message. Raises LocalProtocolError for what a source refuses whatever its state."""
    if isinstance(event, Shut):
        return _message(ReturnPath.SHUT, struct.pack(">I", event.value))
    if isinstance(event, Pong):
        return _message(ReturnPath.PONG, struct.pack(">I", event.value))
    if isinstance(event, ResumeAck):
        if event.value != MIGRATION_RESUME_ACK_VALUE:
            raise LocalProtocolError(f"RESUME_ACK {event.value:#x}, a source takes 1 only", channel="return path")
        return _message(ReturnPath.RESUME_ACK, struct.pack(">I", event.value))
    if isinstance(event, SwitchoverAck):
        return _message(ReturnPath.SWITCHOVER_ACK, b"")
    if isinstance(event, ReceivedBitmap):
        if len(event.bitmap) % 8:
            raise LocalProtocolError("a bitmap is a multiple of 8 bytes", channel="return path")
        return b"".join(
            (
                _message(ReturnPath.RECV_BITMAP, _counted(event.block)),
                struct.pack(">Q", len(event.bitmap)),
                event.bitmap,
                struct.pack(">Q", RAMBLOCK_RECV_BITMAP_ENDING),
            )
        )
    if not 0 < event.length_bytes < 1 << 32:
        raise LocalProtocolError(f"a request for {event.length_bytes} bytes", channel="return path")
    where = struct.pack(">QI", event.start_bytes, event.length_bytes)
    if event.named:
        return _message(ReturnPath.REQ_PAGES_ID, where + _counted(event.block))
    return _message(ReturnPath.REQ_PAGES, where)


class PageRequester:
    """Requests as a destination writes them: the block is named only when it is not the last one's.

    `forget` after a reconnection: the new source knows no last block.
    """

    def __init__(self) -> None:
        self._last_block: str | None = None

    def request(self, block: str, start_bytes: int, length_bytes: int) -> bytes:
        named = block != self._last_block
        message = encode_return_path(RequestPages(block, start_bytes, length_bytes, named))
        self._last_block = block
        return message

    def forget(self) -> None:
        self._last_block = None


def _counted(name: str) -> bytes:
    raw = name.encode("ascii", "replace")
    if not 0 < len(raw) < 256 or not name.isascii():
        raise LocalProtocolError(f"{name!r} is no name of a RAM block", channel="return path")
    return bytes([len(raw)]) + raw


def _message(kind: ReturnPath, payload: bytes) -> bytes:
    return struct.pack(">HH", kind, len(payload)) + payload
