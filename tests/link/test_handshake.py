"""Both sides of the handshake: every state and event, every deadline, refusals, and channels that do not belong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.link.test_messages import EXAMPLES
from tests.support.hosts import DESTINATION, GUEST
from tests.support.link_sides import (
    KEY,
    MAIN,
    Pair,
    S,
    as_control,
    in_state,
    terms,
    without_userfaultfd,
)
from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.link import states
from virtmig.link.frames import PREFACE
from virtmig.link.judge import Hosts
from virtmig.link.messages import (
    CONTROL,
    Agreement,
    AllOpen,
    Answer,
    Attached,
    Attachment,
    ChannelCount,
    ChannelName,
    Failed,
    Finished,
    Hello,
    Ping,
    Pong,
    Proposal,
    Reason,
    Refuse,
    Verdict,
)
from virtmig.link.side import Close, Dial, Established, Forget, Heard, Opened, Over, Send, Side
from virtmig.link.states import DEADLINE_S, FINAL, INITIATOR, RESPONDER, State
from virtmig.transitions import advance

# -- the whole of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"", KEY])
def test_a_whole_handshake(key: bytes) -> None:
    pair = Pair("parallel", parallel_connections=3, source={"key": key}, destination={"key": key}).begin()
    names = ["main", "parallel 0", "parallel 1", "parallel 2"]
    for side in (pair.source, pair.destination):
        assert side.state is S.ESTABLISHED
        assert [str(action.channel) for action in pair.of(side, Opened)] == names
        assert isinstance(pair.log[side][-1], Established)
    assert pair.source._proofs == pair.destination._proofs
    heard = [type(action.message).__name__ for action in pair.of(pair.source, Heard)]
    assert heard == ["Hello", "Answer", "Agreement"]
    agreement = pair.of(pair.source, Heard)[-1].message
    assert len(agreement.secret) == (0 if key else 32)
    wire = b"".join(action.frame for side in pair.log for action in pair.of(side, Send))
    assert not key or (key not in wire and pair.source._proofs.secret not in wire)


def test_running_finishing_and_forgetting() -> None:
    pair = Pair().begin().run()
    pair.carry(pair.source, pair.source.finish(pair.now))
    assert [side.state for side in (pair.source, pair.destination)] == [S.RUNNING] * 2
    assert pair.log[pair.destination][-1] == Heard(Finished())
    with pytest.raises(LocalProtocolError, match="already"):
        pair.source.finish(pair.now)
    pair.carry(pair.destination, pair.destination.finish(pair.now))
    for side in (pair.source, pair.destination):
        assert side.state is S.FINISHED
        assert pair.log[side][-1] == Over(S.FINISHED)
        assert side.expire(pair.now + DEADLINE_S[S.FINISHED]) == [Forget()]
        assert side.next_deadline() is None


@pytest.mark.parametrize("parallel", [1, 16])
def test_a_handshake_takes_three_round_trips_for_any_number_of_channels(parallel: int) -> None:
    pair = Pair("parallel", parallel_connections=parallel)
    flights, sides = 0, (pair.source, pair.destination)
    flying: list[tuple[Side, Send]] = [(pair.source, action) for action in pair.source.begin(pair.now)]  # type: ignore[misc]
    pair.carry = lambda side, actions: answered.append((side, actions))  # type: ignore[method-assign]
    while flying:
        flights += 1
        answered: list[tuple[Side, list[Any]]] = []
        for side, action in flying:
            pair.deliver(side, sides[side is pair.source], action)
        flying = []
        for side, actions in answered:
            for action in actions:
                if isinstance(action, Dial):
                    number = next(pair.number)
                    flying += [(side, send) for send in side.connected(action.channel, f"s{number}", pair.now)]  # type: ignore[attr-defined]
                elif isinstance(action, Send):
                    flying.append((side, action))
    assert flights == 6
    assert [side.state for side in sides] == [S.ESTABLISHED] * 2
    assert len(pair.source.channels) == 1 + parallel


def test_a_silent_session_that_is_done_mends_only_control() -> None:
    pair = Pair().begin().run()
    pair.source.finish(pair.now)
    actions = pair.source.expire(pair.now + DEADLINE_S[S.RUNNING])
    assert actions == [Close("s-control"), Close("s0"), Dial(CONTROL)]
    assert pair.source.broken == {CONTROL}


def test_a_refusal_of_what_is_no_longer_needed_does_not_matter() -> None:
    pair = Pair().begin().run()
    pair.source.lost("s0", pair.now)
    pair.source.connected(MAIN, "s1", pair.now)
    pair.source.finish(pair.now)
    assert pair.source.state is S.RUNNING
    refusal = as_control(Refuse(reasons=(Reason("channel", "gone"),)))
    assert pair.source.receive_on("s1", refusal, pair.now) == [Close("s1")]
    assert pair.source.state is S.RUNNING


def test_the_destination_hears_that_a_silent_connection_is_there_and_hears_it_again_after_a_break() -> None:
    pair = Pair().begin()
    pair.carry(pair.source, pair.source.attached(MAIN, pair.now))
    heard = [row.message for row in pair.of(pair.destination, Heard)]
    assert heard[-1] == Attached(role="main", index=0)
    assert pair.source.state is pair.destination.state is S.RUNNING
    with pytest.raises(LocalProtocolError, match="not agreed"):
        pair.source.attached(ChannelName("parallel", 3), pair.now)
    with pytest.raises(RemoteProtocolError, match="not agreed"):
        pair.destination.receive(as_control(Attached(role="parallel", index=3)), pair.now)
    pair.source.lost("s-control", pair.now)
    pair.source.attached(MAIN, pair.now)
    again = pair.source._mended(CONTROL, "s9", 0, pair.now)
    assert [row.message for row in again if isinstance(row, Send)] == [Attached(role="main", index=0)] * 2


def test_secrets_are_not_shown() -> None:
    pair = Pair().begin()
    secret = pair.source._proofs.secret
    assert len(secret) == 32
    for shown in (pair.log[pair.source], pair.log[pair.destination], pair.source._proofs):
        assert repr(secret)[2:-1] not in repr(shown)


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [INITIATOR, RESPONDER], ids=["initiator", "responder"])
def test_every_pair_that_is_not_in_a_table_is_refused_and_names_both(table: Any) -> None:
    for state in State:
        for event in (*states.EVENTS, "nonsense"):
            if (state, event) in table:
                assert advance(table, state, event) in State
            else:
                with pytest.raises(LocalProtocolError, match=f"{event!r} cannot happen in state '{state}'"):
                    advance(table, state, event)


@pytest.mark.parametrize("table", [INITIATOR, RESPONDER], ids=["initiator", "responder"])
def test_every_state_is_reached_has_a_deadline_and_can_be_left_or_is_final(table: Any) -> None:
    reached = {S.CONNECTED}
    for _ in State:
        reached |= {after for (before, _), after in table.items() if before in reached}
    assert reached == set(State) == set(DEADLINE_S)
    for state in State:
        after = {found for (before, _), found in table.items() if before is state}
        assert (after == {state}) == (state in FINAL)
        assert (state, "expired") in table


#: what the peer may say on control in each state, apart from Refuse and Failed
WELCOME = {
    "source": {S.HELLO: {Hello}, S.PROPOSED: {Answer}, S.OPENING: {AllOpen}},
    "destination": {S.CONNECTED: {Hello}, S.HELLO: {Proposal}},
}
ALIVE = {
    S.ESTABLISHED: {Ping},
    S.RUNNING: {Ping, Finished},
    S.RECONNECTING: {Ping, Finished},
    S.FINISHED: {Ping, Finished},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_every_message_in_every_state(side: str, state: State) -> None:
    welcome = WELCOME[side].get(state, set()) | ALIVE.get(state, set()) | {Failed}
    if (side, state) == ("source", S.OPENING):
        welcome.add(Ping)
    if side == "source" and state is not S.FINISHED:
        welcome.discard(Finished)  # only after its own
    if state in (S.CONNECTED, S.HELLO, S.PROPOSED, S.AGREED, S.OPENING):
        welcome.add(Refuse)
    for message in EXAMPLES:
        pair, found = in_state(side, state)
        if type(message).__name__ in ("Agreement", "AllOpen") and state in (S.AGREED, S.OPENING):
            continue  # these depend on what was said before: tested apart
        if state in (S.REFUSED, S.FAILED):
            assert found.receive(as_control(message), pair.now) == []
        elif type(message) in welcome:
            found.receive(as_control(message), pair.now)
        else:
            with pytest.raises(RemoteProtocolError) as broken:
                found.receive(as_control(message), pair.now)
            assert (broken.value.channel, broken.value.offset) == ("control", len(PREFACE))
            assert found.state is state


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_every_call_in_every_state(side: str, state: State) -> None:
    calls = {
        "run": {S.ESTABLISHED},
        "finish": {S.RUNNING, S.RECONNECTING},
        "refuse": {S.CONNECTED, S.HELLO, S.PROPOSED, S.AGREED, S.OPENING},
        "begin": {S.CONNECTED},
        "give_answer": {S.PROPOSED},
    }
    for name, possible in calls.items():
        pair, found = in_state(side, state)
        arguments = {
            "refuse": ([Reason("x", "no")],),
            "give_answer": (Answer(verdicts=(), channels=(ChannelCount("main", 1),)),),
        }
        call = getattr(found, name, None)
        if call is None:
            continue
        if state in possible:
            call(*arguments.get(name, ()), pair.now)
        else:
            with pytest.raises(LocalProtocolError):
                call(*arguments.get(name, ()), pair.now)
            assert found.state is state


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_failure_here_and_a_lost_control_connection_in_every_state(side: str, state: State) -> None:
    pair, found = in_state(side, state)
    actions = found.fail("the disk is full", pair.now, guest="source")
    if state in FINAL:
        assert actions == []
    else:
        assert found.state is S.FAILED
        assert isinstance(actions[0], Send)
        assert actions[0].message == Failed(reason="the disk is full", guest="source")
        assert actions[-1] == Over(S.FAILED, (Reason("", "the disk is full"),), "source")
    pair, found = in_state(side, state)
    found.lost(f"{side[0]}-control", pair.now)
    if state in FINAL:
        assert found.state is state
    else:
        assert found.state is (S.RECONNECTING if state in (S.RUNNING, S.RECONNECTING) else S.FAILED)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_the_deadline_of_every_state(side: str, state: State) -> None:
    pair, found = in_state(side, state)
    due = pair.now + DEADLINE_S[state]
    assert found.expire(pair.now) == []
    assert found._deadline == due
    actions = found.expire(due)
    if state in FINAL:
        assert actions == [Forget()]
        assert found.state is state
    elif state is S.RUNNING:
        assert found.state is S.RECONNECTING
        assert actions[:2] == [Close(f"{side[0]}-control"), Close(f"{side[0]}0")]
        assert actions[2:] == ([Dial(CONTROL), Dial(MAIN)] if side == "source" else [])
        assert found.broken == {CONTROL, MAIN}
    else:
        assert found.state is S.FAILED
        assert found.next_deadline() == due + DEADLINE_S[S.FAILED]
        [failed] = [action.message for action in actions if isinstance(action, Send)]
        assert f"{DEADLINE_S[state]:g} s" in failed.reason
        assert str(state) in failed.reason


def test_deadlines_can_be_set() -> None:
    pair = Pair(source={"deadline_s": {S.CONNECTED: 3}})
    assert pair.source.next_deadline() == pair.now + 3


# -- silence -------------------------------------------------------------------------------------------------------


def test_a_silent_peer_is_asked_and_then_taken_for_lost() -> None:
    pair = Pair().begin().run()
    pair.now = pair.source.next_deadline() or 0
    pair.carry(pair.source, pair.source.expire(pair.now))
    assert pair.of(pair.destination, Send)[-1].message == Pong(number=1)
    assert pair.source._deadline == pair.now + DEADLINE_S[S.RUNNING]
    for number in (2, 3, 4):
        pair.now = pair.source.next_deadline() or 0
        [ping] = pair.source.expire(pair.now)
        assert ping.message == Ping(number=number)
    pair.now = pair.source.next_deadline() or 0
    assert Dial(CONTROL) in pair.source.expire(pair.now)


def test_a_pong_that_nobody_asked_for_is_refused() -> None:
    pair = Pair().begin().run()
    for number in (0, 1):
        with pytest.raises(RemoteProtocolError, match=f"pong {number}"):
            pair.source.receive(as_control(Pong(number=number)), pair.now)


# -- refusals ------------------------------------------------------------------------------------------------------


def refused(pair: Pair) -> tuple[Reason, ...]:
    pair.begin()
    for side in (pair.source, pair.destination):
        assert side.state is S.REFUSED
        assert side.reasons
        assert pair.of(side, Over) == [Over(S.REFUSED, side.reasons)]
        assert not pair.of(side, Opened)
        assert not pair.of(side, Dial)
        assert side.expire(pair.now + DEADLINE_S[S.REFUSED]) == [Forget()]
    assert pair.source.reasons == pair.destination.reasons
    return pair.source.reasons


def test_ten_connections_asked_and_five_allowed_are_five_and_said_so() -> None:
    facts = msgspec.structs.replace(DESTINATION, parallel_connections_max=5)
    pair = Pair("parallel", parallel_connections=10, destination={"facts": facts}).begin()
    assert len(pair.source.channels) == 6
    [adjusted] = [row for row in pair.source.answer.verdicts if row.outcome == "adjusted"]
    assert (adjusted.feature, adjusted.asked, adjusted.given) == ("parallel-connections", "10", "5")
    assert "beryl allows 5" in adjusted.reason
    assert pair.source.answer.limits == {"parallel-connections": 5}
    assert Pair("parallel", threads=10, destination={"facts": facts}).begin().source.state is S.ESTABLISHED


@pytest.mark.parametrize(
    "how", [{"options": ("strict",)}, {"fixed": ("parallel-connections",)}, {"fixed": ("threads",)}]
)
def test_ten_connections_asked_and_five_allowed_are_refused_under_strict_or_when_fixed(how: Any) -> None:
    facts = msgspec.structs.replace(DESTINATION, parallel_connections_max=5)
    options = ("parallel", *how.get("options", ()))
    pair = Pair(*options, parallel_connections=10, destination={"facts": facts}, fixed=how.get("fixed", ()))
    [reason] = refused(pair)
    assert "beryl allows 5" in reason.reason
    assert "--parallel-connections 5" in reason.way_out


def test_postcopy_without_userfaultfd_is_refused_before_any_channel() -> None:
    [reason] = refused(Pair("postcopy", destination={"facts": without_userfaultfd()}))
    assert reason.feature == "postcopy"
    assert "uid 4242" in reason.reason
    assert "vm.unprivileged_userfaultfd=1" in reason.way_out


def test_a_request_that_cannot_be_read_is_refused() -> None:
    pair = Pair()
    pair.source._request["no-such-option"] = True
    [reason] = refused(pair)
    assert "no-such-option" in reason.reason


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 7), 3), ((2, 7), (1, 3), 3), ((1, 2), (3, 4), None), ((5, 5), (1, 4), None)],
)
def test_the_highest_common_version_or_a_refusal_that_names_both_ranges(ours: Any, theirs: Any, common: Any) -> None:
    pair = Pair(source={"versions": ours}, destination={"versions": theirs})
    if common:
        pair.begin()
        assert pair.source.proposal.version == pair.destination.proposal.version == common
        return
    [reason] = refused(pair)
    for low, high in (ours, theirs):
        assert f"{low} to {high}" in reason.reason


def test_a_mandatory_feature_that_nobody_knows_is_refused_by_name() -> None:
    [reason] = refused(Pair(source={"mandatory": ("teleport",)}))
    assert "'teleport'" in reason.reason
    [reason] = refused(Pair(destination={"mandatory": ("teleport",)}))
    assert "'teleport'" in reason.reason


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [(KEY, b"", "no pre-shared key"), (b"", KEY, "no pre-shared key"), (KEY, KEY[::-1], "did not prove")],
)
def test_both_must_have_the_key(one: bytes, other: bytes, words: str) -> None:
    [reason] = refused(Pair(source={"key": one}, destination={"key": other}))
    assert words in reason.reason


def test_a_source_without_the_key_cannot_propose() -> None:
    pair = Pair(source={"key": KEY}, destination={"key": KEY})
    [hello] = pair.source.begin(pair.now)
    pair.destination.receive(as_control(hello.message), pair.now)
    proposal = Proposal(version=1, request={}, guest=GUEST, window_bytes=1 << 20, proof=bytes(32))
    actions = pair.destination.receive(as_control(proposal), pair.now)
    assert pair.destination.state is S.REFUSED
    assert "did not prove" in actions[-1].reasons[0].reason


def test_a_hello_that_was_changed_on_the_way_breaks_the_proof() -> None:
    pair = Pair(source={"key": KEY}, destination={"key": KEY})
    [hello] = pair.source.begin(pair.now)
    changed = msgspec.structs.replace(hello.message, implementation="else")
    _, back = pair.destination.receive(as_control(changed), pair.now)
    pair.source.receive(as_control(back.message), pair.now)
    assert pair.source.state is S.REFUSED


def test_short_keys_are_not_taken() -> None:
    with pytest.raises(LocalProtocolError, match="a pre-shared key of 5 bytes"):
        Pair(source={"key": b"12345"})
    assert "key" not in repr(terms("source", key=KEY))


def accepting(**changes: Any) -> Any:
    """A judge that says yes and settles something else."""

    def judge(proposal: Proposal, hosts: Hosts) -> Answer:
        answer = Answer(verdicts=(), settled=proposal.request, channels=(ChannelCount("main", 1),))
        return msgspec.structs.replace(answer, **changes)

    return judge


@pytest.mark.parametrize(
    ("judge", "fixed", "words"),
    [
        (accepting(settled={}), (), "live was changed from True to None without a word"),
        (accepting(settled={"live": True, "tls": True}), (), "tls was changed from None to True"),
        (accepting(verdicts=(Verdict(feature="live", outcome="adjusted", reason=""),)), ("live",), "may not be"),
        (accepting(channels=(ChannelCount("main", 2),)), (), "no main channel"),
        (accepting(attachment=Attachment(uri="unix:///elsewhere")), (), "unix:///elsewhere is none of those offered"),
        (accepting(channels=(ChannelCount("main", 1), ChannelCount("main", 1))), (), "twice"),
    ],
)
def test_a_source_does_not_accept_what_was_not_said(judge: Any, fixed: Any, words: str) -> None:
    pair = Pair(judge=judge, fixed=fixed).begin()
    assert pair.source.state is pair.destination.state is S.REFUSED
    assert any(words in row.reason for row in pair.source.reasons)
    assert pair.destination.reasons == pair.source.reasons


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": (ChannelName("parallel"), ChannelName("main"))}, "not those of the answer"),
        ({"window_bytes": 1 << 30}, "more than was proposed"),
        ({"secret": bytes(5)}, "a secret of 5 bytes"),
    ],
)
def test_an_agreement_must_be_that_of_the_answer(change: Any, words: str) -> None:
    pair, source = in_state("source", S.AGREED)
    d = pair.destination
    message = Agreement(session=d.session, channels=d.channels, window_bytes=d.window_bytes, secret=bytes(32))
    with pytest.raises(RemoteProtocolError, match=words):
        source.receive(as_control(msgspec.structs.replace(message, **change)), pair.now)
    assert source.state is S.AGREED
    source.receive(as_control(message), pair.now)
    assert source.state is S.OPENING


def test_an_answer_that_no_session_can_come_of_is_our_own_error() -> None:
    pair, destination = in_state("destination", S.PROPOSED)
    with pytest.raises(LocalProtocolError, match="without a main channel"):
        destination.give_answer(Answer(verdicts=()), pair.now)  # type: ignore[attr-defined]


def test_a_proposal_of_another_version_than_the_common_one_is_refused() -> None:
    pair, destination = in_state("destination", S.HELLO)
    proposal = as_control(Proposal(version=2, request={}, guest=GUEST, window_bytes=1 << 20))
    with pytest.raises(RemoteProtocolError, match="version 2"):
        destination.receive(proposal, pair.now)
    assert destination.state is S.HELLO
