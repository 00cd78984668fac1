"""What a domain XML says about a guest."""

from __future__ import annotations

import pytest

from virtmig.domain.facts import guest_facts_from_xml
from virtmig.errors import DomainXmlError
from virtmig.facts import DiskFacts, GuestFacts, HostdevFacts

FULL = """
<domain type='kvm' id='7'>
  <name>opal</name>
  <uuid>4b6f0c1e-0d2a-4c55-9b3e-7f10c2a4d9e1</uuid>
  <memory unit='MiB'>1031</memory>
  <currentMemory unit='MiB'>17</currentMemory>
  <memtune><hard_limit unit='GiB'>3</hard_limit></memtune>
  <memoryBacking><hugepages/><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu placement='static'>5</vcpu>
  <os><type arch='aarch64' machine='virt-9.1'>hvm</type></os>
  <cpu mode='custom' match='exact' check='full'>
    <model>max</model>
    <feature policy='require' name='invtsc'/>
  </cpu>
  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/></clock>
  <devices>
    <emulator>/opt/qemu</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='writeback'/>
      <source file='/srv/opal.qcow2'/><target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='network' device='disk'>
      <source protocol='rbd' name='pool/opal'><host name='mon'/></source><target dev='vdb'/><shareable/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/vg/opal'/><target dev='vdc'/><transient/></disk>
    <disk type='volume' device='disk'><source pool='fast' volume='opal'/><target dev='vdd'/></disk>
    <disk type='nvme' device='disk'><source type='pci' managed='yes' namespace='1'/><target dev='vde'/></disk>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0x0000' bus='0x3b' slot='0x00' function='0x4'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='usb'><source><address bus='1' device='9'/></source></hostdev>
    <hostdev mode='subsystem' type='mdev' model='vfio-pci'><source><address uuid='c2177883'/></source></hostdev>
    <interface type='hostdev'><source><address type='pci' domain='0x0000' bus='0x5e' slot='0x02' function='0x1'/>
    </source></interface>
    <interface type='network'><source network='default'/></interface>
    <filesystem type='mount'><driver type='virtiofs'/><target dir='x'/></filesystem>
    <filesystem type='mount'><target dir='y'/></filesystem>
    <shmem name='mine' role='master'/><shmem name='yours' role='peer'/>
    <tpm model='tpm-crb'><backend type='emulator'/></tpm>
  </devices>
</domain>
"""


def test_everything_that_matters_is_read() -> None:
    facts = guest_facts_from_xml(FULL, state="running", snapshots=3)
    assert facts == GuestFacts(
        name="opal",
        uuid="4b6f0c1e-0d2a-4c55-9b3e-7f10c2a4d9e1",
        state="running",
        snapshots=3,
        memory_bytes=1031 << 20,
        vcpus=5,
        virt_type="kvm",
        arch="aarch64",
        machine="virt-9.1",
        emulator="/opt/qemu",
        cpu_xml=facts.cpu_xml,
        disks=(
            DiskFacts(target="vda", source="/srv/opal.qcow2", cache="writeback"),
            DiskFacts(target="sda", device="cdrom", readonly=True, empty=True),
            DiskFacts(
                target="vdb",
                kind="network",
                source="rbd:pool/opal",
                shareable=True,
                storage="shared",
                evidence="a network disk is the same on every host",
            ),
            DiskFacts(target="vdc", kind="block", source="/dev/vg/opal", transient=True),
            DiskFacts(target="vdd", kind="volume", source="fast/opal"),
            DiskFacts(target="vde", kind="nvme", source="nvme", storage="local"),
        ),
        hostdevs=(
            HostdevFacts(kind="pci", where="0000:3b:00.4", vfio=True),
            HostdevFacts(kind="usb", where="bus 1 device 9"),
            HostdevFacts(kind="mdev", where="c2177883", vfio=True),
            HostdevFacts(kind="pci", where="0000:5e:02.1", vfio=True),
        ),
        virtiofs=1,
        tpm=True,
        hugepages=True,
        memory_source="memfd",
        memory_shared=True,
        hard_limit_bytes=3 << 30,
        shmem_peers=("yours",),
        invtsc_without_frequency=True,
    )
    assert facts.cpu_xml.startswith("<cpu mode=")
    assert facts.cpu_xml.endswith("</cpu>")


def test_the_least_domain_leaves_everything_else_unknown() -> None:
    facts = guest_facts_from_xml("<domain><name>opal</name></domain>")
    assert facts == GuestFacts(name="opal")
    assert facts.memory_bytes is None
    assert facts.vcpus is None


def test_the_cpu_of_the_migratable_xml_is_taken_instead() -> None:
    assert guest_facts_from_xml(FULL, cpu_xml="<cpu/>").cpu_xml == "<cpu/>"


@pytest.mark.parametrize(
    ("cpu", "clock", "blocked"),
    [
        ("<feature policy='require' name='invtsc'/>", "", True),
        ("<feature name='invtsc'/>", "<timer name='tsc'/>", True),
        ("<feature policy='disable' name='invtsc'/>", "", False),
        ("<feature policy='require' name='invtsc'/>", "<timer name='tsc' frequency='2100000000'/>", False),
        ("", "", False),
    ],
)
def test_invtsc_needs_a_frequency(cpu: str, clock: str, blocked: bool) -> None:
    xml = f"<domain><name>o</name><cpu>{cpu}</cpu><clock>{clock}</clock></domain>"
    assert guest_facts_from_xml(xml).invtsc_without_frequency is blocked


def test_what_is_no_xml_is_refused() -> None:
    with pytest.raises(DomainXmlError):
        guest_facts_from_xml("domain opal")
