"""The facade without hosts: what its arguments become, what managers pass, how it is put in place and taken away."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import re
import sys
import threading
import types
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmig import known_bad, obstacles, plan
from virtmig.errors import (
    ChannelError,
    ConnectionFailed,
    DomainXmlError,
    MigrationAborted,
    PlanRefused,
    RequestError,
    VirtError,
)
from virtmig.integrations import libvirt_errors, migrate_to_uri3
from virtmig.integrations.migrate_to_uri3 import Settings, _with_files, install, installed, uninstall, wrap
from virtmig.options import OPTIONS, RULES, Kind, Option
from virtmig.progress import Outcome, Status, Whereabouts
from virtmig.request import MigrationRequest, Value
from virtmig.virt import facade
from virtmig.virt.connection import open_connection
from virtmig.virt.facade import ARGUMENTS, METHODS, MigrateCalled, NotOurs, read_options
from virtmig.virt.parameters import migrate_call

XML = "<domain><name>web01</name></domain>"
P2P = int(libvirt.VIR_MIGRATE_PEER2PEER)


def called(method: str, *given: Any, **named: Any) -> MigrateCalled:
    return MigrateCalled(method, None, given, named, getattr(libvirt.virDomain, method))


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_the_bindings(method: str) -> None:
    parameters = list(inspect.signature(getattr(libvirt.virDomain, method)).parameters.values())[1:]
    empty = inspect.Parameter.empty
    assert ARGUMENTS[method] == tuple((p.name, ... if p.default is empty else p.default) for p in parameters)


def test_every_migrate_method_of_the_binding_is_ours() -> None:
    starts = {name for name in dir(libvirt.virDomain) if name.startswith("migrate")}
    assert {name for name in starts if "Get" not in name and "Set" not in name} - {"migrateStartPostCopy"} == set(
        METHODS
    )


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (called("migrateToURI2", "qemu+tls://b/system", "tcp://b", XML, P2P | 1, "web02", 9),
         {"p2p": True, "live": True, "migrateuri": "tcp://b", "xml": XML, "dname": "web02", "bandwidth": 9}),
        (called("migrateToURI", "qemu+tls://b/system", flags=P2P), {"p2p": True}),
        (called("migrate2", object(), None, 1, uri="tcp://b"), {"live": True, "migrateuri": "tcp://b"}),
        (called("migrate", object(), 9, "web02"), {"live": True, "persistent": True, "dname": "web02"}),
        (called("migrate3", object(), {"compression": "zstd", "migrate_disks": []}, 1),
         {"live": True, "comp-methods": ("zstd",)}),
    ],
)  # fmt: skip
def test_older_calls_are_read_as_the_newest(call: MigrateCalled, expected: dict[str, Value]) -> None:
    assert read_options(call) == expected


@pytest.mark.parametrize(
    "call",
    [
        called("migrateToURI3", "u", {}, 1),
        called("migrateToURI3", "u", {}, P2P | 1 << 29),
        called("migrateToURI3", "u", {}, -1),
        called("migrateToURI3", "u", {}, "1"),
        called("migrateToURI3", "u", {}, True),
        called("migrateToURI3", "u", [], P2P),
        called("migrateToURI3", "u", {"foo.bar": 1}, P2P),
        called("migrateToURI3", "u", {b"bandwidth": 1}, P2P),
        called("migrateToURI3", "u", {"bandwidth": True}, P2P),
        called("migrateToURI3", "u", {"bandwidth": 1.0}, P2P),
        called("migrateToURI3", "u", {"migrate_uri": ["tcp://b"]}, P2P),
        called("migrateToURI3", "u", {"migrate_disks": [1]}, P2P),
        called("migrateToURI3", "u"),
        called("migrateToURI3", "u", {}, P2P, 1),
        called("migrateToURI3", "u", {}, dconnuri="u"),
        called("migrate3", object(), {}, P2P),
        called("migrate3", object(), {}, 4),
    ],
)
def test_what_the_table_has_no_words_for_is_left_to_libvirt(call: MigrateCalled) -> None:
    with pytest.raises(NotOurs):
        read_options(call)


# -- the round trip --------------------------------------------------------------------------------------------------

_SAID = [row for row in OPTIONS if (row.flag or row.param) and row.since <= libvirt.getVersion()]
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0/,"), min_size=1, max_size=12)


def _values(row: Option) -> st.SearchStrategy[Any]:
    match row.kind:
        case Kind.BOOL:
            return st.just(True)
        case Kind.NUMBER if row.power_of_two:
            return st.integers(12, 62).map(lambda bits: 1 << bits)
        case Kind.NUMBER:
            return st.integers(row.minimum or 0, row.maximum)
        case Kind.LIST if row.choices:
            return st.lists(st.sampled_from(row.choices), min_size=1, unique=True).map(tuple)
        case Kind.LIST:
            return st.lists(_TEXT, min_size=1, max_size=4, unique=True).map(tuple)
        case Kind.FILE:
            return st.just(XML)
    if row.name == "migrateuri":
        return st.sampled_from(("tcp://b", "unix:///run/m.sock", "rdma://b:1"))
    return _TEXT


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    """Any set of options -> flags and parameters -> the same options; rules are the request's affair, not the map's."""
    rows = data.draw(st.lists(st.sampled_from(_SAID), unique_by=lambda row: row.name))
    asked: dict[str, Value] = {row.name: data.draw(_values(row), label=row.name) for row in rows}
    asked.pop("tunnelled" if "p2p" not in asked else "", None)
    flags = 0
    params: dict[str, Any] = {}
    with contextlib.ExitStack() as files:
        for name, value in _with_files(asked, files).items():  # one at a time: no rule gets in between
            call = migrate_call({name: value})  # type: ignore[arg-type]
            flags |= call.flags
            params |= call.params
    back = (
        called("migrateToURI3", "u", params, flags) if "p2p" in asked else called("migrate3", object(), params, flags)
    )
    assert read_options(back) == asked


# -- what managers pass ----------------------------------------------------------------------------------------------

_DISKS = {"migrate_disks": ["vda", "vdb"]}
_KUBE = {"migrate_uri": "unix:///var/run/kubevirt/migrationproxy/5f-49152-source.sock", "destination_xml": XML,
         "persistent_xml": XML, "destination_name": "default_vm"}  # fmt: skip
_KUBE_URI = "qemu+unix:///session?socket=/var/run/kubevirt/migrationproxy/5f-source.sock"

#: (manager and case, flags, params, option names that must come of it); Nova: nova/virt/libvirt/guest.py Guest.migrate
#: and driver.py _live_migration_operation; VDSM: lib/vdsm/virt/migration.py _migration_params and
#: _calculate_migration_flags; KubeVirt: pkg/virt-launcher/virtwrap/live-migration-source.go generateMigrationFlags and
#: generateMigrationParams (its Go binding writes the parameters under the same names)
MANAGERS: list[tuple[str, int, dict[str, Any], str]] = [
    ("nova: shared storage", 27, {"bandwidth": 0, "destination_xml": XML, "persistent_xml": XML, "migrate_uri": "tcp://b"},
     "live p2p persistent undefinesource migrateuri xml persistent-xml bandwidth"),
    ("nova: block migration", 155, {"bandwidth": 0, "destination_xml": XML, "persistent_xml": XML, **_DISKS},
     "live p2p persistent undefinesource copy-storage-inc xml migrate-disks persistent-xml bandwidth"),
    ("nova: parallel", 27 + 131072, {"bandwidth": 0, "parallel.connections": 4},
     "live p2p persistent undefinesource parallel parallel-connections bandwidth"),
    ("nova: postcopy permitted", 27 + 32768, {"bandwidth": 0}, "live p2p persistent undefinesource postcopy bandwidth"),
    ("nova: native TLS", 27 + 65536, {"bandwidth": 0}, "live p2p persistent undefinesource tls bandwidth"),
    ("nova: tunnelled", 27 + 4, {"bandwidth": 0}, "live p2p tunnelled persistent undefinesource bandwidth"),
    ("vdsm: minimal downtime", 8203, {"bandwidth": 52, "migrate_uri": "tcp://10.0.0.2", "destination_xml": XML,
                                      "graphics_uri": "spice://10.0.0.2"},
     "live p2p persistent auto-converge migrateuri graphicsuri xml bandwidth"),
    ("vdsm: encrypted", 8203 + 65536, {"bandwidth": 52, "migrate_uri": "tcp://10.0.0.2", "tls.destination": "b.example",
                                       "destination_xml": XML},
     "live p2p persistent auto-converge migrateuri xml tls bandwidth tls-destination"),
    ("vdsm: very large VMs", 8203 + 131072 + 1048576, {"bandwidth": 600, "parallel.connections": 9,
                                                       "migrate_uri": "tcp://10.0.0.2", "destination_xml": XML},
     "live p2p persistent auto-converge zerocopy migrateuri xml parallel parallel-connections bandwidth"),
    ("vdsm: postcopy in the schedule", 8203 + 32768, {"migrate_uri": "tcp://10.0.0.2", "destination_xml": XML},
     "live p2p persistent auto-converge postcopy migrateuri xml"),
    ("vdsm: legacy", 8203 + 4 + 4096 + 2048, {"bandwidth": 52, "destination_xml": XML},
     "live p2p tunnelled persistent compressed auto-converge abort-on-error xml bandwidth"),
    ("kubevirt: normal", 131083, {**_KUBE, "parallel.connections": 8},
     "live p2p persistent migrateuri dname xml persistent-xml parallel parallel-connections"),
    ("kubevirt: dedicated CPUs", 11, {**_KUBE, "bandwidth": 64},
     "live p2p persistent migrateuri dname xml persistent-xml bandwidth"),
    ("kubevirt: volumes", 11 + 128, {**_KUBE, **_DISKS, "disks_uri": "unix:///var/run/kubevirt/5f-49153-source.sock"},
     "live p2p persistent copy-storage-inc migrateuri dname xml migrate-disks disks-uri persistent-xml"),
    ("kubevirt: volumes, zeroes", 11 + 128, {**_KUBE, **_DISKS, "migrate_disks_detect_zeroes": ["vda", "vdb"],
                                             "disks_uri": "unix:///var/run/kubevirt/5f-49153-source.sock"},
     "live p2p persistent copy-storage-inc migrateuri dname xml migrate-disks migrate-disks-detect-zeroes disks-uri "
     "persistent-xml"),
    ("kubevirt: policy", 131083 + 8192 + 512 + 2048, {**_KUBE, "parallel.connections": 8, "compression": ["zstd"]},
     "live p2p persistent unsafe compressed auto-converge migrateuri dname xml comp-methods persistent-xml parallel "
     "parallel-connections"),
    ("kubevirt: paused guest", 11 + 32, _KUBE, "live p2p persistent suspend migrateuri dname xml persistent-xml"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "params", "names"), [row[1:] for row in MANAGERS], ids=[row[0] for row in MANAGERS])
def test_what_managers_pass_is_a_request(flags: int, params: dict[str, Any], names: str) -> None:
    uri = _KUBE_URI if "destination_name" in params else "qemu+tcp://b/system"
    options = read_options(called("migrateToURI3", uri, params, flags))
    with contextlib.ExitStack() as files:
        asked = _with_files(options, files) | {"domain": "web01", "desturi": uri}
        request = migrate_to_uri3._request(asked, {"transport": "relay", "fence": True})
        assert [n for n in request if n not in ("domain", "desturi", "on-stall", "retries", "transport", "fence")] == (
            names.split()
        )
        back = {row.name for row in OPTIONS if row.since > libvirt.getVersion()} & set(request)
        if not back:
            again = migrate_call(request)
            assert again.flags == flags
            lists = {key: [value] if key == "compression" and isinstance(value, str) else value
                     for key, value in params.items()}  # fmt: skip
            assert again.params == lists
        assert request.text("on-stall") == "continue"
        assert ("fence" in request) == ("postcopy" not in request)
        assert ("transport" in request) == (not {"migrateuri", "tunnelled", "tls"} & set(request))


# -- settings --------------------------------------------------------------------------------------------------------


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate_to_uri3, "SETTINGS_FILE", tmp_path / "none.toml")
    monkeypatch.delenv(migrate_to_uri3.SETTINGS_VARIABLE, raising=False)
    assert Settings.read() == Settings()
    (tmp_path / "none.toml").write_text("on-stall = 'postcopy'\nmax-downtime-ceiling = 900\nfence = false\n")
    assert Settings.read().defaults == {"on-stall": "postcopy", "max-downtime-ceiling": 900, "fence": False}
    other = tmp_path / "other.toml"
    other.write_text("timeout-abort = true\ntimeout = 60\n")
    monkeypatch.setenv(migrate_to_uri3.SETTINGS_VARIABLE, str(other))
    assert Settings.read().defaults == {"timeout-abort": True, "timeout": 60}
    for text, words in (
        ("live = true", "live is no setting"),
        ("bandwidth = 3", "bandwidth is no setting"),
        ("transport = 'carrier pigeon'", "'carrier pigeon' is not a value of --transport"),
        ("max-downtime = 'x'", "malformed"),
        ("fence = 1", "takes no value"),
        ("fence", "cannot read"),
    ):
        other.write_text(text)
        with pytest.raises(RequestError, match=words) as caught:
            Settings.read()
        assert str(other) in str(caught.value)
    other.unlink()
    with pytest.raises(RequestError, match="cannot read"):
        Settings.read()


def test_defaults_give_way_to_what_was_asked_and_need_each_other() -> None:
    asked = {"domain": "d", "desturi": "u", "live": True}
    timeout = {"timeout-abort": True, "timeout": 60}
    assert {"timeout", "timeout-abort"} <= set(migrate_to_uri3._request(asked, timeout))
    fence_and = migrate_to_uri3._request(asked | {"postcopy": True}, timeout | {"fence": True, "on-stall": "postcopy"})
    assert "fence" not in fence_and
    assert (fence_and.text("on-stall"), fence_and.number("timeout")) == ("postcopy", 60)
    dead = migrate_to_uri3._request({"domain": "d", "desturi": "u"}, timeout)  # not live: no timeout there
    assert "timeout" not in dead


# -- errors ----------------------------------------------------------------------------------------------------------


def test_errors_carry_libvirts_code_its_words_and_every_reason() -> None:
    reasons = [("storage", "Migration without shared storage is unsafe: vda", "add --copy-storage-all"),
               ("hosts", "b has no kvm for x86_64", "load it")]  # fmt: skip
    error: Any = libvirt_errors.as_libvirt(PlanRefused(reasons), "web01")
    assert isinstance(error, libvirt.libvirtError)
    assert (error.get_error_code(), error.get_error_domain()) == (libvirt.VIR_ERR_MIGRATE_UNSAFE, libvirt.VIR_FROM_QEMU)
    assert error.get_error_level() == libvirt.VIR_ERR_ERROR
    assert str(error) == error.get_error_message() == (
        "Unsafe migration: Migration without shared storage is unsafe: vda; b has no kvm for x86_64 (add "
        "--copy-storage-all; or load it; nothing was started, web01 is where it was)"
    )  # fmt: skip
    error = libvirt_errors.as_libvirt(VirtError("x", code=38, domain=7), "web01")
    assert (error.get_error_code(), error.get_error_domain(), str(error)) == (38, 7, "x")


def test_an_error_is_not_what_the_thread_heard_last() -> None:
    with pytest.raises(libvirt.libvirtError):
        libvirt.open("nonsense:///")
    error: Any = libvirt_errors.as_libvirt(PlanRefused([("x", "domain is not running", "")]), "web01")
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert str(error).startswith("Requested operation is not valid: domain is not running")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (Status.FAILED, 38, 38),
        (Status.FAILED, -1, libvirt.VIR_ERR_OPERATION_FAILED),
        (Status.ABORTED, -1, libvirt.VIR_ERR_OPERATION_ABORTED),
        (Status.INTERRUPTED, 9, 9),
    ],
)
def test_outcomes(status: Status, code: int, expected: int) -> None:
    outcome = Outcome(
        status=status, guest=Whereabouts.SOURCE, domain="w", source="a", destination="b", sentence="w still runs on a",
        elapsed_s=1.0, error="broken", error_code=code, error_domain=10,
    )  # fmt: skip
    error: Any = libvirt_errors.of_outcome(outcome)
    assert (error.get_error_code(), error.get_error_domain()) == (expected, 10)
    assert "broken" in str(error)
    assert str(error).endswith("(w still runs on a)")


def _sentences(module: types.ModuleType, filled_in: str) -> list[str]:
    """Every string of a module's source, with `filled_in` for each value."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(str(part.value) if isinstance(part, ast.Constant) else filled_in for part in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_named_refusal_is_one_that_the_plan_or_a_rule_can_give() -> None:
    modules = (plan, obstacles, known_bad)
    plans = [text for module in modules for value in ("X", "migration out") for text in _sentences(module, value)]
    with pytest.raises(RequestError) as nameless:
        MigrationRequest({"domain": "d", "desturi": "u", "dname": ""})
    rules = [*(rule.message for rule in RULES), str(nameless.value)]
    for rows, said in ((libvirt_errors.REFUSALS, plans), (libvirt_errors.HARMFUL, rules)):
        for row in rows:
            assert any(re.match(row.words, text) for text in said), row
            assert row.name.numbers[0] > 0
            assert row.source


