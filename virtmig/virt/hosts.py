"""The two ends of a migration as libvirt connections, and asking them where the guest is, with a deadline.

Any libvirt call can block for half a minute when a daemon is frozen. What we wait for here is bounded: a call runs
in its own thread, and a host that has not answered by the deadline has "not answered", which is never a no.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt

from virtmig.errors import ConnectionFailed
from virtmig.virt.connection import close_connection, is_connection_error, open_connection, start_call
from virtmig.whereabouts import HostAnswer, Presence

T = TypeVar("T")

#: how long one host may take to say where the guest is before it counts as silent
ANSWER_S = 4.0


class NoAnswerError(Exception):
    """The call did not come back in time; it may still be running in its thread."""


def answer_within(seconds: float, call: Callable[[], T], name: str = "virtmig-ask", *, own: bool = False) -> T:
    """Run `call` in a thread and return its result or raise its error; NoAnswerError after `seconds`.

    `own`: it uses no connection but those that it opens itself. Otherwise none is closed before it has come back.
    """
    box: queue.Queue[tuple[bool, Any]] = queue.Queue(1)

    def run() -> None:
        try:
            box.put((True, call()))
        except Exception as error:
            box.put((False, error))

    if own:
        threading.Thread(target=run, name=name, daemon=True).start()
    else:
        start_call(run, name)
    try:
        came_back, value = box.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswerError(f"no answer within {seconds:g} s") from None
    if not came_back:
        raise value
    result: T = value
    return result


class Host:
    """One end: a URI, a name for people, and a connection that is opened again when it broke.

    `connection` is for questions and actions; the blocking migrate call opens connections of its own.
    """

    def __init__(self, uri: str | None, connection: Any | None = None) -> None:
        self.uri = uri
        self._connection = connection if connection is not None else open_connection(uri)
        self._owned = connection is None
        self.name = self._find_name()

    @property
    def connection(self) -> Any:
        return self._connection

    def _find_name(self) -> str:
        with contextlib.suppress(libvirt.libvirtError, NoAnswerError):
            return str(answer_within(ANSWER_S, self._connection.getHostname))
        return self.uri or "this host"

    def full_uri(self) -> str:
        """The URI that libvirt really opened, aliases and defaults resolved."""
        with contextlib.suppress(libvirt.libvirtError, NoAnswerError):
            return str(answer_within(ANSWER_S, self._connection.getURI))
        return self.uri or ""

    def reconnect(self) -> None:
        """Open the connection again. Raises ConnectionFailed."""
        broken, self._connection = self._connection, open_connection(self.uri)
        if self._owned:
            threading.Thread(target=close_connection, args=(broken,), name="virtmig-close", daemon=True).start()
        self._owned = True

    def ask(self, uuid: str, *, incoming: bool, seconds: float = ANSWER_S) -> HostAnswer:
        """What this host says about the domain; reconnects once when the connection turns out to be broken."""
        deadline = time.monotonic() + seconds
        detail = ""
        while (left := deadline - time.monotonic()) > 0:
            try:
                presence = answer_within(left, lambda: _look(self._connection, uuid, incoming=incoming))
            except NoAnswerError as error:
                return HostAnswer(self.name, Presence.NO_ANSWER, detail or str(error))
            except libvirt.libvirtError as error:
                detail = error.get_error_message() or str(error)
                if not is_connection_error(error):
                    return HostAnswer(self.name, Presence.NO_ANSWER, detail)
                try:
                    answer_within(max(0.1, deadline - time.monotonic()), self.reconnect, own=True)
                except (ConnectionFailed, NoAnswerError) as failed:
                    detail = str(failed)
                    time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
            else:
                return HostAnswer(self.name, presence)
        return HostAnswer(self.name, Presence.NO_ANSWER, detail or f"no answer within {seconds:g} s")

    def find(self, uuid: str) -> Any | None:
        """The domain object, or None when this host answered that it has none. Raises VirtError."""
        return _find(self._connection, uuid)

    def close(self) -> None:
        """Close without waiting for a daemon that does not answer: a frozen one would hold us for half a minute."""
        if not self._owned:
            return
        with contextlib.suppress(NoAnswerError, libvirt.libvirtError):
            answer_within(1.0, lambda: close_connection(self._connection), "virtmig-close", own=True)


def _find(connection: Any, uuid: str) -> Any | None:
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _look(connection: Any, uuid: str, *, incoming: bool) -> Presence:
    domain = _find(connection, uuid)
    if domain is None:
        return Presence.ABSENT
    try:
        state, reason = domain.state(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return Presence.ABSENT
        raise
    return read_state(state, reason, incoming=incoming)


def read_state(state: int, reason: int, *, incoming: bool) -> Presence:
    """libvirt's (state, reason) of virDomainGetState -> Presence, as seen from the destination or the source."""
    if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
        return Presence.SHUT_OFF
    if state == libvirt.VIR_DOMAIN_PAUSED:
        match reason:
            case libvirt.VIR_DOMAIN_PAUSED_POSTCOPY:
                return Presence.POSTCOPY
            case libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED:
                return Presence.POSTCOPY_FAILED
            case libvirt.VIR_DOMAIN_PAUSED_MIGRATION:
                return Presence.INCOMING if incoming else Presence.LEAVING
            case libvirt.VIR_DOMAIN_PAUSED_STARTING_UP:
                return Presence.INCOMING if incoming else Presence.PAUSED
        return Presence.PAUSED
    if state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
        if reason == libvirt.VIR_DOMAIN_RUNNING_POSTCOPY:
            return Presence.POSTCOPY
        # the constant is younger than 9.0 bindings built elsewhere; the number is libvirt's ABI
        if reason == getattr(libvirt, "VIR_DOMAIN_RUNNING_POSTCOPY_FAILED", 11):
            return Presence.POSTCOPY_FAILED
    return Presence.RUNNING


def silent(name: str, why: str) -> HostAnswer:
    """The answer of a host that we have no connection to."""
    return HostAnswer(name, Presence.NO_ANSWER, why)
