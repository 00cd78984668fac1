"""OpenNebula's migrate action: what the driver gives, what its own script does, and guests that move in the lab."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import libvirt
import pytest

from tests.support.lab import LabGuest, eventually
from virtmig.errors import MigrationError, RequestError
from virtmig.integrations.opennebula import Migration, read_action
from virtmig.lab.guest import GuestSettings
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab

SCRIPT = Path(__file__).parents[2] / "hooks" / "opennebula" / "migrate"
WORDS = ["one-12", "host-b", "host-a", "12", "12", "host-a"]  # the driver adds VM and host once more


def action_xml(*, shared: str = "YES", target: str = "/var/lib/one/datastores/0/12", features: str = "") -> str:
    """As src/vmm/VirtualMachineManager.cc format_message and the VMM executor put it together."""
    return (
        f"<VMM_DRIVER_ACTION_DATA><HOST><![CDATA[host-a]]></HOST><DEPLOY_ID>one-12</DEPLOY_ID>"
        f"<DISK_TARGET_PATH>{target}</DISK_TARGET_PATH><VM><ID>12</ID><TEMPLATE><FEATURES>{features}</FEATURES>"
        f"</TEMPLATE></VM><DATASTORE><BASE_PATH><![CDATA[/var/lib/one//datastores/0]]></BASE_PATH>"
        f"<TEMPLATE><SHARED><![CDATA[{shared}]]></SHARED></TEMPLATE></DATASTORE></VMM_DRIVER_ACTION_DATA>"
    )


def test_what_the_driver_asks_for() -> None:
    action = read_action(WORDS, action_xml(features="<MIGRATE_COMPRESSED>YES</MIGRATE_COMPRESSED>"))
    assert (action.deploy_id, action.destination, action.source) == ("one-12", "host-b", "host-a")
    assert action.source_folder == action.destination_folder == PurePosixPath("/var/lib/one/datastores/0/12")
    assert (action.shared, action.ours, action.other_datastore) == (True, True, False)
    assert action.options == ("--compressed",)
    assert not read_action(WORDS, action_xml(shared="NO")).ours
    assert not read_action(["one-12", "host-a", *WORDS[2:]], action_xml()).ours
    assert read_action(WORDS, action_xml(target="/var/lib/one/datastores/100/12")).other_datastore
    older = action_xml().replace("<BASE_PATH><![CDATA[/var/lib/one//datastores/0]]></BASE_PATH>", "")
    assert not read_action(WORDS, older).other_datastore


def test_the_command() -> None:
    features = "<MIGRATE_AUTO_CONVERGE>20, 10</MIGRATE_AUTO_CONVERGE>"
    action = read_action(WORDS, action_xml(features=features))
    given = {"MIGRATE_OPTIONS": "--postcopy --on-stall 'postcopy'", "QEMU_PROTOCOL": "qemu+tls"}
    assert " ".join(Migration(action, given).command()) == (
        "-c qemu:///system migrate --live --exit-codes fine --postcopy --on-stall postcopy --auto-converge "
        "--auto-converge-initial 20 --auto-converge-increment 10 one-12 qemu+tls://host-b/system"
    )
    assert Migration(action, {}).command()[-1] == "qemu+ssh://host-b/system"
    for name, value in (("MIGRATE_OPTIONS", "--postcopy 'x"), ("VIRSH_TRIES", "many")):
        with pytest.raises(RequestError, match=f"kvmrc: {name}"):  # nothing was touched: there is no such host
            Migration(action, {name: value}).go()


@pytest.mark.parametrize(
    ("words", "xml", "said"),
    [
        (WORDS[:3], action_xml(), "migrate takes DEPLOY_ID DST_HOST SRC_HOST VMID"),
        (WORDS, "<VM/>", "begins with <VM>"),
        (WORDS, "", "is empty"),
        (WORDS, "<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><a>&e;</a>", "document type"),
        (
            WORDS,
            action_xml(features="<MIGRATE_AUTO_CONVERGE>20 --xml /etc/passwd</MIGRATE_AUTO_CONVERGE>"),
            "is not INITIAL,INCREMENT",
        ),
    ],
)
def test_what_is_not_understood_is_refused(words: list[str], xml: str, said: str) -> None:
    with pytest.raises(MigrationError, match=said):
        read_action(words, xml)


class Remotes:
    """A host's /var/tmp/one: the script in its place, kvmrc, and beside it OpenNebula's own script."""

    def __init__(self, folder: Path) -> None:
        self.script = folder / "vmm" / "kvm" / "migrate"
        self.kvmrc = folder / "etc" / "vmm" / "kvm" / "kvmrc"
        self.script.parent.mkdir(parents=True)
        self.kvmrc.parent.mkdir(parents=True)
        shutil.copy(SCRIPT, self.script)
        self.write()

    def write(self, **values: str) -> None:
        given = {"LIBVIRT_URI": "qemu:///system", "QEMU_PROTOCOL": "qemu+tcp", **values}
        lines = [f"export {name}={value!r}" for name, value in given.items()]
        self.kvmrc.write_text("\n".join([*lines, f"VIRTMIG_PYTHON={sys.executable}", ""]))

    def own_script(self, text: str) -> None:
        path = self.script.with_name("migrate.one")
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def remotes(tmp_path: Path) -> Remotes:
    return Remotes(tmp_path / "one")


def test_local_disks_are_left_to_opennebulas_own_script(remotes: Remotes, tmp_path: Path) -> None:
    xml = action_xml(shared="NO")
    done = subprocess.run([remotes.script, *WORDS], input=xml, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error migrating VM one-12: {remotes.script}.one is missing")

    # it keeps what it was given, and calls virsh: ours for `migrate`, the real one for all else
    remotes.own_script(
        f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/xml\n'
        "virsh --connect test:///default domstate test\nvirsh --connect test:///default migrate test --zerocopy\n"
        "exit 7\n"
    )
    done = subprocess.run([remotes.script, *WORDS], input=xml, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "running\n\n")
    assert (tmp_path / "words").read_text().split() == WORDS
    assert (tmp_path / "xml").read_text() == xml
    assert "error: " in done.stderr


def test_a_missing_python_is_an_error_that_names_it(remotes: Remotes) -> None:
    remotes.kvmrc.write_text("VIRTMIG_PYTHON=/nonexistent/python\n")
    done = subprocess.run([remotes.script, *WORDS], input=action_xml(), capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "/nonexistent/python" in done.stderr


# -- in the lab --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standing(full_lab: Lab) -> Iterator[LabGuest]:
    guest = LabGuest(full_lab, GuestSettings(name="one-12", memory_mib=24, dirty_mib_s=2.0))
    full_lab.start_guest(guest.settings)
    yield guest
    guest.close()


def sides(guest: LabGuest) -> tuple[LabHost, LabHost]:
    """Where it runs, and the other host."""
    lab = guest.lab
    return (lab.a, lab.b) if guest.only_on(lab.a) else (lab.b, lab.a)


def driver(remotes: Remotes, at: LabHost, *words: str, xml: str) -> subprocess.Popen[str]:
    """The driver's call, on that host."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/", "VIRTMIG_RECORDS": os.environ["VIRTMIG_RECORDS"]}
    process = subprocess.Popen(
        at.command([str(remotes.script), *words]), env=environment, cwd="/", text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(xml)
    process.stdin.close()
    process.stdin = None
    return process


#: the driver's own code, as VmmAction has it: what the core is told, and what goes into the VM's log
DRIVER_RB = """
require_relative "#{ENV['ONE_SOURCES']}/src/mad/ruby/CommandManager"
require_relative "#{ENV['ONE_SOURCES']}/src/mad/ruby/DriverExecHelper"
include DriverExecHelper
@send_mutex = Mutex.new
done = LocalCommand.run(ARGV[0], log_method(12), STDIN.read, 60)
result, info = get_info_from_execution(done)
send_message('MIGRATE', result, 12, info)
"""


@pytest.fixture
def sources() -> str:
    folder = os.environ.get("VIRTMIG_MANAGERS", "")
    if not folder or not shutil.which("ruby"):
        pytest.skip("needs ruby and OpenNebula's sources in $VIRTMIG_MANAGERS/one")
    return f"{folder}/one"


@pytest.mark.lab
@pytest.mark.root
@pytest.mark.slow
def test_opennebulas_own_driver_calls_it(standing: LabGuest, remotes: Remotes, sources: str, tmp_path: Path) -> None:
    """What does not fit is the VM's error, in one sentence; then it moves."""
    source, destination = sides(standing)
    script = tmp_path / "driver.rb"
    script.write_text(DRIVER_RB)
    line = shlex.join([str(remotes.script), standing.name, destination.hostname, source.hostname, "12"])
    environment = {**os.environ, "ONE_SOURCES": sources}

    def act() -> list[str]:
        words = source.command(["ruby", str(script), line])
        done = subprocess.run(words, input=action_xml(), env=environment, capture_output=True, text=True, timeout=90)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    remotes.write(MIGRATE_OPTIONS="--fence --postcopy")
    *log, said = act()
    assert said.startswith("MIGRATE FAILURE 12 Error migrating VM one-12: --fence holds the destination paused")
    assert said.endswith(f"The guest is on {source.hostname}")
    assert all(text.startswith(("LOG I 12 ", "LOG I -1 virtmig: ")) for text in log)
    assert standing.only_on(source)
    remotes.write()
    *log, said = act()
    assert said == "MIGRATE SUCCESS 12 -"
    assert log[0].startswith("LOG I -1 virtmig: virtmig -c qemu:///system migrate --live")
    assert all(text.startswith("LOG I -1 virtmig: ") for text in log)
    assert standing.only_on(destination)
    standing.check(destination)


def called(remotes: Remotes, at: LabHost, *words: str, xml: str) -> subprocess.CompletedProcess[str]:
    process = driver(remotes, at, *words, xml=xml)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def snapshots(guest: LabGuest, host: LabHost) -> list[str]:
    return sorted(snapshot.getName() for snapshot in guest.domain(host).listAllSnapshots())


@pytest.mark.lab
@pytest.mark.root
def test_a_guest_moves_with_its_snapshots(standing: LabGuest, remotes: Remotes, tmp_path: Path) -> None:
    """libvirt refuses to migrate a domain that has snapshots: they are forgotten before and told again afterwards."""
    source, destination = sides(standing)
    folder = tmp_path / "datastores" / "0" / "12"
    folder.mkdir(parents=True)
    domain = standing.domain(source)
    text = (
        "<domainsnapshot><name>before</name><state>running</state><creationTime>1700000000</creationTime>"
        f"<memory snapshot='no'/>{domain.XMLDesc(0)}</domainsnapshot>"
    )
    (folder / "before.xml").write_text(text)
    domain.snapshotCreateXML(text, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
    words = [standing.name, destination.hostname, source.hostname, "12"]
    xml = action_xml(target=str(folder)).replace("/var/lib/one//datastores/0", str(folder.parent))

    remotes.write(MIGRATE_OPTIONS="--fence --postcopy")  # refused by the plan, after the snapshots were forgotten
    failed = called(remotes, source, *words, xml=xml)
    assert (failed.returncode, failed.stdout) == (1, "")
    *log, last = failed.stderr.splitlines()
    assert log[0].startswith("INFO: virtmig: Error executing: virtmig -c qemu:///system migrate")
    assert all(line.startswith("INFO: virtmig: ") for line in log)
    assert last.startswith("Error migrating VM one-12: --fence holds the destination paused")
    assert last.endswith(f"The guest is on {source.hostname}")
    assert standing.only_on(source)
    assert snapshots(standing, source) == ["before"]

    remotes.write(MIGRATE_OPTIONS="--max-downtime 250", SYNC_TIME="no")
    there = called(remotes, source, *words, xml=xml)
    assert (there.returncode, there.stdout) == (0, ""), there
    uri = f"qemu+tcp://{destination.hostname}/system"
    assert f"migrate --live --exit-codes fine --max-downtime 250 one-12 {uri}" in there.stderr
    assert standing.only_on(destination)
    standing.check(destination)
    assert snapshots(standing, destination) == ["before"]
    for snapshot in standing.domain(destination).listAllSnapshots():
        snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


@pytest.mark.lab
@pytest.mark.root
def test_the_drivers_timeout_aborts_and_is_answered(standing: LabGuest, remotes: Remotes) -> None:
    """TERM to the whole group, as CommandManager.rb does: the guest stays, and the error says so."""
    source, destination = sides(standing)
    remotes.write(MIGRATE_OPTIONS="--bandwidth 1")
    words = [standing.name, destination.hostname, source.hostname, "12"]
    process = driver(remotes, source, *words, xml=action_xml())
    eventually(lambda: standing.domain(source).jobInfo()[0], "the job")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1].endswith(f"The guest is on {source.hostname}")
    assert standing.only_on(source)


@pytest.mark.lab
@pytest.mark.root
def test_what_runs_on_the_destination_is_never_destroyed(standing: LabGuest, remotes: Remotes) -> None:
    """Another guest has the name there, so libvirt refuses; OpenNebula's script would then destroy that one."""
    source, destination = sides(standing)
    other = standing.domain(source).XMLDesc(0).replace(standing.uuid, GuestSettings(name="namesake").uuid)
    namesake = standing.connection(destination).createXML(other, 0)
    try:
        words = [standing.name, destination.hostname, source.hostname, "12"]
        failed = called(remotes, source, *words, xml=action_xml())
        assert failed.returncode == 1
        said = f"The guest is on {source.hostname}, and one on {destination.hostname} is running: it was left alone"
        assert failed.stderr.splitlines()[-1].endswith(said)
        assert namesake.state(0)[0] == libvirt.VIR_DOMAIN_RUNNING
        assert standing.only_on(source)
    finally:
        namesake.destroy()
