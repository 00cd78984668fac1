"""The states of a migration, as QEMUs of three ages name and pass them, and a destination's postcopy states.

Tables are data, `(state, event): state`, walked by virtmig.transitions. The states
are enum MigrationStatus (qapi/migration.json) and enum PostcopyState (migration/postcopy-ram.h); the events are named
here for what QEMU does at migrate_set_state. A newer QEMU may report a state nobody knew: `Track` takes what
query-migrate or the event MIGRATION says, notes what was not expected, and goes on.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from virtmig.stream.wire import Dialect


class Status(enum.StrEnum):
    """enum MigrationStatus."""

    NONE = "none"
    SETUP = "setup"
    WAIT_UNPLUG = "wait-unplug"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COLO = "colo"
    POSTCOPY_DEVICE = "postcopy-device"  # since 10.2
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"  # since 9.1
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"  # since 11.0
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class PostcopyState(enum.StrEnum):
    """enum PostcopyState: how far a destination's postcopy is; told by commands on the stream."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    RUNNING = "running"
    END = "end"


class Side(enum.StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


Table = Mapping[tuple[str, str], str]
S, P = Status, PostcopyState

#: the states in which a migration is over (or none was begun)
FINAL = frozenset({S.NONE, S.COMPLETED, S.FAILED, S.CANCELLED})
#: once here, the guest's memory is on both hosts: nothing goes back to the source alone
SPLIT = frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER})

# fmt: off
_BEGIN: dict[tuple[str, str], str] = {
    (S.NONE, "migrate"): S.SETUP,
    (S.COMPLETED, "migrate"): S.SETUP,
    (S.FAILED, "migrate"): S.SETUP,
    (S.CANCELLED, "migrate"): S.SETUP,
    (S.SETUP, "set up"): S.ACTIVE,
    (S.SETUP, "failover device in place"): S.WAIT_UNPLUG,       # virtio-net failover
    (S.WAIT_UNPLUG, "unplugged"): S.ACTIVE,
    (S.CANCELLING, "cleaned up"): S.CANCELLED,
}
_COLO: dict[tuple[str, str], str] = {
    (S.ACTIVE, "colo"): S.COLO,
    (S.COLO, "failover"): S.COMPLETED,
}

#: 7.2 shows `device` only with pause-before-switchover, and lets a postcopy be cancelled.
SOURCE_7_2: Table = {
    **_BEGIN, **_COLO,
    (S.ACTIVE, "pause before switchover"): S.PRE_SWITCHOVER,
    (S.PRE_SWITCHOVER, "migrate-continue"): S.DEVICE,
    (S.PRE_SWITCHOVER, "migrate-continue to postcopy"): S.POSTCOPY_ACTIVE,
    (S.ACTIVE, "all sent"): S.COMPLETED,
    (S.DEVICE, "all sent"): S.COMPLETED,
    (S.ACTIVE, "start postcopy"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_ACTIVE, "all sent"): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, "connection lost"): S.POSTCOPY_PAUSED,
    (S.POSTCOPY_PAUSED, "migrate resume"): S.POSTCOPY_RECOVER,
    (S.POSTCOPY_RECOVER, "resume acknowledged"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, "connection lost"): S.POSTCOPY_PAUSED,
    **{(state, "cancel"): S.CANCELLING for state in (
        S.SETUP, S.WAIT_UNPLUG, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE,
        S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER)},
    **{(state, "error"): S.FAILED for state in (
        S.SETUP, S.WAIT_UNPLUG, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE, S.COLO, S.POSTCOPY_ACTIVE)},
}

