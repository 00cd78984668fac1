"""Records read as they grow, and the events made of them: whole lines, each once; thinned when too many."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.integrations.api.serving import ended
from tests.report.test_records import NOTHING, curve, outcome, recorded
from virtmig.integrations.api import events
from virtmig.integrations.api.events import batch, begins_at
from virtmig.integrations.api.history import History
from virtmig.integrations.api.jobs import Jobs
from virtmig.integrations.api.migrations import Found, Migrations, shown, shown_all
from virtmig.integrations.metrics import Metrics
from virtmig.policy import Action, Decision
from virtmig.progress import Phase, Status, Whereabouts
from virtmig.report.records import read_record


def parsed(data: bytes) -> list[tuple[str, int | None, Any]]:
    """(event, id, data) of each."""
    found = []
    for block in data.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            found.append((fields["event"], int(fields["id"]) if "id" in fields else None, json.loads(fields["data"])))
    return found


def test_a_record_is_followed_line_by_line(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(3))
    history = History(tmp_path)
    head = history.head(recorder.id)
    assert (head.sample.progress, head.over, head.outcome) == (curve(3)[-1], False, None)
    before = head.percent
    recorder._began -= 1.0
    recorder.sample(curve(9)[-1], NOTHING)
    assert history.head(recorder.id).sample.progress == curve(9)[-1]
    assert history.head(recorder.id).percent >= before
    recorder._began -= 1.0
    recorder.sample(msgspec.structs.replace(curve(1)[0], elapsed_s=9.0), NOTHING)
    assert history.head(recorder.id).percent >= before
    recorder.finish(outcome())
    head = history.head(recorder.id)
    assert (head.over, head.outcome) == (True, outcome())
    assert head.end_time == pytest.approx(head.began.time + head.last_at_s)


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    record_id = ended(tmp_path)
    path = tmp_path / f"{record_id}.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    history = History(tmp_path)
    assert history.head(record_id).outcome is None
    _, offset = batch(path, 0)
    assert whole[:offset].endswith(b"\n")
    with open(path, "ab") as file:
        file.write(whole[-9:])
    assert history.head(record_id).outcome is not None
    assert batch(path, offset)[1] == len(whole)


def test_whoever_was_killed_left_a_broken_record(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(3))
    process = subprocess.Popen(["/bin/true"])
    text = recorder.path.read_text().replace(f'"pid":{os.getpid()}', f'"pid":{process.pid}')
    recorder.path.write_text(text)
    process.wait()
    migration = shown(Migrations(Jobs(tmp_path), History(tmp_path)).find(recorder.id))
    assert (migration.status, migration.ending, migration.running) == ("error", "broken off", False)
    assert "both hosts can tell" in migration.sentence


def test_a_file_that_is_no_record_is_none(tmp_path: Path) -> None:
    (tmp_path / "20260101-000000-abcdef.jsonl").write_bytes(b'\xff{"row":"began"}\n[]\n{"row":"sample"}\n')
    history = History(tmp_path)
    assert list(history.heads()) == []
    assert history.head("../../etc/passwd") is None


@pytest.mark.parametrize(
    ("status", "guest", "nova", "kubevirt"),
    [
        (Status.COMPLETED, Whereabouts.DESTINATION, "completed", "Succeeded"),
        (Status.ABORTED, Whereabouts.SOURCE, "cancelled", "Failed"),
        (Status.FAILED, Whereabouts.SOURCE, "failed", "Failed"),
        (Status.FAILED, Whereabouts.UNKNOWN, "error", "Failed"),
        (Status.FAILED, Whereabouts.DOUBLED, "error", "Failed"),
        (Status.INTERRUPTED, Whereabouts.SPLIT, "error", "Failed"),
    ],
)
def test_novas_words(tmp_path: Path, status: Status, guest: Whereabouts, nova: str, kubevirt: str) -> None:
    recorder = recorded(tmp_path, samples=curve(2))
    recorder.finish(outcome(status=status, guest=guest, error="no", hint="try"))
    migration = shown(Migrations(Jobs(tmp_path), History(tmp_path)).find(recorder.id))
    assert (migration.status, migration.kubevirt_phase, migration.ending) == (nova, kubevirt, status.value)
    assert (migration.memory_total_bytes, migration.error, migration.hint) == (512 << 20, "no", "try")
    assert (migration.source_node, migration.dest_node) == ("amber", "beryl")


def test_events_are_the_rows_and_their_ids_resume(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(5))
    recorder.decided(Decision(action=Action.SET_DOWNTIME, value=400, reason="it does not converge"))
    recorder.message("line one\nline two", "warning")
    data, offset = batch(recorder.path, 0)
    found = parsed(data)
    assert [name for name, _, _ in found] == ["sample"] * 5 + ["decision", "message"]
    assert found[0][2]["status"] == "running"
    assert found[0][2]["memory_remaining_bytes"] == curve(1)[0].memory_remaining_bytes
    assert found[5][2] | {"at_s": 0} == {
        "at_s": 0, "action": "set-downtime", "value": 400, "reason": "it does not converge"}  # fmt: skip
    assert found[6][2]["text"] == "line one\nline two"
    assert offset == recorder.path.stat().st_size
    for number, (_, at, _) in enumerate(found):
        assert begins_at(recorder.path, str(at)) == at
        assert [each[1] for each in parsed(batch(recorder.path, at)[0])] == [row[1] for row in found[number + 1 :]]
    for wrong in ("", "7", "-1", "x", "9" * 15, "٣", str(offset + 1)):
        assert begins_at(recorder.path, wrong) == 0
    assert begins_at(None, "7") == 0


def test_too_many_samples_are_thinned_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_SAMPLES", 7)
    recorder = recorded(tmp_path, samples=curve(50))
    recorder.message("kept", "warning")
    found = parsed(batch(recorder.path, 0)[0])
    samples = [data for name, _, data in found if name == "sample"]
    assert len(samples) <= 7
    assert samples[-1]["elapsed_s"] == curve(50)[-1].elapsed_s
    assert found[0] == ("dropped", None, {"samples": 50 - len(samples)})
    assert found[-1][2]["text"] == "kept"


def test_a_long_record_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_MOST_ROWS", 10)
    recorder = recorded(tmp_path, samples=curve(25))
    seen, offset = 0, 0
    while data := batch(recorder.path, offset)[0]:
        offset = batch(recorder.path, offset)[1]
        seen += len(parsed(data))
        assert seen <= 25
    assert seen == 25


def test_an_end_that_is_written_while_we_look_is_no_broken_record(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[msgspec.structs.replace(curve(1)[0], phase=Phase.SWITCHOVER)])
    assert read_record(recorder.path).status == "running"
    assert History(tmp_path).head(recorder.id).broken_off is False


def test_the_percentage_does_not_depend_on_who_looked_when(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(1))
    watching = History(tmp_path)
    for progress in curve(20)[1:]:
        recorder._began -= 1.0
        recorder.sample(progress, NOTHING)
        watching.head(recorder.id)
    late = History(tmp_path).head(recorder.id)
    assert late.percent == watching.head(recorder.id).percent == pytest.approx(100 * 15 / 16)
    recorder._began -= 1.0
    recorder.sample(curve(19)[-1], msgspec.structs.replace(NOTHING, converging=False))
    now = curve(19)[-1].percent
    assert watching.head(recorder.id).percent == History(tmp_path).head(recorder.id).percent == pytest.approx(now)
    assert now < 50


@pytest.mark.parametrize("damage", [('"time":', '"time":1e300,"x":'), ('"at_s":0.5', '"at_s":-1e300'),
                                    ('"total_bytes":', '"total_bytes":-1e300,"x":')])  # fmt: skip
def test_a_damaged_record_takes_nothing_away(tmp_path: Path, damage: tuple[str, str]) -> None:
    well, damaged = ended(tmp_path), recorded(tmp_path, samples=curve(2))
    text = damaged.path.read_text()
    assert damage[0] in text
    damaged.path.write_text(text.replace(*damage, 1))
    history = History(tmp_path)
    found = shown_all(Migrations(Jobs(tmp_path), history).all())
    assert well in {each.id for each in found}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\S+Z", each.updated_at) for each in found)
    assert b'virtmig_migrations_total{result="completed"} 1.0' in Metrics(history).exposition()


def test_one_that_cannot_be_shown_is_left_out_of_a_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    well = Found("a", None, History(tmp_path).head(ended(tmp_path)))
    broken = Found("b", None, History(tmp_path).head(ended(tmp_path)))
    broken.head.percent = None
    broken.head.ended = None
    assert [each.id for each in shown_all([broken, well])] == ["a"]
    assert "b cannot be shown: TypeError" in caplog.text


def test_a_long_first_line_is_read(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(2))
    text = recorder.path.read_text()
    recorder.path.write_text(text.replace('"changes":["a', f'"changes":["{"a" * (5 << 20)}', 1))
    head = History(tmp_path).head(recorder.id)
    assert head.sample.progress == curve(2)[-1]
    assert len(head.began.changes[0]) > 5 << 20
