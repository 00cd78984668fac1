"""QEMU to QEMU through two agents, no libvirt between: each age on each side, and a postcopy that is recovered."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.emulators import LabQemu, emulators, lab_source
from tests.support.recorder import Emulator
from tests.support.two_agents import GUEST, REQUEST, Host
from virtmig.engine.agents import RelaySession, shake_hands
from virtmig.facts import Finding, HostFacts, version
from virtmig.link.asking import Ended

POSTCOPY = ("postcopy-ram",)
PREEMPT = ("postcopy-ram", "postcopy-preempt")
PREEMPT_SINCE, BOTH_SINCE = (7, 1), (10, 1)
MODES: dict[str, tuple[tuple[str, ...], int]] = {
    "precopy": ((), 0),
    "multifd": (("multifd",), 4),
    "postcopy": (POSTCOPY, 0),
    "preempt": (PREEMPT, 0),
    "multifd with postcopy": ((*POSTCOPY, "multifd"), 4),
    "multifd with preempt": ((*PREEMPT, "multifd"), 4),
}
#: the guest writes faster than that: precopy does not end by itself
SLOW = {"max-bandwidth": 1 << 20, "downtime-limit": 1}
#: a postcopy with a middle that can be broken
SLOWER = {**SLOW, "max-postcopy-bandwidth": 1 << 18}


def pairs() -> list[Any]:
    """(source, destination, mode); a guest goes to the same age or a newer one. The host's own pair is always run."""
    known = emulators()
    rows = []
    for at, source in enumerate(sorted(known, key=_age)):
        for destination in sorted(known, key=_age)[at:]:
            for mode in MODES:
                if "with" in mode and min(_age(source), _age(destination)) < BOTH_SINCE:
                    continue
                own = source == destination == known[0] and mode in ("multifd", "preempt")
                name = f"{source.version_name} to {destination.version_name} {mode}"
                rows.append(pytest.param(source, destination, mode, id=name, marks=() if own else pytest.mark.compat))
    return rows


def _age(emulator: Emulator) -> tuple[int, ...]:
    return tuple(int(part) for part in emulator.version_name.split("."))


class Agents:
    """Two agents, told of which age the QEMU of their host is."""

    def __init__(self, folder: Path, source: Emulator, destination: Emulator) -> None:
        self.source, self.destination = Host(folder / "a"), Host(folder / "b")
        self._ages = (source, destination)
        for host, emulator in zip((self.source, self.destination), self._ages, strict=True):
            facts = HostFacts(uri="qemu:///system", hostname=host.folder.name, qemu_version=_number(emulator),
                              userfaultfd=Finding("yes", "root"), qemu_uid=0)  # fmt: skip
            look = host.agent.discovery.look

            def told(*given: Any, facts: HostFacts = facts, look: Any = look, **more: Any) -> Any:
                return look(*given, **more)[0], facts

            host.agent.discovery.look = told  # type: ignore[method-assign]

    def session(self, capabilities: tuple[str, ...], channels: int, **options: Any) -> tuple[RelaySession, list[Any]]:
        request = REQUEST | {name.replace("_", "-"): value for name, value in options.items()}
        if channels:
            request |= {"parallel": True, "parallel-connections": channels}
        if "postcopy-ram" in capabilities:
            request |= {"postcopy": True, "postcopy-preempt": "on" if "postcopy-preempt" in capabilities else "auto"}
        guest = msgspec.structs.replace(GUEST, qemu_version=_number(self._ages[0]))
        connection, agreed = shake_hands(self.source.socket, self.destination.address, request=request, guest=guest)
        told: list[Any] = []
        return RelaySession(connection, agreed, told.append), told


def _number(emulator: Emulator) -> int:
    return version(*_age(emulator), 0)


@contextlib.contextmanager
def two_agents(source: Emulator, destination: Emulator) -> Iterator[Agents]:
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as folder:
        agents = Agents(Path(folder), source, destination)
        with agents.source, agents.destination:
            yield agents


@contextlib.contextmanager
def waiting(emulator: Emulator, capabilities: tuple[str, ...], channels: int, machine: str) -> Iterator[LabQemu]:
    with emulator.folder() as folder, LabQemu(emulator, folder, "-incoming", "defer", name="destination",
                                              machine=machine) as qemu:  # fmt: skip
        qemu.set_capabilities([*capabilities, "events", "return-path", "late-block-activate"])
        qemu.set_parameters({"multifd-channels": channels} if channels else {})
        yield qemu


