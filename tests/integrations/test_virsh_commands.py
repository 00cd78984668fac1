"""`virtmig-virsh` beside the real virsh: the same lines, the same exit status, standard output and errors."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.virsh import (
    REAL,
    TEST,
    Answer,
    errors_of,
    install_shim,
    virsh,
    virsh_needed,
)
from virtmig.errors import RequestError
from virtmig.integrations.virsh_commands import read_options_variable
from virtmig.options import OUR_OPTIONS


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_shim(tmp_path_factory.mktemp("shim"))


def steady(text: str) -> str:
    """Without what no two runs have alike."""
    return re.sub(r"Time: [0-9.]+ ms", "Time: N ms", text)


# --- the table: each line by the real virsh and by us ----------------------------------------------------------------

#: other commands, options, mistakes: passed on
PASSED_ON = [
    f"{TEST} list",
    f"{TEST} -q list",
    f"{TEST} -r list",
    f"{TEST} -t uri",
    f"{TEST} domstate test",
    f"{TEST} domstate nobody",
    f"{TEST} 'list; uri'",
    f"{TEST} 'echo a  \"b c\"; echo d\\ e'",
    f"{TEST} 'quit; list'",
    "--conn test:///default list",
    "-ctest:///default -rq list",
    "-qc test:///default list",
    "--keepalive 5 list",
    "-c bad:/// list",
    "-c bad:/// help list",
    "echo a b",
    "'# a comment'",
    "'echo \"open'",
    "'echo dangling\\'",
    "''",
    "help migrate",
    "help domain",
    "migrate a b --live --help",
    "domjobinfo --help",
    "--help",
    "--version",
    "--version=long",
    "--bogus",
    "-c",
    "-d x list",
    "-e foo list",
    "-k x list",
    "frob",
    "'list; frob'",
]  # fmt: skip

#: our commands; what is refused before a connection is opened, and what test:///default can answer
TAKEN_OVER = [
    "migrate",
    "migrate test x --liv",
    "migrate test x --live=yes",
    "migrate test x --tunnelled --tunneled",
    "migrate test x --bandwidth",
    "migrate --help --bogus",
    "migrate-setmaxdowntime test",
    "domjobinfo test extra",
    "'migrate test \"x'",
    "-d x migrate test x",
    "-l /nonexistent/log domjobinfo test",
    "--bogus migrate test x",
    f"{TEST} migrate nobody x",
    f"{TEST} migrate test nonsense --live",
    f"{TEST} migrate test nonsense --dname --help",
    f"{TEST} -t migrate test nonsense",
    f"{TEST} migrate test test:///default --live --offline",
    f"{TEST} migrate test test:///default --tls-destination x",
    f"{TEST} migrate test test:///default --live --timeout -3",
    f"{TEST} domjobinfo nobody",
    f"{TEST} domjobabort test",
    f"{TEST} migrate-setmaxdowntime test 300",
    f"{TEST} -q migrate-setspeed test 5",
    f"{TEST} -r migrate-postcopy test",
    "-c bad:/// migrate test x --live --offline",
]  # fmt: skip

#: more than one command in one string
STRINGS = [
    f"{TEST} 'list; domjobabort test; uri'",
    f"{TEST} 'domjobabort test; domjobinfo nobody;; ;'",
    f"{TEST} 'domjobabort test; quit; list'",
    f"{TEST} 'list --bogus; domjobinfo test'",
    f"{TEST} 'domjobinfo test; frob'",
    f"{TEST} 'domjobinfo --help; uri'",
    f"{TEST} 'echo \"a;b\"; domjobabort \\test\\\n'",
    f"{TEST} 'uri # domjobinfo test\ndomjobinfo nobody; # end'",
    "-c bad:/// 'list; domjobinfo test'",
    f"{TEST} 'connect bad:///; domjobabort test; uri'",
    "'connect test:///default --readonly; domjobabort test; uri; connect; uri'",
]  # fmt: skip

#: lines with several mistakes: virsh names the first, we name all
ALL_MISTAKES = [line for line in TAKEN_OVER if "--live --offline" in line]


@pytest.fixture(scope="module")
def answers(shim: Path) -> Iterator[dict[str, tuple[Future[Answer], Future[Answer]]]]:
    """Every line by the real virsh and by ours, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            line: (pool.submit(virsh, None, *shlex.split(line)), pool.submit(virsh, shim, *shlex.split(line)))
            for line in [*PASSED_ON, *TAKEN_OVER, *STRINGS]
        }


