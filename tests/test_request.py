"""A request: each RULE broken and kept, the mapping cases that end in an error, and nothing but RequestError ever."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmig.cli.grammar import read_line
from virtmig.errors import RequestError
from virtmig.options import BY_NAME, OPTIONS, RULES, SPELLINGS, Kind, Option, Rule
from virtmig.request import MigrationRequest, check_values, read_file_values, tokens
from virtmig.verbs import VERB_BY_NAME

BASE = {"domain": "vm", "desturi": "qemu+ssh://host-b/system"}


def value_for(token: str) -> object:
    name, _, value = token.partition("=")
    row = BY_NAME[name]
    if name in ("migrateuri", "disks-uri"):
        return "unix:///run/m.sock" if value == "unix" else "tcp://10.0.0.2"
    if row.kind is Kind.BOOL:
        return True
    if row.kind is Kind.NUMBER:
        return max(row.minimum or 0, 1 if not row.power_of_two else 4096)
    if row.kind is Kind.LIST:
        return (value or (row.choices[-1] if row.choices else "vda"),)
    return value or (row.choices[0] if row.choices else f"some-{name}")


def build(wanted: list[str]) -> dict[str, object]:
    """The values that make these tokens true; `comp-methods=a` and `comp-methods=b` add up."""
    values: dict[str, object] = dict(BASE)
    for token in wanted:
        values[token.partition("=")[0]] = value_for(token)
    methods = tuple(dict.fromkeys(token.partition("=")[2] for token in wanted if token.startswith("comp-methods=")))
    return {**values, "comp-methods": methods} if methods else values


def kept(rule: Rule) -> dict[str, object]:
    """Values that meet the rule's conditions, as far as they can be met, and break no rule at all."""
    wanted = [token for token in rule.when if token not in rule.excludes] + list(rule.needs[:1])
    for _ in range(10):
        present = tokens(build(wanted))  # type: ignore[arg-type]
        broken = [r for r in RULES if present.issuperset(r.when) and r.needs and present.isdisjoint(r.needs)]
        if not broken:
            break
        wanted.append(broken[0].needs[0])
    return build(wanted)


def rule_name(rule: Rule) -> str:
    needs = f"-needs-{'-or-'.join(rule.needs)}" if rule.needs else ""
    return "+".join(rule.when) + needs + (f"-not-{'-'.join(rule.excludes)}" if rule.excludes else "")


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_broken_rule_is_said_with_a_way_out(rule: Rule) -> None:
    assert bool(rule.needs) != bool(rule.excludes), "a rule needs or excludes"
    with pytest.raises(RequestError) as refused:
        MigrationRequest(build([*rule.when, *rule.excludes]))  # type: ignore[arg-type]
    said = [(message, hint) for _, message, hint in refused.value.problems]
    assert (rule.message, rule.hint) in said
    assert rule.message in refused.value.message
    assert rule.hint
    assert rule.hint in refused.value.hint
    assert rule.source


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_kept_rule_is_silent(rule: Rule) -> None:
    values = kept(rule)
    request = MigrationRequest(values)  # type: ignore[arg-type]
    assert dict(request).keys() >= values.keys()


def test_no_rule_stands_twice() -> None:
    assert len({(rule.when, rule.needs, rule.excludes) for rule in RULES}) == len(RULES)


