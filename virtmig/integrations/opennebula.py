"""OpenNebula's `migrate` action of its KVM driver, behind hooks/opennebula/migrate.

The driver calls DEPLOY_ID DST_HOST SRC_HOST VMID with <VMM_DRIVER_ACTION_DATA> on standard input and takes 0 for done
(OpenNebula src/vmm_mad/remotes/kvm/migrate, lib/kvm/opennebula_vm.rb). Of standard error, lines that begin with
"INFO: " go into the VM's log, and all others together are the VM's ERROR (src/mad/ruby/DriverExecHelper.rb
get_info_from_execution, since 7.0), so that there is one such line here. Where disks are shared, virtmig migrates.
Local disks and other datastores are for OpenNebula's own script, kept as migrate.one: it runs with virtmig's virsh
first in its PATH.

One thing differs on purpose. After a failure OpenNebula's script destroys the destination's copy, whatever the failure
was; this one never destroys a guest.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from virtmig.domain.document import parse_xml
from virtmig.errors import MigrationError, RequestError

#: kvmrc's VIRSH_TRIES (opennebula_vm.rb virsh_retry): only for what passes when a block job ends
TRIES, RETRY_AFTER_S, RETRY_ON = 3, 5.0, "active block job"
#: virtmig migrate --exit-codes fine
DONE, ATTENTION = 0, 5
_SYNC_TIME = """for i in 1 2 3 4; do
    virsh --connect "$1" --readonly dominfo "$2" || exit; virsh --connect "$1" domtime --sync "$2" && exit; sleep 5
done"""
_COMPACT = "sudo -l | grep -q sysctl && sudo -n sysctl vm.drop_caches=3 vm.compact_memory=1"

Done = subprocess.CompletedProcess[str]
#: the driver has asked to end
_stopped = threading.Event()


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver asks for. Folders are the VM's own, on either host."""

    deploy_id: str
    destination: str
    source: str
    shared: bool
    source_folder: PurePosixPath
    destination_folder: PurePosixPath
    options: tuple[str, ...] = ()  # of virtmig migrate, from the VM's template

    @property
    def other_datastore(self) -> bool:
        return self.source_folder.parent.name != self.destination_folder.parent.name

    @property
    def ours(self) -> bool:
        """From host to host, with nothing to copy."""
        return self.shared and self.source != self.destination


def read_action(words: Sequence[str], xml: str) -> Action:
    """`words` as the driver gives them. Raises RequestError, DomainXmlError."""
    if len(words) < 4:
        raise RequestError("migrate takes DEPLOY_ID DST_HOST SRC_HOST VMID", hint="it is called by OpenNebula's driver")
    deploy_id, destination, source, vm_id = words[:4]
    root = parse_xml(xml, what="the driver's action")
    if root.tag != "VMM_DRIVER_ACTION_DATA":
        raise RequestError(f"the driver's action begins with <{root.tag!s}>, not with <VMM_DRIVER_ACTION_DATA>")

    def text(path: str) -> str:
        return (root.findtext(path) or "").strip()

    features = "VM/TEMPLATE/FEATURES/MIGRATE_"
    options = (*_auto_converge(text(f"{features}AUTO_CONVERGE")),)
    options += ("--compressed",) if text(f"{features}COMPRESSED") == "YES" else ()
    target = PurePosixPath(text("DISK_TARGET_PATH") or "/")
    base = text("DATASTORE/BASE_PATH")  # since 7.2; until then it is the same on both hosts
    return Action(
        deploy_id=deploy_id,
        destination=destination,
        source=source,
        shared=text("DATASTORE/TEMPLATE/SHARED").upper() == "YES",
        source_folder=PurePosixPath(base, vm_id) if base else target,
        destination_folder=target,
        options=options,
    )


def _auto_converge(given: str) -> tuple[str, ...]:
    """INITIAL[,INCREMENT] in percent. The template is the VM owner's: nothing but numbers becomes an option."""
    if not given:
        return ()
    if not re.fullmatch(r"\s*\d{1,2}\s*(,\s*\d{1,2}\s*)?", given):
        raise RequestError(f"MIGRATE_AUTO_CONVERGE = {given!r} is not INITIAL,INCREMENT in percent")
    names = ("--auto-converge-initial", "--auto-converge-increment")
    pairs = zip(names, given.split(","), strict=False)
    return ("--auto-converge", *(word for name, value in pairs for word in (name, value.strip())))


