"""A process guest that arrives: its memory files are filled, and it goes on when the source has given it up.

Precopy: SHUT 0 says that all is here; the guest runs only when the source has answered GIVEN_UP. A source that does not
hear SHUT 0 lets its own guest run on, one that hears it does not: at no moment do two copies run, whatever breaks.
Postcopy: RUN starts it at once, and a fault handler asks for what it touches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from virtmig.engine.faults import FaultBlock, FaultHandler, FaultStats
from virtmig.engine.landing import Awaited, Facts, Request
from virtmig.engine.memory import GuestMemory
from virtmig.engine.process_guest import ProcessGuest
from virtmig.engine.userfault import Userfault
from virtmig.errors import ChannelError, GuestMemoryError, RemoteProtocolError
from virtmig.pages import PAGE_BYTES, PageNumbers, runs_of
from virtmig.progress import Whereabouts
from virtmig.stream.events import DeviceSection, StreamHeader

MACHINE = "virtmig-process"
DEVICE = "process-guest"
DEVICE_VERSION = 1
MADV_POPULATE_WRITE = 23  # Linux 5.14


class ProcessLanding:
    """`guest` exists from `begin` on and belongs to the caller after success; `abandon` ends it.

    `prepared`: the blocks that will come (name -> bytes), when they are known: their memory is made and touched before
    anything connects, as first touches cost as much as the whole transfer. Not for postcopy, where holes stay holes.
    """

    def __init__(self, *, prepared: Mapping[str, int] | None = None, busy_poll_us: int = 0) -> None:
        self.guest: ProcessGuest | None = None
        self.started = False
        self._busy_poll_us = busy_poll_us
        self._memory: GuestMemory | None = None
        self._awaited: dict[str, npt.NDArray[np.bool_]] = {}
        self._request: Request = lambda block, start, length: None
        self._userfault: Userfault | None = None
        self._handler: FaultHandler | None = None
        self._stats: FaultStats | None = None
        self._loaded = False
        if prepared is not None:
            self._create(prepared)
            for block in self.memory.blocks.values():
                block.mapping.madvise(MADV_POPULATE_WRITE)

    def attach(self, request: Request) -> None:
        self._request = request

    def expect(self, blocks: Mapping[str, int]) -> None:
        """Memory is the kernel's to promise."""

    def awaits(self, pages: Awaited, facts: Facts) -> None:
        """It keeps them itself, from `discard`."""

    def begin(self, blocks: Mapping[str, int], page_sizes: Mapping[str, int]) -> None:
        if self.guest is None:
            self._create(blocks)
        elif self.guest.blocks != dict(blocks):
            raise RemoteProtocolError(f"RAM blocks {dict(blocks)}, prepared are {self.guest.blocks}", channel="main")

    def _create(self, blocks: Mapping[str, int]) -> None:
        self.guest = ProcessGuest.incoming(blocks)
        files = {name: (os.dup(fd), blocks[name]) for name, fd in self.guest.memfds.items()}
        self._memory = GuestMemory(files)
        self._awaited = {name: np.zeros(length // PAGE_BYTES, np.bool_) for name, length in blocks.items()}

    @property
    def memory(self) -> GuestMemory:
        if self._memory is None:
            raise GuestMemoryError("pages before the list of RAM blocks")
        return self._memory

    def place(self, block: str, pages: PageNumbers, data: memoryview) -> None:
        if self._handler is None:
            self.memory.place(block, pages, data)
            return
        at = 0
        for first, count in runs_of(pages):
            self._handler.place(block, first, data[at : at + count * PAGE_BYTES])
            at += count * PAGE_BYTES

    def zero(self, block: str, pages: PageNumbers) -> None:
        if self._handler is None:
            self.memory.zero(block, pages)
            return
        for first, count in runs_of(pages):
            self._handler.place(block, first, None, count)

    def room(self, block: str, first_page: int, count: int) -> memoryview | None:
        return self.memory.room(block, first_page, count) if self._handler is None else None

    def read(self, block: str, page: int) -> memoryview:
        return self.memory.room(block, page, 1)

    def discard(self, block: str, start_bytes: int, length_bytes: int) -> None:
        self._awaited[block][start_bytes // PAGE_BYTES : (start_bytes + length_bytes) // PAGE_BYTES] = True

    def devices_loaded(self, header: StreamHeader, sections: Sequence[DeviceSection]) -> None:
        if header.machine != MACHINE:
            raise RemoteProtocolError(
                f"a guest of machine type '{header.machine}', only '{MACHINE}' can run here", channel="main"
            )
        found = [section for section in sections if section.idstr == DEVICE]
        if len(found) != 1 or found[0].version_id != DEVICE_VERSION or self.guest is None:
            raise RemoteProtocolError(f"{len(found)} sections '{DEVICE}', one is expected", channel="main")
        self.guest.load(found[0].data)
        self._loaded = True

    def run(self) -> None:
        guest = self.guest
        if guest is None or not self._loaded:
            raise RemoteProtocolError("RUN before the device state", channel="main")
        self._userfault = guest.arm_postcopy()
        blocks = [FaultBlock(name, address, guest.blocks[name], guest.memfds[name])
                  for name, address in guest.addresses.items()]  # fmt: skip
        self._handler = FaultHandler(
            self._userfault, blocks, self._missing, pid=guest.pid, busy_poll_us=self._busy_poll_us
        )
        for name, awaited in self._awaited.items():
            here = self.memory.touched(name) & ~awaited
            self._handler.mark_present(name, np.flatnonzero(here).astype(np.uint64))
        self._handler.start()
        guest.resume()
        self.started = True

    def _missing(self, block: str, page: int) -> None:
        """In the fault thread: what is to come is asked for; a page that was zero in precopy is a hole of the file."""
        if self._awaited[block][page]:
            self._request(block, page * PAGE_BYTES, PAGE_BYTES)
        elif self._handler is not None:
            self._handler.place(block, page, None)

    def resumed(self) -> None:
        """After a recovery: what the guest waits for was asked of a connection that is gone."""
        if self._handler is not None:
            for block, page in self._handler.outstanding():
                self._request(block, page * PAGE_BYTES, PAGE_BYTES)

    def commit(
        self,
        header: StreamHeader,
        sections: Sequence[DeviceSection],
        description: bytes,
        facts: Facts,
    ) -> None:
        if self._handler is None:
            self.devices_loaded(header, sections)
            return
        if self._handler.failure is not None:
            raise GuestMemoryError(f"the guest's faults are not served any more: {self._handler.failure}")
        self._disarm()

    def let_go(self, heard: bool) -> None:
        """The source will not run it again: here it runs."""
        if self.started or self.guest is None:
            self._unmap()
            return
        if not heard:
            self._unmap()
            raise ChannelError(
                "the source went away without a word whether it has let go of the guest: it is whole here, and paused",
                hint="run it here only when it is certain that it does not run on the source",
                guest=Whereabouts.UNKNOWN,
            )
        self.guest.resume()
        self.started = True
        self._unmap()  # a tenth of a second a GiB, for which the guest need not wait

    def keep(self) -> None:
        """It lives as long as its process; the caller ends it."""

    def abandon(self) -> None:
        if self.guest is not None:
            self.guest.close()
        self._disarm()
        self._unmap()

    @property
    def fault_stats(self) -> FaultStats | None:
        """How the faults of a postcopy went; None in precopy."""
        return self._stats if self._handler is None else self._handler.stats()

    def _disarm(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            self._stats = handler.stats()
            handler.stop()
        userfault, self._userfault = self._userfault, None
        if userfault is not None:
            userfault.close()

    def _unmap(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            with contextlib.suppress(BufferError):
                memory.close()
