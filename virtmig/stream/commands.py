"""Commands on the main stream, both ways, and the order they must come in (loadvm_process_command, savevm.c)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from virtmig.errors import LocalProtocolError
from virtmig.stream.cursor import Cursor
from virtmig.stream.events import Command
from virtmig.stream.lifecycle import POSTCOPY_INCOMING, PostcopyState
from virtmig.stream.wire import (
    COMMAND_LENGTH,
    MAX_DISCARDS_PER_COMMAND,
    POSTCOPY_RAM_DISCARD_VERSION,
    TARGET_PAGE_BYTES,
)
from virtmig.stream.wire import Command as Number
from virtmig.transitions import advance

_ADVISE_BYTES = 16
#: the commands that move a destination's postcopy on, by the names of lifecycle.POSTCOPY_INCOMING
_EVENT: dict[Number, str] = {
    Number.POSTCOPY_ADVISE: "advise",
    Number.POSTCOPY_RAM_DISCARD: "discard",
    Number.POSTCOPY_LISTEN: "listen",
    Number.POSTCOPY_RUN: "run",
}


def decode_command(cursor: Cursor, known: Mapping[str, int] | None) -> Command:
    """One command behind its item byte. `known` are the RAM blocks' lengths, None when they are not known.

    Raises NeedData, RemoteProtocolError. PACKAGED comes as a Command too; its bytes follow on the stream.
    """
    begin = cursor.offset - 1
    number, length = cursor.pull_u16(), cursor.pull_u16()
    try:
        command = Number(number)
    except ValueError:
        raise cursor.broken(f"an unknown command {number:#x} of {length} bytes", at=begin) from None
    expected = COMMAND_LENGTH.get(command)
    if command is Number.INVALID or (expected is not None and length != expected):
        raise cursor.broken(f"{command.name} of {length} bytes, {expected or 0} are expected", at=begin)
    if command is Number.POSTCOPY_ADVISE and length not in (0, _ADVISE_BYTES):
        raise cursor.broken(f"POSTCOPY_ADVISE of {length} bytes, 0 or {_ADVISE_BYTES} are expected", at=begin)
    payload = cursor.pull_bytes(length, 0xFFFF, command.name)
    match command:
        case Number.PING | Number.PACKAGED:
            return Command(number, payload, value=int.from_bytes(payload, "big"))
        case Number.POSTCOPY_ADVISE if payload:
            host, target = struct.unpack(">QQ", payload)
            if target != TARGET_PAGE_BYTES:
                raise cursor.broken(f"target pages of {target} bytes, {TARGET_PAGE_BYTES} are expected", at=begin)
            if not host or host % TARGET_PAGE_BYTES:
                raise cursor.broken(f"host page sizes {host:#x}", at=begin)
            return Command(number, payload, page_sizes=(host, target))
        case Number.RECV_BITMAP:
            if length < 2 or payload[0] != length - 1 or not payload[1:].isascii():
                raise cursor.broken("RECV_BITMAP whose name does not fill it", at=begin)
            name = payload[1:].decode()
            if known is not None and name not in known:
                raise cursor.broken(f"RECV_BITMAP of an unknown RAM block '{name}'", at=begin)
            return Command(number, payload, name=name)
        case Number.POSTCOPY_RAM_DISCARD:
            return _discard(cursor, number, payload, known, begin)
    return Command(number, payload)


def _discard(cursor: Cursor, number: int, payload: bytes, known: Mapping[str, int] | None, begin: int) -> Command:
    name_length = payload[1] if len(payload) > 1 else 0
    head = 3 + name_length
    if (
        not name_length
        or len(payload) < head + 16
        or payload[0] != POSTCOPY_RAM_DISCARD_VERSION
        or payload[head - 1] != 0
        or (len(payload) - head) % 16
        or not payload[2 : head - 1].isascii()
    ):
        raise cursor.broken("a malformed POSTCOPY_RAM_DISCARD", at=begin)
    name = payload[2 : head - 1].decode()
    if known is not None and name not in known:
        raise cursor.broken(f"a discard of an unknown RAM block '{name}'", at=begin)
    numbers = struct.unpack(f">{(len(payload) - head) // 8}Q", payload[head:])
    pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    for start, length in pairs:
        outside = known is not None and start + length > known[name]
        if start % TARGET_PAGE_BYTES or length % TARGET_PAGE_BYTES or not length or outside:
            raise cursor.broken(f"a discard of {start:#x}+{length:#x} outside of '{name}' or unaligned", at=begin)
    return Command(number, payload, name=name, ranges=pairs)


class Order:
    """What a command may follow. `resumed`: the connection of a paused postcopy, where the guest runs already."""

    def __init__(self, resumed: bool = False) -> None:
        self.resumed = resumed
        self.return_path = resumed
        self.postcopy: str = PostcopyState.RUNNING if resumed else PostcopyState.NONE

    @property
    def listening(self) -> bool:
        """From LISTEN on pages are placed one by one, and a break of the connection is a pause."""
        return self.postcopy in (PostcopyState.LISTENING, PostcopyState.RUNNING)

    def check(self, cursor: Cursor, number: int, begin: int) -> None:
        """Note the command. Raises RemoteProtocolError when a destination would refuse it here."""
        command = Number(number)
        if command in _EVENT:
            try:
                self.postcopy = advance(POSTCOPY_INCOMING, self.postcopy, _EVENT[command])
            except LocalProtocolError:
                raise cursor.broken(f"{command.name} in postcopy state '{self.postcopy}'", at=begin) from None
        elif command is Number.OPEN_RETURN_PATH:
            self.return_path = True  # QEMU warns of a second one and goes on
        elif command is Number.PING and not self.return_path:
            raise cursor.broken("PING, and no return path was opened", at=begin)
        elif command in (Number.RECV_BITMAP, Number.POSTCOPY_RESUME) and not self.resumed:
            raise cursor.broken(f"{command.name}, and no postcopy is paused", at=begin)


# -- the other way ---------------------------------------------------------------------------------------------------


def command(number: Number, payload: bytes = b"") -> Command:
    """A command to be sent, without the parsed parts that only a reader needs."""
    expected = COMMAND_LENGTH.get(number, len(payload))
    if len(payload) != expected or len(payload) > 0xFFFF:
        raise LocalProtocolError(f"{number.name} of {len(payload)} bytes")
    return Command(int(number), payload)


def ping(value: int) -> Command:
    return Command(int(Number.PING), struct.pack(">I", value), value=value)


def advise(host_page_sizes: int = TARGET_PAGE_BYTES) -> Command:
    """POSTCOPY_ADVISE: the ORed host page sizes of all RAM blocks, in bytes."""
    sizes = (host_page_sizes, TARGET_PAGE_BYTES)
    return Command(int(Number.POSTCOPY_ADVISE), struct.pack(">QQ", *sizes), page_sizes=sizes)


def discard(block: str, ranges: Iterable[tuple[int, int]]) -> Command:
    """POSTCOPY_RAM_DISCARD of at most MAX_DISCARDS_PER_COMMAND (start, length) pairs in bytes."""
    pairs = tuple(ranges)
    if not 0 < len(pairs) <= MAX_DISCARDS_PER_COMMAND:
        raise LocalProtocolError(
            f"a discard of {len(pairs)} ranges; 1 to {MAX_DISCARDS_PER_COMMAND} fit into one command"
        )
    body = b"".join(struct.pack(">QQ", *pair) for pair in pairs)
    payload = bytes([POSTCOPY_RAM_DISCARD_VERSION]) + counted(block) + b"\0" + body
    return Command(int(Number.POSTCOPY_RAM_DISCARD), payload, name=block, ranges=pairs)


def recv_bitmap(block: str) -> Command:
    """RECV_BITMAP: ask a paused destination which pages of that block it has."""
    return Command(int(Number.RECV_BITMAP), counted(block), name=block)


def counted(name: str) -> bytes:
    """A name as on the wire: u8 length, ASCII."""
    if not name.isascii() or not 0 < len(name) < 256:
        raise LocalProtocolError(f"a name of {len(name)} characters that does not fit the wire: {name!r:.60}")
    return bytes([len(name)]) + name.encode("ascii")
