"""`virtmig agent`, `handshake`, `order`, `recover`: the service of this host, what is asked of it or done without."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from virtmig.cli.signals import stop_on_signals
from virtmig.errors import ChannelError, MigrationAborted, MigrationError, PlanRefused, RequestError
from virtmig.request import MigrationRequest
from virtmig.verbs import HANDSHAKE_OPTIONS

if TYPE_CHECKING:
    from virtmig.agent.config import AgentConfig
    from virtmig.cli.main import GlobalOptions
    from virtmig.engine.transport import Stop
    from virtmig.link.asking import Agreed, Exchanged, Said, SessionRecord

#: an agent that was started for one --stdio and has nothing to do ends
IDLE_S = 60.0
_START_S = 10.0
#: after so long an agent that has ended has not lost a race
_RACE_S = 2.0
_TURN_S = 1.0
_END_S = 5.0
#: longer than agents that dial each other wait between two attempts
_MENDING_S = 5.0
#: one of both hosts refuses
EXIT_REFUSED = 3
_PIECE_BYTES = 256 * 1024


class _Asked:
    """Signals become readable: nothing that a handler may call has a lock."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ask(self, what: str) -> None:
        os.eventfd_write(self._event, 1)

    def wait(self, seconds: float) -> bool:
        """Whether a signal came; it is forgotten then."""
        if not select.select([self._event], [], [], seconds)[0]:
            return False
        os.eventfd_read(self._event)
        return True


def run_agent(values: dict[str, Any], options: GlobalOptions) -> int:
    """The service; returns when it was told to stop and its sessions have ended."""
    from virtmig.agent.logs import configure_logs
    from virtmig.agent.notify import Notifier, activated_sockets
    from virtmig.agent.server import Agent

    config = _settings(values)
    if values.get("stdio"):
        return _stdio(config.local_socket, values)
    idle_s = values.get("idle-exit")
    configure_logs(config.log)
    with stop_on_signals(_Asked()) as asked:
        agent = Agent(config)
        agent.start(Notifier(), activated_sockets())
        while not asked.wait(_TURN_S):
            if idle_s and agent.idle_s > int(idle_s):
                break
        stopping = threading.Thread(target=agent.stop, name="stop")
        stopping.start()
        while stopping.is_alive():
            if asked.wait(0.1):  # a second signal: now
                for session in agent.sessions():
                    session.fail("the agent was told to stop at once")
    return 0


def _settings(values: dict[str, Any]) -> AgentConfig:
    """The file, and what the command line says instead. Raises RequestError."""
    from virtmig.agent.config import Address, load_config

    config = load_config(Path(str(values["config"])) if values.get("config") else None)
    if listen := values.get("listen"):
        given = tuple(part.strip() for part in str(listen).split(",") if part.strip())
        try:
            for text in given:
                Address.parse(text)
        except ValueError as error:
            raise RequestError(str(error), option="listen", hint="--listen tcp:HOST:PORT,unix:PATH") from None
        config = msgspec.structs.replace(config, listen=given)
    return msgspec.structs.replace(config, listen=()) if values.get("local-only") else config


# -- stdio -------------------------------------------------------------------------------------------------------------


