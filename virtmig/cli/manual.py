"""--help, `virtmig help COMMAND` and the man page virtmig(1), all made from the tables. Examples come first."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from virtmig.options import Kind, Option
from virtmig.verbs import ENVIRONMENT, EXIT_STATUS, GLOBAL_OPTIONS, VERB_BY_NAME, VERBS, GlobalOption, Verb

ONE_LINE = "live migration with a handshake: virsh migrate's options, checked and planned on both hosts"

DESCRIPTION = (
    "virtmig migrates libvirt guests. It takes the options of virsh migrate with virsh's meaning, finds out what "
    "both hosts can do, refuses what cannot work before anything starts, watches the migration, and says at the "
    "end where the guest runs."
)

#: titles for Option.group; virsh's own rows have none
GROUP_TITLES = {
    "channels": "virtmig's options: channels",
    "plan": "virtmig's options: the plan",
    "policy": "virtmig's options: what to do on the way",
    "output": "virtmig's options: output",
}


def facts(row: Option) -> str:
    """What a row says beside its help: unit and range, choices, default, since, other spellings."""
    said = []
    if row.kind is Kind.NUMBER:
        said.append(f"{row.unit + ', ' if row.unit else ''}{row.minimum} to {row.maximum}")
    if row.power_of_two:
        said.append("a power of two")
    if row.choices and row.kind is Kind.LIST:
        said.append("of " + ", ".join(row.choices))
    if row.default:
        said.append(f"default {row.default}")
    if row.since:
        said.append(f"libvirt {row.since // 1_000_000}.{row.since // 1_000 % 1_000} or newer")
    if row.aliases:
        said.append("also " + ", ".join(f"--{alias}" for alias in row.aliases))
    return "; ".join(said)


def sentence(row: Option) -> str:
    told = facts(row)
    return f"{row.help} ({told})" if told else row.help


def heading(row: Option) -> str:
    """`--live`, `--bandwidth <number>`, and `[--domain] <string>` for what every line must have."""
    if row.kind is Kind.BOOL:
        return f"--{row.name}"
    metavar = "<" + "|".join(row.choices) + ">" if row.kind is Kind.CHOICE else row.metavar
    return f"[--{row.name}] {metavar}" if row.required else f"--{row.name} {metavar}"


def option_groups(verb: Verb) -> list[tuple[str, list[Option]]]:
    """The verb's rows under their titles, virsh's own first."""
    groups: dict[str, list[Option]] = {}
    for row in verb.options:
        title = GROUP_TITLES.get(row.group, "virtmig's options") if row.ours else "Options"
        if not row.ours and verb.name == "migrate":
            title = "virsh's options"
        groups.setdefault(title, []).append(row)
    return list(groups.items())


def usage(verb: Verb) -> str:
    words = ["virtmig", verb.name]
    words += [f"<{row.name}>" if row.required else f"[{row.name}]" for row in verb.options if _in_usage(verb, row)]
    return " ".join([*words, *(["[options]"] if any(not row.required for row in verb.options) else [])])


def _in_usage(verb: Verb, row: Option) -> bool:
    return row.required or (row.positional and verb.name in ("doctor", "help"))


def _option_term(row: GlobalOption) -> str:
    short = f"-{row.short}, " if row.short else ""
    return f"{short}--{row.name}" + (f" {row.metavar}" if row.metavar else "")


def _width() -> int:
    return max(min(shutil.get_terminal_size((100, 24)).columns, 120), 60)


def _table(pairs: Iterable[tuple[str, str]], *, column: int = 28) -> list[str]:
    """Two columns; a term that is too long has its text on the next line."""
    lines = []
    for term, text in pairs:
        body = textwrap.wrap(text, _width() - column, break_on_hyphens=False) or [""]
        if len(term) + 4 > column:
            lines.append(f"  {term}")
        else:
            lines.append(f"  {term:<{column - 2}}{body.pop(0)}".rstrip())
        lines += [" " * column + line for line in body]
    return lines


def _examples(examples: Sequence[tuple[str, str]]) -> list[str]:
    return [text for line, what in examples for text in (f"  {line}", f"      {what}")]


def program_help() -> str:
    """`virtmig --help` and `virtmig help`."""
    shown = [*VERB_BY_NAME["migrate"].examples[:3], *VERB_BY_NAME["doctor"].examples]
    lines = [f"virtmig - {ONE_LINE}", "", "Usage: virtmig [global options] <command> [args...]", ""]
    lines += ["Examples", *_examples(shown), ""]
    lines += ["Commands", *_table((verb.name, verb.help) for verb in VERBS), ""]
    lines += ["Global options", *_table((_option_term(row), row.help) for row in GLOBAL_OPTIONS), ""]
    lines += ["Every option of a command: virtmig help <command>"]
    return "\n".join(lines)


def command_help(verb: Verb) -> str:
    """`virtmig VERB --help` and `virtmig help VERB`."""
    lines = [f"virtmig {verb.name} - {verb.help}", "", f"Usage: {usage(verb)}", ""]
    if verb.examples:
        lines += ["Examples", *_examples(verb.examples), ""]
    if verb.description:
        lines += [*textwrap.wrap(verb.description, _width()), ""]
    for title, rows in option_groups(verb):
        lines += [title, *_table((heading(row), sentence(row)) for row in rows), ""]
    if verb.name == "migrate":
        data = [f"<{row.name}>" for row in verb.options if row.positional]
        lines += ["These can also be given without their name, in this order"]
        lines += ["  " + line for line in textwrap.wrap(" ".join(data), _width() - 2, break_on_hyphens=False)]
        lines += ["", "Exit status", *_table(EXIT_STATUS, column=8), ""]
    return "\n".join(lines).rstrip()


def roff(text: str) -> str:
    """Text that troff prints as it stands: its escapes and the control characters at the start of a line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in escaped.split("\n"))


