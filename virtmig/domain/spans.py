"""Where each element of an XML text begins and ends, so that a change touches its own bytes and no others.

lxml says what an element is, not where it stands. A text that lxml has accepted, without a document type, is simple
enough to be cut into tags by one expression; the n-th start tag is the n-th element in document order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

#: comments, processing instructions and CDATA sections may contain anything, so they are matched first
_TAG = re.compile(
    r"""<!--.*?-->|<\?.*?\?>|<!\[CDATA\[.*?\]\]>|</(?P<end>[^>]*)>"""
    r"""|<(?P<name>[^\s/>!?]+)(?P<rest>(?:[^>"']++|"[^"]*+"|'[^']*+')*+)>""",
    re.DOTALL,
)
_ATTRIBUTE = re.compile(r"""\s(?P<name>[^\s=]+)\s*=\s*(?P<quote>["'])(?P<value>.*?)(?P=quote)""", re.DOTALL)
_BLANK = " \t\r\n"


class ElementSpan(msgspec.Struct):
    """Offsets into the text, in characters. `<a b='c'>text</a>`: start, open_end, close_start, end.

    An element written `<a/>` has open_end == close_start == end.
    """

    start: int
    open_end: int
    close_start: int
    end: int

    @property
    def is_empty_tag(self) -> bool:
        return self.open_end == self.end


class AttributeSpan(msgspec.Struct):
    """Where the name begins, the value between its quotes, and which quote that is."""

    name_start: int
    start: int
    end: int
    quote: str


def element_spans(text: str) -> list[ElementSpan]:
    """The spans of all elements, in document order. `text` must be well-formed and without a document type."""
    found: list[ElementSpan] = []
    opened: list[ElementSpan] = []
    for match in _TAG.finditer(text):
        if match["name"]:
            span = ElementSpan(match.start(), match.end(), match.end(), match.end())
            found.append(span)
            if not match["rest"].endswith("/"):
                opened.append(span)
        elif match["end"] is not None:
            span = opened.pop()
            span.close_start, span.end = match.span()
    return found


def attribute_span(text: str, element: ElementSpan, name: str) -> AttributeSpan | None:
    """The attribute `name` (as written, with its prefix) in the element's start tag."""
    for match in _ATTRIBUTE.finditer(text, element.start, element.open_end):
        if match["name"] == name:
            return AttributeSpan(match.start("name"), match.start("value"), match.end("value"), match["quote"])
    return None


def end_of_attributes(text: str, element: ElementSpan) -> int:
    """Where a further attribute goes: behind the last one, or behind the name."""
    tag = text[element.start : element.open_end].removesuffix(">")
    if element.is_empty_tag:
        tag = tag.removesuffix("/")
    return element.start + len(tag.rstrip(_BLANK))


def text_segments(text: str, element: ElementSpan) -> Iterator[tuple[int, int]]:
    """The stretches of character data directly in an element without child elements, blanks around them cut off."""
    position = element.open_end
    for match in re.finditer(r"<!--.*?-->|<\?.*?\?>", text[element.open_end : element.close_start], re.DOTALL):
        yield from _trimmed(text, position, element.open_end + match.start())
        position = element.open_end + match.end()
    yield from _trimmed(text, position, element.close_start)


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    part = text[start:end]
    bare = part.strip(_BLANK)
    if bare:
        first = start + len(part) - len(part.lstrip(_BLANK))
        yield first, first + len(bare)


def blank_before(text: str, position: int) -> int:
    """The start of the blanks that stand directly before `position`."""
    while position and text[position - 1] in _BLANK:
        position -= 1
    return position


def indent_of(text: str, position: int) -> str | None:
    """The blanks between the line's beginning and `position`; None when something else stands in that line."""
    line = text.rfind("\n", 0, position)
    blanks = text[line + 1 : position]
    return None if line < 0 or blanks.strip(" \t") else blanks
