"""XBZRLE: example of a real QEMU, round trips, and everything a peer can get wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.xbzrle import apply_xbzrle, decode_xbzrle, encode_xbzrle

PAGE = 4096
OLD = bytes(range(256)) * 16


def changed(*changes: tuple[int, bytes]) -> bytes:
    page = bytearray(OLD)
    for at, content in changes:
        page[at : at + len(content)] = content
    return bytes(page)


def test_as_recorded_from_qemu() -> None:
    # from a 7.2 stream: skip 0x46C, one byte, 0x3c
    assert decode_xbzrle(bytes.fromhex("ec08013c"), OLD) == changed((0x46C, b"\x3c"))
    assert encode_xbzrle(OLD, changed((0x46C, b"\x3c"))) == bytes.fromhex("ec08013c")


@pytest.mark.parametrize(
    ("new", "encoded"),
    [
        (OLD, b""),
        (changed((0, b"\xff")), b"\x00\x01\xff"),
        (changed((PAGE - 1, b"\x00")), b"\xff\x1f\x01\x00"),
        (changed((0, b"\xee" * 127)), b"\x00\x7f" + b"\xee" * 127),
        (changed((0, b"\xaa\xbb"), (5, b"\xcc")), b"\x00\x02\xaa\xbb\x03\x01\xcc"),
    ],
)
def test_both_ways(new: bytes, encoded: bytes) -> None:
    assert encode_xbzrle(OLD, new) == encoded
    assert decode_xbzrle(encoded, OLD) == new


def test_in_place() -> None:
    page = bytearray(OLD)
    assert apply_xbzrle(b"\x00\x02\xaa\xbb\x03\x01\xcc", memoryview(page)) == 3
    assert page == changed((0, b"\xaa\xbb"), (5, b"\xcc"))


def test_in_place_all_or_nothing() -> None:
    page = bytearray(OLD)
    with pytest.raises(RemoteProtocolError):
        apply_xbzrle(b"\x00\x02\xaa\xbb\x03\x05\xcc", memoryview(page))
    assert page == OLD


def test_what_does_not_get_shorter_is_not_encoded() -> None:
    other = bytes((byte + 1) & 0xFF for byte in OLD)
    assert encode_xbzrle(OLD, other) is None
    encoded = encode_xbzrle(OLD, other, longest=2 * PAGE)
    assert encoded is not None
    assert len(encoded) == PAGE + 3
    with pytest.raises(LocalProtocolError):
        encode_xbzrle(OLD, OLD[:-1])


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (b"\x05", "ends where a number should be"),
        (b"\x80", "more than two bytes"),
        (b"\x80\x80\x01", "more than two bytes"),
        (b"\x05\x00", "changes nothing"),
        (b"\x05\x01\xaa\x00\x01\xaa", "skips nothing"),
        (b"\x05\x03\xaa", "ends inside 3 changed bytes"),
        (b"\xff\x1f\x02\xaa\xbb", "past the page's end"),
        (b"\xff\x7f\x01\xaa", "past the page's end"),
        (b"\x00\x01" * 2049, "4098 bytes for a page"),
    ],
)
def test_broken(encoded: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        decode_xbzrle(encoded, OLD)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, PAGE - 1), st.binary(min_size=1, max_size=40)), max_size=12))
def test_round_trip(changes: list[tuple[int, bytes]]) -> None:
    new = changed(*changes)[:PAGE]
    encoded = encode_xbzrle(OLD, new)
    assert encoded is not None
    assert decode_xbzrle(encoded, OLD) == new


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_end_in_a_page_or_a_typed_error(encoded: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert len(decode_xbzrle(encoded, OLD)) == PAGE
