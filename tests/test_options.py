"""One test per row of THE TABLE: every spelling, its place, its range, and the libvirt name it becomes.

The second half asks the installed virsh and the installed libvirt binding whether the table lacks anything.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import libvirt
import pytest

from virtmig.cli.grammar import read_line
from virtmig.errors import RequestError
from virtmig.options import (
    BY_NAME,
    OPTIONS,
    OUR_OPTIONS,
    POSITIONAL,
    RULES,
    SPELLINGS,
    VIRSH_OPTIONS,
    Kind,
    Option,
)
from virtmig.request import check_value

BASE = ["vm", "qemu+ssh://host-b/system"]

#: values that need a form of their own; any other text row takes any text
TEXTS = {
    "migrateuri": "tcp://10.0.0.2:49152",
    "disks-uri": "tcp://10.0.0.2:49153",
    "migrate-disks": "vda,vdb",
    "comp-methods": "zstd",
}

#: flags of the binding that no option of `virsh migrate` sets
FLAGS_WITHOUT_OPTION: dict[str, str] = {}

#: typed parameters of the binding that no option of `virsh migrate` sets
PARAMS_WITHOUT_OPTION: dict[str, str] = {}


def text_for(row: Option) -> str:
    if row.kind is Kind.NUMBER:
        low = row.minimum or 0
        return str(max(low, 8192)) if row.power_of_two else str(low + 1)
    if row.kind is Kind.CHOICE:
        return row.choices[-1]
    return TEXTS.get(row.name, f"some-{row.name}")


def by_name(row: Option) -> str:
    return row.name


virsh_needed = pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed")
rows = pytest.mark.parametrize("row", OPTIONS, ids=by_name)


@rows
def test_every_spelling_gives_the_value_to_the_row(row: Option) -> None:
    base = [] if row.required else BASE
    needed = {"domain": ["--desturi", "x"], "desturi": ["--domain", "x"]}.get(row.name, [])
    for spelling in (row.name, *row.aliases):
        if row.kind is Kind.BOOL:
            assert read_line("migrate", OPTIONS, [*BASE, f"--{spelling}"]).values[row.name] is True
            with pytest.raises(RequestError, match=f"invalid '=' after option --{row.name}$"):
                read_line("migrate", OPTIONS, [*BASE, f"--{spelling}=yes"])
            continue
        text = text_for(row)
        for words in ([f"--{spelling}", text], [f"--{spelling}={text}"]):
            assert read_line("migrate", OPTIONS, [*base, *words, *needed]).values[row.name] == text
            assert read_line("migrate", OPTIONS, [*words, *base, *needed]).values[row.name] == text
        with pytest.raises(RequestError, match=rf"expected syntax: --{row.name} {row.metavar}$"):
            read_line("migrate", OPTIONS, [*base, *needed, f"--{spelling}"])


@rows
def test_given_twice_is_refused(row: Option) -> None:
    words = [f"--{row.name}"] if row.kind is Kind.BOOL else [f"--{row.name}", text_for(row)]
    with pytest.raises(RequestError, match=f"^option --{row.name} already seen$"):
        read_line("migrate", OPTIONS, [*words, *words])
    for alias in row.aliases:
        with pytest.raises(RequestError, match=f"^option --{row.name} already seen$"):
            read_line("migrate", OPTIONS, [*words, f"--{alias}", *words[1:]])


@pytest.mark.parametrize("row", POSITIONAL, ids=by_name)
def test_positional_rows_take_data_in_table_order(row: Option) -> None:
    place = POSITIONAL.index(row)
    words = [text_for(each) for each in POSITIONAL[: place + 1]] + ([BASE[1]] if place == 0 else [])
    assert read_line("migrate", OPTIONS, words).values[row.name] == text_for(row)
    others = [word for each in POSITIONAL[2:place] for word in (f"--{each.name}", text_for(each))]
    if place >= 2:  # those given by name are skipped, wherever they stand
        line = read_line("migrate", OPTIONS, [*others, *BASE, text_for(row)])
        assert line.values[row.name] == text_for(row)


@pytest.mark.parametrize("row", [row for row in OPTIONS if not row.positional], ids=by_name)
def test_other_rows_never_take_data(row: Option) -> None:
    line = read_line("migrate", OPTIONS, [text_for(each) for each in POSITIONAL])
    assert row.name not in line.values
    with pytest.raises(RequestError, match=r"^unexpected data 'more'$"):
        read_line("migrate", OPTIONS, [*(text_for(each) for each in POSITIONAL), "more"])


@rows
def test_names_are_never_shortened(row: Option) -> None:
    for spelling in (row.name, *row.aliases):
        short = spelling[:-1]
        if short not in SPELLINGS and short != "help":
            with pytest.raises(RequestError, match=f"^command 'migrate' doesn't support option --{short}$") as refused:
                read_line("migrate", OPTIONS, [*BASE, f"--{short}"])
            assert refused.value.hint


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.kind is Kind.NUMBER], ids=by_name)
def test_range_edges(row: Option) -> None:
    assert row.minimum is not None
    assert row.maximum is not None
    assert check_value(row, str(row.minimum)) == row.minimum
    assert check_value(row, str(row.maximum)) == row.maximum
    for beyond in (row.minimum - 1, row.maximum + 1):
        with pytest.raises(RequestError) as refused:
            check_value(row, str(beyond))
        assert refused.value.option == row.name
        assert row.name in refused.value.message or row.param in refused.value.message
        assert f"{row.minimum} to {row.maximum}" in refused.value.hint
        assert row.unit in refused.value.hint


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.kind is Kind.NUMBER], ids=by_name)
@pytest.mark.parametrize("text", ["", "a", "1a", "5 ", "0x10", "1_0", "1e3", "--1", "1.5", "٣", "1" * 30, "9" * 6000])
def test_what_is_no_number_in_base_ten(row: Option, text: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_value(row, text)
    assert refused.value.message == f"Numeric value '{text}' for <{row.name}> option is malformed or out of range"
    assert refused.value.option == row.name


def test_numbers_are_read_as_virsh_reads_them() -> None:
    assert check_value(BY_NAME["bandwidth"], "010") == 10
    assert check_value(BY_NAME["bandwidth"], " +5") == 5
    assert check_value(BY_NAME["bandwidth"], "0" * 40 + "7") == 7


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.choices], ids=by_name)
def test_choices(row: Option) -> None:
    for choice in row.choices:
        assert check_value(row, choice) == ((choice,) if row.kind is Kind.LIST else choice)
    with pytest.raises(RequestError) as refused:
        check_value(row, "lz4")
    assert refused.value.option == row.name
    assert all(choice in refused.value.hint for choice in row.choices)
    if row.default:
        assert row.default in row.choices


@pytest.mark.parametrize(
    "row", [row for row in OPTIONS if row.kind in (Kind.STRING, Kind.FILE, Kind.LIST)], ids=by_name
)
def test_text_that_libvirt_cannot_be_given(row: Option) -> None:
    with pytest.raises(RequestError, match="Option argument is empty"):
        check_value(row, "")
    for bad in ("a\0b", "\udcff", True, 1.5, None, {"a": 1}):
        with pytest.raises(RequestError) as refused:
            check_value(row, bad)
        assert refused.value.option == row.name


@rows
def test_the_row_explains_itself(row: Option) -> None:
    assert row.help
    assert not row.help.endswith(".")
    assert bool(row.group) == row.ours, "our rows stand in a help group of their own, virsh's rows in none"
    assert row.positional or not row.required
    assert row.kind is not Kind.BOOL or not (row.positional or row.default or row.unit)


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.flag], ids=by_name)
def test_the_flag_is_libvirts(row: Option) -> None:
    assert re.fullmatch(r"VIR_MIGRATE_[A-Z0-9_]+", row.flag)
    if not hasattr(libvirt, row.flag):
        assert row.since > libvirt.getVersion(), "this libvirt should have the flag"


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.param], ids=by_name)
def test_the_parameter_is_libvirts(row: Option) -> None:
    if row.param not in binding_params():
        assert row.since > libvirt.getVersion(), "this libvirt should have the parameter"


def binding_params() -> set[str]:
    return {getattr(libvirt, name) for name in dir(libvirt) if name.startswith("VIR_MIGRATE_PARAM_")}


def test_the_binding_has_no_flag_that_the_table_lacks() -> None:
    flags = {
        name for name in dir(libvirt) if name.startswith("VIR_MIGRATE_") and isinstance(getattr(libvirt, name), int)
    }
    assert len(flags) > 15
    assert flags - {row.flag for row in OPTIONS} == set(FLAGS_WITHOUT_OPTION)


def test_the_binding_has_no_parameter_that_the_table_lacks() -> None:
    assert len(binding_params()) > 15
    assert binding_params() - {row.param for row in OPTIONS} == set(PARAMS_WITHOUT_OPTION)


def test_names_and_aliases_are_unique() -> None:
    spellings = [spelling for row in OPTIONS for spelling in (row.name, *row.aliases)]
    assert sorted(spellings) == sorted(set(spellings))
    assert set(spellings) == set(SPELLINGS)


def test_every_token_of_every_rule_is_a_row() -> None:
    for rule in RULES:
        for token in (*rule.when, *rule.needs, *rule.excludes):
            name, _, value = token.partition("=")
            assert name in BY_NAME, token
            assert not value or not BY_NAME[name].choices or value in BY_NAME[name].choices, token


def virsh(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["virsh", "-c", "test:///default", *words],
        capture_output=True,
        text=True,
        timeout=20,
        env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def virsh_options(command: str) -> dict[str, str]:
    """What `virsh help COMMAND` lists, in its order: name -> bool, number or string."""
    listed = virsh("help", command).stdout.partition("  OPTIONS\n")[2]
    found = re.findall(r"^    \[?--([a-z0-9-]+)\]?(?: <(number|string)>)?  ", listed + " ", re.MULTILINE)
    return {name: kind or "bool" for name, kind in found}


@virsh_needed
def test_virsh_has_no_option_that_the_table_lacks() -> None:
    listed = virsh_options("migrate")
    assert len(listed) >= 49
    assert [name for name in listed if name not in BY_NAME] == []
    assert list(listed) == [row.name for row in VIRSH_OPTIONS if row.name in listed], "virsh's order"
    kinds = {Kind.BOOL: "bool", Kind.NUMBER: "number"}
    assert listed == {name: kinds.get(BY_NAME[name].kind, "string") for name in listed}


@virsh_needed
def test_rows_that_virsh_does_not_list_are_newer_or_ours() -> None:
    listed = virsh_options("migrate")
    major, minor, release = map(int, virsh("--version").stdout.strip().split("."))
    installed = major * 1_000_000 + minor * 1_000 + release
    for row in VIRSH_OPTIONS:
        assert (row.name in listed) == (row.since <= installed), row.name
    assert not [row.name for row in OUR_OPTIONS if row.name in listed], "virsh has taken one of our names"


@virsh_needed
def test_virsh_fills_the_positional_rows_in_our_order() -> None:
    """virsh -d 1 says which row each word went to, on standard output (9.0) or standard error (12.8)."""
    words = [text_for(row) for row in POSITIONAL]
    while True:
        said = virsh("-d", "1", "migrate", *words, "--help")
        refused = re.search(r"^error: unexpected data '(.*)'$", said.stderr, re.MULTILINE)
        if refused is None:
            break
        words.pop()  # virsh takes data for fewer rows since 10.x; those it takes must be ours
    order = re.findall(r"^migrate: ([a-z-]+)\(optdata\): ", said.stdout + said.stderr, re.MULTILINE)
    assert order == [row.name for row in POSITIONAL][: len(words)]
    assert len(order) >= 10
