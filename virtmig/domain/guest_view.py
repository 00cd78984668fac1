"""What of a domain XML the guest sees, as a flat table: where -> value.

The other way round from libvirt's check (virDomainDefCheckABIStabilityFlags, conf/domain_conf.c, and
qemuDomainABIStabilityCheckDomain), which lists what it compares: here HOST_SIDE lists what belongs to the host, and
everything else counts as seen, so an element that nobody has heard of may not change either. That finds all that
libvirt compares, and more: boot order, firmware, multiqueue, offloads, ROMs, USB ports, QEMU arguments.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from lxml import etree

from virtmig.domain.cpu_sets import format_set, parse_set
from virtmig.domain.document import size_bytes

#: (element's path below <domain>, devices without the "devices/") -> names of attributes (@) and child elements of the
#: host's side; "" is the text, "*" everything
HOST_SIDE: dict[str, str] = {
    "": "@id title description metadata memtune blkiotune numatune cputune iothreads iothreadids defaultiothread "
    "resource on_poweroff on_reboot on_crash on_lockfailure perf seclabel idmap bootloader bootloader_args "
    # both are state, not definition: the balloon moves it, and libvirt skips it too (ABI_CHECK_SKIP_VOLATILE)
    "currentMemory",
    # QEMU's RAM blocks are named by the kind of memory, so source/@type stays (qemuDomainABIStabilityCheckDomain)
    "memoryBacking": "hugepages nosharepages locked access allocation discard",
    "vcpu": "@cpuset @placement",
    "cpu/numa/cell": "@memAccess @discard",
    "os": "kernel initrd dtb",
    "os/loader": "",
    "os/nvram": "*",
    "os/acpi/table": "",
    "features": "tcg async-teardown",
    # with offset='variable' libvirt follows the guest's clock; the clock itself travels in the migration stream
    "clock": "@adjustment",
    "devices": "emulator graphics audio lease",
    "disk": "@type @snapshot @rawio @sgio source backingStore mirror auth encryption iotune shareable transient state",
    "disk/driver": "@name @type @cache @io @error_policy @rerror_policy @discard @discard_no_unref @detect_zeroes "
    "@iothread @copy_on_read @ioeventfd @metadata_cache iothreads metadata_cache",
    "disk/target": "@tray",
    "interface": "@type @managed @trustGuestRxFilters source target virtualport vlan bandwidth port filterref script "
    "downscript backend portForward tune coalesce route",
    "interface/mac": "@type @check",
    "interface/driver": "@name @txmode @ioeventfd",
    "controller/driver": "@iothread @ioeventfd iothreads",
    "filesystem": "@accessmode @fmode @dmode @multidevs source binary idmap space_hard_limit space_soft_limit",
    "filesystem/driver": "@name @format @wrpolicy",
    "hostdev": "@managed @sgio @rawio driver shareable",
    "input": "source",
    "serial": "@type source protocol log",
    "parallel": "@type source protocol log",
    "console": "@type @tty source protocol log",
    "channel": "@type source protocol log",
    "channel/target": "@state",
    "redirdev": "source protocol log",
    "smartcard": "@type source certificate database protocol log",
    "sound": "audio",
    "video/model/acceleration": "@rendernode",
    "watchdog": "@action",
    "memballoon": "stats",
    "rng": "backend rate",
    "tpm/backend": "@persistent_state @debug encryption device source",
    "shmem/server": "@path",
    "memory": "@dumpCore @access @discard",
    "memory/source": "path pagesize nodemask",
    "memory/target": "current",
    "crypto": "backend",
    "pstore": "path",
}
_HOST_SIDE = {path: frozenset(names.split()) | ({""} if not names else set()) for path, names in HOST_SIDE.items()}

#: wherever they stand. The alias of a memory device names a RAM block and is kept (qemuDomainABIStabilityCheckDomain)
_EVERYWHERE = frozenset({"alias"})

#: children that come more than once are told apart by one of these; others by their number
_KEYS = {
    "feature": "name", "timer": "name", "cell": "id", "sibling": "id", "vcpu": "id", "entry": "name", "cache": "level",
    "property": "name",
}  # fmt: skip

_IDENTITIES = {
    "disk": ("target", "dev"),
    "interface": ("mac", "address"),
    "filesystem": ("target", "dir"),
    "channel": ("target", "name"),
}

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
#: the unit of a size that says none (virDomainParseMemory and virParseScaledValue, per element)
_UNITS = {
    "memory": "KiB",
    "maxMemory": "KiB",
    "cpu/numa/cell": "KiB",
    "features/smm/tseg": "MiB",
    "memory/target/size": "KiB",
    "memory/target/requested": "KiB",
    "memory/target/block": "KiB",
    "memory/target/label/size": "KiB",
    "memory/source/alignsize": "KiB",
    "shmem/size": "B",
    "pstore/size": "KiB",
}
_SIZE_ATTRIBUTES = ("memory", "value", "size")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+", re.ASCII | re.IGNORECASE)


class Device(NamedTuple):
    """One device: what it is, what tells it from others of its kind, and all that the guest sees of it."""

    kind: str
    identity: str
    seen: dict[str, str]


def seen_outside_devices(root: etree._Element) -> dict[str, str]:
    """Everything but <devices>: machine, firmware, CPUs, memory, features, clock, SMBIOS, QEMU's arguments."""
    return dict(_flat(root, "", ""))


