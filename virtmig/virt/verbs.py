"""The sibling verbs of migrate: one libvirt call each, on any job, also one that plain virsh started.

Each takes an open connection and a domain by name, id or UUID, and raises VirtError in libvirt's words.
"""

from __future__ import annotations

from typing import Any

import libvirt

from virtmig.errors import RequestError
from virtmig.virt.connection import lookup_domain, translated


def set_max_downtime(connection: Any, name: str, milliseconds: int) -> None:
    if milliseconds < 1:
        raise RequestError("migrate: Invalid downtime", option="downtime", hint="milliseconds, 1 or more")
    domain = lookup_domain(connection, name)
    with translated(hint="the domain must be running; QEMU takes up to 2000000 ms"):
        domain.migrateSetMaxDowntime(milliseconds, 0)


def get_max_downtime(connection: Any, name: str) -> int:
    """In milliseconds."""
    domain = lookup_domain(connection, name)
    with translated():
        return _number(domain.migrateGetMaxDowntime(0), "virDomainMigrateGetMaxDowntime")


def _number(value: Any, call: str) -> int:
    """Some versions of the binding give None where they should raise."""
    if value is None:
        raise libvirt.libvirtError(f"{call}() failed")
    return int(value)


def _speed_flags(postcopy: bool) -> int:
    return int(libvirt.VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY) if postcopy else 0


def set_speed(connection: Any, name: str, mib_s: int, *, postcopy: bool) -> None:
    domain = lookup_domain(connection, name)
    with translated():
        domain.migrateSetMaxSpeed(mib_s, _speed_flags(postcopy))


def get_speed(connection: Any, name: str, *, postcopy: bool) -> int:
    """In MiB/s; 8796093022207 means unlimited."""
    domain = lookup_domain(connection, name)
    with translated():
        return int(domain.migrateGetMaxSpeed(_speed_flags(postcopy)))


def compression_cache(connection: Any, name: str, size_bytes: int | None) -> int:
    """Set the xbzrle cache when a size is given; its size afterwards, in bytes."""
    domain = lookup_domain(connection, name)
    with translated():
        if size_bytes is not None:
            domain.migrateSetCompressionCache(size_bytes, 0)
        return _number(domain.migrateGetCompressionCache(0), "virDomainMigrateGetCompressionCache")


def start_postcopy(connection: Any, name: str) -> None:
    domain = lookup_domain(connection, name)
    with translated(hint="the migration must have been started with --postcopy and be running"):
        domain.migrateStartPostCopy(0)


def job_stats(connection: Any, name: str, *, completed: bool, keep: bool) -> dict[str, Any]:
    """virDomainGetJobStats as a dict with "type"; reading completed statistics clears them unless `keep`."""
    domain = lookup_domain(connection, name)
    flags = 0
    if completed:
        flags |= int(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    if keep:
        flags |= int(libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED)
    with translated():
        return dict(domain.jobStats(flags))


def abort_job(connection: Any, name: str, *, postcopy: bool) -> None:
    domain = lookup_domain(connection, name)
    with translated():
        if postcopy:
            domain.abortJobFlags(libvirt.VIR_DOMAIN_ABORT_JOB_POSTCOPY)
        else:
            domain.abortJob()


def hostname(connection: Any) -> str:
    """What the host calls itself (virConnectGetHostname)."""
    with translated():
        return str(connection.getHostname())


def migratable_xml(domain: Any, *, inactive: bool = False) -> str:
    """As the other host would get it, passwords included; of a transient domain `inactive` is "" ."""
    with translated():
        if not inactive:
            return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE))
        if not domain.isPersistent():
            return ""
        return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
