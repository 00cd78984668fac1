"""How fast multifd packets are read and made, against memcpy in the same run:  python tests/bench/multifd_stream.py

Uncompressed packets of 128 random pages, 64 MiB a pass; the ratio is to copying the same bytes with numpy between two
warm buffers. Passes alternate, the median counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from virtmig.stream.multifd import MultifdDecoder
from virtmig.stream.multifd_encoder import MultifdEncoder
from virtmig.stream.wire import MULTIFD_PACKET_SIZE, Dialect

PAGE_BYTES = 4096


def measure(size_bytes: int, passes: int) -> dict[str, float]:
    """Median GiB/s by name."""
    source = np.frombuffer(np.random.default_rng(1).bytes(size_bytes), np.uint8)
    target = np.ones_like(source)
    memory = memoryview(source).cast("B")
    sequential = np.arange(0, size_bytes, PAGE_BYTES, dtype=np.uint64)
    scattered = sequential[::2].copy()
    pieces = [
        b"".join(
            MultifdEncoder(0, dialect=Dialect.QEMU_11_1).pages_of_memory("pc.ram", sequential[at : at + 128], memory)
        )
        for at in range(0, len(sequential), 128)
    ]
    blocks = {"pc.ram": size_bytes}

    def copy() -> int:
        target[:] = source
        return size_bytes

    def feed(step: int) -> int:
        decoder = MultifdDecoder(method="none", blocks=blocks, expect_hello=False)
        total = 0
        for piece in pieces:
            view = memoryview(piece)
            for at in range(0, len(view), step):
                decoder.feed(view[at : at + step])
                for event in decoder.events():
                    total += len(event.data)  # type: ignore[union-attr]
        return total

    def in_place() -> int:
        """As from recv_into: the bytes are copied once, by the caller, to where they stay."""
        decoder = MultifdDecoder(method="none", blocks=blocks, expect_hello=False)
        total = 0
        for piece in pieces:
            view, at = memoryview(piece), 0
            while at < len(view):
                room = decoder.room()
                count = min(len(room), len(view) - at)
                room[:count] = view[at : at + count]
                decoder.filled(count)
                at += count
            for event in decoder.events():
                total += len(event.data)  # type: ignore[union-attr]
        return total

    def encode(offsets: np.ndarray) -> int:
        encoder = MultifdEncoder(0, dialect=Dialect.QEMU_11_1)
        at, total = 0, 0
        place = memoryview(target).cast("B")
        for first in range(0, len(offsets), 128):
            at = 0
            for buffer in encoder.pages_of_memory("pc.ram", offsets[first : first + 128], memory):
                place[at : at + len(buffer)] = buffer
                at += len(buffer)
            total += at
        return total

    def encode_to_buffers() -> int:
        buffers = MultifdEncoder(0, dialect=Dialect.QEMU_11_1).pages_of_memory("pc.ram", sequential, memory)
        return sum(map(len, buffers))

    contestants: dict[str, Callable[[], int]] = {
        "memcpy": copy,
        "decode, packets whole": lambda: feed(MULTIFD_PACKET_SIZE * 2),
        "decode, 64 KiB reads": lambda: feed(64 * 1024),
        "decode, read in place": in_place,
        "encode and copy out, neighbours": lambda: encode(sequential),
        "encode and copy out, every second page": lambda: encode(scattered),
        "encode to buffers only": encode_to_buffers,
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    gc.disable()
    for number in range(passes + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            done = run()
            if number:  # the first pass warms up
                rates[name].append(done / (time.perf_counter() - begin) / 2**30)
    gc.enable()
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates = measure(options.mib << 20, options.passes)
    ratios = {name: rate / rates["memcpy"] for name, rate in rates.items()}
    if options.json:
        print(json.dumps({"gib_per_s": rates, "of_memcpy": ratios}))
        return
    for name, rate in rates.items():
        print(f"{name:40} {rate:7.2f} GiB/s {ratios[name]:6.2f} of memcpy")


if __name__ == "__main__":
    main()
