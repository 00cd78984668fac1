"""Two sides of a handshake without a network, in any state."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import msgspec

from tests.support.hosts import DESTINATION, GUEST, SOURCE, ask
from virtmig.facts import Finding
from virtmig.link.frames import PREFACE, Control, FrameDecoder, FrameType, encode_message
from virtmig.link.initiator import Initiator
from virtmig.link.judge import Hosts, judge_by, objections
from virtmig.link.messages import (
    AllOpen,
    ChannelName,
    OpenChannel,
    Resume,
)
from virtmig.link.responder import Responder
from virtmig.link.side import Dial, Send, Side, Terms
from virtmig.link.states import State
from virtmig.plan import negotiate

S = State
KEY = b"a key of 24 random bytes"
MAIN = ChannelName("main")


def random_from(seed: str) -> Any:
    count = itertools.count()
    return lambda length: hashlib.sha512(f"{seed} {next(count)}".encode()).digest()[:length]


def terms(seed: str, **changes: Any) -> Terms:
    return Terms(**{"facts": SOURCE if seed == "source" else DESTINATION, "random": random_from(seed), **changes})


class Pair:
    """A source and a destination with perfect connections between them; `log` is every action of each."""

    def __init__(
        self,
        *options: str,
        source: dict[str, Any] | None = None,
        destination: dict[str, Any] | None = None,
        judge: Any = None,
        fixed: tuple[str, ...] = (),
        consent: Any = objections,
        **values: Any,
    ) -> None:
        self.now = 100.0
        request = dict(ask("live", *options, **values))
        self.source = Initiator(
            terms("source", **source or {}), "s-control", self.now,
            request=request, guest=GUEST, fixed=fixed, consent=consent, peer="beryl",
        )  # fmt: skip
        self.destination = Responder(
            terms("destination", **destination or {}), "d-control", self.now,
            judge=judge or judge_by(negotiate), peer="amber",
        )  # fmt: skip
        self.log: dict[Side, list[Any]] = {self.source: [], self.destination: []}
        self.dial = True  # dial at once, as asked
        self.number = itertools.count()

    def begin(self) -> Pair:
        self.carry(self.source, self.source.begin(self.now))
        return self

    def carry(self, side: Side, actions: list[Any]) -> None:
        self.log[side] += actions
        peer = self.destination if side is self.source else self.source
        for action in actions:
            if isinstance(action, Dial) and self.dial:
                number = next(self.number)
                self.carry(self.source, self.source.connected(action.channel, f"s{number}", self.now))
            elif isinstance(action, Send):
                self.deliver(side, peer, action)

    def deliver(self, side: Side, peer: Side, action: Send) -> None:
        control = as_control(action.message)
        connection = str(action.connection)
        if connection.endswith("control"):
            self.carry(peer, peer.receive(control, self.now))
        elif isinstance(action.message, OpenChannel):
            self.carry(peer, peer.open_channel(f"d{connection[1:]}", action.message, self.now, peer="amber"))
        elif isinstance(action.message, Resume):
            self.carry(peer, peer.resume(f"d{connection[1:]}", action.message, self.now, peer="amber"))
        else:
            self.carry(peer, peer.receive_on(f"s{connection[1:]}", control, self.now))

    def run(self) -> Pair:
        for side in (self.source, self.destination):
            side.run(self.now)
        return self

    def of(self, side: Side, kind: type) -> list[Any]:
        return [action for action in self.log[side] if isinstance(action, kind)]


def as_control(message: Any) -> Control:
    decoder = FrameDecoder("control", frozenset(FrameType))
    decoder.feed(PREFACE + encode_message(message))
    [event] = decoder.events()
    return event


def in_state(side: str, state: State) -> tuple[Pair, Side]:
    """A pair of which that side is in that state, reached by the events of its table."""
    if state is S.REFUSED:
        pair = Pair("postcopy", destination={"facts": without_userfaultfd()}).begin()
    elif state in (S.RUNNING, S.RECONNECTING, S.FINISHED, S.FAILED):
        pair = Pair().begin().run()
        if state is S.FAILED:
            pair.carry(pair.source, pair.source.fail("the disk is full", pair.now, guest="source"))
        elif state is S.FINISHED:
            pair.carry(pair.source, pair.source.finish(pair.now))
            pair.carry(pair.destination, pair.destination.finish(pair.now))
        elif state is S.RECONNECTING:
            pair.dial = False
            for each in (pair.source, pair.destination):
                pair.carry(each, each.lost("s0" if each is pair.source else "d0", pair.now))
    elif state is S.CONNECTED:
        pair = Pair()
    else:
        pair = staged(side, state)
    found: Side = getattr(pair, side)
    assert found.state is state
    return pair, found


def staged(side: str, state: State) -> Pair:
    """States on the way: step by step, by hand."""
    pair = Pair("parallel", parallel_connections=2)
    s, d, now = pair.source, pair.destination, pair.now
    [hello] = s.begin(now)
    steps = [hello]
    if (side, state) == ("source", S.HELLO):
        return pair
    _, back = d.receive(as_control(hello.message), now)
    if (side, state) == ("destination", S.HELLO):
        return pair
    _, proposal = s.receive(as_control(back.message), now)
    if (side, state) == ("source", S.PROPOSED):
        return pair
    judge, d._judge = d._judge, None
    d.receive(as_control(proposal.message), now)
    if state is S.PROPOSED:
        return pair
    answer, agreement = d.give_answer(judge(d.proposal, Hosts(SOURCE, DESTINATION)), now)
    if (side, state) == ("destination", S.AGREED):
        return pair
    s.receive(as_control(answer.message), now)
    if state is S.AGREED:
        return pair
    _, *dials = s.receive(as_control(agreement.message), now)
    if (side, state) == ("source", S.OPENING):
        return pair
    for number, dial in enumerate(dials):
        [opening] = s.connected(dial.channel, f"s{number}", now)
        opened, *rest = d.open_channel(f"d{number}", opening.message, now, peer="amber")
        if state is S.OPENING:
            return pair
        s.receive_on(f"s{number}", as_control(opened.message), now)
        steps += rest
    for action in steps:
        if isinstance(action, Send) and isinstance(action.message, AllOpen):
            s.receive(as_control(action.message), now)
    return pair


def without_userfaultfd() -> Any:
    return msgspec.structs.replace(DESTINATION, userfaultfd=Finding("no", "QEMU runs as uid 4242"))
