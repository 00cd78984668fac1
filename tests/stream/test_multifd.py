import contextlib
import hashlib
import itertools
import lzma
import random
import struct
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream import multifd_compression
from virtmig.stream.multifd import (
    DEVICE_STATE_PIECE_BYTES,
    DeviceState,
    DeviceStateData,
    MultifdDecoder,
    MultifdHello,
    MultifdPacket,
    check_hello,
    encode_multifd,
)
from virtmig.stream.multifd_compression import make_deflater, make_inflater
from virtmig.stream.multifd_encoder import MultifdEncoder
from virtmig.stream.multifd_epochs import MultifdEpochs
from virtmig.stream.wire import Dialect, MultifdFlag

CAPTURES = Path(__file__).parent / "captures"
PROVENANCE = tomllib.loads((CAPTURES / "README.toml").read_text())
RECORDED = sorted(path.name[: -len(".1.xz")] for path in CAPTURES.glob("multifd-*.1.xz"))
UUID = bytes.fromhex("12345678123412341234123456789abc")
PAGE = 4096
BLOCKS = {"pc.ram": 1 << 26, "tiny": 2048}
SYNC, ZLIB, ZSTD = int(MultifdFlag.SYNC), int(MultifdFlag.ZLIB), int(MultifdFlag.ZSTD)


def recorded(name, channel):
    return lzma.decompress((CAPTURES / f"{name}.{channel}.xz").read_bytes())


def hello(channel_id=0, uuid=UUID, magic=0x11223344, version=1):
    return struct.pack(">II16sB39x", magic, version, uuid, channel_id)


def packet(
    offsets=(),
    zeros=(),
    body=None,
    *,
    flags=0,
    alloc=128,
    normal=None,
    zero=None,
    size=None,
    number=0,
    name=b"pc.ram",
    magic=0x11223344,
    version=1,
    stale=b"",
):
    body = bytes(len(offsets) * PAGE) if body is None else body
    head = struct.pack(
        ">IIIIIIQI28x256s",
        magic,
        version,
        flags,
        alloc,
        len(offsets) if normal is None else normal,
        len(body) if size is None else size,
        number,
        len(zeros) if zero is None else zero,
        name,
    )
    fields = b"".join(struct.pack(">Q", offset) for offset in (*offsets, *zeros)) + stale
    return head + fields.ljust(1024, b"\0") + body


def device_state(body, *, flags=0x40, name=b"vfio\0", size=None, instance=3):
    return struct.pack(">III256sII", 0x11223344, 1, flags, name, instance, len(body) if size is None else size) + body


def decode(raw, *, ended=True, step=None, **options):
    decoder = MultifdDecoder(**options)
    events = []
    for at in range(0, len(raw), step or max(1, len(raw))):
        decoder.feed(raw[at : at + (step or len(raw))])
        events += decoder.events()
    if ended:
        decoder.end()
    events += decoder.events()
    return events


def encoded(events):
    return b"".join(bytes(buffer) for event in events for buffer in encode_multifd(event))


# -- recordings of real QEMUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_a_recording_decodes_to_the_guests_memory_and_encodes_to_itself(name):
    version, method = name.split("-")[1], name.rsplit("-", 1)[1]
    bios = bytearray(0x40000)
    syncs, hellos = [], []
    for channel in (1, 2):
        raw = recorded(name, channel)
        events = decode(raw, method=method, uuid=UUID, channels=2)
        assert encoded(events) == raw
        hellos.append(events[0].channel_id)
        syncs.append(sum(event.is_sync for event in events[1:]))
        for event in events[1:]:
            if event.block == "pc.bios":
                for index, offset in enumerate(event.normal_offsets.tolist()):
                    bios[offset : offset + PAGE] = event.data[index * PAGE : (index + 1) * PAGE]
    assert sorted(hellos) == [0, 1]
    assert syncs[0] == syncs[1] > 1
    assert hashlib.sha256(bios).hexdigest() == PROVENANCE["qemu"][version]["pc_bios_sha256"]


