"""Record whole migrations between two real QEMUs: every connection, both directions, and what the guest's memory was.

    python -m tests.support.recorder --qemu /usr/bin/qemu-system-x86_64 --version-name 7.2 --out tests/vectors
    python -m tests.support.recorder --chroot /var/tmp/trixie --version-name 10.0 --only plain,xbzrle

What a recording holds is written in tests/vectors/README.md. Nothing here uses virtmig.stream: what must be found comes
from QEMU itself (query-migrate, info ramblock, the JSON description, the process's memory), so that the recordings
are a second opinion.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import lzma
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.proxy import Connection, RecordingProxy, free_port
from tests.support.qemu import Qemu, QemuError
from tests.support.reference import ReferenceReader, Seen
from tests.support.vectors import page_digest
from virtmig.lab.guest import FIRST_BYTE, PAGE_BYTES, GuestSettings, boot_image
from virtmig.lab.memory_check import check_memory

MEMORY_MIB = 64
#: 7.2 under TCG lost 174 to 200 pages in each plain precopy of a 64 MiB guest, and none with 8 KiB more. Presumably the
#: word-wise fast path of cpu_physical_memory_sync_dirty_bitmap, which takes whole 256 KiB only, leaves the TLB stale.
_MEMORY_KIB = {"7.2": 64 * 1024 + 8, "10.0": 64 * 1024, "11.1": 64 * 1024}
_BIOS = "bios.bin"  # half as long as the default of these machines, which keeps the recordings small
_FOUR_GIB = 1 << 32  # the BIOS ends there
_MIB = 1 << 20
_PAGES_OFFSET = 0x1F0  # of guest.S: u32 pages, u32 limit
_ZERO_PAGE = bytes(PAGE_BYTES)


@dataclass(frozen=True)
class Scenario:
    """One migration. `ending` is how it leaves precopy; `passes` is how many passes over RAM begin before that."""

    name: str
    versions: tuple[str, ...]
    capabilities: tuple[str, ...] = ("return-path",)
    parameters: dict[str, int | str] = field(default_factory=dict)
    ending: str = "precopy"  # precopy, postcopy, recovery, file
    machine: str = "pc"
    shared_memory: bool = False
    passes: int = 2
    dirty_mib_s: float = 4.0
    walk_pages: int = 128  # their filler shrinks well only under xz's delta filter: few where QEMU compresses itself
    bandwidth_mib_s: int = 4
    why: str = ""


_ALL = ("7.2", "10.0", "11.1")
_POSTCOPY = ("postcopy-ram",)
_PREEMPT = ("postcopy-ram", "postcopy-preempt")


def _multifd(method: str, channels: int = 2) -> dict[str, int | str]:
    return {"multifd-channels": channels, "multifd-compression": method}


SCENARIOS = (
    Scenario("plain", _ALL, passes=3, why="precopy with a return path, three passes"),
    Scenario("multifd", _ALL, ("return-path", "multifd"), _multifd("none"), passes=3, bandwidth_mib_s=8,
             why="two channels, nothing compressed, three passes"),
    Scenario("multifd-zlib", _ALL, ("return-path", "multifd"), _multifd("zlib"), passes=1, walk_pages=8,
             bandwidth_mib_s=1, why="one zlib stream a channel"),
    Scenario("multifd-zstd", _ALL, ("return-path", "multifd"), _multifd("zstd"), passes=1, walk_pages=8,
             bandwidth_mib_s=1, why="one zstd frame a channel"),
    Scenario("xbzrle", _ALL, ("xbzrle",), passes=4, bandwidth_mib_s=2, why="pages sent as differences"),
    Scenario("compress", ("7.2",), ("compress",), passes=1, walk_pages=8,
             why="the old compress capability: one zlib stream a page"),
    Scenario("postcopy", _ALL, _POSTCOPY, {"max-postcopy-bandwidth": 256 << 10}, "postcopy",
             why="some pages are requested, and answered on main"),
    Scenario("postcopy-preempt", _ALL, _PREEMPT, {"max-postcopy-bandwidth": 256 << 10}, "postcopy",
             why="requested pages come on a channel of their own, without a magic"),
    Scenario("recovery", _ALL, _POSTCOPY, {"max-postcopy-bandwidth": 32 << 10}, "recovery", passes=1,
             why="paused in postcopy and continued over new connections"),
    Scenario("recovery-preempt", _ALL, _PREEMPT, {"max-postcopy-bandwidth": 32 << 10}, "recovery", passes=1,
             why="paused and continued, with a new preempt channel too"),
    Scenario("ignore-shared", _ALL, ("return-path", "x-ignore-shared"), shared_memory=True, passes=1,
             why="pc.ram is listed with its address and never sent"),
    Scenario("mapped-ram", ("10.0", "11.1"), ("mapped-ram",), ending="file",
             why="a file with a place for every page, written while the guest ran and loaded afterwards"),
    Scenario("mapped-ram-ignore-shared", ("11.1",), ("mapped-ram", "x-ignore-shared"), ending="file",
             shared_memory=True, passes=1,
             why="the block that is left out has both offsets 0; 10.0 fails here with EFAULT"),
    Scenario("multifd-postcopy", ("11.1",), (*_PREEMPT, "multifd"),
             {**_multifd("none"), "max-postcopy-bandwidth": 2 << 20}, "postcopy", bandwidth_mib_s=8,
             why="after the switch everything goes on main and preempt, zero pages in full"),
    Scenario("old-machine-multifd", ("11.1",), ("return-path", "multifd"), _multifd("none"),
             machine="pc-i440fx-7.2", bandwidth_mib_s=8, why="a new binary with 7.2's multifd sync and zero pages"),
    Scenario("old-machine-preempt", ("11.1",), _PREEMPT, {"max-postcopy-bandwidth": 256 << 10}, "postcopy",
             machine="pc-i440fx-7.2", why="the preempt channel is opened early and ends with an EOS"),
)  # fmt: skip


@dataclass(frozen=True)
class Emulator:
    """A QEMU binary. `root` is the folder that it sees as `/`; `version_name` names its recordings."""

    binary: str
    root: Path
    version_name: str

    @property
    def command(self) -> list[str]:
        return [self.binary] if self.root == Path("/") else ["chroot", str(self.root), self.binary]

    @contextmanager
    def folder(self) -> Iterator[tuple[Path, str]]:
        """A work folder: its path here, and its path as the emulator sees it."""
        inside = self.root / "var/tmp"
        path = Path(tempfile.mkdtemp(prefix="recorder-", dir=inside))
        try:
            yield path, "/" + str(path.relative_to(self.root))
        finally:
            shutil.rmtree(path)


class PagesLost(Exception):
    """The destination did not get the source's memory: QEMU's TCG can lose a page that is written during a sync."""


class Recording:
    """A scenario while it runs on one emulator."""

    def __init__(self, emulator: Emulator, scenario: Scenario, out: Path) -> None:
        self.emulator, self.scenario = emulator, scenario
        self.out = out / f"{emulator.version_name}-{scenario.name}"
        self.memory_kib = _MEMORY_KIB[emulator.version_name]
        self.proxy: RecordingProxy | None = None

    def run(self) -> None:
        """Migrate and write the recording's folder, replacing an older one."""
        with ExitStack() as stack:
            self.here, self.there = stack.enter_context(self.emulator.folder())
            (self.here / "boot.img").write_bytes(self._image())
            source = stack.enter_context(self._qemu("source"))
            source.wait_heartbeat(3)
            sections = device_sections(source)
            # the guest ran to its end in device_sections: a fresh source makes the recording
            source.close()
            source = stack.enter_context(self._qemu("source"))
            source.wait_heartbeat(3)
            running = self.scenario.ending in ("postcopy", "recovery")
            destination = stack.enter_context(
                self._qemu("destination", "-incoming", "defer", *([] if running else ["-S"]))
            )
            for side in (source, destination):
                side.set_capabilities((*self.scenario.capabilities, "events"))
                side.set_parameters({k: v for k, v in self.scenario.parameters.items() if k.startswith("multifd")})
            source.set_parameters(
                {**self.scenario.parameters, "max-bandwidth": self.scenario.bandwidth_mib_s * _MIB, "downtime-limit": 1}
            )
            if self.scenario.ending == "file":
                self._through_file(source, destination)
            else:
                self.proxy = stack.enter_context(RecordingProxy())
                self._through_proxy(source, destination)
                self.proxy.wait_closed()
            about = self._about(source, destination, sections)
            digests = self._memory(source, destination, about)
            self._write(about, digests)

    def _image(self) -> bytes:
        """The lab's boot image with a walk that may be shorter than 1 MiB."""
        image = bytearray(
            boot_image(GuestSettings(memory_mib=MEMORY_MIB, walk_mib=1, dirty_mib_s=self.scenario.dirty_mib_s))
        )
        limit = FIRST_BYTE + self.scenario.walk_pages * PAGE_BYTES
        struct.pack_into("<II", image, _PAGES_OFFSET, self.scenario.walk_pages, limit)
        return bytes(image)

    def _qemu(self, role: str, *more: str) -> Qemu:
        floppy = f"if=floppy,format=raw,readonly=on,file={self.there}/boot.img"
        arguments = ["-M", self.scenario.machine, "-accel", "tcg", "-m", f"{self.memory_kib}K", "-display", "none",
                     "-nodefaults", "-bios", _BIOS, "-boot", "a", "-drive", floppy, *more]  # fmt: skip
        if self.scenario.shared_memory:
            backend = f"memory-backend-file,id=pc.ram,size={self.memory_kib}K,share=on,mem-path={self.there}/ram"
            arguments[1] += ",memory-backend=pc.ram"
            arguments += ["-object", backend]
        return Qemu(self.emulator.command, arguments, name=role, stderr=self.here / f"{role}.stderr")

    def _through_proxy(self, source: Qemu, destination: Qemu) -> None:
        proxy = self.proxy
        assert proxy is not None
        proxy.target_port = free_port()
        destination.qmp.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{proxy.target_port}")
        source.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{proxy.port}")
        source.qmp.wait_pass(self.scenario.passes)
        if self.scenario.ending == "precopy":
            source.set_parameters({"max-bandwidth": 256 * _MIB, "downtime-limit": 5000})
        else:
            proxy.wait_carried("s2d", 400_000)  # far enough into the walk that some of it is here and some is not
            source.qmp.execute("migrate-start-postcopy")
            source.qmp.wait_status("postcopy-active")
            destination.qmp.wait_status("postcopy-active")
            if self.scenario.ending == "recovery":
                self._pause_and_recover(source, destination)
        source.qmp.wait_status("completed")
        destination.qmp.wait_status("completed")

    def _pause_and_recover(self, source: Qemu, destination: Qemu) -> None:
        proxy = self.proxy
        assert proxy is not None
        proxy.wait_carried("d2s", 120)  # some pages were requested
        if self.emulator.version_name == "7.2":
            source.qmp.execute("migrate-pause")
        else:
            proxy.cut()
        source.qmp.wait_status("postcopy-paused")
        destination.qmp.wait_status("postcopy-paused")
        proxy.target_port = free_port()
        destination.qmp.execute("migrate-recover", uri=f"tcp:127.0.0.1:{proxy.target_port}")
        source.set_parameters({"max-postcopy-bandwidth": 2 * _MIB})
        source.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{proxy.port}", resume=True)

    def _through_file(self, source: Qemu, destination: Qemu) -> None:
        source.qmp.execute("migrate", uri=f"file:{self.there}/saved")
        source.qmp.wait_pass(self.scenario.passes)
        source.set_parameters({"max-bandwidth": 256 * _MIB, "downtime-limit": 5000})
        source.qmp.wait_status("completed")
        destination.qmp.execute("migrate-incoming", uri=f"file:{self.there}/saved")
        destination.qmp.wait_status("completed")

    def _about(self, source: Qemu, destination: Qemu, sections: list[tuple[str, int]]) -> dict[str, Any]:
        final = source.qmp.execute("query-migrate")
        machine = self.scenario.machine
        if machine == "pc":
            machine = next(m["name"] for m in source.qmp.execute("query-machines") if m.get("alias") == "pc")
        about: dict[str, Any] = {
            "scenario": self.scenario.name,
            "why": self.scenario.why,
            "qemu": source.version,
            "machine": machine,
            "recorded": datetime.date.today(),
            "host": "x86_64, TCG, source and destination the same binary",
            "ending": self.scenario.ending,
            "capabilities": list(self.scenario.capabilities),
            "parameters": self.scenario.parameters,
            "passes_before_the_end": self.scenario.passes,
            "source": {"arguments": [self._portable(a) for a in source.arguments], "states": source.qmp.statuses()},
            "destination": {
                "arguments": [self._portable(a) for a in destination.arguments],
                "states": destination.qmp.statuses(),
            },
            "blocks": source.ram_blocks(),
            "device_sections": [f"{name}/{instance}" for name, instance in sections],
            "ram": {k.replace("-", "_"): v for k, v in final["ram"].items()},
        }
        for extra in ("xbzrle-cache", "compression"):
            if extra in final:
                about[extra.replace("-", "_")] = {k.replace("-", "_"): v for k, v in final[extra].items()}
        return about

    def _portable(self, argument: str) -> str:
        return re.sub(r"fd=\d+", "fd=N", argument.replace(self.there, "WORK"))

    def _memory(self, source: Qemu, destination: Qemu, about: dict[str, Any]) -> str:
        """Hash the stopped source's RAM page by page; check the guest's walk; compare with a paused destination."""
        about["memory"] = {}
        lines = []
        for address, length in (
            (0, about["blocks"]["pc.ram"]),
            (_FOUR_GIB - about["blocks"]["pc.bios"], about["blocks"]["pc.bios"]),
        ):
            name, content = source.read_guest_block(address, length)
            if address == 0:
                count = self.scenario.walk_pages
                walk = check_memory(content[FIRST_BYTE : FIRST_BYTE + count * PAGE_BYTES], count)
                about["memory"]["walk_counter"] = walk.counter
            pages = [content[at : at + PAGE_BYTES] for at in range(0, length, PAGE_BYTES)]
            present = [(number, page_digest(page)) for number, page in enumerate(pages) if page != _ZERO_PAGE]
            lines += [f"{name} {number} {digest}" for number, digest in present]
            entry: dict[str, Any] = {"bytes": length, "nonzero_pages": len(present)}
            entry["blake2b"] = hashlib.blake2b(content, digest_size=32).hexdigest()
            running_destination = "-S" not in destination.arguments
            if not running_destination:
                loaded = destination.read_guest_block(address, length)[1]
                if loaded != content:
                    raise PagesLost(f"{name} of the destination is not the source's")
                entry["destination_blake2b"] = hashlib.blake2b(loaded, digest_size=32).hexdigest()
            about["memory"][name] = entry
            if running_destination and not self.scenario.parameters.get("multifd-channels"):
                received = {page: page_digest(data) for page, data in self._received().get(name, {}).items()}
                if received != dict(present):
                    raise PagesLost(f"what was sent of {name} is not the source's memory")
        return "\n".join(lines) + "\n"

    def _received(self) -> dict[str, dict[int, bytes]]:
        """RAM block -> page number -> content, from the recorded bytes."""
        assert self.proxy is not None
        seen = Seen()
        for connection, name in zip(self.proxy.connections, name_connections(self.proxy.connections), strict=True):
            reader = ReferenceReader(bytes(connection.s2d), seen)
            (reader.read_main if name.startswith("main") else reader.read_preempt)()
        return seen.pages

    def _write(self, about: dict[str, Any], digests: str) -> None:
        if self.out.exists():
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True)
        about["connections"] = []
        if self.proxy is None:
            content = (self.here / "saved").read_bytes()
            about["connections"].append({"name": "file", **_direction("s2d", content)})
            (self.out / "file.xz").write_bytes(compress(content))
        else:
            names = name_connections(self.proxy.connections)
            for connection, name in zip(self.proxy.connections, names, strict=True):
                sent, answered = bytes(connection.s2d), bytes(connection.d2s)
                about["connections"].append({"name": name, **_direction("s2d", sent), **_direction("d2s", answered)})
                for suffix, content in (("s2d", sent), ("d2s", answered)):
                    if content:
                        (self.out / f"{name}.{suffix}.xz").write_bytes(compress(content))
            rows = (f"{names[number]} {way} {count}\n" for number, way, count in self.proxy.arrivals)
            (self.out / "arrivals.xz").write_bytes(lzma.compress("".join(rows).encode()))
        (self.out / "memory.xz").write_bytes(lzma.compress(digests.encode()))
        (self.out / "about.toml").write_text(to_toml(about))


