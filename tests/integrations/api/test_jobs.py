"""A ticket before a process: a retried request never starts a second migration, whatever was killed in between."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.test_records import curve, outcome, recorded
from tests.support.lab import eventually
from virtmig.integrations.api.actions import recover
from virtmig.integrations.api.history import History
from virtmig.integrations.api.jobs import Job, Jobs, KeyConflict, NotKept
from virtmig.integrations.api.migrations import Migrations, NotNow, shown
from virtmig.integrations.metrics import Metrics
from virtmig.progress import Status, Whereabouts
from virtmig.request import MigrationRequest

REQUEST = MigrationRequest({"domain": "opal", "desturi": "test:///beryl", "live": True})


def starts(folder: Path) -> int:
    path = folder / "started"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Its command leaves a line in `started` each time, and stays until it is told to go."""
    hold = f"{tmp_path}/hold.$$"
    script = f"trap 'echo error: told; kill $!; exit 1' TERM; mkfifo {hold}; cat {hold} & "
    script += f"echo $$ >> {tmp_path}/started; wait"
    made = Jobs(tmp_path / "records", command=("/bin/sh", "-c", script))
    yield made
    for job in made.all():
        started = eventually(lambda job=job: (now := made.now(job)).pid and now, "its pid, written as it starts")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(started.pid), signal.SIGKILL)


def until_up(jobs: Jobs, job: Job) -> Job:
    return eventually(lambda: (now := jobs.now(job)).pid and now.running and now, "its process")


