"""Rules that make a guest's XML fit another host, read from files as xml/virtmig-rules.rng describes them.

    <rules>
      <when source='rack1-*' destination='rack2-*' domain='web*'>
        <bridge from='br0' to='br-prod'/>
        <path kind='disk' from='/srv/images' to='/mnt/images'/>
      </when>
    </rules>

Rules are tried in the order in which they stand; of several for one value the first counts, so an exception goes
before the rule that it is an exception of. A rule outside <when> is for every migration. Texts come in, rules come out:
whoever calls has read the files.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import msgspec
from lxml import etree

from virtmig.domain.document import parse_xml, size_bytes
from virtmig.domain.places import PLACES, Place
from virtmig.domain.transforms import (
    Bind,
    HostDevice,
    MapNumbers,
    MapValue,
    Metadata,
    PageSize,
    Pin,
    Transform,
    Unbind,
    Unpin,
)
from virtmig.errors import DomainXmlError


class Rule(msgspec.Struct, frozen=True):
    """One rule, and for which hosts and guests it is. `name` is its own or its element's."""

    name: str
    file: str
    line: int
    transform: Transform
    source: str = "*"
    destination: str = "*"
    domain: str = "*"

    def __str__(self) -> str:
        return f"{self.name} ({self.file}:{self.line})"

    def is_for(self, source: str, destination: str, domain: str, uuid: str) -> bool:
        """An empty host is one that nobody knows (libvirt tells no hook who the source is): only `*` is for it."""
        return (
            _host_matches(source, self.source)
            and _host_matches(destination, self.destination)
            and (fnmatchcase(domain, self.domain) or uuid.lower() == self.domain.lower())
        )


