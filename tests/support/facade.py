"""Calls of libvirt's binding and of the facade beside each other, on one guest that stays on host a."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt

from tests.support.lab import LabGuest
from virtmig.integrations.migrate_to_uri3 import Settings, wrap
from virtmig.lab.guest import GuestSettings
from virtmig.lab.lab import Lab

LIVE, P2P, TUNNELLED = libvirt.VIR_MIGRATE_LIVE, libvirt.VIR_MIGRATE_PEER2PEER, libvirt.VIR_MIGRATE_TUNNELLED
PERSIST, UNDEFINE = libvirt.VIR_MIGRATE_PERSIST_DEST, libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
DISK, INC = libvirt.VIR_MIGRATE_NON_SHARED_DISK, libvirt.VIR_MIGRATE_NON_SHARED_INC
OFFLINE = libvirt.VIR_MIGRATE_OFFLINE
POSTCOPY, PARALLEL = libvirt.VIR_MIGRATE_POSTCOPY, libvirt.VIR_MIGRATE_PARALLEL
PLAIN = Settings({"transport": "direct"})

#: (method, arguments) of a call; `there` is the URI of the destination, `conn` a connection to it
Shape = Callable[[str, Any], tuple[str, tuple[Any, ...], dict[str, Any]]]


def switch_line() -> str:
    """What hooks/nova.md tells an administrator to write into virtmig.pth."""
    page = (Path(__file__).parents[2] / "hooks" / "nova.md").read_text()
    return page.partition("```pth\n")[2].partition("```")[0]


def to_uri3(params: Any, flags: Any, uri: str = "") -> Shape:
    return lambda there, conn: ("migrateToURI3", (uri or there, params, flags), {})


def managed(params: Any, flags: Any) -> Shape:
    return lambda there, conn: ("migrate3", (conn, params, flags), {})


@contextlib.contextmanager
def standing(lab: Lab, name: str) -> Iterator[LabGuest]:
    """One persistent guest for many tests."""
    guest = LabGuest(lab, GuestSettings(name=name, memory_mib=16, dirty_mib_s=2.0))
    lab.start_guest(guest.settings, persistent=True)
    try:
        yield guest
    finally:
        guest.close()


def at_home(guest: LabGuest) -> LabGuest:
    """It, on host a, wherever the last test has left it."""
    lab = guest.lab
    if guest.running(lab.b):
        guest.domain(lab.b).migrate3(guest.connection(lab.a), {}, LIVE)
    assert guest.only_on(lab.a)
    return guest


def answer(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a caller can tell apart, and the words."""
    try:
        return call(), ""
    except libvirt.libvirtError as error:
        return (error.get_error_code(), error.get_error_domain()), str(error)
    except (TypeError, OverflowError, AttributeError) as error:
        return type(error), str(error)


def both_fail(lab: Lab, guest: LabGuest, shape: Shape) -> tuple[Any, str, str]:
    """The answer of both, which is the same, and the words of each; the guest stays where it was."""
    domain, there = guest.domain(lab.a), guest.connection(lab.b)
    method, given, named = shape(lab.b.uri, there)
    state = guest.state(lab.a)
    plain, libvirts = answer(lambda: getattr(domain, method)(*given, **named))
    ours, words = answer(lambda: getattr(wrap(domain, PLAIN), method)(*given, **named))
    assert ours == plain, f"libvirt: {libvirts!r}; facade: {words!r}"
    assert isinstance(ours, (tuple, type)), f"it succeeded: {ours}"
    assert guest.state(lab.a) == state
    return ours, libvirts, words
