"""`virtmig-virsh`: called as virsh. Decides at once whose command it is: ours, or the next virsh's in PATH.

    virsh migrate ..., and its siblings (OURS)         virtmig.integrations.virsh_commands, imported only then
    every other command, the shell, every mistake      the real virsh, by exec: same process, terminal, signals, status

The words are read as virsh reads them (libvirt's tools/virsh.c virshParseArgv, tools/vsh.c vshCommandStringGetArg).
What is not understood here is left to the real virsh, which says what is wrong with it. Nothing heavy is imported
before the decision: a command that is passed on costs one start of Python.

    VIRTMIG_REAL_VIRSH        the real virsh, when the next one in PATH is not it
    VIRTMIG_MIGRATE_OPTIONS   options of virtmig migrate for every `migrate` that comes through here
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

OURS = frozenset(
    {
        "migrate",
        "migrate-setmaxdowntime",
        "migrate-getmaxdowntime",
        "migrate-setspeed",
        "migrate-getspeed",
        "migrate-compcache",
        "migrate-postcopy",
        "domjobinfo",
        "domjobabort",
    }
)

#: virsh's global options: long name, short letter, whether a value follows
GLOBALS = (
    ("connect", "c", True),
    ("debug", "d", True),
    ("escape", "e", True),
    ("help", "h", False),
    ("keepalive-interval", "k", True),
    ("keepalive-count", "K", True),
    ("log", "l", True),
    ("quiet", "q", False),
    ("readonly", "r", False),
    ("timing", "t", False),
    ("version", "v", False),
)
#: a shell's words for "found, but cannot be run" and "not found"
EXIT_CANNOT_RUN, EXIT_NOT_FOUND = 126, 127
#: how often one virsh may lead to another through scripts before it counts as a circle
DEEPEST = 8
DEPTH = "VIRTMIG_VIRSH_DEPTH"


class NotOurs(Exception):
    """The line is the real virsh's: another command, the shell, help, or a mistake that it reports itself."""


class NoRealVirsh(Exception):
    """There is no virsh to pass commands on to. `status` is the exit status a shell would give."""

    def __init__(self, message: str, hint: str, status: int = EXIT_NOT_FOUND) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


class Line:
    """One command line: `options` by long name (text or True) and `commands`, each a list of words."""

    def __init__(self, options: dict[str, str | bool], commands: list[list[str]]) -> None:
        self.options = options
        self.commands = commands


def read_line(words: Sequence[str]) -> Line:
    """The words behind the program's name. Raises NotOurs unless a command of OURS is among them."""
    options, rest = read_globals(words)
    if not rest:
        raise NotOurs("the interactive shell")
    commands = read_string(rest[0]) if len(rest) == 1 else [list(rest)]
    if not any(command[0] in OURS for command in commands):
        raise NotOurs("no command of ours")
    return Line(options, commands)


def read_globals(words: Sequence[str]) -> tuple[dict[str, str | bool], Sequence[str]]:
    """getopt_long with "+": up to the first word that is no option. Long names may be shortened while unique."""
    options: dict[str, str | bool] = {}
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            return options, words[at + 1 :]
        if word == "-" or not word.startswith("-"):
            break
        at += 1
        if word.startswith("--"):
            text, equals, value = word[2:].partition("=")
            name, takes_value = _long(text)
            if bool(equals) != takes_value:
                if equals or at == len(words):
                    raise NotOurs(word)
                value, at = words[at], at + 1
            options[name] = value if takes_value else True
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            name, takes_value = _short(letter)
            if not takes_value:
                options[name] = True
                continue
            if not letters:
                if at == len(words):
                    raise NotOurs(word)
                letters, at = words[at], at + 1
            options[name] = letters
            break
    return options, words[at:]


def _long(text: str) -> tuple[str, bool]:
    found = [row for row in GLOBALS if row[0] == text] or [row for row in GLOBALS if row[0].startswith(text)]
    if len(found) != 1 or found[0][0] in ("help", "version"):
        raise NotOurs(text)
    return found[0][0], found[0][2]


def _short(letter: str) -> tuple[str, bool]:
    for name, short, takes_value in GLOBALS:
        if short == letter and name not in ("help", "version"):
            return name, takes_value
    raise NotOurs(letter)


def read_string(text: str) -> list[list[str]]:
    """The commands of one string, each with its words; comments and empty commands leave nothing.

    As vshCommandStringGetArg: `;` and newlines separate, `'` and `"` quote, `\\` escapes outside `'`. A `'` that is
    never closed ends with the string; an open `"` and a `\\` at the end are mistakes: NotOurs.
    """
    commands: list[list[str]] = []
    words: list[str] = []
    at = 0
    while True:
        word, at, more = _next_word(text, at)
        if word is not None:
            words.append(word)
            continue
        if words and not words[0].startswith("#"):
            commands.append(words)
        words = []
        if not more:
            return commands


