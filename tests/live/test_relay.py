"""Migrations between two real libvirt hosts through their agents: what the relay carries, what is settled before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.live.test_migrate import Witness, move, request, virtmig
from tests.support.agents import LinkProxy, sessions, settled, through
from tests.support.lab import GuestFactory, LabGuest, eventually
from tests.support.proxy import free_port
from virtmig.errors import ChannelError, PlanRefused
from virtmig.lab.agents import agent_socket, kill_agent, start_agent, start_agents
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.migrate import migrate
from virtmig.progress import Outcome, Phase, Progress, Status, Whereabouts

pytestmark = [pytest.mark.lab, pytest.mark.root]

POSTCOPY = {"postcopy": True, "postcopy_after_precopy": True, "bandwidth": 64, "max_downtime": 1}


def parallel(count: int) -> str:
    """The channels of a multifd migration, as they are said."""
    return ", ".join(["main", *(f"parallel {index}" for index in range(count))])


@pytest.fixture(scope="module")
def agents(full_lab: Lab) -> Iterator[Lab]:
    start_agents(full_lab)
    yield full_lab
    for host in full_lab.hosts:
        kill_agent(full_lab, host)


@pytest.fixture(autouse=True)
def nothing_is_left(agents: Lab) -> Iterator[None]:
    yield
    assert settled(agents) == []


def relay(
    lab: Lab,
    guest: LabGuest,
    source: LabHost,
    destination: LabHost,
    *,
    on_sample: Callable[[Progress], None] | None = None,
    address: str = "",
    **options: Any,
) -> tuple[Outcome, Witness]:
    witness = Witness(on_sample)
    asked = request(guest, destination, **through(source, destination, address), **options)
    return migrate(asked, source_uri=source.uri, watcher=witness), witness


def there(lab: Lab, guest: LabGuest, channels: str, *, back: bool = False, **options: Any) -> Witness:
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a))[: 1 + back]:
        outcome, witness = relay(lab, guest, source, destination, **options)
        assert outcome.status is Status.COMPLETED, outcome
        assert outcome.guest is Whereabouts.DESTINATION
        agreed = next(text for text in witness.messages if text.startswith("agreed with"))
        assert re.search(rf"round trips: {channels};", agreed), agreed
        assert guest.only_on(destination)
        guest.check(destination)
        assert sessions(source, guest) == sessions(destination, guest) == ()
    return witness


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, "main"),
        pytest.param({"p2p": True}, "main", marks=pytest.mark.slow),
        pytest.param({"fence": True}, "main", marks=pytest.mark.slow),
        pytest.param({"parallel": True, "parallel_connections": 16}, parallel(16), marks=pytest.mark.slow),
    ],
    ids=["plain", "p2p", "fence", "16 channels"],
)
def test_precopy(
    agents: Lab, guest: GuestFactory, request: pytest.FixtureRequest, options: dict[str, Any], channels: str
) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    there(agents, guest(), channels, back=slow, **options)


def test_postcopy_driven_by_the_source(agents: Lab, guest: GuestFactory) -> None:
    witness = there(agents, guest(dirty_mib_s=20.0), "main", p2p=True, **POSTCOPY)
    assert any(sample.phase is Phase.POSTCOPY for sample in witness.samples)


@pytest.mark.slow
def test_a_cut_is_only_a_pause_over_four_channels(agents: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    restored: list[threading.Timer] = []

    def cut(progress: Progress) -> None:
        if progress.phase is Phase.PRECOPY and progress.memory_processed_bytes and not restored:
            agents.link.cut()
            restored.append(threading.Timer(1.0, agents.link.restore))
            restored[0].start()

    try:
        there(agents, fresh, parallel(4), on_sample=cut, parallel=True, parallel_connections=4, bandwidth=32)
    finally:
        for timer in restored:
            timer.join()
    assert restored


def test_broken_connections_are_dialled_again(agents: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    with LinkProxy(agents.folder / "proxy.sock", agents.b.folder / "run" / "virtmig" / "link.sock") as proxy:

        def cut(progress: Progress) -> None:
            if progress.memory_processed_bytes and not cuts:
                cuts.append(len(proxy.connections))
                proxy.cut()

        cuts: list[int] = []
        outcome, witness = relay(agents, fresh, agents.a, agents.b, on_sample=cut, address=proxy.address,
                                 parallel=True, parallel_connections=2, bandwidth=24)  # fmt: skip
        assert outcome.status is Status.COMPLETED, outcome
        assert len(proxy.connections) >= cuts[0] + 4, "control, main and two parallel channels, once more"
    assert any("the agents have lost each other" in text for text in witness.messages)
    assert fresh.only_on(agents.b)
    fresh.check(agents.b)


@pytest.fixture
def impatient(agents: Lab) -> Iterator[Lab]:
    """Agents that give each other up after two seconds."""
    for host in agents.hosts:
        kill_agent(agents, host)
        start_agent(agents, host, "deadlines.reconnect_s = 2\n")
    yield agents
    for host in agents.hosts:
        kill_agent(agents, host)
        start_agent(agents, host)


def test_a_broken_postcopy_is_recovered_by_an_agent_that_was_killed(impatient: Lab, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=20.0)
    killed: list[bool] = []

    def kill(progress: Progress) -> None:
        if progress.phase is Phase.POSTCOPY and fresh.running(impatient.b) and not killed:
            killed.append(True)
            kill_agent(impatient, impatient.a)

    outcome, _ = relay(impatient, fresh, impatient.a, impatient.b, on_sample=kill, **POSTCOPY, postcopy_bandwidth=8)
    assert killed
    assert (outcome.status, outcome.guest) == (Status.INTERRUPTED, Whereabouts.SPLIT), outcome
    start_agent(impatient, impatient.a, "deadlines.reconnect_s = 2\n")
    (broken,) = sessions(impatient.a, fresh)
    assert (broken.role, broken.state, broken.domain) == ("source", "failed", fresh.name)
    done = virtmig("-c", impatient.a.uri, "recover", fresh.name, "--agent", str(agent_socket(impatient.a)))
    assert done.returncode == 0, done.stderr
    assert f"{fresh.name} now runs on {impatient.b.hostname}" in done.stdout + done.stderr
    assert fresh.only_on(impatient.b)
    fresh.check(impatient.b)
    assert sessions(impatient.a, fresh) == sessions(impatient.b, fresh) == (), "what was broken is recovered"


@pytest.fixture
def certified(agents: Lab, tmp_path: Path) -> Iterator[Lab]:
    """Agents that know each other by certificates."""
    authority = trustme.CA()
    for host in agents.hosts:
        folder = tmp_path / host.name
        folder.mkdir()
        shown = authority.issue_cert(host.state.address, host.hostname, common_name=host.hostname)
        authority.cert_pem.write_to_path(folder / "ca-cert.pem")
        for side in ("server", "client"):
            shown.cert_chain_pems[0].write_to_path(folder / f"{side}-cert.pem")
            shown.private_key_pem.write_to_path(folder / f"{side}-key.pem")
            (folder / f"{side}-key.pem").chmod(0o600)
        kill_agent(agents, host)
        start_agent(agents, host, access=f'tls.folder = "{folder}"\nallow = [{{ peer = "tls:lab-*", '
                                         'rights = ["send", "receive"] }]\n')  # fmt: skip
    yield agents
    for host in agents.hosts:
        kill_agent(agents, host)
        start_agent(agents, host)


def test_tls_between_the_agents(certified: Lab, guest: GuestFactory) -> None:
    witness = there(certified, guest(), parallel(2), parallel=True, parallel_connections=2)
    assert any(re.match(r"agreed with .*lab-b", text) for text in witness.messages), witness.messages


def test_storage_goes_through_a_channel_of_its_own(agents: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    content = os.urandom(4 << 20)
    name = f"{fresh.name}.img"
    images = [host.folder / "log" / name for host in agents.hosts]  # each host's own /var/log/libvirt
    try:
        images[0].write_bytes(content)
        images[1].write_bytes(bytes(len(content)))
        disk = (f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
                f"<source file='/var/log/libvirt/{name}'/><target dev='vda' bus='virtio'/></disk>")  # fmt: skip
        domain = fresh.domain(agents.a)
        description = domain.XMLDesc().replace("<devices>", f"<devices>{disk}", 1)
        domain.destroy()  # a guest without ACPI takes no disk while it runs
        fresh.connection(agents.a).createXML(description)
        before = agents.heartbeat(agents.a, fresh.name)
        eventually(lambda: agents.heartbeat(agents.a, fresh.name) != before, "the guest's first heartbeat")
        outcome, witness = relay(agents, fresh, agents.a, agents.b, copy_storage_all=True, migrate_disks="vda")
        assert outcome.status is Status.COMPLETED, outcome
        assert any("main, storage 0;" in text for text in witness.messages)
        assert fresh.only_on(agents.b)
        assert images[1].read_bytes() == content
        fresh.check(agents.b)
    finally:
        for image in images:
            image.unlink(missing_ok=True)


@pytest.mark.slow
def test_without_agents_a_destination_puts_connections_in_order(full_lab: Lab, guest: GuestFactory) -> None:
    """libvirt's QEMU listens on loopback, `virtmig order` at the address that is given out."""
    lab, fresh = full_lab, guest()
    there, port = lab.b.state.address, free_port()
    command = [sys.executable, "-m", "virtmig.cli.main", "order", f"tcp:{there}:{port}", f"tcp:127.0.0.1:{port}",
               "--parallel-connections", "4"]  # fmt: skip
    with subprocess.Popen(lab.b.command(command), stdout=subprocess.PIPE, text=True) as ordering:
        assert ordering.stdout is not None
        assert ordering.stdout.readline() == f"listening on tcp:{there}:{port}\n"
        outcome, _ = move(fresh, lab.a, lab.b, transport="direct", parallel=True, parallel_connections=4,
                          migrateuri=f"tcp://{there}:{port}", listen_address="127.0.0.1")  # fmt: skip
        assert outcome.status is Status.COMPLETED, outcome
        said = ordering.stdout.read().splitlines()
        assert ordering.wait(20) == 0
    assert said[:-1] == ["main: connected to QEMU", *(f"parallel {index}: connected to QEMU" for index in range(4))]
    assert said[-1].endswith("over main, parallel 0, parallel 1, parallel 2, parallel 3; both QEMUs know how it ended")
    fresh.check(lab.b)


