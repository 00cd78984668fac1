from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.curves import MIB, PaperMigration
from virtmig.agreement import Adjustment, Choice, Plan
from virtmig.cli.display import (
    MODES,
    SCHEMA_VERSION,
    Display,
    MonotonePercent,
    eta_text,
    make_display,
    resolve_mode,
    virsh_percent,
)
from virtmig.errors import PlanRefused, RequestError
from virtmig.forecast import Forecast, forecast
from virtmig.obstacles import Caution
from virtmig.policy import Action, Decision, History, Policy, decide
from virtmig.progress import Outcome, Phase, Progress, Status, Whereabouts
from virtmig.request import MigrationRequest

GIB = 1 << 30
NOON = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
PLAN = ["multifd on: both hosts have it", "tls on: asked for"]
VERY = {"domain": "web01", "desturi": "qemu+ssh://host-b/system"}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Recorded:
    """A display with its two streams in memory."""

    def __init__(self, mode: str, *, is_terminal: bool = False, width: int = 100, encoding: str = "utf-8", **environ):
        self.raw_out, self.raw_err = io.BytesIO(), io.BytesIO()
        # newline="": what is written is what is read, \r and \n included
        self.stream_out = io.TextIOWrapper(self.raw_out, encoding="utf-8", newline="")
        self.stream_err = io.TextIOWrapper(self.raw_err, encoding=encoding, newline="")
        self.encoding = encoding
        self.display: Display = make_display(
            mode,
            stream_out=self.stream_out,
            stream_err=self.stream_err,
            is_terminal=is_terminal,
            width=width,
            environ={"TERM": "xterm-256color", **environ},
            wall_clock=lambda: NOON,
        )

    @property
    def out(self) -> str:
        self.stream_out.flush()
        return self.raw_out.getvalue().decode()

    @property
    def err(self) -> str:
        self.stream_err.flush()
        return self.raw_err.getvalue().decode(self.encoding)

    @property
    def shown(self) -> str:
        return ESCAPES.sub("", self.err)


def precopy(**fields: object) -> Progress:
    values = {
        "elapsed_s": 21.0,
        "phase": Phase.PRECOPY,
        "total_bytes": 8 * GIB,
        "remaining_bytes": 2 * GIB,
        "memory_total_bytes": 8 * GIB,
        "memory_remaining_bytes": 2 * GIB,
        "memory_bytes_per_s": 512 * MIB,
        "dirty_bytes_per_s": 118 * MIB,
        "full_passes": 3,
        "iteration": 7,
        "expected_downtime_ms": 86,
        "downtime_limit_ms": 300,
        **fields,
    }
    return msgspec.convert(values, Progress)


EXPECTED = Forecast(
    converging=True,
    sentence="converges: 9 s to 14 s more, pass 4 of about 5",
    eta_low_s=9.0,
    eta_high_s=14.0,
    downtime_ms=86,
    downtime_limit_ms=300,
)
NEVER = Forecast(converging=False, sentence="not converging: the guest writes too fast; what helps: --postcopy")
SWITCH = Decision(action=Action.START_POSTCOPY, reason="1 full pass over memory is done; switching to postcopy")
UNREMARKABLE = Decision(action=Action.CONTINUE, reason="precopy, 9 s since the start", notable=False)


def outcome(status: Status = Status.COMPLETED, **fields: object) -> Outcome:
    values = {
        "status": status,
        "guest": Whereabouts.DESTINATION if status is Status.COMPLETED else Whereabouts.SOURCE,
        "domain": "web01",
        "source": "host-a",
        "destination": "host-b",
        "sentence": "web01 now runs on host-b" if status is Status.COMPLETED else "web01 still runs on host-a",
        "elapsed_s": 12.0,
        "downtime_ms": 86,
        "processed_bytes": 12 * GIB,
        "error": "" if status is Status.COMPLETED else "operation aborted: job 'migration out' canceled by client",
        "hint": "" if status is Status.COMPLETED else "try again with --postcopy",
        **fields,
    }
    return msgspec.convert(values, Outcome)


