"""Single transforms: what they take and what they leave."""

from __future__ import annotations

import pytest

from tests.domain.triple_files import rules
from virtmig.domain.document import DomainDocument
from virtmig.domain.rewriting import rewrite
from virtmig.domain.transforms import MapValue, Settled, Transform


def changes(texts: str, xml: str) -> list[str]:
    result = rewrite(f"<domain>{xml}</domain>", rules(texts), source="a", destination="b")
    return [str(change) for change in result.changes]


@pytest.mark.parametrize(
    ("before", "after", "value", "mapped"),
    [
        ("/srv/a", "/mnt", "/srv/a/x.img", "/mnt/x.img"),
        ("/srv/a", "/mnt", "/srv/a", "/mnt"),
        ("/srv/a/", "/mnt/", "/srv/a/x", "/mnt/x"),
        ("/srv/a", "/mnt", "/srv/ab/x", None),
        ("/srv/a", "/mnt", "/other/srv/a", None),
        ("/", "/mnt", "/srv/x", "/mnt/srv/x"),
        ("/srv", "/", "/srv/x", "/x"),
        ("/srv", "/", "/srv/", "/"),
        ("/srv", "/srv/new", "/srv/x", "/srv/new/x"),
        ("/srv", "/srv/new", "/srv/new/x", "/srv/new/x"),
        ("/srv", "/srv/new", "/srv/newer", "/srv/new/newer"),
        ("pool", "east", "pool/image", "east/image"),
    ],
)
def test_a_prefix_ends_at_a_slash_and_is_moved_once(before: str, after: str, value: str, mapped: str | None) -> None:
    assert MapValue((), before, after, prefix=True).map(value) == mapped


def test_a_value_is_mapped_as_a_whole_without_a_prefix() -> None:
    exact = MapValue((), "br0", "br1")
    assert [exact.map(value) for value in ("br0", "br01", "br0/1", "")] == ["br1", None, None, None]
    assert MapValue((), None, "any").map("x") == "any"


def test_the_first_rule_for_a_value_counts() -> None:
    interface = "<devices><interface type='bridge'><source bridge='br0'/></interface></devices>"
    stays = "<bridge from='br0' to='br0'/><bridge from='br0' to='br1'/>"
    assert changes(stays, interface) == []


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        ("<vcpu cpuset='0,2'>4</vcpu>", ["vcpu/@cpuset: 0,2 -> 8,10"]),
        ("<vcpu cpuset='0-9'>4</vcpu>", ["vcpu/@cpuset: 0-9 -> 4-11"]),
        ("<vcpu cpuset='9-10'>4</vcpu>", []),
        ("<vcpu cpuset='0-3,^1'>4</vcpu>", ["vcpu/@cpuset: 0-3,^1 -> 8,10-11"]),
        ("<vcpu>4</vcpu>", []),
    ],
)
def test_numbers_that_no_rule_names_stay(xml: str, said: list[str]) -> None:
    assert changes("<cpus from='0-3' to='8-11'/>", xml) == said


@pytest.mark.parametrize(
    ("rule", "xml", "said"),
    [
        ("<vcpupin vcpu='0-9' cpuset='1'/>", "<vcpu>1</vcpu>", 2),
        ("<vcpupin vcpu='5' cpuset='1'/>", "<vcpu>1</vcpu>", 0),
        ("<vcpupin vcpu='0' cpuset='1'/>", "<name>no vcpu is one</name>", 2),
        ("<vcpupin vcpu='0' cpuset='0-1'/>", "<vcpu>1</vcpu><cputune><vcpupin vcpu='0' cpuset='1,0'/></cputune>", 0),
        ("<iothreadpin iothread='1-9' cpuset='1'/>", "<vcpu>1</vcpu>", 0),
        ("<iothreadpin iothread='0-9' cpuset='1'/>", "<iothreads>2</iothreads>", 3),
        (
            "<iothreadpin iothread='1-9' cpuset='1'/>",
            "<iothreads>2</iothreads><iothreadids><iothread id='7'/></iothreadids>",
            3,
        ),
        ("<numatune nodeset='1'/>", "<numatune><memory mode='strict' nodeset='1'/></numatune>", 0),
        ("<memnode cellid='0' nodeset='1'/>", "<vcpu>1</vcpu>", 0),
        ("<unpin/>", "<vcpu>1</vcpu>", 0),
        ("<unpin/>", "<vcpu>1</vcpu><cputune><emulatorpin cpuset='1'/></cputune>", 2),
        ("<unbind/>", "<vcpu>1</vcpu>", 0),
        ("<hugepages to='4'/>", "<memoryBacking><hugepages/></memoryBacking>", 0),
        ("<metadata uri='urn:x'/>", "<metadata><y/></metadata>", 0),
        ("<metadata uri='urn:x'><x xmlns='urn:x'/></metadata>", "<metadata><a:x xmlns:a='urn:x'></a:x></metadata>", 1),
        ("<metadata uri='urn:x'><x xmlns='urn:x'/></metadata>", "<metadata><x xmlns='urn:x'></x></metadata>", 0),
    ],
)
def test_only_what_the_guest_has_is_placed(rule: str, xml: str, said: int) -> None:
    assert len(changes(rule, xml)) == said


