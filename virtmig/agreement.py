"""A plan and its parts: what will be done between two hosts, each piece with its reason. Made by plan.negotiate()."""

from __future__ import annotations

from typing import Literal

import msgspec

from virtmig.errors import PlanRefused
from virtmig.obstacles import Caution, Refusal
from virtmig.request import MigrationRequest


class Choice(msgspec.Struct, frozen=True):
    """One feature of the table. `on` is None where libvirt decides when the two daemons meet."""

    feature: str
    on: bool | None
    reason: str
    evidence: str = ""


class Suggestion(msgspec.Struct, frozen=True):
    """What would help and is not done without the person's word; `option` is how to say it."""

    feature: str
    option: str
    reason: str


class Adjustment(msgspec.Struct, frozen=True):
    """An option that is carried out with another value than asked."""

    option: str
    asked: str
    planned: str
    reason: str


class Channel(msgspec.Struct, frozen=True):
    """`count` connections of one role between the two QEMUs."""

    role: Literal["main", "parallel", "priority", "storage"]
    count: int
    both_ways: bool
    note: str = ""


class Transport(msgspec.Struct, frozen=True):
    """What the bytes of one migrate URI go through."""

    name: str
    many_channels: bool
    both_ways: bool


#: by scheme of the migrate URI; a pipe (exec:, fd:) is what libvirt uses inside a tunnel
TRANSPORTS = {
    "tcp": Transport("tcp", many_channels=True, both_ways=True),
    "unix": Transport("unix", many_channels=True, both_ways=True),
    "rdma": Transport("rdma", many_channels=False, both_ways=True),
    "relay": Transport("relay", many_channels=True, both_ways=True),
    "tunnel": Transport("tunnel", many_channels=False, both_ways=False),
}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What will be done, and why. `values` is the request after adjustments."""

    domain: str
    source: str
    destination: str
    transport: str
    transport_reason: str
    channels: tuple[Channel, ...] = ()
    choices: tuple[Choice, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()
    warnings: tuple[Caution, ...] = ()
    notes: tuple[Caution, ...] = ()
    values: dict[str, bool | int | str | tuple[str, ...]] = {}
    virsh_line: str = ""
    beyond_virsh: tuple[str, ...] = ()  # options of the request that virsh has no words for

    @property
    def refused(self) -> bool:
        return bool(self.refusals)

    @property
    def request(self) -> MigrationRequest:
        """What is carried out. Raises RequestError if the values were tampered with."""
        return MigrationRequest(self.values)

    def choice(self, feature: str) -> Choice:
        return next(choice for choice in self.choices if choice.feature == feature)

    def raise_if_refused(self) -> None:
        """Raises PlanRefused with all reasons."""
        if self.refusals:
            raise PlanRefused([(item.feature, item.reason, item.way_out) for item in self.refusals])