def test_the_recordings_show_what_the_dialects_differ_in():
    syncs = {}
    zeros = {}
    for name in RECORDED:
        for channel in (1, 2):
            for event in decode(recorded(name, channel))[1:]:
                if event.is_sync:
                    syncs.setdefault(name, set()).add(event.pages_alloc)
                zeros[name] = zeros.get(name, 0) + event.zero_count
    assert syncs["multifd-7.2-none"] == {128}
    assert syncs["multifd-10.0-zlib"] == syncs["multifd-11.1-none"] == {0}
    # zero pages: machine types up to 8.2 send them on main
    assert zeros["multifd-7.2-zstd"] == zeros["multifd-11.1-pc-i440fx-7.2-zlib"] == 0
    assert zeros["multifd-10.0-zlib"] > 16000
    assert zeros["multifd-11.1-zstd"] > 16000
    stale = [e for c in (1, 2) for e in decode(recorded("multifd-7.2-none", c))[1:] if e.is_sync and e.next_packet_size]
    assert stale
    assert all(event.block == "" and not event.body and event.name_field.strip(b"\0") for event in stale)


@pytest.mark.parametrize("name", ["multifd-7.2-zlib", "multifd-11.1-zstd", "multifd-10.0-zlib"])
def test_pieces_of_any_size_give_the_same_events(name):
    raw = recorded(name, 2)[:12000]
    whole = decode(raw, ended=False)
    assert len(whole) > 2
    for step in (1, 7, 1344, 5000):
        parts = decode(raw, ended=False, step=step)
        assert encoded(parts) == encoded(whole)
        assert [getattr(event, "data", None) for event in parts] == [getattr(event, "data", None) for event in whole]


def test_cut_at_every_byte_is_incomplete_or_a_clean_end():
    raw = hello() + packet([0], body=b"a" * PAGE) + device_state(b"xyz") + packet(flags=SYNC, alloc=0)
    sizes = [0, 64, 64 + 1344 + PAGE, 64 + 1344 + PAGE + 276 + 3, len(raw)]
    for cut in range(len(raw) + 1):
        decoder = MultifdDecoder()
        decoder.feed(raw[:cut])
        events = list(decoder.events())
        assert len(encoded(events)) <= cut
        decoder.end()
        if cut in sizes[1:]:
            assert list(decoder.events()) == []
        else:
            with pytest.raises(RemoteProtocolError, match="ended inside") as caught:
                list(decoder.events())
            assert caught.value.offset == cut
            with pytest.raises(RemoteProtocolError, match="ended inside"):
                list(decoder.events())


def test_room_saves_the_copy():
    raw = hello() + packet([PAGE, 2 * PAGE], body=random.Random(1).randbytes(2 * PAGE)) + packet(flags=SYNC)
    decoder = MultifdDecoder()
    at = 0
    while at < len(raw):
        room = decoder.room()
        count = min(len(room), len(raw) - at, 1000)
        room[:count] = raw[at : at + count]
        decoder.filled(count)
        at += count
    decoder.end()
    assert encoded(list(decoder.events())) == raw
    assert decoder.offset == len(raw)


# -- dialects --------------------------------------------------------------------------------------------------------


def test_sync_on_a_data_packet_and_the_empty_one_after_it():
    pages = random.Random(2).randbytes(PAGE)
    body = make_deflater("zlib").deflate(pages)
    raw = hello() + packet([0], body=body, flags=SYNC | ZLIB, number=9) + packet(number=9, size=4096)
    _, data, empty = decode(raw, source=Dialect.QEMU_7_2, method="zlib", blocks=BLOCKS)
    assert data.is_sync
    assert bytes(data.data) == pages
    assert (empty.is_sync, empty.packet_num, empty.block) == (False, 9, "")
    assert encoded([data, empty]) == raw[64:]
    with pytest.raises(RemoteProtocolError, match="SYNC on a packet with pages"):
        decode(raw, source=Dialect.QEMU_11_1, method="zlib")


def test_leftovers_are_kept_and_not_believed():
    stale = struct.pack(">Q", 0xDEADBEEF) * 120
    raw = hello() + packet([PAGE], body=bytes(PAGE), stale=stale) + packet(flags=SYNC, size=99999, stale=stale)
    events = decode(raw, source=Dialect.QEMU_7_2, blocks=BLOCKS)
    assert encoded(events) == raw
    assert events[1].normal_offsets.tolist() == [PAGE]
    assert events[2].normal_offsets.size == 0


