"""virsh's grammar, over click: one line of words against one table of options.

The rules, as tools/vsh.c vshCommandParse has them:
- options and data may be mixed; `--opt value` and `--opt=value`; a boolean takes no `=`; names are never shortened;
- every positional row can also be given as data: data fill the rows in table order, skipping those already given;
- the value of an option is the next word whatever it looks like (`--dname --live` names a guest "--live");
- after `--` everything is data; a single dash begins no option, so `-c` after a command is data;
- nothing may be given twice, and an alias counts as its option;
- `--help` counts only on a line without mistakes.
`---x` and `--=x` are unknown options, as in virsh 12.8; virsh 9.0 took them for data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import click

from virtmig.errors import RequestError
from virtmig.options import Kind, Option
from virtmig.verbs import GLOBAL_OPTIONS, Verb

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Line:
    """One command line as read so far: `values` by option name (True or text), `open_rows` still to be filled."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.values: dict[str, object] = {}
        self.open_rows = [row for row in options if row.positional]
        self.asks_help = False
        self.data_only = False


def read_line(command: str, options: Sequence[Option], words: Iterable[str], *, tolerant: bool = False) -> Line:
    """Read the words after `command`. Raises RequestError in virsh's words at the first mistake.

    Values stay text: ranges and rules are the request's. `tolerant` reads on past mistakes, for completion.
    """
    line = Line(options)
    spellings = {spelling: row for row in options for spelling in (row.name, *row.aliases)}
    rest = iter(words)
    for word in rest:
        if line.data_only or not word.startswith("--"):
            if line.open_rows:
                line.values[line.open_rows.pop(0).name] = word
            elif not tolerant:
                raise RequestError(f"unexpected data '{word}'", hint=_data_hint(command, word, spellings))
            continue
        if word == "--":
            line.data_only = True
            continue
        name, equals, text = word[2:].partition("=")
        try:
            _read_option(command, line, spellings, name, text if equals else None, rest)
        except RequestError:
            if not tolerant:
                raise
    if not tolerant and not line.asks_help:
        _check_required(command, options, line, words)
    return line


def _read_option(
    command: str, line: Line, spellings: dict[str, Option], name: str, text: str | None, rest: Iterable[str]
) -> None:
    if name == "help":
        if text is not None:
            raise RequestError("invalid '=' after option --help", option="help")
        line.asks_help = True
        return
    row = spellings.get(name)
    if row is None:
        raise RequestError(
            f"command '{command}' doesn't support option --{name}",
            option=name,
            hint=_option_hint(command, name, spellings),
        )
    if row.name in line.values:
        raise RequestError(f"option --{row.name} already seen", option=row.name, hint="give it once")
    if row.kind is Kind.BOOL:
        if text is not None:
            raise RequestError(
                f"invalid '=' after option --{row.name}", option=row.name, hint=f"--{row.name} takes no value"
            )
        line.values[row.name] = True
        return
    value = text if text is not None else next(iter(rest), None)
    if value is None:
        raise RequestError(f"expected syntax: --{row.name} {row.metavar}", option=row.name)
    line.values[row.name] = value
    if row in line.open_rows:
        line.open_rows.remove(row)


def _check_required(command: str, options: Sequence[Option], line: Line, words: Iterable[str]) -> None:
    missing = [row.name for row in options if row.required and row.name not in line.values]
    if not missing:
        return
    from virtmig.request import combined

    dashed = next((word for word in words if word.startswith("-") and not word.startswith("--")), None)
    hint = f"'{dashed}' after a command is data; virtmig's own options go before it" if dashed else _usage(options)
    raise combined([(name, f"command '{command}' requires <{name}> option", hint) for name in missing])


def _usage(options: Sequence[Option]) -> str:
    return "the line begins: " + " ".join(f"<{row.name}>" for row in options if row.required)


def _option_hint(command: str, name: str, spellings: dict[str, Option]) -> str:
    if any(name == row.name for row in GLOBAL_OPTIONS):
        return f"--{name} goes before the command: virtmig --{name} ... {command}"
    from virtmig.request import near_option

    return near_option(command, name, spellings)


def _data_hint(command: str, word: str, spellings: dict[str, Option]) -> str:
    if word.startswith("-"):
        return "virtmig's own options go before the command"
    return f"did you mean --{word}?" if word in spellings else f"see: virtmig help {command}"


class VirshCommand(click.Command):
    """One verb: the table's rows as click parameters, virsh's grammar for the words, `run` for the values."""

    def __init__(self, verb: Verb, run: Callable[[Verb, dict[str, object], click.Context], int]) -> None:
        super().__init__(verb.name, help=verb.help, add_help_option=False)
        self.verb = verb
        self.run = run
        self.params = [_parameter(row) for row in verb.options]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        line = read_line(self.verb.name, self.verb.options, args, tolerant=ctx.resilient_parsing)
        if line.asks_help and not ctx.resilient_parsing:
            click.echo(self.get_help(ctx))
            ctx.exit(0)
        ctx.params = line.values
        ctx.meta[__name__] = line
        ctx.args = []
        return []

    def invoke(self, ctx: click.Context) -> int:
        return self.run(self.verb, dict(ctx.params), ctx)

    def get_help(self, ctx: click.Context) -> str:
        from virtmig.cli.manual import command_help

        return command_help(self.verb)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Values for the next free place, and option names; the value of a named option is asked of its parameter."""
        from click.shell_completion import CompletionItem

        line: Line = ctx.meta[__name__]
        found: list[CompletionItem] = []
        dashed = incomplete.startswith("-") and not line.data_only
        place = line.open_rows[0] if line.open_rows and not dashed else None
        if place is not None:
            found += _complete_value(place, ctx, incomplete)
        if dashed or (not incomplete and not line.data_only and (place is None or not place.required)):
            free = [(f"--{row.name}", row.help) for row in self.verb.options if row.name not in line.values]
            found += [CompletionItem(name, help=text) for name, text in free if name.startswith(incomplete)]
        return found


def _parameter(row: Option) -> click.Option:
    declarations = [row.field, *(f"--{spelling}" for spelling in (row.name, *row.aliases))]
    if row.kind is Kind.BOOL:
        return click.Option(declarations, is_flag=True, help=row.help)
    return click.Option(
        declarations,
        help=row.help,
        metavar=row.metavar,
        shell_complete=lambda ctx, _param, incomplete: _complete_value(row, ctx, incomplete),
    )


def _complete_value(row: Option, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    from virtmig.cli.completion import complete_value

    return complete_value(row, incomplete, connect=ctx.find_root().params.get("connect"))
