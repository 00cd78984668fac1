"""A running agent: limits, versions, features, facts in time, its begin and its end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.two_agents import (
    PATIENCE_S,
    Host,
    Migration,
    allow,
    ask,
    descriptors,
    dial,
    ends,
    eventually,
    handshake,
    hear,
    limits,
    nothing_left,
    threads,
)
from virtmig.agent import server
from virtmig.agent.config import DeadlinesSection
from virtmig.agent.notify import ActivatedSocket, Notifier
from virtmig.errors import ChannelError, PlanRefused, RequestError
from virtmig.facts import Finding, HostFacts
from virtmig.link.frames import PREFACE, FrameType
from virtmig.link.messages import ChannelName, Hello, Refuse, Resume, ResumeAccepted
from virtmig.link.proofs import RESUME
from virtmig.link.side import Terms

PLAIN = (allow("plain", "send", "receive"),)
BOTH = {"link": "tcp:127.0.0.1:0", "allow": PLAIN}


def own_terms(host: Host, **changes: Any) -> Terms:
    return Terms(**{"facts": HostFacts(uri="qemu:///rude", hostname="rude"), "random": os.urandom, **changes})


def refusals(logs: list[Any]) -> list[Any]:
    return [event for event in logs if event["event"] == "refused" and "reason" in event]


@pytest.fixture
def hosts(place: Path) -> Iterator[tuple[Host, Host]]:
    with Host(place / "a", **BOTH) as source, Host(place / "b", **BOTH) as destination:
        yield source, destination


# -- limits, versions, features ------------------------------------------------------------------------------------


def test_limits_of_migrations(place: Path) -> None:
    with (
        Host(place / "a", limits=limits(migrations_out=2)) as source,
        Host(place / "b", limits=limits(migrations_in=1)) as destination,
        Host(place / "c", limits=limits(migrations_out=0)) as closed,
    ):
        first = Migration(source, destination.address)
        with pytest.raises(PlanRefused) as refused:
            handshake(source, destination.address)
        [(feature, reason, way_out)] = refused.value.reasons
        assert (feature, reason) == (
            "limits.migrations_in",
            "1 migrations to this host run already, it allows 1 at once",
        )
        assert "limits.migrations_in" in way_out
        first.close()
        eventually(lambda: destination.agent.limits.usage.migrations_in == 0)
        eventually(lambda: source.agent.limits.usage.migrations_out == 0)
        assert handshake(source, destination.address).round_trips == 3
        with pytest.raises(PlanRefused, match="this host gives no guests away"):
            handshake(closed, destination.address)


def test_strangers_with_a_key_to_prove_take_no_migration(place: Path) -> None:
    """Whoever says HELLO and cannot prove the key does not keep others from migrating."""
    key = place / "key"
    key.write_text("5a" * 24)
    key.chmod(0o600)
    settings: dict[str, Any] = {"security": "key", "key_file": str(key), "limits": limits(migrations_in=1),
                                "link": "tcp:127.0.0.1:0", "allow": (allow("key", "send", "receive"),)}  # fmt: skip
    with (
        Host(place / "a", **settings) as source,
        Host(place / "b", **settings) as destination,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(5):
            rude = stack.enter_context(dial(destination.address))
            hello = Hello(version_lowest=1, version_highest=1, implementation="x", nonce=bytes(32),
                          facts=HostFacts(uri="x"), keyed=True)  # fmt: skip
            assert isinstance(ask(rude, hello), Hello)
        assert len(destination.agent.sessions()) == 5
        assert len(destination.agent.greetings) == 5
        assert handshake(source, destination.address).round_trips == 3


def test_fewer_connections_are_said_or_refused(place: Path) -> None:
    with Host(place / "a") as source, Host(place / "b", limits=limits(parallel_connections=5)) as destination:
        agreed = handshake(source, destination.address, parallel=True, parallel_connections=10)
        assert [str(channel) for channel in agreed.channels] == ["main", *(f"parallel {n}" for n in range(5))]
        [row] = [row for row in agreed.answer.verdicts if row.outcome == "adjusted"]
        assert (row.feature, row.asked, row.given) == ("parallel-connections", "10", "5")
        assert "allows 5 parallel connections" in row.reason
        with pytest.raises(PlanRefused) as refused:
            handshake(source, destination.address, parallel=True, parallel_connections=10, strict=True)
        [(_, reason, way_out)] = refused.value.reasons
        assert "10 parallel connections were asked for" in reason
        assert "--parallel-connections 5" in way_out


def test_postcopy_is_refused_where_qemu_may_not_have_userfaultfd(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Host(place / "a") as source, Host(place / "b") as destination:
        assert handshake(source, destination.address, postcopy=True).round_trips == 3
        look = destination.agent.discovery.look

        def without(*given: Any, **named: Any) -> Any:
            facts, host = look(*given, **named)
            return facts, msgspec.structs.replace(host, userfaultfd=Finding("no", "a kernel that says no"))

        monkeypatch.setattr(destination.agent.discovery, "look", without)
        with pytest.raises(PlanRefused, match="a kernel that says no"):
            handshake(source, destination.address, postcopy=True)
        eventually(lambda: not destination.agent.sessions())


def test_machine_types_that_differ_are_said(place: Path) -> None:
    from tests.support.hosts import GUEST as MODERN

    with Host(place / "a") as source, Host(place / "b") as destination:
        if not destination.agent.facts()[0].emulators:
            pytest.skip("no QEMU on this machine that could know machine types")
        with pytest.raises(PlanRefused, match=r"machine type pc-q35-2\.4711 is unknown to QEMU"):
            handshake(source, destination.address, guest=msgspec.structs.replace(MODERN, machine="pc-q35-2.4711"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"versions": (3, 9)}, "3 to 9"),
        ({"mandatory": ("teleport",)}, "teleport"),
    ],
)
def test_versions_and_features_without_a_common_one(
    hosts: tuple[Host, Host], changes: dict[str, Any], reason: str
) -> None:
    destination = hosts[1]
    terms = own_terms(destination, **changes)
    with dial(destination.address) as sock:
        hello = Hello(version_lowest=terms.versions[0], version_highest=terms.versions[1], implementation="x",
                      nonce=bytes(32), facts=terms.facts, mandatory=terms.mandatory)  # fmt: skip
        answer = ask(sock, hello)
    assert isinstance(answer, Refuse)
    assert reason in answer.reasons[0].reason


def test_an_older_hello_without_optional_fields_is_understood(hosts: tuple[Host, Host]) -> None:
    destination = hosts[1]
    facts = {"uri": "qemu:///old"}
    content = {"message": "hello", "version_lowest": 1, "version_highest": 1, "implementation": "old",
               "nonce": bytes(32), "facts": facts, "something-else": [1, 2]}  # fmt: skip
    payload = msgspec.msgpack.encode(content)
    with dial(destination.address) as sock:
        sock.sendall(PREFACE + struct.pack(">BBHI", FrameType.HELLO, 0, 0, len(payload)) + payload)
        answer = hear(sock)
    assert isinstance(answer, Hello)
    assert not answer.keyed


# -- facts in time -------------------------------------------------------------------------------------------------


def test_hello_is_answered_in_time_when_libvirt_hangs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is said, what is not is said too, and no thread more waits for a libvirt that does not answer."""
    from virtmig.agent import discovery
    from virtmig.agent.responding import FACTS_WITHIN_S

    assert server.FACTS_WITHIN_S + server.GREETING_S / 2 < 10.0
    assert FACTS_WITHIN_S < 30.0
    hangs = threading.Event()
    asked = []

    def ask_libvirt(config: Any, guest: Any) -> Any:
        asked.append(guest)
        hangs.wait(PATIENCE_S)
        return None, "it hung"

    monkeypatch.setattr(discovery, "_ask_libvirt", ask_libvirt)
    monkeypatch.setattr(server, "FACTS_WITHIN_S", 0.3)
    monkeypatch.setattr("virtmig.agent.responding.FACTS_WITHIN_S", 0.3)
    heard: list[Any] = []
    with Host(place / "a") as source, Host(place / "b") as destination:
        begun = time.monotonic()
        handshake(source, destination.address, heard=heard.append)
        assert time.monotonic() - begun < PATIENCE_S
        [hello] = [message for message in heard if message.name == "Hello" and not message.source]
        assert any("libvirt: no answer for" in text for text in hello.content["facts"]["unanswered"])
        handshake(source, destination.address)
        assert sum(guest is None for guest in asked) == 2  # each host once, whoever asked
        hangs.set()


