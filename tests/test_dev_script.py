"""The set-up script: its words and exit codes, the line for the administrator on each distribution, its speed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
DEV = TOP / "dev"
SHELL = shutil.which("dash") or "sh"

#: os-release(5) files as the distributions ship them, cut to the three fields that are read
RELEASES = {
    "debian": 'ID=debian\nVERSION_ID="12"\n',
    "ubuntu": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n',
    "fedora": "ID=fedora\nVERSION_ID=42\n",
    "rocky": 'ID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.6"\n',
    "tumbleweed": 'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\nVERSION_ID="20261101"\n',
    "arch": "ID=arch\n",
}

#: (distribution, the command it installs with, packages that the line must name when the lab's programs are missing)
ADMIN_LINES = [
    ("debian", "apt-get install -y --no-install-recommends", {"qemu-system-x86", "libvirt-clients"}),
    ("ubuntu", "apt-get install -y --no-install-recommends", {"qemu-system-x86", "libvirt-clients"}),
    ("fedora", "dnf install -y", {"qemu-system-x86-core", "libvirt-client"}),
    ("rocky", "dnf install -y", {"qemu-kvm", "libvirt-client"}),
    ("tumbleweed", "zypper --non-interactive install --no-recommends", {"qemu-x86", "libvirt-client"}),
    ("arch", "pacman -S --needed --noconfirm", {"qemu-system-x86", "libvirt"}),
]

#: everything the script itself calls, and nothing of a hypervisor or a compiler
PROGRAMS = [
    "awk",
    "cat",
    "cksum",
    "cp",
    "date",
    "dirname",
    "find",
    "id",
    "mkdir",
    "readlink",
    "rm",
    "sed",
    "tail",
    "tr",
]


def run_dev(
    *arguments: str, script: Path = DEV, env: dict[str, str] | None = None, cwd: Path = TOP
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHELL, str(script), *arguments],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh copy of what the set-up reads, in a folder with a space in its name; there is no .venv in it."""
    folder = tmp_path / "a check out"
    folder.mkdir()
    for name in ("dev", "pyproject.toml"):
        shutil.copy2(TOP / name, folder / name)
    return folder


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with a POSIX system's programs and this Python, but no compiler, virsh or QEMU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in PROGRAMS:
        found = shutil.which(program)
        assert found, f"{program} is not installed"
        (folder / program).symlink_to(found)
    return str(folder)


def test_it_is_posix_shell() -> None:
    assert DEV.read_text().startswith("#!/bin/sh\n")
    assert os.access(DEV, os.X_OK)
    assert subprocess.run([SHELL, "-n", str(DEV)], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    result = subprocess.run(["shellcheck", str(DEV), str(TOP / ".ci/run")], capture_output=True, text=True)
    assert result.stdout == ""


def test_help_names_every_verb() -> None:
    result = run_dev("help")
    cases = re.findall(r"^ {4}([\w |]+)\)(?:$| \w)", DEV.read_text().split("case $verb in")[-1], re.MULTILINE)
    verbs = [verb for case in cases for verb in case.split(" | ")]
    assert result.returncode == 0
    assert sorted(verbs) == sorted(
        ["demo", "test", "lint", "fuzz", "bench", "soak", "compat", "setup", "clean", "help"]
    )
    for verb in verbs:
        assert re.search(rf"^  {verb} ", result.stdout, re.MULTILINE)
    assert run_dev().stdout == run_dev("--help").stdout == result.stdout


@pytest.mark.parametrize("arguments", [["mkae"], ["--fast", "test"]])
def test_an_unknown_word_is_a_usage_error(arguments: list[str]) -> None:
    result = run_dev(*arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr
    assert "usage:" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("interpreter", "words"), [("no-such-python", "no such program"), ("false", "not a Python 3.11 or newer")]
)
def test_an_interpreter_that_was_asked_for_is_never_replaced(checkout: Path, interpreter: str, words: str) -> None:
    result = run_dev("--offline", "setup", script=checkout / "dev", env={"VIRTMIG_PYTHON": interpreter})
    assert result.returncode == 1
    assert f"VIRTMIG_PYTHON={interpreter}" in result.stderr
    assert words in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("distribution", "command", "packages"), ADMIN_LINES, ids=[row[0] for row in ADMIN_LINES])
