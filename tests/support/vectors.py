"""The recordings in tests/vectors/: find them, read them. What they hold is in tests/vectors/README.md."""

from __future__ import annotations

import hashlib
import lzma
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent.parent / "vectors"


def page_digest(page: bytes | memoryview) -> str:
    """How `memory.xz` names a page's content: 16 bytes of BLAKE2b in hexadecimal."""
    return hashlib.blake2b(page, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Recording:
    """One folder of tests/vectors/."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def about(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "about.toml").read_text())

    @cached_property
    def channels(self) -> list[str]:
        """Names of the connections in the order in which they were accepted."""
        return [connection["name"] for connection in self.about["connections"]]

    def has(self, capability: str) -> bool:
        return capability in self.about["capabilities"]

    def sent(self, channel: str) -> bytes:
        """Source to destination; empty when nothing was sent. A mapped-ram file is the channel `file`."""
        if channel == "file":
            return lzma.decompress((self.folder / "file.xz").read_bytes())
        return self._direction(channel, "s2d")

    def answered(self, channel: str) -> bytes:
        """Destination to source."""
        return self._direction(channel, "d2s")

    def arrivals(self) -> list[tuple[str, str, int]]:
        """(channel, "s2d" or "d2s", bytes) in the order of arrival at the proxy, neighbours merged."""
        lines = lzma.decompress((self.folder / "arrivals.xz").read_bytes()).decode().splitlines()
        return [(channel, way, int(count)) for channel, way, count in (line.split() for line in lines)]

    def page_digests(self) -> dict[str, dict[int, str]]:
        """RAM block -> page number -> digest of the pages that were not all zero when the source had stopped."""
        blocks: dict[str, dict[int, str]] = {}
        for line in lzma.decompress((self.folder / "memory.xz").read_bytes()).decode().splitlines():
            block, number, digest = line.rsplit(" ", 2)
            blocks.setdefault(block, {})[int(number)] = digest
        return blocks

    def _direction(self, channel: str, way: str) -> bytes:
        path = self.folder / f"{channel}.{way}.xz"
        return lzma.decompress(path.read_bytes()) if path.exists() else b""


def recordings(*with_capabilities: str, version: str = "") -> list[Recording]:
    """All recordings, or those with all these capabilities and of this QEMU version ("7.2"), sorted by name."""
    found = (Recording(about.parent) for about in sorted(VECTORS.glob("*/about.toml")))
    return [each for each in found if all(map(each.has, with_capabilities)) and each.about["qemu"].startswith(version)]
