"""The flight recorder: a Watcher that writes what it hears into a record and passes it on. It never hurts a migration.

A record that cannot be written is given up with one warning. Samples get rarer as a migration gets longer, so that a
record is bounded whatever happens.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
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
    encode_row,
    forget_old,
    records_folder,
)
from virtmig.request import MigrationRequest

if TYPE_CHECKING:
    from virtmig.forecast import Forecast

log = logging.getLogger("virtmig")

LARGEST_BYTES = 16 << 20
#: (from this second on, at least so many seconds between two samples)
_RARER = ((3600.0, 10.0), (600.0, 1.0), (60.0, 0.5), (0.0, 0.0))


class Recorder:
    """The record of one migration; `id` is "" where none can be kept. `agents` may be called in another thread."""

    def __init__(self, folder: Path | None = None) -> None:
        self.id = ""
        self.path: Path | None = None
        self._folder = folder or records_folder()
        self._began = time.monotonic()
        self._bytes = 0
        self._last_sample = -1.0
        self._last_phase: Phase | None = None
        self._fd = -1
        self._lock = threading.Lock()
        self._last_carried = -1.0

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
        """Make the file. Never raises."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            forget_old(self._folder)
            name, path = self._make(self._folder)
        except OSError as error:
            self._give_up(error)
            return
        self.id, self.path = name, path
        self._write(
            Began(
                id=name,
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
            )
        )

    def _make(self, folder: Path) -> tuple[str, Path]:
        """Under the id that whoever started us has given out already, else under a new one."""
        made = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{secrets.token_hex(3)}"
        given = os.environ.get(RECORD_ID, "")
        for name in (given, made) if ID.fullmatch(given) else (made,):
            path = folder / f"{name}{SUFFIX}"
            with contextlib.suppress(FileExistsError):
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
                return name, path
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def refused(self, reasons: Sequence[tuple[str, str, str]]) -> None:
        self._write(Refused(at_s=self._now(), reasons=tuple(reasons)))
        with self._lock:
            self._close()

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None:
        """Begun already, with more than this."""

    def sample(self, progress: Progress, expected: Forecast) -> None:
        """A change of phase is always kept."""
        now = self._now()
        if progress.phase is self._last_phase and now - self._last_sample < self._apart(now):
            return
        self._last_sample, self._last_phase = now, progress.phase
        self._write(
            Sampled(
                at_s=now,
                progress=progress,
                eta_low_s=expected.eta_low_s,
                eta_high_s=expected.eta_high_s,
                converging=expected.converging,
            )
        )

    def decided(self, decision: Decision) -> None:
        self._write(Decided(at_s=self._now(), decision=decision))

    def message(self, text: str, level: str = "info") -> None:
        self._write(Said(at_s=self._now(), text=text, level=level))

    def event(self, at: float, host: str, what: str, detail: int) -> None:
        """`at`: time.monotonic() when it arrived."""
        self._write(Event(at_s=round(at - self._began, 3), host=host, what=what, detail=detail))

    def agents(self, said: AgentsWord) -> None:
        """What they have carried is kept as rarely as samples are."""
        if isinstance(said, Carried):
            now = self._now()
            if now - self._last_carried < max(0.5, self._apart(now)):
                return
            self._last_carried = now
        self._write(Agents(at_s=self._now(), said=said))

    def finish(self, outcome: Outcome) -> None:
        self._write(Ended(at_s=self._now(), outcome=outcome), last=True)
        with self._lock:
            self._close()

    @staticmethod
    def _apart(now: float) -> float:
        return next(seconds for begin, seconds in _RARER if now >= begin)

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _write(self, row: Row, *, last: bool = False) -> None:
        with self._lock:
            if self._fd < 0 or (self._bytes > LARGEST_BYTES and not last):
                return
            try:
                line = encode_row(row)
                self._bytes += os.write(self._fd, line)
            except (OSError, msgspec.MsgspecError, TypeError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("no record of this migration is kept: %s: %s", self._folder, error)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
