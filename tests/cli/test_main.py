"""The command line: virsh's grammar and words (the real virsh is asked too), globals, dispatch, errors, start-up."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmig.cli import commands
from virtmig.cli.grammar import read_line
from virtmig.cli.main import GlobalOptions, main
from virtmig.errors import GuestDoubled, MigrationError, PlanRefused, RequestError
from virtmig.request import MigrationRequest
from virtmig.verbs import GLOBAL_OPTIONS, VERB_BY_NAME, VERBS

ROOT = Path(__file__).parents[2]
ENTRY = [sys.executable, "-c", "from virtmig.cli.main import run; run()"]

virsh_needed = pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIRTMIG_DEBUG", "VIRTMIG_LOG_FILE", "VIRSH_DEFAULT_CONNECT_URI", "NO_COLOR", "_VIRTMIG_COMPLETE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object, GlobalOptions]]:
    """What reached the commands: (verb, request or values, global options)."""
    calls: list[tuple[str, object, GlobalOptions]] = []
    for verb in VERBS:
        name = "run_" + verb.name.replace("-", "_")
        if hasattr(commands, name):

            def record(what: object, options: GlobalOptions, verb_name: str = verb.name) -> int:
                calls.append((verb_name, what, options))
                return 0

            monkeypatch.setattr(commands, name, record)
    return calls


def errors_of(text: str) -> list[str]:
    return re.findall(r"^error: (.*)$", text, re.MULTILINE)


# --- virsh's words: each line is refused before any connection, by virsh and by us -----------------------------------

REFUSED_LINES = {
    "migrate": ["command 'migrate' requires <domain> option", "command 'migrate' requires <desturi> option"],
    "migrate test": ["command 'migrate' requires <desturi> option"],
    "migrate --desturi x": ["command 'migrate' requires <domain> option"],
    "migrate test x --x": ["command 'migrate' doesn't support option --x"],
    "migrate test x --liv": ["command 'migrate' doesn't support option --liv"],
    "migrate test x --x=1": ["command 'migrate' doesn't support option --x"],
    "migrate test x --live=yes": ["invalid '=' after option --live"],
    "migrate test x --tunneled=1": ["invalid '=' after option --tunnelled"],
    "migrate test x --live --live": ["option --live already seen"],
    "migrate test x --tunnelled --tunneled": ["option --tunnelled already seen"],
    "migrate test x --bandwidth 1 --bandwidth 2": ["option --bandwidth already seen"],
    "migrate test x --desturi y": ["option --desturi already seen"],
    "migrate x --domain test": ["option --domain already seen"],
    "migrate test x tcp:a --migrateuri tcp:b": ["option --migrateuri already seen"],
    "migrate test x --bandwidth": ["expected syntax: --bandwidth <number>"],
    "migrate test x --dname": ["expected syntax: --dname <string>"],
    "migrate test x --bogus --help": ["command 'migrate' doesn't support option --bogus"],
    "migrate --help --bogus": ["command 'migrate' doesn't support option --bogus"],
    "migrate a b c d e f 1 g h 2 i j 3 4 5 6 7 8 k 9 10 11 l more": ["unexpected data 'more'"],
    "domjobinfo": ["command 'domjobinfo' requires <domain> option"],
    "domjobinfo test extra": ["unexpected data 'extra'"],
    "domjobinfo test --raw": ["command 'domjobinfo' doesn't support option --raw"],
    "domjobinfo -- --rawstats extra": ["unexpected data 'extra'"],
    "domjobabort --postcopy": ["command 'domjobabort' requires <domain> option"],
    "migrate-compcache test 4096": ["unexpected data '4096'"],
    "migrate-compcache test --size": ["expected syntax: --size <number>"],
    "migrate-setmaxdowntime --downtime 5": ["command 'migrate-setmaxdowntime' requires <domain> option"],
    "migrate-setmaxdowntime test": ["command 'migrate-setmaxdowntime' requires <downtime> option"],
    "migrate-setspeed test": ["command 'migrate-setspeed' requires <bandwidth> option"],
    "frob": ["unknown command: 'frob'"],
    "frob --help": ["unknown command: 'frob'"],
    "help frob": ["command or command group 'frob' doesn't exist"],
    "--frob": ["unsupported option '--frob'. See --help."],
    "-z": ["unsupported option '-z'. See --help."],
    "-c": ["option '-c'/'--connect' requires an argument"],
    "--connect": ["option '-c'/'--connect' requires an argument"],
    "-d": ["option '-d'/'--debug' requires an argument"],
    "-K": ["option '-K'/'--keepalive-count' requires an argument"],
    "-d x domjobinfo": ["option -d takes a numeric argument"],
    "-k x domjobinfo": ["Invalid value for option -k"],
    "-K -1 domjobinfo": ["option -K requires a positive integer argument"],
    "-d 9 domjobinfo": [
        "ignoring debug level 9 out of range [0-4]",
        "command 'domjobinfo' requires <domain> option",
    ],
}


@pytest.mark.parametrize("line", REFUSED_LINES)
def test_refused_lines(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 1
    out, err = capsys.readouterr()
    assert errors_of(err) == REFUSED_LINES[line]
    assert out == ""
    assert "Traceback" not in err


def virsh(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["virsh", *words],
        capture_output=True,
        text=True,
        timeout=20,
        env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        check=False,
    )


@virsh_needed
@pytest.mark.parametrize("line", REFUSED_LINES)
def test_virsh_says_the_same(line: str) -> None:
    """virsh since 10.x reports only the first missing option; 9.0 writes <number> rows as --downtime there."""
    done = virsh(*shlex.split(line))
    said = [re.sub(r"requires --([a-z-]+) option", r"requires <\1> option", each) for each in errors_of(done.stderr)]
    assert done.returncode == 1
    if "unexpected data 'more'" in REFUSED_LINES[line]:  # fewer rows take data since 10.x
        assert said[0].startswith("unexpected data")
    else:
        assert said == REFUSED_LINES[line][: len(said)]
        assert said


#: lines without a mistake: how virsh reads them is in its trace (virsh -d 1), whatever the command would do then
READ_LINES = [
    "migrate test x",
    "migrate test x --live --p2p",
    "migrate --live test --bandwidth=10 x --verbose",
    "migrate --desturi y test z",
    "migrate test x --migrateuri tcp:b graphics listen name",
    "migrate test x --dname --live",
    "migrate test x --dname=--live",
    "migrate test x --dname=a=b",
    "migrate test x --dname=",
    "migrate test x --dname --",
    "migrate test x -l",
    "migrate test x - -",
    "migrate test x --p2p --tunneled",
    "migrate test '' --timeout 5",
    "migrate test x --xml f --dname n u g l",
    "domjobinfo --rawstats test",
    "domjobabort test --postcopy",
    "migrate-setmaxdowntime --downtime 5 test",
    "migrate-setspeed test 10 --postcopy",
    "migrate-compcache test --size=4096",
]


@virsh_needed
@pytest.mark.parametrize("line", READ_LINES)
def test_virsh_reads_the_line_the_same_way(line: str) -> None:
    command, *words = shlex.split(line)
    # --help at the end keeps virsh from running the command, and changes nothing in how the rest is read
    done = virsh("-d", "1", command, *words, "--help")
    trace = re.findall(
        rf"^{command}: ([a-z0-9-]+)\((optdata|bool)\)(?:: (.*))?$", done.stdout + done.stderr, re.MULTILINE
    )
    read_by_virsh = {name: True if kind == "bool" else text for name, kind, text in trace if name != "help"}
    assert read_line(command, VERB_BY_NAME[command].options, words).values == read_by_virsh


@virsh_needed
def test_virsh_reads_data_after_two_dashes_the_same_way() -> None:
    """Such a line cannot end in --help: it runs, and test:/// has no such domain."""
    done = virsh("-d", "1", "-c", "test:///default", "domjobinfo", "--completed", "--", "--rawstats")
    assert "domjobinfo: domain(optdata): --rawstats" in done.stdout + done.stderr
    line = read_line("domjobinfo", VERB_BY_NAME["domjobinfo"].options, ["--completed", "--", "--rawstats"])
    assert line.values == {"completed": True, "domain": "--rawstats"}


