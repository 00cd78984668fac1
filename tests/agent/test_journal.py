"""What a restarted agent knows of the sessions of before."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from virtmig.agent.journal import KEPT_S, Entry, Journal
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


def entry(journal: Journal, session: str, began: float, **changes: object) -> Entry:
    made = Entry(journal, msgspec.structs.replace(RECORD, session=session, began=began, **changes))
    made.note("established")
    made.note("running")
    return made


def test_a_guest_that_arrived_leaves_nothing_broken_behind(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    entry(journal, "a", 1.0).note("failed", ("the network",))
    entry(journal, "b", 2.0, role="destination").note("failed")
    entry(journal, "c", 3.0, domain="onyx", uuid="8f5c").note("failed")
    entry(journal, "d", 4.0)
    again = entry(journal, "e", 5.0, request={"postcopy-resume": True})
    entry(journal, "f", 6.0).note("failed")
    assert {record.session for record in journal.records()} == set("abcdef")
    again.note("finished")
    assert {record.session for record in journal.records()} == set("cdf")


def test_only_a_source_that_never_let_go_keeps_its_guest(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert not entry(journal, "a", 1.0).source_keeps, "a postcopy"
    kept = entry(journal, "b", 1.0, request={})
    assert kept.source_keeps
    assert kept.note("handover") == ""
    kept.note("running")
    assert [record.state for record in journal.records() if record.session == "b"] == ["handover"]
    kept.note("failed")
    assert not kept.source_keeps
    assert [record.handed_over for record in journal.records() if record.session == "b"] == [True]


def test_a_handover_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in entry(Journal(tmp_path / "file"), "a", 1.0).note("handover")
