"""Domain XML that came from another host or from a file: read without harm, changed without touching the rest.

parse_xml refuses what no document of libvirt's has: a document type (so no entity and no external reference is ever
looked at), more than MAX_XML_BYTES, MAX_MARKUP or MAX_DEPTH. DomainDocument changes single values and keeps every other
byte: comments, order, blanks, quotes and namespaces that it does not know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable

import msgspec
from lxml import etree

from virtmig.domain.spans import (
    ElementSpan,
    attribute_span,
    blank_before,
    element_spans,
    end_of_attributes,
    indent_of,
    text_segments,
)
from virtmig.errors import DomainXmlError

#: virsh reads at most this much of a file (VSH_MAX_XML_FILE)
MAX_XML_BYTES = 10 << 20
#: `<` in a document: two an element, and comments. A guest with 500 disks has below 20 000
MAX_MARKUP = 200_000
#: elements within elements; libxml2's own limit without XML_PARSE_HUGE (xmlParserMaxDepth before 2.14)
MAX_DEPTH = 256

_DOCTYPE = re.compile(r"(?:\s++|<\?.*?\?>|<!--.*?-->)*+<!DOCTYPE", re.DOTALL)


def parse_xml(text: str, *, what: str = "domain XML") -> etree._Element:
    """The root element of `text`. Raises DomainXmlError, also for a document type: no libvirt document has one."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise DomainXmlError(f"{what} cannot be parsed: {error.reason} at character {error.start}") from None
    if len(raw) > MAX_XML_BYTES:
        raise DomainXmlError(f"{what} is larger than {MAX_XML_BYTES} bytes")
    if text.count("<") > MAX_MARKUP:
        raise DomainXmlError(f"{what} has more than {MAX_MARKUP} tags and comments")
    if _DOCTYPE.match(text.removeprefix("\ufeff")):
        raise DomainXmlError(f"{what} declares a document type, which is not accepted")
    if not text.strip():
        raise DomainXmlError(f"{what} cannot be parsed: it is empty")
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, collect_ids=False
    )
    try:
        root = etree.fromstring(raw, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise DomainXmlError(f"{what} cannot be parsed: {_said(error)}") from None
    if root.getroottree().docinfo.doctype:
        raise DomainXmlError(f"{what} declares a document type, which is not accepted")
    if _deeper_than(root, MAX_DEPTH):
        raise DomainXmlError(f"{what} has elements nested deeper than {MAX_DEPTH}")
    return root


def _said(error: Exception) -> str:
    if "xcessive depth" in str(error):
        return f"elements are nested deeper than {MAX_DEPTH}"
    return str(error)


def _deeper_than(root: etree._Element, limit: int) -> bool:
    depth = 0
    for event, _ in etree.iterwalk(root, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > limit:
            return True
    return False


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


def size_bytes(number: str, unit: str) -> int | None:
    """A size in libvirt's writing in bytes; None when the number is none or the unit is unknown."""
    factor = _UNITS.get(unit.lower())
    number = number.strip()
    return int(number) * factor if factor and number.isascii() and number.isdigit() else None


def bytes_of(element: etree._Element, path: str) -> int | None:
    """The size at `path` in bytes, read with its unit (KiB when it has none, as libvirt does); None when absent."""
    found = element.find(path)
    return None if found is None else size_bytes(found.text or "", found.get("unit", "KiB"))


class Change(msgspec.Struct, frozen=True):
    """One thing that a rule changed. `path` is where, from below <domain>; None means that it is absent there."""

    rule: str
    path: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.path}: {self.after} added"
        if self.after is None:
            return f"{self.path}: {self.before} removed"
        return f"{self.path}: {self.before} -> {self.after}"


class _Edit(msgspec.Struct):
    """Replace text[start:end] with what `render` gives when the document is written."""

    start: int
    end: int
    render: Callable[[], str]


class DomainDocument:
    """A domain XML that can be changed in place. `root` always shows the changes; `changes` lists them in order.

    One element or attribute may be changed several times. Raises DomainXmlError for what parse_xml refuses and for a
    root that is no <domain>.
    """

    def __init__(self, text: str, *, what: str = "domain XML") -> None:
        self.root = parse_xml(text, what=what)
        if self.root.tag != "domain":
            raise DomainXmlError(f"{what} begins with <{self.root.tag!s}>, not with <domain>")
        self.changes: list[Change] = []
        self._text = text
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._tree = self.root.getroottree()
        #: what stood in the text; an element that is added has no span and is written from the tree
        self._spans = dict(zip(self.root.iter("*"), element_spans(text), strict=True))
        self._edits: dict[tuple[int, str, str], _Edit] = {}
        self._added: dict[tuple[int, str], list[etree._Element]] = {}

    @property
    def text(self) -> str:
        """The whole document: the text it was made from, with the changes in their places."""
        parts: list[str] = []
        position = 0
        for edit in sorted(self._edits.values(), key=lambda edit: (edit.start, edit.end)):
            if edit.start < position:
                continue  # within an element that was removed
            parts += [self._text[position : edit.start], edit.render()]
            position = edit.end
        return "".join([*parts, self._text[position:]])

    def path(self, element: etree._Element, attribute: str = "") -> str:
        """Where an element stands, as people write it: devices/disk[2]/source/@file."""
        path = self._tree.getelementpath(element)
        if not attribute:
            return path
        return f"@{attribute}" if path == "." else f"{path}/@{attribute}"

    def value(self, element: etree._Element) -> str:
        """The character data of an element, comments left out, blanks around it cut off."""
        return str(element.xpath("string()")).strip()

    def set_attribute(self, element: etree._Element, name: str, value: str, *, rule: str) -> None:
        """Give an attribute without a namespace a value; it is added when it is not there."""
        before = element.get(name)
        if before == value:
            return
        element.set(name, value)
        self.changes.append(Change(rule, self.path(element, name), before, value))
        span = self._spans.get(element)
        if span is None:
            return
        place = attribute_span(self._text, span, name)
        if place is not None:
            quote = place.quote
            start, end = place.name_start, place.end + 1
            equals = self._text[start : place.start]
            self._edit(span, "attribute", name, start, end, lambda: f"{equals}{_quoted(element, name, quote)}{quote}")
        else:
            end = end_of_attributes(self._text, span)
            self._edit(span, "attribute", name, end, end, lambda: f" {name}='{_quoted(element, name, chr(39))}'")

    def remove_attribute(self, element: etree._Element, name: str, *, rule: str) -> None:
        """Take an attribute away, with the blanks before it."""
        before, span = element.get(name), self._spans.get(element)
        if before is None:
            return
        self.changes.append(Change(rule, self.path(element, name), before, None))
        del element.attrib[name]
        place = attribute_span(self._text, span, name) if span is not None else None
        if span is not None and place is not None:
            start = blank_before(self._text, place.name_start)
            self._edit(span, "attribute", name, start, place.end + 1, lambda: "")
        elif span is not None:
            self._edits.pop((span.start, "attribute", name), None)

    def set_text(self, element: etree._Element, value: str, *, rule: str) -> None:
        """Give an element that holds only text another text; the blanks around it and comments beside it stay.

        Raises DomainXmlError when a comment stands in the middle of the text.
        """
        before = self.value(element)
        if before == value:
            return
        span = self._spans.get(element)
        if span is not None:
            segments = list(text_segments(self._text, span))
            if len(segments) != 1 or any(isinstance(child.tag, str) for child in element):
                raise DomainXmlError(
                    f"{self.path(element)} cannot be changed by {rule}: its text is in {len(segments)} parts",
                    hint="take the comment out of the value",
                )
            self._edit(span, "text", "", *segments[0], lambda: _escaped(self.value(element)))
        for child in element:
            child.tail = None
        element.text = value
        self.changes.append(Change(rule, self.path(element), before, value))

    def insert(
        self, parent: etree._Element, element: etree._Element, *, rule: str, after: tuple[str, ...] = ()
    ) -> etree._Element:
        """Add an element in its own line: behind the last one of its name or of a name in `after`, or at the end."""
        siblings = [child for child in parent if child.tag == element.tag] or [
            child for child in parent if child.tag in after
        ]
        element.tail = None
        if siblings:
            siblings[-1].addnext(element)
        else:
            parent.append(element)
        self.changes.append(Change(rule, self.path(element), None, render(element)))
        last, span = siblings[-1] if siblings else None, self._spans.get(parent)
        if last is not None and last in self._spans:
            self._add_behind(last, element)
        elif last is not None:
            next((added for added in self._added.values() if last in added), []).append(element)
        elif span is not None:
            self._add_within(parent, span, element)
        return element

    def replace(self, old: etree._Element, new: etree._Element, *, rule: str) -> None:
        """Put one element in the place of another."""
        parent, span = old.getparent(), self._spans.get(old)
        if parent is None:
            raise DomainXmlError(f"{rule} cannot replace <{old.tag!s}> itself")
        path, before = self.path(old), render(old)
        new.tail = None
        parent.replace(old, new)
        self.changes.append(Change(rule, path, before, render(new)))
        if span is not None:
            self._edit(span, "whole", "", span.start, span.end, lambda: self._written(render(new)))

    def remove(self, element: etree._Element, *, rule: str) -> None:
        """Take an element out, with the blanks before it."""
        parent, span = element.getparent(), self._spans.get(element)
        if parent is None:
            raise DomainXmlError(f"{rule} cannot remove <{element.tag!s}> itself")
        self.changes.append(Change(rule, self.path(element), render(element), None))
        element.tail = None
        parent.remove(element)
        if span is not None:
            self._edit(span, "whole", "", blank_before(self._text, span.start), span.end, lambda: "")

    def _edit(self, span: ElementSpan, kind: str, name: str, start: int, end: int, text: Callable[[], str]) -> None:
        self._edits[span.start, kind, name] = _Edit(start, end, text)

    def _add_behind(self, sibling: etree._Element, element: etree._Element) -> None:
        span = self._spans[sibling]
        added = self._added.setdefault((span.start, "behind"), [])
        added.insert(0, element)  # the tree has it directly behind the sibling
        indent = indent_of(self._text, span.start)
        self._edit(span, "behind", "", span.end, span.end, lambda: self._written(_lines(added, indent)))

    def _add_within(self, parent: etree._Element, span: ElementSpan, element: etree._Element) -> None:
        added = self._added.setdefault((span.start, "within"), [])
        added.append(element)
        outer = indent_of(self._text, span.start)
        first = next((self._spans[child] for child in parent if child in self._spans), None)
        indent = indent_of(self._text, first.start) if first else None if outer is None else f"{outer}  "
        closing = "" if outer is None else f"\n{outer}"
        if span.is_empty_tag:
            tag = str(parent.tag)
            self._edit(
                span,
                "within",
                "",
                span.end - 2,
                span.end,
                lambda: self._written(f">{_lines(added, indent)}{closing}</{tag}>"),
            )
            return
        end = blank_before(self._text, span.close_start)
        if "\n" in self._text[end : span.close_start]:
            closing = ""
        self._edit(span, "within", "", end, end, lambda: self._written(f"{_lines(added, indent)}{closing}"))

    def _written(self, lines: str) -> str:
        return lines.replace("\n", self._newline)


def render(element: etree._Element, indent: str | None = None) -> str:
    """An element as libvirt would print it, in one line, or with its children indented below `indent`.

    One in a namespace is printed as it was written, by lxml, with the declarations that it needs.
    """
    if any(str(name).startswith("{") for name in (element.tag, *element.attrib)):
        alone = copy.deepcopy(element)
        etree.cleanup_namespaces(alone)
        return etree.tostring(alone, encoding="unicode", with_tail=False)
    tag = str(element.tag)
    attributes = "".join(f" {name}='{_quoted(element, str(name), chr(39))}'" for name in map(str, element.attrib))
    content = _escaped((element.text or "").strip()) + _lines(element, None if indent is None else f"{indent}  ")
    if not content:
        return f"<{tag}{attributes}/>"
    closing = f"\n{indent}" if len(element) and indent is not None else ""
    return f"<{tag}{attributes}>{content}{closing}</{tag}>"


def _lines(elements: Iterable[etree._Element], indent: str | None) -> str:
    """Elements that are still in a tree, each in its line; all in one line when there is no indent."""
    here = [element for element in elements if isinstance(element.tag, str) and element.getparent() is not None]
    return "".join(f"{'' if indent is None else chr(10) + indent}{render(element, indent)}" for element in here)


def _quoted(element: etree._Element, name: str, quote: str) -> str:
    value = _escaped(element.get(name, "")).replace("\n", "&#10;").replace("\t", "&#9;")
    return value.replace(quote, "&quot;" if quote == '"' else "&apos;")


def _escaped(text: str) -> str:
    """Character data. A carriage return would be read as a line feed."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\r", "&#13;")