#: 10.0 always passes `device` at the switchover, and goes through postcopy-recover-setup (since 9.1).
SOURCE_10_0: Table = {
    **_BEGIN, **_COLO,
    (S.ACTIVE, "pause before switchover"): S.PRE_SWITCHOVER,
    (S.PRE_SWITCHOVER, "migrate-continue"): S.DEVICE,
    (S.ACTIVE, "switchover"): S.DEVICE,
    (S.DEVICE, "all sent"): S.COMPLETED,
    (S.DEVICE, "start postcopy"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_ACTIVE, "all sent"): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, "connection lost"): S.POSTCOPY_PAUSED,
    (S.POSTCOPY_PAUSED, "migrate resume"): S.POSTCOPY_RECOVER_SETUP,
    (S.POSTCOPY_RECOVER_SETUP, "connected"): S.POSTCOPY_RECOVER,
    (S.POSTCOPY_RECOVER_SETUP, "connection lost"): S.POSTCOPY_PAUSED,
    (S.POSTCOPY_RECOVER, "resume acknowledged"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, "connection lost"): S.POSTCOPY_PAUSED,
    **{(state, "cancel"): S.CANCELLING for state in (
        S.SETUP, S.WAIT_UNPLUG, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE)},
    **{(state, "error"): S.FAILED for state in (
        S.SETUP, S.WAIT_UNPLUG, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE, S.COLO, S.POSTCOPY_ACTIVE)},
}

#: 11.1 waits in postcopy-device for PONG(0x42), and passes `failing` before `failed`.
SOURCE_11_1: Table = {
    **{pair: state for pair, state in SOURCE_10_0.items() if pair[1] != "error"},
    (S.DEVICE, "start postcopy"): S.POSTCOPY_DEVICE,
    (S.POSTCOPY_DEVICE, "package loaded"): S.POSTCOPY_ACTIVE,
    **{(state, "error"): S.FAILING for state in (
        S.SETUP, S.WAIT_UNPLUG, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE, S.COLO, S.POSTCOPY_DEVICE, S.POSTCOPY_ACTIVE)},
    (S.FAILING, "cleaned up"): S.FAILED,
}

DESTINATION_7_2: Table = {
    (S.NONE, "migrate-incoming"): S.SETUP,
    (S.SETUP, "main connected"): S.ACTIVE,
    (S.ACTIVE, "loaded"): S.COMPLETED,
    (S.ACTIVE, "colo"): S.COLO,
    (S.COLO, "failover"): S.COMPLETED,
    (S.ACTIVE, "listen"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_ACTIVE, "all received"): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, "connection lost"): S.POSTCOPY_PAUSED,
    (S.POSTCOPY_PAUSED, "main connected"): S.POSTCOPY_RECOVER,
    (S.POSTCOPY_RECOVER, "resume"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, "connection lost"): S.POSTCOPY_PAUSED,
    **{(state, "error"): S.FAILED for state in (S.SETUP, S.ACTIVE, S.COLO, S.POSTCOPY_ACTIVE)},
}
DESTINATION_10_0: Table = DESTINATION_7_2
DESTINATION_11_1: Table = {
    **DESTINATION_7_2,
    (S.ACTIVE, "listen"): S.POSTCOPY_DEVICE,
    (S.POSTCOPY_DEVICE, "run"): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_DEVICE, "error"): S.FAILED,
    (S.FAILED, "migrate-incoming"): S.SETUP,                    # only with exit-on-error=false
}

#: The same in all three (loadvm_postcopy_handle_* in migration/savevm.c). LISTEN without a DISCARD before it is let
#: through but leaves the state at DISCARD, so that RUN is refused: whoever sends a postcopy must discard something.
POSTCOPY_INCOMING: Table = {
    (P.NONE, "advise"): P.ADVISE,
    (P.ADVISE, "discard"): P.DISCARD,
    (P.DISCARD, "discard"): P.DISCARD,
    (P.ADVISE, "listen"): P.DISCARD,
    (P.DISCARD, "listen"): P.LISTENING,
    (P.LISTENING, "run"): P.RUNNING,
    (P.RUNNING, "end"): P.END,
    (P.LISTENING, "end"): P.END,
    (P.END, "cleaned up"): P.NONE,
}
# fmt: on

