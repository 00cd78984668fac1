"""systemd's side played with a real datagram socket and really inherited descriptors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmig.agent.notify import Notifier, activated_sockets


@pytest.fixture
def manager() -> Iterator[tuple[socket.socket, str]]:
    """What the service manager listens on, and its address."""
    with (
        tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
    ):
        listening.bind(f"{folder}/notify")
        listening.settimeout(20)
        yield listening, f"{folder}/notify"


def test_what_the_manager_is_told(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert notifier.active
    assert notifier.ready("listening on tcp:[::]:1")
    assert listening.recv(4096) == b"READY=1\nSTATUS=listening on tcp:[::]:1"
    assert notifier.status("2 migrations\nSTOPPING=1")  # a line end cannot add a variable
    assert listening.recv(4096) == b"STATUS=2 migrations STOPPING=1"
    assert notifier.watchdog()
    assert listening.recv(4096) == b"WATCHDOG=1"
    assert notifier.extend_timeout(2.5)
    assert listening.recv(4096) == b"EXTEND_TIMEOUT_USEC=2500000"
    assert notifier.stopping()
    assert listening.recv(4096) == b"STOPPING=1"


def test_an_abstract_address() -> None:
    name = f"virtmig-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(20)
        assert Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert listening.recv(4096) == b"READY=1"


def test_without_a_manager_nothing_happens(manager: tuple[socket.socket, str]) -> None:
    notifier = Notifier({})
    assert not notifier.active
    assert not notifier.ready()
    assert notifier.watchdog_s is None
    gone = Notifier({"NOTIFY_SOCKET": manager[1] + "-gone"})
    assert not gone.watchdog()


def test_a_manager_that_does_not_read_blocks_nobody(manager: tuple[socket.socket, str]) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager[1]})
    sent = 0
    while notifier.status("x" * 1000):
        sent += 1
        assert sent < 100_000
    assert sent > 0


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_how_often_the_watchdog_wants_to_hear(variables: dict[str, str], seconds: float | None) -> None:
    assert Notifier(variables).watchdog_s == seconds


# -- activation ----------------------------------------------------------------------------------------------------

#: what systemd does between fork and exec: descriptors from 3 on, and the variables with the child's own pid
_SYSTEMD = """
import json, os, sys
count, names, script = int(sys.argv[1]), sys.argv[2], sys.argv[3]
for at in range(count):
    os.set_inheritable(3 + at, True)
environment = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}
os.execve(sys.executable, [sys.executable, "-c", script], environment)
"""
_AGENT = f"""
import json, os, sys
sys.path[:0] = {sys.path!r}
from virtmig.agent.notify import activated_sockets
found = activated_sockets()
print(json.dumps({{
    "sockets": [[s.name, s.socket.family.name, str(s.socket.getsockname())] for s in found],
    "inheritable": [s.socket.get_inheritable() for s in found],
    "variables": [name for name in os.environ if name.startswith("LISTEN_")],
    "again": len(activated_sockets()),
}}))
"""


def test_sockets_that_systemd_hands_over() -> None:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder:
        path = Path(folder) / "agent.sock"
        made = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET), socket.socket(socket.AF_INET)]
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made[0].bind(str(path))
        made[1].bind(("127.0.0.1", 0))
        for listening in made[:2]:
            listening.listen()
        ordered = [made[0], made[2], datagrams, made[1]]  # the third is not listening
        # dup2 into the child's 3.. happens in a shell of descriptors: Popen keeps numbers, so move them there first
        mover = "import fcntl, os, sys\nfds = [int(x) for x in sys.argv[1].split()]\n"
        mover += "moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]\n"
        mover += "[os.dup2(fd, 3 + i) for i, fd in enumerate(moved)]\nsys.argv = ['-', *sys.argv[2:]]\n"
        try:
            done = subprocess.run(
                [sys.executable, "-c", mover + _SYSTEMD, " ".join(str(s.fileno()) for s in ordered), "4",
                 "local:raw:udp:virtmig-agent.socket", _AGENT],
                pass_fds=[s.fileno() for s in ordered], capture_output=True, text=True, check=True,
            )  # fmt: skip
            port = made[1].getsockname()[1]
        finally:
            for each in (*made, datagrams):
                each.close()
    said = json.loads(done.stdout)
    assert said["sockets"] == [
        ["local", "AF_UNIX", str(path)],
        ["virtmig-agent.socket", "AF_INET", f"('127.0.0.1', {port})"],
    ]
    assert said["inheritable"] == [False, False]
    assert said["variables"] == []
    assert said["again"] == 0


@pytest.mark.parametrize(
    "variables",
    [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "one"},
     {"LISTEN_PID": str(os.getpid())}],
)  # fmt: skip
def test_sockets_for_somebody_else_are_left_alone(variables: dict[str, str]) -> None:
    environment = dict(variables)
    assert activated_sockets(environment) == ()
    assert environment == {}
