"""`virtmig doctor [DESTURI]`: what both hosts can and cannot do for a migration, each trouble with the command that
fixes it, in the manner of virt-host-validate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Literal, TextIO

import msgspec

from virtmig.facts import GuestFacts, HostFacts, version, version_text
from virtmig.features import FEATURES
from virtmig.known_bad import KNOWN_BAD, NEVER, Versions, known_bad

Status = Literal["PASS", "WARN", "FAIL"]

#: what virtmig is written for and tested with (options.py)
OLDEST_LIBVIRT = version(9)


class Check(msgspec.Struct, frozen=True):
    """One line. `fix` is a command, or the words for the person who has to do it; empty only with PASS."""

    status: Status
    host: str
    what: str  # completes "Checking for ..."
    detail: str = ""
    fix: str = ""


def run_doctor(source_uri: str | None, destination_uri: str | None, as_json: bool = False) -> int:
    """Ask both hosts and print what was found, as lines or as one JSON array. 0, or 1 when something FAILs."""
    from virtmig.errors import ConnectionFailed
    from virtmig.virt.capabilities import gather_host_facts, unreachable_host_facts
    from virtmig.virt.hosts import Host

    facts: list[HostFacts] = []
    broken: list[Check] = []
    for uri in [source_uri] if destination_uri is None else [source_uri, destination_uri]:
        try:
            host = Host(uri)
        except ConnectionFailed as error:
            facts.append(unreachable_host_facts(uri or ""))
            broken.append(Check("FAIL", facts[-1].label, "a connection to libvirt", error.message, error.hint))
            continue
        try:
            facts.append(gather_host_facts(host.connection, uri or host.full_uri()))
        finally:
            host.close()
    checks = [*broken, *doctor_lines(facts[0], facts[1] if len(facts) > 1 else None)]
    if as_json:
        sys.stdout.write(msgspec.json.encode(checks).decode() + "\n")
    else:
        print_checks(checks, sys.stdout)
    return 1 if any(check.status == "FAIL" for check in checks) else 0


def print_checks(checks: list[Check], stream: TextIO) -> None:
    """virt-host-validate's lines: `  HOST: Checking for WHAT : PASS`, with a reason and a fix where it is not."""
    color = {"PASS": "\033[32m", "WARN": "\033[33m", "FAIL": "\033[31m"} if stream.isatty() else {}
    width = max((len(f"{check.host}: Checking for {check.what}") for check in checks), default=0)
    for check in checks:
        line = f"{check.host}: Checking for {check.what}"
        status = f"{color.get(check.status, '')}{check.status}{chr(27) + '[0m' if color else ''}"
        detail = f" ({check.detail})" if check.detail else ""
        stream.write(f"  {line:<{width}} : {status}{detail}\n")
        if check.fix and check.status != "PASS":
            stream.write(f"      fix: {check.fix}\n")


def doctor_lines(
    source: HostFacts, destination: HostFacts | None = None, guest: GuestFacts | None = None
) -> list[Check]:
    """All checks of one host, or of two and of what they are to each other. Pure."""
    if destination is not None and source.label == destination.label:
        source = msgspec.structs.replace(source, hostname=f"{source.label} (source)")
        destination = msgspec.structs.replace(destination, hostname=f"{destination.label} (destination)")
    checks = [*_one_host(source, "source")] if source.reachable else []
    if destination is not None and destination.reachable:
        checks += _one_host(destination, "destination")
    checks += _known_trouble(source, destination)
    if destination is None:
        return checks
    if source.reachable and destination.reachable:
        checks += _pair(source, destination)
        if guest is not None:
            checks += _guest(source, destination, guest)
    return checks


# -- one host ------------------------------------------------------------------------------------------------------


def _one_host(host: HostFacts, role: str) -> Iterator[Check]:
    name = host.label
    yield _minimum(name, "libvirt", host.libvirt_version, OLDEST_LIBVIRT, "upgrade libvirt on that host")
    if host.driver != "QEMU":
        yield Check("FAIL", name, "the QEMU driver", f"this is {host.driver or 'unknown'}", "give a qemu: URI")
        return
    if host.qemu_version is None:
        yield Check(
            "FAIL", name, "a QEMU binary", "libvirt found none", "apt install qemu-system-x86, or dnf install qemu-kvm"
        )
    else:
        yield Check("PASS", name, "a QEMU binary", version_text(host.qemu_version))
    yield _acceleration(host)
    yield _host_name(host, role)
    yield from _userfaultfd(host, role)
    yield _locked_memory(host)
    yield from _tls(host)
    for question in host.unanswered:
        yield Check("WARN", name, "an answer to every question", question, f"virsh -c '{host.uri}' capabilities")


