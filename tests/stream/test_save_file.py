"""libvirt's header of a save file: a real one, both byte orders, cut and broken."""

from __future__ import annotations

import lzma
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.stream.cursor import Cursor, NeedData
from virtmig.stream.save_file import (
    HEADER_BYTES,
    SaveFormat,
    SaveHeader,
    decode_save_header,
    encode_save_header,
    is_save_file,
    read_save_header,
)

REAL = lzma.decompress((Path(__file__).parent / "captures" / "save-file-head-libvirt-9.0.xz").read_bytes())
SMALL = SaveHeader(b"<domain/>\0<cookie/>\0" + bytes(30), 1, SaveFormat.ZSTD, 10)


def test_a_real_file() -> None:
    header = read_save_header(REAL)
    assert (header.version, header.was_running, header.format_name, header.byte_order) == (2, 1, "raw", "little")
    assert header.is_complete
    assert header.xml.startswith("<domain type='qemu'>\n  <name>guest</name>")
    assert header.xml.endswith("</domain>\n")
    assert header.cookie.startswith("<cookie>\n  <cpu")
    assert REAL[header.stream_offset :][:4] == b"QEVM"
    assert encode_save_header(header) == REAL[: header.stream_offset]


@pytest.mark.parametrize(
    "header",
    [
        SMALL,
        replace(SMALL, byte_order="big"),
        replace(SMALL, is_complete=False),
        replace(SMALL, version=1, cookie_offset=0),
        replace(SMALL, format=99, unused=bytes(range(56))),
    ],
)
def test_both_ways(header: SaveHeader) -> None:
    raw = encode_save_header(header)
    assert is_save_file(raw)
    found = read_save_header(raw + b"QEVM")
    assert found == header
    assert found.stream_offset == len(raw)
    assert (found.xml, found.cookie) == ("<domain/>", "<cookie/>" if header.cookie_offset else "")
    assert found.format_name == ("unknown (99)" if header.format == 99 else "zstd")


def test_cut_at_every_byte() -> None:
    raw = encode_save_header(SMALL)
    cursor = Cursor()
    for at in range(len(raw)):
        with pytest.raises(RemoteProtocolError, match="ends inside"):
            read_save_header(raw[:at])
        with pytest.raises(NeedData):
            decode_save_header(cursor)
        cursor.feed(raw[at : at + 1])
    assert decode_save_header(cursor) == SMALL
    assert cursor.offset == len(raw)


def with_number(at: int, value: int) -> bytes:
    raw = bytearray(encode_save_header(SMALL))
    raw[at : at + 4] = struct.pack("<I", value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"LibvirtQemudSafe" + bytes(100), "not a file of virsh save"),
        (with_number(16, 0), "version"),
        (with_number(16, 3), "version"),
        (with_number(20, 0), "without a domain XML"),
        (with_number(20, 0xFFFFFFFF), "of 4294967295 bytes, at most"),
        (with_number(32, 5), "inside or behind the XML"),
        (with_number(32, 4000), "inside or behind the XML"),
        (encode_save_header(SMALL)[:HEADER_BYTES] + b"\xff" * 50, "inside or behind"),
        (encode_save_header(replace(SMALL, data=b"\xff\xfe\0", cookie_offset=0)), "not UTF-8"),
    ],
)
def test_broken(raw: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        read_save_header(raw)


def test_what_libvirt_would_not_read_is_not_written() -> None:
    with pytest.raises(LocalProtocolError, match="ends with a NUL"):
        encode_save_header(replace(SMALL, data=b"<domain/>"))
    with pytest.raises(LocalProtocolError, match="a cookie at"):
        encode_save_header(replace(SMALL, cookie_offset=51))
