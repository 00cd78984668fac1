"""estimate(...) -> Estimate: how a migration will go, before it begins. Pure; the same model as forecast.py.

The guest's memory V goes at B bytes per second while the guest writes D; r = D/B. QEMU samples D on a few pages of each
GiB: in the lab half to 1.2 of the true rate came out. So the logarithm of r is taken as spread normally around the one
measured; the range is what four of five such r give, and the chance to converge is that of r < 1.

    first pass     V / B, whatever the guest writes
    more passes    as precopy_bytes of forecast.py, from V * min(r, 1) on
"""

from __future__ import annotations

import math

import msgspec

from virtmig.forecast import TOO_NEAR_TO_ONE, passes_to_go, precopy_bytes
from virtmig.progress import DEFAULT_DOWNTIME_MS
from virtmig.quantities import duration_text, rate_text, size_text

#: how far the rates that were measured are from those that will be: one standard deviation of ln(r)
SPREAD = 0.35
_LOW, _HIGH = math.exp(-1.28 * SPREAD), math.exp(1.28 * SPREAD)
#: libvirt's and QEMU's own part: preparing, devices, the reply
_AROUND_S = 0.6
#: QEMU's and libvirt's own part of the guest's stop: devices, and the reply
STOP_MS = 30.0


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """`high_s` None: it may never end by itself. `chance`: that precopy alone ends, 0 to 1."""

    memory_bytes: int
    dirty_bytes_per_s: float
    rate_bytes_per_s: float
    rate_evidence: str
    low_s: float
    high_s: float | None = None
    downtime_ms: float
    chance: float
    sentence: str
    advice: str = ""


def estimate(
    *,
    memory_bytes: int,
    dirty_bytes_per_s: float,
    rate_bytes_per_s: float,
    rate_evidence: str = "",
    downtime_limit_ms: int = DEFAULT_DOWNTIME_MS,
    postcopy: bool = False,
) -> Estimate:
    """Raises ValueError for no memory or no rate."""
    if memory_bytes <= 0 or rate_bytes_per_s <= 0:
        raise ValueError("an estimate needs memory and a rate")
    ratio = max(0.0, dirty_bytes_per_s) / rate_bytes_per_s
    chance = _chance(ratio)
    one_pass_s = memory_bytes / rate_bytes_per_s
    high_s: float | None = None
    if postcopy:
        low_s, latest_s = one_pass_s, one_pass_s * (1 + min(1.0, ratio * _HIGH)) + _AROUND_S
        high_s = latest_s
        sentence = f"{duration_text(low_s)} to {duration_text(latest_s)}; postcopy is sure to end it"
        downtime_ms, chance = STOP_MS, 1.0
    else:
        low_s, downtime_ms = _precopy(memory_bytes, rate_bytes_per_s, ratio * _LOW, downtime_limit_ms) or (
            one_pass_s,
            float(downtime_limit_ms),
        )
        worst = _precopy(memory_bytes, rate_bytes_per_s, ratio * _HIGH, downtime_limit_ms)
        high_s = worst[0] + _AROUND_S if worst is not None else None
        if worst is not None:
            downtime_ms = max(downtime_ms, worst[1])
        end = duration_text(high_s) if high_s is not None else "without an end"
        sentence = f"{duration_text(low_s)} to {end}, the guest away for about {downtime_ms:.0f} ms"
        sentence += f"; precopy ends by itself with a chance of {chance:.0%}"
    return Estimate(
        memory_bytes=memory_bytes,
        dirty_bytes_per_s=dirty_bytes_per_s,
        rate_bytes_per_s=rate_bytes_per_s,
        rate_evidence=rate_evidence,
        low_s=low_s,
        high_s=high_s,
        downtime_ms=downtime_ms,
        chance=chance,
        sentence=f"{size_text(memory_bytes)} at {rate_text(rate_bytes_per_s)}"
        + (f" ({rate_evidence})" if rate_evidence else "")
        + f", the guest writes {rate_text(dirty_bytes_per_s)}: {sentence}",
        advice="" if chance >= 0.9 or postcopy else _advice(dirty_bytes_per_s, rate_bytes_per_s, downtime_limit_ms),
    )


def _precopy(memory_bytes: float, rate: float, ratio: float, limit_ms: int) -> tuple[float, float] | None:
    """(seconds, ms of downtime); None when what is left never fits into the limit."""
    fits = rate * limit_ms / 1000
    left = memory_bytes * min(1.0, ratio)
    if ratio >= TOO_NEAR_TO_ONE and left > fits:
        return None
    passes = passes_to_go(left, ratio, fits)
    if passes is None:
        return None
    sent = memory_bytes + (precopy_bytes(left, ratio, passes) if passes else 0.0)
    rest = left * ratio**passes if passes else left
    return sent / rate + rest / rate, rest / rate * 1000 + STOP_MS


def _chance(ratio: float) -> float:
    """That the true ratio is below 1."""
    if ratio <= 0:
        return 1.0
    return 0.5 * (1 + math.erf(-math.log(ratio) / (SPREAD * math.sqrt(2))))


def _advice(dirty: float, rate: float, limit_ms: int) -> str:
    needed_ms = dirty / rate * 1000
    return (
        f"--postcopy; or more than {rate_text(dirty * 1.25)} of bandwidth; or --max-downtime well above {limit_ms} ms "
        f"(what the guest writes in a second takes {needed_ms:.0f} ms to send)"
    )
