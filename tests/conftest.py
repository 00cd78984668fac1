"""What every test shares: the lab's fixtures, and a last word on what was skipped and why."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter

import pytest

# the suite is collected without the lab too: its fixtures are then missing only from the tests that ask for them
pytest_plugins = ["tests.support.lab"] if importlib.util.find_spec("tests.support.lab") else []


@pytest.fixture(autouse=True, scope="session")
def _records_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Migrations in tests leave their records in a folder of the run."""
    os.environ["VIRTMIG_RECORDS"] = str(tmp_path_factory.mktemp("records"))


def pytest_configure() -> None:
    """Under nohup, or in the background of a script, HUP and INT are ignored: what tests start would inherit that."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The default run ends within minutes: what is slow is only run when marks are named (./dev soak slow)."""
    left = [item for item in items if item.get_closest_marker("slow")]
    if left and not config.option.markexpr and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line with the count, then one line for each reason, the most frequent first."""
    reasons = skip_reasons(terminalreporter.stats.get("skipped", []))
    if not reasons:
        return
    terminalreporter.section(f"{reasons.total()} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")


def skip_reasons(reports: list[pytest.TestReport]) -> Counter[str]:
    """How many tests were skipped for each reason."""
    found: Counter[str] = Counter()
    for report in reports:
        # a skip's longrepr is (file, line, "Skipped: reason")
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[text.removeprefix("Skipped: ")] += 1
    return found
