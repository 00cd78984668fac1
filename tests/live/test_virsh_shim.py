"""`virtmig-virsh` and the real virsh move the same guests between two real libvirt hosts; what callers see is alike."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.lab import GuestFactory, LabGuest, eventually
from tests.support.virsh import REAL, Answer, Terminal, environment, errors_of, install_shim, virsh
from virtmig.lab.guest import GuestSettings
from virtmig.lab.lab import Lab

pytestmark = pytest.mark.lab

#: a lab guest's memory takes about half a minute at this speed: time to look at the job
SLOW = ("--bandwidth", "1")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def standing(lab: Lab) -> Iterator[LabGuest]:
    """One guest for all: each test leaves it running on host a."""
    guest = LabGuest(lab, GuestSettings(name="shimmed", memory_mib=32, dirty_mib_s=2.0))
    lab.start_guest(guest.settings)
    yield guest
    guest.close()


@pytest.fixture
def by(shim: Path) -> Callable[..., tuple[Answer, Answer]]:
    """The same words by the real virsh and by ours."""

    def both(*words: str, **more: str) -> tuple[Answer, Answer]:
        more = {"VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"], **more}
        with ThreadPoolExecutor(2) as pool:
            theirs, ours = (pool.submit(virsh, which, *words, **more) for which in (None, shim))
            return theirs.result(), ours.result()

    return both


def there_and_back(lab: Lab, guest: LabGuest, shim: Path, before: str, *words: str, **more: str) -> list[Answer]:
    """There by ours, back by the real one: [theirs, ours]."""
    more = {"VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"], **more}
    ours = virsh(shim, "-c", lab.a.uri, *before.split(), "migrate", guest.name, lab.b.uri, *words, **more)
    assert guest.only_on(lab.b), ours
    theirs = virsh(None, "-c", lab.b.uri, *before.split(), "migrate", guest.name, lab.a.uri, *words)
    assert guest.only_on(lab.a), theirs
    return [theirs, ours]


def test_progress(lab: Lab, standing: LabGuest, shim: Path) -> None:
    """At 32 MiB/s the guest's memory takes a second: virsh looks every half."""
    decimals = "." in virsh(None, "--version").stdout and _version() >= (9, 4)
    number = r"[ \d]\d\.\d\d" if decimals else r"[ \d]{2}\d"
    line = rf"Migration: \[{number} %\]\n" if decimals else rf"\rMigration: \[{number} %\]"
    for done in there_and_back(lab, standing, shim, "-q", "--live", "--p2p", "--verbose", "--bandwidth", "32"):
        assert (done.returncode, done.stdout) == (0, "")
        assert re.fullmatch(rf"({line})+", done.stderr), done.stderr
        assert done.stderr.count("Migration:") in (2, 3, 4)
        assert "100" in done.stderr[-12:]


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in virsh(None, "--version").stdout.split(".")[:2])


#: words behind `migrate`, what virsh's first error and ours have in common
REFUSED = [
    ("--live shimmed {a}", "same host"),
    ("--live --zerocopy shimmed {b}", "zero-copy is only available for parallel migration"),
    ("--live --migrateuri http://x/ shimmed {b}", "unsupported scheme http in migration URI http://x/"),
    ("--live --xml /nonexistent shimmed {b}", "cannot read file '/nonexistent'"),
    ("--live --direct shimmed {b}", "direct migration is not supported by the source host"),
    ("--live shimmed qemu+unix:///system?socket=/tmp/absent.sock", "Failed to connect socket to '/tmp/absent.sock'"),
    ("--live --parallel-connections 4 shimmed {b}", "Turn parallel migration on to tune it"),
    ("--offline shimmed {b}", "offline migration must be specified with the persistent flag set"),
]


@pytest.mark.parametrize(("words", "words_in_common"), REFUSED)
def test_refusals(
    lab: Lab, standing: LabGuest, by: Callable[..., tuple[Answer, Answer]], words: str, words_in_common: str
) -> None:
    theirs, ours = by("-c", lab.a.uri, "migrate", *words.format(a=lab.a.uri, b=lab.b.uri).split())
    for done in (theirs, ours):
        assert (done.returncode, done.stdout) == (1, "\n")
        assert words_in_common in errors_of(done.stderr)[0]
    assert standing.only_on(lab.a)


