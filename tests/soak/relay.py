"""The relay's fault matrix, with two real libvirts, real QEMUs and a guest that checks its own memory.

    ./dev soak relay                    every case, about half an hour; a table at the end
    ./dev soak relay --only postcopy    those in whose name this regular expression is found
    ./dev soak relay --list

A case is green when at most one copy ever ran, the guest is where it was said to be, every byte of its memory is
right, the same guest then migrates, and nothing is left on either host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import libvirt

from tests.soak.faults import POSTCOPY, PRECOPY, RECONNECT_S, SETTINGS, SWITCHOVER, Bench, agent_process
from tests.support.agents import Frame, LinkProxy
from tests.support.lab import LabGuest, eventually
from virtmig.errors import MigrationError
from virtmig.lab.agents import start_agents
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import FULL, Lab
from virtmig.link.frames import FrameType
from virtmig.progress import Outcome, Phase, Status, Whereabouts

Case = Callable[[Bench], None]
CASES: dict[str, Case] = {}
PHASES = {"precopy": (Phase.PRECOPY, PRECOPY), "switchover": (Phase.SWITCHOVER, SWITCHOVER),
          "postcopy": (Phase.POSTCOPY, POSTCOPY)}  # fmt: skip


def case(name: str) -> Callable[[Case], Case]:
    def keep(run: Case) -> Case:
        CASES[name] = run
        return run

    return keep


def completed(result: Outcome | MigrationError) -> None:
    assert isinstance(result, Outcome), result
    assert result.status is Status.COMPLETED, f"{result.status.value}: {result.error}; {result.sentence}"


def failed_at_source(result: Outcome | MigrationError) -> None:
    if isinstance(result, Outcome):
        assert result.status is Status.FAILED, result.status
        assert result.guest is Whereabouts.SOURCE, f"said to be {result.guest.value}: {result.sentence}"


def split(result: Outcome | MigrationError) -> None:
    assert isinstance(result, Outcome), result
    is_split = (result.status, result.guest) == (Status.INTERRUPTED, Whereabouts.SPLIT)
    assert is_split, f"{result.status}: {result.sentence}"


def settings(phase: str) -> dict[str, object]:
    return {"dirty_mib_s": None} if phase == "postcopy" else {}


# -- the link is cut ---------------------------------------------------------------------------------------------------


def _cut(phase: str, seconds: float) -> Case:
    def run(bench: Bench) -> None:
        at, options = PHASES[phase]
        with bench.guest(**settings(phase)) as guest, bench.slow_link():
            completed(bench.migrate(guest, bench.cut_for(seconds), phase=at, **options))
            bench.survives(guest, bench.lab.b)

    return run


for _phase in PHASES:
    for _seconds in (1, 5, 20):
        CASES[f"cut {_seconds} s in {_phase}"] = _cut(_phase, _seconds)


@case("cut past the deadline in precopy")
def _cut_precopy(bench: Bench) -> None:
    with bench.guest() as guest:
        failed_at_source(bench.migrate(guest, bench.cut_for(600), phase=Phase.PRECOPY, **PRECOPY))
        bench.survives(guest, bench.lab.a)


@case("cut past the deadline in switchover")
def _cut_switchover(bench: Bench) -> None:
    with bench.guest() as guest, bench.slow_link():
        failed_at_source(bench.migrate(guest, bench.cut_for(600), phase=Phase.SWITCHOVER, **SWITCHOVER))
        bench.survives(guest, bench.lab.a)


@case("cut past the deadline in postcopy, recovered")
def _cut_postcopy(bench: Bench) -> None:
    with bench.guest(dirty_mib_s=None) as guest:
        split(bench.migrate(guest, bench.cut_for(600), phase=Phase.POSTCOPY, **POSTCOPY))
        bench.tidy()
        bench.recover(guest)
        bench.survives(guest, bench.lab.b)


@case("postcopy broken twice, recovered twice")
def _twice(bench: Bench) -> None:
    with bench.guest(dirty_mib_s=None) as guest:
        for _ in range(2):
            recovery = {"postcopy_resume": True} if bench.notes else {}
            kill = bench.kill_agent(bench.lab.a)
            split(bench.migrate(guest, kill, phase=Phase.POSTCOPY, **POSTCOPY, **recovery))
            bench.tidy()
        bench.recover(guest)
        bench.survives(guest, bench.lab.b)


# -- an agent is killed ------------------------------------------------------------------------------------------------


def _killed(phase: str, which: str) -> Case:
    def run(bench: Bench) -> None:
        at, options = PHASES[phase]
        host = getattr(bench.lab, which)
        with bench.guest(**settings(phase)) as guest, bench.slow_link():
            result = bench.migrate(guest, bench.kill_agent(host), phase=at, **options)
            if phase == "postcopy":
                split(result)
                bench.tidy()
                bench.recover(guest)
                bench.survives(guest, bench.lab.b)
            else:
                failed_at_source(result)
                bench.survives(guest, bench.lab.a)

    return run


def _killed_at(kind: FrameType, to_source: bool, which: str) -> Case:
    """In the state that this frame would end at the side that awaits it."""

    def run(bench: Bench) -> None:
        host: LabHost = getattr(bench.lab, which)
        killed = threading.Event()

        def meddle(frame: Frame) -> bool:
            if frame.kind == kind and frame.to_source == to_source and not killed.is_set():
                killed.set()
                bench.kill_agent(host)()
            return not killed.is_set()  # nor what it has said before it died

        with bench.guest() as guest, bench.proxy(meddle) as proxy:
            result = bench.migrate(guest, lambda: None, may_miss=True, address=proxy.address)
            assert killed.is_set()
            if kind is FrameType.FINISHED:
                completed(result)
                bench.survives(guest, bench.lab.b)
            else:
                failed_at_source(result)
                bench.survives(guest, bench.lab.a)

    return run


def _killed_established(which: str) -> Case:
    def run(bench: Bench) -> None:
        with bench.guest() as guest:
            failed_at_source(bench.migrate(guest, bench.kill_agent(getattr(bench.lab, which)), words="agreed with"))
            bench.survives(guest, bench.lab.a)

    return run


def _killed_reconnecting(phase: str, which: str) -> Case:
    def run(bench: Bench) -> None:
        at, options = PHASES[phase]
        host: LabHost = getattr(bench.lab, which)
        with bench.guest(**settings(phase)) as guest, bench.proxy() as proxy:

            def act() -> None:
                proxy.cut(refuse=True)
                threading.Timer(1.0, bench.kill_agent(host)).start()

            result = bench.migrate(guest, act, phase=at, address=proxy.address, **options)
            proxy.restore()
            if phase == "postcopy":
                split(result)
                bench.tidy()
                bench.recover(guest)
                bench.survives(guest, bench.lab.b)
            else:
                failed_at_source(result)
                bench.survives(guest, bench.lab.a)

    return run


for _which, _side in (("a", "source"), ("b", "destination")):
    for _kind, _to_source, _state in (
        (FrameType.HELLO, False, "connected"),
        (FrameType.HELLO, True, "hello"),
        (FrameType.ANSWER, True, "proposed"),
        (FrameType.AGREEMENT, True, "agreed"),
        (FrameType.CHANNEL_OPENED, True, "opening"),
        (FrameType.FINISHED, False, "finishing"),
        (FrameType.FINISHED, True, "finished"),
    ):
        CASES[f"kill -9 {_side}'s agent, {_state}"] = _killed_at(_kind, _to_source, _which)
    CASES[f"kill -9 {_side}'s agent, established"] = _killed_established(_which)
    for _phase in PHASES:
        CASES[f"kill -9 {_side}'s agent, running in {_phase}"] = _killed(_phase, _which)
    for _phase in ("precopy", "postcopy"):
        CASES[f"kill -9 {_side}'s agent, reconnecting in {_phase}"] = _killed_reconnecting(_phase, _which)


def _terminated(phase: str, which: str) -> Case:
    """It lets what runs finish, and only then ends."""

    def run(bench: Bench) -> None:
        at, options = PHASES[phase]
        host: LabHost = getattr(bench.lab, which)
        process = agent_process(host)
        with bench.guest(**settings(phase)) as guest:
            completed(bench.migrate(guest, lambda: process.signal(signal.SIGTERM), phase=at, **options))
            eventually(lambda: not process.alive, "the end of the agent that had finished", 15)
            bench.survives(guest, bench.lab.b)

    return run


def _terminated_early(which: str) -> Case:
    def run(bench: Bench) -> None:
        process = agent_process(getattr(bench.lab, which))
        with bench.guest() as guest:
            result = bench.migrate(guest, lambda: process.signal(signal.SIGTERM), words="agreed with")
            done = isinstance(result, Outcome) and result.status is Status.COMPLETED  # QEMU had come before the signal
            if not done:
                failed_at_source(result)
            eventually(lambda: not process.alive, "the end of the agent", 15)
            bench.survives(guest, bench.lab.b if done else bench.lab.a)

    return run


def _told_twice(bench: Bench) -> None:
    process = agent_process(bench.lab.a)
    with bench.guest() as guest:

        def at_once() -> None:
            process.signal(signal.SIGTERM)
            threading.Timer(2.5, lambda: process.signal(signal.SIGTERM)).start()

        failed_at_source(bench.migrate(guest, at_once, phase=Phase.PRECOPY, **PRECOPY))
        eventually(lambda: not process.alive, "the end of the agent", 15)
        bench.survives(guest, bench.lab.a)


CASES["SIGTERM twice to source's agent in precopy"] = _told_twice
for _which, _side in (("a", "source"), ("b", "destination")):
    CASES[f"SIGTERM to {_side}'s agent, established"] = _terminated_early(_which)
    for _phase in ("precopy", "postcopy"):
        CASES[f"SIGTERM to {_side}'s agent in {_phase}"] = _terminated(_phase, _which)


# -- the link's connections --------------------------------------------------------------------------------------------


@case("every connection reset, again and again, in precopy")
def _resets(bench: Bench) -> None:
    with bench.guest() as guest, bench.proxy() as proxy:
        done = threading.Event()

        def resets() -> None:
            while not done.wait(0.4):
                proxy.cut()

        thread = threading.Thread(target=resets)
        try:
            completed(bench.migrate(guest, thread.start, phase=Phase.PRECOPY, address=proxy.address, parallel=True,
                                    parallel_connections=3, **PRECOPY))  # fmt: skip
        finally:
            done.set()
            thread.join()
        bench.survives(guest, bench.lab.b)


@case("every connection reset, again and again, in postcopy")
def _resets_postcopy(bench: Bench) -> None:
    with bench.guest(dirty_mib_s=None) as guest, bench.proxy() as proxy:
        done = threading.Event()

        def resets() -> None:
            while not done.wait(0.4):
                proxy.cut()

        thread = threading.Thread(target=resets)
        try:
            completed(bench.migrate(guest, thread.start, phase=Phase.POSTCOPY, address=proxy.address, **POSTCOPY))
        finally:
            done.set()
            thread.join()
        bench.survives(guest, bench.lab.b)


@case("control takes and says nothing for 45 s in precopy")
def _full_control(bench: Bench) -> None:
    with bench.guest(dirty_mib_s=0.25) as guest, bench.proxy() as proxy:  # a minute at 1 MiB/s, and no more
        completed(bench.migrate(guest, lambda: _stall_control(bench, proxy, 45), phase=Phase.PRECOPY,
                                address=proxy.address, bandwidth=1))  # fmt: skip
        bench.survives(guest, bench.lab.b)


def _stall_control(bench: Bench, proxy: LinkProxy, seconds: float) -> None:
    (control,) = [each for each in proxy.connections if each.control]
    control.flowing.clear()
    threading.Timer(seconds, control.flowing.set).start()


@case("the other agent stands still for 12 s in precopy")
def _stopped_agent(bench: Bench) -> None:
    process = agent_process(bench.lab.b)

    def stop() -> None:
        process.signal(signal.SIGSTOP)
        threading.Timer(12, lambda: process.signal(signal.SIGCONT)).start()

    with bench.guest() as guest:
        completed(bench.migrate(guest, stop, phase=Phase.PRECOPY, **PRECOPY))
        bench.survives(guest, bench.lab.b)


# -- QEMU, libvirt, the client -----------------------------------------------------------------------------------------


def _qemu_killed(phase: str, which: str) -> Case:
    def run(bench: Bench) -> None:
        at, options = PHASES[phase]
        host: LabHost = getattr(bench.lab, which)
        with bench.guest(**settings(phase)) as guest, bench.slow_link():
            result = bench.migrate(guest, bench.kill_qemu(guest, host), phase=at, **options)
            assert isinstance(result, Outcome)
            assert result.status is not Status.COMPLETED
            if phase == "postcopy":
                expected = Whereabouts.LOST
            else:
                expected = Whereabouts.SOURCE if which == "b" else Whereabouts.NEITHER
            assert result.guest is expected, f"said to be {result.guest.value}: {result.sentence}"
            if expected is Whereabouts.SOURCE:
                bench.survives(guest, bench.lab.a)
            else:
                assert not guest.running(bench.lab.a)
        bench.tidy()
        bench.nothing_left()

    return run


for _which, _side in (("a", "source"), ("b", "destination")):
    for _phase in PHASES:
        CASES[f"kill -9 {_side}'s QEMU in {_phase}"] = _qemu_killed(_phase, _which)


def _daemon_killed(which: str, p2p: bool) -> Case:
    def run(bench: Bench) -> None:
        host: LabHost = getattr(bench.lab, which)
        with bench.guest() as guest:
            options = {**PRECOPY, **({"p2p": True} if p2p else {})}
            failed_at_source(bench.migrate(guest, bench.restart_daemon(host), phase=Phase.PRECOPY, **options))
            bench.survives(guest, bench.lab.a)

    return run


for _which, _side in (("a", "source"), ("b", "destination")):
    CASES[f"kill -9 {_side}'s libvirtd in precopy"] = _daemon_killed(_which, False)
    CASES[f"kill -9 {_side}'s libvirtd in precopy, p2p"] = _daemon_killed(_which, True)


def _client_killed(phase: str, p2p: bool) -> Case:
    def run(bench: Bench) -> None:
        _, options = PHASES[phase]
        with bench.guest(**settings(phase)) as guest, bench.slow_link():
            client = bench.migrating(guest, **options, **({"p2p": True} if p2p else {}))
            try:
                _until(bench, guest, phase)
            finally:
                client.kill()
                client.communicate()
            bench.notes.append("the client was killed")
            arrives = p2p or phase == "postcopy"
            bench.survives(guest, bench.lab.b if arrives else bench.lab.a, 90)

    return run


def _until(bench: Bench, guest: LabGuest, phase: str) -> None:
    if phase == "postcopy":
        eventually(lambda: guest.state(bench.lab.b) == 1, "postcopy", 60)
    else:
        eventually(lambda: guest.domain(bench.lab.a).jobStats(0).get("memory_processed"), "memory on the way", 60)


for _phase in ("precopy", "postcopy"):
    for _p2p in (False, True):
        CASES[f"kill -9 the client in {_phase}{', p2p' if _p2p else ''}"] = _client_killed(_phase, _p2p)


def _frozen(fence: bool) -> Case:
    """The destination's daemon stands still from the switchover on: libvirt alone makes two copies of that."""

    def run(bench: Bench) -> None:
        options = {**SWITCHOVER, **({"fence": True} if fence else {})}
        with bench.guest() as guest, bench.slow_link():
            result = bench.migrate(guest, bench.lab.b.freeze_daemon, phase=Phase.SWITCHOVER, **options)
            assert isinstance(result, Outcome)
            assert result.status is not Status.COMPLETED
            bench.lab.b.thaw_daemon()
            if fence and not _alone(guest, bench.lab.a):  # its daemon had the last call already: the copy stays, paused
                assert guest.state(bench.lab.b) == libvirt.VIR_DOMAIN_PAUSED
                command = f"destroy {guest.uuid}"
                assert command in result.hint, f"nobody was told of the copy: {result.hint}"
                bench.lab.virsh(bench.lab.b, *command.split())
                bench.notes.append("as the hint says, the paused copy was destroyed")
            bench.survives(guest, bench.lab.a)

    return run


