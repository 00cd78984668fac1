"""Those who call virsh: Pacemaker's VirtualDomain and a host's evacuation from cron, virtmig's virsh first in PATH."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from tests.support.facade import at_home
from tests.support.lab import GuestFactory, LabGuest
from tests.support.virsh import install_shim, virsh_needed
from virtmig.lab.guest import GuestSettings
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.report.records import records_folder

pytestmark = [pytest.mark.lab, pytest.mark.root, virsh_needed]

EVACUATE = Path(__file__).parents[2] / "hooks" / "evacuate"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def standing(full_lab: Lab) -> Iterator[LabGuest]:
    guest = LabGuest(full_lab, GuestSettings(name="clustered", memory_mib=24, dirty_mib_s=2.0))
    full_lab.start_guest(guest.settings)
    yield guest
    guest.close()


@pytest.fixture
def one(standing: LabGuest) -> LabGuest:
    """One guest for all, on host a."""
    return at_home(standing)


def on_host(host: LabHost, words: list[str], shim: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """As a daemon or cron has it: little in the environment, and no terminal."""
    given = {"PATH": f"{shim}:/usr/bin:/bin:/usr/sbin:/sbin", "VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"], **more}
    return subprocess.run(
        host.command(words), env=given, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90
    )


def records(of: LabGuest) -> int:
    folder = records_folder()
    assert folder is not None
    return sum(of.uuid in path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


# -- Pacemaker's VirtualDomain -----------------------------------------------------------------------------------------

#: the lines of VirtualDomain_migrate_to that move a guest, with its variables (resource-agents heartbeat/VirtualDomain)
MIGRATE_TO = """
VIRSH_OPTIONS="--connect=qemu:///system --quiet"
virsh ${VIRSH_OPTIONS} migrate-setspeed $DOMAIN_NAME 64
virsh ${VIRSH_OPTIONS} migrate --live $migrate_opts $DOMAIN_NAME $remoteuri $migrateuri &
migrate_pid=${!}
wait ${migrate_pid}
"""


def test_what_virtualdomain_calls(full_lab: Lab, one: LabGuest, shim: Path) -> None:
    before = records(one)
    options = {"DOMAIN_NAME": one.name, "remoteuri": f"qemu+tcp://{full_lab.b.hostname}/system", "migrateuri": ""}
    refused = on_host(full_lab.a, ["sh", "-c", MIGRATE_TO], shim, migrate_opts="--zerocopy", **options)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: zero-copy is only available for parallel migration" in refused.stderr
    assert one.only_on(full_lab.a)
    done = on_host(full_lab.a, ["sh", "-c", MIGRATE_TO], shim, migrate_opts="--auto-converge", **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert one.only_on(full_lab.b)
    assert records(one) == before + 1


@pytest.fixture
def agent() -> tuple[Path, str]:
    """VirtualDomain, and its OCF_ROOT."""
    for root in (os.environ.get("VIRTMIG_MANAGERS", "") + "/resource-agents/usr/lib/ocf", "/usr/lib/ocf"):
        path = Path(root, "resource.d", "heartbeat", "VirtualDomain")
        if path.exists():
            return path, root
    pytest.skip("needs resource-agents, installed or unpacked in $VIRTMIG_MANAGERS/resource-agents")


@pytest.mark.slow
def test_virtualdomain_itself(
    full_lab: Lab, one: LabGuest, shim: Path, agent: tuple[Path, str], tmp_path: Path
) -> None:
    """As Pacemaker's executor calls it: migrate_to on the one node, migrate_from and monitor on the other."""
    program, root = agent
    config = tmp_path / "clustered.xml"
    config.write_text(one.domain(full_lab.a).XMLDesc(0))

    def act(host: LabHost, action: str, options: str = "--auto-converge") -> subprocess.CompletedProcess[str]:
        return on_host(
            host, [str(program), action], shim, OCF_ROOT=root, OCF_RESOURCE_INSTANCE="vm-clustered", HA_LOGFACILITY="",
            OCF_RESOURCE_TYPE="VirtualDomain", OCF_RESOURCE_PROVIDER="heartbeat", HA_RSCTMP=str(tmp_path),
            HA_LOGFILE=str(tmp_path / "log"), HA_use_logd="no",
            OCF_RESKEY_config=str(config), OCF_RESKEY_hypervisor="qemu:///system", OCF_RESKEY_migration_transport="tcp",
            OCF_RESKEY_migrate_options=options, OCF_RESKEY_migration_speed="16", OCF_RESKEY_migration_downtime="250",
            OCF_RESKEY_autoset_utilization_cpu="false", OCF_RESKEY_autoset_utilization_host_memory="false",
            OCF_RESKEY_autoset_utilization_hv_memory="false", OCF_RESKEY_CRM_meta_timeout="60000",
            OCF_RESKEY_CRM_meta_migrate_source=full_lab.a.hostname, VIRTMIG_MIGRATE_OPTIONS="--max-downtime 300",
            OCF_RESKEY_CRM_meta_migrate_target=full_lab.b.hostname,
        )  # fmt: skip

    before = records(one)
    failed = act(full_lab.a, "migrate_to", "--zerocopy")
    assert failed.returncode == 1
    assert "zero-copy is only available for parallel migration" in failed.stderr
    assert f"live migration to {full_lab.b.hostname} failed: 1" in failed.stderr
    assert one.only_on(full_lab.a)
    assert act(full_lab.a, "monitor").returncode == 0
    moved = act(full_lab.a, "migrate_to")
    assert moved.returncode == 0, moved.stderr
    assert act(full_lab.b, "migrate_from").returncode == 0
    assert act(full_lab.b, "monitor").returncode == 0
    assert act(full_lab.a, "monitor").returncode == 7  # OCF_NOT_RUNNING
    assert records(one) == before + 1
    one.check(full_lab.b)


