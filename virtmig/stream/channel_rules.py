"""The rules by which QEMUs of three ages, and virtmig itself, name a new connection: data, with the reasons.

Rows are tried from the top; the first row all of whose facts hold decides. `mirrors` names the QEMU function (in
migration/migration.c, channel.c, multifd.c, socket.c) or the message that does the same. channel.py reads them.
"""
# ruff: noqa: E501  (one row, one line: a table is read down its columns)

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Rule(enum.StrEnum):
    """Whose rule identifies: a QEMU destination's, to know what it will make of a connection, or our own."""

    QEMU_7_2 = "7.2"
    QEMU_10_0 = "10.0"
    QEMU_11_1 = "11.1"
    VIRTMIG = "virtmig"


class Fact(enum.Enum):
    """What can be said of a new connection and of those before it; a row of a rule asks for some of these."""

    MAIN_MISSING = enum.auto()
    MAIN_HERE = enum.auto()
    MULTIFD_ON = enum.auto()
    MULTIFD_OFF = enum.auto()
    MULTIFD_MISSING = enum.auto()  # on, and not all are here
    MULTIFD_COMPLETE = enum.auto()  # all are here, or it is off
    PREEMPT_MISSING = enum.auto()  # on, and not here
    PREEMPT_HERE = enum.auto()
    PREEMPT_OFF = enum.auto()
    PREEMPT_EARLY = enum.auto()
    POSTCOPY_OFF = enum.auto()
    RECOVERY = enum.auto()
    AGREED = enum.auto()  # on the explicit postcopy magic
    UNPEEKABLE = enum.auto()  # TLS, file: its bytes cannot be looked at without taking them
    UNSEEN = enum.auto()  # peekable, fewer than four bytes here yet
    SILENT = enum.auto()  # as UNSEEN, and the caller's patience is over
    SAW_QEVM = enum.auto()
    SAW_MULTIFD = enum.auto()
    SAW_POSTCOPY = enum.auto()
    SAW_COMMAND = enum.auto()  # what a recovery's main begins with
    SAW_RECORD = enum.auto()  # beside SAW_OTHER: could be the page word that a preempt channel's record begins with
    SAW_OTHER = enum.auto()


class Verdict(enum.Enum):
    MAIN = "main"
    MULTIFD = "multifd"
    PREEMPT = "preempt"
    PEEK = "peek"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Row:
    when: frozenset[Fact]
    verdict: Verdict
    reason: str
    mirrors: str


def _row(when: Sequence[Fact], verdict: Verdict, reason: str, mirrors: str) -> Row:
    return Row(frozenset(when), verdict, reason, mirrors)


F, V = Fact, Verdict
_IOC = "migration_ioc_process_incoming"
_NEW = "multifd_recv_new_channel"
_EXTRA = "socket_accept_incoming_migration: Extra incoming migration connection; ignoring"
_WRONG_FIRST = "multifd_recv_initial_packet: received packet magic 5145564d expected 11223344"
_NO_STREAM = "qemu_loadvm_state: Not a migration stream"

# fmt: off
#: 7.2 looks at nothing. Bytes that happen to be known are used only to say beforehand what it will stumble over.
ROWS_7_2: tuple[Row, ...] = (
    _row([F.MAIN_MISSING, F.SAW_MULTIFD],            V.REFUSE,  "7.2 takes the first connection as main, and this one is multifd: it would wait or fail", _WRONG_FIRST),
    _row([F.MAIN_MISSING, F.SAW_POSTCOPY],           V.REFUSE,  "7.2 takes the first connection as main, and does not know this magic", _NO_STREAM),
    _row([F.MAIN_MISSING, F.RECOVERY],               V.MAIN,    "a recovery's main has no header, and 7.2 takes the first connection as main", "qmp_migrate_recover, " + _IOC),
    _row([F.MAIN_MISSING, F.SAW_OTHER],              V.REFUSE,  "the first connection is main, and this is no migration stream", _NO_STREAM),
    _row([F.MAIN_MISSING, F.SAW_COMMAND],            V.REFUSE,  "the first connection is main, and this begins without a header although nothing is paused", _NO_STREAM),
    _row([F.MAIN_MISSING],                           V.MAIN,    "the first connection is main; 7.2 does not look at bytes", _IOC + ": !mis->from_src_file"),
    _row([F.MULTIFD_MISSING, F.SAW_QEVM],            V.REFUSE,  "main is here and every later connection is multifd, but this is a main stream", _WRONG_FIRST),
    _row([F.MULTIFD_MISSING, F.SAW_OTHER],           V.REFUSE,  "main is here and every later connection is multifd, but this is not", "multifd_recv_initial_packet: received packet magic"),
    _row([F.MULTIFD_MISSING],                        V.MULTIFD, "main is here and multifd is on: every later connection is multifd", _IOC + ": migrate_use_multifd(), " + _NEW),
    _row([F.PREEMPT_MISSING, F.MULTIFD_OFF, F.SAW_QEVM],    V.REFUSE, "a second main stream where the preempt channel is expected", "postcopy_preempt_new_channel"),
    _row([F.PREEMPT_MISSING, F.MULTIFD_OFF, F.SAW_MULTIFD], V.REFUSE, "a multifd channel, and multifd is off", "postcopy_preempt_new_channel"),
    _row([F.PREEMPT_MISSING, F.MULTIFD_OFF],         V.PREEMPT, "main is here and multifd is off: the second connection is preempt", _IOC + ": postcopy_preempt_new_channel"),
    _row([F.PREEMPT_MISSING],                        V.REFUSE,  "with multifd on, 7.2 knows main and multifd only; all of them are here", _IOC + ": migrate_use_multifd() comes first"),
    _row([F.PREEMPT_HERE],                           V.REFUSE,  "the preempt channel is here already", _EXTRA),
    _row([],                                         V.REFUSE,  "all channels are here already", _EXTRA),
)