# -- the service ---------------------------------------------------------------------------------------------------


def test_stop_lets_a_session_finish_and_begins_no_other(place: Path, logs: list[Any]) -> None:
    with Host(place / "a") as source, Host(place / "b") as destination:
        migration = Migration(source, destination.address).connect()
        eventually(lambda: all(each.running for each in destination.agent.sessions()))
        stopping = threading.Thread(target=destination.agent.stop)
        stopping.start()
        assert destination.agent.stopping.wait(PATIENCE_S)
        with pytest.raises(PlanRefused, match="the agent is being stopped"):
            handshake(source, destination.address)
        migration.echo(b"still here")
        migration.finish()
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()
    assert [event["event"] for event in logs].count("stopped") == 3
    assert not Path(destination.socket).exists()


def test_stop_gives_up_at_its_deadline(place: Path) -> None:
    deadlines = DeadlinesSection(stop_s=0.2)
    with Host(place / "a") as source, Host(place / "b", deadlines=deadlines) as destination:
        migration = Migration(source, destination.address).connect()
        eventually(lambda: all(each.running for each in destination.agent.sessions()))
        destination.agent.stop()
        assert migration.session.over.wait(PATIENCE_S)
        assert migration.session.ended is not None
        assert "the time to finish is over" in migration.session.ended.reasons[0].reason
        migration.close()


