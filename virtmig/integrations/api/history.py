"""What the records say, read as they grow: each line once, whoever writes it. Nothing is held for a client.

A record that has ended never changes again; of it only its first row, its last sample and its end stay in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from virtmig.cli.display import MonotonePercent
from virtmig.progress import Outcome
from virtmig.report.records import SUFFIX, Began, Ended, Record, Refused, Row, Sampled

_ROWS: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)
#: read at once; a line of a record is far below it
_PIECE_BYTES = 4 << 20
#: heads of records kept in memory; a folder holds at most records.KEPT_RECORDS
_MOST_HEADS = 2000


class _Kind(msgspec.Struct):
    row: str


_KINDS = msgspec.json.Decoder(_Kind)


class Head(msgspec.Struct, kw_only=True):
    """What is known of one record so far."""

    began: Began
    path: Path
    sample: Sampled | None = None
    percent: float = 0.0  # never falls
    refused: Refused | None = None
    ended: Ended | None = None
    last_at_s: float = 0.0
    broken_off: bool = False

    @property
    def id(self) -> str:
        return self.began.id

    @property
    def outcome(self) -> Outcome | None:
        return self.ended.outcome if self.ended is not None else None

    @property
    def over(self) -> bool:
        """Whether its migration has ended, or whoever ran it was killed."""
        return self.ended is not None or self.refused is not None or self.broken_off

    @property
    def end_time(self) -> float | None:
        """time.time() of its end; of a broken one when it was last heard of."""
        return self.began.time + self.last_at_s if self.over else None


class Follower:
    """One record, read on from where it was left. Every method may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head: Head | None = None
        self._offset = 0
        self._percent = MonotonePercent()
        self._lock = threading.Lock()

    def update(self) -> Head | None:
        """Read what was added. None: it is no record (yet), or it has been removed."""
        with self._lock:
            if self.head is not None and (self.head.ended is not None or self.head.refused is not None):
                return self.head
            self._read_on()
            head = self.head
            if head is not None and not head.over and not _alive(head.began.pid):
                self._read_on()  # what was written before it died, and after our first look
                head.broken_off = head.ended is None and head.refused is None
            return self.head

    def _read_on(self) -> None:
        last_sample = b""
        for line in self._new_lines():
            last_sample = self._take(line) or last_sample
        if last_sample and self.head is not None:
            self._sampled(last_sample)

    def _new_lines(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                while piece := file.read(_PIECE_BYTES):
                    whole, newline, _ = piece.rpartition(b"\n")
                    if not newline:
                        return
                    self._offset += len(whole) + 1
                    file.seek(self._offset)
                    yield from whole.split(b"\n")
        except OSError:
            return

    def _take(self, line: bytes) -> bytes:
        """Returns the line when it is a sample: only the last of many is worth decoding."""
        try:
            if self.head is not None and _KINDS.decode(line).row == "sample":
                return line
            row = _ROWS.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
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

    def _sampled(self, line: bytes) -> None:
        assert self.head is not None
        try:
            row = _ROWS.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return
        if isinstance(row, Sampled):
            self.head.sample = row
            self.head.percent = self._percent.update(row.progress)
            self.head.last_at_s = max(self.head.last_at_s, row.at_s)


class History:
    """Every record of a folder. `update` reads what was added since the last time; cheap when nothing was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._followers: dict[str, Follower] = {}
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """The newest first."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.name.endswith(SUFFIX)]
        except OSError:
            names = []
        return sorted((name.removesuffix(SUFFIX) for name in names), reverse=True)

    def head(self, record_id: str) -> Head | None:
        """None for no such record."""
        follower = self.follower(record_id)
        return follower.update() if follower is not None else None

    def follower(self, record_id: str) -> Follower | None:
        with self._lock:
            found = self._followers.get(record_id)
            if found is None:
                path = self.folder / f"{record_id}{SUFFIX}"
                if not path.is_file() or path.parent != self.folder:
                    return None
                if len(self._followers) >= _MOST_HEADS:
                    self._forget_missing()
                found = self._followers[record_id] = Follower(path)
            return found

    def heads(self) -> Iterator[Head]:
        """The newest first. Files that are no records are left out."""
        for record_id in self.ids():
            head = self.head(record_id)
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
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    yield offset, None
    except OSError:
        return


def whole_record(head: Head) -> Record:
    """Every row of it, for a report."""
    rows = [row for _, row in rows_from(head.path) if row is not None]
    return Record(head.began, tuple(rows[1:]), head.path)


def _alive(pid: int) -> bool:
    """Whether that process runs; one that has ended and was not waited for does not."""
    if pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