def test_zero_pages_come_after_the_normal_ones():
    raw = hello() + packet([PAGE], [3 * PAGE, 0], body=b"z" * PAGE) + packet([], [8 * PAGE], flags=ZSTD, size=0)
    with pytest.raises(RemoteProtocolError, match="compressed with zstd, agreed is none"):
        decode(raw, method="none")
    event = decode(raw[: 64 + 1344 + PAGE], blocks=BLOCKS)[1]
    assert event.normal_offsets.tolist() == [PAGE]
    assert event.zero_offsets.tolist() == [3 * PAGE, 0]
    with pytest.raises(RemoteProtocolError, match=r"only since 9\.0"):
        decode(raw, source=Dialect.QEMU_7_2)


def test_device_state_is_passed_in_bounded_pieces():
    body = random.Random(3).randbytes(DEVICE_STATE_PIECE_BYTES * 2 + 17)
    raw = hello() + device_state(body) + device_state(b"") + packet(flags=SYNC, alloc=0)
    events = decode(raw)
    assert encoded(events) == raw
    assert isinstance(events[1], DeviceState)
    assert (events[1].idstr, events[1].instance_id, events[1].size) == ("vfio", 3, len(body))
    pieces = [event for event in events if isinstance(event, DeviceStateData)]
    assert [len(piece.data) for piece in pieces] == [DEVICE_STATE_PIECE_BYTES, DEVICE_STATE_PIECE_BYTES, 17]
    assert [piece.remaining for piece in pieces] == [DEVICE_STATE_PIECE_BYTES + 17, 17, 0]
    assert isinstance(events[-1], MultifdPacket)


# -- what must be refused (each a check of multifd.c, multifd-zlib.c, multifd-zstd.c) ---------------------------------

BAD = [
    ("magic", packet(magic=0x11223345), 0, "expected multifd magic"),
    ("a main stream", struct.pack(">II", 0x5145564D, 3) + bytes(400), 0, "QEVM: a main stream"),
    ("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00" + bytes(400), 0, "TLS"),
    ("version", packet(version=2), 4, "version 1, got 2"),
    ("unknown flags", packet(flags=0x80), 8, "unknown multifd flags 0x80"),
    ("two compression bits", packet([0], flags=0x6), 8, "unknown multifd compression 0x6"),
    ("qpl", packet([0], flags=0x8), 8, "qpl"),
    ("uadk", packet([0], flags=0x10), 8, "uadk"),
    ("qatzip", packet([0], flags=0x20), 8, "qatzip"),
    ("pages_alloc", packet(alloc=129), 12, "room for 129 pages"),
    ("pages_alloc huge", packet(alloc=0xFFFFFFFF), 12, "room for 4294967295 pages"),
    ("normal above alloc", packet([0, PAGE], alloc=1), 16, "2 pages in a packet with room for 1"),
    ("zero above the rest", packet([0], [PAGE], alloc=1), 32, "1 zero pages"),
    ("zero wraps round", packet([0], zero=0xFFFFFFFF), 32, "4294967295 zero pages"),
    ("name not terminated", packet([0], name=b"x" * 256), 64, "not terminated"),
    ("name empty", packet([0], name=b""), 64, "empty RAM block name"),
    ("name not ASCII", packet([0], name=b"\xff"), 64, "not ASCII"),
    ("unknown block", packet([0], name=b"vga.vram"), 64, "unknown RAM block"),
    ("beyond the block", packet([0, 1 << 26]), 328, "outside pc.ram"),
    ("beyond any block", packet([0xFFFFFFFFFFFFF000]), 320, "outside pc.ram"),
    ("a block shorter than a page", packet([0], name=b"tiny"), 320, "outside tiny"),
    ("unaligned", packet([0, 4097]), 328, "not the start of a page"),
    ("a page twice", packet([PAGE, PAGE]), 320, "same page twice"),
    ("a page normal and zero", packet([PAGE], [0, PAGE]), 320, "same page twice"),
    ("size too small", packet([0], size=4095), 20, "4095 bytes for 1 pages"),
    ("size huge", packet([0], size=0xFFFFFFFF), 20, "4294967295 bytes for 1 pages"),
    ("empty with a size", packet([], [0], size=5), 20, "an empty packet expected"),
    ("compressed body huge", packet([0], flags=ZLIB, size=(1 << 20) + 1), 20, "1048577 bytes"),
    ("compressed body empty", packet([0], body=b"", flags=ZLIB), 20, "0 bytes"),
    ("zlib garbage", packet([0], body=b"garbage", flags=ZLIB), 1344, "not a zlib stream"),
    ("zstd garbage", packet([0], body=b"garbage!", flags=ZSTD), 1344, "not a zstd stream"),
    ("device state with SYNC", device_state(b"", flags=0x41), 8, "SYNC on a device-state packet"),
    ("device name not terminated", device_state(b"", name=b"v" * 256), 12, "not terminated"),
    ("device state huge", device_state(b"", size=0xFFFFFFFF), 272, "a device state of 4294967295 bytes"),
]


