"""What is done to a migration: to which one, when it is too late, and one that was let go of in postcopy."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import pytest

from tests.report.test_records import curve, outcome, recorded
from tests.support.lab import eventually
from virtmig.integrations.api import actions
from virtmig.integrations.api.actions import Limits, abort, look, recover, set_limits, start_postcopy
from virtmig.integrations.api.history import Head, History, Looked, Looks, _Look
from virtmig.integrations.api.jobs import Jobs
from virtmig.integrations.api.migrations import Migration, Migrations, NotNow, shown
from virtmig.integrations.metrics import Metrics
from virtmig.progress import Phase, Status, Whereabouts
from virtmig.report.records import read_record
from virtmig.virt.connection import connected

IN_POSTCOPY = msgspec.structs.replace(curve(1)[0], phase=Phase.POSTCOPY)


def test_a_detached_postcopy_goes_on_until_the_hosts_say_its_end(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, "postcopy", samples=[IN_POSTCOPY])
    recorder.finish(outcome(status=Status.DETACHED, guest=Whereabouts.SPLIT, sentence="split", hint="watch it"))
    said = [
        None,
        Looked(guest=Whereabouts.SPLIT, sentence="it moves", goes_on=True),
        Looked(guest=Whereabouts.SPLIT, sentence="split"),
        Looked(guest=Whereabouts.UNKNOWN, sentence="not certain"),
        Looked(guest=Whereabouts.DESTINATION, sentence="opal now runs on beryl"),
    ]
    looks = Looks(lambda _head: said[0])
    history = History(tmp_path, looks=looks)
    migrations = Migrations(Jobs(tmp_path), history)
    metrics = Metrics(history)

    def asked() -> Migration:
        """What is shown after the hosts were asked once more."""
        known = looks._known.setdefault(recorder.id, _Look())
        known.due, known.looked = 0.0, None
        known.came.clear()
        found = shown(migrations.find(recorder.id))
        said.pop(0)
        return found

    def succeeded() -> bool:
        return b"virtmig_migration_succeeded{" in metrics.exposition()

    for running, status, ending in (
        (True, "post-migrating", "detached"),
        (True, "post-migrating", "detached"),
        (False, "error", "postcopy-interrupted"),
        (False, "error", "detached"),
    ):
        found = asked()
        assert (found.running, found.status, found.ending) == (running, status, ending)
    assert not succeeded()
    with pytest.raises(NotNow, match="it has ended: detached"):
        abort(migrations.find(recorder.id), migrations)
    found = asked()
    assert (found.running, found.status, found.guest) == (False, "completed", Whereabouts.DESTINATION)
    assert (found.sentence, found.hint) == ("opal now runs on beryl", None)
    assert succeeded()
    record = read_record(recorder.path)
    assert (record.status, record.outcome.downtime_ms) == ("completed", 20)
    assert shown(Migrations(Jobs(tmp_path), History(tmp_path)).find(recorder.id)).status == "completed"


def test_hosts_are_asked_what_became_of_it(tmp_path: Path) -> None:
    """libvirt's test driver on both ends: the guest runs on "both", and a host that is not there has not answered."""
    with connected("test:///default") as connection:
        uuid = connection.lookupByName("test").UUIDString()
    began = History(tmp_path).head(recorded(tmp_path, "postcopy", samples=[]).id).began
    test = msgspec.structs.replace(began.source_facts, uri="test:///default")
    began = msgspec.structs.replace(
        began, source_facts=test, guest=msgspec.structs.replace(began.guest, uuid=uuid),
        request={**began.request, "desturi": "test:///default"},
    )  # fmt: skip
    both = look(Head(began=began, path=tmp_path))
    assert (both.guest, both.status, both.goes_on) == (Whereabouts.DOUBLED, Status.FAILED, False), both.sentence
    assert "runs on both amber and beryl" in both.sentence
    began.request["desturi"] = "no+such:///driver"
    assert look(Head(began=began, path=tmp_path)).guest is Whereabouts.UNKNOWN
    assert look(Head(began=msgspec.structs.replace(began, guest=None), path=tmp_path)) is None


def test_only_the_latest_running_one_of_a_guest_is_acted_on(tmp_path: Path) -> None:
    first = recorded(tmp_path, "postcopy", samples=curve(2))
    later = recorded(tmp_path, "postcopy", samples=curve(2))
    stale, real = sorted((first.id, later.id))
    migrations = Migrations(Jobs(tmp_path), History(tmp_path))
    for act in (abort, start_postcopy, partial(set_limits, limits=Limits(bandwidth=3))):
        with pytest.raises(NotNow, match=f"a later migration of opal runs, {real}"):
            act(migrations.find(stale), migrations=migrations)
    assert migrations.newer(migrations.find(real)) is None


def test_a_downtime_limit_comes_too_late_in_postcopy(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, "postcopy", samples=[IN_POSTCOPY])
    migrations = Migrations(Jobs(tmp_path), History(tmp_path))
    with pytest.raises(NotNow, match="its downtime is over"):
        set_limits(migrations.find(recorder.id), Limits(max_downtime=700, bandwidth=1), migrations)


def test_a_detached_postcopy_is_recovered_only_when_the_source_says_that_it_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = recorded(tmp_path, "postcopy", samples=[IN_POSTCOPY])
    recorder.finish(outcome(status=Status.DETACHED, guest=Whereabouts.SPLIT))
    jobs = Jobs(tmp_path, command=("/bin/true",))
    migrations = Migrations(jobs, History(tmp_path))
    for looked, words in (
        (None, "the hosts cannot be asked"),
        (Looked(guest=Whereabouts.UNKNOWN, sentence="amber did not answer"), "amber did not answer"),
        (Looked(guest=Whereabouts.DESTINATION, sentence="opal now runs on beryl"), "opal now runs on beryl; only"),
        (Looked(guest=Whereabouts.SPLIT, sentence="", goes_on=True), "goes on by itself"),
    ):
        monkeypatch.setattr(actions, "look", lambda _head, looked=looked: looked)
        with pytest.raises(NotNow, match=words):
            recover(migrations.find(recorder.id), migrations)
    assert jobs.all() == []
    monkeypatch.setattr(actions, "look", lambda _head: Looked(guest=Whereabouts.SPLIT, sentence=""))
    job, fresh = recover(migrations.find(recorder.id), migrations)
    assert (fresh, job.ticket.of) == (True, recorder.id)
    eventually(lambda: jobs.now(job).exit_code == 0, "its end")
