"""The contestants of `./dev bench engine`. Each function is one migration and returns one sample: figures by name.

A   engine -> engine, two processes: a stopped process guest       "seconds": the call until SHUT 0 has come
B,C QEMU -> QEMU, a stopped guest, multifd or a single stream      "seconds": `migrate` until the completed event
D   QEMU -> engine (in memory), engine's image -> QEMU
L   a guest that runs and writes 8 MiB/s over 2 MiB: downtime
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.processes import RAM, Meter, Side, SideFailed, fill_qemu, listen, qemu
from tests.bench.workloads import Pattern
from tests.support.emulators import LabQemu, dialect
from tests.support.qemu import Qemu
from tests.support.recorder import Emulator
from virtmig.lab.guest import GuestSettings, boot_image

Sample = dict[str, Any]
#: a guest that is let go on at the destination does nothing there
_IDLE = {"rate_mib_s": 0.001}
_LIVE_RATE, _LIVE_WALK_MIB = 8, 2
#: the lab guest keeps to the memory below; above it is the workload
_ABOVE_LAB = 16 << 20


#: workloads whose source has memory that was never touched
_HOLES = ("zero", "clumped", "scattered")


@dataclass
class Bench:
    """What all contestants share: the newest QEMU, the guest's size, and the workloads made so far."""

    emulator: Emulator | None
    mib: int
    folder: Path
    patterns: dict[tuple[str, int], Pattern] = field(default_factory=dict)
    images: dict[int, Path] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def pattern(self, name: str, mib: int | None = None) -> Pattern:
        key = (name, mib or self.mib)
        if key not in self.patterns:
            self.patterns[key] = Pattern(name, key[1] << 20)
        return self.patterns[key]

    @property
    def qemu(self) -> Emulator:
        if self.emulator is None:
            raise SideFailed("no QEMU is at hand")
        return self.emulator

    def close(self) -> None:
        for pattern in self.patterns.values():
            pattern.close()
        for path in self.files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def engine_to_engine(bench: Bench, workload: str, channels: int, warm: bool = True, mib: int | None = None) -> Sample:
    mib = mib or bench.mib
    length = mib << 20
    with Side() as source, Side() as destination:
        here = source.ask("guest_here", length=length, settings=_IDLE)
        source.fill(bench.pattern(workload, mib), here["fd"])
        there = destination.ask(
            "listen", kind="process", channels=channels, prepared={"ram": length} if warm else None
        )  # fmt: skip
        meter = Meter(source=source.pid, destination=destination.pid)
        source.ask("migrate", address=there["address"], channels=channels)
        sent = source.ask("run")
        destination.ask("run")
        found: Sample = meter.stop()
    found |= {
        "seconds": sent["sent"]["elapsed_s"],
        "call_s": sent["call_s"],
        "downtime_ms": sent["downtime_ms"],
        "wire_bytes": sent["sent"]["bytes_sent"],
    }
    return _with_rates(found, mib)


def qemu_to_qemu(
    bench: Bench, workload: str, channels: int, warm: bool = True, mib: int | None = None, touched: bool = True
) -> Sample:
    """`channels` 0 is the single stream. `touched`: the source has its RAM mapped, like a guest that used it."""
    mib = mib or bench.mib
    options = _qemu_options(channels)
    incoming = ("-S", "-incoming", "defer")
    with (
        qemu(bench.qemu, mib, "source", "-S", touched=touched and workload not in _HOLES, **options) as source,
        qemu(bench.qemu, mib, "destination", *incoming, touched=warm, **options) as destination,
    ):
        fill_qemu(source, bench.pattern(workload, mib))
        address = listen(destination)
        meter = Meter(source=source.process.pid, destination=destination.process.pid)
        began = time.monotonic()
        source.qmp.execute("migrate", uri=address)
        source.qmp.wait_status("completed")
        ended = time.monotonic()
        destination.qmp.wait_status("completed")
        found: Sample = meter.stop()
        told = completed(source)
    found |= {"seconds": ended - began, **told}
    return _with_rates(found, mib)


def qemu_to_engine(bench: Bench, channels: int) -> Sample:
    with (
        qemu(bench.qemu, bench.mib, "source", "-S", touched=True, **_qemu_options(channels)) as source,
        Side() as destination,
    ):
        fill_qemu(source, bench.pattern("random"))
        there = destination.ask("listen", kind="memory", channels=channels, prepared={RAM: bench.mib << 20})
        meter = Meter(source=source.process.pid, destination=destination.pid)
        began = time.monotonic()
        source.qmp.execute("migrate", uri=there["address"])
        source.qmp.wait_status("completed")
        ended = time.monotonic()
        destination.ask("run")
        found: Sample = meter.stop()
        told = completed(source)
    found |= {"seconds": ended - began, **told}
    return _with_rates(found, bench.mib)


def engine_to_qemu(bench: Bench, channels: int) -> Sample:
    image = stored_guest(bench)
    options = _qemu_options(channels)
    with (
        Side() as source,
        qemu(bench.qemu, bench.mib, "destination", "-S", "-incoming", "defer", touched=True, **options) as destination,
    ):
        address = listen(destination)
        meter = Meter(source=source.pid, destination=destination.process.pid)
        source.ask(
            "send", folder=str(image), address=address, destination=dialect(bench.qemu).value,
            multifd_channels=channels,
        )  # fmt: skip
        sent = source.ask("run")
        destination.qmp.wait_status("completed")
        found: Sample = meter.stop()
    found |= {"seconds": sent["sent"]["elapsed_s"], "call_s": sent["call_s"], "wire_bytes": sent["sent"]["bytes_sent"]}
    return _with_rates(found, bench.mib)


