"""Bytes, rates and times as a person reads them. Plain text in, nothing else: no locale, no colour."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_text(size_bytes: float) -> str:
    """Three significant digits and an IEC unit: `5.70 GiB`, `41.2 MiB`, `412 KiB`, `17 B`."""
    value, unit = float(max(size_bytes, 0)), 0
    while value >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def rate_text(bytes_per_s: float) -> str:
    return f"{size_text(bytes_per_s)}/s"


def duration_text(duration_s: float) -> str:
    """`0.4 s`, `9 s`, `1 min 20 s`, `2 h 3 min`; the small unit is left out where nobody could use it."""
    if duration_s < 9.95:
        return f"{max(duration_s, 0.0):.1f} s".replace(".0 s", " s")
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def clock_text(duration_s: float) -> str:
    """`0:00:21`: a width that does not jump while it counts."""
    minutes, seconds = divmod(int(max(duration_s, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
