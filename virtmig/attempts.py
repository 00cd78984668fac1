"""Trying again what may pass by itself, and being asked to stop."""

from __future__ import annotations

import logging
import time
from typing import Any

from tenacity import Retrying, stop_after_attempt, wait_random_exponential

from virtmig.progress import Outcome, Status, Whereabouts
from virtmig.request import MigrationRequest

log = logging.getLogger("virtmig")

#: a second stop request within this time means: now
STOP_AGAIN_S = 2.0
#: libvirt's codes for trouble that may pass by itself: RPC, no connect, internal port clash, state lock
PASSING_CODES = frozenset({5, 38, 39, 68})


class StopRequest:
    """Requests to stop, from signals or another thread: when each arrived (time.monotonic()) and what it was."""

    def __init__(self) -> None:
        self.requests: list[tuple[float, str]] = []

    def ask(self, what: str) -> None:
        # only an append: this runs inside signal handlers, where taking a lock could wait for ourselves
        self.requests.append((time.monotonic(), what))

    @property
    def now(self) -> bool:
        """Whether the last two requests came close together: stop at once, wait for nothing."""
        return len(self.requests) > 1 and self.requests[-1][0] - self.requests[-2][0] <= STOP_AGAIN_S


def may_try_again(outcome: Outcome) -> bool:
    return (
        outcome.status is Status.FAILED
        and not outcome.started
        and outcome.guest is Whereabouts.SOURCE
        and (outcome.error_code in PASSING_CODES or "Unable to find an unused port" in outcome.error)
    )


def retrying(request: MigrationRequest, stop: StopRequest, retry: Any) -> Retrying:
    """tenacity's loop, for what is safe to repeat; a stop request ends it, the last result or error is kept."""
    return Retrying(
        retry=retry,
        stop=lambda state: bool(stop.requests) or stop_after_attempt(1 + (request.number("retries") or 0))(state),
        wait=wait_random_exponential(multiplier=0.4, max=3.0),
        before_sleep=lambda state: log.info("trying again: %s", state.outcome),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
