"""This very host looked at, against second opinions; what it cannot have is played from files."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.support.emulators import BINARY
from virtmig.agent import discovery as module
from virtmig.agent.access import QemuUser
from virtmig.agent.config import AgentConfig, DeadlinesSection, LimitsSection, QemuSection
from virtmig.agent.discovery import (
    FAILURE_KEPT_S,
    AgentFacts,
    Cpus,
    Device,
    Discovery,
    Link,
    choose_emulator,
    cpu_quota,
    find_emulators,
    judge_userfaultfd,
    links,
)
from virtmig.agent.qmp import EmulatorFacts
from virtmig.facts import GuestArch, GuestFacts, HostFacts, version
from virtmig.lab.lab import Lab

NOBODY = pwd.getpwnam("nobody")
QEMU = shutil.which(BINARY) or ""
needs_qemu = pytest.mark.skipif(not QEMU, reason=f"needs {BINARY}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes users")


def config(**values: object) -> AgentConfig:
    return AgentConfig(qemu=QemuSection(libvirt_uri="none", user="nobody", **values))  # type: ignore[arg-type]


# -- this host -----------------------------------------------------------------------------------------------------


@needs_qemu
def test_everything_of_this_host_without_libvirt() -> None:
    settings = msgspec.structs.replace(config(), limits=LimitsSection(parallel_connections=7))
    agent, host = Discovery(settings).look()
    system = os.uname()
    assert (agent.hostname, agent.kernel, agent.arch) == (system.nodename, system.release, system.machine)
    assert agent.cpus.affinity == len(os.sched_getaffinity(0))
    assert agent.cpus.usable <= agent.cpus.affinity
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    assert agent.locked_memory_limit_bytes == (-1 if hard == resource.RLIM_INFINITY else hard)
    assert {link.name for link in agent.links} == set(os.listdir("/sys/class/net")) - {"lo", "bonding_masters"}
    assert os.path.realpath(QEMU) in {os.path.realpath(emulator.path) for emulator in agent.emulators}
    assert list(agent.emulators) == sorted(agent.emulators, key=lambda each: (-each.version, each.path))
    assert (agent.libvirt_version, agent.libvirt) == (None, 'not asked: qemu.libvirt_uri = "none"')

    own = next(each for each in agent.emulators if os.path.realpath(each.path) == os.path.realpath(QEMU))
    assert (host.hostname, host.driver, host.local) == (agent.hostname, "QEMU", True)
    assert host.parallel_connections_max == 7
    assert (host.qemu_uid, host.qemu_uid_evidence) == (NOBODY.pw_uid, "qemu.user of agent.toml")
    assert host.migration_capabilities is not None
    assert "multifd" in host.migration_capabilities
    arch = host.guest_arch(own.arch)
    assert arch is not None
    assert own.path in arch.emulators
    assert {"pc", "q35", arch.canonical["pc"]} <= set(arch.machines)
    assert any(text.startswith("libvirt: not asked") for text in host.unanswered)


@needs_qemu
def test_the_facts_go_over_the_wire() -> None:
    agent, host = Discovery(config()).look()
    assert msgspec.json.decode(msgspec.json.encode(agent), type=AgentFacts) == agent
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(host), type=HostFacts) == host
    assert len(msgspec.msgpack.encode(host)) < 196_608 // 2  # the bound of link/PROTOCOL.md


def test_a_libvirt_that_is_not_there_is_said() -> None:
    absent = AgentConfig(qemu=QemuSection(libvirt_uri="qemu+unix:///session?socket=/nowhere/sock"))
    agent, host = Discovery(absent).look()
    assert agent.libvirt_version is None
    assert "/nowhere/sock" in agent.libvirt
    assert any("/nowhere/sock" in text for text in host.unanswered)
    assert (agent.qemu_user.uid, agent.userfaultfd.status) == (None, host.userfaultfd.status)


def test_an_unknown_user_is_said_and_nothing_is_guessed() -> None:
    agent, _ = Discovery(AgentConfig(qemu=QemuSection(libvirt_uri="none", user="no-such"))).look()
    assert agent.qemu_user == QemuUser()
    assert any("no user no-such" in text for text in agent.unanswered)


def test_without_the_binding_the_agent_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import sys
sys.modules["libvirt"] = None
from virtmig.agent.config import AgentConfig
from virtmig.agent.discovery import Discovery
agent, host = Discovery(AgentConfig()).look()
assert "libvirt's Python binding is not installed" in agent.libvirt, agent.libvirt
print(host.hostname)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == os.uname().nodename, done.stderr


# -- with libvirt --------------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_libvirts_word_and_the_agents_are_one(lab: Lab) -> None:
    source = lab.hosts[0]
    settings = AgentConfig(qemu=QemuSection(libvirt_uri=source.uri))
    agent, host = Discovery(settings).look()
    assert (agent.libvirt, agent.libvirt_version) == (source.uri, host.libvirt_version)
    assert host.libvirt_version
    assert host.hostname == (source.hostname if lab.full else os.uname().nodename)
    assert host.uri == source.uri
    assert host.guest_archs
    assert host.domains is not None
    assert host.migration_capabilities is not None  # libvirt has no word for these
    assert "postcopy-ram" in host.migration_capabilities
    assert host.qemu_uid == agent.qemu_user.uid
    guest = GuestFacts(name="x", arch="x86_64", machine="pc", virt_type="qemu")
    fit = Discovery(settings).host_facts(guest).fit
    assert fit is not None
    assert fit.emulator.status == "yes"


@pytest.mark.lab
def test_a_frozen_libvirt_holds_nobody(lab: Lab) -> None:
    target = lab.hosts[1]
    settings = AgentConfig(qemu=QemuSection(libvirt_uri=target.uri), deadlines=DeadlinesSection(probe_s=1.0))
    target.freeze_daemon()
    try:
        agent, host = Discovery(settings).look()
    finally:
        target.thaw_daemon()
    assert "no answer within 1 s" in agent.libvirt
    assert host.hostname == os.uname().nodename


# -- emulators -----------------------------------------------------------------------------------------------------


def put(path: Path, mode: int = 0o755, text: str = "#!/bin/sh\nexit 1\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_which_files_are_emulators(tmp_path: Path) -> None:
    one = put(tmp_path / "a/qemu-system-x86_64")
    two = put(tmp_path / "b/qemu-kvm")
    mine = put(tmp_path / "c/my-qemu")
    for name in ("qemu-img", "qemu-system-x86_64-microvm", "qemu-x86_64", "virtqemud"):
        put(tmp_path / "a" / name)
    put(tmp_path / "a/qemu-system-arm", 0o644)
    (tmp_path / "b/qemu-system-amd64").symlink_to(one)  # the same file again
    (tmp_path / "b/qemu-system-gone").symlink_to("/nowhere")
    search = f"{tmp_path}/a:{tmp_path}/b:{tmp_path}/none:relative"
    assert find_emulators(search=search) == (one, two)
    assert find_emulators([mine], search=search) == (mine, one, two)
    assert find_emulators(["/nowhere/qemu"], search="") == ("/nowhere/qemu",)  # asked for: its absence is said


@needs_qemu
def test_an_emulator_is_asked_again_only_when_its_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_emulators", tuple)
    path = put(tmp_path / "qemu", text=f'#!/bin/sh\necho >> {tmp_path}/asked\nexec {QEMU} "$@"\n')
    finder = Discovery(config(emulators=(path,)))

    def asked() -> int:
        return (tmp_path / "asked").read_text().count("\n")

    first = finder.emulators()
    assert [each.path for each in first] == [path]
    assert finder.emulators() == first
    assert asked() == 1
    os.utime(path, ns=(1, first[0].modified_ns + 1))
    assert finder.emulators()[0].modified_ns == first[0].modified_ns + 1
    assert asked() == 2
    with open(path, "a") as file:  # another size in the same second
        file.write("# upgraded\n")
    os.utime(path, ns=(1, first[0].modified_ns + 1))
    finder.emulators()
    assert asked() == 3


def test_a_binary_that_fails_is_said_each_time_and_tried_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_emulators", tuple)
    path = put(tmp_path / "qemu", text=f"#!/bin/sh\necho >> {tmp_path}/asked\necho broken >&2\nexit 1\n")
    now = [1000.0]
    finder = Discovery(config(emulators=(path,)), clock=lambda: now[0])
    for _ in range(3):
        unanswered: list[str] = []
        assert finder.emulators(unanswered) == ()
        assert unanswered == [f"{path}: ended before it had answered; it said: broken"]
    assert (tmp_path / "asked").read_text().count("\n") == 1
    now[0] += FAILURE_KEPT_S
    finder.emulators()
    assert (tmp_path / "asked").read_text().count("\n") == 2


def test_which_emulator_would_run_the_guest(tmp_path: Path) -> None:
    here = os.uname().machine
    new, old, arm = (
        EmulatorFacts(path=put(tmp_path / name), version=version(number), arch=arch)
        for name, number, arch in (("new", 97, here), ("old", 96, here), ("arm", 95, "armv9"))
    )
    found = (new, old, arm)
    (tmp_path / "link").symlink_to(old.path)
    libvirt = HostFacts(uri="x", guest_archs=(GuestArch(arch=here, emulators=("/nowhere", old.path)),))
    assert choose_emulator(found, None, None) is new
    assert choose_emulator(found, libvirt, None) is old
    assert choose_emulator(found, libvirt, GuestFacts(name="g", emulator=new.path)) is new
    assert choose_emulator(found, None, GuestFacts(name="g", emulator=str(tmp_path / "link"))) is old
    assert choose_emulator(found, libvirt, GuestFacts(name="g", emulator="/elsewhere", arch="armv9")) is arm
    assert choose_emulator(found, None, GuestFacts(name="g", arch="s390x")) is None
    assert choose_emulator((), libvirt, None) is None


# -- userfaultfd ---------------------------------------------------------------------------------------------------

ROOT_ONLY = Device(uid=0, gid=0, mode=0o600)
FOR_GROUP = Device(uid=0, gid=77, mode=0o660)
SYSTEM_10_1 = HostFacts(uri="x", session=False, libvirt_version=version(10, 1))
SYSTEM_9 = HostFacts(uri="x", session=False, libvirt_version=version(9))
SESSION = HostFacts(uri="x", session=True, libvirt_version=version(9))


@pytest.mark.parametrize(
    ("uid", "gids", "sysctl", "device", "qemu", "libvirt", "status", "words"),
    [
        (0, (0,), "0\n", None, version(7), None, "yes", "root"),
        (5, (5,), "1\n", None, version(7), None, "yes", "vm.unprivileged_userfaultfd=1"),
        (None, (), "1\n", None, None, None, "yes", "vm.unprivileged_userfaultfd=1"),
        (None, (), "0\n", FOR_GROUP, version(9), None, "unknown", "user is not known"),
        (5, (5,), None, None, version(9), None, "unknown", "no vm.unprivileged_userfaultfd to read"),
        (5, (5,), "0\n", None, version(9), None, "no", "vm.unprivileged_userfaultfd=0"),
        (5, (5,), "0\n", ROOT_ONLY, version(9), None, "no", "owner 0, group 0, mode 0600"),
        (5, (5,), "0\n", FOR_GROUP, version(9), None, "no", "group 77, mode 0660"),
        (5, (5, 77), "0\n", FOR_GROUP, version(9), None, "yes", "group 77, mode 0660"),
        (5, (5, 77), "0\n", FOR_GROUP, version(7, 2), None, "no", "since 8.0"),
        (5, (5, 77), "0\n", FOR_GROUP, None, None, "unknown", "no QEMU was found"),
        (5, (5, 77), "0\n", FOR_GROUP, version(9), SESSION, "yes", "group 77"),
        (5, (5, 77), "0\n", FOR_GROUP, version(9), SYSTEM_9, "unknown", "cgroup_device_acl"),
        (5, (5,), "0\n", ROOT_ONLY, version(9), SYSTEM_10_1, "yes", "libvirt >= 10.1"),
        (5, (5, 77), "0\n", Device(uid=0, gid=77, mode=0o640), version(9), None, "no", "mode 0640"),
        (5, (5, 77), "0\n", Device(uid=5, gid=77, mode=0o060), version(9), None, "no", "owner 5"),
        (5, (5,), "0\n", Device(uid=5, gid=0, mode=0o600), version(9), None, "yes", "owner 5"),
        (5, (5, 77), "0\n", Device(uid=0, gid=77, mode=0o606), version(9), None, "no", "mode 0606"),
        (5, (5,), "0\n", Device(uid=0, gid=77, mode=0o606), version(9), None, "yes", "mode 0606"),
        (
            5,
            (5,),
            "0\n",
            Device(uid=0, gid=0, mode=0o660, access_list=True),
            version(9),
            None,
            "unknown",
            "access list",
        ),
    ],
)
def test_userfaultfd_by_the_rules(
    uid: int | None,
    gids: tuple[int, ...],
    sysctl: str | None,
    device: Device | None,
    qemu: int | None,
    libvirt: HostFacts | None,
    status: str,
    words: str,
) -> None:
    user = QemuUser(uid=uid, gid=None, evidence="test")
    finding = judge_userfaultfd(user=user, gids=gids, sysctl=sysctl, device=device, qemu_version=qemu, libvirt=libvirt)
    assert (finding.status, words in finding.evidence) == (status, True), finding


_TRY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
by_call = libc.syscall(323, os.O_CLOEXEC) >= 0
try:
    os.open("/dev/userfaultfd", os.O_RDWR)
    by_device = True
except OSError:
    by_device = False
print(int(by_call), int(by_device))
"""


