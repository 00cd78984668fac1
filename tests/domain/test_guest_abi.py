"""What the guest sees of a change: all of it is found, and nothing that belongs to the host."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.domain.libvirt_oracle import Oracle
from tests.domain.strategies import elements
from tests.domain.triple_files import NAMES, SAMPLES, triple
from virtmig.domain.guest_abi import Difference, compare, refuse
from virtmig.errors import DomainXmlError

TEXTS = {path.stem: path.read_text() for path in SAMPLES}

CARD = "devices/interface[52:54:00:6a:1f:01]"

#: (sample, text in it whose first occurrence counts, what comes in its place, where the difference is)
SEEN = [
    ("plain", "type='kvm'", "type='qemu'", "@type"),
    ("plain", "<name>plain", "<name>other", "name"),
    ("plain", "6a1f0c52-8d3b", "6a1f0c52-8d3c", "uuid"),
    ("plain", "<memory unit='GiB'>2", "<memory unit='GiB'>3", "memory"),
    ("plain", "<vcpu placement='static'>2", "<vcpu placement='static'>3", "vcpu"),
    ("plain", "<vcpu placement='static'>", "<vcpu placement='static' current='1'>", "vcpu/@current"),
    ("plain", "arch='x86_64'", "arch='i686'", "os/type/@arch"),
    ("plain", "pc-q35-7.2", "pc-q35-7.1", "os/type/@machine"),
    ("plain", "<boot dev='hd'/>", "<boot dev='network'/>", "os/boot/@dev"),
    ("plain", "<apic/>", "", "features/apic"),
    ("plain", "<apic/>", "<apic eoi='on'/>", "features/apic/@eoi"),
    ("plain", "<apic/>", "<apic/><pae/>", "features/pae"),
    ("plain", "<apic/>", "<apic/><kvm><hidden state='on'/></kvm>", "features/kvm/hidden/@state"),
    ("plain", "mode='custom'", "mode='host-model'", "cpu/@mode"),
    ("plain", ">qemu64<", ">Nehalem<", "cpu/model"),
    ("plain", "</cpu>", "<vendor>Intel</vendor></cpu>", "cpu/vendor"),
    ("plain", "</cpu>", "<topology sockets='1' cores='2' threads='1'/></cpu>", "cpu/topology/@cores"),
    ("plain", "</cpu>", "<feature policy='disable' name='svm'/></cpu>", "cpu/feature[svm]/@policy"),
    ("plain", "</cpu>", "<maxphysaddr mode='emulate' bits='40'/></cpu>", "cpu/maxphysaddr/@bits"),
    ("plain", "offset='utc'", "offset='localtime'", "clock/@offset"),
    ("plain", "present='no'", "present='yes'", "clock/timer[hpet]/@present"),
    ("plain", "<timer name='hpet' present='no'/>", "", "clock/timer[hpet]/@name"),
    ("plain", "</clock>", "<timer name='tsc' frequency='1000000'/></clock>", "clock/timer[tsc]/@frequency"),
    ("plain", "PLAIN-0001", "plain-0001", "devices/disk[vda]/serial"),
    ("plain", "device='disk'", "device='cdrom'", "devices/disk[vda]/@device"),
    ("plain", "dev='vda' bus='virtio'", "dev='vda' bus='scsi'", "devices/disk[vda]/target/@bus"),
    ("plain", "dev='vda'", "dev='vdb'", "devices/disk[vda]"),
    ("plain", "<serial>", "<readonly/><serial>", "devices/disk[vda]/readonly"),
    (
        "plain",
        "<serial>",
        "<blockio logical_block_size='4096'/><serial>",
        "devices/disk[vda]/blockio/@logical_block_size",
    ),
    ("plain", "cache='none'", "cache='none' queues='2'", "devices/disk[vda]/driver/@queues"),
    ("plain", "cache='none'", "cache='none' packed='on'", "devices/disk[vda]/driver/@packed"),
    ("plain", "bus='0x03'", "bus='0x04'", "devices/disk[vda]/address"),
    ("plain", "<boot dev='hd'/>", "<boot dev='hd'/><bootmenu enable='yes'/>", "os/bootmenu/@enable"),
    ("plain", "model='pcie-root-port'", "model='pcie-to-pci-bridge'", "devices/controller[pci 1]/@model"),
    ("plain", "chassis='1'", "chassis='9'", "devices/controller[pci 1]/target/@chassis"),
    ("plain", "52:54:00:6a:1f:01", "52:54:00:6a:1f:02", f"{CARD}/mac/@address"),
    ("plain", "<model type='virtio'/>", "<model type='e1000'/>", f"{CARD}/model/@type"),
    ("plain", "<source bridge", "<mtu size='9000'/><source bridge", f"{CARD}/mtu/@size"),
    (
        "plain",
        "<source bridge",
        "<link state='down'/><source bridge",
        f"{CARD}/link/@state",
    ),
    (
        "plain",
        "<source bridge",
        "<driver queues='4'/><source bridge",
        f"{CARD}/driver/@queues",
    ),
    ("plain", "<interface type='bridge'>", "<interface type='hostdev'>", f"{CARD}/@type"),
    ("plain", "type='isa-serial' port='0'", "type='isa-serial' port='1'", "devices/serial/target/@port"),
    ("plain", "<model type='vga'", "<model type='cirrus'", "devices/video/model/@type"),
    ("plain", "vram='16384'", "vram='32768'", "devices/video/model/@vram"),
    ("plain", "heads='1'", "heads='2'", "devices/video/model/@heads"),
    (
        "plain",
        "<memballoon model='virtio'>",
        "<memballoon model='virtio' autodeflate='on'>",
        "devices/memballoon/@autodeflate",
    ),
    ("plain", "</devices>", "<hub type='usb'/></devices>", "devices/hub"),
    ("plain", "</devices>", "<vsock model='virtio'><cid auto='no' address='3'/></vsock></devices>", "devices/vsock"),
    ("numa", "<maxMemory slots='4'", "<maxMemory slots='5'", "maxMemory/@slots"),
    ("numa", ">16777216<", ">16777217<", "maxMemory"),
    ("numa", "cpus='0-1' memory='4194304'", "cpus='0-1' memory='4194305'", "cpu/numa/cell[0]/@memory"),
    ("numa", "cpus='2-3'", "cpus='2'", "cpu/numa/cell[1]/@cpus"),
    ("numa", "value='21'", "value='22'", "cpu/numa/cell[0]/distances/sibling[1]/@value"),
    ("numa", "<boot order='1'/>", "", "devices/disk[vda]/boot/@order"),
    ("numa", "<size unit='KiB'>1048576", "<size unit='KiB'>1048577", "devices/memory/target/size"),
    ("numa", "<node>1", "<node>0", "devices/memory/target/node"),
    ("numa", "model='dimm'", "model='virtio-mem'", "devices/memory/@model"),
    ("numa", "0x280000000", "0x290000000", "devices/memory/address"),
    ("numa", "</target>\n      <address", "</target><alias name='ua-x'/><address", "devices/memory/alias/@name"),
    ("hugepages", "<source type='memfd'/>", "<source type='file'/>", "memoryBacking/source/@type"),
    ("hugepages", "<size unit='KiB'>128", "<size unit='KiB'>256", "devices/memory/target/label/size"),
    (
        "vhost-user",
        "rx_queue_size='1024'",
        "rx_queue_size='512'",
        "devices/interface[52:54:00:6a:1f:31]/driver/@rx_queue_size",
    ),
    ("vhost-user", "mrg_rxbuf='on'", "mrg_rxbuf='off'", "devices/interface[52:54:00:6a:1f:31]/driver/host/@mrg_rxbuf"),
    ("vfio", "type='mdev'", "type='usb'", "devices/hostdev[2]/@type"),
    ("vfio", "display='off'", "display='on'", "devices/hostdev[2]/@display"),
    ("vfio", "<rom bar='off'/>", "<rom bar='on'/>", "devices/hostdev[1]/rom/@bar"),
    ("vfio", "intremap='on'", "intremap='off'", "devices/iommu/driver/@intremap"),
    ("vfio", "<ioapic driver='qemu'/>", "<ioapic driver='kvm'/>", "features/ioapic/@driver"),
    ("virtiofs", "<target dir='home'/>", "<target dir='house'/>", "devices/filesystem[home]/target/@dir"),
    ("virtiofs", "<readonly/>", "", "devices/filesystem[old]/readonly"),
    ("virtiofs", "queue='1024'", "queue='512'", "devices/filesystem[projects]/driver/@queue"),
    ("tpm", "43dc0cf8", "43dc0cf9", "genid"),
    ("tpm", ">007</entry>", ">7</entry>", "sysinfo/system/entry[serial]"),
    ("tpm", "site:north", "site:south", "sysinfo/oemStrings/entry"),
    ("tpm", "role:desk", "role:lab", "sysinfo/oemStrings/entry[2]"),
    ("tpm", "<smbios mode='sysinfo'/>", "<smbios mode='host'/>", "os/smbios/@mode"),
    ("tpm", "secure='yes'", "secure='no'", "os/loader/@secure"),
    ("tpm", "retries='8191'", "retries='4095'", "features/hyperv/spinlocks/@retries"),
    ("tpm", "<vpindex state='on'/>", "<vpindex state='off'/>", "features/hyperv/vpindex/@state"),
    ("tpm", "<tseg unit='MiB'>48", "<tseg unit='MiB'>24", "features/smm/tseg"),
    ("tpm", "<serial>007<", "<serial>7<", "devices/disk[sda]/serial"),
    ("tpm", "com.redhat.spice.0", "com.redhat.spice.1", "devices/channel[1]/target/@name"),
    ("tpm", "type='tablet'", "type='mouse'", "devices/input/@type"),
    ("tpm", "tpm-crb", "tpm-tis", "devices/tpm/@model"),
    ("tpm", "version='2.0'", "version='1.2'", "devices/tpm/backend/@version"),
    ("tpm", "model='ich9'", "model='ich6'", "devices/sound/@model"),
    ("tpm", "vgamem='16384'", "vgamem='8192'", "devices/video/model/@vgamem"),
    ("tpm", "<redirdev bus='usb' type='spicevmc'/>", "", "devices/redirdev"),
    ("tpm", "i6300esb", "ib700", "devices/watchdog/@model"),
    ("tpm", "<rng model='virtio'>", "<rng model='virtio-transitional'>", "devices/rng/@model"),
    ("tpm", "<panic model='hyperv'/>", "<panic model='isa'/>", "devices/panic/@model"),
    ("network-disks", "model='virtio-scsi'", "model='lsilogic'", "devices/controller[scsi 0]/@model"),
    ("many-disks", "<wwn>5000c50015000007", "<wwn>5000c50015000017", "devices/disk[sdh]/wwn"),
    ("many-disks", "unit='7'", "unit='8'", "devices/disk[sdh]/address"),
    ("many-disks", "queues='4'", "queues='5'", "devices/controller[scsi 0]/driver/@queues"),
    ("unknown-namespaces", "console=ttyS0", "console=ttyS1", "os/cmdline"),
    (
        "unknown-namespaces",
        "isa-serial.wakeup=1",
        "isa-serial.wakeup=0",
        "{http://libvirt.org/schemas/domain/qemu/1.0}commandline/"
        "{http://libvirt.org/schemas/domain/qemu/1.0}arg[2]/@value",
    ),
    ("unknown-namespaces", "<vcpu>1", "<thing n='1'/><vcpu>1", "thing/@n"),
    ("unknown-namespaces", "one is enough -->", "one is enough -->0", "vcpu"),
]

#: (sample, text in it, what comes in its place): the guest sees none of it, and libvirt minds none
UNSEEN = [
    ("plain", "<on_reboot>restart", "<on_reboot>destroy"),
    ("plain", "<memory unit='GiB'>2", "<memory unit='MiB'>2048"),
    ("plain", "<vcpu placement='static'>", "<vcpu placement='static' cpuset='3'>"),
    ("plain", "</vcpu>", "</vcpu><cputune><shares>9</shares></cputune>"),
    ("plain", "</name>", "</name><title>t</title><description>d</description><metadata><a xmlns='u'/></metadata>"),
    ("plain", "</uuid>", "</uuid><!-- a comment -->"),
    ("plain", "<disk type='file' device='disk'>", "<disk type='file' device='disk' snapshot='no'>"),
    ("plain", "cache='none'", "cache='writeback' io='threads' error_policy='stop'"),
    ("plain", "type='qcow2'", "type='raw'"),
    ("plain", "/srv/images/plain.qcow2", "/mnt/p.img"),
    ("plain", "domain='0x0000' bus='0x03' slot='0x00'", "bus='3' slot='0'"),
    ("plain", "52:54:00:6a:1f:01", "52:54:00:6A:1F:01"),
    ("plain", "bridge='br0'", "bridge='br1'"),
    ("plain", "<interface type='bridge'>\n", "<interface type='bridge'><target dev='tap7'/><bandwidth/>\n"),
    ("plain", "<serial type='pty'>", "<serial type='null'>"),
    ("plain", "port='-1' autoport='yes'", "port='5907' autoport='no'"),
    ("plain", "<memballoon model='virtio'>", "<memballoon model='virtio'><stats period='5'/>"),
    ("plain", "<apic/>", "<!-- x --><apic><!-- y --></apic>"),
    ("numa", "mode='strict' nodeset='0-1'", "mode='preferred' nodeset='1'"),
    ("numa", "<emulatorpin cpuset='2-3'/>", ""),
    ("numa", "cpus='0-1'", "cpus='1,0'"),
    ("numa", "io='native' iothread='1'", "io='threads' iothread='2'"),
    ("numa", "<nodemask>1", "<nodemask>0"),
    ("hugepages", "<nosharepages/>", ""),
    ("hugepages", "size='1' unit='GiB'", "size='2' unit='MiB'"),
    ("hugepages", "/mnt/pmem0", "/mnt/pmem1"),
    ("vhost-user", "/run/spdk", "/run/spdk2"),
    ("vhost-user", "/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1"),
    ("vfio", "bus='0x3b'", "bus='0x3c'"),
    ("vfio", "c2177883", "c2177884"),
    ("vfio", "<tag id='42'/>", "<tag id='43'/>"),
    ("vfio", "id='0x1050'", "id='0x1051'"),
    ("virtiofs", "/srv/share/projects", "/mnt/projects"),
    ("virtiofs", "/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"),
    ("virtiofs", "accessmode='mapped'", "accessmode='squash'"),
    ("tpm", "/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_CODE.secboot.fd"),
    ("tpm", "/dev/urandom", "/dev/random"),
    ("tpm", "action='reset'", "action='poweroff'"),
    ("tpm", "6dd3e4a5", "6dd3e4a6"),
    ("tpm", "compression='off'", "compression='glz'"),
    ("network-disks", "<shareable/>", ""),
    ("network-disks", "volume='network-disks.img'", "volume='n.img'"),
    ("many-disks", "queues='4' iothread='1'", "queues='4' iothread='2'"),
    ("unknown-namespaces", "/srv/boot/vmlinuz", "/mnt/vmlinuz"),
    ("unknown-namespaces", "mode='connect' host='192.0.2.20'", "mode='bind' host='192.0.2.21'"),
]


def replaced(sample: str, old: str, new: str) -> str:
    assert old in TEXTS[sample]
    return TEXTS[sample].replace(old, new, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_is_like_itself(name: str) -> None:
    text = triple(name).before
    assert compare(text, text) == []


@given(st.lists(elements(), max_size=4), st.lists(elements(), max_size=4))
def test_any_document_is_like_itself(outside: list[str], devices: list[str]) -> None:
    text = f"<domain>{''.join(outside)}<devices>{''.join(devices)}</devices></domain>"
    assert compare(text, text) == []


@pytest.mark.parametrize(("sample", "old", "new", "where"), SEEN)
def test_what_the_guest_sees_is_found(sample: str, old: str, new: str, where: str) -> None:
    changed = replaced(sample, old, new)
    differences = compare(TEXTS[sample], changed)
    assert where in [difference.where for difference in differences]
    back = {(difference.where, difference.after, difference.before) for difference in compare(changed, TEXTS[sample])}
    if "[" not in where:
        assert back == {(difference.where, difference.before, difference.after) for difference in differences}


@pytest.mark.parametrize(("sample", "old", "new"), UNSEEN)
def test_what_belongs_to_the_host_is_let_through(sample: str, old: str, new: str, oracle: Oracle) -> None:
    changed = replaced(sample, old, new)
    assert compare(TEXTS[sample], changed) == []
    assert not oracle.abi(TEXTS[sample], changed)


@pytest.mark.parametrize("sample", [path.stem for path in SAMPLES if path.stem != "many-disks"])
def test_all_that_libvirt_refuses_is_found(sample: str, oracle: Oracle) -> None:
    """Every attribute and every text of the samples is changed, one after the other, and every element taken out."""
    if oracle.abi(TEXTS[sample], TEXTS[sample]) is None:
        pytest.skip(f"libvirt cannot define it on this host: {oracle.define(TEXTS[sample])}")
    refused = 0
    for where, changed in _mutations(TEXTS[sample]):
        said = oracle.abi(TEXTS[sample], changed)
        if said:
            refused += 1
            assert compare(TEXTS[sample], changed), f"{where}: {said}"
    assert refused > 5


def _mutations(text: str) -> Iterator[tuple[str, str]]:
    tree = etree.ElementTree(etree.fromstring(text.encode()))
    for number, element in enumerate(tree.getroot().iter("*")):
        path = tree.getelementpath(element)
        # the balloon is state: libvirt's own migration skips it too (VIR_DOMAIN_DEF_ABI_CHECK_SKIP_VOLATILE)
        if path == "currentMemory":
            continue
        for name, value in element.attrib.items():
            yield f"{path}/@{name}", _with(text, number, str(name), _another(str(value)))
        if (element.text or "").strip():
            yield path, _with(text, number, None, _another(str(element.text).strip()))
        # a <target> less is a domain that libvirt 9.0 dies of
        if number and element.tag not in ("target", "distances"):
            yield f"no {path}", _without(text, number)


def _another(value: str) -> str:
    opposite = {"on": "off", "off": "on", "yes": "no", "no": "yes"}
    if value in opposite:
        return opposite[value]
    if re.fullmatch(r"(0x)?[0-9a-fA-F:.-]+", value):
        return value[:-1] + ("1" if value[-1] != "1" else "2")
    return f"{value}x"


def _with(text: str, number: int, attribute: str | None, value: str) -> str:
    root = etree.fromstring(text.encode())
    element = list(root.iter("*"))[number]
    if attribute is None:
        element.text = value
    else:
        element.set(attribute, value)
    return etree.tostring(root, encoding="unicode")


def _without(text: str, number: int) -> str:
    root = etree.fromstring(text.encode())
    element = list(root.iter("*"))[number]
    parent = element.getparent()
    assert parent is not None
    parent.remove(element)
    return etree.tostring(root, encoding="unicode")


# -- words -----------------------------------------------------------------------------------------------------------

TWO = "<domain><devices><disk><target dev='vda'/></disk><disk><target dev='vdb'/></disk></devices></domain>"


def test_a_device_that_is_gone_is_named() -> None:
    one = TWO.replace("<disk><target dev='vda'/></disk>", "")
    assert [str(difference) for difference in compare(TWO, one)] == ["devices/disk[vda]: it is gone"]
    assert [str(difference) for difference in compare(one, TWO)] == ["devices/disk[vda]: it is new"]


def test_disks_may_stand_in_another_order_and_network_cards_may_not() -> None:
    turned = TWO.replace("vda", "tmp").replace("vdb", "vda").replace("tmp", "vdb")
    assert compare(TWO, turned) == []
    cards = TWO.replace("disk", "interface").replace("target dev", "mac address")
    assert len(compare(cards, turned.replace("disk", "interface").replace("target dev", "mac address"))) == 2


def test_differences_are_said_in_words() -> None:
    assert str(Difference("a/b", "1", "2")) == "a/b: 1 -> 2"
    assert str(Difference("features/acpi", "", None)) == "features/acpi: it is gone"
    assert str(Difference("x", None, "7")) == "x: 7 is new"
    assert str(Difference("x", "", "7")) == "x: present -> 7"


def test_all_differences_are_in_the_error_and_the_first_in_its_words() -> None:
    differences = [Difference(f"d{number}", "1", "2") for number in range(7)]
    with pytest.raises(
        DomainXmlError, match=r"^my XML would change .*: d0: 1 -> 2; .*d4: 1 -> 2 \(and 2 more\)$"
    ) as caught:
        refuse(differences, what="my XML")
    assert len(caught.value.differences) == 7
    refuse([])


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(DomainXmlError, match="the XML after cannot be parsed"):
        compare(TWO, "<domain>")
