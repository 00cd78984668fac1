"""The text of `domjobinfo`, line for line as virsh prints it (virsh-domain.c, cmdDomjobinfo). Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: virDomainJobType and virDomainJobOperation -> virsh's words
JOB_TYPES = ("None", "Bounded", "Unbounded", "Completed", "Failed", "Cancelled")
OPERATIONS = (
    "Unknown",
    "Start",
    "Save",
    "Restore",
    "Incoming migration",
    "Outgoing migration",
    "Snapshot",
    "Snapshot revert",
    "Dump",
    "Backup",
    "Snapshot delete",
)
BOUNDED, UNBOUNDED, COMPLETED = 1, 2, 3


def capacity(value: int, suffix: str = "") -> str:
    """Bytes with three decimals and an IEC unit, as vshPrettyCapacity prints them."""
    number = float(value)
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    index = 0
    while number >= 1024 and index < len(units) - 1:
        number /= 1024
        index += 1
    return f"{number:.3f} {units[index]}{suffix}"


def _rate(value: int) -> str:
    return capacity(value, "/s")


def _plain(value: int) -> str:
    return f"{value:<12}"


def _wide(value: int) -> str:
    return f"{value:<13}"


def _ms(value: int) -> str:
    return f"{value:<12} ms"


def _pages_per_s(value: int) -> str:
    return f"{value:<12} pages/s"


Row = tuple[str, str, Callable[[int], str]]

#: (key of virDomainGetJobStats, virsh's label, format), in virsh's order
_MEMORY: tuple[Row, ...] = (
    ("memory_processed", "Memory processed:", capacity),
    ("memory_remaining", "Memory remaining:", capacity),
    ("memory_total", "Memory total:", capacity),
    ("memory_bps", "Memory bandwidth:", _rate),
    ("memory_dirty_rate", "Dirty rate:", _pages_per_s),
    ("memory_page_size", "Page size:", lambda value: f"{value:<12} bytes"),
    ("memory_iteration", "Iteration:", _plain),
    ("memory_postcopy_requests", "Postcopy requests:", _plain),
)
_DISK: tuple[Row, ...] = (
    ("disk_processed", "File processed:", capacity),
    ("disk_remaining", "File remaining:", capacity),
    ("disk_total", "File total:", capacity),
    ("disk_bps", "File bandwidth:", _rate),
)
_REST: tuple[Row, ...] = (
    ("memory_constant", "Constant pages:", _plain),
    ("memory_normal", "Normal pages:", _plain),
    ("memory_normal_bytes", "Normal data:", capacity),
    ("downtime", "", _ms),
    ("downtime_net", "Downtime w/o network:", _ms),
    ("setup_time", "Setup time:", _ms),
    ("compression_cache", "Compression cache:", capacity),
    ("compression_bytes", "Compressed data:", capacity),
    ("compression_pages", "Compressed pages:", _wide),
    ("compression_cache_misses", "Compression cache misses:", _wide),
    ("compression_overflow", "Compression overflows:", _wide),
    ("auto_converge_throttle", "Auto converge throttle:", _wide),
    ("disk_temp_used", "Temporary disk space use:", capacity),
    ("disk_temp_total", "Temporary disk space total:", capacity),
    ("vfio_data_transferred", "VFIO data transferred:", capacity),
)
_HIDDEN_WHEN_ZERO = frozenset({"memory_bps", "disk_bps"})


def lines(stats: Mapping[str, Any], *, completed: bool = False, any_stats: bool = False) -> list[str]:
    """virsh's lines for one job. `stats` is virDomainGetJobStats with its "type"."""
    kind = int(stats.get("type", 0))
    out = [_line("Job type:", f"{_word(JOB_TYPES, kind):<12}")]
    if kind == 0:
        return out
    out.append(_line("Operation:", f"{_word(OPERATIONS, int(stats.get('operation', 0))):<12}"))
    if not (kind in (BOUNDED, UNBOUNDED) or (completed and kind == COMPLETED) or any_stats):
        return out
    out.append(_line("Time elapsed:", _ms(int(stats.get("time_elapsed", 0)))))
    if "time_elapsed_net" in stats:
        out.append(_line("Time elapsed w/o network:", _ms(int(stats["time_elapsed_net"]))))
    if kind == BOUNDED:
        out.append(_line("Time remaining:", _ms(int(stats.get("time_remaining", 0)))))
    if any(stats.get(f"data_{part}") for part in ("total", "remaining", "processed")):
        for part in ("processed", "remaining", "total"):
            out.append(_line(f"Data {part}:", capacity(int(stats.get(f"data_{part}", 0)))))
    if any(stats.get(f"memory_{part}") for part in ("total", "remaining", "processed")):
        out += _rows(_MEMORY, stats)
    if any(stats.get(f"disk_{part}") for part in ("total", "remaining", "processed")):
        out += _rows(_DISK, stats)
    for key, label, text in _REST:
        if key == "downtime":
            label = "Total downtime:" if kind == COMPLETED else "Expected downtime:"
        out += _rows(((key, label, text),), stats)
    if any_stats and stats.get("errmsg"):
        out.append(_line("Error message:", str(stats["errmsg"])))
    return out


def raw_lines(stats: Mapping[str, Any]) -> list[str]:
    """`--rawstats`: libvirt's own keys and values, in its order, below the number of the job's type."""
    rows = [f"{key}: {int(value) if isinstance(value, bool) else value}" for key, value in stats.items()
            if key != "type"]  # fmt: skip
    return [f"Job type: {stats.get('type', 0)}", "", *rows]


def _rows(rows: tuple[Row, ...], stats: Mapping[str, Any]) -> list[str]:
    return [
        _line(label, text(int(stats[key])))
        for key, label, text in rows
        if key in stats and (stats[key] or key not in _HIDDEN_WHEN_ZERO)
    ]


def _line(label: str, value: str) -> str:
    return f"{label:<17} {value}"


def _word(words: tuple[str, ...], index: int) -> str:
    return words[index] if 0 <= index < len(words) else "Unknown"