@pytest.mark.parametrize(
    ("reason", "code", "domain"),
    [
        ("domain has active block job", 55, 10),
        ("cannot migrate domain with 2 snapshots", 55, 10),
        ("multifd excludes postcopy: QEMU before 10.1 cannot do multifd and postcopy together", 1, 10),
        ("Migration option 'multifd' is not supported by QEMU binary or libvirt: it needs QEMU 4.0", 74, 10),
        ("machine type pc-q35-11.0 is unknown to QEMU 7.2 on b", 67, 10),
        ("the guest's CPU does not fit b: it lacks avx512f", 91, 31),
        ("another job is already running for domain 'web01': migration out", 55, 10),
        ("another job is already running for domain 'web01': save", 68, 10),
        ("libvirt has no word for this", 84, 10),
    ],
)
def test_refusals_have_libvirts_code(reason: str, code: int, domain: int) -> None:
    assert libvirt_errors.refused(reason).numbers == (code, domain)


# -- in place and away -----------------------------------------------------------------------------------------------


def _methods() -> dict[str, Any]:
    return {method: getattr(libvirt.virDomain, method) for method in METHODS}


def test_installations_nest_and_the_binding_comes_back() -> None:
    before = _methods()
    assert uninstall() is False
    install()
    ours = _methods()
    assert all(ours[method] is not before[method] for method in METHODS)
    install()
    assert _methods() == ours
    assert uninstall() is True
    assert _methods() == ours
    assert uninstall() is True
    assert _methods() == before
    assert facade._originals == facade._placed == {}