def test_a_finished_session_answers_who_dials_again(hosts: tuple[Host, Host]) -> None:
    """PROTOCOL.md: a finished destination still accepts a RESUME."""
    destination = hosts[1]
    migration = Migration(hosts[0], destination.address).connect()
    [session] = destination.agent.sessions()
    migration.finish()
    eventually(lambda: not destination.agent.sessions())
    proofs = session.side._proofs
    assert proofs is not None
    control = ChannelName("control")
    resume = Resume(session=session.side.session, role="control", index=0, attempt=9, received_up_to=0,
                    proof=proofs.of_attempt(RESUME, control, 9, 0))  # fmt: skip
    with dial(destination.address) as sock:
        assert isinstance(ask(sock, resume), ResumeAccepted)


def test_handed_over_sockets_go_on_listening(place: Path) -> None:
    """systemd keeps them: after our end they must still take connections for the next agent."""
    local, link = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))
    local.bind(str(place / "given.sock"))
    local.listen()
    port = link.getsockname()[1]
    host = Host(place / "a", allow=PLAIN)
    host.agent.start(Notifier({}), (ActivatedSocket("", local.dup()), ActivatedSocket("", link.dup())))
    assert len(host.agent.addresses) == 2
    assert not host.socket.exists()
    host.agent.stop(0.0)
    with dial(f"unix:{place}/given.sock"), dial(f"tcp:127.0.0.1:{port}"):
        assert local.accept()
        assert link.accept()
    local.close()
    link.close()


def test_the_beat_comes_from_the_thread_that_accepts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(place / "notify"))
    manager.settimeout(PATIENCE_S)
    notifier = Notifier({"NOTIFY_SOCKET": str(place / "notify"), "WATCHDOG_USEC": "200000"})
    host = Host(place / "a")
    host.agent.start(notifier)
    assert manager.recv(4096).startswith(b"READY=1\nSTATUS=listening on unix:")
    assert manager.recv(4096) == b"WATCHDOG=1"
    with host.agent._lock:  # a service that hangs where everything passes
        eventually(lambda: silent(manager, 0.5), "the beat ending")
    assert manager.recv(4096) == b"WATCHDOG=1"
    host.agent.stop(0.0)
    assert "accept" not in threads()
    manager.close()


def silent(manager: socket.socket, seconds: float) -> bool:
    manager.settimeout(seconds)
    try:
        manager.recv(4096)
    except TimeoutError:
        return True
    finally:
        manager.settimeout(PATIENCE_S)
    return False


def test_what_cannot_be_listened_on(place: Path) -> None:
    with Host(place / "a"), pytest.raises(ChannelError, match=r"in use"):
        Host(place / "a").agent.start()
    (place / "file").write_text("")
    from virtmig.agent.config import LocalSection

    for local, error in (
        (LocalSection(socket=f"{place}/file/agent.sock"), "folder of the clients' socket cannot be made"),
        (LocalSection(socket=f"{place}/x.sock", group="no-such-group"), "this host has no group no-such-group"),
    ):
        with pytest.raises(RequestError, match=error):
            Host(place / "b", local=local).agent.start()
    with pytest.raises(ChannelError, match="cannot listen on unix:"):
        Host(place / "b", link=f"unix:{place}/nowhere/link.sock").agent.start()
    assert not (place / "b" / "agent.sock").exists()


def test_a_stale_socket_is_taken_over(place: Path) -> None:
    (place / "a").mkdir()
    for name in ("agent.sock", "link.sock"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(place / "a" / name))
    with Host(place / "a") as host, dial(host.address):
        assert host.socket.exists()


def test_both_families_by_default(place: Path) -> None:
    with Host(place / "a", link="tcp:[::]:0", allow=PLAIN) as host:
        for address in ("127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])):
            with socket.create_connection((address.strip("[]"), host.port), PATIENCE_S) as sock:
                sock.sendall(b"x")
                assert ends(sock)


def test_nothing_is_left_of_handshakes(hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    from virtmig.link.states import DEADLINE_S, State

    monkeypatch.setitem(DEADLINE_S, State.FAILED, 0.1)
    monkeypatch.setitem(DEADLINE_S, State.REFUSED, 0.1)
    source, destination = hosts
    before = descriptors()
    with nothing_left():
        for _ in range(5):
            handshake(source, destination.address, parallel=True, parallel_connections=4)
            with pytest.raises(PlanRefused):
                handshake(source, destination.address, parallel=True, parallel_connections=40, strict=True)
    assert descriptors() <= before
    assert list((destination.folder / "sessions").glob("*")) == []
    assert list((source.folder / "sessions").glob("*")) == []


def test_a_stopped_agent_leaves_nothing_behind(place: Path) -> None:
    """Not even the sessions that would answer a peer for a while yet."""
    with nothing_left():
        with Host(place / "a") as source, Host(place / "b") as destination:
            Migration(source, destination.address).connect().finish()
        assert not [name for name in threads() if name in ("session", "accept") or name.startswith("relay ")]
