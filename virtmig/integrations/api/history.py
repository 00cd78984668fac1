"""What the records say, read as they grow: each line once, whoever writes it. Nothing is held for a client.

A record that has ended never changes again; of it only its first row, its last sample and its end stay in memory.
Only a postcopy that was let go of has no end yet: the hosts are asked about it, and what they say becomes its last row.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from virtmig.cli.display import MonotonePercent
from virtmig.progress import Outcome, Progress, Status, Whereabouts
from virtmig.report.records import SUFFIX, Began, Ended, Record, Refused, Row, Said, Sampled, alive, encode_row

log = logging.getLogger("virtmig.api")

#: virtmig's own word for how it ended; "broken off": whoever ran it was killed, and only the hosts can tell
Ending = Literal[
    "completed", "aborted", "failed", "refused", "detached", "postcopy-interrupted", "broken off"
]  # fmt: skip

_ROWS: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)
#: read at once, and the longest line
_PIECE_BYTES = 4 << 20
_LINE_LONGEST_BYTES = 64 << 20
#: what a line that cannot be read may raise
_DAMAGED = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
#: exit statuses from here on: a signal ended the process (sh)
KILLED = 128
#: hosts are asked again so long after they have said that a postcopy goes on, or anything else
_AGAIN_S, _LATER_S = 2.0, 30.0
_MOST_LOOKS = 4
#: heads of records kept in memory; a folder holds at most records.KEPT_RECORDS
_MOST_HEADS = 2000


class _Kind(msgspec.Struct):
    row: str


_KINDS = msgspec.json.Decoder(_Kind)


class _Counters(msgspec.Struct):
    """What a percentage is made from; the rest of a sample costs time."""

    progress: Progress
    converging: bool | None = None


_COUNTERS = msgspec.json.Decoder(_Counters)


class Looked(msgspec.Struct, frozen=True):
    """What both hosts say of a postcopy that was let go of. `goes_on`: memory still moves."""

    guest: Whereabouts
    sentence: str
    goes_on: bool = False

    @property
    def status(self) -> Status | None:
        """How it has ended, where that is certain."""
        if self.guest is Whereabouts.DESTINATION:
            return Status.COMPLETED
        return Status.FAILED if self.guest in (Whereabouts.LOST, Whereabouts.DOUBLED) else None


class Head(msgspec.Struct, kw_only=True):
    """What is known of one record so far."""

    began: Began
    path: Path
    sample: Sampled | None = None
    percent: float = 0.0  # never falls while memory converges; where it does not, of this moment
    refused: Refused | None = None
    ended: Ended | None = None
    last_at_s: float = 0.0
    broken_off: bool = False
    exit_code: int | None = None  # of a broken one that the API has started
    looked: Looked | None = None

    @property
    def id(self) -> str:
        return self.began.id

    @property
    def detached(self) -> bool:
        """Whether nobody has seen its end yet, for it went on by itself."""
        return self.ended is not None and self.ended.outcome.status is Status.DETACHED

    @property
    def outcome(self) -> Outcome | None:
        """As the record has it, or as the hosts have said since then."""
        if self.ended is None or self.looked is None or not self.detached:
            return self.ended.outcome if self.ended is not None else None
        found = msgspec.structs.replace(self.ended.outcome, guest=self.looked.guest, sentence=self.looked.sentence)
        if self.looked.guest is Whereabouts.SPLIT and not self.looked.goes_on:
            words = "the connection between the hosts broke"
            return msgspec.structs.replace(found, status=Status.INTERRUPTED, error=words, hint="POST recover")
        return found

    @property
    def over(self) -> bool:
        """Whether its migration has ended as far as anybody can tell, or whoever ran it was killed."""
        outcome = self.outcome
        if outcome is not None and outcome.status is Status.DETACHED:
            return outcome.guest is not Whereabouts.SPLIT
        return outcome is not None or self.refused is not None or self.broken_off

    @property
    def ending(self) -> Ending | None:
        """None while it runs. A record that stops early tells no end, but the process's exit status does."""
        outcome = self.outcome
        if outcome is not None:
            return outcome.status.value
        if self.refused is not None:
            return "refused"
        if not self.broken_off:
            return None
        return "broken off" if self.exit_code is None or self.exit_code >= KILLED else ending_of(self.exit_code)

    @property
    def end_time(self) -> float | None:
        """time.time() of its end; of a broken one when it was last heard of."""
        return self.began.time + self.last_at_s if self.over else None


