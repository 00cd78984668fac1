"""Nova's own Guest moves real guests, the facade in place as hooks/nova.md says; without Nova, none of this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.support.facade import switch_line
from tests.support.lab import GuestFactory, LabGuest
from virtmig.lab.agents import agent_address, agent_socket, kill_agent, start_agents
from virtmig.lab.lab import Lab
from virtmig.report.records import records_folder

pytestmark = [pytest.mark.nova, pytest.mark.lab, pytest.mark.root]

CHECKOUT = Path(__file__).resolve().parents[3]
POSTCOPY, PARALLEL = int(libvirt.VIR_MIGRATE_POSTCOPY), int(libvirt.VIR_MIGRATE_PARALLEL)


def drive(
    python: Path,
    tmp_path: Path,
    guest: LabGuest,
    lab: Lab,
    flags: int,
    *words: str,
    policy: str = "",
    facade: bool = True,
) -> dict[str, Any]:
    (tmp_path / "virtmig.pth").write_text(switch_line())
    # a folder on PYTHONPATH is not searched for .pth files; this reads them as site-packages are read
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(tmp_path)!r})")
    (tmp_path / "policy.toml").write_text(policy)
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name("drive.py")), lab.a.uri, guest.uuid, lab.b.uri, str(flags), *words],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{CHECKOUT}", "VIRTMIG_POLICY": str(tmp_path / "policy.toml"),
             "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true", "VIRTMIG_INSTALL": "1" if facade else ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["facade"] is facade
    assert said["version"]
    return said


def records() -> int:
    folder = records_folder()
    assert folder is not None
    return len(list(folder.iterdir())) if folder.is_dir() else 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [(27, ()), (155, ()), (27 + PARALLEL, ("parallel=2",))],
    ids=["27", "155 without disks", "parallel"],
)
def test_a_real_guest_moves(
    nova_python: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path, flags: int, words: tuple[str, ...]
) -> None:
    fresh = guest(persistent=True)
    before = records()
    said = drive(nova_python, tmp_path, fresh, full_lab, flags, *words)
    assert said["error"] is None
    assert said["events"] > 0
    assert records() == before + 1
    assert fresh.only_on(full_lab.b)
    assert fresh.state(full_lab.a) is None
    assert fresh.domain(full_lab.b).isPersistent()
    fresh.check(full_lab.b)


def test_through_the_agents_behind_the_fence(
    nova_python: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path
) -> None:
    fresh = guest(persistent=True)
    policy = (f'transport = "relay"\nfence = true\nagent = "{agent_socket(full_lab.a)}"\n'
              f'destination-agent = "{agent_address(full_lab.b)}"\n')  # fmt: skip
    start_agents(full_lab)
    try:
        assert drive(nova_python, tmp_path, fresh, full_lab, 27, policy=policy)["error"] is None
    finally:
        for host in full_lab.hosts:
            kill_agent(full_lab, host)
    fresh.check(full_lab.b)


def test_nova_aborts_and_hears_what_it_hears_without_virtmig(
    nova_python: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path
) -> None:
    fresh = guest(persistent=True, dirty_mib_s=None)
    plain, ours = (
        drive(nova_python, tmp_path, fresh, full_lab, 27, "bandwidth=4", "then=abort", facade=facade)
        for facade in (False, True)
    )
    assert (ours["code"], ours["domain"]) == (plain["code"], plain["domain"]) == (78, 10)
    assert ours["error"].startswith(plain["error"])
    assert ours["samples"] > 0
    assert fresh.only_on(full_lab.a)
    fresh.check(full_lab.a)


def test_nova_forces_it_complete_by_postcopy(
    nova_python: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path
) -> None:
    fresh = guest(persistent=True, dirty_mib_s=None)
    said = drive(nova_python, tmp_path, fresh, full_lab, 27 + POSTCOPY, "bandwidth=24", "then=postcopy")
    assert said["error"] is None
    assert fresh.only_on(full_lab.b)
    fresh.check(full_lab.b)


def test_the_pair_that_loses_guests_is_refused_before_anything_starts(
    nova_python: Path, full_lab: Lab, guest: GuestFactory, tmp_path: Path
) -> None:
    """Nova sets parallel and postcopy together where it is told to; QEMU 7.2 takes the pair and loses the guest."""
    fresh = guest(persistent=True)
    if fresh.connection(full_lab.a).getVersion() >= 10_001_000:
        pytest.skip("this QEMU can do both")
    said = drive(nova_python, tmp_path, fresh, full_lab, 27 + POSTCOPY + PARALLEL, "parallel=2")
    assert said["code"] == libvirt.VIR_ERR_INTERNAL_ERROR
    assert "this QEMU accepts multifd with postcopy" in said["error"]
    assert fresh.only_on(full_lab.a)
