"""systemd's two small protocols, which it promises to keep: sd_notify(3) and socket activation, sd_listen_fds(3).

Everything does nothing where systemd did not start this process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

import msgspec

_FIRST_DESCRIPTOR = 3


class Notifier:
    """Tells the service manager how we are. A message that cannot be sent is dropped: it may not hurt a migration."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        self._address = given.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_s(given)  # tell watchdog() at least this often; None: nobody waits for it

    @property
    def active(self) -> bool:
        return bool(self._address)

    def ready(self, status: str = "") -> bool:
        return self.send(READY="1", **({"STATUS": status} if status else {}))

    def stopping(self, status: str = "") -> bool:
        return self.send(STOPPING="1", **({"STATUS": status} if status else {}))

    def status(self, text: str) -> bool:
        """One line that `systemctl status` shows."""
        return self.send(STATUS=text)

    def watchdog(self) -> bool:
        """Still alive. Call it from what must not hang, not from a thread that only does this."""
        return self.send(WATCHDOG="1")

    def extend_timeout(self, seconds: float) -> bool:
        """Starting or stopping goes on and may take this much longer; say it again before that has passed."""
        return self.send(EXTEND_TIMEOUT_USEC=str(round(seconds * 1_000_000)))

    def send(self, **variables: str) -> bool:
        """One datagram; whether it was sent."""
        if not self._address:
            return False
        lines = (f"{name}={value.replace(chr(10), ' ')}" for name, value in variables.items())
        # "@name" is the abstract name \0name
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as there:
                there.setblocking(False)
                there.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
        return True


def _watchdog_s(given: Mapping[str, str]) -> float | None:
    """Half of what the unit's WatchdogSec allows, as sd_watchdog_enabled(3) advises."""
    text = given.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or int(text) == 0 or given.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 2_000_000


class ActivatedSocket(msgspec.Struct, frozen=True):
    """A listening socket that systemd made; `name` is FileDescriptorName= of its unit."""

    name: str
    socket: socket.socket


def activated_sockets(environment: MutableMapping[str, str] | None = None) -> tuple[ActivatedSocket, ...]:
    """The sockets handed over to this process, each once: the variables are taken out, so that no child sees them.

    Descriptors that are no listening stream socket are closed and left out.
    """
    given = os.environ if environment is None else environment
    pid, count, names = (given.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return ()
    labels = names.split(":")
    found = []
    for index in range(int(count)):
        descriptor = _FIRST_DESCRIPTOR + index
        label = labels[index] if index < len(labels) else ""
        try:
            os.set_inheritable(descriptor, False)
            listening = socket.socket(fileno=descriptor)
        except OSError:
            continue
        if listening.type != socket.SOCK_STREAM or not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listening.close()
            continue
        found.append(ActivatedSocket(label, listening))
    return tuple(found)
