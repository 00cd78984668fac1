"""A second opinion on QEMU's stream: a slow reader of whole recordings, written apart from virtmig.stream.

It takes a recording that is complete and known to be good, keeps everything in memory, and trusts every length. Where a
device section ends is found by its footer. Used to check that recordings are sound, and to hold the decoders against.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

PAGE_BYTES = 4096
_ZERO = bytes(PAGE_BYTES)
#: what may follow a device section's footer: the end (and the description), the next device, a command
_NEXT_ITEM = rb"(?=\x00(?:\x06|\Z)|\x04\x00\x00..[\x01-\x7f][ -~]{2}|\x08\x00[\x01-\x0b]\x00)"


@dataclass
class Seen:
    """What a migration's channels said, up to where they end."""

    machine: str = ""
    blocks: dict[str, int] = field(default_factory=dict)
    commands: list[tuple[int, bytes]] = field(default_factory=list)
    sections: list[tuple[str, int]] = field(default_factory=list)
    pages: dict[str, dict[int, bytes]] = field(default_factory=dict)  # those that are not zero
    counts: Counter[str] = field(default_factory=Counter)  # normal, zero, xbzrle, compressed
    eof: bool = False
    description: bytes = b""

    def place(self, block: str, offset: int, page: bytes) -> None:
        pages = self.pages.setdefault(block, {})
        if page == _ZERO:
            pages.pop(offset // PAGE_BYTES, None)
        else:
            pages[offset // PAGE_BYTES] = page


class _Ended(Exception):
    """The bytes ended inside an element."""


class ReferenceReader:
    """Reads one channel that carries RAM records: main, or preempt. `marker` is called at each EOS and each flush word.

    `seen` may be shared by the channels of a migration.
    """

    def __init__(
        self, data: bytes, seen: Seen, *, gpa: bool = False, marker: Callable[[str], None] | None = None
    ) -> None:
        self.data, self.seen, self.at, self.gpa = data, seen, 0, gpa
        self.marker = marker or (lambda kind: None)
        self.block = ""
        self.ram_ids: set[int] = set()

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise _Ended
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        value: int = struct.unpack(f">{form}", self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        return self.take(self.number("B")).decode("ascii")

    def read_main(self) -> None:
        """From the file header, or from a command (a recovery), to the end or to where the recording was cut."""
        try:
            if self.data.startswith(b"QEVM"):
                self.take(8)
                assert self.number("B") == 7
                self.seen.machine = self.take(self.number("I")).decode("ascii")
                while self.data[self.at] == 5:
                    self.take(1)
                    name = self.string()
                    self.take(4)
                    assert name == "configuration/capabilities", name
                    for _ in range(self.number("I")):
                        self.string()
            self._items()
        except _Ended:
            self.seen.counts["cut"] += 1

    def read_preempt(self) -> None:
        """Records to the end, with or without the last EOS."""
        try:
            while self.at < len(self.data):
                self._record()
        except _Ended:
            self.seen.counts["cut"] += 1

    def _items(self) -> None:
        while self.at < len(self.data):
            kind = self.number("B")
            if kind in (1, 4):
                number, name, instance = self.number("I"), self.string(), self.number("I")
                self.take(4)
                if name == "ram":
                    self.ram_ids.add(number)
                    self._records()
                else:
                    self.seen.sections.append((name, instance))
                    footer = re.compile(re.escape(b"\x7e" + struct.pack(">I", number)) + _NEXT_ITEM, re.DOTALL)
                    found = footer.search(self.data, self.at)
                    assert found is not None, name
                    self.at = found.start()
                self._footer(number)
            elif kind in (2, 3):
                number = self.number("I")
                assert number in self.ram_ids or self.data[self.at] == 0, f"section {number}"
                self._records()
                self._footer(number)
            elif kind == 8:
                self._command(self.number("H"), self.take(self.number("H")))
            elif kind == 0:
                self.seen.eof = True
            else:
                assert kind == 6, f"item {kind} at {self.at - 1}"
                self.seen.description = self.take(self.number("I"))

    def _footer(self, number: int) -> None:
        assert self.take(5) == b"\x7e" + struct.pack(">I", number)

    def _command(self, number: int, payload: bytes) -> None:
        self.seen.commands.append((number, payload))
        if number == 7:
            nested = ReferenceReader(self.take(struct.unpack(">I", payload)[0]), self.seen)
            nested.ram_ids = self.ram_ids
            nested._items()
        elif number == 6:
            length = payload[1]
            block = payload[2 : 2 + length].decode("ascii")
            for start, size in struct.iter_unpack(">QQ", payload[3 + length :]):
                for page in range(start // PAGE_BYTES, (start + size) // PAGE_BYTES):
                    self.seen.pages.get(block, {}).pop(page, None)

    def _records(self) -> None:
        while self._record():
            pass

    def _record(self) -> bool:
        begin = self.at
        word = self.number("Q")
        flags, offset = word & (PAGE_BYTES - 1), word & ~(PAGE_BYTES - 1)
        if flags == 4:
            self._block_list(offset)
            return True
        if flags in (0x10, 0x200):
            self.marker("eos" if flags == 0x10 else "flush")
            return flags != 0x10
        if not flags & 0x20:
            self.block = self.string()
        kind = flags & ~0x20
        if kind == 2:
            assert self.take(1) == b"\0"
            page, name = _ZERO, "zero"
        elif kind == 8:
            page, name = self.take(PAGE_BYTES), "normal"
        elif kind == 0x40:
            assert self.take(1) == b"\x01"
            old = self.seen.pages.get(self.block, {}).get(offset // PAGE_BYTES, _ZERO)
            page, name = apply_xbzrle(old, self.take(self.number("H"))), "xbzrle"
            self.seen.counts["xbzrle_bytes"] += self.at - begin - 8  # as xbzrle_counters.bytes has it
        else:
            assert kind == 0x100, hex(flags)
            page, name = zlib.decompress(self.take(self.number("I"))), "compressed"
        self.seen.counts[name] += 1
        self.seen.place(self.block, offset, page)
        return True

    def _block_list(self, total: int) -> None:
        while total > 0:
            name, length = self.string(), self.number("Q")
            self.seen.blocks[name] = length
            total -= length
            if self.gpa:
                self.take(8)


def apply_xbzrle(old: bytes, encoded: bytes) -> bytes:
    """The page that `encoded` makes of `old`: runs to skip and runs of new bytes, in turn."""
    page, at, place = bytearray(old), 0, 0

    def length() -> int:
        nonlocal at
        value = encoded[at] & 0x7F
        at += 1
        if encoded[at - 1] & 0x80:
            value |= encoded[at] << 7
            at += 1
        return value

    while at < len(encoded):
        place += length()
        count = length()
        page[place : place + count] = encoded[at : at + count]
        at += count
        place += count
    return bytes(page)
