"""What fails, by the plain binding and by the facade: the same codes, libvirt's words, and the guest where it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest

from tests.support.facade import (
    DISK,
    INC,
    LIVE,
    OFFLINE,
    P2P,
    PARALLEL,
    PERSIST,
    PLAIN,
    POSTCOPY,
    TUNNELLED,
    Shape,
    answer,
    at_home,
    both_fail,
    managed,
    standing,
    to_uri3,
)
from tests.support.lab import GuestFactory, LabGuest, eventually
from virtmig.integrations.migrate_to_uri3 import wrap
from virtmig.lab.guest import GuestSettings
from virtmig.lab.lab import Lab
from virtmig.virt.connection import open_connection

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def module_guest(lab: Lab) -> Iterator[LabGuest]:
    with standing(lab, "refused") as guest:
        yield guest


@pytest.fixture
def one(module_guest: LabGuest) -> LabGuest:
    """One guest for all, on host a."""
    return at_home(module_guest)


SAID_BY_LIBVIRT: dict[str, Shape] = {
    "p2p flag on migrate3": managed({}, LIVE | P2P),
    "tunnelled, managed": managed({}, LIVE | TUNNELLED),
    "tunnelled, parallel": to_uri3({}, LIVE | P2P | TUNNELLED | PARALLEL),
    "direct": to_uri3({}, LIVE),
    "both storage flags": to_uri3({}, LIVE | P2P | DISK | INC),
    "offline without persistent": managed({}, OFFLINE),
    "offline with storage": managed({}, OFFLINE | PERSIST | DISK),
    "zero-copy without parallel": to_uri3({}, LIVE | P2P | libvirt.VIR_MIGRATE_ZEROCOPY),
    "postcopy, not live": to_uri3({}, P2P | POSTCOPY),
    "postcopy, tunnelled": to_uri3({}, LIVE | P2P | POSTCOPY | TUNNELLED),
    "resume without postcopy": to_uri3({}, LIVE | P2P | libvirt.VIR_MIGRATE_POSTCOPY_RESUME),
    "connections without parallel": to_uri3({"parallel.connections": 2}, LIVE | P2P),
    "unknown method": to_uri3({"compression": "lzma"}, LIVE | P2P),
    "a method twice": to_uri3({"compression": ["mt", "mt"]}, LIVE | P2P),
    "throttle without converge": to_uri3({"auto_converge.initial": 20}, LIVE | P2P),
    "unknown parameter": to_uri3({"foo.bar": 1}, LIVE | P2P),
    "unknown flag": to_uri3({}, LIVE | P2P | 1 << 29),
    "unknown flag, managed": managed({}, LIVE | 1 << 29),
    "scheme": to_uri3({"migrate_uri": "http://x"}, LIVE | P2P),
    "no host": to_uri3({"migrate_uri": "tcp:///"}, LIVE | P2P),
    "tunnelled with URI": to_uri3({"migrate_uri": "tcp://1.1.1.1"}, LIVE | P2P | TUNNELLED),
    "port and URI": to_uri3({"disks_port": 5, "disks_uri": "tcp://x"}, LIVE | P2P | DISK),
    "bandwidth": to_uri3({"bandwidth.postcopy": 1 << 62}, LIVE | P2P | POSTCOPY),
    "XML cut short": to_uri3({"destination_xml": "<x"}, LIVE | P2P),
    "no domain XML": to_uri3({"destination_xml": "<x/>"}, LIVE | P2P),
    "text for a number": to_uri3({"bandwidth": "x"}, LIVE | P2P),
    "negative": to_uri3({"bandwidth": -1}, LIVE | P2P),
    "params is None": to_uri3(None, LIVE | P2P),
    "flags is text": to_uri3({}, "live"),
    "no flags at all": lambda there, conn: ("migrateToURI", (there,), {}),
    "too few": lambda there, conn: ("migrateToURI3", (there,), {}),
    "unknown keyword": lambda there, conn: ("migrateToURI3", (there, {}), {"flag": 3}),
    "no connection": lambda there, conn: ("migrate", (there, LIVE), {}),
    "direct, the oldest form": lambda there, conn: ("migrateToURI2", (None, "tcp:x", None, LIVE, None, 0), {}),
}

SAID_BY_THE_PLAN: dict[str, Shape] = {
    "no URI": to_uri3({}, LIVE | P2P, "nonsense"),
    "no server": to_uri3({}, LIVE | P2P, "qemu:///system"),
    "same host, by name": to_uri3({}, LIVE | P2P, "qemu://localhost/system"),
    "unknown disk": to_uri3({"migrate_disks": ["vdz"]}, LIVE | P2P | DISK),
    "nothing to resume": to_uri3({}, LIVE | P2P | POSTCOPY | libvirt.VIR_MIGRATE_POSTCOPY_RESUME),
    "RDMA without limit": to_uri3({"migrate_uri": "rdma://1.1.1.1"}, LIVE | P2P),
    "no certificates": to_uri3({}, LIVE | P2P | libvirt.VIR_MIGRATE_TLS),
    "parameter of a newer libvirt": to_uri3({"bandwidth.avail.switchover": 3}, LIVE | P2P),
}


@pytest.mark.parametrize("shape", SAID_BY_LIBVIRT.values(), ids=SAID_BY_LIBVIRT)
def test_what_libvirt_refuses(lab: Lab, one: LabGuest, shape: Shape) -> None:
    _, libvirts, words = both_fail(lab, one, shape)
    assert words == libvirts


@pytest.mark.parametrize("shape", SAID_BY_THE_PLAN.values(), ids=SAID_BY_THE_PLAN)
def test_what_the_plan_refuses(full_lab: Lab, one: LabGuest, shape: Shape) -> None:
    _, libvirts, words = both_fail(full_lab, one, shape)
    assert words.endswith(f"nothing was started, {one.name} is where it was)")
    assert words.startswith(libvirts.partition(":")[0])


def test_both_ends_the_same_host(lab: Lab, one: LabGuest) -> None:
    here = one.connection(lab.a)
    for shape in (to_uri3({}, LIVE | P2P, lab.a.uri), lambda *_: ("migrate3", (here, {}, LIVE), {})):
        assert both_fail(lab, one, shape)[0] == (1, 10)


def test_a_destination_that_is_not_there(lab: Lab, one: LabGuest) -> None:
    for uri in ("qemu+tcp://127.0.0.9:1/system", "qemu+unix:///system?socket=/nowhere/x"):
        assert both_fail(lab, one, to_uri3({}, LIVE | P2P, uri))[0] == (38, 7)


def test_another_driver(lab: Lab, one: LabGuest) -> None:
    test = open_connection("test:///default")
    assert both_fail(lab, one, lambda *_: ("migrate3", (test, {}, LIVE), {}))[0] == (3, 20)
    domain = test.lookupByName("test")
    for each in (domain, wrap(domain, PLAIN)):
        assert answer(lambda each=each: each.migrateToURI3(lab.b.uri, {}, LIVE | P2P))[0] == (74, 20)
    test.close()


def test_a_read_only_connection_may_not_migrate(lab: Lab, one: LabGuest) -> None:
    """virtmig opens connections of its own, which could."""
    source, destination = (libvirt.openReadOnly(host.uri) for host in lab.hosts)
    for domain in (source.lookupByName(one.name), wrap(source.lookupByName(one.name), PLAIN)):
        assert answer(lambda domain=domain: domain.migrateToURI3(lab.b.uri, {}, LIVE | P2P))[0] == (29, 20)
    assert both_fail(lab, one, lambda *_: ("migrate3", (destination, {}, LIVE), {}))[0] == (29, 20)


def test_names_and_uuids_that_are_taken(lab: Lab, one: LabGuest) -> None:
    there, domain = one.connection(lab.b), one.domain(lab.a)
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    other = "11111111-2222-4333-8444-555555555555"
    for text in (xml.replace(domain.UUIDString(), other), xml.replace("<name>refused", "<name>other")):
        clash = there.defineXML(text)
        assert both_fail(lab, one, to_uri3({}, LIVE | P2P))[0] == (9, 20)
        clash.undefine()
    twin = there.createXML(xml)
    assert both_fail(lab, one, to_uri3({}, LIVE | P2P))[0] == (55, 20)
    twin.destroy()
    eventually(lambda: one.only_on(lab.a), "the guest alone")


def test_a_guest_that_does_not_run_and_one_that_is_gone(lab: Lab, guest: GuestFactory) -> None:
    fresh = guest(persistent=True, memory_mib=16)
    gone = fresh.domain(lab.a)
    gone.suspend()
    assert both_fail(lab, fresh, to_uri3({}, LIVE | P2P | POSTCOPY))[0] == (74, 10)
    gone.destroy()
    for shape in (to_uri3({}, LIVE | P2P), managed({}, LIVE)):
        assert both_fail(lab, fresh, shape)[0] == (55, 20)
    gone.undefine()
    for each in (gone, wrap(gone, PLAIN)):
        assert answer(lambda each=each: each.migrateToURI3(lab.b.uri, {}, LIVE | P2P))[0] == (42, 10)


def test_what_9_0_takes_without_a_word_is_refused_as_later_libvirts_do(lab: Lab, one: LabGuest) -> None:
    domain = wrap(one.domain(lab.a), PLAIN)
    for params, flags, code in (
        ({}, PARALLEL | libvirt.VIR_MIGRATE_COMPRESSED, 8),
        ({"compression": ["xbzrle"]}, PARALLEL, 8),
        ({"destination_name": ""}, 0, 8),
        ({}, TUNNELLED | DISK, 84),
    ):
        assert answer(lambda p=params, f=flags: domain.migrateToURI3(lab.b.uri, p, LIVE | P2P | f))[0] == (code, 10)
    assert one.only_on(lab.a)


# -- what only begins and then fails -------------------------------------------------------------------------------

#: libvirt, or QEMU, fails in the middle: what it says, as it says it, and then where the guest is
BEGINS_AND_FAILS: dict[str, tuple[Shape, tuple[int, int]]] = {
    "nobody listens": (to_uri3({"migrate_uri": "tcp://127.0.0.1:1"}, LIVE | P2P), (38, 7)),
    "no such address to listen on": (to_uri3({"listen_address": "192.0.2.77"}, LIVE | P2P), (1, 10)),
}
BEGINS_AND_FAILS_SLOWLY: dict[str, tuple[Shape, tuple[int, int]]] = {
    "no such network": (to_uri3({"migrate_uri": "tcp://10.255.255.1:49999"}, LIVE | P2P), (38, 7)),
    "no such socket": (to_uri3({"migrate_uri": "unix:///nowhere/x"}, LIVE | P2P), (1, 10)),
    "persistent XML of nothing": (to_uri3({"persistent_xml": "<domain/>"}, LIVE | P2P | PERSIST), (21, 20)),
}
#: a destination XML that is another guest's
OTHER_GUESTS = {
    "machine": ("machine='", "machine='x"),
    "memory": ("<memory unit='KiB'>", "<memory unit='KiB'>9"),
    "CPUs": (">1</vcpu>", ">2</vcpu>"),
    "name": ("<name>", "<name>x"),
}


def fails_alike(lab: Lab, guest: LabGuest, shape: Shape, code: tuple[int, int]) -> None:
    ours, libvirts, words = both_fail(lab, guest, shape)
    assert ours == code
    assert words == f"{libvirts} ({guest.name} still runs on {lab.a.hostname}, unchanged)"


@pytest.mark.parametrize(("shape", "code"), BEGINS_AND_FAILS.values(), ids=BEGINS_AND_FAILS)
def test_what_begins_and_fails(full_lab: Lab, one: LabGuest, shape: Shape, code: tuple[int, int]) -> None:
    fails_alike(full_lab, one, shape, code)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "code"), BEGINS_AND_FAILS_SLOWLY.values(), ids=BEGINS_AND_FAILS_SLOWLY)
def test_what_else_begins_and_fails(full_lab: Lab, one: LabGuest, shape: Shape, code: tuple[int, int]) -> None:
    fails_alike(full_lab, one, shape, code)


@pytest.mark.slow
def test_another_guests_xml(full_lab: Lab, one: LabGuest) -> None:
    xml = one.domain(full_lab.a).XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    for before, after in OTHER_GUESTS.values():
        changed = xml.replace(before, after)
        assert changed != xml, before
        fails_alike(full_lab, one, to_uri3({"destination_xml": changed}, LIVE | P2P), (67, 20))
    fails_alike(
        full_lab, one, to_uri3({"destination_xml": xml.replace("file='", "file='/nowhere")}, LIVE | P2P), (38, 18)
    )


# -- guests that cannot move ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(lab: Lab, before: str = "", after: str = "", flags: int = 0) -> Iterator[LabGuest]:
    """A transient guest on host a with another XML than the lab's."""
    guest = LabGuest(lab, GuestSettings(name="changed", memory_mib=16, dirty_mib_s=2.0))
    lab.start_guest(guest.settings)
    try:
        xml = guest.domain(lab.a).XMLDesc(0)
        guest.domain(lab.a).destroy()
        guest.connection(lab.a).createXML(xml.replace(before, after), flags)
        yield guest
    finally:
        guest.close()


