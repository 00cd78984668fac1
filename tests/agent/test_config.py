"""agent.toml: the sample tells the truth, and every mistake is refused with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import virtmig.agent
from virtmig.agent.config import (
    UNIX_PATH_LONGEST_BYTES,
    Address,
    AgentConfig,
    default_file,
    field_names,
    load_config,
    parse_config,
    runtime_folder,
)
from virtmig.errors import RequestError

SAMPLE = Path(virtmig.agent.__file__).parent / "systemd" / "agent.toml"
#: a key or a table that is commented out; prose has a space behind the #
_COMMENTED = re.compile(r"^#(?=[a-z\[])", re.MULTILINE)


def test_the_sample_changes_nothing_as_it_is() -> None:
    assert load_config(SAMPLE) == AgentConfig()


def test_every_value_in_the_sample_is_the_default() -> None:
    assert parse_config(_COMMENTED.sub("", SAMPLE.read_text())) == AgentConfig()


def test_every_key_stands_in_the_sample_with_words_before_it() -> None:
    table, found, explained = "", set(), True
    for line in _COMMENTED.sub("", SAMPLE.read_text()).splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            table = f"{header[1]}."
        elif assignment := re.match(r"(\w+) =", line):
            assert explained, f"{assignment[1]} has no words before it"
            found.add(table + assignment[1])
        elif line.startswith("# "):
            explained = True
        elif not line and table == "":
            explained = False
    rows = {name for name in field_names() if name.startswith("allow.")}
    assert found == set(field_names()) - rows
    for name in rows:
        assert re.search(rf"^#   {name.removeprefix('allow.')} = ", SAMPLE.read_text(), re.MULTILINE), name


def test_the_example_rows_of_the_sample_are_valid() -> None:
    rows = re.findall(r"^#   (\[\[allow\]\]|peer = .*|rights = .*)$", SAMPLE.read_text(), re.MULTILINE)
    config = parse_config("\n".join(rows))
    assert config.allow[0].kind == "tls"
    assert set(config.allow[0].rights) == {"send", "receive"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lisen = []", "a.toml:1: unknown key lisen; did you mean listen?"),
        (
            "\n[limits]\nmigration_in = 1",
            "a.toml:3: unknown key limits.migration_in; did you mean limits.migrations_in?",
        ),
        ("[limits]\nstop_s = 1", "a.toml:2: unknown key limits.stop_s; did you mean deadlines.stop_s?"),
        ("[[allow]]\npeer = 'key'\nright = ['send']", "a.toml:3: unknown key allow.right; did you mean allow.rights?"),
        ("[xyzzy]\na = 1", "a.toml:1: unknown key xyzzy"),
        ("limits.migrations_in = -3", "a.toml:1: limits.migrations_in: Expected `int` >= 0"),
        ("[limits]\nparallel_connections = 0", "a.toml:2: limits.parallel_connections: Expected `int` >= 1"),
        ("[limits]\nmigrations_in = '3'", "a.toml:2: limits.migrations_in: Expected `int`, got `str`"),
        ("[[allow]]\npeer = 'tls:a'\nrights = ['sent']", "a.toml:3: allow.rights: Invalid enum value 'sent'"),
        ("[[allow]]\npeer = 'host-b'\nrights = []", "it is tls:PATTERN, user:NAME, group:NAME"),
        ("[[allow]]\npeer = 'key:x'\nrights = []", "it is tls:PATTERN, user:NAME, group:NAME"),
        ("[[allow]]\npeer = 'tls:'\nrights = []", "it is tls:PATTERN, user:NAME, group:NAME"),
        ("listen = ['16515']", "an address is tcp:HOST:PORT or unix:PATH"),
        ("security = 'none'", "Invalid enum value 'none'"),
        ("security = 'key'", 'security = "key" needs key_file'),
        ("[qemu]\nsockets_mode = '0775'", "others than QEMU's user and group may have no rights"),
        ("[local]\nmode = '660'", "a.toml:2: local.mode: Expected `str` matching regex"),
        ("[deadlines]\nstop_s = 0", "a.toml:2: deadlines.stop_s: Expected `float` > 0"),
        ("\nlisten = oops", "line 2"),
    ],
)
def test_a_mistake_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_config(text, "a.toml")
    assert words in str(refused.value)
    assert str(refused.value).startswith("a.toml")


def test_every_unknown_key_is_named_at_once() -> None:
    with pytest.raises(RequestError) as refused:
        parse_config("one = 1\ntwo = 2\n[tls]\nthree = 3\n", "a.toml")
    assert re.findall(r"a\.toml:(\d)", str(refused.value)) == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("text", "address", "written"),
    [
        ("tcp:host-a:1234", Address("tcp", host="host-a", port=1234), "tcp:host-a:1234"),
        ("tcp:host-a", Address("tcp", host="host-a", port=16515), "tcp:host-a:16515"),
        ("tcp:[::1]", Address("tcp", host="::1", port=16515), "tcp:[::1]:16515"),
        ("tcp:[fe80::1%eth0]:7", Address("tcp", host="fe80::1%eth0", port=7), "tcp:[fe80::1%eth0]:7"),
        ("tcp:10.0.0.1:0", Address("tcp", host="10.0.0.1", port=0), "tcp:10.0.0.1:0"),
        ("unix:/run/a.sock", Address("unix", path="/run/a.sock"), "unix:/run/a.sock"),
    ],
)
def test_addresses(text: str, address: Address, written: str) -> None:
    assert Address.parse(text) == address
    assert str(address) == written
    assert Address.parse(written) == address


@pytest.mark.parametrize(
    "text", ["", "tcp:", "tcp::1", "tcp:::1:16515", "tcp:h:65536", "tcp:h:", "tcp:a b", "unix:", "unix:a.sock",
             "udp:h:1", "unix:/" + "x" * UNIX_PATH_LONGEST_BYTES]
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Address.parse(text)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        load_config(tmp_path / "agent.toml")
    (tmp_path / "agent.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_config(tmp_path / "agent.toml")


def test_places_of_a_user_and_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert AgentConfig().local_socket == Path("/run/virtmig/agent.sock")
    assert AgentConfig().sockets_folder == Path("/run/virtmig/qemu")
    assert default_file() == Path("/etc/virtmig/agent.toml")
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    assert runtime_folder() == Path("/run/user/1234/virtmig")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/x")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert AgentConfig().local_socket == Path("/tmp/x/virtmig/agent.sock")
    assert default_file() == tmp_path / "virtmig/agent.toml"
    assert load_config() == AgentConfig()  # a default file that is missing means the defaults
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/virtmig-2")  # a service of the system with a user of its own
    assert AgentConfig().local_socket == Path("/run/virtmig-2/agent.sock")
    assert default_file() == Path("/etc/virtmig/agent.toml")
