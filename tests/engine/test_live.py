"""Between two engines: a guest that never stops writing arrives whole, runs once, and stays when anything breaks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.lab import eventually
from tests.support.proxy import RecordingProxy
from virtmig.engine import live, transport
from virtmig.engine.dirty import tracking_available
from virtmig.engine.guest_walk import GuestSettings
from virtmig.engine.incoming import GIVEN_UP, Incoming, Received
from virtmig.engine.live import LiveResult, Pass, Settle, Step, migrate_guest, recover_guest
from virtmig.engine.outgoing import SendSettings
from virtmig.engine.process_guest import ProcessGuest
from virtmig.engine.process_landing import ProcessLanding
from virtmig.engine.transport import Address, Connection, Listener, Stop
from virtmig.errors import ChannelError, GuestMemoryError, MigrationAborted, MigrationError
from virtmig.progress import Whereabouts

_facts = tracking_available()
pytestmark = pytest.mark.skipif(not _facts.available, reason=f"writes cannot be tracked: {_facts.reason}")

BLOCKS = {"ram": 16 << 20, "vram": 1 << 20}
SWITCH_AT_ONCE = Settle(downtime_limit_ms=10_000)


def POSTCOPY_AT_ONCE(last: Pass) -> Step:
    """After the first pass in which the guest wrote: on a busy machine it may not have had its turn in one."""
    return "postcopy" if last.left_pages else "pass"


class There:
    """The destination: an Incoming with a ProcessLanding, in a thread."""

    def __init__(self, channels: int = 0, **options: Any) -> None:
        self.stop = Stop()
        self.listener = Listener(Address("127.0.0.1"), self.stop)
        self.landing = ProcessLanding()
        self.incoming = Incoming(self.listener, self.landing, self.stop, multifd_channels=channels,
                                 **{"stall_s": 10, **options})  # fmt: skip
        self._outcome: list[Received | BaseException] = []
        self._thread = threading.Thread(target=self._run, name="there")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self.incoming.run())
        except BaseException as error:
            self._outcome.append(error)

    @property
    def guest(self) -> ProcessGuest:
        assert self.landing.guest is not None
        return self.landing.guest

    def result(self) -> Received:
        self._thread.join(30)
        assert self._outcome, "the destination did not come to an end"
        if isinstance(self._outcome[0], BaseException):
            raise self._outcome[0]
        return self._outcome[0]

    def close(self) -> None:
        self.stop.request()
        self._thread.join(30)
        self.listener.close()
        self.landing.abandon()


@contextmanager
def two(
    channels: int = 0, guest: GuestSettings | None = None, blocks: dict[str, int] = BLOCKS, **options: Any
) -> Iterator[tuple[ProcessGuest, There]]:
    there = There(channels, **options)
    try:
        with ProcessGuest.start(blocks, guest or GuestSettings(rate_mib_s=40, fill="random")) as here:
            eventually(lambda: here.pages_written > 200, "the guest writes")
            yield here, there
    finally:
        there.close()


def arrived(here: ProcessGuest, there: There) -> None:
    """It runs there, and only there, and every word of it is right."""
    assert not here.running
    assert there.landing.started
    beats = there.guest.beats
    eventually(lambda: there.guest.beats > beats, "a beat at the destination")
    check = there.guest.check()
    assert check.ok, check
    assert not there.guest.corrupt


def stayed(here: ProcessGuest, there: There) -> None:
    """It runs here as before, and nothing of it is there."""
    assert here.running
    beats = here.beats
    eventually(lambda: here.beats > beats, "a beat at the source")
    assert here.check().ok
    with pytest.raises(MigrationError):
        there.result()
    assert not there.landing.started


@pytest.mark.parametrize("channels", [0, 1, 2, 4, 8, 16])
def test_precopy(channels: int, nothing_left: None) -> None:
    with two(channels) as (here, there):
        result = migrate_guest(here, there.listener.address, SendSettings(multifd_channels=channels), Stop())
        received = there.result()
        arrived(here, there)
        assert len(received.channels) == 1 + channels
        assert not result.postcopy
        assert result.sent.pages_normal + result.sent.pages_zero == received.pages_normal + received.pages_zero


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_precopy_compressed(method: str) -> None:
    with two(2, GuestSettings(rate_mib_s=10)) as (here, there):
        settings = SendSettings(multifd_channels=2, compression=method)
        migrate_guest(here, there.listener.address, settings, Stop())
        there.result()
        arrived(here, there)


@pytest.mark.parametrize("pattern", ["sequential", "random", "hot"])
def test_passes_go_on_until_the_rest_fits(pattern: Any) -> None:
    seen: list[Pass] = []

    def decide(last: Pass) -> Step:
        seen.append(last)
        return "pass" if last.number < 4 else "switch"

    with two(2, GuestSettings(rate_mib_s=30, pattern=pattern, hot_pages=512, fill="random")) as (here, there):
        result = migrate_guest(here, there.listener.address, SendSettings(multifd_channels=2), Stop(), decide=decide)
        there.result()
        arrived(here, there)
        assert [each.number for each in seen] == [1, 2, 3, 4]
        assert result.passes == tuple(seen)
        assert seen[0].sent_pages == sum(BLOCKS.values()) // 4096
        assert all(each.sent_pages < seen[0].sent_pages for each in seen[1:])


@pytest.mark.parametrize(("preempt", "channels"), [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize("fill", ["random", "none"])
def test_postcopy(preempt: bool, channels: int, fill: Any, nothing_left: None) -> None:
    with two(channels, GuestSettings(pattern="random", fill=fill)) as (here, there):
        settings = SendSettings(postcopy=True, preempt=preempt, multifd_channels=channels)
        result = migrate_guest(here, there.listener.address, settings, Stop(), decide=POSTCOPY_AT_ONCE)
        received = there.result()
        arrived(here, there)
        assert result.postcopy
        assert received.postcopy
        assert received.pages_twice == 0
        stats = there.landing.fault_stats
        assert stats is not None
        assert stats.duplicates == 0


def test_guest_that_outruns_the_wire_is_given_back() -> None:
    with two(0, GuestSettings()) as (here, there):
        settings = SendSettings(bandwidth_bytes_per_s=30 << 20)
        with pytest.raises(MigrationError, match="writes faster") as error:
            migrate_guest(here, there.listener.address, settings, Stop(), decide=Settle(1, most_passes=2))
        assert error.value.guest is Whereabouts.SOURCE
        stayed(here, there)


@pytest.mark.parametrize("stage", ["connecting", "pages", "finishing"])
def test_cancel_at_every_stage_then_migrate_again(stage: str, nothing_left: None) -> None:
    stop = Stop()

    def at(progress: Any) -> None:
        if progress.stage == stage:
            stop.request()

    with two(2) as (here, there):
        with pytest.raises(MigrationAborted) as error:
            migrate_guest(here, there.listener.address, SendSettings(multifd_channels=2), stop,
                          decide=Settle(0, most_passes=50), progress=at) if stage == "pages" else migrate_guest(
                here, there.listener.address, SendSettings(multifd_channels=2), stop, decide=SWITCH_AT_ONCE,
                progress=at)  # fmt: skip
        assert error.value.guest is Whereabouts.SOURCE
        stayed(here, there) if stage != "connecting" else None
        assert here.running
        again = There()
        try:
            migrate_guest(here, again.listener.address, SendSettings(), Stop(), decide=SWITCH_AT_ONCE)
            again.result()
            arrived(here, again)
        finally:
            again.close()


def test_fail_every_send_in_turn(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    """The n-th send breaks, n = 1, 2, 3 ...: the guest runs on the source each time, until a run succeeds."""
    send = Connection.send
    count = 0
    broken_at = 0
    lock = threading.Lock()

    def breaking(self: Connection, *buffers: Any) -> None:
        nonlocal count
        if self.name in ("main", "multifd 0", "multifd 1") and threading.current_thread().name != "main":
            with lock:
                count += 1
                if count == broken_at:
                    raise ChannelError(f"{self.name}: broken on purpose")
        send(self, *buffers)

    monkeypatch.setattr(Connection, "send", breaking)
    outcomes = []
    with ProcessGuest.start({"ram": 4 << 20}, GuestSettings(rate_mib_s=5, fill="random")) as here:
        for broken_at in range(1, 60):
            count = 0
            there = There(2)
            try:
                migrate_guest(here, there.listener.address, SendSettings(multifd_channels=2), Stop(),
                              decide=SWITCH_AT_ONCE)  # fmt: skip
            except MigrationError as error:
                outcomes.append(error.guest)
                assert error.guest is Whereabouts.SOURCE
                assert here.running
                assert not there.landing.started
            else:
                if count < broken_at:
                    there.result()
                    arrived(here, there)
                    break
                # the send that broke was the last word: the guest is whole there, and runs nowhere
                with pytest.raises(ChannelError) as unheard:
                    there.result()
                assert unheard.value.guest is Whereabouts.UNKNOWN
                assert not here.running
                assert not there.landing.started
                here.resume()
            finally:
                there.close()
        else:
            pytest.fail("no run succeeded")
    assert len(outcomes) > 8


def test_last_word_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source heard SHUT 0 and let go, and its word is lost: nobody runs, nobody runs twice."""
    monkeypatch.setattr(live, "GIVEN_UP", b"")
    with two() as (here, there):
        migrate_guest(here, there.listener.address, SendSettings(), Stop(), decide=SWITCH_AT_ONCE)
        with pytest.raises(ChannelError, match="without a word") as error:
            there.result()
        assert error.value.guest is Whereabouts.UNKNOWN
        assert not here.running
        assert not there.guest.running
        assert there.guest.check().ok  # it is whole, and may be resumed by hand
    assert len(GIVEN_UP) == 9