#: the error rows of the mapping cases M1 to M29: (options, part of the message). Words are libvirt's or QEMU's
ERROR_CASES = {
    "M5": ("--auto-converge-initial 30", "Turn auto convergence on to tune it"),
    "M5-increment": ("--auto-converge-increment 15", "Turn auto convergence on to tune it"),
    "M7": ("--parallel-connections 4", "Turn parallel migration on to tune it"),
    "M8-0": ("--parallel --parallel-connections 0", "Numeric value '0' for <parallel-connections>"),
    "M8-256": ("--parallel --parallel-connections 256", "Numeric value '256' for <parallel-connections>"),
    "M9": ("--parallel --parallel-connections -1", "Numeric value '-1' for <parallel-connections>"),
    "M11": ("--compressed --parallel", "No compression algorithm selected for parallel migration"),
    "M12-xbzrle": (
        "--parallel --comp-methods xbzrle",
        "Compression method 'xbzrle' isn't supported with parallel migration",
    ),
    "M12-mt": ("--parallel --comp-methods mt", "Compression method 'mt' isn't supported with parallel migration"),
    "M13-zstd": ("--comp-methods zstd", "Compression method 'zstd' is only supported with parallel migration"),
    "M13-zlib": ("--comp-methods zlib", "Compression method 'zlib' is only supported with parallel migration"),
    "M14": (
        "--parallel --comp-methods zlib,zstd",
        "Only one compression method could be specified with parallel compression",
    ),
    "M15": ("--comp-methods xbzrle,xbzrle", "Compression method 'xbzrle' is specified twice"),
    "M16": ("--comp-methods lz4", "Unsupported compression method 'lz4'"),
    "M17-zstd": ("--comp-zstd-level 3", "Turn zstd compression on to tune it"),
    "M17-zlib": ("--comp-zlib-level 3", "Turn zlib compression on to tune it"),
    "M17-xbzrle": ("--comp-xbzrle-cache 4096", "Turn xbzrle compression on to tune it"),
    "M17-mt-level": ("--comp-mt-level 3", "Turn multithread compression on to tune it"),
    "M17-mt-threads": ("--comp-mt-threads 3", "Turn multithread compression on to tune it"),
    "M17-mt-dthreads": ("--comp-mt-dthreads 3", "Turn multithread compression on to tune it"),
    "M17-other-method": ("--parallel --comp-methods zlib --comp-zstd-level 3", "Turn zstd compression on to tune it"),
    "M20": (
        "--postcopy-bandwidth 17592186044416",
        "migration parameter 'bandwidth.postcopy' must be less than 17592186044416",
    ),
    "M25": (
        "--tls --migrateuri unix:///run/m.sock",
        "Explicit destination hostname is required for TLS migration over UNIX socket",
    ),
    "M26": ("--zerocopy", "zero-copy is only available for parallel migration"),
    "M27-parallel": ("--p2p --tunnelled --parallel", "--tunnelled and --parallel are mutually exclusive"),
    "M27-postcopy": (
        "--live --p2p --tunnelled --postcopy",
        "post-copy is not supported with tunnelled migration",
    ),
    "M27-not-live": ("--postcopy", "post-copy migration is not supported with non-live or paused migration"),
    "M27-paused": (
        "--live --postcopy --suspend",
        "post-copy migration is not supported with non-live or paused migration",
    ),
}


#: what virsh itself refuses (virsh-domain.c cmdMigrate): options after `migrate test dst`, and virsh's words
VIRSH_CASES = {
    "--live --offline": "Options --live and --offline are mutually exclusive",
    "--live --timeout 5 --timeout-suspend --timeout-postcopy --postcopy": "Options --timeout-suspend and "
    "--timeout-postcopy are mutually exclusive",
    "--live --postcopy-after-precopy": "Option --postcopy is required by option --postcopy-after-precopy",
    "--live --timeout 5 --timeout-postcopy": "Option --postcopy is required by option --timeout-postcopy",
    "--persistent-xml f": "Option --persistent is required by option --persistent-xml",
    "--tls-destination h": "Option --tls is required by option --tls-destination",
    "--live --timeout-suspend": "migrate: Unexpected --timeout-* option without --timeout",
    "--live --timeout-postcopy --postcopy": "migrate: Unexpected --timeout-* option without --timeout",
    "--timeout 5": "migrate: Unexpected timeout for offline migration",
}