#: 10.0 peeks if multifd is on, mapped-ram and postcopy are off and the socket can; else it counts as 7.2 does.
ROWS_10_0: tuple[Row, ...] = (
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_OFF],  V.REFUSE, "all channels are here already", _EXTRA),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_HERE], V.REFUSE, "the preempt channel is here already", _EXTRA),
    _row([F.MULTIFD_ON, F.POSTCOPY_OFF, F.UNSEEN],   V.PEEK,    "multifd connections may overtake main: the magic tells", "migration_channel_read_peek"),
    _row([F.MULTIFD_ON, F.POSTCOPY_OFF, F.SILENT],   V.REFUSE,  "10.0 waits in its main loop for four bytes, which do not come", "migration_channel_read_peek"),
    _row([F.MULTIFD_ON, F.SAW_QEVM, F.MAIN_HERE],    V.REFUSE,  "a second main stream", _IOC + ": migration_incoming_setup"),
    _row([F.MULTIFD_ON, F.SAW_QEVM],                 V.MAIN,    "QEVM is main, in whatever order it came", _IOC + ": channel_magic == QEMU_VM_FILE_MAGIC"),
    _row([F.MULTIFD_MISSING, F.SAW_MULTIFD],         V.MULTIFD, "not QEVM: multifd, in whatever order it came", _IOC + ": channel_magic, " + _NEW),
    _row([F.MULTIFD_ON, F.SAW_MULTIFD],              V.REFUSE,  "one multifd channel more than expected", "multifd_recv_all_channels_created"),
    _row([F.MULTIFD_ON, F.SAW_OTHER],                V.REFUSE,  "neither magic; 10.0 takes it for multifd and fails", "multifd_recv_initial_packet: received packet magic"),
    _row([F.MULTIFD_ON, F.SAW_POSTCOPY],             V.REFUSE,  "10.0 does not know this magic, takes it for multifd and fails", "multifd_recv_initial_packet: received packet magic"),
    _row([F.MULTIFD_ON, F.SAW_COMMAND],              V.REFUSE,  "neither magic; 10.0 takes it for multifd and fails", "multifd_recv_initial_packet: received packet magic"),
    _row([F.MULTIFD_ON, F.UNPEEKABLE, F.MAIN_MISSING], V.MAIN,  "it cannot be peeked, so the first is main", _IOC + ": !QIO_CHANNEL_FEATURE_READ_MSG_PEEK"),
    _row([F.MULTIFD_MISSING, F.UNPEEKABLE],          V.MULTIFD, "it cannot be peeked, and main is here", _IOC + ": default_channel = !mis->from_src_file"),
    _row([F.MAIN_MISSING, F.RECOVERY],               V.MAIN,    "a recovery's main has no header, and the first connection is main", _IOC + ": default_channel = !mis->from_src_file"),
    _row([F.MAIN_MISSING, F.SAW_MULTIFD],            V.REFUSE,  "the first connection is main, and this is multifd, which is off", _NO_STREAM),
    _row([F.MAIN_MISSING, F.SAW_POSTCOPY],           V.REFUSE,  "the first connection is main, and 10.0 does not know this magic", _NO_STREAM),
    _row([F.MAIN_MISSING, F.SAW_OTHER],              V.REFUSE,  "the first connection is main, and this is no migration stream", _NO_STREAM),
    _row([F.MAIN_MISSING, F.SAW_COMMAND],            V.REFUSE,  "this begins without a header although nothing is paused", _NO_STREAM),
    _row([F.MAIN_MISSING],                           V.MAIN,    "without multifd 10.0 does not peek: the first is main", _IOC + ": default_channel = !mis->from_src_file"),
    _row([F.PREEMPT_MISSING, F.SAW_QEVM],            V.REFUSE,  "a second main stream where the preempt channel is expected", "postcopy_preempt_new_channel"),
    _row([F.PREEMPT_MISSING, F.SAW_MULTIFD],         V.REFUSE,  "a multifd channel, and multifd is off", "postcopy_preempt_new_channel"),
    _row([F.PREEMPT_MISSING],                        V.PREEMPT, "main is here: the next is preempt, and it stays silent", _IOC + ": postcopy_preempt_new_channel"),
    _row([],                                         V.REFUSE,  "all channels are here already", _EXTRA),
)