def test_destination_that_dies_before_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise GuestMemoryError("on purpose")

    monkeypatch.setattr(ProcessLanding, "commit", refused)
    with two() as (here, there):
        with pytest.raises(MigrationError) as error:
            migrate_guest(here, there.listener.address, SendSettings(), Stop(), decide=SWITCH_AT_ONCE)
        assert error.value.guest is Whereabouts.SOURCE
        stayed(here, there)


def test_guest_process_that_is_killed_is_noticed() -> None:
    with two(0, GuestSettings(rate_mib_s=5)) as (here, there):
        settings = SendSettings(bandwidth_bytes_per_s=8 << 20)

        def kill(_: Any) -> None:
            if here._process is not None:
                here._process.kill()

        with pytest.raises(MigrationError):
            migrate_guest(here, there.listener.address, settings, Stop(), progress=kill)
        with pytest.raises(MigrationError):
            there.result()


@pytest.mark.parametrize("preempt", [False, True], ids=["", "preempt"])
@pytest.mark.parametrize("silent", [False, True], ids=["dead socket", "silent socket"])
def test_broken_postcopy_is_recovered_twice(preempt: bool, silent: bool, nothing_left: None) -> None:
    """Cut in postcopy, recover over a wire that is cut again, recover once more: whole, and no page twice."""
    stall_s = 0.5 if silent else 10.0
    guest = GuestSettings(pattern="random", fill="random")
    with two(0, guest, {"ram": 8 << 20}, stall_s=stall_s) as (here, there):
        slow = SendSettings(postcopy=True, preempt=preempt, bandwidth_bytes_per_s=8 << 20, stall_s=stall_s)

        def cut_at(carried: int, call: Any) -> None:
            with RecordingProxy() as proxy:
                proxy.target_port = there.listener.address.port

                def cut() -> None:
                    proxy.wait_carried("s2d", carried, 20, together=True)
                    if silent:
                        proxy.freeze()
                    else:
                        proxy.cut()

                cutter = threading.Thread(target=cut, name="cutter")
                cutter.start()
                with pytest.raises(MigrationError) as error:
                    call(Address("127.0.0.1", proxy.port))
                cutter.join()
                assert error.value.guest is Whereabouts.SPLIT
            eventually(lambda: there.incoming.paused, "a pause at the destination")

        cut_at((8 << 20) + (2 << 20), lambda a: migrate_guest(here, a, slow, Stop(), decide=POSTCOPY_AT_ONCE))
        assert not here.running
        cut_at(1 << 20, lambda a: recover_guest(here, a, slow, Stop()))
        recover_guest(here, there.listener.address, SendSettings(postcopy=True, preempt=preempt), Stop())
        received = there.result()
        arrived(here, there)
        assert received.recoveries == 2
        assert received.pages_twice == 0


