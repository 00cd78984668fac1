"""The README says what is so: the map of the code, the commands and options it shows, the rows of its table."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from virtmig.options import BY_NAME, SPELLINGS
from virtmig.stream.lifecycle import POSTCOPY_INCOMING, TABLES, Side, mermaid
from virtmig.stream.wire import Dialect
from virtmig.verbs import VERB_BY_NAME

TOP = Path(__file__).resolve().parents[1]
README = (TOP / "README.md").read_text()

#: what the top of the tree may hold
TOP_NAMES = {
    ".ci",
    ".gitignore",
    "COPYING.LESSER",
    "README.md",
    "dev",
    "hooks",
    "pyproject.toml",
    "tests",
    "virtmig",
    "xml",
}


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def shown_commands() -> list[list[str]]:
    """Every `virtmig ...` line of the README's shell blocks, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("virtmig ")]


def run_virtmig(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from virtmig.cli.main import run; run()", *words],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_starts_with_the_two_commands() -> None:
    block = re.search(r"```\n(.*?)```", README, re.DOTALL)
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["./dev demo", "./dev test"]


def test_the_map_names_every_module_and_every_named_file_exists() -> None:
    named = re.findall(r"^([\w/]+\.py) {2,}\S", section("Map of the code"), re.MULTILINE)
    package = TOP / "virtmig"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert len(named) == len(set(named))
    assert set(named) == there


@pytest.mark.parametrize("name", sorted({words[1] for words in shown_commands()}))
def test_a_shown_command_exists(name: str) -> None:
    assert name in VERB_BY_NAME
    result = run_virtmig("help", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert name in result.stdout


def test_the_shown_options_exist() -> None:
    shown = [words for words in shown_commands() if words[1] == "migrate"]
    assert len(shown) > 3
    options = {word[2:] for words in shown for word in words if word.startswith("--")}
    assert options <= set(SPELLINGS)


def test_every_option_named_in_the_text_exists() -> None:
    known = set(SPELLINGS) | {option.name for verb in VERB_BY_NAME.values() for option in verb.options}
    for title in (
        "What it does",
        "The first migration",
        "One table of options",
        "When memory does not converge",
        "Exit status",
    ):
        for name in re.findall(r"--([a-z][a-z-]+)", section(title)):
            assert name in known, f"{title}: --{name}"


def test_the_shown_verbs_of_dev_exist() -> None:
    shown = set(re.findall(r"^\./dev (?:-\S+ )*(\w+)", README, re.MULTILINE))
    usage = subprocess.run([str(TOP / "dev"), "help"], capture_output=True, text=True, check=True).stdout
    assert len(shown) > 3
    assert shown <= set(re.findall(r"^  (\w+) {1,}", usage, re.MULTILINE))


def test_the_rows_of_the_option_table_are_the_tables_own() -> None:
    rows = re.findall(
        r"^\| `--([\w-]+)`[^|]*\| `([\w.]+)` \| `([\w-]+)`", section("One table of options"), re.MULTILINE
    )
    assert len(rows) > 5
    for name, libvirt_name, qemu_name in rows:
        option = BY_NAME[name]
        assert libvirt_name in (option.flag, option.param)
        assert re.search(rf":{re.escape(qemu_name)}\b", option.qemu), option.qemu


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_top_holds_the_agreed_names_only() -> None:
    git = subprocess.run(
        ["git", "-C", str(TOP), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if git.returncode != 0:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in git.stdout.splitlines()} <= TOP_NAMES


def test_the_licence_is_named_alike_everywhere() -> None:
    project = (TOP / "pyproject.toml").read_text()
    assert 'license = "LGPL-2.1-or-later"' in project
    assert 'license-files = ["COPYING.LESSER"]' in project
    text = (TOP / "COPYING.LESSER").read_text()
    assert "GNU LESSER GENERAL PUBLIC LICENSE" in text
    assert "Version 2.1, February 1999" in text
    assert "LGPL-2.1-or-later" in section("Licence")


def test_the_pictures_of_states_are_those_of_the_tables() -> None:
    drawn = re.findall(r"```mermaid\n(.*?)```", section("States of a migration"), re.DOTALL)
    assert drawn == [mermaid(TABLES[Dialect.QEMU_11_1, Side.SOURCE]), mermaid(POSTCOPY_INCOMING)]
