"""The lab: two libvirt hosts on one machine, up and down, and opened again by a later command."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from virtmig.errors import LabError
from virtmig.lab.guest import GuestSettings, boot_image, domain_xml
from virtmig.lab.hosts import FULL, LONGEST_FOLDER, NETWORK, SESSION, HostState, LabHost, find_daemon
from virtmig.lab.link import Link, LinkState, Shape
from virtmig.lab.processes import await_true


class LabState(msgspec.Struct, kw_only=True):
    """lab.json: all that a later command needs to find everything again."""

    form: str
    folder: str
    user: str = ""
    hosts: list[HostState] = []
    link: LinkState = msgspec.field(default_factory=LinkState)
    guests: list[GuestSettings] = []


def default_folder(name: str = "") -> Path:
    return Path(f"/tmp/vmlab-{os.getuid()}{f'-{name}' if name else ''}")


class Lab:
    """A running lab. Made by `up` or `opened`."""

    def __init__(self, state: LabState) -> None:
        self.state = state
        self.folder = Path(state.folder)
        self.a, self.b = (LabHost(host) for host in state.hosts)
        self.link = Link(state.link, (self.a, self.b), self.folder)

    @property
    def hosts(self) -> tuple[LabHost, LabHost]:
        return self.a, self.b

    @property
    def full(self) -> bool:
        return self.state.form == FULL

    # -- up, open, down --------------------------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        folder: Path | None = None,
        *,
        form: str = "auto",
        user: str = "",
        shape: Shape | None = None,
    ) -> Lab:
        """Start both hosts. `user`: run the session form's daemons as that user (root only).

        A lab that fails half way is taken down again. Raises LabError.
        """
        folder = folder or default_folder()
        form = choose_form(form)
        check_tools(form)
        if len(str(folder)) > LONGEST_FOLDER:
            raise LabError(
                f"the folder {folder} is too long: unix socket paths end at 108 bytes",
                hint=f"--dir with at most {LONGEST_FOLDER} characters",
            )
        if shape is not None and shape != Shape() and form != FULL:
            raise LabError(
                "bandwidth, delay and loss need the full form (network namespaces)",
                hint="run as root, or leave them out",
            )
        with _lock(folder):
            if (folder / "lab.json").exists():
                raise LabError(f"a lab is already up in {folder}", hint="virtmig lab down, or --name for a second one")
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            _refuse_foreign(os.lstat(folder), folder)
            hosts = [
                HostState(name=name, form=form, folder=str(folder / name), address=f"{NETWORK}.{number}", user=user)
                for number, name in ((1, "a"), (2, "b"))
            ]
            lab = cls(LabState(form=form, folder=str(folder), user=user, hosts=hosts))
            try:
                lab._start(shape or Shape())
            except BaseException:
                lab._stop()
                raise
            return lab

    @classmethod
    def opened(cls, folder: Path | None = None) -> Lab:
        """The lab that is up in `folder`. Raises LabError when there is none."""
        folder = folder or default_folder()
        try:
            state = msgspec.json.decode((folder / "lab.json").read_bytes(), type=LabState)
        except FileNotFoundError:
            raise LabError(f"no lab is up in {folder}", hint="virtmig lab up") from None
        except msgspec.MsgspecError as error:
            raise LabError(f"{folder / 'lab.json'} is damaged: {error}", hint=f"remove {folder} by hand") from None
        return cls(state)

    def down(self) -> None:
        """End everything that belongs to this lab and remove its folder. Safe to repeat."""
        with _lock(self.folder):
            self._stop()

    def _start(self, shape: Shape) -> None:
        (self.folder / "guests").mkdir(exist_ok=True)
        (self.folder / "serial").mkdir(exist_ok=True)
        self.folder.chmod(0o755)
        if self.state.user:
            shutil.chown(self.folder / "serial", self.state.user)
        addresses = {host.hostname: host.state.address for host in self.hosts}
        for host in self.hosts:
            host.write_configuration(addresses)
            self._bring_capability_cache(host)
            host.start_keeper()
            self.save()
        if self.full:
            self.link.connect(shape)
        for host in self.hosts:
            host.start_daemon()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda host: host.await_daemon(), self.hosts))
        self.save()

    def _stop(self) -> None:
        self.link.disconnect()
        for host in self.hosts:
            self._keep_capability_cache(host)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda host: host.stop(), self.hosts))
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> None:
        """Write lab.json, atomically."""
        new = self.folder / "lab.json.new"
        new.write_bytes(msgspec.json.format(msgspec.json.encode(self.state), indent=1))
        os.rename(new, self.folder / "lab.json")

    # libvirt probes each QEMU binary for seconds and keeps what it found in a cache, which is checked against the
    # times of both binaries: safe to carry from one lab to the next

    def _cache_home(self) -> Path:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return base / "virtmig" / f"lab-{self.state.form}{self.state.user}"

    def _host_cache(self, host: LabHost) -> Path:
        return host.folder / "cache" / ("qemu" if self.full else "libvirt/qemu") / "capabilities"

    def _bring_capability_cache(self, host: LabHost) -> None:
        with contextlib.suppress(OSError):
            shutil.copytree(self._cache_home(), self._host_cache(host), dirs_exist_ok=True)

    def _keep_capability_cache(self, host: LabHost) -> None:
        with contextlib.suppress(OSError, shutil.Error):
            if any(self._host_cache(host).glob("*.xml")):
                shutil.copytree(self._host_cache(host), self._cache_home(), dirs_exist_ok=True)

    # -- guests ----------------------------------------------------------------------------------------------------

    def start_guest(self, settings: GuestSettings, *, persistent: bool = False, host: LabHost | None = None) -> None:
        """Start a guest on host a (or `host`) and wait until it has filled its memory. Raises LabError."""
        host = host or self.a
        image = self.folder / "guests" / f"{settings.name}.img"
        image.write_bytes(boot_image(settings))
        image.chmod(0o444)
        host.serial_file(settings.name).unlink(missing_ok=True)
        xml = self.folder / "guests" / f"{settings.name}.xml"
        serial = f"{host.serial_folder}/{settings.name}.serial"
        xml.write_text(domain_xml(settings, image=image, serial=serial, emulator=find_qemu()))
        if persistent:
            self.virsh(host, "define", str(xml))
            self.virsh(host, "start", settings.name)
        else:
            self.virsh(host, "create", str(xml))
        self.state.guests = [g for g in self.state.guests if g.name != settings.name] + [settings]
        self.save()
        await_true(lambda: self.heartbeat(host, settings.name), 30.0, f"the first heartbeat of {settings.name}")

    def heartbeat(self, host: LabHost, guest: str) -> int | None:
        """The last tick count the guest printed on this host (250 a second), None before the first."""
        try:
            lines = host.serial_file(guest).read_bytes().split(b"\n")
        except OSError:
            return None
        for line in reversed(lines[:-1]):
            with contextlib.suppress(ValueError):
                return int(line, 16)
        return None

    def remove_guest(self, name: str) -> None:
        """Destroy and undefine it on both hosts, whatever state it is in."""
        uuid = GuestSettings(name=name).uuid  # it may have been given another name on its way
        for host in self.hosts:
            for verb in ("destroy", "undefine"):
                subprocess.run(["virsh", "-c", host.uri, verb, uuid], capture_output=True, timeout=60)
        self.state.guests = [guest for guest in self.state.guests if guest.name != name]
        self.save()

    def guest(self, name: str) -> GuestSettings:
        for settings in self.state.guests:
            if settings.name == name:
                return settings
        raise LabError(f"the lab has no guest {name}", hint=f"it has: {', '.join(g.name for g in self.state.guests)}")

    def where(self, name: str) -> dict[str, str]:
        """Each host's `virsh domstate --reason`: "absent" when it says it has no such guest, else "unknown (why)"."""
        uuid = GuestSettings(name=name).uuid  # it may have been given another name on its way
        states = {}
        for host in self.hosts:
            done = subprocess.run(
                ["virsh", "-c", host.uri, "domstate", uuid, "--reason"],
                capture_output=True,
                text=True,
                timeout=60,
                env={**os.environ, "LC_ALL": "C"},
            )
            absent = "failed to get domain" in done.stderr
            states[host.name] = done.stdout.strip() or ("absent" if absent else f"unknown ({_one_line(done.stderr)})")
        return states

    def virsh(self, host: LabHost, *words: str) -> str:
        """Plain virsh on this host, from outside. Raises LabError with virsh's words."""
        done = subprocess.run(["virsh", "-c", host.uri, *words], capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"virsh {' '.join(words)} on host {host.name}: {_one_line(done.stderr)}")
        return done.stdout