@pytest.mark.parametrize(("word", "name"), [("---live", "-live"), ("--=y", "")])
def test_odd_dashes_are_unknown_options_as_in_virsh_12_8(word: str, name: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_line("migrate", VERB_BY_NAME["migrate"].options, ["test", "x", word])
    assert refused.value.message == f"command 'migrate' doesn't support option --{name}"


@virsh_needed
@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.ours and verb.name not in ("help", "version")])
def test_the_siblings_have_virshs_options(verb: object) -> None:
    listed = virsh("help", verb.name).stdout.partition("  OPTIONS\n")[2]  # type: ignore[attr-defined]
    found = re.findall(r"^    (\[?)--([a-z0-9-]+)\]?(?: <(number|string)>)?  ", listed, re.MULTILINE)
    rows = {row.name: row for row in verb.options}  # type: ignore[attr-defined]
    assert found
    for required, name, kind in found:
        assert rows[name].kind.value in {"number": ("number",), "": ("bool",)}.get(kind, ("string", "list", "file"))
        assert rows[name].required == bool(required)
    if verb.name != "migrate":  # type: ignore[attr-defined]
        assert [name for _, name, _ in found] == list(rows)


# --- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("migrate vm dst --bandwith 5", "did you mean --bandwidth?"),
        ("migrate vm dst --connect x", "--connect goes before the command: virtmig --connect ... migrate"),
        ("migrate vm dst -c x", "virtmig's own options (-c, -q, ...) go before the command"),
        ("migrate -c", "'-c' after a command is data; virtmig's own options go before it"),
        ("migrate vm", "the line begins: <domain> <desturi>"),
        ("migarte vm dst", "did you mean: virtmig migrate?"),
        ("help migarte", "did you mean: virtmig migrate?"),
        ("domjobinfo vm rawstats", "did you mean --rawstats?"),
        ("migrate vm dst --timeout 5", "add --live"),
        ("completion tcsh", "one of bash, zsh, fish"),
    ],
)
def test_the_hint_is_on_a_line_of_its_own_after_the_error(
    line: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(line)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"hint: {hint}"
    assert all(each.startswith("error: ") for each in lines[:-1])
    assert len(lines) > 1


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_migrate_gets_a_checked_request(seen: list[tuple[str, object, GlobalOptions]]) -> None:
    assert main(shlex.split("-c qemu:///system migrate --live vm --bandwidth=10 dst --multifd")) == 0
    ((verb, request, options),) = seen
    assert verb == "migrate"
    assert isinstance(request, MigrationRequest)
    assert dict(request) == {"domain": "vm", "desturi": "dst", "live": True, "bandwidth": 10, "parallel": True}
    assert options.connect == "qemu:///system"


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("migrate-setmaxdowntime vm 500", {"domain": "vm", "downtime": 500}),
        ("migrate-getmaxdowntime vm", {"domain": "vm"}),
        ("migrate-setspeed --postcopy vm 100", {"domain": "vm", "bandwidth": 100, "postcopy": True}),
        ("migrate-getspeed vm --postcopy", {"domain": "vm", "postcopy": True}),
        ("migrate-compcache vm --size 4096", {"domain": "vm", "size": 4096}),
        ("migrate-compcache vm", {"domain": "vm"}),
        ("migrate-postcopy vm", {"domain": "vm"}),
        ("domjobinfo vm --completed --rawstats", {"domain": "vm", "completed": True, "rawstats": True}),
        ("domjobabort vm", {"domain": "vm"}),
        ("watch vm", {"domain": "vm"}),
    ],
)
def test_siblings_get_their_values(
    line: str, values: dict[str, object], seen: list[tuple[str, object, GlobalOptions]]
) -> None:
    assert main(shlex.split(line)) == 0
    assert [(verb, what) for verb, what, _ in seen] == [(line.split()[0], values)]


