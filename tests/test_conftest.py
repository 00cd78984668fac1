"""The last word on skips: how many, and why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]

SKIPPING = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_inside(number):
    pytest.skip("no second host")

@pytest.mark.skipif(True, reason="needs root")
def test_marked():
    pass

def test_passes():
    pass
"""


def run_pytest(folder: Path, text: str) -> str:
    (folder / "test_skipping.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
    ]
    done = subprocess.run([*command, str(folder)], cwd=TOP, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_skips_are_counted_by_reason_and_the_most_frequent_comes_first(tmp_path: Path) -> None:
    lines = run_pytest(tmp_path, SKIPPING).splitlines()
    at = next(number for number, line in enumerate(lines) if line.strip("= ") == "4 skipped")
    assert [line.split(maxsplit=1) for line in lines[at + 1 : at + 3]] == [["3", "no second host"], ["1", "needs root"]]


def test_nothing_is_said_when_nothing_was_skipped(tmp_path: Path) -> None:
    assert "skipped" not in run_pytest(tmp_path, "def test_passes():\n    pass\n")
