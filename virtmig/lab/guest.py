"""A lab guest's settings, and what is made of them: a boot image and a domain XML."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

import msgspec
from lxml import etree

from virtmig.errors import LabError

PAGE_BYTES = 4096
FIRST_BYTE = 1 << 20  # where the walk begins, see guest.S
TICKS_PER_S = 250
_PAGES_OFFSET, _LIMIT_OFFSET, _RATE_OFFSET = 0x1F0, 0x1F4, 0x1F8
AS_FAST_AS_POSSIBLE = 0xFFFF_FFFF
#: above the walk: SeaBIOS keeps its tables at the end of RAM
_SPARE_BYTES = 2 << 20


class GuestSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`dirty_mib_s` None means as fast as possible, 0 means not at all; `walk_mib` None means all that fits."""

    name: str = "guest"
    memory_mib: int = 128
    walk_mib: int | None = None
    dirty_mib_s: float | None = 8.0
    machine: str = "pc"

    @property
    def pages(self) -> int:
        """How many pages the guest walks over. Raises LabError when they do not fit into its memory."""
        most = (self.memory_mib << 20) - FIRST_BYTE - _SPARE_BYTES
        walk = most if self.walk_mib is None else self.walk_mib << 20
        if self.memory_mib < 16 or self.memory_mib > 3072:
            raise LabError(f"{self.memory_mib} MiB is no size for a lab guest", hint="16 to 3072 MiB")
        if walk > most or walk < PAGE_BYTES:
            raise LabError(f"a walk of {self.walk_mib} MiB does not fit into a guest of {self.memory_mib} MiB",
                           hint=f"at most {most >> 20} MiB")  # fmt: skip
        return walk // PAGE_BYTES

    @property
    def rate(self) -> int:
        """Pages per tick in 24.8 fixed point, as guest.S takes it."""
        if self.dirty_mib_s is None:
            return AS_FAST_AS_POSSIBLE
        if self.dirty_mib_s < 0:
            raise LabError(f"a dirty rate of {self.dirty_mib_s} MiB/s makes no sense", hint="0 or more")
        return min(round(self.dirty_mib_s * (1 << 20) / PAGE_BYTES / TICKS_PER_S * 256), AS_FAST_AS_POSSIBLE - 1)

    @property
    def uuid(self) -> str:
        """Made from the name, so that both hosts and a later command know it."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.name}.lab.virtmig"))


def boot_image(settings: GuestSettings) -> bytes:
    """The boot sector with its settings patched in, as a 1.44 MB floppy: SeaBIOS wants a whole one."""
    sector = bytearray((Path(__file__).parent / "guest.bin").read_bytes())
    struct.pack_into("<I", sector, _PAGES_OFFSET, settings.pages)
    struct.pack_into("<I", sector, _LIMIT_OFFSET, FIRST_BYTE + settings.pages * PAGE_BYTES)
    struct.pack_into("<I", sector, _RATE_OFFSET, settings.rate)
    return bytes(sector).ljust(1440 * 1024, b"\0")


def sample_path(name: str = "lab-guest.xml") -> Path:
    """A sample in xml/domains/, in a checkout or in an installed package. Raises LabError when it is not there."""
    package = Path(__file__).parent.parent
    for folder in (package.parent / "xml" / "domains", package / "_xml" / "domains"):
        if (folder / name).is_file():
            return folder / name
    raise LabError(f"the sample xml/domains/{name} is missing", hint="run from a checkout, or install the package anew")


def domain_xml(settings: GuestSettings, *, image: Path, serial: str, emulator: str = "") -> str:
    """The sample with this guest's name, UUID, memory, image and serial file."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True)
    root = etree.parse(str(sample_path()), parser).getroot()

    def element(path: str) -> etree._Element:
        found = root.find(path)
        if found is None:
            raise LabError(f"the sample domain has no <{path}>")
        return found

    name = element("name")
    name.text = settings.name
    identity = etree.Element("uuid")
    identity.text = settings.uuid
    name.addnext(identity)
    element("memory").text = str(settings.memory_mib)
    element("os/type").set("machine", settings.machine)
    element("devices/disk/source").set("file", str(image))
    element("devices/serial/source").set("path", serial)
    if emulator:
        element("devices/emulator").text = emulator
    return etree.tostring(root, encoding="unicode")
