"""The facade beside the plain binding, between two real libvirt hosts: the same calls, the same answers."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.support.agents import settled
from tests.support.facade import (
    DISK,
    INC,
    LIVE,
    OFFLINE,
    P2P,
    PERSIST,
    PLAIN,
    POSTCOPY,
    UNDEFINE,
    answer,
    at_home,
    standing,
)
from tests.support.lab import GuestFactory, LabGuest, eventually
from virtmig.integrations import migrate_to_uri3 as facade
from virtmig.integrations.migrate_to_uri3 import wrap
from virtmig.lab.agents import agent_address, agent_socket, kill_agent, start_agents
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.virt.connection import open_connection

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def module_guest(lab: Lab) -> Iterator[LabGuest]:
    with standing(lab, "facade") as guest:
        yield guest


@pytest.fixture
def one(module_guest: LabGuest) -> LabGuest:
    """One guest for all, on host a."""
    return at_home(module_guest)


# -- what succeeds -----------------------------------------------------------------------------------------------------


def xml_of(domain: Any) -> str:
    return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE))


SUCCEEDS: dict[str, tuple[str, Callable[[Any, str, Any], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "nova 27": ("migrateToURI3", lambda domain, uri, _: ((uri,), {"params": {
        "bandwidth": 0, "destination_xml": xml_of(domain), "persistent_xml": xml_of(domain)}, "flags": 27})),
    "vdsm 8203": ("migrateToURI3", lambda domain, uri, _: ((uri, {
        "bandwidth": 52, "graphics_uri": "vnc://127.0.0.1", "destination_xml": xml_of(domain)}, 8203), {})),
    "kubevirt 131083": ("migrateToURI3", lambda domain, uri, _: ((uri, {
        "destination_xml": xml_of(domain), "persistent_xml": xml_of(domain), "destination_name": domain.name(),
        "parallel.connections": 2}, 131083), {})),
    "a disk list that 9.0 ignores": ("migrateToURI3", lambda _, uri, __: ((uri, {"migrate_disks": ["vdz"]}, 3), {})),
    "migrateToURI2": ("migrateToURI2", lambda _, uri, __: ((uri, None, None, 3, None, 0), {})),
    "migrateToURI": ("migrateToURI", lambda _, uri, __: ((uri, 3), {"bandwidth": 100})),
    "migrate3, not live": ("migrate3", lambda _, __, conn: ((conn,), {"params": {"bandwidth": 100}, "flags": 0})),
    "migrate2": ("migrate2", lambda domain, __, conn: ((conn, xml_of(domain), LIVE), {})),
    "migrate": ("migrate", lambda _, __, conn: ((conn, LIVE, None, None, 100), {})),
}  # fmt: skip


LEFT_TO_LIBVIRT = ("a disk list that 9.0 ignores",)
OFTEN_TRIED = {"nova 27", "kubevirt 131083", "migrate3, not live"}


@pytest.mark.parametrize(
    "names",
    [OFTEN_TRIED, pytest.param(SUCCEEDS.keys() - OFTEN_TRIED, marks=pytest.mark.slow)],
    ids=["often tried", "all others"],
)
def test_what_succeeds(
    lab: Lab, one: LabGuest, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], names: set[str]
) -> None:
    """There by the binding, back by the facade, with the same call; it is planned once, and only the log hears."""
    binding = libvirt.virDomain.migrateToURI3
    for name in SUCCEEDS.keys() & names:
        method, shape = SUCCEEDS[name]
        plain = succeed(one, method, shape, lab.a, lab.b)
        caplog.clear()
        with caplog.at_level(logging.INFO, "virtmig.facade"), facade.installed(PLAIN), facade.installed(PLAIN):
            assert libvirt.virDomain.migrateToURI3 is not binding
            ours = succeed(one, method, shape, lab.b, lab.a)
        assert libvirt.virDomain.migrateToURI3 is binding
        said = [record.getMessage() for record in caplog.records if record.name == "virtmig.facade"]
        planned = sum(", direct (" in text for text in said)
        assert planned + sum("is left to libvirt" in text for text in said) == 1, said
        assert planned == (name not in LEFT_TO_LIBVIRT), said
        assert type(ours) is type(plain), name
        if plain == 0:
            assert ours == 0
        else:
            assert (ours.UUIDString(), ours.name(), ours.isActive()) == (plain.UUIDString(), plain.name(), 1), name
            assert not planned or ours.connect() is one.connection(lab.a)
    one.check(lab.a)
    assert capfd.readouterr() == ("", "")


def succeed(guest: LabGuest, method: str, shape: Any, source: LabHost, destination: LabHost) -> Any:
    domain = guest.domain(source)
    given, named = shape(domain, destination.uri, guest.connection(destination))
    result = getattr(domain, method)(*given, **named)
    assert guest.only_on(destination)
    completed = guest.domain(destination).jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    assert completed["type"] == libvirt.VIR_DOMAIN_JOB_COMPLETED
    assert completed["downtime"] >= 0
    return result


def test_offline(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(memory_mib=16, persistent=True)
    fresh.domain(lab.a).destroy()
    flags = OFFLINE | PERSIST | UNDEFINE
    plain = fresh.domain(lab.a).migrate3(fresh.connection(lab.b), {}, flags)
    ours = wrap(fresh.domain(lab.b), PLAIN).migrate3(fresh.connection(lab.a), {}, flags)
    assert (ours.UUIDString(), ours.isActive()) == (plain.UUIDString(), 0)
    assert fresh.state(lab.b) is None


# -- while it runs -----------------------------------------------------------------------------------------------------


class Call(threading.Thread):
    """A migrate call in a thread of its own, as managers make it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="manager")
        self._call = call
        self.result: Any = None
        self.start()

    def run(self) -> None:
        self.result = answer(self._call)

    def end(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self.result


def moving(guest: LabGuest, host: LabHost) -> Any:
    return eventually(lambda: guest.domain(host).jobStats(0).get("memory_processed"), "memory on the way")


def test_an_abort_from_another_thread_and_a_second_call_meanwhile(lab: Lab, one: LabGuest) -> None:
    answers = []
    for use in (contextlib.nullcontext, lambda: facade.installed(PLAIN)):
        with use():
            domain = open_connection(lab.a.uri).lookupByUUIDString(one.uuid)
            call = Call(lambda domain=domain: domain.migrateToURI3(lab.b.uri, {"bandwidth": 3}, LIVE | P2P))
            moving(one, lab.a)
            stats = one.domain(lab.a).jobStats(0)
            assert (stats["type"], stats["operation"]) == (libvirt.VIR_DOMAIN_JOB_UNBOUNDED, 5)
            second = one.domain(lab.a)
            assert answer(lambda domain=second: domain.migrateToURI3(lab.b.uri, {}, P2P | DISK | INC))[0] == (8, 20)
            second.abortJob()
            answers.append(call.end())
            assert one.only_on(lab.a)
    (plain, libvirts), (ours, words) = answers
    assert ours == plain
    assert ours[0] == libvirt.VIR_ERR_OPERATION_ABORTED
    assert words.startswith(libvirts)
    assert re.search(rf"\({one.name} still runs on \S+, unchanged\)$", words)


@pytest.mark.slow
def test_postcopy_that_another_thread_starts(full_lab: Lab, one: LabGuest) -> None:
    domain = wrap(open_connection(full_lab.a.uri).lookupByUUIDString(one.uuid), PLAIN)
    call = Call(lambda: domain.migrateToURI3(full_lab.b.uri, {"bandwidth": 8}, LIVE | P2P | POSTCOPY))
    moving(one, full_lab.a)
    one.domain(full_lab.a).migrateStartPostCopy(0)
    assert call.end() == (0, "")
    assert one.only_on(full_lab.b)
    one.check(full_lab.b)


# -- what the caller has no word for -----------------------------------------------------------------------------------


def test_settings_the_agents_carry_it_and_the_fence_holds(
    full_lab: Lab,
    one: LabGuest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(f'fence = true\nagent = "{agent_socket(full_lab.a)}"\n'
                    f'destination-agent = "{agent_address(full_lab.b)}"\n')  # fmt: skip
    monkeypatch.setenv(facade.SETTINGS_VARIABLE, str(file))
    start_agents(full_lab)
    try:
        with caplog.at_level(logging.INFO, "virtmig.facade"):
            assert wrap(one.domain(full_lab.a)).migrateToURI3(full_lab.b.uri, {}, LIVE | P2P) == 0
        said = " ".join(record.getMessage() for record in caplog.records)
        assert "relay (auto: both hosts run an agent)" in said
        assert "agreed with " in said
        assert one.only_on(full_lab.b)
        one.check(full_lab.b)
        assert settled(full_lab) == []
    finally:
        for host in full_lab.hosts:
            kill_agent(full_lab, host)


def test_broken_settings_refuse_and_name_the_file(
    lab: Lab, one: LabGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("fense = true\n")
    monkeypatch.setenv(facade.SETTINGS_VARIABLE, str(file))
    kind, words = answer(lambda: wrap(one.domain(lab.a)).migrateToURI3(lab.b.uri, {}, LIVE | P2P))
    assert kind == (libvirt.VIR_ERR_CONFIG_UNSUPPORTED, 10)
    assert f"{file}: fense is no setting" in words
    assert one.only_on(lab.a)
