"""Parsing XML that came from another host or from a file: no entities, no network, no huge trees."""

from __future__ import annotations

from lxml import etree

from virtmig.errors import DomainXmlError

#: virsh reads at most this much of a file (VSH_MAX_XML_FILE)
MAX_XML_BYTES = 10 << 20


def parse_xml(text: str, *, what: str = "domain XML") -> etree._Element:
    """The root element of `text`. Raises DomainXmlError, also for a document type: no libvirt document has one."""
    raw = text.encode()
    if len(raw) > MAX_XML_BYTES:
        raise DomainXmlError(f"{what} is larger than {MAX_XML_BYTES} bytes")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(raw, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise DomainXmlError(f"{what} cannot be parsed: {error}") from None
    if root.getroottree().docinfo.doctype:
        raise DomainXmlError(f"{what} declares a document type, which is not accepted")
    return root


def text_of(element: etree._Element, path: str, default: str = "") -> str:
    """The text of the first element at `path`, without surrounding space."""
    found = element.find(path)
    return (found.text or "").strip() if found is not None and found.text else default


def attribute_of(element: etree._Element, path: str, name: str, default: str = "") -> str:
    """An attribute of the first element at `path`."""
    found = element.find(path)
    return found.get(name, default) if found is not None else default


#: libvirt's size units (docs/formatdomain.rst, memory): powers of 1024 with an i or alone, of 1000 with a B
_UNITS = {
    "b": 1, "bytes": 1,
    "kb": 10**3, "k": 2**10, "kib": 2**10,
    "mb": 10**6, "m": 2**20, "mib": 2**20,
    "gb": 10**9, "g": 2**30, "gib": 2**30,
    "tb": 10**12, "t": 2**40, "tib": 2**40,
    "pb": 10**15, "p": 2**50, "pib": 2**50,
    "eb": 10**18, "e": 2**60, "eib": 2**60,
}  # fmt: skip


def bytes_of(element: etree._Element, path: str) -> int | None:
    """The size at `path` in bytes, read with its unit (KiB when it has none, as libvirt does); None when absent."""
    found = element.find(path)
    if found is None or not (found.text or "").strip():
        return None
    unit = _UNITS.get(found.get("unit", "KiB").lower())
    try:
        return int((found.text or "").strip()) * unit if unit else None
    except ValueError:
        return None
