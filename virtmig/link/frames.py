"""Frames: what stands before every message and every piece of a channel's bytes. Bytes to events, and back.

    preface   8 bytes, once each way on every connection: 89 "VMLINK" 0a
    header    u8 type, u8 flags, u16 zero, u32 length of what follows      (all integers big-endian)

A length is compared with its type's bound before anything of it is read or kept. Flag 0x01 (OPTIONAL) lets a receiver
that does not know the type skip the frame; without it an unknown type is an error. Other flags are errors.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link import messages
from virtmig.link.messages import Message

PREFACE = b"\x89VMLINK\n"
HEADER = struct.Struct(">BBHI")
POSITION = struct.Struct(">Q")
_DATA_HEADER = struct.Struct(">BBHIQ")  # both
OPTIONAL = 0x01
#: bytes of a channel in one DATA frame; long enough that headers do not count, short enough to interleave
DATA_LONGEST_BYTES = 1 << 20
#: what is skipped of a type that nobody here knows
OPTIONAL_LONGEST_BYTES = 64 * 1024


class FrameType(enum.IntEnum):
    """The numbers of version 1. 0x40 to 0x4f are kept for page batches (the pages transport), see PROTOCOL.md."""

    HELLO = 0x01
    PROPOSAL = 0x02
    ANSWER = 0x03
    AGREEMENT = 0x04
    OPEN_CHANNEL = 0x05
    CHANNEL_OPENED = 0x06
    ALL_OPEN = 0x07
    REFUSE = 0x08
    FAILED = 0x09
    FINISHED = 0x0A
    PING = 0x0B
    PONG = 0x0C
    RESUME = 0x0D
    RESUME_ACCEPTED = 0x0E
    ATTACHED = 0x0F
    DATA = 0x20
    ACK = 0x21
    END = 0x22


T = FrameType

#: the longest payload of each type, in bytes
BOUND: dict[FrameType, int] = {
    T.HELLO: 256 * 1024,
    T.PROPOSAL: 1024 * 1024,
    T.ANSWER: 1024 * 1024,
    T.AGREEMENT: 32 * 1024,
    T.OPEN_CHANNEL: 512,
    T.CHANNEL_OPENED: 512,
    T.ALL_OPEN: 512,
    T.REFUSE: 256 * 1024,
    T.FAILED: 8 * 1024,
    T.FINISHED: 512,
    T.PING: 512,
    T.PONG: 512,
    T.RESUME: 512,
    T.RESUME_ACCEPTED: 512,
    T.ATTACHED: 512,
    T.DATA: POSITION.size + DATA_LONGEST_BYTES,
    T.ACK: POSITION.size,
    T.END: POSITION.size,
}
#: the shortest of those that are not msgpack; DATA carries at least one byte
_SHORTEST = {T.DATA: POSITION.size + 1, T.ACK: POSITION.size, T.END: POSITION.size}

KIND: dict[FrameType, type[Message]] = {
    T.HELLO: messages.Hello,
    T.PROPOSAL: messages.Proposal,
    T.ANSWER: messages.Answer,
    T.AGREEMENT: messages.Agreement,
    T.OPEN_CHANNEL: messages.OpenChannel,
    T.CHANNEL_OPENED: messages.ChannelOpened,
    T.ALL_OPEN: messages.AllOpen,
    T.REFUSE: messages.Refuse,
    T.FAILED: messages.Failed,
    T.FINISHED: messages.Finished,
    T.PING: messages.Ping,
    T.PONG: messages.Pong,
    T.RESUME: messages.Resume,
    T.RESUME_ACCEPTED: messages.ResumeAccepted,
    T.ATTACHED: messages.Attached,
}
TYPE_OF: dict[type[Message], FrameType] = {kind: number for number, kind in KIND.items()}

#: what a connection may begin with, read by whoever accepted it
FIRST = frozenset({T.HELLO, T.OPEN_CHANNEL, T.RESUME})
#: what may come on the control connection
ON_CONTROL = frozenset(KIND) - {T.OPEN_CHANNEL, T.CHANNEL_OPENED, T.RESUME}
#: what may come on a channel's connection once it was opened, or while the dialling side waits for that
ON_CHANNEL = frozenset({T.CHANNEL_OPENED, T.RESUME_ACCEPTED, T.REFUSE, T.DATA, T.ACK, T.END})
PAGES_RESERVED = range(0x40, 0x50)


@dataclass(frozen=True, slots=True)
class Control:
    """A message, the whole frame it came in (for proofs over what was said), and where that began."""

    message: Message
    frame: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class DataPiece:
    """Bytes of the channel from `position` on. A view of what was fed: use it up before that buffer is used again."""

    position: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Acknowledged:
    received_up_to: int


@dataclass(frozen=True, slots=True)
class Ended:
    """No byte follows `position` in this direction."""

    position: int


FrameEvent = Control | DataPiece | Acknowledged | Ended


def encode_header(kind: int, length_bytes: int, flags: int = 0) -> bytes:
    """A frame's header. Raises LocalProtocolError for a length that the peer would refuse."""
    bound = BOUND[FrameType(kind)] if kind in BOUND else OPTIONAL_LONGEST_BYTES
    if length_bytes > bound:
        raise LocalProtocolError(f"{_called(kind)} of {length_bytes} bytes, at most {bound} are accepted")
    return HEADER.pack(kind, flags, 0, length_bytes)


