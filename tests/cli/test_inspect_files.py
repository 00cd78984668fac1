"""What inspected bytes come from: looked at, unpacked in bounded pieces, recognised by their beginning."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from typing import Any

import pytest

from virtmig.cli.inspect_files import PIECE_BYTES, BrokenSource, Source, inflated, kind_of_start


def test_unpacking_is_bounded() -> None:
    bomb = lzma.compress(bytes(64 << 20))
    pieces = inflated(Source("x", io.BytesIO(bomb)), "xz").pieces()
    sizes = [len(piece) for piece in pieces]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= PIECE_BYTES


def test_a_source_can_be_looked_at_without_taking() -> None:
    source = Source("x", None, iter([b"ab", b"cd", b"ef"]))
    assert source.head(3) == b"abc"
    assert (source.offset, b"".join(source.pieces()), source.offset) == (0, b"abcdef", 6)
    assert (source.tail(9), source.read_again(0, 9)) == (b"", None)


@pytest.mark.parametrize("packing", [lzma, gzip, bz2])
def test_several_packed_parts_and_padding_are_one(packing: Any) -> None:
    raw = packing.compress(b"first") + bytes(8) + packing.compress(b"second") + bytes(4)
    kind = kind_of_start(raw)
    assert b"".join(inflated(Source("x", io.BytesIO(raw)), kind).pieces()) == b"firstsecond"


def test_what_was_unpacked_before_a_cut_is_given_out() -> None:
    raw = gzip.compress(bytes(3 << 20))
    found: list[bytes] = []
    with pytest.raises(BrokenSource, match="the gzip data is cut off") as caught:
        found.extend(inflated(Source("x", io.BytesIO(raw[:-8])), "gzip").pieces())
    assert (sum(map(len, found)), caught.value.offset) == (3 << 20, len(raw) - 8)


def test_reading_that_fails_is_told_with_its_offset() -> None:
    class Failing(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read(3)

    source = Source("x", Failing(b"abcdef"))
    pieces = source.pieces()
    assert next(pieces) == b"abc"
    with pytest.raises(BrokenSource, match="it cannot be read: Input/output error") as caught:
        next(pieces)
    assert caught.value.offset == 3


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"QEVM\0\0\0\3", "main"),
        (b"\x11\x22\x33\x44\0\0\0\1", "multifd"),
        (b"\x08\x00\x0a\x00\x07\x06pc.ram", "resumed"),
        (b"\0\2\0\4\0\0\0\1", "return path"),
        (b"\0\2\7\4\0\0\0\1", ""),
        (b"\0\0\0\0\0\0\x10\x08\x06pc.ram", "preempt"),
        (b"\0\0\0\0\0\0\x10\x28", ""),
        (b"LibvirtQemudPart", "save"),
        (b"", ""),
    ],
)
def test_first_bytes(head: bytes, kind: str) -> None:
    assert kind_of_start(head) == kind
