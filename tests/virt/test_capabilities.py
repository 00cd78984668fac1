"""Facts asked from libvirt: the test driver (which knows little and must not trip us) and the lab's real hosts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

from virtmig.errors import VirtError
from virtmig.facts import GuestFacts, HostFacts
from virtmig.virt.capabilities import (
    check_cpu,
    gather_guest_facts,
    gather_host_facts,
    missing_features,
    unreachable_host_facts,
)
from virtmig.virt.connection import open_connection

replace = msgspec.structs.replace


@pytest.fixture
def test_driver() -> Iterator[Any]:
    connection = open_connection("test:///default")
    yield connection
    connection.close()


@pytest.fixture
def opal(tmp_path: Path) -> Iterator[Any]:
    """A running domain of a test driver of its own: the default one is shared by the whole process."""
    domain = (
        "<domain type='test'><name>opal</name><memory unit='MiB'>9</memory><os><type arch='i686'>hvm</type></os>"
        "<devices><disk type='file' device='disk'><source file='/guest/image'/><target dev='vda'/></disk></devices>"
        "</domain>"
    )
    file = tmp_path / "node.xml"
    file.write_text(f"<node>{domain}</node>")
    connection = open_connection(f"test://{file}")
    yield connection.lookupByName("opal")
    connection.close()


# -- a driver that knows little ------------------------------------------------------------------------------------


def test_a_driver_that_knows_little_leaves_the_rest_unknown(test_driver: Any) -> None:
    facts = gather_host_facts(test_driver, "test:///default")
    assert (facts.driver, facts.reachable, facts.qemu_version, facts.session) == ("TEST", True, None, None)
    assert facts.libvirt_version == libvirt.getVersion()
    assert facts.arch == "i686"
    assert facts.cpus == 16
    assert facts.memory_bytes == 3 << 30
    assert [domain.name for domain in facts.domains or ()] == ["test"]
    assert [text for text in facts.unanswered if text.startswith("memory statistics")]
    assert msgspec.json.decode(msgspec.json.encode(facts), type=HostFacts) == facts


def test_a_guest_of_that_driver(opal: Any) -> None:
    facts = gather_guest_facts(opal)
    assert (facts.name, facts.state, facts.persistent, facts.snapshots) == ("opal", "running", True, 0)
    assert facts.memory_bytes == 9 << 20
    assert facts.job is None  # the driver has no job statistics
    assert facts.block_job is None
    assert [disk.storage for disk in facts.disks] == ["unknown"]


def test_a_guest_that_does_not_run(opal: Any) -> None:
    opal.destroy()
    facts = gather_guest_facts(opal, query_qemu=True)
    assert (facts.state, facts.active, facts.job, facts.qemu_version) == ("shut off", False, "", None)


def test_a_guest_that_is_gone(opal: Any) -> None:
    opal.destroy()
    opal.undefine()
    with pytest.raises(VirtError) as gone:
        gather_guest_facts(opal)
    assert gone.value.code == libvirt.VIR_ERR_NO_DOMAIN


def test_a_closed_connection_gives_no_facts_and_no_error(test_driver: Any) -> None:
    other = open_connection("test:///default")
    other.close()
    facts = gather_host_facts(other, "test:///default")
    assert facts.libvirt_version is None
    assert facts.domains is None
    assert len(facts.unanswered) > 5


def test_an_old_binding_is_no_error() -> None:
    class Nothing:
        """A connection without any method: what a missing one must come down to."""

    facts = gather_host_facts(_Missing(Nothing()), "qemu:///system")
    assert facts.libvirt_version is None
    assert all("too old" in text for text in facts.unanswered if text.startswith("libvirt version"))


class _Missing:
    """Every method exists and raises what a call of a missing one raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            return getattr(self.inner, name)

        return call


def test_a_host_that_nobody_reaches() -> None:
    facts = unreachable_host_facts("qemu+ssh://onyx/system")
    assert (facts.reachable, facts.label, facts.libvirt_version) == (False, "qemu+ssh://onyx/system", None)


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            "the CPU is incompatible with host CPU: Host CPU does not provide required features: vme, x2apic",
            ("vme", "x2apic"),
        ),
        ("guest CPU doesn't match specification: missing features: avx512f,vmx-ept-1gb", ("avx512f", "vmx-ept-1gb")),
        ("guest CPU doesn't match specification: extra features: ht", ("ht",)),
        ("internal error: Unknown CPU model NoSuch", ()),
    ],
)
def test_missing_features_are_read_from_libvirts_words(text: str, features: tuple[str, ...]) -> None:
    assert missing_features(text) == features


# -- the lab -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts(lab: Any) -> Iterator[tuple[Any, Any]]:
    """Connections to the lab's two hosts."""
    connections = tuple(open_connection(host.uri) for host in lab.hosts)
    yield connections[0], connections[1]
    for connection in connections:
        connection.close()


