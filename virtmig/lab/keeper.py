"""The process that stands for one lab host. A script of its own: it needs nothing but Python and runs as any user.

    keeper.py CONFIG.json

It makes the private mounts (full form), then starts the host's libvirt daemon whenever it is told to (SIGUSR1) and it
is not running, and ends it with everything below it on SIGTERM. As a child subreaper it inherits the QEMUs that the
daemon leaves behind and reaps them at once: an init that reaps late makes libvirt wait for a dead source.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    with open(sys.argv[1]) as file:
        config = json.load(file)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    for source, target in config["binds"]:
        subprocess.run(["mount", "--bind", source, target], check=True)
    if config["hostname"]:
        subprocess.run(["hostname", config["hostname"]], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # taken one by one below, so that none is lost between two looks
    with open(config["ready"], "w") as file:
        file.write(str(os.getpid()))
    daemon = 0
    while True:
        received = signal.sigwaitinfo(signals).si_signo
        if received == signal.SIGTERM:
            return end(daemon)
        while True:
            try:
                pid, _status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                break
            if pid == daemon:
                daemon = 0
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(config["pidfile"])  # says that the next SIGUSR1 will be heeded, and no pid goes stale
        if received == signal.SIGUSR1 and daemon == 0:
            daemon = start(config)


def start(config: dict[str, Any]) -> int:
    """Start the daemon in the foreground, as our child, its output in the host's log; its pid goes to a file."""
    with open(config["log"], "ab") as log:
        process = subprocess.Popen(
            config["daemon"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **config["env"]},
            cwd="/",
            start_new_session=True,
            preexec_fn=unblock,
        )
    with open(config["pidfile"] + ".new", "w") as file:
        file.write(str(process.pid))
    os.rename(config["pidfile"] + ".new", config["pidfile"])
    process.returncode = 0  # we reap it ourselves
    return process.pid


def unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end(daemon: int) -> int:
    """End the daemon first, then every process left below us, and wait until none is left."""
    if daemon:
        quietly_kill(daemon, signal.SIGTERM)
        quietly_kill(daemon, signal.SIGCONT)
        if not gone(daemon, 2.0):
            quietly_kill(daemon, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 2.0
        while children := list(below(os.getpid())):
            for pid in children:
                quietly_kill(pid, number)
                quietly_kill(pid, signal.SIGCONT)
            reap()
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
    reap()
    return 0


def below(parent: int) -> Iterator[int]:
    """Every descendant, the deepest first."""
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        children = [int(word) for word in file.read().split()]
    for child in children:
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            yield from below(child)
        yield child


def quietly_kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return True
        except ChildProcessError:
            return True
        time.sleep(0.01)
    return False


if __name__ == "__main__":
    sys.exit(main())
