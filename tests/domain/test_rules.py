"""Reading rules, and what is said about wrong ones."""

from __future__ import annotations

import re

import pytest

from tests.domain.triple_files import GRAMMAR, TOP, rules
from virtmig.domain.document import MAX_XML_BYTES
from virtmig.domain.rules import _ATTRIBUTES as ATTRIBUTES
from virtmig.domain.rules import _TRANSFORMS as TRANSFORMS
from virtmig.domain.rules import Rules, rules_from_texts, rules_from_xml
from virtmig.errors import DomainXmlError

THREE = """<?xml version='1.0'?>
<rules>
  <!-- <bridge from='no' to='no'/> -->
  <bridge from='br0' to='br1'/>
  <when source='a-*' destination='b.example.org' domain='[vw]*'>
    <pool name='the pool' from='p' to='q'/>
    <metadata uri='urn:x'><bridge xmlns='urn:x' from='1'/></metadata>
  </when>
</rules>"""


def test_each_rule_knows_its_place_and_its_hosts() -> None:
    found = rules_from_xml(THREE, GRAMMAR, "three.xml").rules
    assert [str(rule) for rule in found] == ["bridge (three.xml:4)", "the pool (three.xml:6)", "metadata (three.xml:7)"]
    assert [(rule.source, rule.destination, rule.domain) for rule in found] == [
        ("*", "*", "*"),
        ("a-*", "b.example.org", "[vw]*"),
        ("a-*", "b.example.org", "[vw]*"),
    ]


@pytest.mark.parametrize(
    ("source", "destination", "domain", "count"),
    [
        ("a-1", "b.example.org", "web", 3),
        ("a-1.example.org", "b.example.org", "web", 3),
        ("a-1", "b", "web", 1),
        ("a-1", "b.example.org", "xen", 1),
        ("A-1", "b.example.org", "web", 1),
        ("", "b.example.org", "web", 1),
        ("a-1", "", "web", 1),
        ("", "", "", 1),
    ],
)
def test_rules_are_chosen_by_hosts_and_guest(source: str, destination: str, domain: str, count: int) -> None:
    found = rules_from_xml(THREE, GRAMMAR)
    assert len(found.select(source=source, destination=destination, domain=domain)) == count


def test_a_guest_is_known_by_its_uuid_too() -> None:
    found = rules("<when domain='6A1F0C52-8D3B-4D6E-9A55-0B7C1E2D3F40'><unpin/></when>")
    chosen = found.select(source="a", destination="b", domain="x", uuid="6a1f0c52-8d3b-4d6e-9a55-0b7c1e2d3f40")
    assert len(chosen) == 1
    assert not found.select(source="a", destination="b", domain="x", uuid="")


