"""The systemd units: valid, hardened, and in agreement with the code and the sample configuration."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import virtmig.agent
from virtmig.agent.config import DEFAULT_PORT, AgentConfig

UNITS = Path(virtmig.agent.__file__).parent / "systemd"
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")


def settings(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


@needs_systemd
def test_systemd_accepts_them(tmp_path: Path) -> None:
    for name in ("virtmig-agent.service", "virtmig-agent.socket"):
        # the installed command may be elsewhere here, or nowhere
        text = (UNITS / name).read_text().replace("ExecStart=virtmig", f"ExecStart={sys.executable}")
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "virtmig" not in done.stderr


@needs_systemd
def test_the_service_is_shut_in() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", str(UNITS / "virtmig-agent.service")],
        capture_output=True,
        text=True,
    )
    if "offline" in done.stderr:
        pytest.skip("this systemd-analyze judges no files")
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= 2.0, done.stdout


def test_they_agree_with_the_code() -> None:
    service, sockets, config = settings("virtmig-agent.service"), settings("virtmig-agent.socket"), AgentConfig()
    assert sockets["ListenStream"] == ["/run/virtmig/agent.sock", str(DEFAULT_PORT)]
    assert service["Type"] == ["notify"]
    assert service["ExecStart"] == ["virtmig agent"]
    assert service["RuntimeDirectory"] == ["virtmig"]
    assert float(service["TimeoutStopSec"][0]) > config.deadlines.stop_s
    assert float(service["WatchdogSec"][0]) > 0
    assert sockets["SocketMode"] == [config.local.mode]
    # what discovery and the sockets' folder need
    assert "PrivateDevices" not in service
    assert "MemoryDenyWriteExecute" not in service
    assert service["SystemCallFilter"][-1] == "@chown"
