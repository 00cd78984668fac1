"""The engine against QEMU, all in one run:  ./dev bench engine [--mib N] [--rounds N] [--only NAMES] [--full]

Each round moves a guest of N MiB by every contestant (contestants.py, postcopy.py) and measures the machine's limits
(limits.py). The first round is thrown away, every other one goes backwards, and ratios are taken within a round: the
median of them counts, with a bootstrap interval (performance.md 3.4). It is a measurement, never a test.

With $VIRTMIG_CHROOTS the newest QEMU there is taken, else the host's own. As root: memory files of other processes are
filled, and userfaultfd serves another process's faults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import contestants, limits, postcopy
from tests.bench.contestants import Bench
from tests.bench.engine_report import Goal, Ratio, Sample, page, ratios, table
from tests.bench.processes import SideFailed
from tests.support.emulators import emulators
from tests.support.qemu import QemuError
from tests.support.recorder import Emulator

#: a sample during which other work took more than this of one core is measured again, so often; the calmest counts
FOREIGN_SHARE = 0.2
_AGAIN = 1
_CHANNELS = (1, 2, 4)
_WORKLOADS = ("zero", "zero-touched", "clumped", "scattered", "text")
_SIZES_MIB = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Item:
    """`often`: in every round, the one that is thrown away too; else in every other one."""

    name: str
    kind: str
    run: Callable[[Any], Sample]
    often: bool = False
    needs_qemu: bool = True


def items(mib: int, full: bool) -> list[Item]:
    found: list[Item] = []

    def add(name: str, work: Callable[..., Sample], *arguments: Any, kind: str = "moved", often: bool = False,
            **options: Any) -> None:  # fmt: skip
        alone = work in (contestants.engine_to_engine, contestants.live_engine, postcopy.engine_faults)
        run = lambda bench: work(bench, *arguments, **options)  # noqa: E731
        found.append(Item(name, kind, run, often or full, needs_qemu=not alone))

    engine, qemu = contestants.engine_to_engine, contestants.qemu_to_qemu
    for channels in _CHANNELS:
        add(f"A{channels} random", engine, "random", channels, often=True)
        add(f"B{channels} random", qemu, "random", channels, often=True)
    add("C random", qemu, "random", 0, often=True)
    add("A0 random", engine, "random", 0)
    add("D2 QEMU > engine", contestants.qemu_to_engine, 2, often=True)
    add("D2 engine > QEMU", contestants.engine_to_qemu, 2, often=True)
    add("B2 random, source untouched", qemu, "random", 2, touched=False)
    add("A2 random cold", engine, "random", 2, warm=False)
    add("B2 random cold", qemu, "random", 2, warm=False)
    for workload in _WORKLOADS:
        add(f"A2 {workload}", engine, workload, 2)
        add(f"B2 {workload}", qemu, workload, 2)
    add("L2 engine, runs", contestants.live_engine, 2)
    add("L2 QEMU, runs", contestants.live_qemu, 2)
    if full:
        add("D4 QEMU > engine", contestants.qemu_to_engine, 4)
        add("D4 engine > QEMU", contestants.engine_to_qemu, 4)
        for size in (each for each in _SIZES_MIB if each <= _most_mib()):
            add(f"A2 random {size} MiB", engine, "random", 2, mib=size)
            add(f"B2 random {size} MiB", qemu, "random", 2, mib=size)
    for preempt in (True, False):
        for quiet in (False, True):
            what = f"{'preempt' if preempt else 'plain'}, {'quiet' if quiet else 'loaded'}"
            if preempt or not quiet or full:
                add(f"P engine {what}", postcopy.engine_faults, mib, preempt, quiet, kind="faults")
                add(f"P QEMU {what}", postcopy.qemu_faults, mib, preempt, quiet, kind="faults")
    add("R engine, lazily", postcopy.restore_lazily, kind="restored")
    add("R QEMU, stream", postcopy.restore_by_qemu, kind="restored")
    add("R QEMU, mapped-ram", postcopy.restore_by_qemu, mapped=True, kind="restored")
    return found


def goals() -> list[Goal]:
    found = [
        *(Goal(f"A/B throughput, random warm, {n} channels", f"A{n} random", f"B{n} random", "gib_per_s", 1.2)
          for n in _CHANNELS),
        *(Goal(f"A/B GiB per CPU-second, {n} channels", f"A{n} random", f"B{n} random", "gib_per_cpu_s", 1.3)
          for n in _CHANNELS),
        Goal("P: p99 of QEMU with preempt / engine's, loaded", "P QEMU preempt, loaded", "P engine preempt, loaded",
             "p99_us", 1.0),
        Goal("zeros that are there, A/B throughput", "A2 zero-touched", "B2 zero-touched", "gib_per_s", 1.0),
        Goal("R: QEMU's stream / engine, to the first beat", "R QEMU, stream", "R engine, lazily", "first_beat_s", 5.0),
        Goal("A2/C throughput", "A2 random", "C random", "gib_per_s", 1.3),
        Goal("A2/B2, source untouched in both", "A2 random", "B2 random, source untouched", "gib_per_s"),
        Goal("A2/B2, cold destination", "A2 random cold", "B2 random cold", "gib_per_s"),
        Goal("A2/B2, untouched zeros", "A2 zero", "B2 zero", "gib_per_s"),
        *(Goal(f"A2/B2, {name}", f"A2 {name}", f"B2 {name}", "gib_per_s") for name in _WORKLOADS[2:]),
        Goal("D/B2, QEMU to engine", "D2 QEMU > engine", "B2 random", "gib_per_s", 0.8),
        Goal("D/B2, engine to QEMU", "D2 engine > QEMU", "B2 random", "gib_per_s", 0.8),
        *(Goal(f"CPU of the source, A/B GiB per s, {n} channels", f"A{n} random", f"B{n} random",
               "gib_per_cpu_s_source") for n in _CHANNELS),
        *(Goal(f"CPU of the destination, A/B GiB per s, {n} channels", f"A{n} random", f"B{n} random",
               "gib_per_cpu_s_destination") for n in _CHANNELS),
        Goal("L: downtime of QEMU / engine's gap", "L2 QEMU, runs", "L2 engine, runs", "downtime_ms",
             under_figure="largest_gap_ms"),
        Goal("P: p99 of QEMU with preempt / engine's, quiet", "P QEMU preempt, quiet", "P engine preempt, quiet",
             "p99_us"),
        Goal("P: p99 of QEMU without preempt / engine's, loaded", "P QEMU plain, loaded", "P engine preempt, loaded",
             "p99_us"),
        Goal("P: faults per s, engine / QEMU, quiet", "P engine preempt, quiet", "P QEMU preempt, quiet",
             "faults_per_s"),
        Goal("R: QEMU's mapped-ram / engine, to the first beat", "R QEMU, mapped-ram", "R engine, lazily",
             "first_beat_s"),
    ]  # fmt: skip
    return found + [
        Goal(f"A2/B2, {size} MiB", f"A2 random {size} MiB", f"B2 random {size} MiB", "gib_per_s") for size in _SIZES_MIB
    ]


def measure(bench: Any, chosen: Sequence[Item], rounds: int, limited: bool) -> Iterator[tuple[int, Sample | None]]:
    """(round, sample); None: the round's limits come next, by the caller."""
    order = {item.name: number for number, item in enumerate(chosen)}
    for number in range(rounds + 1):
        due = [item for item in chosen if item.often or number % 2 or (rounds < 3 and number)]
        for item in due if number % 2 else reversed(due):
            tries = [sample := _once(bench, item)]
            while sample["foreign_share"] > FOREIGN_SHARE and number and len(tries) <= _AGAIN:
                tries.append(sample := _once(bench, item))
            sample = min(tries, key=lambda each: ("failed" in each, each["foreign_share"]))
            dropped = [each["foreign_share"] for each in tries if each is not sample]
            sample |= {"order": order[item.name], "round": number, "dropped_foreign_shares": dropped}
            yield number, sample
        if limited:
            yield number, None


