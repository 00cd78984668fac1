import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.return_path import (
    PageRequester,
    Pong,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathDecoder,
    Shut,
    SwitchoverAck,
    bitmap_bytes,
    encode_return_path,
)

BLOCKS = {"pc.ram": 1 << 26, "pc.bios": 0x40000}
END = struct.pack(">Q", 0x0123456789ABCDEF)


def message(kind, payload=b"", length=None):
    return struct.pack(">HH", kind, len(payload) if length is None else length) + payload


def counted(name):
    return bytes([len(name)]) + name


def bitmap_message(name=b"pc.bios", size=8, bits=b"\x07" + bytes(7), end=END):
    return message(5, counted(name)) + struct.pack(">Q", size) + bits + end


def decode(raw, *, step=None, ended=True, **options):
    decoder = ReturnPathDecoder(**options)
    events = []
    for at in range(0, len(raw), step or max(1, len(raw))):
        decoder.feed(raw[at : at + (step or len(raw))])
        events += decoder.events()
    if ended:
        decoder.end()
    return events + list(decoder.events())


# recorded: the destination's side of whole migrations of `-M pc -m 64`
RECORDED = {
    # QEMU 11.1.3, multifd with postcopy-preempt: PONG(0x42) is the package loaded, 3 comes from another thread after 4
    "11.1": ("000200040000000100020004000000020002000400000004000200040000000300020004000000420001000400000000",
             [Pong(1), Pong(2), Pong(4), Pong(3), Pong(0x42), Shut(0)]),
    # QEMU 7.2.22, postcopy with preempt
    "7.2": ("00020004000000010002000400000002000200040000000300020004000000040001000400000000",
            [Pong(1), Pong(2), Pong(3), Pong(4), Shut(0)]),
    # requests as seen from an 11.1.3 destination: the second one's block is that of the first
    "requests": ("0003001300000000003000000000100006" + b"pc.ram".hex() + "0004000c000000000038000000001000",
                 [RequestPages("pc.ram", 0x300000, 0x1000, True), RequestPages("pc.ram", 0x380000, 0x1000, False)]),
}  # fmt: skip

EVERYTHING = (
    message(2, struct.pack(">I", 1))
    + message(7)
    + message(3, struct.pack(">QI", 0x1000, 0x2000) + counted(b"pc.ram"))
    + message(4, struct.pack(">QI", 0x5000, 0x1000))
    + bitmap_message()
    + message(6, struct.pack(">I", 1))
    + message(1, struct.pack(">I", 0))
)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("step", [None, 1, 3])
def test_recorded_answers(name, step):
    raw = bytes.fromhex(RECORDED[name][0])
    events = decode(raw, step=step, blocks=BLOCKS)
    assert events == RECORDED[name][1]
    assert b"".join(map(encode_return_path, events)) == raw


@pytest.mark.parametrize("step", [None, 1, 5])
def test_every_message_both_ways(step):
    events = decode(EVERYTHING, step=step, blocks=BLOCKS, switchover_acks=1)
    assert events == [
        Pong(1),
        SwitchoverAck(),
        RequestPages("pc.ram", 0x1000, 0x2000, True),
        RequestPages("pc.ram", 0x5000, 0x1000, False),
        ReceivedBitmap("pc.bios", b"\x07" + bytes(7)),
        ResumeAck(),
        Shut(0),
    ]
    assert b"".join(map(encode_return_path, events)) == EVERYTHING


def test_cut_at_every_byte():
    whole = decode(EVERYTHING)
    ends = {0}
    for event in whole:
        ends.add(max(ends) + len(encode_return_path(event)))
    for cut in range(len(EVERYTHING) + 1):
        decoder = ReturnPathDecoder()
        decoder.feed(EVERYTHING[:cut])
        events = list(decoder.events())
        assert events == whole[: len(events)]
        assert list(decoder.events()) == []
        decoder.end()
        if cut in ends:
            assert list(decoder.events()) == []
        else:
            with pytest.raises(RemoteProtocolError, match="ended inside a message"):
                list(decoder.events())
            with pytest.raises(RemoteProtocolError, match="ended inside a message"):
                list(decoder.events())


