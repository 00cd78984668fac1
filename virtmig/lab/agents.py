"""An agent on each host of the lab, with a pre-shared key between them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

from virtmig.errors import LabError
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.lab.processes import Process, await_true

START_S = 20.0


def agent_socket(host: LabHost) -> Path:
    """Where clients of that host's agent connect, as seen from outside."""
    return host.folder / "run" / "virtmig" / "agent.sock"


def agent_address(host: LabHost) -> str:
    """What `--destination-agent` takes."""
    return f"tcp:{host.state.address}:16515" if host.full else f"unix:{host.folder}/run/virtmig/link.sock"


def agent_log(host: LabHost) -> Path:
    return host.folder / "log" / "agent.log"


def start_agents(lab: Lab, settings: str = "") -> None:
    """On both hosts, with a new key; `settings` are more lines for both agent.toml (`limits.migrations_in = 1`).

    Raises LabError with the log's last lines.
    """
    key = lab.folder / "agent.key"
    key.write_text(secrets.token_hex(32) + "\n")
    key.chmod(0o600)
    for host in lab.hosts:
        start_agent(lab, host, settings)


def start_agent(lab: Lab, host: LabHost, settings: str = "", *, access: str = "") -> None:
    """One of them. `access` are lines in the place of those with the lab's key, which must be there else."""
    if host.state.agent is not None and host.state.agent.alive:
        raise LabError(f"an agent runs on {host.hostname} already", hint=f"kill {host.state.agent.pid}")
    (host.folder / "run" / "virtmig").mkdir(mode=0o755, exist_ok=True)
    config = host.folder / "agent.toml"
    config.write_text(_configuration(lab, host, access) + settings)
    words = [sys.executable, "-m", "virtmig.cli.main", "agent", "--config", str(config)]
    root = str(Path(__file__).resolve().parents[2])
    with open(agent_log(host), "ab") as log:
        process = subprocess.Popen(
            host.command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": root, "VIRTMIG_LAB": str(lab.folder)},
        )  # fmt: skip
    host.state.agent = Process.of(process.pid)
    lab.save()
    sockets = agent_socket(host), host.folder / "run" / "virtmig" / "link.sock"  # the first and the last of its own
    await_true(lambda: process.poll() is not None or all(map(_accepts, sockets)), START_S,
               f"the agent of {host.hostname}", agent_log(host))  # fmt: skip
    if process.poll() is not None:
        tail = agent_log(host).read_text(errors="replace").strip().splitlines()[-5:]
        raise LabError(f"the agent of {host.hostname} has ended: {' / '.join(tail)}")


def kill_agent(lab: Lab, host: LabHost, number: int = signal.SIGKILL) -> None:
    """And wait until it has gone, its last thread too: that one still holds the sockets."""
    agent, socket = host.state.agent, agent_socket(host)
    if agent is not None:
        agent.signal(number)
        await_true(lambda: not agent.alive and not _accepts(socket), 15.0, f"the end of the agent of {host.hostname}")
        if host.state.agent is agent:  # another thread may have started the next one
            host.state.agent = None
            lab.save()


def _accepts(path: Path) -> bool:
    from virtmig.engine.agents import reachable

    return not reachable(f"unix:{path}")


def _configuration(lab: Lab, host: LabHost, access: str) -> str:
    """Dotted keys, so that more lines may follow for any table."""
    folder = f"{host.folder}/run/virtmig"
    local = "/run/virtmig" if host.full else folder
    tcp = f'"tcp:{host.state.address}:16515", ' if host.full else ""
    uri = "" if host.full else "qemu:///session"
    key = (
        f'security = "key"\nkey_file = "{lab.folder}/agent.key"\n'
        'allow = [{ peer = "key", rights = ["send", "receive"] }]\n'
    )
    return (
        f'listen = [{tcp}"unix:{folder}/link.sock"]\n{access or key}'
        f'local.socket = "{local}/agent.sock"\n'
        f'qemu.sockets_folder = "{local}/qemu"\nqemu.libvirt_uri = "{uri}"\n'
    )