def _direction(way: str, content: bytes) -> dict[str, Any]:
    return {f"{way}_bytes": len(content), f"{way}_blake2b": hashlib.blake2b(content, digest_size=16).hexdigest()}


def name_connections(connections: list[Connection]) -> list[str]:
    """A name for each connection by its first bytes: main, multifd-K, preempt; `-recovery` for the second of a kind."""
    names: list[str] = []
    for connection in connections:
        begin = bytes(connection.s2d[:64])
        if begin.startswith(b"QEVM"):
            name = "main"
        elif begin.startswith(b"\x11\x22\x33\x44"):
            name = f"multifd-{begin[24]}"
        elif begin.startswith(b"\x08\x00\x0a"):  # MIG_CMD_RECV_BITMAP: a recovery has no header
            name = "main"
        else:
            name = "preempt"
        names.append(name if name not in names else f"{name}-recovery")
    return names


def compress(content: bytes) -> bytes:
    """xz, with a delta filter when that is smaller: the lab guest's pages are words that grow by a constant."""
    text = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    words = {**text, "lc": 0, "lp": 2, "pb": 2}
    code, delta = {"id": lzma.FILTER_X86}, {"id": lzma.FILTER_DELTA, "dist": 4}
    tries = (lzma.compress(content, filters=filters) for filters in ([text], [delta, words], [code, delta, words]))
    return min(tries, key=len)


