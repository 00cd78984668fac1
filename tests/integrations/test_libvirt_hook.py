"""The hook as libvirt runs it, without libvirt: arguments, XML, answer, status, time, and what can be broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from virtmig.agent.journal import Journal
from virtmig.engine.agents import runtime_folder
from virtmig.integrations import hook_files, hook_log, libvirt_hook
from virtmig.integrations.libvirt_hook import Answer, Call, Settings, answer, read_settings
from virtmig.lab.guest import sample_path
from virtmig.link.asking import SessionRecord

PLAIN = sample_path("plain.xml").read_bytes()
UUID = "6a1f0c52-8d3b-4d6e-9a55-0b7c1e2d3f41"
OTHERS = ["prepare", "start", "started", "stopped", "release", "reconnect", "attach", "restore"]
Done = subprocess.CompletedProcess[bytes]


class Hook:
    """hooks/qemu with its settings in a folder of the test, called with libvirt's environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log" / "hook.jsonl"
        self.path = folder / "50-virtmig"
        self.settings()
        self.write()

    def write(self, python: str = sys.executable, deadline_s: str = "1.9") -> None:
        text = hook_files.script(python=python, config=str(self.folder / "hook.toml"))
        self.path.write_text(text.replace("deadline_s=1.9", f"deadline_s={deadline_s}"))
        self.path.chmod(0o755)

    def settings(self, more: str = "", rules: str = "") -> None:
        (self.folder / "rules.xml").write_text(f"<rules>{rules}</rules>")
        (self.folder / "hook.toml").write_text(f'log = "{self.log}"\nrules = ["{self.folder}/rules.xml"]\n{more}\n')

    def __call__(self, operation: str, xml: bytes = PLAIN, guest: str = "web01", **more: str) -> Done:
        return subprocess.run(
            [str(self.path), guest, operation, "begin", "-"],
            input=xml, capture_output=True, cwd="/", timeout=20, check=False,
            env={"LC_ALL": "C", "PATH": os.environ["PATH"], "HOME": "/", **more},
        )  # fmt: skip

    def rows(self) -> list[hook_log.Row]:
        return list(hook_log.read(str(self.log)))


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


RULE = "<bridge from='br0' to='br-prod'/>"


def test_only_what_is_changed_is_printed(hook: Hook) -> None:
    done = hook("migrate")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    hook.settings(rules=RULE)
    done = hook("migrate")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip() == PLAIN.replace(b"br0", b"br-prod").strip()
    unchanged, rewritten = hook.rows()
    assert (unchanged["result"], rewritten["result"]) == ("unchanged", "rewritten")
    assert "br-prod" in rewritten["changes"][0]
    assert "rules.xml:1" in rewritten["changes"][0]
    again = hook("migrate", done.stdout)  # after virtmig on the source, or another hook, has done it already
    assert (again.returncode, again.stdout) == (0, b"")


@pytest.mark.parametrize("operation", OTHERS)
def test_other_operations_are_noted_and_never_answered(hook: Hook, operation: str) -> None:
    hook.settings('require = ["handshake", "rules"]', rules=RULE)
    done = hook(operation, guest='a "guest" \\ of\nours')
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (row,) = hook.rows()
    assert (row["operation"], row["suboperation"], row["extra"], row["result"]) == (operation, "begin", "-", "noted")
    assert row["guest"] == 'a "guest" \\ of\nours'
    assert row["host"] == os.uname().nodename
    assert abs(row["time"] - time.time()) < 60


def test_an_operation_of_a_later_libvirt_is_left_alone(hook: Hook) -> None:
    hook.write(python="/nonexistent")
    done = hook("teleport")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -- gates -----------------------------------------------------------------------------------------------------------


def test_a_guest_that_does_not_fit_the_gate_is_refused_with_the_reason(hook: Hook) -> None:
    hook.settings('require = "rules"', rules="<bridge wrong='br0'/>")
    done = hook("migrate")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"virtmig: web01: vetoed: " in done.stderr
    assert b"rules.xml:1: rule <bridge>" in done.stderr
    (row,) = hook.rows()
    assert row["result"] == "vetoed"
    assert "rule <bridge>" in row["reason"]


