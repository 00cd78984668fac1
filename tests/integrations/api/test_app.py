"""The API over its socket: what it shows, what it refuses and how, the page, and slow or dead readers."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from lxml import html
from openapi_spec_validator import validate

from tests.integrations.api.serving import client_of, ended
from tests.integrations.api.test_events import parsed
from tests.report.test_records import curve, outcome, recorded
from tests.support.lab import eventually
from virtmig.integrations.api import app as app_module
from virtmig.integrations.api import events as events_module
from virtmig.integrations.api.problems import KINDS
from virtmig.integrations.api.schema import NOT_HERE
from virtmig.options import OPTIONS

TEST = {"domain": "test", "desturi": "test:///default", "source_uri": "test:///default", "live": True}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    records = tmp_path_factory.mktemp("records")
    with client_of(records) as client:
        yield client, records


@pytest.fixture
def records(shared: tuple[httpx.Client, Path]) -> Path:
    """The folder of the API's records, empty."""
    for path in shared[1].glob("*.jsonl"):
        path.unlink()
    return shared[1]


@pytest.fixture
def client(shared: tuple[httpx.Client, Path], records: Path) -> httpx.Client:
    return shared[0]


def problem(reply: httpx.Response, status: int, kind: str) -> dict[str, object]:
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
    found = reply.json()
    assert (found["status"], found["type"]) == (status, f"urn:virtmig:problem:{kind}")
    assert found["title"] == KINDS[kind][1]
    return found


def test_records_are_listed_the_newest_first_and_in_pages(client: httpx.Client, records: Path) -> None:
    ids = sorted((ended(records) for _ in range(3)), reverse=True)
    assert [row["id"] for row in client.get("/v1/migrations").json()["migrations"]] == ids
    page = client.get("/v1/migrations", params={"limit": 2}).json()
    assert ([row["id"] for row in page["migrations"]], page["next_marker"]) == (ids[:2], ids[1])
    page = client.get("/v1/migrations", params={"limit": 2, "marker": ids[1]}).json()
    assert ([row["id"] for row in page["migrations"]], page["next_marker"]) == (ids[2:], None)
    assert client.get("/v1/migrations", params={"status": "running"}).json()["migrations"] == []
    assert len(client.get("/v1/migrations", params={"domain": "opal"}).json()["migrations"]) == 3
    assert client.get("/v1/migrations", params={"domain": "other"}).json()["migrations"] == []
    for wrong in ({"limit": "0"}, {"limit": "x"}, {"limit": "1e1"}, {"marker": "x"}, {"status": "x"}, {"domain": ""}):
        problem(client.get("/v1/migrations", params=wrong), 400, "malformed")


def test_one_is_shown_with_its_texts(client: httpx.Client, records: Path) -> None:
    one = ended(records)
    shown = client.get(f"/v1/migrations/{one}").json()
    assert (shown["status"], shown["sentence"], shown["percent"]) == ("completed", "opal now runs on beryl", 100.0)
    assert "lost each other" in client.get(f"/v1/migrations/{one}/log").text
    assert "asked for with --live" in client.get(f"/v1/migrations/{one}/explain").text
    report = client.get(f"/v1/migrations/{one}/report")
    assert "opal now runs on beryl" in report.text
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    for action in ("abort", "postcopy", "recover"):
        assert "ended" in problem(client.post(f"/v1/migrations/{one}/{action}"), 409, "state")["detail"]
    problem(client.patch(f"/v1/migrations/{one}/limits", json={"bandwidth": 1}), 409, "state")


def test_in_postcopy_an_abort_is_refused_with_the_reason(client: httpx.Client, records: Path) -> None:
    import msgspec

    from virtmig.progress import Phase

    recorder = recorded(records, "postcopy", samples=[msgspec.structs.replace(curve(1)[0], phase=Phase.POSTCOPY)])
    found = problem(client.post(f"/v1/migrations/{recorder.id}/abort"), 409, "state")
    assert "an abort would lose it" in found["detail"]
    problem(client.post(f"/v1/migrations/{recorder.id}/postcopy"), 409, "state")


