"""How fast a running guest writes to its memory, as QEMU samples it (calc-dirty-rate; libvirt 7.2 and later)."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import libvirt

from virtmig.errors import VirtError
from virtmig.virt.connection import translated
from virtmig.virt.hosts import NoAnswerError, answer_within

#: virDomainDirtyRateCalc takes whole seconds, 1 to 60
MEASURE_S = 1
_ANSWER_S = 5.0
_MIB = 1 << 20
_PAGE_STANDS_FOR = (1 << 30) / 512


class DirtyRate(NamedTuple):
    bytes_per_s: float
    step_bytes_per_s: float  # what one sampled page stands for


def dirty_rate(connection: Any, domain: Any, *, few: int = 10, most_s: int = 4) -> DirtyRate | None:
    """Sampled for a second, and for `most_s` at most while fewer than `few` of the sampled pages were written.

    QEMU watches 512 pages of each GiB (DIRTYRATE_DEFAULT_SAMPLE_PAGES), so one stands for 2 MiB. The guest runs on.
    None where libvirt or QEMU cannot tell.
    """
    seen: list[float] = []
    while len(seen) < most_s and sum(seen) < few * _PAGE_STANDS_FOR:
        sample = _sample(connection, domain)
        if sample is None:
            return None
        seen.append(sample)
    return DirtyRate(sum(seen) / len(seen), _PAGE_STANDS_FOR / len(seen))


def _sample(connection: Any, domain: Any) -> float | None:
    """Bytes written in MEASURE_S, each page counted once."""
    try:
        with translated():
            answer_within(_ANSWER_S, lambda: domain.startDirtyRateCalc(MEASURE_S, 0), "virtmig-dirty")
            deadline = time.monotonic() + MEASURE_S + _ANSWER_S
            while time.monotonic() < deadline:
                time.sleep(0.1)
                stats = answer_within(
                    _ANSWER_S,
                    lambda: connection.domainListGetStats([domain], libvirt.VIR_DOMAIN_STATS_DIRTYRATE),
                    "virtmig-dirty",
                )
                found = stats[0][1] if stats else {}
                if found.get("dirtyrate.calc_status") == libvirt.VIR_DOMAIN_DIRTYRATE_MEASURED:
                    return float(found.get("dirtyrate.megabytes_per_second", 0)) * _MIB
    except (VirtError, NoAnswerError, AttributeError):
        return None
    return None