def encode_message(message: Message) -> bytes:
    """A whole frame. Raises LocalProtocolError where a field or the frame is out of its bounds."""
    payload = messages.encode_payload(message)
    return encode_header(TYPE_OF[type(message)], len(payload)) + payload


def encode_data_header(position: int, length_bytes: int) -> bytes:
    """What stands before `length_bytes` bytes of a channel."""
    if length_bytes > DATA_LONGEST_BYTES:
        raise LocalProtocolError(f"DATA of {length_bytes} bytes, at most {DATA_LONGEST_BYTES} are accepted")
    return _DATA_HEADER.pack(T.DATA, 0, 0, POSITION.size + length_bytes, position)


def encode_ack(received_up_to: int) -> bytes:
    return encode_header(T.ACK, POSITION.size) + POSITION.pack(received_up_to)


def encode_end(position: int) -> bytes:
    return encode_header(T.END, POSITION.size) + POSITION.pack(position)


class FrameDecoder:
    """One direction of one connection: bytes to events.

    `channel` names it in errors. `accept` are the types that may come now; it may be changed between events, and a type
    outside of it is refused at its header. Kept are at most one control frame and what was fed and not yet read.
    """

    def __init__(self, channel: str = "control", accept: frozenset[FrameType] = ON_CONTROL) -> None:
        self.channel = channel
        self.accept = accept
        self._input = memoryview(b"")
        self._kept = bytearray()
        self._preface_left = len(PREFACE)
        self._offset = 0
        self._frame_at = 0
        self._skip_left = 0
        self._data_left = 0
        self._position = 0
        self._ended = False
        self._failure: RemoteProtocolError | None = None

    @property
    def offset(self) -> int:
        """How many bytes of the connection were read."""
        return self._offset

    @property
    def kept_bytes(self) -> int:
        """What is held until more comes."""
        return len(self._kept) + len(self._input)

    @property
    def between_frames(self) -> bool:
        """Nothing has begun that is not complete: only here may a connection end without a loss."""
        return not (self._preface_left or self._kept or self._skip_left or self._data_left or self._input)

    @property
    def wanted_bytes(self) -> int:
        """How many bytes to read at most so that nothing behind the next frame (or piece of DATA) is taken."""
        if self._preface_left or self._skip_left or self._data_left:
            return self._preface_left or self._skip_left or self._data_left
        if len(self._kept) < HEADER.size:
            return HEADER.size - len(self._kept)
        number, _, _, length = HEADER.unpack_from(self._kept)
        return HEADER.size + (POSITION.size if number == T.DATA else int(length)) - len(self._kept)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes, of any number. They are copied only where an earlier feed was not read to its end."""
        fed = memoryview(data).cast("B")
        self._input = memoryview(bytes(self._input) + bytes(fed)) if len(self._input) else fed

    def end(self) -> None:
        """No more bytes. Events then fail if that is in the middle of a frame."""
        self._ended = True

    def events(self) -> Iterator[FrameEvent]:
        """What is complete. Raises RemoteProtocolError on the first broken rule, and again on every later call."""
        if self._failure is not None:
            raise self._failure
        while True:
            try:
                event = self._next()
            except RemoteProtocolError as broken:
                self._failure = broken
                raise
            if event is None:
                break
            yield event
        if self._ended and not self.between_frames:
            self._failure = self._broken("ended inside a frame", self._offset)
            raise self._failure

    def _next(self) -> FrameEvent | None:
        while len(self._input):
            if self._preface_left:
                self._read_preface()
            elif self._skip_left:
                self._skip_left -= len(self._take(self._skip_left))
            elif self._data_left:
                piece = DataPiece(self._position, self._take(self._data_left))
                self._data_left -= len(piece.data)
                self._position += len(piece.data)
                return piece
            elif self._whole_data_header():
                continue
            elif (event := self._frame()) is not None:
                return event
        return None

    def _whole_data_header(self) -> bool:
        """Most headers stand before DATA and come in one piece. Whatever is odd about one is left to `_frame`."""
        if self._kept or len(self._input) < _DATA_HEADER.size or T.DATA not in self.accept:
            return False
        number, flags, reserved, length, position = _DATA_HEADER.unpack_from(self._input)
        if number != T.DATA or flags or reserved or not _SHORTEST[T.DATA] <= length <= BOUND[T.DATA]:
            return False
        self._input = self._input[_DATA_HEADER.size :]
        self._offset += _DATA_HEADER.size
        self._position, self._data_left = position, length - POSITION.size
        return True

    def _take(self, most: int) -> memoryview:
        taken, self._input = self._input[:most], self._input[most:]
        self._offset += len(taken)
        return taken

    def _read_preface(self) -> None:
        taken = self._take(self._preface_left)
        begin = len(PREFACE) - self._preface_left
        for number, (found, due) in enumerate(zip(taken, PREFACE[begin:], strict=False)):
            if found != due:
                raise self._broken(f"not a virtmig link: byte {found:#04x} in the place of {due:#04x}", begin + number)
        self._preface_left -= len(taken)

    def _frame(self) -> FrameEvent | None:
        """Collect a header and, for all but DATA and what is skipped, the payload behind it."""
        if not self._kept:
            self._frame_at = self._offset
        if len(self._kept) < HEADER.size:
            self._kept += self._take(HEADER.size - len(self._kept))
            if len(self._kept) < HEADER.size:
                return None
            self._check_header()
            if self._skip_left or not self._kept:
                return None
        number, _, _, length = HEADER.unpack_from(self._kept)
        whole = HEADER.size + (POSITION.size if number == T.DATA else length)
        self._kept += self._take(whole - len(self._kept))
        if len(self._kept) < whole:
            return None
        frame = bytes(self._kept)
        self._kept.clear()
        kind = FrameType(number)
        if kind in KIND:
            return self._message(kind, frame)
        (position,) = POSITION.unpack_from(frame, HEADER.size)
        if kind is T.ACK:
            return Acknowledged(position)
        if kind is T.END:
            return Ended(position)
        self._position, self._data_left = position, length - POSITION.size
        return None

    def _check_header(self) -> None:
        """Everything that can be said before the payload is read."""
        number, flags, reserved, length = HEADER.unpack(self._kept)
        at = self._frame_at
        if flags & ~OPTIONAL or reserved:
            raise self._broken(f"{_called(number)} with unknown flags {flags:#04x} {reserved:#06x}", at + 1)
        if number not in BOUND:
            if not flags & OPTIONAL:
                raise self._broken(f"{_called(number)} is not known here and not optional", at)
            if length > OPTIONAL_LONGEST_BYTES:
                raise self._broken(
                    f"{_called(number)} of {length} bytes, at most {OPTIONAL_LONGEST_BYTES} are accepted", at + 4
                )
            self._skip_left = length
            self._kept.clear()
            return
        kind = FrameType(number)
        if kind not in self.accept:
            due = ", ".join(sorted(item.name for item in self.accept))
            raise self._broken(f"{kind.name} cannot come here, only {due}", at)
        if length > BOUND[kind]:
            raise self._broken(f"{kind.name} of {length} bytes, at most {BOUND[kind]} are accepted", at + 4)
        if length < _SHORTEST.get(kind, 1):
            raise self._broken(f"{kind.name} of {length} bytes, at least {_SHORTEST.get(kind, 1)} are due", at + 4)

    def _message(self, kind: FrameType, frame: bytes) -> Control:
        try:
            message = messages.decode_payload(KIND[kind], memoryview(frame)[HEADER.size :])
        except RemoteProtocolError as error:
            raise self._broken(error.message, self._frame_at + HEADER.size) from None
        return Control(message, frame, self._frame_at)

    def _broken(self, message: str, at: int) -> RemoteProtocolError:
        return RemoteProtocolError(message, channel=self.channel, offset=at)


def _called(number: int) -> str:
    if number in BOUND:
        return FrameType(number).name
    if number in PAGES_RESERVED:
        return f"frame type {number:#04x} (kept for page batches)"
    return f"frame type {number:#04x}"
