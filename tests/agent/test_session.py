"""What happens to a session between one step and the next."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.two_agents import Host, Migration, eventually
from virtmig.agent.session import MAIN, Session
from virtmig.engine.lines import Line
from virtmig.link.frames import FrameDecoder, encode_message
from virtmig.link.messages import CONTROL, ChannelName, Ping
from virtmig.link.side import Action, Opened, Resumed, Send
from virtmig.link.states import State


@pytest.fixture
def hosts(place: Path) -> Iterator[tuple[Host, Host]]:
    with Host(place / "a") as source, Host(place / "b") as destination:
        yield source, destination


def broken_line() -> Line:
    """Whatever is written to it fails."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return Line(ours, "the source")


@pytest.mark.parametrize("what", ["main resumed", "control resumed", "opened"])
def test_a_line_that_breaks_while_it_is_confirmed_costs_nothing(
    hosts: tuple[Host, Host], logs: list[Any], what: str
) -> None:
    """The answer cannot be written, and the side's next action is for a line that is no more."""
    migration = Migration(hosts[0], hosts[1].address).connect()
    session: Session = hosts[1].agent.sessions()[0]
    line = broken_line()

    def confirm() -> list[Action]:
        session._decoders[line] = FrameDecoder("main")
        message = Ping(number=1)
        send = Send(line, message, encode_message(message))
        if what == "opened":
            return [send, Opened(ChannelName("parallel", 0), line)]
        return [send, Resumed(MAIN if what == "main resumed" else CONTROL, line, 0)]

    done: list[bool] = []
    session.post(confirm)
    session.post(lambda: done.append(True) or [])  # type: ignore[func-returns-value]
    eventually(lambda: done)
    assert session.side.state is State.RUNNING
    assert list(session.carriers) == [MAIN]
    migration.echo(b"the guest goes on" * 1000)
    migration.finish()
    assert not [event for event in logs if "internal error" in event["event"]]
