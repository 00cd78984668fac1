"""libvirt's own daemon runs the hook, in each lab host's private hooks folder; plain virsh moves the guests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.live.test_migrate import move
from tests.support.agents import settled, through
from tests.support.facade import LIVE, P2P, both_fail, to_uri3
from tests.support.lab import GuestFactory, LabGuest, eventually
from virtmig.integrations import hook_files, hook_log
from virtmig.lab.agents import kill_agent, start_agents
from virtmig.lab.guest import GuestSettings, boot_image, domain_xml
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab, find_qemu
from virtmig.progress import Status
from virtmig.virt.connection import open_connection

pytestmark = [pytest.mark.lab, pytest.mark.root]

IMAGES = "/var/lib/libvirt/images-"  # private to each host, under a name of its own


class Hooked:
    """A host whose daemon runs the hook; `settings` are those of its hook.toml."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self.folder = host.folder / "etc" / "hooks"
        self.own = host.folder / "hook"
        self.own.mkdir()
        self.install()
        self._reload()

    @property
    def log(self) -> Path:
        return self.own / "hook.jsonl"

    def settings(self, more: str = "", rules: str = "") -> None:
        (self.own / "rules.xml").write_text(f"<rules>{rules}</rules>")
        (self.own / "hook.toml").write_text(f'log = "{self.log}"\nrules = "{self.own}/rules.xml"\n{more}')
        self.log.unlink(missing_ok=True)

    def install(self, **changes: str) -> Path:
        """`python`: another interpreter; other names are shell variables of the file."""
        python = {"python": changes.pop("python")} if "python" in changes else {}
        path = hook_files.install(self.folder, config=str(self.own / "hook.toml"), **python).path
        for name, value in changes.items():
            path.write_text(path.read_text().replace(f"\n{name}=", f"\n{name}={value}  #"))
        return path

    def rows(self, *, of: LabGuest) -> list[dict[str, Any]]:
        return [row for row in hook_log.read(str(self.log)) if row["guest"] == of.name]

    def phases(self, *, of: LabGuest) -> list[str]:
        return [row["operation"] for row in self.rows(of=of)]

    def remove(self) -> None:
        hook_files.remove(self.folder)
        self._reload()

    def _reload(self) -> None:
        """SIGHUP, and wait until the daemon has looked for hooks again: its last word to `daemon` hooks says so."""
        marker, daemon = self.own / "reloaded", self.folder / "daemon"
        daemon.write_text(f'#!/bin/sh\n[ "$2" != reload ] || echo >> {marker}\n')
        daemon.chmod(0o755)
        open_connection(self.host.uri).close()  # a daemon that has just begun to listen passes over SIGHUP
        os.kill(self.host.daemon_pid, signal.SIGHUP)
        eventually(marker.exists, "the daemon's reload")
        marker.unlink()
        daemon.unlink()


@pytest.fixture(scope="module")
def hooks(full_lab: Lab) -> Iterator[dict[str, Hooked]]:
    hooked = {host.name: Hooked(host) for host in full_lab.hosts}
    yield hooked
    for each in hooked.values():
        each.remove()


@pytest.fixture(autouse=True)
def plain(hooks: dict[str, Hooked]) -> None:
    for each in hooks.values():
        each.install()
        each.settings()


@pytest.fixture
def elsewhere(full_lab: Lab) -> Iterator[LabGuest]:
    """A guest on host a whose disk host b has under another path."""
    settings = GuestSettings(name="elsewhere", memory_mib=32, dirty_mib_s=2.0)
    for host in full_lab.hosts:
        image = host.folder / "varlib" / f"images-{host.name}" / "disk.img"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(boot_image(settings))
    host = full_lab.a
    serial = f"{host.serial_folder}/{settings.name}.serial"
    xml = host.folder / "elsewhere.xml"
    xml.write_text(domain_xml(settings, image=Path(f"{IMAGES}a/disk.img"), serial=serial, emulator=find_qemu()))
    guest = LabGuest(full_lab, settings)
    full_lab.virsh(host, "create", str(xml))
    eventually(lambda: full_lab.heartbeat(host, guest.name), "its first heartbeat")
    yield guest
    guest.close()


@pytest.fixture(scope="module")
def standing(full_lab: Lab) -> Iterator[LabGuest]:
    """One guest for several tests: each leaves it running on host a."""
    guest = LabGuest(full_lab, GuestSettings(name="standing", memory_mib=24, dirty_mib_s=2.0))
    full_lab.start_guest(guest.settings)
    yield guest
    guest.close()


