"""The source's connections to one destination and its threads: opened, watched, closed; every thread is joined.

A destination turns a connection away that it does not expect, and says nothing of it on the others: QEMU drops it when
its main loop comes to accept it. Until then it takes bytes, and they are lost.
"""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable

from virtmig.engine.transport import Address, Connection, Stop, connect
from virtmig.errors import ChannelError, MigrationError

#: how long a QEMU may take to turn away a connection in which bytes wait
TURN_AWAY_S = 0.25
_LOOK_S = 0.005


class Dialling:
    """One thread opens and closes; what the threads fail with becomes the stop's error."""

    def __init__(self, address: Address, stop: Stop, stall_s: float) -> None:
        self.connections: list[Connection] = []
        #: a defect of ours that ended a thread
        self.crash: BaseException | None = None
        self._address = address
        self._stop = stop
        self._stall_s = stall_s
        self._threads: list[threading.Thread] = []

    def connect(self, name: str) -> Connection:
        connection = connect(self._address, self._stop, name=name, stall_s=self._stall_s)
        self.connections.append(connection)
        return connection

    def start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def sent_bytes(self, *, preempt: bool = True) -> int:
        return sum(each.bytes_sent for each in self.connections if preempt or each.name != "preempt")

    def close(self) -> None:
        """Every thread joined, every socket closed."""
        for connection in self.connections:
            connection.shutdown()
        for thread in self._threads:
            thread.join()
        for connection in self.connections:
            connection.close()

    def check_kept(self, connection: Connection, within_s: float = 0.0) -> None:
        """Raises ChannelError when the destination has closed it, or does so within that time."""
        if connection.gone(within_s):
            self._stop.check()
            raise ChannelError(f"{connection.name}: the destination has turned this connection away")

    def wait_taken(self, connection: Connection, written_at: float) -> None:
        """Until all bytes are the destination's, the last one written at that time (time.monotonic).

        Over tcp its kernel takes them, also for a connection that is turned away afterwards: that long is waited too.
        """
        deadline = time.monotonic() + self._stall_s
        while connection.untaken_bytes() and not connection.gone(_LOOK_S):
            self._stop.check()
            if time.monotonic() > deadline:
                raise ChannelError(f"{connection.name}: the destination takes nothing for {self._stall_s:g} s")
        left = written_at + TURN_AWAY_S - time.monotonic()
        self.check_kept(connection, 0.0 if connection.socket.family == socket.AF_UNIX else max(0.0, left))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except MigrationError as error:
            traceback.clear_frames(error.__traceback__)  # what they held of the guest's memory could not be unmapped
            self._stop.request(error)
            let_go(error)
        except BaseException as error:  # a defect of ours: it must not leave the others waiting
            self.crash = error
            name = threading.current_thread().name
            self._stop.request(MigrationError(f"{name}: {type(error).__name__}: {error}"))
            let_go(error)


def let_go(error: BaseException | None) -> None:
    """The frames of an error may hold views of the image: what is mapped must go when the image is closed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
