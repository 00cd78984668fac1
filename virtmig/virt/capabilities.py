"""Facts of hosts and guests, asked through libvirt alone: versions, capabilities, CPUs, domains, jobs.

Every question has a deadline, and a host that let one pass is asked nothing more. A question that this libvirt, this
binding or this driver does not know leaves its fact unknown and its reason in `HostFacts.unanswered`. QEMU's monitor
is asked only on demand: libvirt marks the domain as tainted for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import libvirt
import msgspec
from lxml import etree

from virtmig.domain.document import parse_xml, text_of
from virtmig.domain.facts import cpu_element, guest_facts_from_xml
from virtmig.errors import DomainXmlError, VirtError
from virtmig.facts import DiskFacts, Finding, GuestArch, GuestFacts, GuestFit, HostFacts, KnownDomain, version
from virtmig.virt import local_daemon
from virtmig.virt.connection import is_connection_error, virt_error
from virtmig.virt.hosts import NoAnswerError, answer_within

T = TypeVar("T")

QUESTION_S = 5.0
#: a daemon may have to probe a QEMU binary before it answers about it; on a slow machine that takes many seconds
PROBE_S = 30.0

#: numbers of libvirt-domain.h that old bindings have no names for
_PAUSED_POSTCOPY_FAILED = 13
_STATES = ("no state", "running", "running", "paused", "shutting down", "shut off", "crashed", "pmsuspended")
_OPERATIONS = (
    "unknown job", "start", "save", "restore", "migration in", "migration out", "snapshot", "snapshot revert",
    "dump", "backup", "snapshot delete",
)  # fmt: skip


class _Questions:
    """Asks one host, one question after the other, until it stays silent once."""

    def __init__(self) -> None:
        self.unanswered: list[str] = []
        self.silent = False

    def ask(self, what: str, call: Callable[[], T], seconds: float = QUESTION_S) -> T | None:
        if self.silent:
            self.unanswered.append(f"{what}: not asked, the host is silent")
            return None
        try:
            return answer_within(seconds, call, "virtmig-facts")
        except NoAnswerError as error:
            self.silent = True
            self.unanswered.append(f"{what}: {error}")
        except libvirt.libvirtError as error:
            self.unanswered.append(f"{what}: {error.get_error_message() or error}")
        except (AttributeError, NotImplementedError) as error:
            self.unanswered.append(f"{what}: the installed libvirt-python is too old ({error})")
        except DomainXmlError as error:
            self.unanswered.append(f"{what}: {error}")
        return None


def unreachable_host_facts(uri: str) -> HostFacts:
    """A host that nobody here can connect to: only its URI is known."""
    return HostFacts(uri=uri, reachable=False, client_version=libvirt.getVersion())


def gather_host_facts(connection: Any, uri: str, *, guest: GuestFacts | None = None) -> HostFacts:
    """Ask one host. With `guest`, also whether it could run that guest (`HostFacts.fit`). Neither raises nor hangs.

    `uri` is the URI as the person gave it; what it leads to is asked from the connection.
    """
    questions = _Questions()
    ask = questions.ask
    real_uri = ask("URI", connection.getURI) or uri
    endpoint = local_daemon.read_uri(real_uri)
    daemon = local_daemon.find_daemon(endpoint)
    libvirt_version = ask("libvirt version", connection.getLibVersion)  # the cheapest question finds out who is silent
    capabilities = ask("capabilities", lambda: parse_xml(connection.getCapabilities(), what="capabilities"), PROBE_S)
    driver = str(ask("driver", connection.getType) or endpoint.driver.upper())
    qemu_version = ask("QEMU version", connection.getVersion) if driver == "QEMU" else None
    info = ask("CPUs and memory", connection.getInfo)
    free, available = _memory(questions, connection, local=endpoint.local)
    uid, uid_evidence = _qemu_uid(capabilities, endpoint, daemon)
    pid = daemon.pid if daemon else None
    facts = HostFacts(
        uri=uri,
        hostname=str(ask("host name", connection.getHostname) or ""),
        local=endpoint.local,
        session=endpoint.session,
        driver=driver,
        client_version=libvirt.getVersion(),
        libvirt_version=libvirt_version,
        qemu_version=qemu_version or None,
        cpus=int(info[2]) if info else None,
        memory_bytes=int(info[1]) << 20 if info else None,
        free_memory_bytes=free,
        available_memory_bytes=available,
        qemu_uid=uid,
        qemu_uid_evidence=uid_evidence,
        userfaultfd=local_daemon.judge_userfaultfd(
            qemu_uid=uid,
            uid_evidence=uid_evidence,
            local=endpoint.local,
            session=endpoint.session,
            libvirt_version=libvirt_version,
            qemu_version=qemu_version,
            sysctl=local_daemon.read_text("/proc/sys/vm/unprivileged_userfaultfd"),
            device=local_daemon.userfaultfd_device(pid),
        ),
        locked_memory_limit_bytes=local_daemon.locked_memory_limit_bytes(pid) if pid else None,
        locked_memory_raisable=None if endpoint.session is None else not endpoint.session,
        tls_files=local_daemon.tls_files(endpoint, pid),
        domains=_domains(questions, connection),
        **(_host_capabilities(capabilities) if capabilities is not None else {}),
    )
    fit = _fit(questions, connection, guest) if guest is not None and driver == "QEMU" else None
    return msgspec.structs.replace(facts, fit=fit, unanswered=tuple(questions.unanswered))


def _host_capabilities(root: etree._Element) -> dict[str, Any]:
    """The fields of HostFacts that the capabilities XML tells."""
    archs = []
    for element in root.iterfind("guest/arch"):
        machines = [*element.iterfind("machine"), *element.iterfind("domain/machine")]
        archs.append(
            GuestArch(
                arch=element.get("name", ""),
                virt_types=tuple(domain.get("type", "") for domain in element.iterfind("domain")),
                emulators=tuple(dict.fromkeys(found.text or "" for found in element.iterfind(".//emulator"))),
                machines=tuple(
                    dict.fromkeys(
                        name
                        for machine in machines
                        for name in (machine.text or "", machine.get("canonical") or "")
                        if name
                    )
                ),
                canonical={
                    machine.text or "": machine.get("canonical", "") for machine in machines if machine.get("canonical")
                },
            )
        )
    return {
        "host_uuid": text_of(root, "host/uuid") or None,
        "arch": text_of(root, "host/cpu/arch"),
        "cpu_model": text_of(root, "host/cpu/model"),
        "cpu_vendor": text_of(root, "host/cpu/vendor"),
        "security_models": tuple(text_of(element, "model") for element in root.iterfind("host/secmodel")),
        "guest_archs": tuple(archs),
        "uri_transports": tuple(
            element.text or "" for element in root.iterfind("host/migration_features/uri_transports/uri_transport")
        ),
    }


def _qemu_uid(
    capabilities: etree._Element | None, endpoint: local_daemon.Endpoint, daemon: local_daemon.Daemon | None
) -> tuple[int | None, str]:
    """The user that QEMU runs as: the DAC model's base label, else the user of a session daemon."""
    if capabilities is not None:
        for model in capabilities.iterfind("host/secmodel"):
            if text_of(model, "model") != "dac":
                continue
            for label in model.iterfind("baselabel"):
                found = re.fullmatch(r"\+?(\d+):\+?\d+", (label.text or "").strip())
                if found and label.get("type") in ("kvm", "qemu"):
                    return int(found[1]), "user of the DAC security model"
    if endpoint.session:
        if daemon is not None:
            return daemon.uid, "user of its session daemon"
        if endpoint.local and not endpoint.socket_path:
            return os.getuid(), "a session daemon runs as its user"
    return None, ""


