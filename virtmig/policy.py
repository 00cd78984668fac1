"""decide(policy, history, progress, now) -> Decision: what to do about a running migration, and why. Pure.

Rules, the first that applies wins; each terminal action (postcopy, suspend, abort) ends the deciding:

    --timeout N                      N seconds after data began to move (libvirt's total is above zero: virsh's rule):
                                     suspend, or --timeout-postcopy, or --timeout-abort
    --postcopy-after-precopy, -passes N   after one (N) full passes over memory, counted by PassCounter, not by QEMU
    --on-stall                       memory does not converge: see `stall()`; auto is postcopy if --postcopy was given,
                                     else the downtime ceiling if one was given, else go on and say so.
                                     A ceiling given beside a named action is climbed first.

Nothing is done before data moves, at the switchover, and once postcopy runs: an abort would then lose the guest.
Nothing is tried twice, also not when it failed. A storage copy has no convergence test: memory has not started.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

import msgspec

from virtmig.progress import DEFAULT_DOWNTIME_MS, PassBoundary, PassCounter, Phase, Progress
from virtmig.quantities import duration_text, rate_text, size_text
from virtmig.request import MigrationRequest

#: steps from the first limit to the ceiling, as Nova's live_migration_downtime_steps
DOWNTIME_STEPS = 10
#: remaining must fall by more than this share over the stall passes to count as falling at all
FALLING = 0.02
#: a guest that rewrites a hot set is measured at just about the transfer rate, also a little below it
KEEPS_UP = 0.9


class Action(enum.StrEnum):
    CONTINUE = "continue"
    SET_DOWNTIME = "set-downtime"
    START_POSTCOPY = "start-postcopy"
    SUSPEND = "suspend"
    ABORT = "abort"


TERMINAL = frozenset({Action.START_POSTCOPY, Action.SUSPEND, Action.ABORT})


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """`value` is the new limit in ms for SET_DOWNTIME. `notable`: a person should hear of it (each thing once)."""

    action: Action
    reason: str
    value: int | None = None
    notable: bool = True


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the person allowed and asked for. The default never acts."""

    timeout_s: int | None = None
    timeout_action: Action = Action.SUSPEND
    postcopy_allowed: bool = False
    postcopy_after_passes: int | None = None
    on_stall: str = "auto"  # auto, continue, postcopy, suspend, abort
    stall_passes: int = 3
    max_downtime_ms: int | None = None
    max_downtime_ceiling_ms: int | None = None

    @classmethod
    def from_request(cls, request: MigrationRequest) -> Policy:
        timeout_action = Action.SUSPEND
        if "timeout-postcopy" in request:
            timeout_action = Action.START_POSTCOPY
        elif "timeout-abort" in request:
            timeout_action = Action.ABORT
        passes = request.number("postcopy-after-passes")
        if passes is None and "postcopy-after-precopy" in request:
            passes = 1
        return cls(
            timeout_s=request.number("timeout") or None,  # virsh: 0 means no timeout
            timeout_action=timeout_action,
            postcopy_allowed="postcopy" in request,
            postcopy_after_passes=passes,
            on_stall=request.text("on-stall"),
            stall_passes=request.number("stall-passes") or cls.stall_passes,
            max_downtime_ms=request.number("max-downtime"),
            max_downtime_ceiling_ms=request.number("max-downtime-ceiling"),
        )


class History:
    """What was seen and done so far: recent samples, every pass boundary, decisions. One owner, one migration.

    Call `add` once for each sample, after `decide`. All `now` values must come from one monotonic clock.
    """

    SAMPLES_KEPT = 600

    def __init__(self) -> None:
        self.samples: deque[Progress] = deque(maxlen=self.SAMPLES_KEPT)
        self.moving_since: float | None = None  # when total_bytes was first above zero: virsh's timeout starts here
        self.tried: list[Decision] = []  # notable decisions, also those that failed
        self.postcopy_started = False
        self._counter = PassCounter()
        self.downtime_limit_ms: int | None = None  # set last, by a decision or by others
        self._passes_at_step: int | None = None
        self._failed: list[Decision] = []

    @property
    def boundaries(self) -> Sequence[PassBoundary]:
        return self._counter.boundaries

    @property
    def full_passes(self) -> int:
        return self._counter.full_passes

    @property
    def taken(self) -> list[Decision]:
        return [decision for decision in self.tried if decision not in self._failed]

    @property
    def guest_suspended(self) -> bool:
        return any(decision.action is Action.SUSPEND for decision in self.taken)

    def add(self, progress: Progress, decision: Decision, now: float) -> None:
        """Keep one sample and what was decided on it; a decision is held to succeed until `failed` is called."""
        if self.changed_limit_ms(progress) is not None:
            self.downtime_limit_ms = progress.downtime_limit_ms
        self.samples.append(progress)
        self._counter.update(progress)
        if self.moving_since is None and progress.total_bytes:
            self.moving_since = now
        if progress.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
            self.postcopy_started = True
        if decision.notable:
            self.tried.append(decision)
        if decision.action is Action.SET_DOWNTIME:
            self.downtime_limit_ms = decision.value
            self._passes_at_step = self.full_passes
        if decision.action is Action.START_POSTCOPY:
            self.postcopy_started = True

    def failed(self, decision: Decision) -> None:
        """The hypervisor refused it: it is not tried again, and other actions stay possible."""
        self._failed.append(decision)
        if decision.action is Action.SET_DOWNTIME:
            self.downtime_limit_ms = None
        if decision.action is Action.START_POSTCOPY:
            self.postcopy_started = any(s.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED) for s in self.samples)

    def was_tried(self, action: Action) -> bool:
        return any(decision.action is action for decision in self.tried)

    def was_refused(self, action: Action) -> bool:
        return any(decision.action is action for decision in self._failed)

    @property
    def over(self) -> bool:
        """Whether a terminal action was taken: nothing is left to decide."""
        return self.postcopy_started or any(decision.action in TERMINAL for decision in self.taken)

    def changed_limit_ms(self, progress: Progress) -> int | None:
        """The downtime limit of a sample that is not added yet, where it is another one than in the sample before."""
        before = self.samples[-1].downtime_limit_ms if self.samples else None
        return progress.downtime_limit_ms if before is not None and progress.downtime_limit_ms != before else None

    @property
    def passes_since_step(self) -> int | None:
        return None if self._passes_at_step is None else self.full_passes - self._passes_at_step


