"""The guest without a hypervisor: what it writes, that it notices damage, that it goes on elsewhere where it stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from tests.support.lab import eventually
from tests.support.leftovers import leftovers
from virtmig.engine import process_guest
from virtmig.engine.guest_walk import DeviceState, Walk, Walker, check_memory, decode_state, first_walks
from virtmig.engine.process_guest import GuestSettings, ProcessGuest
from virtmig.engine.userfault import GuestGone
from virtmig.errors import GuestMemoryError
from virtmig.pages import PAGE_BYTES

BLOCKS = {"low": 37 * PAGE_BYTES, "high": 90 * PAGE_BYTES}
PAGES = 127


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = leftovers()
    yield
    assert leftovers() == before


def copy_memory(source: ProcessGuest, destination: ProcessGuest) -> None:
    for name, length in source.blocks.items():
        assert os.pwrite(destination.memfds[name], os.pread(source.memfds[name], length, 0), 0) == length


def contents(guest: ProcessGuest) -> dict[str, bytes]:
    return {name: os.pread(fd, guest.blocks[name], 0) for name, fd in guest.memfds.items()}


def until_written(guest: ProcessGuest, pages: int) -> None:
    goal = guest.pages_written + pages
    eventually(lambda: guest.pages_written >= goal, f"{pages} pages written")


SETTINGS = [
    GuestSettings(),
    GuestSettings(pattern="random", fill="random", seed=5),
    GuestSettings(pattern="hot", hot_pages=11, batch_pages=5),
    GuestSettings(first_page=30, page_count=20, batch_pages=7, rate_mib_s=40.0),
]


@pytest.mark.parametrize("settings", SETTINGS)
class TestGoingOn:
    def test_paused_means_that_nothing_is_written(self, settings: GuestSettings) -> None:
        with ProcessGuest.start(BLOCKS, settings) as guest:
            assert guest.running
            until_written(guest, 200)
            guest.pause()
            assert not guest.running
            before, written, beats = contents(guest), guest.pages_written, guest.beats
            assert guest.state() == guest.state()
            assert (contents(guest), guest.pages_written, guest.beats) == (before, written, beats)
            guest.resume()
            until_written(guest, 200)
            eventually(lambda: guest.beats > beats, "a beat")

    def test_it_goes_on_elsewhere_where_it_stood(self, settings: GuestSettings) -> None:
        with ProcessGuest.incoming(BLOCKS) as destination:
            with ProcessGuest.start(BLOCKS, settings) as source:
                until_written(source, 500)
                source.pause()
                state = source.state()
                copy_memory(source, destination)
                beats, written = source.beats, source.pages_written
            assert not destination.running
            destination.load(state)
            assert destination.state() == state
            assert (destination.beats, destination.pages_written) == (beats, written)
            assert destination.check().ok
            destination.resume()
            until_written(destination, 500)
            assert destination.beats > beats
            checked = destination.check()
            assert checked.ok, checked
            assert checked.pages == PAGES
            assert destination.running
            assert not destination.corrupt
            assert destination.corruption is None

    def test_one_page_that_stayed_old_is_noticed(self, settings: GuestSettings) -> None:
        """A consistent page, only not the newest: what a lost write looks like."""
        with ProcessGuest.incoming(BLOCKS) as destination, ProcessGuest.start(BLOCKS, settings) as source:
            until_written(source, 300)
            source.pause()
            copy_memory(source, destination)
            old = source.pages_written
            source.resume()
            until_written(source, 3000)
            source.pause()
            stale = os.pread(destination.memfds["low"], PAGE_BYTES, 33 * PAGE_BYTES)
            copy_memory(source, destination)
            os.pwrite(destination.memfds["low"], stale, 33 * PAGE_BYTES)
            assert source.pages_written > old
            assert contents(source) != contents(destination)
            destination.load(source.state())
            checked = destination.check()
            assert not checked.ok
            assert checked.bad_pages == 1
            assert checked.corruption is not None
            assert checked.corruption.page == 33
            assert checked.corruption.found_counter < checked.corruption.expected_counter
            destination.resume()
            eventually(lambda: destination.corrupt, "the guest's own finding")
            found = destination.corruption
            assert found is not None
            assert found.page == 33
            assert found.found_counter < found.expected_counter
            assert not destination.check().ok  # though the page has been written again since


class TestChecking:
    def test_every_word_counts(self) -> None:
        for fill in ("none", "random"):
            with ProcessGuest.start(BLOCKS, GuestSettings(fill=fill)) as guest:
                until_written(guest, 200)
                guest.pause()
                for word in (0, 1, 2, 300, 510, 511):
                    at = 40 * PAGE_BYTES + word * 8
                    before = os.pread(guest.memfds["high"], 8, at)
                    os.pwrite(guest.memfds["high"], bytes(byte ^ 1 for byte in before), at)
                    checked = guest.check()
                    assert (checked.ok, checked.bad_pages) == (False, 1), (fill, word)
                    assert checked.corruption is not None
                    assert checked.corruption.page == 37 + 40
                    os.pwrite(guest.memfds["high"], before, at)
                assert guest.check().ok

    def test_it_fills_no_holes(self) -> None:
        settings = GuestSettings(first_page=0, page_count=10)
        with ProcessGuest.start({"ram": 1 << 20}, settings) as guest:
            until_written(guest, 20)
            assert guest.check().ok
            assert os.fstat(guest.memfds["ram"]).st_blocks * 512 == 10 * PAGE_BYTES

    def test_memory_that_is_shorter_than_said(self) -> None:
        with ProcessGuest.start(BLOCKS) as guest:
            guest.pause()
            files = {"low": (guest.memfds["low"], BLOCKS["low"]), "high": (guest.memfds["low"], BLOCKS["high"])}
            with pytest.raises(GuestMemoryError, match="'high' is shorter"):
                check_memory(files, guest.state())


class TestBeats:
    def test_the_gap_is_the_downtime(self) -> None:
        with ProcessGuest.start(BLOCKS, GuestSettings(rate_mib_s=1.0)) as guest:
            eventually(lambda: guest.beats > 5, "beats")
            guest.forget_gap()
            assert guest.largest_gap_ms < 50_000
            guest.pause()
            held_up = threading.Event()
            held_up.wait(0.03)
            beats = guest.beats
            guest.resume()
            eventually(lambda: guest.beats > beats, "a beat")
            assert guest.largest_gap_ms >= 30

    def test_a_rate_of_nothing_beats_without_writing(self) -> None:
        with ProcessGuest.start(BLOCKS, GuestSettings(rate_mib_s=0.0)) as guest:
            eventually(lambda: guest.beats > 20, "beats")
            assert guest.pages_written == 0
            guest.set_rate(None)
            until_written(guest, 100)

    def test_another_boot_has_another_clock(self) -> None:
        with ProcessGuest.start(BLOCKS) as guest, ProcessGuest.incoming(BLOCKS) as destination:
            guest.pause()
            state = msgspec.msgpack.decode(guest.state(), type=DeviceState)
            state.boot_id, state.last_beat_ns, state.largest_gap_ns = "elsewhere", 1, 0
            copy_memory(guest, destination)
            destination.load(msgspec.msgpack.encode(state))
            destination.resume()
            until_written(destination, 200)
            assert destination.largest_gap_ms < 60_000


class TestRefusals:
    def test_a_state_cut_anywhere_or_of_another_guest(self) -> None:
        with ProcessGuest.start(BLOCKS) as guest, ProcessGuest.incoming(BLOCKS) as destination:
            guest.pause()
            state = guest.state()
            for cut in range(len(state)):
                with pytest.raises(GuestMemoryError, match="no device state"):
                    decode_state(state[:cut], PAGES)
            with pytest.raises(GuestMemoryError, match="no device state"):
                destination.load(state + b"\x00")
            with pytest.raises(GuestMemoryError, match="other memory"):
                decode_state(state, PAGES - 1)
            strange = msgspec.msgpack.decode(state, type=DeviceState)
            strange.walks[0].position = PAGES
            with pytest.raises(GuestMemoryError, match="outside of its pages"):
                destination.load(msgspec.msgpack.encode(strange))
            copy_memory(guest, destination)
            destination.load(state)
            assert destination.check().ok

    def test_only_a_paused_guest_has_a_state(self) -> None:
        with ProcessGuest.start(BLOCKS) as guest:
            for refused in (guest.state, lambda: guest.load(b""), guest.arm_postcopy):
                with pytest.raises(GuestMemoryError, match="of a guest that runs"):
                    refused()
            assert guest.check().ok

    @pytest.mark.parametrize(
        "settings",
        [
            GuestSettings(first_page=PAGES),
            GuestSettings(page_count=PAGES + 1),
            GuestSettings(first_page=-1),
            GuestSettings(pattern="hot"),
            GuestSettings(batch_pages=0),
        ],
    )
    def test_settings_that_are_not_this_guest_s(self, settings: GuestSettings) -> None:
        with pytest.raises(GuestMemoryError, match=f"pages of|of a guest with {PAGES}"):
            ProcessGuest.start(BLOCKS, settings)

    @pytest.mark.parametrize("length", [0, 4095, -4096])
    def test_blocks_that_are_not_whole_pages(self, length: int) -> None:
        with pytest.raises(GuestMemoryError, match="not whole pages"):
            ProcessGuest.incoming({"good": PAGE_BYTES, "bad": length})


class TestEnding:
    def test_a_guest_that_was_killed_says_so_and_is_reaped(self) -> None:
        with ProcessGuest.start(BLOCKS) as guest:
            pid = guest.pid
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(GuestGone):
                guest.pause()
            eventually(lambda: not guest.alive, "its end")
            with pytest.raises(GuestGone):
                guest.state()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_closing_ends_who_waits_for_an_answer(self) -> None:
        guest = ProcessGuest.start(BLOCKS)
        os.kill(guest.pid, signal.SIGSTOP)
        ended: list[Exception] = []

        def ask() -> None:
            try:
                guest.pause()
            except GuestMemoryError as error:
                ended.append(error)

        waiting = threading.Thread(target=ask)
        waiting.start()
        eventually(guest._asking.locked, "the question")
        guest.close()
        waiting.join(10)
        assert [type(error) for error in ended] == [GuestGone]
        guest.close()
        assert (guest.running, guest.beats, guest.corruption) == (False, 0, None)

    def test_an_answer_that_is_late_is_not_taken_for_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with ProcessGuest.start(BLOCKS) as guest:
            os.kill(guest.pid, signal.SIGSTOP)
            monkeypatch.setattr(process_guest, "_ANSWER_S", 0.05)
            with pytest.raises(GuestMemoryError, match="did not answer 'pause'"):
                guest.pause()
            monkeypatch.undo()
            os.kill(guest.pid, signal.SIGCONT)
            assert decode_state(guest.state(), PAGES).version == 1

    def test_the_guest_ends_with_its_parent(self) -> None:
        script = (
            "import os; from virtmig.engine.process_guest import ProcessGuest;"
            "guest = ProcessGuest.start({'ram': 4096}); print(guest.pid, flush=True); os._exit(0)"
        )
        pid = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout)

        def gone() -> bool:
            try:
                with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                    return file.read().rpartition(")")[2].split()[0] == "Z"  # nobody here has to reap it
            except OSError:
                return True

        eventually(gone, "the end of the guest process")

    def test_no_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(GuestMemoryError, match="cannot start the guest process"):
            ProcessGuest.start(BLOCKS)

    def test_whichever_memory_file_fails_nothing_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.memfd_create
        for failing in range(3):
            left = [failing]

            def limited(name: str, flags: int, left: list[int] = left) -> int:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(24, "Too many open files")
                return real(name, flags)

            monkeypatch.setattr(os, "memfd_create", limited)
            before = leftovers()
            with pytest.raises(GuestMemoryError, match="Too many open files"):
                ProcessGuest.start(BLOCKS)
            assert leftovers() == before


class TestWalk:
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 127, 360])
    @pytest.mark.parametrize("scrambled", [False, True])
    def test_each_page_once_a_round(self, count: int, scrambled: bool) -> None:
        walk = Walk(5, count, scrambled)
        counters = np.zeros(count, np.uint64)
        for _ in range(40):
            pages, before = walk.next(17)
            at = (pages - np.uint64(5)).astype(np.int64)
            assert (counters[at] == before).all()
            counters[at] += np.uint64(1)
            assert (walk.counters() == counters).all()

    def test_a_walker_notices_a_page_that_was_written_twice(self) -> None:
        settings = GuestSettings(pattern="random", batch_pages=8)
        memory = np.zeros((32, PAGE_BYTES // 8), np.uint64)
        walker = Walker([memory[:10], memory[10:]], settings, first_walks(settings, 32))
        while not walker.walks[0].round:
            walker.step(8)
        assert walker.bad_pages == 0
        memory[17, 0] += np.uint64(1)
        while walker.walks[0].round < 2:
            walker.step(8)
        assert walker.bad_pages == 1
        assert walker.first_bad is not None
        assert (walker.first_bad.page, walker.first_bad.expected_counter, walker.first_bad.found_counter) == (17, 1, 2)
