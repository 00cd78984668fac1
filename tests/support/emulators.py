"""The QEMUs that are at hand, and the lab's guest in one of them without libvirt.

The host's own QEMU, and the one in each folder of $VIRTMIG_CHROOTS, which `./dev compat` fills.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.qemu import Qemu
from tests.support.recorder import Emulator
from virtmig.lab.guest import FIRST_BYTE, PAGE_BYTES, GuestSettings, boot_image
from virtmig.lab.memory_check import MemoryCheck, check_memory
from virtmig.stream.wire import Dialect

BINARY = "qemu-system-x86_64"
#: not a multiple of 1 MiB: TCG of 7.2 loses dirty pages at such sizes (tests/support/recorder.py)
MEMORY_KIB = 64 * 1024 + 8
_FOUR_GIB = 1 << 32


@functools.cache
def emulators() -> tuple[Emulator, ...]:
    """One for each version, the host's own first."""
    found = []
    own = shutil.which(BINARY)
    if own:
        found.append(Emulator(own, Path("/"), _version([own])))
    folder = os.environ.get("VIRTMIG_CHROOTS")
    for root in sorted(Path(folder).iterdir()) if folder else ():
        if (root / "usr/bin" / BINARY).exists():
            binary = f"/usr/bin/{BINARY}"
            found.append(Emulator(binary, root, _version(["chroot", str(root), binary])))
    return tuple({each.version_name: each for each in reversed(found)}.values())[::-1]


def _version(command: Sequence[str]) -> str:
    text = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+\.\d+)", text)
    assert match is not None, text
    return match[1]


def dialect(emulator: Emulator) -> Dialect:
    """Whose rules this version follows."""
    major, minor = (int(part) for part in emulator.version_name.split("."))
    if major < 8:
        return Dialect.QEMU_7_2
    return Dialect.QEMU_11_1 if (major, minor) >= (10, 1) else Dialect.QEMU_10_0


class LabQemu(Qemu):
    """A QEMU with the lab's guest. `folder` is where it and we can put files: (our path, its path)."""

    def __init__(
        self,
        emulator: Emulator,
        folder: tuple[Path, str],
        *more: str,
        name: str = "source",
        settings: GuestSettings | None = None,
        machine: str = "pc",
        memory_kib: int = MEMORY_KIB,
        shared: bool = False,
    ) -> None:
        here, there = folder
        self.settings = settings or GuestSettings(memory_mib=64, walk_mib=2, dirty_mib_s=8)
        image = here / "boot.img"
        if not image.exists():
            image.write_bytes(boot_image(self.settings))
        floppy = f"if=floppy,format=raw,readonly=on,file={there}/boot.img"
        arguments = ["-M", machine, "-accel", "tcg", "-m", f"{memory_kib}K", "-display", "none", "-nodefaults",
                     "-bios", "bios.bin", "-boot", "a", "-drive", floppy, *more]  # fmt: skip
        if shared:
            arguments[1] += ",memory-backend=pc.ram"
            backend = f"memory-backend-file,id=pc.ram,size={memory_kib}K,share=on,mem-path={there}/ram"
            arguments += ["-object", backend]
        super().__init__(emulator.command, arguments, name=name, stderr=here / f"{name}.stderr")

    def memory(self) -> dict[str, bytes]:
        """The RAM blocks that the guest sees, read from the process. Stop the guest first."""
        lengths = self.ram_blocks()
        blocks = (self.read_guest_block(0, lengths["pc.ram"]),
                  self.read_guest_block(_FOUR_GIB - lengths["pc.bios"], lengths["pc.bios"]))  # fmt: skip
        return dict(blocks)

    def check_walk(self) -> MemoryCheck:
        """The guest's own counters. Stop the guest first."""
        content = self.memory()["pc.ram"]
        pages = self.settings.pages
        return check_memory(content[FIRST_BYTE : FIRST_BYTE + pages * PAGE_BYTES], pages)


@contextmanager
def lab_source(
    emulator: Emulator,
    *,
    capabilities: Sequence[str] = ("return-path",),
    machine: str = "pc",
    shared: bool = False,
    **parameters: int | str,
) -> Iterator[tuple[LabQemu, tuple[Path, str]]]:
    """A running guest that is ready to be migrated, and the folder it shares with us."""
    with emulator.folder() as folder, LabQemu(emulator, folder, machine=machine, shared=shared) as source:
        source.wait_heartbeat(2)
        source.set_capabilities([*capabilities, "events"])
        source.set_parameters({"max-bandwidth": 1 << 30, "downtime-limit": 2000, **parameters})
        yield source, folder
