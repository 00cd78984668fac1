"""Showing a migration: one Display, five ways. rich is imported only when the live view is asked for.

    rich    a live view on a terminal                                         standard error
    line    virsh's own line, byte for byte, and its lone newline             standard error (newline: standard output)
    log     one dated line a second, and a summary                            standard error
    json    one JSON object a line, the last one is the result                standard output
    none    nothing but errors                                                standard error

In rich, line and log the end is one sentence that says where the guest runs: on standard output when the migration
succeeded, as the command's result, else on standard error, after the error and the hint.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TextIO

import msgspec

from virtmig.agreement import Plan
from virtmig.errors import MigrationError, PlanRefused, RequestError
from virtmig.forecast import Forecast
from virtmig.policy import Decision
from virtmig.progress import Outcome, Phase, Progress, Status
from virtmig.quantities import duration_text, rate_text, size_text
from virtmig.request import MigrationRequest

#: version of the JSON lines; grows when a field changes its meaning or goes away, not when one is added
SCHEMA_VERSION = 1
MODES = ("rich", "line", "log", "json", "none")
LOG_EVERY_S = 1.0
WELL_ENDED = frozenset({Status.COMPLETED, Status.DETACHED})

PHASE_WORDS = {
    Phase.PREPARING: "preparing the destination",
    Phase.STORAGE: "copying disks",
    Phase.POSTCOPY_PAUSED: "postcopy interrupted",
}
#: Nova's words for what Phase tells in more detail (os-server-migrations, `status`)
NOVA_STATUS = {
    Phase.PREPARING: "preparing",
    Phase.STORAGE: "running",
    Phase.PRECOPY: "running",
    Phase.SWITCHOVER: "running",
    Phase.POSTCOPY: "running",
    Phase.POSTCOPY_PAUSED: "error",
    Phase.COMPLETED: "completed",
    Phase.FAILED: "failed",
    Phase.CANCELLED: "cancelled",
}


def resolve_mode(
    request: MigrationRequest,
    is_terminal: bool,
    *,
    quiet: bool = False,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Which way to show it. `is_terminal` is about standard error.

    --quiet, --json and --progress say it; --verbose is virsh's line; else the live view on a terminal that can move
    its cursor, and log lines everywhere else (files, CI, a dumb terminal).
    """
    environ = os.environ if environ is None else environ
    if quiet or "quiet" in request:
        return "none"
    if "json" in request:
        return "json"
    asked = request.text("progress")
    if asked != "auto":
        return asked
    if "verbose" in request:
        return "line"
    return "rich" if is_terminal and environ.get("TERM", "") not in ("", "dumb", "unknown") else "log"


def make_display(
    mode: str,
    *,
    stream_out: TextIO | None = None,
    stream_err: TextIO | None = None,
    is_terminal: bool | None = None,
    width: int | None = None,
    environ: Mapping[str, str] | None = None,
    wall_clock: Callable[[], datetime] | None = None,
) -> Display:
    """A display for one of MODES. Streams default to the process's own, `is_terminal` to what standard error is.

    `width` in columns overrides the terminal's. Raises ValueError for a mode that is none of MODES.
    """
    out = sys.stdout if stream_out is None else stream_out
    err = sys.stderr if stream_err is None else stream_err
    terminal = err.isatty() if is_terminal is None else is_terminal
    clock = wall_clock or (lambda: datetime.now().astimezone())
    match mode:
        case "rich":
            from virtmig.cli.display_rich import RichDisplay

            return RichDisplay(out, err, width=width, environ=os.environ if environ is None else environ)
        case "line":
            return LineDisplay(out, err, is_terminal=terminal)
        case "log":
            return LogDisplay(out, err, clock)
        case "json":
            return JsonDisplay(out, err, clock)
        case "none":
            return Display(out, err)
    raise ValueError(f"{mode!r} is not a way to show progress; one of {', '.join(MODES)}")


