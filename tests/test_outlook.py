"""The rate of a path, as past migrations reached it: of the same way first, and why it is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.hosts import DESTINATION, GUEST, SOURCE, ask, plan
from virtmig.agreement import Plan
from virtmig.forecast import Forecast
from virtmig.outlook import outlook, path_rate
from virtmig.progress import Phase, Progress
from virtmig.report.recorder import Recorder
from virtmig.report.records import Record, all_records
from virtmig.virt.dirty_rate import DirtyRate

MIB = 1 << 20


def past(folder: Path, planned: Plan, mib_per_s: int) -> None:
    recorder = Recorder(folder)
    recorder.begin(planned.request, planned, source=SOURCE, destination=DESTINATION, guest=GUEST)
    progress = Progress(elapsed_s=1.0, phase=Phase.PRECOPY, memory_bytes_per_s=mib_per_s * MIB)
    recorder.sample(progress, Forecast(converging=None, sentence=""))
    recorder.flush(5.0)


def records(folder: Path) -> list[Record]:
    return all_records(folder)


def test_the_same_way_counts_before_others(tmp_path: Path) -> None:
    one, four = plan(ask("live")), plan(ask("live", "parallel", parallel_connections=4))
    assert path_rate(one, []) == (None, "no migration between these hosts is known")
    past(tmp_path, four, 900)
    assert path_rate(one, records(tmp_path)) == (
        900 * MIB, "as one migration between these hosts reached in another way (transport, connections)",
    )  # fmt: skip
    past(tmp_path, one, 300)
    past(tmp_path, one, 320)
    assert path_rate(one, records(tmp_path)) == (310 * MIB, "as 2 migrations between these hosts reached")
    assert path_rate(four, records(tmp_path)) == (900 * MIB, "as one migration between these hosts reached")
    relayed = msgspec.structs.replace(one, transport="relay")
    assert "in another way" in path_rate(relayed, records(tmp_path))[1]


def test_a_limit_bounds_what_was_reached(tmp_path: Path) -> None:
    past(tmp_path, plan(ask("live")), 300)
    assert path_rate(plan(ask("live", bandwidth=100)), records(tmp_path)) == (100 * MIB, "--bandwidth 100")
    assert path_rate(plan(ask("live", bandwidth=500)), records(tmp_path))[0] == 300 * MIB
    assert path_rate(plan(ask("live", bandwidth=500)), []) == (500 * MIB, "--bandwidth 500")


def test_a_path_nobody_knows_is_said_and_what_the_guest_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIRTMIG_RECORDS", str(tmp_path))

    def measured(_connection: Any, _domain: Any) -> DirtyRate | None:
        return rate

    monkeypatch.setattr("virtmig.outlook.dirty_rate", measured)
    rate: DirtyRate | None = DirtyRate(8.0 * MIB, 2.0 * MIB)
    told = outlook(None, None, plan(ask("live")), GUEST)
    assert told is not None
    assert told.estimate is None
    assert told.words == (
        "cannot be told: no migration between these hosts is known "
        "(the guest writes about 8.00 MiB/s (4 of the sampled pages))"
    )
    assert told.advice.startswith("--bandwidth")
    found = outlook(None, None, plan(ask("live", bandwidth=100)), GUEST)
    assert found is not None
    assert found.estimate is not None
    assert found.words == found.estimate.sentence
    rate = None
    assert "does not tell how fast" in str(outlook(None, None, plan(ask("live", bandwidth=100)), GUEST))
    assert outlook(None, None, plan(ask("live")), msgspec.structs.replace(GUEST, state="shut off")) is None
