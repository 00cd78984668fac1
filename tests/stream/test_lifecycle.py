import re

import pytest

from virtmig.errors import LocalProtocolError
from virtmig.stream.lifecycle import (
    FINAL,
    POSTCOPY_INCOMING,
    SPLIT,
    TABLES,
    PostcopyState,
    Side,
    Status,
    Track,
    differences,
    mermaid,
    status,
)
from virtmig.stream.wire import Dialect
from virtmig.transitions import advance

Q7, Q10, Q11 = Dialect.QEMU_7_2, Dialect.QEMU_10_0, Dialect.QEMU_11_1
SRC, DST = Side.SOURCE, Side.DESTINATION

# what query-migrate of those QEMUs showed, or their sources say: one migration a row
STORIES = [
    (Q7, SRC, "setup active completed"),
    (Q7, SRC, "setup active pre-switchover device completed"),
    (Q7, SRC, "setup active postcopy-active completed"),
    (Q7, SRC, "setup active postcopy-active postcopy-paused postcopy-recover postcopy-active completed"),
    (Q7, SRC, "setup active postcopy-active cancelling cancelled"),
    (Q7, SRC, "setup active failed"),
    (Q7, DST, "setup active postcopy-active postcopy-paused postcopy-recover postcopy-active completed"),
    (Q10, SRC, "setup active device completed"),
    (Q10, SRC, "setup wait-unplug active pre-switchover device completed"),
    (Q10, SRC, "setup active device postcopy-active completed"),
    (Q10, SRC, "setup active device postcopy-active postcopy-paused postcopy-recover-setup postcopy-recover "
               "postcopy-active completed"),
    (Q10, SRC, "setup active cancelling cancelled setup active device completed"),
    (Q11, SRC, "setup active device postcopy-device postcopy-active completed"),
    (Q11, SRC, "setup active device postcopy-device failing failed"),
    (Q11, SRC, "setup active failing failed setup active device completed"),
    (Q11, SRC, "setup active device postcopy-device postcopy-active postcopy-paused postcopy-recover-setup "
               "postcopy-paused postcopy-recover-setup postcopy-recover postcopy-active completed"),
    (Q11, DST, "setup active postcopy-device postcopy-active completed"),
    (Q11, DST, "setup active failed setup active completed"),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "side", "story"), STORIES)
def test_stories_are_expected_step_by_step(dialect, side, story):
    track = Track(dialect, side)
    for word in story.split():
        seen = track.observe(word)
        assert seen.expected, seen.reason
        assert seen.skipped == ()
        assert track.observe(word) is None
    assert track.surprises == []


@pytest.mark.parametrize(
    ("dialect", "story"),
    [
        (Q7, "setup active device postcopy-active"),
        (Q10, "setup active postcopy-device"),
        (Q7, "setup active postcopy-active postcopy-paused postcopy-recover-setup"),
        (Q11, "setup active device postcopy-device postcopy-active cancelling"),
        (Q10, "setup active failing"),
        (Q10, "setup active setup"),
    ],
)
def test_what_that_age_does_not_do_is_a_surprise_and_no_failure(dialect, story):
    track = Track(dialect, SRC)
    words = story.split()
    for word in words[:-1]:
        assert track.observe(word).expected
    seen = track.observe(words[-1])
    assert (seen.known, seen.expected) == (True, False)
    assert "does not follow" in seen.reason
    assert track.state == words[-1]
    assert track.surprises == [seen]


def test_a_poll_may_miss_short_states():
    track = Track(Q11, SRC)
    assert track.observe("active").skipped == ("setup",)
    seen = track.observe("postcopy-active")
    assert seen.skipped == ("device", "postcopy-device")
    assert "over device, postcopy-device" in seen.reason
    assert track.surprises == []


def test_states_of_a_newer_qemu_are_recorded_and_passed():
    track = Track(Q11, SRC, "active")
    seen = track.observe("quantum-switchover")
    assert (seen.state, seen.known, seen.expected) == ("quantum-switchover", False, False)
    assert track.state == "quantum-switchover"
    assert track.observe("completed").expected
    assert [observation.state for observation in track.surprises] == ["quantum-switchover"]
    assert status("quantum-switchover") == "quantum-switchover"
    assert status("failing") is Status.FAILING