def devices(root: etree._Element) -> list[Device]:
    """The devices, in the XML's order; disks and controllers sorted as libvirt sorts them."""
    found = [_device(element) for element in root.iterfind("devices/*") if _is_seen(element)]
    sort = {"disk", "controller"}
    return [device for device in found if device.kind not in sort] + sorted(
        (device for device in found if device.kind in sort), key=lambda device: (device.kind, device.identity)
    )


def _is_seen(element: etree._Element) -> bool:
    return isinstance(element.tag, str) and element.tag not in _HOST_SIDE["devices"]


def _device(element: etree._Element) -> Device:
    kind = str(element.tag)
    seen = dict(_flat(element, kind, ""))
    if kind == "interface":
        # a network card of the host looks to the guest like what it is; all others look like their model
        seen["@type"] = "hostdev" if element.get("type") == "hostdev" else "emulated"
    if kind == "hostdev":
        _host_device(element, seen)
    if kind == "memory" and (alias := element.find("alias")) is not None:
        seen["alias/@name"] = alias.get("name", "")
    if kind == "vsock" and seen.get("cid/@auto") == "yes":
        seen.pop("cid/@address", None)
    return Device(kind, _identity(element), seen)


def _host_device(element: etree._Element, seen: dict[str, str]) -> None:
    """Which device of the host it is may change, what kind it is may not; libvirt lets pci and mdev change places."""
    for where in [where for where in seen if where.startswith("source")]:
        del seen[where]
    if seen.get("@type") in ("pci", "mdev"):
        seen["@type"] = "pci"


def _identity(element: etree._Element) -> str:
    """The name by which people know a device: target, MAC address, type and index, address."""
    path, name = _IDENTITIES.get(str(element.tag), ("", ""))
    found = element.find(path) if path else None
    if found is not None and found.get(name):
        return found.get(name, "").lower()
    if element.tag == "controller":
        return f"{element.get('type', '')} {element.get('index', '0'):>3}"
    address = element.find("address")
    return "" if address is None else " ".join(f"{name}={value}" for name, value in sorted(_address(address).items()))


def _flat(element: etree._Element, table: str, where: str) -> Iterator[tuple[str, str]]:
    """(where, value) of everything in `element` that is not in the rows of `table` and below."""
    hidden = _HOST_SIDE.get(table, frozenset())
    if "*" in hidden:
        return
    prefix = f"{where}/" if where else ""
    yield from _own(element, hidden, table, where, prefix)
    numbers: Counter[str] = Counter()
    for child in element:
        if not _is_shown(child, hidden, table):
            continue
        tag = str(child.tag)
        key = child.get(_KEYS[tag], "") if tag in _KEYS else ""
        numbers[f"{tag} {key}"] += 1
        number = numbers[f"{tag} {key}"]
        words = " ".join(word for word in (key, str(number) if number > 1 else "") if word)
        name = f"{tag}[{words}]" if words else tag
        yield from _flat(child, f"{table}/{tag}" if table else tag, f"{prefix}{name}")


def _is_shown(child: etree._Element, hidden: frozenset[str], table: str) -> bool:
    if not isinstance(child.tag, str) or child.tag in hidden or child.tag in _EVERYWHERE:
        return False
    if child.tag.startswith(f"{_QEMU}deprecation"):
        return False
    return not (table == "" and child.tag == "devices")


def _own(
    element: etree._Element, hidden: frozenset[str], table: str, where: str, prefix: str
) -> Iterator[tuple[str, str]]:
    """What an element says itself. One that says nothing is there all the same: <acpi/>."""
    if element.tag == "address":
        yield where, " ".join(f"{name}={value}" for name, value in sorted(_address(element).items()))
        return
    unit = element.get("unit") or _UNITS.get(table, "")
    scaled = False
    for name, value in ((str(name), str(value)) for name, value in element.attrib.items()):
        if f"@{name}" in hidden or name == "unit" or (element.tag == "rom" and name == "file"):
            continue
        size = size_bytes(value, unit) if unit and name in _SIZE_ATTRIBUTES else None
        scaled = scaled or size is not None
        yield f"{prefix}@{name}", _value(element, name, value) if size is None else f"{size} bytes"
    has_children = any(isinstance(child.tag, str) for child in element)
    text = "" if "" in hidden else _text(element)
    size = size_bytes(text, unit) if unit else None
    if element.get("unit") and size is None and not scaled:
        yield f"{prefix}@unit", unit
    if text and table:
        yield where, f"{size} bytes" if size is not None else text.lower() if table in ("uuid", "genid") else text
    elif table and not element.attrib and not has_children and "" not in hidden:
        yield where, ""


def _text(element: etree._Element) -> str:
    """All character data directly in the element, on both sides of comments."""
    return "".join([element.text or "", *(child.tail or "" for child in element)]).strip()


def _value(element: etree._Element, name: str, value: str) -> str:
    """One writing for what has several. Not for texts: a serial number of 007 is not 7."""
    if element.tag == "mac" and name == "address":
        return value.lower()
    if element.tag == "cell" and name == "cpus":
        try:
            return format_set(parse_set(value))
        except ValueError:
            return value
    return value


def _address(element: etree._Element) -> dict[str, str]:
    """Numbers as numbers, and with what libvirt adds: the first PCI domain, bus and function, drives' first bus."""
    given = {str(name): _number(str(value)) for name, value in element.attrib.items()}
    if given.get("type") == "pci" and "slot" in given:
        return {"domain": "0", "bus": "0", "function": "0", **given}
    if given.get("type") == "drive":
        return {"controller": "0", "bus": "0", "target": "0", "unit": "0", **given}
    return given


def _number(value: str) -> str:
    return str(int(value, 16 if value[:2] in ("0x", "0X") else 10)) if _NUMBER.fullmatch(value) else value
