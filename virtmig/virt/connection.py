"""Connections to libvirt daemons: opened with a clear error, watched by one event loop thread, kept alive.

The blocking migrate call and the monitoring calls must not share a connection: with a 9.0 client, calls on a
connection that another thread is using stall for seconds or for ever. Open two.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt

from virtmig.errors import ConnectionFailed, DomainNotFound, VirtError

log = logging.getLogger("virtmig.virt")

#: a silent peer is given up after about (count + 1) * interval seconds, as libvirt's own p2p keepalive does
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 5
#: behind the fence a destination that is given up too early costs a retry, never a second copy: 8 s instead of 30
FENCED_KEEPALIVE = (2, 3)

#: what `open_connection` uses when it is told nothing else; virsh's -k and -K set it
default_keepalive = (KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)

#: so long a call of another thread may hold up a close before that is left to a thread of its own
_CLOSE_PATIENCE_S = 0.2

_calls_lock = threading.Lock()
_calls: set[threading.Thread] = set()  # each in a call on a connection that others may close
_loop_lock = threading.Lock()
_loop_thread: threading.Thread | None = None


def start_event_loop() -> None:
    """Start libvirt's default event loop in a daemon thread, once; it must run before the first connection is opened.

    Without it there are no events, no keepalive and no close callbacks. The thread lives as long as the process:
    libvirt's default implementation cannot be taken back.
    """
    global _loop_thread
    with _loop_lock:
        if _loop_thread is not None and _loop_thread.is_alive():
            return
        libvirt.registerErrorHandler(lambda *_: None, None)  # libvirt prints errors to stderr by itself otherwise
        libvirt.virEventRegisterDefaultImpl()
        # a timer that does nothing keeps the loop turning, so that handles added by other threads are picked up
        libvirt.virEventAddTimeout(250, lambda *_: None, None)

        def turn() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError as error:  # pragma: no cover - a broken handle must not end all events
                    log.debug("event loop: %s", error)

        _loop_thread = threading.Thread(target=turn, name="virtmig-libvirt-events", daemon=True)
        _loop_thread.start()


def set_default_keepalive(interval_s: int | None, count: int | None) -> None:
    """virsh's -k and -K: for every connection opened from now on; an interval of 0 turns keepalive off."""
    global default_keepalive
    default_keepalive = (
        KEEPALIVE_INTERVAL_S if interval_s is None else interval_s,
        KEEPALIVE_COUNT if count is None else count,
    )


def open_connection(
    uri: str | None,
    *,
    readonly: bool = False,
    keepalive: tuple[int, int] | None = None,
) -> Any:
    """A libvirt.virConnect for `uri` (None: libvirt's own default and aliases), with keepalive on where it exists.

    Raises ConnectionFailed naming the URI, with libvirt's own words and a hint.
    """
    start_event_loop()
    try:
        connection = libvirt.openReadOnly(uri) if readonly else libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise ConnectionFailed(
            f"failed to connect to {uri or 'the default hypervisor'}: {error.get_error_message() or error}",
            uri=uri or "",
            code=error.get_error_code() or -1,
            domain=error.get_error_domain() or -1,
            hint=_connect_hint(uri or "", str(error)),
        ) from error
    with contextlib.suppress(libvirt.libvirtError):  # local drivers (test:///) have no keepalive
        connection.setKeepAlive(*(keepalive or default_keepalive))
    return connection


def _connect_hint(uri: str, text: str) -> str:
    lower = text.lower()
    if (
        "driver name" in lower
        or "could not parse" in lower
        or "unable to parse" in lower
        or "no connection driver" in lower
    ):
        return "a libvirt URI looks like qemu+ssh://HOST/system or qemu:///system"
    if "permission denied" in lower:
        return "the socket belongs to another user or group: join the group libvirt, or use sudo"
    if "name or service not known" in lower or "resolve" in lower or "name resolution" in lower:
        return "check the host name in the URI"
    if "no such file" in lower or "connection refused" in lower:
        there = f" try: virsh -c '{uri}' version" if uri else ""
        return f"is libvirtd (or virtqemud) running there?{there}"
    if "authentication" in lower or "certificate" in lower:
        return "check the credentials: virt-pki-validate for tls, ssh-agent for ssh"
    return f"try: virsh -c '{uri}' version" if uri else ""


def start_call(run: Callable[[], None], name: str) -> None:
    """A thread in which `run` uses connections: while it does, `close_connection` closes none."""

    def counted() -> None:
        try:
            run()
        finally:
            with _calls_lock:
                _calls.discard(thread)

    thread = threading.Thread(target=counted, name=name, daemon=True)
    with _calls_lock:
        thread.start()
        _calls.add(thread)


def close_connection(connection: Any) -> None:
    """Close it behind the calls of other threads. Those that nobody waits for any more may be on this connection, and
    libvirt frees it under them (virDomainLookupByUUIDString and its like hold no reference).
    """
    with _calls_lock:
        others = _calls - {threading.current_thread()}
    deadline = time.monotonic() + _CLOSE_PATIENCE_S
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [thread for thread in others if thread.is_alive()]

    def close() -> None:
        for thread in late:
            thread.join()
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()

    if late:
        threading.Thread(target=close, name="virtmig-close", daemon=True).start()
    else:
        close()


@contextlib.contextmanager
def connected(uri: str | None, *, readonly: bool = False) -> Iterator[Any]:
    """`open_connection` as a context."""
    connection = open_connection(uri, readonly=readonly)
    try:
        yield connection
    finally:
        close_connection(connection)


@contextlib.contextmanager
def translated(**known: Any) -> Iterator[None]:
    """libvirtError -> VirtError with its code and domain; keywords (hint, guest, ...) go to VirtError."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise virt_error(error, **known) from error


def virt_error(error: Any, **known: Any) -> VirtError:
    return VirtError(
        error.get_error_message() or str(error),
        code=error.get_error_code() or -1,
        domain=error.get_error_domain() or -1,
        **known,
    )


def is_connection_error(error: Any) -> bool:
    """Whether a libvirtError says that the daemon did not answer, rather than that it said no."""
    code = error.get_error_code()
    if code in (
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_NO_CONNECT,
    ):
        return True
    text = (error.get_error_message() or "").lower()
    return code == libvirt.VIR_ERR_INTERNAL_ERROR and ("client socket is closed" in text or "connection closed" in text)


def lookup_domain(connection: Any, name: str) -> Any:
    """A domain by id, UUID or name, in virsh's order (virshLookupDomainInternal). Raises DomainNotFound."""
    attempts: list[Callable[[], Any]] = []
    if name.isdigit():
        attempts.append(lambda: connection.lookupByID(int(name)))
    if len(name) == 36:
        attempts.append(lambda: connection.lookupByUUIDString(name))
    attempts.append(lambda: connection.lookupByName(name))
    last: Any = None
    for attempt in attempts:
        try:
            return attempt()
        except libvirt.libvirtError as error:
            last = error
            if is_connection_error(error):
                break
    with contextlib.suppress(libvirt.libvirtError):
        known = [domain.name() for domain in connection.listAllDomains()]
        hint = f"known there: {', '.join(sorted(known)[:8])}" if known else "no domain is known there"
        raise DomainNotFound(
            f"failed to get domain '{name}'",
            code=last.get_error_code() or -1,
            domain=last.get_error_domain() or -1,
            hint=hint,
        )
    raise virt_error(last)