def test_the_line_for_the_administrator(
    checkout: Path, bare_path: str, tmp_path: Path, distribution: str, command: str, packages: set[str]
) -> None:
    release = tmp_path / "os-release"
    release.write_text(RELEASES[distribution])
    env = {"VIRTMIG_OS_RELEASE": str(release), "VIRTMIG_PYTHON": sys.executable, "PATH": bare_path}
    result = run_dev("--offline", "setup", script=checkout / "dev", env=env)
    assert result.returncode == 1
    lines = [line.strip() for line in result.stderr.splitlines() if line.startswith("    ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{command} ")
    named = lines[0].removeprefix(f"{command} ").split()
    assert packages <= set(named)
    assert len(named) == len(set(named))
    assert not (checkout / ".venv").exists()


def test_a_distribution_that_is_not_known(checkout: Path, bare_path: str, tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text("ID=plan9\n")
    env = {"VIRTMIG_OS_RELEASE": str(release), "VIRTMIG_PYTHON": sys.executable, "PATH": bare_path}
    result = run_dev("setup", script=checkout / "dev", env=env)
    assert result.returncode == 1
    assert "missing on this machine:" in result.stderr
    assert " virsh" in result.stderr
    assert "plan9" in result.stderr


#: an interpreter that notes what it is asked for; pip and the demos only say that they were run
FAKE_PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >>"$FAKE_LOG"
case "$1 $2" in
    "-m pip") case "$*" in *"$FAKE_PIP_FAILS"*) exit 1 ;; *) exit 0 ;; esac ;;
    "-m virtmig"*) echo "ran $*" && exit 0 ;;
    *"$FAKE_MISSING"*) exit 1 ;;
