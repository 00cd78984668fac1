"""Which postcopy `virtmig recover` takes for broken, with two agents and a link between them that is cut."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import LinkProxy
from tests.support.two_agents import GUEST, Host, Migration, eventually
from virtmig.cli import agent_commands
from virtmig.cli.agent_commands import broken_session
from virtmig.engine.agents import ask_sessions
from virtmig.errors import RequestError


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_postcopy_whose_agents_still_dial_is_given_a_moment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Host(place / "a") as source,
        Host(place / "b") as destination,
        LinkProxy(place / "link", place / "b" / "link.sock") as proxy,
    ):
        migration = Migration(source, proxy.address, postcopy=True).connect()
        with pytest.raises(RequestError, match=r"no broken postcopy of opal; it knows: opal \(running\)"):
            broken_session(source.socket, GUEST.name)
        with pytest.raises(RequestError, match="no broken postcopy of onyx"):
            broken_session(source.socket, "onyx")

        proxy.cut(refuse=True)
        eventually(lambda: ask_sessions(source.socket)[0].state == "reconnecting")
        monkeypatch.setattr(agent_commands, "_MENDING_S", 0.0)
        assert broken_session(source.socket, GUEST.uuid).state == "reconnecting", "a recovery ends it"
        monkeypatch.undo()

        asked = threading.Event()
        given_up = threading.Thread(target=lambda: asked.wait() and source.agent.sessions()[0].fail("for good"))
        given_up.start()
        asked.set()
        found = broken_session(source.socket, GUEST.name)
        given_up.join()
        assert (found.state, found.role) == ("failed", "source")
        destination.agent.sessions()[0].fail("for good")
        migration.close()