def test_read_only(lab: Lab, standing: LabGuest, by: Callable[..., tuple[Answer, Answer]]) -> None:
    theirs, ours = by("-c", lab.a.uri, "-r", "migrate", "--live", standing.name, lab.b.uri)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


SIBLINGS = [
    "migrate-getmaxdowntime shimmed",
    "migrate-setmaxdowntime shimmed 300",
    "migrate-getspeed shimmed",
    "migrate-setspeed shimmed 8796093022208",
    "migrate-compcache shimmed",
    "-q migrate-compcache shimmed --size 1048576",
    "-q domjobinfo shimmed --rawstats",
    "domjobabort shimmed",
    "migrate-postcopy shimmed",
]


@pytest.mark.parametrize("line", SIBLINGS)
def test_siblings(lab: Lab, standing: LabGuest, by: Callable[..., tuple[Answer, Answer]], line: str) -> None:
    theirs, ours = by("-c", lab.a.uri, *line.split())
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert errors_of(ours.stderr) == errors_of(theirs.stderr)


@contextlib.contextmanager
def migrating(lab: Lab, guest: LabGuest, shim: Path | None, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A slow migration by the real virsh (None) or ours, seen by libvirt; aborted at the latest at the end."""
    process = subprocess.Popen(
        ["virsh", "-c", lab.a.uri, "migrate", "--live", guest.name, lab.b.uri, *SLOW, *words],
        executable=REAL if shim is None else str(shim / "virsh"),
        env=environment(shim, {"VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"]}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_for_job(lab, guest)
        yield process
    finally:
        with contextlib.suppress(Exception):
            guest.domain(lab.a).abortJob()
        process.communicate(timeout=60)
        eventually(lambda: guest.only_on(lab.a), "the end of the migration")
        eventually(lambda: guest.domain(lab.a).jobStats(0)["type"] == 0, "the end of its job")


def _wait_for_job(lab: Lab, guest: LabGuest) -> None:
    eventually(lambda: guest.domain(lab.a).jobStats(0).get("memory_processed"), "memory on the way")


def _stays(guest: LabGuest) -> str:
    return f"{guest.name} still runs on lab-a, unchanged"


ABORTED = "operation aborted: job 'migration out' canceled by client"


def test_a_job_is_seen_and_aborted_alike(
    lab: Lab, standing: LabGuest, by: Callable[..., tuple[Answer, Answer]], shim: Path
) -> None:
    """Ours by the real virsh's siblings, and the real virsh's migration by ours."""
    for mover, other in ((shim, None), (None, shim)):
        with migrating(lab, standing, mover) as process:
            for options in ((), ("--rawstats",)) if mover else ():
                labels = [
                    re.findall(r"^(?!.*(?:bandwidth|bps))(.*?)(?::|$)", done.stdout, re.MULTILINE)  # absent while 0
                    for done in by("-c", lab.a.uri, "domjobinfo", standing.name, *options)
                ]
                assert labels[0] == labels[1]
                assert len(labels[0]) > 10
            aborted = virsh(other, "-c", lab.a.uri, "domjobabort", standing.name)
            assert (aborted.returncode, aborted.stdout, aborted.stderr) == (0, "\n", "")
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (1, "\n")
            assert errors_of(err) == [ABORTED, *([_stays(standing)] if mover else [])]
    standing.check(lab.a)


def test_a_guest_that_is_already_migrating(
    lab: Lab, standing: LabGuest, by: Callable[..., tuple[Answer, Answer]], shim: Path
) -> None:
    with migrating(lab, standing, shim) as process:
        for done in by("-c", lab.a.uri, "migrate", "--live", standing.name, lab.b.uri):
            assert (done.returncode, done.stdout) == (1, "\n")
            assert "job" in errors_of(done.stderr)[0]
        assert process.poll() is None


def test_the_process_dies_of_sigterm_as_virsh_does(lab: Lab, standing: LabGuest, shim: Path) -> None:
    """virsh dies at once and leaves the rest to the daemons; ours aborts, says where the guest is, and then dies."""
    for mover in (None, shim):
        with migrating(lab, standing, mover) as process:
            process.terminate()
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (-signal.SIGTERM, "")
            if mover is not None:
                assert errors_of(err) == [ABORTED, _stays(standing)]
                assert standing.only_on(lab.a)


def test_ctrl_c_on_a_terminal_aborts_the_migration_and_nobody_else_hears_it(
    lab: Lab, standing: LabGuest, shim: Path
) -> None:
    for mover, program in ((None, REAL), (shim, str(shim / "virsh"))):
        line = shlex.join([program, "-c", lab.a.uri, "migrate", "--live", standing.name, lab.b.uri, "--verbose", *SLOW])
        shell = Terminal(mover, "-c", f'trap "echo heard" INT; {line}; echo "status $?"; stty -a', program="/bin/sh",
                         VIRTMIG_RECORDS=os.environ["VIRTMIG_RECORDS"])  # fmt: skip
        with contextlib.closing(shell):
            _wait_for_job(lab, standing)
            shell.expect("Migration: [")
            shell.expect("Migration: [")  # virsh takes the terminal after the first
            shell.press("x\x03")
            shell.expect(ABORTED)
            assert "heard" not in shell.seen
            shell.expect("status 1")
            shell.expect("intr = ^C")
            shell.expect(" icanon")
            assert shell.wait() == 0
        eventually(lambda: standing.only_on(lab.a), "the guest where it was")
    standing.check(lab.a)


def test_sigint_that_the_parent_ignores_is_not_heard(lab: Lab, guest: GuestFactory, shim: Path) -> None:
    """As a shell starts what stands before `&`."""
    fresh = guest(memory_mib=32, dirty_mib_s=1.0)
    line = shlex.join([str(shim / "virsh"), "-c", lab.a.uri, "migrate", "--live", fresh.name, lab.b.uri, *SLOW])
    more = {"VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"]}
    shell = subprocess.Popen(
        ["sh", "-c", f"trap '' INT; exec {line}"], env=environment(shim, more), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _wait_for_job(lab, fresh)
    shell.send_signal(signal.SIGINT)
    fresh.domain(lab.a).migrateSetMaxSpeed(1024, 0)
    assert shell.communicate(timeout=60)[1] == ""
    assert shell.returncode == 0
    assert fresh.only_on(lab.b)


def test_a_migration_says_nothing_and_uses_the_options_for_all(
    lab: Lab, standing: LabGuest, shim: Path, tmp_path: Path
) -> None:
    given = {"VIRTMIG_MIGRATE_OPTIONS": "--fence --max-downtime 250", "VIRTMIG_RECORDS": str(tmp_path)}
    for done in there_and_back(lab, standing, shim, "", "--live", "--auto-converge", "--timeout", "60", **given):
        assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    standing.check(lab.a)
    (record,) = tmp_path.rglob("*.jsonl")
    first = json.loads(record.read_text().splitlines()[0])
    assert "fence" in json.dumps(first)
    refused = virsh(shim, "-c", lab.a.uri, "migrate", "--live", "--postcopy", standing.name, lab.b.uri, **given)
    assert (refused.returncode, refused.stdout) == (1, "\n")
    assert errors_of(refused.stderr)[0].startswith("--fence holds the destination paused")


def test_a_string_of_commands(lab: Lab, standing: LabGuest, shim: Path) -> None:
    """Ours between the real virsh's; the connection is followed to the other host."""
    name, more = standing.name, {"VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"]}
    for which, source, destination in ((None, lab.a, lab.b), (shim, lab.b, lab.a)):
        line = f"domstate {name}; migrate {name} '{destination.uri}' --live; connect \"{destination.uri}\"; " + (
            f"domstate {name}; migrate-getmaxdowntime {name}; connect '{source.uri}'; migrate-getmaxdowntime {name}"
        )
        done = virsh(which, "-c", source.uri, line, **more)
        assert done.returncode == 1  # the last one: the guest has left
        assert done.stdout == "running\n\n\n\nrunning\n\n300\n\n\n\n"
        assert errors_of(done.stderr) == [f"failed to get domain '{name}'"]
    assert standing.only_on(lab.a)
