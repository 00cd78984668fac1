"""Signals, terminals and closed streams: as the real virsh takes them; and the form of its progress line."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.lab import eventually
from tests.support.virsh import (
    REAL,
    Terminal,
    environment,
    install_shim,
    listening,
    virsh_needed,
)
from virtmig.integrations.virsh_terminal import progress_form


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(params=["real", "ours"])
def which(request: pytest.FixtureRequest, shim: Path) -> Path | None:
    return None if request.param == "real" else shim


@virsh_needed
def test_the_interactive_shell(which: Path | None) -> None:
    shell = Terminal(which, "-c", "test:///default")
    with contextlib.closing(shell):
        shell.expect("Welcome to virsh, the virtualization interactive terminal.")
        shell.expect("virsh # ")
        shell.press("list --name\n")
        shell.expect("\ntest")
        shell.expect("virsh # ")
        shell.press("migrate test nonsense\n")
        shell.expect("error: no connection driver available for URI 'nonsense'")
        shell.expect("virsh # ")
        shell.press("quit\n")
        assert shell.wait() == 0


@virsh_needed
def test_keys_on_a_terminal_reach_a_passed_on_command(which: Path | None) -> None:
    """Ctrl-Z stops it under a shell's job control, Ctrl-C ends it as virsh ends."""
    program = REAL if which is None else str(which / "virsh")
    line = f"{shlex.quote(program)} -c test:///default event --all --loop"
    shell = Terminal(which, "-c", f'set -m; {line}; echo "stopped: $?"; fg; echo "ended: $?"', program="/bin/sh")
    with contextlib.closing(shell):
        eventually(lambda: listening(shell.pid), "virsh waiting for events")
        shell.press("\x1a")
        shell.expect(f"stopped: {128 + signal.SIGTSTP}")
        eventually(lambda: os.tcgetpgrp(shell.file) not in (0, shell.pid), "virsh in the foreground again")
        shell.press("\x03")
        shell.expect("events received: 0")
        shell.expect("ended: 1")
        assert shell.wait() == 0


@virsh_needed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("words", [["event", "--all", "--loop"], ["domjobabort test; event --all --loop"]], ids=str)
def test_signals_reach_a_passed_on_command(which: Path | None, words: list[str], number: signal.Signals) -> None:
    """Also one that stands behind a command of ours."""
    child = subprocess.Popen(
        ["virsh", "-c", "test:///default", *words],
        executable=REAL if which is None else str(which / "virsh"),
        env=environment(which),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    eventually(lambda: listening(child.pid), "virsh waiting for events")
    said = None
    while said is None:  # virsh may not have come to wait for it yet
        child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = child.communicate(timeout=5)[0]
    assert child.returncode == (1 if number == signal.SIGINT else -number)  # 1: no event was seen
    assert said.endswith("events received: 0\n\n") == (number == signal.SIGINT)


@virsh_needed
@pytest.mark.parametrize("line", ["help", "-c test:///default domjobabort test"])
@pytest.mark.parametrize("redirections", ["<&- >&-", ">/dev/full", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_streams(shim: Path, line: str, redirections: str) -> None:
    status = [
        subprocess.run(
            ["sh", "-c", f"{shlex.quote(program)} {line} {redirections}"],
            env=environment(which), stderr=subprocess.DEVNULL, timeout=30, check=False,
        ).returncode
        for which, program in ((None, REAL), (shim, str(shim / "virsh")))
    ]  # fmt: skip
    assert status[0] == status[1]


@virsh_needed
def test_a_reader_that_has_gone(which: Path | None) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            ["virsh", "help"],
            executable=REAL if which is None else str(which / "virsh"),
            env=environment(which), stdin=subprocess.DEVNULL, stdout=gone, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("version", "is_terminal", "before", "after", "decimals"),
    [
        ((9, 0), True, "\r", "", False),
        ((9, 0), False, "\r", "", False),
        ((12, 8), True, "\r", "", True),
        ((12, 8), False, "", "\n", True),
    ],
)
def test_the_progress_line_is_that_of_the_installed_libvirt(
    version: tuple[int, int], is_terminal: bool, before: str, after: str, decimals: bool
) -> None:
    form = progress_form(is_terminal, version)
    assert (form.before, form.after, form.decimals) == (before, after, decimals)
