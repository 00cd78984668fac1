"""Faults of a guest whose pages are still elsewhere (P), and a guest that begins before its memory is there (R).

P   The guest touches every page in a random order as fast as it can, and none is there when it begins. "loaded": the
    rest comes at full speed meanwhile; "quiet": nothing comes unasked (QEMU: 512 KiB/s) for SETTLE_S, then all of it.
    Engine: FaultHandler's figures, from reading the fault to placing the page. QEMU: postcopy-latency of a destination
    that has postcopy-blocktime with a distribution (10.1 and newer), from the fault thread's notice to the placing.
R   From the command to the guest's next heartbeat on its serial port; both QEMUs have been started before.
"""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path
from typing import Any

from tests.bench.contestants import Bench, Sample, lab_boot, lab_fill, stored_guest
from tests.bench.processes import UNLIMITED, Meter, Side, fill_qemu, listen, qemu
from tests.support.emulators import dialect

SETTLE_S = 1.5
_QUIET_BYTES_PER_S = 512 << 10
_POSTCOPY = ("return-path", "postcopy-ram")
#: protected mode; then for ever: page = (page * 1664525 + 1013904223) & mask; above 1 MiB: ++word 2 of it. The mask is
#: at 0x1f0. From r.S by `gcc -m32 -nostdlib -Wl,-Ttext=0x7c00 -Wl,--oformat=binary`:
#:   next: imull $1664525,%esi,%esi; addl $1013904223,%esi; movl %esi,%eax; andl %edi,%eax; shll $12,%eax
#:         cmpl $0x100000,%eax; jb next; incl 8(%eax); jmp next
_RANDOM_WALK = bytes.fromhex(
    "fa31c08ed8660f0116687ce4920c02e6920f20c00c010f22c066ea217c00"
    "00080066b810008ed831f68b3df07d000069f60d66190081c65ff36e3c89"
    "f021f8c1e00c3d0000100072e6ff4008ebe1669000000000000000" "00ffff"
    "0000009acf00ffff00000092cf001700507c000000000000000000000000"
)  # fmt: skip


def random_walker(mib: int) -> bytes:
    """A floppy whose boot sector touches the pages of the largest power of two below `mib` in a scrambled order."""
    pages = 1 << ((mib << 8).bit_length() - 1)
    sector = bytearray(_RANDOM_WALK.ljust(510, b"\0") + b"\x55\xaa")
    struct.pack_into("<I", sector, 0x1F0, pages - 1)
    return bytes(sector).ljust(1440 * 1024, b"\0")


def engine_faults(bench: Bench, mib: int, preempt: bool, quiet: bool) -> Sample:
    settings = {"pattern": "random", "fill": "random", "batch_pages": 16}
    with Side() as source, Side() as destination:
        source.ask("guest_here", length=mib << 20, settings=settings)
        there = destination.ask("listen", kind="process")
        source.ask("split", address=there["address"], preempt=preempt, quiet=quiet)
        destination.ask("started")
        meter = Meter(source=source.pid, destination=destination.pid)
        began = time.monotonic()
        if quiet:
            time.sleep(SETTLE_S)
            faults = destination.ask("faults")["faults"]
            measured = time.monotonic() - began
            source.ask("release")
        sent = source.ask("run")
        seconds = time.monotonic() - began
        destination.ask("run")
        if not quiet:
            faults, measured = destination.ask("faults")["faults"], seconds
        found: Sample = meter.stop()
    return found | {
        "seconds": seconds,
        "downtime_ms": sent["downtime_ms"],
        "faults": faults["faults"],
        "faults_per_s": faults["faults"] / measured,
        "p50_us": faults["p50_us"],
        "p99_us": faults["p99_us"],
        "max_us": faults["max_us"],
        "mib": mib,
    }


def qemu_faults(bench: Bench, mib: int, preempt: bool, quiet: bool) -> Sample:
    capabilities = (*_POSTCOPY, *(["postcopy-preempt"] if preempt else []))
    rate = _QUIET_BYTES_PER_S if quiet else 0
    boot = random_walker(mib)
    with (
        qemu(bench.qemu, mib, "source", capabilities=capabilities, boot=boot, touched=True,
             parameters={"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": rate}) as source,
        qemu(bench.qemu, mib, "destination", "-incoming", "defer", shared=False, boot=boot,
             capabilities=(*capabilities, "postcopy-blocktime")) as destination,
    ):  # fmt: skip
        time.sleep(0.7)  # SeaBIOS, and a first walk
        source.qmp.execute("stop")
        fill_qemu(source, bench.pattern("random", mib), 1 << 20)
        source.qmp.execute("cont")
        address = listen(destination)
        source.qmp.execute("migrate", uri=address)
        source.qmp.wait_status("active")
        source.qmp.execute("migrate-start-postcopy")
        source.qmp.wait_status("postcopy-active")
        meter = Meter(source=source.process.pid, destination=destination.process.pid)
        began = time.monotonic()
        destination.qmp.wait_event(lambda event: event["event"] == "RESUME", "RESUME")
        measured: float | None = None
        info: dict[str, Any] = {}
        if quiet:
            time.sleep(SETTLE_S)
            info, measured = destination.qmp.execute("query-migrate"), time.monotonic() - began
            source.set_parameters({"max-postcopy-bandwidth": 0, "max-bandwidth": UNLIMITED})
        source.qmp.wait_status("completed")
        seconds = time.monotonic() - began
        destination.qmp.wait_status("completed")
        found: Sample = meter.stop()
        last = destination.qmp.execute("query-migrate")
        if "postcopy-latency-dist" not in info:
            info, measured = last, seconds
        found |= {"requests": source.qmp.execute("query-migrate").get("ram", {}).get("postcopy-requests")}
    return found | {"seconds": seconds, "mib": mib, **_latencies(info, measured or seconds)}