def tell_a_story(display: Display, end: Outcome, **migration: object) -> list[Progress]:
    """A whole migration, told to a display as the loop tells it."""
    paper, history, seen = PaperMigration(**{"dirty": 700, **migration}), History(), []
    with display:
        display.start("web01", "host-a", "host-b", PLAN)
        display.sample(Progress(elapsed_s=0.0), None)
        for progress in paper.samples():
            decision = decide(Policy(), history, progress, progress.elapsed_s)
            history.add(progress, decision, progress.elapsed_s)
            told = msgspec.structs.replace(progress, full_passes=history.full_passes)
            display.sample(told, forecast(history, Policy()))
            display.decided(decision)
            seen.append(told)
        display.message("something to know", "info")
        display.finish(end)
    return seen


def break_off(display: Display, error: type[BaseException]) -> None:
    with display:
        display.sample(precopy(), EXPECTED)
        raise error


# -- which way to show it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "is_terminal", "mode"),
    [
        ({}, True, "rich"),
        ({}, False, "log"),
        ({"verbose": True}, True, "line"),
        ({"verbose": True}, False, "line"),
        ({"quiet": True}, True, "none"),
        ({"quiet": True, "progress": "rich"}, True, "none"),
        ({"json": True}, True, "json"),
        ({"progress": "rich"}, False, "rich"),
        ({"progress": "log"}, True, "log"),
        ({"progress": "json"}, True, "json"),
        ({"progress": "none", "verbose": True}, True, "none"),
        ({"progress": "auto"}, True, "rich"),
    ],
)
def test_resolve_mode(options: dict, is_terminal: bool, mode: str) -> None:
    request = MigrationRequest({**VERY, **options})
    assert resolve_mode(request, is_terminal, environ={"TERM": "xterm"}) == mode


@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_log_lines(term: str) -> None:
    assert resolve_mode(MigrationRequest(VERY), True, environ={"TERM": term}) == "log"


def test_the_global_quiet_counts_too() -> None:
    assert resolve_mode(MigrationRequest({**VERY, "json": True}), True, quiet=True) == "none"


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="rich, line, log, json, none"):
        make_display("fancy")


def test_rich_is_not_imported_for_any_other_way() -> None:
    code = (
        "import sys; from virtmig.cli.display import make_display\n"
        "for mode in ('line', 'log', 'json', 'none'): make_display(mode)\n"
        "print('rich' in sys.modules, 'libvirt' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- percentages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remaining", "total", "text"),
    [
        (100_000, 100_000, " 0.00"),
        (57_645, 100_000, "42.35"),
        (57_641, 100_000, "42.35"),  # truncated, not rounded to 42.36
        (94_200, 100_000, " 5.79"),  # as the double has it, in C too
        (94_000, 100_000, " 6.00"),
        (1, 100_000, "99.99"),
        (1, 1 << 60, "99.99"),
        (0, 100_000, "99.99"),
        (7, 5, " 0.00"),
    ],
)
def test_virsh_percent(remaining: int, total: int, text: str) -> None:
    assert virsh_percent(remaining, total, done=False) == text


@given(st.lists(st.tuples(st.sampled_from(Phase), st.integers(0, 1 << 40), st.integers(0, 1 << 40)), max_size=40))
def test_the_percentage_never_falls_and_is_99_until_the_end(samples: list[tuple[Phase, int, int]]) -> None:
    percent, before = MonotonePercent(), 0.0
    for phase, total, remaining in samples:
        after = percent.update(Progress(elapsed_s=0, phase=phase, total_bytes=total, remaining_bytes=remaining))
        assert before <= after <= 99
        before = after
    assert percent.finish() == 100


def test_disks_are_the_first_half_while_memory_is_not_known() -> None:
    percent = MonotonePercent()
    storage = Progress(elapsed_s=1, phase=Phase.STORAGE, total_bytes=100, remaining_bytes=20)
    assert percent.update(storage) == 40


