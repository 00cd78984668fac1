"""Fail the n-th receive and ioctl, n = 1, 2, 3 ..., until a run succeeds; each time the guest is in its place."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine.test_live import POSTCOPY_AT_ONCE, SWITCH_AT_ONCE, There, arrived
from virtmig.engine.channels import Arrivals
from virtmig.engine.dirty import tracking_available
from virtmig.engine.guest_walk import GuestSettings
from virtmig.engine.incoming import Incoming
from virtmig.engine.live import migrate_guest, recover_guest
from virtmig.engine.outgoing import SendSettings
from virtmig.engine.process_guest import ProcessGuest
from virtmig.engine.transport import Connection, Stop
from virtmig.errors import ChannelError, MigrationError
from virtmig.progress import Whereabouts

_facts = tracking_available()
pytestmark = pytest.mark.skipif(not _facts.available, reason=f"writes cannot be tracked: {_facts.reason}")

#: after so many that succeed one by one, every further run leaves out a few more
ONE_BY_ONE = 12


class Breaker:
    """Counts calls, and breaks one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.at = 0
        self._lock = threading.Lock()

    def hit(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self.at

    def numbers(self) -> Iterator[int]:
        number = 1
        while True:
            self.count, self.at = 0, number
            yield number
            number += 1 if number < ONE_BY_ONE else number // 4


@contextmanager
def guest() -> Iterator[ProcessGuest]:
    with ProcessGuest.start({"ram": 4 << 20}, GuestSettings(rate_mib_s=5, fill="random")) as made:
        yield made


def judged(here: ProcessGuest, there: There, breaker: Breaker, move: Callable[[], Any]) -> bool:
    """Whether the run succeeded; whatever happened, not two run, and who is said to run does."""
    settled: Whereabouts | None = None
    try:
        move()
    except MigrationError as error:
        settled = error.guest
    if settled is not None:
        there.stop.request()
    try:
        there.result()
        at_destination = True
    except MigrationError:
        at_destination = False
    if settled is None and at_destination and breaker.count < breaker.at:
        arrived(here, there)
        return True
    runs_there = there.landing.started
    assert not (here.running and runs_there), "two run"
    if settled is Whereabouts.SOURCE:
        assert here.running
    if settled is None:
        assert not here.running
        assert runs_there or not at_destination
    if not here.running:
        here.resume()  # nobody else does: the next run begins as the first
    return False


def run_until_it_succeeds(breaker: Breaker, settings: SendSettings, channels: int) -> int:
    with guest() as here:
        for number in breaker.numbers():
            there = There(channels)
            try:
                if judged(here, there, breaker, lambda there=there: migrate_guest(  # type: ignore[misc]
                    here, there.listener.address, settings, Stop(), decide=SWITCH_AT_ONCE,
                )):  # fmt: skip
                    return number
            finally:
                there.close()
    raise AssertionError


@pytest.mark.parametrize("channels", [0, 2])
def test_every_receive(channels: int, monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    breaker = Breaker()
    receive = Connection.recv_into

    def breaking(self: Connection, view: memoryview) -> int:
        if breaker.hit():
            raise ChannelError(f"{self.name}: broken on purpose")
        return receive(self, view)

    monkeypatch.setattr(Connection, "recv_into", breaking)
    settings = SendSettings(multifd_channels=channels)
    assert run_until_it_succeeds(breaker, settings, channels) > 6


def test_every_ioctl_of_precopy(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    """Tracking in this process; the guest's own ioctls are in its process."""
    breaker = Breaker()
    ioctl = fcntl.ioctl

    def breaking(*words: Any) -> Any:
        if breaker.hit():
            raise OSError(12, "broken on purpose")
        return ioctl(*words)

    monkeypatch.setattr(fcntl, "ioctl", breaking)
    assert run_until_it_succeeds(breaker, SendSettings(), 0) > 2


def test_every_ioctl_of_postcopy(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    """After RUN the guest is at the destination for good: an ioctl that fails there ends it, and never two run."""
    breaker = Breaker()
    ioctl = fcntl.ioctl

    def breaking(*words: Any) -> Any:
        if breaker.hit():
            raise OSError(12, "broken on purpose")
        return ioctl(*words)

    monkeypatch.setattr(fcntl, "ioctl", breaking)
    settings = SendSettings(postcopy=True, stall_s=3)
    numbers = []
    for number in breaker.numbers():
        numbers.append(number)
        with guest() as here:
            there = There(stall_s=3)
            try:
                if judged(here, there, breaker, lambda here=here, there=there: migrate_guest(  # type: ignore[misc]
                    here, there.listener.address, settings, Stop(), decide=POSTCOPY_AT_ONCE,
                )):  # fmt: skip
                    break
            finally:
                there.close()
    assert len(numbers) > 4


def test_postcopy_paused_on_purpose_and_gone_on_with(nothing_left: None) -> None:
    """A stop in postcopy is a pause: the guest is split, and a recovery brings the rest."""
    pause_and_go_on()


def test_a_recovery_ahead_of_the_news_of_the_end(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    """The destination still reads what came over the broken connection when the next one is here."""
    early = threading.Event()
    may_recover, broken = Arrivals._may_recover, Incoming._broken

    def noticing(self: Arrivals, *words: Any) -> bool:
        answer = may_recover(self, *words)
        if answer:
            early.set()
        return answer

    def late(self: Incoming, *words: Any) -> None:
        early.wait(30)
        broken(self, *words)

    monkeypatch.setattr(Arrivals, "_may_recover", noticing)
    monkeypatch.setattr(Incoming, "_broken", late)
    pause_and_go_on()
    assert early.is_set()


def pause_and_go_on() -> None:
    stop = Stop()

    def pause(progress: Any) -> None:
        if progress.guest_runs and progress.stage == "pages":
            stop.request()

    with ProcessGuest.start({"ram": 16 << 20}, GuestSettings(pattern="random", fill="random")) as here:
        there = There()
        try:
            slow = SendSettings(postcopy=True, bandwidth_bytes_per_s=20 << 20)
            with pytest.raises(MigrationError) as error:
                migrate_guest(here, there.listener.address, slow, stop, decide=POSTCOPY_AT_ONCE, progress=pause)
            assert error.value.guest is Whereabouts.SPLIT
            assert not here.running
            recover_guest(here, there.listener.address, SendSettings(postcopy=True), Stop())
            there.result()
            arrived(here, there)
        finally:
            there.close()