def virsh_migrate(guest: LabGuest, source: LabHost, destination: LabHost) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["virsh", "-c", source.uri, "migrate", "--live", guest.name, destination.uri],
        capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip


def test_a_migration_that_fails_without_the_rewrite_succeeds_with_it(
    full_lab: Lab, hooks: dict[str, Hooked], elsewhere: LabGuest
) -> None:
    failed = virsh_migrate(elsewhere, full_lab.a, full_lab.b)
    assert failed.returncode == 1
    assert f"'{IMAGES}a/disk.img'" in failed.stderr
    assert elsewhere.only_on(full_lab.a)
    assert hooks["b"].rows(of=elsewhere)[0]["result"] == "unchanged"

    hooks["b"].settings(rules=f"<path kind='disk' from='{IMAGES}a' to='{IMAGES}b'/>")
    done = virsh_migrate(elsewhere, full_lab.a, full_lab.b)
    assert (done.returncode, done.stderr) == (0, "")
    assert elsewhere.only_on(full_lab.b)
    elsewhere.check(full_lab.b)
    assert f"{IMAGES}b/disk.img" in elsewhere.domain(full_lab.b).XMLDesc(0)

    arrived = hooks["b"].rows(of=elsewhere)
    assert [row["operation"] for row in arrived] == ["migrate", "prepare", "start", "started"]
    assert arrived[0]["result"] == "rewritten"
    assert f"{IMAGES}b/disk.img" in arrived[0]["changes"][0]
    assert {(row["uuid"], row["host"]) for row in arrived} == {(elsewhere.uuid, "lab-b")}
    assert eventually(lambda: hooks["a"].phases(of=elsewhere)[-2:] == ["stopped", "release"], "the source's last words")
    command = [sys.executable, "-I", "-c", "from virtmig.cli.main import run; run()"]
    history = subprocess.run(
        full_lab.b.command([*command, "hooks", "history"]), capture_output=True, text=True, timeout=30
    )
    assert (history.returncode, history.stderr) == (0, "")
    assert history.stdout.splitlines()[1].split()[2:4] == [elsewhere.name, "came"]
    listed = subprocess.run(
        full_lab.b.command([*command, "list", "--json", elsewhere.name]), capture_output=True, text=True, timeout=30
    )
    assert (listed.returncode, listed.stderr) == (0, "")
    row = json.loads(listed.stdout.splitlines()[0])  # virsh ran it: there is no record
    assert (row["domain"], row["destination"], row["status"]) == (elsewhere.name, "lab-b", "came")


def test_a_guest_that_is_refused_runs_on_at_the_source(
    full_lab: Lab, hooks: dict[str, Hooked], standing: LabGuest
) -> None:
    fresh = standing
    hooks["b"].settings('require = "handshake"')
    refused = virsh_migrate(fresh, full_lab.a, full_lab.b)
    assert refused.returncode == 1
    assert "Hook script execution failed" in refused.stderr
    assert f"virtmig: {fresh.name}: vetoed: hook.toml requires a handshake" in refused.stderr
    assert fresh.only_on(full_lab.a)
    fresh.check(full_lab.a)
    assert [(row["operation"], row["result"]) for row in hooks["b"].rows(of=fresh)] == [("migrate", "vetoed")]
    code, libvirts, words = both_fail(full_lab, fresh, to_uri3({}, LIVE | P2P))
    assert code == (libvirt.VIR_ERR_HOOK_SCRIPT_FAILED, libvirt.VIR_FROM_HOOK)
    assert "requires a handshake" in libvirts
    assert words.endswith(f"({fresh.name} still runs on {full_lab.a.hostname}, unchanged)")


@pytest.mark.slow
def test_a_gate_is_closed_when_it_does_not_work_and_without_one_guests_come_in(
    full_lab: Lab, hooks: dict[str, Hooked], standing: LabGuest, tmp_path: Path
) -> None:
    fresh = standing
    hooks["b"].settings('require = "rules"', rules="<bridge wrong='br0'/>")
    refused = virsh_migrate(fresh, full_lab.a, full_lab.b)
    assert refused.returncode == 1
    assert "rules.xml:1: rule <bridge>" in refused.stderr
    assert fresh.only_on(full_lab.a)

    hooks["b"].install(**broken("killed", tmp_path))
    refused = virsh_migrate(fresh, full_lab.a, full_lab.b)
    assert refused.returncode == 1
    assert "requires something of incoming guests" in refused.stderr
    assert fresh.only_on(full_lab.a)

    hooks["b"].install()
    hooks["b"].settings(rules="<bridge wrong='br0'/>")
    assert virsh_migrate(fresh, full_lab.a, full_lab.b).returncode == 0
    assert hooks["b"].rows(of=fresh)[0]["result"] == "failed open"
    assert virsh_migrate(fresh, full_lab.b, full_lab.a).returncode == 0
    assert fresh.only_on(full_lab.a)
    fresh.check(full_lab.a)


