"""Whole migrations between two real libvirt hosts, driven as a person drives them; memory checked after each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.lab import GuestFactory, LabGuest, eventually
from virtmig.attempts import StopRequest
from virtmig.errors import PlanRefused
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.migrate import migrate
from virtmig.plan import Plan
from virtmig.policy import Action, Decision
from virtmig.progress import Outcome, Phase, Progress, Status, Whereabouts
from virtmig.request import MigrationRequest

pytestmark = pytest.mark.lab


class Witness:
    """A watcher that keeps everything and can act on a sample."""

    def __init__(self, on_sample: Any = None) -> None:
        self.plan: Plan | None = None
        self.samples: list[Progress] = []
        self.decisions: list[Decision] = []
        self.messages: list[str] = []
        self.outcome: Outcome | None = None
        self.on_sample = on_sample

    def start(self, domain: str, source: str, destination: str, plan: Plan) -> None:
        self.plan = plan

    def sample(self, progress: Progress, expected: object) -> None:
        self.samples.append(progress)
        if self.on_sample is not None:
            self.on_sample(progress)

    def decided(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def message(self, text: str, level: str = "info") -> None:
        self.messages.append(text)

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome


def request(guest: LabGuest, destination: LabHost, **options: Any) -> MigrationRequest:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    return MigrationRequest({"domain": guest.name, "desturi": destination.uri, "live": True, **given})


def move(guest: LabGuest, source: LabHost, destination: LabHost, **options: Any) -> tuple[Outcome, Witness]:
    witness = Witness()
    return migrate(request(guest, destination, **options), source_uri=source.uri, watcher=witness), witness


def virtmig(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "virtmig.cli.main", *words], capture_output=True, text=True, timeout=100, **more
    )


def there_and_back(lab: Lab, guest: LabGuest, **options: Any) -> None:
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a)):
        outcome, witness = move(guest, source, destination, **options)
        assert outcome.status is Status.COMPLETED, outcome
        assert outcome.guest is Whereabouts.DESTINATION
        assert outcome.sentence.startswith(f"{guest.name} now runs on ")
        assert witness.outcome == outcome
        assert guest.only_on(destination)
        guest.check(destination)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p2p": True},
        {"parallel": True, "parallel_connections": 4},
        pytest.param({"threads": 3, "p2p": True}, marks=pytest.mark.slow),
        pytest.param({"auto_converge": True}, marks=pytest.mark.slow),
        pytest.param({"compressed": True}, marks=pytest.mark.slow),
        {"fence": True},
        pytest.param({"fence": True, "p2p": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_there_and_back(lab: Lab, guest: GuestFactory, options: dict[str, Any]) -> None:
    there_and_back(lab, guest(), **options)


def test_tunnelled(lab: Lab, guest: GuestFactory) -> None:
    there_and_back(lab, guest(), p2p=True, tunnelled=True)


def test_the_session_form(session_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(in_lab=session_lab)
    there_and_back(session_lab, fresh)
    there_and_back(session_lab, fresh, p2p=True, parallel=True)


def test_postcopy_is_refused_up_front_where_the_destination_cannot(session_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(in_lab=session_lab)
    allowed = int(open("/proc/sys/vm/unprivileged_userfaultfd").read())  # noqa: SIM115
    if allowed or (os.access("/dev/userfaultfd", os.R_OK | os.W_OK) and os.getuid() != 0):
        pytest.skip("this system lets ordinary users use userfaultfd: postcopy works in the session form")
    done = virtmig("-c", session_lab.a.uri, "migrate", "--live", "--postcopy", fresh.name, session_lab.b.uri)
    assert done.returncode == 1
    assert "userfaultfd" in done.stderr
    assert "sysctl vm.unprivileged_userfaultfd=1" in done.stderr
    assert fresh.only_on(session_lab.a)
    assert fresh.state(session_lab.b) is None


def test_postcopy_after_precopy_means_one_full_pass(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=20.0)
    outcome, witness = move(
        fresh, full_lab.a, full_lab.b, postcopy=True, postcopy_after_precopy=True, bandwidth=24, max_downtime=1
    )
    assert outcome.status is Status.COMPLETED, outcome
    (switch,) = [decision for decision in witness.decisions if decision.action is Action.START_POSTCOPY]
    assert "1 full pass" in switch.reason
    assert any(sample.phase is Phase.POSTCOPY for sample in witness.samples)
    before = [sample for sample in witness.samples if sample.phase is Phase.PRECOPY]
    assert before[-1].full_passes >= 1
    assert fresh.only_on(full_lab.b)
    fresh.check(full_lab.b)


def test_a_guest_that_does_not_converge_is_moved_to_postcopy(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=None)
    outcome, witness = move(fresh, full_lab.a, full_lab.b, postcopy=True, bandwidth=32, stall_passes=2, max_downtime=5)
    assert outcome.status is Status.COMPLETED, outcome
    (switch,) = [decision for decision in witness.decisions if decision.action is Action.START_POSTCOPY]
    assert "does not converge" in switch.reason
    assert switch.reason in outcome.actions[0]
    fresh.check(full_lab.b)


def test_a_downtime_ceiling_is_climbed_when_memory_does_not_converge(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=None, walk_mib=12)
    outcome, witness = move(
        fresh, lab.a, lab.b, bandwidth=40, stall_passes=1, max_downtime=2, max_downtime_ceiling=3000
    )
    assert outcome.status is Status.COMPLETED, outcome
    raised = [decision.value for decision in witness.decisions if decision.action is Action.SET_DOWNTIME]
    assert raised
    assert raised == sorted(raised)
    fresh.check(lab.b)


def test_an_abort_leaves_the_source_and_the_next_try_succeeds(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    stop = StopRequest()
    witness = Witness(lambda progress: progress.phase is Phase.PRECOPY and not stop.requests and stop.ask("test"))
    limit_before = fresh.domain(lab.a).migrateGetMaxDowntime(0)
    outcome = migrate(
        request(fresh, lab.b, bandwidth=4, max_downtime=7), source_uri=lab.a.uri, watcher=witness, stop=stop
    )
    assert (outcome.status, outcome.guest) == (Status.ABORTED, Whereabouts.SOURCE)
    assert outcome.sentence == f"{fresh.name} still runs on {outcome.source}, unchanged"
    assert fresh.only_on(lab.a)
    assert fresh.state(lab.b) is None
    assert fresh.domain(lab.a).migrateGetMaxDowntime(0) == limit_before
    fresh.check(lab.a)
    outcome, _ = move(fresh, lab.a, lab.b)
    assert outcome.status is Status.COMPLETED
    fresh.check(lab.b)


def test_timeouts(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=None)
    outcome, witness = move(fresh, lab.a, lab.b, bandwidth=8, max_downtime=1, timeout=1, timeout_abort=True)
    assert outcome.status is Status.ABORTED
    assert [decision.action for decision in witness.decisions] == [Action.ABORT]
    assert fresh.only_on(lab.a)
    outcome, witness = move(fresh, lab.a, lab.b, bandwidth=48, max_downtime=1, timeout=1)
    assert outcome.status is Status.COMPLETED
    assert Action.SUSPEND in [decision.action for decision in witness.decisions]
    assert outcome.guest is Whereabouts.DESTINATION
    eventually(lambda: fresh.state(lab.b) is not None, "the guest on host b")
    fresh.check(lab.b)


@pytest.mark.parametrize("options", [{}, {"fence": True}], ids=["plain", "fence"])
def test_a_paused_guest_stays_paused(lab: Lab, guest: GuestFactory, options: dict[str, Any]) -> None:
    fresh = guest(dirty_mib_s=None)
    fresh.domain(lab.a).suspend()
    outcome, _ = move(fresh, lab.a, lab.b, **options)
    assert outcome.status is Status.COMPLETED
    assert outcome.sentence.endswith("paused")
    assert not fresh.running(lab.b)
    fresh.check(lab.b)
    fresh.domain(lab.b).resume()
    eventually(lambda: fresh.domain(lab.b).vcpus()[0][0][2] > 200_000_000, "the guest's first steps on host b")
    fresh.check(lab.b)


def test_a_guest_that_arrived_paused_is_not_sent_on_by_a_qemu_that_would_abort(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=None)
    fresh.domain(lab.a).suspend()
    assert move(fresh, lab.a, lab.b)[0].status is Status.COMPLETED
    if fresh.connection(lab.b).getVersion() >= 10_000_000:
        assert move(fresh, lab.b, lab.a)[0].status is Status.COMPLETED
        return
    with pytest.raises(PlanRefused, match="no processor time since"):
        move(fresh, lab.b, lab.a)
    fresh.domain(lab.b).resume()
    eventually(lambda: fresh.domain(lab.b).vcpus()[0][0][2] > 200_000_000, "the guest's first steps on host b")
    fresh.domain(lab.b).suspend()
    assert move(fresh, lab.b, lab.a)[0].status is Status.COMPLETED
    fresh.check(lab.a)


def test_suspend_leaves_it_paused_on_the_destination(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    outcome, _ = move(fresh, lab.a, lab.b, suspend=True)
    assert outcome.sentence == f"{fresh.name} is now on {outcome.destination}, paused"
    assert not fresh.running(lab.b)
    fresh.check(lab.b)


def test_persistent_undefinesource_and_offline(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(persistent=True)
    outcome, _ = move(fresh, lab.a, lab.b, persistent=True, undefinesource=True)
    assert outcome.status is Status.COMPLETED
    assert fresh.state(lab.a) is None
    assert fresh.domain(lab.b).isPersistent()
    fresh.check(lab.b)
    fresh.domain(lab.b).destroy()
    offline = MigrationRequest(
        {"domain": fresh.name, "desturi": lab.a.uri, "offline": True, "persistent": True, "undefinesource": True}
    )
    outcome = migrate(offline, source_uri=lab.b.uri)
    assert outcome.status is Status.COMPLETED
    assert "definition" in outcome.sentence
    assert fresh.domain(lab.a).isActive() == 0
    assert fresh.state(lab.b) is None


def test_json_lines(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    done = virtmig("-c", lab.a.uri, "migrate", "--live", "--json", fresh.name, lab.b.uri)
    assert done.returncode == 0
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["type"] == "result"
    assert events[-1]["guest"] == "destination"
    assert {"plan", "started"} & {event["type"] for event in events}
    assert done.stderr == ""


def test_virshs_line(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    done = virtmig("-c", lab.a.uri, "migrate", "--live", "--verbose", fresh.name, lab.b.uri)
    assert done.returncode == 0
    assert "Migration: [100.00 %]" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_abort_without_a_terminal(lab: Lab, guest: GuestFactory, number: signal.Signals) -> None:
    fresh = guest()
    words = ["-c", lab.a.uri, "migrate", "--live", "--bandwidth", "3", "--exit-codes", "fine", fresh.name, lab.b.uri]
    process = subprocess.Popen(
        [sys.executable, "-m", "virtmig.cli.main", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: fresh.domain(lab.a).jobStats(0).get("memory_processed"), "memory on the way")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert f"{number.name}: aborting" in err
    assert f"{fresh.name} still runs on" in err
    assert fresh.only_on(lab.a)
    assert fresh.state(lab.b) is None


def test_a_second_signal_at_once_ends_it_at_once(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    stop = StopRequest()

    def twice(progress: Progress) -> None:
        if progress.phase is Phase.PRECOPY and not stop.requests:
            stop.ask("first")
            stop.ask("second")

    outcome = migrate(request(fresh, lab.b, bandwidth=3), source_uri=lab.a.uri, watcher=Witness(twice), stop=stop)
    assert outcome.guest in (Whereabouts.SOURCE, Whereabouts.UNKNOWN)
    eventually(lambda: fresh.only_on(lab.a), "the guest back on its source alone")


def test_a_stop_in_postcopy_detaches_and_the_guest_arrives(full_lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(memory_mib=64, dirty_mib_s=None)
    words = ["-c", full_lab.a.uri, "migrate", "--live", "--postcopy", "--postcopy-after-precopy", "--bandwidth", "32"]
    words += ["--postcopy-bandwidth", "8", "--max-downtime", "1", fresh.name, full_lab.b.uri]
    process = subprocess.Popen(
        [sys.executable, "-m", "virtmig.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    eventually(lambda: fresh.running(full_lab.b), "postcopy", 60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "aborting now would lose it" in err
    eventually(lambda: fresh.only_on(full_lab.b), "the rest of its memory", 60)
    fresh.check(full_lab.b)


def test_watch_attaches_to_a_migration_that_virsh_started(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    virsh = subprocess.Popen(
        ["virsh", "-q", "-c", lab.a.uri, "migrate", "--live", "--bandwidth", "16", fresh.name, lab.b.uri],
        stdin=subprocess.DEVNULL,
    )
    eventually(lambda: fresh.domain(lab.a).jobStats(0).get("memory_processed"), "memory on the way")
    done = virtmig("-c", lab.a.uri, "watch", fresh.name)
    assert virsh.wait(60) == 0
    assert done.returncode == 0, done.stderr
    assert f"{fresh.name} has left" in done.stderr + done.stdout
    assert "precopy" in done.stderr


def test_sibling_verbs_on_a_job_that_virsh_started(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    virsh = subprocess.Popen(
        ["virsh", "-q", "-c", lab.a.uri, "migrate", "--live", "--bandwidth", "2", fresh.name, lab.b.uri],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: fresh.domain(lab.a).jobStats(0).get("memory_processed"), "memory on the way")
    assert virtmig("-c", lab.a.uri, "migrate-setmaxdowntime", fresh.name, "421").returncode == 0
    assert virtmig("-c", lab.a.uri, "migrate-getmaxdowntime", fresh.name).stdout.strip() == "421"
    assert virtmig("-c", lab.a.uri, "migrate-setspeed", fresh.name, "3").returncode == 0
    assert virtmig("-c", lab.a.uri, "migrate-getspeed", fresh.name).stdout.strip() == "3"
    ours = virtmig("-c", lab.a.uri, "domjobinfo", fresh.name).stdout.splitlines()
    theirs = subprocess.run(
        ["virsh", "-c", lab.a.uri, "domjobinfo", fresh.name], capture_output=True, text=True
    ).stdout.splitlines()
    assert [line[:18] for line in ours] == [line[:18] for line in theirs]
    postcopy = virtmig("-c", lab.a.uri, "migrate-postcopy", fresh.name)
    assert postcopy.returncode == 1
    assert "POSTCOPY" in postcopy.stderr
    assert virtmig("-c", lab.a.uri, "domjobabort", fresh.name).returncode == 0
    assert virsh.wait(60) == 1
    assert virsh.stderr is not None
    assert "canceled by client" in virsh.stderr.read()
    virsh.stderr.close()
    assert fresh.only_on(lab.a)


def test_doctor_and_plan(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    checked = virtmig("-c", lab.a.uri, "doctor", lab.b.uri)
    assert "PASS" in checked.stdout
    planned = virtmig("-c", lab.a.uri, "migrate", "--plan", "--json", "--live", "--parallel", fresh.name, lab.b.uri)
    plan = json.loads(planned.stdout)
    multifd = next(choice for choice in plan["choices"] if choice["feature"] == "multifd")
    assert multifd["on"] is True
    assert plan["virsh_line"].startswith("virsh ")
    assert fresh.only_on(lab.a)
    refused = virtmig(
        "-c", lab.a.uri, "migrate", "--plan", "--exit-codes", "fine", "--live", "--parallel", "--postcopy", fresh.name,
        lab.b.uri,
    )  # fmt: skip
    if "7.2" in str(plan):
        assert refused.returncode == 3
        assert "--parallel" in refused.stdout
