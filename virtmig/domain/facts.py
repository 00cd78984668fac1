"""What a domain XML says about a guest that matters to a migration. Only reads."""

from __future__ import annotations

from typing import Any

from lxml import etree

from virtmig.domain.document import attribute_of, bytes_of, parse_xml, text_of
from virtmig.facts import DiskFacts, GuestFacts, HostdevFacts


def guest_facts_from_xml(xml: str, *, cpu_xml: str | None = None, **known: Any) -> GuestFacts:
    """GuestFacts of one domain XML (virDomainGetXMLDesc).

    `cpu_xml` is the <cpu> of the migratable XML where that differs; `known` are fields that no XML tells (state,
    snapshots, job, ...). Raises DomainXmlError.
    """
    root = parse_xml(xml)
    return GuestFacts(
        name=text_of(root, "name"),
        uuid=text_of(root, "uuid"),
        memory_bytes=bytes_of(root, "memory"),
        vcpus=_number(text_of(root, "vcpu")),
        virt_type=root.get("type", ""),
        arch=attribute_of(root, "os/type", "arch"),
        machine=attribute_of(root, "os/type", "machine"),
        emulator=text_of(root, "devices/emulator"),
        cpu_xml=cpu_element(root) if cpu_xml is None else cpu_xml,
        disks=tuple(_disk(element) for element in root.iterfind("devices/disk")),
        hostdevs=tuple(_hostdevs(root)),
        virtiofs=sum(1 for _ in root.iterfind("devices/filesystem/driver[@type='virtiofs']")),
        tpm=root.find("devices/tpm") is not None,
        hugepages=root.find("memoryBacking/hugepages") is not None,
        memory_source=attribute_of(root, "memoryBacking/source", "type"),
        memory_shared=attribute_of(root, "memoryBacking/access", "mode") == "shared",
        hard_limit_bytes=bytes_of(root, "memtune/hard_limit"),
        shmem_peers=tuple(
            element.get("name", "") for element in root.iterfind("devices/shmem") if element.get("role") == "peer"
        ),
        invtsc_without_frequency=_invtsc_without_frequency(root),
        **known,
    )


def cpu_element(root: etree._Element) -> str:
    """The <cpu> element as text, empty when the domain has none."""
    cpu = root.find("cpu")
    return etree.tostring(cpu, encoding="unicode", with_tail=False) if cpu is not None else ""


def _disk(element: etree._Element) -> DiskFacts:
    source = element.find("source")
    kind = element.get("type", "file")
    where = _source_text(source, kind)
    readonly = element.find("readonly") is not None or element.get("device") == "cdrom"
    return DiskFacts(
        target=attribute_of(element, "target", "dev"),
        kind=kind,
        device=element.get("device", "disk"),
        source=where,
        readonly=readonly,
        shareable=element.find("shareable") is not None,
        cache=attribute_of(element, "driver", "cache"),
        transient=element.find("transient") is not None,
        empty=not where,
        storage="shared" if kind == "network" else "local" if kind == "nvme" else "unknown",
        evidence="a network disk is the same on every host" if kind == "network" else "",
    )


def _source_text(source: etree._Element | None, kind: str) -> str:
    if source is None:
        return ""
    if kind == "network":
        name = source.get("name", "")
        return f"{source.get('protocol', 'network')}:{name}"
    for attribute in ("file", "dev", "dir", "volume", "name", "path"):
        if source.get(attribute):
            pool = f"{source.get('pool')}/" if attribute == "volume" else ""
            return f"{pool}{source.get(attribute)}"
    return kind if kind in ("nvme", "vhostuser", "vhostvdpa") else ""


def _hostdevs(root: etree._Element) -> list[HostdevFacts]:
    found = []
    for element in root.iterfind("devices/hostdev"):
        kind = element.get("type", element.get("mode", ""))
        driver = attribute_of(element, "driver", "name") or attribute_of(element, "driver", "model")
        found.append(
            HostdevFacts(
                kind=kind, where=_address(element), vfio=kind == "mdev" or (kind == "pci" and driver in ("", "vfio"))
            )
        )
    for element in root.iterfind("devices/interface[@type='hostdev']"):
        found.append(HostdevFacts(kind="pci", where=_address(element), vfio=True))
    return found


def _address(element: etree._Element) -> str:
    address = element.find("source/address")
    if address is None:
        return attribute_of(element, "source", "dev")
    if address.get("uuid"):
        return address.get("uuid", "")
    if address.get("slot"):
        parts = [address.get(name, "0x0").removeprefix("0x") for name in ("domain", "bus", "slot", "function")]
        return f"{parts[0]:>04}:{parts[1]:>02}:{parts[2]:>02}.{parts[3]}"
    return " ".join(f"{name} {value}" for name, value in sorted(address.attrib.items()))


def _invtsc_without_frequency(root: etree._Element) -> bool:
    feature = root.find("cpu/feature[@name='invtsc']")
    if feature is None or feature.get("policy", "require") not in ("require", "force"):
        return False
    timer = root.find("clock/timer[@name='tsc']")
    return timer is None or not timer.get("frequency")


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
