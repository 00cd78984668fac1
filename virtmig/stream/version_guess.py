"""Which QEMU wrote this? What the bytes tell, each piece with its reason, and nothing more.

A stream does not name its QEMU. Some elements exist only since, or only up to, a release; where only the releases 7.2
and 10.0 were compared, the bound is the weaker one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from virtmig.stream.events import Command, EncodedPage, MappedEntry, MultifdFlush, StreamHeader
from virtmig.stream.multifd import DeviceState, MultifdPacket
from virtmig.stream.return_path import SwitchoverAck
from virtmig.stream.wire import MULTIFD_COMPRESSION_MASK, PING_PACKAGE_LOADED, MultifdFlag
from virtmig.stream.wire import Command as Number

Version = tuple[int, int]
#: the minor number of "any release of that series"
ANY = 99


class Evidence(msgspec.Struct, frozen=True):
    """`since` or `until` is a release, (9, ANY) all of 9.x."""

    words: str
    since: Version | None = None
    until: Version | None = None

    @classmethod
    def of_description(cls, has_configuration: bool) -> Evidence:
        """The JSON's key `configuration`: 7.2 does not write it, 10.0 does."""
        if has_configuration:
            return cls("the description has the configuration, which 7.2's lacks", since=(8, 0))
        return cls("the description lacks the configuration, which 10.0's has", until=(9, ANY))


class VersionGuess(msgspec.Struct, frozen=True):
    """`since` and `until` bound the version ("7.2", "9.x"), None where the bytes set no bound."""

    text: str
    since: str | None
    until: str | None
    reasons: tuple[str, ...]


_COMMANDS: dict[int, Evidence] = {
    Number.SWITCHOVER_START: Evidence("SWITCHOVER_START came with 10.0", since=(10, 0)),
    Number.ENABLE_COLO: Evidence("ENABLE_COLO went with 10.2", until=(10, 1)),
}
_METHODS: dict[int, Evidence] = {
    MultifdFlag.QPL: Evidence("multifd compression qpl came with 9.1", since=(9, 1)),
    MultifdFlag.UADK: Evidence("multifd compression uadk came with 9.1", since=(9, 1)),
    MultifdFlag.QATZIP: Evidence("multifd compression qatzip came with 9.2", since=(9, 2)),
}
_PING = Evidence(f"PING {PING_PACKAGE_LOADED:#x} came with 10.2", since=(10, 2))
_FLUSH = Evidence("MULTIFD_FLUSH came with 8.1", since=(8, 1))
_COMPRESS = Evidence("COMPRESS_PAGE went with 9.1", until=(9, 0))
_MAPPED = Evidence("mapped-ram came with 9.0", since=(9, 0))
_ABSENT = Evidence("mapped-ram leaves out the area of a shared block, 10.0 reserves it", since=(10, 1))
_DEVICE_STATE = Evidence("multifd device state came with 10.0", since=(10, 0))
_ACK = Evidence("SWITCHOVER_ACK came with 8.1 (this side is the destination)", since=(8, 1))
_ZERO_PAGES = Evidence("zero pages in multifd packets came with 9.0", since=(9, 0))
_SYNC_PAGES = Evidence("SYNC rides on a multifd packet with pages, which went with 9.0", until=(8, ANY))
_SYNC_FULL = Evidence("multifd SYNC packets name the capacity, where 10.0 writes 0", until=(9, ANY))
_SYNC_EMPTY = Evidence("multifd SYNC packets name no capacity, 7.2 writes it", since=(8, 0))
_MACHINE = re.compile(r".*-(\d{1,3})\.(\d{1,2})")


def from_event(event: object) -> Iterator[Evidence]:
    """What one event of any channel tells."""
    match event:
        case Command():
            yield from from_command(event)
        case StreamHeader():
            found = _MACHINE.fullmatch(event.machine or "")
            if found:
                release = f"{int(found[1])}.{int(found[2])}"
                since = (int(found[1]), int(found[2]))
                yield Evidence(f"machine type {event.machine} came with {release}", since=since)
            if "mapped-ram" in event.capabilities:
                yield _MAPPED
        case MappedEntry():
            if event.block.mapped is not None and event.block.mapped[2:] == (0, 0):
                yield _ABSENT
        case EncodedPage() if not event.xbzrle:
            yield _COMPRESS
        case MultifdFlush():
            yield _FLUSH
        case MultifdPacket():
            yield from from_packet(event)
        case DeviceState():
            yield _DEVICE_STATE
        case SwitchoverAck():
            yield _ACK


def from_command(command: Command) -> Iterator[Evidence]:
    if command.number in _COMMANDS:
        yield _COMMANDS[command.number]
    if command.number == Number.PING and command.value == PING_PACKAGE_LOADED:
        yield _PING


def from_packet(packet: MultifdPacket) -> Iterator[Evidence]:
    if packet.zero_count:
        yield _ZERO_PAGES
    has_pages = bool(packet.normal_count or packet.zero_count)
    if packet.is_sync and has_pages:
        yield _SYNC_PAGES
    elif packet.is_sync:
        yield _SYNC_FULL if packet.pages_alloc else _SYNC_EMPTY
    if has_pages and packet.flags & MULTIFD_COMPRESSION_MASK in _METHODS:
        yield _METHODS[packet.flags & MULTIFD_COMPRESSION_MASK]


def guess_version(evidence: list[Evidence]) -> VersionGuess:
    """The releases that fit all of it. The reasons that decide come first."""
    since = max((each.since for each in evidence if each.since is not None), default=None)
    until = min((each.until for each in evidence if each.until is not None), default=None)
    deciding = [
        each
        for each in evidence
        if (each.since is not None and each.since == since) or (each.until is not None and each.until == until)
    ]
    reasons = tuple(dict.fromkeys(each.words for each in [*deciding, *evidence]))
    low, high = _text(since), _text(until)
    if since is None and until is None:
        text = "not known: nothing here came or went with a release"
    elif until is None:
        text = f"{low} or newer"
    elif since is None:
        text = f"{high} or older"
    elif since > until:
        text = f"the bytes contradict each other: {low} or newer, and {high} or older"
    else:
        text = f"{low}" if low == high else f"{low} to {high}"
    return VersionGuess(text, low, high, reasons)


def _text(version: Version | None) -> str | None:
    if version is None:
        return None
    return f"{version[0]}.x" if version[1] == ANY else f"{version[0]}.{version[1]}"
