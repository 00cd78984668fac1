"""The agents' part of one migration: whether both hosts have one, the handshake, and what libvirt is told of it."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from virtmig.agreement import Plan
from virtmig.engine.agents import (
    DEFAULT_PORT,
    Followed,
    RelaySession,
    ask_facts,
    default_socket,
    reachable,
    shake_hands,
)
from virtmig.errors import ChannelError, MigrationError
from virtmig.facts import Finding, GuestFacts, HostFacts
from virtmig.link.asking import Carried, Exchanged
from virtmig.progress import Whereabouts
from virtmig.request import MigrationRequest

#: what concerns this command alone, and not the other host
_OURS_ALONE = frozenset({"agent", "destination-agent", "progress", "json", "quiet", "exit-codes", "verbose", "plan",
                         "xml", "persistent-xml", "retries", "query-qemu", "report", "estimate"})  # fmt: skip


def find_agents(request: MigrationRequest, source: HostFacts, destination: HostFacts) -> tuple[HostFacts, HostFacts]:
    """Both hosts' facts, with what is known of their agents. Nobody is asked when the bytes go another way anyhow."""
    if request.text("transport") == "direct":
        return source, destination
    mine = _agent_of_source(request, source)
    if mine.status == "yes" or request.text("transport") == "relay":
        theirs = _agent_of_destination(request, destination)
    else:
        theirs = Finding("unknown", "not looked for")
    replace = msgspec.structs.replace
    return replace(source, agent=mine), replace(destination, agent=theirs)


def _agent_of_source(request: MigrationRequest, source: HostFacts) -> Finding:
    path = request.text("agent").removeprefix("unix:") or str(default_socket())
    try:
        facts = ask_facts(path).facts
    except MigrationError as error:
        return Finding("no", error.message)
    if facts.host_uuid and source.host_uuid and facts.host_uuid != source.host_uuid:
        return Finding("no", f"the agent at {path} is that of {facts.label}")
    return Finding("yes", f"it answers at {path}")


def _agent_of_destination(request: MigrationRequest, destination: HostFacts) -> Finding:
    addresses = destination_agents(request)
    if not addresses:
        return Finding("no", "its address is not known: --destination-agent tcp:HOST:PORT")
    for address in addresses:
        problem = reachable(address)
        if not problem:
            return Finding("yes", f"something listens at {address}")
    if request.text("transport") == "relay":
        # this command may stand elsewhere than the source's agent, which will try itself
        return Finding("unknown", f"{addresses[0]}: {problem}")
    return Finding("no", f"{addresses[0]}: {problem}")


def destination_agents(request: MigrationRequest) -> tuple[str, ...]:
    """As given, else the agents' port of the host in the destination's URI; empty when it names none."""
    if given := request.text("destination-agent"):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    host = urlsplit(request.destination_uri).hostname
    if not host:
        return ()
    return (f"tcp:[{host}]:{DEFAULT_PORT}" if ":" in host else f"tcp:{host}:{DEFAULT_PORT}",)


class ChannelRates:
    """Bytes per second of each channel, both ways, in the order of the agreement; () until two counts are known."""

    def __init__(self) -> None:
        self.now: tuple[int, ...] = ()
        self._last: Carried | None = None

    def update(self, said: Carried) -> None:
        """In the thread that follows the session; whoever reads `now` gets the last whole answer."""
        last, self._last = self._last, said
        seconds = (said.ms - last.ms) / 1000 if last is not None else 0.0
        if last is None or seconds <= 0:
            return
        before = last.channels
        self.now = tuple(
            int(max(0, sum(counts) - sum(before.get(name, (0, 0)))) / seconds) for name, counts in said.channels.items()
        )


class Relay:
    """A session of the agents for one attempt. `request` is what libvirt gets."""

    def __init__(
        self, plan: Plan, guest: GuestFacts, source: HostFacts, tell: Callable[[Followed], None],
        heard: Callable[[Exchanged], None] = lambda message: None,
    ) -> None:  # fmt: skip
        """Shake hands. Raises PlanRefused with the destination's reasons, ChannelError; nothing has started then."""
        request = plan.request
        values = {name: value for name, value in plan.values.items() if name not in _OURS_ALONE}
        values["transport"] = "relay"
        path = request.text("agent").removeprefix("unix:") or str(default_socket())
        try:
            connection, self.agreed = shake_hands(
                path, ",".join(destination_agents(request)), request=values, guest=guest, facts=source, heard=heard
            )
        except ChannelError as error:
            error.guest = Whereabouts.SPLIT if "postcopy-resume" in request else Whereabouts.SOURCE
            error.message = f"{error.message}; nothing was started, {guest.name} is where it was"
            error.args = (error.message,)
            raise
        self.session = RelaySession(connection, self.agreed, tell)
        attachment = self.agreed.attachment
        assert attachment is not None  # a session without one is only a handshake
        changes: dict[str, object] = {
            "transport": "direct",
            "migrateuri": attachment.uri,
            "listen_address": attachment.listen_address or None,
            "disks_uri": attachment.disks_uri or None,
        }
        for row in self.agreed.answer.verdicts:
            if row.outcome == "adjusted":
                changes[row.feature.replace("-", "_")] = self.agreed.answer.settled.get(row.feature)
        self.request = request.replace(**changes)  # type: ignore[arg-type]

    @property
    def words(self) -> str:
        """One line for people."""
        agreed = self.agreed
        channels = ", ".join(str(channel) for channel in agreed.channels)
        way = agreed.attachment.uri if agreed.attachment else "nowhere"
        return f"agreed with {agreed.peer} in {agreed.ms:.0f} ms, {agreed.round_trips} round trips: {channels}; {way}"
