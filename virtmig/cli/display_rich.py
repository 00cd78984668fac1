"""The live view: a panel on a terminal, plain rows below 60 columns, ASCII without UTF-8, no colour with NO_COLOR."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from virtmig.agreement import Plan
from virtmig.cli.display import (
    WELL_ENDED,
    Display,
    MonotonePercent,
    eta_text,
    phase_text,
    plan_summary,
    summary_text,
    throttle_text,
)
from virtmig.forecast import Forecast
from virtmig.policy import Decision
from virtmig.progress import Outcome, Phase, Progress, Status
from virtmig.quantities import clock_text, rate_text, size_text

NARROW_COLUMNS = 60
#: drawing more often than this costs CPU time that the migration needs
DRAW_EVERY_S = 0.2
SPARK_COLUMNS = 24
BAR_COLUMNS = 36
SPARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARKS = "_.-=+*#@"


def sparkline(values: Sequence[float], columns: int, glyphs: str = SPARKS) -> str:
    """The last `columns` values as bars between zero and their highest."""
    recent = list(values)[-columns:]
    highest = max(recent, default=0)
    if highest <= 0:
        return glyphs[0] * len(recent)
    return "".join(glyphs[min(int(max(value, 0) / highest * len(glyphs)), len(glyphs) - 1)] for value in recent)


def bar(percent: float, columns: int, *, ascii_only: bool) -> Text:
    full, rest = ("#", "-") if ascii_only else ("━", "╌")
    done = int(columns * min(max(percent, 0.0), 100.0) / 100)
    return Text(full * done, style="green").append(rest * (columns - done), style="dim")


class LastingConsole(Console):
    """A console that goes quiet when its terminal has gone; rich's own ends the process, and with it our watching."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class RichDisplay(Display):
    """A live panel on standard error. Messages and decisions scroll by above it."""

    shows_end = True

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        *,
        width: int | None = None,
        environ: Mapping[str, str] = os.environ,
        console: Console | None = None,
    ) -> None:
        super().__init__(out, err)
        self.console = console or LastingConsole(
            file=err,
            width=width,
            no_color=bool(environ.get("NO_COLOR")) or None,
            force_terminal=True,
            highlight=False,
            emoji=False,
        )
        encoding = getattr(err, "encoding", None) or "utf-8"
        self.ascii_only = not encoding.lower().replace("-", "").startswith("utf")
        self._names: tuple[str, str, str] | None = None
        self._percent = MonotonePercent()
        self._sent: deque[float] = deque(maxlen=120)
        self._dirty: deque[float] = deque(maxlen=120)
        self._drawn: tuple[Phase, float] | None = None
        self._progress: Progress | None = None
        self._expected: Forecast | None = None
        self._decision = ""
        self._outcome: Outcome | None = None
        self._live: Live | None = None

    # -- events ----------------------------------------------------------------------------------------------------

    def start(self, domain: str, source: str, destination: str, plan: Plan | Sequence[str] = ()) -> None:
        self._names = (domain, source, destination)
        for line in plan_summary(plan):
            self._print(Text(f"plan: {line}", style="dim"))

    def sample(self, progress: Progress, expected: Forecast | None = None) -> None:
        self._percent.update(progress)
        self._progress, self._expected = progress, expected
        if progress.memory_bytes_per_s is not None or progress.disk_bytes_per_s is not None:
            self._sent.append((progress.memory_bytes_per_s or 0) + (progress.disk_bytes_per_s or 0))
        if progress.dirty_bytes_per_s is not None:
            self._dirty.append(progress.dirty_bytes_per_s)
        due = self._drawn is None or (
            progress.phase is not self._drawn[0] or progress.elapsed_s >= self._drawn[1] + DRAW_EVERY_S
        )
        if due:
            self._drawn = (progress.phase, progress.elapsed_s)
            self._draw()

    def decided(self, decision: Decision) -> None:
        if decision.notable:
            self._decision = f"{decision.action.value}: {decision.reason}"
            self._print(Text(self._decision, style="bold"))
            self._draw()

    def message(self, text: str, level: str = "info") -> None:
        style = {"warning": "yellow", "error": "bold red"}.get(level, "")
        self._print(Text(text if level == "info" else f"{level}: {text}", style=style))

    def finish(self, outcome: Outcome) -> None:
        self._outcome = outcome
        if outcome.status is Status.COMPLETED:
            self._percent.finish()
        if self._progress is not None:
            self._draw()
        self.close()
        if outcome.status in WELL_ENDED:
            self._print(Text(summary_text(outcome), style="dim"))
        super().finish(outcome)

    def close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    # -- drawing ---------------------------------------------------------------------------------------------------

    def _print(self, text: Text) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.console.print(self._safe(text), soft_wrap=True)

    def _safe(self, text: Text) -> Text:
        if not self.ascii_only:
            return text
        return Text(text.plain.encode("ascii", "replace").decode(), style=text.style)

    def _draw(self) -> None:
        if self._progress is None:
            return
        # a terminal that has gone away must not end the migration
        with contextlib.suppress(OSError, ValueError):
            self._show(self.view())

    def _show(self, view: RenderableType) -> None:
        if self._live is None:
            # no refresh thread and no redirected streams: nothing happens between two samples
            self._live = Live(
                view,
                console=self.console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)
        else:
            self._live.update(view, refresh=True)

    def view(self) -> RenderableType:
        """What is drawn now."""
        if self.console.width < NARROW_COLUMNS:
            return self._narrow()
        return self._panel()

    def _title(self) -> str:
        progress = self._progress
        assert progress is not None
        parts = []
        if self._names is not None:
            domain, source, destination = self._names
            parts += [domain, f"{source} {'->' if self.ascii_only else '→'} {destination}"]
        parts.append(self._outcome.status.value if self._outcome else phase_text(progress))
        parts.append(clock_text(self._outcome.elapsed_s if self._outcome else progress.elapsed_s))
        return "  ".join(parts)

    def _panel(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, style="dim", width=10)
        table.add_column(ratio=1, overflow="fold")
        for label, value in self._rows():
            table.add_row(label, self._safe(value) if self.ascii_only else value)
        return Panel(
            table,
            title=self._safe(Text(self._title())),
            subtitle=self._safe(Text(self._footer(), style="dim")),
            box=box.ASCII if self.ascii_only else box.ROUNDED,
            width=min(self.console.width, 110),
        )

    def _narrow(self) -> RenderableType:
        lines = [Text(self._title(), style="bold")]
        lines += [Text(f"{label} ").append_text(value) for label, value in self._rows(narrow=True)]
        lines = [self._safe(line) for line in lines]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
            if self.ascii_only:
                line.overflow = "crop"
        return Group(*lines)

    def _rows(self, *, narrow: bool = False) -> list[tuple[str, Text]]:
        progress, expected = self._progress, self._expected
        assert progress is not None
        over = self._outcome is not None
        rows = [("progress", self._progress_row(progress, narrow=narrow))]
        if progress.phase is Phase.PREPARING and not over:
            return rows
        if not over:
            rows += [("remaining", Text(self._remaining(progress)))] if progress.total_bytes else []
        if self._sent:
            rows.append(("sent", self._rate_row(self._sent, narrow=narrow)))
        if self._dirty and progress.phase is not Phase.STORAGE:
            rows.append(("dirtied", self._rate_row(self._dirty, narrow=narrow)))
        rows += [
            (f"channel {number}", Text(rate_text(rate)))
            for number, rate in enumerate(progress.channel_bytes_per_s)
            if not narrow
        ]
        if progress.throttle_percent:
            rows.append(("throttle", Text(throttle_text(progress.throttle_percent), style="yellow")))
        if progress.phase is Phase.POSTCOPY and progress.postcopy_requests is not None:
            rows.append(("faults", Text(f"the guest had to ask for {progress.postcopy_requests} pages")))
        if over or expected is None:
            return rows + self._decision_rows()
        style = {True: "green", False: "yellow", None: ""}[expected.converging]
        rows.append(("forecast", Text(expected.sentence, style=style)))
        if expected.downtime_limit_ms is not None and progress.phase is Phase.PRECOPY:
            downtime = f"{expected.downtime_ms} ms" if expected.downtime_ms is not None else "not known yet"
            rows.append(("downtime", Text(f"expected {downtime}, limit {expected.downtime_limit_ms} ms")))
        return rows + self._decision_rows()

    def _decision_rows(self) -> list[tuple[str, Text]]:
        return [("decided", Text(self._decision, style="bold"))] if self._decision else []

    def _progress_row(self, progress: Progress, *, narrow: bool) -> Text:
        if progress.phase is Phase.PREPARING and self._outcome is None:
            return Text("the destination is being prepared; the guest runs on")
        percent = self._percent.value
        # rounding up would show 100.0 before the end
        shown = f"{int(percent * 10) / 10:5.1f} %"
        text = bar(percent, 12 if narrow else BAR_COLUMNS, ascii_only=self.ascii_only).append(f" {shown}", style="bold")
        eta = eta_text(self._expected) if self._expected is not None and self._outcome is None else ""
        if eta:
            text.append(f"  {eta}", style="yellow" if eta == "not converging" else "cyan")
        return text

    def _remaining(self, progress: Progress) -> str:
        text = f"{size_text(progress.remaining_bytes or 0)} of {size_text(progress.total_bytes or 0)}"
        if progress.phase is Phase.PRECOPY:
            text += f", pass {progress.full_passes + 1}"
            if progress.iteration is not None:
                text += f" (iteration {progress.iteration})"
        return text

    def _rate_row(self, values: Sequence[float], *, narrow: bool) -> Text:
        glyphs = ASCII_SPARKS if self.ascii_only else SPARKS
        line = "" if narrow else sparkline(values, SPARK_COLUMNS, glyphs).rjust(SPARK_COLUMNS) + "  "
        return Text(f"{line}{rate_text(values[-1])} (peak {rate_text(max(values))})")

    def _footer(self) -> str:
        progress = self._progress
        ended = progress is None or progress.phase in (Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED)
        if progress is None or ended or self._outcome is not None:
            return ""
        if progress.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
            return "Ctrl-C detaches, the migration goes on"
        source = self._names[1] if self._names else "the source"
        return f"Ctrl-C aborts, the guest stays on {source}"