@needs_root
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the number of the system call on x86-64 only")
@pytest.mark.parametrize(("uid", "gid"), [(0, 0), (NOBODY.pw_uid, NOBODY.pw_gid)])
def test_userfaultfd_against_the_kernel(uid: int, gid: int) -> None:
    tried = subprocess.run(
        [sys.executable, "-c", _TRY], user=uid, group=gid, extra_groups=[], cwd="/", capture_output=True, check=True
    )
    by_call, by_device = map(int, tried.stdout.split())
    user = QemuUser(uid=uid, gid=gid, evidence="test")
    for qemu, able in ((version(7), by_call), (version(9), by_call or by_device)):
        finding = module._userfaultfd(user, qemu, None)
        assert finding.status == ("yes" if able else "no"), finding


# -- the kernel's files --------------------------------------------------------------------------------------------


def test_the_narrowest_control_group_counts(tmp_path: Path) -> None:
    put(tmp_path / "system.slice/agent.service/cpu.max", text="max 100000\n")
    put(tmp_path / "system.slice/cpu.max", text="350000 100000\n")
    groups = "1:name=systemd:/x\n0::/system.slice/agent.service\n"
    assert cpu_quota(groups, tmp_path) == (3.5, str(tmp_path / "system.slice"))
    put(tmp_path / "system.slice/agent.service/cpu.max", text="50000 100000\n")
    assert cpu_quota(groups, tmp_path)[0] == 0.5
    assert cpu_quota("0::/elsewhere\n", tmp_path)[0] is None
    assert cpu_quota("", tmp_path)[0] is None


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    put(tmp_path / "cpu/box/cpu.cfs_quota_us", text="170000\n")
    put(tmp_path / "cpu/box/cpu.cfs_period_us", text="100000\n")
    put(tmp_path / "cpu/cpu.cfs_quota_us", text="-1\n")
    put(tmp_path / "cpu/cpu.cfs_period_us", text="100000\n")
    assert cpu_quota("4:memory:/box\n3:cpu,cpuacct:/box\n", tmp_path)[0] == 1.7
    assert cpu_quota("3:cpuset:/box\n", tmp_path)[0] is None


