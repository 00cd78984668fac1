"""Every QEMU at hand is asked about itself; binaries that behave badly are refused in words and leave no process."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tests.support.emulators import emulators
from tests.support.recorder import Emulator
from virtmig.agent import qmp
from virtmig.agent.qmp import EmulatorFacts, ask_emulator, read_schema
from virtmig.errors import ChannelError
from virtmig.facts import version, version_text

every_emulator = pytest.mark.parametrize("emulator", emulators(), ids=lambda emulator: emulator.version_name)


def ask(emulator: Emulator) -> EmulatorFacts:
    *prefix, path = emulator.command
    return ask_emulator(path, prefix=prefix)


def said(emulator: Emulator, *arguments: str) -> str:
    return subprocess.run([*emulator.command, *arguments], capture_output=True, text=True, check=True).stdout


@every_emulator
def test_a_qemu_says_what_it_is(emulator: Emulator) -> None:
    facts = ask(emulator)
    assert f"version {version_text(facts.version)} ({facts.package})" in said(emulator, "--version")
    assert facts.arch == "x86_64"
    # a second opinion: the same binary, by its command line
    rows = re.findall(r"^(\S+)\s+(.*)$", said(emulator, "-M", "help"), re.MULTILINE)[1:]
    aliases = {name: found[1] for name, text in rows if (found := re.search(r"\(alias of (\S+)\)", text))}
    assert {row.alias: row.name for row in facts.machines if row.alias} == aliases
    assert {row.name for row in facts.machines} == {name for name, _ in rows} - set(aliases) - {"none"} | (
        {"none"} & {row.name for row in facts.machines}
    )
    assert [row.name for row in facts.machines if row.default] == [
        name for name, text in rows if "(default)" in text and name not in aliases
    ]
    deprecated = {row.name for row in facts.machines if row.deprecated}
    assert deprecated == {name for name, text in rows if "(deprecated)" in text and name not in aliases}


@every_emulator
def test_a_qemu_says_what_it_can(emulator: Emulator) -> None:
    facts = ask(emulator)
    able, schema = set(facts.capabilities), facts.schema
    newer = facts.version >= version(10)
    assert {"multifd", "postcopy-ram", "postcopy-preempt", "return-path", "zero-copy-send"} <= able
    assert ("mapped-ram" in able) == ("switchover-ack" in able) == newer
    assert ("compress" in able) == (not newer)
    assert facts.parameters["multifd-channels"] == 2
    assert facts.parameters["downtime-limit"] == 300
    assert schema.choices["multifd-compression"][:2] == ("none", "zlib")
    assert ("zero-page-detection" in schema.choices) == newer
    assert ("channels" in schema.arguments["migrate"]) == newer
    assert ("exit-on-error" in schema.arguments["migrate-incoming"]) == newer
    assert ({"socket", "file"} <= set(schema.transports)) == newer
    assert set(facts.parameters) <= set(schema.parameters)
    assert {"migrate", "migrate-recover", "migrate-pause", "calc-dirty-rate", "yank"} <= set(schema.commands)
    assert "x-ignore-shared" in schema.unstable
    assert "multifd" not in (*schema.unstable, *schema.deprecated)
    assert ("query-migrationthreads" in schema.commands) == (version(10) <= facts.version < version(11))


@every_emulator
def test_the_facts_survive_json(emulator: Emulator) -> None:
    facts = ask(emulator)
    assert msgspec.json.decode(msgspec.json.encode(facts), type=EmulatorFacts) == facts
    assert len(msgspec.json.encode(facts)) < 32 << 10


def test_the_file_is_remembered_with_the_facts() -> None:
    path = emulators()[0].command[-1]
    facts, status = ask_emulator(path), os.stat(path)
    assert (facts.path, facts.modified_ns, facts.size_bytes) == (path, status.st_mtime_ns, status.st_size)


def test_a_schema_that_says_nothing_of_migration() -> None:
    assert read_schema([{"name": "quit", "meta-type": "command", "arg-type": "0"}]) == qmp.SchemaFacts()


def test_flags_of_the_schema() -> None:
    rows = [
        {"name": "migrate", "meta-type": "command", "arg-type": "9", "features": ["brand-new"]},
        {"name": "yank", "meta-type": "command", "arg-type": "0", "features": ["deprecated", "brand-new"]},
        {"name": "9", "meta-type": "object", "members": [{"name": "uri", "type": "str"}]},
    ]
    schema = read_schema(rows)
    assert schema.features == {"migrate": ("brand-new",), "yank": ("brand-new",)}
    assert schema.deprecated == ("yank",)
    assert schema.arguments == {"migrate": ("uri",)}


# -- binaries that behave badly ------------------------------------------------------------------------------------

_GREETING = '{"QMP": {"version": {"qemu": {"micro": 3, "minor": 4, "major": 97}, "package": "x"}, "capabilities": []}}'


def binary(folder: Path, body: str) -> str:
    """A script in place of a QEMU; it leaves its process id."""
    path = folder / "qemu-system-test"
    path.write_text(f"#!/bin/sh\necho $$ > {folder}/pid\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exec sleep 1000", "has not answered in time"),
        (f"echo '{_GREETING}'; exec sleep 1000", "has not answered in time"),
        ("echo 'could not load a library' >&2; exit 1", "ended before it had answered; it said: could not load"),
        ("echo hello; exec sleep 1000", "its answers are not those of a QEMU"),
        ("echo '[1]'; exec sleep 1000", "its answers are not those of a QEMU"),
        ('echo \'{"QMP": 7}\'; echo \'{"return": {}}\'; exec sleep 1000', "its answers are not those of a QEMU"),
        (f"echo '{_GREETING}'; echo '{{\"error\": {{\"desc\": \"not today\"}}}}'; exec sleep 1000",
         "qmp_capabilities: not today"),
        (f"echo '{_GREETING}'; while echo '{{\"return\": {{}}}}'; do :; done", "its answers are not those of a QEMU"),
        (f"echo '{_GREETING}'; while echo '{{\"event\": \"X\"}}'; do :; done", "has not answered in time"),
        ("exec cat /dev/zero", "an answer of more than 1 MiB"),
    ],
)  # fmt: skip
def test_a_bad_binary_is_refused_and_ended(
    tmp_path: Path, body: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "ANSWER_LONGEST_BYTES", 1 << 20)
    begin = time.monotonic()
    with pytest.raises(ChannelError) as refused:
        ask_emulator(binary(tmp_path, body), seconds=0.3 if "in time" in words else 20)
    assert words in str(refused.value)
    assert time.monotonic() - begin < 15
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="No such file"):
        ask_emulator(str(tmp_path / "none"))
    path = tmp_path / "plain"
    path.write_text("#!/no/such/interpreter\n")
    with pytest.raises(ChannelError, match="Permission denied"):
        ask_emulator(str(path))
    path.chmod(0o755)
    with pytest.raises(ChannelError, match="No such file"):
        ask_emulator(str(path))


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_it_goes_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "began")
    path = binary(tmp_path, f"echo > {tmp_path}/began; exec sleep 600")
    code = "import sys; from virtmig.agent.qmp import ask_emulator; ask_emulator(sys.argv[1], seconds=600)"
    with subprocess.Popen([sys.executable, "-c", code, path]) as agent:
        assert (tmp_path / "began").read_bytes()
        with os.fdopen(os.pidfd_open(int((tmp_path / "pid").read_text()))) as emulator:
            agent.kill()
            assert select.select([emulator], [], [], 20)[0]


def test_nothing_of_the_agents_environment_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    with pytest.raises(ChannelError):
        ask_emulator(binary(tmp_path, f"env > {tmp_path}/env"))
    assert {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()} <= {"PATH", "LC_ALL", "PWD"}
