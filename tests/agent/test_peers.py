"""Who gets in and where guests may go: TLS, the key, nothing, users, ssh; each refusal in words, on both hosts."""

from __future__ import annotations

import datetime
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from tests.support.two_agents import (
    Host,
    Migration,
    allow,
    dial,
    ends,
    eventually,
    handshake,
    threads,
    write_pki,
)
from virtmig.agent.access import Identity
from virtmig.agent.peers import Peers, peer_address
from virtmig.errors import ChannelError, MigrationError, PlanRefused, RequestError
from virtmig.link.states import DEADLINE_S, State

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
EVERYBODY = (allow("tls:*", "send", "receive"),)


class Authorities(NamedTuple):
    ours: trustme.CA
    other: trustme.CA


@pytest.fixture(scope="module")
def authorities() -> Authorities:
    return Authorities(trustme.CA(), trustme.CA())


def leaf(authority: trustme.CA, name: str, **dates: Any) -> trustme.LeafCert:
    return authority.issue_cert("127.0.0.1", name, **dates)


def tls_host(folder: Path, authority: trustme.CA, certificate: trustme.LeafCert, **settings: Any) -> Host:
    pki = write_pki(folder / "pki", authority, certificate)
    return Host(folder, link="tcp:127.0.0.1:0", **({"security": "tls", "tls": pki, "allow": EVERYBODY} | settings))


def refusals(logs: list[Any]) -> list[str]:
    return [
        f"{event['peer']}: {event['reason']}" for event in logs if event["event"] == "refused" and "reason" in event
    ]


def test_mutual_tls_with_names(place: Path, authorities: Authorities) -> None:
    ours = authorities.ours
    amber = tls_host(place / "a", ours, leaf(ours, "amber.example.org"), allow=(allow("tls:beryl.*", "receive"),))
    beryl = tls_host(place / "b", ours, leaf(ours, "beryl.example.org"), allow=(allow("tls:amber.*", "send"),))
    with amber as source, beryl as destination:
        agreed = handshake(source, destination.address, parallel=True, parallel_connections=3)
        assert agreed.peer == "beryl.example.org"
        assert len(agreed.channels) == 4
        migration = Migration(source, destination.address).connect()
        migration.echo(os.urandom(300_000))
        migration.finish()


@pytest.mark.parametrize(
    ("made_by", "dates", "said", "logged"),
    [
        ("other", {}, "refuses our certificate or TLS", "it is not signed by our CA"),
        ("ours", {"not_before": NOW - 9 * DAY, "not_after": NOW - DAY}, "ours has expired", "it has expired"),
        (
            "ours",
            {"not_before": NOW + DAY, "not_after": NOW + 9 * DAY},
            "refuses our certificate",
            "it is not valid yet",
        ),
    ],
)
def test_a_source_with_a_wrong_certificate(
    place: Path, authorities: Authorities, logs: list[Any], made_by: str, dates: Any, said: str, logged: str
) -> None:
    """TLS 1.3 tells it only after its own handshake: at its first read."""
    ours = authorities.ours
    bad = leaf(getattr(authorities, made_by), "amber.example.org", **dates)
    with tls_host(place / "a", ours, bad) as source, tls_host(place / "b", ours, leaf(ours, "beryl")) as destination:
        with pytest.raises(MigrationError) as refused:
            handshake(source, destination.address)
        assert said in str(refused.value)
        eventually(lambda: refusals(logs))
        [line] = refusals(logs)
        assert line.startswith("127.0.0.1:")
        assert logged in line


@pytest.mark.parametrize(
    ("made_by", "dates", "said"),
    [
        ("other", {}, "it is not signed by our CA"),
        ("ours", {"not_before": NOW - 9 * DAY, "not_after": NOW - DAY}, "it has expired"),
        ("ours", None, "it is for another"),
    ],
)
def test_a_destination_with_a_wrong_certificate(
    place: Path, authorities: Authorities, logs: list[Any], made_by: str, dates: Any, said: str
) -> None:
    ours, authority = authorities.ours, getattr(authorities, made_by)
    bad = authority.issue_cert("elsewhere.example.org") if dates is None else leaf(authority, "beryl", **dates)
    with tls_host(place / "a", ours, leaf(ours, "amber")) as source, tls_host(place / "b", ours, bad) as destination:
        with pytest.raises(ChannelError, match=said):
            handshake(source, destination.address)
        eventually(lambda: refusals(logs))
        assert not destination.agent.sessions()


