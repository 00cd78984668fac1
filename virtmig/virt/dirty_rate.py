"""How fast a running guest writes to its memory, as QEMU samples it (calc-dirty-rate; libvirt 7.2 and later)."""

from __future__ import annotations

import time
from typing import Any

import libvirt

from virtmig.errors import VirtError
from virtmig.virt.connection import translated
from virtmig.virt.hosts import NoAnswerError, answer_within

#: virDomainDirtyRateCalc takes whole seconds, 1 to 60
MEASURE_S = 1
_ANSWER_S = 5.0
_MIB = 1 << 20


def dirty_rate(connection: Any, domain: Any, *, seconds: int = MEASURE_S) -> float | None:
    """Bytes per second, sampled for `seconds` (the guest runs on); None where libvirt or QEMU cannot tell."""
    try:
        with translated():
            answer_within(_ANSWER_S, lambda: domain.startDirtyRateCalc(seconds, 0), "virtmig-dirty")
            deadline = time.monotonic() + seconds + _ANSWER_S
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
