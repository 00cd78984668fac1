"""What ends a migration without an outcome: the record says why, and where the guest was. libvirt's test driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import DESTINATION, GUEST, SOURCE, ask, plan
from virtmig.attempts import StopRequest
from virtmig.ends import Ends
from virtmig.errors import ChannelError, PlanRefused
from virtmig.fitting import Fitted
from virtmig.migrate import _recorded_failures, _Run
from virtmig.progress import Status, Whereabouts
from virtmig.report.recorder import Recorder
from virtmig.report.records import Record, find_record
from virtmig.virt.hosts import Host
from virtmig.watchers import Silent


@pytest.fixture
def ends() -> Iterator[Ends]:
    source, destination = Host("test:///default"), Host("test:///default")
    domain = source.connection.lookupByName("test")
    yield Ends(source, destination, domain, domain.UUIDString(), "test", SOURCE, DESTINATION, GUEST)
    source.close()
    destination.close()


def attempt(ends: Ends, folder: Path, *options: str, raising: BaseException | None = None, begun: bool = False,
            **values: Any) -> Record:  # fmt: skip
    """One that is refused by an agent that is not there, or that raises what is given; its record."""
    request = ask(*options, **values)
    recorder = Recorder(folder)
    recorder.begin(request, plan(request))
    run = _Run(ends, plan(request), Silent(), StopRequest(), Fitted(), recorder)
    run.begun = begun

    def fail() -> None:
        if raising is not None:
            raise raising
        run._shake_hands()

    with pytest.raises(ChannelError if raising is None else type(raising)), _recorded_failures(recorder, run):
        fail()
    return find_record("last", folder)


def test_an_agent_that_is_not_there(ends: Ends, tmp_path: Path) -> None:
    record = attempt(ends, tmp_path, "live", transport="relay", agent=f"unix:{tmp_path}/nobody",
                     destination_agent="tcp:192.0.2.1:1")  # fmt: skip
    assert record.outcome is not None
    assert record.status == "failed"
    assert record.outcome.guest is Whereabouts.SOURCE
    assert "nobody" in record.outcome.error
    assert record.outcome.sentence == "nothing was started; test is where it was"
    assert not record.outcome.started
    assert record.outcome.report_id == record.id


def test_a_refusal_after_the_plan(ends: Ends, tmp_path: Path) -> None:
    record = attempt(ends, tmp_path, "live", raising=PlanRefused([("multifd", "too old", "upgrade")]))
    assert record.status == "refused"
    assert record.refusals == (("multifd", "too old", "upgrade"),)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_a_bug_says_its_type_and_where_the_guest_may_be(ends: Ends, tmp_path: Path, error: BaseException) -> None:
    before = attempt(ends, tmp_path, "live", raising=error)
    during = attempt(ends, tmp_path / "x", "live", raising=error, begun=True)
    split = attempt(ends, tmp_path / "y", "live", "postcopy", "postcopy-resume", raising=error)
    outcomes = [record.outcome for record in (before, during, split) if record.outcome is not None]
    assert [outcome.guest for outcome in outcomes] == [Whereabouts.SOURCE, Whereabouts.UNKNOWN, Whereabouts.SPLIT]
    assert all(outcome.error.startswith(type(error).__name__) for outcome in outcomes)
    assert {outcome.status for outcome in outcomes} == {Status.FAILED}
    assert "may go on without virtmig" in outcomes[1].sentence
    assert "domstate" in outcomes[1].hint
    assert "--postcopy-resume" in outcomes[2].hint
