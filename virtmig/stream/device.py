"""Where the data of a device's section ends, and what is in it.

The stream carries no length for it. While it streams, the end is a footer with the section's id that is followed by
something that can follow a footer (`find_end`); when the JSON description has come, its fields say it exactly
(`walk`, scripts/analyze-migration.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from virtmig.errors import RemoteProtocolError
from virtmig.stream.wire import Item

#: the most bytes that must be looked at behind a footer to tell: a section's head with the longest name
LONGEST_NEXT = 1 + 4 + 1 + 255 + 4 + 4

_NEXT_SECTION = re.compile(rb"[\x01\x04].{4}(?P<length>.)(?P<rest>.*)", re.DOTALL)
_NAME = re.compile(rb"[!-~ ]+")
_NEXT_COMMAND = re.compile(rb"\x08\x00[\x01-\x0b]..", re.DOTALL)
_NEXT_DESCRIPTION = re.compile(rb"\x00\x06.{4}\{", re.DOTALL)


def find_end(data: bytes | memoryview, section_id: int, *, ended: bool, nested: bool) -> int | None:
    """Offset of the footer in `data`, the bytes behind a section's head; None when more bytes are needed.

    `ended`: no more bytes will come. `nested`: inside a package, where nothing may follow the last footer.
    """
    raw = bytes(data)
    footer = bytes([Item.SECTION_FOOTER]) + section_id.to_bytes(4, "big")
    at = raw.find(footer)
    while at >= 0:
        behind = raw[at + 5 : at + 5 + LONGEST_NEXT]
        verdict = may_follow(behind, ended=ended and at + 5 + len(behind) == len(raw), nested=nested)
        if verdict is None:
            return None
        if verdict:
            return at
        at = raw.find(footer, at + 1)
    return None


def may_follow(behind: bytes, *, ended: bool, nested: bool) -> bool | None:
    """Whether these bytes can stand behind a footer; None when there are too few of them to tell."""
    if not behind:
        return True if ended else None
    kind = behind[0]
    if kind == Item.EOF:
        if nested:
            return False
        if len(behind) == 1:
            return True if ended else None
        if behind[1] != Item.VMDESCRIPTION:
            return False
        return bool(_NEXT_DESCRIPTION.match(behind)) if len(behind) >= 7 else (ended or None)
    if kind == Item.COMMAND:
        if len(behind) < 5:
            return False if ended else None
        return bool(_NEXT_COMMAND.match(behind))
    if kind in (Item.SECTION_PART, Item.SECTION_END):
        return True if len(behind) >= 5 else (False if ended else None)
    if kind in (Item.SECTION_START, Item.SECTION_FULL):
        if len(behind) < 6:
            return False if ended else None
        length = behind[5]
        name = behind[6 : 6 + length]
        if length == 0 or (name and not _NAME.fullmatch(name)):
            return False
        if len(behind) < 6 + length + 8:
            return False if ended else None
        version = int.from_bytes(behind[6 + length + 4 : 6 + length + 8], "big")
        return version < 1 << 16
    return False


def walk(description: dict[str, Any], data: bytes) -> Iterator[tuple[str, bytes]]:
    """Fields of one device by name, in order: ("name", bytes), ("outer.inner[3]", bytes).

    `description` is one entry of the JSON's "devices". Raises RemoteProtocolError where the data does not fit it.
    """
    used = 0

    def take(size: object, name: str) -> bytes:
        nonlocal used
        if not isinstance(size, int) or size < 0 or used + size > len(data):
            raise RemoteProtocolError(f"the description's field {name} of {size} bytes lies outside of the section")
        used += size
        return data[used - size : used]

    def struct(part: dict[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, bytes]]:
        if depth > 32:
            raise RemoteProtocolError("the description is nested deeper than 32 levels")
        for field in part.get("fields", ()):
            name = prefix + str(field.get("name", "?"))
            repeat = field.get("array_len", 1)
            if not isinstance(repeat, int) or not 0 <= repeat <= len(data) + 1:
                raise RemoteProtocolError(f"the description's field {name} is repeated {repeat} times")
            for number in range(repeat):
                label = f"{name}[{field.get('index', number)}]" if repeat > 1 or "index" in field else name
                if "struct" in field:
                    yield from struct(field["struct"], label + ".", depth + 1)
                else:
                    yield label, take(field.get("size"), label)
        for sub in part.get("subsections", ()):
            name = str(sub.get("vmsd_name", "?"))
            head = take(2 + len(name) + 4, f"{prefix}subsection {name}")
            if head[0] != Item.SUBSECTION or head[2 : 2 + len(name)] != name.encode("ascii", "replace"):
                raise RemoteProtocolError(f"the description's subsection {name} is not in the section")
            yield from struct(sub, f"{prefix}{name}.", depth + 1)

    yield from struct(description, "", 0)
    if used != len(data):
        raise RemoteProtocolError(f"the description covers {used} bytes of {len(data)}")


def read_description(text: bytes) -> dict[str, Any]:
    """The JSON description. Raises RemoteProtocolError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"the JSON description cannot be read: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("devices"), list):
        raise RemoteProtocolError("the JSON description has no list of devices")
    return value
