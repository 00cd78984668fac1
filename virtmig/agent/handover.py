"""The handover: the one moment at which a source lets go, and what both hosts write down before it may come.

A source's QEMU has migrated when its destination's says SHUT on the return path; only then libvirt tells the
destination to start the guest. Until SHUT is let through the source alone may run it, and does when anything fails. So
the agents hold it until the destination's libvirt has answered (one that is frozen would start the guest later, when
the source has given it up and runs it again) and the journals on disk say "handover", the destination's first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from virtmig.agent.config import AgentConfig
from virtmig.engine.agents import runs_as_system
from virtmig.errors import MigrationError, RemoteProtocolError
from virtmig.stream.return_path import RequestPages, ReturnPathDecoder, Shut

if TYPE_CHECKING:
    from virtmig.virt.hosts import Host

#: less than any deadline of the link; a daemon that lives answers in a millisecond
ANSWER_S = 3.0


class ReturnPathWatch:
    """Called with each piece of main's return path before it goes on; "" lets it, else it says why it may not.

    `settle` is called once, before SHUT. After a postcopy's first request the guest runs at the destination, and
    nothing is left to hold back. Bytes that are no return path are QEMU's business: they go on unwatched.
    """

    def __init__(self, settle: Callable[[], str]) -> None:
        self._settle = settle
        self._decoder: ReturnPathDecoder | None = ReturnPathDecoder(bitmap_limit_bytes=1 << 16)

    def __call__(self, data: memoryview) -> str:
        if self._decoder is None:
            return ""
        try:
            self._decoder.feed(bytes(data))
            for event in self._decoder.events():
                if isinstance(event, (Shut, RequestPages)):
                    self._decoder = None
                    return self._settle() if isinstance(event, Shut) and event.value == 0 else ""
        except RemoteProtocolError:
            self._decoder = None
        return ""


class LocalLibvirt:
    """A connection to this host's libvirt, opened while memory still moves, so that its answer costs no downtime."""

    def __init__(self, config: AgentConfig, uuid: str) -> None:
        self._uuid = uuid
        self._uri = config.qemu.libvirt_uri or ("qemu:///system" if runs_as_system() else "qemu:///session")
        self._host: Host | None = None
        self._lock = threading.Lock()
        self._closed = False
        if uuid and self._uri != "none":
            threading.Thread(target=self._open, name="libvirt", daemon=True).start()

    def silent(self) -> str:
        """Empty when it has answered about the guest just now, or was never there to be asked; else what is wrong."""
        host = self._host
        if host is None:
            return ""
        from virtmig.whereabouts import Presence

        answer = host.ask(self._uuid, incoming=True, seconds=ANSWER_S)
        if answer.presence is Presence.NO_ANSWER:
            return f"libvirt of the destination ({self._uri}) does not answer: {answer.detail}"
        return ""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            host, self._host = self._host, None
        if host is not None:
            host.close()

    def _open(self) -> None:
        try:
            from virtmig.virt.hosts import Host
        except ImportError:
            return
        with contextlib.suppress(MigrationError):
            host = Host(self._uri)
            with self._lock:
                if not self._closed:
                    self._host = host
                    return
            host.close()
