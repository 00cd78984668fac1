"""Small changes of a domain XML that make it fit another host. Each touches what belongs to the host, nothing else.

A transform is data read from a rule. `apply` changes a document and settles what it looked at: a later rule leaves that
alone, so of several rules for one value the first counts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import msgspec
from lxml import etree

from virtmig.domain.cpu_sets import format_set, numbering, parse_set
from virtmig.domain.document import DomainDocument, size_bytes
from virtmig.domain.places import Place
from virtmig.errors import DomainXmlError


class Settled(msgspec.Struct):
    """Which attributes and texts of one document a rule has decided on."""

    seen: set[tuple[etree._Element, str]] = msgspec.field(default_factory=set)

    def claim(self, element: etree._Element, attribute: str) -> bool:
        """False when an earlier rule was first."""
        key = (element, attribute)
        if key in self.seen:
            return False
        self.seen.add(key)
        return True


class Transform(msgspec.Struct, frozen=True):
    """The common face: apply(document, rule's name, what is settled)."""

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        raise NotImplementedError


class MapValue(Transform, frozen=True):
    """Values equal to `before`, or paths below it (`prefix`), become `after`; any value when `before` is None.

    `only` holds attributes that the element must have. With `add` the attribute is given to
    elements without it too. A prefix ends at a slash. A path that is below `after` already, where that lies below
    `before`, has been moved and stays: else a second rewriting would move it again.
    """

    places: tuple[Place, ...]
    before: str | None
    after: str
    prefix: bool = False
    only: tuple[tuple[str, str], ...] = ()
    add: bool = False

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        for place, element in _elements(document, self.places):
            value = _read(document, element, place.attribute)
            if value is None and not self.add:
                continue
            if not all(element.get(name) == wanted for name, wanted in self.only):
                continue
            mapped = self.map(value or "")
            if mapped is not None and settled.claim(element, place.attribute):
                _write(document, element, place.attribute, mapped, rule)

    def map(self, value: str) -> str | None:
        """The new value, or None when this rule is not for it."""
        if self.before is None or value == self.before:
            return self.after
        if not self.prefix:
            return None
        before, after = self.before.rstrip("/"), self.after.rstrip("/")
        if not _below(value, before):
            return None
        if _below(after, before) and _below(value, after):
            return value
        return (after + value[len(before) :]) or "/"


class MapNumbers(Transform, frozen=True):
    """CPU or NUMA node numbers in sets: the n-th of `before` becomes the n-th of `after`, others stay."""

    places: tuple[Place, ...]
    before: str
    after: str

    def __post_init__(self) -> None:
        numbering(self.before, self.after)

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        numbers = numbering(self.before, self.after)
        for place, element in _elements(document, self.places):
            value = _read(document, element, place.attribute)
            if not value:
                continue
            old = _set_in(document, element, place.attribute, value, rule)
            if not old & set(numbers) or not settled.claim(element, place.attribute):
                continue
            new = {numbers.get(number, number) for number in old}
            if new != old:
                _write(document, element, place.attribute, format_set(new), rule)


class Pin(Transform, frozen=True):
    """<vcpupin>, <iothreadpin> or <emulatorpin>: the CPUs of the host for some of the guest's threads.

    `threads` are numbers (0-3); those that the guest does not have are left out. None for the emulator.
    """

    tag: str
    attribute: str
    threads: str | None
    cpuset: str

    def __post_init__(self) -> None:
        parse_set(self.cpuset)
        if self.threads is not None:
            parse_set(self.threads)

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        for wanted in self._present(document):
            found = next(
                (
                    pin
                    for pin in document.root.iterfind(f"cputune/{self.tag}")
                    if wanted is None or pin.get(self.attribute, "").strip() == wanted
                ),
                None,
            )
            if found is None:
                found = _new(self.tag, {self.attribute: wanted, "cpuset": self.cpuset})
                document.insert(_child(document, "cputune", _BEFORE_CPUTUNE, rule), found, rule=rule)
                settled.claim(found, "cpuset")
            elif settled.claim(found, "cpuset"):
                _write_set(document, found, "cpuset", self.cpuset, rule)

    def _present(self, document: DomainDocument) -> list[str | None]:
        if self.threads is None:
            return [None]
        known = _vcpus(document) if self.tag == "vcpupin" else _iothreads(document)
        return [str(number) for number in sorted(parse_set(self.threads) & known)]


class Unpin(Transform, frozen=True):
    """The guest's threads may run on every CPU: no pins, and no cpuset at <vcpu>."""

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        for tag in ("vcpupin", "emulatorpin", "iothreadpin"):
            for element in document.root.findall(f"cputune/{tag}"):
                document.remove(element, rule=rule)
        for element in document.root.findall("vcpu"):
            document.remove_attribute(element, "cpuset", rule=rule)
        _remove_if_empty(document, "cputune", rule)


class Bind(Transform, frozen=True):
    """<numatune>: the host's nodes for the guest's memory, for all of it or for one guest node (`cellid`)."""

    nodeset: str
    mode: str | None
    cellid: str | None

    def __post_init__(self) -> None:
        parse_set(self.nodeset)

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        if self.cellid is not None and document.root.find(f"cpu/numa/cell[@id='{self.cellid}']") is None:
            return
        tag = "memory" if self.cellid is None else "memnode"
        found = next(
            (
                element
                for element in document.root.iterfind(f"numatune/{tag}")
                if self.cellid is None or element.get("cellid", "").strip() == self.cellid
            ),
            None,
        )
        if found is None:
            found = _new(tag, {"cellid": self.cellid, "mode": self.mode or "strict", "nodeset": self.nodeset})
            document.insert(_child(document, "numatune", _BEFORE_NUMATUNE, rule), found, rule=rule)
            settled.claim(found, "nodeset")
        elif settled.claim(found, "nodeset"):
            if self.mode is not None:
                document.set_attribute(found, "mode", self.mode, rule=rule)
            document.remove_attribute(found, "placement", rule=rule)
            _write_set(document, found, "nodeset", self.nodeset, rule)


class Unbind(Transform, frozen=True):
    """The guest's memory may lie on every node: no <numatune>, no nodemask of memory devices."""

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        for path in ("numatune", "devices/memory/source/nodemask"):
            for element in document.root.findall(path):
                document.remove(element, rule=rule)
        for element in document.root.findall("devices/memory/source"):
            if not len(element):
                document.remove(element, rule=rule)


class PageSize(Transform, frozen=True):
    """Huge pages of another size behind the guest's memory; sizes in bytes. The guest's own layout does not change."""

    before: int | None
    after: int

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        for page in document.root.iterfind("memoryBacking/hugepages/page"):
            size = size_bytes(page.get("size", ""), page.get("unit", "KiB"))
            if self._wanted(size) and settled.claim(page, "size") and size != self.after:
                number, unit = self._in_unit(page.get("unit", "KiB"))
                document.set_attribute(page, "size", number, rule=rule)
                if page.get("unit") or unit != "KiB":
                    document.set_attribute(page, "unit", unit, rule=rule)
        for element in document.root.iterfind("devices/memory/source/pagesize"):
            size = size_bytes(document.value(element), element.get("unit", "KiB"))
            if self._wanted(size) and settled.claim(element, "") and size != self.after:
                number, unit = self._in_unit(element.get("unit", "KiB"))
                document.set_text(element, number, rule=rule)
                if element.get("unit") or unit != "KiB":
                    document.set_attribute(element, "unit", unit, rule=rule)

    def _wanted(self, size: int | None) -> bool:
        return size is not None and self.before in (None, size)

    def _in_unit(self, unit: str) -> tuple[str, str]:
        """The new size in the unit that stands there, in KiB where that does not go."""
        one = size_bytes("1", unit)
        return (str(self.after // one), unit) if one and self.after % one == 0 else (str(self.after >> 10), "KiB")


_PCI = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-7])", re.ASCII | re.IGNORECASE)
_PCI_PARTS = ("domain", "bus", "slot", "function")


class HostDevice(Transform, frozen=True):
    """Another device of the host behind a <hostdev>, by PCI address (0000:3b:00.4) or by the UUID of an mdev."""

    before: str
    after: str

    def __post_init__(self) -> None:
        if bool(_PCI.fullmatch(self.before)) != bool(_PCI.fullmatch(self.after)):
            raise ValueError(f"'{self.before}' and '{self.after}' are not both PCI addresses or both UUIDs")

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        before, after = _pci(self.before), _pci(self.after)
        for device in ("hostdev", "interface[@type='hostdev']"):
            for address in document.root.iterfind(f"devices/{device}/source/address"):
                if before is None or after is None:
                    if address.get("uuid", "").lower() == self.before.lower() and settled.claim(address, ""):
                        document.set_attribute(address, "uuid", self.after, rule=rule)
                elif _pci_of(address) == before and settled.claim(address, ""):
                    for part, number, digits in zip(_PCI_PARTS, after, (4, 2, 2, 1), strict=True):
                        if _number(address.get(part, "0")) != number:
                            document.set_attribute(address, part, f"0x{number:0{digits}x}", rule=rule)


class Metadata(Transform, frozen=True):
    """The element of one application in <metadata>, by its namespace: replaced, added, or removed (`content` empty)."""

    uri: str
    content: str

    def apply(self, document: DomainDocument, rule: str, settled: Settled) -> None:
        found = next(
            (
                element
                for element in document.root.iterfind("metadata/*")
                if isinstance(element.tag, str) and etree.QName(element).namespace == self.uri
            ),
            None,
        )
        if not self.content:
            if found is not None:
                document.remove(found, rule=rule)
                _remove_if_empty(document, "metadata", rule)
            return
        element = etree.fromstring(self.content)
        if found is None:
            document.insert(_child(document, "metadata", _BEFORE_METADATA, rule), element, rule=rule)
        elif _canonical(found) != _canonical(element):
            document.replace(found, element, rule=rule)


# where libvirt prints these (virDomainDefFormatInternalSetRootName): behind the last of the elements that are there
_BEFORE_METADATA = ("name", "uuid", "genid", "title", "description", "hwuuid")
_BEFORE_CPUTUNE = ("vcpu", "vcpus", "iothreads", "iothreadids", "defaultiothread")
_BEFORE_NUMATUNE = (*_BEFORE_CPUTUNE, "cputune")


def _elements(document: DomainDocument, places: tuple[Place, ...]) -> Iterator[tuple[Place, etree._Element]]:
    for place in places:
        for element in document.root.findall(place.path):
            yield place, element


def _read(document: DomainDocument, element: etree._Element, attribute: str) -> str | None:
    return element.get(attribute) if attribute else document.value(element) or None


def _write(document: DomainDocument, element: etree._Element, attribute: str, value: str, rule: str) -> None:
    if attribute:
        document.set_attribute(element, attribute, value, rule=rule)
    else:
        document.set_text(element, value, rule=rule)


def _write_set(document: DomainDocument, element: etree._Element, attribute: str, value: str, rule: str) -> None:
    """A set that says the same in other words is left as it is."""
    old = element.get(attribute)
    if old is None or _set_in(document, element, attribute, old, rule) != parse_set(value):
        document.set_attribute(element, attribute, value, rule=rule)


def _set_in(document: DomainDocument, element: etree._Element, attribute: str, value: str, rule: str) -> frozenset[int]:
    try:
        return parse_set(value)
    except ValueError as error:
        raise DomainXmlError(f"{document.path(element, attribute)}: {error} (read for {rule})") from None


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _child(document: DomainDocument, tag: str, after: tuple[str, ...], rule: str) -> etree._Element:
    found = document.root.find(tag)
    return found if found is not None else document.insert(document.root, etree.Element(tag), rule=rule, after=after)


def _remove_if_empty(document: DomainDocument, path: str, rule: str) -> None:
    element = document.root.find(path)
    if element is not None and not len(element) and not document.value(element):
        document.remove(element, rule=rule)


def _vcpus(document: DomainDocument) -> frozenset[int]:
    found = document.root.find("vcpu")
    text = document.value(found) if found is not None else ""
    return frozenset(range(int(text))) if text.isascii() and text.isdigit() and len(text) < 6 else frozenset({0})


def _iothreads(document: DomainDocument) -> frozenset[int]:
    """libvirt numbers them from 1; those with an <iothread id=''> have that one (virDomainIOThreadIDDefArrayInit)."""
    known = {_number(element.get("id", "0")) for element in document.root.iterfind("iothreadids/iothread")}
    found = document.root.find("iothreads")
    text = document.value(found) if found is not None else ""
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    free = (number for number in range(1, count + len(known) + 1) if number not in known)
    while len(known) < count:
        known.add(next(free))
    return frozenset(known)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return -1


def _pci(text: str) -> tuple[int, int, int, int] | None:
    match = _PCI.fullmatch(text)
    if not match:
        return None
    return int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16), int(match[4], 16)


def _pci_of(address: etree._Element) -> tuple[int, int, int, int] | None:
    if address.get("uuid") or address.get("slot") is None:
        return None
    domain, bus, slot, function = (_number(address.get(part, "0")) for part in _PCI_PARTS)
    return domain, bus, slot, function


def _canonical(element: etree._Element) -> bytes:
    alone = copy.deepcopy(element)
    alone.tail = None
    return etree.tostring(alone, method="c14n", exclusive=True)


def _new(tag: str, attributes: dict[str, str | None]) -> etree._Element:
    """An element with those attributes that have a value, in this order."""
    element = etree.Element(tag)
    for name, value in attributes.items():
        if value is not None:
            element.set(name, value)
    return element
