"""Parsing XML that others wrote."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.domain.strategies import DATA, elements, quoted
from virtmig.domain.document import (
    MAX_DEPTH,
    MAX_MARKUP,
    MAX_XML_BYTES,
    DomainDocument,
    attribute_of,
    bytes_of,
    parse_xml,
    text_of,
)
from virtmig.errors import DomainXmlError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be parsed"),
        ("<domain>", "cannot be parsed"),
        ("<domain/><domain/>", "cannot be parsed"),
        ("\x00", "cannot be parsed"),
        ("<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/hostname'>]><d>&e;</d>", "document type"),
        ("<d>" + " " * MAX_XML_BYTES + "</d>", "larger than"),
    ],
)
def test_what_is_not_a_document_of_libvirts_is_refused(text: str, words: str) -> None:
    with pytest.raises(DomainXmlError, match=words):
        parse_xml(text)


def test_an_encoding_declaration_is_no_obstacle() -> None:
    assert text_of(parse_xml("<?xml version='1.0' encoding='UTF-8'?><d><n> ä </n></d>"), "n") == "ä"


@pytest.mark.parametrize(
    ("element", "size"),
    [
        ("<m>7</m>", 7 << 10),
        ("<m unit='KiB'>7</m>", 7 << 10),
        ("<m unit='b'>7</m>", 7),
        ("<m unit='KB'>7</m>", 7000),
        ("<m unit='MiB'>7</m>", 7 << 20),
        ("<m unit='G'>7</m>", 7 << 30),
        ("<m unit='TB'>7</m>", 7 * 10**12),
        ("<m unit='furlong'>7</m>", None),
        ("<m>seven</m>", None),
        ("<m/>", None),
        ("<other/>", None),
    ],
)
def test_sizes_are_read_with_their_unit(element: str, size: int | None) -> None:
    assert bytes_of(parse_xml(f"<d>{element}</d>"), "m") == size


def test_what_is_absent_has_the_default() -> None:
    root = parse_xml("<d><a b='c'/></d>")
    assert text_of(root, "a") == ""
    assert text_of(root, "x/y", "none") == "none"
    assert attribute_of(root, "a", "b") == "c"
    assert attribute_of(root, "a", "z", "none") == "none"
    assert attribute_of(root, "x", "b") == ""


# -- hostile ---------------------------------------------------------------------------------------------------------

LAUGHS = "<!DOCTYPE d [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 10}'>" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{LAUGHS}]><domain>&j;</domain>", "document type"),
        (f"{LAUGHS}]><domain name='&j;'/>", "document type"),
        ("<!-- x --><?y?>\n<!DOCTYPE domain SYSTEM 'http://127.0.0.1:9/x.dtd'><domain/>", "document type"),
        ("\ufeff<!DOCTYPE domain PUBLIC 'a' '/dev/zero'><domain/>", "document type"),
        ("<domain>&e;</domain>", "cannot be parsed"),
        ("<domain><name>a</domain>", "cannot be parsed"),
        ("<a>" * (MAX_DEPTH + 1) + "</a>" * (MAX_DEPTH + 1), f"deeper than {MAX_DEPTH}"),
        ("<a>" * 90_000 + "</a>" * 90_000, f"deeper than {MAX_DEPTH}"),
        ("<a>" + "<b/>" * MAX_MARKUP + "</a>", f"more than {MAX_MARKUP} tags"),
        ("<domain a='1' a='2'/>", "cannot be parsed"),
        ("<domain>\ud800</domain>", "cannot be parsed"),
        ("<domain>" + "<!--", "cannot be parsed"),
        ("<![CDATA[" * 1000, "cannot be parsed"),
        ("<q:domain/>", "cannot be parsed"),
    ],
)
def test_hostile_xml_ends_in_a_clear_word(text: str, words: str) -> None:
    begin = time.monotonic()
    with pytest.raises(DomainXmlError, match=words):
        DomainDocument(text)
    assert time.monotonic() - begin < 20


def test_the_deepest_that_is_allowed() -> None:
    assert parse_xml("<a>" * MAX_DEPTH + "</a>" * MAX_DEPTH).tag == "a"


def test_an_inclusion_is_only_an_element(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    text = f"<domain xmlns:xi='http://www.w3.org/2001/XInclude'><xi:include href='{secret}' parse='text'/></domain>"
    document = DomainDocument(text)
    assert "the secret" not in str(document.root.xpath("string()"))
    assert document.text == text


def test_a_declared_encoding_does_not_change_the_characters() -> None:
    for encoding in ("ISO-8859-1", "UTF-16", "ascii"):
        assert text_of(parse_xml(f"<?xml version='1.0' encoding='{encoding}'?><d><n>ä€</n></d>"), "n") == "ä€"


def test_what_is_no_domain_is_refused() -> None:
    with pytest.raises(DomainXmlError, match=r"my\.xml begins with <network>, not with <domain>"):
        DomainDocument("<network/>", what="my.xml")


# -- DomainDocument --------------------------------------------------------------------------------------------------

ODD = """<?xml version="1.0"?>
<!-- a < b -->
<domain  type='kvm'
  id="3">
