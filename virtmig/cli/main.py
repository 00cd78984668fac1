"""`virtmig [globals] COMMAND ...`: start, dispatch, errors to standard error, exit status.

Every command is imported when it runs and not before, so that `virtmig --help` and completion stay quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from virtmig.cli.global_options import GlobalOptions, read_global_options
from virtmig.cli.grammar import VirshCommand
from virtmig.errors import MigrationError, PlanRefused, RequestError
from virtmig.verbs import GLOBAL_OPTIONS, VERB_BY_NAME, VERBS, GlobalOption, Verb

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["GlobalOptions", "main", "program", "run"]

#: --exit-codes fine: refused, nothing was started
EXIT_REFUSED = 3


class Program(click.Group):
    """The commands by name, each built or imported when it is asked for. `ctx.obj` is the GlobalOptions."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb.name for verb in VERBS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        verb = VERB_BY_NAME.get(name)
        if verb is None:
            return None
        if name == "lab":
            from virtmig.lab.cli import lab

            return lab
        return VirshCommand(verb, run_verb)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # getopt's optional_argument: a value behind `=` only, never the next word
        forms = {"--version=long": "-V", "--version=short": "-v"}
        return super().parse_args(ctx, [forms.get(word, word) for word in args[:1]] + args[1:])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        command = self.get_command(ctx, args[0])
        if command is not None:
            return args[0], command, args[1:]
        if ctx.resilient_parsing:
            ctx.meta["virtmig.unknown"] = True
            return None, None, args
        raise RequestError(f"unknown command: '{args[0]}'", hint=_near_command(args[0]))

    def invoke(self, ctx: click.Context) -> int:
        try:
            return int(super().invoke(ctx) or 0)
        except (click.ClickException, click.exceptions.Exit, click.Abort, OSError):
            raise
        except Exception as error:
            options = ctx.obj if isinstance(ctx.obj, GlobalOptions) else read_global_options({}, os.environ)
            return report(error, tracebacks=options.tracebacks)

    def get_help(self, ctx: click.Context) -> str:
        from virtmig.cli.manual import program_help

        return program_help()

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        if ctx.meta.get("virtmig.unknown"):
            return []
        if incomplete.startswith("-"):
            options = [(f"--{row.name}", row.help) for row in GLOBAL_OPTIONS]
            return [CompletionItem(name, help=text) for name, text in options if name.startswith(incomplete)]
        return [CompletionItem(verb.name, help=verb.help) for verb in VERBS if verb.name.startswith(incomplete)]


def _near_command(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, VERB_BY_NAME, n=1)
    return f"did you mean: virtmig {near[0]}?" if near else "see: virtmig help"


