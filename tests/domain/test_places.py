"""The table of what belongs to the host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lxml import etree

from tests.domain.triple_files import rules
from virtmig.domain.document import parse_xml
from virtmig.domain.places import PLACES, Place
from virtmig.domain.rewriting import rewrite

ROWS = [(rule, kind, place) for (rule, kind), places in PLACES.items() for place in places]
_UUIDS = ("6dd3e4a5-1d76-44ce-961f-f119f5aad935", "7ee4f5b6-2e87-55df-a720-a22ac6bbea46")
#: (rule, kind) -> a value before and after, where any words do not do
VALUES = {"path": ("/a/b", "/c/b"), "cpus": ("0-1", "4-5"), "nodes": ("0-1", "4-5"), "secret": _UUIDS}
TLS = {"graphics": ("any", "secure")}


def values(rule: str, kind: str) -> tuple[str, str]:
    return TLS.get(kind, ("no", "yes")) if rule == "tls" else VALUES.get(rule, ("before", "after"))


def domain_with(place: Place, value: str) -> str:
    """The least domain that has this place: an element for each step, with what its condition asks for."""
    root = etree.Element("domain")
    element = root
    for step in re.findall(r"[^/\[]+(?:\[[^\]]*\])*", place.path):
        name, *conditions = re.split(r"\[@|\]\[@|\]", step)
        element = etree.SubElement(element, "hostdev" if name == "*" else name)
        for condition in filter(None, conditions):
            attribute, _, wanted = condition.partition("=")
            element.set(attribute, wanted.strip("'") or "rbd")
    if place.attribute:
        element.set(place.attribute, value)
    else:
        element.text = value
    return etree.tostring(root, encoding="unicode")


@pytest.mark.parametrize(("rule", "kind", "place"), ROWS, ids=lambda part: str(part) if isinstance(part, str) else None)
def test_a_rule_reaches_its_place(rule: str, kind: str, place: Place) -> None:
    before, after = values(rule, kind)
    given = f" kind='{kind}'" if kind else ""
    source = "" if rule == "tls" else " from='/a'" if rule == "path" else f" from='{before}'"
    target = "/c" if rule == "path" else after
    xml = domain_with(place, before)
    result = rewrite(xml, rules(f"<{rule}{given}{source} to='{target}'/>"), source="a", destination="b")
    assert [(change.before, change.after) for change in result.changes] == [(before, after)]
    assert result.xml == domain_with(place, after)
    assert parse_xml(result.xml).find(place.path) is not None


@pytest.mark.parametrize(("rule", "kind", "place"), ROWS, ids=lambda part: str(part) if isinstance(part, str) else None)
def test_libvirts_schema_knows_the_names(rule: str, kind: str, place: Place, libvirt_schema: etree.RelaxNG) -> None:
    """Of all elements on the way and of the attribute: a misspelt row would never find anything."""
    schema = "".join(path.read_text() for path in Path("/usr/share/libvirt/schemas").glob("*.rng"))
    names = re.findall(r"[a-z]\w*", re.sub(r"\[[^\]]*\]", "", place.path), re.IGNORECASE)
    for name in names:
        assert re.search(rf"<element name=['\"]{name}['\"]|<value>{name}</value>", schema), name
    if place.attribute:
        assert re.search(rf"<attribute name=['\"]{place.attribute}['\"]", schema)