def test_every_verb_of_the_table_can_be_run() -> None:
    own = {"help", "version", "completion", "doctor", "lab"}
    for verb in VERBS:
        if verb.name not in own:
            assert callable(getattr(commands, "run_" + verb.name.replace("-", "_")))


def test_the_exit_status_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run_watch", lambda values, options: 7)
    assert main(["watch", "vm"]) == 7


# --- globals ---------------------------------------------------------------------------------------------------------


def globals_of(line: str, seen: list[tuple[str, object, GlobalOptions]]) -> GlobalOptions:
    seen.clear()
    assert main([*shlex.split(line), "watch", "vm"]) == 0
    return seen[0][2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("-c test:///default", {"connect": "test:///default"}),
        ("-ctest:///default", {"connect": "test:///default"}),
        ("--connect=test:///default", {"connect": "test:///default"}),
        (
            "-rqt -k5 -K 0",
            {"readonly": True, "quiet": True, "timing": True, "keepalive_interval_s": 5, "keepalive_count": 0},
        ),
        ("--readonly --quiet --no-color", {"readonly": True, "quiet": True, "no_color": True}),
        ("--keepalive-interval 3 --keepalive-count=4", {"keepalive_interval_s": 3, "keepalive_count": 4}),
        ("-d 4 --", {"debug": 4}),
    ],
)
def test_globals(line: str, expected: dict[str, object], seen: list[tuple[str, object, GlobalOptions]]) -> None:
    assert globals_of(line, seen) == GlobalOptions(**expected)  # type: ignore[arg-type]


