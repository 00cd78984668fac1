"""A plan on paper says everything that is in it, on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import io
import json

import pytest

from tests.support.hosts import LOCAL_DISK, ask, plan
from virtmig.agreement import Plan
from virtmig.cli.plan_view import plan_json, plan_lines, print_plan
from virtmig.facts import version


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def rich_plan() -> Plan:
    """A plan with something in every section."""
    return plan(
        ask("live", "postcopy", "p2p", threads=11, max_downtime=70),
        both={"qemu_version": version(7, 2), "libvirt_version": version(9)},
        destination={"parallel_connections_max": 6, "free_memory_bytes": 1},
        guest={"disks": (LOCAL_DISK,), "persistent": True},
    )


def sentences(found: Plan) -> list[str]:
    return [
        *(choice.reason for choice in found.choices),
        *(choice.evidence for choice in found.choices),
        *(item.reason for item in found.refusals),
        *(item.way_out for item in found.refusals),
        *(item.reason for item in found.adjustments),
        *(item.option for item in found.suggestions),
        *(item.reason for item in found.suggestions),
        *(item.text for item in found.warnings),
        *(item.text for item in found.notes),
        found.virsh_line,
    ]


def test_the_fixture_has_something_to_say_everywhere(rich_plan: Plan) -> None:
    for part in ("refusals", "adjustments", "suggestions", "warnings", "notes", "channels", "beyond_virsh"):
        assert getattr(rich_plan, part), part


def test_plain_text_leaves_nothing_out(rich_plan: Plan) -> None:
    text = "\n".join(plan_lines(rich_plan))
    for sentence in sentences(rich_plan):
        assert sentence in text
    assert "REFUSED" in text
    assert "parallel x 6" in text
    assert "--max-downtime" in text


def test_a_pipe_gets_plain_text(rich_plan: Plan) -> None:
    stream = io.StringIO()
    print_plan(rich_plan, stream=stream)
    assert stream.getvalue() == "\n".join(plan_lines(rich_plan)) + "\n"


@pytest.mark.parametrize("columns", ["72", "100", "200"])
def test_a_terminal_gets_the_same_words(rich_plan: Plan, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    print_plan(rich_plan, stream=stream)
    words = stream.getvalue().split()
    for item in rich_plan.refusals:
        assert set(f"{item.reason} {item.way_out}".split()) <= set(words)
    assert rich_plan.virsh_line in stream.getvalue()  # in one line, to be copied
    assert all(choice.feature in words for choice in rich_plan.choices)


def test_the_virsh_line_says_c_as_the_person_did(rich_plan: Plan) -> None:
    text = "\n".join(plan_lines(rich_plan, connect="qemu:///system"))
    assert "virsh -c qemu:///system migrate opal qemu+ssh://beryl/system --live" in text


def test_brackets_in_a_reason_are_not_taken_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    print_plan(plan(ask("live"), guest={"blockers": ("device [red]x[/red] [/bold]",)}), stream=stream)
    assert "[red]x[/red]" in stream.getvalue()


def test_json_is_one_line_with_all_of_it(rich_plan: Plan) -> None:
    text = plan_json(rich_plan)
    assert "\n" not in text
    found = json.loads(text)
    assert found["refused"] is True
    assert [item["reason"] for item in found["refusals"]] == [item.reason for item in rich_plan.refusals]
    assert found["values"]["parallel-connections"] == 6
    assert json.loads(plan_json(plan(ask("live"))))["refused"] is False