def ending_of(exit_code: int) -> Ending:
    """Of `virtmig migrate` that ended by itself."""
    return "completed" if exit_code == 0 else "failed"


class Follower:
    """One record, read on from where it was left. Every method may be called from any thread."""

    def __init__(self, path: Path, exit_code: Callable[[str], int | None] = lambda _id: None) -> None:
        self.path = path
        self._exit_code = exit_code
        self.head: Head | None = None
        self._offset = 0
        self._percent = MonotonePercent()
        self._lock = threading.Lock()

    def update(self) -> Head | None:
        """Read what was added. None: it is no record (yet), or it has been removed."""
        with self._lock:
            head = self.head
            if head is not None and ((head.ended is not None and not head.detached) or head.refused is not None):
                return head
            self._read_on()
            head = self.head
            if head is not None and not head.over and not alive(head.began):
                self._read_on()  # what was written before it died, and after our first look
                head.broken_off = head.ended is None and head.refused is None
            if head is not None and head.broken_off and head.exit_code is None:
                head.exit_code = self._exit_code(head.id)
            return head

    def looked(self, looked: Looked, *, write: bool) -> None:
        """What the hosts say now; an end that is certain becomes the record's last row."""
        with self._lock:
            head = self.head
            if head is None or head.ended is None or not head.detached:
                return
            head.looked = looked
            if looked.status is None:
                return
            words = {"sentence": looked.sentence, "error": "", "hint": ""}
            outcome = msgspec.structs.replace(head.ended.outcome, status=looked.status, guest=looked.guest, **words)
            row = Ended(at_s=round(max(head.last_at_s, time.time() - head.began.time), 3), outcome=outcome)
            if write:
                _append(self.path, row)
            head.ended, head.last_at_s = row, row.at_s

    def _read_on(self) -> None:
        last_sample = b""
        for line in self._new_lines():
            last_sample = self._take(line) or last_sample
        if last_sample and self.head is not None:
            self._sampled(last_sample)

    def _new_lines(self) -> Iterator[bytes]:
        length = _PIECE_BYTES
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                while piece := file.read(length):
                    whole, newline, _ = piece.rpartition(b"\n")
                    if not newline:
                        if len(piece) < length or length >= _LINE_LONGEST_BYTES:
                            return
                        length *= 2
                    else:
                        self._offset += len(whole) + 1
                        yield from whole.split(b"\n")
                    file.seek(self._offset)
        except OSError:
            return

    def _take(self, line: bytes) -> bytes:
        """Returns the line when it is a sample: of many, only the last one's row is kept."""
        try:
            if self.head is not None and _KINDS.decode(line).row == "sample":
                self._count(_COUNTERS.decode(line), self.head)
                return line
            row = _ROWS.decode(line)
        except _DAMAGED:
            return b""
        if self.head is None:
            if isinstance(row, Began):
                self.head = Head(began=row, path=self.path)
            return b""
        self.head.last_at_s = row.at_s
        if isinstance(row, Ended):
            self.head.ended = row
        elif isinstance(row, Refused):
            self.head.refused = row
        return b""

    def _count(self, counters: _Counters, head: Head) -> None:
        """From every sample, so that it does not matter who looked when."""
        if counters.converging is False:  # what had been reached says nothing any more
            self._percent = MonotonePercent()
        head.percent = self._percent.update(counters.progress)

    def _sampled(self, line: bytes) -> None:
        assert self.head is not None
        try:
            row = _ROWS.decode(line)
        except _DAMAGED:
            return
        if isinstance(row, Sampled):
            self.head.sample = row
            self.head.last_at_s = max(self.head.last_at_s, row.at_s)


