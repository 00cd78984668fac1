"""Frames: whole, bytewise, cut anywhere, with bytes behind; bounds before reading; what nobody knows."""

from __future__ import annotations

import ast
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link.frames import (
    BOUND,
    FIRST,
    KIND,
    ON_CHANNEL,
    ON_CONTROL,
    PREFACE,
    Acknowledged,
    Control,
    DataPiece,
    Ended,
    FrameDecoder,
    FrameType,
    encode_ack,
    encode_data_header,
    encode_end,
    encode_header,
    encode_message,
)
from virtmig.link.messages import MESSAGES, Failed, Ping, Pong

ALL = frozenset(FrameType)
STREAM = (
    PREFACE
    + encode_message(Ping(number=7))
    + bytes.fromhex("7f 01 0000 00000003") + b"???"
    + encode_data_header(40, 5) + b"bytes"
    + bytes.fromhex("80 01 0000 00000000")
    + encode_ack(9)
    + encode_message(Failed(reason="no"))
    + encode_end(45)
)  # fmt: skip


def decode(*chunks: bytes, accept: frozenset[FrameType] = ALL, end: bool = False) -> list:
    """Events, with the pieces of DATA joined."""
    decoder, found = FrameDecoder("main", accept), []
    for chunk in chunks:
        decoder.feed(chunk)
        for event in decoder.events():
            if isinstance(event, DataPiece):
                last = found[-1] if found else None
                if isinstance(last, tuple) and last[0] + len(last[1]) == event.position:
                    found[-1] = last[0], last[1] + bytes(event.data)
                else:
                    found.append((event.position, bytes(event.data)))
            else:
                found.append(event.message if isinstance(event, Control) else event)
    if end:
        decoder.end()
        assert list(decoder.events()) == []
    return found


EVENTS = [Ping(number=7), (40, b"bytes"), Acknowledged(9), Failed(reason="no"), Ended(45)]


def test_whole_bytewise_and_cut_at_every_byte_are_the_same() -> None:
    assert decode(STREAM, end=True) == EVENTS
    assert decode(*(STREAM[at : at + 1] for at in range(len(STREAM))), end=True) == EVENTS
    for at in range(len(STREAM)):
        assert decode(STREAM[:at], STREAM[at:], end=True) == EVENTS


def test_an_end_inside_a_frame_is_truncated_and_between_frames_it_is_not() -> None:
    whole = set()
    for at in range(len(STREAM) + 1):
        decoder = FrameDecoder("main", ALL)
        decoder.feed(STREAM[:at])
        list(decoder.events())
        decoder.end()
        if decoder.between_frames:
            whole.add(at)
            assert list(decoder.events()) == []
        else:
            with pytest.raises(RemoteProtocolError, match="ended inside a frame") as broken:
                list(decoder.events())
            assert broken.value.offset == at
    assert len(whole) == 8  # behind the preface and behind each of the seven frames


def test_bytes_behind_a_message_that_was_wanted_alone_are_refused_with_their_place() -> None:
    decoder = FrameDecoder("control", ON_CONTROL)
    decoder.feed(STREAM)
    with pytest.raises(RemoteProtocolError, match="DATA cannot come here") as broken:
        list(decoder.events())
    assert broken.value.channel == "control"
    assert broken.value.offset == STREAM.index(encode_data_header(40, 5))
    with pytest.raises(RemoteProtocolError) as again:
        list(decoder.events())
    assert again.value is broken.value


def test_what_may_come_can_change_between_two_events() -> None:
    decoder = FrameDecoder("?", FIRST | {FrameType.PING})
    decoder.feed(PREFACE + encode_message(Ping(number=1)) + encode_ack(0))
    events = decoder.events()
    assert isinstance(next(events), Control)
    decoder.accept = ON_CHANNEL
    assert next(events) == Acknowledged(0)


def test_a_feed_that_was_not_read_is_not_lost() -> None:
    decoder = FrameDecoder("main", ALL)
    for byte in STREAM[:20]:
        decoder.feed(bytes([byte]))
    assert [event.message for event in decoder.events()] == []
    decoder.feed(STREAM[20:])
    assert len(list(decoder.events())) == 5


def test_a_control_event_carries_its_whole_frame() -> None:
    decoder = FrameDecoder()
    frame = encode_message(Pong(number=3))
    decoder.feed(PREFACE + frame)
    [event] = decoder.events()
    assert (event.frame, event.offset) == (frame, len(PREFACE))


@pytest.mark.parametrize("at", range(len(PREFACE)))
def test_another_protocol_is_refused_at_its_first_wrong_byte(at: int) -> None:
    decoder = FrameDecoder()
    wrong = PREFACE[:at] + b"\x00"
    for byte in wrong:
        decoder.feed(bytes([byte]))
        if decoder.kept_bytes == 1 and byte == 0:
            with pytest.raises(RemoteProtocolError, match="not a virtmig link") as broken:
                list(decoder.events())
            assert broken.value.offset == at
        else:
            assert list(decoder.events()) == []