def test_signatures_and_documentation_are_the_bindings() -> None:
    before = {method: (inspect.signature(found), found.__doc__) for method, found in _methods().items()}
    with installed():
        assert {m: (inspect.signature(found), found.__doc__) for m, found in _methods().items()} == before


def test_many_threads_install_and_uninstall() -> None:
    before = _methods()
    barrier = threading.Barrier(8)

    def turn() -> None:
        barrier.wait()
        for _ in range(200):
            with installed():
                assert libvirt.virDomain.migrateToURI3 is not before["migrateToURI3"]

    threads = [threading.Thread(target=turn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _methods() == before


def test_somebody_elses_patch_over_ours_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    binding = libvirt.virDomain.migrateToURI3
    monkeypatch.setattr(libvirt.virDomain, "migrateToURI3", binding)  # brings the binding's back at the end
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    install()
    ours = libvirt.virDomain.migrateToURI3

    def theirs(self: Any, *given: Any, **named: Any) -> Any:
        heard.append("theirs")
        return ours(self, *given, **named)

    libvirt.virDomain.migrateToURI3 = theirs
    uninstall()
    assert libvirt.virDomain.migrateToURI3 is theirs
    for turn in range(2):  # once over our retired method, once over a second installation of ours
        with pytest.raises(libvirt.libvirtError) as caught:
            domain.migrateToURI3("qemu://b/system", {}, 3)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED
        assert heard == ["theirs"] * (turn + 1)
        install() if turn == 0 else uninstall()
    assert libvirt.virDomain.migrateToURI3 is theirs
    connection.close()
    facade._placed.clear()
    facade._originals.clear()


def test_virtmigs_own_calls_go_to_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(migrate_to_uri3, "_Facade", lambda settings: lambda call: heard.append(call.method))
    module = types.ModuleType("virtmig.somewhere")
    exec("def call(domain):\n    return domain.migrateToURI3('qemu://b/system', {}, 3)", module.__dict__)
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    with installed():
        domain.migrateToURI3("qemu://b/system", {}, 3)
        assert heard == ["migrateToURI3"]
        with pytest.raises(libvirt.libvirtError):
            module.call(domain)
    assert heard == ["migrateToURI3"]
    connection.close()


def test_a_connection_is_opened_again_with_the_callers_credentials(tmp_path: Path) -> None:
    """VDSM's libvirt asks for a password."""
    file = tmp_path / "node.xml"
    file.write_text("<node><auth><user password='secret'>vdsm</user></auth></node>")
    uri = f"test://{file}"
    before = (libvirt.open, libvirt.openAuth)

    def answer(credentials: list[Any], _: Any) -> int:
        for credential in credentials:
            credential[4] = "vdsm" if credential[0] == libvirt.VIR_CRED_AUTHNAME else "secret"
        return 0

    with installed():
        with pytest.raises(ConnectionFailed):
            open_connection(uri)
        auth = [[libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_PASSPHRASE], answer, None]
        callers = libvirt.openAuth(uri, auth, 0)
        again = open_connection(callers.getURI())
        assert again.getType() == "TEST"
        with pytest.raises(libvirt.libvirtError):
            libvirt.open(uri)  # of another caller: nobody's password is lent to them
        again.close()
        callers.close()
    assert (libvirt.open, libvirt.openAuth) == before
    assert facade._credentials == {}
    with pytest.raises(ConnectionFailed):
        open_connection(uri)


def test_a_wrapped_domain_is_the_domain_but_for_its_migrate_methods() -> None:
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    wrapped = wrap(domain)
    assert isinstance(wrapped, libvirt.virDomain)
    assert (wrapped.name(), wrapped.UUIDString()) == (domain.name(), domain.UUIDString())
    assert wrapped.connect() is connection
    assert wrapped._o is domain._o
    assert set(dir(domain)) <= set(dir(wrapped))
    assert inspect.signature(wrapped.migrate3) == inspect.signature(domain.migrate3)
    wrapped.note = 1
    assert domain.note == 1
    with pytest.raises(AttributeError):
        wrapped.no_such_thing  # noqa: B018
    snapshot = wrapped.snapshotCreateXML("<domainsnapshot/>")
    assert snapshot.getDomain() is domain
    connection.close()


def test_a_managed_migration_to_nowhere_is_an_error_and_no_crash() -> None:
    connection = libvirt.open("test:///default")
    for method in ("migrate3", "migrate2", "migrate"):
        given = (None, {}) if method == "migrate3" else (None,)
        with pytest.raises(libvirt.libvirtError, match="invalid connection pointer in virDomainMigrate") as caught:
            getattr(wrap(connection.lookupByName("test")), method)(*given)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_INVALID_CONN
    connection.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("a defect"), libvirt.VIR_ERR_INTERNAL_ERROR),
        (ConnectionFailed("no", uri="qemu:///system", code=45), libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED),  # the binding's
        (ConnectionFailed("no", uri="qemu://b/system", code=38), libvirt.VIR_ERR_SYSTEM_ERROR),
        (ChannelError("no agent"), libvirt.VIR_ERR_OPERATION_FAILED),
        (DomainXmlError("no such element"), libvirt.VIR_ERR_CONFIG_UNSUPPORTED),
        (MigrationAborted("stopped"), libvirt.VIR_ERR_OPERATION_ABORTED),
    ],
)
def test_whatever_goes_wrong_inside_is_a_libvirt_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(migrate_to_uri3, "migrate", fail)
    connection = libvirt.open("test:///default")
    call = MigrateCalled(
        "migrateToURI3",
        connection.lookupByName("test"),
        ("qemu://b/system", {}, 3),
        {},
        libvirt.virDomain.migrateToURI3,
    )
    request = MigrationRequest({"domain": "test", "desturi": "qemu://b/system"})
    with pytest.raises(libvirt.libvirtError) as caught:
        migrate_to_uri3._carry_out(call, request, "qemu:///system")
    assert caught.value.get_error_code() == code
    connection.close()


def test_green_threads_are_left_to_libvirt(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    patcher = types.ModuleType("eventlet.patcher")
    patcher.is_monkey_patched = lambda what: what == "thread"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    with pytest.raises(NotOurs):
        migrate_to_uri3._refuse_green_threads()
    assert "OS_NOVA_DISABLE_EVENTLET_PATCHING" in caplog.text


def test_xml_is_in_memory_only_and_gone_afterwards() -> None:
    with contextlib.ExitStack() as files:
        path = str(_with_files({"xml": XML}, files)["xml"])
        assert Path(path).read_text() == Path(path).read_text() == XML
        assert os.stat(path).st_nlink == 0
    assert not os.path.exists(path)


def test_the_request_is_the_tables() -> None:
    """Nothing here names an option that the table has not."""
    assert {row.name for row in migrate_to_uri3.DEFAULTS} >= {"transport", "fence", "agent", "on-stall", "timeout"}
    assert not any(row.flag or row.param for row in migrate_to_uri3.DEFAULTS)
    MigrationRequest({"domain": "d", "desturi": "u", **migrate_to_uri3._CALLER_DECIDES})
