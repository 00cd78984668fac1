"""Images made from recordings, and QEMUs of every age that wait for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.emulators import emulators
from tests.support.proxy import free_port
from tests.support.qemu import Qemu
from tests.support.recorder import MEMORY_MIB, Emulator
from tests.support.vectors import VECTORS, Recording, page_digest
from virtmig.engine.image import ImageWriter, new_manifest
from virtmig.engine.transport import Address
from virtmig.lab.guest import GuestSettings, boot_image
from virtmig.stream.decoder import QemuStreamDecoder
from virtmig.stream.events import Description, DeviceSection, Pages, RamBlocks, SectionBegin, StreamHeader, ZeroPages
from virtmig.stream.wire import Item

BINARY = "/usr/bin/qemu-system-x86_64"
#: a folder with one root file system for each further QEMU
CHROOTS = "VIRTMIG_CHROOTS"
_FOUR_GIB = 1 << 32


def recording(name: str) -> Recording:
    return Recording(VECTORS / name)


def image_from(source: Recording, folder: Path) -> Path:
    """An image of the guest that a plain recording's main channel carries."""
    decoder = QemuStreamDecoder()
    decoder.feed(source.sent("main"))
    decoder.end()
    writer = ImageWriter(folder)
    sections: list[DeviceSection] = []
    header, description, ram_id = None, b"", 1
    for event in decoder.events():
        match event:
            case StreamHeader():
                header = event
            case RamBlocks():
                memory = writer.create_memory({block.name: block.used_length for block in event.blocks})
            case SectionBegin() if event.kind == Item.SECTION_START:
                ram_id = event.section_id
            case Pages():
                memory.place(event.block, event.page_numbers, event.data)
            case ZeroPages():
                memory.zero(event.block, event.page_numbers)
            case DeviceSection():
                sections.append(event)
            case Description():
                description = event.text
    assert header is not None
    writer.save_devices(sections)
    writer.commit(new_manifest(header, sections, description=description, ram_section_id=ram_id), description)
    return folder


@dataclass
class Waiting:
    """A QEMU that waits for a migration at `address`; `source` is the recording whose guest it can take."""

    qemu: Qemu
    address: Address
    source: Recording

    def memory_differs(self) -> list[str]:
        """Pages of pc.ram and pc.bios that are not what the source had when it stopped."""
        expected = self.source.page_digests()
        blocks = self.source.about["blocks"]
        zero = page_digest(bytes(4096))
        found = []
        for name, address in (("pc.ram", 0), ("pc.bios", _FOUR_GIB - blocks["pc.bios"])):
            there, content = self.qemu.read_guest_block(address, blocks[name])
            assert there == name
            for number in range(len(content) // 4096):
                digest = page_digest(content[number * 4096 : (number + 1) * 4096])
                if digest != expected[name].get(number, zero):
                    found.append(f"{name} {number}")
        return found

    def recover(self) -> Address:
        """migrate-recover once it is paused: where it waits now."""
        self.qemu.qmp.wait_status("postcopy-paused")
        address = Address("127.0.0.1", free_port())
        self.qemu.qmp.execute("migrate-recover", uri=str(address))
        return address


@contextmanager
def waiting(
    emulator: Emulator,
    source: Recording,
    *capabilities: str,
    runs: bool = False,
    unix: bool = False,
    changed: tuple[str, ...] = (),
    **parameters: int | str,
) -> Iterator[Waiting]:
    """The recording's own command line with -incoming; the guest stays stopped unless it `runs`.

    `changed`: an option and the value it has instead.
    """
    with emulator.folder() as (here, there):
        (here / "boot.img").write_bytes(boot_image(GuestSettings(memory_mib=MEMORY_MIB, walk_mib=1)))
        recorded: Sequence[str] = source.about["source"]["arguments"]
        arguments = [argument.replace("WORK", there) for argument in recorded[: recorded.index("-chardev")]]
        arguments[arguments.index("-M") + 1] = source.about["machine"]
        if changed:
            arguments[arguments.index(changed[0]) + 1] = changed[1]
        arguments += ["-incoming", "defer", *([] if runs else ["-S"])]
        with Qemu(emulator.command, arguments, name="destination", stderr=here / "stderr") as qemu:
            qemu.set_capabilities((*capabilities, "events"))
            qemu.set_parameters(parameters)
            if unix:
                address = Address(path=str(here / "socket"))
                qemu.qmp.execute("migrate-incoming", uri=f"unix:{there}/socket")
            else:
                address = Address("127.0.0.1", free_port())
                qemu.qmp.execute("migrate-incoming", uri=str(address))
            yield Waiting(qemu, address, source)


def own_emulator(version: str = "") -> Emulator:
    """The host's own QEMU, or the one of that version; the test is skipped when there is none."""
    found = next((each for each in emulators() if not version or each.version_name == version), None)
    if found is None:
        pytest.skip(f"no QEMU {version or 'at all'} here (./dev compat brings them)")
    return found
