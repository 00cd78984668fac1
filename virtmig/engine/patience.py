"""What a destination waits for that may take a person: a source that comes again, and room on the disk."""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import Protocol

from virtmig.engine.memory import NoRoom
from virtmig.engine.transport import Stop
from virtmig.errors import ChannelError

#: how often a full disk is tried again
ROOM_S = 1.0


class Tell(Protocol):
    """What happens on the way, for a person (`words`) and a program (`name`, `facts`). From any thread; must not raise.

    postcopy: the guest is the destination's from now on. paused, resumed: its connection. no-room, room: its disk.
    """

    def __call__(self, name: str, words: str, **facts: str | int) -> None: ...


def tell_nobody(name: str, words: str, **facts: str | int) -> None:
    """For who does not listen."""


class Pause:
    """A broken postcopy: since when, and for how long its source may take. Its owner's lock is held for each call."""

    def __init__(self, recover_s: float | None) -> None:
        """`recover_s` None: as long as it takes."""
        self.recover_s = recover_s
        self.since: float | None = None
        self.recoveries = 0

    def begin(self) -> bool:
        """False when it is paused already."""
        if self.since is not None:
            return False
        self.since = time.monotonic()
        return True

    def end(self) -> None:
        self.since = None
        self.recoveries += 1

    @property
    def left_s(self) -> float | None:
        """How long to wait still; None: no end is set."""
        if self.since is None or self.recover_s is None:
            return None
        return max(0.01, self.since + self.recover_s - time.monotonic())

    @property
    def overdue(self) -> bool:
        return self.since is not None and self.recover_s is not None and time.monotonic() >= self.since + self.recover_s


class DiskRoom:
    """A full disk, tried again and again: what is in hand cannot be had again, so it is not let go."""

    def __init__(self, stop: Stop, tell: Tell) -> None:
        self._stop = stop
        self._tell = tell
        self._lock = threading.Lock()
        self._full = False

    def wait(self, error: NoRoom, source: socket.socket | None) -> None:
        """A moment. Raises the stop's error; with a `source` that may still go back, ChannelError when it has gone."""
        with self._lock:
            first, self._full = not self._full, True
        if first:
            # what a source has sent lies in sockets: some of it may be its last
            words = f"{error}: make room, the source waits; do not end this process, not all can be sent again"
            self._tell("no-room", words, reason=str(error))
        if source is not None:
            poll = select.poll()
            poll.register(source.fileno(), select.POLLRDHUP)
            if poll.poll(0):
                raise ChannelError("main: the source went away while there was no room for its guest")
        self._stop.requested.wait(ROOM_S)
        self._stop.check()

    def found(self) -> None:
        """Something could be written."""
        if not self._full:
            return
        with self._lock:
            was, self._full = self._full, False
        if was:
            self._tell("room", "there is room again")
