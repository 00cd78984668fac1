"""Which channel is this connection? QEMU's rules of three ages and our own, as tables with their reasons.

A migration may need 1 main, N multifd and 1 preempt connection, all to one address, and nothing on the wire announces
the preempt one. Each QEMU guesses in its own way:

    7.2     the first is main, nothing is looked at                     (migration_ioc_process_incoming)
    10.0    peeks only when multifd is on and postcopy is off           (migration_ioc_process_incoming)
    11.1    peeks until main and all multifd are here; next is preempt  (the same, since 10.1)
    virtmig peeks when a multifd channel can come, never waits for a silent one, and refuses what fits nowhere

`identify` answers for one new connection. It is pure: the caller peeks (when `wants_peek` says so) and keeps the time.
The rows of the rules are in channel_rules.py.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from virtmig.errors import ChannelError, LocalProtocolError
from virtmig.stream.channel_rules import TABLES, Fact, Row, Rule, Verdict
from virtmig.stream.wire import (
    MULTIFD_CHANNEL_ID_AT,
    MULTIFD_MAGIC,
    POSTCOPY_MAGIC,
    QEMU_VM_FILE_MAGIC,
    Dialect,
    Item,
)

MAGIC_BYTES = 4
#: a page word is offset | flags in 64 bits: with blocks of up to 256 TiB its first four bytes stay below this
_RECORD_BELOW = 1 << 16


class Role(enum.StrEnum):
    MAIN = "main"
    MULTIFD = "multifd"
    PREEMPT = "preempt"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the destination was set up for. Both ends must be set up alike: QEMU sends none of this.

    `early_preempt`: the source opens the preempt channel right after main (QEMU 7.2, or a machine type up to 7.2 with
    x-preempt-pre-7-2). `mapped_ram`: multifd channels write to the file and open no connections. `recovery`: the
    postcopy is paused and a new main connection is awaited, which has no header. `postcopy_magic`: both sides agreed on
    the explicit magic of the upstream proposal; only ever between two virtmigs.
    """

    rule: Rule
    multifd_channels: int = 0
    postcopy: bool = False
    preempt: bool = False
    early_preempt: bool = False
    mapped_ram: bool = False
    recovery: bool = False
    postcopy_magic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.multifd_channels <= 255:
            raise LocalProtocolError(f"{self.multifd_channels} multifd channels, QEMU takes 1 to 255")
        if self.preempt and not self.postcopy:
            raise LocalProtocolError("postcopy-preempt requires postcopy-ram")
        if self.early_preempt and not self.preempt:
            raise LocalProtocolError("an early preempt channel without postcopy-preempt")
        if self.postcopy and self.multifd_channels and self.rule is Rule.QEMU_10_0:
            raise LocalProtocolError(
                "QEMU 10.0: Postcopy is not yet compatible with multifd", hint="QEMU 10.1 and later can do both"
            )
        if self.postcopy_magic and self.rule is not Rule.VIRTMIG:
            raise LocalProtocolError(
                f"the postcopy magic was agreed on with QEMU {self.rule}, which does not know it",
                hint="the magic is only for two sides that both announced it",
            )
        if self.postcopy_magic and not self.preempt:
            raise LocalProtocolError("the postcopy magic without postcopy-preempt")


@dataclass(frozen=True, slots=True)
class Identity:
    """`index` is the multifd channel id when the hello could be seen (peeked 25 bytes), else the arrival number."""

    role: Role
    index: int = 0
    reason: str = ""
    mirrors: str = ""


@dataclass(frozen=True, slots=True)
class NeedMoreBytes:
    """Peek `count` bytes, then ask again; `reason` says what they are to decide."""

    count: int
    reason: str


def describe_bytes(first: bytes | None) -> str:
    """A person's words for the first bytes of a connection."""
    if not first:
        return "nothing"
    magic = int.from_bytes(first[:4], "big") if len(first) >= 4 else None
    shown = f"{first[:8].hex(' ')}"
    if magic == QEMU_VM_FILE_MAGIC:
        return f"{shown} (QEVM: a main stream)"
    if magic == MULTIFD_MAGIC:
        return f"{shown} (multifd)"
    if magic == POSTCOPY_MAGIC:
        return f"{shown} (the postcopy magic)"
    if first[0] in (0x14, 0x15, 0x16, 0x17) and first[1:2] == b"\x03":
        return f"{shown} (TLS)"
    if first[:4] in (b"GET ", b"POST", b"HEAD", b"PUT "):
        return f"{shown} (HTTP)"
    if first[:4] == b"SSH-":
        return f"{shown} (SSH)"
    if magic == 0x28 or first[:1] == b"{":
        return f"{shown} (JSON or RPC)"
    return shown


def wants_peek(expected: Expected, present: Sequence[Identity]) -> bool:
    """Whether the next connection must be peeked at before it can be named (if it can be peeked)."""
    return isinstance(_decide(expected, present, None, True, False), NeedMoreBytes)


