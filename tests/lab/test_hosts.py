"""The two hosts: who they are, what reaches them, and their daemons frozen, killed and started again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import libvirt
import pytest
from lxml import etree

from tests.support.lab import GuestFactory, eventually, frozen
from virtmig.errors import LabError
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.lab.processes import Process
from virtmig.virt.connection import connected

pytestmark = pytest.mark.lab


def on(host: LabHost, *words: str) -> str:
    return subprocess.run(
        host.command(list(words)), capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


def host_uuid(host: LabHost) -> str:
    with connected(host.uri) as connection:
        return etree.fromstring(connection.getCapabilities()).findtext("host/uuid") or ""


@pytest.mark.parametrize("form", ["lab", "session_lab"])
def test_two_hosts_with_uuids_of_their_own(request: pytest.FixtureRequest, form: str) -> None:
    lab: Lab = request.getfixturevalue(form)
    assert host_uuid(lab.a) != host_uuid(lab.b)
    assert lab.a.daemon_pid != lab.b.daemon_pid


@pytest.mark.root
def test_namespaces_hide_the_system_and_the_other_host(full_lab: Lab) -> None:
    own = Path("/proc/self/ns")
    for kind in ("mnt", "net", "uts"):
        seen = {os.readlink(own / kind), *(os.readlink(f"/proc/{h.daemon_pid}/ns/{kind}") for h in full_lab.hosts)}
        assert len(seen) == 3, kind
    assert [on(host, "hostname") for host in full_lab.hosts] == ["lab-a", "lab-b"]
    assert on(full_lab.a, "cat", "/etc/machine-id") != on(full_lab.b, "cat", "/etc/machine-id")


@pytest.mark.root
def test_tcp_uri_inside_the_lab(full_lab: Lab) -> None:
    assert on(full_lab.a, "virsh", "-c", full_lab.b.tcp_uri, "hostname") == "lab-b"


def test_session_daemons_run_as_an_ordinary_user(session_lab: Lab) -> None:
    for host in session_lab.hosts:
        assert os.stat(f"/proc/{host.daemon_pid}").st_uid != 0
        assert on(host, "virsh", "-c", "qemu:///session" if os.getuid() else host.uri, "uri").startswith("qemu")


def test_killed_daemon_is_gone_and_its_guest_runs_on(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16)
    pid = lab.a.qemu_pid(made.name)
    lab.a.kill_daemon()
    try:
        with pytest.raises(LabError, match="is not running"):
            lab.a.freeze_daemon()
        assert lab.where(made.name)["a"].startswith("unknown (")
        beat = lab.heartbeat(lab.a, made.name) or 0
        eventually(lambda: (lab.heartbeat(lab.a, made.name) or 0) > beat, "another heartbeat")
    finally:
        lab.a.start_daemon()
        lab.a.await_daemon()
    assert lab.a.qemu_pid(made.name) == pid
    eventually(lambda: made.running(lab.a), "the new daemon finds the guest")
    made.check(lab.a)


def test_kill_and_start_again_and_again(lab: Lab) -> None:
    seen = set()
    for _ in range(6):
        lab.b.kill_daemon()
        lab.b.start_daemon()
        lab.b.await_daemon(10)
        seen.add(lab.b.daemon_pid)
        assert lab.virsh(lab.b, "uri")
    assert len(seen) == 6


def test_start_of_a_running_daemon_changes_nothing(lab: Lab) -> None:
    pid = lab.a.daemon_pid
    lab.a.start_daemon()
    lab.a.await_daemon()
    assert lab.virsh(lab.a, "uri")
    assert lab.a.daemon_pid == pid


def test_frozen_daemon_answers_nobody_and_thaws(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16)
    daemon = Process.of(lab.a.daemon_pid)
    ask = ["timeout", "1", "virsh", "-c", lab.a.uri, "domstate", made.name]
    with frozen(lab.a):
        assert subprocess.run(ask, capture_output=True).returncode == 124
        beat = lab.heartbeat(lab.a, made.name) or 0
        eventually(lambda: (lab.heartbeat(lab.a, made.name) or 0) > beat, "another heartbeat")
    assert daemon.alive
    assert made.state(lab.a) == libvirt.VIR_DOMAIN_RUNNING


def test_qemu_pid(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16)
    pid = lab.a.qemu_pid(made.name)
    assert f"guest={made.name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert lab.b.qemu_pid(made.name) is None
