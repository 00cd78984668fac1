"""The boot sector is what its source says, takes its settings, and does in a QEMU what it claims."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from tests.support.lab import GuestFactory, LabGuest, eventually
from virtmig.errors import LabError
from virtmig.lab.guest import AS_FAST_AS_POSSIBLE, FIRST_BYTE, PAGE_BYTES, GuestSettings, boot_image, domain_xml
from virtmig.lab.lab import Lab

LAB = Path(__file__).parents[2] / "virtmig" / "lab"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


def test_binary_is_built_from_the_source(tmp_path: Path) -> None:
    if not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("binutils (as, ld) are not installed")
    subprocess.run(["as", "--32", "-o", "guest.o", str(LAB / "guest.S")], cwd=tmp_path, check=True)
    link = "ld -m elf_i386 -Ttext 0x7c00 --oformat binary -e start -o guest.bin guest.o"
    subprocess.run(link.split(), cwd=tmp_path, check=True)
    built = (tmp_path / "guest.bin").read_bytes()
    assert len(built) == 512
    assert built == (LAB / "guest.bin").read_bytes()


def test_boot_image_is_a_floppy_with_the_settings_at_their_offsets() -> None:
    image = boot_image(GuestSettings(memory_mib=64, walk_mib=10, dirty_mib_s=5.0))
    assert len(image) == 1_474_560
    assert image[510:512] == b"\x55\xaa"
    pages, limit, rate = struct.unpack_from("<3I", image, 0x1F0)
    assert (pages, limit) == (2560, FIRST_BYTE + (10 << 20))
    assert rate == 1311  # 5 MiB/s = 1280 pages/s = 5.12 pages per tick, in 1/256 pages
    plain = (LAB / "guest.bin").read_bytes()
    assert image[:0x1F0] == plain[:0x1F0]


def test_rates_at_the_ends() -> None:
    assert struct.unpack_from("<I", boot_image(GuestSettings(dirty_mib_s=None)), 0x1F8)[0] == AS_FAST_AS_POSSIBLE
    assert struct.unpack_from("<I", boot_image(GuestSettings(dirty_mib_s=0)), 0x1F8)[0] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (GuestSettings(memory_mib=8), "8 MiB is no size"),
        (GuestSettings(memory_mib=4096), "4096 MiB is no size"),
        (GuestSettings(memory_mib=64, walk_mib=62), "does not fit"),
        (GuestSettings(memory_mib=64, walk_mib=0), "does not fit"),
        (GuestSettings(memory_mib=64, dirty_mib_s=-1), "makes no sense"),
    ],
)
def test_impossible_settings_are_refused_with_a_way_out(settings: GuestSettings, words: str) -> None:
    with pytest.raises(LabError, match=words) as caught:
        boot_image(settings)
    assert caught.value.hint


def filled(settings: GuestSettings) -> etree._Element:
    text = domain_xml(settings, image=Path("/lab/x & y.img"), serial="/lab/s.serial", emulator="/opt/qemu")
    return etree.fromstring(text)


def test_domain_xml_carries_the_settings() -> None:
    settings = GuestSettings(name="n<1>", memory_mib=96, machine="q35")
    root = filled(settings)
    assert root.findtext("name") == "n<1>"
    assert root.findtext("uuid") == settings.uuid != GuestSettings(name="n2").uuid
    assert (root.findtext("memory"), root.find("memory").get("unit")) == ("96", "MiB")
    assert root.find("os/type").get("machine") == "q35"
    assert root.find("devices/disk/source").get("file") == "/lab/x & y.img"
    assert root.find("devices/disk/readonly") is not None
    assert root.find("devices/serial/source").get("path") == "/lab/s.serial"
    assert root.findtext("devices/emulator") == "/opt/qemu"


@pytest.mark.parametrize("sample", ["as it is", "filled"])
def test_domain_xml_fits_the_schema(sample: str) -> None:
    if not SCHEMA.exists():
        pytest.skip(f"libvirt's schema is not installed ({SCHEMA})")
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    path = LAB.parents[1] / "xml" / "domains" / "lab-guest.xml"
    root = etree.parse(str(path)).getroot() if sample == "as it is" else filled(GuestSettings())
    assert schema.validate(root), schema.error_log


# -- in a QEMU -------------------------------------------------------------------------------------------------------


def walked(lab: Lab, guest: LabGuest) -> tuple[int, int]:
    """Pages walked since boot, and the last tick the guest printed, at one moment."""
    domain = guest.domain(lab.a)
    domain.suspend()
    try:
        check = guest.check(lab.a)
        tick = lab.heartbeat(lab.a, guest.name)
    finally:
        domain.resume()
    assert tick is not None
    return check.counter * check.pages + (check.step_page or 0), tick


@pytest.mark.lab
@pytest.mark.parametrize("dirty_mib_s", [2.0, 16.0])
def test_walks_at_the_rate_that_was_set(lab: Lab, guest: GuestFactory, dirty_mib_s: float) -> None:
    made = guest(memory_mib=16, dirty_mib_s=dirty_mib_s)
    pages_before, tick_before = walked(lab, made)
    eventually(lambda: (lab.heartbeat(lab.a, made.name) or 0) >= tick_before + 250, "a second of guest time")
    pages_after, tick_after = walked(lab, made)
    per_tick = (pages_after - pages_before) / (tick_after - tick_before)
    # the heartbeat comes every 25 ticks: that much, at both ends, is not known
    assert per_tick == pytest.approx(dirty_mib_s * (1 << 20) / PAGE_BYTES / 250, rel=0.15)


@pytest.mark.lab
def test_idle_guest_changes_nothing_and_still_beats(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16, dirty_mib_s=0)
    first = made.check(lab.a)
    beat = lab.heartbeat(lab.a, made.name) or 0
    eventually(lambda: (lab.heartbeat(lab.a, made.name) or 0) > beat + 50, "two heartbeats")
    assert made.check(lab.a) == first
    assert (first.counter, first.step_page) == (0, None)


@pytest.mark.lab
def test_as_fast_as_possible_is_far_beyond_any_rate(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16, dirty_mib_s=None)
    before, tick_before = walked(lab, made)
    eventually(lambda: (lab.heartbeat(lab.a, made.name) or 0) > tick_before + 50, "two heartbeats")
    after, tick_after = walked(lab, made)
    assert (after - before) / (tick_after - tick_before) > 1000


@pytest.mark.lab
def test_heartbeat_is_a_line_every_25_ticks(lab: Lab, guest: GuestFactory) -> None:
    made = guest(memory_mib=16)
    serial = lab.a.serial_file(made.name)
    text = eventually(lambda: (t := serial.read_bytes()).count(b"\n") >= 4 and t, "four heartbeats")
    lines = text.split(b"\n")[:-1]
    assert all(len(line) == 8 for line in lines)
    ticks = [int(line, 16) for line in lines]
    assert ticks == list(range(25, 25 * len(ticks) + 1, 25))