def test_globals_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str, object, GlobalOptions]]
) -> None:
    monkeypatch.setenv("VIRSH_DEFAULT_CONNECT_URI", "test:///default")
    monkeypatch.setenv("NO_COLOR", "1")
    assert globals_of("", seen) == GlobalOptions(connect="test:///default", no_color=True)
    assert globals_of("-c qemu:///session", seen).connect == "qemu:///session"


@pytest.mark.usefixtures("quiet_again")
@pytest.mark.parametrize(("text", "level"), [("2", 2), ("0", 0), ("yes", 0), ("", 4)])
def test_debug_from_the_environment(
    text: str,
    level: int,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[tuple[str, object, GlobalOptions]],
) -> None:
    monkeypatch.setenv("VIRTMIG_DEBUG", text)
    assert globals_of("", seen).debug == level


@pytest.fixture
def quiet_again() -> Iterator[None]:
    """Takes away the handlers that --debug and --log have put on the logger."""
    log = logging.getLogger("virtmig")
    handlers, level = list(log.handlers), log.level
    yield
    for handler in [each for each in log.handlers if each not in handlers]:
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


def test_every_global_option_has_a_field_or_acts_by_itself() -> None:
    fields = set(GlobalOptions.__struct_fields__)
    renamed = {"log": "log_file", "keepalive-interval": "keepalive_interval_s"}
    for row in GLOBAL_OPTIONS:
        if row.name not in ("help", "version"):
            assert renamed.get(row.name, row.name.replace("-", "_")) in fields


def test_timing(capsys: pytest.CaptureFixture[str], seen: list[tuple[str, object, GlobalOptions]]) -> None:
    main(["-t", "watch", "vm"])
    assert re.fullmatch(r"\n\(Time: \d+\.\d{3} ms\)\n\n", capsys.readouterr().out)
    main(["watch", "vm"])
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("quiet_again")
def test_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "virtmig.log"
    monkeypatch.setattr(commands, "run_watch", lambda *_: logging.getLogger("virtmig.virt").info("seen") or 0)
    assert main(["-l", str(path), "watch", "vm"]) == 0
    assert path.read_text().endswith("INFO virtmig.virt: seen\n")


def test_a_log_file_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-l", str(tmp_path / "no" / "log"), "watch", "vm"]) == 1
    assert errors_of(capsys.readouterr().err)[0].startswith("failed to open the log file")


# --- errors ----------------------------------------------------------------------------------------------------------


