"""list, show, logs, explain, compare, replay and report as a person types them."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from tests.report.test_records import curve, outcome, recorded
from virtmig.cli.main import main
from virtmig.progress import Status, Whereabouts


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    folder = tmp_path / "records"
    monkeypatch.setenv("VIRTMIG_RECORDS", str(folder))
    found = []
    for number in (1, 2):
        recorder = recorded(folder, samples=curve(30))
        recorder.finish(outcome(elapsed_s=4.0 / number))
        found.append(recorder.id)
    return found[0], found[1]


def say(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_list_shows_the_newest_first_and_as_json(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = say(capsys, "list").splitlines()
    assert lines[0].split() == ["id", "when", "domain", "from", "to", "status", "guest", "took", "sent", "downtime"]
    assert {line.split()[0] for line in lines[1:]} == set(two)
    assert len(say(capsys, "list", "--limit", "1").splitlines()) == 2
    assert say(capsys, "list", "ruby").splitlines() == lines[:1] or len(say(capsys, "list", "ruby").splitlines()) == 1
    rows = [json.loads(line) for line in say(capsys, "list", "--json").splitlines()]
    assert {row["id"] for row in rows} == set(two)
    assert all(row["outcome"]["status"] == "completed" for row in rows)


def test_show_logs_and_explain(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "opal" in say(capsys, "show", two[0])
    rows = [json.loads(line) for line in say(capsys, "show", two[0], "--json").splitlines()]
    assert rows[0]["row"] == "began"
    assert rows[-1]["row"] == "ended"
    assert "opal" not in say(capsys, "show", two[0], "--redact")
    assert "opal now runs on beryl" in say(capsys, "logs", "last")
    assert "What was planned:" in say(capsys, "explain", "opal")


def test_compare_replay_and_report(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = say(capsys, "compare", *two)
    assert next(line for line in compared.splitlines() if line.startswith("duration")).split()[-1] == "0.50"
    policy = tmp_path / "policy.toml"
    policy.write_text('timeout_s = 5\ntimeout_action = "abort"\n')
    assert "abort" in say(capsys, "replay", two[0], "--policy", str(policy))
    policy.write_text("timeout = 5\n")
    assert main(["replay", two[0], "--policy", str(policy)]) == 1
    assert "known: " in capsys.readouterr().err
    assert say(capsys, "report", two[0], "--output", str(tmp_path / "r.html")).strip() == str(tmp_path / "r.html")
    assert "<!DOCTYPE html>" in (tmp_path / "r.html").read_text()
    assert main(["report", two[0], "--output", str(tmp_path / "no" / "r.html")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_what_is_not_there_is_said(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "ruby"]) == 1
    assert "no record of a migration is called 'ruby'" in capsys.readouterr().err


def test_what_more_than_one_record_is_called_is_asked_again(
    two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", two[0][:4]]) == 1
    error = capsys.readouterr().err
    assert f"2 records begin with '{two[0][:4]}'" in error
    assert all(each in error for each in two)
    assert two[1] in say(capsys, "show", two[1])


def test_a_report_goes_where_it_was_asked_to_go(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a link, into a pipe, to a device; none of them is replaced, and a full disk leaves nothing behind."""
    there, link, pipe = tmp_path / "there.html", tmp_path / "link.html", tmp_path / "pipe"
    there.write_text("old")
    link.symlink_to(there)
    say(capsys, "report", two[0], "--output", str(link))
    assert link.is_symlink()
    assert "<!DOCTYPE html>" in there.read_text()
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    say(capsys, "report", two[0], "--output", str(pipe))
    reader.join(10)
    assert "<!DOCTYPE html>" in read[0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert main(["report", two[0], "--output", "/dev/full"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert main(["report", two[0], "--output", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_record_and_one_that_speaks_to_the_terminal(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "records"
    damaged = folder / f"{two[0]}.jsonl"
    lines = damaged.read_text().splitlines()
    began = json.loads(lines[0])
    damaged.write_text("\n".join([json.dumps({**began, "time": 1e300}), *lines[1:]]) + "\n")
    listed = say(capsys, "list")
    assert two[1] in listed
    assert two[0] not in listed
    hostile = folder / f"{two[1]}.jsonl"
    lines = hostile.read_text().splitlines()
    began = {**json.loads(lines[0]), "domain": "\x1b[2Jopal\x07"}
    said = {"row": "message", "at_s": 1.0, "text": "one\x1b]0;title\x07\ntwo", "level": "info"}
    hostile.write_text("\n".join([json.dumps(began), json.dumps(said), *lines[1:]]) + "\n")
    for words in (["list"], ["show", two[1]], ["logs", two[1]], ["explain", two[1]]):
        shown = say(capsys, *words)
        assert not [each for each in shown if not each.isprintable() and each != "\n"]
        assert words[0] == "logs" or "\\x1b[2Jopal\\x07" in shown
    assert "one\\x1b]0;title\\x07\n            two" in say(capsys, "logs", two[1])


def test_the_log_has_details_once_and_an_aborted_one_what_it_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIRTMIG_RECORDS", str(tmp_path))
    recorder = recorded(tmp_path, samples=curve(4))
    for host, what, detail in (
        ("source", "suspended", 1), ("source", "suspended", 1), ("destination", "resumed", 3),
        ("destination", "resumed", 1),
    ):  # fmt: skip
        recorder.event(time.monotonic(), host, what, detail)
    recorder.finish(outcome(status=Status.ABORTED, guest=Whereabouts.SOURCE, processed_bytes=None))
    log = say(capsys, "logs", "last")
    assert log.count("source: suspended (migrated)") == 1
    assert "destination: resumed (postcopy)" in log
    assert "destination: resumed (migrated)" in log
    assert "sent       96.0 MiB" in say(capsys, "show", "last")
    policy = tmp_path / "policy.toml"
    policy.write_text("timeout_s = 5\n")
    recorder = recorded(tmp_path, samples=[])
    recorder.finish(outcome())
    assert "nothing can be told: the record has no samples" in say(
        capsys, "replay", str(recorder.id), "--policy", str(policy)
    )
