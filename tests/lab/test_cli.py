"""`virtmig lab ...` as a person types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtmig.lab.lab import Lab

pytestmark = pytest.mark.lab

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run() -> Iterator[Run]:
    """`run("up", ...)` is `virtmig lab up --name ...`; whatever is up at the end is taken down."""
    name = f"t{os.getpid()}"

    def virtmig(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "virtmig.cli.main", "lab", words[0], "--name", name, *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=Path(__file__).parents[2])

    yield virtmig
    virtmig("down")
    assert not Path(f"/tmp/vmlab-{os.getuid()}-{name}").exists()


@pytest.mark.root
def test_a_whole_session(full_lab: Lab, run: Run) -> None:
    up = run("up", "--form", "full", "--guests", "2", "--memory", "16", "--dirty", "2", "--bandwidth", "200")
    assert up.returncode == 0, up.stderr
    lines = up.stdout.splitlines()
    a, b = (line.partition(": ")[2] for line in lines[:2])
    assert any("virsh -c" in line for line in lines)
    assert any("virtmig -c" in line for line in lines)

    status = run("status").stdout
    assert "200 Mbit/s" in status
    assert "guest guest1: 16 MiB; a: running (booted), b: absent" in status

    moved = subprocess.run(
        ["virsh", "-c", a, "migrate", "--live", "--p2p", "guest2", b], capture_output=True, text=True
    )
    assert moved.returncode == 0, moved.stderr
    for guest, host in (("guest1", "a"), ("guest2", "b")):
        checked = run("check", guest)
        assert checked.returncode == 0, checked.stderr
        assert f"{guest} on host {host}" in checked.stdout

    assert run("exec", "b", "--", "hostname").stdout == "lab-b\n"
    assert run("exec", "a", "--", "sh", "-c", "exit 7").returncode == 7

    assert run("link", "--cut").returncode == 0
    assert "cut" in run("status").stdout
    assert run("link", "--restore").returncode == 0
    assert run("link", "--delay", "2").returncode == 0
    assert "link: 200 Mbit/s, delay 2 ms, loss 0 %\n" in run("status").stdout
    assert run("link", "--bandwidth", "0").returncode == 0
    assert "link: unlimited, delay 2 ms" in run("status").stdout
    assert "already up" in run("up").stderr
    assert run("down").returncode == 0


def test_down_without_a_lab_is_no_error(run: Run) -> None:
    done = run("down")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no lab is up" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status",), "no lab is up"),
        (("check", "x"), "no lab is up"),
        (("link",), "nothing was asked"),
        (("up", "--dirty", "much"), "'much' is no dirty rate"),
        (("up", "--memory", "32", "--walk", "99"), "does not fit"),
        (("up", "--dir", "/tmp/" + "x" * 60), "108 bytes"),
    ],
)
def test_errors_are_one_line_and_a_hint(run: Run, words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("hint: ")