def _stdio(path: Path, values: dict[str, Any]) -> int:
    """Standard input and output are a link of another host's agent: carried to this host's, which is started for it."""
    connection = _connected(path) or _started(path, values)
    thread = threading.Thread(target=_carry_in, args=(connection,), daemon=True)
    thread.start()
    with contextlib.suppress(OSError):  # one of both ends has gone: whoever is left sees the end
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
    """None: nobody listens there. Raises ChannelError when somebody does, and does not let us in."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_START_S)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise ChannelError(
            f"the agent at {path} cannot be reached: {error.strerror or error}",
            hint="local.group and local.mode of its agent.toml, or SocketGroup= of its systemd socket, say who may",
        ) from None
    connection.settimeout(None)
    return connection


def _started(path: Path, values: dict[str, Any]) -> socket.socket:
    """An agent of our own, which ends by itself; its log stands beside its socket. Raises ChannelError."""
    words = [sys.executable, "-m", "virtmig.cli.main", "agent", "--local-only", "--idle-exit", str(int(IDLE_S))]
    words += ["--config", str(Path(values["config"]).absolute())] if values.get("config") else []
    log = path.with_suffix(".log")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ChannelError(f"no agent runs here, and none can be started: {log}: {error.strerror}") from None
    begin = os.lseek(handle, 0, os.SEEK_END)
    try:
        process = subprocess.Popen(
            words, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=handle, cwd="/"
        )
    finally:
        os.close(handle)
    deadline = time.monotonic() + _START_S
    while (connection := _connected(path)) is None:
        # one that has ended may have lost the race against another that was started at the same time
        if process.poll() is not None and time.monotonic() > deadline - _START_S + _RACE_S:
            raise ChannelError(f"the agent that was started has ended: {_last_words(log, begin)}", hint=f"see {log}")
        if time.monotonic() > deadline:
            raise ChannelError(f"the agent that was started does not listen on {path}", hint=f"see {log}")
        time.sleep(0.02)
    return connection


def _last_words(log: Path, begin: int) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
        if said:
            return "; ".join(said)
    return "without a word"


# -- handshake ---------------------------------------------------------------------------------------------------------


def run_handshake(values: dict[str, Any], options: GlobalOptions) -> int:
    """Show the exchange and the agreement between two agents; nothing is migrated.

    0: they agree; 3: one of them refuses; 1: anything else.
    """
    from virtmig.engine.agents import AgentConnection, shake_hands
    from virtmig.link.asking import Ended, Problem, Refused
    from virtmig.link.messages import Reason

    asked = {name: values[name] for name in HANDSHAKE_OPTIONS if name in values}
    guest, facts = _guest(str(values.get("domain") or ""), options)
    request = MigrationRequest(
        {"domain": guest.name, "desturi": "qemu://destination/system", "live": True, "transport": "relay", **asked}
    )
    as_json = bool(values.get("json"))
    show = _Exchange(sys.stdout)

    def write(said: Said) -> None:
        print(msgspec.json.encode(said).decode(), flush=True)

    connection: AgentConnection | None = None
    try:
        connection, agreed = shake_hands(
            agent_path(values.get("source")),
            str(values["destination"]),
            request={name: request[name] for name in request},
            guest=guest,
            facts=facts,
            only_handshake=True,
            heard=write if as_json else (lambda said: None) if options.quiet else show.message,
        )
        if as_json:
            write(agreed)
        else:
            show.agreement(agreed)
        with contextlib.suppress(MigrationError):  # both agents are done with it before we go
            while not isinstance(connection.hear(_END_S), Ended):
                pass
    except PlanRefused as error:
        if as_json:
            write(Refused(reasons=tuple(Reason(*row) for row in error.reasons)))
        else:
            show.refusals(error.reasons)
        return EXIT_REFUSED
    except MigrationError as error:
        if not as_json:
            raise
        write(Problem(text=error.message, hint=error.hint, kind=type(error).__name__))
        return 1
    finally:
        if connection is not None:
            connection.close()
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


class _Exchange:
    """A handshake as text. What the other host says is its own: nothing in it can move the cursor."""

    def __init__(self, stream: TextIO) -> None:
        from virtmig.engine.agents import plain_text

        self._plain = plain_text
        self._stream = stream
        self._facts: dict[bool, dict[str, Any]] = {}

    def _line(self, text: str) -> None:
        before, after = ("\n", text[1:]) if text.startswith("\n") else ("", text)
        print(before + self._plain(after).rstrip(), file=self._stream, flush=True)

    def message(self, message: Exchanged) -> None:
        content = message.content if isinstance(message.content, dict) else {}
        shown: list[str] = []
        if message.name == "Hello":
            facts = content.get("facts")
            facts = self._facts[message.source] = facts if isinstance(facts, dict) else {}
            low, high = content.get("version_lowest"), content.get("version_highest")
            versions = f"protocol {low}" if low == high else f"protocol {low} to {high}"
            shown = [f"{content.get('implementation')}, {versions}", f"host {facts.get('hostname') or '?'}"]
        elif message.name == "Proposal":
            request = content.get("request", {})
            shown = [" ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in request.items()
                              if name not in ("domain", "desturi"))]  # fmt: skip
        elif message.name == "Answer":
            counts = Counter(row.get("outcome") for row in content.get("verdicts", []))
            shown = [
                ", ".join(f"{counts[word]} {word}" for word in ("accepted", "adjusted", "refused") if counts[word])
            ]
        elif message.name == "Agreement":
            shown = [_channels(content.get("channels", []))]
        elif message.name in ("Refuse", "Failed"):
            shown = [str(content.get("reason") or "; ".join(row.get("reason") for row in content.get("reasons", [])))]
        self._line(f"{message.ms:9.1f} ms  {'->' if message.source else '<-'} {message.name:<12} {'; '.join(shown)}")

    def agreement(self, agreed: Agreed) -> None:
        self._line(f"\nagreed with {agreed.peer} in {agreed.ms:.1f} ms, {agreed.round_trips} round trips")
        self._hosts()
        for outcome in ("adjusted", "accepted"):
            for row in agreed.answer.verdicts:
                if row.outcome == outcome:
                    change = f" ({row.asked} -> {row.given})" if outcome == "adjusted" else ""
                    self._line(f"  {outcome:<11} {row.feature}{change}: {row.reason}")
        for warning in agreed.answer.warnings:
            self._line(f"  warning     {warning.feature}: {warning.reason}")
            if warning.way_out:
                self._line(f"              way out: {warning.way_out}")
        self._line("  channels    " + _channels([msgspec.structs.asdict(channel) for channel in agreed.channels]))

    def refusals(self, reasons: Iterable[tuple[str, str, str]]) -> None:
        self._line("\nrefused")
        self._hosts()
        for feature, reason, way_out in reasons:
            self._line(f"  refused     {feature}: {reason}")
            if way_out:
                self._line(f"              way out: {way_out}")

    def _hosts(self) -> None:
        for source, name in ((True, "source"), (False, "destination")):
            if source in self._facts:
                rows = list(_facts_lines(self._facts[source]))
                self._line(f"  {name:<11} {rows[0]}")
                for row in rows[1:]:
                    self._line(f"              {row}")


def _facts_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What a handshake may depend on: the host in one line, what is not known of it in more."""
    from virtmig.facts import version_text

    parts = []
    for name, key in (("QEMU", "qemu_version"), ("libvirt", "libvirt_version")):
        parts.append(f"{name} {version_text(facts[key])}" if isinstance(facts.get(key), int) else f"{name} unknown")
    if (most := facts.get("parallel_connections_max")) is not None:
        parts.append(f"at most {most} parallel connections")
    if isinstance(userfaultfd := facts.get("userfaultfd"), dict):
        parts.append(f"postcopy {userfaultfd.get('status')} ({userfaultfd.get('evidence')})")
    yield f"{facts.get('hostname') or '?'}: {', '.join(parts)}"
    for text in facts.get("unanswered", ()):
        yield f"not known: {text}"


