"""Mutated recordings of main and preempt channels: events, "need more", or one typed error, in bounded memory.

VIRTMIG_FUZZ_S sets the seconds for each test (default 1), VIRTMIG_FUZZ_SEED the seed; a failure names seed and number.
"""

import contextlib
import itertools
import lzma
import os
import random
import resource
import time
from pathlib import Path

import pytest

from tests.support.vectors import recordings
from virtmig.errors import RemoteProtocolError
from virtmig.stream.decoder import PreemptDecoder, QemuStreamDecoder
from virtmig.stream.device import read_description, walk
from virtmig.stream.encoder import encode_events
from virtmig.stream.events import Description, DeviceSection
from virtmig.stream.save_file import encode_save_header, read_save_header

CAPTURES = Path(__file__).parent.parent / "stream" / "captures"
SECONDS = float(os.environ.get("VIRTMIG_FUZZ_S", "1"))
SEED = int(os.environ.get("VIRTMIG_FUZZ_SEED", "3"))
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
#: what all inputs may add to the peak: the limits below, the inputs, and the interpreter's own
EXTRA_KIB = 128 * 1024
LIMITS = {"section_limit_bytes": 1 << 20, "package_limit_bytes": 1 << 20, "description_limit_bytes": 1 << 20}


def shorten(raw: bytes) -> bytes:
    """The head, a piece of the pages, and everything from the last RAM section on: more inputs in the same time."""
    decoder = QemuStreamDecoder()
    decoder.feed(raw)
    kept: list[bytes] = []
    pages = 0
    for event in decoder.events():
        part = b"".join(encode_events([event]))
        if len(part) > 4000 and not isinstance(event, DeviceSection | Description):
            pages += 1
            if pages > 3:
                continue
            part = part[: 8 + part[8] + 1 + 4096] if part[7] & 0x20 == 0 and part[7] & 8 else part
        kept.append(part)
    return b"".join(kept)


def main_streams() -> list[bytes]:
    found = [
        shorten(each.sent(name))
        for each in recordings()
        for name in each.channels
        if name == "main" and "file" not in each.channels
    ]
    found += [lzma.decompress(path.read_bytes()) for path in sorted(CAPTURES.glob("main-*.xz"))]
    assert len(found) > 25
    return found


def mutate(generator: random.Random, raw: bytes) -> bytes:
    """Flip bits, write telling numbers, cut, repeat or splice pieces."""
    changed = bytearray(raw)
    for _ in range(generator.randint(1, 5)):
        if not changed:
            break
        at = generator.randrange(len(changed))
        if generator.random() < 0.4:  # the head decides how everything else is read
            at = min(at, generator.randrange(400))
        kind = generator.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            width = generator.choice((1, 2, 4, 8))
            changed[at : at + width] = (generator.choice(NUMBERS) & (1 << 8 * width) - 1).to_bytes(width, "big")
        elif kind == 2:
            del changed[at : at + generator.randint(1, 2000)]
        elif kind == 3:
            changed[at:at] = changed[at : at + generator.randint(1, 2000)]
        elif kind == 4:
            other = generator.randrange(len(raw))
            changed[at : at + 64] = raw[other : other + 64]
        else:
            del changed[at:]
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


@pytest.fixture(scope="module")
def streams():
    return main_streams()


def test_main(streams):
    generator = random.Random(SEED)
    refused = whole = 0
    with bounded_memory():
        for number, raw in inputs(generator, streams):
            decoder = QemuStreamDecoder(recovery=generator.random() < 0.05, **LIMITS)
            out = bytearray()
            devices, description = [], None
            step = generator.choice((len(raw) or 1, 65536, 4096, 777))

            def take(decoder=decoder, out=out, devices=devices):
                found = None
                for event in decoder.events():
                    for part in encode_events([event]):
                        out += part
                    if isinstance(event, DeviceSection):
                        devices.append(event)
                    if isinstance(event, Description):
                        found = event
                return found

            try:
                for at in range(0, len(raw), step):
                    decoder.feed(raw[at : at + step])
                    description = take() or description
                decoder.end()
                description = take() or description
                whole += 1
                assert raw == out, (SEED, number)
            except RemoteProtocolError as broken:
                assert broken.channel == "main", (SEED, number)
                assert 0 <= broken.offset <= len(raw), (SEED, number)
                refused += 1
            assert raw[: len(out)] == out, (SEED, number)
            if description is not None and description.complete:
                with contextlib.suppress(RemoteProtocolError):
                    for device, entry in zip(devices, read_description(description.text)["devices"], strict=False):
                        if isinstance(entry, dict):
                            list(walk(entry, device.data))
    assert refused > 20
    assert refused + whole > 50


def test_preempt():
    originals = [each.sent("preempt")[:60_000] for each in recordings() if "preempt" in each.channels]
    originals = [raw for raw in originals if raw]
    assert originals
    generator = random.Random(SEED)
    refused = 0
    with bounded_memory():
        for number, raw in inputs(generator, originals):
            decoder = PreemptDecoder(known={"pc.ram": 1 << 26, "pc.bios": 1 << 18})
            out = bytearray()
            step = generator.choice((len(raw) or 1, 4096, 777))
            try:
                for at in range(0, len(raw), step):
                    decoder.feed(raw[at : at + step])
                    for part in encode_events(decoder.events()):
                        out += part
                decoder.end()
                list(decoder.events())
            except RemoteProtocolError as broken:
                assert 0 <= broken.offset <= len(raw), (SEED, number)
                refused += 1
            assert raw[: len(out)] == out, (SEED, number)
    assert refused > 20


def test_save_file():
    original = lzma.decompress((CAPTURES / "save-file-head-libvirt-9.0.xz").read_bytes())
    generator = random.Random(SEED)
    refused = 0
    with bounded_memory():
        for number, raw in inputs(generator, [original]):
            try:
                header = read_save_header(raw)
            except RemoteProtocolError as broken:
                assert 0 <= broken.offset <= len(raw), (SEED, number)
                refused += 1
            else:
                assert isinstance(header.xml + header.cookie + header.format_name, str)
                if b"\0" in header.data:
                    assert encode_save_header(header) == raw[: header.stream_offset], (SEED, number)
    assert refused > 20
