"""The service as a process: what systemd hands it, signals, standard input and output, restarts, exit status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.two_agents import PATIENCE_S, Host, Migration, ask, dial, eventually, handshake
from virtmig.agent.journal import Journal
from virtmig.engine.agents import ask_facts, ask_sessions, reachable
from virtmig.facts import HostFacts
from virtmig.link.asking import SessionRecord
from virtmig.link.frames import PREFACE, encode_message
from virtmig.link.messages import Hello

AGENT = [sys.executable, "-m", "virtmig.cli.main", "agent"]
HELLO = Hello(version_lowest=1, version_highest=1, implementation="x", nonce=bytes(32), facts=HostFacts(uri="x"))
#: passes descriptors 3 and 4 as systemd does, whose LISTEN_PID must be that of the process itself
ACTIVATED = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh"]


def settings(folder: Path, extra: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "agent.toml"
    path.write_text(
        f'listen = ["unix:{folder}/link.sock"]\nsecurity = "plain"\nlocal.socket = "{folder}/agent.sock"\n'
        f'qemu.sockets_folder = "{folder}/qemu"\nqemu.libvirt_uri = "none"\n{extra}'
    )
    return path


@contextlib.contextmanager
def service(folder: Path, *words: str, extra: str = "", **given: object) -> Iterator[subprocess.Popen[str]]:
    """Until it listens; afterwards it is ended."""
    command = [*AGENT, "--config", str(settings(folder, extra)), *words]
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(folder), **given.pop("env", {})}  # type: ignore[dict-item]
    with subprocess.Popen([*given.pop("before", []), *command], stderr=subprocess.PIPE, text=True,  # type: ignore[misc]
                          env=environment, **given) as process:  # type: ignore[call-overload]  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def listens(folder: Path, process: subprocess.Popen[str]) -> None:
    eventually(lambda: process.poll() is not None or not reachable(f"unix:{folder}/agent.sock"), "the agent listening")
    assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]


def events(process: subprocess.Popen[str]) -> list[dict[str, object]]:
    assert process.stderr is not None
    return [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]


# -- systemd -------------------------------------------------------------------------------------------------------


def test_under_systemd_with_its_sockets(place: Path) -> None:
    """Handed over, ready, alive; stopped; and the sockets take connections for the next one."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(place / "notify"))
    manager.settimeout(PATIENCE_S)
    local, link = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))
    local.bind(str(place / "agent.sock"))
    local.listen()
    with given_as_3_and_4(local, link) as pass_fds:
        environment = {"LISTEN_FDS": "2", "NOTIFY_SOCKET": str(place / "notify"), "WATCHDOG_USEC": "1000000"}
        with service(place, env=environment, before=ACTIVATED, **pass_fds) as process:
            ready = manager.recv(4096).decode()
            assert ready.startswith("READY=1\nSTATUS=listening on ")
            assert f"tcp:127.0.0.1:{link.getsockname()[1]}" in ready
            assert ask_facts(place / "agent.sock").facts.hostname == socket.gethostname()
            assert "WATCHDOG=1" in {manager.recv(4096).decode() for _ in range(3)}
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
    assert (place / "agent.sock").exists()
    with dial(f"unix:{place}/agent.sock"), dial(f"tcp:127.0.0.1:{link.getsockname()[1]}"):
        assert local.accept()
        assert link.accept()
    for each in (manager, local, link):
        each.close()


@contextlib.contextmanager
def given_as_3_and_4(*sockets: socket.socket) -> Iterator[dict[str, object]]:
    """For Popen: systemd passes them from 3 on."""
    high = [os.dup(each.fileno()) for each in sockets]

    def place_them() -> None:
        spare = [os.dup(fd) for fd in high]
        while min(spare) < 3 + len(spare):
            spare = [os.dup(fd) for fd in spare]
        for number, fd in enumerate(spare):
            os.dup2(fd, 3 + number)

    yield {"preexec_fn": place_them, "pass_fds": tuple({*high, *range(3, 3 + len(high))})}
    for fd in high:
        os.close(fd)


# -- signals -------------------------------------------------------------------------------------------------------


def test_sigterm_without_a_session(place: Path) -> None:
    with service(place / "a") as process:
        listens(place / "a", process)
        eventually(lambda: stat.S_IMODE((place / "a" / "agent.sock").stat().st_mode) == 0o660)  # once it listens
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        said = [event["event"] for event in events(process)]
        assert [each for each in said if each != "refused"][-1] == "stopped"  # refused: the look whether it listens
    assert not list((place / "a").glob("*.sock"))


def test_sigterm_lets_a_session_finish(place: Path) -> None:
    with Host(place / "b") as source, service(place / "a") as process:
        listens(place / "a", process)
        migration = Migration(source, f"unix:{place}/a/link.sock").connect()
        process.send_signal(signal.SIGTERM)
        eventually(lambda: refused(place / "a"), "no new session being begun")
        migration.echo(os.urandom(10_000))
        migration.finish()
        assert process.wait(PATIENCE_S) == 0


def refused(folder: Path) -> bool:
    with dial(f"unix:{folder}/link.sock") as sock:
        return "the agent is being stopped" in str(ask(sock, HELLO))