#: what libvirt's library and driver refuse, and what only virtmig has
DRIVER_CASES = {
    "--copy-storage-all --copy-storage-inc": "--copy-storage-all and --copy-storage-inc are mutually exclusive",
    "--copy-storage-synchronous-writes": "--copy-storage-synchronous-writes needs --copy-storage-all or",
    "--migrate-disks vda": "--migrate-disks needs --copy-storage-all or",
    "--migrate-disks-detect-zeroes vda": "--migrate-disks-detect-zeroes needs --copy-storage-all or",
    "--migrate-disks-target-zero vda": "--migrate-disks-target-zero needs --copy-storage-all or",
    "--disks-port 1 --disks-uri tcp://h": "Both port and URI requested for disk migration",
    "--offline": "offline migration must be specified with the persistent flag set",
    "--offline --persistent --copy-storage-all": "offline migration cannot handle non-shared storage",
    "--offline --persistent --copy-storage-inc": "offline migration cannot handle non-shared storage",
    "--offline --persistent --p2p --tunnelled": "tunnelled offline migration does not make sense",
    "--tunnelled": "cannot perform tunnelled migration without using peer2peer flag",
    "--p2p --tunnelled --migrateuri tcp://h": "migration URI is not supported by tunnelled migration",
    "--p2p --tunnelled --listen-address h": "listen address is not supported by tunnelled migration",
    "--p2p --tunnelled --disks-port 1": "disk port address is not supported by tunnelled migration",
    "--p2p --tunnelled --disks-uri tcp://h": "disks URI is ignored by tunnelled migration",
    "--p2p --tunnelled --copy-storage-all": "migration of non-shared storage is not supported with tunnelled",
    "--p2p --tunnelled --copy-storage-inc": "migration of non-shared storage is not supported with tunnelled",
    "--p2p --tunnelled --tls": "--tls and --tunnelled do not go together",
    "--p2p --direct": "--direct and --p2p are mutually exclusive",
    "--live --postcopy-resume": "resuming failed post-copy migration requires post-copy to be enabled",
    "--parallel --zerocopy --tls": "Zero copy only available for non-compressed non-TLS",
    "--parallel --zerocopy --comp-methods zstd": "Zero copy only available for non-compressed non-TLS",
    "--migrateuri unix:///s --listen-address h": "Usage of listen-address is forbidden when migration URI uses UNIX",
    "--migrateuri unix:///s --copy-storage-all": "NBD URI must be supplied when migration URI uses UNIX transport",
    "--migrateuri unix:///s --copy-storage-inc": "NBD URI must be supplied when migration URI uses UNIX transport",
    "--tls --disks-uri unix:///s": "NBD migration with TLS is not supported over UNIX socket",
    "--live --timeout 5 --timeout-abort --timeout-suspend": "Options --timeout-abort and --timeout-suspend are",
    "--live --postcopy --timeout 5 --timeout-abort --timeout-postcopy": "Options --timeout-abort and --timeout-p",
    "--live --timeout-abort": "migrate: Unexpected --timeout-* option without --timeout",
    "--live --postcopy-after-passes 2": "Option --postcopy is required by option --postcopy-after-passes",
    "--live --on-stall postcopy": "--on-stall postcopy needs --postcopy",
    "--live --postcopy-preempt on": "Postcopy preempt requires postcopy-ram",
    "--live --transport relay --migrateuri tcp://h": "--transport relay: the agents settle it between them, --mig",
    "--live --transport relay --listen-address h": "--transport relay: the agents settle it between them, --lis",
    "--live --transport relay --copy-storage-all --disks-uri tcp://h": "--transport relay: the agents settle it "
    "between them, --disks-uri",
    "--live --transport relay --copy-storage-all --disks-port 5": "--transport relay: the agents settle it between "
    "them, --disks-port",
    "--live --p2p --tunnelled --transport relay": "--tunnelled goes through libvirt's daemons, --transport relay",
    "--live --transport relay --tls": "--tls of QEMU hides from the agents which channel is which",
    "--live --transport relay --rdma-pin-all": "RDMA cannot go through a relay",
    "--offline --persistent --transport relay": "--offline moves no memory: there is nothing to relay",
    "--live --fence --postcopy": "--fence holds the destination paused until the source has stopped",
    "--offline --persistent --fence": "--fence is for running guests",
    "--json --verbose": "Options --json and --verbose are mutually exclusive",
    "--quiet --verbose": "Options --quiet and --verbose are mutually exclusive",
}


