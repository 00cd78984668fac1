"""XBZRLE: a page as its difference to what the receiver holds (migration/xbzrle.c).

    (ULEB128 bytes to skip, ULEB128 bytes that changed, those bytes)*          the rest of the page is as it was

The changed bytes are the new ones, not an XOR. Both numbers take one or two bytes (at most 0x3FFF). Only the first
skip can be 0, and no stretch of changed bytes is empty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.wire import TARGET_PAGE_BYTES

#: the largest number that two bytes of ULEB128 hold
LONGEST = 0x3FFF


def decode_xbzrle(encoded: bytes | memoryview, page: bytes | bytearray | memoryview) -> bytes:
    """The new page. `page` is what the receiver held before. Raises RemoteProtocolError on any broken rule."""
    fresh = bytearray(page)
    for at, content in _changes(encoded, len(fresh)):
        fresh[at : at + len(content)] = content
    return bytes(fresh)


def apply_xbzrle(encoded: bytes | memoryview, page: memoryview) -> int:
    """The same in place, all or nothing; how many bytes were written. Raises RemoteProtocolError."""
    changes = _changes(encoded, len(page))
    for at, content in changes:
        page[at : at + len(content)] = content
    return sum(len(content) for _, content in changes)


def encode_xbzrle(
    old: bytes | memoryview, new: bytes | memoryview, *, longest: int = TARGET_PAGE_BYTES
) -> bytes | None:
    """What `decode_xbzrle` makes `new` of, exactly as QEMU writes it; None when that takes more than `longest` bytes.

    b"" when nothing changed (QEMU then sends nothing at all). Raises LocalProtocolError when the sizes differ.
    """
    if len(old) != len(new) or not len(new) <= LONGEST:
        raise LocalProtocolError(f"XBZRLE of pages of {len(old)} and {len(new)} bytes")
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    out = bytearray()
    place = 0
    for start, stop in _stretches(before != after):
        out += _uleb128(start - place) + _uleb128(stop - start)
        if len(out) + stop - start > longest:
            return None
        out += after[start:stop].tobytes()
        place = stop
    return bytes(out)


def _changes(encoded: bytes | memoryview, page_bytes: int) -> list[tuple[int, memoryview]]:
    """(place in the page, its new bytes) of a whole encoding, all checked."""
    view = memoryview(encoded)
    if len(view) > page_bytes:
        raise RemoteProtocolError(f"XBZRLE of {len(view)} bytes for a page of {page_bytes}")
    found = []
    at = place = 0
    while at < len(view):
        skip, used = _pull(view, at)
        if not skip and at:
            raise RemoteProtocolError(f"XBZRLE skips nothing at byte {at}")
        at += used
        count, used = _pull(view, at)
        if not count:
            raise RemoteProtocolError(f"XBZRLE changes nothing at byte {at}")
        at += used
        place += skip
        if count > len(view) - at:
            raise RemoteProtocolError(f"XBZRLE ends inside {count} changed bytes, {len(view) - at} are there")
        if place + count > page_bytes:
            raise RemoteProtocolError(f"XBZRLE runs to {place + count}, past the page's end at {page_bytes}")
        found.append((place, view[at : at + count]))
        at += count
        place += count
    return found


def _pull(view: memoryview, at: int) -> tuple[int, int]:
    """One number and how many bytes it took (uleb128_decode_small)."""
    if at >= len(view):
        raise RemoteProtocolError("XBZRLE ends where a number should be")
    if view[at] < 0x80:
        return view[at], 1
    if at + 1 >= len(view) or view[at + 1] >= 0x80:
        raise RemoteProtocolError(f"an XBZRLE number of more than two bytes at byte {at}")
    return view[at] & 0x7F | view[at + 1] << 7, 2


def _uleb128(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80, number >> 7])


def _stretches(changed: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of changed bytes."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], changed, [False]))))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