@pytest.mark.lab
def test_a_real_host_tells_all_that_a_plan_needs(lab: Any, hosts: tuple[Any, Any]) -> None:
    for connection, host in zip(hosts, lab.hosts, strict=True):
        facts = gather_host_facts(connection, host.uri)
        assert facts.unanswered == ()
        assert (facts.driver, facts.session) == ("QEMU", not lab.full)
        assert facts.libvirt_version == connection.getLibVersion()
        assert facts.qemu_version == connection.getVersion()
        assert facts.host_uuid in connection.getCapabilities()
        assert facts.domains is not None
        arch = facts.guest_arch("x86_64")
        assert arch is not None
        assert arch.canonical["pc"] in arch.machines
        assert facts.userfaultfd.status in ("yes", "no")
        if lab.full:
            assert (facts.qemu_uid, facts.userfaultfd.status, facts.locked_memory_raisable) == (0, "yes", True)


@pytest.mark.lab
def test_a_running_guest_and_whether_the_other_host_can_have_it(lab: Any, hosts: tuple[Any, Any], guest: Any) -> None:
    made = guest()
    facts = gather_guest_facts(made.domain(lab.hosts[0]))
    assert (facts.name, facts.uuid, facts.state, facts.job) == (made.name, made.uuid, "running", "")
    assert (facts.snapshots, facts.block_job, facts.postcopy_failed) == (0, False, False)
    assert facts.memory_bytes is not None
    assert facts.qemu_version is None  # not asked: it would taint the domain
    there = gather_host_facts(hosts[1], lab.hosts[1].uri, guest=facts)
    assert there.fit is not None
    assert (there.fit.emulator.status, there.fit.cpu.status) == ("yes", "yes")
    assert made.uuid not in [domain.uuid for domain in there.domains or ()]
    here = gather_host_facts(hosts[0], lab.hosts[0].uri)
    assert made.uuid in [domain.uuid for domain in here.domains or () if domain.active]


@pytest.mark.lab
def test_qemu_is_asked_only_on_demand_and_that_taints(lab: Any, guest: Any) -> None:
    domain = guest().domain(lab.hosts[0])
    gather_guest_facts(domain)
    assert not any("custom-monitor" in text or "monitor" in text for text in domain.messages(0))
    facts = gather_guest_facts(domain, query_qemu=True)
    assert facts.qemu_version == domain.connect().getVersion()
    assert {"postcopy-ram", "multifd", "return-path"} <= set(facts.migration_capabilities or ())
    assert facts.blockers == ()
    assert any("monitor" in text for text in domain.messages(0))


@pytest.mark.lab
@pytest.mark.parametrize(
    ("change", "emulator", "cpu", "words"),
    [
        ({"emulator": "/nonexistent/qemu"}, "no", "unknown", "/nonexistent/qemu"),
        ({"machine": "pc-q35-99.9"}, "no", "unknown", "pc-q35-99.9"),
        ({"cpu_xml": "<cpu mode='custom'><model>NoSuch</model></cpu>"}, "yes", "no", "NoSuch"),
        ({"cpu_xml": "no xml"}, "yes", "unknown", ""),
        ({"cpu_xml": ""}, "yes", "yes", "no particular CPU"),
    ],
)
def test_what_a_host_cannot_run_is_found_out_before(
    hosts: tuple[Any, Any], lab: Any, guest: Any, change: dict[str, str], emulator: str, cpu: str, words: str
) -> None:
    facts = replace(gather_guest_facts(guest().domain(lab.hosts[0])), **change)
    fit = gather_host_facts(hosts[1], lab.hosts[1].uri, guest=facts).fit
    assert fit is not None
    assert (fit.emulator.status, fit.cpu.status) == (emulator, cpu)
    assert words in fit.emulator.evidence + fit.cpu.evidence


@pytest.mark.lab
def test_missing_cpu_features_are_named(hosts: tuple[Any, Any], lab: Any, guest: Any) -> None:
    facts = gather_guest_facts(guest().domain(lab.hosts[0]))
    # QEMU's emulation has no AVX-512
    wanted = "<cpu mode='custom' match='exact' check='{}'><model>Skylake-Server</model></cpu>"
    finding, missing = check_cpu(hosts[1], replace(facts, cpu_xml=wanted.format("full")))
    assert finding.status == "no"
    assert "avx512f" in missing
    finding, _ = check_cpu(hosts[1], replace(facts, cpu_xml=wanted.format("none")))
    assert finding.status == "unknown"  # libvirt would start it all the same


@pytest.mark.lab
def test_a_frozen_host_is_given_up_after_one_question(lab: Any, hosts: tuple[Any, Any]) -> None:
    from tests.support.lab import frozen

    began = time.monotonic()
    with frozen(lab.hosts[1]):
        facts = gather_host_facts(hosts[1], lab.hosts[1].uri, guest=GuestFacts(name="opal", cpu_xml="<cpu/>"))
    assert time.monotonic() - began < 15
    assert facts.libvirt_version is None
    assert facts.domains is None
    assert any("not asked, the host is silent" in text for text in facts.unanswered)


@pytest.mark.lab
def test_an_unprivileged_daemon_says_what_it_may_not(session_lab: Any) -> None:
    host = session_lab.hosts[1]
    connection = open_connection(host.uri)
    try:
        facts = gather_host_facts(connection, host.uri)
    finally:
        connection.close()
    assert (facts.session, facts.local) == (True, True)
    assert facts.qemu_uid not in (None, 0)
    assert facts.locked_memory_raisable is False
    assert facts.locked_memory_limit_bytes is not None
    assert facts.userfaultfd.status in ("yes", "no")  # this machine's kernel can be asked
