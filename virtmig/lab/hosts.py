"""One lab host: its folder, its configuration, its daemon, its URI.

    full      as root: private mount, network and UTS namespaces; everything works (postcopy, hooks, storage copy)
    session   as any user: a session daemon with folders of its own; everything but postcopy, unless the system
              lets that user use userfaultfd

Nothing of the system's own libvirt is touched: no file in /etc/libvirt, no socket in /run/libvirt.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from virtmig.errors import LabError
from virtmig.lab.processes import Process, await_true

FULL, SESSION = "full", "session"
NETWORK = "10.77.0"
#: unix socket paths end at 108 bytes, and QEMU's monitor sockets lie deep in the host's folder
LONGEST_FOLDER = 40


class HostState(msgspec.Struct, kw_only=True):
    """What lab.json keeps of one host."""

    name: str  # "a" or "b"
    form: str
    folder: str
    address: str
    keeper: Process | None = None
    agent: Process | None = None
    user: str = ""


class LabHost:
    """A host of the lab; `state` is all there is to it, so that a later command can open it again."""

    def __init__(self, state: HostState) -> None:
        self.state = state
        self.folder = Path(state.folder)

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def hostname(self) -> str:
        return f"lab-{self.state.name}"

    @property
    def full(self) -> bool:
        return self.state.form == FULL

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "libvirt" / f"{_daemon_path().stem.replace('libvirtd', 'libvirt')}-sock"

    @property
    def uri(self) -> str:
        """Works from everywhere on this machine, also as the destination that the other host's daemon opens."""
        return f"qemu+unix:///{'system' if self.full else 'session'}?socket={self.socket}"

    @property
    def tcp_uri(self) -> str:
        """Works inside the lab's network (`virtmig lab exec a -- ...`); the full form only."""
        return f"qemu+tcp://{self.hostname}/system"

    @property
    def log(self) -> Path:
        return self.folder / "log" / "daemon.log"

    @property
    def serial_folder(self) -> str:
        """Where a guest's serial line goes, as its XML names it: private to each host in the full form."""
        return "/var/log/libvirt" if self.full else str(self.folder.parent / "serial")

    def serial_file(self, guest: str) -> Path:
        """The same file, as seen from outside."""
        return (self.folder / "log" if self.full else self.folder.parent / "serial") / f"{guest}.serial"

    # -- up and down -----------------------------------------------------------------------------------------------

    def write_configuration(self, other_addresses: dict[str, str]) -> None:
        for part in ("run", "etc", "varlib", "cache", "log", "home"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "run").chmod(0o700 if not self.full else 0o755)
        host_uuid = f"{self.name * 8}-{self.name * 4}-4{self.name * 3}-8{self.name * 3}-{self.name * 12}"
        daemon: dict[str, object] = {
            "host_uuid": host_uuid,
            "log_outputs": f"2:file:{self.folder / 'log' / 'daemon.log'}",
        }
        qemu: dict[str, object] = {"stdio_handler": "file", "security_driver": "none"}
        qemu |= {"keepalive_interval": 2, "keepalive_count": 3}  # a frozen peer is given up after 8 s, not 30
        if self.full:
            daemon["log_outputs"] = "2:file:/var/log/libvirt/daemon.log"
            daemon |= {"auth_unix_rw": "none", "auth_unix_ro": "none"}
            if _daemon_path().stem == "libvirtd":
                daemon |= {"listen_tls": 0, "listen_tcp": 1, "listen_addr": self.state.address, "auth_tcp": "none"}
            qemu |= {
                "user": "root",
                "group": "root",
                "dynamic_ownership": 0,
                "remember_owner": 0,
                "cgroup_controllers": [],
                "namespaces": [],
                "seccomp_sandbox": 0,
                "migration_address": "0.0.0.0",
                "migration_host": self.state.address,
            }
            hosts = "127.0.0.1 localhost\n" + "".join(
                f"{address} {name}\n" for name, address in other_addresses.items()
            )
            (self.folder / "hosts").write_text(hosts)
            (self.folder / "machine-id").write_text(self.name * 32 + "\n")
        else:
            qemu |= {"migration_host": "127.0.0.2"}  # libvirt refuses 127.0.0.1 by name; all of 127/8 is loopback
        configuration = self._configuration_folder()
        configuration.mkdir(parents=True, exist_ok=True)
        (configuration / f"{_daemon_path().stem}.conf").write_text(_conf(daemon))
        (configuration / "qemu.conf").write_text(_conf(qemu))

    def start_keeper(self) -> None:
        """Start the process that stands for this host and wait until its mounts are made."""
        ready = self.folder / "keeper.ready"
        ready.unlink(missing_ok=True)
        config = {
            "binds": self._binds(),
            "hostname": self.hostname if self.full else "",
            "ready": str(ready),
            "daemon": [str(_daemon_path()), *(["--listen"] if self.full and self._offers_tcp else [])],
            "env": {} if self.full else self.environment(),
            "log": str(self.folder / "daemon.out"),
            "pidfile": str(self.folder / "daemon.pid"),
        }
        script = self.folder / "keeper.py"
        shutil.copy(Path(__file__).parent / "keeper.py", script)
        (self.folder / "keeper.json").write_text(json.dumps(config))
        if self.state.user:
            _give_away(self.folder, self.state.user)
        command = [*self._prefix(), self._python(), str(script), str(self.folder / "keeper.json")]
        with (self.folder / "keeper.out").open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", start_new_session=True
            )
        try:
            await_true(
                lambda: (ready.is_file() and ready.read_text().strip() != "") or process.poll() is not None,
                10.0,
                f"the keeper of host {self.name}",
                self.folder / "keeper.out",
            )
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.poll() is not None:
            raise LabError(f"host {self.name} did not start: {_tail(self.folder / 'keeper.out')}")
        self.state.keeper = Process.of(int(ready.read_text()))
        process.returncode = 0  # it outlives us; nobody here waits for it

    def start_daemon(self) -> None:
        """Start the libvirt daemon if it is not running; returns at once, see `await_daemon`."""
        if self.state.keeper is None or not self.state.keeper.alive:
            raise LabError(f"host {self.name} is not up", hint="virtmig lab up")
        self.state.keeper.signal(signal.SIGUSR1)

    def await_daemon(self, seconds: float = 20.0) -> None:
        """Wait until the daemon accepts connections. Raises LabError with the end of its log, at once when it died."""
        pidfile = self.folder / "daemon.pid"
        born = died = False

        def settled() -> bool:
            nonlocal born, died
            if self._accepts():
                return True
            died = born and not pidfile.exists()  # the keeper removes it when it reaps the daemon
            born = born or pidfile.exists()
            return died

        await_true(settled, seconds, f"the libvirt daemon of host {self.name}", self.log)
        if died:  # before it has read its configuration it complains on standard error
            words = _tail(self.log) or _tail(self.folder / "daemon.out")
            raise LabError(f"the libvirt daemon of host {self.name} ended at once: {words}")

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    def stop(self) -> None:
        """End the agent, the daemon, its guests and the keeper."""
        if self.state.agent is not None:
            self.state.agent.signal(signal.SIGTERM)
            self.state.agent.end(5.0)
            self.state.agent = None
        if self.state.keeper is not None:
            self.state.keeper.end(15.0)
            with contextlib.suppress(ChildProcessError):  # ours only when this process called `up`
                os.waitpid(self.state.keeper.pid, 0)
            self.state.keeper = None

    # -- the daemon, for fault tests ---------------------------------------------------------------------------------

    @property
    def daemon_pid(self) -> int:
        """The pid of the libvirt daemon. Raises LabError when it is not running."""
        try:
            return int((self.folder / "daemon.pid").read_text())
        except (OSError, ValueError):
            raise LabError(f"the libvirt daemon of host {self.name} is not running") from None

    def freeze_daemon(self) -> None:
        """SIGSTOP, and wait until it stands still: the signal is only queued when kill() returns."""
        status = Path(f"/proc/{self.daemon_pid}/status")
        os.kill(self.daemon_pid, signal.SIGSTOP)
        await_true(lambda: "(stopped)" in status.read_text(), 5.0, "the frozen daemon's standstill")

    def thaw_daemon(self) -> None:
        os.kill(self.daemon_pid, signal.SIGCONT)

    def kill_daemon(self) -> None:
        """kill -9; the guests stay. Returns when the keeper has reaped it: until then its socket may still accept."""
        os.kill(self.daemon_pid, signal.SIGKILL)
        await_true(lambda: not (self.folder / "daemon.pid").exists(), 5.0, "the killed daemon's end")

    def qemu_pid(self, guest: str) -> int | None:
        """The pid of a guest's QEMU on this host."""
        folder = self.folder / "run" / "libvirt" / "qemu"
        for place in (folder / f"{guest}.pid", folder / "run" / f"{guest}.pid"):
            if place.is_file():
                return int(place.read_text())
        return None

    # -- running things on the host ----------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What a command needs in its environment to be on this host (session form)."""
        if self.full:
            return {}
        folder = self.folder
        return {
            "HOME": str(folder / "home"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "XDG_CONFIG_HOME": str(folder / "etc"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_DATA_HOME": str(folder / "varlib"),
        }

    def command(self, words: list[str]) -> list[str]:
        """`words` as a command that runs on this host."""
        if self.state.keeper is None:
            raise LabError(f"host {self.name} is not up", hint="virtmig lab up")
        if self.full:
            return ["nsenter", "-t", str(self.state.keeper.pid), "-m", "-n", "-u", "--", *words]
        return ["env", *(f"{key}={value}" for key, value in self.environment().items()), *words]

    # -- details -----------------------------------------------------------------------------------------------------

    @property
    def _offers_tcp(self) -> bool:
        return _daemon_path().stem == "libvirtd"

    def _configuration_folder(self) -> Path:
        return self.folder / "etc" if self.full else self.folder / "etc" / "libvirt"

    def _binds(self) -> list[tuple[str, str]]:
        if not self.full:
            return []
        binds = [(self.folder / "run", "/run"), (self.folder / "hosts", "/etc/hosts")]
        if Path("/etc/machine-id").exists():
            binds.append((self.folder / "machine-id", "/etc/machine-id"))
        for part, target in (("varlib", "/var/lib/libvirt"), ("cache", "/var/cache/libvirt"),
                             ("log", "/var/log/libvirt"), ("etc", "/etc/libvirt")):  # fmt: skip
            Path(target).mkdir(parents=True, exist_ok=True)  # there on every host that has the daemon; else empty
            binds.append((self.folder / part, target))
        return [(str(source), target) for source, target in binds]

    def _prefix(self) -> list[str]:
        if self.full:
            return ["unshare", "-m", "-n", "-u", "--propagation", "private", "--"]
        if self.state.user:
            entry = pwd.getpwnam(self.state.user)
            ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
            return ["setpriv", *ids, "--"]
        return []

    def _python(self) -> str:
        """An interpreter that the host's user can run: ours may lie in a folder that only we can enter."""
        system = Path("/usr/bin/python3")
        return str(system) if self.state.user and system.exists() else sys.executable


def find_daemon() -> Path | None:
    """libvirtd, or virtqemud where the modular daemons replaced it."""
    for name in ("libvirtd", "virtqemud"):
        for folder in (*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/usr/local/sbin"):
            if folder and os.access(Path(folder) / name, os.X_OK):
                return Path(folder) / name
    return None


def _daemon_path() -> Path:
    found = find_daemon()
    if found is None:
        raise LabError(
            "libvirtd is not installed", hint="Debian: apt install libvirt-daemon libvirt-daemon-driver-qemu"
        )
    return found


def _conf(settings: dict[str, object]) -> str:
    def text(value: object) -> str:
        if isinstance(value, list):
            return "[ " + ", ".join(f'"{item}"' for item in value) + " ]"
        return str(value) if isinstance(value, int) else f'"{value}"'

    return "".join(f"{key} = {text(value)}\n" for key, value in settings.items())


def _give_away(folder: Path, user: str) -> None:
    entry = pwd.getpwnam(user)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def _tail(path: Path, lines: int = 5) -> str:
    return " / ".join(path.read_text(errors="replace").strip().splitlines()[-lines:]) if path.exists() else ""