# -- maintenance -------------------------------------------------------------------------------------------------------


def test_a_host_is_evacuated_from_cron(
    full_lab: Lab, one: LabGuest, guest: GuestFactory, shim: Path, tmp_path: Path
) -> None:
    """One cannot move: it stays and is named, the other goes; what one destination does not take goes to the next."""
    stays, goes = one, guest(memory_mib=16, persistent=True)
    domain = stays.domain(full_lab.a)
    snapshot = domain.snapshotCreateXML(
        f"<domainsnapshot><name>s</name><state>running</state><creationTime>1</creationTime>{domain.XMLDesc(0)}"
        "</domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE,
    )
    there, nowhere = f"qemu+tcp://{full_lab.b.hostname}/system", "qemu+tcp://127.0.0.9:1/system"
    lock = {"EVACUATE_LOCK": str(tmp_path / "lock")}
    done = on_host(full_lab.a, [str(EVACUATE), nowhere, there], shim, **lock)
    assert done.returncode == 1
    assert f"{goes.name} is on {there}\n" in done.stdout
    assert f"evacuate: {stays.name} stays here\n" in done.stderr
    assert "cannot migrate domain with 1 snapshots" in done.stderr
    assert stays.only_on(full_lab.a)
    assert goes.only_on(full_lab.b)
    assert goes.state(full_lab.a) is None
    assert goes.domain(full_lab.b).isPersistent()
    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    done = on_host(full_lab.a, [str(EVACUATE), there], shim, **lock)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{stays.name} is on {there}\n1 moved\n"
    assert stays.only_on(full_lab.b)
    done = on_host(full_lab.a, [str(EVACUATE), there], shim, **lock)  # cron mails what is printed: nothing
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_evacuations_do_not_overlap(full_lab: Lab, shim: Path, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen(["flock", str(lock), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"held\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"held\n"
        done = on_host(full_lab.a, [str(EVACUATE), "qemu:///system"], shim, EVACUATE_LOCK=str(lock))
    assert (done.returncode, done.stdout) == (2, "")
    assert "another one is at work" in done.stderr
    assert on_host(full_lab.a, [str(EVACUATE)], shim).returncode == 2