def test_tracking_that_cannot_be_had_is_refused_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = type(_facts)(False, "this kernel has no PAGEMAP_SCAN", "Linux 6.7")
    monkeypatch.setattr(live, "tracking_available", lambda: facts)
    with two() as (here, there):
        with pytest.raises(GuestMemoryError, match="PAGEMAP_SCAN") as error:
            migrate_guest(here, there.listener.address, SendSettings(), Stop())
        assert error.value.guest is Whereabouts.SOURCE
        assert here.running


def test_nobody_listens(nothing_left: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with ProcessGuest.start({"ram": 1 << 20}) as here:
        with pytest.raises(ChannelError, match="cannot connect") as error:
            migrate_guest(here, Address("127.0.0.1", port), SendSettings(), Stop())
        assert error.value.guest is Whereabouts.SOURCE
        assert here.running


def test_peer_that_stalls_at_any_byte_is_noticed(nothing_left: None) -> None:
    """It takes so many bytes and then nothing more: the source gives up in the stated time, and its guest runs."""
    with ProcessGuest.start({"ram": 8 << 20}, GuestSettings(rate_mib_s=5, fill="random")) as here:
        for taken in (0, 4, 100, 5000, 1 << 20):
            with socket.create_server(("127.0.0.1", 0)) as server:
                held: list[socket.socket] = []

                def take(taken: int = taken, server: socket.socket = server, held: list[socket.socket] = held) -> None:
                    peer = server.accept()[0]
                    held.append(peer)
                    left = taken
                    while left and (got := peer.recv(left)):
                        left -= len(got)

                thread = threading.Thread(target=take, name="peer")
                thread.start()
                with pytest.raises(ChannelError, match=r"for 0\.5 s") as error:
                    migrate_guest(here, Address("127.0.0.1", server.getsockname()[1]), SendSettings(stall_s=0.5),
                                  Stop(), decide=SWITCH_AT_ONCE)  # fmt: skip
                assert error.value.guest is Whereabouts.SOURCE
                assert here.running
                thread.join()
                held[0].close()
    assert transport.STALL_S >= 1


def test_memory_is_bounded_by_channels_not_by_ram() -> None:
    """What both sides hold beyond the guest: the peak of this process does not grow with the guest."""
    import resource

    def move(mib: int) -> LiveResult:
        there = There(2)
        try:
            with ProcessGuest.start({"ram": mib << 20}, GuestSettings(rate_mib_s=1)) as here:
                result = migrate_guest(here, there.listener.address, SendSettings(multifd_channels=2), Stop())
                there.result()
                return result
        finally:
            there.close()

    move(8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    move(8)
    small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert small < 64 * 1024