def _terms(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, text in pairs for line in (".TP", f".B {_quoted(term)}", roff(text))]


def _quoted(term: str) -> str:
    return '"' + roff(term).replace('"', "\\(dq") + '"'


def man_page() -> str:
    """virtmig(1) in the man macros; `virtmig help --man | man -l -` shows it."""
    lines = [
        '.TH VIRTMIG 1 "" virtmig "User Commands"',
        ".SH NAME",
        f"virtmig \\- {roff(ONE_LINE)}",
        ".SH SYNOPSIS",
        ".B virtmig",
        roff("[global options] <command> [args...]"),
        ".SH EXAMPLES",
    ]
    for verb in VERBS:
        for example, what in verb.examples:
            said = roff(what[0].upper() + what[1:])
            lines += [".PP", f"{said}:", ".PP", ".nf", ".RS 4", roff(example), ".RE", ".fi"]
    lines += [".SH DESCRIPTION", roff(DESCRIPTION)]
    lines += [".SH GLOBAL OPTIONS", "They go before the command."]
    lines += _terms((_option_term(row), row.help) for row in GLOBAL_OPTIONS)
    lines += [".SH COMMANDS"]
    for verb in VERBS:
        lines += [f".SS {_quoted(usage(verb).removeprefix('virtmig '))}", roff(verb.description or verb.help)]
        if verb.name == "lab":
            lines += [".PP", roff("See: virtmig lab --help")]
        if verb.name != "migrate":
            lines += _terms((heading(row), sentence(row)) for row in verb.options)
    for title, rows in option_groups(VERB_BY_NAME["migrate"]):
        lines += [f".SH {_quoted('MIGRATE: ' + title.upper())}"]
        if title == "virsh's options":
            data = " ".join(f"<{row.name}>" for row in rows if row.positional)
            lines += [roff(f"Without their names, in this order: {data}.")]
        lines += _terms((heading(row), sentence(row)) for row in rows)
    lines += [".SH EXIT STATUS", *_terms(EXIT_STATUS)]
    lines += [".SH ENVIRONMENT", *_terms(ENVIRONMENT)]
    lines += [".SH SEE ALSO", ".BR virsh (1),", ".BR libvirtd (8)"]
    return "\n".join(lines) + "\n"
