"""What the guest would see change between two domain XMLs. libvirt refuses the first such difference; this lists all.

Compare two XMLs of one kind (both from VIR_DOMAIN_XML_MIGRATABLE, or both as a person wrote them): what libvirt fills
in (addresses, default controllers) is not filled in here, so its absence counts as a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from virtmig.domain.document import parse_xml
from virtmig.domain.guest_view import Device, devices, seen_outside_devices
from virtmig.errors import DomainXmlError

_SHOWN = 5


class Difference(msgspec.Struct, frozen=True):
    """One thing that the guest sees. `before` or `after` is None where it is absent."""

    where: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.where}: {self.after or 'it'} is new"
        if self.after is None:
            return f"{self.where}: {self.before or 'it'} is gone"
        return f"{self.where}: {self.before or 'present'} -> {self.after or 'present'}"


def compare(before: str, after: str) -> list[Difference]:
    """Every difference in what the guest sees, in the XML's order. Raises DomainXmlError for what cannot be read."""
    old, new = parse_xml(before, what="the XML before"), parse_xml(after, what="the XML after")
    found = _differences("", seen_outside_devices(old), seen_outside_devices(new))
    old_devices, new_devices = _by_kind(devices(old)), _by_kind(devices(new))
    for kind in dict.fromkeys([*old_devices, *new_devices]):
        found += _device_differences(old_devices[kind], new_devices[kind])
    return found


def refuse(differences: Sequence[Difference], *, what: str = "the destination XML") -> None:
    """Raise DomainXmlError with all of them in .differences; return when there are none."""
    if not differences:
        return
    words = [str(difference) for difference in differences]
    more = f" (and {len(words) - _SHOWN} more)" if len(words) > _SHOWN else ""
    raise DomainXmlError(
        f"{what} would change what the guest sees: {'; '.join(words[:_SHOWN])}{more}",
        differences=words,
        hint="change only what belongs to the host: paths, names of networks, addresses, CPUs and nodes of the host",
    )


def _by_kind(found: Sequence[Device]) -> defaultdict[str, list[Device]]:
    kinds: defaultdict[str, list[Device]] = defaultdict(list)
    for device in found:
        kinds[device.kind].append(device)
    return kinds


def _device_differences(old: Sequence[Device], new: Sequence[Device]) -> list[Difference]:
    """As many as before: the n-th is compared with the n-th, as libvirt does. Else by name, to tell which is gone.

    Disks and controllers go by name always: libvirt sorts them.
    """
    left = list(new)
    by_name = len(old) != len(new) or (bool(old) and old[0].kind in ("disk", "controller"))
    twins: list[Device | None] = []
    for device in old:
        twin = next((other for other in left if not by_name or other.identity == device.identity), None)
        if twin is not None:
            left.remove(twin)
        twins.append(twin)
    found: list[Difference] = []
    many = max(len(old), len(new))
    for number, (device, twin) in enumerate(zip(old, twins, strict=True), 1):
        if twin is None:
            found.append(Difference(_name(device, number, many), "", None))
        else:
            found += _pair_differences(number, device, twin, many)
    return found + [Difference(_name(device, number, many), None, "") for number, device in enumerate(left, 1)]


def _pair_differences(number: int, old: Device, new: Device, count: int) -> list[Difference]:
    return _differences(_name(old, number, count), old.seen, new.seen)


def _name(device: Device, number: int, count: int) -> str:
    """devices/disk[vda], devices/serial[2], devices/watchdog."""
    if device.kind in ("disk", "interface", "controller", "filesystem") and device.identity:
        return f"devices/{device.kind}[{' '.join(device.identity.split())}]"
    return f"devices/{device.kind}[{number}]" if count > 1 else f"devices/{device.kind}"


def _differences(where: str, old: dict[str, str], new: dict[str, str]) -> list[Difference]:
    prefix = f"{where}/" if where else ""
    return [
        Difference(f"{prefix}{name}" if name else where, old.get(name), new.get(name))
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
