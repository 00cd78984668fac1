import hashlib
import lzma
import struct
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.mapped_ram import (
    PIECE_BYTES,
    BlockPlan,
    MappedRamHeader,
    PageRun,
    decode_header,
    encode_header,
    lay_out,
    present_pages,
    read_blocks,
    read_pages,
    write_blocks,
    write_pages,
)
from virtmig.stream.wire import Dialect

CAPTURES = Path(__file__).parent / "captures"
PROVENANCE = tomllib.loads((CAPTURES / "README.toml").read_text())
PAGE, MIB = 4096, 1 << 20


class Image:
    """A file in memory with QEMU's two calls."""

    def __init__(self, raw=b""):
        self.raw = bytearray(raw)
        self.longest = 0

    def pread(self, count, at):
        self.longest = max(self.longest, count)
        return bytes(self.raw[at : at + count])

    def pwrite(self, data, at):
        if at + len(data) > len(self.raw):
            self.raw += bytes(at + len(data) - len(self.raw))
        self.raw[at : at + len(data)] = data


def capture(name):
    raw = lzma.decompress((CAPTURES / f"{name}.xz").read_bytes())
    # the RAM section: u8 START, u32 id, "\3ram", u32 instance, u32 version, then the block list
    return Image(raw), raw.index(b"\3ram") + 12


def built(dialect=Dialect.QEMU_11_1, plans=None, at=100):
    """A small file of our own making: every third page of each block, then the EOS word."""
    image = Image()
    plans = plans or [BlockPlan("pc.ram", 64 * PAGE), BlockPlan("rom", 3 * PAGE)]
    blocks, end = lay_out(plans, at, dialect=dialect)
    write_blocks(image.pwrite, at, blocks)
    for block in blocks:
        if not block.header.is_absent:
            runs = [PageRun(block.name, n, bytes([n % 255 + 1]) * PAGE) for n in range(0, block.page_count, 3)]
            write_pages(image.pwrite, block, runs)
    image.pwrite(struct.pack(">Q", 0x10), end)
    return image, at, blocks, end


def test_a_real_10_0_file_holds_the_guests_memory():
    image, at = capture("mapped-ram-10.0")
    blocks, end = read_blocks(image.pread, at, file_bytes=len(image.raw))
    assert [(block.name, block.used_length_bytes) for block in blocks] == [
        ("pc.ram", 64 << 20),
        ("/rom@etc/acpi/tables", 0x20000),
        ("pc.bios", 0x40000),
        ("pc.rom", 0x20000),
        ("/rom@etc/table-loader", 0x1000),
        ("/rom@etc/acpi/rsdp", 0x1000),
    ]
    assert image.pread(9, end) == struct.pack(">Q", 0x10) + b"\x7e"
    memory = bytearray(64 << 20)
    for run in read_pages(image.pread, blocks[0]):
        at_byte = run.first_page * PAGE
        memory[at_byte : at_byte + len(run.data)] = run.data
    assert hashlib.sha256(memory).hexdigest() == PROVENANCE["mapped_ram"]["10.0"]["pc_ram_sha256"]
    assert image.longest <= PIECE_BYTES


@pytest.mark.parametrize(
    ("name", "dialect", "ignored"),
    [
        ("mapped-ram-10.0", Dialect.QEMU_10_0, None),
        ("mapped-ram-11.1-ignore-shared", Dialect.QEMU_11_1, {"pc.ram"}),
    ],
)
def test_a_real_file_is_laid_out_and_written_again_byte_for_byte(name, dialect, ignored):
    image, at = capture(name)
    blocks, end = read_blocks(image.pread, at, file_bytes=len(image.raw), ignore_shared=ignored is not None)
    plans = [BlockPlan(b.name, b.used_length_bytes, b.gpa, b.name in (ignored or ())) for b in blocks]
    again, again_end = lay_out(plans, at, dialect=dialect)
    assert (again, again_end) == (blocks, end)
    copy = Image(image.raw[:at])
    write_blocks(copy.pwrite, at, again)
    for block in again:
        if not block.header.is_absent:
            assert write_pages(copy.pwrite, block, read_pages(image.pread, block)) == len(
                present_pages(image.pread, block)
            )
    copy.pwrite(bytes(image.raw[end:]), end)
    assert copy.raw == image.raw


