"""The report: one file, nothing from elsewhere, readable without scripts, harmless whatever a guest is called."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from lxml import html

from tests.report.test_records import curve, outcome, recorded
from virtmig.progress import Phase
from virtmig.report.html import _MOST_POINTS, Chart, Series, charts_of, phases_of, report_html, svg, write_report
from virtmig.report.records import Record, find_record


@pytest.fixture
def record(tmp_path: Path) -> Record:
    samples = curve(20)
    samples[-1] = msgspec.structs.replace(samples[-1], phase=Phase.SWITCHOVER)
    recorder = recorded(tmp_path, "postcopy", samples=samples, bandwidth=64)
    recorder.message("</script><script>alert(1)</script> & more", "warning")
    recorder.finish(outcome(sentence="opal <b>now</b> runs on beryl", report_id=recorder.id))
    return find_record("last", tmp_path)


def test_it_says_what_the_record_says(record: Record) -> None:
    page = html.fromstring(report_html(record))
    text = " ".join(page.find("body").text_content().split())
    for words in ("opal <b>now</b> runs on beryl", "20 ms by QEMU's count, 26 ms seen", "--bandwidth 64", "a -> b [r]",
                  "alert(1)", record.id, "asked for with --postcopy"):  # fmt: skip
        assert words in text
    rows = [
        [cell.text_content() for cell in row] for row in page.xpath("//h2[text()='Features']/following::tbody[1]/tr")
    ]
    assert [row[0] for row in rows] == [choice.feature for choice in record.began.plan.choices]
    assert {row[1] for row in rows} <= {"on", "off", "auto"}


def test_nothing_comes_from_elsewhere_and_nothing_that_was_recorded_runs(record: Record) -> None:
    text = report_html(record)
    page = html.fromstring(text)
    assert not page.xpath("//@src | //link | //@href | //iframe | //object | //@onclick")
    assert len(page.xpath("//script")) == 3  # data, uPlot, ours
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)
    assert len(text) < 300_000


def test_without_scripts_the_charts_are_pictures(record: Record) -> None:
    page = html.fromstring(report_html(record))
    figures = page.xpath("//figure")
    assert len(figures) == len(charts_of(record)) == 2
    for figure in figures:
        assert figure.xpath(".//svg//polyline/@points")[0]
        assert figure.xpath(".//svg/@aria-label")


def test_the_charts_data_is_what_was_sampled(record: Record) -> None:
    page = html.fromstring(report_html(record))
    charts = msgspec.json.decode(page.xpath("//script[@id='data']")[0].text, type=list[Chart])
    assert charts == charts_of(record)
    rates = next(chart for chart in charts if chart.title == "rates")
    assert [row.label for row in rates.series] == ["sent", "guest writes"]
    assert rates.series[0].values == (64.0,) * 20


def test_phases_follow_each_other_without_a_gap(record: Record) -> None:
    phases = phases_of(record)
    assert [name for name, _, _ in phases] == ["precopy", "switchover"]
    assert phases[0][2] == phases[1][1]
    assert phases[-1][2] >= record.samples[-1].at_s


def test_a_long_migration_is_thinned(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=curve(2))
    found = find_record("last", tmp_path)
    rows = tuple(msgspec.structs.replace(found.samples[0], at_s=float(number)) for number in range(5 * _MOST_POINTS))
    many = msgspec.structs.replace(found, rows=rows)
    assert all(len(chart.seconds) <= _MOST_POINTS for chart in charts_of(many))
    assert recorder.id == found.id


def test_a_gap_is_a_gap_and_zero_is_the_axis() -> None:
    picture = svg(Chart("x", "", (0.0, 1.0, 2.0, 3.0), (Series("a", (1.0, None, 0.0, 4.0)),)))
    lines = re.findall(r'points="([^"]*)"', picture)
    assert len(lines) == 2
    assert lines[1].split()[-1].endswith(",8.0")
    assert lines[1].split()[0].endswith(",158.0")


def test_a_refused_migration_has_a_report_too(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, samples=[])
    recorder.refused([("multifd", "too old", "upgrade")])
    text = report_html(find_record("last", tmp_path))
    assert "too old; a way out: upgrade" in text
    assert "<figure" not in text


def test_it_is_written_whole_or_not_at_all(record: Record, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report(record, target)
    assert target.read_text() == report_html(record)
    with pytest.raises(OSError, match="No such file"):
        write_report(record, tmp_path / "missing" / "report.html")
    assert [path.name for path in tmp_path.glob("*.html")] == ["report.html"]
