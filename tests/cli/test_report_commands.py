"""list, show, logs, explain, compare, replay and report as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.test_records import curve, outcome, recorded
from virtmig.cli.main import main


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