class Migration:
    """One action between two hosts with shared disks. `environment` is the driver's with what kvmrc sets."""

    def __init__(self, action: Action, environment: Mapping[str, str]) -> None:
        self._action = action
        self._environment = environment
        self._source = environment.get("LIBVIRT_URI") or "qemu:///system"
        protocol = environment.get("QEMU_PROTOCOL") or "qemu+ssh"
        self._destination = f"{protocol}://{action.destination}/system"

    def command(self) -> list[str]:
        """Raises RequestError for a kvmrc that cannot be understood."""
        given = [*self._words("MIGRATE_OPTIONS"), *self._action.options]
        return ["-c", self._source, "migrate", "--live", "--exit-codes", "fine", *given, self._action.deploy_id,
                self._destination]  # fmt: skip

    def _words(self, name: str) -> list[str]:
        try:
            return shlex.split(self._environment.get(name, ""))
        except ValueError as error:
            raise RequestError(f"kvmrc: {name}: {error}") from None

    def _tries(self) -> int:
        given = self._environment.get("VIRSH_TRIES") or self._environment.get("VIRSH_RETRIES") or str(TRIES)
        if not given.isdecimal():
            raise RequestError(f"kvmrc: VIRSH_TRIES = {given!r} is no number")
        return int(given)

    def go(self) -> None:
        """Raises MigrationError when the guest is not on the destination."""
        command, tries = self.command(), self._tries()
        snapshots, current = self._take_snapshots()
        done = self._migrate(command, tries)
        if done.returncode != DONE:
            stayed = done.returncode != ATTENTION and self._is_at_the_source()
            if stayed:
                self._give_back(snapshots, current, self._source, self._action.source_folder)
            raise MigrationError(self._failure(done, stayed=stayed))
        self._give_back(snapshots, current, self._destination, self._action.destination_folder)
        if self._action.other_datastore:
            return
        if self._environment.get("SYNC_TIME", "").upper() == "YES":
            _detach(_SYNC_TIME, self._destination, self._action.deploy_id)
        if self._environment.get("CLEANUP_MEMORY_ON_STOP", "").upper() == "YES":
            _detach(_COMPACT)

    def _migrate(self, command: list[str], tries: int) -> Done:
        while True:
            tries -= 1
            began = time.monotonic()
            done = _run([sys.executable, "-I", "-c", "from virtmig.cli.main import run; run()", *command])
            took = f"virtmig {shlex.join(command)} ({time.monotonic() - began:.1f}s)"
            if done.returncode == DONE:
                _say(took, done.stderr.rstrip())
                return done
            _say(f"Error executing: {took}", f"\t[stderr]: {done.stderr.rstrip()}")
            if tries <= 0 or RETRY_ON not in done.stderr or _stopped.wait(RETRY_AFTER_S):
                return done

    def _is_at_the_source(self) -> bool:
        state = self._virsh(self._source, "domstate", self._action.deploy_id)
        return state.returncode == 0 and state.stdout.strip() not in ("", "shut off")

    def _failure(self, done: Done, *, stayed: bool) -> str:
        """The last line of the driver's error: what libvirt or virtmig said, and where the guest is."""
        said = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE) or done.stderr.strip().splitlines()[-1:]
        what = "; ".join(dict.fromkeys(said)) or f"virtmig ended with status {done.returncode}"
        if stayed:
            return f"{what}. The guest is on {self._action.source}{self._leftover()}"
        hosts = f"{self._action.source} and {self._action.destination}"
        return f"{what}. Where the guest is, is not certain: look at {hosts}; nothing was removed on either"

    def _leftover(self) -> str:
        """A shut off definition on the destination goes away; anything that may be alive stays, and is named."""
        state = self._virsh(self._destination, "domstate", self._action.deploy_id)
        found = state.stdout.strip()
        if state.returncode or not found:
            return ""
        if found != "shut off":
            return f", and one on {self._action.destination} is {found}: it was left alone"
        self._virsh(self._destination, "undefine", "--keep-nvram", self._action.deploy_id)
        return ""

    # -- snapshots: libvirt does not migrate a domain that has some --------------------------------------------------

    def _take_snapshots(self) -> tuple[list[str], str]:
        """Forget the metadata of snapshots on the source: their names, and the current one. The snapshots stay."""
        listed = self._virsh(self._source, "snapshot-list", self._action.deploy_id, "--name")
        if listed.returncode:
            raise MigrationError(_error_of(listed) or f"cannot list the snapshots of {self._action.deploy_id}")
        names = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
        if not names:
            return [], ""
        current = self._virsh(self._source, "snapshot-current", self._action.deploy_id, "--name")
        for name in names:
            self._logged(self._source, "snapshot-delete", self._action.deploy_id, "--metadata", "--snapshotname", name)
        return names, current.stdout.strip() if current.returncode == 0 else ""

    def _give_back(self, names: Sequence[str], current: str, uri: str, folder: PurePosixPath) -> None:
        for name in names:
            self._logged(uri, "snapshot-create", "--redefine", self._action.deploy_id, str(folder / f"{name}.xml"))
        if current:
            self._logged(uri, "snapshot-current", self._action.deploy_id, current)

    def _logged(self, uri: str, *words: str) -> None:
        done = self._virsh(uri, *words)
        if done.returncode:
            _say(f"Error executing: virsh --connect {uri} {shlex.join(words)}", f"\t[stderr]: {done.stderr.strip()}")

    def _virsh(self, uri: str, *words: str) -> Done:
        return _run(["virsh", "--connect", uri, *words])