def test_what_was_not_started_with_postcopy_is_not_switched(client: httpx.Client, records: Path) -> None:
    recorder = recorded(records, samples=curve(2))
    found = problem(client.post(f"/v1/migrations/{recorder.id}/postcopy"), 409, "state")
    assert '"postcopy": true' in found["hint"]


def test_wrong_paths_methods_and_bodies(client: httpx.Client) -> None:
    problem(client.get("/nowhere"), 404, "not-found")
    problem(client.get("/v1/migrations/20260101-000000-abcdef"), 404, "not-found")
    problem(client.get("/page/../app.py"), 404, "not-found")
    reply = client.delete("/v1/migrations")
    problem(reply, 405, "method")
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    problem(client.post("/v1/plans", content=b"{}"), 415, "media-type")
    kind = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"\xff", b"{}", b'{"domain":"a"}', b'{"domain":"a","desturi":"b","x":1}',
                 b'{"domain":"a","desturi":"b","live":"yes"}', b'{"domain":"a","desturi":"b","bandwidth":-1}',
                 b'{"domain":"a","desturi":"b","on_stall":"pray"}', b"[" * 100_000):  # fmt: skip
        problem(client.post("/v1/plans", content=body, headers=kind), 400, "malformed")
    problem(client.post("/v1/migrations", json=TEST, headers={"idempotency-key": "k" * 201}), 400, "malformed")


def test_a_refused_plan_says_every_reason_and_nothing_is_started(client: httpx.Client, records: Path) -> None:
    plan = client.post("/v1/plans", json=TEST)
    assert (plan.status_code, plan.json()["refused"]) == (200, True)
    assert "migrate --live" not in plan.json()["virtmig_line"].partition("migrate")[0]
    found = problem(client.post("/v1/migrations", json=TEST), 409, "refused")
    assert {row["what"] for row in found["reasons"]} == {"hosts", "domain"}
    assert all(row["way_out"] for row in found["reasons"])
    assert found["guest"] == "source"
    assert client.get("/v1/migrations").json()["migrations"] == []
    assert not list(records.glob("api/*.json"))
    metrics = client.get("/metrics").text
    assert 'virtmig_migrations_total{result="refused"} 1.0' in metrics
    assert 'virtmig_migration_refusals_total{reason="other"} 1.0' in metrics
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_errors_of_libvirt_and_of_the_options(client: httpx.Client) -> None:
    found = problem(client.post("/v1/plans", json={**TEST, "domain": "nope"}), 404, "no-domain")
    assert found["hint"] == "known there: test"
    found = problem(client.post("/v1/plans", json={**TEST, "desturi": "no+such://x"}), 409, "connection")
    assert found["retryable"] is True
    found = problem(client.post("/v1/plans", json={**TEST, "parallel_connections": 3, "timeout_abort": True}), 409,
                    "request")  # fmt: skip
    assert [row["way_out"] for row in found["reasons"]] == ["add --timeout SECONDS", "add --parallel"]
    found = problem(client.post("/v1/plans", json={**TEST, "xml": "<x>"}), 409, "request")
    assert "xml" in found["detail"]


def test_another_sites_page_is_not_heard(client: httpx.Client) -> None:
    for path in ("/v1/plans", "/v1/migrations"):
        reply = client.post(path, json=TEST, headers={"origin": "https://evil.example"})
        problem(reply, 403, "forbidden")
    reply = client.post("/v1/plans", json=TEST, headers={"origin": "http://virtmig"})
    assert reply.status_code == 200


def test_readonly_shows_and_does_nothing(tmp_path: Path) -> None:
    with client_of(tmp_path, readonly=True) as client:
        assert client.get("/v1/migrations").status_code == 200
        problem(client.post("/v1/plans", json=TEST), 403, "forbidden")


