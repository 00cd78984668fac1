"""One table: what each QEMU, and virtmig, makes of a connection. Each row says which behaviour it mirrors."""

# ruff: noqa: E501  (one case, one line)

import pytest

from virtmig.errors import ChannelError, LocalProtocolError
from virtmig.stream.channel import (
    Expected,
    Identity,
    Moment,
    NeedMoreBytes,
    Role,
    connection_order,
    describe_bytes,
    encode_postcopy_magic,
    identify,
    missing,
    wants_peek,
)
from virtmig.stream.channel_rules import TABLES, Fact, Rule, Verdict
from virtmig.stream.wire import Dialect

QEVM = bytes.fromhex("5145564d00000003")
MULTIFD = bytes.fromhex("1122334400000001")
POSTCOPY = bytes.fromhex("55667788")
RECOVERY = bytes.fromhex("08000a0007")  # a RECV_BITMAP command: how a recovery's main begins
TLS = bytes.fromhex("1603010200")
M, F, P = Identity(Role.MAIN), Identity(Role.MULTIFD), Identity(Role.PREEMPT)
F0, F1 = Identity(Role.MULTIFD, 0), Identity(Role.MULTIFD, 1)
OLD, MID, NEW, OURS = Rule.QEMU_7_2, Rule.QEMU_10_0, Rule.QEMU_11_1, Rule.VIRTMIG
PEEK = "peek"
NO = "refuse"


def setup(rule, multifd=0, **options):
    if options.get("preempt"):
        options["postcopy"] = True
    return Expected(rule, multifd_channels=multifd, **options)


def multifd_hello(channel_id):
    return MULTIFD + bytes(16) + bytes([channel_id])


