"""The API and its page with real migrations: killed and started again, steered, followed, and looked at in Chromium."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra api is not installed")
pytest.importorskip("uvicorn", reason="the extra api is not installed")
pytest.importorskip("prometheus_client", reason="the extra api is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed (extra dev)")

from tests.integrations.api.browser import CHROMIUM, Browser  # noqa: E402
from tests.support.lab import GuestFactory, LabGuest, eventually  # noqa: E402
from virtmig.lab.lab import Lab  # noqa: E402

pytestmark = pytest.mark.lab

_CODE = """
import sys
from virtmig.cli.api_commands import run_api
from virtmig.cli.global_options import GlobalOptions
sys.exit(run_api({"listen": sys.argv[2], "plain": sys.argv[2].startswith("tcp:")}, GlobalOptions(connect=sys.argv[1])))
"""


class ApiProcess:
    """`virtmig api` over the records in `folder`, and a client of it."""

    def __init__(self, lab: Lab, folder: Path, listen: str = "") -> None:
        self.lab = lab
        words = [sys.executable, "-c", _CODE, lab.a.uri, listen or f"unix:{folder}/s"]
        environ = {**os.environ, "VIRTMIG_RECORDS": str(folder / "records")}
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environ)
        line = self.process.stderr.readline()
        assert line.startswith("virtmig api: "), line + self.process.stderr.read()
        self.url = f"http://127.0.0.1:{line.split()[2].rpartition(':')[2]}" if listen else "http://virtmig"
        transport = None if listen else httpx.HTTPTransport(uds=f"{folder}/s")
        self.client = httpx.Client(transport=transport, base_url=self.url, timeout=40)

    def start(self, guest: LabGuest, key: str = "", **options: Any) -> Any:
        body = {"domain": guest.name, "desturi": self.lab.b.uri, "live": True, **options}
        return self.client.post("/v1/migrations", json=body, headers={"idempotency-key": key} if key else {})

    def show(self, migration: str) -> dict[str, Any]:
        return self.client.get(f"/v1/migrations/{migration}").json()

    def until(self, migration: str, seconds: float = 60, **wanted: Any) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            found = self.show(migration)
            return found if wanted.items() <= found.items() else None

        return eventually(there, f"{wanted}", seconds)

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        assert self.process.wait(15) == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vma-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def api(lab: Lab, folder: Path) -> Iterator[ApiProcess]:
    found = ApiProcess(lab, folder)
    yield found
    found.close()


def test_a_killed_api_leaves_the_migration_alone_and_a_new_one_shows_it(
    lab: Lab, folder: Path, guest: GuestFactory
) -> None:
    fresh = guest()  # writes faster than these limits let go: it cannot end before it may
    api = ApiProcess(lab, folder)
    started = api.start(fresh, "one", bandwidth=3, max_downtime=1)
    assert started.status_code == 201
    one = started.json()["id"]
    assert started.headers["location"] == f"/v1/migrations/{one}"
    api.until(one, phase="precopy")
    with api.client.stream("GET", f"/v1/migrations/{one}/events") as reply:
        lines = reply.iter_lines()
        assert next(line for line in lines if line == "event: sample")
        api.process.kill()
        api.process.wait()
    api = ApiProcess(lab, folder)
    again = api.start(fresh, "one", bandwidth=3, max_downtime=1)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, one, "running")
    other = api.start(fresh, "one", bandwidth=7, max_downtime=1)
    assert (other.status_code, other.json()["type"]) == (409, "urn:virtmig:problem:key")
    assert f'domain="{fresh.name}"' in api.client.get("/metrics").text
    before = api.show(one)["memory_processed_bytes"]
    eventually(lambda: api.show(one)["memory_processed_bytes"] > before, "more of its memory")
    limits = api.client.patch(f"/v1/migrations/{one}/limits", json={"bandwidth": 4, "max_downtime": 3})
    assert limits.status_code == 200, limits.text
    slowed = api.client.patch(f"/v1/migrations/{one}/limits", json={"bandwidth": 2, "max_downtime": 2})
    assert slowed.status_code == 200, slowed.text
    log = f"/v1/migrations/{one}/log"
    eventually(lambda: "-> 2 ms" in (text := api.client.get(log).text) and "2.00 MiB/s from" in text, "the limits")
    assert api.show(one)["downtime_limit_ms"] == 2
    api.client.patch(f"/v1/migrations/{one}/limits", json={"bandwidth": 1000, "max_downtime": 900}).raise_for_status()
    done = api.until(one, running=False)
    assert (done["status"], done["guest"], done["started_by"]) == ("completed", "destination", "api")
    assert done["sentence"].startswith(f"{fresh.name} now runs on")
    assert fresh.domain(lab.b).migrateGetMaxSpeed(0) != 7
    assert [row["id"] for row in api.client.get("/v1/migrations").json()["migrations"]] == [one]
    assert api.show(done["record_id"])["id"] == one
    fresh.check(lab.b)
    api.close()


def test_an_abort_and_what_others_started(api: ApiProcess, folder: Path, lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    words = ["-c", lab.a.uri, "migrate", "--live", "--bandwidth", "3", "--quiet", fresh.name, lab.b.uri]
    environ = {**os.environ, "VIRTMIG_RECORDS": str(folder / "records")}
    command = subprocess.Popen([sys.executable, "-m", "virtmig.cli.main", *words], stderr=subprocess.PIPE, env=environ)

    def running() -> str:
        found = api.client.get("/v1/migrations", params={"status": "running"}).json()["migrations"]
        return found[0]["id"] if found and found[0]["phase"] == "precopy" else ""

    theirs = eventually(running, "the command's migration")
    assert api.show(theirs)["started_by"] == "command"
    assert api.client.post(f"/v1/migrations/{theirs}/postcopy").status_code == 409
    reply = api.client.post(f"/v1/migrations/{theirs}/abort")
    assert (reply.status_code, reply.json()["message"]) == (202, "aborting; the guest stays on the source")
    assert command.wait(30) == 1
    command.stderr.close()
    ended = api.until(theirs, running=False)
    assert (ended["status"], ended["ending"], ended["guest"]) == ("cancelled", "aborted", "source")
    assert fresh.only_on(lab.a)
    assert api.client.post(f"/v1/migrations/{theirs}/abort").status_code == 409
    fresh.check(lab.a)


@pytest.mark.slow
def test_an_abort_before_anything_moves(api: ApiProcess, lab: Lab, guest: GuestFactory) -> None:
    fresh = guest()
    lab.b.freeze_daemon()
    try:
        refused = api.client.build_request("POST", "/v1/migrations", json={"domain": "none-of-these",
                                           "desturi": lab.b.uri, "live": True})  # fmt: skip
        assert api.client.send(refused).status_code == 404
    finally:
        lab.b.thaw_daemon()
    one = api.start(fresh, bandwidth=2).json()["id"]
    reply = api.client.post(f"/v1/migrations/{one}/abort")
    assert reply.status_code in (202, 409), reply.text
    if reply.status_code == 409:
        api.client.post(f"/v1/migrations/{one}/abort").raise_for_status()
    ended = api.until(one, running=False)
    assert ended["guest"] in ("source", None)
    eventually(lambda: fresh.only_on(lab.a), "the guest on its source alone")


@pytest.mark.slow
def test_a_switch_to_postcopy(full_lab: Lab, folder: Path, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=None)
    api = ApiProcess(full_lab, folder)
    one = api.start(fresh, bandwidth=32, postcopy=True, postcopy_bandwidth=24, on_stall="continue", max_downtime=1)
    one = one.json()["id"]
    api.until(one, phase="precopy")
    reply = api.client.post(f"/v1/migrations/{one}/postcopy")
    assert reply.status_code == 202, reply.text
    ended = api.until(one, running=False)
    assert (ended["status"], ended["guest"]) == ("completed", "destination")
    names = [line for line in api.client.get(f"/v1/migrations/{one}/events").text.splitlines() if "event:" in line]
    assert names[-1] == "event: end"
    events = api.client.get(f"/v1/migrations/{one}/events").text
    samples = [json.loads(line[6:]) for line in events.splitlines() if line.startswith('data: {"at_s"')]
    moved = [row for row in samples if row.get("phase") == "postcopy"]
    assert not any("dirty_bytes_per_s" in row for row in moved)
    took_s = moved[-1]["at_s"] - moved[0]["at_s"]
    assert ended["observed_downtime_ms"] < 1000 * took_s, "to the guest's start, not to the end of its memory"
    assert "postcopy was started by somebody else" in api.client.get(f"/v1/migrations/{one}/log").text
    fresh.check(full_lab.b)
    api.close()


@pytest.mark.slow
def test_a_postcopy_that_was_let_go_of_is_followed_to_its_end(full_lab: Lab, folder: Path, guest: GuestFactory) -> None:
    fresh = guest(dirty_mib_s=None)
    api = ApiProcess(full_lab, folder)
    one = api.start(fresh, bandwidth=32, postcopy=True, postcopy_bandwidth=3, on_stall="continue", max_downtime=1)
    one = one.json()["id"]
    api.until(one, phase="precopy")
    api.client.post(f"/v1/migrations/{one}/postcopy").raise_for_status()
    api.until(one, phase="postcopy")
    late = api.client.patch(f"/v1/migrations/{one}/limits", json={"max_downtime": 500})
    assert (late.status_code, late.json()["type"]) == (409, "urn:virtmig:problem:state")
    os.kill(int((folder / f"records/api/{one}.pid").read_text()), signal.SIGTERM)
    api.until(one, ending="detached", status="post-migrating", running=True)
    refused = api.client.post(f"/v1/migrations/{one}/recover")
    assert (refused.status_code, refused.json()["detail"]) == (409, "its postcopy goes on by itself")
    assert api.client.post(f"/v1/migrations/{one}/abort").status_code == 409
    assert "virtmig_migration_failed{" not in api.client.get("/metrics").text
    faster = api.client.patch(f"/v1/migrations/{one}/limits", json={"postcopy_bandwidth": 500})
    assert faster.status_code == 200, faster.text
    done = api.until(one, running=False)
    assert (done["status"], done["guest"], done["ending"]) == ("completed", "destination", "completed")
    assert "postcopy bandwidth: 500 MiB/s from now on" in api.client.get(f"/v1/migrations/{one}/log").text
    assert [row["id"] for row in api.client.get("/v1/migrations").json()["migrations"]] == [one]
    fresh.check(full_lab.b)
    api.close()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_page_by_keyboard(lab: Lab, folder: Path, guest: GuestFactory, tmp_path: Path) -> None:
    fresh = guest()
    api = ApiProcess(lab, folder, "tcp:127.0.0.1:0")
    past = api.start(fresh, bandwidth=8).json()["id"]  # long enough for samples, which the report's charts show
    api.until(past, status="completed")
    back = {"domain": fresh.name, "desturi": lab.a.uri, "source_uri": lab.b.uri, "live": True, "bandwidth": 3,
            "postcopy": lab.full, "max_downtime": 1}  # fmt: skip
    one = api.client.post("/v1/migrations", json=back).raise_for_status().json()["id"]
    with Browser() as page:
        page.open(api.url + "/")
        card = f"document.querySelector('article[data-id=\"{one}\"]')"
        page.until(f"{card} && {card}.querySelectorAll('.uplot').length === 2", 30)
        page.until(f"{card}.querySelector('.state').textContent.startsWith('precopy')")
        assert fresh.name in page.value(f"{card}.querySelector('h3').textContent")
        assert page.value(f"{card}.querySelector('.postcopy').hidden") is not lab.full
        row = page.until(f"document.querySelector('#past li[data-id=\"{past}\"]')?.textContent")
        assert f"{fresh.name} now runs on" in row
        for width, dark in ((1000, False), (360, True)):
            page.resize(width, 800, dark=dark, phone=width < 500)
            page.until(f"document.documentElement.scrollWidth <= {width}")
            page.screenshot(tmp_path / f"{width}.png")
        # by keyboard alone: to the button, Escape leaves it alone, the second time it is meant
        is_abort = "document.activeElement.className === 'abort'"
        for _ in range(20):
            page.press("Tab")
            if page.value(is_abort):
                break
        assert page.value(is_abort)
        page.press("Enter")
        page.until("document.getElementById('ask').open")
        assert page.value("document.activeElement.textContent") == "Leave it alone"
        page.press("Escape")
        page.until("!document.getElementById('ask').open")
        assert api.show(one)["running"]
        page.press("Enter")
        page.until("document.getElementById('ask').open")
        page.press("Tab")
        assert page.value("document.activeElement.textContent") == "Abort it"
        page.press("Enter")
        api.until(one, status="cancelled")
        page.until(f"document.querySelector('#past li[data-id=\"{one}\"]') !== null", 30)
        assert page.value("document.querySelectorAll('article').length") == 0
        assert page.value("document.activeElement.id") == "past-title"
        page.open(f"{api.url}/v1/migrations/{past}/report")
        page.until("document.querySelectorAll('svg, .uplot').length")
        assert page.errors == []
        assert {url.split("/")[2] for url in page.requests if url.startswith("http")} == {api.url.split("/")[2]}
    assert fresh.only_on(lab.b)
    api.close()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_pages_switch_to_postcopy_keeps_the_keyboards_place(
    full_lab: Lab, folder: Path, guest: GuestFactory
) -> None:
    fresh = guest(dirty_mib_s=None)
    api = ApiProcess(full_lab, folder, "tcp:127.0.0.1:0")
    one = api.start(fresh, bandwidth=16, postcopy=True, postcopy_bandwidth=3, on_stall="continue", max_downtime=1)
    one = one.json()["id"]
    with Browser() as page:
        page.open(api.url + "/")
        button = f"document.querySelector('article[data-id=\"{one}\"] .postcopy')"
        page.until(f"{button} && !{button}.disabled", 30)
        page.value(f"{button}.focus()")
        page.press("Enter")
        page.until("document.getElementById('ask').open")
        page.press("Tab")
        assert page.value("document.activeElement.textContent") == "Switch it"
        page.press("Enter")
        page.until(f"{button}.hidden", 30)
        assert page.value("document.activeElement.tagName") == "H3"
        assert page.value(f"document.activeElement.parentElement.dataset.id === '{one}'")
        api.client.patch(f"/v1/migrations/{one}/limits", json={"postcopy_bandwidth": 500}).raise_for_status()
        page.until(f"document.querySelector('#past li[data-id=\"{one}\"]') !== null", 30)
        assert page.value("document.activeElement.id") == "past-title"
        assert page.errors == []
    assert api.until(one, running=False)["status"] == "completed"
    fresh.check(full_lab.b)
    api.close()


@pytest.mark.slow
def test_sigterm_ends_the_api_and_no_migration(lab: Lab, folder: Path, guest: GuestFactory) -> None:
    fresh = guest()
    api = ApiProcess(lab, folder)
    one = api.start(fresh, bandwidth=24).json()["id"]
    api.until(one, phase="precopy")
    api.process.send_signal(signal.SIGTERM)
    assert api.process.wait(15) == 0
    assert not (folder / "s").exists()
    eventually(lambda: fresh.only_on(lab.b), "the guest on host b", 60)
    record = next((folder / "records").glob("*.jsonl"))
    last = eventually(lambda: (row := json.loads(record.read_text().splitlines()[-1]))["row"] == "ended" and row, "end")
    assert last["outcome"]["status"] == "completed"
    fresh.check(lab.b)