def _append(path: Path, row: Ended | Said) -> None:
    """To a record that nobody writes any more. A disk that has no room costs a warning."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = end > 0 and file.read(1) != b"\n"
            file.write(b"\n" * torn + encode_row(row))
    except OSError as error:
        log.warning("%s: %s is not kept: %s", path, type(row).__name__, error.strerror or error)


class _Look:
    """What was asked of the hosts of one record."""

    def __init__(self) -> None:
        self.looked: Looked | None = None
        self.due = 0.0
        self.under_way = False
        self.came = threading.Event()


class Looks:
    """Hosts asked in the background, a few at once, and each of them not all the time. `look`: None if nobody can."""

    def __init__(self, look: Callable[[Head], Looked | None]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._known: dict[str, _Look] = {}

    def now(self, head: Head, *, wait_s: float = 0.0) -> Looked | None:
        """What they said last; with `wait_s` their first answer is waited for."""
        with self._lock:
            known = self._known.setdefault(head.id, _Look())
            busy = sum(each.under_way for each in self._known.values())
            if not known.under_way and time.monotonic() >= known.due and busy < _MOST_LOOKS:
                known.under_way = True
                threading.Thread(target=self._ask, args=(head, known), name="virtmig-look", daemon=True).start()
        if wait_s and known.looked is None:
            known.came.wait(wait_s)
        return known.looked

    def _ask(self, head: Head, known: _Look) -> None:
        looked = None
        try:
            looked = self._look(head)
        except Exception as error:
            log.warning("where %s is: %s", head.began.domain, error)
        with self._lock:
            known.looked = looked or known.looked
            again = looked is not None and looked.guest is Whereabouts.SPLIT
            known.due = time.monotonic() + (_AGAIN_S if again else _LATER_S)
            known.under_way = False
        known.came.set()


class History:
    """Every record of a folder. `update` reads what was added since the last time; cheap when nothing was.

    `exit_code`: of the process of a record, where it is known. `readonly`: no record gets a last row.
    """

    def __init__(
        self,
        folder: Path,
        *,
        exit_code: Callable[[str], int | None] = lambda _id: None,
        looks: Looks | None = None,
        readonly: bool = False,
    ) -> None:
        self.folder = folder
        self._exit_code = exit_code
        self._looks = looks
        self._readonly = readonly
        self._followers: dict[str, Follower] = {}
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """The newest first."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.name.endswith(SUFFIX)]
        except OSError:
            names = []
        return sorted((name.removesuffix(SUFFIX) for name in names), reverse=True)

    def head(self, record_id: str, *, wait_s: float = 0.0) -> Head | None:
        """None for no such record. Hosts that were never asked about a detached one are waited for so long."""
        follower = self.follower(record_id)
        head = follower.update() if follower is not None else None
        if follower is not None and head is not None and head.detached and self._looks is not None:
            looked = self._looks.now(head, wait_s=wait_s)
            if looked is not None:
                follower.looked(looked, write=not self._readonly)
        return head

    def said(self, head: Head, text: str, what: str, value: int | None) -> None:
        """What was done to a migration whose process has gone, as a row of its record."""
        at_s = round(max(head.last_at_s, time.time() - head.began.time), 3)
        _append(head.path, Said(at_s=at_s, text=text, what=what, value=value))

    def follower(self, record_id: str) -> Follower | None:
        with self._lock:
            found = self._followers.get(record_id)
            if found is None:
                path = self.folder / f"{record_id}{SUFFIX}"
                if not path.is_file() or path.parent != self.folder:
                    return None
                if len(self._followers) >= _MOST_HEADS:
                    self._forget_missing()
                found = self._followers[record_id] = Follower(path, self._exit_code)
            return found

    def heads(self) -> Iterator[Head]:
        """The newest first. Files that are no records are left out."""
        for record_id in self.ids():
            try:
                head = self.head(record_id)
            except Exception as error:  # one that nobody foresaw must not hide the others
                log.warning("%s%s cannot be read: %s: %s", record_id, SUFFIX, type(error).__name__, error)
                continue
            if head is not None and head.id == record_id:
                yield head

    def _forget_missing(self) -> None:
        there = set(self.ids())
        for name in [name for name in self._followers if name not in there]:
            del self._followers[name]


def rows_from(path: Path, offset: int = 0) -> Iterator[tuple[int, Row | None]]:
    """(offset behind the line, row) of every whole line from `offset` on; None for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    yield offset, _ROWS.decode(line)
                except _DAMAGED:
                    yield offset, None
    except OSError:
        return


def whole_record(head: Head) -> Record:
    """Every row of it, for a report."""
    rows = [row for _, row in rows_from(head.path) if row is not None]
    return Record(head.began, tuple(rows[1:]), head.path)