class MonotonePercent:
    """A percentage that never falls and is 99 at most until the end, as vdsm shows it.

    The true one falls at every pass and when memory joins disks that were being copied: while only disks are known,
    they are the first half.
    """

    def __init__(self) -> None:
        self.value = 0.0

    def update(self, progress: Progress) -> float:
        percent = progress.percent
        if percent is not None:
            if progress.phase is Phase.STORAGE and not progress.memory_total_bytes:
                percent /= 2
            self.value = max(self.value, min(percent, 99.0))
        return self.value

    def finish(self) -> float:
        self.value = 100.0
        return self.value


class Display:
    """Says nothing but errors; the other ways build on it. A context manager: the terminal is always given back.

    Call order: start, then any number of sample, decided and message, then finish once. `start` and `finish` may be
    missing, for a job that somebody else started.
    """

    shows_end = False

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out = out
        self.err = err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self, domain: str, source: str, destination: str, plan: Plan | Sequence[str] = ()) -> None:
        """`plan` is a Plan, or its lines for people."""

    def sample(self, progress: Progress, expected: Forecast | None = None) -> None:
        """One sample and what is expected at that moment."""

    def decided(self, decision: Decision) -> None:
        """What the policy decided; decisions that are not notable are not shown."""

    def message(self, text: str, level: str = "info") -> None:
        """`level` is info, warning or error."""
        if level == "error":
            self._say(_levelled(text, level))

    def refused(self, error: MigrationError) -> None:
        """It ended before it began. The error's words are the caller's to print; JSON needs its result line."""

    def finish(self, outcome: Outcome) -> None:
        """The end: the error and the hint if there are any, and the sentence that says where the guest runs."""
        if outcome.status not in WELL_ENDED:
            if outcome.error:
                self._say(_levelled(outcome.error, "error"))
            self._say(outcome.sentence)
            if outcome.hint:
                self._say(f"hint: {outcome.hint}")
        elif self.shows_end:
            self._say(outcome.sentence, self.out)

    def close(self) -> None:
        """Give the terminal back; may be called more than once."""

    def _say(self, text: str, stream: TextIO | None = None) -> None:
        # whoever read our progress may be gone (a closed pipe, a terminal that hung up): the migration goes on
        stream = self.err if stream is None else stream
        for place in dict.fromkeys((stream, self.err)):  # a full disk behind standard output must not hide the end
            with contextlib.suppress(OSError, ValueError):
                place.write(f"{text}\n")
                place.flush()
                return


class LineDisplay(Display):
    """virsh's own line, with two decimals: `Migration: [42.35 %]`.

    Since virsh got its decimals it ends each line with a newline where standard error is no terminal, and begins it
    with a carriage return where it is one; seen with virsh 12.8.
    """

    shows_end = True

    def __init__(self, out: TextIO, err: TextIO, *, is_terminal: bool) -> None:
        super().__init__(out, err)
        self.is_terminal = is_terminal
        self._open = False  # whether the cursor stands behind an unfinished line

    def sample(self, progress: Progress, expected: Forecast | None = None) -> None:
        if progress.total_bytes and progress.remaining_bytes is not None:
            done = progress.phase is Phase.COMPLETED and progress.remaining_bytes == 0
            self._print(virsh_percent(progress.remaining_bytes, progress.total_bytes, done=done))

    def decided(self, decision: Decision) -> None:
        if decision.notable:
            self._say(f"{decision.action.value}: {decision.reason}")

    def message(self, text: str, level: str = "info") -> None:
        self._say(_levelled(text, level))

    def finish(self, outcome: Outcome) -> None:
        if outcome.status is Status.COMPLETED:
            self._print("100.00")
            self._open = False  # the newline below ends it on a terminal
        self.close()
        # virsh ends every command that prints nothing with one newline on standard output
        with contextlib.suppress(OSError, ValueError):
            self.out.write("\n")
            self.out.flush()
        super().finish(outcome)

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(OSError, ValueError):
                self.err.write("\n")
                self.err.flush()

    def _print(self, percent: str) -> None:
        before, after = ("\r", "") if self.is_terminal else ("", "\n")
        with contextlib.suppress(OSError, ValueError):
            self.err.write(f"{before}Migration: [{percent} %]{after}")
            self.err.flush()
        self._open = self.is_terminal

    def _say(self, text: str, stream: TextIO | None = None) -> None:
        self.close()
        super()._say(text, stream)