def _once(bench: Any, item: Item) -> Sample:
    """With what else the machine did meanwhile: `foreign_share` of one processor."""
    services = getattr(bench, "services_s", lambda: 0.0)  # processes of the benchmark's own that outlive a sample
    services()
    began, busy, own, load = time.monotonic(), _busy_s(), _own_s() + services(), os.getloadavg()[0]
    try:
        sample = item.run(bench)
    except (SideFailed, QemuError, OSError) as error:
        sample = {"failed": f"{type(error).__name__}: {error}"}
    wall = time.monotonic() - began
    foreign = max(0.0, (_busy_s() - busy) - (_own_s() + services() - own)) / wall
    return sample | {"item": item.name, "kind": item.kind, "load": load, "foreign_share": round(foreign, 3),
                     "item_s": wall}  # fmt: skip


def _busy_s() -> float:
    """Of all processors, what was not idle."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _most_mib() -> int:
    """The memory of three copies: the source's, the destination's, and the workload's."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024 // 4
    return 1024


def _newest() -> Emulator | None:
    return max(emulators(), key=lambda each: tuple(map(int, each.version_name.split("."))), default=None)


def describe_machine(emulator: Emulator | None) -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "qemu": emulator.version_name if emulator else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "model": model[0].split(":")[1].strip() if model else platform.machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_at_start": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="the guest's RAM (512)")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more is thrown away (5)")
    parser.add_argument("--only", default="", help="contestants whose names begin so, with commas: A2,B2,P,G")
    parser.add_argument("--full", action="store_true", help="all in every round, and sizes up to 4 GiB")
    parser.add_argument("--json", type=Path, help="every sample into this file")
    parser.add_argument("--html", type=Path, help="charts into this file")
    options = parser.parse_args()
    wanted = tuple(filter(None, options.only.split(",")))
    emulator = _newest()
    chosen = [item for item in items(options.mib, options.full) if not wanted or item.name.startswith(wanted)]
    if emulator is None:
        chosen = [item for item in chosen if not item.needs_qemu]
    limited = not wanted or "G" in wanted
    samples: list[Sample] = []
    found_limits: list[dict[str, float]] = []
    machine = describe_machine(emulator)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is shown, nothing stays in /dev/shm
    bench = Bench(emulator, options.mib, Path(tempfile.mkdtemp(prefix="virtmig-bench-", dir="/dev/shm")))
    try:
        for number, sample in measure(bench, chosen, options.rounds, limited):
            if sample is None:
                found_limits += [limits.measure()] if number else []
                continue
            samples.append(sample)
            tell(sample, options.rounds)
    except KeyboardInterrupt:
        print("bench: stopped; this is what was measured until then", file=sys.stderr)
    finally:
        bench.close()
    _report(options, machine, samples, found_limits)