# -- settled before any byte of the guest ------------------------------------------------------------------------------


@pytest.fixture
def modest(agents: Lab) -> Iterator[Lab]:
    """The destination's agent allows five channels, and its QEMU runs as a user without userfaultfd."""
    kill_agent(agents, agents.b)
    start_agent(agents, agents.b, 'limits.parallel_connections = 5\nqemu.user = "nobody"\n')
    yield agents
    kill_agent(agents, agents.b)
    start_agent(agents, agents.b)


def test_what_the_destination_allows_is_settled_before_anything_moves(modest: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    asked = {"parallel": True, "parallel_connections": 10}
    for options, words in (({"postcopy": True}, "userfaultfd"), ({**asked, "strict": True}, "10")):
        witness = Witness()
        with pytest.raises(PlanRefused, match=words):
            migrate(request(fresh, modest.b, **through(modest.a, modest.b), **options),
                    source_uri=modest.a.uri, watcher=witness)  # fmt: skip
        assert witness.samples == []
        assert fresh.only_on(modest.a)
        assert fresh.state(modest.b) is None
        assert settled(modest) == []
    outcome, witness = relay(modest, fresh, modest.a, modest.b, **asked)
    assert outcome.status is Status.COMPLETED, outcome
    assert any(re.match(r"--parallel-connections: 10 -> 5: ", text) for text in witness.messages), witness.messages
    assert any("parallel 4;" in text for text in witness.messages)
    fresh.check(modest.b)


def test_a_missing_agent_is_said_and_nothing_starts(agents: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    with pytest.raises(PlanRefused, match=r"needs an agent on .*no agent of virtmig at /nowhere"):
        move(fresh, agents.a, agents.b, **{**through(agents.a, agents.b), "agent": "/nowhere"})
    kill_agent(agents, agents.b)
    try:
        with pytest.raises(ChannelError, match=r"no agent at tcp:10\.77\.0\.2:16515: Connection refused") as told:
            relay(agents, fresh, agents.a, agents.b)
        assert told.value.message.endswith(f"; nothing was started, {fresh.name} is where it was")
        assert told.value.guest is Whereabouts.SOURCE
    finally:
        start_agent(agents, agents.b)
    assert fresh.only_on(agents.a)
    assert fresh.state(agents.b) is None