esac
exec "{real}" "$@"
"""


class FakeMachine:
    """A machine without hypervisor and compiler; `run` is ./dev there, with an environment that pip never touches."""

    def __init__(self, checkout: Path, path: str, tmp_path: Path) -> None:
        self.checkout = checkout
        self.log = tmp_path / "asked"
        self.requirements = checkout / ".dev/requirements.txt"
        self.stamp = checkout / ".venv/dev.stamp"
        self.engine_stamp = checkout / ".venv/dev.engine-stamp"
        release = tmp_path / "os-release"
        release.write_text(RELEASES["debian"])
        python = checkout / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(FAKE_PYTHON.replace("{real}", sys.executable))
        python.chmod(0o755)
        self.env = {
            "PATH": path,
            "VIRTMIG_OS_RELEASE": str(release),
            "VIRTMIG_PYTHON": str(python),
            "FAKE_LOG": str(self.log),
            "FAKE_PIP_FAILS": "nothing",
            "FAKE_MISSING": "import libvirt",
        }

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        return run_dev(*arguments, script=self.checkout / "dev", env=self.env | env)

    @property
    def installed(self) -> list[str]:
        """What pip was asked to install, since `run`."""
        asked = self.log.read_text().splitlines()
        return [line.split("install ", 1)[1] for line in asked if line.startswith("-m pip install ")]


@pytest.fixture
def machine(checkout: Path, bare_path: str, tmp_path: Path) -> FakeMachine:
    return FakeMachine(checkout, bare_path, tmp_path)


def test_a_demo_without_a_hypervisor_is_the_engines(machine: FakeMachine) -> None:
    result = machine.run("--no-system", "demo")
    assert (result.returncode, result.stdout) == (0, "ran -m virtmig.engine.demo\n"), result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("    apt-get install ")]) == 1
    assert "virtmig's own engine" in result.stderr
    assert machine.installed == ["--requirement .dev/requirements.txt", "--no-deps --editable ."]
    needed = machine.requirements.read_text()
    assert "numpy" in needed
    assert "msgspec" in needed
    assert "libvirt" not in needed
    assert machine.engine_stamp.exists()
    assert not machine.stamp.exists()


def test_a_second_demo_installs_nothing_and_a_set_up_is_still_incomplete(machine: FakeMachine) -> None:
    machine.run("--no-system", "demo")
    result = machine.run("--no-system", "demo")
    assert (result.returncode, result.stdout) == (0, "ran -m virtmig.engine.demo\n")
    assert machine.installed == []
    result = machine.run("--no-system", "setup")
    assert result.returncode == 1
    assert "missing on this machine:" in result.stderr


def test_a_demo_on_a_distribution_that_is_not_known(machine: FakeMachine) -> None:
    Path(machine.env["VIRTMIG_OS_RELEASE"]).write_text("ID=plan9\n")
    result = machine.run("demo")
    assert (result.returncode, result.stdout) == (0, "ran -m virtmig.engine.demo\n")
    assert "plan9" in result.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libvirt"), reason="libvirt's Python binding is not installed")
def test_with_the_binding_at_hand_the_set_up_of_python_is_complete(machine: FakeMachine) -> None:
    result = machine.run("--no-system", "demo", FAKE_MISSING="nothing of this name")
    assert machine.stamp.exists()
    assert result.stdout == "ran -m virtmig.engine.demo\n"
    assert machine.installed == ["--editable .[dev]"]
    assert not machine.engine_stamp.exists()


def test_a_binding_that_cannot_be_built_does_not_stop_the_demo(machine: FakeMachine) -> None:
    result = machine.run("--no-system", "demo", FAKE_MISSING="nothing of this name", FAKE_PIP_FAILS="[dev]")
    assert (result.returncode, result.stdout) == (0, "ran -m virtmig.engine.demo\n")
    assert machine.installed[-2:] == ["--requirement .dev/requirements.txt", "--no-deps --editable ."]
    assert machine.engine_stamp.exists()
    assert not machine.stamp.exists()


def test_packages_that_cannot_be_had_are_an_error(machine: FakeMachine) -> None:
    result = machine.run("--no-system", "demo", FAKE_PIP_FAILS="install")
    assert (result.returncode, result.stdout) == (1, "")
    assert not machine.engine_stamp.exists()
    assert not machine.stamp.exists()


def test_the_engines_demo_when_it_is_asked_for(machine: FakeMachine) -> None:
    result = machine.run("demo", "--engine", "--memory", "16")
    assert (result.returncode, result.stdout) == (0, "ran -m virtmig.engine.demo --memory 16\n"), result.stderr
    assert "missing" not in result.stderr
    assert machine.installed == ["--requirement .dev/requirements.txt", "--no-deps --editable ."]


def test_without_any_way_to_an_environment_there_is_no_demo(machine: FakeMachine) -> None:
    python = machine.checkout.parent / "python"
    (machine.checkout / ".venv/bin/python").rename(python)
    env = {"VIRTMIG_PYTHON": str(python), "FAKE_MISSING": "import ensurepip"}
    result = machine.run("--no-system", "demo", **env)
    assert (result.returncode, result.stdout) == (1, "")
    assert " ensurepip" in result.stderr


def test_a_row_for_every_need_and_a_need_for_every_row() -> None:
    text = DEV.read_text()
    table = text.split("cat <<'TABLE'\n")[1].split("\nTABLE\n")[0].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table if not line.startswith("#")}
    assert all(len(cells) == 4 for cells in rows.values())
    needs = set(re.findall(r"printf ' ([\w.+-]+)'", text)) | {"python", "ensurepip"}
    needs |= set(re.search(r"for program in (.+); do", text)[1].split())
    assert needs == set(rows)


def test_setup_a_second_time_is_quick_and_silent() -> None:
    if not (TOP / ".venv/dev.stamp").exists():
        pytest.skip("./dev did not set up the environment that runs these tests")
    run_dev("setup")
    before = time.monotonic()
    result = run_dev("setup", cwd=Path("/"))
    elapsed_s = time.monotonic() - before
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert elapsed_s < 15


def test_clean_removes_what_was_made_and_nothing_else(checkout: Path) -> None:
    for made in (".venv/bin", ".dev", "virtmig/__pycache__", ".pytest_cache"):
        (checkout / made).mkdir(parents=True)
    (checkout / "virtmig/kept.py").touch()
    assert run_dev("clean", script=checkout / "dev").returncode == 0
    left = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    assert left == {"dev", "pyproject.toml", "virtmig/kept.py"}
    assert sorted(path.name for path in checkout.iterdir()) == ["dev", "pyproject.toml", "virtmig"]