def test_names_that_are_not_on_the_list(place: Path, authorities: Authorities, logs: list[Any]) -> None:
    ours = authorities.ours
    with (
        tls_host(place / "a", ours, leaf(ours, "amber.example.org")) as source,
        tls_host(place / "b", ours, leaf(ours, "beryl"), allow=(allow("tls:onyx", "send"),)) as stranger,
        tls_host(place / "c", ours, leaf(ours, "cobalt"), allow=(allow("tls:amber.*", "receive"),)) as no_right,
    ):
        for destination, has in ((stranger, "it has no rights here"), (no_right, "it has receive")):
            with pytest.raises(PlanRefused) as refused:
                handshake(source, destination.address)
            [(_, reason, way_out)] = refused.value.reasons
            assert reason == f"amber.example.org may not bring guests to this host: the right 'send' is missing, {has}"
            assert way_out == (
                f"in agent.toml of this host ({socket.gethostname()}): "
                'allow = [{ peer = "tls:amber.example.org", rights = ["send"] }]'
            )
            events = [event for event in logs if event["event"] == "refused" and "reasons" in event]
            assert events[-1]["peer"].startswith("amber.example.org (127.0.0.1:")
            assert events[-1]["reasons"] == [reason]


def test_a_destination_that_may_not_be_given_guests_hears_nothing(
    place: Path, authorities: Authorities, logs: list[Any]
) -> None:
    ours = authorities.ours
    with (
        tls_host(place / "a", ours, leaf(ours, "amber"), allow=(allow("tls:onyx", "receive"),)) as source,
        tls_host(place / "b", ours, leaf(ours, "beryl.example.org")) as destination,
    ):
        with pytest.raises(PlanRefused) as refused:
            handshake(source, destination.address)
        [(feature, reason, way_out)] = refused.value.reasons
        assert feature == "receive"
        assert reason.startswith(
            "beryl.example.org may not be given guests of this host: the right 'receive' is missing"
        )
        assert 'peer = "tls:beryl.example.org", rights = ["receive"]' in way_out
        eventually(lambda: any("closed the connection" in line for line in refusals(logs)))
        assert "hello" not in [event["event"] for event in logs]
        assert source.agent.limits.usage.migrations_out == 0


def test_tls_and_plain_do_not_meet(place: Path, authorities: Authorities, logs: list[Any]) -> None:
    ours = authorities.ours
    plain = {"link": "tcp:127.0.0.1:0", "allow": (allow("plain", "send", "receive"),)}
    with tls_host(place / "a", ours, leaf(ours, "amber")) as tls, Host(place / "b", **plain) as open_one:
        with pytest.raises(MigrationError) as refused:
            handshake(tls, open_one.address)
        assert "during the TLS handshake" in str(refused.value) or "has hung up" in str(refused.value)
        eventually(lambda: any("byte 0x16 in the place of 0x89" in each for each in refusals(logs)))
        with pytest.raises(MigrationError):
            handshake(open_one, tls.address)
        eventually(lambda: any("does not speak TLS" in each for each in refusals(logs)))
        with dial(tls.address) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert ends(browser)
        eventually(lambda: any("http request" in each for each in refusals(logs)))


# -- the key, and nothing ------------------------------------------------------------------------------------------


def key_host(folder: Path, digits: str, *rights: Any, **settings: Any) -> Host:
    folder.mkdir()
    key = folder / "key"
    key.write_text(digits * 24)
    key.chmod(0o600)
    given: dict[str, Any] = {"link": "tcp:127.0.0.1:0", "security": "key", "key_file": str(key)}
    return Host(folder, **(given | {"allow": (allow("key", *(rights or ("send", "receive"))),)} | settings))


def test_the_key(place: Path, logs: list[Any]) -> None:
    with key_host(place / "a", "5a") as source, key_host(place / "b", "5a") as destination:
        assert handshake(source, destination.address).peer == "a holder of the pre-shared key"
        with key_host(place / "c", "7b") as other, pytest.raises(PlanRefused, match="did not prove"):
            handshake(source, other.address)
        plain = {"link": "tcp:127.0.0.1:0", "allow": (allow("plain", "send", "receive"),)}
        with Host(place / "d", **plain) as keyless:
            with pytest.raises(PlanRefused, match="key"):
                handshake(keyless, destination.address)
            with pytest.raises(PlanRefused, match="key"):
                handshake(source, keyless.address)
    assert "5a5a5a" not in str(logs)


def test_rights_of_the_key_and_of_nobody(place: Path) -> None:
    with (
        key_host(place / "a", "5a") as source,
        key_host(place / "b", "5a", "receive") as destination,
        pytest.raises(PlanRefused, match="a holder of the pre-shared key may not bring guests to this host"),
    ):
        handshake(source, destination.address)
    with (
        key_host(place / "c", "5a", "send") as source,
        key_host(place / "d", "5a") as destination,
        pytest.raises(PlanRefused, match="may not be given guests of this host"),
    ):
        handshake(source, destination.address)
    with (
        Host(place / "e", link="tcp:127.0.0.1:0", allow=(allow("plain", "receive"),)) as source,
        Host(place / "f", link="tcp:127.0.0.1:0") as destination,
        pytest.raises(PlanRefused, match="an unproven peer may not bring guests to this host"),
    ):
        handshake(source, destination.address)


