"""What happens, as it happens: lines for a person on standard error, or JSON lines on standard output.

Written at once and without a buffer, from any thread. Who reads may go away: that is told to the caller and never
raised, as a guest on its way must not depend on a terminal.
"""

from __future__ import annotations

import os
import threading

import msgspec


class EventLines:
    def __init__(self, *, json: bool, quiet: bool) -> None:
        self._json = json
        self._quiet = quiet
        self._lock = threading.Lock()

    def event(self, name: str, words: str = "", **facts: object) -> bool:
        """One event: its name and `facts` as JSON, or `words` when there are any. False: it could not be written."""
        if self._json:
            return self._write(1, msgspec.json.encode({"event": name, **facts}))
        return not words or self._quiet or self._write(2, words.encode("utf-8", "backslashreplace"))

    def _write(self, number: int, line: bytes) -> bool:
        rest = memoryview(line + b"\n")
        with self._lock:
            try:
                while rest:
                    rest = rest[os.write(number, rest) :]
            except OSError:
                return False
        return True