def _error_of(done: Done) -> str:
    return "; ".join(re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE))


def _run(words: Sequence[str]) -> Done:
    return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def _detach(script: str, *words: str) -> None:
    """It may take its time; nobody waits for it, and the driver's streams are not kept open."""
    quiet, command = subprocess.DEVNULL, ["sh", "-c", script, "sh", *words]
    subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def _say(*texts: str) -> None:
    """To the log. A number behind "INFO: " would be taken for another VM's."""
    for line in "\n".join(texts).splitlines():
        if line.strip():
            print(f"INFO: virtmig: {line}", file=sys.stderr)


# -- local disks and datastores: OpenNebula's own script ---------------------------------------------------------------


def delegate(original: Path, words: Sequence[str], xml: str) -> int:
    """Run OpenNebula's script; what it calls `virsh` is virtmig's, which passes on all but `migrate`."""
    if not os.access(original, os.X_OK):
        raise RequestError(
            f"{original} is missing: local disks and datastores are moved by OpenNebula's own script",
            hint="keep it beside this one under that name",
        )
    real = shutil.which("virsh")
    with tempfile.TemporaryDirectory(prefix="virtmig-") as folder:
        shim = Path(folder, "virsh")
        program = shlex.join([sys.executable, "-I", "-c", "from virtmig.integrations.virsh_shim import run; run()"])
        shim.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        shim.chmod(0o755)
        path = os.environ.get("PATH", os.defpath)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{path}"}
        if real and "VIRTMIG_REAL_VIRSH" not in environment:
            environment["VIRTMIG_REAL_VIRSH"] = real
        return subprocess.run([original, *words], input=xml, text=True, env=environment, check=False).returncode


def main(words: Sequence[str], xml: str) -> int:
    """`words`: where OpenNebula's own script is, then the driver's. Returns the exit status."""
    name = words[1] if len(words) > 1 else "?"
    try:
        action = read_action(words[1:], xml)
        if not action.ours:
            return delegate(Path(words[0]), words[1:], xml)
        Migration(action, os.environ).go()
    except MigrationError as error:
        line = f"Error migrating VM {name}: {error}" + (f" ({error.hint})" if error.hint else "")
        print(line.replace("\n", "; "), file=sys.stderr)
        return 1
    return 0


def run() -> None:
    """Behind hooks/opennebula/migrate. The driver's TERM goes to the whole group: virtmig aborts, we wait and tell."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: _stopped.set())  # not SIG_IGN, which virtmig would inherit
    os.environ.update(LANG="C", LC_ALL="C")
    sys.exit(main(sys.argv[1:], sys.stdin.read()))
