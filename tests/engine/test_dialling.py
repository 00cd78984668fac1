"""The preempt connection that a destination does not take: no page is lost with it, END does not go out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_outgoing import POSTCOPY, SLOW_BYTES_PER_S, folder_of, nothing_is_left, send  # noqa: F401
from tests.support.destination_peer import DestinationPeer, destination_peer
from tests.support.emulators import dialect
from tests.support.images import recording, waiting
from tests.support.recorder import Emulator
from virtmig.engine.outgoing import SendProgress
from virtmig.errors import ChannelError
from virtmig.lab.guest import PAGE_BYTES
from virtmig.progress import Whereabouts
from virtmig.stream.return_path import RequestPages, Shut
from virtmig.stream.wire import Dialect

PREEMPT: dict[str, Any] = {"postcopy": True, "preempt": True, "destination": Dialect.QEMU_11_1}
ASK = RequestPages("pc.ram", 5000 * PAGE_BYTES, PAGE_BYTES, True)


def asked_before(peer: DestinationPeer) -> dict[str, Any]:
    """What lets the page be asked for before the background comes to it."""

    def wait(report: SendProgress) -> None:
        assert not report.guest_runs or peer.asked.wait(20)

    return {"progress": wait, "bandwidth_bytes_per_s": SLOW_BYTES_PER_S}


@pytest.mark.parametrize("told", [None, Dialect.QEMU_11_1], ids=["", "told 11.1"])
def test_a_qemu_without_preempt_is_refused_before_the_guest_runs(
    told: Dialect | None,
    emulator: Emulator,
    folder_of: Callable[[str], Path],  # noqa: F811
) -> None:
    name = f"{emulator.version_name}-plain"
    with waiting(emulator, recording(name), *POSTCOPY[0], runs=True) as waits:
        with pytest.raises(ChannelError, match=r"^preempt") as failure:
            send(folder_of(name), waits.address, **{**PREEMPT, "destination": told or dialect(emulator)})
        assert failure.value.guest is Whereabouts.SOURCE
        assert "leave out --postcopy-preempt" in failure.value.hint
        assert waits.qemu.process.wait(20) == 1
        assert not any(event["event"] == "RESUME" for event in waits.qemu.qmp.events)


def test_end_is_held_back_when_preempt_is_turned_away_late(folder_of: Callable[[str], Path]) -> None:  # noqa: F811
    """The handshake's last packet was lost: to that QEMU the connection comes with its first page."""
    with destination_peer(ask=ASK) as (peer, address):

        def turn_away() -> None:
            assert peer.asked.wait(20)
            peer.turn_away()

        thread = threading.Thread(target=turn_away, name="peer turns away")
        thread.start()
        with pytest.raises(ChannelError, match="preempt") as failure:
            send(folder_of("7.2-plain"), address, **PREEMPT, **asked_before(peer))
        thread.join()
        assert peer.ran.is_set()
        assert not peer.ended.is_set()
    assert failure.value.guest is Whereabouts.SPLIT
    assert f"virtmig send --recover {folder_of('7.2-plain')} {address} --postcopy-preempt" in failure.value.hint


def test_end_is_held_back_while_a_unix_peer_leaves_a_page_unread(
    folder_of: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    with destination_peer(tmp_path / "s", ask=ASK) as (peer, address):
        with pytest.raises(ChannelError, match="preempt: the destination takes nothing for 1 s") as failure:
            send(folder_of("7.2-plain"), address, stall_s=1, **PREEMPT, **asked_before(peer))
        assert peer.ran.is_set()
        assert not peer.ended.is_set()
    assert failure.value.guest is Whereabouts.SPLIT


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_end_goes_out_when_preempt_was_taken(
    unix: bool,
    folder_of: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    path = tmp_path / "s" if unix else None
    with destination_peer(path, ask=ASK, end=Shut(0), accepts=1) as (peer, address):
        told = {**PREEMPT, "destination": Dialect.QEMU_7_2}
        result = send(folder_of("7.2-plain"), address, **told, **asked_before(peer))
        assert peer.ended.is_set()
    assert result.requests_served == 1


def test_a_recovery_goes_on_over_main_where_there_is_no_preempt(
    emulator: Emulator,
    folder_of: Callable[[str], Path],  # noqa: F811
) -> None:
    """To break it off would crash a 7.2 that is in postcopy-recover, and its guest with it."""
    name = f"{emulator.version_name}-plain"
    told = dialect(emulator)

    def broken(report: SendProgress) -> None:
        if report.guest_runs and report.pages_sent > 100:
            raise ChannelError("main: broken on purpose")

    with waiting(emulator, recording(name), *POSTCOPY[0], runs=True) as waits:
        with pytest.raises(ChannelError, match="on purpose"):
            send(folder_of(name), waits.address, destination=told, postcopy=True, progress=broken,
                 bandwidth_bytes_per_s=SLOW_BYTES_PER_S)  # fmt: skip
        send(folder_of(name), waits.recover(), destination=told, recover=True, preempt=True)
        waits.qemu.qmp.wait_status("completed")
        waits.qemu.wait_heartbeat(2)