@pytest.mark.parametrize(("raw", "at", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("step", [None, 1, 100])
def test_a_broken_packet_is_refused_where_it_is_broken(raw, at, message, step):
    decoder = MultifdDecoder(blocks=BLOCKS, channel="multifd 7")
    good = hello() + packet([0], [PAGE]) if message != "qpl" else hello()
    if any(word in message for word in ("compress", "qpl", "uadk", "qatzip", "stream", "bytes")):
        good = hello()
    events = []

    def run():
        for piece in (good, *([raw] if step is None else [raw[i : i + step] for i in range(0, len(raw), step)])):
            decoder.feed(piece)
            events.extend(decoder.events())

    with pytest.raises(RemoteProtocolError, match=message) as caught:
        run()
    assert caught.value.channel == "multifd 7"
    assert caught.value.offset == len(good) + at
    assert encoded(events) == good
    with pytest.raises(RemoteProtocolError, match=message):
        list(decoder.events())


def test_the_events_before_a_broken_one_are_told():
    decoder = MultifdDecoder()
    decoder.feed(hello() + packet([0]) + packet(magic=7) + packet([0]))
    seen = []
    with pytest.raises(RemoteProtocolError):
        seen.extend(decoder.events())
    assert [type(event) for event in seen] == [MultifdHello, MultifdPacket]


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("given_bytes", "message"), [(8 << 20, "more than its pages"), (PAGE + 1, "more than"), (PAGE - 1, "gave 4095")]
)
def test_bombs_and_short_bodies_are_refused(method, given_bytes, message):
    body = make_deflater(method, 9).deflate(bytes(given_bytes))
    raw = hello() + packet([0], body=body, flags=multifd_compression.METHOD_FLAG[method])
    with pytest.raises(RemoteProtocolError, match=message):
        decode(raw, method=method)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_output_held_back_by_one_packet_does_not_leak_into_the_next(method):
    deflater = make_deflater(method)
    first = deflater.deflate(bytes(PAGE) + b"\1" * 100)
    second = deflater.deflate(b"\2" * (PAGE - 100))
    flag = multifd_compression.METHOD_FLAG[method]
    with pytest.raises(RemoteProtocolError, match="more than its pages"):
        decode(hello() + packet([0], body=first, flags=flag) + packet([0], body=second, flags=flag), method=method)


def test_a_stream_that_ends_is_refused():
    with pytest.raises(RemoteProtocolError, match="the zlib stream ended"):
        decode(hello() + packet([0], body=zlib.compress(bytes(PAGE)), flags=ZLIB))
    zstd = multifd_compression.zstd_module()
    with pytest.raises(RemoteProtocolError, match="the zstd frame ended"):
        decode(hello() + packet([0], body=zstd.compress(bytes(PAGE)), flags=ZSTD))


def test_a_zstd_window_beyond_any_qemu_level_is_refused():
    zstd = multifd_compression.zstd_module()
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 26})
    body = compressor.compress(bytes(PAGE), mode=zstd.ZstdCompressor.FLUSH_BLOCK)
    with pytest.raises(RemoteProtocolError, match="not a zstd stream"):
        decode(hello() + packet([0], body=body, flags=ZSTD))


def test_without_a_zstd_module_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(multifd_compression, "ZSTD_MODULES", ("no_such_module_of_zstd",))
    with pytest.raises(LocalProtocolError) as caught:
        MultifdDecoder(method="zstd")
    assert "backports.zstd" in caught.value.hint
    with pytest.raises(RemoteProtocolError, match="zstd is not available"):
        decode(hello() + packet([0], flags=ZSTD))


@pytest.mark.parametrize("method", ["qpl", "uadk", "qatzip", "lzma"])
def test_methods_that_cannot_be_had_are_refused_by_name(method):
    for make in (make_inflater, make_deflater):
        with pytest.raises(LocalProtocolError, match=method):
            make(method)