def _next_word(text: str, at: int) -> tuple[str | None, int, bool]:
    """(word, where it ends, True), or (None, where the next command begins, whether there is more)."""
    size = len(text)
    while at < size and (text[at] in " \t" or text.startswith("\\\n", at)):
        at += 2 if text[at] == "\\" else 1
    if at == size:
        return None, at, False
    if text[at] in ";\n":
        return None, at + 1, True
    if text[at] == "#":
        end = text.find("\n", at)
        return (None, size, False) if end < 0 else (None, end + 1, True)
    found: list[str] = []
    quote = ""
    while at < size:
        character = text[at]
        if not quote and character in " \t;\n":
            break
        at += 1
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
        elif character == "\\" and quote != "'":
            if at == size:
                raise NotOurs("dangling \\")
            if text[at] != "\n":
                found.append(text[at])
            at += 1
        else:
            found.append(character)
    if quote == '"':
        raise NotOurs('missing "')
    return "".join(found), at, True


# -- the real virsh --------------------------------------------------------------------------------------------------


def find_real_virsh(environment: Mapping[str, str], program: str) -> str:
    """VIRTMIG_REAL_VIRSH, or the first virsh in PATH that is not this program. Raises NoRealVirsh."""
    named = environment.get("VIRTMIG_REAL_VIRSH", "")
    if named:
        if not os.path.exists(named):
            raise NoRealVirsh(f"VIRTMIG_REAL_VIRSH: there is no '{named}'", "set it to the path of libvirt's virsh")
        if is_shim(named, program):
            raise NoRealVirsh(
                f"VIRTMIG_REAL_VIRSH: '{named}' is virtmig-virsh itself", "set it to the path of libvirt's virsh"
            )
        if not _can_run(named):
            raise NoRealVirsh(
                f"VIRTMIG_REAL_VIRSH: '{named}' cannot be run", "set it to the path of libvirt's virsh", EXIT_CANNOT_RUN
            )
        return named
    for folder in environment.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder or os.curdir, "virsh")
        if _can_run(path) and not is_shim(path, program):
            return path
    raise NoRealVirsh(
        "no virsh in PATH behind virtmig-virsh",
        "install libvirt's client (libvirt-clients, libvirt-client), or set VIRTMIG_REAL_VIRSH",
    )


def _can_run(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def is_shim(path: str, program: str) -> bool:
    """Whether `path` is this program, or a script (of another installation, a wrapper) that starts it."""
    try:
        if os.path.samefile(path, program):
            return True
    except OSError:
        pass  # started in a way that names no file: its text still tells
    try:
        with open(path, "rb") as file:
            beginning = file.read(2048)
    except OSError:
        return False
    return beginning.startswith(b"#!") and (b"virsh_shim" in beginning or b"virtmig-virsh" in beginning)


def passed_environment(environment: Mapping[str, str], real: str) -> dict[str, str]:
    """What the real virsh gets: ours without the LC_CTYPE that Python sets for itself in the C locale (PEP 538).

    A script may lead back to us without saying so; it gets a count of how often it has. Raises NoRealVirsh.
    """
    given = dict(environment)
    if given.get("LC_CTYPE", "") in ("C.UTF-8", "C.utf8", "UTF-8"):
        with open("/proc/self/environ", "rb") as file:
            if not any(row.startswith(b"LC_CTYPE=") for row in file.read().split(b"\0")):
                del given["LC_CTYPE"]
    counted = given.pop(DEPTH, "")
    depth = int(counted) if counted.isdecimal() else 0
    with open(real, "rb") as file:
        script = file.read(2) == b"#!"
    if script:
        if depth >= DEEPEST:
            raise NoRealVirsh(
                f"'{real}' leads back to virtmig-virsh", "set VIRTMIG_REAL_VIRSH to the path of libvirt's virsh"
            )
        given[DEPTH] = str(depth + 1)
    return given


def become_virsh(real: str, words: Sequence[str]) -> None:
    """Never returns. Python ignores two signals for itself; they are as usual again in the real virsh."""
    environment = passed_environment(os.environ, real)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(real, ["virsh", *words], environment)
    except OSError as error:
        raise cannot_run(real, error) from None


def cannot_run(real: str, error: OSError) -> NoRealVirsh:
    """The kernel refused to start it."""
    hint = "set VIRTMIG_REAL_VIRSH to the path of libvirt's virsh"
    return NoRealVirsh(f"cannot run '{real}': {error.strerror}", hint, EXIT_CANNOT_RUN)


def run() -> None:
    """The `virtmig-virsh` command."""
    words = sys.argv[1:]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before anything has begun ends us without a traceback
    try:
        try:
            line = read_line(words)
        except NotOurs:
            become_virsh(find_real_virsh(os.environ, sys.argv[0]), words)
            return
        from virtmig.integrations.virsh_commands import run_commands
        from virtmig.integrations.virsh_terminal import end

        end(run_commands(line, words, program=sys.argv[0]))
    except NoRealVirsh as error:
        sys.exit(_refuse(error))


def _refuse(error: NoRealVirsh) -> int:
    if sys.stderr is not None:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
    return error.status


if __name__ == "__main__":
    run()
