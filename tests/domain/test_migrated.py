"""A real libvirt takes what rewrite made: a guest whose image lies elsewhere on the other host."""

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest

from tests.domain.triple_files import rules
from tests.support.lab import GuestFactory
from virtmig.domain.facts import guest_facts_from_xml
from virtmig.domain.rewriting import rewrite
from virtmig.lab.lab import Lab

pytestmark = pytest.mark.lab


def test_a_guest_arrives_only_with_the_xml_that_fits(lab: Lab, guest: GuestFactory) -> None:
    moved = guest()
    domain = moved.domain(lab.a)
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    image = Path(guest_facts_from_xml(xml).disks[0].source)
    elsewhere = image.with_name(f"elsewhere-{image.name}")
    image.rename(elsewhere)
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE
    with pytest.raises(libvirt.libvirtError, match=image.name):
        domain.migrate3(moved.connection(lab.b), {}, flags)
    chosen = rules(f"<path match='exact' from='{image}' to='{elsewhere}'/>")
    rewritten = rewrite(xml, chosen, source=lab.a.name, destination=lab.b.name)
    assert [str(change) for change in rewritten.changes] == [f"devices/disk/source/@file: {image} -> {elsewhere}"]
    domain.migrate3(moved.connection(lab.b), {"destination_xml": rewritten.xml}, flags)
    assert moved.state(lab.b) == libvirt.VIR_DOMAIN_RUNNING
    assert str(elsewhere) in moved.domain(lab.b).XMLDesc(0)
    assert rewrite(rewritten.xml, chosen, source=lab.a.name, destination=lab.b.name).changes == ()