def _minimum(name: str, software: str, have: int | None, needed: int, fix: str) -> Check:
    what = f"{software} >= {version_text(needed)}"
    if have is None:
        return Check("WARN", name, what, "its version is not known", fix)
    return Check("PASS" if have >= needed else "FAIL", name, what, version_text(have), "" if have >= needed else fix)


def _acceleration(host: HostFacts) -> Check:
    arch = host.guest_arch(host.arch)
    if arch is not None and "kvm" in arch.virt_types:
        return Check("PASS", host.label, "hardware virtualization (KVM)")
    return Check(
        "WARN",
        host.label,
        "hardware virtualization (KVM)",
        "only emulated guests (TCG) run here",
        "modprobe kvm_intel || modprobe kvm_amd; ls -l /dev/kvm",
    )


def _host_name(host: HostFacts, role: str) -> Check:
    what = "a host name that others can use"
    if host.hostname and not host.hostname.startswith("localhost"):
        return Check("PASS", host.label, what, host.hostname)
    status: Status = "FAIL" if role == "destination" and host.session is False else "WARN"
    return Check(
        status,
        host.label,
        what,
        f"it calls itself {host.hostname or 'nothing'}",
        "hostnamectl hostname NAME, or migration_host in qemu.conf, or --migrateuri tcp://ADDRESS",
    )


def _userfaultfd(host: HostFacts, role: str) -> Iterator[Check]:
    what = "userfaultfd for QEMU's user (postcopy)"
    if host.userfaultfd.status == "yes":
        yield Check("PASS", host.label, what, host.userfaultfd.evidence)
    elif role == "destination" or host.userfaultfd.status == "no":
        yield Check(
            "WARN",
            host.label,
            what,
            host.userfaultfd.evidence,
            "sysctl vm.unprivileged_userfaultfd=1"
            + (", or libvirt >= 10.1 with /dev/userfaultfd in cgroup_device_acl" if host.session is False else ""),
        )


def _locked_memory(host: HostFacts) -> Check:
    what = "locked memory for zero-copy"
    limit = host.locked_memory_limit_bytes
    if host.locked_memory_raisable or limit == -1:
        return Check("PASS", host.label, what, "libvirt raises the limit as needed" if limit != -1 else "unlimited")
    known = f"the limit is {limit >> 10} KiB and may not be raised" if limit is not None else "the limit is not known"
    return Check("WARN", host.label, what, known, "ulimit -l unlimited before its daemon starts (limits.conf: memlock)")


def _tls(host: HostFacts) -> Iterator[Check]:
    what = "certificates for --tls"
    if host.tls_files.status == "yes":
        yield Check("PASS", host.label, what, host.tls_files.evidence)
    elif host.tls_files.status == "no":
        yield Check("WARN", host.label, what, host.tls_files.evidence, "virt-pki-validate; only --tls needs them")


def _known_trouble(source: HostFacts, destination: HostFacts | None) -> Iterator[Check]:
    """Rows of KNOWN_BAD that these versions bring in, whatever is asked later; one line a row."""
    for row in KNOWN_BAD:
        if all(item.until == NEVER and not item.since for item in row.ranges):
            continue  # true of every version there is: nothing to find out about these hosts
        hit = [
            label
            for label, versions in _sides(source, destination)
            if any(row is found for found in known_bad(frozenset(row.when), versions))
        ]
        if not hit:
            continue
        pair = len(hit) > 1 and destination is not None
        hosts = " and ".join(hit[:-1] if pair else hit)  # the pair is named only where neither host is in it alone
        needs = f"with {' and '.join(_words(row.when))}: " if row.when else ""
        yield Check("WARN", hosts, f"known trouble: {row.name}", f"{needs}{row.consequence}", row.way_out)


def _sides(source: HostFacts, destination: HostFacts | None) -> Iterator[tuple[str, Versions]]:
    """Each host by itself in its role, then both together."""
    mine = Versions(source_qemu=source.qemu_version, source_libvirt=source.libvirt_version)
    yield source.label, mine
    if destination is None:
        return
    qemu, libvirt = destination.qemu_version, destination.libvirt_version
    yield destination.label, Versions(destination_qemu=qemu, destination_libvirt=libvirt)
    yield (
        f"{source.label} -> {destination.label}",
        msgspec.structs.replace(mine, destination_qemu=qemu, destination_libvirt=libvirt),
    )


def _words(tokens: tuple[str, ...]) -> list[str]:
    options = {row.name: "--" + row.when[0].replace("=", " ", 1) for row in FEATURES if row.when}
    return [token.removeprefix("guest:") if ":" in token else options.get(token, f"--{token}") for token in tokens]