# -- virsh's line ------------------------------------------------------------------------------------------------------


def test_virsh_line_on_a_terminal() -> None:
    recorded = Recorded("line", is_terminal=True)
    seen = tell_a_story(recorded.display, outcome())
    lines = recorded.err.split("\r")[1:]
    assert lines[0].startswith("Migration: [")
    assert re.fullmatch(r"Migration: \[[ \d]\d\.\d\d %\]", lines[0])
    assert "Migration: [100.00 %]" in lines[-1]
    assert len(lines) >= len(seen)
    assert "something to know\n" in recorded.err
    assert recorded.out == "\nweb01 now runs on host-b\n"


def test_virsh_line_in_a_file_ends_each_line() -> None:
    """As virsh 12.8 does it: `virsh -c test:///default save --verbose test /tmp/x 2>file`."""
    recorded = Recorded("line", is_terminal=False)
    tell_a_story(recorded.display, outcome())
    assert "\r" not in recorded.err
    assert recorded.err.endswith("Migration: [100.00 %]\n")


def test_the_line_of_an_aborted_migration_never_says_100() -> None:
    recorded = Recorded("line", is_terminal=True)
    with recorded.display as display:
        display.sample(precopy(remaining_bytes=0))
        display.finish(outcome(Status.ABORTED))
    assert "100.00" not in recorded.err
    assert "\nerror: operation aborted" in recorded.err
    assert recorded.err.endswith("web01 still runs on host-a\nhint: try again with --postcopy\n")
    assert recorded.out == "\n"


