"""Channels that do not belong to a session: unknown, unproved, replayed, early, late, surplus, another peer's."""

from __future__ import annotations

import os
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from tests.support.two_agents import (
    Host,
    RudeSource,
    allow,
    ask,
    dial,
    ends,
    eventually,
    write_pki,
)
from virtmig.facts import HostFacts
from virtmig.link.frames import FrameType
from virtmig.link.messages import ChannelName, ChannelOpened, OpenChannel, Refuse, Resume, ResumeAccepted
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


# -- channels that do not belong -----------------------------------------------------------------------------------


@pytest.fixture
def rude(hosts: tuple[Host, Host]) -> Iterator[tuple[Host, RudeSource]]:
    """A source that has an agreement, and opens its channels itself."""
    destination = hosts[1]
    peer = RudeSource(destination.address, own_terms(destination), parallel=True, parallel_connections=2).agree()
    yield destination, peer
    peer.close()


Change = Callable[[OpenChannel], OpenChannel]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda right: msgspec.structs.replace(right, session=bytes(16)), "no such session for this peer"),
        (lambda right: msgspec.structs.replace(right, proof=bytes(32)), "the proof is wrong"),
        (lambda right: msgspec.structs.replace(right, role="parallel"), "the proof is wrong"),
        (lambda right: msgspec.structs.replace(right, index=1), "the proof is wrong"),
    ],
)
def test_a_channel_that_does_not_belong(rude: tuple[Host, RudeSource], change: Change, reason: str) -> None:
    _, peer = rude
    right = peer.opening()
    answer, sock = peer.ask(change(right))
    assert isinstance(answer, Refuse)
    assert [row.reason for row in answer.reasons] == [reason]
    assert ends(sock)
    answer, _ = peer.ask(right)  # the session has not noticed
    assert isinstance(answer, ChannelOpened)


def test_a_surplus_channel(rude: tuple[Host, RudeSource]) -> None:
    _, peer = rude
    assert peer.side._proofs is not None
    surplus = ChannelName("parallel", 2)
    message = OpenChannel(
        session=peer.side.session, role="parallel", index=2, proof=peer.side._proofs.of(b"virtmig open", surplus)
    )
    answer, sock = peer.ask(message)
    assert isinstance(answer, Refuse)
    assert answer.reasons[0].reason == "parallel 2 was not agreed"
    assert ends(sock)


def test_a_replayed_channel_and_an_old_attempt(rude: tuple[Host, RudeSource]) -> None:
    destination, peer = rude
    first = peer.opening()
    answer, main = peer.ask(first)
    assert isinstance(answer, ChannelOpened)
    answer, replayed = peer.ask(first)
    assert isinstance(answer, Refuse)
    assert "was opened before" in answer.reasons[0].reason
    assert ends(replayed)
    for number in (1, 2):
        answer, _ = peer.ask(peer.opening(number))
        assert isinstance(answer, ChannelOpened)
    eventually(lambda: [str(each.side.state) for each in destination.agent.sessions()] == ["established"])

    def resume(attempt: int) -> Resume:
        channel = ChannelName("main")
        assert peer.side._proofs is not None
        proof = peer.side._proofs.of_attempt(RESUME, channel, attempt, 0)
        return Resume(session=peer.side.session, role="main", index=0, attempt=attempt, received_up_to=0, proof=proof)

    answer, _ = peer.ask(resume(1))  # nothing runs yet, nothing can be resumed
    assert isinstance(answer, Refuse)
    main.sendall(struct.pack(">BBHIQ", FrameType.DATA, 0, 0, 9, 0) + b"Q")
    eventually(lambda: [str(each.side.state) for each in destination.agent.sessions()] == ["running"])
    answer, _ = peer.ask(resume(7))
    assert isinstance(answer, ResumeAccepted)
    answer, old = peer.ask(resume(7))
    assert isinstance(answer, Refuse)
    assert answer.reasons[0].reason == "attempt 7 to resume main was made before"
    assert ends(old)


def test_early_and_late_channels(hosts: tuple[Host, Host], logs: list[Any]) -> None:
    destination = hosts[1]
    early = OpenChannel(session=bytes(16), role="main", index=0, proof=bytes(32))
    with dial(destination.address) as sock:  # nobody has agreed on anything; no session has the empty name either
        answer = ask(sock, early)
        assert isinstance(answer, Refuse)
        assert answer.reasons[0].reason == "no such session for this peer"
    peer = RudeSource(destination.address, own_terms(destination)).agree()
    late = peer.opening()
    peer.control.close()
    eventually(lambda: not destination.agent.sessions(), "the session ending with its control connection")
    answer, sock = peer.ask(late)
    assert isinstance(answer, Refuse)
    assert ends(sock)
    peer.close()


def test_a_channel_after_the_deadline(
    hosts: tuple[Host, Host], logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from virtmig.link.states import DEADLINE_S, State

    monkeypatch.setitem(DEADLINE_S, State.AGREED, 0.2)
    destination = hosts[1]
    peer = RudeSource(destination.address, own_terms(destination)).agree()
    late = peer.opening()
    eventually(lambda: not destination.agent.sessions(), "the deadline")
    [over] = [event for event in logs if event["event"] == "over"]
    assert "nothing came of state 'agreed' within 0.2 s" in over["reasons"][0]
    answer, _ = peer.ask(late)
    assert isinstance(answer, Refuse)
    peer.close()


def test_a_channel_of_another_peer(place: Path, logs: list[Any]) -> None:
    """It has the session's secret, and another certificate than the control connection's."""
    authority = trustme.CA()
    tls = write_pki(place / "pki", authority, authority.issue_cert("127.0.0.1", "beryl"))
    contexts = []
    for name in ("amber", "onyx"):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        authority.issue_cert(name).configure_cert(context)
        contexts.append(context)
    with Host(
        place / "b", link="tcp:127.0.0.1:0", security="tls", tls=tls, allow=(allow("tls:*", "send"),)
    ) as destination:
        peer = RudeSource(destination.address, own_terms(destination), wrap=contexts[0]).agree()
        right = peer.opening()
        peer.wrap = contexts[1]
        answer, sock = peer.ask(right)
        assert isinstance(answer, Refuse)
        assert answer.reasons[0].reason == "no such session for this peer"
        assert ends(sock)
        assert refusals(logs)[-1]["peer"].startswith("onyx (127.0.0.1:")
        peer.wrap = contexts[0]
        answer, _ = peer.ask(right)
        assert isinstance(answer, ChannelOpened)
        peer.close()