# fmt: off
CASES = [
    # id, set up, here before, first bytes, how the connection is, result, what it mirrors
    ("7.2 first is main",                   setup(OLD, 2),                 [],           None,     {}, "main 0",    "migration_ioc_process_incoming 7.2: !mis->from_src_file"),
    ("7.2 first is main, silent",           setup(OLD),                    [],           None,     {"silent": True}, "main 0", "7.2 stays responsive with a silent connection"),
    ("7.2 multifd first is misread",        setup(OLD, 2),                 [],           MULTIFD,  {}, NO,          "multifd_recv_initial_packet: received packet magic 5145564d expected 11223344"),
    ("7.2 later is multifd, unseen",        setup(OLD, 2),                 [M],          None,     {}, "multifd 0", "migration_ioc_process_incoming 7.2: migrate_use_multifd()"),
    ("7.2 second multifd",                  setup(OLD, 2),                 [M, F0],      MULTIFD,  {}, "multifd 1", "multifd_recv_new_channel"),
    ("7.2 id from the hello",               setup(OLD, 2),                 [M],          multifd_hello(1), {}, "multifd 1", "multifd_recv_initial_packet: the id is in the hello"),
    ("7.2 TLS",                             setup(OLD, 2),                 [M],          None,     {"peekable": False}, "multifd 0", "7.2 never peeks, TLS or not"),
    ("7.2 second main",                     setup(OLD, 2),                 [M],          QEVM,     {}, NO,          "multifd_recv_initial_packet: received packet magic"),
    ("7.2 early preempt is second",         setup(OLD, preempt=True, early_preempt=True), [M], None, {}, "preempt 0", "migration_ioc_process_incoming 7.2: postcopy_preempt_new_channel"),
    ("7.2 duplicate preempt",               setup(OLD, preempt=True),      [M, P],       None,     {}, NO,          "socket_accept_incoming_migration: Extra incoming migration connection"),
    ("7.2 one too many",                    setup(OLD, 1),                 [M, F0],      None,     {}, NO,          "migration_has_all_channels, Extra incoming migration connection"),
    ("7.2 preempt besides multifd",         setup(OLD, 1, preempt=True),   [M, F0],      None,     {}, NO,          "7.2: migrate_use_multifd() is asked first, preempt never reached"),
    ("7.2 recovery",                        setup(OLD, postcopy=True, recovery=True), [], RECOVERY, {}, "main 0",   "qmp_migrate_recover: the first connection is main"),
    ("7.2 headerless without a pause",      setup(OLD),                    [],           RECOVERY, {}, NO,          "qemu_loadvm_state: Not a migration stream"),
    ("7.2 HTTP",                            setup(OLD),                    [],           b"GET / ", {}, NO,         "qemu_loadvm_state: Not a migration stream"),
    ("10.0 peeks with multifd",             setup(MID, 2),                 [],           None,     {}, PEEK,        "10.0 migration_channel_read_peek: multifd, no postcopy, no mapped-ram"),
    ("10.0 three bytes are not enough",     setup(MID, 2),                 [],           QEVM[:3], {}, PEEK,        "10.0 migration_channel_read_peek: 1 ms polling until four bytes"),
    ("10.0 multifd first",                  setup(MID, 2),                 [],           MULTIFD,  {}, "multifd 0", "10.0 migration_ioc_process_incoming: channel_magic"),
    ("10.0 main after multifd",             setup(MID, 2),                 [F1, F0],     QEVM,     {}, "main 0",    "10.0: default_channel = channel_magic == QEMU_VM_FILE_MAGIC"),
    ("10.0 no multifd, no peek",            setup(MID),                    [],           None,     {}, "main 0",    "10.0: default_channel = !mis->from_src_file"),
    ("10.0 postcopy, no peek",              setup(MID, preempt=True),      [],           None,     {}, "main 0",    "10.0: !migrate_postcopy_ram() is part of the peeking condition"),
    ("10.0 preempt is second",              setup(MID, preempt=True),      [M],          None,     {}, "preempt 0", "10.0 postcopy_preempt_new_channel"),
    ("10.0 duplicate preempt",              setup(MID, preempt=True),      [M, P],       None,     {}, NO,          "Extra incoming migration connection; ignoring"),
    ("10.0 TLS first is main",              setup(MID, 2),                 [],           None,     {"peekable": False}, "main 0", "10.0: QIO_CHANNEL_FEATURE_READ_MSG_PEEK missing"),
    ("10.0 TLS later is multifd",           setup(MID, 2),                 [M],          None,     {"peekable": False}, "multifd 0", "10.0: default_channel = !mis->from_src_file"),
    ("10.0 mapped-ram never peeks",         setup(MID, 2, mapped_ram=True), [],          None,     {}, "main 0",    "10.0: !migrate_mapped_ram() is part of the peeking condition"),
    ("10.0 stranger with multifd",          setup(MID, 2),                 [M],          TLS,      {}, NO,          "multifd_recv_initial_packet: received packet magic"),
    ("10.0 silence with multifd",           setup(MID, 2),                 [M],          None,     {"silent": True}, NO, "10.0 blocks in migration_channel_read_peek"),
    ("10.0 postcopy magic",                 setup(MID, 2),                 [M],          POSTCOPY, {}, NO,          "anything but QEVM is multifd, which then fails on the magic"),
    ("10.0 recovery",                       setup(MID, postcopy=True, recovery=True), [], RECOVERY, {}, "main 0",   "10.0 qmp_migrate_recover, no peek"),
    ("11.1 peeks even plain",               setup(NEW),                    [],           None,     {}, PEEK,        "migration_has_main_and_multifd_channels is false"),
    ("11.1 main alone",                     setup(NEW),                    [],           QEVM,     {}, "main 0",    "QEMU_VM_FILE_MAGIC -> CH_MAIN"),
    ("11.1 order 0, main, 1",               setup(NEW, 2),                 [F0],         QEVM,     {}, "main 0",    "any order is accepted"),
    ("11.1 order 1, 0, main",               setup(NEW, 2),                 [F1],         multifd_hello(0), {}, "multifd 0", "any order is accepted"),
    ("11.1 multifd with postcopy",          setup(NEW, 2, preempt=True),   [M, F0],      MULTIFD,  {}, "multifd 1", "10.1 and later: multifd with postcopy"),
    ("11.1 preempt after all, no peek",     setup(NEW, 2, preempt=True),   [M, F0, F1],  None,     {}, "preempt 0", "CH_POSTCOPY without a peek"),
    ("11.1 preempt too early is peeked",    setup(NEW, 2, preempt=True),   [M],          None,     {}, PEEK,        "11.1 wedges: it waits for four bytes of a silent connection"),
    ("11.1 preempt too early stays silent", setup(NEW, 2, preempt=True),   [M],          None,     {"silent": True}, NO, "11.1 wedges: it waits for four bytes of a silent connection"),
    ("11.1 duplicate preempt",              setup(NEW, preempt=True),      [M, P],       None,     {}, NO,          "Extra incoming migration connection; ignoring"),
    ("11.1 extra connection",               setup(NEW),                    [M],          None,     {}, NO,          "Extra incoming migration connection; ignoring"),
    ("11.1 multifd where none is",          setup(NEW),                    [],           MULTIFD,  {}, NO,          "MULTIFD_MAGIC without multifd"),
    ("11.1 second main",                    setup(NEW, 2),                 [M],          QEVM,     {}, NO,          "CH_MAIN twice"),
    ("11.1 stranger",                       setup(NEW, 2),                 [M],          TLS,      {}, NO,          "unknown channel magic: %u"),
    ("11.1 postcopy magic is unknown",      setup(NEW, 2, preempt=True),   [M],          POSTCOPY, {}, NO,          "unknown channel magic: %u"),
    ("11.1 recovery has no magic",          setup(NEW, preempt=True, recovery=True), [], RECOVERY, {}, "main 0",    "MIGRATION_STATUS_POSTCOPY_PAUSED && !mis->from_src_file -> CH_MAIN"),
    ("11.1 headerless without a pause",     setup(NEW, preempt=True),      [],           RECOVERY, {}, NO,          "unknown channel magic: %u"),
    ("11.1 TLS first is main",              setup(NEW, 2),                 [],           None,     {"peekable": False}, "main 0", "non-peekable: !mis->from_src_file"),
    ("11.1 TLS later is multifd",           setup(NEW, 2),                 [M, F0],      None,     {"peekable": False}, "multifd 1", "Non-peekable channels like tls/file are processed as multifd channels"),
    ("11.1 TLS preempt after all",          setup(NEW, 1, preempt=True),   [M, F0],      None,     {"peekable": False}, "preempt 0", "CH_POSTCOPY without a peek"),
    ("11.1 TLS extra without multifd",      setup(NEW),                    [M],          None,     {"peekable": False}, NO, "Extra incoming migration connection; ignoring (its own text for this case is unreachable)"),
    ("11.1 id out of range",                setup(NEW, 2),                 [M],          multifd_hello(2), {}, NO,  "multifd: received channel id %u exceeds channel count %u"),
    ("11.1 id twice",                       setup(NEW, 2),                 [M, F1],      multifd_hello(1), {}, NO,  "multifd: received id '%d' already setup"),
    ("virtmig main",                        setup(OURS, 2),                [F0],         QEVM,     {}, "main 0",    "as 11.1"),
    ("virtmig waits for bytes",             setup(OURS, 2),                [],           None,     {}, PEEK,        "as 11.1, without blocking"),
    ("virtmig early preempt of a 7.2",      setup(OURS, 1, preempt=True, early_preempt=True), [M], None, {"silent": True}, "preempt 0", "7.2 opens it right after main, and nothing is sent on it"),
    ("virtmig silence, preempt not early",  setup(OURS, 1, preempt=True),  [M],          None,     {"silent": True}, NO, "a late preempt channel comes after all multifd"),
    ("virtmig silence before main",         setup(OURS, 0, preempt=True, early_preempt=True), [], None, {"silent": True}, NO, "main is told by its magic"),
    ("virtmig preempt last",                setup(OURS, 1, preempt=True),  [M, F0],      None,     {"silent": True}, "preempt 0", "as 11.1: CH_POSTCOPY"),
    ("virtmig preempt last, unseen",        setup(OURS, 1, preempt=True),  [M, F0],      None,     {}, PEEK,        "a multifd channel too many would speak in a moment"),
    ("virtmig preempt with data",           setup(OURS, preempt=True),     [M],          bytes(8), {}, "preempt 0", "as 11.1, which looks at nothing then: a page word"),
    ("virtmig record before multifd",       setup(OURS, 1, preempt=True),  [M],          bytes(8), {}, NO,          "11.1: unknown channel magic: 0"),
    ("virtmig multifd nobody announced",    setup(OURS, preempt=True),     [M],          MULTIFD,  {}, NO,          "11.1 takes it for preempt and fails at its first bytes"),
    ("virtmig HTTP after main",             setup(OURS, preempt=True),     [M],          b"GET / ", {}, NO,         "11.1 takes it for preempt and fails at its first bytes"),
    ("virtmig agreed magic",                setup(OURS, 2, preempt=True, postcopy_magic=True), [M], POSTCOPY, {}, "preempt 0", "the upstream proposal: told at any time"),
    ("virtmig agreed magic, before main",   setup(OURS, 2, preempt=True, postcopy_magic=True), [],  POSTCOPY, {}, "preempt 0", "the upstream proposal: told at any time"),
    ("virtmig agreed, still silent",        setup(OURS, preempt=True, postcopy_magic=True), [M], None, {}, PEEK,    "with an agreement silence names nothing"),
    ("virtmig agreed, silent for good",     setup(OURS, preempt=True, postcopy_magic=True), [M], None, {"silent": True}, NO, "with an agreement silence names nothing"),
    ("virtmig magic, not agreed",           setup(OURS, preempt=True),     [M],          POSTCOPY, {}, NO,          "no released QEMU sends it"),
    ("virtmig agreed magic twice",          setup(OURS, preempt=True, postcopy_magic=True), [M, P], POSTCOPY, {}, NO, "Extra incoming migration connection; ignoring"),
    ("virtmig duplicate preempt",           setup(OURS, preempt=True),     [M, P],       None,     {}, NO,          "Extra incoming migration connection; ignoring"),
    ("virtmig recovery",                    setup(OURS, preempt=True, recovery=True), [], RECOVERY, {}, "main 0",   "as 11.1: MIGRATION_STATUS_POSTCOPY_PAUSED"),
    ("virtmig recovery, not a command",     setup(OURS, preempt=True, recovery=True), [], TLS,     {}, NO,          "stricter than 11.1, which takes any magic while paused"),
    ("virtmig TLS main",                    setup(OURS, 2),                [],           None,     {"peekable": False}, "main 0", "as 11.1"),
    ("virtmig TLS multifd",                 setup(OURS, 2),                [M],          None,     {"peekable": False}, "multifd 0", "as 11.1"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_identify(case):
    name, expected, present, first, how, result, mirrors = case
    assert mirrors, name
    if result == NO:
        with pytest.raises(ChannelError) as caught:
            identify(expected, present, first, **how)
        text = str(caught.value)
        assert "saw " in text
        assert text.endswith(missing(expected, present))
        if first:
            assert first[:4].hex(" ") in text
        return
    found = identify(expected, present, first, **how)
    if result == PEEK:
        assert found == NeedMoreBytes(4, found.reason)
        assert wants_peek(expected, present)
    else:
        assert isinstance(found, Identity)
        assert f"{found.role} {found.index}" == result
        assert found.mirrors


def test_every_row_of_every_table_decides_something():
    """No row is dead: each is the first match of some possible situation (the last may only close its table)."""
    sights = [None, QEVM, MULTIFD, POSTCOPY, RECOVERY, TLS, bytes(8)]
    presents = [[], [M], [F0], [F0, F1], [M, F0], [M, F0, F1], [M, P], [M, F0, F1, P], [M, F0, P]]
    for rule, rows in TABLES.items():
        hit = set()
        for multifd in (0, 2):
            for bits in range(64):
                flags = ("postcopy", "preempt", "early_preempt", "mapped_ram", "recovery", "postcopy_magic")
                try:
                    expected = Expected(rule, multifd, **{flag: bool(bits >> at & 1) for at, flag in enumerate(flags)})
                except LocalProtocolError:
                    continue
                for present in presents:
                    for first in sights:
                        for peekable, silent in ((True, False), (True, True), (False, False)):
                            hit.add(deciding_row(expected, present, first, peekable, silent))
        dead = [row for index, row in enumerate(rows[:-1]) if index not in hit]
        assert not dead, (rule, dead)


def deciding_row(expected, present, first, peekable, silent):
    from virtmig.stream import channel

    facts = channel._facts(expected, present, first, peekable, silent)
    return next(index for index, row in enumerate(TABLES[expected.rule]) if row.when <= facts)


def test_tables_are_whole():
    for rule, rows in TABLES.items():
        assert rows[-1].when == frozenset(), rule
        assert rows[-1].verdict is Verdict.REFUSE
        assert all(row.reason and row.mirrors for row in rows)
    used = {fact for rows in TABLES.values() for row in rows for fact in row.when}
    assert used == set(Fact)


def test_what_was_seen_is_said_in_words():
    assert "QEVM" in describe_bytes(QEVM)
    assert "multifd" in describe_bytes(MULTIFD)
    assert "postcopy magic" in describe_bytes(POSTCOPY)
    assert "TLS" in describe_bytes(TLS)
    assert "HTTP" in describe_bytes(b"GET / HTTP/1.1")
    assert "SSH" in describe_bytes(b"SSH-2.0-x")
    assert describe_bytes(None) == describe_bytes(b"") == "nothing"
    assert describe_bytes(b"\x01") == "01"


def test_an_error_says_what_was_seen_and_what_was_expected():
    with pytest.raises(ChannelError) as caught:
        identify(setup(NEW, 2, preempt=True), [M, F0], b"GET / HTTP/1.1")
    assert str(caught.value) == (
        "a connection was refused: an unknown magic; saw 47 45 54 20 2f 20 48 54 (HTTP), "
        "expected 1 of 2 multifd, preempt"
    )
    with pytest.raises(ChannelError, match="cannot be peeked, expected no further connection"):
        identify(setup(NEW), [M], peekable=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": MID, "multifd_channels": 2, "postcopy": True}, "not yet compatible with multifd"),
        ({"rule": NEW, "preempt": True}, "requires postcopy-ram"),
        ({"rule": NEW, "early_preempt": True}, "early preempt"),
        ({"rule": NEW, "multifd_channels": 256}, "256 multifd"),
        ({"rule": OLD, "postcopy": True, "preempt": True, "postcopy_magic": True}, "does not know it"),
        ({"rule": NEW, "postcopy": True, "preempt": True, "postcopy_magic": True}, "does not know it"),
        ({"rule": OURS, "postcopy_magic": True}, "without postcopy-preempt"),
    ],
)
def test_impossible_set_ups(options, message):
    with pytest.raises(LocalProtocolError, match=message):
        Expected(**options)


def test_the_postcopy_magic_is_sent_only_when_agreed():
    agreed = setup(OURS, preempt=True, postcopy_magic=True)
    assert encode_postcopy_magic(agreed) == POSTCOPY
    assert identify(agreed, [M], encode_postcopy_magic(agreed)).role is Role.PREEMPT
    with pytest.raises(LocalProtocolError, match="only when both sides agreed"):
        encode_postcopy_magic(setup(OURS, preempt=True))


# -- the order in which a destination must be connected to -----------------------------------------------------------

ORDERS = [
    (Dialect.QEMU_7_2, {"multifd_channels": 2}),
    (Dialect.QEMU_7_2, {"preempt": True, "postcopy": True, "early_preempt": True}),
    (Dialect.QEMU_10_0, {}),
    (Dialect.QEMU_10_0, {"multifd_channels": 3}),
    (Dialect.QEMU_10_0, {"multifd_channels": 3, "peekable": False}),
    (Dialect.QEMU_10_0, {"preempt": True, "postcopy": True}),
    (Dialect.QEMU_11_1, {"multifd_channels": 2, "preempt": True, "postcopy": True}),
    (Dialect.QEMU_11_1, {"multifd_channels": 2, "preempt": True, "postcopy": True, "early_preempt": True}),
    (Dialect.QEMU_11_1, {"multifd_channels": 2, "preempt": True, "postcopy": True, "peekable": False}),
    (Dialect.QEMU_11_1, {"preempt": True, "postcopy": True, "early_preempt": True}),
]


@pytest.mark.parametrize(("dialect", "options"), ORDERS)
def test_the_order_we_keep_is_named_rightly_by_that_qemus_own_rule(dialect, options):
    steps = connection_order(dialect, **options)
    set_up = {key: value for key, value in options.items() if key != "peekable"}
    expected = Expected(Rule(dialect.value), **set_up)
    peekable = options.get("peekable", True)
    present = []
    for step in steps:
        first = {Role.MAIN: QEVM, Role.MULTIFD: multifd_hello(step.index), Role.PREEMPT: None}[step.role]
        found = identify(expected, present, first if peekable else None, peekable=peekable, silent=first is None)
        assert (found.role, found.index) == (step.role, step.index)
        if wants_peek(expected, present) and peekable:
            assert step.writes_at_once
        if step.role is Role.PREEMPT:
            assert not step.writes_at_once
        present.append(found)
        assert step.reason
    assert missing(expected, present) == "no further connection"
    assert steps[0].role is Role.MAIN
    assert [step.role for step in steps].count(Role.PREEMPT) == int(options.get("preempt", False))


def test_an_early_preempt_is_held_back_before_11_1_with_multifd():
    steps = connection_order(Dialect.QEMU_11_1, multifd_channels=1, postcopy=True, preempt=True, early_preempt=True)
    assert steps[-1].when is Moment.ALL_MULTIFD_WRITTEN
    assert "wedges" in steps[-1].reason
    late = connection_order(Dialect.QEMU_11_1, multifd_channels=1, postcopy=True, preempt=True)
    assert late[-1].when is Moment.PONG_AND_ALL_MULTIFD


@pytest.mark.parametrize(
    ("dialect", "options", "message"),
    [
        (Dialect.QEMU_7_2, {"multifd_channels": 2, "postcopy": True}, "cannot do it"),
        (Dialect.QEMU_7_2, {"postcopy": True, "preempt": True}, "does not read main until"),
        (Dialect.QEMU_10_0, {"multifd_channels": 2, "postcopy": True}, "not yet compatible"),
    ],
)
def test_no_order_for_what_that_qemu_cannot_do(dialect, options, message):
    with pytest.raises(LocalProtocolError, match=message):
        connection_order(dialect, **options)
