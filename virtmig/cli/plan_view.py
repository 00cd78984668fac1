"""A plan on paper: for people (a table on a terminal, plain lines elsewhere) and as JSON."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

import msgspec

from virtmig.agreement import Channel, Plan
from virtmig.obstacles import Caution


def plan_json(plan: Plan) -> str:
    """The whole plan in one line of JSON, with `refused` said outright."""
    found = msgspec.to_builtins(plan)
    return msgspec.json.encode({"refused": plan.refused, **found}).decode()


def print_plan(plan: Plan, connect: str = "", stream: TextIO | None = None) -> None:
    """`connect` is what the person gave with -c; the virsh line then says the same."""
    stream = stream or sys.stdout
    if stream.isatty():
        _print_rich(plan, connect, stream)
    else:
        stream.write("\n".join(plan_lines(plan, connect)) + "\n")


def plan_lines(plan: Plan, connect: str = "") -> list[str]:
    """Plain text, one thought a line: stable enough to grep."""
    width = max((len(choice.feature) for choice in plan.choices), default=0)
    lines = [_title(plan), f"transport: {plan.transport} ({plan.transport_reason})", *_channel_lines(plan)]
    lines.append("")
    for choice in plan.choices:
        evidence = f"  [{choice.evidence}]" if choice.evidence else ""
        lines.append(f"  {choice.feature:<{width}}  {_word(choice.on):<4}  {choice.reason}{evidence}")
    for heading, paragraphs in _sections(plan):
        lines += ["", f"{heading}:", *(f"  {paragraph}" for paragraph in paragraphs)]
    return [*lines, "", *_virsh_lines(plan, connect)]


def _title(plan: Plan) -> str:
    verdict = "REFUSED" if plan.refused else "can be done"
    return f"{plan.domain}: {plan.source} -> {plan.destination}: {verdict}"


def _word(on: bool | None) -> str:
    return {True: "on", False: "off", None: "auto"}[on]


def _channel_lines(plan: Plan) -> list[str]:
    if not plan.channels:
        return ["channels: none"]
    return ["channels: " + ", ".join(_channel(channel) for channel in plan.channels)]


def _channel(channel: Channel) -> str:
    count = f" x {channel.count}" if channel.role == "parallel" or channel.count > 1 else ""
    note = f" ({channel.note})" if channel.note else ""
    return f"{channel.role}{count}{note}"


def _caution(item: Caution) -> str:
    return f"{item.feature}: {item.text}" + (f" -> {item.way_out}" if item.way_out else "")


def _sections(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    sections = (
        ("refused", [f"{item.feature}: {item.reason} -> {item.way_out}" for item in plan.refusals]),
        ("adjusted", [f"--{item.option} {item.asked} -> {item.planned}: {item.reason}" for item in plan.adjustments]),
        ("warnings", [_caution(item) for item in plan.warnings]),
        ("suggested", [f"{item.option}: {item.reason}" for item in plan.suggestions]),
        ("good to know", [_caution(item) for item in plan.notes]),
    )
    return ((heading, found) for heading, found in sections if found)


def _virsh_lines(plan: Plan, connect: str) -> list[str]:
    line = plan.request.virsh_line(connect) if connect else plan.virsh_line
    lines = ["the same with virsh:", f"  {line}"]
    if plan.beyond_virsh:
        lines.append(f"  (virsh has no words for: {', '.join(plan.beyond_virsh)})")
    return lines


def _print_rich(plan: Plan, connect: str, stream: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=stream, width=shutil.get_terminal_size((100, 24)).columns, highlight=False)
    color = "red" if plan.refused else "green"
    console.print(f"[bold {color}]{escape(_title(plan))}[/]")
    console.print(escape(f"transport: {plan.transport} ({plan.transport_reason})"))
    console.print(escape("\n".join(_channel_lines(plan))))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, ratio in (("feature", None), ("", None), ("why", 3), ("evidence", 2)):
        table.add_column(heading, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for choice in plan.choices:
        style = {True: "green", False: "dim", None: "yellow"}[choice.on]
        table.add_row(
            escape(choice.feature),
            f"[{style}]{_word(choice.on)}[/]",
            escape(choice.reason),
            escape(choice.evidence),
        )
    console.print(table)
    colors = {"refused": "red", "adjusted": "yellow", "warnings": "yellow"}
    for heading, paragraphs in _sections(plan):
        console.print(f"\n[bold {colors.get(heading, 'default')}]{heading}[/]")
        for paragraph in paragraphs:
            wrapped = textwrap.fill(
                paragraph,
                console.width,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
            console.print(escape(wrapped))
    console.print()
    for line in _virsh_lines(plan, connect):
        console.print(escape(line), soft_wrap=True)  # a command is copied as one line