#: 11.1 (since 10.1) peeks every connection until main and all multifd are here.
ROWS_11_1: tuple[Row, ...] = (
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_HERE], V.REFUSE, "the preempt channel is here already", _EXTRA),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_OFF],  V.REFUSE, "all channels are here already", _EXTRA),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.SAW_QEVM],     V.REFUSE, "a second main stream where the preempt channel is expected", "migration_has_main_and_multifd_channels"),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.SAW_MULTIFD],  V.REFUSE, "one multifd channel more than expected", "migration_has_main_and_multifd_channels"),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE],          V.PREEMPT, "main and all multifd are here: the next is preempt, and is not peeked", _IOC + ": CH_POSTCOPY"),
    _row([F.UNPEEKABLE, F.MAIN_MISSING],             V.MAIN,    "it cannot be peeked, so the first is main", _IOC + ": !mis->from_src_file"),
    _row([F.UNPEEKABLE, F.MULTIFD_MISSING],          V.MULTIFD, "it cannot be peeked, main is here and multifd is on", _IOC + ": Non-peekable channels like tls/file are multifd"),
    _row([F.UNSEEN],                                 V.PEEK,    "until main and all multifd are here every connection is peeked", "migration_channel_read_peek"),
    _row([F.SILENT],                                 V.REFUSE,  "11.1 waits in its main loop for four bytes, QMP and all, and they do not come", "migration_channel_read_peek"),
    _row([F.SAW_QEVM, F.MAIN_MISSING],               V.MAIN,    "QEVM is main, in whatever order it came", _IOC + ": QEMU_VM_FILE_MAGIC -> CH_MAIN"),
    _row([F.SAW_QEVM],                               V.REFUSE,  "a second main stream", _IOC + ": CH_MAIN"),
    _row([F.SAW_MULTIFD, F.MULTIFD_MISSING],         V.MULTIFD, "the multifd magic, in whatever order it came", _IOC + ": MULTIFD_MAGIC -> CH_MULTIFD"),
    _row([F.SAW_MULTIFD, F.MULTIFD_OFF],             V.REFUSE,  "a multifd channel, and multifd is off", _IOC + ": MULTIFD_MAGIC"),
    _row([F.SAW_MULTIFD],                            V.REFUSE,  "one multifd channel more than expected", "multifd_recv_all_channels_created"),
    _row([F.RECOVERY, F.MAIN_MISSING],               V.MAIN,    "the postcopy is paused: a recovery's main carries no magic", _IOC + ": MIGRATION_STATUS_POSTCOPY_PAUSED"),
    _row([],                                         V.REFUSE,  "an unknown magic", _IOC + ": unknown channel magic"),
)