def test_fewer_cpus_than_there_are() -> None:
    assert Cpus(online=64, affinity=4).usable == 4.0
    assert Cpus(online=64, affinity=4, quota=2.5).usable == 2.5
    assert Cpus(online=64, affinity=4, quota=9.0).usable == 4.0
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:1])
    try:
        assert module._cpus().affinity == 1
    finally:
        os.sched_setaffinity(0, cpus)


def test_links_and_what_is_not_known_of_them(tmp_path: Path) -> None:
    for name, speed in (("eth7", "23456"), ("eth8", "-1"), ("eth9", ""), ("lo", "1")):
        put(tmp_path / name / "operstate", text="up\n")
        put(tmp_path / name / "mtu", text="9017\n")
        if speed:
            put(tmp_path / name / "speed", text=f"{speed}\n")
    (tmp_path / "eth7/device").mkdir()
    put(tmp_path / "bonding_masters", text="bond0\n")
    seven, eight, nine = links(tmp_path)
    assert seven == Link(
        name="eth7", speed_mbit_per_s=23456, state="up", mtu_bytes=9017, evidence=f"{tmp_path}/eth7/speed"
    )
    assert (eight.speed_mbit_per_s, eight.virtual) == (None, True)
    assert "the kernel does not know it" in eight.evidence
    assert "-1" in eight.evidence
    assert (nine.name, nine.speed_mbit_per_s) == ("eth9", None)
    assert "No such file" in nine.evidence
    assert list(links(tmp_path / "none")) == []
