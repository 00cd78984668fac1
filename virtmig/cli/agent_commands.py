"""`virtmig agent`, `virtmig handshake`, `virtmig recover`: the service of this host, and what is asked of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virtmig.cli.signals import stop_on_signals
from virtmig.errors import ChannelError, RequestError
from virtmig.request import MigrationRequest
from virtmig.verbs import HANDSHAKE_OPTIONS

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions
    from virtmig.link.asking import Agreed, Exchanged, SessionRecord

#: an agent that was started for one --stdio and has nothing to do ends
IDLE_S = 60.0
_START_S = 10.0
_PIECE_BYTES = 256 * 1024


class _Asked:
    def __init__(self) -> None:
        self.event = threading.Event()

    def ask(self, what: str) -> None:
        self.event.set()


def run_agent(values: dict[str, Any], options: GlobalOptions) -> int:
    """The service; returns when it was told to stop and its sessions have ended."""
    from virtmig.agent.config import load_config
    from virtmig.agent.logs import configure_logs
    from virtmig.agent.notify import Notifier, activated_sockets
    from virtmig.agent.server import Agent

    config = load_config(Path(str(values["config"])) if values.get("config") else None)
    if listen := values.get("listen"):
        config = msgspec.structs.replace(config, listen=tuple(str(listen).split(",")))
    if values.get("stdio"):
        return _stdio(config.local_socket, values)
    idle_s = values.get("idle-exit")
    if values.get("local-only"):
        config = msgspec.structs.replace(config, listen=())
    configure_logs(config.log)
    notifier = Notifier()
    agent = Agent(config)
    with stop_on_signals(_Asked()) as asked:
        agent.start(notifier, activated_sockets())
        quiet_since = time.monotonic()
        while not asked.event.wait(1.0):
            if agent.sessions():
                quiet_since = time.monotonic()
            if idle_s and time.monotonic() - quiet_since > int(idle_s):
                break
        again = _Asked()
        with stop_on_signals(again):  # a second signal: now
            stopping = threading.Thread(target=agent.stop, kwargs={"notifier": notifier})
            stopping.start()
            while stopping.is_alive():
                if again.event.wait(0.2):
                    for session in agent.sessions():
                        session.fail("the agent was told to stop at once")
                stopping.join(0.1)
    return 0


def _stdio(path: Path, values: dict[str, Any]) -> int:
    """Standard input and output are a link of another host's agent: carried to this host's, which is started for it."""
    connection = _connected(path)
    if connection is None:
        words = [sys.executable, "-m", "virtmig.cli.main", "agent", "--local-only", "--idle-exit", str(int(IDLE_S))]
        words += ["--config", str(values["config"])] if values.get("config") else []
        quiet = subprocess.DEVNULL
        subprocess.Popen(words, start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
        deadline = time.monotonic() + _START_S
        while (connection := _connected(path)) is None:
            if time.monotonic() > deadline:
                raise ChannelError(f"the agent that was started does not listen on {path}", hint="virtmig agent")
            time.sleep(0.05)
    thread = threading.Thread(target=_carry_in, args=(connection,), daemon=True)
    thread.start()
    while data := connection.recv(_PIECE_BYTES):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
    return 0


def _carry_in(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(0, _PIECE_BYTES):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def _connected(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return connection


# -- handshake ---------------------------------------------------------------------------------------------------------


def run_handshake(values: dict[str, Any], options: GlobalOptions) -> int:
    """Show the exchange and the agreement between two agents; nothing is migrated."""
    from virtmig.engine.agents import shake_hands

    asked = {name: values[name] for name in HANDSHAKE_OPTIONS if name in values}
    domain = str(values.get("domain") or "")
    guest, facts = _guest(domain, options)
    request = MigrationRequest({"domain": guest.name, "desturi": "qemu://destination/system", "live": True, "transport": "relay",
                                **asked})  # fmt: skip
    as_json = bool(values.get("json"))

    def heard(message: Exchanged) -> None:
        if as_json:
            print(msgspec.json.encode(message).decode(), flush=True)
        elif not options.quiet:
            _show_message(message)

    connection, agreed = shake_hands(
        agent_path(values.get("source")),
        str(values["destination"]),
        request={name: request[name] for name in request},
        guest=guest,
        facts=facts,
        only_handshake=True,
        heard=heard,
    )
    connection.close()
    if as_json:
        print(msgspec.json.encode(agreed).decode(), flush=True)
    else:
        _show_agreement(agreed)
    return 0


def agent_path(given: object) -> Path:
    """The socket of the source's agent; as given, with or without `unix:`, else its usual place."""
    from virtmig.agent.config import AgentConfig

    text = str(given or "")
    return Path(text.removeprefix("unix:")) if text and text != "local" else AgentConfig().local_socket


