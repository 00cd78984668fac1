"""estimate(...) -> Estimate: how a migration will go, before it begins. Pure; the same model as forecast.py.

The guest's memory V goes at B bytes per second while the guest writes D; r = D/B. QEMU samples D on a few pages of
each GiB: k of them were seen written, each of which stands for many. So the logarithm of r is taken as spread normally
around the one measured, with a deviation of what the lab showed of well-sampled guests (half to 1.2 of the true rate)
and of what counting k things leaves open; the range is what four of five such r give, and the chance to converge is
that of r < 1. Where none was seen written, the rate that would have shown none in half of all samplings stands in.

    first pass     V / B, whatever the guest writes
    more passes    as precopy_bytes of forecast.py, from V * min(r, 1) on
"""

from __future__ import annotations

import math

import msgspec

from virtmig.forecast import TOO_NEAR_TO_ONE, passes_to_go, precopy_bytes
from virtmig.progress import DEFAULT_DOWNTIME_MS
from virtmig.quantities import duration_text, rate_text, size_text

#: how far the rates that were measured are from those that will be: one standard deviation of ln(r), if many were seen
SPREAD = 0.35
#: so many standard deviations to both sides hold four of five
_FOUR_OF_FIVE = 1.28
#: seen in half of all samplings: none
_NONE_SEEN = math.log(2)
#: libvirt's and QEMU's own part: preparing, devices, the reply
_AROUND_S = 0.6
#: QEMU's and libvirt's own part of the guest's stop: devices, and the reply
STOP_MS = 30.0
#: fewer pages than this seen written, and it is said
FEW_SEEN = 10


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """`high_s` None: it may never end by itself. `chance`: that precopy alone ends, 0 to 1."""

    memory_bytes: int
    dirty_bytes_per_s: float
    dirty_step_bytes_per_s: float = 0.0  # what one page that was seen written stands for; 0: the rate is exact
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
    dirty_step_bytes_per_s: float = 0.0,
    rate_evidence: str = "",
    downtime_limit_ms: int = DEFAULT_DOWNTIME_MS,
    postcopy: bool = False,
) -> Estimate:
    """Raises ValueError for no memory or no rate."""
    if memory_bytes <= 0 or rate_bytes_per_s <= 0:
        raise ValueError("an estimate needs memory and a rate")
    dirty, spread = _likely(max(0.0, dirty_bytes_per_s), dirty_step_bytes_per_s)
    least, most = (dirty / rate_bytes_per_s * math.exp(side * _FOUR_OF_FIVE * spread) for side in (-1, 1))
    chance = _chance(dirty / rate_bytes_per_s, spread)
    one_pass_s = memory_bytes / rate_bytes_per_s
    high_s: float | None = None
    if postcopy:
        low_s, latest_s = one_pass_s, one_pass_s * (1 + min(1.0, most)) + _AROUND_S
        high_s = latest_s
        sentence = f"{duration_text(low_s)} to {duration_text(latest_s)}; postcopy is sure to end it"
        downtime_ms, chance = STOP_MS, 1.0
    else:
        low_s, downtime_ms = _precopy(memory_bytes, rate_bytes_per_s, least, downtime_limit_ms) or (
            one_pass_s,
            float(downtime_limit_ms),
        )
        worst = _precopy(memory_bytes, rate_bytes_per_s, most, downtime_limit_ms)
        high_s = worst[0] + _AROUND_S if worst is not None else None
        if worst is not None:
            downtime_ms = max(downtime_ms, worst[1])
        end = duration_text(high_s) if high_s is not None else "without an end"
        sentence = f"{duration_text(low_s)} to {end}, the guest away for about {downtime_ms:.0f} ms"
        sentence += f"; precopy ends by itself with a chance of {chance_text(chance)}"
    return Estimate(
        memory_bytes=memory_bytes,
        dirty_bytes_per_s=dirty_bytes_per_s,
        dirty_step_bytes_per_s=dirty_step_bytes_per_s,
        rate_bytes_per_s=rate_bytes_per_s,
        rate_evidence=rate_evidence,
        low_s=low_s,
        high_s=high_s,
        downtime_ms=downtime_ms,
        chance=chance,
        sentence=f"{size_text(memory_bytes)} at {rate_text(rate_bytes_per_s)}"
        + (f" ({rate_evidence})" if rate_evidence else "")
        + f", {written_text(dirty_bytes_per_s, dirty_step_bytes_per_s)}: {sentence}",
        advice="" if chance >= 0.9 or postcopy else _advice(dirty, rate_bytes_per_s, downtime_limit_ms),
    )


def written_text(dirty_bytes_per_s: float, step_bytes_per_s: float) -> str:
    """What was measured of the guest's writing, and how sure that is."""
    seen = round(dirty_bytes_per_s / step_bytes_per_s) if step_bytes_per_s else None
    if seen == 0:
        return f"the guest writes little (none of the sampled pages; one stands for {rate_text(step_bytes_per_s)})"
    pages = f" ({seen} of the sampled pages)" if seen is not None and seen < FEW_SEEN else ""
    return f"the guest writes about {rate_text(dirty_bytes_per_s)}{pages}"


def chance_text(chance: float) -> str:
    """Nothing that was sampled is certain."""
    if chance >= 0.99:
        return "99 % or more"
    return "1 % or less" if chance <= 0.01 else f"{chance:.0%}"


def _likely(dirty: float, step: float) -> tuple[float, float]:
    """The middle of what D may be, and the standard deviation of its logarithm."""
    if not step:
        return dirty, SPREAD
    seen = dirty / step
    return max(seen, _NONE_SEEN) * step, math.sqrt(SPREAD**2 + 1 / (seen + 0.5))


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


def _chance(ratio: float, spread: float) -> float:
    """That the true ratio is below 1."""
    if ratio <= 0:
        return 1.0
    return 0.5 * (1 + math.erf(-math.log(ratio) / (spread * math.sqrt(2))))


def _advice(dirty: float, rate: float, limit_ms: int) -> str:
    needed_ms = dirty / rate * 1000
    return (
        f"--postcopy; or more than {rate_text(dirty * 1.25)} of bandwidth; or --max-downtime well above {limit_ms} ms "
        f"(what the guest writes in a second takes {needed_ms:.0f} ms to send)"
    )
