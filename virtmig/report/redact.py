"""A record for a bug report: without names, addresses and paths that say whose it is, and still a record."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any

import msgspec

from virtmig.report.records import Began, Record, Row, encode_row

#: fields whose value is a name, whatever it looks like
_NAMES = frozenset({"domain", "dname", "name", "hostname", "source", "destination", "peer", "uri", "desturi"})
_URI_OPTIONS = ("desturi", "migrateuri", "listen-address", "dname", "graphicsuri", "disks-uri", "destination-agent")

_QUOTED_PATH = re.compile(r"""(['"])/(?:(?!\1).)+\1""")
_PATH = re.compile(r"""(?<![\w/:])/[^\s'",;:<>()/]+(?:/[^\s'",;:<>()]*)+""")
_URI_HOST = re.compile(r"""(?<=://)[^/\s?#'",;]+""")
_MAC = re.compile(r"\b(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b", re.IGNORECASE)
_UUID = re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.IGNORECASE)
_IPV4 = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-f]*:[0-9a-f:]*:[0-9a-f:.]*(?:%\w+)?", re.IGNORECASE)
_FULL_NAME = re.compile(r"\b[a-z0-9_-]+(?:\.[a-z0-9_-]+)+\.[a-z]{2,}\b", re.IGNORECASE)


def redacted(record: Record) -> list[bytes]:
    """Its lines. Words of the format stay, whatever the guest is called; keys stay always."""
    names: dict[str, str] = {}
    for value, word in _tell_tales(record.began):
        if value:
            names.setdefault(value, word)
    # whole words only, the longest first: a guest called "a" is not in every sentence twice
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest_first)) if names else None

    def hidden(text: str) -> str:
        if pattern is not None:
            text = pattern.sub(lambda match: names[match[0]], text)
        text = "/PATH" if text.startswith("/") and len(text) > 1 else text
        text = _QUOTED_PATH.sub(r"\1/PATH\1", text)
        text = _PATH.sub("/PATH", _URI_HOST.sub("HOST", text))
        text = _UUID.sub("UUID", _MAC.sub("MAC", text))
        text = _IPV6.sub(_address, _IPV4.sub("ADDRESS", text))
        return _FULL_NAME.sub("HOST", text)

    def walk(value: Any, key: str = "") -> Any:
        match value:
            case str():
                return value if value in format_words() and key not in _NAMES else hidden(value)
            case Mapping():
                return {name: walk(each, str(name)) for name, each in value.items()}
            case list() | tuple():
                return [walk(each, key) for each in value]
        return value

    lines = []
    for row in (record.began, *record.rows):
        content = msgspec.json.decode(encode_row(row))
        row_tag = content.pop("row")
        lines.append(msgspec.json.encode({"row": row_tag, **walk(content)}) + b"\n")
    return lines


def _address(match: re.Match[str]) -> str:
    try:
        ipaddress.IPv6Address(match[0].rstrip(":.") if not match[0].endswith("::") else match[0])
    except ValueError:
        return match[0]
    return "ADDRESS"


def _tell_tales(began: Began) -> Iterator[tuple[str, str]]:
    yield began.domain, "GUEST"
    for facts, word in ((began.source_facts, "SOURCE"), (began.destination_facts, "DESTINATION")):
        if facts is not None:
            for value in (facts.hostname, facts.host_uuid or "", facts.uri):
                yield value, word
            for domain in facts.domains or ():
                yield domain.name, "OTHER-GUEST"
    yield began.source, "SOURCE"
    yield began.destination, "DESTINATION"
    for name in _URI_OPTIONS:
        yield str(began.request.get(name) or ""), name.upper()


@cache
def format_words() -> frozenset[str]:
    """Every tag, literal and enumeration value that a row may hold."""
    found: set[str] = set()
    seen: set[type] = set()

    def visit(kind: Any) -> None:
        match kind:
            case msgspec.inspect.StructType():
                if isinstance(kind.tag, str):
                    found.add(kind.tag)
                if kind.cls not in seen:
                    seen.add(kind.cls)
                    for field in kind.fields:
                        visit(field.type)
            case msgspec.inspect.LiteralType():
                found.update(value for value in kind.values if isinstance(value, str))
            case msgspec.inspect.EnumType():
                members: Iterator[Enum] = iter(kind.cls)
                found.update(str(member.value) for member in members)
            case msgspec.inspect.UnionType():
                for each in kind.types:
                    visit(each)
            case msgspec.inspect.DictType():
                visit(kind.value_type)
            case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType() | msgspec.inspect.SetType():
                visit(kind.item_type)
            case msgspec.inspect.TupleType():
                for each in kind.item_types:
                    visit(each)

    visit(msgspec.inspect.type_info(Row))
    return frozenset(found)
