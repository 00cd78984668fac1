"""Watch a migration that somebody else started (virsh, a cloud manager), without touching it.

Only the source is asked: the peer of a job is not among the facts libvirt gives about it.
"""

from __future__ import annotations

import time
from typing import Protocol

import msgspec

from virtmig.errors import MigrationError
from virtmig.forecast import Forecast, forecast
from virtmig.policy import Decision, History, Policy, decide
from virtmig.progress import PassCounter, Phase, Progress
from virtmig.virt.connection import lookup_domain
from virtmig.virt.hosts import Host
from virtmig.virt.job import JobView
from virtmig.whereabouts import Presence

SAMPLE_S = 0.5


class SampleWatcher(Protocol):
    def sample(self, progress: Progress, expected: Forecast) -> None: ...
    def message(self, text: str, level: str = "info") -> None: ...


def watch(name: str, *, source_uri: str | None, watcher: SampleWatcher) -> bool:
    """Show the outgoing job of a domain until it ends. True when the guest has left the source.

    Raises MigrationError when no migration job is active, and what open_connection and lookup_domain raise.
    """
    host = Host(source_uri)
    try:
        domain = lookup_domain(host.connection, name)
        uuid, label = domain.UUIDString(), domain.name()
        view = JobView(host, uuid)
        view.read_downtime_limit()
        history, passes, policy, last = History(), PassCounter(), Policy(), None
        while (progress := view.sample()) is not None and progress.phase not in (
            Phase.COMPLETED,
            Phase.FAILED,
            Phase.CANCELLED,
        ):
            last = msgspec.structs.replace(progress, full_passes=passes.update(progress))
            decision: Decision = decide(policy, history, last, time.monotonic())
            history.add(last, decision, time.monotonic())
            watcher.sample(last, forecast(history, policy))
            time.sleep(SAMPLE_S)
        if last is None:
            raise MigrationError(
                f"no migration of '{label}' is running on {host.name}",
                hint=f"virtmig domjobinfo {label} --completed shows the last one",
            )
        answer = host.ask(uuid, incoming=False)
        left = answer.presence in (Presence.ABSENT, Presence.SHUT_OFF)
        watcher.message(
            f"{label} has left {host.name}" if left else f"{label} is on {host.name}: {answer.presence.value}"
        )
        return left
    finally:
        host.close()