def test_sigterm_gives_up_after_its_deadline_and_a_second_one_at_once(place: Path) -> None:
    with Host(place / "b") as source:
        with service(place / "a", extra="deadlines.stop_s = 0.3\n") as process:
            listens(place / "a", process)
            migration = Migration(source, f"unix:{place}/a/link.sock").connect()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
            assert migration.session.over.wait(PATIENCE_S)
            assert "the time to finish is over" in str(migration.session.ended)
            migration.close()
        with service(place / "a") as process:
            listens(place / "a", process)
            migration = Migration(source, f"unix:{place}/a/link.sock").connect()
            process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(place / "a"))
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
            assert migration.session.over.wait(PATIENCE_S)
            assert "told to stop at once" in str(migration.session.ended)
            migration.close()


def test_killed_and_started_again(place: Path) -> None:
    """Its sockets are taken over, what was broken off is remembered, and the next handshake works."""
    with Host(place / "b") as other:
        with service(place / "a") as process:
            listens(place / "a", process)
            process.kill()
            process.wait()
        assert (place / "a" / "agent.sock").exists()
        Journal(place / "a" / "sessions").write(
            SessionRecord(session="5f", role="source", domain="opal", state="running")
        )
        with service(place / "a") as process:
            listens(place / "a", process)
            [record] = ask_sessions(place / "a" / "agent.sock")
            assert (record.state, record.reasons) == ("failed", ("the agent was stopped or killed",))
            assert handshake(other, f"unix:{place}/a/link.sock").round_trips == 3


def test_idle_exit(place: Path) -> None:
    with service(place / "a", "--idle-exit", "1", "--local-only") as process:
        listens(place / "a", process)
        assert not (place / "a" / "link.sock").exists()
        assert process.wait(PATIENCE_S) == 0


# -- standard input and output -------------------------------------------------------------------------------------


def bridge(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*AGENT, "--stdio", "--config", str(folder / "agent.toml")], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "RUNTIME_DIRECTORY": str(folder)})  # fmt: skip


def test_stdio_starts_an_agent_when_none_runs(place: Path) -> None:
    settings(place / "a")
    with bridge(place / "a") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(PREFACE + encode_message(HELLO))
        process.stdin.flush()
        assert process.stdout.read(len(PREFACE)) == PREFACE
        pid = started_by(place / "a")
        process.stdin.close()  # the source has gone: so is the session, and the bridge ends
        assert process.wait(PATIENCE_S) == 0
    assert not (place / "a" / "link.sock").exists()
    log = place / "a" / "agent.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    eventually(lambda: '"event": "over"' in log.read_text())
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not (place / "a" / "agent.sock").exists(), "the end of the agent")


def started_by(folder: Path) -> int:
    """The pid of the agent that listens there."""
    with dial(f"unix:{folder}/agent.sock") as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), "little")


def test_stdio_with_an_agent_that_runs(place: Path) -> None:
    with Host(place / "a") as running:
        settings(place / "a")
        with bridge(place / "a") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"GET / HTTP/1.1\r\n\r\n")
            process.stdin.flush()
            assert process.wait(PATIENCE_S) == 0  # the agent has hung up
            assert process.stdout.read() == b""
        assert not (place / "a" / "agent.log").exists()
        assert not running.agent.sessions()


def test_stdio_says_why_no_agent_can_be_started(place: Path) -> None:
    folder = place / "a"
    settings(folder, 'local.group = "no-such-group"\n')
    process = bridge(folder)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert b"the agent that was started has ended: local.group: this host has no group no-such-group" in errors
    assert b"Traceback" not in errors
    (folder / "agent.toml").write_text(f'local.socket = "{folder}/agent.toml/x.sock"\n')
    process = bridge(folder)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert b"no agent runs here, and none can be started" in errors


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "extra", "said"),
    [
        (("--listen", "16515"), "", "error: '16515': an address is tcp:HOST:PORT or unix:PATH"),
        (("--listen", "tcp:203.0.113.77:1"), "", "error: cannot listen on tcp:203.0.113.77:1: Cannot assign"),
        ((), "sekurity = 1\n", ":6: unknown key sekurity; did you mean security?"),
        ((), "allow = 7\n", ":6: allow: Expected `array`, got `int`"),
        ((), "limits.migrations_in = -1\n", "limits.migrations_in: Expected `int` >= 0"),
        (("--config", "/nowhere/agent.toml"), "", "error: /nowhere/agent.toml: no such file"),
        ((), 'key_file = "/nowhere/key"\n', "error: /nowhere/key: the pre-shared key cannot be read: No such file"),
    ],
)
def test_a_configuration_that_cannot_be(place: Path, words: tuple[str, ...], extra: str, said: str) -> None:
    path = settings(place, extra)
    given = words if "--config" in words else ("--config", str(path), *words)
    done = subprocess.run([*AGENT, *given], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_two_agents_on_one_socket(place: Path) -> None:
    with Host(place / "a") as first:
        done = subprocess.run([*AGENT, "--config", str(settings(place / "a"))], capture_output=True, text=True,
                              timeout=PATIENCE_S, check=False)  # fmt: skip
        assert done.returncode == 1
        assert f"error: cannot listen on unix:{first.socket}: Address already in use" in done.stderr
        assert "another process listens there" in done.stderr
        assert ask_facts(first.socket).facts.hostname == socket.gethostname()
