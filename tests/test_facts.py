"""Facts are plain data: they survive JSON both ways, and what is not known stays unknown."""

from __future__ import annotations

import msgspec
import pytest

from tests.support.hosts import DESTINATION, GUEST, LOCAL_DISK
from virtmig.facts import DiskFacts, Finding, GuestFacts, HostdevFacts, HostFacts, version, version_text


@pytest.mark.parametrize("facts", [DESTINATION, HostFacts(uri="qemu:///system")])
def test_host_facts_survive_json(facts: HostFacts) -> None:
    assert msgspec.json.decode(msgspec.json.encode(facts), type=HostFacts) == facts


def test_guest_facts_survive_json() -> None:
    guest = msgspec.structs.replace(GUEST, disks=(LOCAL_DISK,), hostdevs=(HostdevFacts(kind="mdev", vfio=True),))
    assert msgspec.json.decode(msgspec.json.encode(guest), type=GuestFacts) == guest


def test_nothing_is_known_about_a_host_that_was_not_asked() -> None:
    nobody = HostFacts(uri="qemu+ssh://onyx/system")
    known = {
        name: value
        for name, value in msgspec.to_builtins(nobody).items()
        if value not in (None, "", (), [], {"status": "unknown", "evidence": "not asked"})
    }
    assert known == {"uri": "qemu+ssh://onyx/system", "reachable": True}
    assert nobody.label == "qemu+ssh://onyx/system"


def test_an_unknown_status_is_refused_by_the_type() -> None:
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'maybe'"):
        msgspec.convert({"status": "maybe", "evidence": ""}, Finding)


@pytest.mark.parametrize(
    ("number", "text"),
    [(version(9), "9.0.0"), (version(12, 8), "12.8.0"), (version(7, 2, 22), "7.2.22"), (None, "unknown version")],
)
def test_versions_are_read_as_libvirt_writes_them(number: int | None, text: str) -> None:
    assert version_text(number) == text


@pytest.mark.parametrize(
    ("state", "active", "running"),
    [
        ("running", True, True),
        ("paused", True, False),
        ("pmsuspended", True, False),
        ("unknown", True, False),
        ("shut off", False, False),
        ("crashed", False, False),
    ],
)
def test_active_has_a_process_and_running_has_running_cpus(state: str, active: bool, running: bool) -> None:
    guest = GuestFacts(name="opal", state=state)
    assert (guest.active, guest.running) == (active, running)


def test_a_disk_is_writable_only_with_a_medium_that_may_be_written() -> None:
    assert DiskFacts(target="vda", source="/x").writable
    assert not DiskFacts(target="vda", source="/x", readonly=True).writable
    assert not DiskFacts(target="vda", empty=True).writable