def test_one_key_is_one_process_however_many_ask_at_once(jobs: Jobs, tmp_path: Path) -> None:
    others = [Jobs(jobs.records, command=jobs.command) for _ in range(3)]
    answers: list[tuple[Job, bool]] = []

    def ask(who: Jobs) -> None:
        answers.append(who.start(REQUEST, key="k", body=b"b"))

    threads = [threading.Thread(target=ask, args=(who,)) for who in [jobs, *others] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({job.ticket.id for job, _ in answers}) == 1
    assert [fresh for _, fresh in answers].count(True) == 1
    until_up(jobs, answers[0][0])
    eventually(lambda: starts(tmp_path) == 1, "one start")
    again, fresh = Jobs(jobs.records, command=jobs.command).start(REQUEST, key="k", body=b"b")
    assert (again.ticket.id, again.running, fresh) == (answers[0][0].ticket.id, True, False)
    assert starts(tmp_path) == 1


def test_a_key_belongs_to_one_request(jobs: Jobs) -> None:
    jobs.start(REQUEST, key="k", body=b"one")
    with pytest.raises(KeyConflict, match="another request"):
        jobs.start(REQUEST, key="k", body=b"two")
    with pytest.raises(KeyConflict):
        jobs.known("k", b"two")
    assert jobs.known("other", b"two") is None


def crash(code: str, records: Path, command: tuple[str, ...]) -> None:
    """Run `code` in a process that ends without a last word."""
    setup = f"""
        import os
        from pathlib import Path
        from virtmig.integrations.api.jobs import Jobs
        from virtmig.request import MigrationRequest
        jobs = Jobs(Path({str(records)!r}), command={command!r})
        request = MigrationRequest({dict(REQUEST)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code)], timeout=30)
    assert done.returncode == 9


def test_killed_between_ticket_and_process_it_is_started_by_the_retry_alone(jobs: Jobs, tmp_path: Path) -> None:
    crash("""
        jobs._spawn = lambda ticket: os._exit(9)
        jobs.start(request, key="k", body=b"b")
    """, jobs.records, jobs.command)  # fmt: skip
    (left,) = jobs.all()
    assert (left.pid, left.running) == (0, False)
    job, fresh = jobs.start(REQUEST, key="k", body=b"b")
    assert (job.ticket.id, fresh) == (left.ticket.id, True)
    until_up(jobs, job)
    assert jobs.start(REQUEST, key="k", body=b"b")[1] is False
    eventually(lambda: starts(tmp_path) == 1, "one start")


def test_killed_after_the_start_its_process_goes_on_and_a_new_one_knows_it(jobs: Jobs, tmp_path: Path) -> None:
    crash("""
        jobs.start(request, key="k", body=b"b")
        os._exit(9)
    """, jobs.records, jobs.command)  # fmt: skip
    (job,) = jobs.all()
    assert job.running
    assert jobs.start(REQUEST, key="k", body=b"b")[1] is False
    job = until_up(jobs, job)
    eventually(lambda: starts(tmp_path) == 1, "its first line")
    assert os.getsid(job.pid) != os.getsid(0)
    assert jobs.ask_to_stop(job)
    eventually(lambda: not jobs.now(job).running, "its end")
    assert jobs.now(job).said == "error: told"
    assert not jobs.ask_to_stop(job)
    (found,) = Migrations(jobs, History(jobs.records)).all()
    assert (shown(found).status, shown(found).error, shown(found).running) == ("failed", "told", False)


def test_where_no_ticket_can_be_kept_nothing_is_started(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotKept, match="only started when its ticket can be kept"):
        Jobs(tmp_path / "file", command=jobs.command).start(REQUEST, key="k", body=b"b")
    assert starts(tmp_path) == 0


def test_a_process_that_cannot_leave_its_number_does_not_become_virtmig(jobs: Jobs, tmp_path: Path) -> None:
    write = jobs._write

    def and_block(*words: object) -> object:
        ticket = write(*words)  # type: ignore[arg-type]
        (jobs.folder / f"{ticket.id}.pid").mkdir()
        return ticket

    jobs._write = and_block  # type: ignore[method-assign,assignment]
    job, _ = jobs.start(REQUEST, key="k", body=b"b")
    eventually(lambda: jobs.now(job).said, "the shell's word")
    assert starts(tmp_path) == 0
    (jobs.folder / f"{job.ticket.id}.pid").rmdir()
    again, fresh = jobs.start(REQUEST, key="k", body=b"b")
    assert (again.ticket.id, fresh) == (job.ticket.id, True)


def test_files_are_kept_beside_the_ticket_and_named_in_the_request(jobs: Jobs) -> None:
    job, _ = jobs.start(REQUEST, files={"xml": "<domain/>"}, source_uri="test:///amber")
    path = Path(job.ticket.request["xml"])
    assert (path.read_text(), oct(path.stat().st_mode & 0o777)) == ("<domain/>", "0o600")
    assert job.ticket.source_uri == "test:///amber"


def broken(folder: Path, **changes: object) -> str:
    recorder = recorded(folder, "postcopy", "p2p", samples=curve(2), bandwidth=64)
    words = {"status": Status.INTERRUPTED, "guest": Whereabouts.SPLIT, **changes}
    recorder.finish(outcome(**words))
    return recorder.id


def test_a_broken_postcopy_is_recovered_once_however_often_it_is_asked(jobs: Jobs, tmp_path: Path) -> None:
    migrations = Migrations(jobs, History(jobs.records))
    one = broken(jobs.records)
    job, fresh = recover(migrations.find(one), migrations)
    assert fresh
    asked = ("domain", "desturi", "live", "p2p", "postcopy", "postcopy-resume", "transport")
    assert set(job.ticket.request) == set(asked)
    assert (job.ticket.of, job.ticket.request["transport"]) == (one, "direct")
    again, fresh = recover(migrations.find(one), migrations)
    assert (again.ticket.id, fresh) == (job.ticket.id, False)
    until_up(jobs, job)
    jobs.ask_to_stop(jobs.now(job))
    eventually(lambda: not jobs.now(job).running, "its end")
    assert recover(migrations.find(one), migrations)[1], "the first try has failed: it may be tried again"


def test_what_is_whole_is_not_recovered(jobs: Jobs) -> None:
    migrations = Migrations(jobs, History(jobs.records))
    one = broken(jobs.records, status=Status.COMPLETED, guest=Whereabouts.DESTINATION)
    with pytest.raises(NotNow, match="only a broken postcopy"):
        recover(migrations.find(one), migrations)
    assert jobs.all() == []


@pytest.mark.parametrize(
    ("code", "status", "ending"),
    [
        ("exit 0", "completed", "completed"),
        ("exit 1", "failed", "failed"),
        ("kill -9 $$", "error", "broken off"),
    ],
)
def test_a_record_that_stopped_is_not_taken_for_a_killed_process(
    tmp_path: Path, code: str, status: str, ending: str
) -> None:
    jobs = Jobs(tmp_path / "records", command=("/bin/sh", "-c", code))
    job, _ = jobs.start(REQUEST)
    ended = eventually(lambda: (now := jobs.now(job)).exit_code is not None and now, "its exit status")
    assert ended.exit_code == {"exit 0": 0, "exit 1": 1}.get(code, 137)
    recorder = recorded(jobs.records, samples=curve(2))
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    text = recorder.path.read_text().replace(f'"pid":{os.getpid()}', f'"pid":{process.pid}')
    (jobs.records / f"{job.ticket.id}.jsonl").write_text(text.replace(recorder.id, job.ticket.id))
    recorder.path.unlink()
    history = History(jobs.records, exit_code=jobs.exit_code)
    found = shown(Migrations(jobs, history).find(job.ticket.id))
    assert (found.status, found.ending, found.running, found.guest) == (status, ending, False, None)
    assert (bool(found.sentence), found.record_id) == (True, job.ticket.id)
    counted = Metrics(history).exposition().decode()
    assert f'virtmig_migrations_total{{result="{ending}"}} 1.0' in counted
