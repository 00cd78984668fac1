"""A pid is only good together with its start time; waiting ends with a reason."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from virtmig.errors import LabError
from virtmig.lab.processes import Process, await_true


def test_recycled_pid_is_neither_alive_nor_signalled() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        real = Process.of(child.pid)
        former = Process(child.pid, real.started - 1)
        assert real.alive
        assert not former.alive
        former.signal(signal.SIGKILL)
        former.end(1.0)
        assert real.alive
        real.end(5.0)
        assert not real.alive  # a zombie is not alive
        assert child.wait() == -signal.SIGTERM


def test_end_of_one_that_ignores_sigterm() -> None:
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen(["python3", "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        Process.of(child.pid).end(0.1)
        assert child.wait() == -signal.SIGKILL


def test_a_name_with_spaces_and_parentheses(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(odd), "60"]) as child:
        assert Process.of(child.pid).alive
        child.kill()


def test_await_true_says_what_and_ends_with_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\nthree\nfour\nfive\nsix\n")
    with pytest.raises(LabError, match=r"the thing did not come within 0\.01 s: two / three / four / five / six"):
        await_true(lambda: False, 0.01, "the thing", log)
    with pytest.raises(LabError, match=r"0\.01 s$"):
        await_true(lambda: False, 0.01, "the thing", tmp_path / "none")


def test_await_true_takes_a_condition_that_holds_after_the_time() -> None:
    await_true(lambda: True, 0.0, "now")


def test_of_nobody() -> None:
    assert not Process.of(2**22 + os.getpid()).alive
