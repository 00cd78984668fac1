"""`virtmig handshake` between two real agents: what is shown, as text and as JSON, and its exit status."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.two_agents import GUEST, Host, allow, eventually, limits
from virtmig.cli.agent_commands import _Exchange, agent_path
from virtmig.cli.main import main
from virtmig.engine.agents import default_socket, plain_text
from virtmig.facts import HostFacts
from virtmig.link.asking import Agreed, Exchanged
from virtmig.link.messages import Answer, ChannelName, Reason, Verdict


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def hosts(place: Path) -> Iterator[tuple[Host, Host]]:
    with Host(place / "a") as source, Host(place / "b", limits=limits(parallel_connections=5)) as destination:
        yield source, destination


def test_what_is_shown(hosts: tuple[Host, Host], capsys: pytest.CaptureFixture[str]) -> None:
    source, destination = hosts
    words = ["handshake", f"unix:{source.socket}", destination.address, "--parallel", "--parallel-connections", "10"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    lines = [re.sub(r"\d+\.\d ms", "_ ms", line) for line in shown.splitlines()]
    lines = [line.strip() for line in lines if not re.match(r"\d{4}-", line)]
    assert lines[0].startswith("_ ms  -> Hello        virtmig ")
    assert ", protocol 1; host " in lines[0]
    assert lines[1].startswith("_ ms  <- Hello        virtmig ")
    assert lines[2] == "_ ms  -> Proposal     --live --parallel --parallel-connections 10 --transport relay"
    assert re.fullmatch(r"_ ms  <- Answer       \d+ accepted, 1 adjusted", lines[3])
    assert lines[4] == "_ ms  <- Agreement    main, parallel 0 to 4"
    assert re.fullmatch(r"agreed with user \S+ \(uid \d+\) in _ ms, 3 round trips", lines[6])
    [adjusted] = [line for line in lines if line.startswith("adjusted")]
    assert adjusted.startswith("adjusted    parallel-connections (10 -> 5): ")
    assert [line for line in lines if re.match(r"source +\S+: QEMU .*at most 16 parallel connections", line)]
    assert [line for line in lines if re.match(r"destination +\S+: QEMU .*at most 5 parallel connections", line)]
    assert 'not known: libvirt: not asked: qemu.libvirt_uri = "none"' in lines
    assert lines[-1] == "channels    main, parallel 0 to 4"
    eventually(lambda: not destination.agent.sessions())


def test_a_refusal_has_its_reasons_and_a_status_of_its_own(
    hosts: tuple[Host, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    source, destination = hosts
    words = ["handshake", str(source.socket), destination.address, "--parallel", "--parallel-connections", "10",
             "--strict"]  # fmt: skip
    assert main(words) == 3
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index("refused")
    [refused] = [line for line in lines[at:] if line.startswith("refused  ")]
    assert "10 parallel connections were asked for" in refused
    assert lines[lines.index(refused) + 1].startswith("way out: --parallel-connections 5")
    assert main([*words, "--json"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["said"] for row in rows] == ["message"] * 4 + ["refused"]
    assert [row["name"] for row in rows[:-1]] == ["Hello", "Hello", "Proposal", "Answer"]
    assert rows[-1]["reasons"][0]["way_out"].startswith("--parallel-connections 5")


def test_as_json(hosts: tuple[Host, Host], capsys: pytest.CaptureFixture[str]) -> None:
    source, destination = hosts
    assert main(["handshake", str(source.socket), destination.address, "--json"]) == 0
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [row["said"] for row in rows] == ["message"] * 5 + ["agreed"]
    assert [row["source"] for row in rows[:-1]] == [True, False, True, False, False]
    assert {"facts", "version_lowest", "version_highest", "implementation"} <= rows[0]["content"].keys()
    assert rows[-1]["round_trips"] == 3
    assert rows[-1]["channels"] == [{"role": "main", "index": 0}]
    assert not {"proof", "nonce", "secret"} & {key for row in rows[:-1] for key in row["content"]}


def test_when_nobody_is_there(hosts: tuple[Host, Host], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = hosts
    assert main(["handshake", str(place / "nobody.sock"), "tcp:beryl"]) == 1
    assert "error: no agent of virtmig at" in capsys.readouterr().err
    assert main(["handshake", str(source.socket), f"unix:{place}/nobody.sock"]) == 1
    errors = capsys.readouterr().err
    assert f"error: no agent at unix:{place}/nobody.sock: No such file or directory" in errors
    assert "hint: does virtmig-agent run there" in errors
    assert main(["handshake", str(source.socket), "tcp:x:y:z", "--json"]) == 1
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"said"')]
    assert (row["said"], row["kind"]) == ("error", "ChannelError")


def test_a_host_that_may_not(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        Host(place / "a", link="tcp:127.0.0.1:0", allow=(allow("plain", "receive"),)) as source,
        Host(place / "b", link="tcp:127.0.0.1:0") as destination,
    ):
        assert main(["handshake", str(source.socket), destination.address]) == 3
    shown = capsys.readouterr().out
    assert "refused     agent: an unproven peer may not bring guests to this host: the right 'send' is missing" in shown
    assert 'allow = [{ peer = "plain", rights = ["send"] }]' in shown


def test_the_other_hosts_words_cannot_move_the_cursor() -> None:
    stream = io.StringIO()
    show = _Exchange(stream)
    evil = "beryl\x1b[2J\x07\nagreed\r\u202e"
    facts = msgspec.to_builtins(HostFacts(uri="x", hostname=evil, unanswered=(evil,)))
    show.message(Exchanged(source=False, name="Hello", ms=1.0, content={"implementation": evil, "facts": facts}))
    show.message(Exchanged(source=False, name="Refuse", ms=1.0, content={"reasons": [{"reason": evil}]}))
    answer = Answer(verdicts=(Verdict(feature=evil, outcome="adjusted", reason=evil, asked=evil, given=evil),),
                    warnings=(Reason(evil, evil, evil),))  # fmt: skip
    show.agreement(Agreed(session="5f", answer=answer, channels=(ChannelName("main"),), peer=evil, ms=2.0))
    show.refusals([(evil, evil, evil)])
    shown = stream.getvalue()
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert not [line for line in shown.splitlines() if line.startswith("agreed") and "beryl" not in line]
    assert "\\x1b[2J" in shown
    assert plain_text("a\tb\u202ec") == "a\\tb\\u202ec"


def test_which_agent_is_meant() -> None:
    assert agent_path("unix:/run/x.sock") == agent_path("/run/x.sock") == Path("/run/x.sock")
    assert agent_path("local") == agent_path("") == agent_path(None) == default_socket()


def test_facts_that_another_version_writes_otherwise() -> None:
    stream = io.StringIO()
    show = _Exchange(stream)
    odd: list[Any] = [{"hostname": 7, "qemu_version": "x", "userfaultfd": "yes", "unanswered": [1]}, {}, None, [1], "x"]
    for facts in odd:
        show.message(Exchanged(source=False, name="Hello", ms=1.0, content={"facts": facts}))
        show.refusals([])
    show.message(Exchanged(source=False, name="Something", ms=1.0))
    assert "<- Something" in stream.getvalue()
    assert GUEST.name not in stream.getvalue()