def identify(
    expected: Expected,
    present: Sequence[Identity],
    first: bytes | None = None,
    *,
    peekable: bool = True,
    silent: bool = False,
) -> Identity | NeedMoreBytes:
    """Name a new connection.

    `present` are the channels named before, in order of arrival. `first` are its first bytes, peeked and not taken;
    None or fewer than four when they are not here. `peekable` False: the connection cannot be peeked (TLS). `silent`:
    the caller waited as long as it wants to. Raises ChannelError that says what was seen and what was expected.
    """
    decided = _decide(expected, present, first, peekable, silent)
    if isinstance(decided, NeedMoreBytes):
        return decided
    row, facts = decided
    if row.verdict is Verdict.REFUSE:
        raise ChannelError(
            f"a connection was refused: {row.reason}; saw {_saw(facts, first)}, expected {missing(expected, present)}",
            hint=row.mirrors,
        )
    role = Role(row.verdict.value)
    index = 0
    if role is Role.MULTIFD:
        taken = [channel.index for channel in present if channel.role is Role.MULTIFD]
        if first is not None and len(first) > MULTIFD_CHANNEL_ID_AT:
            index = first[MULTIFD_CHANNEL_ID_AT]
            if index >= expected.multifd_channels or index in taken:
                fault = "is here already" if index in taken else "is out of range"
                raise ChannelError(
                    f"a connection was refused: multifd channel id {index} {fault}; "
                    f"saw {describe_bytes(first)}, expected {missing(expected, present)}",
                    hint="multifd_recv_initial_packet",
                )
        else:
            index = next(free for free in range(256) if free not in taken)
    return Identity(role, index, row.reason, row.mirrors)


def missing(expected: Expected, present: Sequence[Identity]) -> str:
    """What is still to come, in words."""
    count = expected.multifd_channels - sum(channel.role is Role.MULTIFD for channel in present)
    parts = []
    if not any(channel.role is Role.MAIN for channel in present):
        parts.append("main without a header (recovery)" if expected.recovery else "main")
    if count > 0:
        parts.append(f"{count} of {expected.multifd_channels} multifd")
    if expected.preempt and not any(channel.role is Role.PREEMPT for channel in present):
        parts.append("preempt")
    return ", ".join(parts) or "no further connection"


def encode_postcopy_magic(expected: Expected) -> bytes:
    """The first bytes of a preempt channel when both sides agreed on the magic; LocalProtocolError when not."""
    if not expected.postcopy_magic:
        raise LocalProtocolError("the postcopy magic is sent only when both sides agreed on it", channel="preempt")
    return POSTCOPY_MAGIC.to_bytes(MAGIC_BYTES, "big")


def _saw(facts: frozenset[Fact], first: bytes | None) -> str:
    if Fact.UNPEEKABLE in facts:
        return "a connection that cannot be peeked"
    return describe_bytes(first)


def _decide(
    expected: Expected, present: Sequence[Identity], first: bytes | None, peekable: bool, silent: bool
) -> tuple[Row, frozenset[Fact]] | NeedMoreBytes:
    facts = _facts(expected, present, first, peekable, silent)
    # every table ends with a row that asks for nothing
    row = next(row for row in TABLES[expected.rule] if row.when <= facts)
    if row.verdict is Verdict.PEEK:
        return NeedMoreBytes(MAGIC_BYTES, row.reason)
    return row, facts


def _facts(
    expected: Expected, present: Sequence[Identity], first: bytes | None, peekable: bool, silent: bool
) -> frozenset[Fact]:
    here = [channel.role for channel in present]
    multifd_on = expected.multifd_channels > 0 and not expected.mapped_ram
    all_multifd = not multifd_on or here.count(Role.MULTIFD) >= expected.multifd_channels
    preempt = Fact.PREEMPT_OFF
    if expected.preempt:
        preempt = Fact.PREEMPT_HERE if Role.PREEMPT in here else Fact.PREEMPT_MISSING
    facts = {
        Fact.MAIN_HERE if Role.MAIN in here else Fact.MAIN_MISSING,
        Fact.MULTIFD_ON if multifd_on else Fact.MULTIFD_OFF,
        Fact.MULTIFD_COMPLETE if all_multifd else Fact.MULTIFD_MISSING,
        preempt,
        _sight(first, peekable, silent),
    }
    if Fact.SAW_OTHER in facts and first is not None and int.from_bytes(first[:4], "big") < _RECORD_BELOW:
        facts.add(Fact.SAW_RECORD)
    for fact, holds in (
        (Fact.PREEMPT_EARLY, expected.early_preempt),
        (Fact.POSTCOPY_OFF, not expected.postcopy),
        (Fact.RECOVERY, expected.recovery),
        (Fact.AGREED, expected.postcopy_magic),
    ):
        if holds:
            facts.add(fact)
    return frozenset(facts)


