"""Transition tables are data, `(state, event): state`; here is how one is walked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from virtmig.errors import LocalProtocolError

State = TypeVar("State", bound=str)


def advance(table: Mapping[tuple[State, str], State], state: State, event: str) -> State:
    """The state after `event`. Raises LocalProtocolError that names both for a pair that is not in the table."""
    after = table.get((state, event))
    if after is None:
        raise LocalProtocolError(
            f"{event!r} cannot happen in state {str(state)!r}",
            hint=f"possible there: {possible(table, state) or 'nothing'}",
        )
    return after


def possible(table: Mapping[tuple[State, str], State], state: State) -> str:
    """What can happen in `state`, in words; "" for a state that nothing leaves."""
    return ", ".join(sorted(event for known, event in table if known == state))
