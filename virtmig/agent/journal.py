"""What this host's sessions are and were, on disk: a restarted agent knows which were broken off, and how to go on.

One small JSON file a session, written when it is agreed on and when its state changes, always whole (rename). Those
that ended well are removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from virtmig.link.asking import SessionRecord

#: broken off and never recovered: forgotten after a week
KEPT_S = 7 * 86400.0


class Journal:
    """The folder. A record that cannot be written may not hurt a migration: `write` never raises."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: SessionRecord) -> None:
        record = msgspec.structs.replace(record, changed=time.time(), pid=os.getpid())
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{record.session}.json"
            part = path.with_suffix(".part")
            with open(part, "wb") as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)

    def remove(self, session: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / f"{session}.json").unlink()

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
            if record.pid != os.getpid() and record.state not in ("failed", "refused", "finished"):
                record = msgspec.structs.replace(record, state="failed", reasons=("the agent was stopped or killed",))
            found.append(record)
        return tuple(sorted(found, key=lambda record: -record.changed))
