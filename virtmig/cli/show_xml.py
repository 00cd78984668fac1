"""What rules make of a guest's XML for another host: the changes and a unified diff, in colour on a terminal."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from virtmig.domain.rewriting import Rewritten, rewrite
from virtmig.domain.rules import Rules
from virtmig.rule_files import read_rules

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions

_CONTEXT_LINES = 3
_PASSWORD = re.compile(r"""(\bpasswd\s*=\s*)(["']).*?\2""")


def run_show_xml(values: dict[str, Any], options: GlobalOptions) -> int:
    """Exit status 0; DomainXmlError for a rule that would change what the guest sees."""
    from virtmig.virt.connection import connected, lookup_domain
    from virtmig.virt.verbs import hostname, migratable_xml

    given = [Path(part) for part in str(values.get("rules") or "").split(",") if part]
    rules = read_rules(given or None)
    with connected(options.connect, readonly=False) as connection:
        xml = migratable_xml(lookup_domain(connection, str(values["domain"])))
        source = hostname(connection)
    with connected(str(values["desturi"]), readonly=True) as connection:
        destination = hostname(connection)
    print_rewritten(xml, rules, source=source, destination=destination, domain=str(values["domain"]),
                    json=bool(values.get("json")))  # fmt: skip
    return 0


def print_rewritten(
    xml: str,
    rules: Rules,
    *,
    source: str,
    destination: str,
    domain: str,
    json: bool = False,
    stream: TextIO | None = None,
) -> Rewritten:
    """Rewrite and print what came of it; `domain` is the guest's name in the heading. Raises what rewrite raises.

    Passwords of VNC and SPICE are not shown to people; JSON has the whole text, for whoever passes it on to libvirt.
    """
    stream = stream or sys.stdout
    rewritten = rewrite(xml, rules, source=source, destination=destination)
    if json:
        stream.write(rewritten_json(rewritten) + "\n")
        return rewritten
    heading = f"{domain}: {source or '?'} -> {destination or '?'}: {_count(rewritten)}"
    names = (f"{domain} on {source or '?'}", f"{domain} on {destination or '?'}")
    lines = [_PASSWORD.sub(r"\1\2***\2", line) for line in diff_lines(xml, rewritten.xml, *names)]
    if stream.isatty():
        _print_rich(heading, rewritten, lines, stream)
    else:
        stream.write("\n".join([heading, *change_lines(rewritten), *([""] if lines else []), *lines]) + "\n")
    return rewritten


def rewritten_json(rewritten: Rewritten) -> str:
    """{"changed": bool, "changes": [{rule, path, before, after}], "xml": text} in one line."""
    return msgspec.json.encode(
        {"changed": bool(rewritten.changes), **msgspec.to_builtins(rewritten)}
    ).decode()  # fmt: skip


def change_lines(rewritten: Rewritten) -> list[str]:
    """One line a change: what, and by which rule of which file."""
    return [f"  {change}  [{change.rule}]" for change in rewritten.changes]


def diff_lines(before: str, after: str, before_name: str, after_name: str) -> Iterator[str]:
    """A unified diff that patch(1) takes; nothing when both are the same. No line has its line feed any more."""
    for line in difflib.unified_diff(
        _lines(before), _lines(after), before_name, after_name, lineterm="\n", n=_CONTEXT_LINES
    ):
        if line.endswith("\n"):
            yield line[:-1]
        else:
            yield line
            yield "\\ No newline at end of file"


def _lines(text: str) -> list[str]:
    """Split at line feeds alone: a form feed or U+2028 is no end of a line for XML or patch."""
    return [f"{line}\n" for line in text.split("\n")[:-1]] + [line for line in text.split("\n")[-1:] if line]


def _count(rewritten: Rewritten) -> str:
    if not rewritten.changes:
        return "no rule changes anything"
    return f"{len(rewritten.changes)} change" + ("s" if len(rewritten.changes) > 1 else "")


_STYLES = {"+": "green", "-": "red", "@": "cyan", "\\": "dim"}


def _print_rich(heading: str, rewritten: Rewritten, lines: Sequence[str], stream: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(
        file=stream,
        width=shutil.get_terminal_size((100, 24)).columns,
        highlight=False,
        no_color=bool(os.environ.get("NO_COLOR")) or None,
    )
    console.print(Text(_harmless(heading), style="bold green" if rewritten.changes else "bold"), soft_wrap=True)
    for change in rewritten.changes:
        line = Text(f"  {_harmless(str(change))}  ")
        line.append(_harmless(f"[{change.rule}]"), style="dim")
        console.print(line, soft_wrap=True)
    if lines:
        console.print()
    for number, text in enumerate(lines):
        style = "bold" if number < 2 else _STYLES.get(text[:1], "")
        console.print(Text(_harmless(text), style=style), soft_wrap=True)  # a line of XML is copied as one


def _harmless(text: str) -> str:
    """Characters that would steer the terminal, or turn the writing around, as their code."""
    return "".join(char if char.isprintable() or char == "\t" else f"\\u{ord(char):04x}" for char in text)
