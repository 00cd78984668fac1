"""What a restarted agent knows of the sessions of before."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from virtmig.agent.journal import KEPT_S, Journal
from virtmig.link.asking import SessionRecord

RECORD = SessionRecord(session="5f2c", role="source", domain="opal", state="running", request={"postcopy": True})


def aged(folder: Path, name: str, **changes: object) -> None:
    """As if it had been written by somebody else, or long ago."""
    path = folder / f"{name}.json"
    record = msgspec.json.decode(path.read_bytes(), type=SessionRecord)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, **changes)))


def test_a_session_that_runs_and_one_that_was_broken_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "s")
    assert journal.records() == ()
    journal.write(RECORD)
    [record] = journal.records()
    assert (record.state, record.pid) == ("running", os.getpid())
    [record] = Journal(tmp_path / "s").records()
    assert record.state == "failed"
    assert record.reasons == ("the agent was stopped or killed",)
    assert record.request == {"postcopy": True}
    assert journal.remove("5f2c") is None
    assert journal.records() == ()


def test_the_same_pid_again_is_not_the_same_agent(tmp_path: Path) -> None:
    """In a container every agent has the pid 1."""
    Journal(tmp_path).write(RECORD)
    aged(tmp_path, "5f2c", changed=time.time() - 60)
    [record] = Journal(tmp_path).records()
    assert record.state == "failed"


def test_the_newest_first_and_nothing_old(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in ("a", "b", "c"):
        journal.write(msgspec.structs.replace(RECORD, session=name, state="failed"))
    aged(tmp_path, "c", changed=time.time() - 60)
    aged(tmp_path, "b", changed=time.time() - KEPT_S - 1)
    assert [record.session for record in journal.records()] == ["a", "c"]
    assert not (tmp_path / "b.json").exists()


def test_what_cannot_be_read_or_written_hurts_nobody(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"{")
    (tmp_path / "y.json").mkdir()
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path)
    journal.write(RECORD)
    assert [record.session for record in journal.records()] == ["5f2c"]
    Journal(tmp_path / "file").write(RECORD)
    assert Journal(tmp_path / "file").records() == ()
    assert not list(tmp_path.glob("*.part"))
    assert (tmp_path / "5f2c.json").stat().st_mode & 0o077 == 0 or tmp_path.stat().st_mode & 0o077 == 0
