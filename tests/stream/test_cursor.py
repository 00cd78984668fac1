"""A place in bytes that arrive in pieces."""

from __future__ import annotations

import pytest

from virtmig.errors import RemoteProtocolError
from virtmig.stream.cursor import _COMPACT_BYTES, Cursor, NeedData


def cursor(data: bytes, origin: int = 0) -> Cursor:
    made = Cursor("test", origin)
    made.feed(data)
    return made


def test_numbers_are_big_endian() -> None:
    here = cursor(bytes(range(1, 16)))
    assert (here.pull_u8(), here.pull_u16(), here.pull_u32()) == (1, 0x0203, 0x04050607)
    assert here.pull_u64() == 0x08090A0B0C0D0E0F
    assert (here.offset, here.available) == (15, 0)


def test_an_element_is_whole_or_not_begun() -> None:
    here = cursor(b"\x00\x01\x05he")

    def element() -> tuple[int, str]:
        with here.element():
            return here.pull_u16(), here.pull_string()

    with pytest.raises(NeedData) as short:
        element()
    assert (short.value.missing, here.offset) == (3, 0)
    here.feed(b"llo!")
    assert element() == (1, "hello")
    assert here.offset == 8


@pytest.mark.parametrize("pull", ["pull_u8", "pull_u16", "pull_u32", "pull_u64", "pull_string"])
def test_nothing_is_taken_when_it_is_not_here(pull: str) -> None:
    here = cursor(b"")
    with pytest.raises(NeedData):
        getattr(here, pull)()
    assert here.offset == 0


def test_a_peers_length_is_bounded_before_anything_is_awaited() -> None:
    here = cursor(b"")
    with pytest.raises(RemoteProtocolError, match="a thing of 4294967295 bytes, at most 10") as broken:
        here.pull_bytes(0xFFFFFFFF, 10, "a thing")
    assert (broken.value.channel, broken.value.offset) == ("test", 0)


def test_a_name_is_ascii() -> None:
    with pytest.raises(RemoteProtocolError, match="not ASCII"):
        cursor(b"\x02\xc3\xa9").pull_string()


def test_looking_ahead_moves_nothing() -> None:
    here = cursor(b"abcdebc", origin=100)
    assert (here.peek_u8(), here.peek_u8(2)) == (ord("a"), ord("c"))
    with here.peek_view(3) as view:
        assert bytes(view) == b"abc"
    here.skip(1)
    assert (here.find(b"bc"), here.find(b"bc", 1), here.find(b"x")) == (0, 4, -1)
    buffer, at = here.window()
    assert bytes(buffer[at:]) == b"bcdebc"
    assert here.offset == 101


def test_offsets_stay_true_when_bytes_are_dropped() -> None:
    here = Cursor()
    piece = bytes(_COMPACT_BYTES // 2 + 1)
    for number in range(1, 8):
        here.feed(piece + b"\x07")
        here.skip(len(piece))
        assert here.pull_u8() == 7
        assert here.offset == number * (len(piece) + 1)
    assert len(here.window()[0]) <= 2 * _COMPACT_BYTES