@pytest.mark.parametrize("kind", FrameType)
def test_a_length_over_the_bound_is_refused_at_the_header(kind: FrameType) -> None:
    decoder = FrameDecoder("main", ALL)
    decoder.feed(PREFACE + struct.pack(">BBHI", kind, 0, 0, BOUND[kind] + 1))
    with pytest.raises(RemoteProtocolError, match=rf"{kind.name} of {BOUND[kind] + 1} bytes, at most") as broken:
        list(decoder.events())
    assert broken.value.offset == len(PREFACE) + 4
    with pytest.raises(LocalProtocolError, match="at most"):
        encode_header(kind, BOUND[kind] + 1)


@pytest.mark.parametrize("kind", FrameType)
def test_a_frame_that_is_too_short_is_refused_at_the_header(kind: FrameType) -> None:
    decoder = FrameDecoder("main", ALL)
    length = {FrameType.DATA: 8, FrameType.ACK: 7, FrameType.END: 7}.get(kind, 0)
    decoder.feed(PREFACE + struct.pack(">BBHI", kind, 0, 0, length))
    with pytest.raises(RemoteProtocolError, match="are due"):
        list(decoder.events())


def test_the_bound_counts_before_anything_is_kept() -> None:
    decoder = FrameDecoder("main", ALL)
    decoder.feed(PREFACE + struct.pack(">BBHI", FrameType.PROPOSAL, 0, 0, BOUND[FrameType.PROPOSAL]))
    for _ in range(200):
        decoder.feed(bytes(1000))
        assert list(decoder.events()) == []
        assert decoder.kept_bytes <= BOUND[FrameType.PROPOSAL] + 8
    assert decoder.kept_bytes == 200_008


def test_data_and_what_is_skipped_are_never_kept() -> None:
    decoder = FrameDecoder("main", ALL)
    decoder.feed(PREFACE + encode_data_header(0, 1 << 20) + bytes.fromhex("ee01000000010000")[:0])
    list(decoder.events())
    for at in range(0, 1 << 20, 1 << 16):
        fed = bytes(1 << 16)
        decoder.feed(fed)
        [piece] = decoder.events()
        assert (piece.position, piece.data.obj is fed) == (at, True)
        assert decoder.kept_bytes == 0
    decoder.feed(struct.pack(">BBHI", 0xEE, 1, 0, 1 << 16) + bytes(1 << 15))
    assert list(decoder.events()) == []
    assert decoder.kept_bytes == 0
    assert not decoder.between_frames


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("40 00 0000 00000001", "0x40 .kept for page batches. is not known here"),
        ("4f 00 0000 00000001", "0x4f .kept for page batches. is not known here"),
        ("ff 00 0000 00000001", "frame type 0xff is not known here and not optional"),
        ("00 00 0000 00000001", "frame type 0x00 is not known"),
        ("ee 01 0000 00010001", "0xee of 65537 bytes, at most 65536"),
        ("0b 02 0000 00000001", "PING with unknown flags 0x02"),
        ("0b 00 0001 00000001", "PING with unknown flags 0x00 0x0001"),
    ],
)
def test_what_nobody_knows_is_refused_by_name_or_number(header: str, words: str) -> None:
    decoder = FrameDecoder("main", ALL)
    decoder.feed(PREFACE + bytes.fromhex(header))
    with pytest.raises(RemoteProtocolError, match=words):
        list(decoder.events())


def test_every_message_has_a_type_and_every_type_a_bound() -> None:
    assert set(KIND.values()) == set(MESSAGES)
    assert len(KIND) == len(MESSAGES)
    assert set(BOUND) == set(FrameType)
    assert set(FrameType) == FIRST | ON_CONTROL | ON_CHANNEL
    assert not {int(kind) for kind in FrameType} & set(range(0x40, 0x50))


def test_nothing_here_reads_a_clock_or_does_input_or_output() -> None:
    allowed = {
        "abc",
        "collections",
        "dataclasses",
        "enum",
        "hashlib",
        "hmac",
        "struct",
        "typing",
        "msgspec",
        "__future__",
    }
    below = {"agreement", "errors", "facts", "request", "transitions", "link"}
    for path in (Path(__file__).parents[2] / "virtmig/link").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top, _, rest in (name.partition(".") for name in names):
                assert rest.partition(".")[0] in below if top == "virtmig" else top in allowed, (path.name, top, rest)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.sampled_from(sorted(FrameType)), st.binary(max_size=40))
def test_any_bytes_are_events_or_one_protocol_error(chunks: list[bytes], kind: FrameType, payload: bytes) -> None:
    decoder = FrameDecoder("main", ALL)
    try:
        decoder.feed(PREFACE + struct.pack(">BBHI", kind, 0, 0, len(payload)) + payload)
        list(decoder.events())
        for chunk in chunks:
            decoder.feed(chunk)
            list(decoder.events())
    except RemoteProtocolError as broken:
        assert broken.channel == "main"
        assert broken.offset is not None
        assert broken.offset >= len(PREFACE)