@pytest.mark.parametrize(
    ("raw", "at", "message"),
    [
        (hello(magic=0x11223345), 0, "expected multifd magic"),
        (hello(version=2), 4, "version 1, got 2"),
        (hello(uuid=bytes(16)), 8, "belongs to guest 00000000-0000-0000-0000-000000000000"),
        (hello(2), 24, "channel id 2, but only 2"),
        (hello(255), 24, "channel id 255"),
    ],
)
def test_a_broken_hello(raw, at, message):
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        decode(raw, uuid=UUID, channels=2)
    assert caught.value.offset == at


def test_an_id_twice():
    greeting = decode(hello(1))[0]
    check_hello(greeting, channels=2, uuid=UUID, present=[0])
    with pytest.raises(RemoteProtocolError, match="already set up"):
        check_hello(greeting, channels=2, uuid=UUID, present=[0, 1])


def test_packet_numbers_are_information_only():
    events = decode(hello() + packet(number=7) + packet(number=7) + packet(number=(1 << 64) - 1))
    assert [event.packet_num for event in events[1:]] == [7, 7, (1 << 64) - 1]


# -- epochs ----------------------------------------------------------------------------------------------------------


def test_an_epoch_completes_when_main_and_all_channels_have_synced():
    for order in itertools.permutations(["main", 0, 1]):
        epochs = MultifdEpochs(2)
        done = [epochs.marker() if who == "main" else epochs.sync(who) for who in order]
        assert done == [False, False, True]
        assert epochs.completed == 1
        assert epochs.waiting_for() == ()


def test_a_sync_on_only_some_channels_is_an_error_once_the_others_ended():
    epochs = MultifdEpochs(2)
    epochs.sync(0)
    assert not epochs.marker()
    assert epochs.waiting_for() == (1,)
    with pytest.raises(RemoteProtocolError, match="ended after 0 syncs"):
        epochs.end(1)


def test_a_channel_that_ended_before_the_marker():
    epochs = MultifdEpochs(1)
    epochs.end(0)
    with pytest.raises(RemoteProtocolError, match="main waits for number 1"):
        epochs.marker()


# -- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
def test_what_the_encoder_sends_a_decoder_reads(dialect, method):
    generator = random.Random(4)
    memory = memoryview(generator.randbytes(PAGE * 400))
    offsets = np.array(sorted(generator.sample(range(400), 300)), np.uint64) * PAGE
    encoder = MultifdEncoder(1, dialect=dialect, uuid=UUID, method=method)
    buffers = [encoder.hello(), *encoder.sync(), *encoder.pages_of_memory("pc.ram", offsets, memory)]
    contiguous = b"".join(memory[offset : offset + PAGE] for offset in offsets.tolist())
    buffers += [*encoder.pages("pc.ram", offsets, contiguous), *encoder.sync()]
    raw = b"".join(buffers)
    events = decode(raw, method=method, source=dialect, channels=2, uuid=UUID, blocks=BLOCKS)
    assert encoded(events) == raw
    assert events[1].is_sync
    assert events[1].pages_alloc == (128 if dialect is Dialect.QEMU_7_2 else 0)
    packets = events[2:-1]
    assert [event.normal_count for event in packets] == [128, 128, 44] * 2
    assert [event.packet_num for event in events[1:]] == list(range(8))
    assert np.concatenate([event.normal_offsets for event in packets[:3]]).tolist() == offsets.tolist()
    assert b"".join(event.data for event in packets[:3]) == contiguous
    assert b"".join(event.data for event in packets[3:]) == contiguous


def test_neighbours_are_one_buffer_in_place():
    memory = memoryview(bytearray(PAGE * 64))
    encoder = MultifdEncoder(0, dialect=Dialect.QEMU_11_1)
    buffers = encoder.pages_of_memory("pc.ram", np.array([0, 1, 2, 9, 10, 5], np.uint64) * PAGE, memory)
    assert [len(buffer) for buffer in buffers] == [1344, 3 * PAGE, 2 * PAGE, PAGE]
    memory[9 * PAGE] = 77
    assert buffers[2][0] == 77


