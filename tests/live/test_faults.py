"""Faults, injected while a guest is on its way: afterwards it is known where it runs, and it moves again.

The frozen destination is the one that libvirt alone answers with two running copies; it is shown with the fence and
without it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from tests.live.test_migrate import Witness, move, request
from tests.support.lab import GuestFactory, LabGuest, eventually, frozen
from virtmig.attempts import StopRequest
from virtmig.errors import PlanRefused
from virtmig.lab.lab import Lab
from virtmig.migrate import migrate
from virtmig.progress import Outcome, Phase, Progress, Status, Whereabouts
from virtmig.virt import connection

pytestmark = [pytest.mark.lab, pytest.mark.root]


@pytest.fixture
def short_keepalive() -> Iterator[None]:
    """A silent daemon is given up after 3 s instead of 30."""
    connection.set_default_keepalive(1, 2)
    yield
    connection.set_default_keepalive(None, None)


class Once:
    """Does something at the first sample in precopy in which memory has moved."""

    def __init__(self, action: Any, phase: Phase = Phase.PRECOPY) -> None:
        self.action = action
        self.phase = phase
        self.done = False

    def __call__(self, progress: Progress) -> None:
        if not self.done and progress.phase is self.phase and progress.memory_processed_bytes:
            self.done = True
            self.action()


def during(guest: LabGuest, lab: Lab, action: Any, *, phase: Phase = Phase.PRECOPY, **options: Any) -> Outcome:
    """Migrate from a to b, slowly, and do `action` on the way."""
    once = Once(action, phase)
    given: dict[str, Any] = {"bandwidth": 4, **options}
    outcome = migrate(request(guest, lab.b, **given), source_uri=lab.a.uri, watcher=Witness(once))
    assert once.done, "the fault was never injected"
    return outcome


def moves_again(guest: LabGuest, lab: Lab) -> None:
    outcome, _ = move(guest, lab.a, lab.b)
    assert outcome.status is Status.COMPLETED, outcome
    assert guest.only_on(lab.b)
    guest.check(lab.b)


def kill_qemu(guest: LabGuest, lab_host: Any) -> None:
    pid = lab_host.qemu_pid(guest.name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


# -- the frozen destination ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p2p", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["managed", "p2p"])
def test_a_frozen_destination_behind_the_fence_never_runs_a_second_copy(
    full_lab: Lab, guest: GuestFactory, p2p: bool
) -> None:
    fresh = guest()
    with frozen_on_the_way(full_lab):
        options: dict[str, Any] = {"p2p": True} if p2p else {}
        outcome = during(fresh, full_lab, full_lab.b.freeze_daemon, fence=True, bandwidth=64, **options)
        assert outcome.status is Status.FAILED
        assert outcome.guest is Whereabouts.SOURCE
        assert "held by the fence" in outcome.sentence
        assert "destroy" in outcome.hint
    assert fresh.running(full_lab.a)
    state = eventually(lambda: answered(fresh, full_lab), "the answer of the thawed destination")
    assert state != "running"
    fresh.check(full_lab.a)
    assert answered(fresh, full_lab) != "running"
    if state == "paused":  # the queued last step was still done; nothing but our hint resumes or removes it
        subprocess.run(shlex.split(outcome.hint.partition("with: ")[2]), check=True, capture_output=True)
    assert fresh.only_on(full_lab.a)
    moves_again(fresh, full_lab)


def answered(guest: LabGuest, lab: Lab) -> str:
    """What host b says: "running", "paused", "absent"; empty while it does not answer."""
    try:
        state = guest.state(lab.b)
    except libvirt.libvirtError:
        return ""
    return {None: "absent", libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_PAUSED: "paused"}.get(
        state, str(state)
    )


def test_a_frozen_destination_without_the_fence_is_reported_and_then_runs_twice(
    full_lab: Lab, guest: GuestFactory, short_keepalive: None
) -> None:
    fresh = guest()
    with frozen_on_the_way(full_lab):
        outcome = during(fresh, full_lab, full_lab.b.freeze_daemon, bandwidth=64)
        assert outcome.status is Status.FAILED
        assert outcome.guest is Whereabouts.UNKNOWN
        assert "not certain" in outcome.sentence
        assert "domstate" in outcome.hint
    # what libvirt alone does with it: this is why the fence exists
    eventually(lambda: fresh.running(full_lab.b) and fresh.running(full_lab.a), "the second copy")
    with pytest.raises(PlanRefused):
        move(fresh, full_lab.a, full_lab.b)


def test_a_thaw_during_the_last_questions_is_reported_as_a_doubled_guest(
    full_lab: Lab, guest: GuestFactory, short_keepalive: None
) -> None:
    fresh = guest()

    witness = Witness(Once(full_lab.b.freeze_daemon))
    thaw = threading.Thread(
        target=lambda: (
            eventually(lambda: witness.on_sample.done, "the freeze"),
            # the source is running again: the migration was given up
            eventually(lambda: fresh.domain(full_lab.a).state(0) == [1, 6], "the source's resume", 60),
            full_lab.b.thaw_daemon(),
        )
    )
    thaw.start()
    try:
        outcome = migrate(request(fresh, full_lab.b, bandwidth=64), source_uri=full_lab.a.uri, watcher=witness)
    finally:
        thaw.join()
        full_lab.b.thaw_daemon()
    assert outcome.status is Status.FAILED
    if outcome.guest is not Whereabouts.UNKNOWN:  # both answered in time
        assert outcome.guest is Whereabouts.DOUBLED
        assert outcome.sentence.startswith("DANGER")
        assert full_lab.a.uri in outcome.hint
        assert full_lab.b.uri in outcome.hint


def frozen_on_the_way(lab: Lab) -> Any:
    """Thaws host b at the end, whatever happened; the freeze itself comes from the test."""

    class Thaw:
        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            lab.b.thaw_daemon()

    return Thaw()


# -- processes that die ----------------------------------------------------------------------------------------------


def test_the_destination_qemu_dies_in_precopy(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    outcome = during(fresh, full_lab, lambda: kill_qemu(fresh, full_lab.b))
    assert (outcome.status, outcome.guest) == (Status.FAILED, Whereabouts.SOURCE)
    assert outcome.error
    assert fresh.only_on(full_lab.a)
    moves_again(fresh, full_lab)


def test_the_source_qemu_dies_in_precopy(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    outcome = during(fresh, full_lab, lambda: kill_qemu(fresh, full_lab.a))
    assert (outcome.status, outcome.guest) == (Status.FAILED, Whereabouts.NEITHER)
    assert outcome.sentence == f"{fresh.name} runs on neither lab-a nor lab-b"


def test_the_destination_is_destroyed_by_a_person(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    outcome = during(fresh, full_lab, lambda: fresh.domain(full_lab.b).destroy())
    assert (outcome.status, outcome.guest) == (Status.FAILED, Whereabouts.SOURCE)
    moves_again(fresh, full_lab)


@pytest.mark.parametrize("p2p", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["managed", "p2p"])
def test_the_destination_daemon_is_killed(full_lab: Lab, guest: GuestFactory, p2p: bool) -> None:
    fresh = guest()
    options: dict[str, Any] = {"p2p": True} if p2p else {}
    try:
        outcome = during(fresh, full_lab, full_lab.b.kill_daemon, **options)
    finally:
        full_lab.b.start_daemon()
        full_lab.b.await_daemon()
    assert outcome.status is Status.FAILED
    assert outcome.guest in (Whereabouts.SOURCE, Whereabouts.UNKNOWN)  # a dead daemon is no answer
    assert fresh.running(full_lab.a)
    eventually(lambda: fresh.only_on(full_lab.a), "the restarted daemon's cleaning up")
    fresh.check(full_lab.a)
    moves_again(fresh, full_lab)


def test_the_source_daemon_is_killed_and_comes_back(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()

    def kill_and_restart() -> None:
        full_lab.a.kill_daemon()
        full_lab.a.start_daemon()
        full_lab.a.await_daemon()

    outcome = during(fresh, full_lab, kill_and_restart, p2p=True)
    assert outcome.status is Status.FAILED
    assert outcome.guest is Whereabouts.SOURCE, outcome
    eventually(lambda: fresh.only_on(full_lab.a), "the source alone")
    fresh.check(full_lab.a)
    moves_again(fresh, full_lab)


def test_a_cut_link_can_be_aborted_and_the_source_goes_on(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    stop = StopRequest()

    def cut_and_stop() -> None:
        full_lab.link.cut()
        stop.ask("test")

    try:
        outcome = migrate(
            request(fresh, full_lab.b, bandwidth=4),
            source_uri=full_lab.a.uri,
            watcher=Witness(Once(cut_and_stop)),
            stop=stop,
        )
    finally:
        full_lab.link.restore()
    assert (outcome.status, outcome.guest) == (Status.ABORTED, Whereabouts.SOURCE)
    eventually(lambda: fresh.only_on(full_lab.a), "the destination's cleaning up")
    moves_again(fresh, full_lab)


# -- postcopy --------------------------------------------------------------------------------------------------------

POSTCOPY = {"postcopy": True, "postcopy_after_precopy": True, "bandwidth": 32, "postcopy_bandwidth": 8,
            "max_downtime": 1}  # fmt: skip


def test_a_broken_postcopy_is_said_and_recovered_by_its_hint(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(memory_mib=64, dirty_mib_s=None)

    def interrupt() -> None:
        # before the destination runs, QEMU cannot pause a postcopy, only lose it
        eventually(lambda: fresh.running(full_lab.b), "the guest's start on the destination")
        fresh.domain(full_lab.a).abortJobFlags(1)

    outcome = during(fresh, full_lab, interrupt, phase=Phase.POSTCOPY, **POSTCOPY)
    assert (outcome.status, outcome.guest) == (Status.INTERRUPTED, Whereabouts.SPLIT), outcome
    assert "part of its memory is still on lab-a" in outcome.sentence
    words = shlex.split(outcome.hint)
    assert words[0] == "virtmig"
    assert "--postcopy-resume" in words
    done = subprocess.run(
        [sys.executable, "-m", "virtmig.cli.main", *words[1:]], capture_output=True, text=True, timeout=100
    )
    if 11_002_000 <= fresh.connection(full_lab.b).getLibVersion() < 11_004_000:  # the daemon would crash (NEWS 11.4.0)
        assert done.returncode == 1
        assert "daemon crashes" in done.stderr
        assert fresh.running(full_lab.b)
        return
    assert done.returncode == 0, done.stderr
    assert f"{fresh.name} now runs on lab-b" in done.stdout
    assert fresh.only_on(full_lab.b)
    fresh.check(full_lab.b)


def test_the_destination_qemu_dies_in_postcopy_and_the_source_is_not_resumed(
    full_lab: Lab, guest: GuestFactory
) -> None:
    fresh = guest(memory_mib=64, dirty_mib_s=None)

    def kill() -> None:
        eventually(lambda: fresh.running(full_lab.b), "the guest's start on the destination")
        kill_qemu(fresh, full_lab.b)

    outcome = during(fresh, full_lab, kill, phase=Phase.POSTCOPY, **POSTCOPY)
    assert outcome.guest is Whereabouts.LOST, outcome
    assert "must not be resumed" in outcome.sentence
    assert not fresh.running(full_lab.a)


# -- M28: what a migration leaves in QEMU ----------------------------------------------------------------------------


def test_after_an_aborted_migration_qemu_is_as_before(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    stop = StopRequest()
    options = {"parallel": True, "auto_converge": True, "auto_converge_initial": 35, "parallel_connections": 3}
    outcome = migrate(
        request(fresh, full_lab.b, bandwidth=4, **options),
        source_uri=full_lab.a.uri,
        watcher=Witness(Once(lambda: stop.ask("test"))),
        stop=stop,
    )
    assert outcome.status is Status.ABORTED

    def ask(command: str) -> Any:
        text = libvirt_qemu.qemuMonitorCommand(fresh.domain(full_lab.a), json.dumps({"execute": command}), 0)
        return json.loads(text)["return"]

    on = {item["capability"] for item in ask("query-migrate-capabilities") if item["state"]}
    assert on <= {"events"}
    parameters = ask("query-migrate-parameters")
    assert (parameters["cpu-throttle-initial"], parameters["multifd-channels"]) == (20, 2)


def test_frozen_is_thawed_again(full_lab: Lab) -> None:
    with frozen(full_lab.b):
        status = open(f"/proc/{full_lab.b.daemon_pid}/status").read()  # noqa: SIM115
        assert "(stopped)" in status
    eventually(lambda: "(stopped)" not in open(f"/proc/{full_lab.b.daemon_pid}/status").read(), "the thaw")  # noqa: SIM115
