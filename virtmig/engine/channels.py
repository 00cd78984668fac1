"""Connections that arrive at a destination: accepted, looked at, named. One thread, which never waits for a silent one.

What a connection is, is decided by stream/channel.py alone; here are the sockets, the peeking and the patience. A
stranger is turned away and noted, and the migration goes on: a port scanner ends nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from virtmig.engine.transport import Listener, Stop
from virtmig.errors import ChannelError, MigrationError
from virtmig.stream.channel import Expected, Identity, NeedMoreBytes, Role, identify, missing
from virtmig.stream.wire import MULTIFD_INIT_BYTES, MULTIFD_MAGIC, Item

#: how long a connection may be silent before it is taken for one that stays silent (an early preempt channel)
QUIET_S = 1.0
#: how long after main the source's own multifd channels may still come in
BEGINNING_S = 5.0
#: how long a source that recovers may be ahead of the news that its old connection has ended
EARLY_RECOVERY_S = 5.0
#: connections that nobody can name yet; beyond that the newest is turned away
MOST_PENDING = 300

Deliver = Callable[[Identity, socket.socket], None]


@dataclass(slots=True)
class _Pending:
    socket: socket.socket
    arrived: float
    seen: bytes = b""


class Arrivals:
    """The thread "accept". `deliver` is called in it for each named connection, which then belongs to the callee."""

    def __init__(self, listener: Listener, expected: Expected, stop: Stop, deliver: Deliver) -> None:
        self._listener = listener
        self._stop = stop
        self._deliver = deliver
        self._lock = threading.Lock()
        self._expected = expected
        self._present: list[Identity] = []
        #: who was turned away, and why; the newest last, at most 20
        self.refused: list[str] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._main_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="accept", daemon=True)
        self._forget = stop.on_request(self._poke)

    def start(self) -> None:
        self._thread.start()

    def present(self) -> tuple[Identity, ...]:
        with self._lock:
            return tuple(self._present)

    def missing(self) -> str:
        """What is still to come, in words."""
        with self._lock:
            return missing(self._expected, self._present)

    def recover(self) -> None:
        """The postcopy is paused: from now on a main without a header is awaited, and a new preempt channel."""
        with self._lock:
            self._expected = replace(self._expected, recovery=True, multifd_channels=0)
            self._present.clear()
        self._poke()

    def forget(self, identity: Identity) -> None:
        """This one was not what it was taken for; the true one may come."""
        with self._lock:
            self._present.remove(identity)
        self._poke()

    def close(self) -> None:
        """End the thread and join it; connections without a name are closed."""
        self._closing = True
        self._poke()
        if self._thread.ident is not None:
            self._thread.join()
        self._forget()
        os.close(self._wake)

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        pending: list[_Pending] = []
        try:
            while not self._closing and not self._stop.requested.is_set():
                self._turn(pending)
        except MigrationError as error:
            self._stop.request(error)
        finally:
            for each in pending:
                each.socket.close()

    def _turn(self, pending: list[_Pending]) -> None:
        # a connection whose bytes are peeked stays readable: it is not waited on, but looked at again after a moment
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._listener.socket.fileno(), select.POLLIN)
        for each in pending:
            if not each.seen:
                poll.register(each.socket.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll(50 if pending else 1000)}
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        while (arrived := self._listener.accept()) is not None:
            if len(pending) >= MOST_PENDING:
                self._refuse(arrived, f"{MOST_PENDING} connections are waiting to be named")
                continue
            arrived.setblocking(False)
            pending.append(_Pending(arrived, time.monotonic()))
        while self._name_one(pending):
            pass

    def _name_one(self, pending: list[_Pending]) -> bool:
        """Name or refuse the first that can be; each may decide what the others are."""
        for each in pending:
            if not self._peek(each):
                pending.remove(each)
                each.socket.close()
                return True
            now = time.monotonic()
            with self._lock:
                try:
                    named = identify(self._expected, self._present, each.seen, silent=self._silent(each, now))
                except ChannelError as error:
                    if self._may_recover(each, now):
                        continue
                    reason = str(error)
                    named = None
                if isinstance(named, NeedMoreBytes):
                    continue
                if named is not None:
                    self._present.append(named)
                    if named.role is Role.MAIN:
                        self._main_since = now
            pending.remove(each)
            if named is None:
                self._refuse(each.socket, reason)
                if int.from_bytes(each.seen[:4], "big") == MULTIFD_MAGIC and self._beginning(now):
                    # no stranger, but a source that was told another number: it would wait for ever
                    count = self._expected.multifd_channels
                    raise ChannelError(
                        f"the source's multifd channels are not those expected: {reason}",
                        hint=f"this side was told {count or 'none'}; --parallel-connections N: the source's number",
                    )
            else:
                self._deliver(named, each.socket)
            return True
        return False

    def _silent(self, each: _Pending, now: float) -> bool:
        """A silent connection is judged only when main is here: before that it may still speak."""
        return any(known.role is Role.MAIN for known in self._present) and now - each.arrived > QUIET_S

    def _may_recover(self, each: _Pending, now: float) -> bool:
        """Whether it may be a recovery's main, while the channel's thread reads what came before the old one's end."""
        expected, early = self._expected, now - each.arrived < EARLY_RECOVERY_S
        return early and expected.postcopy and not expected.recovery and each.seen[:1] == bytes([Item.COMMAND])

    def _beginning(self, now: float) -> bool:
        """Whether a multifd channel too many may be the source's: later, or in a recovery, it is a stranger's."""
        with self._lock:
            if self._expected.recovery:
                return False
            return self._main_since is None or now - self._main_since < BEGINNING_S

    def _peek(self, each: _Pending) -> bool:
        """Look at the first bytes; False when the peer has gone. A multifd hello is waited for in full, for its id."""
        try:
            seen = each.socket.recv(MULTIFD_INIT_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not seen:
            return False
        whole = len(seen) >= MULTIFD_INIT_BYTES or int.from_bytes(seen[:4], "big") != MULTIFD_MAGIC
        if whole or time.monotonic() - each.arrived > QUIET_S:
            each.seen = seen
        return True

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        connection.close()
        self.refused.append(reason)
        del self.refused[:-20]
