"""What both sides of a handshake do alike: deadlines, pings, finishing, failing, connections that break.

Nothing is done here: every call returns actions, in order, and whoever owns the sockets carries them out. A connection
is whatever the caller calls it (any hashable). Messages that break a rule raise RemoteProtocolError and change nothing;
the caller then calls `fail`. Calls that cannot be raise LocalProtocolError and change nothing.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.facts import HostFacts
from virtmig.link.frames import Control, encode_message
from virtmig.link.messages import (
    CONTROL,
    NONCE_BYTES,
    ChannelName,
    Failed,
    Finished,
    Hello,
    Message,
    Ping,
    Pong,
    Reason,
    Refuse,
    clip,
)
from virtmig.link.proofs import ChannelProofs, check_key
from virtmig.link.states import DEADLINE_S, FINAL, PING_AFTER_S, State, Table
from virtmig.transitions import advance, possible

#: what this code speaks, lowest and highest
VERSIONS = (1, 1)
#: parts of the protocol by name: what a peer may demand in Hello.mandatory
FEATURES = ("resume",)
WINDOW_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Send:
    """Write `frame` to that connection."""

    connection: Hashable
    message: Message
    frame: bytes = field(repr=False)  # an Agreement holds the secret


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect for this channel and call `connected`; try again until that worked or the session is over."""

    channel: ChannelName


@dataclass(frozen=True, slots=True)
class Opened:
    """The channel is confirmed by both sides. No byte of the guest before Established."""

    channel: ChannelName
    connection: Hashable


@dataclass(frozen=True, slots=True)
class Established:
    """Every channel is open."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The channel goes on over this connection; the peer has everything before `received_up_to`."""

    channel: ChannelName
    connection: Hashable
    received_up_to: int


@dataclass(frozen=True, slots=True)
class Heard:
    """The peer said this, and somebody above may want to know: Hello, Proposal, Answer, Agreement, Finished."""

    message: Message


@dataclass(frozen=True, slots=True)
class Close:
    """This connection is of no more use; send what was handed out for it first."""

    connection: Hashable


@dataclass(frozen=True, slots=True)
class Over:
    """FINISHED, REFUSED or FAILED. `guest` is what the peer said about the guest's place, when it failed."""

    state: State
    reasons: tuple[Reason, ...] = ()
    guest: str = "unknown"


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing more can come for this session: close what is left, drop it."""


Action = Send | Dial | Opened | Established | Resumed | Heard | Close | Over | Forget


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one side brings to every handshake. `random(n)` gives n bytes that nobody can guess."""

    facts: HostFacts
    random: Callable[[int], bytes]
    implementation: str = "virtmig"
    versions: tuple[int, int] = VERSIONS
    features: tuple[str, ...] = FEATURES
    mandatory: tuple[str, ...] = ()
    key: bytes = field(default=b"", repr=False)  # pre-shared; empty: TLS or the unix socket says who the peer is
    window_bytes: int = WINDOW_BYTES
    deadline_s: Mapping[State, float] = field(default_factory=dict)  # in the place of DEADLINE_S
    ping_after_s: float = PING_AFTER_S


