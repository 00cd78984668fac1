"""The guest's view of a domain, as a table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lxml import etree

from virtmig.domain.document import parse_xml
from virtmig.domain.guest_view import HOST_SIDE, devices, seen_outside_devices


def outside(xml: str) -> dict[str, str]:
    return seen_outside_devices(parse_xml(f"<domain>{xml}</domain>"))


def device(xml: str) -> dict[str, str]:
    return devices(parse_xml(f"<domain><devices>{xml}</devices></domain>"))[0].seen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<memory>1024</memory>", "<memory unit='MiB'>1</memory>"),
        ("<uuid>AB</uuid>", "<uuid>ab</uuid>"),
        ("<features><acpi/></features>", "<features>\n <!-- x --><acpi></acpi> </features>"),
        ("<features><smm><tseg>2</tseg></smm></features>", "<features><smm><tseg unit='M'>2</tseg></smm></features>"),
        (
            "<cpu><feature name='a' policy='require'/><feature name='b' policy='require'/></cpu>",
            "<cpu><feature policy='require' name='b'/><feature policy='require' name='a'/></cpu>",
        ),
        ("<cpu><numa><cell id='0' cpus='0-2'/></numa></cpu>", "<cpu><numa><cell id='0' cpus='2,0-1'/></numa></cpu>"),
    ],
)
def test_two_writings_of_one_thing_are_one(one: str, other: str) -> None:
    assert outside(one) == outside(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<disk><serial>007</serial></disk>", "<disk><serial>7</serial></disk>"),
        ("<disk><serial>AB</serial></disk>", "<disk><serial>ab</serial></disk>"),
        ("<disk><serial>0x10</serial></disk>", "<disk><serial>16</serial></disk>"),
        ("<shmem><size unit='M'>1</size></shmem>", "<shmem><size>1024</size></shmem>"),
        ("<disk><new unit='furlong'>1</new></disk>", "<disk><new unit='mile'>1</new></disk>"),
        ("<new/>", "<new a=''/>"),
        ("<new><!-- -->1</new>", "<new><!-- -->2</new>"),
        ("<disk a='1'/>", "<disk xmlns:x='u' x:a='1'/>"),
    ],
)
def test_two_things_are_two(one: str, other: str) -> None:
    assert device(one) != device(other)


def test_addresses_are_numbers_with_libvirts_defaults() -> None:
    plain = device("<disk><address type='pci' slot='0x1f'/></disk>")
    assert plain == device("<disk><address type='pci' domain='0x0000' bus='0x00' slot='31' function='0x0'/></disk>")
    assert plain == {"address": "bus=0 domain=0 function=0 slot=31 type=pci"}
    assert device("<disk><address type='drive' unit='1'/></disk>") == device(
        "<disk><address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>"
    )


def test_a_vsock_whose_number_libvirt_chooses_may_get_another() -> None:
    given = "<vsock><cid auto='{}' address='{}'/></vsock>"
    assert device(given.format("yes", 3)) == device(given.format("yes", 4))
    assert device(given.format("no", 3)) != device(given.format("no", 4))


def test_which_device_of_the_host_it_is_is_not_seen_but_what_it_is() -> None:
    given = "<hostdev mode='subsystem' type='{}'><source><address uuid='{}'/></source></hostdev>"
    assert device(given.format("pci", 1)) == device(given.format("mdev", 2))
    assert device(given.format("pci", 1)) != device(given.format("usb", 1))


def test_graphics_and_sound_of_the_host_are_no_devices_of_the_guest() -> None:
    xml = "<domain><devices><emulator>/q</emulator><graphics type='vnc'/><audio id='1' type='none'/></devices></domain>"
    assert devices(parse_xml(xml)) == []


def test_libvirts_schema_knows_what_is_called_the_hosts(libvirt_schema: etree.RelaxNG) -> None:
    """A misspelt name in the table would hide nothing; one of another element would hide too much."""
    schema = "".join(path.read_text() for path in Path("/usr/share/libvirt/schemas").glob("*.rng"))
    names = {word for words in HOST_SIDE.values() for word in words.split() if word != "*"}
    names |= {step for path in HOST_SIDE for step in path.split("/") if step}
    # of libvirt after 9.0
    newer = {"@discard_no_unref", "@debug", "async-teardown", "crypto", "pstore"}
    unknown = {
        name
        for name in names - newer
        if not re.search(rf"<(element|attribute) name=['\"]{name.lstrip('@')}['\"]|<value>{name}</value>", schema)
    }
    assert unknown == set()
