"""Places for strangers: how many, who has to go, and what the log has of it."""

from __future__ import annotations

from typing import Any

from virtmig.agent.greetings import LOGGED_MOST, LOGGED_WINDOW_S, Greetings, Refusals


def test_a_crowd_crowds_out_itself() -> None:
    gone: list[str] = []
    greetings = Greetings(4)
    first = greetings.admit("192.0.2.9", lambda: gone.append("the only one of its address"))
    crowd = [greetings.admit("192.0.2.1", lambda number=number: gone.append(f"crowd {number}")) for number in range(6)]
    assert gone == ["crowd 0", "crowd 1", "crowd 2"]
    assert len(greetings) == 4
    assert crowd[0].given_up == "more than 4 connections wait to be greeted, 4 of them from 192.0.2.1"
    assert first.given_up == crowd[5].given_up == ""
    for each in (first, *crowd, *crowd):
        each.done()
    assert len(greetings) == 0


def test_who_takes_it_over_is_told() -> None:
    gone: list[str] = []
    greetings = Greetings(1)
    first = greetings.admit("a", lambda: gone.append("connection"))
    first.give_up = lambda: gone.append("session")
    greetings.admit("a", lambda: gone.append("another"))
    assert gone == ["session"]


def test_a_flood_is_counted(logs: list[Any]) -> None:
    now = [100.0]
    refusals = Refusals(clock=lambda: now[0])
    for number in range(LOGGED_MOST + 30):
        refusals.say("192.0.2.1", f"192.0.2.1:{number}", "it says nothing")
    refusals.say("192.0.2.9", "192.0.2.9:1", "not a link", "a hint")
    assert len(logs) == LOGGED_MOST + 1
    assert logs[-1] == {"event": "refused", "log_level": "warning", "peer": "192.0.2.9:1", "reason": "not a link",
                        "hint": "a hint"}  # fmt: skip
    now[0] += LOGGED_WINDOW_S + 1
    refusals.say("192.0.2.1", "192.0.2.1:99", "it says nothing")
    assert (logs[-2]["source"], logs[-2]["connections"]) == ("192.0.2.1", 30)
    assert logs[-1]["peer"] == "192.0.2.1:99"
    refusals.close()
    assert len(logs) == LOGGED_MOST + 3