WRONG = [
    ("require = 'handshakes'", "handshakes"),
    ("requires = 'handshake'", "there is no key requires"),
    ("require = [1]", "require is a text or a list of texts"),
    ("require = ['rules'", "hook.toml"),
    ("log = 'hook.jsonl'\nrequire = 'rules'", "hook.toml"),
]


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_settings_that_mean_a_gate_and_cannot_be_understood_close_it(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "hook.toml"
    file.write_text(line)
    settings = read_settings(str(file))
    assert said in settings.problem
    given = answer(Call("web01", "migrate", xml=PLAIN), settings, destination="b")
    assert given == Answer("vetoed", reason=settings.problem)
    assert answer(Call("web01", "reconnect", xml=PLAIN), settings, destination="b") == Answer("noted")


@pytest.mark.parametrize("text", [b"log = 5", b"no toml at all", b"\xff\xfe", b"unknown = 1"])
def test_other_damaged_settings_fail_open_and_say_so(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "hook.toml"
    file.write_bytes(text)
    settings = read_settings(str(file))
    assert str(file) in settings.problem
    given = answer(Call("web01", "migrate", xml=PLAIN), settings, destination="b")
    assert (given.result, given.reason) == ("unchanged", settings.problem)


def test_no_settings_are_the_defaults(tmp_path: Path) -> None:
    assert read_settings(str(tmp_path / "absent")) == Settings()
    file = tmp_path / "hook.toml"
    file.write_text('require = "handshake"\nrules = "/srv/rules"\nlog = "/srv/hook.jsonl"\n')
    assert read_settings(str(file)) == Settings(frozenset({"handshake"}), ("/srv/rules",), "/srv/hook.jsonl")


@pytest.mark.parametrize("require", [frozenset(), frozenset({"rules"})])
def test_rules_that_undo_each_other(tmp_path: Path, require: frozenset[str]) -> None:
    rules = tmp_path / "rules.xml"
    rules.write_text("<rules><bridge from='br0' to='br1'/><bridge from='br1' to='br2'/></rules>")
    given = answer(Call("web01", "migrate", xml=PLAIN), Settings(require, (str(rules),)), destination="b")
    assert given.result == ("vetoed" if require else "failed open")
    assert "would change their own result" in given.reason
    assert given.xml == ""


@pytest.mark.parametrize("xml", [b"", b"<domain", b"\xff", b"<!DOCTYPE d [<!ENTITY e 'x'>]><domain>&e;</domain>"])
def test_what_is_no_domain_fails_open(hook: Hook, xml: bytes) -> None:
    hook.settings(rules=RULE)
    done = hook("migrate", xml)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"failed open" in done.stderr
    assert hook.rows()[0]["result"] == "failed open"


def test_a_named_rule_file_that_is_missing(tmp_path: Path) -> None:
    call, rules = Call("web01", "migrate", xml=PLAIN), (str(tmp_path / "absent.xml"),)
    assert answer(call, Settings(rules=rules), destination="b").result == "failed open"
    vetoed = answer(call, Settings(frozenset({"rules"}), rules), destination="b")
    assert (vetoed.result, "cannot read" in vetoed.reason) == ("vetoed", True)


def test_rules_for_a_source_are_for_those_who_know_it(hook: Hook) -> None:
    hook.settings(rules=f"<when source='rack1-*'>{RULE}</when>")
    assert hook("migrate").stdout == b""
    assert b"br-prod" in hook("migrate", **{libvirt_hook.TEST_SOURCE: "rack1-a"}).stdout


# -- the agent's journal -----------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    monkeypatch.setattr(libvirt_hook, "sessions_folder", lambda: str(tmp_path / "sessions"))
    return Journal(tmp_path / "sessions")


def record(**values: object) -> SessionRecord:
    given = {"session": "f0", "role": "destination", "domain": "web01", "uuid": UUID, "state": "established", **values}
    return SessionRecord(**given)  # type: ignore[arg-type]


def test_a_session_that_this_hosts_agent_has_agreed_on_opens_the_gate(journal: Journal) -> None:
    gate = Settings(frozenset({"handshake"}))
    call = Call("web01", "migrate", xml=PLAIN.replace(PLAIN.split(b"<uuid>")[1][:36], UUID.encode()))
    vetoed = answer(call, gate, destination="b")
    assert (vetoed.result, "requires a handshake" in vetoed.reason) == ("vetoed", True)
    journal.write(record())
    assert answer(call, gate, destination="b").result == "unchanged"


@pytest.mark.parametrize(
    "other",
    [{"role": "source"}, {"uuid": UUID.replace("6", "7")}, {"uuid": ""}, {"state": "failed"}, {"state": "opening"}],
    ids=str,
)
def test_no_other_session_does(journal: Journal, other: dict[str, str]) -> None:
    journal.write(record(**other))
    assert not libvirt_hook.agreed_session(UUID)
    assert not libvirt_hook.agreed_session("")


def test_an_agent_that_has_ended_vouches_for_nobody(journal: Journal, tmp_path: Path) -> None:
    journal.write(record())
    file = tmp_path / "sessions" / "f0.json"
    gone = subprocess.Popen(["true"])
    gone.wait()
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": gone.pid}))
    assert not libvirt_hook.agreed_session(UUID)
    for damaged in (b"{", b"[]", b"\xff", b"null"):
        file.write_bytes(damaged)
        assert not libvirt_hook.agreed_session(UUID)


def test_the_agents_folder_is_where_the_agent_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    assert libvirt_hook.sessions_folder() == str(runtime_folder() / "sessions")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    for folder in ("", "/run/user/77"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        assert libvirt_hook.sessions_folder() == str(runtime_folder() / "sessions")


# -- what can be broken ------------------------------------------------------------------------------------------------

BROKEN: dict[str, str] = {
    "missing": "",
    "no virtmig": "#!/bin/sh\nexec /usr/bin/python3 -I -S -c 'import virtmig'\n",
    "killed": "#!/bin/sh\nkill -9 $$\n",
    "half an XML": "#!/bin/sh\necho '<domain>'\nkill -9 $$\n",
    "hanging": "#!/bin/sh\nexec sleep 60\n",
    "not executable": "#!/bin/sh\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_python_changes_nothing(hook: Hook, kind: str) -> None:
    python = hook.folder / "python"
    if BROKEN[kind]:
        python.write_text(BROKEN[kind])
        python.chmod(0o644 if kind == "not executable" else 0o755)
    hook.write(python=str(python), deadline_s="0.2")
    for operation in ("reconnect", "migrate"):
        done = hook(operation)
        assert (done.returncode, done.stdout) == (0, b"")
        assert f"virtmig's hook did not work at {operation} of web01".encode() in done.stderr
    hook.settings('require = "handshake"')
    assert hook("reconnect").returncode == 0
    done = hook("migrate")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"requires something of incoming guests" in done.stderr


GATES = {
    'require = "handshake"': True,
    "require = [ # both\n  'handshake',\n]": True,
    "  require=['rules']": True,
    "requires = 'handshake'": True,  # means one
    "require = []": False,
    'require = "" # none yet': False,
    "# require = 'handshake'": False,
    "rules = ['require']": False,
}


@pytest.mark.parametrize("line", GATES)
def test_a_gate_is_found_without_python(hook: Hook, line: str) -> None:
    """And where Python works, it finds the same."""
    (hook.folder / "hook.toml").write_text(line)
    assert bool(read_settings(str(hook.folder / "hook.toml")).require) is GATES[line]
    hook.write(python="/nonexistent")
    done = hook("migrate")
    assert (done.returncode, b"requires something" in done.stderr) == ((1, True) if GATES[line] else (0, False))


def test_a_shell_that_cannot_fork_lets_reconnect_succeed(hook: Hook) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: to become a user who may start no process")
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "prlimit", "--nproc=0"]
    with tempfile.TemporaryDirectory(prefix="virtmig-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        script = shutil.copy(hook.path, folder)
        done = subprocess.run(
            [*words, script, "web01", "reconnect", "begin", "-"], input=PLAIN, capture_output=True, timeout=20
        )
    assert b"fork" in done.stderr
    assert done.returncode == 0


def test_a_full_disk_costs_the_note_alone(hook: Hook) -> None:
    hook.settings(rules=RULE)
    text = (hook.folder / "hook.toml").read_text().replace(str(hook.log), "/dev/full")
    (hook.folder / "hook.toml").write_text(text)
    for operation in ("reconnect", "migrate"):
        done = hook(operation)
        assert done.returncode == 0
        assert f"{operation} was not noted: [Errno 28]".encode() in done.stderr
    assert b"br-prod" in done.stdout


def test_an_answer_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule file that never ends being read: a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "rules.xml")
    monkeypatch.setattr(libvirt_hook, "ANSWER_S", 0.1)
    previous = signal.getsignal(signal.SIGALRM)
    try:
        for require, result, status in (("", "failed open", 0), ('require = "handshake"', "vetoed", 3)):
            text = f'log = "{tmp_path}/log"\nrules = "{tmp_path}/rules.xml"\n{require}'
            (tmp_path / "hook.toml").write_text(text)
            monkeypatch.setattr(libvirt_hook, "agreed_session", lambda uuid, within_s: True)
            words = [str(tmp_path / "hook.toml"), "web01", "migrate", "begin", "-"]
            assert libvirt_hook.main(words, PLAIN) == (status, "")
            *_, row = hook_log.read(str(tmp_path / "log"))
            assert (row["result"], row["reason"]) == (result, "no answer within 0.1 s")
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_nothing_heavy_is_imported() -> None:
    """lxml and msgspec only for rules, what takes longer never."""
    words = "import sys, virtmig.integrations.libvirt_hook; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", words], capture_output=True, text=True, check=True).stdout
    assert not {"lxml", "msgspec", "numpy", "libvirt", "rich", "click", "dataclasses", "asyncio"} & set(loaded.split())
    words = "import sys, virtmig.domain.rewriting, virtmig.rule_files; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", words], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "libvirt", "rich", "click", "asyncio"} & set(loaded.split())


def best_ms(action: Callable[[], object], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append((time.perf_counter() - began) * 1000)
    return min(taken)


def test_it_costs_little_more_than_python_itself(hook: Hook) -> None:
    """In terms of an empty Python on this machine, whatever else it does: about 2 for a phase, 6 with rules."""
    python = best_ms(lambda: subprocess.run([sys.executable, "-I", "-c", "pass"], check=True))
    hook.settings(rules=RULE)
    assert best_ms(lambda: hook("start")) < 5 * python
    assert best_ms(lambda: hook("migrate")) < 15 * python
