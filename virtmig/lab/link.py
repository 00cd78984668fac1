"""The wire between the two hosts of a full lab: a veth pair, its bandwidth, delay and loss, and cutting it.

Bandwidth is a token bucket on both ends (tc tbf). Delay and loss are netem's where the kernel has it; where it has
not, the pair is replaced by two TUN devices and a forwarder of our own between them (wire.py), which does all three.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from virtmig.errors import LabError
from virtmig.lab.hosts import LabHost
from virtmig.lab.processes import Process, await_true

DEVICE = "lab0"
PREFIX = 24
#: a MAC address that no interface of the lab has
NOBODY = "02:00:00:00:00:fe"


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Per direction. None or 0: as the kernel gives it."""

    bandwidth_mbit_s: float | None = None
    delay_ms: float = 0.0
    loss_percent: float = 0.0

    @property
    def plain(self) -> bool:
        return not (self.delay_ms or self.loss_percent)


class LinkState(msgspec.Struct, kw_only=True):
    shape: Shape = Shape()
    cut: bool = False
    forwarder: Process | None = None


class Link:
    """The wire between two hosts; `state` is kept in lab.json."""

    def __init__(self, state: LinkState, hosts: tuple[LabHost, LabHost], folder: Path) -> None:
        self.state = state
        self.hosts = hosts
        self.folder = folder

    def connect(self, shape: Shape) -> None:
        """Lay the wire. Raises LabError when neither netem nor TUN devices can be had for what is asked."""
        self.state.shape = shape
        if shape.plain or has_netem(self.hosts[0]):
            self._connect_veth()
        else:
            self._connect_forwarder()
        self._shape()

    def change(self, shape: Shape) -> None:
        """Another shape on a running lab. Turning delay or loss on lays a new wire where the kernel has no netem."""
        if self.state.forwarder is not None:
            self.state.shape = shape
            self._write_shape()
        elif shape.plain or has_netem(self.hosts[0]):
            self.state.shape = shape
            self._shape()
        else:
            for host in self.hosts:
                _run(host, ["ip", "link", "del", DEVICE], check=False)
            self.connect(shape)  # wire.json carries the cut over

    def cut(self) -> None:
        """Drop everything, both ways and silently: neither end is told, as when a cable between switches breaks."""
        self.state.cut = True
        self._apply_cut()

    def restore(self) -> None:
        self.state.cut = False
        self._apply_cut()

    def disconnect(self) -> None:
        if self.state.forwarder is not None:
            self.state.forwarder.end(2.0)
            self.state.forwarder = None

    # -- veth ------------------------------------------------------------------------------------------------------

    def _connect_veth(self) -> None:
        first, second = (str(host.state.keeper.pid) for host in self.hosts if host.state.keeper)
        _ip(["link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second])
        for host in self.hosts:
            _run(host, ["ip", "addr", "add", f"{host.state.address}/{PREFIX}", "dev", DEVICE])
            _run(host, ["ip", "link", "set", DEVICE, "addrgenmode", "none", "up"])  # no IPv6 beside a cut

    def _shape(self) -> None:
        shape = self.state.shape
        if self.state.forwarder is not None:
            self._write_shape()
            return
        for host in self.hosts:
            _run(host, ["tc", "qdisc", "del", "dev", DEVICE, "root"], check=False)
            if not shape.plain:
                netem = ["tc", "qdisc", "add", "dev", DEVICE, "root", "netem", "limit", "100000"]
                netem += ["delay", f"{shape.delay_ms}ms"] if shape.delay_ms else []
                netem += ["loss", f"{shape.loss_percent}%"] if shape.loss_percent else []
                netem += ["rate", f"{shape.bandwidth_mbit_s}mbit"] if shape.bandwidth_mbit_s else []
                _run(host, netem)
            elif shape.bandwidth_mbit_s:
                burst = max(65536 * 4, int(shape.bandwidth_mbit_s * 1e6 / 8 / 250))
                _run(host, ["tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", "rate",
                            f"{shape.bandwidth_mbit_s}mbit", "burst", str(burst), "latency", "100ms"])  # fmt: skip

    def _apply_cut(self) -> None:
        if self.state.forwarder is not None:
            self._write_shape()
            return
        # a frame for somebody else's MAC address is dropped where it arrives, and neither end is told; an interface
        # that goes down or a queue that drops would tell the sender, and not every kernel has filters (matchall)
        for host, other in zip(self.hosts, reversed(self.hosts), strict=True):
            neighbour = ["to", other.state.address, "dev", DEVICE]
            if self.state.cut:
                _run(host, ["ip", "neigh", "replace", *neighbour, "lladdr", NOBODY, "nud", "permanent"])
            else:
                _run(host, ["ip", "neigh", "del", *neighbour], check=False)

    # -- the forwarder ---------------------------------------------------------------------------------------------

    def _connect_forwarder(self) -> None:
        if not Path("/dev/net/tun").exists():
            raise LabError(
                "this kernel has neither netem (sch_netem) nor TUN devices: delay and loss cannot be had",
                hint="load the module sch_netem or tun, or leave out --delay and --loss",
            )
        self._write_shape()
        ready = self.folder / "wire.ready"
        ready.unlink(missing_ok=True)
        pids = [str(host.state.keeper.pid) for host in self.hosts if host.state.keeper]
        with (self.folder / "wire.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "wire.py"), DEVICE, str(self.folder), *pids],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                start_new_session=True,
            )
        await_true(lambda: ready.exists() or process.poll() is not None, 5.0, "the wire", self.folder / "wire.out")
        if process.poll() is not None:
            raise LabError(f"the wire did not start: {(self.folder / 'wire.out').read_text().strip()}")
        self.state.forwarder = Process.of(process.pid)
        process.returncode = 0
        for host in self.hosts:
            _run(host, ["ip", "addr", "add", f"{host.state.address}/{PREFIX}", "dev", DEVICE])
            _run(host, ["ip", "link", "set", DEVICE, "mtu", "65000", "up"])

    def _write_shape(self) -> None:
        shape = self.state.shape
        text = msgspec.json.encode(
            {
                "bytes_per_s": (shape.bandwidth_mbit_s or 0) * 1e6 / 8,
                "delay_s": shape.delay_ms / 1000,
                "loss": 1.0 if self.state.cut else shape.loss_percent / 100,
            }
        )
        new = self.folder / "wire.json.new"
        new.write_bytes(text)
        os.rename(new, self.folder / "wire.json")


def has_netem(host: LabHost) -> bool:
    """Whether the kernel takes a netem qdisc; tried on the loopback device of a host's own network namespace."""
    tried = _run(host, ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms"], check=False)
    if tried.returncode == 0:
        _run(host, ["tc", "qdisc", "del", "dev", "lo", "root"], check=False)
    return tried.returncode == 0


def _ip(words: list[str]) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _run(host: LabHost, words: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(host.command(words), capture_output=True, text=True)
    if check and done.returncode:
        raise LabError(f"host {host.name}: {' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done
