"""VDSM's own migration thread moves real guests, the facade in place as hooks/nova.md says; skipped without VDSM."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.facade import switch_line
from tests.support.lab import GuestFactory, LabGuest
from virtmig.lab.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.lab, pytest.mark.root]

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def vdsm() -> Path:
    """Its sources, and an environment with what they import."""
    folder = Path(os.environ.get("VIRTMIG_MANAGERS", "/nonexistent"), "vdsm")
    if not (folder / "venv" / "bin" / "python").exists():
        pytest.skip("needs VDSM's lib/ and a venv in $VIRTMIG_MANAGERS/vdsm (hooks/nova.md)")
    return folder


def drive(vdsm: Path, tmp_path: Path, guest: LabGuest, lab: Lab, *words: str, facade: bool = True) -> dict[str, Any]:
    """On host a, as vdsmd runs there."""
    (tmp_path / "virtmig.pth").write_text(switch_line())
    # a folder on PYTHONPATH is not searched for .pth files; this reads them as site-packages are read
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(tmp_path)!r})")
    (tmp_path / "policy.toml").write_text("")
    program = [str(vdsm / "venv" / "bin" / "python"), str(Path(__file__).with_name("drive.py"))]
    done = subprocess.run(
        lab.a.command([*program, "qemu:///system", guest.uuid, lab.b.hostname, *words]),
        capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{vdsm}/lib:{CHECKOUT}", "VIRTMIG_INSTALL": "1" if facade else "",
             "VIRTMIG_POLICY": str(tmp_path / "policy.toml")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["facade"] is facade
    return said


def test_its_schedule_moves_a_guest(vdsm: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path) -> None:
    fresh = guest(persistent=True, dirty_mib_s=2.0)
    said = drive(vdsm, tmp_path, fresh, full_lab, "minimal downtime", "bandwidth=32")
    assert (said["error"], said["flags"]) == (None, 11)
    assert said["events"] > 0
    assert fresh.only_on(full_lab.b)
    fresh.check(full_lab.b)


def test_its_schedule_aborts_and_it_hears_what_it_hears_without_virtmig(
    vdsm: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path
) -> None:
    fresh = guest(persistent=True, dirty_mib_s=None)
    plain, ours = (
        drive(vdsm, tmp_path, fresh, full_lab, "abort", "bandwidth=24", facade=facade) for facade in (False, True)
    )
    assert (ours["code"], ours["domain"]) == (plain["code"], plain["domain"]) == (78, 10)
    assert ours["error"].startswith(plain["error"])
    assert fresh.only_on(full_lab.a)


def test_its_schedule_switches_to_postcopy(vdsm: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path) -> None:
    fresh = guest(persistent=True, dirty_mib_s=None)
    said = drive(vdsm, tmp_path, fresh, full_lab, "post-copy", "bandwidth=24")
    assert (said["error"], said["flags"]) == (None, 11 + 32768)
    assert fresh.only_on(full_lab.b)
    fresh.check(full_lab.b)
