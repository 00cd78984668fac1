"""Where elements stand in a text."""

from __future__ import annotations

import pytest

from virtmig.domain.spans import attribute_span, element_spans, end_of_attributes, indent_of, text_segments

TEXT = """<?xml version='1.0'?>
<!-- <no> > -->
<a x = "1>" y='<2'>
  <b/><c ><![CDATA[<d>]]></c >
\t<e z='"'
     />t<!-- e -->u
</a>
"""


def test_each_element_has_its_own_text() -> None:
    found = [TEXT[span.start : span.end] for span in element_spans(TEXT)]
    assert found[0] == TEXT[TEXT.index("<a ") : TEXT.index("</a>") + 4]
    assert found[1:] == ["<b/>", "<c ><![CDATA[<d>]]></c >", "<e z='\"'\n     />"]


def test_tags_without_content_are_told_from_others() -> None:
    assert [span.is_empty_tag for span in element_spans(TEXT)] == [False, True, False, True]
    a, b, c, _ = element_spans(TEXT)
    assert TEXT[c.open_end : c.close_start] == "<![CDATA[<d>]]>"
    assert b.open_end == b.close_start == b.end
    assert TEXT[a.close_start : a.end] == "</a>"


@pytest.mark.parametrize(
    ("element", "name", "value", "quote"), [(0, "x", "1>", '"'), (0, "y", "<2", "'"), (3, "z", '"', "'")]
)
def test_the_value_of_an_attribute(element: int, name: str, value: str, quote: str) -> None:
    span = attribute_span(TEXT, element_spans(TEXT)[element], name)
    assert span is not None
    assert (TEXT[span.start : span.end], span.quote) == (value, quote)
    assert TEXT[span.name_start :].startswith(name)
    assert TEXT[span.end] == quote


def test_an_attribute_that_is_only_in_a_value_is_not_found() -> None:
    text = """<a b=" c='1'" d=''/>"""
    assert attribute_span(text, element_spans(text)[0], "c") is None


@pytest.mark.parametrize(
    ("text", "position"), [("<a/>", 2), ("<a />", 2), ("<a>x</a>", 2), ("<a b='/' >x</a>", 8), ("<a b='>'\n/>", 8)]
)
def test_further_attributes_go_behind_the_last(text: str, position: int) -> None:
    assert end_of_attributes(text, element_spans(text)[0]) == position


def test_text_is_found_between_comments() -> None:
    text = "<a> \n<!-- x --> one <?p q?>two<!---->\t</a>"
    assert [text[start:end] for start, end in text_segments(text, element_spans(text)[0])] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "indent"),
    [("<a>\n  <b/></a>", "  "), ("<a><b/></a>", None), ("<a>\n<b/></a>", ""), ("<a>\n\tx <b/></a>", None)],
)
def test_the_indent_is_what_stands_alone_before(text: str, indent: str | None) -> None:
    assert indent_of(text, text.index("<b")) == indent