TABLES: dict[tuple[Dialect, Side], Table] = {
    (Dialect.QEMU_7_2, Side.SOURCE): SOURCE_7_2,
    (Dialect.QEMU_10_0, Side.SOURCE): SOURCE_10_0,
    (Dialect.QEMU_11_1, Side.SOURCE): SOURCE_11_1,
    (Dialect.QEMU_7_2, Side.DESTINATION): DESTINATION_7_2,
    (Dialect.QEMU_10_0, Side.DESTINATION): DESTINATION_10_0,
    (Dialect.QEMU_11_1, Side.DESTINATION): DESTINATION_11_1,
}


def status(text: str) -> Status | str:
    """What a QEMU calls its state; a word of a QEMU newer than this table stays a plain string."""
    try:
        return Status(text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True)
class Observation:
    """`known`: the word is in the tables of any age. `expected`: the state before leads here, over `skipped` states.

    A poll misses short states, so a state that can be reached over others is expected too.
    """

    state: Status | str
    known: bool
    expected: bool
    skipped: tuple[str, ...]
    reason: str


class Track:
    """The states one side of one migration was seen in. Never fails: what was not expected is in `surprises`."""

    def __init__(self, dialect: Dialect, side: Side, state: str = Status.NONE) -> None:
        self._table = TABLES[dialect, side]
        self._dialect, self._side = dialect, side
        self.state: Status | str = status(state)
        self.surprises: list[Observation] = []

    def observe(self, text: str) -> Observation | None:
        """A state was reported; None when it is the one we are in."""
        after = status(text)
        if after == self.state:
            return None
        before, self.state = self.state, after
        who = f"QEMU {self._dialect} {self._side}"
        if not isinstance(after, Status):
            seen = Observation(after, False, False, (), f"{who}: {text!r} is a state of a newer QEMU")
        elif not isinstance(before, Status):
            seen = Observation(after, True, True, (), f"{who}: back in a known state from {before!r}")
        else:
            way = _way(self._table, before, after)
            if way is None:
                seen = Observation(after, True, False, (), f"{who}: {after} does not follow {before}")
            else:
                over = f" over {', '.join(way)}" if way else ""
                seen = Observation(after, True, True, way, f"{who}: {after} follows {before}{over}")
        if not seen.expected:
            self.surprises.append(seen)
        return seen


def _way(table: Table, before: str, after: str) -> tuple[str, ...] | None:
    """The states between, on a shortest way; None when there is no way. Over a final state leads none."""
    ways: dict[str, tuple[str, ...]] = {before: ()}
    queue = [before]
    for state in queue:
        for (known, _), following in table.items():
            if known != state or following in ways:
                continue
            way = ways[state] if state == before else (*ways[state], state)
            if following == after:
                return tuple(str(passed) for passed in way)
            if following not in FINAL:
                ways[following] = way
                queue.append(following)
    return None


def mermaid(table: Table, title: str = "") -> str:
    """A table as a Mermaid state diagram, one line per pair of states, in the table's own order."""
    names: dict[tuple[str, str], list[str]] = {}
    for (before, event), after in table.items():
        names.setdefault((before, after), []).append(event)
    lines = [*(["---", f"title: {title}", "---"] if title else []), "stateDiagram-v2", "    direction LR"]
    states = dict.fromkeys(state for pair in names for state in pair)
    lines += [f'    state "{state}" as {_identifier(state)}' for state in states if "-" in state]
    first = next(iter(table))[0]
    lines.append(f"    [*] --> {_identifier(first)}")
    lines += [
        f"    {_identifier(before)} --> {_identifier(after)}: {' / '.join(events)}"
        for (before, after), events in names.items()
    ]
    return "\n".join(lines) + "\n"


def differences(older: Table, newer: Table) -> tuple[str, ...]:
    """What a newer QEMU does otherwise, a line each: for a person who compares two ages."""
    lines = []
    for pair in dict.fromkeys((*older, *newer)):
        was, now = older.get(pair), newer.get(pair)
        if was != now:
            lines.append(f"{pair[0]} --{pair[1]}--> {was or 'nothing'}, now {now or 'nothing'}")
    return tuple(lines)


def _identifier(state: str) -> str:
    return str(state).replace("-", "_")
