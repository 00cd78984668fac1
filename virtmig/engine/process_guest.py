"""A guest without a hypervisor: a child process that keeps writing its memory and checks every page it comes back to.

Its memory are memory files that the parent made; its device state says where its walks stand. Another child that has
the same memory and loads that state goes on exactly there: one lost, late or doubled write shows. It is a process of
its own because a thread that waits for a page with the interpreter lock held would stop the fault handler as well.

What it writes is guest_walk's. The child is one thread: `python -m virtmig.engine.process_guest FD` answers what comes
over a unix socket and walks while nothing does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from virtmig.engine.dirty import watch_writes
from virtmig.engine.guest_walk import (
    WORDS,
    Corruption,
    DeviceState,
    GuestCheck,
    GuestSettings,
    Walker,
    Words,
    check_memory,
    decode_state,
    first_walks,
)
from virtmig.engine.memory import GuestMemory, holes_and_data
from virtmig.engine.userfault import UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, GuestGone, Userfault
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES

MADV_POPULATE_READ = 22
_MIB_PAGES = (1 << 20) // PAGE_BYTES
_TICK_NS = 1_000_000
#: a guest that was held up catches up on this much of its rate at most
_CREDIT_NS = 100_000_000
_MESSAGE_BYTES = 1 << 16
_ANSWER_S = 60.0

# words of the control page, which parent and child share
_BEATS, _LAST_BEAT_NS, _LARGEST_GAP_NS, _BAD_PAGES, _PAGES_WRITTEN, _RUNNING = range(6)
_FIRST_BAD = slice(8, 8 + 6)


class _Ask(msgspec.Struct):
    verb: Literal["blocks", "pause", "resume", "state", "load", "rate", "track", "untrack", "postcopy"]
    blocks: list[tuple[str, int]] = []
    settings: GuestSettings | None = None
    data: bytes = b""
    minor: bool = True
    number: int = 0


class _Answer(msgspec.Struct):
    error: str = ""
    hint: str = ""
    addresses: list[int] = []
    data: bytes = b""
    number: int = 0


class ProcessGuest:
    """The parent's side. One thread at a time asks; `close` may come from any, ends the child and whoever waits."""

    def __init__(self, blocks: Mapping[str, int], settings: GuestSettings | None) -> None:
        self.blocks = dict(blocks)
        self.memfds: dict[str, int] = {}
        self.addresses: dict[str, int] = {}
        self._asking = threading.Lock()
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: mmap.mmap | None = None
        self._memory: GuestMemory | None = None
        self._channel, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control_fd = -1
        try:
            control_fd = os.memfd_create("virtmig-control", os.MFD_CLOEXEC)
            os.ftruncate(control_fd, PAGE_BYTES)
            self._control = mmap.mmap(control_fd, PAGE_BYTES)
            for name, length in self.blocks.items():
                if length <= 0 or length % PAGE_BYTES:
                    raise GuestMemoryError(f"RAM block '{name}' of {length} bytes is not whole pages")
                self.memfds[name] = os.memfd_create(f"virtmig-{name}"[:200], os.MFD_CLOEXEC)
                os.ftruncate(self.memfds[name], length)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "virtmig.engine.process_guest", str(far.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[far.fileno()],
                env=_environment(),
                start_new_session=True,
            )
            far.close()
            ask = _Ask("blocks", list(self.blocks.items()), settings)
            answer, _ = self._ask(ask, [control_fd, *self.memfds.values()])
            self.addresses = dict(zip(self.blocks, answer.addresses, strict=True))
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise GuestMemoryError(f"cannot start the guest process: {error.strerror or error}") from None
            raise
        finally:
            far.close()
            if control_fd >= 0:
                os.close(control_fd)

    @classmethod
    def start(cls, blocks: Mapping[str, int], settings: GuestSettings | None = None) -> ProcessGuest:
        """A running one. `blocks`: name -> bytes."""
        guest = cls(blocks, settings or GuestSettings())
        try:
            guest.resume()
        except BaseException:
            guest.close()
            raise
        return guest

    @classmethod
    def incoming(cls, blocks: Mapping[str, int]) -> ProcessGuest:
        """A paused one with untouched memory that waits for `load`."""
        return cls(blocks, None)

    def memory(self) -> GuestMemory:
        """Its memory, mapped in this process to be read; it stays mapped until `close`.

        What it holds already is mapped at once: a fault for every page costs more than sending it.
        """
        if self._memory is None:
            files = {name: (os.dup(fd), self.blocks[name]) for name, fd in self.memfds.items()}
            self._memory = GuestMemory(files, writable=False)
            for block in self._memory.blocks.values():
                for start, end in holes_and_data(block.fd, block.length):
                    with contextlib.suppress(OSError):  # Linux 5.14; without it pages are mapped one by one
                        block.mapping.madvise(MADV_POPULATE_READ, start, end - start)
        return self._memory

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else -1

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Block -> (address in the child, bytes): what WriteTracker wants."""
        return {name: (address, self.blocks[name]) for name, address in self.addresses.items()}

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def running(self) -> bool:
        return bool(self._word(_RUNNING))

    @property
    def beats(self) -> int:
        return self._word(_BEATS)

    @property
    def largest_gap_ms(self) -> float:
        """The longest time without a beat: pauses, and the way from another guest of this host, included."""
        return self._word(_LARGEST_GAP_NS) / 1e6

    @property
    def pages_written(self) -> int:
        return self._word(_PAGES_WRITTEN)

    @property
    def corruption(self) -> Corruption | None:
        """The first page the guest itself found wrong."""
        if not self._word(_BAD_PAGES) or self._control is None:
            return None
        with memoryview(self._control) as raw, raw.cast("Q") as words, words[_FIRST_BAD] as first:
            return Corruption(*first.tolist())

    @property
    def corrupt(self) -> bool:
        return bool(self._word(_BAD_PAGES))

    def forget_gap(self) -> None:
        """Measure the largest gap anew."""
        if self._control is not None:
            with memoryview(self._control) as raw, raw.cast("Q") as words:
                words[_LARGEST_GAP_NS] = 0

    def pause(self) -> None:
        """When this returns, nothing is written any more. In postcopy it waits for the page the guest waits for."""
        self._ask(_Ask("pause"))

    def resume(self) -> None:
        self._ask(_Ask("resume"))

    def set_rate(self, rate_mib_s: float | None) -> None:
        self._ask(_Ask("rate", settings=GuestSettings(rate_mib_s=rate_mib_s)))

    def state(self) -> bytes:
        """The device state of a paused guest."""
        return self._ask(_Ask("state"))[0].data

    def load(self, state: bytes) -> None:
        """Take over another guest's state; memory is the caller's. `resume` then goes on where that one stood."""
        self._ask(_Ask("load", data=state))

    def track_writes(self) -> None:
        """From here on a WriteTracker of (pid, ranges) sees this guest's writes."""
        self._ask(_Ask("track"))

    def stop_tracking(self) -> None:
        self._ask(_Ask("untrack"))

    def arm_postcopy(self, *, minor: bool = True) -> Userfault:
        """Each page's next touch is a fault on what is returned, which the caller owns; its close disarms.

        With `minor`, pages that the memory file holds fault too (UFFDIO_CONTINUE maps them); without, only holes do,
        and pages that are to come again must have been punched out.
        """
        _, descriptors = self._ask(_Ask("postcopy", minor=minor))
        if len(descriptors) != 1:
            raise GuestMemoryError("the guest process sent no userfaultfd")
        return Userfault(descriptors[0])

    def check(self) -> GuestCheck:
        """Every word of the memory; a running guest is paused for it. Holes are read without filling them."""
        was_running = self.running
        if was_running:
            self.pause()
        try:
            files = {name: (self.memfds[name], length) for name, length in self.blocks.items()}
            return check_memory(files, self.state())
        finally:
            if was_running:
                self.resume()

    def close(self) -> None:
        """End the child, wait for it, close everything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        with self._asking:
            self._channel.close()
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._memory is not None:
                self._memory.close()
                self._memory = None
            descriptors, self.memfds = self.memfds, {}
            for fd in descriptors.values():
                os.close(fd)

    def __enter__(self) -> ProcessGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _word(self, index: int) -> int:
        if self._control is None:
            return 0
        return int.from_bytes(self._control[index * 8 : index * 8 + 8], "little")

    def _ask(self, ask: _Ask, descriptors: list[int] | None = None) -> tuple[_Answer, list[int]]:
        with self._asking:
            self._asked += 1
            ask.number = self._asked
            try:
                self._channel.settimeout(_ANSWER_S)
                socket.send_fds(self._channel, [msgspec.msgpack.encode(ask)], descriptors or [])
                answer, received = self._answer()
                while answer.number != ask.number:  # to what was asked before, and came too late
                    _close_all(received)
                    answer, received = self._answer()
            except TimeoutError:
                raise GuestMemoryError(f"the guest process did not answer '{ask.verb}' in {_ANSWER_S:g} s") from None
            except OSError as error:
                raise GuestGone(f"the guest process has ended ({error.strerror or error})") from None
        if answer.error:
            _close_all(received)
            raise GuestMemoryError(answer.error, hint=answer.hint)
        return answer, received

    def _answer(self) -> tuple[_Answer, list[int]]:
        data, received, _, _ = socket.recv_fds(self._channel, _MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise GuestGone("the guest process has ended")
        try:
            return msgspec.msgpack.decode(data, type=_Answer), received
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            _close_all(received)
            raise GuestMemoryError(f"the guest process answered what is no answer: {error}") from None


class _Child:
    """The guest itself."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._incoming = select.poll()
        self._incoming.register(channel, select.POLLIN)
        self._blocks: list[Words] = []
        self._mappings: list[mmap.mmap] = []
        self._control = memoryview(bytearray(PAGE_BYTES)).cast("Q")
        self._watch: Userfault | None = None
        self._since_ns = 0
        self._paced_pages = 0
        self._walker = Walker([], GuestSettings(), [])

    def run(self) -> None:
        """Until the parent goes away."""
        wait_ms: int | None = None
        while True:
            if self._incoming.poll(wait_ms) and not self._serve():
                return
            wait_ms = self._live() if self._control[_RUNNING] else None

    def _live(self) -> int:
        """A beat and a batch; returns how many ms there is nothing to do."""
        now = time.monotonic_ns()
        words = self._control
        gap = now - words[_LAST_BEAT_NS]
        if gap >= _TICK_NS:
            if words[_LAST_BEAT_NS] and gap > words[_LARGEST_GAP_NS]:
                words[_LARGEST_GAP_NS] = gap
            words[_LAST_BEAT_NS] = now
            words[_BEATS] += 1
        pages = self._walker.settings.batch_pages
        rate = self._walker.settings.rate_mib_s
        if rate is not None:
            due = int((now - self._since_ns) * rate * _MIB_PAGES / 1e9) - self._paced_pages
            credit = int(_CREDIT_NS * rate * _MIB_PAGES / 1e9) + 1
            if due > credit:
                self._paced_pages += due - credit
            pages = min(pages, due)
        if pages <= 0:
            return 1
        done = self._walker.step(pages)
        self._paced_pages += done
        words[_PAGES_WRITTEN] += done
        if self._walker.bad_pages != words[_BAD_PAGES]:
            self._report()
        return 0

    def _report(self) -> None:
        """The first page that was wrong, then how many: who sees a number there sees the page."""
        if (found := self._walker.first_bad) is not None:
            for index, value in enumerate(msgspec.structs.astuple(found)):
                self._control[_FIRST_BAD.start + index] = value
        self._control[_BAD_PAGES] = self._walker.bad_pages

    def _serve(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._channel, _MESSAGE_BYTES, 256)
        if not data:
            return False
        ask = msgspec.msgpack.decode(data, type=_Ask)
        passed: list[int] = []
        try:
            answer = self._do(ask, descriptors, passed)
        except GuestMemoryError as error:
            answer = _Answer(error=error.message, hint=error.hint)
        except OSError as error:
            answer = _Answer(error=f"'{ask.verb}' failed in the guest process: {error.strerror or error}")
        finally:
            _close_all(descriptors)
        answer.number = ask.number
        try:
            socket.send_fds(self._channel, [msgspec.msgpack.encode(answer)], passed)
        finally:
            _close_all(passed)
        return True

    def _do(self, ask: _Ask, descriptors: list[int], passed: list[int]) -> _Answer:
        words = self._control
        if ask.verb in ("state", "load", "postcopy") and words[_RUNNING]:
            raise GuestMemoryError(f"'{ask.verb}' of a guest that runs")
        match ask.verb:
            case "blocks":
                self._map(ask, descriptors)
                ranges = self._ranges()
                return _Answer(addresses=[start for start, _ in ranges])
            case "pause":
                words[_RUNNING] = 0
            case "resume":
                self._since_ns, self._paced_pages = time.monotonic_ns(), 0
                words[_RUNNING] = 1
            case "state":
                return _Answer(data=msgspec.msgpack.encode(self._state()))
            case "load":
                self._load(decode_state(ask.data, self._pages))
            case "rate":
                rate = ask.settings.rate_mib_s if ask.settings else None
                self._walker.settings = msgspec.structs.replace(self._walker.settings, rate_mib_s=rate)
                self._since_ns, self._paced_pages = time.monotonic_ns(), 0
            case "track":
                if self._watch is None:
                    self._watch = watch_writes(self._ranges())
            case "untrack":
                watch, self._watch = self._watch, None
                if watch is not None:
                    watch.close()
            case "postcopy":
                self._arm(ask.minor, passed)
        return _Answer()

    def _map(self, ask: _Ask, descriptors: list[int]) -> None:
        control, *files = descriptors
        self._control = memoryview(mmap.mmap(control, PAGE_BYTES)).cast("Q")
        for fd, (_, length) in zip(files, ask.blocks, strict=True):
            self._mappings.append(mmap.mmap(fd, length))
            self._blocks.append(np.frombuffer(self._mappings[-1], np.uint64).reshape(-1, WORDS))
        if ask.settings is not None:
            self._walker = Walker(self._blocks, ask.settings, first_walks(ask.settings, self._pages))
            self._walker.fill()

    def _ranges(self) -> list[tuple[int, int]]:
        return [(int(words.ctypes.data), words.nbytes) for words in self._blocks]

    @property
    def _pages(self) -> int:
        return sum(map(len, self._blocks))

    def _state(self) -> DeviceState:
        beats, last, gap, _, written = self._control[:_RUNNING].tolist()
        at = self._walker
        return DeviceState(
            at.settings, at.walks, at.batches, beats, last, gap, written, at.bad_pages, at.first_bad, _boot_id()
        )

    def _load(self, state: DeviceState) -> None:
        self._walker = Walker(self._blocks, state.settings, state.walks, state.batches)
        self._walker.bad_pages, self._walker.first_bad = state.bad_pages, state.first_bad
        words = self._control
        words[_BEATS] = state.beats
        words[_LAST_BEAT_NS] = state.last_beat_ns if state.boot_id == _boot_id() else 0
        words[_LARGEST_GAP_NS] = state.largest_gap_ns
        words[_PAGES_WRITTEN] = state.pages_written
        self._report()

    def _arm(self, minor: bool, passed: list[int]) -> None:
        """The parent gets the only descriptor: if it goes away, whoever waits for a page here is let go."""
        watch = Userfault.open(UFFD_FEATURE_MISSING_SHMEM | (UFFD_FEATURE_MINOR_SHMEM if minor else 0))
        passed.append(watch.fd)
        for start, length in self._ranges():
            watch.register(start, length, missing=True, minor=minor)
        for mapping in self._mappings:
            mapping.madvise(mmap.MADV_DONTNEED)  # pages mapped before would not fault; the file keeps their contents


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _environment() -> dict[str, str]:
    """The child imports this very package, and numpy starts no threads in it."""
    package_root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join([package_root, known] if known else [package_root])
    return {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as channel, contextlib.suppress(ConnectionError):
        _Child(channel).run()


if __name__ == "__main__":
    main()