@virsh_needed
@pytest.mark.parametrize("line", [*PASSED_ON, *TAKEN_OVER, *STRINGS])
def test_as_the_real_virsh(answers: dict[str, tuple[Future[Answer], Future[Answer]]], line: str) -> None:
    theirs, ours = (future.result(30) for future in answers[line])
    assert ours.returncode == theirs.returncode
    assert steady(ours.stdout) == steady(theirs.stdout)
    expected = errors_of(theirs.stderr)
    assert errors_of(ours.stderr)[: len(expected) if line in ALL_MISTAKES else None] == expected
    if line in PASSED_ON:
        assert ours.stderr == theirs.stderr
    else:
        assert re.fullmatch(r"((error|hint): .*\n)*", ours.stderr)


@virsh_needed
def test_the_default_connection_fails_behind_an_empty_line(shim: Path) -> None:
    for line in (["domjobinfo", "test"], ["migrate", "test", "x"]):
        theirs, ours = (virsh(which, *line, VIRSH_DEFAULT_CONNECT_URI="bad:///") for which in (None, shim))
        assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout) == (1, "\n")
        assert errors_of(ours.stderr) == errors_of(theirs.stderr)


@virsh_needed
def test_an_option_of_ours_on_the_line_is_refused_with_the_place_where_it_belongs(shim: Path) -> None:
    done = virsh(shim, *shlex.split(TEST), "migrate", "test", "x", "--fence")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: command 'migrate' doesn't support option --fence\n"
        "hint: virtmig's own options go into the environment: VIRTMIG_MIGRATE_OPTIONS=--fence\n"
    )


@virsh_needed
def test_commands_on_standard_input_are_the_real_virshs(shim: Path) -> None:
    theirs, ours = (virsh(which, *shlex.split(TEST), stdin="uri\nlist --name\nfrob\n") for which in (None, shim))
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert "test:///default" in ours.stdout


# --- VIRTMIG_MIGRATE_OPTIONS -----------------------------------------------------------------------------------------


def test_options_for_every_migration() -> None:
    assert read_options_variable("") == {}
    assert read_options_variable("--transport relay --fence --parallel --retries=0") == {
        "transport": "relay", "fence": True, "parallel": True, "retries": 0
    }  # fmt: skip
    takes_part = {row.name for row in OUR_OPTIONS} - {"plan", "progress", "json", "quiet", "exit-codes", "report"}
    assert {"transport", "fence", "max-downtime", "agent"} <= takes_part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--bogus", "command 'migrate' doesn't support option --bogus"),
        ("fence", "unexpected data 'fence'"),
        ("--transport pigeon", "'pigeon' is not a value of --transport"),
        ("--retries many", "Numeric value 'many' for <retries> option is malformed or out of range"),
        ("--json", "--json cannot be given for all migrations"),
        ("--domain web01", "--domain cannot be given for all migrations"),
        ("--agent 'x", "No closing quotation"),
    ],
)
def test_mistakes_in_the_variable_name_it(text: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_options_variable(text)
    assert refused.value.message == f"VIRTMIG_MIGRATE_OPTIONS: {message}"


def test_a_mistake_in_the_variable_ends_a_migration_and_nothing_else(shim: Path) -> None:
    wrong = {"VIRTMIG_MIGRATE_OPTIONS": "--fenced"}
    done = virsh(shim, *shlex.split(TEST), "migrate", "test", "qemu:///session", **wrong)
    assert (done.returncode, done.stdout) == (1, "\n")
    assert done.stderr.startswith("error: VIRTMIG_MIGRATE_OPTIONS: command 'migrate' doesn't support option --fenced\n")
    assert "did you mean --fence?" in done.stderr
    if REAL:
        assert virsh(shim, *shlex.split(TEST), "uri", **wrong).returncode == 0


def test_without_a_real_virsh_our_commands_still_run(shim: Path) -> None:
    passed_on = virsh_alone(shim, "list")
    assert (passed_on.returncode, passed_on.stdout) == (127, "")
    assert passed_on.stderr.startswith("error: no virsh in PATH behind virtmig-virsh\nhint: install ")
    ours = virsh_alone(shim, *shlex.split(TEST), "domjobabort", "test")
    assert (ours.returncode, ours.stdout) == (1, "\n")
    assert "virDomainAbortJob" in ours.stderr
    mixed = virsh_alone(shim, *shlex.split(TEST), "domjobabort test; list")
    assert (mixed.returncode, mixed.stdout) == (127, "")
    mistaken = virsh_alone(shim, "domjobabort")
    assert mistaken.stderr == "error: command 'domjobabort' requires <domain> option\n"


def virsh_alone(shim: Path, *words: str) -> Answer:
    return subprocess.run(
        [str(shim / "virsh"), *words], env={"PATH": str(shim), "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
