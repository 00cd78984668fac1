"""This host, looked at by its own agent: what it is and can do, each thing with its evidence, nothing guessed.

The kernel's files, limits and links are read, each QEMU binary is asked (qmp.py), libvirt is asked if it is there.
Nothing here raises, and nothing waits longer than `deadlines.probe_s`, or than whoever asks: what could not be had in
time stands in `unanswered`.
"""

from __future__ import annotations

import math
import os
import platform
import pwd
import re
import resource
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from virtmig.agent.access import QemuUser, qemu_user
from virtmig.agent.certificates import tls_finding
from virtmig.agent.config import AgentConfig
from virtmig.agent.kept import Kept
from virtmig.agent.qmp import EmulatorFacts, ask_emulator
from virtmig.engine.agents import runs_as_system
from virtmig.errors import ChannelError, RequestError, VirtError
from virtmig.facts import Finding, GuestArch, GuestFacts, HostFacts, version
from virtmig.virt import local_daemon

#: libvirt looks for the first two in PATH (qemu_capabilities.c, virQEMUCapsFindBinaryForArch), for the last as well
_BINARY = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm")
_USUAL_FOLDERS = ("/usr/bin", "/usr/local/bin", "/usr/libexec", "/run/libvirt/nix-emulators")
#: QEMU that opens /dev/userfaultfd if the system call is not allowed
_OPENS_DEVICE_SINCE = version(8)
#: libvirt that has it in its default cgroup_device_acl
_GRANTED_SINCE = version(10, 1)
_ASKED_AT_ONCE = 4
#: a binary that did not answer is left alone that long: each try may cost the whole deadline
FAILURE_KEPT_S = 300.0
#: what emulators and libvirt have said is asked again after so long
FACTS_KEPT_S = 30.0
#: for one guest libvirt is asked anew; so many of these questions may be without an answer at once
MOST_QUESTIONS = 8


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One network interface. `speed_mbit_per_s` is None where the kernel does not say."""

    name: str
    speed_mbit_per_s: int | None = None
    state: str = "unknown"  # operstate of the kernel: up, down, unknown, ...
    mtu_bytes: int | None = None
    virtual: bool = False  # no device behind it: a bridge, bond, veth, VLAN; a bond's speed is still real
    evidence: str = ""


class Cpus(msgspec.Struct, frozen=True, kw_only=True):
    """What threads of this agent, and so of its relay, may use of the processors."""

    online: int
    affinity: int  # CPUs that the scheduler may put it on
    quota: float | None = None  # CPUs' worth of time by the control group; None: no limit
    evidence: str = ""

    @property
    def usable(self) -> float:
        return float(self.affinity) if self.quota is None else min(float(self.affinity), self.quota)


class AgentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What HostFacts has no place for, or only one place where a host has several."""

    hostname: str
    kernel: str
    arch: str
    cpus: Cpus
    emulators: tuple[EmulatorFacts, ...] = ()  # newest first
    qemu_user: QemuUser = QemuUser()
    userfaultfd: Finding = Finding()  # with the newest emulator
    locked_memory_limit_bytes: int | None = None  # the agent's own hard limit; -1: unlimited
    links: tuple[Link, ...] = ()
    tls: Finding = Finding()  # the agent's own certificates; those of QEMU are in HostFacts
    libvirt_version: int | None = None
    libvirt: str = ""  # what was asked, or why nothing was
    unanswered: tuple[str, ...] = ()


