"""Mutated recordings of multifd channels, return paths and mapped-ram files: events, "need more", or one typed error.

VIRTMIG_FUZZ_S sets the seconds for each test (default 1), VIRTMIG_FUZZ_SEED the seed; a failure names seed and number.
"""

import contextlib
import itertools
import lzma
import os
import random
import resource
import struct
import time
from pathlib import Path

import pytest

from virtmig.errors import ChannelError, RemoteProtocolError
from virtmig.stream.channel import Expected, Identity, NeedMoreBytes, Role, identify
from virtmig.stream.channel_rules import Rule
from virtmig.stream.mapped_ram import read_blocks, read_pages
from virtmig.stream.multifd import MultifdDecoder, encode_multifd
from virtmig.stream.return_path import ReturnPathDecoder, encode_return_path

CAPTURES = Path(__file__).parent.parent / "stream" / "captures"
SECONDS = float(os.environ.get("VIRTMIG_FUZZ_S", "1"))
SEED = int(os.environ.get("VIRTMIG_FUZZ_SEED", "3"))
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
#: what one input may add to the peak: a body, its output, and the interpreter's own
EXTRA_KIB = 96 * 1024

RETURN_PATH = bytes.fromhex(
    "000200040000000100070000"
    "0003001300000000003000000000100006" + b"pc.ram".hex() + "0004000c000000000038000000001000"
    "00050007" + b"\x06pc.ram".hex() + "0000000000000010" + "ff" * 16 + "0123456789abcdef"
    "00060004000000010001000400000000"
)


def mutate(generator, raw):
    """Flip bits, write telling numbers, cut, repeat or splice pieces."""
    changed = bytearray(raw)
    for _ in range(generator.randint(1, 6)):
        if not changed:
            break
        at = generator.randrange(len(changed))
        # headers are few among the pages: half of the changes go to a packet's first bytes
        if generator.random() < 0.5:
            at = min(at, generator.choice((64, 128, 400, 1500)))
        kind = generator.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            width = generator.choice((1, 2, 4, 8))
            changed[at : at + width] = (generator.choice(NUMBERS) & (1 << 8 * width) - 1).to_bytes(width, "big")
        elif kind == 2:
            del changed[at : at + generator.randint(1, 2000)]
        elif kind == 3:
            changed[at:at] = changed[at : at + generator.randint(1, 2000)]
        else:
            other = generator.randrange(len(raw))
            changed[at : at + 64] = raw[other : other + 64]
    return bytes(changed)


@contextlib.contextmanager
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < EXTRA_KIB


def inputs(generator, originals):
    """(number, mutated original) for the set time."""
    until = time.monotonic() + SECONDS
    for number in itertools.count():
        if time.monotonic() > until:
            print(f"{number} inputs, seed {SEED}")
            return
        yield number, mutate(generator, originals[number % len(originals)])


def recordings():
    found = []
    for path in sorted(CAPTURES.glob("multifd-*.xz")):
        # the beginning of each channel holds every kind of packet; shorter inputs are more inputs
        found.append(lzma.decompress(path.read_bytes())[:30_000])
    assert len(found) >= 8
    return found


def test_multifd():
    generator = random.Random(SEED)
    refused = whole = 0
    with bounded_memory():
        for number, raw in inputs(generator, recordings()):
            decoder = MultifdDecoder(blocks={"pc.ram": 1 << 26, "pc.bios": 0x40000}, device_state_limit_bytes=1 << 20)
            out = bytearray()
            step = generator.choice((len(raw) or 1, 1000, 4096, 77))
            try:
                for at in range(0, len(raw), step):
                    decoder.feed(raw[at : at + step])
                    for event in decoder.events():
                        for buffer in encode_multifd(event):
                            out += buffer
                decoder.end()
                list(decoder.events())
                whole += 1
            except RemoteProtocolError as broken:
                assert 0 <= broken.offset <= len(raw), (SEED, number)
                refused += 1
            assert raw[: len(out)] == out, (SEED, number)
    assert refused
    assert refused + whole > 50


def test_return_path():
    generator = random.Random(SEED)
    refused = 0
    with bounded_memory():
        for number, raw in inputs(generator, [RETURN_PATH]):
            decoder = ReturnPathDecoder(bitmap_limit_bytes=1 << 20)
            decoder.feed(raw)
            out = b""
            try:
                for event in decoder.events():
                    out += encode_return_path(event)
                decoder.end()
                list(decoder.events())
            except RemoteProtocolError as broken:
                assert 0 <= broken.offset <= len(raw), (SEED, number)
                refused += 1
            assert raw[: len(out)] == out, (SEED, number)
    assert refused > 50


def test_mapped_ram():
    generator = random.Random(SEED)
    original = lzma.decompress((CAPTURES / "mapped-ram-11.1-ignore-shared.xz").read_bytes())
    at = original.index(b"\3ram") + 12
    entries = [at, 0xA6, 0x120000, 0x240000, 0x320000, 0x401000]
    refused = 0
    with bounded_memory():
        for number, _ in inputs(generator, [b"x"]):
            patches = {}
            for _ in range(generator.randint(1, 4)):
                place = generator.choice(entries) + generator.randrange(90)
                patches[place] = struct.pack(">Q", generator.choice(NUMBERS))[8 - generator.choice((1, 4, 8)) :]
            length = generator.choice((len(original), generator.randrange(len(original))))

            def pread(count, offset, patches=patches, length=length):
                data = bytearray(original[offset : min(offset + count, length)])
                for place, new in patches.items():
                    for index, byte in enumerate(new):
                        if 0 <= place + index - offset < len(data):
                            data[place + index - offset] = byte
                return bytes(data)

            try:
                blocks, end = read_blocks(pread, at, file_bytes=length, ignore_shared=True)
                for block in blocks:
                    for _ in read_pages(pread, block):
                        pass
                assert end <= length, (SEED, number)
            except RemoteProtocolError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize("rule", list(Rule))
def test_identify(rule):
    """Any order of any connections: named, asked for more, or refused; never two mains or an id twice."""
    generator = random.Random(SEED)
    magics = [bytes.fromhex(magic) for magic in ("5145564d00000003", "1122334400000001", "55667788", "08000a00", "")]
    for _ in range(1500):
        multifd = generator.choice((0, 1, 3))
        postcopy = generator.random() < 0.5 and (rule is not Rule.QEMU_10_0 or not multifd)
        preempt = postcopy and generator.random() < 0.7
        expected = Expected(
            rule,
            multifd,
            postcopy=postcopy,
            preempt=preempt,
            early_preempt=preempt and generator.random() < 0.5,
            recovery=postcopy and generator.random() < 0.2,
            postcopy_magic=preempt and rule is Rule.VIRTMIG and generator.random() < 0.5,
        )
        present: list[Identity] = []
        for _ in range(8):
            first = generator.choice((None, generator.randbytes(generator.randrange(30)), *magics))
            if first == magics[1] and generator.random() < 0.5:
                first += generator.randbytes(16) + bytes([generator.randrange(5)])
            try:
                found = identify(
                    expected, present, first, peekable=generator.random() < 0.8, silent=generator.random() < 0.3
                )
            except ChannelError as refused:
                assert "saw" in str(refused)
                assert "expected" in str(refused)
                continue
            if isinstance(found, NeedMoreBytes):
                continue
            present.append(found)
        named = [(channel.role, channel.index) for channel in present]
        assert len(set(named)) == len(named)
        assert sum(role is Role.MULTIFD for role, _ in named) <= multifd
