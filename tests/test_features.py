"""The feature table, the mapping to QEMU (cases M1 to M29), and the known-bad versions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.hosts import ask, plan
from virtmig.errors import RequestError
from virtmig.facts import version
from virtmig.features import (
    BY_FEATURE,
    CAPABILITY_ORDER,
    FEATURES,
    PARAMETER_ORDER,
    UNLIMITED_BYTES_PER_S,
    QemuSettings,
    capabilities_of,
    conflicts,
    features_asked,
    qemu_settings,
)
from virtmig.known_bad import KNOWN_BAD, Versions, known_bad
from virtmig.obstacles import Refusal
from virtmig.options import BY_NAME
from virtmig.request import MigrationRequest, tokens

NEW = capabilities_of(version(11, 1), version(12, 8))
OLD = capabilities_of(version(7, 2), version(9))


def settings(request: MigrationRequest, side: Any = "source", here: Any = NEW, peer: Any = NEW) -> QemuSettings:
    return qemu_settings(request, side, here=here, peer=peer)


# -- the table -----------------------------------------------------------------------------------------------------


def test_every_name_in_the_table_exists() -> None:
    for row in FEATURES:
        assert set(row.needs) <= set(BY_FEATURE), row.name
        for exclusion in row.excludes:
            assert exclusion.other in BY_FEATURE or exclusion.other.startswith("guest:"), row.name
        for token in row.when:
            assert token.partition("=")[0] in BY_NAME, row.name
        assert row.qemu == "" or row.qemu in CAPABILITY_ORDER, row.name
        assert row.source, row.name


#: one request for every row that a person can ask for
ASKED: dict[str, MigrationRequest] = {
    "live": ask("live"),
    "p2p": ask("p2p"),
    "offline": ask("offline", "persistent"),
    "tunnelled": ask("tunnelled", "p2p"),
    "multifd": ask("parallel"),
    "postcopy": ask("live", "postcopy"),
    "postcopy-preempt": ask("live", "postcopy", postcopy_preempt="on"),
    "postcopy-resume": ask("live", "postcopy", "postcopy-resume"),
    "xbzrle": ask("compressed"),
    "compress": ask(comp_methods=["mt"]),
    "multifd-zlib": ask("parallel", comp_methods=["zlib"]),
    "multifd-zstd": ask("parallel", comp_methods=["zstd"]),
    "zero-copy-send": ask("parallel", "zerocopy"),
    "auto-converge": ask("auto-converge"),
    "tls": ask("tls"),
    "storage-copy": ask("copy-storage-inc"),
    "synchronous-writes": ask("copy-storage-all", "copy-storage-synchronous-writes"),
    "rdma": ask(migrateuri="rdma://beryl"),
    "rdma-pin-all": ask("rdma-pin-all", migrateuri="rdma://beryl"),
    "fence": ask("live", "fence"),
}
BY_ITSELF = {"return-path", "switchover-ack", "pause-before-switchover", "late-block-activate"}
NEVER = {"mapped-ram"}


def test_every_feature_is_exercised_below() -> None:
    assert set(ASKED) | BY_ITSELF | NEVER == set(BY_FEATURE)


@pytest.mark.parametrize("feature", ASKED)
def test_what_is_asked_for_is_on(feature: str) -> None:
    request = ASKED[feature]
    assert feature in features_asked(request)
    qemu = version(9) if feature == "compress" else version(11, 1)
    choice = plan(request, both={"qemu_version": qemu}, guest={"hard_limit_bytes": 17 << 30}).choice(feature)
    assert choice.on is True
    assert choice.reason


@pytest.mark.parametrize("feature", sorted(set(ASKED) - {"live"}))
def test_what_is_not_asked_for_is_off_and_says_why(feature: str) -> None:
    choice = plan(ask("live")).choice(feature)
    assert choice.on is False
    assert choice.reason


@pytest.mark.parametrize("feature", sorted(BY_ITSELF))
def test_what_libvirt_does_by_itself_is_on(feature: str) -> None:
    assert plan(ask("live")).choice(feature).on is True
    assert plan(ask("offline", "persistent"), guest={"state": "shut off"}).choice(feature).on is False


@pytest.mark.parametrize("feature", sorted(NEVER))
def test_what_only_files_have_is_never_chosen(feature: str) -> None:
    for request in ASKED.values():
        assert plan(request).choice(feature).on is False


@pytest.mark.parametrize(
    ("feature", "host", "request_"),
    [
        ("multifd", {"qemu_version": version(3, 1)}, ask("live", "parallel")),
        ("postcopy", {"libvirt_version": version(1, 3)}, ask("live", "postcopy")),
        ("multifd-zstd", {"libvirt_version": version(9, 3)}, ask("live", "parallel", comp_methods=["zstd"])),
        ("multifd-zlib", {"libvirt_version": version(9, 3)}, ask("live", "parallel", comp_methods=["zlib"])),
        ("compress", {"qemu_version": version(9, 1)}, ask("live", comp_methods=["mt"])),
        ("tls", {"qemu_version": version(2, 6)}, ask("live", "tls")),
        ("synchronous-writes", {"libvirt_version": version(7)}, ASKED["synchronous-writes"]),
        ("postcopy-resume", {"libvirt_version": version(8, 4)}, ASKED["postcopy-resume"]),
    ],
)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_host_that_is_too_old_or_too_new_is_refused(
    feature: str, host: dict[str, int], request_: MigrationRequest, side: str
) -> None:
    other = {"qemu_version": version(9)} if feature == "compress" else {}
    label = {"source": "amber", "destination": "beryl"}[side]
    refused = plan(request_, both=other, **{side: host}).refusals
    assert [item for item in refused if item.feature == feature and f"{label} has " in item.reason]
    assert not [item for item in plan(request_, both=other).refusals if f"{label} has " in item.reason]


def test_zero_copy_concerns_the_source_alone() -> None:
    request = ask("live", "parallel", "zerocopy")
    old = {"qemu_version": version(7)}
    assert [item.feature for item in plan(request, source=old).refusals] == ["zero-copy-send"]
    assert not plan(request, destination=old).refused


@pytest.mark.parametrize(
    ("on", "qemu", "pairs"),
    [
        ({"multifd", "postcopy"}, version(10, 1), []),
        ({"multifd", "postcopy"}, version(10, 0, 9), [("multifd", "postcopy")]),
        ({"multifd", "xbzrle"}, version(11, 1), [("multifd", "xbzrle")]),
        ({"multifd", "compress"}, version(8), [("multifd", "compress")]),
        ({"multifd", "rdma"}, version(11, 1), [("multifd", "rdma")]),
        ({"postcopy", "guest:vfio"}, version(11, 1), [("postcopy", "guest:vfio")]),
        ({"postcopy", "fence"}, version(11, 1), [("postcopy", "fence")]),
        ({"postcopy-preempt", "compress"}, version(8), [("postcopy-preempt", "compress")]),
        ({"tunnelled", "multifd"}, version(11, 1), [("tunnelled", "multifd")]),
        ({"tunnelled", "postcopy"}, version(11, 1), [("tunnelled", "postcopy")]),
        ({"tunnelled", "storage-copy"}, version(11, 1), [("tunnelled", "storage-copy")]),
        ({"tunnelled", "tls"}, version(11, 1), [("tunnelled", "tls")]),
        ({"tunnelled", "return-path"}, version(11, 1), [("return-path", "tunnelled")]),
        ({"zero-copy-send", "tls"}, version(11, 1), [("zero-copy-send", "tls")]),
        ({"zero-copy-send", "multifd-zlib"}, version(11, 1), [("zero-copy-send", "multifd-zlib")]),
        ({"zero-copy-send", "multifd-zstd"}, version(11, 1), [("zero-copy-send", "multifd-zstd")]),
        ({"zero-copy-send", "xbzrle"}, version(11, 1), [("zero-copy-send", "xbzrle")]),
        ({"zero-copy-send", "compress"}, version(8), [("zero-copy-send", "compress")]),
        ({"mapped-ram", "postcopy"}, version(11, 1), [("mapped-ram", "postcopy")]),
        ({"mapped-ram", "xbzrle"}, version(11, 1), [("mapped-ram", "xbzrle")]),
        ({"mapped-ram", "tls"}, version(11, 1), [("mapped-ram", "tls")]),
    ],
)
@pytest.mark.parametrize("older_side", [0, 1])
def test_exclusions(on: set[str], qemu: int, pairs: list[tuple[str, str]], older_side: int) -> None:
    versions = [version(99), version(99)]
    versions[older_side] = qemu
    assert [(row.name, exclusion.other) for row, exclusion in conflicts(on, *versions)] == pairs


def test_every_exclusion_of_the_table_is_in_the_test_above() -> None:
    [mark] = [mark for mark in test_exclusions.pytestmark if mark.args[0] == ("on", "qemu", "pairs")]
    tested = {pair for case in mark.args[1] for pair in case[2]}
    assert tested == {(row.name, exclusion.other) for row in FEATURES for exclusion in row.excludes}


def test_capabilities_follow_both_versions() -> None:
    assert "postcopy-preempt" in NEW
    assert "postcopy-preempt" not in capabilities_of(version(7), version(12, 8))
    assert "postcopy-preempt" not in OLD  # QEMU 7.2 has it, libvirt 9.0 does not know it
    assert "compress" in OLD
    assert "compress" not in NEW


# -- M1 to M29 -----------------------------------------------------------------------------------------------------

#: case -> (request, side, capabilities that are on, parameters of the request); both ends new
MAPPED: dict[str, tuple[MigrationRequest, str, tuple[str, ...], dict[str, Any]]] = {
    "M1": (
        ask("live", "postcopy", "parallel"), "source",
        ("postcopy-ram", "pause-before-switchover", "multifd", "return-path", "postcopy-preempt", "switchover-ack"), {},
    ),
    "M2": (
        ask("live", "postcopy", "parallel"), "destination",
        ("postcopy-ram", "late-block-activate", "multifd", "return-path", "postcopy-preempt", "switchover-ack"), {},
    ),
    "M3": (ask("p2p", "tunnelled"), "source", ("pause-before-switchover",), {}),
    "M4": (
        ask("auto-converge", auto_converge_initial=30, auto_converge_increment=15), "source",
        ("auto-converge", "pause-before-switchover", "return-path", "switchover-ack"),
        {"cpu-throttle-initial": 30, "cpu-throttle-increment": 15},
    ),
    "M4 destination": (
        ask("auto-converge", auto_converge_initial=30), "destination",
        ("late-block-activate", "return-path", "switchover-ack"), {},
    ),
    "M6": (
        ask("parallel", parallel_connections=4), "source",
        ("pause-before-switchover", "multifd", "return-path", "switchover-ack"), {"multifd-channels": 4},
    ),
    "M6 destination": (
        ask("parallel", parallel_connections=4), "destination",
        ("late-block-activate", "multifd", "return-path", "switchover-ack"), {"multifd-channels": 4},
    ),
    "M10": (
        ask("compressed"), "source", ("xbzrle", "pause-before-switchover", "return-path", "switchover-ack"), {},
    ),
    "M18": (
        ask("parallel", comp_methods=["zstd"], comp_zstd_level=3), "source",
        ("pause-before-switchover", "multifd", "return-path", "switchover-ack"),
        {"multifd-compression": "zstd", "multifd-zstd-level": 3},
    ),
    "M19": (
        ask("live", "postcopy", postcopy_bandwidth=10), "destination",
        ("postcopy-ram", "late-block-activate", "return-path", "postcopy-preempt", "switchover-ack"),
        {"max-postcopy-bandwidth": 10485760},
    ),
    "M21": (
        ask(bandwidth=10), "source", ("pause-before-switchover", "return-path", "switchover-ack"),
        {"max-bandwidth": 10485760},
    ),
    "M21 destination": (
        ask(bandwidth=10), "destination", ("late-block-activate", "return-path", "switchover-ack"), {},
    ),
    "M22": (
        ask("live", "postcopy", "postcopy-resume", "auto-converge", bandwidth=7, postcopy_bandwidth=20), "source",
        (), {"max-postcopy-bandwidth": 20971520},
    ),
    "zero-copy": (
        ask("parallel", "zerocopy"), "source",
        ("pause-before-switchover", "multifd", "return-path", "zero-copy-send", "switchover-ack"), {},
    ),
    "rdma": (
        ask("rdma-pin-all", migrateuri="rdma://beryl"), "destination",
        ("rdma-pin-all", "late-block-activate", "return-path", "switchover-ack"), {},
    ),
    "tls": (
        ask("tls", tls_destination="f27-1.virt"), "source",
        ("pause-before-switchover", "return-path", "switchover-ack"),
        {"tls-creds": "objlibvirt_migrate_tls0", "tls-hostname": "f27-1.virt"},
    ),
    "tls destination": (
        ask("tls", tls_destination="f27-1.virt"), "destination",
        ("late-block-activate", "return-path", "switchover-ack"),
        {"tls-creds": "objlibvirt_migrate_tls0", "tls-hostname": ""},
    ),
    "switchover bandwidth": (
        ask(available_switchover_bandwidth=3), "source",
        ("pause-before-switchover", "return-path", "switchover-ack"), {"avail-switchover-bandwidth": 3145728},
    ),
    "xbzrle cache": (
        ask(comp_methods=["xbzrle"], comp_xbzrle_cache=8192), "destination",
        ("xbzrle", "late-block-activate", "return-path", "switchover-ack"), {"xbzrle-cache-size": 8192},
    ),
    "offline": (ask("offline", "persistent"), "source", (), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPPED)
def test_what_qemu_is_told(case: str) -> None:
    request, side, capabilities, parameters = MAPPED[case]
    found = settings(request, side)
    assert found.capabilities == capabilities
    assert list(found.parameters.items()) == list(parameters.items())  # the order of keys is libvirt's


#: case -> (options, libvirt's words); the request check says them before anything is opened
REFUSED: dict[str, tuple[tuple[tuple[str, ...], dict[str, Any]], str]] = {
    "M5": (((), {"auto_converge_initial": 30}), "Turn auto convergence on to tune it"),
    "M7": (((), {"parallel_connections": 4}), "Turn parallel migration on to tune it"),
    "M8 none": ((("parallel",), {"parallel_connections": 0}), "malformed or out of range"),
    "M8 many": ((("parallel",), {"parallel_connections": 256}), "malformed or out of range"),
    "M9": ((("parallel",), {"parallel_connections": -1}), "malformed or out of range"),
    "M11": ((("compressed", "parallel"), {}), "No compression algorithm selected for parallel migration"),
    "M12": (
        (("parallel",), {"comp_methods": ["xbzrle"]}),
        "Compression method 'xbzrle' isn't supported with parallel migration",
    ),
    "M13": (((), {"comp_methods": ["zstd"]}), "Compression method 'zstd' is only supported with parallel migration"),
    "M14": (
        (("parallel",), {"comp_methods": ["zlib", "zstd"]}),
        "Only one compression method could be specified with parallel compression",
    ),
    "M15": (((), {"comp_methods": ["xbzrle", "xbzrle"]}), "Compression method 'xbzrle' is specified twice"),
    "M16": (((), {"comp_methods": ["lz4"]}), "Unsupported compression method 'lz4'"),
    "M17": ((("parallel",), {"comp_zstd_level": 3}), "Turn zstd compression on to tune it"),
    "M20": (
        (("live", "postcopy"), {"postcopy_bandwidth": 17592186044416}),
        "migration parameter 'bandwidth.postcopy' must be less than 17592186044416",
    ),
    "M25": (
        (("tls",), {"migrateuri": "unix:///run/m.sock"}),
        "Explicit destination hostname is required for TLS migration over UNIX socket",
    ),
    "M26": ((("zerocopy",), {}), "zero-copy is only available for parallel migration"),
    "M27 parallel": ((("tunnelled", "p2p", "parallel"), {}), "mutually exclusive"),
    "M27 postcopy": (
        (("tunnelled", "p2p", "live", "postcopy"), {}), "post-copy is not supported with tunnelled migration",
    ),
    "M27 not live": ((("postcopy",), {}), "post-copy migration is not supported with non-live or paused migration"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_any_connection(case: str) -> None:
    (options, values), words = REFUSED[case]
    with pytest.raises(RequestError) as refused:
        ask(*options, **values)
    assert words in refused.value.message


#: case -> (what the hosts lack, libvirt's words); said by the plan
PLANNED: dict[str, tuple[dict[str, Any], str]] = {
    "M23": ({"tls_files": {"status": "no", "evidence": "/etc/pki/qemu/ca-cert.pem is missing"}}, "no certificates"),
    "M24": ({"qemu_version": version(2, 6)}, "TLS migration is not supported with this QEMU binary"),
}


@pytest.mark.parametrize("case", PLANNED)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_what_the_plan_refuses(case: str, side: str) -> None:
    import msgspec

    from virtmig.facts import Finding

    lacks, words = PLANNED[case]
    facts = {
        name: msgspec.convert(value, Finding) if isinstance(value, dict) else value for name, value in lacks.items()
    }
    found = plan(ask("live", "tls"), **{side: facts})
    assert [item for item in found.refusals if item.feature == "tls" and words in item.reason]


#: cases that no mapping can show, and where they are
ELSEWHERE = {
    "M28": "what libvirt restores when a job ends is libvirt's doing: seen live, tests/live/",
    "M29": "about virDomainSave, which is no migration between hosts",
}


def test_all_cases_are_somewhere() -> None:
    named = {case.partition(" ")[0] for case in (*MAPPED, *REFUSED, *PLANNED, *ELSEWHERE)}
    assert {f"M{number}" for number in range(1, 30)} <= named


def test_a_plain_run_sends_the_same_as_libvirt_9_does() -> None:
    assert settings(ask("live")).sent() == {
        "tls-creds": "", "tls-hostname": "", "max-bandwidth": 9223372036853727232,
    }  # fmt: skip
    assert UNLIMITED_BYTES_PER_S == 9223372036853727232
    assert settings(ask("live"), "destination").sent() == {"tls-creds": "", "tls-hostname": ""}
    assert settings(ask("live", bandwidth=10)).sent()["max-bandwidth"] == 10485760
    assert settings(ask("live", bandwidth=0)).sent()["max-bandwidth"] == UNLIMITED_BYTES_PER_S


def test_an_optional_capability_needs_both_ends_and_one_that_is_always_on_only_its_own() -> None:
    request = ask("live", "postcopy")
    assert settings(request, here=NEW, peer=OLD).capabilities == (
        "postcopy-ram", "pause-before-switchover", "return-path",
    )  # fmt: skip
    assert "pause-before-switchover" not in settings(request, here=frozenset(), peer=NEW).capabilities
    assert settings(request, here=frozenset(), peer=NEW).required == ("postcopy-ram", "return-path")


def test_every_key_that_is_sent_has_a_place_in_libvirts_order() -> None:
    for request in (*ASKED.values(), *(case[0] for case in MAPPED.values())):
        for side in ("source", "destination"):
            found = settings(request, side)
            assert set(found.capabilities) <= set(CAPABILITY_ORDER)
            assert set(found.sent()) <= set(PARAMETER_ORDER)


# -- known-bad versions --------------------------------------------------------------------------------------------

#: row -> (versions it must match, versions just outside that it must not)
HIT_AND_MISS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "multifd-postcopy-loses-guest": (
        {"source_qemu": version(7, 2, 22), "destination_qemu": version(10, 1)},
        {"source_qemu": version(8), "destination_qemu": version(8)},
    ),
    "multifd-postcopy-refused": (
        {"source_qemu": version(10, 1), "destination_qemu": version(10, 0, 9)},
        {"source_qemu": version(10, 1), "destination_qemu": version(10, 1)},
    ),
    "resume-crashes-destination": (
        {"destination_libvirt": version(11, 3)},
        {"source_libvirt": version(11, 3), "destination_libvirt": version(11, 4)},
    ),
    "postcopy-cannot-be-resumed": (
        {"destination_libvirt": version(11, 2)}, {"destination_libvirt": version(11, 1, 9)},
    ),
    "resume-reported-failed": ({"source_libvirt": version(10, 9)}, {"source_libvirt": version(11)}),
    "recovery-must-not-break": ({"source_qemu": version(8, 1)}, {"source_qemu": version(8, 2)}),
    "nbd-broken": ({"destination_libvirt": version(8, 7)}, {"destination_libvirt": version(8, 8)}),
    "tunnelled-storage-goes-on": ({"source_libvirt": version(9)}, {"source_libvirt": version(9, 1)}),
    "restart-during-migration-crashes": ({"source_libvirt": version(8, 8)}, {"source_libvirt": version(8, 9)}),
    "root-squash-nfs": ({"destination_libvirt": version(10, 1)}, {"destination_libvirt": version(10, 4)}),
    "shutdown-during-migration-crashes": ({"source_libvirt": version(10, 4)}, {"source_libvirt": version(10, 5)}),
    "vmx-features-refused": (
        {"source_libvirt": version(9, 9), "destination_libvirt": version(10, 1)},
        {"source_libvirt": version(9, 9), "destination_libvirt": version(10, 2)},
    ),
    "ht-refused": (
        {"destination_libvirt": version(11, 9), "source_qemu": version(9, 2), "destination_qemu": version(10)},
        {"destination_libvirt": version(11, 9), "source_qemu": version(10), "destination_qemu": version(10)},
    ),
    "xmldesc-times-out": ({"destination_libvirt": version(11, 4)}, {"destination_libvirt": version(11, 5)}),
    "swtpm-race": ({"source_libvirt": version(11, 10)}, {"source_libvirt": version(12)}),
    "tls-source-crash": ({"source_libvirt": version(11, 5)}, {"destination_libvirt": version(11, 5)}),
    "multifd-tls-close": (
        {"source_qemu": version(7, 1), "destination_qemu": version(9, 2)},
        {"source_qemu": version(9, 2), "destination_qemu": version(9, 2)},
    ),
    "frequent-iterations": ({"source_qemu": version(11)}, {"source_qemu": version(10, 2)}),
    "paused-twice": ({"source_qemu": version(9, 2)}, {"source_qemu": version(10), "destination_qemu": version(7, 2)}),
    "maybe-paused-twice": ({"source_qemu": version(7, 2)}, {"source_qemu": version(10)}),
    "frozen-daemon-doubles-guest": ({"source_libvirt": version(12, 8)}, {}),
}  # fmt: skip


def test_every_known_bad_row_is_tested() -> None:
    assert set(HIT_AND_MISS) == {row.name for row in KNOWN_BAD}
    assert all(row.source and row.way_out and row.consequence for row in KNOWN_BAD)


@pytest.mark.parametrize("row", KNOWN_BAD, ids=lambda row: row.name)
def test_a_known_bad_row_hits_its_versions_and_no_others(row: Any) -> None:
    hit, miss = HIT_AND_MISS[row.name]
    present = frozenset(row.when)
    assert row in known_bad(present, Versions(**hit))
    assert row not in known_bad(present, Versions(**miss))
    assert row not in known_bad(present, Versions())  # an unknown version is not held against anyone
    for token in row.when:
        assert row not in known_bad(present - {token}, Versions(**hit))
    for token in row.unless:
        assert row not in known_bad(present | {token}, Versions(**hit))


#: row -> a request and facts that reach it through the plan
REACHED: dict[str, tuple[MigrationRequest, dict[str, Any]]] = {
    "multifd-postcopy-loses-guest": (ask("live", "postcopy", "parallel"), {"source": {"qemu_version": version(7, 2)}}),
    "multifd-postcopy-refused": (ask("live", "postcopy", "parallel"), {"source": {"qemu_version": version(9, 2)}}),
    "resume-crashes-destination": (
        ask("live", "postcopy", "postcopy-resume"), {"destination": {"libvirt_version": version(11, 2)}},
    ),
    "nbd-broken": (ask("live", "copy-storage-all"), {"destination": {"libvirt_version": version(8, 7)}}),
    "swtpm-race": (ask("live"), {"both": {"libvirt_version": version(11, 9)}, "guest": {"tpm": True}}),
    "tls-source-crash": (ask("live", "tls"), {"source": {"libvirt_version": version(11, 5)}}),
    "vmx-features-refused": (
        ask("live"),
        {"source": {"libvirt_version": version(9)}, "destination": {"libvirt_version": version(10)}},
    ),
    "frequent-iterations": (ask("live", "postcopy", "postcopy-after-precopy"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REACHED)
def test_the_plan_says_what_is_known(name: str) -> None:
    [row] = [row for row in KNOWN_BAD if row.name == name]
    request, facts = REACHED[name]
    found = plan(request, **facts)
    where: Any = {"refuse": found.refusals, "warn": found.warnings, "note": found.notes}[row.kind]
    said = [item.reason if isinstance(item, Refusal) else item.text for item in where]
    assert [text for text in said if row.consequence in text and row.source in text]


def test_tokens_of_known_bad_rows_are_words_that_a_plan_knows() -> None:
    guest_words = {"guest:tpm", "guest:kvm", "guest:file-disks", "guest:arrived-paused", "guest:maybe-arrived-paused"}
    for row in KNOWN_BAD:
        for token in (*row.when, *row.unless):
            assert token in BY_FEATURE or token in guest_words or token in BY_NAME, token
    assert "live" in tokens(ask("live"))
