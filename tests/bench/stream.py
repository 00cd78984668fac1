"""How fast the stream is read and written, against memcpy in the same run:  ./dev bench stream

A main stream of random pages (one named page, then CONTINUE records), and multifd packets (multifd_stream.py). The
ratio is to copying the same bytes with numpy between two warm buffers. Passes alternate, the median counts.
Goal: each at least 0.4 of memcpy; must: 0.2.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from tests.bench import multifd_stream
from virtmig.stream.decoder import QemuStreamDecoder
from virtmig.stream.encoder import encode_events
from virtmig.stream.events import EndOfRam, Pages, RamBlock, RamBlocks, SectionBegin, SectionFooter, StreamHeader
from virtmig.stream.ram import LONGEST_RUN_PAGES
from virtmig.stream.wire import Item, RamFlag

PAGE_BYTES = 4096
MUST, GOAL = 0.2, 0.4


def random_stream(size_bytes: int) -> tuple[list[object], bytes, np.ndarray]:
    """The events of a main stream of that many bytes of pages, its bytes, and the guest's memory."""
    memory = np.frombuffer(np.random.default_rng(1).bytes(size_bytes), np.uint8)
    words = np.arange(0, size_bytes, PAGE_BYTES, dtype=np.uint64) | np.uint64(RamFlag.PAGE | RamFlag.CONTINUE)
    words[0] = int(RamFlag.PAGE)
    view = memory.data
    runs = [
        Pages("pc.ram", at == 0, words[at : at + LONGEST_RUN_PAGES],
              view[at * PAGE_BYTES : (at + LONGEST_RUN_PAGES) * PAGE_BYTES])
        for at in range(0, len(words), LONGEST_RUN_PAGES)
    ]  # fmt: skip
    events: list[object] = [
        StreamHeader(3, "pc-i440fx-7.2"),
        SectionBegin(Item.SECTION_START, 2, "ram", 0, 4),
        RamBlocks(size_bytes | RamFlag.MEM_SIZE, (RamBlock("pc.ram", size_bytes),)),
        EndOfRam(),
        SectionFooter(2),
        SectionBegin(Item.SECTION_PART, 2, "ram"),
        *runs,
        EndOfRam(),
        SectionFooter(2),
    ]
    return events, b"".join(encode_events(events)), memory


def measure(size_bytes: int, passes: int) -> dict[str, float]:
    """Median GiB/s of page data by name."""
    events, raw, memory = random_stream(size_bytes)
    target = np.ones(len(raw), np.uint8)
    place = target.data

    def copy() -> int:
        target[:size_bytes] = memory
        return size_bytes

    def decode(step: int) -> int:
        decoder, total, view = QemuStreamDecoder(), 0, memoryview(raw)
        for at in range(0, len(raw), step):
            decoder.feed(view[at : at + step])
            for event in decoder.events():
                if isinstance(event, Pages):
                    total += len(event.data)
        if total != size_bytes:
            raise SystemExit(f"{total} bytes of pages came out of {size_bytes}")
        return total

    def encode() -> int:
        at = 0
        for part in encode_events(events):
            place[at : at + len(part)] = part
            at += len(part)
        if at != len(raw):
            raise SystemExit(f"{at} bytes came out of {len(raw)}")
        return size_bytes

    def encode_to_buffers() -> int:
        return size_bytes if sum(map(len, encode_events(events))) == len(raw) else 0

    contestants: dict[str, Callable[[], int]] = {
        "memcpy": copy,
        "decode main, 1 MiB reads": lambda: decode(1 << 20),
        "decode main, 256 KiB reads": lambda: decode(256 << 10),
        "decode main, 64 KiB reads": lambda: decode(64 << 10),
        "encode main and copy out": encode,
        "encode main to buffers": encode_to_buffers,
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


def multifd(size_bytes: int, passes: int) -> dict[str, float]:
    """The contestants of multifd_stream.py, measured behind the main stream's."""
    return multifd_stream.measure(size_bytes, passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates = measure(options.mib << 20, options.passes)
    ratios = {name: rate / rates["memcpy"] for name, rate in rates.items()}
    packets = multifd(options.mib << 20, options.passes)
    memcpy = packets.pop("memcpy")
    rates |= {f"multifd: {name}": rate for name, rate in packets.items()}
    ratios |= {f"multifd: {name}": rate / memcpy for name, rate in packets.items()}
    if options.json:
        print(json.dumps({"gib_per_s": rates, "of_memcpy": ratios, "must": MUST, "goal": GOAL}))
        return
    for name, rate in rates.items():
        print(f"{name:48} {rate:7.2f} GiB/s {ratios[name]:6.2f} of memcpy")


if __name__ == "__main__":
    main()
