"""Builders of facts for the pure tests: two new hosts and a plain guest, each field changeable by keyword.

Numbers are unlike any default of libvirt or QEMU, so that code with numbers of its own fails.
"""

from __future__ import annotations

from typing import Any

import msgspec

from virtmig.facts import DiskFacts, Finding, GuestArch, GuestFacts, GuestFit, HostFacts, version
from virtmig.plan import Plan, negotiate
from virtmig.request import MigrationRequest

UUID = "4b6f0c1e-0d2a-4c55-9b3e-7f10c2a4d9e1"
OTHER_UUID = "9d1be0a3-6f0f-4c6e-8a55-2b7e1c0d4f33"
MACHINE = "pc-q35-9.1"

SOURCE = HostFacts(
    uri="qemu+ssh://amber/system",
    hostname="amber",
    host_uuid="a1a1a1a1-0000-4000-8000-000000000001",
    local=False,
    session=False,
    driver="QEMU",
    client_version=version(12, 8),
    libvirt_version=version(12, 8),
    qemu_version=version(11, 1, 3),
    arch="x86_64",
    cpus=7,
    free_memory_bytes=97 << 30,
    guest_archs=(
        GuestArch(arch="x86_64", virt_types=("qemu", "kvm"), machines=(MACHINE, "q35"), canonical={"q35": MACHINE}),
    ),
    userfaultfd=Finding("yes", "QEMU runs as root (test)"),
    locked_memory_raisable=True,
    tls_files=Finding("yes", "seen by the test"),
    domains=(),
)
DESTINATION = msgspec.structs.replace(
    SOURCE,
    uri="qemu+ssh://beryl/system",
    hostname="beryl",
    host_uuid="b2b2b2b2-0000-4000-8000-000000000002",
    cpus=5,
    fit=GuestFit(emulator=Finding("yes", "asked"), cpu=Finding("yes", "asked")),
)
GUEST = GuestFacts(
    name="opal",
    uuid=UUID,
    state="running",
    persistent=False,
    memory_bytes=13 << 30,
    vcpus=3,
    virt_type="kvm",
    arch="x86_64",
    machine=MACHINE,
    emulator="/opt/qemu",
    snapshots=0,
    block_job=False,
    postcopy_failed=False,
    job="",
)
LOCAL_DISK = DiskFacts(target="vdc", source="/srv/opal.img", storage="local", evidence="lies on xfs")


def ask(*options: str, **values: Any) -> MigrationRequest:
    """`ask("live", parallel_connections=3)` -> a request from opal to beryl."""
    given = {name.replace("_", "-"): value for name, value in values.items()}
    return MigrationRequest({"domain": "opal", "desturi": DESTINATION.uri, **dict.fromkeys(options, True), **given})


def plan(
    request: MigrationRequest,
    *,
    source: dict[str, Any] | None = None,
    destination: dict[str, Any] | None = None,
    both: dict[str, Any] | None = None,
    guest: dict[str, Any] | None = None,
) -> Plan:
    """negotiate() between the two hosts above, with some of their facts changed."""
    return negotiate(
        request,
        msgspec.structs.replace(SOURCE, **{**(both or {}), **(source or {})}),
        msgspec.structs.replace(DESTINATION, **{**(both or {}), **(destination or {})}),
        msgspec.structs.replace(GUEST, **(guest or {})),
    )