def _sight(first: bytes | None, peekable: bool, silent: bool) -> Fact:
    if not peekable:
        return Fact.UNPEEKABLE
    if first is None or len(first) < MAGIC_BYTES:
        return Fact.SILENT if silent else Fact.UNSEEN
    magic = int.from_bytes(first[:MAGIC_BYTES], "big")
    if magic == QEMU_VM_FILE_MAGIC:
        return Fact.SAW_QEVM
    if magic == MULTIFD_MAGIC:
        return Fact.SAW_MULTIFD
    if magic == POSTCOPY_MAGIC:
        return Fact.SAW_POSTCOPY
    return Fact.SAW_COMMAND if first[0] == Item.COMMAND and first[1] == 0 else Fact.SAW_OTHER


# -- the other way round: in which order a destination QEMU must be connected to ---------------------------------------


class Moment(enum.StrEnum):
    """When a connection may be opened."""

    AT_ONCE = "at once"
    MAIN_ACCEPTED = "when main is accepted"
    MAIN_WRITTEN = "when main has its first four bytes"
    PREVIOUS_WRITTEN = "when the previous connection has its hello"
    ALL_MULTIFD_WRITTEN = "when main and all multifd have their first bytes"
    PONG_AND_ALL_MULTIFD = "when a PONG came back, and all multifd have their first bytes"


@dataclass(frozen=True, slots=True)
class Step:
    """`writes_at_once`: the connection must be opened only when its first bytes are at hand."""

    role: Role
    index: int
    when: Moment
    writes_at_once: bool
    reason: str


def connection_order(
    destination: Dialect,
    *,
    multifd_channels: int = 0,
    postcopy: bool = False,
    preempt: bool = False,
    early_preempt: bool = False,
    peekable: bool = True,
) -> tuple[Step, ...]:
    """The one order of connections that a destination QEMU of this age names rightly, with the reasons.

    Whoever stands between source and destination (a relay) opens them so, whatever order the source's came in.
    Raises LocalProtocolError for what that QEMU cannot do.
    """
    Expected(
        Rule(destination.value),
        multifd_channels=multifd_channels,
        postcopy=postcopy,
        preempt=preempt,
        early_preempt=early_preempt,
    )
    old = destination is Dialect.QEMU_7_2
    if old and multifd_channels and postcopy:
        raise LocalProtocolError(
            "QEMU 7.2 accepts multifd with postcopy but cannot do it: every connection after main is multifd to it",
            hint="QEMU 10.1 and later can do both",
        )
    if old and preempt and not early_preempt:
        raise LocalProtocolError(
            "QEMU 7.2 does not read main until the preempt channel is there, and this source opens it later",
            hint="use a machine type up to 7.2, with which newer QEMUs open it early",
        )
    if old:
        main = "7.2 takes the first connection as main and looks at nothing"
        later = "7.2 takes every connection after main as multifd"
    elif not peekable:
        main = "a connection that cannot be peeked is main when it is the first"
        later = "a connection that cannot be peeked is multifd when main is here"
    elif destination is Dialect.QEMU_10_0:
        main = "10.0 needs this order only when it cannot peek; it is right either way"
        later = "10.0 peeks at it in its main loop, which stands still until four bytes are there"
    else:
        main = "11.1 peeks at it in its main loop, QMP stands still until four bytes are there"
        later = "11.1 peeks at it in its main loop; the order among multifd is free"
    first_bytes = not old and peekable
    steps = [Step(Role.MAIN, 0, Moment.AT_ONCE, first_bytes and not _silent_main(destination, multifd_channels), main)]
    for index in range(multifd_channels):
        when = Moment.PREVIOUS_WRITTEN if first_bytes else Moment.MAIN_ACCEPTED
        steps.append(Step(Role.MULTIFD, index, when, True, later))
    if preempt:
        steps.append(_preempt_step(destination, multifd_channels, early_preempt))
    return tuple(steps)


def _silent_main(destination: Dialect, multifd_channels: int) -> bool:
    """10.0 peeks only when multifd is on."""
    return destination is Dialect.QEMU_10_0 and not multifd_channels


def _preempt_step(destination: Dialect, multifd_channels: int, early: bool) -> Step:
    if destination is Dialect.QEMU_7_2:
        reason = (
            "7.2 begins to read main only when the preempt channel is there, and takes the second connection for it"
        )
        return Step(Role.PREEMPT, 0, Moment.MAIN_ACCEPTED, False, reason)
    if early and multifd_channels:
        reason = (
            "the source opens it before multifd, but a silent connection before all multifd are here wedges "
            "this destination for good: hold it back"
        )
        return Step(Role.PREEMPT, 0, Moment.ALL_MULTIFD_WRITTEN, False, reason)
    if early:
        reason = "machine types up to 7.2 open it early; it must not overtake main, which is told by its magic or place"
        return Step(Role.PREEMPT, 0, Moment.MAIN_WRITTEN, False, reason)
    reason = "the source opens it at the switch to postcopy, after a PONG; it is silent, so all others must be named"
    return Step(Role.PREEMPT, 0, Moment.PONG_AND_ALL_MULTIFD, False, reason)
