"""When a source waits for SWITCHOVER_ACK: the capability switchover-ack is not on the wire, and 7.2 takes no ack.

What was seen of QEMU 7.2, 10.0 and 11.1 (loadvm_process_command, source_return_path_thread):

    machine type 8.1 to 11.0   any QEMU that has it takes one ack, and waits for it with the capability on
    machine type from 11.1 on  one that nobody asked for is fatal; without devices that ask, nobody waits
    any other name             7.2 and 8.0 fail at an ack, newer ones wait for it: told by how they wait
"""

from __future__ import annotations

import re

_VERSION = re.compile(r"-(\d{1,3})\.(\d{1,2})(?:\.\d{1,2})?")
_FIRST_TAKEN, _FIRST_COUNTED = (8, 1), (11, 1)
#: a source that finds nothing to send completes; one that waits goes through its RAM thousands of times a second, and
#: finds nothing each time that the guest did not write in between
EMPTY_PARTS = 64


class SwitchoverAcks:
    """Decides once when the one ack is due. Both methods are for main's thread.

    `asked`: somebody knows that the capability is on, or off; None: as the table above says.
    """

    def __init__(self, asked: bool | None = None) -> None:
        self._asked = asked
        self._watching = False
        self._empty = 0
        self._pages = -1

    def due_at_open(self, machine: str | None) -> bool:
        """The return path is open: whether the ack is to be sent at once, as QEMU's destination does."""
        if self._asked is not None:
            return self._asked
        match = _VERSION.search(machine or "")
        if match is None or match.end() != len(machine or ""):
            self._watching = True
            return False
        release = (int(match[1]), int(match[2]))
        self._watching = release < _FIRST_TAKEN
        return _FIRST_TAKEN <= release < _FIRST_COUNTED

    def due_after_part(self, pages: int) -> bool:
        """A RAM section has ended and `pages` came so far on all channels: whether the source shows that it waits."""
        if not self._watching:
            return False
        self._empty += pages == self._pages
        self._pages = pages
        if self._empty < EMPTY_PARTS:
            return False
        self._watching = False
        return True

    def never(self) -> None:
        """Sections without pages mean something else here (xbzrle leaves out what is as it was), or it is too late."""
        self._watching = False
