"""A named, resumable byte channel: DATA, ACK and END frames, and a window of what the peer has not acknowledged.

Positions count the bytes of one direction from 0. END takes one position of its own behind the last byte, as a FIN
does, so that "received up to N" says of everything whether it arrived. What was written is kept until it is
acknowledged; after a broken connection `resume` hands out exactly the rest. Each direction ends for itself.

Received and acknowledged differ: bytes are received when the next ones are wanted, and acknowledged when whoever reads
them says that they are safe (`consumed`). So a reader never holds more than a window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link.frames import (
    DATA_LONGEST_BYTES,
    Acknowledged,
    DataPiece,
    Ended,
    FrameEvent,
    encode_ack,
    encode_data_header,
    encode_end,
)

Buffer = bytes | memoryview

#: a shorter piece is copied to the one before it: its view would take more than what is in it (pages are requested so)
_SMALL_BYTES = 64
#: and no more is put together
_COLLECTED_BYTES = 64 * 1024


class Outgoing:
    """One direction, as its writer sees it. At most `window_bytes` are kept; nothing more can be written then.

    What is written is kept by reference, unless it is small: it must not change until it is acknowledged.
    """

    def __init__(self, name: str, window_bytes: int) -> None:
        self.name = name
        self.window_bytes = window_bytes
        self.ended = False
        self.acknowledged = 0
        self.position = 0  # of the next byte
        self.connected = True
        self._kept: deque[memoryview | bytearray] = deque()
        self._sent = 0  # how far it was handed out for sending; an acknowledgement beyond is a lie

    @property
    def kept_bytes(self) -> int:
        """Written and not acknowledged."""
        return self.position - min(self.acknowledged, self.position)

    @property
    def room_bytes(self) -> int:
        """How much may be written now."""
        return 0 if self.ended else self.window_bytes - self.kept_bytes

    @property
    def done(self) -> bool:
        """Ended, and all of it acknowledged, the end too."""
        return self.ended and self.acknowledged > self.position

    def write(self, data: bytes | memoryview) -> list[Buffer]:
        """DATA frames for `data`, as buffers for sendmsg. Raises LocalProtocolError beyond the window or the end."""
        view = memoryview(data).cast("B").toreadonly()
        if self.ended:
            raise LocalProtocolError("written behind the end", channel=self.name, offset=self.position)
        if len(view) > self.room_bytes:
            raise LocalProtocolError(
                f"{len(view)} bytes written, the window has room for {self.room_bytes}",
                channel=self.name,
                offset=self.position,
            )
        if not len(view):
            return []
        begin = self.position
        self._keep(view)
        self.position += len(view)
        if not self.connected:
            return []
        self._sent = self.position
        return list(_data_frames(begin, [view]))

    def _keep(self, view: memoryview) -> None:
        if len(view) >= _SMALL_BYTES:
            self._kept.append(view)
            return
        last = self._kept[-1] if self._kept else None
        if isinstance(last, bytearray) and len(last) < _COLLECTED_BYTES:
            last += view
        else:
            self._kept.append(bytearray(view))

    def end(self) -> list[Buffer]:
        """No more will be written; reading goes on."""
        if self.ended:
            raise LocalProtocolError("ended twice", channel=self.name, offset=self.position)
        self.ended = True
        if not self.connected:
            return []
        self._sent = self.position + 1
        return [encode_end(self.position)]

    def acknowledge(self, received_up_to: int) -> int:
        """The peer has everything before that; how many bytes are free again. Raises RemoteProtocolError."""
        self._check("acknowledged", received_up_to)
        before, self.acknowledged = self.kept_bytes, received_up_to
        free = drop = before - self.kept_bytes
        while drop:
            first = self._kept[0]
            if len(first) > drop:
                self._kept[0] = first[drop:]
                break
            drop -= len(self._kept.popleft())
        return free

    def resume(self, received_up_to: int) -> list[Buffer]:
        """Everything the peer does not have, as frames for the new connection. Raises RemoteProtocolError."""
        self._check("received", received_up_to)
        self.connected = True
        begin = min(received_up_to, self.position)
        skip, rest = begin - min(self.acknowledged, self.position), []
        for view in self._kept:
            if len(view) > skip:
                # what is collected goes on growing, which it cannot while there are views of it
                rest.append(view[skip:] if isinstance(view, memoryview) else memoryview(bytes(view[skip:])))
            skip = max(0, skip - len(view))
        frames = list(_data_frames(begin, rest))
        if self.ended and received_up_to <= self.position:
            frames.append(encode_end(self.position))
        self._sent = self.position + self.ended
        return frames

    def _check(self, what: str, received_up_to: int) -> None:
        if not self.acknowledged <= received_up_to <= self._sent:
            raise RemoteProtocolError(
                f"{what} up to {received_up_to}, not between {self.acknowledged} and {self._sent}",
                channel=self.name,
                offset=received_up_to,
            )


class Incoming:
    """One direction, as its reader sees it. An ACK is due after every `ack_every_bytes`, and for the end.

    What is acknowledged is gone from the writer's window, so acknowledge (`consume`) what is safe: written on, or kept.
    """

    def __init__(self, name: str, ack_every_bytes: int) -> None:
        self.name = name
        self.ended = False
        self.received_up_to = 0  # with the end's own position
        self.connected = True
        self._consumed = 0
        self._acknowledged = 0
        self._ack_every = ack_every_bytes

    def data(self, piece: DataPiece) -> memoryview:
        """The bytes, when they are the next ones. Raises RemoteProtocolError for a gap, an overlap, behind the end."""
        self._check(piece.position, "DATA")
        self.received_up_to += len(piece.data)
        return piece.data

    def end(self, ended: Ended) -> None:
        self._check(ended.position, "END")
        self.ended = True
        self.received_up_to += 1

    def consume(self, count: int) -> list[Buffer]:
        """`count` more bytes are safe here (the end counts one); an ACK when one is due."""
        if self._consumed + count > self.received_up_to:
            raise LocalProtocolError("more consumed than received", channel=self.name, offset=self.received_up_to)
        self._consumed += count
        finished = self.ended and self._consumed == self.received_up_to
        if self._consumed - self._acknowledged < (1 if finished else self._ack_every):
            return []
        return self.acknowledge()

    def acknowledge(self) -> list[Buffer]:
        """An ACK now, when there is anything new to say."""
        if self._acknowledged == self._consumed or not self.connected:
            return []
        self._acknowledged = self._consumed
        return [encode_ack(self._consumed)]

    def resume(self) -> list[Buffer]:
        """An ACK of all that is safe: the last one may have been lost with the connection."""
        self.connected = True
        self._acknowledged = 0
        return self.acknowledge()

    @property
    def consumed_up_to(self) -> int:
        """What may be told to a peer that resumes after this side was started again: the rest is lost with it."""
        return self._consumed

    def _check(self, position: int, what: str) -> None:
        if self.ended:
            problem = f"{what} behind the end"
        elif position != self.received_up_to:
            problem = f"{what} at {position}, {'a gap behind' if position > self.received_up_to else 'again before'} "
            problem += str(self.received_up_to)
        else:
            return
        raise RemoteProtocolError(problem, channel=self.name, offset=self.received_up_to)


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes to be carried on. A view of what was fed to the decoder; say `consumed` once they are safe."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class EndReceived:
    """The peer will write no more. Counts one position for `consumed`."""


@dataclass(frozen=True, slots=True)
class RoomMade:
    """The peer acknowledged: so many bytes may be written again."""

    free_bytes: int


ChannelEvent = Received | EndReceived | RoomMade


class ResumableChannel:
    """Both directions of one channel. Feed it its decoder's events; send what it returns, in order.

    Between `broken` and `resume` there is no connection: what is written is kept, and nothing is returned.
    """

    def __init__(self, name: str, window_bytes: int, *, ack_every_bytes: int | None = None) -> None:
        """`ack_every_bytes`: a quarter of the window unless told otherwise; more than the window would stall it."""
        every = window_bytes // 4 if ack_every_bytes is None else ack_every_bytes
        if not 0 < every <= window_bytes:
            raise LocalProtocolError(f"an ACK every {every} bytes in a window of {window_bytes}", channel=name)
        self.name = name
        self.outgoing = Outgoing(name, window_bytes)
        self.incoming = Incoming(name, every)

    @property
    def received_up_to(self) -> int:
        """What Resume and ResumeAccepted say of this side."""
        return self.incoming.received_up_to

    @property
    def done(self) -> bool:
        """Ended both ways, everything acknowledged by the peer and by us."""
        return self.outgoing.done and self.incoming.ended and self.incoming.consumed_up_to == self.received_up_to

    def write(self, data: bytes | memoryview) -> list[Buffer]:
        """See Outgoing.write."""
        return self.outgoing.write(data)

    def end(self) -> list[Buffer]:
        """Half-close: nothing more is written, reading goes on."""
        return self.outgoing.end()

    def consumed(self, count: int) -> list[Buffer]:
        """So much of what was received is safe; an ACK when one is due."""
        return self.incoming.consume(count)

    def receive(self, event: FrameEvent) -> ChannelEvent:
        """What a frame means. Raises RemoteProtocolError."""
        if isinstance(event, DataPiece):
            return Received(self.incoming.data(event))
        if isinstance(event, Ended):
            self.incoming.end(event)
            return EndReceived()
        if isinstance(event, Acknowledged):
            return RoomMade(self.outgoing.acknowledge(event.received_up_to))
        raise RemoteProtocolError(
            f"{type(event.message).__name__} on an open channel", channel=self.name, offset=event.offset
        )

    def broken(self) -> None:
        """The connection is gone: nothing more may be fed from it, nothing more is handed out for it."""
        self.outgoing.connected = self.incoming.connected = False

    def resume(self, received_up_to: int) -> list[Buffer]:
        """A new connection, and how far the peer came: what to send on it: an ACK, and exactly the rest."""
        rest = self.outgoing.resume(received_up_to)
        return [*self.incoming.resume(), *rest]


def _data_frames(position: int, pieces: list[memoryview]) -> Iterator[Buffer]:
    for view in pieces:
        for begin in range(0, len(view), DATA_LONGEST_BYTES):
            part = view[begin : begin + DATA_LONGEST_BYTES]
            yield encode_data_header(position, len(part))
            yield part
            position += len(part)