def test_11_1_leaves_out_ignored_blocks_and_10_0_reserves_their_place():
    plans = [BlockPlan("pc.ram", 4 * MIB, gpa=0, ignored=True), BlockPlan("rom", PAGE, gpa=0xC0000)]
    new, _ = lay_out(plans, 0, dialect=Dialect.QEMU_11_1)
    old, _ = lay_out(plans, 0, dialect=Dialect.QEMU_10_0)
    assert new[0].header.is_absent
    assert new[1].at == 8 + 1 + 6 + 8 + 8 + 28
    assert (old[0].header.pages_offset, old[1].at) == (MIB, 5 * MIB)
    for dialect in (Dialect.QEMU_10_0, Dialect.QEMU_11_1):
        image, at, blocks, end = built(dialect, plans)
        assert read_blocks(image.pread, at, file_bytes=len(image.raw), ignore_shared=True) == (blocks, end)
        assert present_pages(image.pread, blocks[1]).tolist() == [0]
    assert present_pages(Image().pread, new[0]).size == 0
    with pytest.raises(LocalProtocolError, match="no place for pages"):
        write_pages(Image().pwrite, new[0], [])


def test_pages_come_in_runs_of_bounded_size():
    image = Image()
    blocks, end = lay_out([BlockPlan("r", 3000 * PAGE)], 0, dialect=Dialect.QEMU_11_1)
    data = np.random.default_rng(5).bytes(2500 * PAGE)
    write_blocks(image.pwrite, 0, blocks)
    assert write_pages(image.pwrite, blocks[0], [PageRun("r", 7, data), PageRun("r", 2999, bytes(PAGE))]) == 2501
    image.pwrite(bytes(8), end)
    runs = list(read_pages(image.pread, blocks[0]))
    assert [(run.first_page, len(run.data) // PAGE) for run in runs] == [
        (7, 1024),
        (1031, 1024),
        (2055, 452),
        (2999, 1),
    ]
    assert b"".join(run.data for run in runs[:3]) == data
    some = list(read_pages(image.pread, blocks[0], np.array([8, 9, 20], np.uint64)))
    assert [(run.first_page, len(run.data)) for run in some] == [(8, 2 * PAGE), (20, PAGE)]
    assert some[0].data == data[PAGE : 3 * PAGE]


def test_header_both_ways():
    raw = bytes.fromhex("00000001 0000000000001000 000000000000008e 0000000000100000")
    assert decode_header(raw) == MappedRamHeader(PAGE, 0x8E, MIB)
    assert encode_header(decode_header(raw)) == raw


def patched(at_in_entry, value, entry=0, dialect=Dialect.QEMU_11_1):
    """A file with one field of one block's entry changed; fields count from the end of the used length."""
    image, at, blocks, _ = built(dialect)
    image.pwrite(value, blocks[entry].at + 1 + len(blocks[entry].name) + at_in_entry)
    return image, at


U32, U64 = struct.Struct(">I").pack, struct.Struct(">Q").pack
BAD = [
    ("version", patched(8, U32(2)), "mapped-ram version 2"),
    ("page size 0", patched(12, U64(0)), "mapped-ram page size 0"),
    ("page size no power of two", patched(12, U64(4097)), "mapped-ram page size 4097"),
    ("page size of another guest", patched(12, U64(8192)), "the guest's is 4096"),
    ("bitmap before the header", patched(20, U64(8)), "bitmap of 'pc.ram' at 0x8 is outside"),
    ("bitmap beyond the file", patched(20, U64(1 << 40)), "bitmap of 'pc.ram' at 0x10000000000 is outside"),
    ("bitmap wraps round", patched(20, U64((1 << 64) - 4)), "is outside"),
    ("pages overlap the bitmap", patched(28, U64(0x90)), "overlap its bitmap"),
    ("pages beyond the file", patched(28, U64(1 << 40)), "the file at"),
    ("pages wrap round", patched(28, U64((1 << 64) - 4096)), "the file at"),
    ("pages unaligned", patched(28, U64(MIB + 3)), "not aligned"),
    ("both offsets 0 without ignore-shared", patched(20, U64(0) + U64(0)), "x-ignore-shared is off"),
    ("used length 0", patched(0, U64(0)), "of 0x0 bytes"),
    ("used length unaligned", patched(0, U64(100)), "of 0x64 bytes"),
    ("used length huge", patched(0, U64(1 << 62)), "of 0x4000000000000000 bytes"),
    ("more than the total", patched(0, U64(68 * PAGE)), "0x43000 are left"),
]


@pytest.mark.parametrize(("place", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_broken_block_is_refused(place, message):
    image, at = place
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        read_blocks(image.pread, at, file_bytes=len(image.raw))
    assert caught.value.channel == "mapped-ram"
    assert at <= caught.value.offset <= len(image.raw)


def test_names():
    for name, message in ((b"\0", "empty block name"), (b"\1\xff", "not ASCII")):
        image, at, _, _ = built()
        image.pwrite(name, at + 8)
        with pytest.raises(RemoteProtocolError, match=message):
            read_blocks(image.pread, at, file_bytes=len(image.raw))
    image, at, _, _ = built(plans=[BlockPlan("a", PAGE), BlockPlan("a", PAGE)])
    with pytest.raises(RemoteProtocolError, match="'a' twice"):
        read_blocks(image.pread, at, file_bytes=len(image.raw))
    image, at, _, _ = built()
    with pytest.raises(RemoteProtocolError, match="expected a block list"):
        read_blocks(image.pread, at + 1, file_bytes=len(image.raw))


def test_bits_past_the_end():
    image, _, blocks, _ = built()
    image.pwrite(b"\x08", blocks[1].header.bitmap_offset)
    with pytest.raises(RemoteProtocolError, match="has page 3, the block 3 pages"):
        present_pages(image.pread, blocks[1])


def test_cut_anywhere_is_an_error_or_the_whole():
    image, at, blocks, end = built()
    interesting = [*range(at, at + 80), *range(blocks[1].at, blocks[1].at + 60), MIB, MIB + PAGE, end - 1, end]
    for cut in interesting:
        short = Image(image.raw[:cut])
        if cut >= end:
            assert read_blocks(short.pread, at, file_bytes=cut) == (blocks, end)
            continue
        with pytest.raises(RemoteProtocolError):
            read_blocks(short.pread, at, file_bytes=cut)
        # a file that shrinks after its list was read
        everything = (
            run
            for block in blocks
            for run in read_pages(short.pread, block, np.arange(block.page_count, dtype=np.uint64))
        )
        with pytest.raises(RemoteProtocolError, match="the file ends inside"):
            list(everything)


def test_what_cannot_be_written():
    with pytest.raises(LocalProtocolError, match=r"7\.2 has no mapped-ram"):
        lay_out([], 0, dialect=Dialect.QEMU_7_2)
    for plan in (BlockPlan("", PAGE), BlockPlan("x", 100), BlockPlan("x", 0), BlockPlan("x", PAGE, ignored=True)):
        with pytest.raises(LocalProtocolError):
            lay_out([plan], 0, dialect=Dialect.QEMU_11_1)
    (block,), _ = lay_out([BlockPlan("x", 2 * PAGE)], 0, dialect=Dialect.QEMU_11_1)
    for run in (PageRun("x", 1, bytes(2 * PAGE)), PageRun("y", 0, bytes(PAGE)), PageRun("x", 0, b"short"),
                PageRun("x", -1, bytes(PAGE))):  # fmt: skip
        with pytest.raises(LocalProtocolError, match="do not fit"):
            write_pages(Image().pwrite, block, [run])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_change_of_the_list_ends_in_blocks_or_one_typed_error(data):
    image, at, blocks, _ = built()
    for _ in range(data.draw(st.integers(1, 4))):
        entry = data.draw(st.sampled_from(blocks)).at
        image.raw[entry + data.draw(st.integers(-8, 60))] = data.draw(st.integers(0, 255))
    try:
        found, end = read_blocks(image.pread, at, file_bytes=len(image.raw), ignore_shared=data.draw(st.booleans()))
        for block in found:
            for run in read_pages(image.pread, block):
                assert len(run.data) <= PIECE_BYTES
        assert end <= len(image.raw)
    except RemoteProtocolError as broken:
        assert broken.offset >= 0
