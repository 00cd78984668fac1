"""virsh's migrate and its siblings as virsh runs them, by virtmig: virsh's words, output and exit status.

A line is all or nothing: a mistake anywhere in it, and no command of it runs (vsh.c vshCommandParse). Commands of a
string run in order, whatever became of the one before; the last one's status is the line's (vshCommandRun), and each
ends with an empty line on standard output unless --quiet was given. Commands that are not ours run in a real virsh in
between; what they leave behind for the next ones, a `connect` or a `quit`, is kept here.

Unlike virsh: INT, TERM and HUP abort the migration safely also without a terminal, and a failure says where the guest
is.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

import msgspec

from virtmig.cli.global_options import GlobalOptions, read_global_options
from virtmig.cli.grammar import read_line
from virtmig.cli.signals import stop_on_signals
from virtmig.errors import ConnectionFailed, MigrationError, RequestError
from virtmig.integrations.virsh_shim import (
    OURS,
    Line,
    NoRealVirsh,
    become_virsh,
    cannot_run,
    find_real_virsh,
    passed_environment,
)
from virtmig.integrations.virsh_terminal import (
    VirshDisplay,
    complain,
    error_lines,
    interrupt_from_terminal,
    open_standard_streams,
    progress_form,
    write,
)
from virtmig.options import BY_NAME, OPTIONS, VIRSH_OPTIONS, Kind, Option
from virtmig.progress import Status
from virtmig.request import MigrationRequest, Value, check_values
from virtmig.verbs import VERB_BY_NAME

#: options of migrate for every migration that comes through here
OPTIONS_VARIABLE = "VIRTMIG_MIGRATE_OPTIONS"
#: what that variable cannot change: which guest and where to, and what virsh's caller reads of the output
_NOT_FOR_ALL = frozenset({"domain", "desturi", "plan", "progress", "json", "quiet", "verbose", "exit-codes", "report"})
#: the options of virsh's own connect
_CONNECT_ROWS = (
    Option(name="name", kind=Kind.STRING, help="", positional=True),
    Option(name="readonly", kind=Kind.BOOL, help=""),
)
#: cannot be a command: the real virsh stumbles over it once everything before it has been read
_STOP_READING = "virtmig-read-no-further"


class State:
    """What one command leaves for the next: the connection, and the status so far."""

    def __init__(self, line: Line, real: str | None) -> None:
        """Raises RequestError for a global option that cannot be."""
        self.given = dict(line.options)
        self.options = read_global_options(
            {name.replace("-", "_"): value for name, value in line.options.items()}, os.environ
        )
        self.real = real
        self.single = len(line.commands) == 1
        self.status = 0

    def connect(self, uri: str | None, *, readonly: bool) -> None:
        """After `connect [URI] [--readonly]` (virshReconnect): another URI forgets --readonly, the same keeps it."""
        if uri is not None:
            self.given["connect"] = uri
            self.given.pop("readonly", None)
        if readonly:
            self.given["readonly"] = True
        self.options = msgspec.structs.replace(
            self.options, connect=uri or self.options.connect, readonly="readonly" in self.given
        )

    def words(self) -> list[str]:
        """The global options for a real virsh."""
        return [
            word
            for name, value in self.given.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ]


class Reading:
    """Our commands of a line: `values` by place, up to the first mistake; a command that asks for help has none."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self.values: dict[int, dict[str, object]] = {}
        self.asks_help = False
        self.mistake: RequestError | None = None
        self.end = len(commands)  # what lies behind the mistake was not read
        for index, (name, *words) in enumerate(commands):
            if name not in OURS:
                continue
            rows = VIRSH_OPTIONS if name == "migrate" else VERB_BY_NAME[name].options
            try:
                found = read_line(name, rows, words)
            except RequestError as error:
                self.mistake, self.end = _pointing_at_the_variable(error), index + 1
                return
            if found.asks_help:
                self.asks_help = True
            else:
                self.values[index] = found.values


