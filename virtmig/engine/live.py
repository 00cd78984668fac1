"""Move a running process guest to another engine: passes over its memory, the switch, and postcopy where it is wanted.

    [all pages] -> [what was written meanwhile] -> ... -> pause -> the rest and the device state -> GIVEN_UP
                                                     \\-> pause -> discard, device state, RUN -> faults and the rest

The guest's writes are tracked by the kernel (dirty.py). What follows each pass is decided by a function that gets the
numbers: `Settle` by default.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from virtmig.engine.dirty import Runs, WriteTracker, page_count, pages_of, tracking_available
from virtmig.engine.image import FORMAT, FORMAT_VERSION, BlockFile, Manifest
from virtmig.engine.incoming import GIVEN_UP
from virtmig.engine.outgoing import Outgoing, Report, SendResult, SendSettings
from virtmig.engine.process_guest import ProcessGuest
from virtmig.engine.process_landing import DEVICE, DEVICE_VERSION, MACHINE
from virtmig.engine.transport import Address, Stop
from virtmig.errors import GuestMemoryError, MigrationError
from virtmig.pages import PAGE_BYTES, PageNumbers
from virtmig.progress import Whereabouts
from virtmig.stream.commands import discard
from virtmig.stream.events import Command, DeviceSection
from virtmig.stream.wire import MAX_DISCARDS_PER_COMMAND, Item

#: pages looked at and handed to a channel at a time: 2 MiB
_PIECE_PAGES = 512
_DEVICE_SECTION_ID = 2

Step = Literal["pass", "switch", "postcopy", "give up"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over memory. `left_pages` were written while it ran; `bytes_per_s` is how fast it sent."""

    number: int
    sent_pages: int
    left_pages: int
    elapsed_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Settle:
    """Switch when the rest fits the downtime limit; else postcopy after so many passes, if at all, or give up."""

    downtime_limit_ms: float = 300.0
    postcopy_after_passes: int | None = None
    most_passes: int = 30

    def __call__(self, last: Pass) -> Step:
        if last.left_pages * PAGE_BYTES <= last.bytes_per_s * self.downtime_limit_ms / 1000:
            return "switch"
        if self.postcopy_after_passes is not None and last.number >= self.postcopy_after_passes:
            return "postcopy"
        return "pass" if last.number < self.most_passes else "give up"


class LiveResult(msgspec.Struct, frozen=True):
    """`downtime_ms` is from pause to SHUT 0 in precopy, to RUN in postcopy, as the source sees it."""

    sent: SendResult
    passes: tuple[Pass, ...]
    downtime_ms: float
    postcopy: bool


class GuestView:
    """A process guest as what Outgoing sends: the shape of an Image, over the guest's own memory files."""

    def __init__(self, guest: ProcessGuest) -> None:
        self.guest = guest
        self.folder = Path(f"pid {guest.pid}")
        blocks = tuple(BlockFile(name, name, length) for name, length in guest.blocks.items())
        self.manifest = Manifest(FORMAT, FORMAT_VERSION, MACHINE, "", 0.0, blocks, 0, 0, 0, 0)
        self.memory = guest.memory()
        self.description = b""

    def device_sections(self) -> list[DeviceSection]:
        """Of a paused guest."""
        state = self.guest.state()
        described = {"name": DEVICE, "instance_id": 0, "version": DEVICE_VERSION, "size": len(state), "fields": []}
        self.description = msgspec.json.encode({"devices": [described]})
        return [DeviceSection(Item.SECTION_FULL, _DEVICE_SECTION_ID, DEVICE, 0, DEVICE_VERSION, state, 0)]


def migrate_guest(
    guest: ProcessGuest,
    address: Address,
    settings: SendSettings,
    stop: Stop,
    *,
    decide: Callable[[Pass], Step] | None = None,
    progress: Report | None = None,
) -> LiveResult:
    """Blocks until the guest is at the destination; it is paused here then, and the caller's to close.

    Raises MigrationError. `guest` SOURCE: it runs here again. SPLIT: it runs there and lacks pages; `recover_guest`.
    """
    facts = tracking_available()
    if not facts.available:
        raise GuestMemoryError(
            f"the guest's writes cannot be tracked: {facts.reason}", hint=facts.hint, guest=Whereabouts.SOURCE
        )
    return _Live(GuestView(guest), address, settings, stop, decide or Settle(), progress).migrate()


def recover_guest(guest: ProcessGuest, address: Address, settings: SendSettings, stop: Stop) -> SendResult:
    """Go on with a broken postcopy: the destination says what it has and gets the rest."""
    recovering = msgspec.structs.replace(settings, recover=True)
    return Outgoing(GuestView(guest), address, recovering, stop, None).run()  # type: ignore[arg-type]


