"""The lab for tests: one for the whole run, guests of their own for each test, faults, and waiting without sleeping."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from virtmig.errors import LabError
from virtmig.lab.agents import agent_log
from virtmig.lab.guest import GuestSettings
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import FULL, SESSION, Lab, check_tools
from virtmig.lab.memory_check import MemoryCheck, check_domain
from virtmig.virt.connection import open_connection

_numbers = itertools.count(1)


def eventually(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Poll until `condition` gives something true and return it; fail the test with `what` otherwise."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.02)
    return value


class LabGuest:
    """One running guest and where it is. `uri(host)` and `domain(host)` are libvirt's view of it."""

    def __init__(self, lab: Lab, settings: GuestSettings) -> None:
        self.lab = lab
        self.settings = settings
        self.name = settings.name
        self.uuid = settings.uuid
        self._connections: dict[str, Any] = {}

    def connection(self, host: LabHost) -> Any:
        known = self._connections.get(host.name)
        if known is None or not known.isAlive():
            known = self._connections[host.name] = open_connection(host.uri)
        return known

    def domain(self, host: LabHost) -> Any:
        return self.connection(host).lookupByUUIDString(self.uuid)

    def state(self, host: LabHost) -> int | None:
        """libvirt's state number on this host, None when it does not know the guest."""
        try:
            return int(self.domain(host).state(0)[0])
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return None

    def running(self, host: LabHost) -> bool:
        return self.state(host) == libvirt.VIR_DOMAIN_RUNNING

    def only_on(self, host: LabHost) -> bool:
        """It runs on this host and on no other."""
        return self.running(host) and all(
            self.state(other) in (None, libvirt.VIR_DOMAIN_SHUTOFF) for other in self.lab.hosts if other is not host
        )

    def check(self, host: LabHost) -> MemoryCheck:
        """Every byte of its memory, and its heart still beats."""
        result = check_domain(self.domain(host), self.settings.pages)
        beat = self.lab.heartbeat(host, self.name) or 0
        if self.running(host):
            eventually(lambda: (self.lab.heartbeat(host, self.name) or 0) > beat, "another heartbeat")
        return result

    def close(self) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()
        self.lab.remove_guest(self.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed in a lab shows what its agents have said."""
    report = yield
    if report.failed:
        labs = {id(value): value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Lab)}
        for host in [host for each in labs.values() for host in each.hosts]:
            if (log := agent_log(host)).exists():
                tail = log.read_text(errors="replace").splitlines()[-40:]
                report.sections.append((f"the agent of {host.hostname}", "\n".join(tail)))
    return report


def _start(form: str, user: str = "") -> Iterator[Lab]:
    try:
        check_tools(form)
    except LabError as error:
        pytest.skip(f"no lab: {error}")
    folder = Path(tempfile.mkdtemp(prefix="vml-", dir="/tmp"))
    folder.rmdir()
    lab = Lab.up(folder, form=form, user=user)
    try:
        yield lab
    finally:
        lab.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two hosts in the fullest form this user can have."""
    yield from _start(FULL if os.getuid() == 0 else SESSION)


@pytest.fixture(scope="session")
def full_lab(lab: Lab) -> Lab:
    if not lab.full:
        pytest.skip("needs root: namespaces, postcopy, frozen daemons")
    return lab


@pytest.fixture(scope="session")
def session_lab() -> Iterator[Lab]:
    """Two session daemons of an unprivileged user; as root, of nobody."""
    yield from _start(SESSION, "nobody" if os.getuid() == 0 else "")


GuestFactory = Callable[..., LabGuest]


@pytest.fixture
def guest(lab: Lab) -> Iterator[GuestFactory]:
    """`guest(memory_mib=..., dirty_mib_s=..., in_lab=..., ...)`: a fresh one on host a, removed afterwards."""
    made: list[LabGuest] = []

    def make(*, persistent: bool = False, in_lab: Lab | None = None, **settings: Any) -> LabGuest:
        where = in_lab or lab
        values = {"name": f"t{next(_numbers)}", "memory_mib": 48, "dirty_mib_s": 4.0, **settings}
        fresh = LabGuest(where, GuestSettings(**values))
        made.append(fresh)
        for host in where.hosts:  # a daemon that crashed in an earlier test fails that one alone
            host.start_daemon()
            host.await_daemon()
        where.start_guest(fresh.settings, persistent=persistent)
        return fresh

    yield make
    for fresh in made:
        fresh.close()


@contextlib.contextmanager
def frozen(host: LabHost) -> Iterator[None]:
    """The host's libvirt daemon stands still (SIGSTOP) and goes on afterwards."""
    host.freeze_daemon()
    try:
        yield
    finally:
        host.thaw_daemon()