def test_the_document_is_valid_and_has_every_option(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    validate(document)
    properties = document["components"]["schemas"]["NewMigration"]["properties"]
    assert set(properties) == {row.field for row in OPTIONS if row.name not in NOT_HERE} | {"source_uri"}
    assert properties["max_downtime"]["maximum"] == 2_000_000
    assert properties["on_stall"]["enum"] == ["abort", "auto", "continue", "postcopy", "suspend"]


def test_events_of_one_that_has_ended(client: httpx.Client, records: Path) -> None:
    one = ended(records, samples=curve(4))
    reply = client.get(f"/v1/migrations/{one}/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = parsed(reply.content)
    assert [name for name, _, _ in found] == ["migration", *["sample"] * 4, "message", "end"]
    assert found[-1][2]["status"] == "completed"
    again = parsed(client.get(f"/v1/migrations/{one}/events", headers={"last-event-id": str(found[2][1])}).content)
    assert [row[1] for row in again[1:]] == [row[1] for row in found[3:]]
    problem(client.get(f"/v1/migrations/{one}/events", headers={"last-event-id": "x"}), 400, "malformed")
    last = client.get(f"/v1/migrations/{one}/events", headers={"last-event-id": str(found[-1][1])})
    assert (last.status_code, last.content) == (204, b"")


def test_events_come_as_they_happen(client: httpx.Client, records: Path) -> None:
    recorder = recorded(records, samples=curve(2))
    with client.stream("GET", f"/v1/migrations/{recorder.id}/events") as reply:
        lines = reply.iter_lines()
        assert next(line for line in lines if line == "event: migration")
        recorder.message("now", "warning")
        assert json.loads(next(line for line in lines if "now" in line)[6:])["text"] == "now"
        recorder.finish(outcome())
        assert next(line for line in lines if line == "event: end")


def test_a_reader_that_takes_nothing_is_let_go_and_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "STALLED_S", 0.3)
    monkeypatch.setattr(app_module, "MOST_STREAMS", 1)
    recorder = recorded(tmp_path, samples=curve(2))
    for _ in range(400):
        recorder.message("x" * 9000)
    with client_of(tmp_path) as client:
        path = client._transport._pool._uds  # type: ignore[attr-defined]
        with socket.socket(socket.AF_UNIX) as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(path)
            stalled.sendall(f"GET /v1/migrations/{recorder.id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            reply = client.get(f"/v1/migrations/{recorder.id}/events")
            assert problem(reply, 429, "busy")["retryable"]
            assert client.get("/v1/migrations").status_code == 200
            recorder.finish(outcome())
            url = f"/v1/migrations/{recorder.id}/events"
            eventually(lambda: client.get(url).status_code == 200, "the place of the stalled reader")


def test_many_connections_and_dead_ones(client: httpx.Client, records: Path) -> None:
    ended(records)
    path = client._transport._pool._uds  # type: ignore[attr-defined]
    sockets = []
    for number in range(150):
        each = socket.socket(socket.AF_UNIX)
        each.connect(path)
        if number % 2:
            each.sendall(b"GET /v1/migrations HTTP/1.1\r\nHo")
        sockets.append(each)
    assert len(client.get("/v1/migrations").json()["migrations"]) == 1
    for each in sockets:
        each.close()
    assert client.get("/metrics").status_code == 200


def test_the_page_asks_nothing_of_anybody_else(client: httpx.Client) -> None:
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = html.fromstring(reply.text)
    named = page.xpath("//@src | //link/@href")
    assert named
    for each in named:
        assert each.startswith(("/page/", "data:"))
        if each.startswith("/page/"):
            got = client.get(each)
            assert got.status_code == 200
            assert not re.search(rb"url\((?!data:)|@import|https?://(?!www\.w3\.org)", got.content.split(b"*/", 1)[-1])
    assert not page.xpath("//@style | //@onclick | //script[not(@src)]")
    for each in page.xpath("//button"):
        assert each.get("type") == "button" or each.getparent().getparent().get("method") == "dialog"
    assert page.xpath("//html/@lang") == ["en"]
