"""The source lets go only when both journals say so and the destination's libvirt lives; else it keeps the guest."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.two_agents import PATIENCE_S, Host, Migration, eventually, exactly
from virtmig.agent.handover import LocalLibvirt, ReturnPathWatch
from virtmig.engine.agents import ask_sessions
from virtmig.stream.return_path import Pong, RequestPages, Shut, encode_return_path

SHUT = encode_return_path(Shut(0))
STILL_S = 0.3


@pytest.fixture
def hosts(place: Path) -> Iterator[tuple[Host, Host]]:
    with Host(place / "a") as source, Host(place / "b") as destination:
        yield source, destination


@contextlib.contextmanager
def migration(hosts: tuple[Host, Host]) -> Iterator[Migration]:
    one = Migration(hosts[0], hosts[1].address).connect()
    try:
        yield one
    finally:
        one.close()


def watched(*pieces: bytes, answer: str = "") -> tuple[list[str], int]:
    """What the watch said to each piece, and how often it settled."""
    asked: list[None] = []

    def settle() -> str:
        asked.append(None)
        return answer

    watch = ReturnPathWatch(settle)
    return [watch(memoryview(piece)) for piece in pieces], len(asked)


def test_shut_is_held_until_it_is_settled_once() -> None:
    assert watched(encode_return_path(Pong(7)), SHUT) == (["", ""], 1)
    assert watched(SHUT, SHUT) == (["", ""], 1)
    assert watched(encode_return_path(Pong(7)) + SHUT, answer="no") == (["no"], 1)
    said, times = watched(*(bytes([byte]) for byte in SHUT), answer="no")
    assert said == [""] * (len(SHUT) - 1) + ["no"]
    assert times == 1


def test_what_hands_nothing_over_is_not_held() -> None:
    assert watched(encode_return_path(Shut(1)), SHUT, answer="no") == (["", ""], 0)
    requested = encode_return_path(RequestPages("pc.ram", 0, 4096, named=True))
    assert watched(requested, SHUT, answer="no") == (["", ""], 0)
    assert watched(b"\xff" * 64, SHUT, answer="no") == (["", ""], 0)


def test_both_journals_say_handover_before_the_source_hears(hosts: tuple[Host, Host]) -> None:
    with migration(hosts) as one:
        assert one.source is not None
        assert one.destination is not None
        assert [ask_sessions(host.socket)[0].handed_over for host in hosts] == [False, False]
        one.destination.sendall(SHUT)
        assert exactly(one.source, len(SHUT)) == SHUT
        assert [(row.handed_over, row.state) for host in hosts for row in ask_sessions(host.socket)] == [
            (True, "handover")] * 2  # fmt: skip
        for host in hosts:
            host.agent.sessions()[0].fail("the network has gone for good")
        assert one.session.over.wait(PATIENCE_S)
        assert not one.session.kept_by_source(0.0), "the destination may run it"
        assert [row.handed_over for host in hosts for row in ask_sessions(host.socket)] == [True, True]


def test_a_session_that_breaks_before_leaves_the_guest_at_the_source(hosts: tuple[Host, Host]) -> None:
    with migration(hosts) as one:
        one.echo(b"no return path at all")
        hosts[1].agent.sessions()[0].fail("the network has gone for good")
        assert one.session.kept_by_source(PATIENCE_S)


@pytest.mark.parametrize("obstacle", ["libvirt", "destination's journal", "source's journal"])
def test_a_source_that_may_not_let_go_keeps_its_guest(
    hosts: tuple[Host, Host], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with migration(hosts) as one:
        assert one.source is not None
        assert one.destination is not None
        if obstacle == "libvirt":
            monkeypatch.setattr(LocalLibvirt, "silent", lambda known: "libvirt of the destination does not answer")
            words = "does not answer"
        else:
            host = hosts[obstacle.startswith("destination")]
            monkeypatch.setattr(host.agent.journal, "_folder", host.socket)  # where no folder can be made
            words = "the source keeps the guest"
        one.destination.sendall(SHUT)
        assert one.session.kept_by_source(PATIENCE_S), one.session.ended
        assert one.session.ended is not None
        assert words in " ".join(row.reason for row in one.session.ended.reasons)
        readable = select.select([one.source], [], [], STILL_S)[0]
        assert not readable or one.source.recv(1) == b"", "the source has been told"


def test_nobody_is_asked_where_libvirt_is_none(hosts: tuple[Host, Host]) -> None:
    known = LocalLibvirt(hosts[0].config, "8f5c0e53-4f0e-4f0f-9d6c-0d4c1c4e7b11")
    assert known.silent() == ""
    known.close()
    eventually(lambda: known.silent() == "")