def stored_guest(bench: Bench) -> Path:
    """An image in memory (/dev/shm) of a running lab guest whose RAM is random above its own part; made once."""
    if bench.mib not in bench.images:
        folder = bench.folder / f"image-{bench.mib}"
        with qemu(bench.qemu, bench.mib, "stored", capabilities=("return-path",), boot=lab_boot()) as source:
            lab_fill(bench, source)
            with Side() as destination:
                there = destination.ask("listen", kind="image", folder=str(folder))
                source.qmp.execute("migrate", uri=there["address"])
                destination.ask("run")
        bench.images[bench.mib] = folder
    return bench.images[bench.mib]


def lab_guest() -> GuestSettings:
    return GuestSettings(memory_mib=64, walk_mib=_LIVE_WALK_MIB, dirty_mib_s=_LIVE_RATE)


def lab_boot() -> bytes:
    """The lab guest with a heartbeat each tick (4 ms) instead of every 25th, so that waiting for one hides nothing."""
    image = bytearray(boot_image(lab_guest()))
    found = re.search(rb"\xc7\x05....\x19\0\0\0", image, re.DOTALL)  # movl $25, beat
    if found is not None:
        image[found.end() - 4] = 1
    return bytes(image)


def lab_fill(bench: Bench, machine: LabQemu) -> None:
    """Let the lab guest boot, then fill the memory that it does not use."""
    machine.wait_heartbeat(2)
    fill_qemu(machine, bench.pattern("random"), _ABOVE_LAB)


def live_engine(bench: Bench, channels: int) -> Sample:
    """The guest's own beat shows the largest gap, from one process to the other."""
    settings = {"rate_mib_s": _LIVE_RATE, "page_count": _LIVE_WALK_MIB * 256, "fill": "random"}
    length = bench.mib << 20
    with Side() as source, Side() as destination:
        source.ask("guest_here", length=length, settings=settings, runs=True)
        there = destination.ask("listen", kind="process", channels=channels, prepared={"ram": length})
        meter = Meter(source=source.pid, destination=destination.pid)
        source.ask("migrate", address=there["address"], channels=channels)
        sent = source.ask("run")
        destination.ask("run")
        found: Sample = meter.stop()
        gap = destination.ask("guest")["largest_gap_ms"]
    found |= {
        "seconds": sent["sent"]["elapsed_s"],
        "downtime_ms": sent["downtime_ms"],
        "largest_gap_ms": gap,
        "passes": sent["passes"],
    }
    return _with_rates(found, bench.mib)


def live_qemu(bench: Bench, channels: int) -> Sample:
    """Downtime from the source's STOP to the destination's RESUME event."""
    options = _qemu_options(channels)
    with (
        qemu(bench.qemu, bench.mib, "source", guest=lab_guest(), touched=True, **options) as source,
        qemu(bench.qemu, bench.mib, "destination", "-incoming", "defer", touched=True, **options) as destination,
    ):
        lab_fill(bench, source)
        address = listen(destination)
        meter = Meter(source=source.process.pid, destination=destination.process.pid)
        began = time.monotonic()
        source.qmp.execute("migrate", uri=address)
        source.qmp.wait_status("completed")
        ended = time.monotonic()
        destination.qmp.wait_status("completed")
        resumed = destination.qmp.wait_event(lambda event: event["event"] == "RESUME", "RESUME")
        stopped = source.qmp.wait_event(lambda event: event["event"] == "STOP", "STOP")
        found: Sample = meter.stop()
        told = completed(source)
    found |= {"seconds": ended - began, **told, "downtime_told_ms": told.get("downtime_ms")}
    found["downtime_ms"] = (_event_s(resumed) - _event_s(stopped)) * 1000
    return _with_rates(found, bench.mib)


def completed(source: Qemu) -> Sample:
    """query-migrate after the end; it may say total-time 0 for a moment (performance.md 2.3)."""
    for _ in range(50):
        info = source.qmp.execute("query-migrate")
        if info.get("total-time"):
            break
        time.sleep(0.01)
    ram = info.get("ram", {})
    return {
        "total_time_s": info.get("total-time", 0) / 1000,
        "setup_time_s": info.get("setup-time", 0) / 1000,
        "downtime_ms": float(info.get("downtime", 0)),
        "wire_bytes": ram.get("transferred", 0),
        "passes": ram.get("dirty-sync-count", 0),
    }


def _qemu_options(channels: int) -> dict[str, Any]:
    capabilities: Sequence[str] = ("return-path", "multifd") if channels else ("return-path",)
    return {"capabilities": capabilities, "parameters": {"multifd-channels": channels} if channels else {}}


def _event_s(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def _with_rates(found: Sample, mib: int) -> Sample:
    busy = found["cpu_source_s"] + found["cpu_destination_s"]
    gib = mib / 1024
    rates = {"mib": mib, "gib_per_s": gib / found["seconds"], "gib_per_cpu_s": gib / busy if busy else None}
    return found | rates | {
        "gib_per_cpu_s_source": gib / max(found["cpu_source_s"], 1e-6),
        "gib_per_cpu_s_destination": gib / max(found["cpu_destination_s"], 1e-6),
    }  # fmt: skip