class _Live(Outgoing):
    def __init__(
        self,
        view: GuestView,
        address: Address,
        settings: SendSettings,
        stop: Stop,
        decide: Callable[[Pass], Step],
        progress: Report | None,
    ) -> None:
        super().__init__(view, address, settings, stop, progress)  # type: ignore[arg-type]
        self._guest = view.guest
        self._decide = decide
        self._passes: list[Pass] = []
        self._was_running = view.guest.running
        self._paused_at = self._gone_at = 0.0

    def migrate(self) -> LiveResult:
        """`_listening`: the package went out, or some of it; the guest may run there and does not come back."""
        self._guest.track_writes()
        try:
            with WriteTracker(self._guest.pid, self._guest.ranges) as self._tracker:
                sent = self.run()
        except MigrationError as error:
            if not self._listening and not self._answers.arrived:
                self._take_back()
                self._judged(error)
            raise
        finally:
            with contextlib.suppress(GuestMemoryError):  # it may be the guest that has ended
                self._guest.stop_tracking()
        downtime = (self._gone_at or time.monotonic()) - self._paused_at
        return LiveResult(sent, tuple(self._passes), downtime * 1000, self._listening)

    # -- what Outgoing does with an image, done with a guest that runs -----------------------------------------------

    def _precopy(self) -> None:
        self._move()

    def _start_lazily(self) -> None:
        self._move()

    def _sync_each_section(self) -> bool | None:
        return False

    def _wait_listed(self) -> None:
        """It makes a process for the guest then: the first pass goes out meanwhile."""

    def _judged(self, error: MigrationError) -> MigrationError:
        """Before SHUT 0 the destination waits for GIVEN_UP: nothing is unknown."""
        if self._listening or self._answers.arrived:
            return super()._judged(error)
        error.guest = Whereabouts.SOURCE
        error.hint = "the guest runs on the source as before"
        return error

    def _serve(self) -> None:
        if self._listening:
            super()._serve()

    def _end(self) -> None:
        if self._answers.arrived:
            self._gone_at = self._gone_at or time.monotonic()
            if self._main is not None:
                with contextlib.suppress(MigrationError):
                    self._main.connection.send(GIVEN_UP)
        super()._end()

    # -- the passes --------------------------------------------------------------------------------------------------

    def _move(self) -> None:
        main = self._begin_stream()
        self._tracker.start()
        pending: dict[str, Runs] = {
            name: np.array([[0, length // PAGE_BYTES]], np.uint64) for name, length in self._reader.lengths.items()
        }
        while True:
            began = time.monotonic()
            main.connection.send(self._encoder.ram_part())
            count = self._send(pending)
            self._end_section()
            elapsed = max(time.monotonic() - began, 1e-6)
            left = sum(page_count(runs) for runs in self._tracker.peek().values())
            last = Pass(len(self._passes) + 1, count, left, elapsed, count * PAGE_BYTES / elapsed)
            self._passes.append(last)
            self._report("pages")
            step = self._decide(last)
            if step == "give up":
                raise MigrationError(
                    f"the guest writes faster than it can be sent: after {last.number} passes {left} pages are left",
                    hint="a longer downtime limit, postcopy, or more channels",
                )
            if step != "pass":
                break
            pending = self._tracker.take()
        self._stop.check()
        self._pause()
        pending = self._tracker.take()
        if step == "postcopy" and self._settings.postcopy:
            self._switch(pending)
        else:
            self._finish(pending)

    def _finish(self, pending: dict[str, Runs]) -> None:
        assert self._main is not None
        self._main.connection.send(self._encoder.ram_end())
        self._send(pending)
        self._end_section()
        self._finish_precopy([])

    def _switch(self, pending: dict[str, Runs]) -> None:
        for name, length in self._reader.lengths.items():
            left = np.zeros(length // PAGE_BYTES, np.bool_)
            left[pages_of(pending[name])] = True
            self._pages.drop(name, np.flatnonzero(~left).astype(np.uint64))
        self._reader.refresh()
        self._switch_to_postcopy(_discards(pending))
        self._gone_at = time.monotonic()

    def _send(self, pending: dict[str, Runs]) -> int:
        """Inside an open section: the pages, those that are zero as such. Returns how many."""
        count = 0
        self._reader.refresh()
        for name, pages in _pieces(pending):
            self._stop.check()
            while not self._wait_pace():
                pass
            normal, zero = self._reader.split(name, pages)
            main = self._main
            assert main is not None
            if self._multifd is not None:
                self._multifd.put(name, normal)
            elif len(normal):
                main.normal += len(normal)
                main.connection.send(main.encoder.pages(name, normal, self._reader.data(name, normal)))
            main.zero_pages(name, zero)
            count += len(pages)
            self._report("pages")
        return count

    def _end_section(self) -> None:
        main, encoder = self._main, self._encoder
        assert main is not None
        if self._multifd is not None:
            self._multifd.sync()
            main.connection.send(encoder.multifd_flush(), encoder.ram_section_end())
        else:
            main.connection.send(encoder.ram_section_end())

    def _pause(self) -> None:
        self._paused_at = time.monotonic()
        self._guest.pause()

    def _take_back(self) -> None:
        with contextlib.suppress(GuestMemoryError):
            if self._was_running and not self._guest.running:
                self._guest.resume()


def _pieces(pending: dict[str, Runs]) -> Iterator[tuple[str, PageNumbers]]:
    """Runs cut and gathered into pieces of at most 512 pages, which lie close together."""
    for name, runs in pending.items():
        if len(runs) == 1:
            first, count = runs[0].tolist()
            for at in range(first, first + count, _PIECE_PAGES):
                yield name, np.arange(at, min(at + _PIECE_PAGES, first + count), dtype=np.uint64)
            continue
        pages = pages_of(runs)
        at = 0
        while at < len(pages):
            # no page further than that: what lies between is looked at for zeros too
            near = int(np.searchsorted(pages[at : at + _PIECE_PAGES], pages[at] + np.uint64(4 * _PIECE_PAGES)))
            yield name, pages[at : at + near]
            at += near


def _discards(pending: dict[str, Runs]) -> Iterator[Command]:
    """Raises MigrationError when there is nothing to discard: without a DISCARD LISTEN is refused."""
    if not any(len(runs) for runs in pending.values()):
        raise MigrationError("nothing is left to be sent in postcopy")
    for name, runs in pending.items():
        ranges = [(first * PAGE_BYTES, count * PAGE_BYTES) for first, count in runs.tolist()]
        for at in range(0, len(ranges), MAX_DISCARDS_PER_COMMAND):
            yield discard(name, ranges[at : at + MAX_DISCARDS_PER_COMMAND])