def test_zero_pages_are_listed_not_sent():
    encoder = MultifdEncoder(0, dialect=Dialect.QEMU_10_0)
    raw = b"".join([encoder.hello(), *encoder.zero_pages("pc.ram", np.arange(200, dtype=np.uint64) * PAGE)])
    assert [event.zero_count for event in decode(raw, blocks=BLOCKS)[1:]] == [128, 72]
    with pytest.raises(LocalProtocolError, match=r"7\.2 ignores zero pages"):
        MultifdEncoder(0, dialect=Dialect.QEMU_7_2).zero_pages("pc.ram", np.zeros(1, np.uint64))


def test_the_encoder_refuses_what_a_destination_would():
    encoder = MultifdEncoder(0, dialect=Dialect.QEMU_11_1)
    one = np.zeros(1, np.uint64)
    with pytest.raises(LocalProtocolError, match="no name"):
        encoder.pages("", one, bytes(PAGE))
    with pytest.raises(LocalProtocolError, match="no name"):
        encoder.pages("x" * 256, one, bytes(PAGE))
    with pytest.raises(LocalProtocolError, match="not the start of a page"):
        encoder.pages("pc.ram", one + 1, bytes(PAGE))
    with pytest.raises(LocalProtocolError, match="4095 bytes for 1 pages"):
        encoder.pages("pc.ram", one, bytes(PAGE - 1))
    with pytest.raises(LocalProtocolError, match="outside"):
        encoder.pages_of_memory("pc.ram", one + PAGE, memoryview(bytes(PAGE)))
    with pytest.raises(LocalProtocolError, match="channel id 255"):
        MultifdEncoder(255, dialect=Dialect.QEMU_11_1)
    with pytest.raises(LocalProtocolError, match="uuid of 3 bytes"):
        MultifdEncoder(0, dialect=Dialect.QEMU_11_1, uuid=b"abc")


# -- anything at all -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 700))
def test_any_bytes_end_in_events_or_one_typed_error(tail, step):
    raw = hello() + tail
    try:
        events = decode(raw, step=step)
    except RemoteProtocolError as broken:
        assert 0 <= broken.offset <= len(raw)
    else:
        assert encoded(events) == raw


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1343), st.integers(1, 255), st.sampled_from(["multifd-7.2-zlib", "multifd-10.0-zlib"]))
def test_a_flipped_byte_is_an_error_or_other_events_with_the_same_bytes(at, mask, name):
    raw = bytearray(recorded(name, 2)[:20000])
    raw[64 + 1344 + at] ^= mask
    events = []
    decoder = MultifdDecoder(method="zlib", blocks={"pc.ram": 1 << 26})
    decoder.feed(raw)
    with contextlib.suppress(RemoteProtocolError):
        events.extend(decoder.events())
    got = encoded(events)
    assert bytes(raw[: len(got)]) == got


def test_pages_are_read_straight_into_the_guests_memory():
    """Neighbouring pages land uncopied; scattered or compressed ones, and those of other blocks, come as data."""
    memory = bytearray(64 * PAGE)
    asked = []

    def destination(block, offsets):
        asked.append((block, offsets.tolist()))
        return memoryview(memory)[2 * PAGE : 5 * PAGE] if len(offsets) == 3 else None

    encoder = MultifdEncoder(0, dialect=Dialect.QEMU_11_1)
    content = np.random.default_rng(5).bytes(3 * PAGE)
    near = np.array([2, 3, 4], np.uint64) * np.uint64(PAGE)
    far = np.array([9, 20], np.uint64) * np.uint64(PAGE)
    raw = encoder.hello() + b"".join([*encoder.pages("pc.ram", near, content),
                                      *encoder.pages("pc.ram", far, content[: 2 * PAGE])])  # fmt: skip
    decoder = MultifdDecoder(blocks={"pc.ram": len(memory)}, destination=destination)
    decoder.feed(raw)
    _, first, second = decoder.events()
    assert (first.placed, second.placed) == (True, False)
    assert bytes(memory[2 * PAGE : 5 * PAGE]) == content == bytes(first.data)
    assert bytes(second.data) == content[: 2 * PAGE]
    assert asked == [("pc.ram", near.tolist()), ("pc.ram", far.tolist())]
    outside = encoder.hello() + b"".join(encoder.pages("pc.ram", near + np.uint64(62 * PAGE), content))
    decoder = MultifdDecoder(blocks={"pc.ram": len(memory)}, destination=destination)
    decoder.feed(outside)
    with pytest.raises(RemoteProtocolError):
        list(decoder.events())
    assert len(asked) == 2
