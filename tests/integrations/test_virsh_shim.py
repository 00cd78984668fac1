"""How `virtmig-virsh` decides whose command it is, and what it costs to pass one on."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.virsh import (
    install_shim,
    virsh,
    virsh_needed,
)
from virtmig.integrations.virsh_shim import (
    OURS,
    NoRealVirsh,
    NotOurs,
    find_real_virsh,
    passed_environment,
    read_globals,
    read_line,
    read_string,
)
from virtmig.verbs import VERB_BY_NAME


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_shim(tmp_path_factory.mktemp("shim"))


# --- how the line is read --------------------------------------------------------------------------------------------


def test_every_command_of_ours_is_one_of_virsh_and_of_virtmig() -> None:
    assert {verb.name for verb in VERB_BY_NAME.values() if not verb.ours} == OURS | {"help", "version"}


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("migrate a b;list", [["migrate", "a", "b"], ["list"]]),
        ("a 'b c' \"d;e\" f\\ g", [["a", "b c", "d;e", "f g"]]),
        ("a 'b\\'c\nd", [["a", "b\\c"], ["d"]]),
        ("a\\\nb", [["ab"]]),
        ("a \\\n b", [["a", "b"]]),
        ("a#b #c d\ne", [["a#b"], ["e"]]),
        ("'#a' b;c", [["c"]]),
        (";; a ;\n;", [["a"]]),
        ("a '' b", [["a", "", "b"]]),
        ("a 'open", [["a", "open"]]),
        ("", []),
    ],
)
def test_words_of_a_string(text: str, commands: list[list[str]]) -> None:
    assert read_string(text) == commands


@pytest.mark.parametrize("text", ['a "open', "a\\", "a 'b' \"c\\"])
def test_unfinished_strings_are_left_to_virsh(text: str) -> None:
    with pytest.raises(NotOurs):
        read_string(text)


@pytest.mark.parametrize(
    ("words", "options", "rest"),
    [
        (["-c", "u", "migrate", "-c"], {"connect": "u"}, ["migrate", "-c"]),
        (["-rqcu", "x"], {"readonly": True, "quiet": True, "connect": "u"}, ["x"]),
        (["--conn=u=v", "--read", "x"], {"connect": "u=v", "readonly": True}, ["x"]),
        (["--keepalive-c", "3", "--", "-x"], {"keepalive-count": "3"}, ["-x"]),
        (["-", "x"], {}, ["-", "x"]),
        (["-k5", "-e", "^]"], {"keepalive-interval": "5", "escape": "^]"}, []),
    ],
)
def test_global_options(words: list[str], options: dict[str, object], rest: list[str]) -> None:
    found, left = read_globals(words)
    assert (found, list(left)) == (options, rest)


@pytest.mark.parametrize(
    "line", ["", "list", "-h migrate a b", "--vers migrate", "--keepalive 5 migrate", "--quiet=1 migrate", "-c", "-x"]
)
def test_left_to_the_real_virsh(line: str) -> None:
    with pytest.raises(NotOurs):
        read_line(shlex.split(line))


# --- where the real virsh is -----------------------------------------------------------------------------------------


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_next_virsh_in_path_that_is_not_ours(tmp_path: Path) -> None:
    first = script(tmp_path / "a/virtmig-virsh", "#!/bin/sh\n")
    (tmp_path / "a/virsh").symlink_to("virtmig-virsh")
    script(tmp_path / "b/virsh", "#!/usr/bin/python3\nfrom virtmig.integrations.virsh_shim import run\n")
    script(tmp_path / "c/virsh", '#!/bin/sh\nexec virtmig-virsh "$@"\n')
    (tmp_path / "d/virsh").mkdir(parents=True)
    script(tmp_path / "e/virsh", "#!/bin/sh\n").chmod(0o644)
    real = script(tmp_path / "f/virsh", "#!/bin/sh\nexec /usr/libexec/virsh\n")
    path = os.pathsep.join(str(tmp_path / name) for name in "abcdef")
    assert find_real_virsh({"PATH": path}, str(first)) == str(real)
    assert find_real_virsh({"PATH": path}, str(tmp_path / "a/virsh")) == str(real)
    with pytest.raises(NoRealVirsh) as refused:
        find_real_virsh({"PATH": path.rpartition(os.pathsep)[0]}, str(first))
    assert refused.value.status == 127


@pytest.mark.parametrize(
    ("named", "status", "words"),
    [("absent", 127, "there is no"), ("shim/virsh", 127, "is virtmig-virsh itself"), ("plain", 126, "cannot be run")],
)
def test_a_wrong_virtmig_real_virsh(shim: Path, tmp_path: Path, named: str, status: int, words: str) -> None:
    (tmp_path / "plain").write_text("x")
    (tmp_path / "shim").symlink_to(shim)
    done = virsh(shim, "list", VIRTMIG_REAL_VIRSH=str(tmp_path / named))
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("error: VIRTMIG_REAL_VIRSH: '") or words == "there is no"
    assert words in done.stderr
    assert "hint: set it to the path of libvirt's virsh" in done.stderr


def test_a_wrapper_that_leads_back_ends(shim: Path, tmp_path: Path) -> None:
    wrapper = script(tmp_path / "virsh", f'#!/bin/sh\nexec {shim}/virsh "$@"\n')
    done = virsh(shim, "list", VIRTMIG_REAL_VIRSH=str(wrapper))
    assert done.returncode == 127
    assert "leads back to virtmig-virsh" in done.stderr


@pytest.mark.parametrize("line", ["list", "domjobabort", "'domjobabort test; list'"])
def test_a_real_virsh_that_the_kernel_refuses(shim: Path, tmp_path: Path, line: str) -> None:
    broken = script(tmp_path / "virsh", "\x7fELF of another machine")
    done = virsh(shim, *shlex.split(line), VIRTMIG_REAL_VIRSH=str(broken))
    assert (done.returncode, done.stdout) == (126, "")
    assert done.stderr.startswith(f"error: cannot run '{broken}': Exec format error\nhint: ")


def test_the_environment_is_passed_as_it_came(shim: Path) -> None:
    """In the C locale Python sets LC_CTYPE in its own environment."""
    env = shutil.which("env") or "/usr/bin/env"
    given = {"PATH": str(shim), "VIRTMIG_REAL_VIRSH": env, "ODD": "\udcff", "VIRTMIG_VIRSH_DEPTH": "1"}
    for locale in ({}, {"LC_CTYPE": "C.UTF-8"}):
        run = subprocess.run([str(shim / "virsh")], env={**given, **locale}, capture_output=True, check=True)
        seen = dict(row.split(b"=", 1) for row in run.stdout.splitlines())
        assert seen.pop(b"ODD") == b"\xff"
        assert set(seen) == {b"PATH", b"VIRTMIG_REAL_VIRSH", *(name.encode() for name in locale)}
    assert "VIRTMIG_VIRSH_DEPTH" in passed_environment({}, str(shim / "virsh"))


def test_signals_are_passed_as_they_were(shim: Path) -> None:
    """Python ignores SIGPIPE and SIGXFSZ; what follows must not."""
    cat = shutil.which("cat") or "/bin/cat"
    done = virsh(shim, "/proc/self/status", VIRTMIG_REAL_VIRSH=cat)
    plain = subprocess.run([cat, "/proc/self/status"], capture_output=True, text=True, check=True)
    for row in ("SigIgn", "SigBlk", "SigCgt"):
        found = [re.findall(rf"^{row}:\t(\w+)", text, re.MULTILINE) for text in (done.stdout, plain.stdout)]
        assert found[0] == found[1], row


# --- cost ------------------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_for_a_command_that_is_passed_on() -> None:
    asked = "import sys; before = set(sys.modules); import virtmig.integrations.virsh_shim; "
    asked += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "__future__", "_signal", "collections.abc", "enum", "functools", "keyword", "operator", "reprlib", "signal",
        "types", "collections", "_collections", "_functools", "_operator", "itertools",
        "virtmig", "virtmig.integrations", "virtmig.integrations.virsh_shim",
    }  # fmt: skip


@virsh_needed
def test_passing_on_costs_less_than_60_ms(shim: Path) -> None:
    """The quickest of some runs: the machine may be busy with something else."""
    quickest = {shim: math.inf, None: math.inf}
    for _ in range(20):
        for which in quickest:
            begun = time.perf_counter()
            virsh(which, "-v")
            quickest[which] = min(quickest[which], time.perf_counter() - begun)
        if quickest[shim] - quickest[None] < 0.060:
            return
    pytest.fail(f"{quickest[shim]:.3f} s instead of {quickest[None]:.3f} s")