@pytest.mark.parametrize("line", [*VIRSH_CASES, *DRIVER_CASES])
def test_what_does_not_go_together(line: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(f"test dst {line}")
    expected = {**VIRSH_CASES, **DRIVER_CASES}[line]
    assert any(message.startswith(expected) for _, message, _ in refused.value.problems)


@pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed")
@pytest.mark.parametrize("line", VIRSH_CASES)
def test_virsh_refuses_it_in_the_same_words(line: str) -> None:
    words = ["virsh", "-c", "test:///default", "migrate", "test", "dst", "--p2p", *shlex.split(line)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=20, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {VIRSH_CASES[line]}\n"


def test_every_rule_has_a_case_written_by_hand() -> None:
    """The table cannot test itself: each rule's words are also in the cases above."""
    words = [*VIRSH_CASES.values(), *DRIVER_CASES.values(), *(message for _, message in ERROR_CASES.values())]
    assert [rule.message for rule in RULES if not any(rule.message.startswith(each) for each in words)] == []


@pytest.mark.parametrize("name", ERROR_CASES)
def test_mapping_case_is_refused_before_anything_starts(name: str) -> None:
    line, message = ERROR_CASES[name]
    with pytest.raises(RequestError) as refused:
        parse(f"vm qemu+ssh://host-b/system {line}")
    assert message in refused.value.message
    if name not in ("M15",):
        assert refused.value.hint


def parse(line: str) -> MigrationRequest:
    return MigrationRequest(read_line("migrate", OPTIONS, shlex.split(line)).values)  # type: ignore[arg-type]


def test_upstream_names_are_the_same_request() -> None:
    expected = parse("vm dst --parallel --parallel-connections 4")
    assert parse("vm dst --multifd --multifd-channels 4") == expected
    short = parse("vm dst --threads 4")
    assert {name: short[name] for name in short if name != "threads"} == dict(expected)
    assert "tunnelled" in parse("vm dst --p2p --tunneled")
    assert "plan" in parse("vm dst --dry-run")


def test_threads_and_connections_may_agree_but_not_differ() -> None:
    assert parse("vm dst --threads 4 --parallel-connections 4").number("parallel-connections") == 4
    with pytest.raises(RequestError, match="--threads and --parallel-connections name different numbers"):
        parse("vm dst --threads 4 --multifd-channels 5")


def test_threads_obey_the_rules_of_parallel() -> None:
    with pytest.raises(RequestError, match="--tunnelled and --parallel are mutually exclusive"):
        parse("vm dst --p2p --tunnelled --threads 2")


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(RequestError) as refused:
        MigrationRequest({"bandwith": 1, "timeout": "x", "live": True, "offline": True})
    messages = [message for _, message, _ in refused.value.problems]
    assert messages == [
        "command 'migrate' doesn't support option --bandwith",
        "Numeric value 'x' for <timeout> option is malformed or out of range",
        "command 'migrate' requires <domain> option",
        "command 'migrate' requires <desturi> option",
        "Options --live and --offline are mutually exclusive",
        "offline migration must be specified with the persistent flag set",
    ]
    assert "did you mean --bandwidth?" in refused.value.hint
    assert refused.value.message == "\n".join(messages)


def test_what_was_not_given_is_absent() -> None:
    request = MigrationRequest({**BASE, "live": True, "postcopy": False, "bandwidth": None})  # type: ignore[dict-item]
    assert list(request) == ["domain", "desturi", "live"]
    assert request.get("retries") is None
    assert request.number("retries") == 2
    assert request.number("bandwidth") is None
    assert request.text("on-stall") == "auto"
    assert request.words("comp-methods") == ()


def test_a_request_cannot_be_changed_but_replaced() -> None:
    request = parse("vm dst --threads 4 --live")
    with pytest.raises(TypeError):
        request["live"] = False  # type: ignore[index]
    single = request.replace(parallel=None, parallel_connections=None)
    assert "parallel" in request
    assert not {"parallel", "threads", "parallel-connections"} & set(single)
    assert request.replace(parallel_connections=2).number("parallel-connections") == 2
    assert hash(request) == hash(parse("vm dst --live --threads 4"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("host:4444", "unsupported scheme host in migration URI host:4444"),
        ("-c", "unsupported scheme -c in migration URI -c"),
        ("tcp:///", "missing host in migration URI: tcp:///"),
        ("tcp://:4444", "missing host in migration URI: tcp://:4444"),
        ("tcp://h:port", "invalid port number in migration URI: tcp://h:port"),
        ("tcp://h:70000", "invalid port number in migration URI: tcp://h:70000"),
        ("tcp://[::1", "malformed migration URI tcp://[::1"),
        ("unix://relative", "migration URI unix://relative names no absolute path"),
    ],
)
def test_migration_uris_that_cannot_be(uri: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        MigrationRequest({**BASE, "migrateuri": uri})
    assert message in refused.value.message
    assert refused.value.option == "migrateuri"


@pytest.mark.parametrize("uri", ["tcp://h", "tcp://[::1]:49152", "tcp:h", "tcp:h:49152", "rdma://h", "unix:///run/m"])
def test_migration_uris_that_can_be(uri: str) -> None:
    assert MigrationRequest({**BASE, "migrateuri": uri})["migrateuri"] == uri


def test_the_xbzrle_cache_is_a_power_of_two() -> None:
    with pytest.raises(RequestError, match="must be a power of two") as refused:
        parse("vm dst --compressed --comp-xbzrle-cache 5000")
    assert refused.value.hint == "for example 4096"


def test_disks_are_named_once() -> None:
    with pytest.raises(RequestError, match="'vda' is named twice in --migrate-disks"):
        parse("vm dst --copy-storage-all --migrate-disks vda,vda")


def test_files_are_read_whole(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "vm.xml"
    path.write_text("<domain>\u00fc</domain>")
    values = read_file_values(parse(f"vm dst --xml {path}"))
    assert values["xml"] == "<domain>\u00fc</domain>"
    assert values["domain"] == "vm"


@pytest.mark.parametrize("kind", ["absent", "folder", "too large", "not text"])
def test_files_that_cannot_be_read(tmp_path, kind: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "vm.xml"
    if kind == "folder":
        path.mkdir()
    elif kind == "too large":
        path.write_bytes(b" " * ((10 << 20) + 1))
    elif kind == "not text":
        path.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError) as refused:
        read_file_values(parse(f"vm dst --xml {path}"))
    assert refused.value.message.startswith(f"cannot read file '{path}'\nFailed to open file '{path}': ")
    assert refused.value.option == "xml"


def test_sibling_verbs_are_checked_against_their_own_table() -> None:
    verb = VERB_BY_NAME["migrate-setspeed"]
    checked = check_values(verb.name, verb.options, {"domain": "vm", "bandwidth": "10", "postcopy": False})
    assert checked == {"domain": "vm", "bandwidth": 10}
    with pytest.raises(RequestError) as refused:
        check_values(verb.name, verb.options, {"bandwidth": str(1 << 44), "live": True})
    assert [message for _, message, _ in refused.value.problems] == [
        "numerical overflow: bandwidth must be less than 8796093022208",
        "command 'migrate-setspeed' doesn't support option --live",
        "command 'migrate-setspeed' requires <domain> option",
    ]


# --- any combination -------------------------------------------------------------------------------------------------

WILD = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["tcp://h", "unix:///s", "tcp://[", "mt,zstd", "zstd", "xbzrle", "auto", "postcopy", "on", "fine"]),
    st.integers(-(1 << 70), 1 << 70),
    st.integers(-2, 300).map(str),
    st.lists(st.text(max_size=3), max_size=3),
    st.sampled_from([True, False, None, 1.5, b"x"]),
)


def plausible(row: Option) -> st.SearchStrategy[object]:
    if row.kind is Kind.BOOL:
        return st.just(True)
    if row.kind is Kind.NUMBER:
        powers = st.integers(12, 62).map(lambda bits: 1 << bits)
        return powers if row.power_of_two else st.integers(row.minimum or 0, row.maximum)
    if row.kind is Kind.CHOICE:
        return st.sampled_from(row.choices)
    if row.name == "comp-methods":
        return st.lists(st.sampled_from(row.choices), min_size=1, max_size=2, unique=True).map(tuple)
    if row.name in ("migrateuri", "disks-uri"):
        return st.sampled_from(["tcp://h", "tcp://[::1]:1", "rdma://h", "unix:///s s"])
    # libvirt takes no "/" in a domain's name
    word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0,/"), min_size=1, max_size=8)
    return st.lists(word, min_size=1, max_size=3, unique=True).map(tuple) if row.kind is Kind.LIST else word


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.one_of(st.sampled_from(sorted(SPELLINGS)), st.text(max_size=5)), WILD, max_size=8))
def test_anything_is_a_request_or_a_request_error(values: dict[str, object]) -> None:
    check_outcome({**BASE, **values})


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([f"--{name}" for name in SPELLINGS]), st.text(max_size=6)), max_size=10))
def test_any_line_is_a_request_or_a_request_error(words: list[str]) -> None:
    outcome = attempt(lambda: read_line("migrate", OPTIONS, words))
    if isinstance(outcome, RequestError):
        assert outcome.message.strip()
    else:
        check_outcome(outcome.values)