def test_advance_refuses_by_name_and_says_what_could_be():
    table = TABLES[Q10, SRC]
    assert advance(table, Status.ACTIVE, "switchover") is Status.DEVICE
    with pytest.raises(LocalProtocolError, match="'package loaded' cannot happen in state 'device'") as caught:
        advance(table, Status.DEVICE, "package loaded")
    assert "start postcopy" in caught.value.hint
    with pytest.raises(LocalProtocolError, match="nowhere"):
        advance(table, "nowhere", "migrate")


def test_a_postcopy_without_a_discard_cannot_run():
    state = PostcopyState.NONE
    for event in ("advise", "discard", "discard", "listen", "run", "end", "cleaned up"):
        state = advance(POSTCOPY_INCOMING, state, event)
    assert state is PostcopyState.NONE
    state = advance(POSTCOPY_INCOMING, advance(POSTCOPY_INCOMING, state, "advise"), "listen")
    assert state is PostcopyState.DISCARD
    with pytest.raises(LocalProtocolError, match="'run' cannot happen in state 'discard'"):
        advance(POSTCOPY_INCOMING, state, "run")


@pytest.mark.parametrize(
    ("state", "event"),
    [
        ("none", "discard"),
        ("none", "listen"),
        ("listening", "advise"),
        ("listening", "discard"),
        ("running", "run"),
        ("advise", "run"),
    ],
)
def test_commands_in_the_wrong_state(state, event):
    with pytest.raises(LocalProtocolError, match="cannot happen"):
        advance(POSTCOPY_INCOMING, state, event)


@pytest.mark.parametrize("key", list(TABLES))
def test_every_state_of_a_table_can_be_reached_and_left_for_an_end(key):
    table = TABLES[key]
    reached = {Status.NONE}
    while more := {after for (before, _), after in table.items() if before in reached} - reached:
        reached |= more
    states = {state for (before, _), after in table.items() for state in (before, after)}
    assert states == reached | ({Status.CANCELLED} & states)
    ending = set(FINAL)
    while more := {before for (before, _), after in table.items() if after in ending} - ending:
        ending |= more
    assert states <= ending


def test_nothing_returns_from_a_split_guest_but_by_an_error_or_an_old_cancel():
    for (dialect, side), table in TABLES.items():
        for (before, event), after in table.items():
            if before in SPLIT and after not in SPLIT and after is not Status.COMPLETED:
                assert event == "error" or (dialect is Q7 and event == "cancel"), (dialect, side, before, event)


def test_states_that_came_later_are_not_in_older_tables():
    def states(dialect):
        return {s for side in Side for (b, _), a in TABLES[dialect, side].items() for s in (b, a)}

    assert states(Q10) - states(Q7) == {Status.POSTCOPY_RECOVER_SETUP}
    assert states(Q11) - states(Q10) == {Status.POSTCOPY_DEVICE, Status.FAILING}
    assert states(Q11) == set(Status)


@pytest.mark.parametrize("table", [*TABLES.values(), POSTCOPY_INCOMING])
def test_the_diagram_shows_every_transition_and_is_always_the_same(table):
    text = mermaid(table, "a title")
    assert text == mermaid(dict(table), "a title")
    assert text.startswith("---\ntitle: a title\n---\nstateDiagram-v2\n")
    drawn = {
        (before.replace("_", "-"), event, after.replace("_", "-"))
        for before, after, events in re.findall(r"^    (\w+) --> (\w+): (.+)$", text, re.M)
        for event in events.split(" / ")
    }
    assert drawn == {(str(before), event, str(after)) for (before, event), after in table.items()}
    names = set(re.findall(r"\w+", re.sub(r'"[^"]*"|:.*', "", text)))
    for named in re.findall(r'state "([^"]+)" as (\w+)', text):
        assert named[0].replace("-", "_") == named[1]
        assert named[1] in names


def test_differences_between_ages():
    lines = differences(TABLES[Q10, SRC], TABLES[Q11, SRC])
    assert "device --start postcopy--> postcopy-active, now postcopy-device" in lines
    assert "postcopy-device --package loaded--> nothing, now postcopy-active" in lines
    assert differences(TABLES[Q7, DST], TABLES[Q10, DST]) == ()
