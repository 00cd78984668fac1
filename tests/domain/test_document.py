"""Parsing XML that others wrote."""

from __future__ import annotations

import pytest

from virtmig.domain.document import MAX_XML_BYTES, attribute_of, bytes_of, parse_xml, text_of
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
