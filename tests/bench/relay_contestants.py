"""The contestants of `./dev bench relay`. Each function is one migration between the lab's hosts and returns a sample.

B   QEMU -> QEMU over the hosts' network, multifd
E   QEMU -> agent -> agent -> QEMU, multifd, unix sockets between QEMU and its agent; H the same with TLS
F   libvirt's own --tunnelled between the lab's two daemons, a single stream as it must be
L   downtime of a guest that runs and writes 8 MiB/s over 2 MiB, from the source's STOP to the destination's RESUME
P   fault latency in postcopy with preempt, of the newest QEMU (its postcopy-blocktime tells the distribution)
K   the handshake alone, over a link with some delay

"seconds" is always QEMU's own: from its state setup (or the command) to completed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt_qemu
from lxml import etree

from tests.bench.contestants import Bench, Sample, completed, lab_fill, lab_guest
from tests.bench.postcopy import _QUIET_BYTES_PER_S, SETTLE_S, _latencies, random_walker
from tests.bench.processes import UNLIMITED, Meter, SideFailed, cpu_s, fill_process, fill_qemu
from tests.bench.relay_hosts import Hosts, qemu_address, request_of
from tests.support.emulators import LabQemu
from tests.support.recorder import Emulator
from virtmig.engine.agents import RelaySession, shake_hands
from virtmig.lab.guest import GuestSettings, boot_image, domain_xml
from virtmig.lab.lab import find_qemu
from virtmig.lab.link import Shape
from virtmig.virt.connection import connected

CHANNELS = 2
_PORT = 49300
_TUNNELLED = "tunnelled"
_POSTCOPY = ("return-path", "postcopy-ram", "postcopy-preempt")
_HANDSHAKES = 5


@dataclass
class RelayBench(Bench):
    """`hosts` is brought up by the first that needs it and closed by the benchmark."""

    bring_up: Callable[[], Hosts] | None = None
    _hosts: Hosts | None = None

    @property
    def hosts(self) -> Hosts:
        if self._hosts is None:
            assert self.bring_up is not None
            self._hosts = self.bring_up()
        return self._hosts

    def services_s(self) -> float:
        """CPU time that the agents, the daemons and the link's forwarder have used so far."""
        return sum(map(cpu_s, self.hosts.services()))

    def close(self) -> None:
        if self._hosts is not None:
            self._hosts.close()
        super().close()