class Rules(msgspec.Struct, frozen=True):
    """All rules, in order."""

    rules: tuple[Rule, ...] = ()

    def __add__(self, other: Rules) -> Rules:
        return Rules(self.rules + other.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def select(self, *, source: str, destination: str, domain: str, uuid: str = "") -> tuple[Rule, ...]:
        """Those for this migration, in order."""
        return tuple(rule for rule in self.rules if rule.is_for(source, destination, domain, uuid))


def rules_from_texts(texts: Mapping[str, str], grammar: str) -> Rules:
    """The rules of several files (name -> text), one behind the other in the mapping's order."""
    return functools.reduce(
        Rules.__add__, (rules_from_xml(text, grammar, file) for file, text in texts.items()), Rules()
    )


def rules_from_xml(text: str, grammar: str, file: str = "rules") -> Rules:
    """The rules in one text. `grammar` is xml/virtmig-rules.rng; `file` is said in errors and in Change.rule.

    Raises DomainXmlError that names file, line and rule.
    """
    root = parse_xml(text, what=file)
    schema = _schema(grammar)
    if not schema.validate(root):
        raise _misfit(root, schema, file)
    return Rules(tuple(_rule(element, file) for element in root.iter("*") if _is_rule(element)))


@functools.lru_cache(maxsize=4)
def _schema(grammar: str) -> etree.RelaxNG:
    try:
        return etree.RelaxNG(parse_xml(grammar, what="the grammar of rules"))
    except etree.RelaxNGParseError as error:
        raise DomainXmlError(f"the grammar of rules cannot be read: {error}") from None


def _host_matches(host: str, pattern: str) -> bool:
    if not host:
        return pattern == "*"
    return fnmatchcase(host, pattern) or fnmatchcase(host.partition(".")[0], pattern)


def _is_rule(element: etree._Element) -> bool:
    parent = element.getparent()
    return parent is not None and element.tag != "when" and parent.tag in ("rules", "when")


def _rule(element: etree._Element, file: str) -> Rule:
    tag = str(element.tag)
    parent = element.getparent()
    around = dict(parent.attrib) if parent is not None and parent.tag == "when" else {}
    line = element.sourceline or 0
    try:
        transform = _TRANSFORMS[tag](element)
    except ValueError as error:
        raise DomainXmlError(f"{file}:{line}: rule {_called(element)}: {error}") from None
    return Rule(
        name=element.get("name", tag),
        file=file,
        line=line,
        transform=transform,
        source=str(around.get("source", "*")),
        destination=str(around.get("destination", "*")),
        domain=str(around.get("domain", "*")),
    )


def _called(element: etree._Element) -> str:
    name = element.get("name")
    return f"<{element.tag!s}>" + (f" '{name}'" if name else "")


# -- element -> transform -------------------------------------------------------------------------------------------


def _mapping(element: etree._Element) -> Transform:
    tag = str(element.tag)
    kind = element.get("kind", "disk" if tag == "path" else "")
    places = PLACES[tag, kind]
    if element.get("type"):
        places = tuple(_of_type(place, element.get("type", "")) for place in places)
    only = tuple((name, element.get(name, "")) for name in ("protocol", "pool") if element.get(name) is not None)
    match = element.get("match", "prefix" if tag in ("path", "image") else "exact")
    before, after = element.get("from"), element.get("to", "")
    if tag == "path":
        _check_absolute(before or "", after)
    return MapValue(places, before, after, prefix=match == "prefix", only=only, add=tag == "tls")


def _of_type(place: Place, type: str) -> Place:
    """The same place of graphics of one type alone."""
    return Place(place.path.replace("devices/graphics", f"devices/graphics[@type='{type}']", 1), place.attribute)


def _check_absolute(*paths: str) -> None:
    for path in paths:
        if not path.startswith("/") or re.search(r"//|/\.\.?(/|$)", path):
            raise ValueError(f"'{path}' is no absolute path without //, . and ..")


def _numbers(element: etree._Element) -> Transform:
    places: tuple[Place, ...] = PLACES[str(element.tag), ""]
    return MapNumbers(places, element.get("from", ""), element.get("to", ""))


def _pin(element: etree._Element) -> Transform:
    tag = str(element.tag)
    attribute = tag.removesuffix("pin")
    return Pin(tag, attribute, element.get(attribute), element.get("cpuset", ""))


def _bind(element: etree._Element) -> Transform:
    return Bind(element.get("nodeset", ""), element.get("mode"), element.get("cellid"))


def _hugepages(element: etree._Element) -> Transform:
    unit = element.get("unit", "KiB")
    before = element.get("from")
    after = size_bytes(element.get("to", ""), unit)
    if not after or after % 1024 or after & (after - 1):
        raise ValueError(f"{element.get('to')} {unit} is no size of huge pages")
    return PageSize(None if before is None else size_bytes(before, unit), after)


def _device(element: etree._Element) -> Transform:
    return HostDevice(element.get("from", ""), element.get("to", ""))


def _metadata(element: etree._Element) -> Transform:
    uri = element.get("uri", "")
    children = [child for child in element if isinstance(child.tag, str)]
    if children and etree.QName(children[0]).namespace != uri:
        raise ValueError(f"<{children[0].tag!s}> is not in the namespace {uri}")
    content = etree.tostring(children[0], encoding="unicode", with_tail=False) if children else ""
    return Metadata(uri, content)


_TRANSFORMS: dict[str, Callable[[etree._Element], Transform]] = {
    **dict.fromkeys(
        ("bridge", "network", "portgroup", "link", "path", "pool", "volume", "image", "secret", "address", "tls"),
        _mapping,
    ),
    **dict.fromkeys(("cpus", "nodes"), _numbers),
    **dict.fromkeys(("vcpupin", "emulatorpin", "iothreadpin"), _pin),
    **dict.fromkeys(("numatune", "memnode"), _bind),
    "unpin": lambda element: Unpin(),
    "unbind": lambda element: Unbind(),
    "hugepages": _hugepages,
    "device": _device,
    "metadata": _metadata,
}


# -- what is wrong --------------------------------------------------------------------------------------------------


def _misfit(root: etree._Element, schema: etree.RelaxNG, file: str) -> DomainXmlError:
    """libxml2 says "Element rules has extra content" for every mistake inside; so each rule is tried alone."""
    if root.tag != "rules":
        return DomainXmlError(f"{file}:{root.sourceline}: begins with <{root.tag!s}>, not with <rules>")
    said = [f"{file}:{entry.line}: {entry.message}" for entry in schema.error_log]
    problems: list[str] = []
    for element in root.iter("*"):
        if element is not root and (_is_rule(element) or element.tag == "when"):
            problems += _problem(element, schema, file)
    return DomainXmlError("\n".join(problems or said[:1]), hint="the grammar is xml/virtmig-rules.rng")


def _problem(element: etree._Element, schema: etree.RelaxNG, file: str) -> list[str]:
    where = f"{file}:{element.sourceline}: "
    if element.tag not in (*_TRANSFORMS, "when"):
        return [f"{where}there is no rule <{element.tag!s}>; there are {', '.join(sorted(_TRANSFORMS))}"]
    alone = etree.Element("rules")
    copied = etree.SubElement(alone, element.tag, dict(element.attrib))
    if element.tag == "when":
        if element.getparent() is not None and element.getparent().tag == "when":  # type: ignore[union-attr]
            return [f"{where}<when> stands inside <when>"]
    else:
        copied.extend([_copied(child) for child in element])
        copied.text = element.text
    if schema.validate(alone):
        return []
    return [f"{where}rule {_called(element)}: {_reason(element, schema)}"]


def _copied(element: etree._Element) -> etree._Element:
    return etree.fromstring(etree.tostring(element, with_tail=False))


def _reason(element: etree._Element, schema: etree.RelaxNG) -> str:
    """libxml2's most telling line, in other words where it has none."""
    allowed = _ATTRIBUTES[str(element.tag)]
    unknown = [str(name) for name in element.attrib if name not in allowed]
    if unknown:
        return f"unknown attribute {', '.join(unknown)}; it takes {', '.join(sorted(allowed)) or 'none'}"
    missing = [name for name, needed in allowed.items() if needed and element.get(name) is None]
    if missing:
        return f"the attribute {', '.join(missing)} is missing"
    if element.tag != "metadata" and (len(element) or (element.text or "").strip()):
        return "there is something inside it"
    said = [entry.message for entry in schema.error_log if "Did not expect" not in entry.message]
    values = ", ".join(f"{name}='{value}'" for name, value in element.attrib.items())
    return f"{values} does not fit" + (f" ({said[0]})" if said else "")


_FROM_TO = {"from": True, "to": True, "name": False}
#: the grammar's attributes, for errors alone: name -> must it be there
_ATTRIBUTES: dict[str, dict[str, bool]] = {
    "when": {"source": False, "destination": False, "domain": False},
    **dict.fromkeys(("bridge", "network", "portgroup", "link", "pool", "secret", "cpus", "nodes", "device"), _FROM_TO),
    "path": {**_FROM_TO, "kind": False, "match": False},
    "volume": {**_FROM_TO, "pool": False, "match": False},
    "image": {**_FROM_TO, "protocol": False, "match": False},
    "address": {"kind": True, "type": False, "from": False, "to": True, "name": False},
    "tls": {"kind": True, "to": True, "name": False},
    "vcpupin": {"vcpu": True, "cpuset": True, "name": False},
    "iothreadpin": {"iothread": True, "cpuset": True, "name": False},
    "emulatorpin": {"cpuset": True, "name": False},
    "numatune": {"nodeset": True, "mode": False, "name": False},
    "memnode": {"cellid": True, "nodeset": True, "mode": False, "name": False},
    "hugepages": {"from": False, "to": True, "unit": False, "name": False},
    "metadata": {"uri": True, "name": False},
    "unpin": {"name": False},
    "unbind": {"name": False},
}