@pytest.mark.slow
def test_a_guest_comes_in_by_handshake_where_one_is_required(
    full_lab: Lab, hooks: dict[str, Hooked], guest: GuestFactory
) -> None:
    fresh = guest(memory_mib=32)
    hooks["b"].settings('require = ["handshake", "rules"]')
    start_agents(full_lab)
    try:
        outcome, _ = move(fresh, full_lab.a, full_lab.b, **through(full_lab.a, full_lab.b))
        assert outcome.status is Status.COMPLETED, outcome
        assert settled(full_lab) == []
    finally:
        for host in full_lab.hosts:
            kill_agent(full_lab, host)
    assert fresh.only_on(full_lab.b)
    fresh.check(full_lab.b)
    first = hooks["b"].rows(of=fresh)[0]
    assert (first["operation"], first["result"]) == ("migrate", "unchanged")


def broken(kind: str, folder: Path) -> dict[str, str]:
    """An interpreter that is missing, is killed at once, or never answers; and how long the hook waits."""
    lines = {"killed": "kill -9 $$", "hanging": "exec sleep 60"}
    if kind == "missing":
        return {"python": str(folder / "absent")}
    script = folder / kind
    script.write_text(f"#!/bin/sh\n{lines[kind]}\n")
    script.chmod(0o755)
    return {"python": str(script), "deadline_s": "0.2"}


def restart(host: LabHost) -> None:
    host.kill_daemon()
    host.start_daemon()
    host.await_daemon()


@pytest.mark.parametrize(
    "kinds", [("missing", "hanging"), pytest.param(("hanging", "killed"), marks=pytest.mark.slow)], ids=" and ".join
)
def test_a_broken_hook_harms_neither_a_migration_nor_the_daemons_restart(
    full_lab: Lab, hooks: dict[str, Hooked], standing: LabGuest, tmp_path: Path, kinds: tuple[str, str]
) -> None:
    """libvirt kills a running guest whose `reconnect` hook fails: with this hook none does."""
    for host, kind in zip(full_lab.hosts, kinds, strict=True):
        hooks[host.name].install(**broken(kind, tmp_path))
    done = virsh_migrate(standing, full_lab.a, full_lab.b)
    assert (done.returncode, done.stderr) == (0, "")
    restart(full_lab.b)
    eventually(lambda: standing.only_on(full_lab.b), "the guest after a restart")
    standing.check(full_lab.b)
    assert hooks["b"].phases(of=standing) == []
    hooks["b"].install()  # and where it works, a restart is noted
    restart(full_lab.b)
    eventually(lambda: hooks["b"].phases(of=standing) == ["reconnect"], "the noted reconnect")
    hooks["a"].install()
    assert virsh_migrate(standing, full_lab.b, full_lab.a).returncode == 0
    assert standing.only_on(full_lab.a)


@pytest.fixture
def others(hooks: dict[str, Hooked]) -> Iterator[Callable[[str, str], Path]]:
    """Hooks of somebody else on host b."""
    made: list[Path] = []

    def make(name: str, text: str) -> Path:
        path = hooks["b"].folder / name
        path.write_text(text)
        path.chmod(0o755)
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink()


@pytest.mark.slow
def test_it_stands_in_a_chain_with_others(
    full_lab: Lab, hooks: dict[str, Hooked], elsewhere: LabGuest, others: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """What an earlier hook prints is our input, and ours is a later one's; each of them sees its own step."""
    first = f"#!/bin/sh\n[ \"$2\" != migrate ] || sed 's#{IMAGES}a#/between#'\n"
    last = f'#!/bin/sh\n[ "$2" != migrate ] || cat > {tmp_path}/last.xml\n'
    ahead, behind = others("qemu", first), others("qemu.d/60-last", last)
    assert hook_files.chain(hooks["b"].folder) == (ahead, hooks["b"].folder / "qemu.d" / hook_files.NAME, behind)
    hooks["b"].settings(rules=f"<path kind='disk' from='/between' to='{IMAGES}b'/>")
    done = virsh_migrate(elsewhere, full_lab.a, full_lab.b)
    assert (done.returncode, done.stderr) == (0, "")
    assert elsewhere.only_on(full_lab.b)
    assert f"{IMAGES}b/disk.img" in (tmp_path / "last.xml").read_text()
    assert json.loads(hooks["b"].log.read_text().splitlines()[0])["result"] == "rewritten"