def virsh_percent(remaining_bytes: int, total_bytes: int, *, done: bool) -> str:
    """The number in virsh's line: truncated to two decimals, at most 99.99 until it is done (virshPrintJobProgress)."""
    if done:
        return "100.00"
    percent = 100.0 - min(remaining_bytes, total_bytes) * 100.0 / total_bytes
    return f"{math.floor(min(percent, 99.99) * 100) / 100:5.2f}"


class LogDisplay(Display):
    """One dated line a second, in the manner of Proxmox's task log: for files and CI."""

    shows_end = True

    def __init__(self, out: TextIO, err: TextIO, clock: Callable[[], datetime]) -> None:
        super().__init__(out, err)
        self.clock = clock
        self._percent = MonotonePercent()
        self._last: tuple[Phase, float] | None = None

    def start(self, domain: str, source: str, destination: str, plan: Plan | Sequence[str] = ()) -> None:
        self._log(f"migrating {domain} from {source} to {destination}")
        for line in plan_summary(plan):
            self._log(f"plan: {line}")

    def sample(self, progress: Progress, expected: Forecast | None = None) -> None:
        percent = self._percent.update(progress)
        if self._last is not None:
            phase, elapsed_s = self._last
            if phase is progress.phase and progress.elapsed_s < elapsed_s + LOG_EVERY_S:
                return
        self._last = (progress.phase, progress.elapsed_s)
        self._log(log_text(progress, percent, expected))

    def decided(self, decision: Decision) -> None:
        if decision.notable:
            self._log(f"{decision.action.value}: {decision.reason}")

    def message(self, text: str, level: str = "info") -> None:
        self._log(_levelled(text, level))

    def finish(self, outcome: Outcome) -> None:
        self._log(summary_text(outcome))
        super().finish(outcome)

    def _log(self, text: str) -> None:
        self._say(f"{self.clock():%Y-%m-%d %H:%M:%S} {text}")


def log_text(progress: Progress, percent: float, expected: Forecast | None) -> str:
    parts = [phase_text(progress)]
    if progress.total_bytes and progress.remaining_bytes is not None:
        moved = max(progress.total_bytes - progress.remaining_bytes, 0)
        parts.append(f"{size_text(moved)} of {size_text(progress.total_bytes)} up to date ({percent:.1f} %)")
    rate = progress.disk_bytes_per_s if progress.phase is Phase.STORAGE else progress.memory_bytes_per_s
    if rate:
        parts.append(rate_text(rate))
    if progress.dirty_bytes_per_s:
        parts.append(f"guest writes {rate_text(progress.dirty_bytes_per_s)}")
    if progress.throttle_percent:
        parts.append(throttle_text(progress.throttle_percent))
    if progress.postcopy_requests:
        parts.append(f"{progress.postcopy_requests} pages asked for")
    if expected is not None and progress.phase not in (Phase.PREPARING, Phase.COMPLETED):
        parts.append(eta_text(expected))
    return ", ".join(part for part in parts if part)


def phase_text(progress: Progress) -> str:
    """`precopy pass 4`, `copying disks`, `switchover`."""
    text = PHASE_WORDS.get(progress.phase, progress.phase.value)
    return f"{text} pass {progress.full_passes + 1}" if progress.phase is Phase.PRECOPY else text


def throttle_text(throttle_percent: int) -> str:
    return f"the guest is being slowed: {throttle_percent} % of its CPU time is taken"


def eta_text(expected: Forecast) -> str:
    """`ETA 9 s to 14 s`, `ETA 9 s or more`, `not converging`, or nothing."""
    if expected.converging is False:
        return "not converging"
    if expected.eta_low_s is None:
        return ""
    low = duration_text(expected.eta_low_s)
    if expected.eta_high_s is None:
        return f"ETA {low} or more"
    high = duration_text(expected.eta_high_s)
    return f"ETA {low}" if low == high else f"ETA {low} to {high}"


