"""One side of a migration between engines, in a process of its own: `python -m tests.bench.side`, for processes.py.

Commands come as JSON lines on stdin, answers go as JSON lines to stdout. It ends when stdin does, and takes its guest
along. With VIRTMIG_BENCH_PROFILE=FOLDER each thread writes a cProfile there.
"""

from __future__ import annotations

import contextlib
import cProfile
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from virtmig.engine.guest_walk import GuestSettings
from virtmig.engine.image import Image
from virtmig.engine.incoming import Incoming
from virtmig.engine.landing import ImageLanding, Request
from virtmig.engine.live import GuestView, Pass, Settle, Step, _Live, migrate_guest
from virtmig.engine.memory import GuestMemory
from virtmig.engine.outgoing import SendSettings, send_image
from virtmig.engine.process_guest import ProcessGuest
from virtmig.engine.process_landing import MADV_POPULATE_WRITE, ProcessLanding
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import MigrationError
from virtmig.stream.events import DeviceSection, StreamHeader
from virtmig.stream.wire import Dialect

Answer = dict[str, Any]


class MemoryLanding:
    """A QEMU's guest that is kept in memory and goes nowhere: `prepared` blocks are touched beforehand."""

    def __init__(self, prepared: Mapping[str, int]) -> None:
        self._files = {name: (_file(name, length), length) for name, length in prepared.items()}
        self._memory = GuestMemory(self._files)
        for block in self._memory.blocks.values():
            block.mapping.madvise(MADV_POPULATE_WRITE)

    def attach(self, request: Request) -> None: ...

    def begin(self, blocks: Mapping[str, int], page_sizes: Mapping[str, int]) -> None:
        more = {name: (_file(name, length), length) for name, length in blocks.items() if name not in self._files}
        if more:
            self._memory.blocks |= (rest := GuestMemory(more)).blocks
            self._memory._touched |= rest._touched

    def place(self, block: str, pages: Any, data: memoryview) -> None:
        self._memory.place(block, pages, data)

    def zero(self, block: str, pages: Any) -> None:
        self._memory.zero(block, pages)

    def room(self, block: str, first_page: int, count: int) -> memoryview | None:
        return self._memory.room(block, first_page, count)

    def read(self, block: str, page: int) -> memoryview:
        return self._memory.room(block, page, 1)

    def discard(self, block: str, start_bytes: int, length_bytes: int) -> None: ...

    def devices_loaded(self, header: StreamHeader, sections: Sequence[DeviceSection]) -> None: ...

    def run(self) -> None: ...

    def commit(
        self, header: StreamHeader, sections: Sequence[DeviceSection], description: bytes, facts: Any
    ) -> None: ...

    def resumed(self) -> None: ...

    def let_go(self, heard: bool) -> None: ...

    def abandon(self) -> None: ...