def run_commands(line: Line, words: Sequence[str], *, program: str) -> int:
    """Everything on the line; the exit status, negative for the signal that this process is to die of.

    `words` are the line as it was given, for a real virsh. Raises NoRealVirsh when it is needed and cannot be had.
    """
    open_standard_streams()
    commands = line.commands
    reading = Reading(commands)
    needs_real = reading.asks_help or any(command[0] not in OURS for command in commands)
    try:
        real: str | None = find_real_virsh(os.environ, program)
    except NoRealVirsh:
        if needs_real:
            raise
        real = None
    if real is not None and reading.asks_help and len(commands) == 1:
        become_virsh(real, words)
    try:
        state = State(line, real)
        _start_logging(state.options)
    except RequestError as error:
        if real is not None:
            become_virsh(real, words)  # it says what is wrong with its own option, and does nothing
        complain(error_lines(error))
        return 1
    if _complain_of_mistakes(commands, reading, real):
        return 1
    if "connect" in line.options and len(commands) > 1 and not _can_connect(state.options):
        return 1
    return _run_in_order(commands, reading.values, state)


def _start_logging(options: GlobalOptions) -> None:
    if options.log_file or options.debug < 4:
        from virtmig.cli.main import start_logging

        start_logging(options)


def _complain_of_mistakes(commands: Sequence[Sequence[str]], reading: Reading, real: str | None) -> bool:
    """The first mistake on the line, in the real virsh's words where there is one; whether there was any."""
    unread = [commands[index] for index in range(reading.end) if index not in reading.values]
    said = _complaint(real, unread) if real is not None and unread else ""
    mistake = reading.mistake
    if mistake is None:
        complain(said)
        return bool(said)
    complain(said or error_lines(mistake))
    if said and mistake.hint:
        complain(f"hint: {mistake.hint}\n")
    return True


def _pointing_at_the_variable(error: RequestError) -> RequestError:
    if error.option in BY_NAME and BY_NAME[error.option].ours and "doesn't support option" in error.message:
        return RequestError(
            error.message,
            option=error.option,
            hint=f"virtmig's own options go into the environment: {OPTIONS_VARIABLE}=--{error.option}",
        )
    return RequestError(error.message, option=error.option)  # virsh's words alone, as virsh has them


def _complaint(real: str, commands: Sequence[Sequence[str]]) -> str:
    """What the real virsh says about these words, without running any: it stumbles at the end, if not before."""
    text = "; ".join(" ".join(_quoted(word) for word in command) for command in [*commands, [_STOP_READING]])
    environment = {name: value for name, value in passed_environment(os.environ, real).items() if name != "VIRSH_DEBUG"}
    with _can_be_run(real):
        done = subprocess.run(
            ["virsh", text],
            executable=real,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
        )
    return "" if _STOP_READING in done.stderr else done.stderr