# -- both ----------------------------------------------------------------------------------------------------------


def _pair(source: HostFacts, destination: HostFacts) -> Iterator[Check]:
    name = f"{source.label} -> {destination.label}"
    if source.host_uuid and source.host_uuid == destination.host_uuid:
        yield Check(
            "FAIL",
            name,
            "two hosts",
            f"both have host UUID {source.host_uuid}",
            "set host_uuid in libvirtd.conf of one",
        )
    elif source.host_uuid and destination.host_uuid:
        yield Check("PASS", name, "two hosts")
    if source.arch and destination.arch:
        same = source.arch == destination.arch
        yield Check(
            "PASS" if same else "FAIL",
            name,
            "the same architecture",
            source.arch if same else f"{source.arch} and {destination.arch}",
            "" if same else "use a destination of the same architecture",
        )
    if source.cpu_vendor and destination.cpu_vendor and source.cpu_vendor != destination.cpu_vendor:
        yield Check(
            "WARN",
            name,
            "CPUs of one vendor",
            f"{source.cpu_vendor} and {destination.cpu_vendor}",
            "virsh hypervisor-cpu-baseline names a CPU that both can give",
        )
    yield from _machines(name, source, destination)
    yield from _security(name, source, destination)
    yield from _together(name, source, destination)


def _machines(name: str, source: HostFacts, destination: HostFacts) -> Iterator[Check]:
    mine, theirs = source.guest_arch(source.arch), destination.guest_arch(source.arch)
    if mine is None or theirs is None or not mine.canonical:
        return
    missing = sorted({alias for alias, real in mine.canonical.items() if real not in theirs.machines})
    what = "machine types of the source on the destination"
    if not missing:
        yield Check("PASS", name, what)
        return
    yield Check(
        "WARN",
        name,
        what,
        "unknown there: " + ", ".join(f"{alias} ({mine.canonical[alias]})" for alias in missing),
        "upgrade QEMU on the destination, or start guests with a machine type that both know",
    )


def _security(name: str, source: HostFacts, destination: HostFacts) -> Iterator[Check]:
    mine, theirs = ({model for model in host.security_models if model != "none"} for host in (source, destination))
    if mine == theirs:
        yield Check("PASS", name, "the same security models", ", ".join(sorted(mine)) or "none")
    else:
        yield Check(
            "WARN",
            name,
            "the same security models",
            f"{', '.join(sorted(mine)) or 'none'} and {', '.join(sorted(theirs)) or 'none'}",
            "security_driver in qemu.conf; guests with static labels cannot move between different models",
        )


def _together(name: str, source: HostFacts, destination: HostFacts) -> Iterator[Check]:
    """What only works when both have it."""
    if source.qemu_version and destination.qemu_version:
        oldest = min(source.qemu_version, destination.qemu_version)
        yield _worth(name, "multifd with postcopy", oldest >= version(10, 1), "QEMU 10.1 on both", version_text(oldest))
        preempt = oldest >= version(7, 1)
        if source.libvirt_version and destination.libvirt_version:
            older = min(source.libvirt_version, destination.libvirt_version)
            yield _worth(
                name,
                "a priority channel for postcopy",
                preempt and older >= version(10),
                "QEMU 7.1 and libvirt 10.0 on both",
                f"QEMU {version_text(oldest)}, libvirt {version_text(older)}",
            )
    one_core = [host.label for host in (source, destination) if host.cpus == 1]
    yield _worth(
        name, "cores for parallel connections", not one_core, "a second core", f"{', '.join(one_core)} has one"
    )


def _worth(name: str, what: str, good: bool, needed: str, have: str) -> Check:
    return Check("PASS", name, what) if good else Check("WARN", name, what, have, f"needs {needed}")


def _guest(source: HostFacts, destination: HostFacts, guest: GuestFacts) -> Iterator[Check]:
    """What the plan would say about this guest without any option but --live."""
    from virtmig.plan import negotiate
    from virtmig.request import MigrationRequest

    plan = negotiate(
        MigrationRequest({"domain": guest.name, "desturi": destination.uri, "live": True}), source, destination, guest
    )
    if not plan.refusals:
        yield Check("PASS", guest.name, f"a live migration to {destination.label}")
    for refusal in plan.refusals:
        yield Check("FAIL", guest.name, refusal.feature, refusal.reason, refusal.way_out)
    for caution in plan.warnings:
        yield Check("WARN", guest.name, caution.feature, caution.text, caution.way_out or "virtmig migrate --plan")