def _alone(guest: LabGuest, host: LabHost) -> bool:
    with contextlib.suppress(AssertionError):
        return bool(eventually(lambda: guest.only_on(host), f"the guest alone on {host.hostname}", 20))
    return False


CASES["destination's libvirtd frozen at the switchover"] = _frozen(False)
CASES["destination's libvirtd frozen at the switchover, --fence"] = _frozen(True)


# -- the table ---------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev soak relay", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="REGEX", help="cases with this in their name")
    parser.add_argument("--skip", action="append", default=[], metavar="REGEX", help="but not those")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument("--keep", action="store_true", help="leave the lab up after a failure")
    given = parser.parse_args()
    chosen = [name for name in CASES if all(re.search(each, name) for each in given.only)
              and not any(re.search(each, name) for each in given.skip)]  # fmt: skip
    if given.list or not chosen:
        print("\n".join(chosen or ["no case has this in its name"]))
        return 0 if chosen else 2
    if os.getuid() != 0:
        print("the matrix needs root: namespaces, postcopy, daemons that are killed")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/tmp"))
    folder.rmdir()
    records = tempfile.mkdtemp(prefix="vms-records-", dir="/tmp")
    os.environ.setdefault("VIRTMIG_RECORDS", records)
    lab = Lab.up(folder, form=FULL)
    rows: list[tuple[str, str, str]] = []
    try:
        start_agents(lab, SETTINGS)
        for name in chosen:
            rows.append(_one(lab, name))
            print(" | ".join(rows[-1]), flush=True)
            if given.keep and rows[-1][2] != "ok":
                print(f"the lab stays up: {folder}")
                return 1
    finally:
        if not given.keep:
            lab.down()
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(records, ignore_errors=True)
    bad = [row for row in rows if row[2] != "ok"]
    print(f"\n{'case':<58} {'verdict':<8} what happened")
    for name, happened, verdict in rows:
        good = verdict == "ok"
        print(f"{name:<58} {'ok' if good else 'FAILED':<8} {happened}{'' if good else ' -- ' + verdict}")
    print(f"\n{len(rows) - len(bad)} of {len(rows)} green; agents reconnect for {RECONNECT_S} s")
    return 1 if bad else 0


def _one(lab: Lab, name: str) -> tuple[str, str, str]:
    bench, began = Bench(lab), time.monotonic()
    verdict = "ok"
    try:
        CASES[name](bench)
    except Exception as error:  # a case that fails is a row of the table; the next one has a lab in order
        verdict = str(error).strip().replace("\n", " ")[:600] or type(error).__name__
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    finally:
        bench.tidy()
    return name, f"{'; '.join(bench.notes)} ({time.monotonic() - began:.0f} s)", verdict


if __name__ == "__main__":
    sys.exit(main())
