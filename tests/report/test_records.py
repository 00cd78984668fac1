"""Records: written as it happens, read back whole or broken, bounded, told, compared, replayed, redacted."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hosts import DESTINATION, GUEST, SOURCE, ask, plan
from virtmig.errors import RequestError
from virtmig.estimate import estimate
from virtmig.forecast import Forecast
from virtmig.link.asking import Agreed, Carried, Changed, Exchanged
from virtmig.link.asking import Ended as AgentsEnded
from virtmig.link.messages import Answer, ChannelName, Reason, Verdict
from virtmig.policy import Action, Decision, Policy
from virtmig.progress import Outcome, Phase, Progress, Status, Whereabouts
from virtmig.relaying import ChannelRates
from virtmig.report import records
from virtmig.report.explain import compare, explain, log_lines, policy_from_toml, replay
from virtmig.report.html import charts_of, report_html
from virtmig.report.recorder import LARGEST_BYTES, Recorder
from virtmig.report.records import Agents, Row, all_records, find_record, read_record
from virtmig.report.redact import format_words, redacted

NOTHING = Forecast(converging=None, sentence="")
MIB = 1 << 20


def outcome(**changes: object) -> Outcome:
    base = Outcome(
        status=Status.COMPLETED, guest=Whereabouts.DESTINATION, domain="opal", source="amber", destination="beryl",
        sentence="opal now runs on beryl", elapsed_s=3.5, downtime_ms=20, observed_downtime_ms=26,
        processed_bytes=200 * MIB,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def curve(count: int = 60, *, rate: int = 64 * MIB, writes: int = 70 * MIB) -> list[Progress]:
    """A precopy that does not converge: what remains stays the same from pass to pass."""
    found = []
    total = 512 * MIB
    for number in range(count):
        sent = number * rate // 2
        found.append(
            Progress(
                elapsed_s=number / 2, phase=Phase.PRECOPY, total_bytes=total, processed_bytes=sent,
                memory_total_bytes=total, memory_processed_bytes=sent, memory_remaining_bytes=total - sent % total,
                remaining_bytes=total - sent % total, memory_bytes_per_s=rate, dirty_bytes_per_s=writes,
                iteration=1 + sent // total, full_passes=sent // total,
            )
        )  # fmt: skip
    return found


class Prompt(Recorder):
    """One whose rows are in the file when it returns."""

    def _put(self, row: Row, *, may_be_left_out: bool = False) -> None:
        super()._put(row, may_be_left_out=may_be_left_out)
        assert self.flush()


def recorded(folder: Path, *options: str, samples: list[Progress] | None = None, **values: object) -> Recorder:
    recorder = Prompt(folder)
    request = ask("live", *options, **values)
    recorder.begin(request, plan(request), source=SOURCE, destination=DESTINATION, guest=GUEST, changes=["a -> b  [r]"])
    for number, progress in enumerate(curve() if samples is None else samples):
        recorder._began -= 0.5 if number else 0.0  # half a second apart, as the samples say
        recorder.sample(progress, NOTHING)
    return recorder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, bandwidth=64)
    recorder.decided(Decision(action=Action.SET_DOWNTIME, value=400, reason="it does not converge"))
    recorder.message("the agents have lost each other", "warning")
    recorder.finish(outcome(report_id=recorder.id))
    record = find_record(recorder.id, tmp_path)
    assert record.began.plan == plan(ask("live", bandwidth=64))
    assert record.began.source_facts == SOURCE
    assert [row.progress for row in record.samples] == curve()
    assert record.outcome == outcome(report_id=recorder.id)
    assert record.status == "completed"
    assert oct(record.path.stat().st_mode & 0o777) == "0o600"
    text = "\n".join(explain(record))
    expected = (
        "opal now runs on beryl", "asked for with --live", "a -> b", "set-downtime: it does not converge",
        "--bandwidth 64: the memory went at", "the guest wrote", "20 ms by QEMU's own count, 26 ms as",
    )  # fmt: skip
    for words in expected:
        assert words in text
    assert "warning: the agents have lost each other" in "\n".join(log_lines(record))


def test_a_crash_keeps_what_was(tmp_path: Path) -> None:
    recorder = recorded(tmp_path)
    assert recorder.path is not None
    whole = recorder.path.read_bytes()
    recorder.path.write_bytes(whole[:-30])
    record = read_record(recorder.path)
    assert record is not None
    assert len(record.samples) == len(curve()) - 1
    assert record.status == "running"
    began = msgspec.structs.replace(record.began, pid=0)
    recorder.path.write_bytes(records.encode_row(began))
    dead = read_record(recorder.path)
    assert dead is not None
    assert dead.status == "broken off"
    assert "virtmig was killed" in "\n".join(explain(dead))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 4000))
def test_any_damage_is_no_record_or_fewer_rows(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    recorder = recorded(folder, samples=curve(4))
    assert recorder.path is not None
    whole = recorder.path.read_bytes()
    recorder.path.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
    record = read_record(recorder.path)
    assert record is None or len(record.rows) <= 4 + junk.count(b"\n")


def test_a_refusal_is_recorded_with_every_reason(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    recorder.refused([("multifd", "too old", "upgrade"), ("postcopy", "no userfaultfd", "")])
    record = find_record("last", tmp_path)
    assert record.status == "refused"
    assert [line.strip() for line in explain(record)[-2:]] == ["too old; a way out: upgrade", "no userfaultfd"]


def test_an_unwritable_folder_and_a_full_disk_cost_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    recorder = recorded(blocked / "records")
    recorder.finish(outcome())
    assert recorder.id == ""
    assert len([row for row in caplog.records if "no record of this migration" in row.message]) == 1
    caplog.clear()
    recorder = recorded(tmp_path, samples=[])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert recorder.path is not None
    resource.setrlimit(resource.RLIMIT_FSIZE, (recorder.path.stat().st_size, before[1]))
    try:
        recorder.message("this does not fit")
        recorder.message("and this does not either")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len([row for row in caplog.records if "the record of this migration has gaps" in row.message]) == 1
    recorder.finish(outcome())
    assert find_record("last", tmp_path).outcome is not None


def test_samples_get_rarer_and_a_record_is_bounded(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    recorder._began -= 700
    for progress in curve(50):
        recorder.sample(progress, NOTHING)  # all within a moment, where one a second is kept
    assert len(find_record("last", tmp_path).samples) == 1
    recorder._bytes = LARGEST_BYTES + 1
    recorder.message("too much")
    recorder.finish(outcome())
    record = find_record("last", tmp_path)
    assert "too much" not in "\n".join(log_lines(record))
    assert record.outcome is not None


def test_old_records_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT_RECORDS", 3)
    for number in range(6):
        (tmp_path / f"2020010{number}-000000-aaaaaa.jsonl").write_bytes(b"{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    recorded(tmp_path, samples=[])
    assert len(list(tmp_path.glob("*.jsonl"))) == 4
    assert (tmp_path / "notes.txt").exists()


def test_records_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTMIG_RECORDS", "")
    recorder = Recorder()
    recorder.begin(ask("live"), plan(ask("live")))
    recorder.finish(outcome())
    assert recorder.id == ""
    assert all_records() == []


def test_a_record_is_found_by_id_beginning_domain_and_last(tmp_path: Path) -> None:
    first = recorded(tmp_path, samples=[])
    assert find_record(first.id[:12], tmp_path).id == first.id
    assert find_record("opal", tmp_path).id == first.id
    assert find_record("last", tmp_path).id == first.id
    with pytest.raises(RequestError, match="no record"):
        find_record("ruby", tmp_path)
    with pytest.raises(RequestError, match="no record"):
        find_record("../../etc/passwd", tmp_path)


def test_a_redacted_record_says_nothing_of_whose_it_is(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(2), migrateuri="tcp://192.0.2.7:4444")
    recorder.message("cannot open /srv/secret/disk.img of 52:54:00:12:34:56")
    recorder.finish(outcome())
    text = b"".join(redacted(find_record("last", tmp_path))).decode()
    for secret in ("opal", "amber", "beryl", "192.0.2.7", "secret", "52:54:00", SOURCE.host_uuid or "-"):
        assert secret not in text
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "20200101-000000-aaaaaa.jsonl").write_text(text)
    record = find_record("last", folder)
    assert record.outcome is not None
    assert len(record.samples) == 2


@pytest.mark.parametrize(
    "name", ["a", "row", "true", "sample", "completed", "precopy", 'my "quoted" guest', "gästin", "running"]
)
def test_a_redacted_record_is_a_record_whatever_the_guest_is_called(tmp_path: Path, name: str) -> None:
    recorder = Recorder(tmp_path)
    request = ask("live", domain=name)
    planned = msgspec.structs.replace(plan(ask("live")), domain=name, values=dict(request))
    recorder.begin(request, planned, source=SOURCE, destination=DESTINATION, guest=GUEST)
    for progress in curve(3):
        recorder.sample(progress, NOTHING)
    secrets = {
        "fe80::1ff:fe23:4567:890a": "from fe80::1ff:fe23:4567:890a",
        "2001:db8::7": "to tcp:[2001:db8::7]:49152",
        "52:54:00:AB:CD:EF": "the card 52:54:00:AB:CD:EF",
        "my disk.img": "cannot open '/srv/vms/my disk.img'",
        "größe": "cannot open /srv/größe/disk",
        "third.example.org": "no route to third.example.org",
        "beryl2": "asked qemu+ssh://root@beryl2/system",
        f"|{name}|": f"of |{name}|",
    }
    for text in secrets.values():
        recorder.message(text)
    recorder.finish(outcome(domain=name, sentence=f"{name} now runs on beryl", status=Status.COMPLETED))
    lines = redacted(find_record("last", tmp_path))
    text = b"".join(lines).decode()
    for secret in secrets:
        assert secret not in text
    again = tmp_path / "again"
    again.mkdir()
    (again / "20200101-000000-aaaaaa.jsonl").write_bytes(b"".join(lines))
    record = find_record("last", again)
    assert record.began.domain == "GUEST"
    assert len(record.samples) == 3
    assert {row.progress.phase for row in record.samples} == {Phase.PRECOPY}
    assert record.outcome is not None
    assert record.outcome.status is Status.COMPLETED
    assert record.outcome.sentence == "GUEST now runs on DESTINATION"
    assert len(record.rows) == len(lines) - 1


def test_the_words_of_the_format_are_known() -> None:
    assert {"began", "sample", "precopy", "completed", "source", "start-postcopy", "refused"} <= format_words()


def test_two_records_are_compared_with_ratios_and_options(tmp_path: Path) -> None:
    one, other = (
        recorded(tmp_path),
        recorded(tmp_path, "parallel", samples=curve(rate=128 * MIB), parallel_connections=4),
    )
    one.finish(outcome())
    other.finish(outcome(elapsed_s=1.75, downtime_ms=10))
    rows = {row[0]: row[1:] for row in compare(find_record(one.id, tmp_path), find_record(other.id, tmp_path))}
    assert rows["duration"][2] == "0.50"
    assert rows["downtime"] == ("20 ms", "10 ms", "0.50")
    assert rows["rate"][2] == "2.00"
    assert rows["--parallel-connections"] == ("-", "4", "")


def test_another_policy_is_replayed_on_the_same_curve(tmp_path: Path) -> None:
    recorder = recorded(tmp_path)
    record = find_record(recorder.id, tmp_path)
    assert replay(record, Policy()) == [] or all(row.action is Action.CONTINUE for _, row in replay(record, Policy()))
    second, decision = replay(record, Policy(timeout_s=10, timeout_action=Action.ABORT))[-1]
    assert decision.action is Action.ABORT
    assert 10 <= second <= 11.5
    last = replay(record, policy_from_toml(b'on_stall = "abort"\n'))[-1][1]
    assert last.action is Action.ABORT
    with pytest.raises(msgspec.ValidationError, match="stall_passes"):
        policy_from_toml(b"on_stal = 1")


def test_the_file_is_written_while_it_happens(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    assert recorder.path is not None
    before = recorder.path.stat().st_size
    recorder.message("now")
    assert recorder.path.stat().st_size > before
    recorder.finish(outcome())
    descriptors = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)}
    assert str(recorder.path) not in descriptors


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_everything_that_may_be_none_survives_being_left_out(tmp_path: Path) -> None:
    """None is not written: whatever may be None must have it as its default, here and in all that is inside."""
    never = estimate(memory_bytes=1 << 40, dirty_bytes_per_s=2e9, rate_bytes_per_s=1e9)
    assert never.high_s is None
    recorder = Recorder(tmp_path)
    recorder.begin(ask("live"), plan(ask("live")), source=SOURCE, destination=DESTINATION, guest=GUEST, estimate=never)
    recorder.finish(outcome(downtime_ms=None, observed_downtime_ms=None, processed_bytes=None))
    record = find_record("last", tmp_path)
    assert record.began.estimate == never
    assert record.outcome == outcome(downtime_ms=None, observed_downtime_ms=None, processed_bytes=None)
    assert never.sentence in "\n".join(explain(record))


def answered() -> Agreed:
    verdicts = (
        Verdict(feature="live", outcome="accepted", reason="asked for with --live"),
        Verdict(feature="parallel-connections", outcome="adjusted", asked="10", given="2", reason="beryl allows 2"),
    )
    channels = (ChannelName("main"), ChannelName("parallel", 0), ChannelName("parallel", 1))
    return Agreed(session="0123", answer=Answer(verdicts=verdicts), channels=channels, peer="beryl", ms=21.0,
                  round_trips=3)  # fmt: skip


def test_what_the_agents_say_is_kept_and_told(tmp_path: Path) -> None:
    rates = ChannelRates()
    recorder = recorded(tmp_path, samples=[])
    recorder.agents(Exchanged(source=True, name="Hello", ms=1.2))
    recorder.agents(answered())
    recorder.agents(Changed(state="reconnecting", words="without parallel 1"))
    progress = curve(8)
    for number, each in enumerate(progress):
        said = Carried(channels={"main": (number * MIB, 0), "parallel 0": (2 * number * MIB, 0), "parallel 1": (0, 0)},
                       ms=number * 500.0)  # fmt: skip
        recorder.agents(said)
        rates.update(said)
        recorder.sample(msgspec.structs.replace(each, channel_bytes_per_s=rates.now), NOTHING)
        recorder._began -= 0.6
    recorder.event(time.monotonic(), "destination", "resumed", 0)
    recorder.agents(AgentsEnded(state="failed", reasons=(Reason("agent", "the other host has gone"),)))
    recorder.finish(outcome())
    record = find_record("last", tmp_path)
    assert record.agreed == answered()
    assert rates.now == (2 * MIB, 4 * MIB, 0)
    log = "\n".join(log_lines(record))
    for words in ("to the destination: Hello", "reconnecting, without",
                  "destination: resumed", "the session is failed: the other host has gone"):  # fmt: skip
        assert words in log
    assert "in 3 round trips, main, parallel 0, parallel 1:" in "\n".join(explain(record))
    assert "parallel-connections: adjusted 10 -> 2, beryl allows 2" in "\n".join(explain(record))
    [chart] = [chart for chart in charts_of(record) if chart.title.startswith("channels")]
    assert [row.label for row in chart.series] == ["main", "parallel 0"]
    assert "parallel-connections</td><td>adjusted 10 → 2" in report_html(record)
    assert sum(isinstance(row, Agents) for row in record.rows) == 3 + len(progress) + 1


def test_of_what_they_have_carried_little_is_kept(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    for number in range(100):
        recorder.agents(Carried(channels={"main": (number, 0)}, ms=float(number)))
    recorder.finish(outcome())
    assert sum(isinstance(row, Agents) for row in find_record("last", tmp_path).rows) == 1


def test_the_id_is_that_of_whoever_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records.RECORD_ID, "20260101-000000-abcdef")
    assert recorded(tmp_path, samples=[]).id == "20260101-000000-abcdef"
    second = recorded(tmp_path, samples=[]).id  # a second one of the same process gets its own
    assert second != "20260101-000000-abcdef"
    monkeypatch.setenv(records.RECORD_ID, "../../x")
    assert recorded(tmp_path, samples=[]).id not in ("../../x", second)
    assert len(all_records(tmp_path)) == 3