@contextlib.contextmanager
def _can_be_run(real: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_run(real, error) from None


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _can_connect(options: GlobalOptions) -> bool:
    """virsh opens the connection of -c before anything else (virshInit), and ends there if it cannot."""
    from virtmig.virt.connection import connected

    try:
        with connected(options.connect, readonly=options.readonly):
            return True
    except ConnectionFailed as error:
        complain(error_lines(error, connecting=True))
        return False


# -- one command after the other ------------------------------------------------------------------------------------


def _run_in_order(commands: Sequence[list[str]], read: Mapping[int, dict[str, object]], state: State) -> int:
    index = 0
    while index < len(commands):
        if index in read:
            state.status = _run_ours(commands[index][0], read[index], state)
            if state.status < 0:
                return state.status
            index += 1
            continue
        group = _group(commands, read, index)
        state.status = _run_real(group, state)
        if state.status < 0 or group[-1][0] in ("quit", "exit"):
            return state.status
        if group[0][0] == "connect" and state.status == 0:
            _keep_connection(group[0][1:], state)
        index += len(group)
    return state.status


def _group(commands: Sequence[list[str]], read: Mapping[int, dict[str, object]], first: int) -> list[list[str]]:
    """Commands that one real virsh can run: up to one of ours, and up to what changes the commands behind it."""
    group = [commands[first]]
    if group[0][0] == "connect":
        return group
    for index in range(first + 1, len(commands)):
        if index in read or commands[index][0] == "connect" or group[-1][0] in ("quit", "exit"):
            break
        group.append(commands[index])
    return group


def _keep_connection(words: Sequence[str], state: State) -> None:
    values = read_line("connect", _CONNECT_ROWS, words).values
    state.connect(str(values["name"]) if "name" in values else None, readonly="readonly" in values)


def _run_real(group: Sequence[Sequence[str]], state: State) -> int:
    """A real virsh for these commands, on our terminal; signals sent to us are sent on. Its status, or -signal."""
    assert state.real is not None
    text = "; ".join(" ".join(_quoted(word) for word in command) for command in group)
    started: list[subprocess.Popen[bytes]] = []

    def send_on(number: int, _frame: FrameType | None) -> None:
        for child in started:
            child.send_signal(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, send_on)
    try:
        with _can_be_run(state.real):
            started.append(
                subprocess.Popen(
                    ["virsh", *state.words(), text],
                    executable=state.real,
                    env=passed_environment(os.environ, state.real),
                )
            )
        return started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_ours(name: str, values: dict[str, object], state: State) -> int:
    options = state.options
    begun = time.perf_counter()
    try:
        status = _migrate(values, options) if name == "migrate" else _sibling(name, values, options)
    except MigrationError as error:
        named = state.single and "connect" in state.given
        if isinstance(error, RequestError) and named and not _can_connect(options):
            return 1  # what virsh would have said first
        unreachable = isinstance(error, ConnectionFailed) and error.uri == (options.connect or "")
        complain(error_lines(error, connecting=unreachable))
        if unreachable and named:
            return 1  # virsh ends before the first command: no empty line
        status = 1
    except Exception as error:
        from virtmig.cli.main import report

        status = report(error, tracebacks=options.tracebacks)
    if status < 0:
        return status
    if options.timing:
        write(f"\n(Time: {(time.perf_counter() - begun) * 1000:.3f} ms)\n\n")
    elif not options.quiet:
        write("\n")
    return status


def _sibling(name: str, values: dict[str, object], options: GlobalOptions) -> int:
    from virtmig.cli import commands

    checked = check_values(name, VERB_BY_NAME[name].options, values)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return int(getattr(commands, "run_" + name.replace("-", "_"))(checked, options))
    finally:
        # virtmig's own commands of these names end as virsh's line does, with the empty line that comes here anyway
        text = printed.getvalue()
        write(text.removesuffix("\n") if name in ("domjobinfo", "migrate-compcache") else text)


def _migrate(values: dict[str, object], options: GlobalOptions) -> int:
    from virtmig.attempts import StopRequest
    from virtmig.migrate import migrate
    from virtmig.virt.connection import set_default_keepalive

    set_default_keepalive(options.keepalive_interval_s, options.keepalive_count)
    display = VirshDisplay(
        sys.stdout, sys.stderr, shows_progress="verbose" in values, form=progress_form(sys.stderr.isatty())
    )
    asked = {name: value for name, value in values.items() if name != "verbose"}
    stop = StopRequest()
    not_heard = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a shell's background job
    with stop_on_signals(stop), interrupt_from_terminal(stop):
        if not_heard:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        request = _request(asked)
        if options.readonly:
            raise MigrationError("operation forbidden: read only access prevents virDomainMigrate3")
        outcome = migrate(request, source_uri=options.connect, watcher=display, stop=stop)
    if outcome.status is Status.COMPLETED:
        return 0
    asked_by = stop.requests[-1][1] if stop.requests else ""
    if outcome.status is Status.ABORTED and asked_by in ("SIGTERM", "SIGHUP"):
        return -int(signal.Signals[asked_by])
    return 1


def _request(values: Mapping[str, object]) -> MigrationRequest:
    """The line's options over the environment's. Raises RequestError naming the variable for mistakes in it.

    virsh tries once; its callers count on that, and repeat by themselves.
    """
    general = read_options_variable(os.environ.get(OPTIONS_VARIABLE, ""))
    return MigrationRequest({"retries": 0, **general, **values})  # type: ignore[dict-item]


def read_options_variable(text: str) -> dict[str, Value]:
    """VIRTMIG_MIGRATE_OPTIONS: options of virtmig migrate, quoted as in a shell. RequestError names the variable."""
    rows: list[Option] = [
        msgspec.structs.replace(row, positional=False, required=False)
        for row in OPTIONS
        if row.name not in _NOT_FOR_ALL
    ]
    try:
        found = read_line("migrate", rows, shlex.split(text))
        return check_values("migrate", rows, found.values)
    except RequestError as error:
        words, hint = error.message, error.hint
        if error.option in _NOT_FOR_ALL:
            words, hint = f"--{error.option} cannot be given for all migrations", "leave it out"
    except ValueError as error:
        words, hint = str(error), 'for example "--transport relay --fence"'
    raise RequestError(f"{OPTIONS_VARIABLE}: {words}", option=OPTIONS_VARIABLE, hint=hint)