class Side(abc.ABC):
    """One side of one session, from the connection on which it was begun. `now` is any clock that only goes forward."""

    table: ClassVar[Table]
    #: Finished is said first by the side that can dial: whether the last message came is asked by dialling again
    finishes_first: ClassVar[bool]

    def __init__(self, terms: Terms, control: Hashable, now: float, *, peer: str = "") -> None:
        """`peer`: who the transport says is at the other end (a certificate's name, a uid); "" where nobody says."""
        self.terms = terms
        self.peer = peer
        self.state = State.CONNECTED
        self.reasons: tuple[Reason, ...] = ()
        self.guest = "unknown"
        self.peer_hello: Hello | None = None
        self.channels: tuple[ChannelName, ...] = ()
        self.session = b""
        self.window_bytes = 0
        self.finished_here = self.finished_there = False
        check_key(terms.key)
        self._nonce = terms.random(NONCE_BYTES)
        self._deadline_s = {**DEADLINE_S, **terms.deadline_s}
        self._connections: dict[ChannelName, Hashable] = {CONTROL: control}
        self._broken: set[ChannelName] = set()
        self._proofs: ChannelProofs | None = None
        self._pings = 0
        self._ping_at = now + terms.ping_after_s
        self._deadline: float | None = now + self._deadline_s[self.state]

    @property
    def broken(self) -> frozenset[ChannelName]:
        """Channels without a connection (and CONTROL, when that is gone), while reconnecting."""
        return frozenset(self._broken)

    # -- time ------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` is due; None when nothing is left to wait for."""
        if self._deadline is None or not self._pinging:
            return self._deadline
        return min(self._deadline, self._ping_at)

    def expire(self, now: float) -> list[Action]:
        """What the passing of time means; nothing before the deadline."""
        if self._deadline is not None and now >= self._deadline:
            return self._expired(now)
        if self._pinging and now >= self._ping_at:
            self._ping_at = now + self.terms.ping_after_s
            self._pings += 1
            return self._send(Ping(number=self._pings & 0xFFFF_FFFF))
        return []

    def _expired(self, now: float) -> list[Action]:
        state, waited = self.state, self._deadline_s[self.state]
        if state in FINAL:
            self._deadline = None
            return [Forget()]
        if state is State.RUNNING:
            self._enter("expired", now)
            connections = dict(self._connections)
            done = self.finished_here or self.finished_there
            actions: list[Action] = [Close(connection) for connection in connections.values()]
            for channel in connections:
                if channel == CONTROL or not done:
                    actions += self._break(channel)
                else:
                    del self._connections[channel]
            return actions
        text = f"nothing came of state {str(state)!r} within {waited:g} s (expected: {possible(self.table, state)})"
        return self._over("expired", now, [Reason("deadline", text)], self._send(Failed(reason=text)))

    @property
    def _pinging(self) -> bool:
        waiting = (State.ESTABLISHED, State.RUNNING, State.RECONNECTING)
        return self.state in waiting and CONTROL not in self._broken

    # -- what the caller asks for ----------------------------------------------------------------------------------

    def run(self, now: float) -> list[Action]:
        """The guest's bytes may flow. The destination calls it no later than at the first byte it receives."""
        self._enter("run", now)
        return []

    def finish(self, now: float) -> list[Action]:
        """All that was expected is here, all that was written was acknowledged. Called once.

        The source says so at once; the destination when the source has said it.
        """
        if self.finished_here:
            raise LocalProtocolError("Finished was said already")
        return self._finished("here", now)

    def refuse(self, reasons: Iterable[Reason], now: float) -> list[Action]:
        """No, for these reasons; only before the session is established."""
        said = tuple(reasons)
        self._next("refuse")
        return self._over("refuse", now, said, self._send(Refuse(reasons=said)))

    def fail(self, reason: str, now: float, *, guest: str = "unknown") -> list[Action]:
        """It went wrong here. In a state that is over nothing happens, so that it can be called on any error."""
        if self.state in FINAL:
            return []
        said = clip(reason)
        return self._over("fail", now, [Reason("", said)], self._send(Failed(reason=said, guest=guest)), guest)

    def lost(self, connection: Hashable, now: float, why: str = "closed by the peer") -> list[Action]:
        """A connection broke. One that was replaced or refused before means nothing."""
        channel = next((name for name, known in self._connections.items() if known == connection), None)
        if channel is None or channel in self._broken:
            return []
        if self.state in FINAL:
            del self._connections[channel]
            return []
        if self.state in (State.RUNNING, State.RECONNECTING):
            if channel != CONTROL and (self.finished_here or self.finished_there):
                del self._connections[channel]
                return []
            self._enter("lost", now)
            return self._break(channel)
        text = clip(f"the connection of {channel} was lost in state {str(self.state)!r}: {why}")
        del self._connections[channel]
        return self._over("lost", now, [Reason("", text)], self._send(Failed(reason=text)))

    # -- what the peer says ----------------------------------------------------------------------------------------

    def receive(self, control: Control, now: float) -> list[Action]:
        """A message on the control connection. Raises RemoteProtocolError when it cannot come now or is wrong."""
        if self.state in (State.REFUSED, State.FAILED):
            return []  # sent before the peer heard of it
        message = control.message
        try:
            actions = self._receive(message, control, now)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.message, channel=str(CONTROL), offset=control.offset) from None
        if self.state is State.RUNNING:
            self._deadline = now + self._deadline_s[State.RUNNING]
        self._ping_at = now + self.terms.ping_after_s
        return actions

    def _receive(self, message: Message, control: Control, now: float) -> list[Action]:
        if isinstance(message, Ping):
            self._check_due("ping", message)
            return self._send(Pong(number=message.number))
        if isinstance(message, Pong):
            self._check_due("pong", message)
            if not self._pings or message.number > self._pings:
                raise RemoteProtocolError(f"pong {message.number} without a ping")
            return []
        if isinstance(message, Finished):
            self._check_due("half finished", message)
            if self.finishes_first and not self.finished_here:
                raise RemoteProtocolError("finished, before the source has said it")
            return self._finished("there", now)
        if isinstance(message, Refuse):
            self._check_due("refuse", message)
            return self._over("refuse", now, message.reasons)
        if isinstance(message, Failed):
            if self.state in FINAL:
                return []
            return self._over("fail", now, [Reason("", message.reason)], guest=message.guest)
        return self._negotiate(message, control, now)

    @abc.abstractmethod
    def _negotiate(self, message: Message, control: Control, now: float) -> list[Action]:
        """What comes before the session is established."""

    # -- inside ----------------------------------------------------------------------------------------------------

    def _next(self, event: str) -> State:
        return advance(self.table, self.state, event)

    def _check_due(self, event: str, message: Message) -> None:
        if (self.state, event) not in self.table:
            name = type(message).__struct_config__.tag
            raise RemoteProtocolError(
                f"{name!r} cannot come in state {str(self.state)!r} (expected: {possible(self.table, self.state)})"
            )

    def _enter(self, event: str, now: float) -> None:
        """Advance. The deadline is that of entering a state: what happens within one does not stretch it."""
        before, self.state = self.state, self._next(event)
        if self.state is not before:
            self._deadline = now + self._deadline_s[self.state]
            self._ping_at = now + self.terms.ping_after_s

    def _send(self, message: Message) -> list[Action]:
        """On control, when there is one."""
        if CONTROL in self._broken or CONTROL not in self._connections:
            return []
        return [Send(self._connections[CONTROL], message, encode_message(message))]

    def _over(
        self,
        event: str,
        now: float,
        reasons: Iterable[Reason],
        last_words: Iterable[Action] = (),
        guest: str = "unknown",
    ) -> list[Action]:
        """The end of it: the last words on control, every other connection closed."""
        actions = list(last_words)
        self._enter(event, now)
        self.reasons, self.guest = tuple(reasons), guest
        actions += [Close(connection) for name, connection in self._connections.items() if name != CONTROL]
        actions += [Close(connection) for connection in self._waiting()]
        self._connections = {name: known for name, known in self._connections.items() if name == CONTROL}
        self._broken.clear()
        return [*actions, Over(self.state, self.reasons, guest)]

    def _waiting(self) -> list[Hashable]:
        """Connections that are not yet those of a channel; forgotten by this call."""
        return []

    def _break(self, channel: ChannelName) -> list[Action]:
        self._broken.add(channel)
        del self._connections[channel]
        return []

    def _mended(self, channel: ChannelName, connection: Hashable, received_up_to: int, now: float) -> list[Action]:
        """A broken channel has a connection again."""
        self._connections[channel] = connection
        self._broken.discard(channel)
        actions: list[Action] = [Resumed(channel, connection, received_up_to)]
        if channel == CONTROL and self.finished_here and (self.finishes_first or self.finished_there):
            actions += self._send(Finished())
            if self.finished_there and self.state is State.RECONNECTING:
                self._enter("both finished", now)
                return [*actions, Over(self.state)]
        return actions + self._all_mended(now)

    def _all_mended(self, now: float) -> list[Action]:
        if self.state is State.RECONNECTING and not self._broken:
            self._enter("all resumed", now)
        return []

    def _finished(self, where: str, now: float) -> list[Action]:
        """One side is done. From then on only control is mended: nothing is left that a channel could carry."""
        both = self.finished_there if where == "here" else self.finished_here
        event = "both finished" if both else "half finished"
        self._next(event)
        actions: list[Action] = []
        if where == "here":
            self.finished_here = True
        else:
            if not self.finished_there:
                actions.append(Heard(Finished()))
            self.finished_there = True
            if self.state is State.FINISHED:
                return actions
        if (where == "here") if self.finishes_first else both:
            actions += self._send(Finished())
        self._broken &= {CONTROL}
        if both and CONTROL not in self._broken:
            self._enter(event, now)
            return [*actions, Over(self.state)]
        self._enter("half finished", now)
        return actions + self._all_mended(now)


