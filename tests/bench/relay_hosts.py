"""Two hosts of a lab for `./dev bench relay`: agents in their namespaces, and QEMUs there without libvirt.

The agents come in pairs: "key" (plain text with proofs) and "tls". A QEMU in a chroot sees the /run of its host, where
the agents' sockets are, by a bind mount that nobody outside of the host's mount namespace sees.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme

from tests.bench.processes import TOP, qemu
from tests.support.emulators import LabQemu
from tests.support.recorder import Emulator
from virtmig.engine.agents import RelaySession, ask_facts, reachable, shake_hands
from virtmig.errors import MigrationError
from virtmig.facts import GuestFacts
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.lab.link import DEVICE, Shape

_READY_S = 30.0
_PORTS = {"key": 16515, "tls": 16516}


@dataclass(frozen=True)
class HostedEmulator(Emulator):
    """A QEMU that is started in the namespaces of a lab's host."""

    prefix: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [*self.prefix, *super().command]


@dataclass
class AgentPair:
    kind: str
    source: subprocess.Popen[bytes]
    destination: subprocess.Popen[bytes]
    source_socket: Path
    destination_address: str


@dataclass
class Hosts:
    """A running lab with agents. libvirt knows `own_qemu`; `newest` may be the same."""

    lab: Lab
    own_qemu: Emulator
    newest: Emulator
    agents: dict[str, AgentPair] = field(default_factory=dict)

    def change_link(self, shape: Shape) -> None:
        if self.lab.state.link.shape != shape:
            plain = shape.plain and self.lab.state.link.forwarder is not None
            if plain:  # from the forwarder back to a veth pair
                self.lab.link.disconnect()
                for host in self.lab.hosts:
                    subprocess.run(host.command(["ip", "link", "del", DEVICE]), capture_output=True)
                self.lab.link.connect(shape)
            else:
                self.lab.link.change(shape)
            self.lab.save()

    def agent_pair(self, kind: str) -> AgentPair:
        """Started when first asked for. Raises MigrationError, with their logs' ends on stderr."""
        if kind not in self.agents:
            self.agents[kind] = self._start(kind)
        return self.agents[kind]

    @contextmanager
    def qemu(self, role: str, emulator: Emulator, mib: int, *more: str, **options: Any) -> Iterator[LabQemu]:
        """See processes.qemu; `role` source is on host a, destination on host b."""
        host = self.lab.a if role == "source" else self.lab.b
        hosted = HostedEmulator(emulator.binary, emulator.root, emulator.version_name, tuple(host.command([])))
        with qemu(hosted, mib, role, *more, **options) as machine:
            yield machine

    @contextmanager
    def relayed(self, kind: str, request: Mapping[str, Any], guest: GuestFacts) -> Iterator[RelaySession]:
        """Agents that have shaken hands: QEMUs are to meet at `agreed.attachment`. Left, it has ended by itself."""
        pair = self.agent_pair(kind)
        values = {**request_of(guest.name), **request}
        connection, agreed = shake_hands(pair.source_socket, pair.destination_address, request=values, guest=guest)
        session = RelaySession(connection, agreed, lambda said: None)
        try:
            yield session
        except BaseException:
            session.close("the benchmark gave it up", guest="source")
            raise
        session.close()
        if session.ended is None or session.ended.state != "finished":
            raise MigrationError(f"the session did not finish: {session.ended}")

    def services(self) -> list[int]:
        """Pids of what runs as long as the hosts do."""
        found = [each.pid for pair in self.agents.values() for each in (pair.source, pair.destination)]
        forwarder = self.lab.state.link.forwarder
        return [*found, self.lab.a.daemon_pid, self.lab.b.daemon_pid, *([forwarder.pid] if forwarder else [])]

    def address(self, role: str) -> str:
        return (self.lab.a if role == "source" else self.lab.b).state.address

    def close(self) -> None:
        for pair in self.agents.values():
            for process in (pair.source, pair.destination):
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()
        self.lab.down()
        shutil.rmtree(self.lab.folder, ignore_errors=True)

    def _start(self, kind: str) -> AgentPair:
        if kind == "tls":
            _write_certificates(self.lab.folder / "pki", [host.state.address for host in self.lab.hosts])
        processes = [self._start_agent(host, kind) for host in self.lab.hosts]
        sockets = [_runtime(host, kind) / "agent.sock" for host in self.lab.hosts]
        pair = AgentPair(kind, *processes, sockets[0], f"tcp:{self.lab.b.state.address}:{_PORTS[kind]}")
        self.agents[kind] = pair
        deadline = time.monotonic() + _READY_S
        for socket in sockets:
            while reachable(f"unix:{socket}"):
                if time.monotonic() > deadline:
                    raise MigrationError(f"the agent at {socket} did not start: see {self.lab.folder}")
                time.sleep(0.05)
            ask_facts(socket)  # asked once, its answers are kept
        return pair

    def _start_agent(self, host: LabHost, kind: str) -> subprocess.Popen[bytes]:
        folder = _runtime(host, kind)
        folder.mkdir(mode=0o755, exist_ok=True)
        config = host.folder / f"agent-{kind}.toml"
        config.write_text(self._configuration(host, kind))
        words = [sys.executable, "-m", "virtmig.cli.main", "agent", "--config", str(config)]
        environment = {**os.environ, "PYTHONPATH": str(TOP), "RUNTIME_DIRECTORY": f"/run/virtmig-{kind}"}
        with (host.folder / "log" / f"agent-{kind}.log").open("ab") as log:
            return subprocess.Popen(
                host.command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def _configuration(self, host: LabHost, kind: str) -> str:
        folder = self.lab.folder
        lines = [f'listen = ["tcp:{host.state.address}:{_PORTS[kind]}"]']
        if kind == "tls":
            lines += ['security = "tls"', 'allow = [{ peer = "tls:*", rights = ["send", "receive"] }]',
                      f'tls = {{ folder = "{folder}/pki" }}']  # fmt: skip
        else:
            key = folder / "agent.key"
            if not key.exists():
                key.touch(mode=0o600)
                key.write_text(secrets.token_hex(32) + "\n")
            lines += [
                'security = "key"',
                f'key_file = "{key}"',
                'allow = [{ peer = "key", rights = ["send", "receive"] }]',
            ]
        # libvirt would be asked whether it could run that QEMU: here it does not run it
        lines.append(f'qemu = {{ emulators = ["{self.path_of(self.newest)}"], libvirt_uri = "none", user = "root" }}')
        return "\n".join(lines) + "\n"

    def path_of(self, emulator: Emulator) -> str:
        """A file that starts it; of a QEMU in a chroot a script, which the agents ask what it can do."""
        if emulator.root == Path("/"):
            return emulator.binary
        path = self.lab.folder / emulator.root.name / "qemu-system-x86_64"
        if not path.exists():
            path.parent.mkdir()
            path.write_text(f'#!/bin/sh\nexec {" ".join(emulator.command)} "$@"\n')
            path.chmod(0o755)
        return str(path)

    def guest_facts(self, emulator: Emulator, mib: int, *, running: bool) -> GuestFacts:
        major, minor = (int(part) for part in emulator.version_name.split("."))
        return GuestFacts(
            name="bench", state="running" if running else "paused", memory_bytes=mib << 20, virt_type="qemu",
            arch="x86_64", emulator=self.path_of(emulator), qemu_version=major * 1_000_000 + minor * 1000,
        )  # fmt: skip


def bring_up(found: Sequence[Emulator]) -> Hosts:
    """`found`: the host's own QEMU first. Raises LabError."""
    folder = Path(tempfile.mkdtemp(prefix="vmlb-", dir="/tmp"))
    folder.rmdir()
    own = next(each for each in found if each.root == Path("/"))
    newest = max(found, key=lambda each: tuple(map(int, each.version_name.split("."))))
    lab = Lab.up(folder, form="full")
    if newest.root != Path("/"):
        for host in lab.hosts:
            subprocess.run(host.command(["mount", "--bind", "/run", str(newest.root / "run")]), check=True)
    return Hosts(lab, own, newest)


def request_of(domain: str) -> dict[str, Any]:
    return {"domain": domain, "desturi": "qemu+tcp://lab-b/system", "live": True, "transport": "relay"}


def qemu_address(uri: str, listen_address: str = "") -> str:
    """libvirt's URI of an attachment as QEMU takes it."""
    if uri.startswith("unix://"):
        return uri.replace("unix://", "unix:", 1)
    host, _, port = uri.removeprefix("tcp://").rpartition(":")
    return f"tcp:{listen_address or host}:{port}"


def _runtime(host: LabHost, kind: str) -> Path:
    return host.folder / "run" / f"virtmig-{kind}"


def _write_certificates(folder: Path, addresses: Sequence[str]) -> None:
    """One certificate for both hosts and both roles, in QEMU's layout."""
    with ExitStack():
        folder.mkdir()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca-cert.pem")
        leaf = authority.issue_cert(*(str(ipaddress.ip_address(each)) for each in addresses), "lab-a", "lab-b")
        for role in ("server", "client"):
            leaf.private_key_pem.write_to_path(folder / f"{role}-key.pem")
            for part in leaf.cert_chain_pems:
                part.write_to_path(folder / f"{role}-cert.pem", append=True)
            (folder / f"{role}-key.pem").chmod(0o600)