def _memory(questions: _Questions, connection: Any, *, local: bool) -> tuple[int | None, int | None]:
    """(free, available) in bytes. Two ways of asking for free memory differ on NUMA machines: the larger is right."""
    free = questions.ask("free memory", connection.getFreeMemory)
    stats = questions.ask("memory statistics", lambda: connection.getMemoryStats(-1)) or {}
    numbers = [int(free)] if free else []
    if "free" in stats:
        numbers.append(int(stats["free"]) * 1024)
    available = int(stats["available"]) * 1024 if "available" in stats else None
    if available is None and local and stats:
        available = local_daemon.available_memory_bytes()
    return max(numbers, default=None), available


def _domains(questions: _Questions, connection: Any) -> tuple[KnownDomain, ...] | None:
    active_flag, inactive_flag = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE, libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE
    active = questions.ask("active domains", lambda: connection.listAllDomains(active_flag))
    inactive = questions.ask("inactive domains", lambda: connection.listAllDomains(inactive_flag))
    if active is None or inactive is None:
        return None
    return tuple(
        KnownDomain(domain.name(), domain.UUIDString(), running)
        for running, domains in ((True, active), (False, inactive))
        for domain in domains
    )


# -- could this host run that guest --------------------------------------------------------------------------------


def _fit(questions: _Questions, connection: Any, guest: GuestFacts) -> GuestFit:
    emulator = _check_emulator(questions, connection, guest)
    if questions.silent:
        return GuestFit(emulator=emulator)
    cpu, missing = check_cpu(connection, guest)
    return GuestFit(emulator=emulator, cpu=cpu, missing_cpu_features=missing)


