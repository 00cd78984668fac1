"""What this host's sessions are and were, on disk: a restarted agent knows which were broken off, and how to go on.

One small JSON file a session, written when it is agreed on and when its state changes, always whole (rename). Those
that ended well are removed, and with them those of the same guest that were broken off before.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import msgspec

from virtmig.link.asking import HANDOVER, SessionRecord
from virtmig.link.states import FINAL, State

#: broken off and never recovered: forgotten after a week
KEPT_S = 7 * 86400.0


class Journal:
    """The folder. A record that cannot be written may not hurt a migration: `write` never raises, it says so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[str] = set()  # by this agent; a pid says little, in a container it is always 1

    def write(self, record: SessionRecord) -> str:
        """Empty when it is on disk, else why not."""
        record = msgspec.structs.replace(record, changed=time.time(), pid=os.getpid())
        self._written.add(record.session)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{record.session}.json"
            part = path.with_suffix(".part")
            with open(part, "wb") as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)  # the name, too
            finally:
                os.close(folder)
        except OSError as error:
            return f"{self._folder}: {error.strerror or error}"
        return ""

    def remove(self, session: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / f"{session}.json").unlink()

    def settle(self, arrived: SessionRecord) -> None:
        """This session has brought its guest over: what was broken off of that guest before is past."""
        self.remove(arrived.session)
        for record in self.records():
            same = record.uuid == arrived.uuid if record.uuid and arrived.uuid else record.domain == arrived.domain
            if same and record.state == State.FAILED and record.began <= arrived.began:
                self.remove(record.session)

    def records(self) -> tuple[SessionRecord, ...]:
        """Every record that can be read, the newest first; those of an agent that was killed say so."""
        found = []
        for path in self._folder.glob("*.json") if self._folder.is_dir() else ():
            try:
                record = msgspec.json.decode(path.read_bytes(), type=SessionRecord)
            except (OSError, ValueError, msgspec.MsgspecError):
                continue
            if time.time() - record.changed > KEPT_S:
                self.remove(record.session)
                continue
            if record.session not in self._written and record.state not in ("failed", "refused", "finished"):
                record = msgspec.structs.replace(record, state="failed", reasons=("the agent was stopped or killed",))
            found.append(record)
        return tuple(sorted(found, key=lambda record: -record.changed))


class Entry:
    """One session's record, kept up to date by whichever of its threads has something to note."""

    def __init__(self, journal: Journal, record: SessionRecord) -> None:
        self._journal = journal
        self._record = record
        self._ran = False
        self._lock = threading.Lock()

    @property
    def source_keeps(self) -> bool:
        """Its QEMU was never told that the destination has the guest, and postcopy was not allowed."""
        with self._lock:
            return not self._record.handed_over and not self._record.request.get("postcopy")

    def note(self, state: str, reasons: tuple[str, ...] = ()) -> str:
        """On disk when this returns, or why not. One that ended well, or before anything moved, is removed."""
        with self._lock:
            handed_over = self._record.handed_over or state == HANDOVER
            self._record = msgspec.structs.replace(self._record, state=state, reasons=reasons, handed_over=handed_over)
            self._ran = self._ran or state == State.RUNNING
            if handed_over and state == State.RUNNING:
                self._record = msgspec.structs.replace(self._record, state=HANDOVER)
            if state == State.FINISHED:
                self._journal.settle(self._record)
                return ""
            if state in FINAL and not self._ran:
                self._journal.remove(self._record.session)
                return ""
            return self._journal.write(self._record)