#: Our own destination: it tells sources of every age apart, and never blocks on a silent connection.
ROWS_VIRTMIG: tuple[Row, ...] = (
    _row([F.SAW_QEVM, F.MAIN_MISSING],               V.MAIN,    "QEVM is main, in whatever order it came", "QEMU 11.1 " + _IOC),
    _row([F.SAW_QEVM],                               V.REFUSE,  "a second main stream", "QEMU 11.1 " + _IOC),
    _row([F.SAW_MULTIFD, F.MULTIFD_MISSING],         V.MULTIFD, "the multifd magic, in whatever order it came", "QEMU 11.1 " + _IOC),
    _row([F.SAW_MULTIFD, F.MULTIFD_OFF],             V.REFUSE,  "a multifd channel, and multifd is off", "QEMU 11.1 " + _IOC),
    _row([F.SAW_MULTIFD],                            V.REFUSE,  "one multifd channel more than expected", "multifd_recv_all_channels_created"),
    _row([F.SAW_POSTCOPY, F.AGREED, F.PREEMPT_MISSING], V.PREEMPT, "the agreed postcopy magic", "the upstream proposal of 2024, in no release"),
    _row([F.SAW_POSTCOPY, F.AGREED],                 V.REFUSE,  "the preempt channel is here already", _EXTRA),
    _row([F.SAW_POSTCOPY],                           V.REFUSE,  "the postcopy magic, on which nobody agreed", "the upstream proposal of 2024, in no release"),
    _row([F.SAW_COMMAND, F.RECOVERY, F.MAIN_MISSING], V.MAIN,   "the postcopy is paused: a recovery's main begins with a command", "QEMU 11.1 " + _IOC + ": MIGRATION_STATUS_POSTCOPY_PAUSED"),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_HERE], V.REFUSE, "the preempt channel is here already", _EXTRA),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_OFF],  V.REFUSE, "all channels are here already", _EXTRA),
    _row([F.SAW_COMMAND, F.MAIN_MISSING],            V.REFUSE,  "this begins without a header although nothing is paused", _NO_STREAM),
    _row([F.SAW_RECORD, F.MAIN_HERE, F.MULTIFD_COMPLETE, F.PREEMPT_MISSING], V.PREEMPT, "a bare page record, and nothing but preempt is missing", "QEMU 11.1 " + _IOC + ": CH_POSTCOPY"),
    _row([F.SAW_OTHER],                              V.REFUSE,  "an unknown magic", _IOC + ": unknown channel magic"),
    _row([F.SAW_COMMAND],                            V.REFUSE,  "a second main stream, or a command where none belongs", _IOC + ": unknown channel magic"),
    _row([F.AGREED, F.MAIN_HERE, F.MULTIFD_COMPLETE, F.UNSEEN], V.PEEK,   "the postcopy magic was agreed on, so it must come first", "the upstream proposal of 2024, in no release"),
    _row([F.AGREED, F.MAIN_HERE, F.MULTIFD_COMPLETE, F.SILENT], V.REFUSE, "the postcopy magic was agreed on and does not come", "the upstream proposal of 2024, in no release"),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.UNSEEN], V.PEEK,   "preempt stays silent for a while, a channel that nobody expects speaks at once", "unlike QEMU 11.1 " + _IOC + ", which takes either"),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.SILENT], V.PREEMPT, "main and all multifd are here, and it stays silent: preempt", "QEMU 11.1 " + _IOC + ": CH_POSTCOPY"),
    _row([F.MAIN_HERE, F.MULTIFD_COMPLETE, F.UNPEEKABLE], V.PREEMPT, "main and all multifd are here: the next is preempt", "QEMU 11.1 " + _IOC + ": CH_POSTCOPY"),
    _row([F.UNPEEKABLE, F.MAIN_MISSING],             V.MAIN,    "it cannot be peeked, so the first is main", "QEMU 11.1 " + _IOC),
    _row([F.UNPEEKABLE],                             V.MULTIFD, "it cannot be peeked, main is here and multifd channels are awaited", "QEMU 11.1 " + _IOC),
    _row([F.UNSEEN],                                 V.PEEK,    "main, multifd or an early preempt channel: the first four bytes tell", "migration_channel_read_peek, without blocking"),
    _row([F.SILENT, F.PREEMPT_EARLY, F.PREEMPT_MISSING, F.MAIN_HERE], V.PREEMPT, "silent while main is here: the early preempt channel of 7.2 and of machine types up to 7.2", "migrate_fd_connect 7.2: postcopy_preempt_setup; x-preempt-pre-7-2"),
    _row([],                                         V.REFUSE,  "the connection stays silent, and no silent channel is expected now", "migration_channel_read_peek"),
)
# fmt: on

TABLES: dict[Rule, tuple[Row, ...]] = {
    Rule.QEMU_7_2: ROWS_7_2,
    Rule.QEMU_10_0: ROWS_10_0,
    Rule.QEMU_11_1: ROWS_11_1,
    Rule.VIRTMIG: ROWS_VIRTMIG,
}