def _check_emulator(questions: _Questions, connection: Any, guest: GuestFacts) -> Finding:
    """Whether the host knows this emulator with this machine and virtualization type."""

    def look() -> Finding:
        try:
            xml = connection.getDomainCapabilities(
                guest.emulator or None, guest.arch or None, guest.machine or None, guest.virt_type or None, 0
            )
        except libvirt.libvirtError as error:
            text = error.get_error_message() or str(error)
            refused = not is_connection_error(error) or "QEMU binary" in text
            return Finding("no" if refused else "unknown", text)
        root = parse_xml(xml, what="domain capabilities")
        return Finding("yes", f"domain capabilities for {text_of(root, 'machine')} of {text_of(root, 'path')}")

    return questions.ask("domain capabilities", look, PROBE_S) or Finding("unknown", questions.unanswered[-1])


def check_cpu(connection: Any, guest: GuestFacts) -> tuple[Finding, tuple[str, ...]]:
    """Can QEMU on that host give the guest its CPU? (finding, names of missing features).

    Asked with virConnectCompareHypervisorCPU and FAIL_INCOMPATIBLE, which knows what that QEMU can do and names what
    is missing (newer libvirt). Does not raise, does not hang.
    """
    if not guest.cpu_xml:
        return Finding("yes", "the guest asks for no particular CPU"), ()
    fail = getattr(libvirt, "VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE", 1)

    def compare() -> int:
        return int(
            connection.compareHypervisorCPU(
                guest.emulator or None,
                guest.arch or None,
                guest.machine or None,
                guest.virt_type or None,
                guest.cpu_xml,
                fail,
            )
        )

    try:
        result = answer_within(PROBE_S, compare, "virtmig-facts")
    except NoAnswerError as error:
        return Finding("unknown", str(error)), ()
    except AttributeError:
        return Finding("unknown", "the installed libvirt-python cannot compare CPUs"), ()
    except libvirt.libvirtError as error:
        return _cpu_refused(error, guest)
    if result == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
        return _unless_unchecked("its QEMU cannot provide it", guest), ()
    same = "identical to" if result == libvirt.VIR_CPU_COMPARE_IDENTICAL else "part of"
    return Finding("yes", f"the guest's CPU is {same} what its QEMU provides"), ()