def test_an_address_that_is_none(place: Path) -> None:
    with Host(place / "a") as source:
        for address, words in (
            ("beryl", "an address is tcp:HOST:PORT or unix:PATH"),
            ("tcp:beryl:99999", "tcp: takes HOST or HOST:PORT"),
            ("ssh:", "names no host"),
            ("ssh:-oProxyCommand=x", "names no host"),
            (f"unix:{place}/nobody.sock", "no agent at unix:"),
            ("tcp:" + "x" * 80 + ".example.org:1", "no agent at tcp:"),
            (" , ", "no address"),
        ):
            with pytest.raises(MigrationError, match=words):
                handshake(source, address)


def test_the_next_address_is_tried(place: Path) -> None:
    with Host(place / "a") as source, Host(place / "b") as destination:
        agreed = handshake(source, f"unix:{place}/nobody.sock, {destination.address}")
        assert agreed.round_trips == 3


def test_addresses_for_people() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        dial(f"tcp:127.0.0.1:{listening.getsockname()[1]}") as one,
    ):
        there, _ = listening.accept()
        assert peer_address(there) == "{}:{}".format(*one.getsockname())
        there.close()


# -- ssh -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that runs the command here, with the configuration of the host it was asked for."""
    folder = place / "bin"
    folder.mkdir()
    script = folder / "ssh"
    script.write_text(
        f"#!/bin/sh\n"
        f'echo "$@" >> {place}/asked\n'
        'while [ "$1" != -- ]; do shift; done\n'
        "host=$2; shift 2\n"
        'case "$host" in\n'
        "  locked) echo 'root@locked: Permission denied (publickey).' >&2; exit 255;;\n"
        f'  b) [ "$*" = "virtmig agent --stdio" ] || exit 9\n'
        f"     exec {sys.executable} -m virtmig.cli.main agent --stdio --config {place}/b/agent.toml;;\n"
        '  *) exec sh -c "$*";;\n'
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return place / "asked"


def test_a_handshake_over_ssh(place: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEADLINE_S, State.FAILED, 0.1)  # as long the control connection is kept
    with Host(place / "a") as source, Host(place / "b") as destination:
        (place / "b" / "agent.toml").write_text(f'local.socket = "{destination.socket}"\n')
        agreed = handshake(source, "ssh:b", parallel=True, parallel_connections=2)
        assert agreed.peer == "ssh b"
        assert len(agreed.channels) == 3
    assert len(ssh.read_text().splitlines()) == 4  # control and three channels
    assert "-o BatchMode=yes" in ssh.read_text()
    eventually(lambda: not [child for child in children() if b"--stdio" in child], "every ssh ending")
    eventually(lambda: not threads("end of ssh"))


def children() -> list[bytes]:
    found = []
    for task in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{os.getpid()}\n" in (task / "status").read_text():
                found.append((task / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_what_ssh_says_is_said(place: Path, ssh: Path) -> None:
    with Host(place / "a") as source:
        with pytest.raises(ChannelError) as failed:
            handshake(source, "ssh:locked")
        assert "ssh has ended with status 255: root@locked: Permission denied (publickey)." in str(failed.value)
        with pytest.raises(ChannelError, match="ssh has ended with status 3: gone"):
            handshake(source, "ssh:onyx sh -c 'echo gone >&2; exit 3'")


def test_clients_that_are_not_root_choose_neither_host_nor_command(place: Path, ssh: Path) -> None:
    alice = Identity(kind="unix", names=("alice",), uid=4711)
    peers = Peers(Host(place / "a", allow=(allow("ssh:*.example.org", "receive"),)).config)
    with pytest.raises(PlanRefused, match="ssh root@onyx may not be given guests of this host"):
        peers.dial("ssh:root@onyx", asked_by=alice)
    with pytest.raises(RequestError, match="which command runs there is chosen by root"):
        peers.dial("ssh:b.example.org touch /tmp/x", asked_by=alice)
    assert not ssh.exists()
    line, identity = peers.dial("ssh:root@b.example.org", asked_by=alice)
    assert identity.names == ("root@b.example.org",)
    line.close()
    eventually(ssh.exists)


# -- users on unix sockets -----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes users")
def test_another_user_on_a_unix_socket(place: Path, logs: list[Any]) -> None:
    """The kernel says who it is; a row of agent.toml says what it may."""
    place.chmod(0o755)
    with Host(place / "b"):
        link = place / "b" / "link.sock"
        assert stat.S_IMODE(link.stat().st_mode) & 0o002 == 0
        link.chmod(0o666)
        code = (
            "import socket, sys; sys.path.insert(0, sys.argv[2])\n"
            "from virtmig.link.messages import Hello; from virtmig.facts import HostFacts\n"
            "from tests.support.two_agents import ask, dial\n"
            "hello = Hello(version_lowest=1, version_highest=1, implementation='x', nonce=bytes(32),"
            " facts=HostFacts(uri='x'))\n"
            "print(ask(dial(sys.argv[1]), hello))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, f"unix:{link}", str(Path(__file__).parents[2])],
            user="nobody", group="nogroup", extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "user nobody" in done.stdout, done.stderr
        assert "may not bring guests to this host" in done.stdout
        assert any("user nobody" in str(event.get("peer")) for event in logs)
