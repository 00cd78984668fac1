"""A resumable channel: every byte once and in order over any pattern of cuts, and never more kept than the window."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link.channel import EndReceived, Outgoing, Received, ResumableChannel, RoomMade
from virtmig.link.frames import (
    ON_CHANNEL,
    PREFACE,
    Acknowledged,
    DataPiece,
    Ended,
    FrameDecoder,
    encode_ack,
    encode_message,
)
from virtmig.link.messages import Reason, Refuse

WINDOW = 64


class End:
    """One end of a channel with its connection: what it sends lies in `wire` until the other end takes it."""

    def __init__(self, name: str, ack_every: int) -> None:
        self.channel = ResumableChannel(name, WINDOW, ack_every_bytes=ack_every)
        self.wire = bytearray()
        self.unsafe: deque[int] = deque()
        self.got = bytearray()
        self.ended = 0
        self.connect()

    def connect(self) -> None:
        self.wire.clear()
        self.decoder = FrameDecoder(self.channel.name, ON_CHANNEL)
        self.decoder.feed(PREFACE)
        assert list(self.decoder.events()) == []

    def send(self, buffers: list) -> None:
        for buffer in buffers:
            self.wire += buffer

    def take(self, other: End, count: int) -> None:
        data = bytes(other.wire[:count])
        del other.wire[:count]
        self.decoder.feed(data)
        for event in self.decoder.events():
            found = self.channel.receive(event)
            if isinstance(found, Received):
                self.got += found.data
                self.unsafe.append(len(found.data))
            elif isinstance(found, EndReceived):
                self.ended += 1
                self.unsafe.append(1)

    def make_safe(self) -> None:
        if self.unsafe:
            self.send(self.channel.consumed(self.unsafe.popleft()))


def cut(one: End, other: End) -> None:
    for end in (one, other):
        end.channel.broken()
        end.connect()


def reconnect(one: End, other: End) -> None:
    up_to = one.channel.received_up_to, other.channel.received_up_to
    one.send(one.channel.resume(up_to[1]))
    other.send(other.channel.resume(up_to[0]))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.integers(1, WINDOW)),
        st.tuples(st.just("take"), st.integers(0, 1), st.integers(1, 90)),
        st.tuples(st.just("safe"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("cut"), st.just(0), st.integers(0, 1)),
        st.tuples(st.just("end"), st.integers(0, 1), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(1, WINDOW), st.integers(1, WINDOW))
def test_any_pattern_of_cuts_delivers_every_byte_once_in_order(plan: list, every: int, other_every: int) -> None:
    ends = End("main", every), End("main", other_every)
    written = bytearray(), bytearray()
    connected = True
    for verb, who, number in plan:
        end, peer = ends[who], ends[1 - who]
        if verb == "write":
            count = min(number, end.channel.outgoing.room_bytes)
            data = bytes((len(written[who]) + step) % 251 for step in range(count))
            written[who].extend(data)
            if data:
                end.send(end.channel.write(data))
        elif verb == "take":
            end.take(peer, number)
        elif verb == "safe":
            end.make_safe()
        elif verb == "end" and not end.channel.outgoing.ended:
            end.send(end.channel.end())
        elif verb == "cut":
            cut(*ends)
            if connected := bool(number):
                reconnect(*ends)
        if verb in ("write", "end") and not connected:
            assert not end.wire
        for each in ends:
            assert each.channel.outgoing.kept_bytes <= WINDOW
            assert sum(each.unsafe) <= WINDOW + 1
    cut(*ends)
    reconnect(*ends)
    for end in ends:
        if not end.channel.outgoing.ended:
            end.send(end.channel.end())
    while any(end.wire or end.unsafe for end in ends):
        for end, peer in (ends, ends[::-1]):
            end.take(peer, len(peer.wire))
            end.make_safe()
    for who, end in enumerate(ends):
        assert end.got == written[1 - who]
        assert end.ended == 1
        assert end.channel.done
        assert end.channel.outgoing.kept_bytes == 0


def test_the_rest_is_replayed_from_exactly_where_the_peer_is_and_nothing_is_copied() -> None:
    channel = ResumableChannel("main", 1 << 20)
    data = bytes(range(100))
    sent = channel.write(data)
    assert sent[1].obj is data  # type: ignore[union-attr]
    channel.write(b"more")
    channel.receive(Acknowledged(10))
    channel.broken()
    replayed = channel.resume(40)
    assert b"".join(replayed[1::2]) == data[40:] + b"more"
    assert replayed[1].obj is data  # type: ignore[union-attr]
    assert channel.outgoing.kept_bytes == 94  # received is not yet acknowledged


def test_a_long_write_is_cut_into_frames_that_the_decoder_takes() -> None:
    channel = ResumableChannel("main", 4 << 20)
    decoder = FrameDecoder("main", ON_CHANNEL)
    data = bytes(3 << 20) + b"x"
    decoder.feed(PREFACE + b"".join(channel.write(data)))
    pieces = list(decoder.events())
    assert [len(piece.data) for piece in pieces] == [1 << 20] * 3 + [1]
    assert [piece.position for piece in pieces] == [0, 1 << 20, 2 << 20, 3 << 20]


def test_a_full_window_takes_no_more_until_it_is_acknowledged() -> None:
    channel = ResumableChannel("main", 8, ack_every_bytes=4)
    channel.write(b"12345678")
    assert channel.outgoing.room_bytes == 0
    with pytest.raises(LocalProtocolError, match="room for 0"):
        channel.write(b"9")
    assert channel.receive(Acknowledged(3)) == RoomMade(3)
    assert channel.outgoing.room_bytes == 3
    assert channel.write(b"") == []


def test_each_direction_ends_for_itself() -> None:
    channel = ResumableChannel("main", 8, ack_every_bytes=4)
    channel.end()
    with pytest.raises(LocalProtocolError, match="behind the end"):
        channel.write(b"1")
    with pytest.raises(LocalProtocolError, match="ended twice"):
        channel.end()
    assert channel.receive(DataPiece(0, memoryview(b"still"))) == Received(memoryview(b"still"))
    assert not channel.done
    assert channel.receive(Acknowledged(1)) == RoomMade(0)
    assert channel.outgoing.done
    channel.receive(Ended(5))
    assert channel.consumed(5) == [encode_ack(5)]
    assert channel.consumed(1) == [encode_ack(6)]
    assert channel.done


def test_an_ack_comes_after_so_many_bytes_and_for_the_end_and_again_after_a_cut() -> None:
    channel = ResumableChannel("main", 100, ack_every_bytes=10)
    channel.receive(DataPiece(0, memoryview(bytes(25))))
    assert channel.consumed(9) == []
    assert channel.consumed(1) == [encode_ack(10)]
    assert channel.consumed(3) == []
    assert channel.incoming.acknowledge() == [encode_ack(13)]
    assert channel.incoming.acknowledge() == []
    channel.broken()
    assert channel.consumed(12) == []
    assert channel.resume(0) == [encode_ack(25)]
    with pytest.raises(LocalProtocolError, match="more consumed than received"):
        channel.consumed(1)


@pytest.mark.parametrize("up_to", [4, 11, 12, 1 << 40])
def test_an_ack_of_what_was_never_sent_or_was_acknowledged_before_is_refused(up_to: int) -> None:
    for act in ("acknowledge", "resume"):
        outgoing = Outgoing("parallel 3", 64)
        outgoing.write(b"0123456789")
        outgoing.acknowledge(5)
        with pytest.raises(RemoteProtocolError, match="not between 5 and 10") as broken:
            getattr(outgoing, act)(up_to)
        assert (broken.value.channel, broken.value.offset) == ("parallel 3", up_to)


def test_what_was_written_without_a_connection_was_never_sent() -> None:
    outgoing = Outgoing("main", 64)
    outgoing.connected = False
    assert outgoing.write(b"0123") == []
    assert outgoing.end() == []
    with pytest.raises(RemoteProtocolError):
        outgoing.acknowledge(1)
    assert len(outgoing.resume(0)) == 3
    outgoing.acknowledge(5)
    assert outgoing.done


def test_the_end_is_replayed_only_when_the_peer_does_not_have_it() -> None:
    outgoing = Outgoing("main", 64)
    outgoing.write(b"0123")
    outgoing.end()
    assert len(outgoing.resume(4)) == 1
    assert outgoing.resume(5) == []
    assert not outgoing.done


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (DataPiece(4, memoryview(b"x")), "again before 5"),
        (DataPiece(6, memoryview(b"x")), "a gap behind 5"),
        (Ended(4), "again before 5"),
        (Ended(6), "a gap behind 5"),
    ],
)
def test_gaps_and_overlaps_are_refused(event: DataPiece | Ended, words: str) -> None:
    channel = ResumableChannel("storage 1", 64)
    channel.receive(DataPiece(0, memoryview(b"01234")))
    with pytest.raises(RemoteProtocolError, match=words) as broken:
        channel.receive(event)
    assert (broken.value.channel, broken.value.offset) == ("storage 1", 5)


@pytest.mark.parametrize("event", [DataPiece(2, memoryview(b"x")), Ended(2), Ended(1)])
def test_nothing_comes_behind_the_end(event: DataPiece | Ended) -> None:
    channel = ResumableChannel("main", 64)
    channel.receive(DataPiece(0, memoryview(b"0")))
    channel.receive(Ended(1))
    with pytest.raises(RemoteProtocolError, match="behind the end"):
        channel.receive(event)


def test_acks_that_could_never_come_are_refused_at_once() -> None:
    for every in (0, 65):
        with pytest.raises(LocalProtocolError, match="an ACK every"):
            ResumableChannel("main", 64, ack_every_bytes=every)


def test_a_message_on_an_open_channel_is_refused_with_its_place() -> None:
    decoder = FrameDecoder("main", ON_CHANNEL)
    refusal = encode_message(Refuse(reasons=(Reason("channel", "late"),)))
    decoder.feed(PREFACE + refusal)
    [event] = decoder.events()
    with pytest.raises(RemoteProtocolError, match="Refuse on an open channel") as broken:
        ResumableChannel("main", 64).receive(event)
    assert (broken.value.channel, broken.value.offset) == ("main", len(PREFACE))
    assert decoder.offset == len(PREFACE + refusal)