def common_version(ours: tuple[int, int], hello: Hello) -> int | None:
    """The highest version that both speak; None when there is none."""
    highest = min(ours[1], hello.version_highest)
    return highest if highest >= max(ours[0], hello.version_lowest) else None


def objections_to(hello: Hello, terms: Terms) -> list[Reason]:
    """Why these two cannot talk: no common version, a feature one of them demands, a key that one of them lacks."""
    found: list[Reason] = []
    low, high = terms.versions
    if common_version(terms.versions, hello) is None:
        theirs = f"{hello.version_lowest} to {hello.version_highest}"
        found.append(
            Reason(
                "version",
                f"this side ({clip(terms.implementation, 128)}) speaks versions {low} to {high} of the link protocol, "
                f"the peer ({hello.implementation}) {theirs}",
                "install a virtmig on both hosts whose versions meet",
            )
        )
    for name in hello.mandatory:
        if name not in terms.features:
            found.append(Reason(name, f"the peer demands {name!r}, which is not known here", "upgrade this side"))
    for name in terms.mandatory:
        if name not in hello.features:
            found.append(Reason(name, f"this side demands {name!r}, which the peer does not have", "upgrade the peer"))
    if bool(terms.key) != hello.keyed:
        without = "the peer" if terms.key else "this side"
        found.append(Reason("key", f"{without} has no pre-shared key, the other demands one", "give both the same key"))
    return found[:64]
