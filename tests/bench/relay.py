"""The relay between two QEMUs against their direct way and libvirt's tunnel:  ./dev bench relay [--mib N] [--rounds N]

Two hosts in namespaces of their own share this machine's processors: unshaped, processor time is the limit; shaped to
2 Gbit/s with 1 ms of delay each way, the link is. Contestants are in relay_contestants.py, rounds and ratios are those
of ./dev bench engine. With $VIRTMIG_CHROOTS the newest QEMU there is taken; what is compared with libvirt's tunnel
runs with libvirt's own QEMU. As root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import hops
from tests.bench.engine import FOREIGN_SHARE, Item, describe_machine, measure, tell
from tests.bench.engine_report import Goal, Sample, Sections, medians, page, ratios, table
from tests.bench.relay_contestants import RelayBench, downtime, faults, handshake, moved, tunnelled
from tests.bench.relay_hosts import bring_up
from tests.support.emulators import emulators
from virtmig.lab.link import Shape

_FREE = Shape()
_LINK = Shape(bandwidth_mbit_s=2000, delay_ms=1.0)
_DELAYS_MS = (1, 10, 50)
_SIZES_MIB = (512, 1024, 2048, 4096)
_DIRECT, _RELAY, _TLS = "", "key", "tls"

SECTIONS: Sections = (
    ("moved", "Memory moved (medians; GiB/s with least..most; CPU-seconds per GiB; +MiB is private memory)", (
        ("GiB/s", "gib_per_s", ".2f"), ("seconds", "seconds", ".3f"), ("agent src", "cpu_agent_source_per_gib", ".3f"),
        ("agent dst", "cpu_agent_destination_per_gib", ".3f"), ("QEMUs", "cpu_qemus_per_gib", ".3f"),
        ("+MiB src", "grown_agent_source_mib", ".1f"), ("+MiB dst", "grown_agent_destination_mib", ".1f"),
        ("down ms", "downtime_ms", ".1f"),
    )),
    ("faults", "Fault latency in postcopy with preempt (QEMU's buckets)", (
        ("faults/s", "faults_per_s", ".0f"), ("p50 us", "p50_us", ".0f"), ("p99 us", "p99_us", ".0f"),
        ("max us", "max_us", ".0f"), ("faults", "faults", ".0f"), ("seconds", "seconds", ".3f"),
    )),
    ("handshake", "Handshake: main and two parallel channels open", (
        ("ms", "wall_ms", ".1f"), ("RTT ms", "delay_ms", ".0f"), ("round trips", "round_trips", ".0f"),
    )),
)  # fmt: skip
CHARTS = (
    ("moved", "gib_per_s", "Throughput, GiB/s"),
    ("moved", "cpu_agent_source_per_gib", "CPU-seconds per GiB of the source's agent (less is better)"),
    ("faults", "p99_us", "Fault latency p99, µs (less is better)"),
    ("handshake", "wall_ms", "Handshake, ms (less is better)"),
)


def items(mib: int, sizes: Sequence[int]) -> list[Item]:
    found: list[Item] = []

    def add(name: str, kind: str, run: Callable[[RelayBench], Sample], *, often: bool = False) -> None:
        found.append(Item(name, kind, run, often))

    def move(name: str, way: str, shape: Shape, *, often: bool = False, **options: Any) -> None:
        add(name, "moved", lambda bench: moved(bench, way, shape, **options), often=often)

    move("B direct", _DIRECT, _FREE, often=True)
    move("E relay", _RELAY, _FREE, often=True)
    move("H relay, TLS", _TLS, _FREE, often=True)
    move("B direct, libvirt's QEMU", _DIRECT, _FREE, often=True, own=True)
    move("E relay, libvirt's QEMU", _RELAY, _FREE, often=True, own=True)
    add("F tunnelled", "moved", lambda bench: tunnelled(bench, _FREE), often=True)
    for size in sizes:
        move(f"M relay, {size} MiB", _RELAY, _FREE, mib=size)
    add("L direct, guest runs", "moved", lambda bench: downtime(bench, _DIRECT, _FREE), often=True)
    add("L relay, guest runs", "moved", lambda bench: downtime(bench, _RELAY, _FREE), often=True)
    for quiet in (False, True):
        for way, name in ((_DIRECT, "direct"), (_RELAY, "relay")):
            add(f"P {name}, {'quiet' if quiet else 'loaded'}", "faults",
                lambda bench, way=way, quiet=quiet: faults(bench, way, quiet))  # type: ignore[misc]  # fmt: skip
    move("B direct, shaped", _DIRECT, _LINK, often=True)
    move("E relay, shaped", _RELAY, _LINK, often=True)
    move("H relay, TLS, shaped", _TLS, _LINK, often=True)
    for delay in _DELAYS_MS:
        for way, name in ((_RELAY, "key"), (_TLS, "TLS")):
            add(f"K {name}, {delay} ms", "handshake",
                lambda bench, way=way, delay=delay: handshake(bench, way, delay))  # type: ignore[misc]  # fmt: skip
    return found


def goals() -> list[Goal]:
    return [
        Goal("E/B shaped", "E relay, shaped", "B direct, shaped", "gib_per_s", 0.98),
        Goal("H/B shaped, TLS", "H relay, TLS, shaped", "B direct, shaped", "gib_per_s"),
        Goal("E/B unshaped", "E relay", "B direct", "gib_per_s", 0.75),
        Goal("H/B unshaped, TLS", "H relay, TLS", "B direct", "gib_per_s"),
        Goal("E/B unshaped, libvirt's QEMU", "E relay, libvirt's QEMU", "B direct, libvirt's QEMU", "gib_per_s", 0.75),
        Goal("E/F unshaped, libvirt's QEMU", "E relay, libvirt's QEMU", "F tunnelled", "gib_per_s", 2.0),
        Goal("F/B unshaped, libvirt's QEMU", "F tunnelled", "B direct, libvirt's QEMU", "gib_per_s"),
        Goal("P p99 of direct / relay, loaded", "P direct, loaded", "P relay, loaded", "p99_us", 0.5),
        Goal("P p99 of direct / relay, quiet", "P direct, quiet", "P relay, quiet", "p99_us", 0.5),
    ]


@dataclass(frozen=True)
class Bound:
    """The median of `figure` (that of `beside` taken off) is at most `most`."""

    name: str
    item: str
    figure: str
    most: float
    beside: str = ""

    def judged(self, samples: Sequence[Sample]) -> str | None:
        found = medians(samples, self.item, self.figure)
        taken = medians(samples, self.beside, self.figure) if self.beside else (0.0, 0.0, 0.0)
        if found is None or taken is None:
            return None
        value = found[0] - taken[0]
        return f"{self.name:54}{value:9.3f}   at most {self.most:g}: {'kept' if value <= self.most else 'MISSED'}"


BOUNDS = (
    *(Bound(f"CPU-s per GiB, agent of the {side}, {name}", item, f"cpu_agent_{side}_per_gib", most)
      for side in ("source", "destination")
      for name, item, most in (("plain", "E relay", 0.25), ("TLS", "H relay, TLS", 0.6))),
    Bound("downtime over direct, ms", "L relay, guest runs", "downtime_ms", 20.0, "L direct, guest runs"),
    *(Bound(f"round trips of a handshake, {name}, {delay} ms", f"K {name}, {delay} ms", "round_trips", 5)
      for delay in _DELAYS_MS for name in ("key", "TLS")),
    *(Bound(f"agents' memory, {_SIZES_MIB[-1]} over {_SIZES_MIB[0]} MiB of guest, {side}, MiB",
            f"M relay, {_SIZES_MIB[-1]} MiB", f"grown_agent_{side}_mib", 8.0, f"M relay, {_SIZES_MIB[0]} MiB")
      for side in ("source", "destination")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="the guest's RAM (2048)")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more is thrown away (5)")
    parser.add_argument("--only", default="", help="contestants whose names begin so, with commas: E,B,G")
    parser.add_argument("--sizes", default=",".join(map(str, _SIZES_MIB)), help="of M, in MiB")
    parser.add_argument("--json", type=Path, help="every sample into this file")
    parser.add_argument("--html", type=Path, help="charts into this file")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("bench relay: needs root, for two hosts in namespaces")
    found = emulators()
    newest = max(found, key=lambda each: tuple(map(int, each.version_name.split("."))))
    wanted = tuple(filter(None, options.only.split(",")))
    sizes = [int(word) for word in options.sizes.split(",")]
    chosen = [item for item in items(options.mib, sizes) if not wanted or item.name.startswith(wanted)]
    limited = not wanted or "G" in wanted
    samples: list[Sample] = []
    limits: list[dict[str, float]] = []
    machine = describe_machine(newest) | {"libvirts_qemu": found[0].version_name}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="virtmig-bench-", dir="/dev/shm"))
    bench = RelayBench(newest, options.mib, folder, bring_up=lambda: bring_up(found))
    try:
        for number, sample in measure(bench, chosen, options.rounds, limited):
            if sample is None:
                limits += [hops.measure()] if number else []
                continue
            samples.append(sample)
            tell(sample, options.rounds)
    except KeyboardInterrupt:
        print("bench: stopped; this is what was measured until then", file=sys.stderr)
    finally:
        bench.close()
    _report(options, machine, samples, limits)


def _report(
    options: argparse.Namespace, machine: dict[str, Any], samples: list[Sample], limits: list[dict[str, float]]
) -> None:
    counted = [sample for sample in samples if sample["round"] and "failed" not in sample]
    told = ratios(counted, goals())
    bounds = [line for bound in BOUNDS if (line := bound.judged(counted))]
    text = "\n".join([table(counted, limits, told, SECTIONS), "", *bounds])
    disturbed = sum(sample["foreign_share"] > FOREIGN_SHARE for sample in counted)
    notes = [
        f"{options.mib} MiB, {options.rounds} rounds, QEMU {machine['qemu']} (libvirt's: {machine['libvirts_qemu']}), "
        f"Linux {machine['kernel']}, Python {machine['python']}, {machine['processors']} x {machine['model']}, load "
        f"{machine['load_at_start'][0]:.1f} before",
        f"{disturbed} of {len(counted)} samples with more than {FOREIGN_SHARE:.0%} of a core taken by other work; "
        f"{sum('failed' in sample for sample in samples)} failed",
    ]
    print("\n".join([*notes, "", text]))
    for sample in samples:
        if "failed" in sample:
            print(f"failed: round {sample['round']}, {sample['item']}: {sample['failed']}")
    if options.json:
        rows = [
            {"name": each.goal.name, "median": each.median, "low": each.low, "high": each.high,
             "goal": each.goal.least, "verdict": each.verdict, "values": each.values}
            for each in told
        ]  # fmt: skip
        middle = {name: statistics.median(each[name] for each in limits) for name in limits[-1]} if limits else {}
        whole = {"machine": machine, "command": sys.argv[1:], "samples": samples, "limits": limits,
                 "limits_median": middle, "ratios": rows, "bounds": bounds}  # fmt: skip
        options.json.write_text(json.dumps(whole, indent=1))
    if options.html:
        options.html.write_text(page("virtmig's relay", notes, counted, told, text, CHARTS))


if __name__ == "__main__":
    main()
