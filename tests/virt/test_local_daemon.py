"""What this machine says about a daemon that runs on it; the judgements are pure and tested as tables."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from virtmig.facts import version
from virtmig.virt.local_daemon import (
    Daemon,
    DeviceNode,
    Endpoint,
    available_memory_bytes,
    conf_value,
    file_system_of,
    find_daemon,
    judge_userfaultfd,
    locked_memory_limit_bytes,
    read_uri,
    same_mounts,
    tls_files,
)


@pytest.mark.parametrize(
    ("uri", "endpoint"),
    [
        ("qemu:///system", Endpoint("qemu", True, False, "")),
        ("qemu:///session", Endpoint("qemu", True, True, "")),
        ("qemu+unix:///session?socket=/x/y", Endpoint("qemu", True, True, "/x/y")),
        ("qemu+ssh://root@onyx/system", Endpoint("qemu", False, False, "")),
        ("qemu+tcp://[::1]:7/session", Endpoint("qemu", False, True, "")),
        ("test:///default", Endpoint("test", True, None, "")),
        ("", Endpoint("", True, None, "")),
    ],
)
def test_a_uri_is_taken_apart(uri: str, endpoint: Endpoint) -> None:
    assert read_uri(uri) == endpoint


ROOT_NODE = DeviceNode(0o600, 0)
UNPRIVILEGED: dict[str, Any] = {
    "qemu_uid": 4242,
    "uid_evidence": "test",
    "local": True,
    "session": False,
    "libvirt_version": version(9),
    "qemu_version": version(9),
    "sysctl": "0\n",
    "device": ROOT_NODE,
}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, "no", "uid 4242"),
        ({"qemu_uid": 0}, "yes", "root"),
        ({"qemu_uid": 0, "local": False}, "yes", "root"),
        ({"local": False}, "unknown", "cannot be asked"),
        ({"sysctl": None}, "unknown", "no vm.unprivileged_userfaultfd"),
        ({"sysctl": "1\n"}, "yes", "vm.unprivileged_userfaultfd=1"),
        ({"sysctl": "1\n", "qemu_uid": None}, "yes", "vm.unprivileged_userfaultfd=1"),
        ({"qemu_uid": None}, "unknown", "not known"),
        ({"device": None}, "no", "vm.unprivileged_userfaultfd=0"),
        ({"libvirt_version": version(10, 1)}, "yes", "libvirt >= 10.1"),
        ({"libvirt_version": version(10, 1), "session": True}, "no", "mode 0600"),
        ({"libvirt_version": version(10, 1), "device": None}, "no", "uid 4242"),
        ({"libvirt_version": version(10, 1), "qemu_version": version(7, 2)}, "no", "uid 4242"),
        ({"device": DeviceNode(0o666, 0)}, "yes", "0666"),
        ({"device": DeviceNode(0o600, 4242)}, "yes", "0600"),
        ({"device": DeviceNode(0o660, 0)}, "unknown", "group"),
        ({"device": DeviceNode(0o666, 0), "qemu_version": version(7, 2)}, "no", "uid 4242"),
    ],
)
def test_who_may_use_userfaultfd(change: dict[str, Any], status: str, words: str) -> None:
    found = judge_userfaultfd(**{**UNPRIVILEGED, **change})
    assert found.status == status
    assert words in found.evidence


def test_the_daemon_behind_a_socket_is_named_by_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    endpoint = read_uri(f"qemu+unix:///system?socket={path}")
    assert find_daemon(endpoint) is None
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        assert find_daemon(endpoint) == Daemon(os.getpid(), os.getuid())
    assert find_daemon(read_uri("qemu+ssh://onyx/system")) is None


def test_a_process_has_a_limit_of_locked_memory() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    assert locked_memory_limit_bytes(os.getpid()) == (-1 if hard == resource.RLIM_INFINITY else hard)
    assert locked_memory_limit_bytes(2**22 + 1) is None


def test_this_machine_has_memory() -> None:
    available = available_memory_bytes()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


MOUNTS = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 21 0:40 / /srv/guests rw - nfs4 filer:/guests rw
31 21 0:41 / /srv/with\\040space rw - ceph mon:/ rw
32 21 0:42 / /over rw - tmpfs tmpfs rw
33 32 0:43 / /over rw - xfs /dev/vdb rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/x.img", "ext4"),
        ("/srv/guests/x.img", "nfs4"),
        ("/srv/guests2/x.img", "ext4"),
        ("/srv/with space/x", "ceph"),
        ("/over/x", "xfs"),
        ("/srv/guests", "nfs4"),
    ],
)
def test_the_innermost_and_last_mount_counts(path: str, kind: str) -> None:
    assert file_system_of(path, MOUNTS) == kind


def test_no_mounts_no_file_system() -> None:
    assert file_system_of("/x", "") is None
    assert same_mounts(os.getpid()) is True
    assert same_mounts(2**22 + 1) is False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('name = "a b"', "a b"),
        ('  name="x" # why', "x"),
        ('#name = "x"', ""),
        ('other_name = "x"', ""),
        ('name = [\n "a",\n "b" ]', '[\n "a",\n "b" ]'),
        ("name = 3", ""),
        ("", ""),
    ],
)
def test_a_setting_of_a_configuration_file(text: str, value: str) -> None:
    assert conf_value(text, "name") == value


def test_certificates_of_other_hosts_are_unknown() -> None:
    assert tls_files(read_uri("qemu+ssh://onyx/system"), None).status == "unknown"
    assert tls_files(read_uri("qemu:///session"), os.getpid()).status == "unknown"