def _latencies(info: dict[str, Any], measured_s: float) -> Sample:
    """From QEMU's distribution: bucket N is [2^N, 2^(N+1)) us; percentiles are interpolated, the maximum is an edge."""
    buckets = info.get("postcopy-latency-dist")
    if not buckets or not sum(buckets):
        return {"not_had": "this QEMU tells no distribution of fault latencies"}
    return {
        "faults": sum(buckets),
        "faults_per_s": sum(buckets) / measured_s,
        "mean_us": info.get("postcopy-latency", 0) / 1000,
        "p50_us": _percentile(buckets, 0.50),
        "p99_us": _percentile(buckets, 0.99),
        "max_us": float(2 ** max(number + 1 for number, count in enumerate(buckets) if count)),
        "buckets": buckets,
    }


def _percentile(buckets: list[int], share: float) -> float:
    wanted, below = share * sum(buckets), 0
    for number, count in enumerate(buckets):
        if count and below + count >= wanted:
            return float(2 ** (number + (wanted - below) / count))
        below += count
    return float(2 ** len(buckets))


def restore_lazily(bench: Bench) -> Sample:
    """The engine's image, by postcopy with preempt."""
    image = stored_guest(bench)
    with (
        Side() as source,
        qemu(bench.qemu, bench.mib, "destination", "-incoming", "defer", shared=False,
             capabilities=(*_POSTCOPY, "postcopy-preempt"), boot=lab_boot()) as destination,
    ):  # fmt: skip
        address = listen(destination)
        meter = Meter(source=source.pid, destination=destination.process.pid)
        began = time.monotonic()
        source.ask(
            "send", folder=str(image), address=address, destination=dialect(bench.qemu).value,
            postcopy=True, preempt=True,
        )  # fmt: skip
        destination.wait_heartbeat(1)
        first = time.monotonic() - began
        source.ask("run")
        seconds = time.monotonic() - began
        found: Sample = meter.stop()
    return found | {"seconds": seconds, "first_beat_s": first, "mib": bench.mib}


def restore_by_qemu(bench: Bench, mapped: bool = False) -> Sample:
    """QEMU's own stream of the same guest from a file in the page cache; `mapped`: its mapped-ram file, two threads."""
    stored = stored_stream(bench, mapped)
    with qemu(
        bench.qemu, bench.mib, "destination", "-incoming", "defer", shared=False, boot=lab_boot(), **_format(mapped)
    ) as destination:
        meter = Meter(source=destination.process.pid, destination=destination.process.pid)
        there = "/" + str(stored.relative_to(bench.qemu.root))
        began = time.monotonic()
        destination.qmp.execute("migrate-incoming", uri=f"file:{there}" if mapped else f"exec:cat {there}")
        destination.wait_heartbeat(1)
        first = time.monotonic() - began
        found: Sample = meter.stop()
    found["cpu_source_s"] = 0.0
    return found | {"seconds": first, "first_beat_s": first, "mib": bench.mib}


def stored_stream(bench: Bench, mapped: bool) -> Path:
    """Made once, in the folder of this QEMU; whoever closes the bench removes it."""
    name = f"bench-stream-{bench.folder.name}-{bench.mib}{'-mapped' if mapped else ''}"
    path = bench.qemu.root / "var/tmp" / name
    if not path.exists():
        bench.files.append(path)
        path.touch()
        with qemu(bench.qemu, bench.mib, "stored", boot=lab_boot(), **_format(mapped)) as source:
            lab_fill(bench, source)
            there = f"/var/tmp/{name}"
            source.qmp.execute("migrate", uri=f"file:{there}" if mapped else f"exec:cat > {there}")
            source.qmp.wait_status("completed")
        with contextlib.suppress(OSError), path.open("rb") as file:
            while file.read(8 << 20):
                pass
    return path


def _format(mapped: bool) -> dict[str, Any]:
    if not mapped:
        return {}
    return {"capabilities": ("mapped-ram", "multifd"), "parameters": {"multifd-channels": 2}}
