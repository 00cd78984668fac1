"""Help and the man page say every row, and what they show can be typed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from virtmig.cli.grammar import read_line
from virtmig.cli.main import main
from virtmig.cli.manual import GROUP_TITLES, command_help, facts, man_page, option_groups, program_help, roff
from virtmig.options import BY_NAME, OPTIONS, OUR_OPTIONS, Kind, Option
from virtmig.request import MigrationRequest, check_values
from virtmig.verbs import ENVIRONMENT, EXIT_STATUS, GLOBAL_OPTIONS, VERB_BY_NAME, VERBS, Verb

MIGRATE = VERB_BY_NAME["migrate"]


def squeezed(text: str) -> str:
    return " ".join(text.split())


def plain(page: str) -> str:
    """The man page's source without its escapes."""
    characters = {"-": "-", "e": "\\", "&": "", "(ti": "~", "(ha": "^", "(dq": '"'}
    return re.sub(r"\\(-|e|&|\(ti|\(ha|\(dq)", lambda escape: characters[escape[1]], page)


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row.name)
def test_every_row_is_in_help_and_man_page(row: Option) -> None:
    for text in (squeezed(command_help(MIGRATE)), squeezed(plain(man_page()))):
        assert f"--{row.name}" in text
        assert row.help in text
        assert facts(row) in text


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_row_of_every_verb_is_in_help_and_man_page(verb: Verb) -> None:
    page = squeezed(plain(man_page()))
    own = squeezed(command_help(verb))
    assert verb.help in squeezed(program_help())
    for row in verb.options:
        for text in (own, page):
            assert f"--{row.name}" in text
            assert row.help in text
    for line, what in verb.examples:
        assert line in own
        assert what in own
        assert line in page


def test_the_man_page_has_globals_exit_status_and_environment() -> None:
    page = squeezed(plain(man_page()))
    for row in GLOBAL_OPTIONS:
        assert f"--{row.name}" in page
        assert row.help in page
    for term, text in (*EXIT_STATUS, *ENVIRONMENT):
        assert f'.B "{term}" {text}' in page


def test_facts_say_unit_range_default_since_and_other_names() -> None:
    assert facts(BY_NAME["bandwidth"]) == "MiB/s, 0 to 17592186044415"
    assert facts(BY_NAME["comp-zstd-level"]) == "0 to 20; libvirt 9.4 or newer"
    assert facts(BY_NAME["comp-xbzrle-cache"]) == "bytes, 4096 to 4611686018427387904; a power of two"
    assert facts(BY_NAME["retries"]) == "0 to 100; default 2"
    assert facts(BY_NAME["parallel-connections"]) == "1 to 255; also --multifd-channels"
    assert facts(BY_NAME["migrate-disks-target-zero"]) == "libvirt 12.2 or newer"
    assert facts(BY_NAME["live"]) == ""


def test_examples_come_before_the_options() -> None:
    text = command_help(MIGRATE)
    assert 0 < text.index("\nExamples\n") < text.index("\nvirsh's options\n")
    assert program_help().index("\nExamples\n") < program_help().index("\nCommands\n")
    assert man_page().index(".SH EXAMPLES") < man_page().index(".SH DESCRIPTION")


def test_virshs_options_and_ours_stand_apart() -> None:
    groups = dict(option_groups(MIGRATE))
    assert next(iter(groups)) == "virsh's options"
    assert not any(row.ours for row in groups["virsh's options"])
    assert sorted(row.name for title in GROUP_TITLES.values() for row in groups[title]) == sorted(
        row.name for row in OUR_OPTIONS
    )


@pytest.mark.parametrize(
    ("verb", "line"),
    [(verb, line) for verb in VERBS if verb.name != "lab" for line, _ in verb.examples],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_example_can_be_typed(verb: Verb, line: str) -> None:
    inner = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)
    words = shlex.split(re.split(r" [|>] ", inner)[0])
    assert words[:2] == ["virtmig", verb.name]
    values = read_line(verb.name, verb.options, words[2:]).values
    if verb.name == "migrate":
        MigrationRequest(values)  # type: ignore[arg-type]
    else:
        check_values(verb.name, verb.options, values)


@pytest.mark.parametrize("columns", ["60", "100", "200"])
def test_help_fits_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    examples = {f"  {line}" for verb in VERBS for line, _ in verb.examples}
    for text in (program_help(), *map(command_help, VERBS)):
        for line in text.splitlines():
            terms = re.fullmatch(r"  \[?--\S+ .*|virtmig \S+ - .*|Usage: .*|virtmig - .*|      .*", line)
            assert len(line) <= int(columns) or line in examples or terms, line


def test_help_has_no_trailing_blanks_or_escapes() -> None:
    for text in (program_help(), *map(command_help, VERBS)):
        assert not re.search(r"[ \t]$|\x1b", text, re.MULTILINE)


def test_roff_escapes_what_troff_would_eat() -> None:
    assert roff("a-b\\c") == "a\\-b\\ec"
    assert roff(".x\n'y") == "\\&.x\n\\&'y"
    assert roff("~^") == "\\(ti\\(ha"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_say(tmp_path: Path) -> None:
    path = tmp_path / "virtmig.1"
    path.write_text(man_page())
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-rLL=100n", path], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stderr == ""
    shown = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout).replace("−", "-")
    for row in OPTIONS:
        assert f"--{row.name}" in shown
        if row.kind is Kind.NUMBER:
            assert f"--{row.name} <number>" in shown


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_shows_the_page(tmp_path: Path) -> None:
    path = tmp_path / "virtmig.1"
    path.write_text(man_page())
    done = subprocess.run(["man", "--warnings", "-l", path], capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr == ""
    assert "virtmig" in done.stdout


def test_help_man_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "--man"]) == 0
    assert capsys.readouterr().out == man_page()
