"""A plan being made: the request, both hosts and the guest, and what has been found so far. Used by plan.py alone."""

from __future__ import annotations

from virtmig.agreement import TRANSPORTS, Adjustment, Suggestion
from virtmig.facts import GuestFacts, HostFacts, version_text
from virtmig.features import Feature, features_asked
from virtmig.known_bad import Versions
from virtmig.obstacles import Caution, Refusal
from virtmig.request import MigrationRequest, tokens


class Draft:
    """A plan being made: what was asked, what is on so far, and what has been said against it."""

    def __init__(self, request: MigrationRequest, source: HostFacts, destination: HostFacts, guest: GuestFacts) -> None:
        self.request, self.source, self.destination, self.guest = request, source, destination, guest
        self.resume = "postcopy-resume" in request
        self.on = set(features_asked(request))
        if "tunnelled" not in request and "offline" not in request:
            self.on.add("return-path")
        scheme = "tunnel" if "tunnelled" in request else request.text("migrateuri").partition(":")[0] or "tcp"
        self.relay, self.transport_reason = relayed(request, source, destination)
        self.transport = TRANSPORTS["relay" if self.relay else scheme]
        self.source_qemu = guest.qemu_version or source.qemu_version
        self.reasons: dict[str, tuple[bool | None, str]] = {}
        self.refusals: list[Refusal] = []
        self.warnings: list[Caution] = []
        self.notes: list[Caution] = []
        self.suggestions: list[Suggestion] = []
        self.adjustments: list[Adjustment] = []

    def add(self, item: Refusal | Caution) -> None:
        if isinstance(item, Refusal):
            if item not in self.refusals:
                self.refusals.append(item)
        elif item not in self.warnings:
            self.warnings.append(item)

    def refuse(self, feature: str, reason: str, way_out: str) -> None:
        self.add(Refusal(feature, reason, way_out))

    def warn(self, feature: str, text: str, way_out: str = "") -> None:
        self.add(Caution(feature, text, way_out))

    @property
    def ends(self) -> tuple[tuple[str, HostFacts, int | None], ...]:
        """(letter, host, QEMU version) of both ends."""
        return (
            ("S", self.source, self.source_qemu),
            ("D", self.destination, self.destination.qemu_version),
        )

    @property
    def present(self) -> frozenset[str]:
        """Everything that exclusions and known-bad rows speak about."""
        guest, found = self.guest, set(tokens(self.request)) | self.on
        disks = [disk for disk in guest.disks if disk.writable]
        still = guest.state == "paused" and any(not disk.empty for disk in guest.disks)
        for name, holds in (
            ("guest:vfio", guest.vfio),
            ("guest:tpm", guest.tpm),
            ("guest:kvm", guest.virt_type == "kvm"),
            ("guest:disks", bool(disks)),
            ("guest:arrived-paused", still and guest.arrived_paused.status == "yes"),
            ("guest:maybe-arrived-paused", still and guest.arrived_paused.status == "unknown"),
            ("guest:file-disks", any(disk.kind == "file" for disk in disks)),
        ):
            if holds:
                found.add(name)
        return frozenset(found)

    @property
    def versions(self) -> Versions:
        return Versions(
            source_qemu=self.source_qemu,
            destination_qemu=self.destination.qemu_version,
            source_libvirt=self.source.libvirt_version,
            destination_libvirt=self.destination.libvirt_version,
        )

    def evidence(self, row: Feature) -> str:
        """The versions that decide about `row`, where they do."""
        parts = []
        for software, since in (("QEMU", row.qemu_since), ("libvirt", row.libvirt_since)):
            if not since and not (software == "QEMU" and row.qemu_until):
                continue
            have = [
                version_text(qemu if software == "QEMU" else host.libvirt_version)
                for letter, host, qemu in self.ends
                if letter in row.deciding_ends
            ]
            limits = [f">= {version_text(since)}"] if since else []
            limits += [f"< {version_text(row.qemu_until)}"] if software == "QEMU" and row.qemu_until else []
            parts.append(f"{software} {' and '.join(limits)}: {' and '.join(have)}")
        return "; ".join(parts)

    def lacking(self, row: Feature) -> tuple[str, str]:
        """(what one end lacks for `row`, what is not known); each empty when there is nothing."""
        unknown = ""
        for letter, host, qemu in self.ends:
            if letter not in row.deciding_ends:
                continue
            asked = (self.guest if letter == "S" else host).migration_capabilities
            if row.qemu and asked is not None:
                if row.qemu not in asked:
                    return f"QEMU on {host.label} does not have {row.qemu}", ""
            elif row.qemu_since or row.qemu_until:
                if qemu is None:
                    unknown = f"the QEMU of {host.label} is not known"
                elif qemu < row.qemu_since:
                    return f"it needs QEMU {version_text(row.qemu_since)}, {host.label} has {version_text(qemu)}", ""
                elif row.qemu_until and qemu >= row.qemu_until:
                    return f"QEMU {version_text(row.qemu_until)} removed it, {host.label} has {version_text(qemu)}", ""
            if row.libvirt_since:
                have = host.libvirt_version
                if have is None:
                    unknown = f"the libvirt of {host.label} is not known"
                elif have < row.libvirt_since:
                    needed = version_text(row.libvirt_since)
                    return f"it needs libvirt {needed}, {host.label} has {version_text(have)}", ""
        return "", unknown


#: what goes from QEMU to QEMU by somebody else's word, or not at all
_NOT_RELAYED = ("tunnelled", "migrateuri", "listen-address", "disks-uri", "disks-port", "tls", "rdma-pin-all",
                "offline")  # fmt: skip


def relayed(request: MigrationRequest, source: HostFacts, destination: HostFacts) -> tuple[bool, str]:
    """Whether the agents carry the bytes, and why."""
    asked = request.text("transport")
    if asked in ("relay", "direct"):
        return asked == "relay", f"asked for with --transport {asked}"
    for host in (source, destination):
        if host.agent.status != "yes":
            why = f"no agent is known on {host.label}" + (f" ({host.agent.evidence})" if host.agent.evidence else "")
            return False, f"auto: QEMU to QEMU, as {why}"
    for name in _NOT_RELAYED:
        if name in request:
            return False, f"auto: QEMU to QEMU, as --{name} was given"
    return True, "auto: both hosts run an agent"