def test_io_threads_have_the_numbers_that_libvirt_gives_them() -> None:
    xml = "<iothreads>3</iothreads><iothreadids><iothread id='2'/></iothreadids>"
    said = changes("<iothreadpin iothread='0-9' cpuset='4'/>", xml)
    assert [text.partition("iothread='")[2][0] for text in said[1:]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("size='1' unit='GiB'", ["@size: 1 -> 2048", "@unit: GiB -> KiB"]),
        ("size='1048576'", ["@size: 1048576 -> 2048"]),
        ("size='1073741824' unit='b'", ["@size: 1073741824 -> 2097152"]),
        ("size='1024' unit='M'", ["@size: 1024 -> 2"]),
        ("size='2' unit='MiB'", []),
    ],
)
def test_a_size_keeps_its_unit_where_that_goes(size: str, said: list[str]) -> None:
    xml = f"<memoryBacking><hugepages><page {size}/></hugepages></memoryBacking>"
    assert [text.rpartition("/")[2] for text in changes("<hugepages to='2' unit='MiB'/>", xml)] == said


def test_the_page_size_of_a_memory_device() -> None:
    xml = (
        "<devices><memory model='dimm'><source><pagesize unit='GiB'>1</pagesize></source>"
        "<target><size>1048576</size></target></memory></devices>"
    )
    assert changes("<hugepages from='1048576' to='2048'/>", xml) == [
        "devices/memory/source/pagesize: 1 -> 2048",
        "devices/memory/source/pagesize/@unit: GiB -> KiB",
    ]


@pytest.mark.parametrize(
    ("address", "count"),
    [
        ("type='pci' domain='0x0000' bus='0x3b' slot='0x00' function='0x4'", 1),
        ("bus='59' slot='0' function='4'", 1),
        ("domain='1' bus='0x3b' slot='0x00' function='0x4'", 0),
        ("bus='x' slot='0' function='4'", 0),
        ("uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'", 0),
        ("type='drive' controller='0' unit='1'", 0),
    ],
)
def test_a_device_is_found_by_its_address_in_any_writing(address: str, count: int) -> None:
    xml = f"<devices><hostdev mode='subsystem' type='pci'><source><address {address}/></source></hostdev></devices>"
    assert len(changes("<device from='3b:00.4' to='3b:00.5'/>", xml)) == count


def test_the_guests_own_addresses_are_no_hosts_devices() -> None:
    xml = (
        "<devices><hostdev mode='subsystem' type='pci'><source><address bus='1' slot='0' function='0'/></source>"
        "<address type='pci' bus='0x3b' slot='0x00' function='0x4'/></hostdev></devices>"
    )
    assert changes("<device from='3b:00.4' to='3b:00.5'/>", xml) == []


def test_tls_is_said_where_nothing_was_said() -> None:
    xml = "<serial type='tcp'><source host='h'/></serial><serial type='pty'><source path='/p'/></serial>"
    said = changes("<tls kind='character' to='no'/>", f"<devices>{xml}</devices>")
    assert said == ["devices/serial[1]/source/@tls: no added"]


def test_a_transform_says_what_it_does() -> None:
    with pytest.raises(NotImplementedError):
        Transform().apply(DomainDocument("<domain/>"), "r", Settled())