def _begin(**given: Any) -> None:
    """Before any command: the global options, and logging when it was asked for."""
    ctx = click.get_current_context()
    options = ctx.obj = read_global_options(given, os.environ)
    if options.log_file or options.debug < 4:
        start_logging(options)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _eager(text: Callable[[click.Context], str]) -> Callable[[click.Context, click.Parameter, bool], None]:
    def show(ctx: click.Context, _parameter: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            click.echo(text(ctx))
            ctx.exit(0)

    return show


def _complete_uri(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from virtmig.cli.completion import complete_uri

    return complete_uri(incomplete)


def _parameter(row: GlobalOption) -> click.Option:
    names = [row.name.replace("-", "_"), f"--{row.name}", *([f"-{row.short}"] if row.short else [])]
    if row.name == "connect":
        return click.Option(names, metavar=row.metavar, help=row.help, shell_complete=_complete_uri)
    if row.metavar:
        return click.Option(names, metavar=row.metavar, help=row.help)
    eager = {"help": lambda ctx: ctx.get_help(), "version": lambda _: installed_version("virtmig")}
    if row.name in eager:
        show = _eager(eager[row.name])
        return click.Option(names, is_flag=True, is_eager=True, expose_value=False, callback=show, help=row.help)
    return click.Option(names, is_flag=True, help=row.help)


_LONG_VERSION = click.Option(
    ["long_version", "-V"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_eager(lambda _: "\n".join(version_lines(None))),
)

program = Program(
    "virtmig",
    params=[*map(_parameter, GLOBAL_OPTIONS), _LONG_VERSION],
    callback=_begin,
    invoke_without_command=True,
    add_help_option=False,
)


def run_verb(verb: Verb, values: dict[str, object], ctx: click.Context) -> int:
    """Check the values against the verb's table and run it; RequestError and its like pass through."""
    options: GlobalOptions = ctx.obj
    begun = time.perf_counter()
    try:
        return _call(verb, values, options, ctx)
    except (RequestError, PlanRefused) as error:
        if values.get("exit-codes") == "fine":
            error.exit_status = EXIT_REFUSED
        raise
    finally:
        if options.timing:
            click.echo(f"\n(Time: {(time.perf_counter() - begun) * 1000:.3f} ms)\n")


def _call(verb: Verb, values: dict[str, object], options: GlobalOptions, ctx: click.Context) -> int:
    from virtmig.request import MigrationRequest, check_values

    if verb.name == "migrate":
        from virtmig.cli import commands

        return commands.run_migrate(MigrationRequest(values), options)  # type: ignore[arg-type]
    checked = check_values(verb.name, verb.options, values)
    if verb.name == "help":
        return _show_help(ctx, str(checked.get("command", "")), man=bool(checked.get("man")))
    if verb.name == "completion":
        from virtmig.cli.completion import completion_script

        click.echo(completion_script(str(checked["shell"]), program), nl=False)
        return 0
    if verb.name == "version":
        click.echo("\n".join(version_lines(options)))
        return 0
    if verb.name == "doctor":
        from virtmig.cli.doctor import run_doctor

        destination = checked.get("desturi")
        return run_doctor(options.connect, str(destination) if destination else None, bool(checked.get("json")))
    from virtmig.cli import commands

    return int(getattr(commands, "run_" + verb.name.replace("-", "_"))(checked, options))


def _show_help(ctx: click.Context, name: str, *, man: bool) -> int:
    root = ctx.find_root()
    if man:
        from virtmig.cli.manual import man_page

        click.echo(man_page(), nl=False)
    elif not name:
        click.echo(root.get_help())
    else:
        command = program.get_command(root, name)
        if command is None:
            raise RequestError(f"command or command group '{name}' doesn't exist", hint=_near_command(name))
        with click.Context(command, info_name=name, parent=root) as inner:
            click.echo(command.get_help(inner))
    return 0


def installed_version(distribution: str) -> str:
    """As the package's metadata has it; a source tree that was never installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


def version_lines(options: GlobalOptions | None) -> list[str]:
    """virtmig, its libvirt binding and Python; with `options` also what answers at the other end of --connect."""
    lines = [f"{name} {installed_version(name)}" for name in ("virtmig", "libvirt-python")]
    lines.append("Python " + ".".join(map(str, sys.version_info[:3])))
    if options is not None:
        from virtmig.errors import ConnectionFailed
        from virtmig.virt.connection import connected

        try:
            with connected(options.connect, readonly=True) as connection:
                lines.append(f"libvirt {_dotted(connection.getLibVersion())} at {connection.getURI()}")
                lines.append(f"hypervisor {connection.getType()} {_dotted(connection.getVersion())}")
        except ConnectionFailed as error:
            lines.append(f"no hypervisor: {error}")
    return lines


def _dotted(number: int) -> str:
    """libvirt's 1000000 * major + 1000 * minor + release."""
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


def start_logging(options: GlobalOptions) -> None:
    """To --log FILE, and to standard error when --debug asks for more than errors."""
    import logging

    level = (logging.DEBUG, logging.INFO, logging.INFO, logging.WARNING, logging.ERROR)[options.debug]
    log = logging.getLogger("virtmig")
    log.setLevel(min(level, logging.INFO) if options.log_file else level)
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handlers: list[logging.Handler] = []
    if options.debug < 4:
        handlers.append(logging.StreamHandler())
        handlers[0].setLevel(level)
    if options.log_file:
        try:
            handlers.append(logging.FileHandler(options.log_file))
        except OSError as error:
            raise RequestError(
                f"failed to open the log file '{options.log_file}': {error.strerror}", option="log"
            ) from None
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)


def report(error: Exception, *, tracebacks: bool = False) -> int:
    """`error:` lines, then `hint:` lines, on standard error; the exit status."""
    if tracebacks:
        import traceback

        traceback.print_exception(error)
    if not isinstance(error, MigrationError):
        _say("error", f"internal error: {type(error).__name__}: {error}")
        _say("hint", "run it again with --debug 0 before the command, and report what it prints")
        return 1
    found: Sequence[tuple[str, str, str]] = (("", error.message, error.hint),)
    if isinstance(error, RequestError):
        found = error.problems
    elif isinstance(error, PlanRefused) and error.reasons:
        found = error.reasons
    for text in dict.fromkeys(message for _, message, _ in found):
        _say("error", text)
    for text in dict.fromkeys(hint for _, _, hint in found if hint):
        _say("hint", text)
    return int(error.exit_status)


def _say(what: str, text: str) -> None:
    for line in text.splitlines() or [""]:
        click.echo(f"{what}: {line}", err=True)


def _report_click(error: click.ClickException) -> int:
    """click's own complaints: about the global options in virsh's words, about `lab` in click's."""
    ctx = getattr(error, "ctx", None)
    words = error.format_message().rstrip(".")
    hint = f"see: {ctx.command_path} --help" if ctx is not None else ""
    if ctx is None or ctx.command is program:
        name = getattr(error, "option_name", "") or ""
        row = next((row for row in GLOBAL_OPTIONS if name in (f"-{row.short}", f"--{row.name}")), None)
        if isinstance(error, click.NoSuchOption):
            words, hint = f"unsupported option '{name}'. See --help.", ""
        elif isinstance(error, click.BadOptionUsage) and row is not None and row.metavar:
            words, hint = f"option '-{row.short}'/'--{row.name}' requires an argument", ""
        elif isinstance(error, click.BadOptionUsage):
            words, hint = f"option {name} takes no value", ""
    _say("error", words)
    if hint:
        _say("hint", hint)
    return 1


def main(words: Sequence[str]) -> int:
    """Run one command line, without the program's name. Returns the exit status; raises SystemExit for completion."""
    if "_VIRTMIG_COMPLETE" in os.environ:
        import virtmig.cli.completion  # noqa: F401  (registers our bash with click)
    try:
        return int(program.main(list(words), prog_name="virtmig", standalone_mode=False) or 0)
    except click.Abort:
        _say("error", "interrupted")
        return 1
    except click.ClickException as error:
        return _report_click(error)
    except BrokenPipeError:
        return 1  # whoever read our output has gone
    except OSError as error:
        if not os.environ.get("VIRTMIG_DEBUG"):
            with contextlib.suppress(OSError):
                _say(
                    "error", f"cannot go on: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
                )
                return 1
        return report(error, tracebacks=True)


def run() -> None:
    """The `virtmig` command."""
    _open_standard_streams()
    status = main(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.exit(status)
    _say("error", "cannot write to standard output")
    os._exit(status or 1)  # the interpreter would try to flush once more, and complain in its own words


def _open_standard_streams() -> None:
    """A closed 0, 1 or 2 becomes /dev/null: otherwise the next socket takes that number, and our output goes there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    run()