def failing(error: Exception) -> object:
    def command(*_: object) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (MigrationError("one\ntwo", hint="try"), ["error: one", "error: two", "hint: try"]),
        (GuestDoubled("twice", code=1), ["error: twice"]),
        (
            PlanRefused([("a", "first", "way"), ("b", "second", "way"), ("c", "third", "")]),
            ["error: first", "error: second", "error: third", "hint: way"],
        ),
        (
            ZeroDivisionError("oops"),
            [
                "error: internal error: ZeroDivisionError: oops",
                "hint: run it again with --debug 0 before the command, and report what it prints",
            ],
        ),
    ],
)
def test_errors_of_commands(
    error: Exception, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "run_watch", failing(error))
    assert main(["watch", "vm"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == lines
    assert out == ""


def test_the_exit_status_of_an_error_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    error = MigrationError("attention")
    error.exit_status = 5
    monkeypatch.setattr(commands, "run_watch", failing(error))
    assert main(["watch", "vm"]) == 5


def test_fine_exit_codes_tell_a_refused_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("migrate vm dst --timeout 5")) == 1
    assert main(shlex.split("migrate vm dst --timeout 5 --exit-codes fine")) == 3
    assert main(shlex.split("migrate vm dst --live --live --exit-codes fine")) == 1, "a line that cannot be read"


@pytest.mark.usefixtures("quiet_again")
def test_tracebacks_only_with_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "run_watch", failing(MigrationError("broken")))
    main(["watch", "vm"])
    assert "Traceback" not in capsys.readouterr().err
    main(["-d", "0", "watch", "vm"])
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("VIRTMIG_DEBUG", "1")
    main(["watch", "vm"])
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_before_anything_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "run_watch", failing(KeyboardInterrupt()))
    assert main(["watch", "vm"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"


# --- help and versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["--help", "-h", "help", "", "-c test:///default --help"])
def test_program_help(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for verb in VERBS:
        assert re.search(rf"^  {verb.name} ", out, re.MULTILINE)
    for row in GLOBAL_OPTIONS:
        assert f"--{row.name}" in out


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS if verb.name != "lab"])
def test_command_help_is_the_same_both_ways(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", verb]) == 0
    by_help = capsys.readouterr().out
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out == by_help
    assert by_help.startswith(f"virtmig {verb} - ")


def test_help_counts_on_an_unfinished_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "vm", "--live", "--help"]) == 0
    assert capsys.readouterr().out.startswith("virtmig migrate - ")


@pytest.mark.parametrize("line", ["-v", "--version", "--version=short", "-v frob"])
def test_short_version(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("line", ["-V", "--version=long"])
def test_long_version(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 0
    assert [each.split()[0] for each in capsys.readouterr().out.splitlines()] == ["virtmig", "libvirt-python", "Python"]


def test_the_version_verb_asks_the_other_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", "test:///default", "version"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^libvirt \d+\.\d+\.\d+ at test:///default$", out, re.MULTILINE)
    assert re.search(r"^hypervisor TEST \d", out, re.MULTILINE)
    assert main(["-c", "nonsense:///", "version"]) == 0
    assert "no hypervisor: " in capsys.readouterr().out


def test_a_real_sibling_on_the_test_driver(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", "test:///default", "domjobinfo", "nosuch"]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: failed to get domain 'nosuch'", "hint: known there: test"]


# --- start-up --------------------------------------------------------------------------------------------------------

HEAVY = ("libvirt", "lxml", "rich", "numpy", "tenacity")


@pytest.mark.parametrize("line", ["--help", "help", "migrate --help", "help migrate", "frob", "migrate", "-v"])
def test_help_and_mistakes_import_nothing_heavy(line: str) -> None:
    code = (
        "import sys; from virtmig.cli.main import main; main(sys.argv[1:]);"
        f"print('IMPORTED', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(line)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED []"


def test_help_starts_quickly() -> None:
    """The budget is 150 ms. Start-up waits for nothing but the processor, so the processor's time is the time it takes

    on a machine with nothing else to do; the clock on the wall would measure the machine's other work too.
    """
    times = []
    for _ in range(10):
        child = subprocess.Popen([*ENTRY, "--help"], stdout=subprocess.DEVNULL, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 0.150


def test_a_closed_pipe_is_no_traceback() -> None:
    line = shlex.join([*ENTRY, "migrate", "--help"]) + " | true"
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=True
    )
    assert "Traceback" not in done.stderr
