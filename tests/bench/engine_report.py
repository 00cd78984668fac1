"""What `./dev bench engine` makes of its samples: ratios by round, a table, and one HTML page with its own SVG."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Sample = dict[str, Any]
_DRAWS = 2000


@dataclass(frozen=True)
class Goal:
    """`figure` of item `over` divided by that of `under`, round by round; where less is better, `over` is the other
    one's. `least` None: told, not judged."""

    name: str
    over: str
    under: str
    figure: str
    least: float | None = None
    under_figure: str | None = None


@dataclass(frozen=True)
class Ratio:
    goal: Goal
    values: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """By the interval, not by the median; a few rounds are no interval."""
        least = self.goal.least
        if least is None:
            return ""
        if len(self.values) < 3:
            return "too few rounds"
        if self.low >= least:
            return "reached"
        return "missed" if self.high < least else "unclear"


def ratios(samples: Sequence[Sample], goals: Sequence[Goal]) -> list[Ratio]:
    """Of each round that has both; the rounds that were thrown away are not among `samples`."""
    found = []
    for goal in goals:
        over = _by_round(samples, goal.over, goal.figure)
        under = _by_round(samples, goal.under, goal.under_figure or goal.figure)
        values = tuple(over[number] / under[number] for number in sorted(over) if under.get(number))
        if values:
            low, high = interval(values)
            found.append(Ratio(goal, values, statistics.median(values), low, high))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """90 % of the medians of draws with replacement."""
    drawn = np.random.default_rng(1).choice(np.asarray(values, float), (_DRAWS, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (5, 95)).tolist()
    return low, high


def medians(samples: Sequence[Sample], item: str, figure: str) -> tuple[float, float, float] | None:
    """(median, least, most)"""
    values = list(_by_round(samples, item, figure).values())
    return (statistics.median(values), min(values), max(values)) if values else None


def _by_round(samples: Sequence[Sample], item: str, figure: str) -> dict[int, float]:
    return {
        sample["round"]: float(sample[figure])
        for sample in samples
        if sample["item"] == item and isinstance(sample.get(figure), int | float)
    }


# -- the table ---------------------------------------------------------------------------------------------------------

#: (heading, figure, format)
_MOVED = (
    ("GiB/s", "gib_per_s", ".2f"), ("GiB/CPU-s", "gib_per_cpu_s", ".2f"), ("source", "gib_per_cpu_s_source", ".2f"),
    ("dest.", "gib_per_cpu_s_destination", ".2f"), ("seconds", "seconds", ".3f"), ("down ms", "downtime_ms", ".1f"),
    ("gap ms", "largest_gap_ms", ".1f"), ("+MiB src", "grown_source_mib", ".1f"),
    ("+MiB dst", "grown_destination_mib", ".1f"),
)  # fmt: skip
_FAULTS = (
    ("faults/s", "faults_per_s", ".0f"), ("p50 us", "p50_us", ".0f"), ("p99 us", "p99_us", ".0f"),
    ("max us", "max_us", ".0f"), ("mean us", "mean_us", ".0f"), ("faults", "faults", ".0f"),
    ("seconds", "seconds", ".3f"),
)  # fmt: skip
_RESTORED = (("1st beat s", "first_beat_s", ".3f"), ("all s", "seconds", ".3f"))
Columns = Sequence[tuple[str, str, str]]
SECTIONS: tuple[tuple[str, str, Columns], ...] = (
    ("moved", "Memory moved (medians; GiB/s with least..most; +MiB is private memory beside the guest's RAM)", _MOVED),
    ("faults", "Fault latency in postcopy", _FAULTS),
    ("restored", "Restore until the guest's first heartbeat", _RESTORED),
)


Sections = Sequence[tuple[str, str, Columns]]


def table(
    samples: Sequence[Sample],
    limits: Sequence[dict[str, float]],
    found: Sequence[Ratio],
    sections: Sections = SECTIONS,
) -> str:
    lines: list[str] = []
    for kind, title, columns in sections:
        items = _items(samples, kind)
        if items:
            lines += [title, f"{'':34}{'n':>3}" + "".join(f"{heading:>11}" for heading, _, _ in columns)]
            lines += [_row(samples, item, columns) for item in items] + [""]
    if limits:
        lines.append("Limits of this machine, GiB/s, median of the rounds")
        for name in limits[-1]:
            values = [each[name] for each in limits if name in each]
            lines.append(f"  {name:32}{statistics.median(values):9.2f}   {min(values):.2f}..{max(values):.2f}")
        lines.append("")
    if found:
        lines.append(f"{'Ratios by round':54}{'n':>3}{'median':>9}{'90 % interval':>16}{'goal':>7}")
        for ratio in found:
            goal = f"{ratio.goal.least:.2f}" if ratio.goal.least is not None else ""
            lines.append(f"{ratio.goal.name:54}{len(ratio.values):3}{ratio.median:9.2f}"
                         f"{f'{ratio.low:.2f}..{ratio.high:.2f}':>16}{goal:>7}  {ratio.verdict}")  # fmt: skip
    return "\n".join(lines)


def _items(samples: Sequence[Sample], kind: str) -> list[str]:
    orders = {sample["item"]: sample["order"] for sample in samples if sample["kind"] == kind}
    return sorted(orders, key=orders.__getitem__)


def _row(samples: Sequence[Sample], item: str, columns: Columns) -> str:
    own = [sample for sample in samples if sample["item"] == item]
    text = f"{item:34}{len(own):3}"
    for _, figure, form in columns:
        found = medians(samples, item, figure)
        text += f"{format(found[0], form) if found else '':>11}"
    if len(own) > 1 and (found := medians(samples, item, columns[0][1])):
        text += f"  {format(found[1], columns[0][2])}..{format(found[2], columns[0][2])}"
    reason = next((sample["not_had"] for sample in own if sample.get("not_had")), "")
    return text + (f"  {reason}" if reason else "")


# -- the page ----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { --paper: #fff; --ink: #1c2330; --dim: #5d6675; --line: #d9dee6; --a: #1f77b4; --b: #c8641c; --good: #23803f;
        --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e6eaf0; --dim: #9aa4b2; --line: #333b48;
        --a: #6cb4ee; --b: #f0a35e; --good: #6bcf8a; --bad: #ff8a80; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } p, figcaption { color: var(--dim); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .dim { fill: var(--dim); } .a { fill: var(--a); } .b { fill: var(--b); } .line { stroke: var(--line); }
.ink { stroke: var(--ink); } .goal { stroke: var(--bad); stroke-dasharray: 3 3; }
pre { overflow-x: auto; font-size: 12px; border: 1px solid var(--line); padding: 0.7rem; }
"""
_ROW = 22
_LEFT, _WIDE, _RIGHT = 360, 480, 140


Charts = Sequence[tuple[str, str, str]]
#: (kind, figure, heading)
CHARTS: Charts = (
    ("moved", "gib_per_s", "Throughput, GiB/s"), ("moved", "gib_per_cpu_s", "GiB per CPU-second, both sides"),
    ("faults", "p99_us", "Fault latency p99, µs (less is better)"),
    ("restored", "first_beat_s", "Restore until the first heartbeat, s (less is better)"),
)  # fmt: skip


def page(
    title: str,
    notes: Sequence[str],
    samples: Sequence[Sample],
    found: Sequence[Ratio],
    text: str,
    charts: Charts = CHARTS,
) -> str:
    """Self-contained; readable on light and dark paper."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    if found:
        parts += [
            "<h2>Ratios by round: median and 90 % interval</h2>",
            "<p>To the right is better for virtmig; the dashed line is the goal.</p>",
            _ratio_chart(found),
        ]
    for kind, figure, heading in charts:
        rows = [(item, bar) for item in _items(samples, kind) if (bar := medians(samples, item, figure))]
        if rows:
            parts += [f"<h2>{html.escape(heading)}</h2>", _bar_chart(rows)]
    parts += ["<h2>All of it</h2>", f"<pre>{html.escape(text)}</pre>"]
    head = "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=color-scheme content='light dark'>"
    return f"{head}<title>{html.escape(title)}</title><style>{_STYLE}</style>\n" + "\n".join(parts) + "</html>\n"


def _bar_chart(rows: Sequence[tuple[str, tuple[float, float, float]]]) -> str:
    """A bar to the median, a whisker from the least to the most."""
    most = max(bar[2] for _, bar in rows) or 1.0
    lines = [_svg(len(rows))]
    for number, (name, (median, low, high)) in enumerate(rows):
        y = number * _ROW
        colour = "b" if "QEMU > QEMU" in name or name.startswith("QEMU") else "a"
        lines.append(
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect class="{colour}" x="{_LEFT}" y="{y + 4}" width="{median / most * _WIDE:.1f}" height="14" rx="2"/>'
            + _whisker(_LEFT + low / most * _WIDE, _LEFT + high / most * _WIDE, y + 11)
            + f'<text x="{_LEFT + _WIDE + 8}" y="{y + 15}">{_short(median)}</text>'
        )
    return "".join(lines) + "</svg>"


def _ratio_chart(found: Sequence[Ratio]) -> str:
    """On a logarithmic scale: twice and half are as far from 1."""
    ends = [value for ratio in found for value in (ratio.low, ratio.high, ratio.goal.least or 1.0) if value > 0]
    low, high = np.log(min([*ends, 0.5])), np.log(max([*ends, 2.0]))

    def x(value: float) -> float:
        return _LEFT + float((np.log(max(value, 1e-9)) - low) / (high - low)) * _WIDE

    bottom = len(found) * _ROW
    lines = [_svg(len(found) + 1), f'<line class="line" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="0" y2="{bottom}"/>']
    for number, ratio in enumerate(found):
        y = number * _ROW
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{html.escape(ratio.goal.name)}</text>')
        if ratio.goal.least is not None:
            goal = x(ratio.goal.least)
            lines.append(f'<line class="goal" x1="{goal:.1f}" x2="{goal:.1f}" y1="{y + 2}" y2="{y + 20}"/>')
        lines.append(
            _whisker(x(ratio.low), x(ratio.high), y + 11)
            + f'<circle class="a" cx="{x(ratio.median):.1f}" cy="{y + 11}" r="5"/>'
            f'<text x="{_LEFT + _WIDE + 8}" y="{y + 15}">{_short(ratio.median)} {html.escape(ratio.verdict)}</text>'
        )
    lines.append(f'<text class="dim" x="{x(1):.1f}" y="{len(found) * _ROW + 15}" text-anchor="middle">1</text>')
    return "".join(lines) + "</svg>"


def _svg(rows: int) -> str:
    return f'<svg viewBox="0 0 {_LEFT + _WIDE + _RIGHT} {rows * _ROW + 4}" role="img">'


def _whisker(start: float, end: float, y: float) -> str:
    return (
        f'<line class="ink" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>'
        f'<line class="ink" x1="{start:.1f}" x2="{start:.1f}" y1="{y - 3}" y2="{y + 3}"/>'
        f'<line class="ink" x1="{end:.1f}" x2="{end:.1f}" y1="{y - 3}" y2="{y + 3}"/>'
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
