"""The channels of a session: opened in order, broken, resumed, finished."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.link_sides import (
    MAIN,
    Pair,
    S,
    as_control,
    in_state,
    staged,
)
from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link.messages import (
    CONTROL,
    AllOpen,
    ChannelName,
    Failed,
    Finished,
    OpenChannel,
    Ping,
    Reason,
    Refuse,
    Resume,
)
from virtmig.link.side import Close, Dial, Established, Heard, Opened, Over, Resumed, Send, Side
from virtmig.link.states import FINAL

# -- channels ------------------------------------------------------------------------------------------------------


def opening() -> tuple[Pair, list[OpenChannel]]:
    """A destination in AGREED, and what the source would say on main, parallel 0 and parallel 1."""
    pair = staged("source", S.OPENING)
    said = [pair.source.connected(name, f"s{at}", pair.now)[0].message for at, name in enumerate(pair.source.channels)]
    return pair, said


def test_channels_are_confirmed_in_their_order_however_they_arrive() -> None:
    pair, (main, first, second) = opening()
    d = pair.destination
    assert d.open_channel("c", second, pair.now, peer="amber") == []
    assert d.open_channel("b", first, pair.now, peer="amber") == []
    assert d.state is S.AGREED
    actions = d.open_channel("a", main, pair.now, peer="amber")
    assert [action.connection for action in actions if isinstance(action, Opened)] == ["a", "b", "c"]
    assert isinstance(actions[-2].message, AllOpen)
    assert actions[-1] == Established()


def test_all_open_may_overtake_the_last_confirmation() -> None:
    pair, said = opening()
    confirmations = []
    for at, message in enumerate(said):
        confirmations += [
            action for action in pair.destination.open_channel(f"d{at}", message, pair.now, peer="amber")
            if isinstance(action, Send)
        ]  # fmt: skip
    *opened, all_open = confirmations
    assert pair.source.receive(as_control(all_open.message), pair.now) == []
    with pytest.raises(RemoteProtocolError, match="all-open"):
        pair.source.receive(as_control(all_open.message), pair.now)
    for at, action in enumerate(opened):
        assert pair.source.state is S.OPENING
        last = pair.source.receive_on(f"s{at}", as_control(action.message), pair.now)
    assert last[-1] == Established()


def is_refused(actions: list[Any], words: str) -> None:
    send, close = actions
    assert isinstance(send.message, Refuse)
    assert words in send.message.reasons[0].reason
    assert (send.connection, close) == ("x", Close("x"))


@pytest.mark.parametrize(
    ("change", "peer", "words"),
    [
        ({"session": b"another session!"}, "amber", "no such session"),
        ({}, "a stranger", "no such session"),
        ({"proof": bytes(32)}, "amber", "the proof is wrong"),
        ({"role": "parallel"}, "amber", "the proof is wrong"),
        ({"index": 1}, "amber", "the proof is wrong"),
    ],
)
def test_a_channel_that_does_not_belong_is_refused_and_disturbs_nothing(change: Any, peer: str, words: str) -> None:
    pair, (main, *_) = opening()
    d = pair.destination
    is_refused(d.open_channel("x", msgspec.structs.replace(main, **change), pair.now, peer=peer), words)
    assert d.state is S.AGREED
    assert d.lost("x", pair.now) == []
    assert d.open_channel("a", main, pair.now, peer="amber")[1] == Opened(MAIN, "a")


def test_early_replayed_surplus_and_late_channels_are_refused() -> None:
    early, d = in_state("destination", S.HELLO)
    pair, said = opening()
    is_refused(d.open_channel("x", said[0], early.now, peer="amber"), "no such session")  # type: ignore[attr-defined]
    d = pair.destination
    d.open_channel("a", said[0], pair.now, peer="amber")
    d.open_channel("c", said[2], pair.now, peer="amber")
    for message in (said[0], said[2]):  # one is open, one waits for its turn
        is_refused(d.open_channel("x", message, pair.now, peer="amber"), "was opened before")
    surplus = ChannelName("priority")
    proof = d._proofs.of(b"virtmig open", surplus)
    message = OpenChannel(session=d.session, role="priority", index=0, proof=proof)
    is_refused(d.open_channel("x", message, pair.now, peer="amber"), "priority was not agreed")
    assert d.state is S.OPENING
    d.fail("enough", pair.now)
    is_refused(d.open_channel("x", said[1], pair.now, peer="amber"), "state 'failed'")


def test_what_waited_is_closed_when_it_fails_and_a_waiting_connection_that_breaks_fails_it() -> None:
    pair, said = opening()
    pair.destination.open_channel("c", said[2], pair.now, peer="amber")
    assert Close("c") in pair.destination.fail("enough", pair.now)
    pair, said = opening()
    pair.destination.open_channel("c", said[2], pair.now, peer="amber")
    pair.destination.lost("c", pair.now)
    assert pair.destination.state is S.FAILED


def test_a_source_that_is_answered_by_someone_else_notices() -> None:
    pair, (main, _, _) = opening()
    opened, *_ = pair.destination.open_channel("a", main, pair.now, peer="amber")
    wrong = msgspec.structs.replace(opened.message, proof=bytes(32))
    with pytest.raises(RemoteProtocolError, match="does not know the session's secret"):
        pair.source.receive_on("s0", as_control(wrong), pair.now)
    with pytest.raises(RemoteProtocolError, match="an answer to something else"):
        pair.source.receive_on("s1", as_control(opened.message), pair.now)
    with pytest.raises(RemoteProtocolError, match="an answer to something else"):
        pair.source.receive_on("s0", as_control(Ping(number=1)), pair.now)
    assert pair.source.receive_on("else", as_control(opened.message), pair.now) == []
    pair.source.receive_on("s0", as_control(Refuse(reasons=(Reason("channel", "surplus"),))), pair.now)
    assert pair.source.state is S.FAILED
    assert "surplus" in pair.source.reasons[0].reason


def test_dialling_out_of_turn() -> None:
    pair, _ = opening()
    assert pair.source.connected(MAIN, "again", pair.now) == [Close("again")]
    assert pair.source.connected(ChannelName("storage"), "y", pair.now) == [Close("y")]
    with pytest.raises(LocalProtocolError, match="cannot be opened"):
        Pair().source.connected(MAIN, "early", 0)
    pair.source.lost("s0", pair.now)
    assert pair.source.state is S.FAILED


# -- broken connections --------------------------------------------------------------------------------------------


def test_everything_breaks_and_comes_back() -> None:
    pair = Pair("parallel", parallel_connections=2).begin().run()
    s, d = pair.source, pair.destination
    pair.dial = False
    for number in (0, 1, 2):
        pair.carry(d, d.lost(f"d{number}", pair.now))
        pair.carry(s, s.lost(f"s{number}", pair.now))
    pair.carry(d, d.lost("d-control", pair.now))
    pair.carry(s, s.lost("s-control", pair.now))
    assert s.broken == d.broken == {CONTROL, *s.channels}
    assert [action.channel for action in pair.of(s, Dial)[-4:]] == [*s.channels, CONTROL]
    for at, channel in enumerate((CONTROL, *s.channels)):
        [resume] = s.connected(channel, f"s2{at}", pair.now, 1000 + at)
        accepted, resumed = d.resume(
            f"d2{at}", resume.message, pair.now, received_up_to=lambda at=at: 2000 + at, peer="amber"
        )
        assert resumed == Resumed(channel, f"d2{at}", 1000 + at)
        assert s.receive_on(f"s2{at}", as_control(accepted.message), pair.now) == [
            Resumed(channel, f"s2{at}", 2000 + at)
        ]
    assert s.state is d.state is S.RUNNING
    assert s.broken == d.broken == frozenset()


def test_a_peer_that_dials_again_before_the_loss_was_seen_takes_the_place_of_the_old_connection() -> None:
    pair = Pair().begin().run()
    s, d = pair.source, pair.destination
    s.lost("s0", pair.now)
    [resume] = s.connected(MAIN, "s1", pair.now)
    close, accepted, resumed = d.resume("d1", resume.message, pair.now, peer="amber")
    assert close == Close("d0")
    assert resumed == Resumed(MAIN, "d1", 0)
    assert d.state is S.RUNNING
    assert d.lost("d0", pair.now) == []
    is_refused(d.resume("x", resume.message, pair.now, peer="amber"), "attempt 1 to resume main was made before")
    assert s.lost("s1", pair.now) == [Dial(MAIN)]  # broke again before the answer came
    [second] = s.connected(MAIN, "s2", pair.now)
    assert second.message.attempt == 2
    with pytest.raises(RemoteProtocolError, match="an answer to something else"):
        s.receive_on("s2", as_control(accepted.message), pair.now)
    _, accepted, _ = d.resume("d2", second.message, pair.now, peer="amber")
    wrong = msgspec.structs.replace(accepted.message, received_up_to=5)
    with pytest.raises(RemoteProtocolError, match="does not know"):
        s.receive_on("s2", as_control(wrong), pair.now)
    s.receive_on("s2", as_control(accepted.message), pair.now)
    assert s.state is S.RUNNING


@pytest.mark.parametrize(
    ("change", "peer", "words"),
    [
        ({"session": bytes(16)}, "amber", "no such session"),
        ({}, "else", "no such session"),
        ({"received_up_to": 1}, "amber", "the proof is wrong"),
        ({"attempt": 2}, "amber", "the proof is wrong"),
        ({"role": "control"}, "amber", "the proof is wrong"),
    ],
)
def test_a_resume_that_does_not_belong_is_refused(change: Any, peer: str, words: str) -> None:
    pair = Pair().begin().run()
    pair.source.lost("s0", pair.now)
    [resume] = pair.source.connected(MAIN, "s1", pair.now)
    message = msgspec.structs.replace(resume.message, **change)
    is_refused(pair.destination.resume("x", message, pair.now, peer=peer), words)
    assert pair.destination.state is S.RUNNING


def test_a_resume_of_what_was_not_agreed_or_too_late_is_refused() -> None:
    pair = Pair().begin().run()
    d = pair.destination
    proof = d._proofs.of_attempt(b"virtmig resume", ChannelName("priority"), 1, 0)
    message = Resume(session=d.session, role="priority", index=0, attempt=1, received_up_to=0, proof=proof)
    is_refused(d.resume("x", message, pair.now, peer="amber"), "priority was not agreed")
    pair.source.lost("s0", pair.now)
    [resume] = pair.source.connected(MAIN, "s1", pair.now)
    d.fail("enough", pair.now)
    is_refused(d.resume("x", resume.message, pair.now, peer="amber"), "state 'failed'")
    pair.source.receive_on("s1", as_control(Refuse(reasons=(Reason("channel", "gone"),))), pair.now)
    assert pair.source.state is S.FAILED


def test_a_finished_that_was_lost_is_said_again() -> None:
    pair = Pair().begin().run()
    s, d = pair.source, pair.destination
    pair.carry(s, s.finish(pair.now))
    d.finish(pair.now)  # lost on the way
    assert d.state is S.FINISHED
    d.lost("d-control", pair.now)
    assert s.lost("s0", pair.now) == []  # nothing is left for main to carry
    assert s.lost("s-control", pair.now) == [Dial(CONTROL)]
    [resume] = s.connected(CONTROL, "s-new-control", pair.now)
    accepted, _, again = d.resume("d-new-control", resume.message, pair.now, peer="amber")
    resumed = s.receive_on("s-new-control", as_control(accepted.message), pair.now)
    assert s.state is S.RUNNING
    assert resumed[1].message == Finished()
    assert s.receive(as_control(again.message), pair.now) == [Heard(Finished()), Over(S.FINISHED)]
    assert d.receive(as_control(resumed[1].message), pair.now) == []


def test_finished_while_the_control_connection_is_gone_is_said_when_it_is_back() -> None:
    pair = Pair().begin().run()
    s, d = pair.source, pair.destination
    assert d.finish(pair.now) == []  # the source has not said it
    assert d.state is S.RUNNING
    s.lost("s-control", pair.now)
    assert s.finish(pair.now) == []
    assert s.state is S.RECONNECTING
    [resume] = s.connected(CONTROL, "s-new-control", pair.now)
    _, accepted, *_ = d.resume("d-new-control", resume.message, pair.now, peer="amber")
    resumed, said = s.receive_on("s-new-control", as_control(accepted.message), pair.now)
    assert resumed == Resumed(CONTROL, "s-new-control", 0)
    heard, answered, over = d.receive(as_control(said.message), pair.now)
    assert (heard, over) == (Heard(Finished()), Over(S.FINISHED))
    assert s.receive(as_control(answered.message), pair.now) == [Heard(Finished()), Over(S.FINISHED)]


def test_a_destination_finishes_after_the_source_also_when_control_is_gone() -> None:
    pair = Pair().begin().run()
    s, d = pair.source, pair.destination
    pair.carry(s, s.finish(pair.now))
    d.lost("d-control", pair.now)
    assert d.finish(pair.now) == []
    s.lost("s-control", pair.now)
    [resume] = s.connected(CONTROL, "s-new-control", pair.now)
    actions = d.resume("d-new-control", resume.message, pair.now, peer="amber")
    assert [type(action) for action in actions] == [Send, Resumed, Send, Over]
    assert d.state is S.FINISHED


class Network:
    """Connections with messages in flight, which can be cut: what flies is lost, each side hears of it in its time."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.flying: dict[tuple[str, Side], list[Any]] = {}
        self.dead: set[str] = set()
        self.unheard: list[tuple[Side, str]] = []
        self.dials: list[ChannelName] = []
        self.number = itertools.count(50)

    def carry(self, side: Side, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send) and action.connection not in self.dead:
                self.flying.setdefault((str(action.connection), side), []).append(action.message)
            elif isinstance(action, Dial):
                self.dials.append(action.channel)
            elif isinstance(action, Close):
                self.cut(str(action.connection), side)

    def cut(self, connection: str, by: Side | None = None) -> None:
        """Closed by one side, what it sent still arrives before the other hears of it; else everything is lost."""
        if connection not in self.dead:
            self.dead.add(connection)
            for side in (self.pair.source, self.pair.destination):
                if side is not by:
                    self.unheard.append((side, connection))
                if side is not by or by is None:
                    self.flying.pop((connection, side), None)

    def step(self, number: int) -> bool:
        """One thing that can happen now, chosen by the number; False when nothing can."""
        choices: list[Any] = [key for key, messages in self.flying.items() if messages]
        choices += [heard for heard in self.unheard if not self.flying.get((heard[1], self.other(heard[0])))]
        choices += self.dials
        if not choices:
            return False
        choice = choices[number % len(choices)]
        source, now = self.pair.source, self.pair.now
        if isinstance(choice, ChannelName):
            self.dials.remove(choice)
            self.carry(source, source.connected(choice, f"c{next(self.number)}", now, 0))
        elif isinstance(choice[0], str):
            self.deliver(choice[0], self.other(choice[1]), self.flying[choice].pop(0))
        else:
            self.unheard.remove(choice)
            side, connection = choice
            self.carry(side, side.lost(connection, now))
        return True

    def deliver(self, connection: str, side: Side, message: Any) -> None:
        now = self.pair.now
        if isinstance(message, OpenChannel):
            self.carry(side, side.open_channel(connection, message, now, peer="amber"))  # type: ignore[attr-defined]
        elif isinstance(message, Resume):
            self.carry(side, side.resume(connection, message, now, peer="amber"))  # type: ignore[attr-defined]
        elif side is self.pair.source and connection in self.pair.source._dialled:
            self.carry(side, self.pair.source.receive_on(connection, as_control(message), now))
        elif connection in side._connections.values() or side.state in FINAL:
            self.carry(side, side.receive(as_control(message), now))

    def other(self, side: Side) -> Side:
        return self.pair.destination if side is self.pair.source else self.pair.source


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["step", "step", "step", "cut", "finish"]), st.integers(0, 99)), max_size=60),
    st.booleans(),
)
def test_any_cuts_at_any_time_end_alike_on_both_sides(plan: list[tuple[str, int]], both_ways: bool) -> None:
    pair = Pair("parallel", parallel_connections=2)
    for side in (pair.source, pair.destination):
        side._connections[CONTROL] = "c0"
    net = Network(pair)
    net.carry(pair.source, pair.source.begin(pair.now))
    while net.step(0):
        pass
    sides = (pair.source, pair.destination)
    pair.run()
    for verb, number in plan:
        side = sides[number % 2]
        if verb == "step":
            net.step(number)
        elif verb == "finish" and not side.finished_here and side.state in (S.RUNNING, S.RECONNECTING):
            net.carry(side, side.finish(pair.now))
        elif verb == "cut":
            live = sorted({str(each) for side in sides for each in side._connections.values()} - net.dead)
            if live:
                net.cut(live[number % len(live)])
    steps = 0
    while net.step(steps * 7 if both_ways else 0):
        steps += 1
        assert steps < 1000
    for side in sides:
        if not side.finished_here:
            net.carry(side, side.finish(pair.now))
    while net.step(0):
        pass
    assert [side.state for side in sides] == [S.FINISHED] * 2


def test_failed_and_refused_by_the_peer() -> None:
    pair, found = in_state("destination", S.RUNNING)
    actions = found.receive(as_control(Failed(reason="no disk", guest="source")), pair.now)
    assert actions == [Close("d0"), Over(S.FAILED, (Reason("", "no disk"),), "source")]
    assert found.guest == "source"
    pair, found = in_state("source", S.OPENING)
    assert found.receive(as_control(Refuse(reasons=(Reason("x", "no"),))), pair.now)[-1] == Over(
        S.REFUSED, (Reason("x", "no"),)
    )


def test_late_connections_are_closed() -> None:
    pair = Pair().begin().run()
    assert pair.source.connected(MAIN, "y", pair.now) == [Close("y")]
    pair.source.lost("s0", pair.now)
    pair.source.connected(MAIN, "s1", pair.now)
    assert Close("s1") in pair.source.fail("enough", pair.now)
    assert pair.source.connected(MAIN, "y", pair.now) == [Close("y")]
