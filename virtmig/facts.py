"""What a host or a guest is and can do: plain data, JSON both ways, nothing guessed.

`None` and "unknown" mean that nobody could tell; a plan treats them as such and says so. Facts that libvirt answers
come from virt/capabilities.py, those that stand in a domain XML from domain/facts.py.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["yes", "no", "unknown"]


def version(major: int, minor: int = 0, micro: int = 0) -> int:
    """libvirt's way to write a version in one number: 1000000 * major + 1000 * minor + micro."""
    return major * 1_000_000 + minor * 1_000 + micro


def version_text(number: int | None) -> str:
    """9000000 -> "9.0.0"; None -> "unknown version"."""
    if number is None:
        return "unknown version"
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


class Finding(msgspec.Struct, frozen=True):
    """A yes or no that may be unknown, with what it was concluded from."""

    status: Status = "unknown"
    evidence: str = "not asked"


class GuestArch(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture that a host can run guests of (capabilities XML, <guest><arch>)."""

    arch: str
    virt_types: tuple[str, ...] = ()  # "kvm", "qemu", ...
    emulators: tuple[str, ...] = ()  # paths on that host
    machines: tuple[str, ...] = ()  # canonical names and aliases
    canonical: dict[str, str] = {}  # alias -> canonical name, e.g. pc -> pc-i440fx-7.2


class KnownDomain(msgspec.Struct, frozen=True):
    """A domain that a host already has."""

    name: str
    uuid: str
    active: bool


class GuestFit(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one host could run one guest, as that host's libvirt answered."""

    emulator: Finding = Finding()  # emulator, machine and virtualization type: virConnectGetDomainCapabilities
    cpu: Finding = Finding()  # virConnectCompareHypervisorCPU
    missing_cpu_features: tuple[str, ...] = ()


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One host, whatever its role. Versions as `version()` writes them."""

    uri: str
    hostname: str = ""  # as the host calls itself; falls back to the URI for people
    host_uuid: str | None = None
    reachable: bool = True  # False: nobody here could connect, everything else is unknown
    local: bool | None = None  # its daemon runs on this machine, under this kernel
    session: bool | None = None  # an unprivileged daemon of one user
    driver: str = ""  # "QEMU", "TEST", ...
    client_version: int | None = None  # the libvirt library that asked
    libvirt_version: int | None = None
    qemu_version: int | None = None  # newest binary the daemon has looked at; a running guest may be older
    arch: str = ""
    cpus: int | None = None
    cpu_model: str = ""
    cpu_vendor: str = ""
    memory_bytes: int | None = None
    free_memory_bytes: int | None = None
    available_memory_bytes: int | None = None  # with page cache that can be given back; libvirt >= 12.3 or local
    security_models: tuple[str, ...] = ()
    guest_archs: tuple[GuestArch, ...] = ()
    uri_transports: tuple[str, ...] = ()
    qemu_uid: int | None = None  # the user QEMU runs as
    qemu_uid_evidence: str = ""
    userfaultfd: Finding = Finding()  # may QEMU's user open a userfaultfd: what postcopy needs on the destination
    migration_capabilities: tuple[str, ...] | None = None  # what QEMU said itself; None when it was not asked
    parallel_connections_max: int | None = None  # a limit the host's owner has set; libvirt has no such setting
    locked_memory_limit_bytes: int | None = None  # -1: unlimited
    locked_memory_raisable: bool | None = None  # the daemon may raise QEMU's limit
    tls_files: Finding = Finding()
    agent: Finding = Finding()  # an agent of virtmig runs there and may be used
    domains: tuple[KnownDomain, ...] | None = None
    fit: GuestFit | None = None  # for the guest of this migration, when the host was asked about it
    unanswered: tuple[str, ...] = ()  # questions that got no answer, with the reason

    @property
    def label(self) -> str:
        """What a person would call this host."""
        return self.hostname or self.uri or "this host"

    def guest_arch(self, arch: str) -> GuestArch | None:
        return next((row for row in self.guest_archs if row.arch == arch), None)


class DiskFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a guest. `storage` says whether the other host sees the same bytes, as far as anybody can tell."""

    target: str
    kind: str = "file"  # the type of the source: file, block, network, nvme, vhostuser, ...
    device: str = "disk"
    source: str = ""
    readonly: bool = False
    shareable: bool = False
    cache: str = ""
    transient: bool = False
    empty: bool = False
    storage: Literal["shared", "local", "unknown"] = "unknown"
    evidence: str = ""

    @property
    def writable(self) -> bool:
        return not self.empty and not self.readonly


class HostdevFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A device of the host given to the guest."""

    kind: str  # pci, usb, scsi, mdev, ...
    where: str = ""
    vfio: bool = False


class GuestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One guest on its source host."""

    name: str
    uuid: str = ""
    state: str = "unknown"  # running, paused, shut off, crashed, pmsuspended, shutting down, unknown
    arrived_paused: Finding = Finding()  # came by migration, paused, and has not run since: its disks are inactive
    persistent: bool | None = None
    memory_bytes: int | None = None
    vcpus: int | None = None
    virt_type: str = ""
    arch: str = ""
    machine: str = ""
    emulator: str = ""
    cpu_xml: str = ""  # as the destination would get it
    qemu_version: int | None = None  # of the process that runs the guest; only QEMU itself can tell
    migration_capabilities: tuple[str, ...] | None = None  # the same
    blockers: tuple[str, ...] | None = None  # QEMU's own reasons against a migration; the same
    disks: tuple[DiskFacts, ...] = ()
    hostdevs: tuple[HostdevFacts, ...] = ()
    virtiofs: int = 0
    tpm: bool = False
    hugepages: bool = False
    memory_source: str = ""  # file, memfd, anonymous
    memory_shared: bool = False
    hard_limit_bytes: int | None = None
    shmem_peers: tuple[str, ...] = ()
    invtsc_without_frequency: bool = False
    snapshots: int | None = None
    block_job: bool | None = None
    autodestroy: bool | None = None  # dies with the connection that started it; libvirt tells nobody
    postcopy_failed: bool | None = None  # split between two hosts by a postcopy that broke
    job: str | None = None  # the running libvirt job: "", or its operation, e.g. "migration out"

    @property
    def active(self) -> bool:
        """It has a QEMU process, whether its CPUs run or not."""
        return self.state not in ("shut off", "crashed")

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def vfio(self) -> bool:
        return any(device.vfio for device in self.hostdevs)
