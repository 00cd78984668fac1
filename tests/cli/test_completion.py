"""Completion as the shells ask for it: through the real bash on a terminal, and through click's protocol for all."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from virtmig.cli.completion import complete_value, domain_names, read_aliases, uri_aliases, within
from virtmig.cli.main import main
from virtmig.options import BY_NAME, OPTIONS, Kind
from virtmig.verbs import VERB_BY_NAME, VERBS

ROOT = Path(__file__).parents[2]
WORDBREAKS = " \t\n\"'><=;|&(:"

bash_needed = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a `virtmig` to run, as an installation has it on the PATH."""
    program = tmp_path / "virtmig"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from virtmig.cli.main import run; run()"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8", **more}


def ask_bash(folder: Path, line: str, breaks: str = WORDBREAKS) -> list[str]:
    """The words that the function of our script puts into COMPREPLY, called as bash calls it."""
    script = f"""
        eval "$(virtmig completion bash)"
        COMP_WORDBREAKS={shlex.quote(breaks)} COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
        _virtmig_completion virtmig
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env=environment(folder),
        timeout=30,
        check=True,
    )
    return done.stdout.split("\n")[:-1]


@bash_needed
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("virtmig dom", ["domjobinfo", "domjobabort"]),
        ("virtmig --rea", ["--readonly"]),
        ("virtmig migrate vm dst --postcopy-a", ["--postcopy-after-precopy", "--postcopy-after-passes"]),
        ("virtmig migrate vm dst --postcopy-after-passes 2 --postcopy-a", ["--postcopy-after-precopy"]),
        ("virtmig migrate vm dst --on-stall ", ["auto", "continue", "postcopy", "suspend", "abort"]),
        ("virtmig migrate vm dst --on-stall=p", ["postcopy"]),
        ("virtmig migrate vm dst --comp-methods mt,z", ["mt,zlib", "mt,zstd"]),
        ("virtmig migrate vm qemu:///se", ["///session"]),
        ("virtmig migrate vm --desturi=qemu:///se", ["///session"]),
        ("virtmig migrate vm --desturi qemu:///session --liv", ["--live"]),
        ("virtmig migrate vm qemu+ssh://host-b/system --bandwidth=10 --liv", ["--live"]),
        ("virtmig -c qemu:///se", ["///session"]),
        ("virtmig -c test:///default domjobinfo ", ["test"]),
        ("virtmig --connect=test:///default migrate t", ["test"]),
        ("virtmig -c test:///default domjobinfo test --completed --", ["--keep-completed", "--anystats", "--rawstats"]),
        ("virtmig -c test:///default watch -- ", ["test"]),
        ("virtmig help migrate-s", ["migrate-setmaxdowntime", "migrate-setspeed"]),
        ("virtmig completion ", ["bash", "zsh", "fish"]),
        ("virtmig frob ", [""]),
        ("virtmig migrate vm dst --frob --liv", ["--live"]),
    ],
)
def test_bash(folder: Path, line: str, expected: list[str]) -> None:
    assert ask_bash(folder, line) == expected


@bash_needed
def test_bash_that_cuts_no_words_gets_whole_ones(folder: Path) -> None:
    assert ask_bash(folder, "virtmig migrate vm qemu:///se", breaks=" \t\n") == ["qemu:///session"]


@bash_needed
def test_every_option_of_migrate_is_offered(folder: Path) -> None:
    assert sorted(ask_bash(folder, "virtmig migrate vm dst --")) == sorted(f"--{row.name}" for row in OPTIONS[2:])


@bash_needed
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (b"virtmig migrate web01 qemu:///se\t", b"qemu:///session"),
        (b"virtmig migrate web01 dst --available-s\t", b"--available-switchover-bandwidth"),
        (b"virtmig migrate web01 dst --xml sam\t", b"sample.xml"),
    ],
)
def test_a_real_terminal(folder: Path, typed: bytes, shown: bytes) -> None:
    """An interactive bash on a pseudo terminal; TAB is pressed, and the line is completed in place."""
    (folder / "sample.xml").touch()
    (folder / "rc").write_text(
        'PS1="ready> "\nbind "set enable-bracketed-paste off"\neval "$(virtmig completion bash)"\n'
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe("bash", ["bash", "--rcfile", "rc", "-i"], environment(folder, TERM="dumb"))
    try:
        read_until(terminal, b"ready> ")
        os.write(terminal, typed)
        assert shown in read_until(terminal, shown)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def read_until(terminal: int, mark: bytes, within_s: float = 20.0) -> bytes:
    seen, deadline = b"", time.monotonic() + within_s
    while mark not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
    return seen


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_by_clicks_protocol(folder: Path, shell: str) -> None:
    line = "virtmig migrate vm qemu:///se"
    asked = {
        "zsh": {"COMP_WORDS": line, "COMP_CWORD": "3"},
        "fish": {"COMP_WORDS": line, "COMP_CWORD": "qemu:///se"},
    }[shell]
    env = environment(folder, _VIRTMIG_COMPLETE=f"{shell}_complete", **asked)
    done = subprocess.run([folder / "virtmig"], capture_output=True, text=True, env=env, timeout=30, check=True)
    assert done.stdout.strip() in ("plain\nqemu:///session\n_", "plain,qemu:///session")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_defines_a_completion_for_virtmig(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert f"_VIRTMIG_COMPLETE={shell}_complete" in out
    assert "virtmig" in out


def test_completion_of_options_imports_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print([name for name in"
        " ('libvirt', 'lxml', 'rich', 'numpy') if name in sys.modules], file=sys.stderr));"
        "from virtmig.cli.main import main; main([])"
    )
    env = {**os.environ, "_VIRTMIG_COMPLETE": "bash_complete", "COMP_LINE": "virtmig migrate vm dst --li"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    assert done.stdout.split() == ["plain,--live", "plain,--listen-address"]
    assert done.stderr == "[]\n"


# --- values ----------------------------------------------------------------------------------------------------------


def values(name: str, incomplete: str) -> list[str]:
    return [item.value for item in complete_value(BY_NAME[name], incomplete)]


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.choices], ids=lambda row: row.name)
def test_every_choice_of_the_table_is_offered(row: object) -> None:
    assert values(row.name, "") == list(row.choices)  # type: ignore[attr-defined]


def test_a_list_offers_each_word_once() -> None:
    assert values("comp-methods", "zlib,") == ["zlib,mt", "zlib,xbzrle", "zlib,zstd"]


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.kind is Kind.FILE], ids=lambda row: row.name)
def test_files_are_left_to_the_shell(row: object) -> None:
    (item,) = complete_value(row, "/et")  # type: ignore[arg-type]
    assert item.type == "file"


def test_every_domain_of_every_verb_is_completed() -> None:
    for verb in VERBS:
        for row in verb.options:
            if row.name == "domain":
                assert [item.value for item in complete_value(row, "", connect="test:///default")] == ["test"]


def test_domain_names() -> None:
    assert domain_names("test:///default") == ["test"]


def test_a_slow_answer_is_no_answer() -> None:
    never = threading.Event()
    begun = time.monotonic()
    assert within(0.05, lambda: [str(never.wait())]) == []
    assert time.monotonic() - begun < 20
    never.set()


def test_an_error_is_no_answer() -> None:
    def broken() -> list[str]:
        raise OSError

    assert within(5, broken) == []
    assert within(5, lambda: ["vm"]) == ["vm"]


@bash_needed
def test_a_host_that_never_answers_does_not_hang_the_shell(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"qemu+tcp://127.0.0.1:{server.getsockname()[1]}/system"
        begun = time.monotonic()
        assert ask_bash(folder, f"virtmig -c {uri} domjobinfo ") == [""]
        assert time.monotonic() - begun < 30


ALIASES = """
# uri_aliases = [ "commented=qemu:///system" ]
uri_aliases = [
  "hail=qemu+ssh://root@hail.cloud.example.com/system",
  # "off=qemu:///system",
  "sleet=qemu+ssh://root@sleet.cloud.example.com/system?keyfile=/k",
]
uri_default = "qemu:///system"
"""


def test_aliases_of_libvirt_conf() -> None:
    assert read_aliases(ALIASES) == ["hail", "sleet"]
    assert read_aliases('uri_default = "x=y"') == []
    assert read_aliases("uri_aliases = [") == []


def test_aliases_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "libvirt").mkdir()
    (tmp_path / "libvirt" / "libvirt.conf").write_text(ALIASES)
    assert uri_aliases({"XDG_CONFIG_HOME": str(tmp_path)}) == ["hail", "sleet"]
    assert uri_aliases({"HOME": str(tmp_path / "nobody")}) == []
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert values("desturi", "s") == ["sleet"]
    assert [item.value for item in complete_value(VERB_BY_NAME["doctor"].options[0], "h")] == ["hail"]