def test_an_open_line_is_ended_when_something_breaks() -> None:
    recorded = Recorded("line", is_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        break_off(recorded.display, KeyboardInterrupt)
    assert recorded.err == "\rMigration: [75.00 %]\n"


# -- log ---------------------------------------------------------------------------------------------------------------


def test_log_lines_are_dated_and_one_a_second() -> None:
    recorded = Recorded("log")
    seen = tell_a_story(recorded.display, outcome())
    lines = recorded.err.splitlines()
    assert all(line.startswith("2026-11-22 12:00:00 ") for line in lines)
    assert lines[0].endswith("migrating web01 from host-a to host-b")
    assert [line[20:] for line in lines[1:3]] == [f"plan: {line}" for line in PLAN]
    samples = [line for line in lines if " up to date (" in line]
    assert seen[-1].elapsed_s - 2 <= len(samples) <= seen[-1].elapsed_s + 2
    assert "something to know" in lines[-2]
    assert lines[-1][20:] == "migration completed in 12 s, 12.0 GiB sent, average speed 1.00 GiB/s, downtime 86 ms"
    assert recorded.out == "web01 now runs on host-b\n"
    assert not ESCAPES.search(recorded.err)


def test_a_log_line_has_the_numbers() -> None:
    recorded = Recorded("log")
    recorded.display.sample(precopy(throttle_percent=60), EXPECTED)
    assert recorded.err[20:] == (
        "precopy pass 4, 6.00 GiB of 8.00 GiB up to date (75.0 %), 512 MiB/s, guest writes 118 MiB/s, "
        "the guest is being slowed: 60 % of its CPU time is taken, ETA 9 s to 14 s\n"
    )


def test_a_new_phase_is_logged_at_once() -> None:
    recorded = Recorded("log")
    for progress in (precopy(), precopy(elapsed_s=21.1), precopy(elapsed_s=21.2, phase=Phase.SWITCHOVER)):
        recorded.display.sample(progress, EXPECTED)
    lines = recorded.err.splitlines()
    assert len(lines) == 2
    assert lines[1][20:].startswith("switchover, ")


def test_eta_text() -> None:
    assert eta_text(EXPECTED) == "ETA 9 s to 14 s"
    assert eta_text(NEVER) == "not converging"
    assert eta_text(Forecast(converging=None, sentence="", eta_low_s=3.0)) == "ETA 3 s or more"
    assert eta_text(Forecast(converging=None, sentence="")) == ""


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_lines_parse_and_the_last_is_the_result() -> None:
    recorded = Recorded("json")
    tell_a_story(recorded.display, outcome())
    events = [json.loads(line) for line in recorded.out.splitlines()]
    assert recorded.err == ""
    assert {event["schema_version"] for event in events} == {SCHEMA_VERSION}
    assert {event["time"] for event in events} == {"2026-11-22T12:00:00.000Z"}
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["plan", "started"]
    assert kinds[-2:] == ["message", "result"]
    assert set(kinds[2:-2]) == {"progress"}
    assert events[0]["plan"] == {"lines": PLAN}
    assert events[1] | {"domain": "web01", "source": "host-a", "destination": "host-b"} == events[1]


def test_json_progress_and_result_round_trip() -> None:
    recorded = Recorded("json")
    progress, end = precopy(channel_bytes_per_s=(5, 6)), outcome(actions=("set-downtime: why",))
    recorded.display.sample(progress, EXPECTED)
    recorded.display.decided(SWITCH)
    recorded.display.decided(UNREMARKABLE)
    recorded.display.finish(end)
    sample, decision, result = (json.loads(line) for line in recorded.out.splitlines())
    assert msgspec.convert(sample, Progress) == progress
    assert msgspec.convert(sample["forecast"], Forecast) == EXPECTED
    assert sample["status"] == "running"
    assert sample["memory_remaining_bytes"] == 2 * GIB
    assert sample["percent"] == 75.0
    assert (decision["type"], decision["action"], decision["reason"]) == ("decision", "start-postcopy", SWITCH.reason)
    assert msgspec.convert(result, Outcome) == end


def test_every_phase_has_one_of_novas_words() -> None:
    recorded = Recorded("json")
    for phase in Phase:
        recorded.display.sample(Progress(elapsed_s=0, phase=phase))
    statuses = [json.loads(line)["status"] for line in recorded.out.splitlines()]
    assert set(statuses) <= {"preparing", "running", "completed", "failed", "error", "cancelled"}


def test_a_plan_is_whole_in_json_and_in_short_for_people() -> None:
    plan = Plan(
        domain="web01",
        source="host-a",
        destination="host-b",
        transport="direct",
        transport_reason="no agent",
        choices=(Choice("tls", True, "asked for"), Choice("xbzrle", False, "not asked"), Choice("multifd", None, "?")),
        adjustments=(Adjustment("parallel-connections", "8", "4", "host-b allows 4"),),
        warnings=(Caution("vfio", "a device may not come along"),),
    )
    recorded, logged = Recorded("json"), Recorded("log")
    for display in (recorded.display, logged.display):
        display.start("web01", "host-a", "host-b", plan)
    assert msgspec.convert(json.loads(recorded.out.splitlines()[0])["plan"], Plan) == plan
    assert [line[20:] for line in logged.err.splitlines()[1:]] == [
        "plan: tls on: asked for",
        "plan: --parallel-connections 4 instead of 8: host-b allows 4",
        "plan: warning: a device may not come along",
    ]


def test_refusals_are_results_in_json_and_the_callers_to_print_elsewhere() -> None:
    refusal = PlanRefused([("tls", "no certificate", "virtmig pki"), ("vfio", "a device", "unplug it")])
    for mode in MODES:
        recorded = Recorded(mode)
        with recorded.display as display:
            display.refused(refusal)
        assert recorded.err == ""
        assert (recorded.out == "") == (mode != "json")
    recorded = Recorded("json")
    recorded.display.refused(refusal)
    recorded.display.refused(RequestError("no such option", option="x", hint="y"))
    first, second = (json.loads(line) for line in recorded.out.splitlines())
    assert (first["type"], first["status"], first["guest"]) == ("result", "refused", "source")
    assert first["reasons"][1] == {"feature": "vfio", "reason": "a device", "way_out": "unplug it"}
    assert second["problems"] == [{"option": "x", "message": "no such option", "hint": "y"}]


# -- quiet -------------------------------------------------------------------------------------------------------------


def test_quiet_says_nothing_but_errors() -> None:
    recorded = Recorded("none")
    tell_a_story(recorded.display, outcome())
    assert (recorded.out, recorded.err) == ("", "")
    recorded = Recorded("none")
    recorded.display.message("a warning", "warning")
    recorded.display.message("it broke", "error")
    recorded.display.finish(outcome(Status.FAILED, error="it broke for good"))
    assert recorded.out == ""
    assert recorded.err.splitlines() == [
        "error: it broke",
        "error: it broke for good",
        "web01 still runs on host-a",
        "hint: try again with --postcopy",
    ]


# -- the live view -----------------------------------------------------------------------------------------------------


def test_the_live_view_shows_what_a_person_asks() -> None:
    recorded = Recorded("rich")
    display = recorded.display
    with display:
        display.start("web01", "host-a", "host-b", PLAN)
        display.decided(SWITCH)
        display.sample(precopy(throttle_percent=60, channel_bytes_per_s=(400 * MIB, 112 * MIB)), EXPECTED)
    text = recorded.shown
    for wanted in (
        "web01  host-a → host-b  precopy pass 4  0:00:21",
        "75.0 %",
        "ETA 9 s to 14 s",
        "2.00 GiB of 8.00 GiB, pass 4 (iteration 7)",
        "512 MiB/s (peak 512 MiB/s)",
        "118 MiB/s (peak 118 MiB/s)",
        "channel 0  400 MiB/s",
        "the guest is being slowed: 60 % of its CPU time is taken",
        "converges: 9 s to 14 s more, pass 4 of about 5",
        "expected 86 ms, limit 300 ms",
        "start-postcopy: 1 full pass over memory is done; switching to postcopy",
        "Ctrl-C aborts, the guest stays on host-a",
        "plan: multifd on: both hosts have it",
    ):
        assert wanted in text, wanted
    assert recorded.out == "", "the live view goes to standard error"


def test_a_recorded_console_shows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    from virtmig.cli.display_rich import RichDisplay

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with RichDisplay(io.StringIO(), stream, console=console) as display:
        display.start("web01", "host-a", "host-b", ())
        display.sample(precopy(), NEVER)
        lines = console.render_lines(display.view(), pad=False)
    assert len(lines) < 15
    text = ESCAPES.sub("", stream.getvalue())
    assert "╭" in text
    assert "not converging" in text


def test_the_percentage_on_the_screen_never_falls() -> None:
    recorded = Recorded("rich")
    tell_a_story(recorded.display, outcome())
    shown = [float(value) for value in re.findall(r"[━╌] +(\d+\.\d) %", recorded.shown)]
    assert len(shown) > 20
    assert shown == sorted(shown)
    assert shown[-1] == 100.0
    assert max(value for value in shown if value < 100) <= 99.0
    assert "migration completed in 12 s" in recorded.shown
    assert recorded.out == "web01 now runs on host-b\n"


def test_phases_of_the_live_view() -> None:
    recorded = Recorded("rich")
    with recorded.display as display:
        display.sample(Progress(elapsed_s=1.0))
        assert "the destination is being prepared; the guest runs on" in recorded.shown
        assert "%" not in recorded.shown
        display.sample(precopy(elapsed_s=2.0, phase=Phase.STORAGE, disk_bytes_per_s=GIB, memory_bytes_per_s=None))
        assert "copying disks" in recorded.shown
        assert "1.00 GiB/s" in recorded.shown
        display.sample(precopy(elapsed_s=3.0, phase=Phase.POSTCOPY, postcopy_requests=77), EXPECTED)
        assert "the guest had to ask for 77 pages" in recorded.shown
        assert "Ctrl-C detaches, the migration goes on" in recorded.shown


@pytest.mark.parametrize("end", [Status.ABORTED, Status.FAILED])
def test_the_live_view_of_a_bad_end(end: Status) -> None:
    recorded = Recorded("rich")
    tell_a_story(recorded.display, outcome(end))
    tail = recorded.shown.splitlines()[-3:]
    assert [line.strip() for line in tail] == [
        "error: operation aborted: job 'migration out' canceled by client",
        "web01 still runs on host-a",
        "hint: try again with --postcopy",
    ]
    assert "100.0 %" not in recorded.shown
    assert recorded.out == ""


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_the_terminal_is_given_back_whatever_happens(error: type[BaseException]) -> None:
    recorded = Recorded("rich")
    with pytest.raises(error):
        break_off(recorded.display, error)
    assert HIDE in recorded.err
    assert recorded.err.rindex(SHOW) > recorded.err.rindex(HIDE)
    assert recorded.err.removesuffix(SHOW).endswith("\n")


@pytest.mark.parametrize("width", [20, 30, 40, 59])
def test_narrow_terminals(width: int) -> None:
    recorded = Recorded("rich", width=width)
    with recorded.display as display:
        display.start("web01", "host-a", "host-b", ())
        display.sample(precopy(), EXPECTED)
    lines = [line for line in re.split(r"[\r\n]+", recorded.shown) if line]
    assert max(map(len, lines)) <= width
    assert "╭" not in recorded.shown
    assert any(line.startswith("web01") for line in lines)
    if width >= 40:
        assert "75.0 %" in recorded.shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_wide_terminals_have_a_panel_that_fits(width: int) -> None:
    recorded = Recorded("rich", width=width)
    with recorded.display as display:
        display.start("web01", "host-a", "host-b", ())
        display.sample(precopy(), EXPECTED)
    lines = [line for line in re.split(r"[\r\n]+", recorded.shown) if line]
    assert max(map(len, lines)) <= min(width, 110)
    assert lines[0].startswith("╭")


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_without_utf_8_everything_is_ascii(encoding: str, width: int) -> None:
    recorded = Recorded("rich", encoding=encoding, width=width)
    tell_a_story(recorded.display, outcome())
    assert recorded.shown.isascii()
    assert "host-a -> host-b" in recorded.shown
    assert "##" in recorded.shown
    assert recorded.out == "web01 now runs on host-b\n"


def test_no_color() -> None:
    def colours(**environ: str) -> set[str]:
        recorded = Recorded("rich", **environ)
        tell_a_story(recorded.display, outcome())
        codes = re.findall(r"\x1b\[([\d;]+)m", recorded.err)
        return {code for code in codes if re.search(r"(^|;)(3[0-7]|38)(;|$)", code)}

    assert colours()
    assert not colours(NO_COLOR="1")


def test_it_does_not_draw_more_often_than_five_times_a_second() -> None:
    recorded = Recorded("rich")
    with recorded.display as display:
        display.sample(precopy(elapsed_s=0.0), EXPECTED)
        once = len(recorded.err)
        for tick in range(1, 20):
            display.sample(precopy(elapsed_s=tick / 100), EXPECTED)
        assert len(recorded.err) == once
        display.sample(precopy(elapsed_s=0.2), EXPECTED)
        assert len(recorded.err) > once


@pytest.mark.parametrize("mode", MODES)
def test_a_reader_that_has_gone_away_does_not_end_the_migration(mode: str) -> None:
    class Gone(io.TextIOBase):
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return True

    display = make_display(mode, stream_out=Gone(), stream_err=Gone(), width=100, environ={"TERM": "xterm"})
    tell_a_story(display, outcome())
    tell_a_story(display, outcome(Status.FAILED))


def test_a_job_that_somebody_else_started_has_neither_start_nor_finish() -> None:
    for mode in MODES:
        recorded = Recorded(mode)
        with recorded.display as display:
            display.sample(precopy(), EXPECTED)
            display.message("web01 has left host-a")
        assert ("web01 has left host-a" in recorded.err + recorded.out) == (mode != "none")