def _cpu_refused(error: Any, guest: GuestFacts) -> tuple[Finding, tuple[str, ...]]:
    text = error.get_error_message() or str(error)
    incompatible = error.get_error_code() == libvirt.VIR_ERR_CPU_INCOMPATIBLE
    if not incompatible and "Unknown CPU model" not in text:
        return Finding("unknown", text), ()
    return _unless_unchecked(text, guest), missing_features(text)


def _unless_unchecked(text: str, guest: GuestFacts) -> Finding:
    """libvirt starts a CPU with check='none' whatever the comparison says."""
    root = parse_xml(guest.cpu_xml, what="CPU XML")
    if root.get("check") == "none":
        return Finding("unknown", f"{text}; but the domain says check='none'")
    return Finding("no", text)


def missing_features(text: str) -> tuple[str, ...]:
    """The features that libvirt's error names, e.g. '... does not provide required features: avx512f, pku'."""
    found = re.search(r"(?:required features|missing features|extra features): ([\w.,\s-]+)", text)
    return tuple(name for name in re.split(r"[,\s]+", found[1].strip()) if name) if found else ()


# -- the guest -----------------------------------------------------------------------------------------------------


def gather_guest_facts(domain: Any, *, query_qemu: bool = False) -> GuestFacts:
    """Ask one domain. `query_qemu` also asks its QEMU, which taints the domain (custom-monitor).

    Raises VirtError when even its XML cannot be had, DomainXmlError when that cannot be parsed.
    """
    questions = _Questions()
    ask = questions.ask
    try:
        xml = answer_within(QUESTION_S, lambda: domain.XMLDesc(0), "virtmig-facts")
    except libvirt.libvirtError as error:
        raise virt_error(error) from error
    except NoAnswerError as error:
        raise VirtError(f"the domain's XML could not be had: {error}", hint="is its libvirt daemon alive?") from None
    migratable = ask("migratable XML", lambda: domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE))
    state, reason = ask("state", lambda: domain.state(0)) or (None, 0)
    active = state not in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED)
    persistent = ask("persistence", domain.isPersistent)
    facts = guest_facts_from_xml(
        xml,
        cpu_xml=cpu_element(parse_xml(migratable)) if migratable else None,
        state=_STATES[state] if state is not None and state < len(_STATES) else "unknown",
        persistent=None if persistent is None else bool(persistent),
        snapshots=ask("snapshots", lambda: domain.snapshotNum(0)),
        job=_job(questions, domain) if active else "",
        postcopy_failed=(state, reason) == (libvirt.VIR_DOMAIN_PAUSED, _PAUSED_POSTCOPY_FAILED),
    )
    if active:
        facts = msgspec.structs.replace(
            facts,
            block_job=_block_job(questions, domain, facts.disks),
            arrived_paused=_arrived_paused(questions, domain) if state == libvirt.VIR_DOMAIN_PAUSED else _NOT_PAUSED,
        )
    if query_qemu and active:
        facts = msgspec.structs.replace(facts, **_ask_qemu(questions, domain))
    return msgspec.structs.replace(facts, disks=_with_storage(questions, domain, facts.disks))


#: setting up a vCPU thread takes less than this; libvirt counts in steps of 10 ms
_HARDLY_RAN_NS = 100_000_000
_NOT_PAUSED = Finding("no", "the guest is not paused")


def _arrived_paused(questions: _Questions, domain: Any) -> Finding:
    """Whether a paused guest came here by migration and never ran: libvirt does not say, but its vCPUs' time tells."""
    vcpus = questions.ask("vCPU times", domain.vcpus)
    if not vcpus or not vcpus[0]:
        return Finding("unknown", "libvirt does not tell the vCPUs' time")
    used_ns = sum(vcpu[2] for vcpu in vcpus[0])
    if used_ns > _HARDLY_RAN_NS:
        return Finding("no", "its vCPUs have run here")
    keep = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
    last_job = questions.ask("completed job", lambda: domain.jobStats(keep)) or {}
    if last_job.get("operation") != libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN:
        return Finding("unknown", "its vCPUs have hardly run here; whether it was migrated here, nobody says")
    if used_ns:
        return Finding("unknown", f"its vCPUs have run for {used_ns // 1_000_000} ms since it was migrated here")
    return Finding("yes", "its vCPUs have used no processor time since it was migrated here")