def decide(policy: Policy, history: History, progress: Progress, now: float) -> Decision:
    """What to do on this sample, before it is added to the history. `now` in seconds on the history's clock."""
    if history.over or progress.phase not in (Phase.STORAGE, Phase.PRECOPY) or not progress.total_bytes:
        return _continue(progress)
    return (
        _timeout(policy, history, progress, now)
        or _postcopy_after_passes(policy, history, progress)
        or _on_stall(policy, history, progress)
        or _continue(progress)
    )


def _continue(progress: Progress) -> Decision:
    text = f"{progress.phase.value}, {duration_text(progress.elapsed_s)} since the start"
    if progress.total_bytes and progress.remaining_bytes is not None:
        text += f", {size_text(progress.remaining_bytes)} of {size_text(progress.total_bytes)} remain"
    return Decision(action=Action.CONTINUE, reason=text, notable=False)


def _timeout(policy: Policy, history: History, progress: Progress, now: float) -> Decision | None:
    action = policy.timeout_action
    since = history.moving_since
    if policy.timeout_s is None or since is None or now - since < policy.timeout_s or history.was_tried(action):
        return None
    if action is Action.START_POSTCOPY and not (policy.postcopy_allowed and progress.phase is Phase.PRECOPY):
        return None  # QEMU takes the switch only while memory moves; asked again on the next sample
    then = {
        Action.SUSPEND: "the guest is suspended until it has moved",
        Action.START_POSTCOPY: "switching to postcopy",
        Action.ABORT: "aborting, the guest stays on the source",
    }[action]
    reason = (
        f"--timeout {policy.timeout_s} is over: data has moved for {duration_text(now - since)} and "
        f"{size_text(progress.remaining_bytes or 0)} remain; {then}"
    )
    return Decision(action=action, reason=reason)


def _postcopy_after_passes(policy: Policy, history: History, progress: Progress) -> Decision | None:
    wanted = policy.postcopy_after_passes
    if wanted is None or not policy.postcopy_allowed or history.was_tried(Action.START_POSTCOPY):
        return None
    done = max(progress.full_passes, history.full_passes)
    if progress.phase is not Phase.PRECOPY or done < wanted:
        return None
    reason = (
        f"{_passes(done)} over memory {'is' if done == 1 else 'are'} done and {_passes(wanted)} "
        f"{'was' if wanted == 1 else 'were'} asked for, {_memory_remaining(progress)} remain; switching to postcopy"
    )
    return Decision(action=Action.START_POSTCOPY, reason=reason)


def _on_stall(policy: Policy, history: History, progress: Progress) -> Decision | None:
    since_step = history.passes_since_step
    if since_step is not None and since_step < 1:
        return None  # the last step gets one pass to show what it does
    stalled = stall(history.boundaries, progress, policy.stall_passes)
    if stalled is None:
        return None
    wanted = policy.on_stall
    if wanted == "auto" and policy.postcopy_allowed and not history.was_tried(Action.START_POSTCOPY):
        wanted = "postcopy"
    elif policy.max_downtime_ceiling_ms is not None:
        step = _raise_downtime(policy, history, progress, policy.max_downtime_ceiling_ms, stalled)
        if step is not None:
            return step
    named = {
        "postcopy": (Action.START_POSTCOPY, "switching to postcopy"),
        "suspend": (Action.SUSPEND, "the guest is suspended until it has moved"),
        "abort": (Action.ABORT, "aborting, the guest stays on the source"),
    }
    if wanted in named:
        action, then = named[wanted]
        allowed = policy.postcopy_allowed or action is not Action.START_POSTCOPY
        if allowed and not history.was_tried(action):
            return Decision(action=action, reason=f"{stalled}; {then}")
    if history.was_tried(Action.CONTINUE):
        return None
    return Decision(action=Action.CONTINUE, reason=f"{stalled}; {_what_is_left(policy, history, progress)}")