class Discovery:
    """Looks at this host. Thread-safe; emulators are asked again only when path, size or time of change differ."""

    def __init__(self, config: AgentConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int, int], EmulatorFacts] = {}
        self._failed: dict[tuple[str, int, int], tuple[float, str]] = {}
        self._questions = threading.BoundedSemaphore(MOST_QUESTIONS)
        self._emulators = Kept("virtmig-emulators", self._ask_emulators, kept_s=FACTS_KEPT_S, clock=clock)
        self._libvirt = Kept("virtmig-libvirt", lambda: _ask_libvirt(config, None), kept_s=FACTS_KEPT_S, clock=clock)

    def look(self, guest: GuestFacts | None = None, *, within_s: float | None = None) -> tuple[AgentFacts, HostFacts]:
        """What is known: (what the agent saw, the same merged with libvirt's word for plan and handshake).

        With `guest`, the host's facts speak of the emulator that would run it, and libvirt says whether it could.
        After `within_s` it is answered with what is known until then, and said what is not.
        """
        unanswered: list[str] = []
        waiting = self._begin_asking(guest)
        answer, late = self._emulators.get(within_s)
        emulators, problems = answer if answer is not None else (self._known_emulators(), ())
        unanswered += problems
        if late:
            unanswered.append(f"QEMU: {late}")
        (libvirt, how), late = self._libvirts_word(waiting, within_s)
        if libvirt is None or late:
            unanswered.append(f"libvirt: {late or how}")
        try:
            user = qemu_user(self._config.qemu, libvirt_uid=libvirt.qemu_uid if libvirt else None)
        except RequestError as error:
            user = QemuUser()
            unanswered.append(error.message)
        chosen = choose_emulator(emulators, libvirt, guest)
        facts = AgentFacts(
            hostname=socket.gethostname(),
            kernel=platform.release(),
            arch=platform.machine(),
            cpus=_cpus(),
            emulators=emulators,
            qemu_user=user,
            userfaultfd=_userfaultfd(user, emulators[0].version if emulators else None, libvirt),
            locked_memory_limit_bytes=_locked_memory_limit_bytes(),
            links=tuple(links()),
            tls=tls_finding(self._config.tls),
            libvirt_version=libvirt.libvirt_version if libvirt else None,
            libvirt=how,
            unanswered=tuple(unanswered),
        )
        return facts, _merge(self._config, facts, libvirt, chosen)

    def host_facts(self, guest: GuestFacts | None = None, *, within_s: float | None = None) -> HostFacts:
        """For the handshake."""
        return self.look(guest, within_s=within_s)[1]

    def _begin_asking(self, guest: GuestFacts | None) -> Kept[tuple[HostFacts | None, str]]:
        """libvirt is asked while the emulators are: about itself, or about that guest too."""
        if guest is None:
            self._libvirt.get(0)
            return self._libvirt
        if not self._questions.acquire(blocking=False):
            return Kept("virtmig-libvirt", lambda: (None, f"{MOST_QUESTIONS} questions wait for it"), kept_s=0.0)

        def ask() -> tuple[HostFacts | None, str]:
            try:
                return _ask_libvirt(self._config, guest)
            finally:
                self._questions.release()

        question = Kept("virtmig-libvirt", ask, kept_s=math.inf, clock=self._clock)
        question.get(0)
        return question

    def _libvirts_word(
        self, question: Kept[tuple[HostFacts | None, str]], within_s: float | None
    ) -> tuple[tuple[HostFacts | None, str], str]:
        answer, late = question.get(within_s)
        if answer is None:  # not about this guest; perhaps about the host
            answer, _ = self._libvirt.get(0)
        return answer or (None, late), late

    def _known_emulators(self) -> tuple[EmulatorFacts, ...]:
        with self._lock:
            return _newest_first(self._known.values())

    def _ask_emulators(self) -> tuple[tuple[EmulatorFacts, ...], tuple[str, ...]]:
        unanswered: list[str] = []
        return self.emulators(unanswered), tuple(unanswered)

    def emulators(self, unanswered: list[str] | None = None) -> tuple[EmulatorFacts, ...]:
        """Every QEMU that was found and has answered, newest first; the others' reasons go to `unanswered`."""
        with ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="virtmig-probe") as pool:
            answers = list(pool.map(self._ask, find_emulators(self._config.qemu.emulators)))
        if unanswered is not None:
            unanswered += [answer for answer in answers if isinstance(answer, str)]
        return _newest_first(answer for answer in answers if isinstance(answer, EmulatorFacts))

    def _ask(self, path: str) -> EmulatorFacts | str:
        try:
            status = os.stat(path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            known = self._known.get(key)
            failed_at, words = self._failed.get(key, (-math.inf, ""))
        if known is not None:
            return known
        if self._clock() - failed_at < FAILURE_KEPT_S:
            return words
        try:
            found = ask_emulator(path, seconds=self._config.deadlines.probe_s)
        except ChannelError as error:
            with self._lock:
                self._failed[key] = self._clock(), error.message
            return error.message
        with self._lock:
            self._known = {old: facts for old, facts in self._known.items() if old[0] != path} | {key: found}
        return found


# -- QEMU ----------------------------------------------------------------------------------------------------------


def _newest_first(found: Iterable[EmulatorFacts]) -> tuple[EmulatorFacts, ...]:
    return tuple(sorted(found, key=lambda emulator: (-emulator.version, emulator.path)))


def find_emulators(given: Iterable[str] = (), *, search: str | None = None) -> tuple[str, ...]:
    """Paths of QEMU's system emulators: the given ones, then PATH's, then the usual folders'. Each file once.

    `search` replaces PATH and the usual folders.
    """
    folders = search.split(os.pathsep) if search is not None else [*os.get_exec_path(), *_USUAL_FOLDERS]
    candidates = [*given]
    for folder in folders:
        if folder.startswith("/"):  # never what lies where we happen to stand
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            candidates += [f"{folder}/{name}" for name in names if _BINARY.fullmatch(name)]
    files: dict[str, str] = {}
    for path in candidates:
        if path in given or shutil.which(path):
            files.setdefault(os.path.realpath(path), path)
    return tuple(files.values())


def choose_emulator(
    emulators: tuple[EmulatorFacts, ...], libvirt: HostFacts | None, guest: GuestFacts | None
) -> EmulatorFacts | None:
    """The one that would run `guest`: the one it names, else libvirt's for its architecture, else the newest."""
    by_file = {os.path.realpath(emulator.path): emulator for emulator in emulators}
    wanted = [guest.emulator] if guest is not None and guest.emulator else []
    arch = guest.arch if guest is not None and guest.arch else platform.machine()
    row = libvirt.guest_arch(arch) if libvirt is not None else None
    for path in (*wanted, *(row.emulators if row is not None else ())):
        if found := by_file.get(os.path.realpath(path)):
            return found
    return next((emulator for emulator in emulators if emulator.arch == arch), None)


def _guest_archs(emulators: tuple[EmulatorFacts, ...]) -> tuple[GuestArch, ...]:
    """As libvirt's capabilities would list them; for a host without libvirt."""
    archs: dict[str, list[EmulatorFacts]] = {}
    for emulator in emulators:
        archs.setdefault(emulator.arch, []).append(emulator)
    return tuple(
        GuestArch(
            arch=arch,
            virt_types=("qemu", "kvm") if rows[0].kvm and os.path.exists("/dev/kvm") else ("qemu",),
            emulators=tuple(row.path for row in rows),
            machines=tuple(
                dict.fromkeys(name for row in rows for each in row.machines for name in (each.name, each.alias) if name)
            ),
            canonical={each.alias: each.name for row in reversed(rows) for each in row.machines if each.alias},
        )
        for arch, rows in archs.items()
    )


# -- libvirt -------------------------------------------------------------------------------------------------------


def _ask_libvirt(config: AgentConfig, guest: GuestFacts | None) -> tuple[HostFacts | None, str]:
    """(its facts, the URI), or (None, why not)."""
    uri = config.qemu.libvirt_uri or ("qemu:///system" if runs_as_system() else "qemu:///session")
    if uri == "none":
        return None, 'not asked: qemu.libvirt_uri = "none"'
    try:
        from virtmig.virt.capabilities import gather_host_facts
        from virtmig.virt.connection import close_connection, open_connection
        from virtmig.virt.hosts import NoAnswerError, answer_within
    except ImportError as error:
        return None, f"libvirt's Python binding is not installed ({error})"

    def ask() -> HostFacts:
        # what a guest needs is asked with functions that a read-only connection may not call (CVE-2019-10167)
        connection = open_connection(uri, readonly=guest is None)
        try:
            return gather_host_facts(connection, uri, guest=guest)
        finally:
            close_connection(connection)

    try:
        return answer_within(config.deadlines.probe_s, ask, "virtmig-libvirt", own=True), uri
    except (VirtError, NoAnswerError) as error:
        return None, f"{uri}: {error}"


def _merge(
    config: AgentConfig, facts: AgentFacts, libvirt: HostFacts | None, chosen: EmulatorFacts | None
) -> HostFacts:
    """libvirt's facts with the agent's laid over them, wherever the agent has looked closer."""
    base = libvirt or HostFacts(
        uri=f"virtmig://{facts.hostname}",
        hostname=facts.hostname,
        local=True,
        driver="QEMU" if facts.emulators else "",
        arch=facts.arch,
        cpus=facts.cpus.online,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        available_memory_bytes=local_daemon.available_memory_bytes(),
        guest_archs=_guest_archs(facts.emulators),
        tls_files=local_daemon.tls_files(local_daemon.read_uri("qemu:///system"), os.getpid()),
    )
    user = facts.qemu_user
    return msgspec.structs.replace(
        base,
        qemu_version=chosen.version if chosen else base.qemu_version,
        migration_capabilities=chosen.capabilities if chosen else base.migration_capabilities,
        qemu_uid=user.uid,
        qemu_uid_evidence=user.evidence if user.uid is not None else "",
        userfaultfd=_userfaultfd(user, chosen.version if chosen else base.qemu_version, libvirt),
        parallel_connections_max=config.limits.parallel_connections,
        unanswered=(*base.unanswered, *facts.unanswered),
    )


# -- the kernel ----------------------------------------------------------------------------------------------------


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Who owns /dev/userfaultfd, and its mode. With an access list the mode alone does not tell."""

    uid: int
    gid: int
    mode: int
    access_list: bool = False


def judge_userfaultfd(
    *,
    user: QemuUser,
    gids: Iterable[int],
    sysctl: str | None,
    device: Device | None,
    qemu_version: int | None,
    libvirt: HostFacts | None = None,
) -> Finding:
    """May QEMU's user make a userfaultfd that sees kernel faults too, as postcopy needs? Pure.

    `sysctl` is the content of vm.unprivileged_userfaultfd; the system call follows virt/local_daemon.py. The device
    counts for a QEMU that opens it: by its owner, else its group, else its mode for others (`gids` are all of QEMU's),
    or by libvirt, which gives QEMU a /dev of its own.
    """
    usable = device if qemu_version is not None and qemu_version >= _OPENS_DEVICE_SINCE else None
    finding = local_daemon.judge_userfaultfd(
        qemu_uid=user.uid,
        uid_evidence=user.evidence,
        local=True,
        session=libvirt.session if libvirt is not None else None,
        libvirt_version=libvirt.libvirt_version if libvirt is not None else None,
        qemu_version=qemu_version,
        sysctl=sysctl,
        device=None,
    )
    if finding.status != "no" or device is None:
        return finding
    who = f"{finding.evidence}; /dev/userfaultfd has owner {device.uid}, group {device.gid}, mode {device.mode:04o}"
    if qemu_version is None:
        return Finding("unknown", f"{who}; no QEMU was found that could say whether it opens that")
    if usable is None:
        return Finding("no", f"{finding.evidence}; QEMU opens /dev/userfaultfd since 8.0")
    granted = libvirt is not None and libvirt.session is False
    if granted and libvirt is not None and (libvirt.libvirt_version or 0) < _GRANTED_SINCE:
        return Finding("unknown", f"{who}; libvirt before 10.1 hides it unless cgroup_device_acl of qemu.conf names it")
    if granted:
        return Finding("yes", f"{who}; libvirt >= 10.1 lets QEMU use it unless cgroup_device_acl was changed")
    if device.access_list:
        return Finding("unknown", f"{who}, and an access list")
    shift = 6 if device.uid == user.uid else 3 if device.gid in frozenset(gids) else 0
    return Finding("yes" if device.mode >> shift & 0o6 == 0o6 else "no", who)


def _userfaultfd(user: QemuUser, qemu_version: int | None, libvirt: HostFacts | None) -> Finding:
    return judge_userfaultfd(
        user=user,
        gids=_groups_of(user),
        sysctl=local_daemon.read_text("/proc/sys/vm/unprivileged_userfaultfd"),
        device=_userfaultfd_device(),
        qemu_version=qemu_version,
        libvirt=libvirt,
    )


def _groups_of(user: QemuUser) -> tuple[int, ...]:
    """Those that libvirt gives QEMU's process: its own and those of /etc/group."""
    own = (user.gid,) if user.gid is not None else ()
    if user.uid is None:
        return own
    try:
        entry = pwd.getpwuid(user.uid)
    except KeyError:
        return own
    return (*own, *os.getgrouplist(entry.pw_name, entry.pw_gid))


def _userfaultfd_device(path: str = "/dev/userfaultfd") -> Device | None:
    try:
        found = os.stat(path)
        lists = os.listxattr(path)
    except OSError:
        return None
    return Device(
        uid=found.st_uid,
        gid=found.st_gid,
        mode=stat.S_IMODE(found.st_mode),
        access_list="system.posix_acl_access" in lists,
    )


def _locked_memory_limit_bytes() -> int:
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return -1 if hard == resource.RLIM_INFINITY else hard


def _cpus() -> Cpus:
    groups = local_daemon.read_text("/proc/self/cgroup") or ""
    quota, evidence = cpu_quota(groups, Path("/sys/fs/cgroup"))
    return Cpus(online=os.cpu_count() or 1, affinity=len(os.sched_getaffinity(0)), quota=quota, evidence=evidence)


def cpu_quota(groups: str, root: Path) -> tuple[float | None, str]:
    """(CPUs' worth of time, where that is written) of the narrowest control group on the way to the root.

    `groups` is a /proc/PID/cgroup. Version 2: cpu.max; version 1: cpu.cfs_quota_us and cpu.cfs_period_us.
    """
    narrowest: tuple[float | None, str] = (None, "no control group limits the processor time")
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            folder = root
        elif "cpu" in controllers.split(","):
            folder = root / "cpu"
        else:
            continue
        for place in (folder / path.lstrip("/"), *(folder / path.lstrip("/")).parents):
            found = _quota_in(place)
            if found is not None and (narrowest[0] is None or found < narrowest[0]):
                narrowest = found, str(place)
            if place == folder:
                break
    return narrowest


def _quota_in(place: Path) -> float | None:
    text = local_daemon.read_text(str(place / "cpu.max"))
    if text is None:
        quota, period = (local_daemon.read_text(str(place / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        text = f"{quota or ''} {period or ''}"
    words = text.split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def links(root: Path = Path("/sys/class/net")) -> Iterator[Link]:
    """Every interface but the loopback, as the kernel describes it."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name == "lo" or not folder.is_dir():
            continue
        speed, evidence = _speed(folder)
        mtu = (local_daemon.read_text(str(folder / "mtu")) or "").strip()
        yield Link(
            name=folder.name,
            speed_mbit_per_s=speed,
            state=(local_daemon.read_text(str(folder / "operstate")) or "unknown").strip(),
            mtu_bytes=int(mtu) if mtu.isdecimal() else None,
            virtual=not (folder / "device").exists(),
            evidence=evidence,
        )


def _speed(folder: Path) -> tuple[int | None, str]:
    path = folder / "speed"
    try:
        text = path.read_text().strip()
    except OSError as error:  # EINVAL: the link is down, or its driver knows no speed
        return None, f"{path}: {error.strerror}"
    if not re.fullmatch(r"-?\d+", text) or int(text) <= 0:
        return None, f"the kernel does not know it ({path}: {text})"
    return int(text), str(path)
