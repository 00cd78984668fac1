"""The demo's two engines: each a process of its own that does as it is asked over a pipe, and ends with it.

Engine is what runs there, Remote is how the demo sees it. `python -m virtmig.engine.demo_engine FD` is one.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal

from virtmig.engine.faults import FaultStats
from virtmig.engine.guest_walk import GuestCheck, GuestSettings
from virtmig.engine.incoming import GIVEN_UP, Incoming
from virtmig.engine.live import GuestView, Pass, Settle, Step, migrate_guest
from virtmig.engine.outgoing import Outgoing, SendProgress, SendResult, SendSettings
from virtmig.engine.process_guest import ProcessGuest, _environment
from virtmig.engine.process_landing import ProcessLanding
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import MigrationError
from virtmig.pages import PAGE_BYTES
from virtmig.progress import Whereabouts
from virtmig.quantities import rate_text, size_text

DOWNTIME_LIMIT_MS = 50.0
MOST_PASSES = 8
#: the guest writes mostly to so much of its memory: an eighth
HOT_SHARE = 8
END_S = 10.0
#: "paused" and "lazy" need no write tracking, "precopy" and "paused" no userfaultfd of the destination
Way = Literal["precopy", "postcopy", "paused", "lazy"]
Say = Callable[[str, bool], None]  # a line, and whether the next one may take its place


class PausedMove(Outgoing):
    """The guest is paused, sent once and goes on there: at the end of it all, or at once and page by page (`lazy`)."""

    def _sync_each_section(self) -> bool:
        return False

    def _end(self) -> None:
        if self._answers.arrived and self._main is not None:
            with contextlib.suppress(MigrationError):
                self._main.connection.send(GIVEN_UP)
        super()._end()


def move_paused(guest: ProcessGuest, address: Address, settings: SendSettings, stop: Stop,
                progress: Callable[[SendProgress], None]) -> SendResult:  # fmt: skip
    guest.pause()
    try:
        return PausedMove(GuestView(guest), address, settings, stop, progress).run()  # type: ignore[arg-type]
    except MigrationError as error:
        if error.guest is Whereabouts.SOURCE:
            guest.resume()
        raise


class Engine:
    """One engine, in its own process: each public method is something it can be asked for."""

    def __init__(self, say: Say) -> None:
        self.stop = Stop()
        self._say = say
        self._guest: ProcessGuest | None = None
        self._listener: Listener | None = None
        self._landing: ProcessLanding | None = None

    @property
    def guest(self) -> ProcessGuest:
        assert self._guest is not None
        return self._guest

    def start(self, memory_mib: int, rate_mib_s: float) -> int:
        """A new guest, running. Its pid."""
        settings = GuestSettings(
            rate_mib_s=rate_mib_s, pattern="hot", hot_pages=(memory_mib << 20) // PAGE_BYTES // HOT_SHARE, fill="random"
        )
        self._guest = ProcessGuest.start({"ram": memory_mib << 20}, settings)
        return self._guest.pid

    def listen(self, path: str) -> None:
        self._listener = Listener(Address(path=path), self.stop)

    def receive(self, channels: int) -> tuple[int, FaultStats | None]:
        """The guest arrives and runs here: its pid, how its faults went."""
        assert self._listener is not None
        self._landing = ProcessLanding()
        try:
            Incoming(self._listener, self._landing, self.stop, multifd_channels=channels, recover_s=END_S).run()
        finally:
            self._listener.close()
        self._guest = self._landing.guest
        return self.guest.pid, self._landing.fault_stats

    def send(self, path: str, way: Way, settings: SendSettings) -> int:
        """The guest goes there; its process here ends. How many requests for pages were served."""
        address, passes = Address(path=path), Passes(self._say, way, self.guest.blocks["ram"] // PAGE_BYTES)
        self._forget_gap()
        if way in ("paused", "lazy"):
            sent = move_paused(self.guest, address, settings, self.stop, passes.sent)
        else:
            result = migrate_guest(self.guest, address, settings, self.stop, decide=passes.decide, progress=passes.sent)
            sent = result.sent
        self.close()
        return sent.requests_served

    def check(self) -> tuple[GuestCheck, float, int]:
        """Every word of memory; the longest time without a beat in ms; how many pages the guest wrote."""
        gap = self.guest.largest_gap_ms
        return self.guest.check(), gap, self.guest.pages_written

    def _forget_gap(self) -> None:
        """Once it beats again: the pause of the last check is no part of this move."""
        beats, deadline = self.guest.beats, time.monotonic() + END_S
        while self.guest.beats == beats and time.monotonic() < deadline:
            time.sleep(0.001)
        self.guest.forget_gap()

    def close(self) -> None:
        guest, self._guest = self._guest, None
        landing, self._landing = self._landing, None
        if guest is not None:
            guest.close()
        if landing is not None:
            landing.abandon()


class Passes:
    """What the source tells while it sends."""

    def __init__(self, say: Say, way: Way, total_pages: int) -> None:
        self._say = say
        self._way = way
        self._done = 0
        self._left = total_pages
        self._number = 1
        self._settle = Settle(DOWNTIME_LIMIT_MS, most_passes=MOST_PASSES)
        if way == "postcopy":
            self._settle = Settle(0.0, postcopy_after_passes=1)

    def decide(self, last: Pass) -> Step:
        step = self._settle(last)
        left, sent = size_text(last.left_pages * PAGE_BYTES), size_text(last.sent_pages * PAGE_BYTES)
        text = f"  pass {last.number}: {sent} at {rate_text(last.bytes_per_s)}, the guest wrote to {left} meanwhile"
        if step == "give up":
            step, text = "switch", f"{text}; enough passes, the rest takes a longer pause"
        elif step != "pass":
            text += ": the rest follows by faults" if step == "postcopy" else ": the rest fits into the downtime"
        self._say(text, False)
        self._done += last.sent_pages
        self._left, self._number = last.left_pages, last.number + 1
        return step

    def sent(self, progress: SendProgress) -> None:
        if progress.stage != "pages":
            return
        sent = progress.pages_sent - self._done
        if progress.guest_runs and self._way in ("postcopy", "lazy"):
            words = f"postcopy: the guest runs there, {progress.requests_served} pages asked for"
        elif self._way in ("paused", "lazy"):
            words = "paused"
        else:
            words = f"pass {self._number}"
        if 0 < sent < self._left:
            self._say(f"  {words}: {size_text(sent * PAGE_BYTES)} of {size_text(self._left * PAGE_BYTES)}", True)


def serve(pipe: Connection) -> None:
    """An engine's process: one question after the other, until nobody asks any more."""
    engine = Engine(lambda text, passing: pipe.send(("line", text, passing)))
    signal.signal(signal.SIGTERM, lambda number, frame: engine.stop.request())
    try:
        while True:
            name, arguments = pipe.recv()
            try:
                answer = ("done", getattr(engine, name)(*arguments), "")
            except MigrationError as error:
                answer = ("error", str(error), error.hint)
            pipe.send(answer)
    except (EOFError, OSError):
        return  # who asked is gone
    finally:
        engine.close()


class Remote:
    """An engine's process as this one sees it."""

    def __init__(self, name: str, say: Say) -> None:
        self.name = name
        self._say = say
        self._pipe, far = Pipe()
        command = [sys.executable, "-m", "virtmig.engine.demo_engine", str(far.fileno())]
        with far:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[far.fileno()], env=_environment(), start_new_session=True
            )

    def tell(self, name: str, *arguments: object) -> None:
        with self._asked():
            self._pipe.send((name, arguments))

    def answer(self) -> Any:
        """What came of what was told; lines that come before it are said."""
        while True:
            with self._asked():
                kind, value, more = self._pipe.recv()
            if kind == "line":
                self._say(value, more)
            elif kind == "error":
                raise MigrationError(f"engine {self.name}: {value}", hint=more)
            else:
                return value

    def ask(self, name: str, *arguments: object) -> Any:
        self.tell(name, *arguments)
        return self.answer()

    def close(self) -> None:
        self._pipe.close()
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its guest ends when nobody holds the other end of its socket
            self.process.wait()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise MigrationError(f"engine {self.name} (pid {self.process.pid}) has ended") from None


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
