"""Where the guest is: every pair of answers, and the sentences people read."""

from __future__ import annotations

from itertools import product

import pytest

from virtmig.progress import Whereabouts
from virtmig.whereabouts import TABLE, HostAnswer, Presence, judge, sentence

SOURCE, DESTINATION, UNKNOWN = Whereabouts.SOURCE, Whereabouts.DESTINATION, Whereabouts.UNKNOWN
GONE = (Presence.ABSENT, Presence.SHUT_OFF)


def answers(source: Presence, destination: Presence) -> tuple[HostAnswer, HostAnswer]:
    return HostAnswer("host-a", source), HostAnswer("host-b", destination)


@pytest.mark.parametrize(
    ("source", "destination", "place"),
    [
        ("running", "absent", "source"),
        ("running", "incoming", "source"),
        ("running", "paused", "source"),
        ("running", "running", "doubled"),
        ("running", "postcopy", "doubled"),
        ("running", "no answer", "unknown"),
        ("paused", "absent", "source"),
        ("leaving", "absent", "source"),
        ("leaving", "incoming", "source"),
        ("leaving", "running", "destination"),
        ("leaving", "paused", "unknown"),
        ("leaving", "no answer", "unknown"),
        ("absent", "running", "destination"),
        ("shut off", "running", "destination"),
        ("absent", "paused", "destination"),
        ("absent", "absent", "neither"),
        ("shut off", "absent", "neither"),
        ("absent", "no answer", "unknown"),
        ("postcopy", "postcopy", "split"),
        ("postcopy failed", "postcopy failed", "split"),
        ("postcopy failed", "absent", "lost"),
        ("absent", "postcopy failed", "lost"),
        ("no answer", "running", "unknown"),
        ("no answer", "no answer", "unknown"),
    ],
)
def test_each_pair(source: str, destination: str, place: str) -> None:
    assert judge(*answers(Presence(source), Presence(destination))) == place


def test_a_pair_outside_the_table_is_unknown_never_a_guess() -> None:
    for pair in product(Presence, Presence):
        if pair not in TABLE:
            assert judge(*answers(*pair)) is UNKNOWN


def test_silence_is_never_a_no() -> None:
    """Without the call's success, a silent destination is never taken for an empty one, nor the source for gone."""
    for other in Presence:
        assert judge(*answers(other, Presence.NO_ANSWER)) in (UNKNOWN, Whereabouts.SPLIT)
        assert judge(*answers(Presence.NO_ANSWER, other)) in (UNKNOWN, Whereabouts.SPLIT)


def test_the_source_is_named_only_when_it_has_the_guest_and_the_destination_does_not_run_it() -> None:
    running = {Presence.RUNNING, Presence.POSTCOPY, Presence.POSTCOPY_FAILED, Presence.NO_ANSWER}
    for (source, destination), place in TABLE.items():
        if place is SOURCE:
            assert source not in GONE
            assert destination not in running
        if place is DESTINATION:
            assert source is not Presence.RUNNING


def test_success_of_the_call_settles_a_silent_destination() -> None:
    pair = answers(Presence.ABSENT, Presence.NO_ANSWER)
    assert judge(*pair) is UNKNOWN
    assert judge(*pair, call_succeeded=True) is DESTINATION


def test_success_of_the_call_never_hides_two_running_copies() -> None:
    assert judge(*answers(Presence.RUNNING, Presence.RUNNING), call_succeeded=True) is Whereabouts.DOUBLED


@pytest.mark.parametrize(
    ("source", "destination", "words"),
    [
        ("running", "absent", "web still runs on host-a, unchanged"),
        ("paused", "absent", "web is still on host-a, paused"),
        ("absent", "running", "web now runs on host-b"),
        ("absent", "paused", "web is now on host-b, paused"),
        ("running", "running", "DANGER: web runs on both host-a and host-b"),
        ("absent", "absent", "web runs on neither host-a nor host-b"),
        ("postcopy", "postcopy", "web runs on host-b, part of its memory is still on host-a"),
        ("running", "no answer", "where web runs is not certain: host-a says running; host-b did not answer"),
    ],
)
def test_sentences(source: str, destination: str, words: str) -> None:
    pair = answers(Presence(source), Presence(destination))
    assert sentence("web", judge(*pair), *pair) == words


def test_every_whereabouts_has_a_sentence_that_names_the_guest() -> None:
    for pair in product(Presence, Presence):
        both = answers(*pair)
        assert "web" in sentence("web", judge(*both), *both)
