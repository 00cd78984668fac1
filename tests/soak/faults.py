"""What the fault matrix needs: guests on their way through the agents, faults at known moments, and the last word."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.live.test_migrate import Witness, request
from tests.support.agents import LinkProxy, sessions, settled, through
from tests.support.lab import LabGuest, eventually
from virtmig.errors import MigrationError
from virtmig.lab.agents import kill_agent, start_agent
from virtmig.lab.guest import GuestSettings
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.lab.link import Shape
from virtmig.lab.processes import Process
from virtmig.migrate import migrate
from virtmig.progress import Outcome, Phase, Progress, Status

Action = Callable[[], object]
#: the agents of the matrix give each other up after that long, and a peer that is silent for 30 s is taken for lost
RECONNECT_S = 25
#: slow enough that every fault lands while memory is on its way
PRECOPY = {"bandwidth": 8}
#: a last pass of a second and more over a link of 10 MB/s
SWITCHOVER = {"max_downtime": 3000}
POSTCOPY = {"postcopy": True, "postcopy_after_precopy": True, "bandwidth": 32, "postcopy_bandwidth": 4,
            "max_downtime": 1}  # fmt: skip
#: two copies that run in turn at a switchover are none too many; two that run through this many looks are
_DOUBLED_LOOKS = 3
_LOOK_S = 0.05
#: more than the messages of a recovery
_FLOWING_BYTES = 512 << 10


class Copies:
    """Looks at the virtual CPUs of both hosts' QEMUs themselves, whatever any daemon says."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab, self._name = lab, name
        self._before: dict[int, int] = {}
        self._together = 0
        self.doubled = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="copies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_S):
            moving = sum(self._moved(host) for host in self._lab.hosts)
            self._together = self._together + 1 if moving == 2 else 0
            self.doubled = self.doubled or self._together >= _DOUBLED_LOOKS

    def _moved(self, host: LabHost) -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = host.qemu_pid(self._name)
            for task in Path(f"/proc/{pid}/task").iterdir() if pid else ():
                if (task / "comm").read_text().startswith("CPU "):
                    spent_ns = int((task / "schedstat").read_text().split()[0])
                    before = self._before.get(int(task.name), spent_ns)
                    self._before[int(task.name)] = spent_ns
                    return spent_ns > before
        return False


class Way:
    """One guest on its way from host a to host b. `action` is done once, when `phase` is seen or `words` are said."""

    def __init__(
        self, bench: Bench, guest: LabGuest, action: Action, phase: Phase | None, words: str, *, resumed: bool = False
    ) -> None:
        """`resumed`: only when pages flow again. A QEMU before 8.2 cannot pause while it negotiates a recovery, and one
        that breaks there ends with a segmentation fault (its commit f8c543e808f2), with or without a relay.
        """
        self.witness = Witness(self._sampled)
        self.acted = threading.Event()
        self._bench, self._guest, self._action, self._phase, self._words = bench, guest, action, phase, words
        self.witness.message = self._said  # type: ignore[method-assign]
        self._resumed, self._begun_at = resumed, -1

    def _said(self, text: str, level: str = "info") -> None:
        self.witness.messages.append(text)
        if self._words and self._words in text:
            self._act()

    def _sampled(self, progress: Progress) -> None:
        if progress.phase is not self._phase or not progress.memory_processed_bytes:
            return
        if self._phase is Phase.POSTCOPY and not self._guest.running(self._bench.lab.b):
            return  # before the destination runs, QEMU cannot pause a postcopy
        if self._resumed:
            self._begun_at = progress.memory_processed_bytes if self._begun_at < 0 else self._begun_at
            if progress.memory_processed_bytes < self._begun_at + _FLOWING_BYTES:
                return
        self._act()

    def _act(self) -> None:
        if not self.acted.is_set():
            self.acted.set()
            self._action()