def tell(sample: Sample, rounds: int) -> None:
    """Progress goes to the terminal only."""
    rate = f"{sample['gib_per_s']:.2f} GiB/s" if "gib_per_s" in sample else ""
    latency = f"p99 {sample['p99_us']:.0f} us" if sample.get("p99_us") else ""
    what = sample.get("failed") or rate or latency or f"{sample.get('first_beat_s', 0):.3f} s"
    print(f"round {sample['round']}/{rounds}  {sample['item']:28} {what}", file=sys.stderr, flush=True)


def _report(
    options: argparse.Namespace, machine: dict[str, Any], samples: list[Sample], found_limits: list[dict[str, float]]
) -> None:
    counted = [sample for sample in samples if sample["round"] and "failed" not in sample]
    found: list[Ratio] = ratios(counted, goals())
    text = table(counted, found_limits, found)
    disturbed = sum(sample["foreign_share"] > FOREIGN_SHARE for sample in counted)
    notes = [
        f"{options.mib} MiB, {options.rounds} rounds, QEMU {machine['qemu']}, Linux {machine['kernel']}, Python "
        f"{machine['python']}, {machine['processors']} x {machine['model']}, load {machine['load_at_start'][0]:.1f} "
        "before",
        f"{disturbed} of {len(counted)} samples with more than {FOREIGN_SHARE:.0%} of a core taken by other work; "
        f"{sum('failed' in sample for sample in samples)} failed",
    ]
    print("\n".join([*notes, "", text]))
    for sample in samples:
        if "failed" in sample:
            print(f"failed: round {sample['round']}, {sample['item']}: {sample['failed']}")
    if options.json:
        told = [
            {"name": each.goal.name, "median": each.median, "low": each.low, "high": each.high,
             "goal": each.goal.least, "verdict": each.verdict, "values": each.values}
            for each in found
        ]  # fmt: skip
        whole = {"machine": machine, "command": sys.argv[1:], "samples": samples, "limits": found_limits,
                 "ratios": told}  # fmt: skip
        options.json.write_text(json.dumps(whole, indent=1))
    if options.html:
        options.html.write_text(page("virtmig's engine against QEMU", notes, counted, found, text))


if __name__ == "__main__":
    main()
