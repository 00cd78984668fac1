"""Where the data of a device's section ends, and what is in it.

The stream carries no length for it. While it streams, the end is a footer with the section's id that is followed by
something that can follow a footer (`find_end`). The JSON description, when it has come or was read ahead from a file,
says it exactly (`described_sizes`), and names the fields (`walk`; QEMU's scripts/analyze-migration.py). Streams of
machine types up to 2.3 have no footers: the description alone cuts them (`split_tail`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from virtmig.errors import RemoteProtocolError
from virtmig.stream.cursor import Cursor
from virtmig.stream.events import DeviceSection
from virtmig.stream.wire import COMMAND_LENGTH, Command, Item

#: the most bytes that must be looked at behind a footer to tell: a section's head with the longest name
LONGEST_NEXT = 1 + 4 + 1 + 255 + 4 + 4
FOOTER_BYTES = 5
#: a description of a guest with hundreds of devices has one; as Python's objects it takes twenty times as much
DESCRIPTION_PARSED_BYTES = 4 << 20
_DEEPEST = 32

_NAME = re.compile(rb"[!-~ ]+")
_LAST_COMMAND = max(Command)
_DESCRIPTION = re.compile(rb'\x00\x06(.{4})\{"', re.DOTALL)

Sizes = dict[tuple[str, int], list[int]]


def find_end(
    cursor: Cursor, section_id: int, searched: int, *, sections: Collection[int], ends_open: bool, nested: bool
) -> tuple[bool, int]:
    """Look for the footer of `section_id` from `searched` bytes ahead of the cursor on.

    (True, length of the section's data), or (False, where to go on when more has come). `sections` are the ids that a
    PART or END may have. `ends_open`: an EOF with nothing behind it is enough, since no description will come.
    `nested`: inside a package, where nothing may follow the last footer and no EOF can.
    """
    footer = bytes([Item.SECTION_FOOTER]) + section_id.to_bytes(4, "big")
    at = cursor.find(footer, searched)
    while at >= 0:
        buffer, start = cursor.window()
        behind = bytes(buffer[start + at + FOOTER_BYTES : start + at + FOOTER_BYTES + LONGEST_NEXT])
        ended = cursor.ended and at + FOOTER_BYTES + len(behind) == cursor.available
        verdict = may_follow(behind, ended=ended, nested=nested, ends_open=ends_open, sections=sections)
        if verdict is None:
            return False, at
        if verdict:
            return True, at
        at = cursor.find(footer, at + 1)
    return False, max(0, cursor.available - FOOTER_BYTES + 1)


def may_follow(
    behind: bytes,
    *,
    ended: bool = False,
    nested: bool = False,
    ends_open: bool = False,
    sections: Collection[int] | None = None,
) -> bool | None:
    """Whether these bytes can stand behind a footer; None when there are too few of them to tell."""
    if not behind:
        return True if ended else None
    kind, few = behind[0], False if ended else None
    if kind == Item.EOF and not nested:
        if len(behind) == 1:
            return True if ended or ends_open else None
        if behind[1] != Item.VMDESCRIPTION:
            return False
        # a description that is cut off is still one: the stream is over when it begins
        return behind[6] == ord("{") if len(behind) >= 7 else (ended or None)
    if kind == Item.COMMAND:
        if len(behind) < 5:
            return few
        number, length = int.from_bytes(behind[1:3], "big"), int.from_bytes(behind[3:5], "big")
        return 0 < number <= _LAST_COMMAND and COMMAND_LENGTH.get(Command(number), length) == length
    if kind in (Item.SECTION_PART, Item.SECTION_END):
        if len(behind) < 5:
            return few
        return sections is None or int.from_bytes(behind[1:5], "big") in sections
    if kind in (Item.SECTION_START, Item.SECTION_FULL):
        if len(behind) < 6:
            return few
        length = behind[5]
        name = behind[6 : 6 + length]
        if length == 0 or (name and not _NAME.fullmatch(name)):
            return False
        if len(behind) < 6 + length + 8:
            return few
        return int.from_bytes(behind[6 + length + 4 : 6 + length + 8], "big") < 1 << 16
    return False


# -- the description -------------------------------------------------------------------------------------------------


def read_description(text: bytes) -> dict[str, Any]:
    """The JSON description. Raises RemoteProtocolError."""
    if len(text) > DESCRIPTION_PARSED_BYTES:
        raise RemoteProtocolError(f"a JSON description of {len(text)} bytes, only {DESCRIPTION_PARSED_BYTES} are read")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"the JSON description cannot be read: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("devices"), list):
        raise RemoteProtocolError("the JSON description has no list of devices")
    return value


def find_description(tail: bytes) -> tuple[int, dict[str, Any]] | None:
    """Where the EOF stands in the end of a whole stream, and the description behind it; None without one.

    For files: it can be read first, so that every section's end is known before the section is read.
    """
    for found in _DESCRIPTION.finditer(tail):
        if found.start() + 6 + int.from_bytes(found[1], "big") == len(tail):
            try:
                return found.start(), read_description(tail[found.start() + 6 :])
            except RemoteProtocolError:
                continue
    return None


def described_sizes(description: dict[str, Any]) -> Sizes:
    """(name, instance) -> bytes of data of its sections, in order. Raises RemoteProtocolError."""
    sizes: Sizes = {}
    for device in description["devices"]:
        if not isinstance(device, dict):
            raise RemoteProtocolError(f"a device that is no object in the description: {device!r:.40}")
        name, instance = device.get("name"), device.get("instance_id")
        if not isinstance(name, str) or not isinstance(instance, int):
            raise RemoteProtocolError(f"a device without name and instance in the description: {name!r:.40}")
        sizes.setdefault((name, instance), []).append(_size(device, name, 0))
    return sizes


def _size(part: dict[str, Any], name: str, depth: int) -> int:
    total = 0
    for label, field, repeat in _fields(part, name, depth):
        inner = field.get("struct")
        total += repeat * (_size(inner, label, depth + 1) if isinstance(inner, dict) else _bytes_of(field, label))
    for label, sub in _subsections(part, name):
        total += 2 + len(label) + 4 + _size(sub, label, depth + 1)
    return total


def walk(device: dict[str, Any], data: bytes) -> Iterator[tuple[str, bytes]]:
    """Fields of one device by name, in order: ("name", bytes), ("outer.inner[3]", bytes).

    `device` is one entry of the JSON's "devices". Raises RemoteProtocolError where the data does not fit it.
    """
    used = 0
    # a field of no bytes in nested arrays could be repeated for ever
    steps = 4 * len(data) + 65536

    def take(size: int, name: str) -> bytes:
        nonlocal used
        if used + size > len(data):
            raise RemoteProtocolError(f"the description's field {name} of {size} bytes lies outside of the section")
        used += size
        return data[used - size : used]

    def struct(part: dict[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, bytes]]:
        nonlocal steps
        for name, field, repeat in _fields(part, prefix, depth):
            inner = field.get("struct")
            for number in range(repeat):
                steps -= 1
                if steps < 0:
                    raise RemoteProtocolError(f"the description's field {name} is repeated too often")
                label = prefix + name
                if repeat > 1 or "index" in field:
                    label += f"[{field.get('index', number)}]"
                if isinstance(inner, dict):
                    yield from struct(inner, label + ".", depth + 1)
                else:
                    yield label, take(_bytes_of(field, label), label)
        for name, sub in _subsections(part, prefix):
            head = take(2 + len(name) + 4, f"{prefix}subsection {name}")
            if head[0] != Item.SUBSECTION or head[1] != len(name) or head[2:-4] != name.encode("ascii", "replace"):
                raise RemoteProtocolError(f"the description's subsection {name} is not in the section")
            yield from struct(sub, f"{prefix}{name}.", depth + 1)

    yield from struct(device, "", 0)
    if used != len(data):
        raise RemoteProtocolError(f"the description covers {used} bytes of {len(data)}")


def _fields(part: dict[str, Any], where: str, depth: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, field, how often it is there)."""
    if depth > _DEEPEST:
        raise RemoteProtocolError(f"the description is nested deeper than {_DEEPEST} levels")
    fields = part.get("fields", ())
    if not isinstance(fields, list | tuple) or not all(isinstance(field, dict) for field in fields):
        raise RemoteProtocolError(f"the description's fields of {where} are no list of objects")
    for field in fields:
        repeat = field.get("array_len", 1)
        if not isinstance(repeat, int) or not 0 <= repeat < 1 << 32:
            raise RemoteProtocolError(f"the description's fields of {where}: one is repeated {repeat!r:.40} times")
        yield str(field.get("name", "?")), field, repeat


def _subsections(part: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    subsections = part.get("subsections", ())
    if not isinstance(subsections, list | tuple) or not all(isinstance(sub, dict) for sub in subsections):
        raise RemoteProtocolError(f"the description's subsections of {where} are no list of objects")
    for sub in subsections:
        yield str(sub.get("vmsd_name", "?")), sub


def _bytes_of(field: dict[str, Any], name: str) -> int:
    size = field.get("size")
    if not isinstance(size, int) or not 0 <= size < 1 << 32:
        raise RemoteProtocolError(f"the description's field {name} has the size {size!r:.40}")
    return size


# -- streams without footers -----------------------------------------------------------------------------------------


def split_tail(tail: bytes, description: dict[str, Any], begins_at: int) -> list[DeviceSection]:
    """The FULL sections that fill `tail`, cut by the description; `begins_at` is the offset of the first.

    Raises RemoteProtocolError when they do not fit together.
    """
    sizes = described_sizes(description)
    found, at = [], 0
    while at < len(tail):
        name_end = at + 6 + (tail[at + 5] if at + 5 < len(tail) else 0)
        data_at = name_end + 8
        name = tail[at + 6 : name_end].decode("ascii", "replace")
        instance = int.from_bytes(tail[name_end : name_end + 4], "big")
        left = sizes.get((name, instance))
        if tail[at] != Item.SECTION_FULL or not left or data_at + left[0] > len(tail):
            raise RemoteProtocolError("the description does not fit the sections", offset=begins_at + at)
        end = data_at + left.pop(0)
        found.append(
            DeviceSection(
                Item.SECTION_FULL,
                int.from_bytes(tail[at + 1 : at + 5], "big"),
                name,
                instance,
                int.from_bytes(tail[name_end + 4 : data_at], "big"),
                tail[data_at:end],
                begins_at + at,
            )
        )
        at = end
    return found