def _file(name: str, length: int) -> int:
    fd = os.memfd_create(f"bench-{name}"[:200], os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return fd


class Side:
    """What a command does is the method of its name; `do_run` answers when the work begun before it has ended."""

    def __init__(self) -> None:
        self._stop = Stop()
        self._guest: ProcessGuest | None = None
        self._landing: Any = None
        self._listener: Listener | None = None
        self._live: _Live | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Answer = {}
        self._released = False

    # -- destination -------------------------------------------------------------------------------------------------

    def do_listen(
        self, kind: str, channels: int = 0, prepared: Mapping[str, int] | None = None, folder: str = ""
    ) -> Answer:
        """Begin to receive; `prepared` is a warm destination's RAM."""
        if kind == "process":
            self._landing = ProcessLanding(prepared=prepared)
        elif kind == "image":
            self._landing = ImageLanding(Path(folder))
        else:
            self._landing = MemoryLanding(prepared or {})
        self._listener = Listener(Address("127.0.0.1"), self._stop)
        incoming = Incoming(self._listener, self._landing, self._stop, multifd_channels=channels)
        self._work(lambda: {"received": _plain(incoming.run())})
        return {"address": str(self._listener.address)}

    def do_started(self) -> Answer:
        while not getattr(self._landing, "started", False) and self._thread is not None and self._thread.is_alive():
            time.sleep(0.002)
        return {"started": getattr(self._landing, "started", False)}

    def do_faults(self) -> Answer:
        stats = self._landing.fault_stats
        return {"faults": _plain(stats) if stats is not None else None}

    def do_guest(self, beats: int = 20) -> Answer:
        """The largest gap of the guest's heartbeat, when it has beaten some more."""
        guest = self._landing.guest
        wanted = guest.beats + beats
        while guest.beats < wanted and guest.alive:
            time.sleep(0.005)
        return {"largest_gap_ms": guest.largest_gap_ms}

    # -- source ------------------------------------------------------------------------------------------------------

    def do_guest_here(self, length: int, settings: Mapping[str, Any], runs: bool = False) -> Answer:
        self._guest = ProcessGuest({"ram": length}, GuestSettings(**settings))
        if runs:
            self._guest.resume()
        return {"fd": self._guest.memfds["ram"]}

    def do_migrate(self, address: str, channels: int = 0) -> Answer:
        guest = self._guest
        assert guest is not None
        settings = SendSettings(multifd_channels=channels)
        guest.memory()  # mapped before the clock runs, as the RAM of a QEMU is that has been used

        def work() -> Answer:
            result = migrate_guest(guest, Address.parse(address), settings, self._stop, decide=Settle())
            return {"sent": _plain(result.sent), "downtime_ms": result.downtime_ms, "passes": len(result.passes)}

        self._work(work)
        return {}

    def do_split(self, address: str, preempt: bool, quiet: bool) -> Answer:
        """Postcopy with every page missing: the guest has written all of them when the first pass ends."""
        guest = self._guest
        assert guest is not None
        settings = SendSettings(postcopy=True, preempt=preempt)
        pages = guest.blocks["ram"] // 4096

        def decide(last: Pass) -> Step:
            until = guest.pages_written + pages
            while guest.pages_written < until:
                time.sleep(0.005)
            if quiet:
                live._wait_pace = self._hold_back  # type: ignore[method-assign]
            return "postcopy"

        def work() -> Answer:
            guest.resume()
            result = live.migrate()
            return {"sent": _plain(result.sent), "downtime_ms": result.downtime_ms}

        view = GuestView(guest)
        live = self._live = _Live(view, Address.parse(address), settings, self._stop, decide, None)
        self._work(work)
        return {}

    def do_release(self) -> Answer:
        """The background goes from now on."""
        assert self._live is not None
        with self._live._changed:
            self._released = True
            self._live._changed.notify_all()
        return {}

    def _hold_back(self) -> bool:
        """In place of Outgoing._wait_pace: its bandwidth would count what was asked for against the background."""
        live = self._live
        assert live is not None
        with live._changed:
            live._changed.wait_for(
                lambda: self._released or bool(live._urgent) or live._stop.requested.is_set()
            )  # fmt: skip
            if live._urgent:
                return False
        live._stop.check()
        return True

    def do_send(self, folder: str, address: str, destination: str, **settings: Any) -> Answer:
        """An image, to a QEMU."""
        chosen = SendSettings(destination=Dialect(destination), **settings)

        def work() -> Answer:
            with Image(Path(folder)) as image:
                return {"sent": _plain(send_image(image, Address.parse(address), chosen, self._stop))}

        self._work(work)
        return {}

    # -- both --------------------------------------------------------------------------------------------------------

    def do_run(self) -> Answer:
        """Wait for the end of what was begun."""
        assert self._thread is not None
        self._thread.join()
        return self._outcome

    def close(self) -> None:
        self._stop.request()
        if self._thread is not None:
            self._thread.join(10)
        guests = [self._guest, getattr(self._landing, "guest", None)]
        for guest in guests:
            if guest is not None:
                guest.close()
        if self._listener is not None:
            self._listener.close()

    def _work(self, work: Callable[[], Answer]) -> None:
        def run() -> None:
            began, busy = time.monotonic(), time.process_time()
            try:
                answer = work()
                now = time.monotonic()
                answer |= {"call_s": now - began, "ended": now, "cpu_s": time.process_time() - busy}
                self._outcome = answer
            except (MigrationError, OSError, AssertionError) as error:
                self._outcome = {"error": f"{type(error).__name__}: {error}"}

        self._thread = threading.Thread(target=run, name="work")
        self._thread.start()


def _plain(value: object) -> Any:
    return msgspec.to_builtins(value)


def _profile(folder: str) -> None:
    """Every thread that starts from now on leaves its profile."""
    original = threading.Thread.run

    def run(self: threading.Thread) -> None:
        profile = cProfile.Profile(time.thread_time if os.environ.get("VIRTMIG_BENCH_CPU") else time.perf_counter)
        try:
            profile.runcall(original, self)
        finally:
            profile.dump_stats(f"{folder}/{os.getpid()}-{self.name.replace(' ', '-')}.prof")

    threading.Thread.run = run  # type: ignore[method-assign]


def main() -> None:
    if folder := os.environ.get("VIRTMIG_BENCH_PROFILE"):
        _profile(folder)
    side = Side()
    try:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(side, f"do_{command.pop('do')}")(**command)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    finally:
        with contextlib.suppress(MigrationError):
            side.close()


if __name__ == "__main__":
    main()
