"""negotiate(): one test a rule. What is refused has a way out; what is not known is said, never guessed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.hosts import DESTINATION, GUEST, LOCAL_DISK, MACHINE, OTHER_UUID, SOURCE, UUID, ask, plan
from virtmig.errors import PlanRefused, RequestError
from virtmig.facts import DiskFacts, Finding, GuestFit, HostdevFacts, HostFacts, KnownDomain, version
from virtmig.features import FEATURES
from virtmig.plan import Plan, negotiate, settings_of
from virtmig.request import MigrationRequest

OLD = {"qemu_version": version(7, 2, 22), "libvirt_version": version(9)}
NO_USERFAULTFD = {"userfaultfd": Finding("no", "QEMU runs as uid 4242 and vm.unprivileged_userfaultfd=0")}


def test_a_plain_migration_between_new_hosts() -> None:
    found = plan(ask("live"))
    assert not found.refused
    assert found.warnings == ()
    assert [choice.feature for choice in found.choices] == [row.name for row in FEATURES]
    assert all(choice.reason for choice in found.choices)
    assert [(channel.role, channel.count) for channel in found.channels] == [("main", 1)]
    assert found.virsh_line == "virsh -c qemu+ssh://amber/system migrate opal qemu+ssh://beryl/system --live"
    found.raise_if_refused()


# -- the word of the person, and what is said about it -------------------------------------------------------------


def test_all_refusals_come_at_once_each_with_a_way_out() -> None:
    found = plan(
        ask("live", "postcopy", "parallel"),
        destination={**OLD, **NO_USERFAULTFD},
        guest={"snapshots": 2, "block_job": True},
    )
    assert {item.feature for item in found.refusals} == {"multifd", "postcopy", "domain"}
    assert len(found.refusals) == 4
    assert all(item.reason and item.way_out for item in found.refusals)
    with pytest.raises(PlanRefused) as refused:
        found.raise_if_refused()
    assert [reason for _, reason, _ in refused.value.reasons] == [item.reason for item in found.refusals]


def test_a_refused_plan_changes_nothing_that_was_asked() -> None:
    request = ask("live", "postcopy", "parallel", parallel_connections=3)
    assert plan(request, both=OLD).request == request


def test_transport_auto_is_direct_and_says_why() -> None:
    assert plan(ask("live")).transport == "direct"
    assert "no agent" in plan(ask("live")).transport_reason
    assert "asked for" in plan(ask("live", transport="direct")).transport_reason


def test_auto_takes_the_agents_when_both_hosts_have_one_and_nothing_speaks_against_it() -> None:
    here = {"agent": Finding("yes", "it answers")}
    assert plan(ask("live"), both=here).transport == "relay"
    assert "both hosts" in plan(ask("live"), both=here).transport_reason
    one = plan(ask("live"), source=here, destination={"agent": Finding("no", "nobody listens there")})
    assert one.transport == "direct"
    assert "nobody listens there" in one.transport_reason
    for asked in (ask("live", migrateuri="tcp://h"), ask("live", "tls"), ask("p2p", "tunnelled")):
        found = plan(asked, both=here)
        assert found.transport == "direct"
        assert "was given" in found.transport_reason
    assert plan(ask("live", transport="direct"), both=here).transport == "direct"


def test_the_relay_is_refused_where_an_agent_is_missing() -> None:
    missing = {"agent": Finding("no", "nobody listens there")}
    found = plan(ask("live", transport="relay"), source={"agent": Finding("yes")}, destination=missing)
    refusal = next(item for item in found.refusals if item.feature == "relay")
    assert "nobody listens there" in refusal.reason
    assert "virtmig-agent" in refusal.way_out
    assert not plan(ask("live", transport="relay")).refused  # not known: the source's agent will find out


def test_the_relay_carries_every_channel_and_no_zero_copy() -> None:
    here = {"agent": Finding("yes")}
    found = plan(ask("live", "postcopy", "parallel", parallel_connections=3, transport="relay"), both=here)
    assert [(row.role, row.count) for row in found.channels] == [("main", 1), ("parallel", 3), ("priority", 1)]
    again = plan(
        ask("live", "postcopy", "postcopy-resume", transport="relay"), guest={"postcopy_failed": True}, both=here
    )
    assert [row.role for row in again.channels] == ["main", "priority"]
    refused = plan(ask("live", "parallel", "zerocopy", transport="relay"), both=here)
    assert "zero-copy-send" in {item.feature for item in refused.refusals}


def test_direct_migration_is_refused_for_qemu() -> None:
    [refusal] = plan(ask("live", "direct")).refusals
    assert refusal.reason.startswith("direct migration is not supported by the source host")
    assert refusal.way_out == "leave out --direct"


# -- multifd and postcopy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("qemu", [version(7, 2), version(8), version(10, 0, 9)])
def test_multifd_with_postcopy_is_refused_when_either_qemu_is_older_than_10_1(side: Any, qemu: int) -> None:
    found = plan(ask("live", "postcopy", "parallel"), **{side: {"qemu_version": qemu}})
    [refusal] = found.refusals
    assert refusal.feature == "multifd"
    assert "--parallel" in refusal.way_out
    assert "--postcopy" in refusal.way_out


def test_multifd_with_postcopy_goes_between_new_qemus() -> None:
    found = plan(ask("live", "postcopy", "parallel"))
    assert not found.refused
    assert [channel.role for channel in found.channels] == ["main", "parallel", "priority"]


def test_the_running_qemu_counts_more_than_the_installed_one() -> None:
    assert plan(ask("live", "postcopy", "parallel"), guest={"qemu_version": version(8, 1)}).refused


def test_multifd_with_postcopy_of_unknown_qemu_is_warned_about() -> None:
    found = plan(ask("live", "postcopy", "parallel"), destination={"qemu_version": None})
    assert not found.refused
    assert any("loses the guest" in item.text for item in found.warnings)


def test_postcopy_is_refused_up_front_without_userfaultfd() -> None:
    [refusal] = plan(ask("live", "postcopy"), destination=NO_USERFAULTFD).refusals
    assert refusal.feature == "postcopy"
    assert "uid 4242" in refusal.reason
    assert "vm.unprivileged_userfaultfd=1" in refusal.way_out
    assert "cgroup_device_acl" in refusal.way_out


def test_a_session_daemon_has_only_the_sysctl() -> None:
    [refusal] = plan(ask("live", "postcopy"), destination={**NO_USERFAULTFD, "session": True}).refusals
    assert "vm.unprivileged_userfaultfd=1" in refusal.way_out
    assert "cgroup_device_acl" not in refusal.way_out


def test_unknown_userfaultfd_is_a_warning() -> None:
    found = plan(ask("live", "postcopy"), destination={"userfaultfd": Finding()})
    assert not found.refused
    assert [item.feature for item in found.warnings] == ["postcopy"]


def test_userfaultfd_of_the_source_does_not_matter() -> None:
    assert not plan(ask("live", "postcopy"), source=NO_USERFAULTFD).refused


@pytest.mark.parametrize(
    ("facts", "on", "words"),
    [
        ({}, True, "both hosts have it"),
        ({"source": {"libvirt_version": version(9, 10)}}, False, "needs libvirt 10.0.0, amber has 9.10.0"),
        ({"destination": {"libvirt_version": version(9, 10)}}, False, "needs libvirt 10.0.0, beryl has 9.10.0"),
        ({"destination": {"qemu_version": version(7)}}, False, "needs QEMU 7.1.0, beryl has 7.0.0"),
        ({"guest": {"migration_capabilities": ("postcopy-ram", "return-path")}}, False, "QEMU on amber does not have"),
        ({"destination": {"libvirt_version": None}}, None, "libvirt decides"),
    ],
)
def test_preempt_comes_by_itself_when_both_have_it(facts: dict[str, Any], on: bool | None, words: str) -> None:
    found = plan(ask("live", "postcopy"), **facts)
    choice = found.choice("postcopy-preempt")
    assert choice.on is on
    assert words in choice.reason
    assert any(channel.role == "priority" for channel in found.channels) is (on is True)


def test_preempt_needs_a_transport_with_more_than_one_channel() -> None:
    found = plan(ask("live", "postcopy", migrateuri="rdma://beryl"), guest={"hard_limit_bytes": 17 << 30})
    assert found.choice("postcopy-preempt") == msgspec.structs.replace(
        found.choice("postcopy-preempt"), on=False, reason="rdma carries one channel"
    )
    unix = plan(ask("live", "postcopy", migrateuri="unix:///run/m.sock"))
    assert unix.choice("postcopy-preempt").on is True


def test_preempt_without_postcopy_is_off() -> None:
    assert plan(ask("live")).choice("postcopy-preempt").on is False
    with pytest.raises(RequestError, match="Postcopy preempt requires postcopy-ram"):
        ask("live", postcopy_preempt="on")


def test_preempt_on_that_cannot_be_had_is_refused() -> None:
    [refusal] = plan(ask("live", "postcopy", postcopy_preempt="on"), both={"libvirt_version": version(9)}).refusals
    assert refusal.feature == "postcopy-preempt"
    assert "needs libvirt 10.0.0" in refusal.reason
    assert not plan(ask("live", "postcopy", postcopy_preempt="on")).refused


def test_preempt_off_is_refused_where_libvirt_would_force_it_on() -> None:
    [refusal] = plan(ask("live", "postcopy", postcopy_preempt="off")).refusals
    assert "no switch" in refusal.reason
    assert not plan(ask("live", "postcopy", postcopy_preempt="off"), both={"libvirt_version": version(9)}).refused


def test_preempt_that_nobody_can_tell_is_a_warning() -> None:
    found = plan(ask("live", "postcopy", postcopy_preempt="off"), destination={"qemu_version": None})
    assert not found.refused
    assert any(item.feature == "postcopy-preempt" for item in found.warnings)


# -- parallel connections ------------------------------------------------------------------------------------------


def test_multifd_is_suggested_and_never_forced() -> None:
    found = plan(ask("live"))
    assert found.choice("multifd").on is False
    assert "--parallel --parallel-connections 4" in [item.option for item in found.suggestions]
    assert "parallel" not in found.request


@pytest.mark.parametrize(
    ("request_", "facts", "words"),
    [
        (ask("live"), {"source": {"cpus": 1}}, "amber has one CPU"),
        (ask("live"), {"destination": {"cpus": 1}}, "beryl has one CPU"),
        (ask("live", "p2p", "tunnelled"), {}, "tunnel carries one channel"),
        (ask("live", "postcopy"), {"both": {"qemu_version": version(10)}}, "cannot do multifd and postcopy"),
        (ask("live", "compressed"), {}, "not compatible with xbzrle"),
        (ask("live"), {"destination": {"qemu_version": version(3)}}, "needs QEMU 4.0.0"),
        (ask("live"), {"destination": {"parallel_connections_max": 1}}, "allows one connection"),
    ],
)
def test_multifd_is_not_suggested_where_it_cannot_pay(
    request_: MigrationRequest, facts: dict[str, Any], words: str
) -> None:
    found = plan(request_, **facts)
    assert not [item for item in found.suggestions if item.feature == "multifd"]
    assert found.choice("multifd").on is False
    assert words in found.choice("multifd").reason


def test_the_suggested_number_fits_the_smaller_host() -> None:
    options = [item.option for item in plan(ask("live"), destination={"cpus": 3}).suggestions]
    assert "--parallel --parallel-connections 3" in options
    limited = plan(ask("live"), destination={"parallel_connections_max": 2}).suggestions
    assert "--parallel --parallel-connections 2" in [item.option for item in limited]


def test_multifd_that_was_asked_for_stays_on_with_one_core() -> None:
    found = plan(ask("live", "parallel"), destination={"cpus": 1})
    assert found.choice("multifd").on is True
    assert any("one CPU" in item.text for item in found.warnings)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_parallel_connections_are_adjusted_to_what_a_host_allows(side: Any) -> None:
    found = plan(ask("live", threads=10), **{side: {"parallel_connections_max": 5}})
    [adjustment] = found.adjustments
    assert (adjustment.asked, adjustment.planned) == ("10", "5")
    assert found.request["parallel-connections"] == 5
    assert [channel.count for channel in found.channels if channel.role == "parallel"] == [5]
    assert "--parallel-connections 5" in found.virsh_line
    assert not found.refused


def test_as_many_connections_as_a_host_allows_need_no_adjusting() -> None:
    found = plan(ask("live", "strict", threads=5), both={"parallel_connections_max": 5})
    assert (found.refused, found.adjustments) == (False, ())


def test_strict_refuses_instead_of_adjusting() -> None:
    found = plan(ask("live", "strict", threads=10), destination={"parallel_connections_max": 5})
    [refusal] = found.refusals
    assert "10 parallel connections" in refusal.reason
    assert "--parallel-connections 5" in refusal.way_out
    assert found.adjustments == ()
    assert found.request["parallel-connections"] == 10


def test_the_default_number_is_qemus_and_is_adjusted_too() -> None:
    free = plan(ask("live", "parallel"))
    assert [channel.count for channel in free.channels] == [1, 2]
    assert "parallel-connections" not in free.request
    tight = plan(ask("live", "parallel"), destination={"parallel_connections_max": 1})
    assert tight.request["parallel-connections"] == 1
    assert plan(ask("live", "parallel"), destination={"parallel_connections_max": 0}).refused


def test_more_connections_than_cores_can_serve_are_warned_about() -> None:
    assert any("get in each other's way" in item.text for item in plan(ask("live", threads=11)).warnings)
    assert not plan(ask("live", threads=10)).warnings


# -- exclusions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("live", "postcopy"), ("parallel",)])
def test_tunnelled_excludes_postcopy_and_parallel(options: tuple[str, ...]) -> None:
    with pytest.raises(RequestError):
        ask("p2p", "tunnelled", *options)


def test_a_one_way_transport_carries_one_channel() -> None:
    found = plan(ask("live", "p2p", "tunnelled"))
    [channel] = found.channels
    assert (channel.role, channel.both_ways) == ("main", False)
    assert found.choice("return-path").on is False
    assert found.choice("switchover-ack").on is False


def test_vfio_excludes_postcopy() -> None:
    vfio = {"hostdevs": (HostdevFacts(kind="pci", where="0000:3b:00.4", vfio=True),)}
    [refusal] = plan(ask("live", "postcopy"), guest=vfio).refusals
    assert "vfio" in refusal.reason
    assert "--postcopy" in refusal.way_out
    assert not plan(ask("live"), guest=vfio).refused


def test_xbzrle_excludes_multifd_also_when_compressed_implies_it() -> None:
    with pytest.raises(RequestError, match="isn't supported with parallel migration"):
        ask("parallel", comp_methods=["xbzrle"])
    with pytest.raises(RequestError, match="No compression algorithm selected"):
        ask("parallel", "compressed")
    assert plan(ask("live", "compressed")).choice("xbzrle").on is True


def test_rdma_carries_one_channel_and_needs_a_memory_limit() -> None:
    found = plan(ask("live", "parallel", migrateuri="rdma://beryl"))
    assert {item.feature for item in found.refusals} == {"multifd", "rdma"}
    assert [item.feature for item in plan(ask("live", "rdma-pin-all")).warnings] == ["rdma-pin-all"]


# -- zero-copy and TLS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "guest", "refused", "warned"),
    [
        ({"locked_memory_raisable": True, "locked_memory_limit_bytes": 65536}, {}, False, False),
        ({"locked_memory_raisable": False, "locked_memory_limit_bytes": -1}, {}, False, False),
        ({"locked_memory_raisable": False, "locked_memory_limit_bytes": 13 << 30}, {}, False, False),
        ({"locked_memory_raisable": False, "locked_memory_limit_bytes": (13 << 30) - 1}, {}, True, False),
        ({"locked_memory_raisable": False, "locked_memory_limit_bytes": 1 << 30}, {"hard_limit_bytes": 1 << 30}, False,
         False),
        ({"locked_memory_raisable": None, "locked_memory_limit_bytes": None}, {}, False, True),
    ],
)  # fmt: skip
def test_zero_copy_needs_locked_memory(
    source: dict[str, Any], guest: dict[str, Any], refused: bool, warned: bool
) -> None:
    found = plan(ask("live", "parallel", "zerocopy"), source=source, guest=guest)
    assert [item.feature for item in found.refusals] == ["zero-copy-send"] * refused
    assert [item.feature for item in found.warnings] == ["zero-copy-send"] * warned


@pytest.mark.parametrize("other", [{"tls": True}, {"comp-methods": ["zstd"]}, {"parallel": False}])
def test_zero_copy_needs_multifd_without_tls_or_compression(other: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        ask(**{"live": True, "parallel": True, "zerocopy": True, **other})


def test_zero_copy_has_no_unix_sockets() -> None:
    [refusal] = plan(ask("live", "parallel", "zerocopy", migrateuri="unix:///run/m.sock")).refusals
    assert refusal.feature == "zero-copy-send"


def test_certificates_that_were_not_seen_are_a_warning() -> None:
    found = plan(ask("live", "tls"), destination={"tls_files": Finding()})
    assert not found.refused
    assert [item.feature for item in found.warnings] == ["tls"]


# -- hosts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "facts", "refused"),
    [
        (ask("live"), {"destination": {"host_uuid": SOURCE.host_uuid}}, True),
        (ask("live", desturi="qemu+tcp://localhost:16510/system"), {}, False),  # a forwarded port to another host
        (ask("live", "p2p", desturi="qemu+tcp://localhost:16510/system"), {}, True),
        (ask("live", "p2p", desturi="qemu:///system"), {}, True),
        (ask("live", "p2p", desturi="qemu+unix:///session?socket=/run/b/sock"), {}, False),
        (ask("live", desturi="qemu+tcp://localhost4/system"), {"destination": {"host_uuid": None}}, True),
    ],
)
def test_the_same_host_is_refused(request_: MigrationRequest, facts: dict[str, Any], refused: bool) -> None:
    assert [item.feature for item in plan(request_, **facts).refusals] == ["hosts"] * refused


def test_another_hypervisor_is_refused() -> None:
    [refusal] = plan(ask("live"), destination={"driver": "TEST"}).refusals
    assert "TEST" in refusal.reason


def test_a_destination_that_only_the_source_can_reach_is_not_held_against_anyone() -> None:
    nobody = HostFacts(uri="qemu+ssh://onyx/system", reachable=False)
    found = negotiate(ask("live", "p2p", "postcopy", "parallel"), SOURCE, nobody, GUEST)
    assert not found.refused
    assert {"hosts", "postcopy", "multifd"} <= {item.feature for item in found.warnings}
    assert found.choice("postcopy-preempt").on is None


def test_two_daemons_of_one_machine_are_told_apart() -> None:
    found = plan(ask("live", "postcopy"), both={"hostname": "jet"}, source={"libvirt_version": version(9)})
    assert (found.source, found.destination) == ("jet (source)", "jet (destination)")
    assert "jet (source) has 9.0.0" in found.choice("postcopy-preempt").reason


@pytest.mark.parametrize(
    ("facts", "where"),
    [
        ({"source": {"client_version": version(11)}}, "client library"),
        ({"source": {"libvirt_version": version(11)}}, "amber"),
    ],
)
def test_an_option_that_is_younger_than_a_libvirt_is_refused(facts: dict[str, Any], where: str) -> None:
    [refusal] = plan(ask("live", available_switchover_bandwidth=9), **facts).refusals
    assert refusal.reason.startswith("this libvirt is too old for --available-switchover-bandwidth (needs 11.1.0")
    assert where in refusal.reason


def test_an_option_of_the_source_alone_does_not_need_a_new_destination() -> None:
    request = ask("live", available_switchover_bandwidth=9)
    assert not plan(request, destination={"libvirt_version": version(11)}).refused
    both = ask("live", "copy-storage-all", migrate_disks_detect_zeroes=["vdc"])
    found = plan(both, destination={"libvirt_version": version(10, 8)}, guest={"disks": (LOCAL_DISK,)})
    assert [item.feature for item in found.refusals] == ["migrate-disks-detect-zeroes"]


# -- the domain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "options", "words"),
    [
        (KnownDomain("opal", UUID, True), {}, "already active on beryl"),
        (KnownDomain("opal", OTHER_UUID, False), {}, "already exists on beryl"),
        (KnownDomain("other", UUID, False), {}, "under the name 'other'"),
        (KnownDomain("pearl", OTHER_UUID, True), {"dname": "pearl"}, "already exists on beryl"),
        (KnownDomain("opal", UUID, False), {}, ""),
        (KnownDomain("opal", OTHER_UUID, True), {"dname": "pearl"}, ""),
    ],
)
def test_what_the_destination_already_has(domain: KnownDomain, options: dict[str, str], words: str) -> None:
    found = plan(ask("live", **options), destination={"domains": (domain,)})
    assert found.refused is bool(words)
    assert all(words in item.reason and item.feature == "domain" for item in found.refusals)


@pytest.mark.parametrize(
    ("guest", "words"),
    [
        ({"state": "shut off"}, "domain is not running"),
        ({"job": "migration out"}, "another job is already running for domain 'opal': migration out"),
        ({"snapshots": 3}, "cannot migrate domain with 3 snapshots"),
        ({"block_job": True}, "domain has active block job"),
        ({"autodestroy": True}, "domain is marked for auto destroy"),
        ({"blockers": ("0000:00:05.0: device is not migratable",)}, "cannot migrate domain: 0000:00:05.0"),
        ({"shmem_peers": ("ivshmem7",)}, "shmem device 'ivshmem7' cannot be migrated"),
        ({"invtsc_without_frequency": True}, "TSC frequency is not specified"),
        ({"disks": (msgspec.structs.replace(LOCAL_DISK, transient=True, storage="shared"),)}, "transient disk"),
        ({"postcopy_failed": True, "job": "migration out", "state": "paused"}, "split by a postcopy that broke"),
    ],
)
def test_libvirts_own_checks_come_before_anything_starts(guest: dict[str, Any], words: str) -> None:
    [refusal] = plan(ask("live"), guest=guest).refusals
    assert words in refusal.reason
    assert refusal.way_out


def test_a_definition_that_does_not_run_can_move_offline() -> None:
    found = plan(ask("offline", "persistent"), guest={"state": "shut off"})
    assert not found.refused
    assert found.channels == ()
    assert plan(ask("offline", "persistent"), guest={"state": "shut off", "snapshots": 1}).refused
    assert any("stays here" in item.text for item in plan(ask("offline", "persistent")).warnings)


def test_postcopy_of_a_paused_guest_is_refused() -> None:
    [refusal] = plan(ask("live", "postcopy"), guest={"state": "paused"}).refusals
    assert "post-copy migration is not supported with non-live or paused migration" in refusal.reason


def test_without_live_the_guest_stands_still_and_that_is_said() -> None:
    assert [item.feature for item in plan(ask()).warnings] == ["live"]


@pytest.mark.parametrize(("libvirt", "refused"), [(version(9), True), (version(10, 5), False)])
def test_virtiofs_needs_a_libvirt_that_asks_virtiofsd(libvirt: int, refused: bool) -> None:
    found = plan(ask("live"), source={"libvirt_version": libvirt}, guest={"virtiofs": 1})
    assert found.refused is refused
    assert any(item.feature == "virtiofs" for item in (*found.refusals, *found.warnings))


# -- storage -------------------------------------------------------------------------------------------------------

SHARED_DISK = DiskFacts(target="vdd", source="rbd:pool/x", kind="network", storage="shared")
UNKNOWN_DISK = DiskFacts(target="vde", source="/data/y.img")
CDROM = DiskFacts(target="sdb", device="cdrom", source="/iso", readonly=True, storage="local")


@pytest.mark.parametrize(
    ("request_", "disks", "refused", "warned"),
    [
        (ask("live"), (LOCAL_DISK,), True, False),
        (ask("live", "unsafe"), (LOCAL_DISK,), False, False),
        (ask("live", "copy-storage-all"), (LOCAL_DISK, CDROM), False, False),
        (ask("live", "copy-storage-all", migrate_disks=["vdd"]), (LOCAL_DISK, SHARED_DISK), True, False),
        (ask("live"), (SHARED_DISK, CDROM), False, False),
        (ask("live"), (UNKNOWN_DISK,), False, True),
        (ask("live"), (DiskFacts(target="vdf", source="/dev/vg/z", kind="block"),), False, False),
        (ask("live", "copy-storage-inc"), (LOCAL_DISK,), False, True),
        (ask("offline", "persistent"), (LOCAL_DISK,), False, True),
    ],
)
def test_storage_that_is_not_shared_is_refused_early(
    request_: MigrationRequest, disks: tuple[DiskFacts, ...], refused: bool, warned: bool
) -> None:
    state = "shut off" if "offline" in request_ else "running"
    found = plan(request_, guest={"disks": disks, "state": state})
    assert [item.feature for item in found.refusals] == ["storage"] * refused
    assert [item.feature for item in found.warnings] == ["storage"] * warned
    assert all("--copy-storage-all" in item.way_out and "--unsafe" in item.way_out for item in found.refusals)


def test_disks_that_cannot_be_copied_are_named() -> None:
    found = plan(ask("live", "copy-storage-all", migrate_disks=["vdz", "sdb"]), guest={"disks": (CDROM,)})
    assert [item.reason for item in found.refusals] == [
        "disk target vdz not found",
        "Cannot migrate empty or read-only disk sdb",
    ]


def test_each_copied_disk_has_a_channel() -> None:
    found = plan(ask("live", "copy-storage-all"), guest={"disks": (LOCAL_DISK, UNKNOWN_DISK, CDROM)})
    assert [(channel.role, channel.count) for channel in found.channels] == [("main", 1), ("storage", 2)]


# -- what the destination can run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guest", "words"),
    [
        ({"machine": "pc-q35-11.1"}, "machine type pc-q35-11.1 is unknown to QEMU 11.1.3 on beryl"),
        ({"arch": "s390x"}, "beryl runs no s390x guests"),
        ({"virt_type": "hvf"}, "beryl has no hvf"),
    ],
)
def test_what_the_destination_cannot_run(guest: dict[str, Any], words: str) -> None:
    [refusal] = plan(ask("live"), guest=guest).refusals
    assert words in refusal.reason
    assert not plan(ask("live"), guest={"machine": MACHINE}).refused


def test_an_incompatible_cpu_is_refused_with_the_missing_features() -> None:
    fit = GuestFit(cpu=Finding("no", "the CPU is incompatible"), missing_cpu_features=("avx512f", "pku"))
    [refusal] = plan(ask("live"), destination={"fit": fit}).refusals
    assert refusal.feature == "cpu"
    assert "avx512f, pku" in refusal.reason


def test_a_cpu_that_could_not_be_compared_is_a_warning() -> None:
    found = plan(ask("live"), destination={"fit": GuestFit(cpu=Finding("unknown", "no answer"))})
    assert not found.refused
    assert [item.feature for item in found.warnings] == ["cpu"]


def test_an_emulator_that_is_not_there_is_refused_unless_the_xml_may_name_another() -> None:
    missing = {"fit": GuestFit(emulator=Finding("no", "Cannot check QEMU binary"))}
    assert [item.feature for item in plan(ask("live"), destination=missing).refusals] == ["machine"]
    found = plan(ask("live", xml="/x.xml"), destination=missing)
    assert (found.refused, [item.feature for item in found.warnings]) == (False, ["machine"])


def test_too_little_memory_is_a_warning() -> None:
    assert [item.feature for item in plan(ask("live"), destination={"free_memory_bytes": 1 << 30}).warnings] == [
        "memory"
    ]
    enough = {"free_memory_bytes": 1 << 30, "available_memory_bytes": 13 << 30}
    assert plan(ask("live"), destination=enough).warnings == ()


def test_a_destination_called_localhost_is_a_warning_unless_an_address_is_given() -> None:
    facts = {"hostname": "localhost.localdomain"}
    assert [item.feature for item in plan(ask("live"), destination=facts).warnings] == ["address"]
    assert plan(ask("live", migrateuri="tcp://192.0.2.7"), destination=facts).warnings == ()


def test_qemus_own_word_about_its_capabilities_counts() -> None:
    guest = {"migration_capabilities": ("return-path", "postcopy-ram")}
    [refusal] = plan(ask("live", "parallel"), guest=guest).refusals
    assert "Migration option 'multifd' is not supported by QEMU binary" in refusal.reason


def test_a_capability_that_libvirt_insists_on_is_checked_too() -> None:
    found = plan(ask("live"), guest={"migration_capabilities": ("multifd",)})
    assert [item.feature for item in found.refusals] == ["return-path"]
    assert "'return-path'" in found.refusals[0].reason


# -- resume --------------------------------------------------------------------------------------------------------

BROKEN = {"postcopy_failed": True, "state": "paused", "job": "migration out", "snapshots": 4}
THERE = {"domains": (KnownDomain("opal", UUID, True),)}
RESUME = ("live", "postcopy", "postcopy-resume")


def test_a_resume_negotiates_nothing() -> None:
    found = plan(ask(*RESUME, postcopy_bandwidth=5), guest=BROKEN, destination={**THERE, **NO_USERFAULTFD})
    assert not found.refused
    on = {choice.feature for choice in found.choices if choice.on}
    assert on == {"live", "postcopy", "postcopy-resume"}
    assert [channel.role for channel in found.channels] == ["main"]
    assert found.suggestions == ()
    sent = settings_of(found, SOURCE, DESTINATION)
    assert sent["source"] == {"capabilities": [], "parameters": {"max-postcopy-bandwidth": 5 << 20}}


def test_a_resume_needs_something_to_resume() -> None:
    found = plan(ask(*RESUME))
    assert [item.feature for item in found.refusals] == ["postcopy-resume"] * 2
    assert "is not being migrated" in found.refusals[0].reason
    assert "does not run domain" in found.refusals[1].reason


def test_what_a_resume_ignores_is_said() -> None:
    found = plan(ask(*RESUME, "parallel", bandwidth=3), guest=BROKEN, destination=THERE)
    assert any("--parallel, --bandwidth" in item.text for item in found.warnings)


# -- suggestions, JSON ---------------------------------------------------------------------------------------------


def test_what_would_help_is_suggested_once() -> None:
    found = plan(ask("live"), guest={"persistent": True})
    assert [item.feature for item in found.suggestions] == ["multifd", "persistent", "postcopy"]
    given = plan(ask("live", "postcopy", "parallel", "persistent"), guest={"persistent": True})
    assert given.suggestions == ()
    assert "postcopy" not in [item.feature for item in plan(ask("live"), destination=NO_USERFAULTFD).suggestions]


def test_a_plan_survives_json() -> None:
    found = plan(
        ask("live", "copy-storage-all", threads=9, migrate_disks=["vdc"]),
        destination={"parallel_connections_max": 4},
        guest={"disks": (LOCAL_DISK,), "snapshots": 1},
    )
    back = msgspec.json.decode(msgspec.json.encode(found), type=Plan)
    assert back.request == found.request
    assert back.refusals == found.refusals
    assert back.channels == found.channels


def test_options_that_virsh_has_no_words_for_are_named() -> None:
    found = plan(ask("live", "fence", max_downtime=70))
    assert found.beyond_virsh == ("--max-downtime", "--fence")
    assert "--fence" not in found.virsh_line