def summary_text(outcome: Outcome) -> str:
    """`migration completed in 12 s, average speed 1.49 GiB/s, downtime 86 ms, 4 iterations`."""
    parts = [f"migration {outcome.status.value} in {duration_text(outcome.elapsed_s)}"]
    if outcome.status is Status.COMPLETED:
        if outcome.processed_bytes and outcome.elapsed_s > 0:
            parts.append(f"{size_text(outcome.processed_bytes)} sent")
            parts.append(f"average speed {rate_text(outcome.processed_bytes / outcome.elapsed_s)}")
        downtime_ms = outcome.downtime_ms if outcome.downtime_ms is not None else outcome.observed_downtime_ms
        if downtime_ms is not None:
            parts.append(f"downtime {downtime_ms} ms")
    return ", ".join(parts)


def plan_summary(plan: Plan | Sequence[str]) -> list[str]:
    """What is on and why, what was adjusted, what may go wrong: one line each. Lines of text pass through."""
    if not isinstance(plan, Plan):
        return list(plan)
    lines = [f"{choice.feature} on: {choice.reason}" for choice in plan.choices if choice.on]
    lines += [f"--{it.option} {it.planned} instead of {it.asked}: {it.reason}" for it in plan.adjustments]
    return lines + [f"warning: {caution.text}" for caution in plan.warnings]


class JsonDisplay(Display):
    """JSON lines: {"type": ..., "schema_version": 1, "time": ..., ...}; human text never mixes in.

    types: plan, started, progress, decision, message, result. `progress` has the fields of Progress (Nova's names
    for the byte counts), `status` in Nova's words beside `phase`, the percentage that never falls, and the forecast.
    `result` has the fields of Outcome and is the last line.
    """

    def __init__(self, out: TextIO, err: TextIO, clock: Callable[[], datetime]) -> None:
        super().__init__(out, err)
        self.clock = clock
        self._percent = MonotonePercent()

    def start(self, domain: str, source: str, destination: str, plan: Plan | Sequence[str] = ()) -> None:
        self._event("plan", plan=plan if isinstance(plan, Plan) else {"lines": plan_summary(plan)})
        self._event("started", domain=domain, source=source, destination=destination)

    def sample(self, progress: Progress, expected: Forecast | None = None) -> None:
        self._event(
            "progress",
            status=NOVA_STATUS[progress.phase],
            percent=round(self._percent.update(progress), 2),
            **msgspec.structs.asdict(progress),
            forecast=expected,
        )

    def decided(self, decision: Decision) -> None:
        if decision.notable:
            self._event("decision", action=decision.action, value=decision.value, reason=decision.reason)

    def message(self, text: str, level: str = "info") -> None:
        self._event("message", level=level, text=text)

    def refused(self, error: MigrationError) -> None:
        refused = isinstance(error, (PlanRefused, RequestError))
        details: dict[str, object] = {}
        if isinstance(error, PlanRefused):
            details["reasons"] = [dict(zip(("feature", "reason", "way_out"), r, strict=True)) for r in error.reasons]
        if isinstance(error, RequestError):
            details["problems"] = [dict(zip(("option", "message", "hint"), p, strict=True)) for p in error.problems]
        self._event(
            "result",
            status=Status.REFUSED if refused else Status.FAILED,
            guest=error.guest,
            error=error.message,
            hint=error.hint,
            **details,
        )

    def finish(self, outcome: Outcome) -> None:
        self._event("result", **msgspec.structs.asdict(outcome))

    def _event(self, type: str, **fields: object) -> None:
        time = self.clock().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = {"type": type, "schema_version": SCHEMA_VERSION, "time": time, **fields}
        self._say(msgspec.json.encode(event).decode(), self.out)


def _levelled(text: str, level: str) -> str:
    return text if level == "info" else f"{level}: {text}"