def device_sections(source: Qemu) -> list[tuple[str, int]]:
    """(name, instance id) of each device section, from the JSON description at the end of a migration to nowhere."""
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)

        def swallow() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1 << 20):
                    received.extend(data)

        thread = threading.Thread(target=swallow, name="swallow")
        thread.start()
        source.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    for match in re.finditer(rb"\x00\x06(....)\{", received, re.DOTALL):
        if struct.unpack(">I", match[1])[0] == len(received) - match.end() + 1:
            return [(d["name"], d["instance_id"]) for d in json.loads(received[match.end() - 1 :])["devices"]]
    raise ValueError("the stream does not end in a description")


def to_toml(table: dict[str, Any], path: str = "") -> str:
    """Enough TOML for about.toml: scalars, lists of scalars, tables, and lists of tables."""
    text, tables = "", ""
    for key, value in table.items():
        name = key if re.fullmatch(r"[\w-]+", key) else json.dumps(key)
        if isinstance(value, dict):
            tables += f"\n[{path}{name}]\n" + to_toml(value, f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables += "".join(f"\n[[{path}{name}]]\n" + to_toml(entry) for entry in value)
        elif isinstance(value, list) and len(value) > 4:
            text += f"{name} = [\n" + "".join(f"    {json.dumps(entry)},\n" for entry in value) + "]\n"
        else:
            text += f"{name} = {value if isinstance(value, datetime.date) else json.dumps(value)}\n"
    return text + tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", default="/usr/bin/qemu-system-x86_64", help="as seen inside the chroot")
    parser.add_argument("--chroot", type=Path, default=Path("/"))
    parser.add_argument("--version-name", required=True, choices=_ALL)
    parser.add_argument("--out", type=Path, default=Path("tests/vectors"))
    parser.add_argument("--only", default="", help="names of scenarios, with commas")
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    emulator = Emulator(options.qemu, options.chroot, options.version_name)
    failed: list[str] = []
    for scenario in SCENARIOS:
        if options.version_name in scenario.versions and (not wanted or scenario.name in wanted):
            recording = Recording(emulator, scenario, options.out)
            try:
                recording.run()
            except (PagesLost, QemuError, TimeoutError, OSError, ValueError) as error:
                failed.append(scenario.name)
                print(f"{recording.out.name}: {type(error).__name__}: {error}", flush=True)
                continue
            size = sum(path.stat().st_size for path in recording.out.iterdir())
            print(f"{recording.out.name}: {size >> 10} KiB", flush=True)
    if failed:
        sys.exit(f"not recorded: {', '.join(failed)}")


if __name__ == "__main__":
    main()