\t<name>odd</name ><vcpu><!-- n --> 4 </vcpu>
  <os  ><kernel>/a&amp;b</kernel><x/></os>
  <cputune/>
  <a><![CDATA[<y>]]></a><t></t >
  <q:c xmlns:q='u'><q:arg value='-x'/></q:c>
</domain>
<?pi <z> ?>
"""


def edited(change: Callable[[DomainDocument], object]) -> tuple[str, list[str]]:
    """ODD after a change, what is left of its lines, and the changes in words."""
    document = DomainDocument(ODD)
    change(document)
    parse_xml(document.text)
    return document.text, [str(change) for change in document.changes]


def found(document: DomainDocument, path: str) -> etree._Element:
    element = document.root.find(path)
    assert element is not None
    return element


def test_nothing_changed_is_the_same_text() -> None:
    assert edited(lambda document: None) == (ODD, [])


@pytest.mark.parametrize(
    ("change", "before", "after", "said"),
    [
        (
            lambda d: d.set_attribute(d.root, "id", 'it\'s "4" & <5>\n', rule="r"),
            'id="3"',
            'id="it\'s &quot;4&quot; &amp; &lt;5&gt;&#10;"',
            '@id: 3 -> it\'s "4" & <5>\n',
        ),
        (lambda d: d.set_attribute(d.root, "new", "'", rule="r"), 'id="3">', "id=\"3\" new='&apos;'>", "@new: ' added"),
        (lambda d: d.set_attribute(found(d, "os"), "n", "1", rule="r"), "<os  >", "<os n='1'  >", "os/@n: 1 added"),
        (lambda d: d.remove_attribute(d.root, "id", rule="r"), '\n  id="3">', ">", "@id: 3 removed"),
        (lambda d: d.set_text(found(d, "vcpu"), "5<", rule="r"), " 4 <", " 5&lt; <", "vcpu: 4 -> 5<"),
        (lambda d: d.set_text(found(d, "os/kernel"), "/c", rule="r"), "/a&amp;b", "/c", "os/kernel: /a&b -> /c"),
        (lambda d: d.set_text(found(d, "a"), "z", rule="r"), "<![CDATA[<y>]]>", "z", "a: <y> -> z"),
        (lambda d: d.remove(found(d, "os/x"), rule="r"), "<x/>", "", "os/x: <x/> removed"),
        (lambda d: d.remove(found(d, "cputune"), rule="r"), "\n  <cputune/>", "", "cputune: <cputune/> removed"),
        (
            lambda d: d.replace(found(d, "cputune"), etree.Element("y"), rule="r"),
            "<cputune/>",
            "<y/>",
            "cputune: <cputune/> -> <y/>",
        ),
        (
            lambda d: d.insert(found(d, "cputune"), etree.Element("y", a="1"), rule="r"),
            "<cputune/>",
            "<cputune>\n    <y a='1'/>\n  </cputune>",
            "cputune/y: <y a='1'/> added",
        ),
        (
            lambda d: d.insert(d.root, etree.Element("y"), rule="r", after=("name", "cputune")),
            "<cputune/>",
            "<cputune/>\n  <y/>",
            "y: <y/> added",
        ),
        (
            lambda d: d.insert(d.root, etree.Element("y"), rule="r", after=("nothing",)),
            "</q:c>\n",
            "</q:c>\n\t<y/>\n",
            "y: <y/> added",
        ),
        (
            lambda d: d.insert(found(d, "t"), etree.Element("y"), rule="r"),
            "<t></t >",
            "<t><y/></t >",
            "t/y: <y/> added",
        ),
    ],
)
def test_a_change_touches_its_own_place_alone(
    change: Callable[[DomainDocument], object], before: str, after: str, said: str
) -> None:
    assert ODD.count(before) == 1
    assert edited(change) == (ODD.replace(before, after), [said])


def test_several_changes_of_one_place_are_one_in_the_text() -> None:
    def change(document: DomainDocument) -> None:
        for value in ("4", "5", "6"):
            document.set_attribute(document.root, "id", value, rule=f"to {value}")
        document.set_attribute(found(document, "os"), "n", "1", rule="r")
        document.remove_attribute(found(document, "os"), "n", rule="r")

    text, changes = edited(change)
    assert text == ODD.replace('id="3"', 'id="6"')
    assert changes == ["@id: 3 -> 4", "@id: 4 -> 5", "@id: 5 -> 6", "os/@n: 1 added", "os/@n: 1 removed"]


def test_what_is_removed_takes_its_changes_with_it() -> None:
    def change(document: DomainDocument) -> None:
        document.set_text(found(document, "os/kernel"), "/c", rule="r")
        document.set_attribute(found(document, "os"), "n", "1", rule="r")
        document.remove(found(document, "os"), rule="r")

    assert edited(change)[0] == ODD.replace("\n  <os  ><kernel>/a&amp;b</kernel><x/></os>", "")


def test_elements_added_one_behind_the_other_keep_their_order_and_can_be_changed() -> None:
    def change(document: DomainDocument) -> None:
        outer = document.insert(document.root, etree.Element("outer"), rule="r", after=("cputune",))
        for number in "123":
            document.insert(outer, etree.Element("pin", n=number), rule="r")
        document.set_attribute(outer[1], "n", "two", rule="r")
        document.remove(outer[2], rule="r")

    text, _ = edited(change)
    assert "<cputune/>\n  <outer>\n    <pin n='1'/>\n    <pin n='two'/>\n  </outer>\n" in text


def test_a_value_in_two_parts_is_not_guessed_at() -> None:
    document = DomainDocument("<domain><emulator>/usr/<!-- x -->bin</emulator></domain>")
    with pytest.raises(DomainXmlError, match="emulator cannot be changed by rule 7: its text is in 2 parts"):
        document.set_text(found(document, "emulator"), "/x", rule="rule 7")


def test_the_root_stays() -> None:
    document = DomainDocument("<domain/>")
    with pytest.raises(DomainXmlError, match="rule 7 cannot remove <domain> itself"):
        document.remove(document.root, rule="rule 7")
    with pytest.raises(DomainXmlError, match="rule 7 cannot replace <domain> itself"):
        document.replace(document.root, etree.Element("domain"), rule="rule 7")


def test_names_spaces_are_declared_where_they_are_needed_and_not_elsewhere() -> None:
    document = DomainDocument("<domain xmlns:q='u'>\n  <metadata/>\n</domain>")
    added = etree.fromstring("<s:a xmlns:s='v'><s:b/></s:a>")
    document.insert(found(document, "metadata"), added, rule="r")
    document.insert(document.root, etree.Element("vcpu"), rule="r")
    assert document.text == (
        "<domain xmlns:q='u'>\n  <metadata>\n    <s:a xmlns:s=\"v\"><s:b/></s:a>\n  </metadata>\n  <vcpu/>\n</domain>"
    )


@given(st.lists(elements(), max_size=4), st.randoms(use_true_random=False), DATA)
def test_any_attribute_of_any_document_changes_alone(children: list[str], random: Random, value: str) -> None:
    text = f"<domain>{''.join(children)}</domain>"
    document = DomainDocument(text)
    assert document.text == text
    places = [(element, str(name)) for element in document.root.iter("*") for name in element.attrib]
    for element, name in random.sample(places, min(2, len(places))):
        document.set_attribute(element, name, value, rule="r")
    again = parse_xml(document.text)
    assert etree.tostring(again) == etree.tostring(document.root)
    assert len(document.text) - len(text) <= sum(len(quoted(c.after or "", "'")) * 2 for c in document.changes)
