"""The flight recorder: a Watcher that writes what it hears into a record and passes it on. It never hurts a migration.

A thread of its own writes each row as soon as it can: whoever says something never waits for a disk. Where a disk has
no room, rows are left out, and the record says how many; room for the last one is set aside from the beginning.
Samples get rarer as a migration gets longer, so that a record is bounded whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from virtmig.agreement import Plan
from virtmig.estimate import Estimate
from virtmig.facts import GuestFacts, HostFacts
from virtmig.link.asking import Carried
from virtmig.policy import Decision
from virtmig.progress import Outcome, Phase, Progress
from virtmig.report.records import (
    ID,
    RECORD_ID,
    SUFFIX,
    Agents,
    AgentsWord,
    Began,
    Decided,
    Ended,
    Event,
    Refused,
    Row,
    Said,
    Sampled,
    boot_id,
    encode_row,
    forget_old,
    records_folder,
    start_ticks,
)
from virtmig.request import MigrationRequest
from virtmig.watchers import Later

if TYPE_CHECKING:
    from virtmig.forecast import Forecast

log = logging.getLogger("virtmig")

LARGEST_BYTES = 16 << 20
#: kept free behind the last row for the end, and taken this much at a time
RESERVED_BYTES = 16 << 10
_STEP_BYTES = 48 << 10
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: what a disk that does not answer may cost, at the beginning and at the end
PATIENCE_S = 2.0
#: (from this second on, at least so many seconds between two samples)
_RARER = ((3600.0, 10.0), (600.0, 1.0), (60.0, 0.5), (0.0, 0.0))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Recorder:
    """The record of one migration; `id` is "" where none can be kept. Any thread may say something.

    `warn` gets one sentence when something cannot be kept; it must not wait.
    """

    def __init__(self, folder: Path | None = None, *, warn: Callable[[str], object] = log.warning) -> None:
        self.id = ""
        self.path: Path | None = None
        self._folder = folder or records_folder()
        self._warn = warn
        self._warned = False
        self._later = Later("record", warn)
        self._began = time.monotonic()
        self._last_sample = -1.0
        self._last_phase: Phase | None = None
        self._last_carried = -1.0
        # of the thread that writes
        self._fd = -1
        self._bytes = 0
        self._reserved_to = 0
        self._head = b""  # the first row, until it is written: without it there is no record
        self._torn = False  # a row was cut: the next one begins a new line
        self._missing = 0

    def begin(
        self,
        request: MigrationRequest,
        plan: Plan,
        *,
        source: HostFacts | None = None,
        destination: HostFacts | None = None,
        guest: GuestFacts | None = None,
        changes: Sequence[str] = (),
        estimate: Estimate | None = None,
    ) -> None:
        """Make the file. Never raises; returns after PATIENCE_S at most, and the file may come later then."""
        if self._folder is None:
            return
        began = Began(
            id="",
            time=time.time(),
            domain=plan.domain,
            source=plan.source,
            destination=plan.destination,
            request={key: request[key] for key in request},
            plan=plan,
            source_facts=source,
            destination_facts=destination,
            guest=guest,
            changes=tuple(changes),
            estimate=estimate,
            pid=os.getpid(),
            boot_id=boot_id(),
            start_ticks=start_ticks(os.getpid()) or 0,
        )
        self._later.put(partial(self._open, self._folder, began))
        if not self._later.flush(PATIENCE_S):
            self._warn_once(f"the record of this migration may be missing: {self._folder} does not answer")

    def refused(self, reasons: Sequence[tuple[str, str, str]]) -> None:
        self._end(Refused(at_s=self._now(), reasons=tuple(reasons)))

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None:
        """Begun already, with more than this."""

    def sample(self, progress: Progress, expected: Forecast) -> None:
        """A change of phase is always kept."""
        now = self._now()
        changed = progress.phase is not self._last_phase
        if not changed and now - self._last_sample < self._apart(now):
            return
        self._last_sample, self._last_phase = now, progress.phase
        row = Sampled(
            at_s=now,
            progress=progress,
            eta_low_s=expected.eta_low_s,
            eta_high_s=expected.eta_high_s,
            converging=expected.converging,
        )
        self._put(row, may_be_left_out=not changed)

    def decided(self, decision: Decision) -> None:
        self._put(Decided(at_s=self._now(), decision=decision))

    def message(self, text: str, level: str = "info") -> None:
        self._put(Said(at_s=self._now(), text=text, level=level))

    def intervened(self, text: str, what: str, value: int | None = None) -> None:
        """Somebody else did something to the migration; `what` and `value` are those of Said."""
        self._put(Said(at_s=self._now(), text=text, what=what, value=value))

    def event(self, at: float, host: str, what: str, detail: int) -> None:
        """`at`: time.monotonic() when it arrived."""
        self._put(Event(at_s=round(at - self._began, 3), host=host, what=what, detail=detail))

    def agents(self, said: AgentsWord) -> None:
        """What they have carried is kept as rarely as samples are."""
        counts = isinstance(said, Carried)
        if counts:
            now = self._now()
            if now - self._last_carried < max(0.5, self._apart(now)):
                return
            self._last_carried = now
        self._put(Agents(at_s=self._now(), said=said), may_be_left_out=counts)

    def finish(self, outcome: Outcome) -> None:
        self._end(Ended(at_s=self._now(), outcome=outcome))

    def flush(self, seconds: float = PATIENCE_S) -> bool:
        """Wait until everything is written; whether it is."""
        return self._later.flush(seconds)

    @staticmethod
    def _apart(now: float) -> float:
        return next(seconds for begin, seconds in _RARER if now >= begin)

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _put(self, row: Row, *, may_be_left_out: bool = False) -> None:
        if self._folder is not None:
            self._later.put(partial(self._write, row), may_be_left_out=may_be_left_out)

    def _end(self, row: Refused | Ended) -> None:
        if self._folder is None:
            return
        self._later.put(partial(self._write_last, row))
        if not self._later.close(PATIENCE_S):
            self._warn_once(f"the record of this migration is not complete: {self._folder} does not answer")

    # -- in the thread that writes -------------------------------------------------------------------------------------

    def _open(self, folder: Path, began: Began) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            forget_old(folder)
            name, self.path, self._fd = _make(folder)
            self._head = encode_row(msgspec.structs.replace(began, id=name))
        except (OSError, msgspec.MsgspecError, TypeError) as error:
            self._close()
            self._warn_once(f"no record of this migration is kept: {folder}: {error}")
            return
        self.id = name
        self._append_head()

    def _write(self, row: Row) -> None:
        if self._fd >= 0 and self._bytes <= LARGEST_BYTES and not self._append(row):
            self._missing += 1

    def _write_last(self, row: Refused | Ended) -> None:
        """With the room that was set aside. Where there is none, again for as long as anybody waits."""
        ends = time.monotonic() + PATIENCE_S - 0.2
        while self._fd >= 0 and not self._append(row, last=True) and time.monotonic() < ends:
            time.sleep(0.1)
        self._close()

    def _append_head(self, *, last: bool = False) -> bool:
        if self._head and self._append_line(self._head, last=last):
            self._head = b""
        return not self._head

    def _append(self, row: Row, *, last: bool = False) -> bool:
        """Whether it is in the file, behind what must come before it."""
        try:
            lines = encode_row(row)
        except (msgspec.MsgspecError, TypeError) as error:
            self._warn_once(f"the record of this migration has gaps: {error}")
            return False
        if self._missing:
            gap = f"rows are missing here, which could not be written: {self._missing}"
            lines = encode_row(Said(at_s=row.at_s, text=gap, level="warning")) + lines
        if not (self._append_head(last=last) and self._append_line(lines, last=last)):
            return False
        self._missing = 0
        return True

    def _append_line(self, lines: bytes, *, last: bool) -> bool:
        try:
            if not last:
                self._reserve(len(lines))
            rest = b"\n" + lines if self._torn else lines
            while rest:
                written = os.write(self._fd, rest)
                self._bytes += written
                self._torn = True
                rest = rest[written:]
        except OSError as error:
            self._warn_once(f"the record of this migration has gaps: {self.path}: {error}")
            return False
        self._torn = False
        return True

    def _reserve(self, length_bytes: int) -> None:
        """Room for a row, and for the last one behind it. Raises OSError where there is none."""
        if self._bytes + length_bytes + RESERVED_BYTES <= self._reserved_to:
            return
        wanted = self._bytes + length_bytes + RESERVED_BYTES + _STEP_BYTES
        if not _libc.fallocate(self._fd, _KEEP_SIZE, 0, wanted):
            self._reserved_to = wanted
            return
        number = ctypes.get_errno()
        if number in _NO_ROOM:
            raise OSError(number, os.strerror(number))
        if number != errno.EINTR:  # a file system that cannot: nothing is set aside
            self._reserved_to = 2 * LARGEST_BYTES

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)

    def _close(self) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size)  # gives back what was set aside and not needed
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1


def _make(folder: Path) -> tuple[str, Path, int]:
    """A new file, open: under the id that whoever started us has given out already, else under a new one."""
    made = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{secrets.token_hex(3)}"
    given = os.environ.get(RECORD_ID, "")
    for name in (given, made) if ID.fullmatch(given) else (made,):
        path = folder / f"{name}{SUFFIX}"
        with contextlib.suppress(FileExistsError):
            return name, path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
