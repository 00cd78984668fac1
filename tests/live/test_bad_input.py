"""Bad input against the real lab: one clear error each, with a hint, and the guest unharmed."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator

import pytest

from tests.live.test_migrate import virtmig
from tests.support.lab import GuestFactory, LabGuest, eventually
from virtmig.errors import ConnectionFailed
from virtmig.lab.guest import GuestSettings
from virtmig.lab.lab import Lab
from virtmig.virt.connection import open_connection

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def standing(lab: Lab) -> Iterator[LabGuest]:
    """One guest for the whole table: nothing in it may move or harm it."""
    guest = LabGuest(lab, GuestSettings(name="standing", memory_mib=32, dirty_mib_s=2.0))
    lab.start_guest(guest.settings)
    yield guest
    guest.close()


#: (what is wrong, the words behind `migrate`, what the error says, what the hint says); {a} {b} are the hosts' URIs
TABLE = [
    ("unknown domain", "--live nobody {b}", "failed to get domain 'nobody'", "known there: "),
    ("unknown uuid", "--live 11111111-2222-3333-4444-555555555555 {b}", "failed to get domain", "known there: "),
    ("dead destination", "--live --retries 0 standing qemu+unix:///system?socket=/tmp/absent.sock",
     "failed to connect to qemu+unix:///system?socket=/tmp/absent.sock", "is libvirtd"),
    ("nobody listens", "--live --retries 0 standing qemu+tcp://127.0.0.1:1/system", "failed to connect", "libvirtd"),
    ("no such host", "--live --retries 0 standing qemu+tcp://no.such.host.invalid/system",
     "failed to connect", "host name"),
    ("no URI", "--live standing nonsense", "failed to connect to nonsense", "libvirt URI looks like"),
    ("another hypervisor", "--live standing test:///default", "", ""),
    ("same host", "--live standing {a}", "same host", ""),
    ("same host p2p", "--live --p2p standing {a}", "same host", ""),
    ("localhost p2p", "--live --p2p standing qemu+tcp://localhost/system", "", ""),
    ("conflict", "--live --tunnelled --p2p --parallel standing {b}", "mutually exclusive", "leave out"),
    ("two conflicts", "--live --offline --zerocopy standing {b}", "zero-copy is only available", "add --parallel"),
    ("tuning without", "--live --parallel-connections 4 standing {b}", "Turn parallel migration on", "add --parallel"),
    ("overflow", "--live --postcopy --postcopy-bandwidth 17592186044416 standing {b}",
     "must be less than 17592186044416", "0 to"),
    ("no number", "--live --bandwidth fast standing {b}", "malformed or out of range", "MiB/s"),
    ("negative", "--live --timeout -3 standing {b}", "malformed or out of range", ""),
    ("256 connections", "--live --parallel --parallel-connections 256 standing {b}",
     "malformed or out of range", "1 to 255"),
    ("unknown option", "--live --paralel standing {b}", "doesn't support option --paralel", "did you mean --parallel"),
    ("no such file", "--live --xml /nonexistent.xml standing {b}", "cannot read file '/nonexistent.xml'", ""),
    ("unsupported scheme", "--live --migrateuri http://x/ standing {b}", "unsupported scheme http", "tcp://"),
    ("a file that is no XML", "--live --xml /etc/hostname standing {b}", "/etc/hostname", ""),
    ("no such file, with --plan", "--live --plan --xml /nonexistent.xml standing {b}", "cannot read file", ""),
    ("a malformed migration URI", "--live --migrateuri tcp:://xx::1 standing {b}", "migration URI", "tcp://"),
    ("a slash in the new name", "--live --dname we/ird standing {b}", "cannot contain '/'", ""),
    ("missing destination", "--live standing", "requires <desturi> option", ""),
    ("direct", "--live --direct standing {b}", "direct", ""),
    ("method", "--live --comp-methods lz4 standing {b}", "Unsupported compression method 'lz4'", "zstd"),
    ("read-only", "-r", "read only", "--readonly"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "words", "error", "hint"), TABLE, ids=[row[0] for row in TABLE])
def test_each_is_one_clear_error(lab: Lab, standing: LabGuest, what: str, words: str, error: str, hint: str) -> None:
    filled = words.format(a=lab.a.uri, b=lab.b.uri).split()
    if what == "read-only":
        done = virtmig("-c", lab.a.uri, "-r", "migrate", "--live", standing.name, lab.b.uri)
    else:
        done = virtmig("-c", lab.a.uri, "migrate", *filled)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "internal error: " not in done.stderr.replace("internal error: unable to execute QEMU", "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    hints = [line for line in done.stderr.splitlines() if line.startswith("hint: ")]
    assert errors
    assert len(set(errors)) == len(errors)
    assert any(error in line for line in errors), errors
    assert any(hint in line for line in hints) or not hint, hints
    assert "destroy" not in done.stderr
    assert standing.only_on(lab.a)
    assert standing.state(lab.b) is None


def test_a_domain_that_is_already_migrating(lab: Lab, standing: LabGuest) -> None:
    virsh = subprocess.Popen(
        ["virsh", "-q", "-c", lab.a.uri, "migrate", "--live", "--bandwidth", "1", standing.name, lab.b.uri],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: standing.domain(lab.a).jobStats(0).get("memory_processed"), "memory on the way")
        done = virtmig("-c", lab.a.uri, "migrate", "--live", standing.name, lab.b.uri)
        assert done.returncode == 1
        assert "another job is already running" in done.stderr
        assert f"hint: virtmig -c '{lab.a.uri}' watch standing" in done.stderr
        assert "destroy" not in done.stderr  # the copy there is the other half of the running migration
        # the first one goes on, undisturbed
        assert standing.domain(lab.a).jobStats(0)["type"] == 2
    finally:
        standing.domain(lab.a).abortJob()
        virsh.wait(60)
    eventually(lambda: standing.only_on(lab.a), "the end of the first migration")


def test_a_destination_that_already_runs_it(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(memory_mib=32)
    lab.start_guest(fresh.settings, host=lab.b)
    done = virtmig("-c", lab.a.uri, "migrate", "--live", fresh.name, lab.b.uri)
    assert done.returncode == 1
    assert "already" in done.stderr
    assert "hint: " in done.stderr
    assert fresh.running(lab.a)
    assert fresh.running(lab.b)


def test_no_permission(full_lab: Lab) -> None:
    """As a user whom the destination's socket is closed to."""
    closed = full_lab.folder / "b" / "run"
    closed.chmod(0o700)
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        with pytest.raises(ConnectionFailed, match="Permission denied") as caught:
            open_connection(full_lab.b.uri)
    finally:
        os.seteuid(0)
        closed.chmod(0o755)
    assert "join the group libvirt" in caught.value.hint


def test_the_guest_is_unharmed_after_the_whole_table(lab: Lab, standing: LabGuest) -> None:
    standing.check(lab.a)
