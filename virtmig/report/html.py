"""One offline HTML file of a record: summary, phases, charts, features and reasons, changes of the XML, log.

It needs no network and no JavaScript: the charts are SVG, which uPlot replaces by its own where scripts may run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import msgspec

from virtmig.progress import Phase, Progress
from virtmig.quantities import duration_text, size_text
from virtmig.report.explain import explain, log_lines
from virtmig.report.records import Record

_ASSETS = Path(__file__).parent / "assets"
#: more points than a screen has columns say nothing more
_MOST_POINTS = 1200
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 180, 56, 22
_MIB = 1 << 20

PHASE_WORDS = {
    Phase.PREPARING: "preparing",
    Phase.STORAGE: "storage",
    Phase.PRECOPY: "precopy",
    Phase.SWITCHOVER: "switchover",
    Phase.POSTCOPY: "postcopy",
    Phase.POSTCOPY_PAUSED: "postcopy, broken off",
    Phase.COMPLETED: "completed",
    Phase.FAILED: "failed",
    Phase.CANCELLED: "cancelled",
}


class Series(msgspec.Struct, frozen=True):
    label: str
    values: tuple[float | None, ...]


class Chart(msgspec.Struct, frozen=True):
    """`seconds` and each series have the same length; `unit` is that of the values."""

    title: str
    unit: str
    seconds: tuple[float, ...]
    series: tuple[Series, ...]


def report_html(record: Record) -> str:
    """The whole file as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    charts = charts_of(record)
    data = msgspec.json.encode(charts).decode().replace("<", "\\u003c")
    began, outcome = record.began, record.outcome
    return environment.get_template("report.html.j2").render(
        record=record,
        began=began,
        outcome=outcome,
        when=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(began.time)),
        facts=_facts(record),
        told=explain(record),
        log=list(log_lines(record)),
        phases=phases_of(record),
        agreed=record.agreed,
        charts=[(chart, markupsafe.Markup(svg(chart))) for chart in charts],
        data=markupsafe.Markup(data),
        script=markupsafe.Markup((_ASSETS / "uPlot.iife.min.js").read_text(encoding="utf-8")),
        style=markupsafe.Markup((_ASSETS / "uPlot.min.css").read_text(encoding="utf-8")),
        asked=[(f"--{name}", "" if value is True else str(value)) for name, value in began.request.items()],
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    outcome = record.outcome
    rows = [("from", record.began.source), ("to", record.began.destination), ("status", record.status)]
    if outcome is not None:
        rows.append(("the guest is", str(outcome.guest)))
        rows.append(("took", duration_text(outcome.elapsed_s)))
        if outcome.downtime_ms is not None:
            seen = f", {outcome.observed_downtime_ms} ms seen" if outcome.observed_downtime_ms is not None else ""
            rows.append(("downtime", f"{outcome.downtime_ms} ms by QEMU's count{seen}"))
    if record.sent_bytes:
        rows.append(("sent", size_text(record.sent_bytes)))
    rows.append(("record", record.id))
    return rows


def phases_of(record: Record) -> list[tuple[str, float, float]]:
    """(phase, from second, to second), neighbours of one phase joined."""
    found: list[tuple[str, float, float]] = []
    for row in record.samples:
        name = PHASE_WORDS[row.progress.phase]
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], row.at_s)
        else:
            begin = row.at_s
            if found:
                found[-1] = (*found[-1][:2], begin)
            found.append((name, begin, begin))
    if found and record.rows:
        found[-1] = (*found[-1][:2], max(found[-1][2], record.rows[-1].at_s))
    return found


def charts_of(record: Record) -> list[Chart]:
    """Those that have anything to show."""
    samples = record.samples
    step = max(1, -(-len(samples) // _MOST_POINTS))
    samples = samples[::step]
    seconds = tuple(row.at_s for row in samples)

    def series(label: str, value: Callable[[Progress], float | None], scale: float = 1.0) -> Series:
        values = [value(row.progress) for row in samples]
        return Series(label, tuple(None if each is None else round(each / scale, 3) for each in values))

    channels = max((len(row.progress.channel_bytes_per_s) for row in samples), default=0)

    def channel(number: int) -> Callable[[Progress], float | None]:
        return lambda progress: (
            progress.channel_bytes_per_s[number] if number < len(progress.channel_bytes_per_s) else None
        )

    drawn = [
        Chart("remaining memory", "MiB", seconds, (series("remaining", lambda p: p.memory_remaining_bytes, _MIB),)),
        Chart(
            "rates", "MiB/s", seconds,
            (series("sent", lambda p: p.memory_bytes_per_s, _MIB),
             series("guest writes", lambda p: p.dirty_bytes_per_s, _MIB)),
        ),
        Chart(
            "channels, both ways", "MiB/s", seconds,
            tuple(series(_channel_name(record, number, channels), channel(number), _MIB) for number in range(channels)),
        ),
        Chart("CPU time taken from the guest", "%", seconds, (series("throttle", lambda p: p.throttle_percent),)),
        Chart("pages asked for in postcopy", "", seconds, (series("requests", lambda p: p.postcopy_requests),)),
    ]  # fmt: skip
    return [shown for chart in drawn if (shown := _with_something(chart)) is not None]


def _channel_name(record: Record, number: int, of: int) -> str:
    agreed = record.agreed
    return str(agreed.channels[number]) if agreed is not None and len(agreed.channels) == of else f"channel {number}"


def _with_something(chart: Chart) -> Chart | None:
    kept = tuple(row for row in chart.series if any(row.values))
    return msgspec.structs.replace(chart, series=kept) if kept and len(chart.seconds) > 1 else None


def svg(chart: Chart) -> str:
    """The same as a picture: axes with their ends, a line for each series, gaps where nothing is known."""
    begin, end = chart.seconds[0], chart.seconds[-1]
    top = max(value for row in chart.series for value in row.values if value is not None) or 1.0
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8

    def point(second: float, value: float) -> str:
        across = (second - begin) / ((end - begin) or 1.0)
        return f"{_LEFT + across * width:.1f},{8 + (1 - value / top) * height:.1f}"

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{markupsafe.escape(chart.title)}">',
        f'<path class="axis" d="M{_LEFT},8 V{8 + height} H{_WIDTH - 8}"/>',
        f'<text x="{_LEFT - 6}" y="14" text-anchor="end">{_number(top)}</text>',
        f'<text x="{_LEFT - 6}" y="{8 + height}" text-anchor="end">0</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{_number(begin)} s</text>',
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 4}" text-anchor="end">{_number(end)} s</text>',
    ]
    for number, row in enumerate(chart.series):
        for run in _runs(chart.seconds, row.values):
            points = " ".join(point(second, value) for second, value in run)
            parts.append(f'<polyline class="s{number % 8}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def _runs(seconds: Sequence[float], values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for second, value in zip(seconds, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((second, value))
    return [run for run in runs if run]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def write_report(record: Record, path: Path) -> None:
    """The whole file or none. What is no file (a device, a pipe) is written to, not replaced. Raises OSError."""
    text = report_html(record)
    if path.parts[:2] in (("/", "dev"), ("/", "proc")) or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()  # what a link leads to is the report's place, and the link stays
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.rename(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def summary(record: Record) -> dict[str, Any]:
    """What a program may want beside the file."""
    return {"id": record.id, "status": record.status, "outcome": record.outcome, "phases": phases_of(record)}