def _guest(domain: str, options: GlobalOptions) -> Any:
    from virtmig.facts import GuestFacts

    if not domain:
        return GuestFacts(name="guest", state="running"), None
    from virtmig.virt.capabilities import gather_guest_facts, gather_host_facts
    from virtmig.virt.connection import connected, lookup_domain

    with connected(options.connect, readonly=False) as connection:
        facts = gather_host_facts(connection, options.connect or "")
        return gather_guest_facts(lookup_domain(connection, domain)), facts


def _show_message(message: Exchanged) -> None:
    arrow = "->" if message.source else "<-"
    content = message.content if isinstance(message.content, dict) else {}
    shown: list[str] = []
    if message.name == "Hello":
        facts = content.get("facts", {})
        low, high = content.get("version_lowest"), content.get("version_highest")
        shown = [f"{content.get('implementation')}, protocol {low} to {high}", f"host {facts.get('hostname', '?')}"]
    elif message.name == "Proposal":
        request = content.get("request", {})
        shown = [" ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in request.items()
                          if name not in ("domain", "desturi"))]  # fmt: skip
    elif message.name == "Agreement":
        shown = [", ".join(_channel(row) for row in content.get("channels", []))]
    elif message.name in ("Refuse", "Failed"):
        shown = [str(content.get("reason") or [row.get("reason") for row in content.get("reasons", [])])]
    print(f"{message.ms:9.1f} ms  {arrow} {message.name:<12} {'; '.join(shown)}".rstrip())


def _channel(row: dict[str, Any]) -> str:
    return f"{row['role']} {row.get('index', 0)}" if row["role"] in ("parallel", "storage") else str(row["role"])


def _show_agreement(agreed: Agreed) -> None:
    print(f"\nagreed with {agreed.peer} in {agreed.ms:.1f} ms, {agreed.round_trips} round trips")
    for row in agreed.answer.verdicts:
        change = f" ({row.asked} -> {row.given})" if row.outcome == "adjusted" else ""
        print(f"  {row.outcome:<9} {row.feature}{change}: {row.reason}")
    for warning in agreed.answer.warnings:
        print(f"  warning   {warning.feature}: {warning.reason}")
    print("  channels  " + ", ".join(str(channel) for channel in agreed.channels))


# -- recover -----------------------------------------------------------------------------------------------------------


def run_recover(values: dict[str, Any], options: GlobalOptions) -> int:
    """Finish a postcopy that broke, as the source's agent remembers it."""
    from virtmig.cli.commands import run_migrate
    from virtmig.engine.agents import ask_sessions

    domain = str(values["domain"])
    path = agent_path(values.get("agent"))
    found = _broken_session(ask_sessions(path), domain)
    changes: dict[str, Any] = {"postcopy_resume": True, "postcopy": True, "live": True}
    kept = {name: value for name, value in found.request.items() if name in ("domain", "desturi", "p2p", "direct")}
    request = MigrationRequest(kept).replace(
        **changes,
        transport=str(values.get("transport") or "relay"),
        agent=str(path),
        destination_agent=found.destination or None,
    )
    connect = options.connect or found.source_uri or None
    return run_migrate(request, msgspec.structs.replace(options, connect=connect) if connect else options)


def _broken_session(sessions: tuple[SessionRecord, ...], domain: str) -> SessionRecord:
    """Raises RequestError when this host's agent remembers none."""
    ours = [row for row in sessions if row.role == "source" and domain in (row.domain, row.uuid)]
    for row in ours:
        if row.state == "failed" and row.request.get("postcopy"):
            return row
    known = ", ".join(f"{row.domain} ({row.state})" for row in sessions if row.role == "source") or "none"
    raise RequestError(
        f"this host's agent remembers no broken postcopy of {domain}; it knows: {known}",
        option="domain",
        hint=f"virtmig migrate {domain} DESTURI --live --postcopy --postcopy-resume",
    )