def address(session: RelaySession) -> tuple[str, str]:
    """Where the destination's QEMU listens, and where the source's connects."""
    attachment = session.agreed.attachment
    assert attachment is not None
    port = attachment.uri.rpartition(":")[2]
    return f"tcp:{attachment.listen_address}:{port}", f"tcp:127.0.0.1:{port}"


def arrived(source: LabQemu, there: LabQemu) -> None:
    """Nothing runs at the source; the guest goes on at the destination, every page of it as it must be."""
    assert source.qmp.execute("query-status")["running"] is False
    there.wait_heartbeat(2)
    there.qmp.execute("stop")
    there.check_walk()


def finished(session: RelaySession) -> None:
    assert session.over.wait(20)
    assert session.ended is not None
    assert session.ended.state == "finished", session.ended
    session.close()


@pytest.mark.parametrize(("source", "destination", "mode"), pairs())
def test_every_age_through_the_relay(source: Emulator, destination: Emulator, mode: str) -> None:
    capabilities, channels = MODES[mode]
    postcopy = "postcopy-ram" in capabilities
    machine = f"pc-i440fx-{source.version_name}"
    limits = SLOW if postcopy else {}
    with (
        two_agents(source, destination) as agents,
        lab_source(source, capabilities=("return-path", *capabilities), machine=machine,
                   **({"multifd-channels": channels} if channels else {}), **limits) as (here, _),
        waiting(destination, capabilities, channels, machine) as there,
    ):  # fmt: skip
        session, _ = agents.session(capabilities, channels)
        listens, connects = address(session)
        there.qmp.execute("migrate-incoming", uri=listens)
        here.qmp.execute("migrate", uri=connects)
        if postcopy:
            here.qmp.wait_pass(2)
            here.qmp.execute("migrate-start-postcopy")
        here.qmp.wait_status("completed")
        there.qmp.wait_status("completed")
        arrived(here, there)
        finished(session)


def recoveries() -> list[Any]:
    known = emulators()
    rows = [(each, PREEMPT if preempt else POSTCOPY) for each in known for preempt in (False, True)]
    return [pytest.param(each, capabilities, id=f"{each.version_name} {capabilities[-1]}",
                         marks=() if each == known[0] and capabilities == POSTCOPY else pytest.mark.compat)
            for each, capabilities in rows]  # fmt: skip


@pytest.mark.parametrize(("qemu", "capabilities"), recoveries())
def test_a_broken_postcopy_is_recovered_through_a_new_session(qemu: Emulator, capabilities: tuple[str, ...]) -> None:
    with (
        two_agents(qemu, qemu) as agents,
        lab_source(qemu, capabilities=("return-path", *capabilities), **SLOWER) as (here, _),
        waiting(qemu, capabilities, 0, "pc") as there,
    ):
        session, told = agents.session(capabilities, 0)
        listens, connects = address(session)
        there.qmp.execute("migrate-incoming", uri=listens)
        here.qmp.execute("migrate", uri=connects)
        here.qmp.wait_pass(2)
        here.qmp.execute("migrate-start-postcopy")
        there.qmp.wait_status("postcopy-active")
        there.wait_heartbeat(1)
        for broken in (*agents.source.agent.sessions(), *agents.destination.agent.sessions()):
            broken.fail("the test breaks it")
        here.qmp.wait_status("postcopy-paused")
        there.qmp.wait_status("postcopy-paused")
        assert session.over.wait(20)
        assert [said.state for said in told if isinstance(said, Ended)] == ["failed"]
        session.close()
        seen = len(there.qmp.events)
        again, _ = agents.session(capabilities, 0, postcopy_resume=True)
        listens, connects = address(again)
        there.qmp.execute("migrate-recover", uri=listens)
        here.set_parameters({"max-postcopy-bandwidth": 0})
        here.qmp.execute("migrate", uri=connects, resume=True)
        there.qmp.wait_status("completed", since=seen)
        here.qmp.wait_status("completed")
        arrived(here, there)
        finished(again)
