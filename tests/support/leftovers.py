"""What a test of memory and processes may not leave behind: threads, descriptors, mapped memory files, children."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def leftovers() -> dict[str, list[str]]:
    """Everything of this process that somebody has to give back, by kind."""
    descriptors = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{entry}").split(":")[0])
        except OSError:
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    children = [path.read_text(encoding="ascii") for path in Path("/proc/self/task").glob("*/children")]
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": sorted(name for name in descriptors if not name.startswith("/proc/")),
        "mappings": sorted(line.split(None, 5)[5] for line in maps if "/memfd:" in line or "/ram-" in line),
        "children": sorted(" ".join(children).split()),
    }