def _job(questions: _Questions, domain: Any) -> str | None:
    stats = questions.ask("job", domain.jobStats)
    if stats is None:
        return None
    if stats.get("type") not in (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED):
        return ""
    operation = int(stats.get("operation", 0))
    return _OPERATIONS[operation] if operation < len(_OPERATIONS) else _OPERATIONS[0]


def _block_job(questions: _Questions, domain: Any, disks: tuple[DiskFacts, ...]) -> bool | None:
    known = False
    for disk in disks:
        if disk.empty:
            continue
        info = questions.ask(f"block job of {disk.target}", partial(domain.blockJobInfo, disk.target, 0))
        if info:
            return True
        known = known or info is not None
    return False if known or not disks else None


def _ask_qemu(questions: _Questions, domain: Any) -> dict[str, Any]:
    """The running QEMU's version, migration capabilities and blockers, by QMP."""

    def command(name: str) -> Any:
        import libvirt_qemu

        text = libvirt_qemu.qemuMonitorCommand(domain, json.dumps({"execute": name}), 0)
        return json.loads(text).get("return")

    found: dict[str, Any] = {}
    if answer := questions.ask("QEMU version", lambda: command("query-version")):
        number = answer["qemu"]
        found["qemu_version"] = version(number["major"], number["minor"], number["micro"])
    if answer := questions.ask("QEMU capabilities", lambda: command("query-migrate-capabilities")):
        found["migration_capabilities"] = tuple(row["capability"] for row in answer)
    answer = questions.ask("QEMU blockers", lambda: command("query-migrate"))
    if answer is not None:
        found["blockers"] = tuple(answer.get("blocked-reasons", ()))
    return found


#: since this release qemu.conf may call local directories shared (shared_filesystems)
_SHARED_FILESYSTEMS_SINCE = version(10, 9)


def _with_storage(questions: _Questions, domain: Any, disks: tuple[DiskFacts, ...]) -> tuple[DiskFacts, ...]:
    """The disks, with what the mounts of a local daemon say about their files."""
    if not any(disk.kind == "file" and disk.writable for disk in disks):
        return disks
    connection = questions.ask("connection", domain.connect)
    uri = questions.ask("URI", connection.getURI) if connection is not None else None
    endpoint = local_daemon.read_uri(uri or "")
    daemon = local_daemon.find_daemon(endpoint) if uri else None
    mounts = local_daemon.read_text(f"/proc/{daemon.pid}/mountinfo") if daemon else None
    if not mounts or daemon is None:
        return disks
    number = questions.ask("libvirt version", connection.getLibVersion) if connection is not None else None
    if number is not None and number >= _SHARED_FILESYSTEMS_SINCE:
        conf = local_daemon.read_text(f"/proc/{daemon.pid}/root/etc/libvirt/qemu.conf")
        if conf is None or local_daemon.conf_value(conf, "shared_filesystems"):
            return disks
    return tuple(_storage_of(disk, mounts, daemon.pid) for disk in disks)


def _storage_of(disk: DiskFacts, mounts: str, pid: int) -> DiskFacts:
    if disk.kind != "file" or disk.empty:
        return disk
    # symbolic links can only be followed where the daemon sees the same files as we do
    path = os.path.realpath(disk.source) if local_daemon.same_mounts(pid) else disk.source
    kind = local_daemon.file_system_of(path, mounts)
    if kind is None:
        return disk
    shared = kind in local_daemon.SHARED_FILE_SYSTEMS
    if kind.startswith("fuse") and not shared:
        return disk  # libvirt knows some of these by other means
    if shared:
        return msgspec.structs.replace(disk, storage="shared", evidence=f"lies on {kind}")
    return msgspec.structs.replace(disk, storage="local", evidence=f"lies on {kind}, which is no shared file system")