def _channels(rows: Iterable[dict[str, Any]]) -> str:
    """`main, parallel 0 to 4`."""
    counts = Counter(str(row["role"]) for row in rows)
    numbered = ("parallel", "storage")
    return ", ".join(
        f"{role} 0{f' to {count - 1}' if count > 1 else ''}" if role in numbered else role
        for role, count in counts.items()
    )


# -- order -------------------------------------------------------------------------------------------------------------


def run_order(values: dict[str, Any], options: GlobalOptions) -> int:
    """Put one migration's connections in order. 0 when each ended as both QEMUs wanted, 1 when one broke."""
    from virtmig.agent.ordering import Ordering
    from virtmig.engine.transport import Address, Listener, Stop
    from virtmig.quantities import size_text

    def say(words: str) -> None:
        if not options.quiet:
            print(words, flush=True)

    stop = Stop()
    with stop_on_signals(_Stopping(stop)):
        qemu = Address.parse(str(values["qemu"]), "qemu")
        listener = Listener(Address.parse(str(values["listen"]), "listen"), stop)
        try:
            ordering = Ordering(listener, qemu, stop, multifd_channels=int(values.get("parallel-connections") or 0),
                                preempt=bool(values.get("postcopy-preempt")), tell=say)  # fmt: skip
            say(f"listening on {listener.address}")
            done = ordering.run()
        finally:
            listener.close()
    say(f"{size_text(done.bytes_to_qemu)} over {', '.join(map(str, done.channels))}; both QEMUs know how it ended")
    for words in done.broken:
        print(f"broken: {words}", file=sys.stderr)
    return 1 if done.broken else 0


class _Stopping:
    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def ask(self, what: str) -> None:
        self._stop.request(MigrationAborted(f"stopped by {what}"))


# -- recover -----------------------------------------------------------------------------------------------------------


def run_recover(values: dict[str, Any], options: GlobalOptions) -> int:
    """Finish a postcopy that broke, as the source's agent remembers it."""
    from virtmig.cli.commands import run_migrate

    path = agent_path(values.get("agent"))
    found = broken_session(path, str(values["domain"]))
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


def broken_session(path: Path, domain: str) -> SessionRecord:
    """The postcopy that this host's agent remembers as broken. Raises RequestError when it remembers none.

    One whose agents still dial each other is given a moment: mended, it needs no recovery. A recovery ends it else.
    """
    from virtmig.engine.agents import ask_sessions

    deadline = time.monotonic() + _MENDING_S
    while True:
        sessions = ask_sessions(path)
        ours = [row for row in sessions if row.role == "source" and domain in (row.domain, row.uuid)]
        broken = [row for row in ours if row.state in ("failed", "reconnecting") and row.request.get("postcopy")]
        if broken and (broken[0].state == "failed" or time.monotonic() > deadline):
            return broken[0]
        if not broken:
            break
        time.sleep(0.05)
    known = ", ".join(f"{row.domain} ({row.state})" for row in sessions if row.role == "source") or "none"
    raise RequestError(
        f"this host's agent remembers no broken postcopy of {domain}; it knows: {known}",
        option="domain",
        hint=f"virtmig migrate {domain} DESTURI --live --postcopy --postcopy-resume",
    )
