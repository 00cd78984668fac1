"""forecast(history, policy) -> Forecast: when it will be over, as a range, or that it will not be. Pure.

With V bytes of guest memory to send in this pass, B bytes sent and D bytes written by the guest per second, r = D/B,
and L the downtime limit, precopy is over when what a pass leaves behind fits into B*L:

    passes       n = ceil(ln(B*L/V) / ln(r))               for r < 1
    bytes        V * (1 - r^n) / (1 - r)
    time         bytes / B, then a downtime of V * r^n / B
    r >= 1       never, unless V <= B*L: the limit, the rate or the guest has to change, or postcopy ends it
    postcopy     (pages not yet sent) / B, whatever the guest writes

r is taken from the rates and from what remained at the last pass boundaries; the two differ for guests that rewrite a
hot set, and the range is as wide as they differ. Bytes are guest memory (zero and compressed pages at full size), not
what went over the wire.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from virtmig.progress import DEFAULT_DOWNTIME_MS, PassBoundary, Phase, Progress
from virtmig.quantities import duration_text, rate_text, size_text

#: neither rate is known better than this
UNCERTAINTY = 0.1
#: the rate is read from this much of the recent past
WINDOW_S = 3.0
#: a ratio this near to 1 ends after so many passes that nothing can be said
TOO_NEAR_TO_ONE = 0.97
#: the longest maxdowntime that libvirt passes on to QEMU (MAX_MIGRATE_DOWNTIME, 2000 s)
MAX_DOWNTIME_MS = 2_000_000


class Seen(Protocol):
    """What a forecast needs of the history of a migration."""

    @property
    def samples(self) -> Sequence[Progress]: ...
    @property
    def boundaries(self) -> Sequence[PassBoundary]: ...
    @property
    def guest_suspended(self) -> bool: ...


class Allowed(Protocol):
    """What a forecast needs of the policy."""

    @property
    def postcopy_allowed(self) -> bool: ...


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """`eta_*_s` count from the last sample to the end of the migration; a missing high end means "nobody can say".

    `converging` is None while it is not known, False when it will not end by itself. `downtime_ms` is what the
    guest's stop would last if it came when the next pass begins: QEMU's own number where it gives one.
    """

    converging: bool | None
    sentence: str
    eta_low_s: float | None = None
    eta_high_s: float | None = None
    downtime_ms: int | None = None
    downtime_limit_ms: int | None = None
    passes_to_go: int | None = None


def passes_to_go(remaining_bytes: float, ratio: float, fits_bytes: float) -> int | None:
    """Passes until what remains fits; at least the one that is under way, None when it never fits."""
    if remaining_bytes <= fits_bytes:
        return 0
    if ratio >= 1 or fits_bytes <= 0:
        return None
    if ratio <= 0:
        return 1
    return max(1, math.ceil(math.log(fits_bytes / remaining_bytes) / math.log(ratio) - 1e-9))


def precopy_bytes(remaining_bytes: float, ratio: float, passes: int) -> float:
    """Guest memory that `passes` passes send, when the first of them has `remaining_bytes` to send."""
    if ratio == 1:
        return remaining_bytes * passes
    return remaining_bytes * (1 - ratio**passes) / (1 - ratio)


def forecast(history: Seen, policy: Allowed) -> Forecast:
    """The forecast at the last sample of the history."""
    if not history.samples:
        return Forecast(converging=None, sentence="nothing is known yet")
    progress = history.samples[-1]
    limit_ms = progress.downtime_limit_ms or DEFAULT_DOWNTIME_MS
    match progress.phase:
        case Phase.PREPARING:
            return Forecast(converging=None, sentence="the destination is being prepared", downtime_limit_ms=limit_ms)
        case Phase.STORAGE:
            return _storage(progress, limit_ms)
        case Phase.PRECOPY:
            return _precopy(history, policy, progress, limit_ms)
        case Phase.SWITCHOVER:
            return Forecast(
                converging=True,
                sentence="the guest is stopped, the last bytes move",
                eta_low_s=0.0,
                eta_high_s=limit_ms / 1000,
                downtime_ms=progress.expected_downtime_ms,
                downtime_limit_ms=limit_ms,
            )
        case Phase.POSTCOPY:
            return _postcopy(history, progress, limit_ms)
        case Phase.POSTCOPY_PAUSED:
            return Forecast(converging=False, sentence="postcopy is interrupted: it goes on only after a recovery")
        case _:
            return Forecast(converging=None, sentence=f"the migration is {progress.phase.value}")


def _storage(progress: Progress, limit_ms: int) -> Forecast:
    remaining, rate = progress.disk_remaining_bytes, progress.disk_bytes_per_s
    if remaining is None or not rate:
        return Forecast(converging=None, sentence="disks are being copied", downtime_limit_ms=limit_ms)
    low_s = remaining / rate
    return Forecast(
        converging=None,
        sentence=f"disks take {duration_text(low_s)} more at {rate_text(rate)}, then memory",
        eta_low_s=low_s,
        downtime_limit_ms=limit_ms,
    )


def _postcopy(history: Seen, progress: Progress, limit_ms: int) -> Forecast:
    remaining, rates = _remaining(progress), _rates(history.samples, first_pass=False)
    if remaining is None or not rates:
        return Forecast(converging=True, sentence="the guest runs on the destination; its memory follows")
    low_s, high_s = _range(remaining / max(rates), remaining / min(rates))
    return Forecast(
        converging=True,
        sentence=f"{size_text(remaining)} follow the guest at {rate_text(min(rates))}",
        eta_low_s=low_s,
        eta_high_s=high_s,
        downtime_limit_ms=limit_ms,
    )


def _precopy(history: Seen, policy: Allowed, progress: Progress, limit_ms: int) -> Forecast:
    boundaries = list(history.boundaries)
    remaining, rates = _remaining(progress), _rates(history.samples, first_pass=len(boundaries) < 2)
    last_pass = _pass_rate(boundaries)
    if last_pass is not None:
        rates.append(last_pass)
    if remaining is None or not rates:
        return Forecast(
            converging=None,
            sentence="no transfer rate is known yet",
            downtime_ms=progress.expected_downtime_ms,
            downtime_limit_ms=limit_ms,
        )
    slow, fast = min(rates), max(rates)
    if history.guest_suspended:
        low_s, high_s = _range(remaining / fast, remaining / slow)
        return Forecast(
            converging=True,
            sentence=f"the guest is suspended and writes nothing, {size_text(remaining)} are left",
            eta_low_s=low_s,
            eta_high_s=high_s,
            downtime_limit_ms=limit_ms,
            passes_to_go=1,
        )
    begin_bytes = boundaries[-1].remaining_bytes if len(boundaries) > 1 else None
    downtime_ms = progress.expected_downtime_ms
    if downtime_ms is None and begin_bytes is not None:
        downtime_ms = round(1000 * begin_bytes / slow)
    ratios = _ratios(progress, boundaries, slow)
    # the first pass says nothing about a guest that writes the same pages again and again, however fast it does
    if not ratios or (begin_bytes is None and max(ratios) >= TOO_NEAR_TO_ONE):
        low_s = remaining / fast
        text = "what the guest writes is known after the first pass"
        if ratios and progress.dirty_bytes_per_s:
            text = f"the guest writes {rate_text(progress.dirty_bytes_per_s)}: the next passes will tell"
        return Forecast(
            converging=None,
            sentence=f"at least {duration_text(low_s)}; {text}",
            eta_low_s=low_s,
            downtime_ms=downtime_ms,
            downtime_limit_ms=limit_ms,
        )
    # this pass began with `whole` bytes and the guest goes on writing until it ends: the next begins with r * whole
    whole = begin_bytes if begin_bytes is not None else progress.memory_total_bytes or remaining
    whole = max(whole, remaining)
    quick = _time_to_go(remaining, whole, fast, min(ratios) * (1 - UNCERTAINTY), limit_ms)
    if begin_bytes is None:
        quick = remaining / fast  # in the first pass much of what is written was still to be sent anyway
    lengthy = _time_to_go(remaining, whole, slow, min(max(ratios) * (1 + UNCERTAINTY), 1.0), limit_ms)
    passes = passes_to_go(whole, sum(ratios) / len(ratios), slow * limit_ms / 1000)
    if min(ratios) >= TOO_NEAR_TO_ONE and whole > fast * limit_ms / 1000:
        return Forecast(
            converging=False,
            sentence=_never(progress, policy, boundaries, slow, limit_ms),
            downtime_ms=downtime_ms,
            downtime_limit_ms=limit_ms,
        )
    if quick is None or max(ratios) >= TOO_NEAR_TO_ONE or lengthy is None:
        text = "it is not certain that memory converges"
        if quick is not None:
            text += f"; at least {duration_text(quick)}"
        return Forecast(
            converging=None,
            sentence=text,
            eta_low_s=quick,
            downtime_ms=downtime_ms,
            downtime_limit_ms=limit_ms,
            passes_to_go=passes,
        )
    low_s, high_s = _range(quick, lengthy)
    number = len(boundaries)
    text = f"converges: {duration_text(low_s)} to {duration_text(high_s)} more"
    if passes is not None:
        text += f", pass {number} of about {number + max(passes - 1, 0)}"
    return Forecast(
        converging=True,
        sentence=text,
        eta_low_s=low_s,
        eta_high_s=high_s,
        downtime_ms=downtime_ms,
        downtime_limit_ms=limit_ms,
        passes_to_go=passes,
    )


def _time_to_go(remaining: float, whole: float, rate: float, ratio: float, limit_ms: int) -> float | None:
    """Seconds for the rest of this pass, the passes after it, and the stop at the end; None when it never ends."""
    fits = rate * limit_ms / 1000
    left = ratio * whole
    passes = passes_to_go(left, ratio, fits)
    if passes is None:
        return None
    return (remaining + precopy_bytes(left, ratio, passes) + left * ratio**passes) / rate


def _never(progress: Progress, policy: Allowed, boundaries: Sequence[PassBoundary], rate: float, limit_ms: int) -> str:
    """What is the matter, in rates, and what would help."""
    dirty = progress.dirty_bytes_per_s
    text = "not converging: "
    text += f"the guest writes {rate_text(dirty)}, {rate_text(rate)} are sent" if dirty else "every pass leaves as much"
    needed_ms = needed_downtime_ms(boundaries, rate)
    helps = []
    if needed_ms is not None and limit_ms < needed_ms <= MAX_DOWNTIME_MS:
        helps.append(f"a downtime limit of {duration_text(needed_ms / 1000)} (now {duration_text(limit_ms / 1000)})")
    helps.append("switching to postcopy" if policy.postcopy_allowed else "--postcopy")
    return f"{text}; what helps: {', or '.join(helps)}"


def needed_downtime_ms(boundaries: Sequence[PassBoundary], rate_bytes_per_s: float) -> int | None:
    """The limit at which each of the last passes would have been the last one; None before the first is over."""
    recent = list(boundaries)[1:][-3:]
    if not recent or rate_bytes_per_s <= 0:
        return None
    exact_ms = 1000 * max(boundary.remaining_bytes for boundary in recent) / rate_bytes_per_s * (1 + UNCERTAINTY)
    step_ms = 10 if exact_ms < 1000 else 100
    return math.ceil(exact_ms / step_ms) * step_ms


def _range(low_s: float, high_s: float) -> tuple[float, float]:
    return low_s * (1 - UNCERTAINTY), high_s * (1 + UNCERTAINTY)


def _remaining(progress: Progress) -> int | None:
    if progress.memory_remaining_bytes is not None:
        return progress.memory_remaining_bytes
    return progress.remaining_bytes


def _ratios(progress: Progress, boundaries: Sequence[PassBoundary], rate_bytes_per_s: float) -> list[float]:
    """r as the rates have it, and as the last boundaries have it; empty before either is known.

    A dirty rate of zero before the first pass is over is "not measured yet", not "writes nothing".
    """
    found = []
    dirty = progress.dirty_bytes_per_s
    if dirty or (dirty is not None and len(boundaries) > 1):
        found.append(dirty / rate_bytes_per_s)
    # all of memory goes over in the first pass, whatever was written: its ratio says less than those that follow
    remained = [boundary.remaining_bytes for boundary in list(boundaries)[1 if len(boundaries) > 2 else 0 :]]
    # up to three passes against the three before: one pass may come out too small or too large, as samples fall
    count = min(3, len(remained) // 2)
    if count:
        early, late = sum(remained[-2 * count : -count]), sum(remained[-count:])
        if early > 0:
            found.append((late / early) ** (1 / count))
    return found


def _pass_rate(boundaries: Sequence[PassBoundary]) -> float | None:
    """Guest memory gone over per second in the last full pass."""
    if len(boundaries) < 2:
        return None
    begin, end = list(boundaries)[-2:]
    duration_s, sent = end.elapsed_s - begin.elapsed_s, end.sent_bytes - begin.sent_bytes
    return sent / duration_s if duration_s > 0 and sent > 0 else None


def _rates(samples: Sequence[Progress], *, first_pass: bool) -> list[float]:
    """Rates of the recent past: pages counted over the last seconds, else what QEMU says went over the wire.

    Both in the first pass, where empty pages go fast and full ones slowly and nobody knows which come next.
    """
    last = samples[-1]
    recent = [s for s in list(samples)[-64:] if last.elapsed_s - s.elapsed_s <= WINDOW_S and s.normal_pages is not None]
    rates = []
    if len(recent) > 1 and last.normal_pages is not None and last.page_size_bytes:
        first = recent[0]
        pages = last.normal_pages - (first.normal_pages or 0) + (last.constant_pages or 0) - (first.constant_pages or 0)
        duration_s = last.elapsed_s - first.elapsed_s
        if pages > 0 and duration_s > 0:
            rates.append(pages * last.page_size_bytes / duration_s)
    wire_counts = first_pass if rates else not first_pass or last.normal_pages is None
    if last.memory_bytes_per_s and wire_counts:
        rates.append(float(last.memory_bytes_per_s))
    return rates