def attempt(make: Callable[[], Any]) -> Any:
    """What it makes, or the RequestError it raises; any other exception is the test's failure."""
    try:
        return make()
    except RequestError as error:
        return error


def check_outcome(values: dict[str, object]) -> None:
    outcome = attempt(lambda: MigrationRequest(values))  # type: ignore[arg-type]
    if isinstance(outcome, RequestError):
        assert outcome.message.strip()
        assert all(message for _, message, _ in outcome.problems)
    else:
        assert {"domain", "desturi"} <= set(outcome) <= set(BY_NAME)
        assert list(outcome.replace()) == list(outcome)


@st.composite
def valid_requests(draw: st.DrawFn) -> MigrationRequest:
    """Some options with plausible values, then what the rules need and without what they exclude."""
    rows = draw(st.lists(st.sampled_from(OPTIONS), max_size=10, unique=True))
    values: dict[str, object] = {row.name: draw(plausible(row)) for row in rows}
    for name in BASE:
        values.setdefault(name, draw(plausible(BY_NAME[name])))
    for _ in range(20):
        present = tokens(values)  # type: ignore[arg-type]
        for rule in RULES:
            if present.issuperset(rule.when) and (
                (rule.needs and present.isdisjoint(rule.needs)) or not present.isdisjoint(rule.excludes)
            ):
                name = rule.when[0].partition("=")[0] if rule.needs else rule.excludes[0].partition("=")[0]
                values.pop(name)
                break
        else:
            break
    values.pop("threads", None)
    return MigrationRequest(values)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(valid_requests())
def test_the_virsh_line_asks_for_the_same(request: MigrationRequest) -> None:
    words = shlex.split(request.virsh_line(connect="qemu:///system"))
    assert words[:4] == ["virsh", "-c", "qemu:///system", "migrate"]
    again = MigrationRequest(read_line("migrate", OPTIONS, words[4:]).values)  # type: ignore[arg-type]
    assert dict(again) == {name: request[name] for name in request if not BY_NAME[name].ours}


def test_the_virsh_line_of_awkward_names() -> None:
    request = MigrationRequest({"domain": "--live", "desturi": "qemu:///system", "dname": "a b"})
    assert request.virsh_line() == "virsh migrate --domain --live qemu:///system --dname 'a b'"
    assert dict(parse(request.virsh_line().removeprefix("virsh migrate "))) == dict(request)
