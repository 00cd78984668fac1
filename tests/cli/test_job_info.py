"""`domjobinfo` prints what virsh prints; the live comparison with a real virsh is in tests/live."""

from __future__ import annotations

import pytest

from virtmig.cli.job_info import capacity, lines, raw_lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000 B"), (1023, "1023.000 B"), (1024, "1.000 KiB"), (268_969_984, "256.510 MiB"), (5 << 40, "5.000 TiB")],
)
def test_capacity(value: int, text: str) -> None:
    assert capacity(value) == text


def test_no_job() -> None:
    assert lines({"type": 0}) == ["Job type:         None        "]


def test_cancelled_shows_only_what_it_was_unless_asked() -> None:
    stats = {"type": 5, "operation": 5, "time_elapsed": 7, "errmsg": "told to"}
    assert lines(stats) == ["Job type:         Cancelled   ", "Operation:        Outgoing migration"]
    assert lines(stats, any_stats=True)[-1] == "Error message:    told to"


def test_running_and_completed_downtime_have_different_names() -> None:
    stats = {"type": 2, "operation": 5, "time_elapsed": 7, "downtime": 31}
    assert "Expected downtime: 31           ms" in lines(stats)
    assert "Total downtime:   31           ms" in lines({**stats, "type": 3}, completed=True)


def test_raw() -> None:
    assert raw_lines({"type": 2, "b": 1, "a": True}) == ["Job type: 2", "", "b: 1", "a: 1"]