@contextmanager
def _way(
    bench: RelayBench, kind: str, request: Mapping[str, Any], emulator: Emulator, mib: int, *, running: bool = False
) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(where the destination's QEMU listens, where the source's connects, the agents' pids); `kind` "" is direct."""
    hosts = bench.hosts
    if not kind:
        address = f"tcp:{hosts.address('destination')}:{_PORT}"
        yield address, address, {}
        return
    with hosts.relayed(kind, request, hosts.guest_facts(emulator, mib, running=running)) as session:
        there = session.agreed.attachment
        assert there is not None
        pair = hosts.agents[kind]
        pids = {"agent_source": pair.source.pid, "agent_destination": pair.destination.pid}
        yield qemu_address(there.uri, there.listen_address), qemu_address(there.uri), pids


_REQUEST = {"parallel": True, "parallel-connections": CHANNELS}


def _options() -> dict[str, Any]:
    return {"capabilities": ("return-path", "multifd"), "parameters": {"multifd-channels": CHANNELS}, "touched": True}


def moved(bench: RelayBench, kind: str, shape: Shape, *, mib: int | None = None, own: bool = False) -> Sample:
    """A stopped guest of random pages, both sides' memory touched. `own`: with libvirt's QEMU, not the newest."""
    mib = mib or bench.mib
    hosts = bench.hosts
    hosts.change_link(shape)
    emulator = hosts.own_qemu if own else hosts.newest
    with (
        hosts.qemu("source", emulator, mib, "-S", **_options()) as source,
        hosts.qemu("destination", emulator, mib, "-S", "-incoming", "defer", **_options()) as destination,
    ):
        fill_qemu(source, bench.pattern("random", mib))
        found = _migrate(bench, kind, emulator, mib, source, destination)
    return _with_rates(found, mib, bool(kind))


def downtime(bench: RelayBench, kind: str, shape: Shape) -> Sample:
    hosts = bench.hosts
    hosts.change_link(shape)
    options = _options() | {"guest": lab_guest()}
    with (
        hosts.qemu("source", hosts.newest, bench.mib, **options) as source,
        hosts.qemu("destination", hosts.newest, bench.mib, "-incoming", "defer", **options) as destination,
    ):
        lab_fill(bench, source)
        found = _migrate(bench, kind, hosts.newest, bench.mib, source, destination, running=True)
        resumed = destination.qmp.wait_event(lambda event: event["event"] == "RESUME", "RESUME")
        stopped = source.qmp.wait_event(lambda event: event["event"] == "STOP", "STOP")
    found |= {"downtime_told_ms": found["downtime_ms"], "downtime_ms": (_event_s(resumed) - _event_s(stopped)) * 1000}
    return _with_rates(found, bench.mib, bool(kind))


def _migrate(
    bench: RelayBench, kind: str, emulator: Emulator, mib: int, source: LabQemu, destination: LabQemu, *,
    running: bool = False,
) -> Sample:  # fmt: skip
    with _way(bench, kind, _REQUEST, emulator, mib, running=running) as (listens, connects, agents):
        destination.qmp.execute("migrate-incoming", uri=listens)
        meter = Meter(source=source.process.pid, destination=destination.process.pid, **agents)
        began = time.monotonic()
        source.qmp.execute("migrate", uri=connects)
        source.qmp.wait_status("completed")
        ended = time.monotonic()
        destination.qmp.wait_status("completed")
    found: Sample = meter.stop()
    return found | completed(source) | {"seconds": ended - began}


def tunnelled(bench: RelayBench, shape: Shape) -> Sample:
    """A stopped libvirt guest with the same memory; the daemons' CPU time stands where the agents' does."""
    hosts = bench.hosts
    hosts.change_link(shape)
    lab = hosts.lab
    settings = GuestSettings(name=_TUNNELLED, memory_mib=64)
    xml = _domain(lab.folder / "guests", settings, f"{lab.a.serial_folder}/bench.serial", bench.mib)
    try:
        lab.virsh(lab.a, "create", str(xml), "--paused")
        source = lab.a.qemu_pid(_TUNNELLED)
        assert source is not None
        fill_process(source, bench.pattern("random"))
        meter = Meter(agent_source=lab.a.daemon_pid, agent_destination=lab.b.daemon_pid)
        with _events(lab.a.uri, _TUNNELLED) as events:
            words = ["virsh", "-c", lab.a.uri, "migrate", "--live", "--p2p", "--tunnelled", _TUNNELLED, lab.b.tcp_uri]
            done = subprocess.run(lab.a.command(words), capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise SideFailed(f"virsh migrate --tunnelled: {done.stderr.strip()}")
            found: Sample = meter.stop()
            times = events()
    finally:
        lab.remove_guest(_TUNNELLED)
    return _with_rates(found | {"seconds": times["completed"] - times["setup"]}, bench.mib, True)


def faults(bench: RelayBench, kind: str, quiet: bool) -> Sample:
    """As in postcopy.qemu_faults; "quiet": nothing comes unasked for QUIET_S."""
    hosts = bench.hosts
    hosts.change_link(Shape())
    emulator, boot = hosts.newest, random_walker(bench.mib)
    rate = _QUIET_BYTES_PER_S if quiet else 0
    with (
        hosts.qemu("source", emulator, bench.mib, capabilities=_POSTCOPY, boot=boot, touched=True,
                   parameters={"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": rate}) as source,
        hosts.qemu("destination", emulator, bench.mib, "-incoming", "defer", shared=False, boot=boot,
                   capabilities=(*_POSTCOPY, "postcopy-blocktime")) as destination,
    ):  # fmt: skip
        time.sleep(0.7)  # SeaBIOS, and a first walk
        source.qmp.execute("stop")
        fill_qemu(source, bench.pattern("random"), 1 << 20)
        source.qmp.execute("cont")
        with _way(bench, kind, {"postcopy": True}, emulator, bench.mib, running=True) as (listens, connects, _):
            destination.qmp.execute("migrate-incoming", uri=listens)
            source.qmp.execute("migrate", uri=connects)
            source.qmp.wait_status("active")
            source.qmp.execute("migrate-start-postcopy")
            source.qmp.wait_status("postcopy-active")
            began = time.monotonic()
            destination.qmp.wait_event(lambda event: event["event"] == "RESUME", "RESUME")
            info: dict[str, Any] = {}
            measured = 0.0
            if quiet:
                time.sleep(SETTLE_S)
                info, measured = destination.qmp.execute("query-migrate"), time.monotonic() - began
                source.set_parameters({"max-postcopy-bandwidth": 0, "max-bandwidth": UNLIMITED})
            source.qmp.wait_status("completed")
            seconds = time.monotonic() - began
            destination.qmp.wait_status("completed")
        if "postcopy-latency-dist" not in info:
            info, measured = destination.qmp.execute("query-migrate"), seconds
    return {"seconds": seconds, "mib": bench.mib, **_latencies(info, measured)}


def handshake(bench: RelayBench, kind: str, delay_ms: float) -> Sample:
    """Until every channel is open, several times; `delay_ms` is half of what is added to a round trip."""
    hosts = bench.hosts
    hosts.change_link(Shape(delay_ms=delay_ms / 2))
    facts = hosts.guest_facts(hosts.newest, bench.mib, running=True)
    request = {**request_of(facts.name), "parallel": True, "parallel-connections": CHANNELS}
    pair = hosts.agent_pair(kind)
    walls, told, trips = [], [], 0
    for _ in range(_HANDSHAKES):
        began = time.monotonic()
        connection, agreed = shake_hands(pair.source_socket, pair.destination_address, request=request, guest=facts)
        walls.append((time.monotonic() - began) * 1000)
        told.append(agreed.ms)
        trips = agreed.round_trips
        RelaySession(connection, agreed, lambda said: None).close("only a handshake was wanted", guest="source")
    return {"seconds": statistics.median(walls) / 1000, "wall_ms": statistics.median(walls),
            "told_ms": statistics.median(told), "round_trips": trips, "delay_ms": delay_ms}  # fmt: skip


def _event_s(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def _with_rates(found: Sample, mib: int, relayed: bool) -> Sample:
    gib = mib / 1024
    found |= {"mib": mib, "gib_per_s": gib / found["seconds"]}
    if "cpu_source_s" in found:
        found["cpu_qemus_per_gib"] = (found["cpu_source_s"] + found["cpu_destination_s"]) / gib
    if relayed:
        found |= {f"cpu_{name}_per_gib": found[f"cpu_{name}_s"] / gib for name in ("agent_source", "agent_destination")}
    return found


def _domain(folder: Path, settings: GuestSettings, serial: str, mib: int) -> Path:
    """The lab's guest with `mib` of RAM in a memory file that is touched beforehand."""
    image = folder / "bench.img"
    image.write_bytes(boot_image(settings))
    image.chmod(0o444)
    root = etree.fromstring(domain_xml(settings, image=image, serial=serial, emulator=find_qemu()))
    for name in ("memory", "currentMemory"):
        for element in root.iterfind(name):
            element.text, element.attrib["unit"] = str(mib), "MiB"
    backing = etree.fromstring(
        "<memoryBacking><source type='memfd'/><access mode='shared'/><allocation mode='immediate'/></memoryBacking>"
    )
    memory = root.find("memory")
    assert memory is not None
    memory.addnext(backing)
    path = folder / "bench.xml"
    path.write_bytes(etree.tostring(root))
    return path


@contextmanager
def _events(uri: str, domain: str) -> Iterator[Callable[[], dict[str, float]]]:
    """The call returns when each state of QEMU's migration was reached, by QEMU's clock, once it is completed."""
    times: dict[str, float] = {}
    completed = threading.Event()

    def heard(_conn: Any, _domain: Any, _event: str, seconds: int, micros: int, details: str, _opaque: Any) -> None:
        status = json.loads(details)["status"]
        times[status] = seconds + micros / 1e6
        if status == "completed":
            completed.set()

    def wait() -> dict[str, float]:
        if not completed.wait(10.0):
            raise SideFailed(f"no event of a completed migration, only {', '.join(times)}")
        return times

    with connected(uri) as connection:
        guest = connection.lookupByName(domain)
        number = libvirt_qemu.qemuMonitorEventRegister(connection, guest, "MIGRATION", heard, None)
        yield wait
        libvirt_qemu.qemuMonitorEventDeregister(connection, number)
