"""Migrations that only libvirt's hook has seen, in list, show, logs and explain: hooks/qemu writes, the verbs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_report_commands import say
from tests.integrations.test_libvirt_hook import PLAIN, RULE, UUID, Hook
from tests.report.test_records import curve, outcome, recorded
from virtmig.cli.main import main
from virtmig.integrations import hook_log

CAME = ("migrate", "prepare", "start", "started")


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hook:
    """No records yet."""
    hook = Hook(tmp_path)
    monkeypatch.setenv("VIRTMIG_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("VIRTMIG_HOOK_LOG", str(hook.log))
    return hook


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in say(capsys, "list", "--json", *words).splitlines()]


def test_a_guest_that_virsh_brought_is_listed_and_explained(hook: Hook, capsys: pytest.CaptureFixture[str]) -> None:
    hook.settings(rules=RULE)
    for operation in CAME:
        assert hook(operation).returncode == 0
    (row,) = listed(capsys)
    assert (row["domain"], row["status"], row["source"]) == ("web01", "came", None)
    identity = str(row["id"])
    assert identity.endswith(UUID[:6])
    line = say(capsys, "list").splitlines()[1]
    assert line.split()[0] == identity
    shown = say(capsys, "show", identity)
    assert "migrate, prepare, start, started" in shown
    assert "br-prod" in shown
    assert [json.loads(each)["operation"] for each in say(capsys, "show", identity, "--json").splitlines()] == list(
        CAME
    )
    assert say(capsys, "logs", "web01").count("hook: ") == len(CAME)
    told = say(capsys, "explain", "last")
    assert "web01 came to" in told
    assert "not run by virtmig from this host" in told
    assert "br-prod" in told


def test_a_veto_is_listed_with_its_reason(hook: Hook, capsys: pytest.CaptureFixture[str]) -> None:
    hook.settings('require = ["handshake"]')
    assert hook("migrate").returncode != 0
    (row,) = listed(capsys)
    assert row["status"] == "vetoed"
    assert "requires a handshake" in say(capsys, "explain", "web01")


def test_what_has_a_record_is_told_once(hook: Hook, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = recorded(tmp_path / "records", samples=curve(3))
    recorder.finish(outcome())
    assert hook("migrate", guest="opal").returncode == 0  # while opal's record was written
    assert hook("migrate", guest="ruby").returncode == 0
    assert [row["domain"] for row in listed(capsys)] == ["ruby", "opal"]
    assert [row["id"] for row in listed(capsys, "opal")] == [recorder.id]
    assert "What was planned:" in say(capsys, "explain", "opal")


def test_an_earlier_migration_of_the_same_guest_is_another(
    hook: Hook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook_log.append(
        str(hook.log), {"time": 1.7e9, "host": "beryl", "guest": "opal", "uuid": UUID, "operation": "migrate"}
    )
    recorder = recorded(tmp_path / "records", samples=curve(3))
    recorder.finish(outcome())
    assert [row["status"] for row in listed(capsys, "opal")] == ["completed", "not begun"]
    assert "What was planned:" in say(capsys, "explain", "opal")  # the newer one
    assert "opal came to beryl" in say(capsys, "explain", "20231114")


def test_two_records_that_begin_alike_are_not_decided_by_a_sighting(
    hook: Hook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        recorded(tmp_path / "records", samples=curve(3)).finish(outcome())
    assert hook("migrate", guest="ruby").returncode == 0
    assert len(listed(capsys)) == 3
    assert main(["show", "20"]) == 1  # the century, with which all ids begin
    assert "2 records begin with" in capsys.readouterr().err


def test_one_that_left_says_where_from(hook: Hook, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"host": "beryl", "guest": "web01", "uuid": UUID, "operation": "release"}
    hook_log.append(str(hook.log), {"time": 1.7e9, **words, "suboperation": "end", "extra": "migrated"})
    assert [(row["source"], row["destination"], row["status"]) for row in listed(capsys)] == [("beryl", None, "left")]


@pytest.mark.parametrize(
    "line",
    [
        '{"time":NaN,"operation":"migrate"}',
        '{"time":1e300,"operation":"migrate"}',
        '{"time":-1e12,"operation":"migrate"}',
        '{"time":true,"operation":"migrate"}',
        "[" * 10_000,
        '{"time":1,"operation":{"a":[]},"uuid":[]}',
        '{"time":1.7e9,"operation":"migrate","changes":5,"uuid":{"a":1},"guest":"\\u001b[2J","host":null}',
    ],
)
def test_a_damaged_log_is_read_as_far_as_it_goes(hook: Hook, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert hook("migrate", PLAIN).returncode == 0
    with hook.log.open("a") as file:
        file.write(line + "\n")
    assert "web01" in [row["domain"] for row in listed(capsys)]
    assert "\x1b" not in say(capsys, "list")
    for verb in ("show", "logs", "explain"):
        assert "\x1b" not in say(capsys, verb, "last")


def test_a_log_that_nobody_may_read_leaves_the_records(
    hook: Hook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook.log.mkdir(parents=True)  # instead of a file
    recorder = recorded(tmp_path / "records", samples=curve(3))
    recorder.finish(outcome())
    assert [row["id"] for row in listed(capsys)] == [recorder.id]