def _raise_downtime(
    policy: Policy, history: History, progress: Progress, ceiling_ms: int, stalled: str
) -> Decision | None:
    """One geometric step from the limit in force towards the ceiling; None at the ceiling or after a refused step.

    Nova's downtime_steps() grows the limit in the same way, by time; here each step has a pass to show its effect.
    """
    current_ms = _limit_in_force(policy, history, progress)
    steps_taken = sum(decision.action is Action.SET_DOWNTIME for decision in history.tried)
    if current_ms >= ceiling_ms or steps_taken >= DOWNTIME_STEPS or history.was_refused(Action.SET_DOWNTIME):
        return None
    factor = (ceiling_ms / current_ms) ** (1 / (DOWNTIME_STEPS - steps_taken))
    value_ms = min(max(round(current_ms * factor), current_ms + 1), ceiling_ms)
    reason = f"{stalled}; the downtime limit goes from {current_ms} ms to {value_ms} ms (ceiling {ceiling_ms} ms)"
    return Decision(action=Action.SET_DOWNTIME, value=value_ms, reason=reason)


def _limit_in_force(policy: Policy, history: History, progress: Progress) -> int:
    """Of a decision, which a sample may not show yet, unless a sample shows a change since then."""
    set_ms = history.changed_limit_ms(progress) or history.downtime_limit_ms
    if set_ms is not None:
        return set_ms
    return progress.downtime_limit_ms or policy.max_downtime_ms or DEFAULT_DOWNTIME_MS


def _what_is_left(policy: Policy, history: History, progress: Progress) -> str:
    limit_ms = _limit_in_force(policy, history, progress)
    if policy.max_downtime_ceiling_ms is not None and limit_ms >= policy.max_downtime_ceiling_ms:
        return f"the downtime limit of {limit_ms} ms is at its ceiling; going on"
    return f"going on with a downtime limit of {limit_ms} ms, as nothing else was allowed"


def stall(boundaries: Sequence[PassBoundary], progress: Progress, stall_passes: int) -> str | None:
    """Why memory counts as not converging, as half a sentence with its numbers; None while it may converge.

    Only what remained when passes began is compared: within a pass memory remaining always falls and then jumps, which
    misled watchers that looked at every sample. Not converging means that over the last `stall_passes` passes it was
    never less than at their beginning, and that the guest now writes about as fast as is sent, or faster, where both
    rates are known: a guest that has just calmed down gets its chance. While auto-converge still takes more and more
    CPU time from the guest, its effect is waited for.
    """
    if progress.phase is not Phase.PRECOPY or len(boundaries) <= stall_passes:
        return None
    window = list(boundaries)[-stall_passes - 1 :]
    first, later = window[0], window[1:]
    lowest_bytes = min(boundary.remaining_bytes for boundary in later)
    if first.remaining_bytes <= 0 or lowest_bytes < (1 - FALLING) * first.remaining_bytes:
        return None
    throttle_before, throttle_now = first.throttle_percent or 0, progress.throttle_percent or 0
    if throttle_now > throttle_before:
        return None
    sent_bytes_per_s = _send_rate(window[-2], window[-1], progress)
    dirty_bytes_per_s = progress.dirty_bytes_per_s
    rates = ""
    if dirty_bytes_per_s and sent_bytes_per_s:
        if dirty_bytes_per_s < KEEPS_UP * sent_bytes_per_s:
            return None
        rates = f"; the guest writes {rate_text(dirty_bytes_per_s)}, {rate_text(sent_bytes_per_s)} are sent"
    return (
        f"memory does not converge: {size_text(first.remaining_bytes)} remained after pass {first.full_passes} and "
        f"never less than {size_text(lowest_bytes)} in the {_passes(stall_passes)} since{rates}"
    )


def _send_rate(begin: PassBoundary, end: PassBoundary, progress: Progress) -> float | None:
    """Guest memory gone over per second in the last pass, zero and compressed pages at their full size."""
    duration_s = end.elapsed_s - begin.elapsed_s
    if duration_s > 0 and end.sent_bytes > begin.sent_bytes:
        return (end.sent_bytes - begin.sent_bytes) / duration_s
    return progress.memory_bytes_per_s


def _memory_remaining(progress: Progress) -> str:
    remaining = progress.memory_remaining_bytes
    return size_text(remaining if remaining is not None else progress.remaining_bytes or 0)


def _passes(count: int) -> str:
    return f"{count} full pass" if count == 1 else f"{count} full passes"
