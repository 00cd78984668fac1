"""Every error as application/problem+json (RFC 9457): what, why, the ways out, and where the guest is.

409 is said of what is well formed and cannot be done now, hosts that do not answer included: nothing was started, and
`retryable` says whether the same request may succeed later.
"""

from __future__ import annotations

from typing import Any

import msgspec

from virtmig.errors import ConnectionFailed, DomainNotFound, MigrationError, PlanRefused, RequestError
from virtmig.integrations.api.jobs import KeyConflict, NotKept
from virtmig.integrations.api.migrations import NotNow, NotThere, Reason
from virtmig.progress import Whereabouts

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:virtmig:problem:"


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`type` is a URN that a program can tell apart; `reasons` are all of them, each with its way out."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    hint: str = ""
    guest: Whereabouts | None = None
    retryable: bool = False
    reasons: tuple[Reason, ...] = ()


class Failure(Exception):
    """Raised where a request ends; the application turns it into its response."""

    def __init__(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.headers = headers or {}


#: type -> (status, title)
KINDS: dict[str, tuple[int, str]] = {
    "malformed": (400, "The request is malformed"),
    "forbidden": (403, "The peer may not do this"),
    "not-found": (404, "There is no such thing"),
    "method": (405, "The method is not offered here"),
    "no-domain": (404, "There is no such domain at the source"),
    "request": (409, "What was asked for does not go together"),
    "refused": (409, "The plan was refused; nothing was started"),
    "connection": (409, "A libvirt daemon cannot be reached; nothing was started"),
    "state": (409, "The state of the migration does not allow it"),
    "key": (409, "The idempotency key belongs to another request"),
    "libvirt": (409, "libvirt said no"),
    "error": (409, "It cannot be done"),
    "slow": (408, "The body did not come"),
    "too-large": (413, "The body is too large"),
    "media-type": (415, "The body must be application/json"),
    "busy": (429, "Too much at once"),
    "internal": (500, "A fault of virtmig"),
    "late": (504, "libvirt did not answer in time"),
    "disk": (507, "No ticket can be kept; nothing was started"),
}
#: the first that fits
_OF_ERRORS: tuple[tuple[type[MigrationError], str], ...] = (
    (NotThere, "not-found"),
    (NotNow, "state"),
    (KeyConflict, "key"),
    (NotKept, "disk"),
    (PlanRefused, "refused"),
    (RequestError, "request"),
    (DomainNotFound, "no-domain"),
    (ConnectionFailed, "connection"),
)


def problem(kind: str, detail: str, **more: Any) -> Problem:
    status, title = KINDS[kind]
    return Problem(type=_TYPE + kind, title=title, status=status, detail=detail, **more)


def failure(kind: str, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> Failure:
    return Failure(problem(kind, detail, **more), headers)


def problem_of(error: MigrationError) -> Problem:
    """In the error's own words."""
    from virtmig.errors import VirtError

    kind = next((kind for known, kind in _OF_ERRORS if isinstance(error, known)), "")
    kind = kind or ("libvirt" if isinstance(error, VirtError) else "error")
    rows = error.problems if isinstance(error, RequestError) else getattr(error, "reasons", ())
    return problem(
        kind, error.message, hint=error.hint, guest=error.guest, retryable=error.retryable,
        reasons=tuple(Reason(*row) for row in rows),
    )  # fmt: skip
