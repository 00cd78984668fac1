"""What stands in the way of this guest moving between these two hosts, whatever the channels are. Pure.

Most of it is what libvirt checks itself, half of it only after the destination has been prepared
(qemu_migration.c: qemuMigrationSrcIsAllowed, qemuMigrationSrcIsSafe, qemuMigrationDstPrepare; cookie checks). Here all
of it is said at once and before anything starts. What nobody could find out is a Caution, never a Refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import msgspec

from virtmig.facts import DiskFacts, GuestFacts, HostFacts, version, version_text
from virtmig.options import BY_NAME, Option
from virtmig.request import MigrationRequest


class Refusal(msgspec.Struct, frozen=True):
    """One reason why it cannot be done as asked, and what the person can do about it."""

    feature: str
    reason: str
    way_out: str


class Caution(msgspec.Struct, frozen=True):
    """Something that may go wrong or could not be found out, and what would settle it."""

    feature: str
    text: str
    way_out: str = ""


Obstacle = Refusal | Caution


def obstacles(
    request: MigrationRequest, source: HostFacts, destination: HostFacts, guest: GuestFacts
) -> Iterator[Obstacle]:
    """Every Refusal and Caution that does not depend on which channels or features are chosen."""
    yield from _hosts(request, source, destination)
    yield from _options_too_new(request, source, destination)
    yield from _names(request, source, destination, guest)
    if "postcopy-resume" in request:
        yield from _resume(destination, guest)
        return
    yield from _state(request, source, guest)
    yield from _devices(request, source, guest)
    yield from _disks(request, guest)
    yield from _machine_and_cpu(request, destination, guest)
    yield from _memory(request, destination, guest)
    yield from _addresses(request, destination)


# -- hosts ---------------------------------------------------------------------------------------------------------


def is_localhost(uri: str) -> bool:
    """libvirt's own test of a peer-to-peer destination (virDomainMigrateCheckNotLocal): no server, or localhost*.

    A URI without a server that names a socket is not local to libvirt: it may lead to another daemon.
    """
    parts = urlsplit(uri)
    if parts.hostname:
        return parts.hostname.startswith("localhost")
    return "socket" not in parse_qs(parts.query)


def _hosts(request: MigrationRequest, source: HostFacts, destination: HostFacts) -> Iterator[Obstacle]:
    if "direct" in request:
        yield Refusal(
            "direct", "direct migration is not supported by the source host: QEMU has none", "leave out --direct"
        )
    another = "give the URI of another host, or of another daemon with ?socket=PATH"
    both_known = source.host_uuid is not None and destination.host_uuid is not None
    if both_known and source.host_uuid == destination.host_uuid:
        yield Refusal(
            "hosts",
            f"source and destination are the same host: both have host UUID {source.host_uuid}",
            f"{another}; two hosts that share a UUID (cloned machines) need host_uuid set in libvirtd.conf",
        )
    elif is_localhost(request.destination_uri) and ("p2p" in request or not both_known):
        yield Refusal(
            "hosts", f"Attempt to migrate guest to the same host: {request.destination_uri} names this host", another
        )
    if source.driver and destination.driver and source.driver != destination.driver:
        yield Refusal(
            "hosts",
            f"{source.label} runs {source.driver} guests, {destination.label} runs {destination.driver} guests",
            f"give a destination URI of the {source.driver} driver",
        )
    if not destination.reachable:
        yield Caution(
            "hosts",
            f"{destination.label} was not reachable from here: what it can do is not known",
            "run this where the destination URI can be opened, to have everything checked before the start",
        )


def _options_too_new(request: MigrationRequest, source: HostFacts, destination: HostFacts) -> Iterator[Obstacle]:
    for name in request:
        option = BY_NAME[name]
        if not option.since:
            continue
        for where, number in _libvirts(option, source, destination):
            if number is not None and number < option.since:
                yield Refusal(
                    name,
                    f"this libvirt is too old for --{name} (needs {version_text(option.since)}, {where} is "
                    f"{version_text(number)})",
                    f"leave out --{name}, or upgrade libvirt",
                )
                break


def _libvirts(option: Option, source: HostFacts, destination: HostFacts) -> Iterator[tuple[str, int | None]]:
    yield "the installed client library", source.client_version
    yield f"the daemon on {source.label}", source.libvirt_version
    sides = option.qemu.rpartition(" ")[2] if option.qemu else "SD"
    if "D" in sides:
        yield f"the daemon on {destination.label}", destination.libvirt_version


# -- the domain ----------------------------------------------------------------------------------------------------


def _names(
    request: MigrationRequest, source: HostFacts, destination: HostFacts, guest: GuestFacts
) -> Iterator[Obstacle]:
    if destination.domains is None or "postcopy-resume" in request:
        return
    if source.host_uuid is not None and source.host_uuid == destination.host_uuid:
        return  # the same daemon: what it knows is the guest itself
    if guest.job or guest.postcopy_failed:
        return  # a migration is under way: the copy there is its other half, in postcopy the one that runs
    name = request.text("dname") or guest.name
    remove = f"virsh -c '{request.destination_uri}'"
    for known in destination.domains:
        if guest.uuid and known.uuid == guest.uuid:
            if known.active:
                yield Refusal(
                    "domain",
                    f"domain '{known.name}' with UUID {known.uuid} is already active on {destination.label}",
                    f"look at both before anything is stopped: virsh -c '{source.uri}' domstate --reason {guest.name}; "
                    f"{remove} domstate --reason {known.name}",
                )
            elif known.name != name:
                yield Refusal(
                    "domain",
                    f"{destination.label} knows UUID {known.uuid} under the name '{known.name}'",
                    f"{remove} undefine {known.name}, or --dname {known.name}",
                )
        elif known.name == name:
            yield Refusal(
                "domain",
                f"domain '{name}' already exists on {destination.label} with UUID {known.uuid}",
                f"give the guest another name there with --dname, or remove that one: {remove} undefine {name}",
            )


def _resume(destination: HostFacts, guest: GuestFacts) -> Iterator[Obstacle]:
    if guest.postcopy_failed is False:
        yield Refusal(
            "postcopy-resume",
            f"domain '{guest.name}' is not being migrated: it has no postcopy that broke",
            "leave out --postcopy-resume to start a migration",
        )
    if destination.domains is not None and not any(
        known.active and known.uuid == guest.uuid for known in destination.domains
    ):
        yield Refusal(
            "postcopy-resume",
            f"{destination.label} does not run domain '{guest.name}': there is no other half to go on with",
            "give the URI of the host that the broken migration went to",
        )


def _state(request: MigrationRequest, source: HostFacts, guest: GuestFacts) -> Iterator[Obstacle]:
    offline = "offline" in request
    if not guest.active and not offline:
        yield Refusal(
            "domain", "domain is not running", f"virsh start {guest.name}, or --offline to move its definition only"
        )
    if guest.active and offline:
        yield Caution(
            "offline", f"{guest.name} runs, and stays here: --offline moves only its definition", "leave out --offline"
        )
    if guest.job and not guest.postcopy_failed:
        yield Refusal(
            "domain",
            f"another job is already running for domain '{guest.name}': {guest.job}",
            f"virtmig -c '{source.uri}' watch {guest.name}",
        )
    if guest.postcopy_failed:
        yield Refusal(
            "domain",
            f"domain '{guest.name}' is split by a postcopy that broke",
            "add --live --postcopy --postcopy-resume to the same destination to go on with it",
        )
    elif guest.state == "paused" and "postcopy" in request:
        yield Refusal(
            "postcopy",
            "post-copy migration is not supported with non-live or paused migration",
            f"leave out --postcopy: a paused guest dirties nothing; or virsh resume {guest.name} first",
        )
    if guest.running and "live" not in request and not offline:
        yield Caution("live", "the guest stands still during the whole migration", "add --live")
    for blocker in guest.blockers or ():
        yield Refusal("domain", f"cannot migrate domain: {blocker}", "remove what QEMU names, then try again")
    if guest.snapshots:
        yield Refusal(
            "domain",
            f"cannot migrate domain with {guest.snapshots} snapshots",
            f"virsh snapshot-delete {guest.name} NAME for each of virsh snapshot-list {guest.name}",
        )
    if offline:
        return
    if guest.block_job:
        yield Refusal(
            "domain",
            "domain has active block job",
            f"wait for it, or end it: virsh blockjob {guest.name} DISK --abort",
        )
    if guest.autodestroy:
        yield Refusal(
            "domain",
            "domain is marked for auto destroy",
            "start it again without --autodestroy",
        )


#: before this release libvirt refuses every virtiofs; later ones ask virtiofsd for "migrate-precopy"
_VIRTIOFS_SINCE = version(10, 5)


def _devices(request: MigrationRequest, source: HostFacts, guest: GuestFacts) -> Iterator[Obstacle]:
    if "offline" in request:
        return
    if guest.virtiofs and source.libvirt_version is not None and source.libvirt_version < _VIRTIOFS_SINCE:
        yield Refusal(
            "virtiofs",
            "migration with virtiofs device is not supported by this libvirt",
            "detach the virtiofs filesystem, or upgrade libvirt and virtiofsd",
        )
    elif guest.virtiofs:
        yield Caution("virtiofs", "virtiofs migrates only when virtiofsd says that it can (migrate-precopy)")
    for name in guest.shmem_peers:
        yield Refusal(
            "shmem",
            f"shmem device '{name}' cannot be migrated, only shmem with role='master' can be migrated",
            f"detach shmem '{name}'",
        )
    if guest.invtsc_without_frequency:
        yield Refusal(
            "cpu",
            "domain has 'invtsc' CPU feature but TSC frequency is not specified",
            "set <timer name='tsc' frequency='...'/> in <clock>, or drop invtsc",
        )
    for disk in guest.disks:
        if disk.transient:
            yield Refusal(
                "storage",
                f"migration with transient disk is not supported: {disk.target}",
                f"detach {disk.target}, or make it permanent",
            )
    if guest.hostdevs and guest.blockers is None:
        named = ", ".join(f"{device.kind} {device.where}".strip() for device in guest.hostdevs)
        yield Caution(
            "hostdev",
            f"QEMU decides whether these host devices can migrate: {named}",
            "--query-qemu asks it beforehand; or detach them before the migration",
        )


# -- storage -------------------------------------------------------------------------------------------------------


def copied_disks(request: MigrationRequest, guest: GuestFacts) -> tuple[DiskFacts, ...]:
    """The disks that libvirt would copy (qemuMigrationAnyCopyDisk): those listed, else all it must copy."""
    if "copy-storage-all" not in request and "copy-storage-inc" not in request:
        return ()
    listed = request.words("migrate-disks") if "migrate-disks" in request else ()
    if listed:
        return tuple(disk for disk in guest.disks if disk.target in listed)
    return tuple(disk for disk in guest.disks if disk.writable and not disk.shareable)


def _disks(request: MigrationRequest, guest: GuestFacts) -> Iterator[Obstacle]:
    by_target = {disk.target: disk for disk in guest.disks}
    for option in ("migrate-disks", "migrate-disks-detect-zeroes", "migrate-disks-target-zero"):
        for target in request.words(option) if option in request else ():
            if target not in by_target:
                yield Refusal(
                    "storage", f"disk target {target} not found", f"{guest.name} has: {', '.join(by_target) or 'none'}"
                )
            elif not by_target[target].writable:
                yield Refusal(
                    "storage",
                    f"Cannot migrate empty or read-only disk {target}",
                    f"leave {target} out of --{option}",
                )
    if "offline" in request:
        if any(disk.writable for disk in guest.disks):
            yield Caution("storage", "--offline copies no disks and no NVRAM", "copy them before it is started there")
        return
    copied = copied_disks(request, guest)
    if "copy-storage-inc" in request and copied:
        yield Caution(
            "storage",
            "--copy-storage-inc needs the images on the destination to exist already: libvirt does not create them",
        )
    if "unsafe" in request:
        return
    for disk in guest.disks:
        if not disk.writable or disk in copied:
            continue
        if disk.storage == "local":
            yield Refusal(
                "storage",
                f"Migration without shared storage is unsafe: {disk.target} ({disk.source}) {disk.evidence}".strip(),
                "add --copy-storage-all, or put the disk on shared storage, or --unsafe if you know better",
            )
        elif disk.storage == "unknown" and disk.kind == "file":
            yield Caution(
                "storage",
                f"nobody here can tell whether {disk.source} (disk {disk.target}) is on shared storage",
                "libvirt checks at the start and refuses a local one; --copy-storage-all copies it",
            )


# -- what the destination can run ----------------------------------------------------------------------------------


def _machine_and_cpu(request: MigrationRequest, destination: HostFacts, guest: GuestFacts) -> Iterator[Obstacle]:
    if not destination.reachable:
        return
    if destination.guest_archs and guest.arch:
        arch = destination.guest_arch(guest.arch)
        if arch is None:
            yield Refusal(
                "machine",
                f"{destination.label} runs no {guest.arch} guests",
                f"install QEMU for {guest.arch} there",
            )
            return
        if guest.virt_type and arch.virt_types and guest.virt_type not in arch.virt_types:
            yield Refusal(
                "machine",
                f"{destination.label} has no {guest.virt_type} for {guest.arch}, only {', '.join(arch.virt_types)}",
                "load the kvm module there and check /dev/kvm"
                if guest.virt_type == "kvm"
                else "use another destination",
            )
        if guest.machine and arch.machines and guest.machine not in arch.machines:
            yield Refusal(
                "machine",
                f"machine type {guest.machine} is unknown to QEMU {version_text(destination.qemu_version)} on "
                f"{destination.label}",
                "upgrade QEMU there, or start the guest with a machine type that both hosts know",
            )
            return
    fit = destination.fit
    if fit is None:
        return
    if fit.emulator.status == "no":
        text = f"{destination.label} cannot run this guest's emulator {guest.emulator}: {fit.emulator.evidence}"
        if "xml" in request:
            yield Caution("machine", f"{text}; the XML given with --xml may name another")
        else:
            yield Refusal("machine", text, "install it there, or name another with --xml")
        return
    if fit.cpu.status == "no":
        said = all(name in fit.cpu.evidence for name in fit.missing_cpu_features)
        named = "" if said else f" (missing: {', '.join(fit.missing_cpu_features)})"
        yield Refusal(
            "cpu",
            f"the guest's CPU does not fit {destination.label}: {fit.cpu.evidence}{named}",
            "start the guest with a CPU that both hosts have: virsh hypervisor-cpu-baseline on both names one",
        )
    elif fit.cpu.status == "unknown" and "offline" not in request:
        yield Caution("cpu", f"whether the guest's CPU fits {destination.label} is not known: {fit.cpu.evidence}")


def _memory(request: MigrationRequest, destination: HostFacts, guest: GuestFacts) -> Iterator[Obstacle]:
    have = destination.available_memory_bytes
    what = "available"
    if have is None:
        have, what = destination.free_memory_bytes, "free (page cache not counted)"
    if "offline" in request or have is None or guest.memory_bytes is None or guest.memory_bytes <= have:
        return
    yield Caution(
        "memory",
        f"the guest has {guest.memory_bytes >> 20} MiB, {destination.label} has {have >> 20} MiB {what}",
        "free memory there, or choose another destination",
    )


def _addresses(request: MigrationRequest, destination: HostFacts) -> Iterator[Obstacle]:
    by_itself = not any(name in request for name in ("migrateuri", "tunnelled", "offline"))
    if by_itself and destination.hostname.startswith("localhost"):
        yield Caution(
            "address",
            f"the destination calls itself {destination.hostname}: libvirt refuses to send memory to such a name "
            "unless migration_host is set in its qemu.conf",
            "--migrateuri tcp://ADDRESS, or give that host a real name",
        )