def _one_line(virsh_error: str) -> str:
    return virsh_error.strip().replace("error: ", "").replace("\n", ": ")


def choose_form(form: str) -> str:
    if form not in ("auto", FULL, SESSION):
        raise LabError(f"'{form}' is no form of the lab", hint="full, session or auto")
    if form == FULL and os.getuid() != 0:
        raise LabError("the full form of the lab needs root: namespaces, a veth pair", hint="sudo, or --form session")
    if form == "auto":
        return FULL if os.getuid() == 0 else SESSION
    return form


def find_qemu() -> str:
    for name in ("qemu-system-x86_64", "qemu-kvm"):
        for folder in (*os.environ.get("PATH", "").split(":"), "/usr/bin", "/usr/libexec"):
            if folder and os.access(Path(folder) / name, os.X_OK):
                return str(Path(folder) / name)
    raise LabError("qemu-system-x86_64 is not installed", hint="Debian: apt install qemu-system-x86")


def check_tools(form: str) -> None:
    """Raises LabError naming everything that is missing for this form."""
    missing = [] if find_daemon() else ["libvirtd"]
    needed = ["virsh", "qemu-system-x86_64"]
    needed += ["unshare", "nsenter", "ip", "tc", "mount", "hostname"] if form == FULL else []
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing += [tool for tool in needed if shutil.which(tool, path=folders) is None]
    if missing:
        raise LabError(f"the lab needs {', '.join(missing)}", hint="./dev setup installs or names the packages")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Two `up`s of one folder: the second waits for nothing and is told."""
    path = Path(f"{folder}.lock")
    while True:
        # the folder's parent is usually /tmp, where anybody may have put a link or a file of that name
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LabError(f"cannot lock {path}: {error.strerror}", hint="--dir with a folder of your own") from None
        try:
            _refuse_foreign(os.fstat(lock), path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError(f"another command is busy with the lab in {folder}") from None
            try:
                removed = os.stat(path).st_ino != os.fstat(lock).st_ino
            except FileNotFoundError:
                removed = True
            if removed:
                continue  # its last owner did so between our open and our lock: ours guards nothing
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(lock)


def _refuse_foreign(status: os.stat_result, path: Path) -> None:
    """Root runs what lies in the lab's folder: it must be ours alone."""
    if status.st_uid != os.getuid() or stat.S_ISLNK(status.st_mode):
        raise LabError(f"{path} belongs to somebody else", hint="--name or --dir for another place")
