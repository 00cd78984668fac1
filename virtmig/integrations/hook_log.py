"""What libvirt's hook saw on this host: one JSON line a call, in a file that is rotated, and read as migrations.

Written within a hook's deadline, so nothing is imported here that takes time. A line has `time` (time.time()), `host`,
`guest`, `uuid`, `operation`, `suboperation`, `extra` (libvirt's words), `took_ms` and `result`; of an incoming
migration also `changes` and `reason`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

#: hook.jsonl, and as many older ones
KEPT_BYTES, KEPT_FILES = 2 << 20, 4
LONGEST_TEXT = 2000
MOST_CHANGES = 200

Row = dict[str, Any]


def default_log() -> str:
    """Root's is /var/log/virtmig/hook.jsonl; of a session daemon's user it is below ~/.local/state.

    libvirt hands HOME on to a hook, but no XDG_* variable.
    """
    if os.geteuid() == 0:
        return "/var/log/virtmig/hook.jsonl"
    return os.path.expanduser("~/.local/state/virtmig/hook.jsonl")


def append(path: str, row: Row) -> None:
    """Add one line, and rotate a file that has become too long. Raises OSError."""
    bounded = {name: value[:LONGEST_TEXT] if isinstance(value, str) else value for name, value in row.items()}
    if "changes" in bounded:
        bounded["changes"] = [str(change)[:LONGEST_TEXT] for change in bounded["changes"][:MOST_CHANGES]]
    line = json.dumps(bounded, separators=(",", ":")).encode() + b"\n"
    os.makedirs(os.path.dirname(path) or ".", mode=0o750, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        os.write(file, line)  # at once: O_APPEND keeps lines of hooks that run at the same time apart
        if os.fstat(file).st_size >= KEPT_BYTES:
            _rotate(path, file)
    finally:
        os.close(file)


def _rotate(path: str, file: int) -> None:
    """hook.jsonl becomes hook.jsonl.1 and so on. Whoever holds the lock does it; nobody waits."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        if os.stat(path).st_ino != os.fstat(file).st_ino:
            return  # another hook has just done it
    except FileNotFoundError:
        return  # the same, and nobody has written since
    names = [path, *(f"{path}.{number}" for number in range(1, KEPT_FILES))]
    for number in range(len(names) - 1, 0, -1):
        if os.path.exists(names[number - 1]):
            os.replace(names[number - 1], names[number])


def read(path: str) -> Iterator[Row]:
    """Every line that can be read, the oldest first; none where no hook has written yet. Raises OSError."""
    for number in range(KEPT_FILES - 1, -1, -1):
        with contextlib.suppress(FileNotFoundError), open(f"{path}.{number}" if number else path, "rb") as file:
            yield from _rows(file)


def _rows(lines: Iterable[bytes]) -> Iterator[Row]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _is_time(row.get("time")) and isinstance(row.get("operation"), str):
            yield row


def _is_time(value: object) -> bool:
    """Of a day that a calendar has."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 253402300800


class Seen(NamedTuple):
    """One migration as this host's hooks saw it. Who sent the guest is not told to hooks."""

    guest: str
    uuid: str
    incoming: bool
    rows: tuple[Row, ...]

    @property
    def began(self) -> float:
        return float(self.rows[0]["time"])

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(str(row["operation"]) for row in self.rows)

    @property
    def result(self) -> str:
        """One of RESULTS."""
        if not self.incoming:
            return "left"
        if self.rows[0].get("result") == "vetoed":
            return "vetoed"
        if "started" in self.phases:
            return "ended" if "release" in self.phases else "came"
        return "not started" if len(self.rows) > 1 else "not begun"


#: what hooks can know of a migration
RESULTS = {
    "vetoed": "this hook refused it",
    "not begun": "libvirt did not go on after the hooks",
    "not started": "its QEMU could not be started here",
    "came": "its QEMU was started here; libvirt tells no hook when the memory has arrived",
    "ended": "as came, and it has stopped since: it failed, moved on, or was shut down",
    "left": "it moved to another host",
}

#: libvirt 10.5 and later say why a guest stopped here; before, EXTRA is "-" and nobody knows
_LEFT = "migrated"
_PHASES = ("prepare", "start", "started", "stopped", "release")


def migrations(rows: Iterable[Row]) -> list[Seen]:
    """Rows put together: a guest came with `migrate`, and left when its `release` says "migrated"."""
    found: list[list[Row]] = []
    running: dict[str, list[Row]] = {}
    for row in rows:
        key, operation = str(row.get("uuid") or row.get("guest")), row["operation"]
        if operation == "migrate":
            running[key] = [row]
            found.append(running[key])
        elif operation in _PHASES:
            if key in running and operation not in [known["operation"] for known in running[key]]:
                running[key].append(row)
            if operation == "release":
                running.pop(key, None)
                if row.get("extra") == _LEFT:
                    found.append([row])
    return [
        Seen(str(rows[0].get("guest")), str(rows[0].get("uuid")), rows[0]["operation"] == "migrate", tuple(rows))
        for rows in found
    ]
