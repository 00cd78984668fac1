"""Strangers at a running agent: slow, silent, many, rude. Refused and logged; a session goes on beside them."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    nothing_left,
    write_pki,
)
from virtmig.agent import server
from virtmig.facts import HostFacts
from virtmig.link.frames import PREFACE, FrameType
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


# -- a session that is not disturbed -------------------------------------------------------------------------------


class Steady:
    """Sends and gets back, all the time, and counts."""

    def __init__(self, migration: Migration) -> None:
        self.rounds = 0
        self.error: BaseException | None = None
        self._migration = migration
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steady")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._migration.echo(os.urandom(20_000))
                self.rounds += 1
                self._stop.wait(0.002)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        before = self.rounds
        eventually(lambda: self.rounds > before + 3 or self.error, "the session going on")
        self._stop.set()
        self._thread.join()
        assert self.error is None


@pytest.fixture
def steady(hosts: tuple[Host, Host]) -> Iterator[tuple[Host, Steady]]:
    """A session whose bytes flow; afterwards it ends as it should."""
    source, destination = hosts
    migration = Migration(source, destination.address).connect()
    with Steady(migration) as running:
        yield destination, running
    migration.finish()


def nested(depth: int) -> bytes:
    payload = b"\x81\xa7message" + b"\x91" * depth
    return PREFACE + struct.pack(">BBHI", FrameType.HELLO, 0, 0, len(payload)) + payload


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x00" * 64, "not a virtmig link: byte 0x00 in the place of 0x89"),
        (b"GET / HTTP/1.1\r\nHost: beryl\r\n\r\n", "not a virtmig link: byte 0x47"),
        (b'{"ask":"facts"}\n', "not a virtmig link: byte 0x7b"),  # clients come over unix sockets alone
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "not a virtmig link: byte 0x16"),  # TLS
        (PREFACE + struct.pack(">BBHI", FrameType.HELLO, 0, 0, 1 << 20), "HELLO of 1048576 bytes, at most 262144"),
        (PREFACE + struct.pack(">BBHI", FrameType.DATA, 0, 0, 100), "DATA cannot come here"),
        (PREFACE + struct.pack(">BBHI", FrameType.PING, 0, 0, 10), "PING cannot come here"),
        (PREFACE + struct.pack(">BBHI", FrameType.HELLO, 0, 0, 3) + b"\xc1xx", "hello: "),
        (nested(5000), "hello: "),
        (PREFACE[:3], "closed the connection"),
        (b"", "closed the connection"),
    ],
)
def test_what_is_no_link_is_refused_once(hosts: tuple[Host, Host], logs: list[Any], data: bytes, reason: str) -> None:
    destination = hosts[1]
    with dial(destination.address) as rude:
        rude.sendall(data)
        with contextlib.suppress(OSError):  # it may have been refused already
            rude.shutdown(socket.SHUT_WR)
        assert ends(rude)
        name = "{}:{}".format(*rude.getsockname())
    [event] = refusals(logs)
    assert reason in event["reason"]
    assert event["peer"] == name
    eventually(lambda: not len(destination.agent.greetings))


def test_strangers_do_not_disturb_a_session(
    steady: tuple[Host, Steady], logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow, silent, many and rude ones at once; then threads and descriptors are as before."""
    destination, running = steady
    monkeypatch.setattr(server, "GREETING_S", 1.0)
    before = running.rounds
    with nothing_left(), contextlib.ExitStack() as open_ones:
        crowd = [open_ones.enter_context(dial(destination.address)) for _ in range(500)]
        slow = open_ones.enter_context(dial(destination.address))
        silent = open_ones.enter_context(dial(destination.address))
        for number in range(3):
            slow.sendall(PREFACE[number : number + 1])
        assert len(destination.agent.greetings) <= destination.agent.greetings.most
        assert ends(slow)
        assert ends(silent)
        for each in crowd:
            assert ends(each)
    assert running.rounds > before
    events = refusals(logs)
    assert any("more than 128 connections wait to be greeted" in event["reason"] for event in events)
    assert len(events) == 20  # the others are counted
    destination.agent.refusals.close()
    [counted] = [event for event in logs if event["event"].startswith("refused as well")]
    assert (counted["source"], counted["connections"]) == ("127.0.0.1", 502 - 20)


def test_half_open_tls_handshakes_give_way_to_those_who_know_what_they_want(place: Path, logs: list[Any]) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1", "beryl.example.org")
    tls = write_pki(place / "pki", authority, leaf)
    settings: dict[str, Any] = {"security": "tls", "tls": tls, "allow": (allow("tls:*", "send", "receive"),)}
    hello = half_of_a_client_hello()
    with (
        Host(place / "a", link="tcp:127.0.0.1:0", **settings) as source,
        Host(place / "b", link="tcp:127.0.0.1:0", **settings) as destination,
        contextlib.ExitStack() as stack,
    ):
        crowd = [stack.enter_context(dial(destination.address)) for _ in range(200)]
        for each in crowd:
            with contextlib.suppress(OSError):
                each.sendall(hello)
        eventually(lambda: len(refusals(logs)) >= 20, "the first being given up")
        assert handshake(source, destination.address, parallel=True, parallel_connections=3).round_trips == 3
        assert all("more than 128 connections wait" in event["reason"] for event in refusals(logs))


def half_of_a_client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(incoming, outgoing, server_hostname="beryl").do_handshake()
    whole = outgoing.read()
    return whole[: len(whole) // 2]


def test_a_defect_while_greeting_costs_that_connection_alone(
    hosts: tuple[Host, Host], logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = hosts
    with monkeypatch.context() as broken:
        broken.setattr(destination.agent.peers, "accepted", lambda *given, **named: 1 / 0)
        with dial(destination.address) as unlucky:
            assert ends(unlucky)
    [event] = [event for event in logs if event["event"] == "internal error with a new connection"]
    assert event["log_level"] == "error"
    assert event["peer"].startswith("127.0.0.1:")
    assert len(destination.agent.greetings) == 0
    assert handshake(source, destination.address).round_trips == 3


def test_without_threads_or_descriptors_the_agent_lives_on(
    hosts: tuple[Host, Host], logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = hosts
    thread = threading.Thread

    def none_for_greetings(**given: Any) -> threading.Thread:
        if given["name"] == "greeting":
            raise RuntimeError("no new thread")
        return thread(**given)

    with monkeypatch.context() as poor:
        poor.setattr(server.threading, "Thread", none_for_greetings)
        with dial(destination.address) as unlucky:
            assert ends(unlucky)
        eventually(lambda: any("no new thread" in event["reason"] for event in refusals(logs)))
    assert handshake(source, destination.address).round_trips == 3