def refused_alike(lab: Lab, guest: LabGuest, shape: Shape, code: tuple[int, int], *, same_words: bool = True) -> None:
    """Before anything has started; libvirt's own words come first."""
    ours, libvirts, words = both_fail(lab, guest, shape)
    assert ours == code
    assert words.endswith(f"nothing was started, {guest.name} is where it was)")
    assert words.startswith(libvirts if same_words else libvirts.partition(":")[0])


def test_snapshots(full_lab: Lab, one: LabGuest) -> None:
    domain = one.domain(full_lab.a)
    snapshot = domain.snapshotCreateXML(
        f"<domainsnapshot><name>s</name><state>running</state><creationTime>1</creationTime>{domain.XMLDesc(0)}"
        "</domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE,
    )
    refused_alike(full_lab, one, to_uri3({}, LIVE | P2P), (55, 10))
    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


@pytest.mark.slow
def test_disks_that_are_local_read_only_or_being_copied(full_lab: Lab, tmp_path: Path) -> None:
    disks = ""
    for target, more in (("vdb", ""), ("vdc", "<readonly/>")):
        image = tmp_path / f"{target}.img"
        image.write_bytes(bytes(1 << 20))
        image.chmod(0o666)
        disks += (f"<disk type='file' device='disk'><driver name='qemu' type='raw' cache='writeback'/><source "
                  f"file='{image}'/><target dev='{target}' bus='virtio'/>{more}</disk>")  # fmt: skip
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o755)
    with changed(full_lab, "</devices>", f"{disks}</devices>") as guest:
        refused_alike(full_lab, guest, to_uri3({}, LIVE | P2P), (81, 10))
        # two reasons: libvirt comes to the unsafe disk first
        refused_alike(full_lab, guest, to_uri3({"migrate_disks": ["vdc"]}, LIVE | P2P | DISK), (81, 10))
        unsafe = libvirt.VIR_MIGRATE_UNSAFE
        refused_alike(full_lab, guest, to_uri3({"migrate_disks": ["vdc"]}, LIVE | P2P | DISK | unsafe), (84, 10))
        copy = f"<disk type='file'><source file='{tmp_path}/copy.img'/><driver type='raw'/></disk>"
        guest.domain(full_lab.a).blockCopy("vdb", copy, {}, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        refused_alike(full_lab, guest, to_uri3({}, LIVE | P2P | unsafe), (55, 10))


@pytest.mark.slow
def test_guests_that_cannot_move_at_all(full_lab: Lab) -> None:
    name = f"vm-{os.getpid()}"
    device = f"<shmem name='{name}' role='peer'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem></devices>"
    try:
        with changed(full_lab, "</devices>", device) as guest:
            refused_alike(full_lab, guest, to_uri3({}, LIVE | P2P), (55, 10), same_words=False)
    finally:
        Path("/dev/shm", name).unlink(missing_ok=True)  # QEMU leaves it: a server would own it
    with changed(full_lab, flags=libvirt.VIR_DOMAIN_START_AUTODESTROY) as guest:
        fails_alike(full_lab, guest, to_uri3({}, LIVE | P2P), (55, 10))


@pytest.mark.slow
def test_another_migration(full_lab: Lab, one: LabGuest) -> None:
    """libvirt waits five seconds for the other one to end; the plan sees it at once."""
    domain = one.domain(full_lab.a)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(answer, lambda: domain.migrateToURI3(full_lab.b.uri, {"bandwidth": 1}, LIVE | P2P))
        eventually(lambda: domain.jobStats(0).get("memory_processed"), "memory on the way")
        try:
            refused_alike(full_lab, one, to_uri3({}, LIVE | P2P), (55, 10), same_words=False)
        finally:
            domain.abortJob()
        assert first.result(20)[0] == (78, 10)
    assert one.only_on(full_lab.a)


@pytest.mark.slow
def test_the_destinations_daemon_dies(full_lab: Lab, guest: GuestFactory) -> None:
    answers = []
    for number, facade in enumerate((False, True)):
        fresh = guest(memory_mib=16, dirty_mib_s=2.0, name=f"left{number}")
        domain = wrap(fresh.domain(full_lab.a), PLAIN) if facade else fresh.domain(full_lab.a)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(
                answer, lambda domain=domain: domain.migrateToURI3(full_lab.b.uri, {"bandwidth": 1}, LIVE | P2P)
            )
            eventually(lambda at=fresh: at.domain(full_lab.a).jobStats(0).get("memory_processed"), "memory on the way")
            full_lab.b.kill_daemon()
            answers.append(call.result(60))
        full_lab.b.start_daemon()
        full_lab.b.await_daemon()
        eventually(lambda at=fresh: at.only_on(full_lab.a), "the guest on the source alone")
        fresh.check(full_lab.a)
    (plain, libvirts), (ours, words) = answers
    assert ours == plain
    assert words.startswith(libvirts)
    assert "where left1 runs is not certain: lab-a says running; lab-b did not answer" in words