REQUEST = struct.pack(">QI", 0x1000, 0x1000)
BAD = [
    ("type 0", message(0), "invalid message 0x0000"),
    ("type 8", message(8), "invalid message 0x0008"),
    ("type 65535", message(65535, length=65535), "invalid message 0xffff"),
    ("longer than 512", message(3, length=513), "513 bytes, at most 512"),
    ("SHUT of 0", message(1), "SHUT of 0 bytes, expected 4"),
    ("SHUT of 5", message(1, bytes(5)), "SHUT of 5 bytes"),
    ("PONG of 3", message(2, bytes(3)), "PONG of 3 bytes"),
    ("REQ_PAGES of 13", message(4, bytes(13)), "REQ_PAGES of 13 bytes"),
    ("RESUME_ACK of 0", message(6), "RESUME_ACK of 0 bytes"),
    ("SWITCHOVER_ACK of 1", message(7, b"x"), "SWITCHOVER_ACK of 1 bytes"),
    ("REQ_PAGES first", message(4, REQUEST), "before any request that names a block"),
    ("REQ_PAGES_ID of 12", message(3, REQUEST), "REQ_PAGES_ID of 12 bytes, at least 13"),
    ("name longer than the message", message(3, REQUEST + b"\x07pc.ram"), "a name of 7 bytes in the place of 6"),
    ("name shorter than the message", message(3, REQUEST + b"\x05pc.ram"), "a name of 5 bytes in the place of 6"),
    ("no name", message(3, REQUEST + b"\0"), "without a block name"),
    ("name not ASCII", message(3, REQUEST + b"\1\xff"), "not ASCII"),
    ("unknown block", message(3, REQUEST + counted(b"vga")), "unknown RAM block 'vga'"),
    ("misaligned start", message(3, struct.pack(">QI", 0x800, 0x1000) + counted(b"pc.ram")), "not whole pages"),
    ("misaligned length", message(3, struct.pack(">QI", 0, 0x800) + counted(b"pc.ram")), "not whole pages"),
    ("no pages", message(3, struct.pack(">QI", 0, 0) + counted(b"pc.ram")), "a request for no pages"),
    ("behind the block", message(3, struct.pack(">QI", 0x40000, 0x1000) + counted(b"pc.bios")), "which has 0x40000"),
    ("over its end", message(3, struct.pack(">QI", 0x3F000, 0x2000) + counted(b"pc.bios")), "which has 0x40000"),
    ("wraps round", message(3, struct.pack(">QI", (1 << 64) - 0x1000, 0x2000) + counted(b"pc.bios")), "which has"),
    ("bitmap without a name", message(5), "RECV_BITMAP without a block name"),
    ("bitmap name length", message(5, b"\x08pc.bios"), "a name of 8 bytes"),
    ("bitmap of unknown block", bitmap_message(b"vga"), "unknown RAM block"),
    ("bitmap size", bitmap_message(size=16), "a bitmap of 16 bytes for pc.bios, expected 8"),
    ("bitmap size huge", bitmap_message(size=1 << 63), "a bitmap of 9223372036854775808 bytes"),
    ("bitmap end mark", bitmap_message(end=bytes(8)), "end mark 0x0000000000000000"),
    ("RESUME_ACK 2", message(6, struct.pack(">I", 2)), "RESUME_ACK 0x2"),
    ("SWITCHOVER_ACK twice", message(7) + message(7), "nobody waits for"),
]


@pytest.mark.parametrize(("raw", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("step", [None, 1])
def test_a_broken_message_is_refused(raw, expected, step):
    good = message(2, struct.pack(">I", 1))
    with pytest.raises(RemoteProtocolError, match=expected) as caught:
        decode(good + raw, step=step, ended=False, blocks=BLOCKS, switchover_acks=1, channel="rp 1")
    assert caught.value.channel == "rp 1"
    assert len(good) <= caught.value.offset <= len(good + raw)


def test_a_dead_decoder_stays_dead():
    decoder = ReturnPathDecoder()
    decoder.feed(message(2, struct.pack(">I", 1)) + message(9) + message(2, struct.pack(">I", 2)))
    seen = decoder.events()
    assert next(seen) == Pong(1)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="0x0009"):
            list(decoder.events())


def test_a_bitmap_without_a_block_list_is_bounded_all_the_same():
    with pytest.raises(RemoteProtocolError, match="at most 64 are accepted"):
        decode(bitmap_message(size=72, bits=bytes(72)), bitmap_limit_bytes=64)
    with pytest.raises(RemoteProtocolError, match="not a multiple of 8"):
        decode(bitmap_message(size=9, bits=bytes(9)))


def test_a_refused_request_does_not_change_the_last_block():
    decoder = ReturnPathDecoder(blocks=BLOCKS, host_page_bytes=2 << 20)
    decoder.feed(message(3, struct.pack(">QI", 2 << 20, 2 << 20) + counted(b"pc.ram")))
    assert len(list(decoder.events())) == 1
    decoder.feed(message(4, REQUEST))
    with pytest.raises(RemoteProtocolError, match="not whole pages of 0x200000"):
        list(decoder.events())


def test_bitmaps():
    assert [bitmap_bytes(size) for size in (4096, 64 * 4096, 65 * 4096)] == [8, 8, 16]
    bitmap = ReceivedBitmap("x", bytes([0b1000_0001, 0, 0, 0, 0, 0, 0, 0xFF]))
    assert bitmap.pages(60).tolist() == [0, 7, 56, 57, 58, 59]
    assert bitmap.pages(60).dtype == np.uint64


def test_requests_name_a_block_only_when_it_changes():
    requester = PageRequester()
    raw = b"".join(
        (
            requester.request("pc.ram", 0x300000, 0x1000),
            requester.request("pc.ram", 0x380000, 0x1000),
            requester.request("pc.bios", 0, 0x1000),
        )
    )
    assert raw.startswith(bytes.fromhex(RECORDED["requests"][0]))
    assert [event.named for event in decode(raw, blocks=BLOCKS)] == [True, False, True]
    requester.forget()
    assert decode(requester.request("pc.bios", 0, 0x1000), blocks=BLOCKS)[0].named


@pytest.mark.parametrize(
    "event",
    [
        ResumeAck(2),
        ReceivedBitmap("pc.ram", bytes(7)),
        ReceivedBitmap("", bytes(8)),
        RequestPages("pc.ram", 0, 0, True),
        RequestPages("x" * 256, 0, 4096, True),
        RequestPages("\xe9", 0, 4096, True),
    ],
)
def test_what_no_source_takes_is_not_sent(event):
    with pytest.raises(LocalProtocolError):
        encode_return_path(event)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_end_in_events_or_one_typed_error(raw, step):
    try:
        events = decode(raw, step=step, ended=False)
    except RemoteProtocolError as broken:
        assert broken.offset <= len(raw)
    else:
        out = b"".join(map(encode_return_path, events))
        assert raw[: len(out)] == out