class Bench:
    """The lab with its agents, and one case after the other."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._numbers = itertools.count(1)
        self._timers: list[threading.Timer] = []
        self._killing = threading.Lock()
        self.copies: Copies | None = None
        self.notes: list[str] = []

    # -- guests and their ways -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guest(self, **settings: Any) -> Iterator[LabGuest]:
        values = {"name": f"s{next(self._numbers)}", "memory_mib": 64, "dirty_mib_s": 4.0, **settings}
        guest = LabGuest(self.lab, GuestSettings(**values))
        self.lab.start_guest(guest.settings)
        self.copies = Copies(self.lab, guest.name)
        try:
            yield guest
        finally:
            self.copies.close()
            guest.close()

    def migrate(
        self,
        guest: LabGuest,
        action: Action,
        *,
        phase: Phase | None = None,
        words: str = "",
        address: str = "",
        may_miss: bool = False,
        **options: Any,
    ) -> Outcome | MigrationError:
        """The outcome, or the error of a migration that did not start; the fault must have been injected."""
        way = Way(self, guest, action, phase, words, resumed="postcopy_resume" in options)
        asked = request(guest, self.lab.b, **through(self.lab.a, self.lab.b, address), **options)
        result: Outcome | MigrationError
        try:
            result = migrate(asked, source_uri=self.lab.a.uri, watcher=way.witness)
            self.notes.append(f"{result.status.value}, {result.sentence}")
        except MigrationError as error:
            result = error
            self.notes.append(f"not started: {error.message}")
        assert may_miss or way.acted.is_set(), f"the fault was never injected: {self.notes[-1]}"
        return result

    def command(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "virtmig.cli.main", *words], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)  # fmt: skip

    def migrating(self, guest: LabGuest, **options: Any) -> subprocess.Popen[str]:
        """The same by the command, which can be killed."""
        asked = request(guest, self.lab.b, **through(self.lab.a, self.lab.b), **options)
        words = [word for name in asked if name not in ("domain", "desturi")
                 for word in ((f"--{name}",) if asked[name] is True else (f"--{name}", str(asked[name])))]  # fmt: skip
        return self.command("-c", self.lab.a.uri, "migrate", guest.name, self.lab.b.uri, *words)

    # -- faults ----------------------------------------------------------------------------------------------------

    def cut_for(self, seconds: float) -> Action:
        """Cut the link now, and lay it again after that time."""

        def cut() -> None:
            self.lab.link.cut()
            timer = threading.Timer(seconds, self.lab.link.restore)
            self._timers.append(timer)
            timer.start()

        return cut

    def kill_agent(self, host: LabHost, number: int = signal.SIGKILL) -> Action:
        def kill() -> None:
            with self._killing:
                kill_agent(self.lab, host, number)

        return kill

    def agents_up(self) -> None:
        """Those that were killed, again; one that is being killed just now has gone first."""
        with self._killing:
            for host in self.lab.hosts:
                if host.state.agent is None or not host.state.agent.alive:
                    host.state.agent = None
                    start_agent(self.lab, host, SETTINGS)

    def kill_qemu(self, guest: LabGuest, host: LabHost) -> Action:
        def kill() -> None:
            pid = host.qemu_pid(guest.name)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

        return kill

    def restart_daemon(self, host: LabHost) -> Action:
        def restart() -> None:
            host.kill_daemon()
            host.start_daemon()
            host.await_daemon()

        return restart

    @contextlib.contextmanager
    def slow_link(self) -> Iterator[None]:
        """10 MB/s: QEMU's own limit does not hold in a switchover."""
        self.lab.link.change(Shape(bandwidth_mbit_s=80))
        try:
            yield
        finally:
            self.lab.link.change(Shape())

    @contextlib.contextmanager
    def proxy(self, meddle: Callable[[Any], object] = lambda frame: True) -> Iterator[LinkProxy]:
        path = self.lab.folder / "proxy.sock"
        with LinkProxy(path, self.lab.b.folder / "run" / "virtmig" / "link.sock", meddle) as proxy:
            yield proxy

    # -- afterwards ------------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Whatever a case did to the lab is undone."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self.lab.link.state.cut:
            self.lab.link.restore()
        if self.lab.link.state.shape != Shape():
            self.lab.link.change(Shape())
        for host in self.lab.hosts:
            with contextlib.suppress(MigrationError, ProcessLookupError):
                host.thaw_daemon()
            try:
                host.daemon_pid  # noqa: B018
            except MigrationError:
                host.start_daemon()
                host.await_daemon()
        self.agents_up()

    def survives(self, guest: LabGuest, host: LabHost, seconds: float = 60.0) -> None:
        """The guest runs on `host` alone, whole; nothing is left; and it migrates as if nothing had been."""
        self.tidy()
        eventually(lambda: guest.only_on(host), f"the guest alone on {host.hostname}", seconds)
        guest.check(host)
        assert self.copies is not None
        assert not self.copies.doubled, "two copies have run at once"
        self.nothing_left()
        other = self.lab.b if host is self.lab.a else self.lab.a
        fast: dict[str, Any] = {"postcopy": True, "postcopy_after_precopy": True}
        more = fast if guest.settings.dirty_mib_s is None else {}
        again = migrate(request(guest, other, **through(host, other), **more), source_uri=host.uri)
        assert again.status is Status.COMPLETED, f"afterwards it did not migrate: {again.error or again.sentence}"
        guest.check(other)
        self.nothing_left()
        assert not self.copies.doubled, "two copies have run at once"

    def nothing_left(self, seconds: float = 35.0) -> None:
        """No socket, folder, carrying thread; no session that is said to be on its way."""
        found = settled(self.lab, seconds)
        assert not found, f"left behind: {found}"
        for host in self.lab.hosts:
            going = [row for row in sessions(host) if row.state not in ("failed", "refused", "finished")]
            assert not going, f"{host.hostname} still counts {going[0].state}"

    def recover(self, guest: LabGuest) -> None:
        """`virtmig recover` finishes what broke."""
        socket_path = self.lab.a.folder / "run" / "virtmig" / "agent.sock"
        done = self.command("-c", self.lab.a.uri, "recover", guest.name, "--agent", str(socket_path))
        out, error = done.communicate(timeout=200)
        self.notes.append("recover: " + ((out + error).strip().splitlines() or ["said nothing"])[-1])
        assert done.returncode == 0, f"recover: {(out + error).strip()[-900:]}"


SETTINGS = f'deadlines.reconnect_s = {RECONNECT_S}\nlog.level = "debug"\n'


def agent_process(host: LabHost) -> Process:
    assert host.state.agent is not None
    return host.state.agent