def test_files_follow_each_other() -> None:
    texts = {"b.xml": "<rules><unpin/></rules>", "a.xml": "<rules><unbind/></rules>", "c.xml": "<rules/>"}
    found = rules_from_texts(texts, GRAMMAR)
    assert [str(rule) for rule in found.rules] == ["unpin (b.xml:1)", "unbind (a.xml:1)"]
    assert len(found) == 2
    assert rules_from_texts({}, GRAMMAR) == Rules()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<bridge from='a'/>", "r.xml:3: rule <bridge>: the attribute to is missing"),
        (
            "<bridge form='a' to='b' name='x'/>",
            "r.xml:3: rule <bridge> 'x': unknown attribute form; it takes from, name, to",
        ),
        ("<bridge from='a' to=''/>", "r.xml:3: rule <bridge>: from='a', to='' does not fit"),
        ("<bridge from='a' to='b'>c</bridge>", "r.xml:3: rule <bridge>: there is something inside it"),
        ("<brigde from='a' to='b'/>", "r.xml:3: there is no rule <brigde>; there are address, bridge"),
        ("<path kind='tape' from='/a' to='/b'/>", "r.xml:3: rule <path>: kind='tape'"),
        ("<path from='/a' to='b'/>", "r.xml:3: rule <path>: 'b' is no absolute path"),
        ("<path from='/a/../b' to='/b'/>", "r.xml:3: rule <path>: '/a/../b' is no absolute path"),
        ("<path match='suffix' from='/a' to='/b'/>", "r.xml:3: rule <path>: match='suffix'"),
        ("<cpus from='0-3' to='0-1'/>", "r.xml:3: rule <cpus>: '0-3' has 4 numbers and '0-1' has 2"),
        ("<cpus from='a' to='0-1'/>", "r.xml:3: rule <cpus>: from='a', to='0-1' does not fit"),
        ("<cpus from='3-1' to='0-1'/>", "r.xml:3: rule <cpus>: '3-1': 3-1 is no range"),
        ("<vcpupin vcpu='0' cpuset='^1-2'/>", "r.xml:3: rule <vcpupin>: '^1-2' is no list"),
        ("<numatune mode='firm' nodeset='1'/>", "r.xml:3: rule <numatune>: mode='firm'"),
        ("<numatune nodeset='1,'/>", "r.xml:3: rule <numatune>: '1,' is no list"),
        ("<hugepages to='3'/>", "r.xml:3: rule <hugepages>: 3 KiB is no size of huge pages"),
        ("<hugepages to='2' unit='b'/>", "r.xml:3: rule <hugepages>: 2 b is no size of huge pages"),
        ("<hugepages to='2' unit='PiB'/>", "r.xml:3: rule <hugepages>: to='2', unit='PiB' does not fit"),
        ("<device from='3b:00.9' to='1'/>", "r.xml:3: rule <device>: from='3b:00.9'"),
        (
            "<device from='3b:00.1' to='c2177883-f1bb-47f0-914d-32a22e3a8804'/>",
            "r.xml:3: rule <device>: '3b:00.1' and 'c2177883-f1bb-47f0-914d-32a22e3a8804' are not both",
        ),
        ("<metadata uri='u'><x/></metadata>", "r.xml:3: rule <metadata>: <x> is not in the namespace u"),
        ("<address kind='disk' to='x'/>", "r.xml:3: rule <address>: kind='disk', to='x' does not fit"),
        ("<tls kind='graphics' to='yes'/>", "r.xml:3: rule <tls>: kind='graphics', to='yes' does not fit"),
        ("<when><when/></when>", "r.xml:3: <when> stands inside <when>"),
        ("<when host='a'/>", "r.xml:3: rule <when>: unknown attribute host; it takes destination, domain, source"),
        ("text", "r.xml:1: Did not expect text in element rules content"),
        ("<x:bridge xmlns:x='y' from='a' to='b'/>", "r.xml:3: there is no rule <{y}bridge>"),
    ],
)
def test_a_wrong_rule_is_named_with_its_line(text: str, words: str) -> None:
    good = "<network from='a' to='b'/>"
    with pytest.raises(DomainXmlError, match=re.escape(words)):
        rules_from_xml(f"<rules>\n  {good}\n  {text}\n  {good}</rules>", GRAMMAR, "r.xml")


def test_all_wrong_rules_are_named() -> None:
    with pytest.raises(DomainXmlError) as caught:
        rules_from_xml(
            "<rules>\n<bridge/>\n<when>\n<pool from='a' to='b'/>\n<pool to='b'/></when></rules>", GRAMMAR, "r.xml"
        )
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == ["r.xml:2:", "r.xml:5:"]
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "r.xml cannot be parsed"),
        ("<rules>", "r.xml cannot be parsed"),
        ("<rule/>", "r.xml:1: begins with <rule>, not with <rules>"),
        (
            "<!DOCTYPE rules [<!ENTITY x SYSTEM 'file:///etc/hostname'>]><rules>&x;</rules>",
            "r.xml declares a document type",
        ),
        ("<rules>" + " " * MAX_XML_BYTES + "</rules>", "r.xml is larger than"),
    ],
)
def test_a_file_that_holds_no_rules_is_refused(text: str, words: str) -> None:
    with pytest.raises(DomainXmlError, match=re.escape(words)):
        rules_from_xml(text, GRAMMAR, "r.xml")


def test_a_grammar_that_is_none_is_refused() -> None:
    with pytest.raises(DomainXmlError, match="the grammar of rules"):
        rules_from_xml("<rules/>", "<grammar/>")


def test_the_tables_and_the_grammar_name_the_same() -> None:
    elements = set(re.findall(r'<element name="(\w+)"', GRAMMAR)) - {"rules"}
    assert elements == set(ATTRIBUTES)
    assert set(TRANSFORMS) == elements - {"when"}
    for name, attributes in ATTRIBUTES.items():
        body = re.search(rf'<element name="{name}">(.*?)</element>', GRAMMAR, re.DOTALL)
        assert body
        spelled = set(re.findall(r'<attribute name="(\w+)"', _expanded(body[1])))
        assert spelled == set(attributes), name


def _expanded(body: str) -> str:
    """With the definitions that it refers to; not <rule> itself."""
    for reference in re.findall(r'<ref name="(\w+)"', body):
        definition = re.search(rf'<define name="{reference}">(.*?)</define>', GRAMMAR, re.DOTALL)
        if definition and reference not in ("rule", "anything"):
            body += _expanded(definition[1])
    return body


def test_the_example_is_right() -> None:
    text = (TOP / "xml/rules/example.xml").read_text()
    assert len(rules_from_xml(text, GRAMMAR, "example.xml")) > 10
