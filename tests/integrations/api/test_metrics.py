"""Metrics: KubeVirt's stems, units, bounded series that go away, counters that only grow; the dashboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.report.test_records import curve, outcome, recorded
from virtmig.integrations import metrics as metrics_module
from virtmig.integrations.api.history import History
from virtmig.integrations.metrics import KEPT_S, LABELS, Metrics
from virtmig.progress import Status, Whereabouts

DASHBOARD = Path(__file__).resolve().parents[3] / "hooks/grafana/virtmig.json"
MINE = {"domain": "opal", "source": "amber", "destination": "beryl"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def families(metrics: Metrics) -> dict[str, object]:
    return {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in families(metrics).values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def test_a_running_one_is_shown_in_kubevirts_stems(tmp_path: Path) -> None:
    recorded(tmp_path, samples=curve(4))
    metrics = Metrics(History(tmp_path))
    last = curve(4)[-1]
    assert value(metrics, "virtmig_migration_data_total_bytes", **MINE) == last.total_bytes
    assert value(metrics, "virtmig_migration_data_processed_bytes", **MINE) == last.processed_bytes
    assert value(metrics, "virtmig_migration_data_remaining_bytes", **MINE) == last.remaining_bytes
    assert value(metrics, "virtmig_migration_dirty_memory_rate_bytes", **MINE) == last.dirty_bytes_per_s
    assert value(metrics, "virtmig_migration_memory_transfer_rate_bytes", **MINE) == last.memory_bytes_per_s
    assert value(metrics, "virtmig_migrations_in_running_phase") == 1
    assert value(metrics, "virtmig_migration_succeeded", **MINE) is None
    for family in families(metrics).values():
        assert family.name.startswith("virtmig_migration")
        assert family.documentation
        assert family.type in ("gauge", "counter", "histogram")


def test_series_of_one_that_has_ended_go_away_and_its_counts_stay(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(4))
    history, clock = History(tmp_path), Clock()
    metrics = Metrics(history, clock=clock)
    recorder.finish(outcome())
    clock.now = history.head(recorder.id).end_time + KEPT_S - 1
    assert value(metrics, "virtmig_migration_succeeded", **MINE) == 1
    assert value(metrics, "virtmig_migration_failed", **MINE) == 0
    assert value(metrics, "virtmig_migration_end_time_seconds", **MINE) == pytest.approx(clock.now - KEPT_S + 1)
    clock.now += 2
    text = metrics.exposition().decode()
    assert "opal" not in text
    assert value(metrics, "virtmig_migrations_total", result="completed") == 1
    assert value(metrics, "virtmig_migration_downtime_seconds_sum") == pytest.approx(0.020)
    assert value(metrics, "virtmig_migration_downtime_seconds_bucket", le="0.03") == 1
    assert value(metrics, "virtmig_migration_downtime_seconds_bucket", le="0.01") == 0
    assert value(metrics, "virtmig_migration_observed_downtime_seconds_count") == 1
    recorder.path.unlink()
    assert value(metrics, "virtmig_migrations_total", result="completed") == 1


def test_refusals_are_counted_by_reason_and_unknown_ones_together(tmp_path: Path) -> None:
    recorded(tmp_path, samples=[]).refused([("multifd", "too old", ""), ("postcopy", "no", ""), ("guest 17", "no", "")])
    metrics = Metrics(History(tmp_path))
    for reason in ("multifd", "postcopy", "other"):
        assert value(metrics, "virtmig_migration_refusals_total", reason=reason) == 1
    metrics.refused(["\u0000x", "y"])
    assert value(metrics, "virtmig_migration_refusals_total", reason="other") == 2
    assert value(metrics, "virtmig_migrations_total", result="refused") == 2


def test_failures_are_counted_by_result(tmp_path: Path) -> None:
    for status in (Status.ABORTED, Status.FAILED, Status.FAILED):
        recorded(tmp_path, samples=[]).finish(outcome(status=status, guest=Whereabouts.SOURCE, downtime_ms=None))
    metrics = Metrics(History(tmp_path))
    assert value(metrics, "virtmig_migrations_total", result="failed") == 2
    assert value(metrics, "virtmig_migrations_total", result="aborted") == 1
    assert value(metrics, "virtmig_migration_downtime_seconds_count") == 0


def test_series_and_labels_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MOST_MIGRATIONS", 3)
    for number in range(5):
        recorder = recorded(tmp_path, samples=curve(2))
        text = recorder.path.read_text().replace('"domain":"opal"', f'"domain":"{number}{"y" * 400}"', 1)
        recorder.path.write_text(text)
    found = families(Metrics(History(tmp_path)))["virtmig_migration_data_total_bytes"].samples
    assert len(found) == 3
    assert all(len(sample.labels["domain"]) == 128 for sample in found)
    assert all(set(sample.labels) == set(LABELS) for sample in found)


def test_the_dashboard_asks_for_what_there_is(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(2))
    recorder.finish(outcome())
    metrics = Metrics(History(tmp_path))
    metrics.refused(["multifd"])
    known: dict[str, set[str]] = {}
    for family in families(metrics).values():
        known.setdefault(family.name, set())
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [row["query"] for row in dashboard["templating"]["list"] if row["type"] == "query"]
    asked = {name for text in expressions for name in re.findall(r"virtmig_\w+", text)}
    assert len(asked) > 10
    assert asked <= set(known) | {f"{name}_total" for name in known}
    for text in expressions:
        for name, labels in re.findall(r"(virtmig_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)=", labels)) <= {*LABELS, "channel"}, (name, labels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    areas = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(area["x"] + area["w"] <= 24 for area in areas)
