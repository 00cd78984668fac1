"""Every test that asks for `emulator` runs with each QEMU that is at hand."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.emulators import emulators
from tests.support.leftovers import leftovers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "emulator" in metafunc.fixturenames:
        found = emulators()
        if not found:
            found = (pytest.param(None, marks=pytest.mark.skip("no qemu-system-x86_64")),)  # type: ignore[assignment]
        metafunc.parametrize("emulator", found, ids=[getattr(each, "version_name", "none") for each in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a second QEMU is only run where there is one: `./dev compat`."""
    if len(emulators()) < 2:
        left = [item for item in items if item.get_closest_marker("compat")]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if not item.get_closest_marker("compat")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With more than one QEMU: what works with which, a line a scenario."""
    versions = sorted((each.version_name for each in emulators()), key=lambda version: [*map(int, version.split("."))])
    if len(versions) < 2:
        return
    cells: dict[str, dict[str, str]] = {}
    for outcome, sign in (("passed", "yes"), ("failed", "NO"), ("error", "NO")):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.partition("::")[2]
            test, _, parameters = name.partition("[")
            version, _, case = parameters.rstrip("]").partition("-")
            if version in versions:
                row = f"{test.removeprefix('test_').replace('_', ' ')}{f' ({case})' if case else ''}"
                cells.setdefault(row, {})[version] = sign if cells.get(row, {}).get(version) != "NO" else "NO"
    if cells:
        terminalreporter.section("QEMU versions by scenarios")
        width = max(map(len, cells))
        terminalreporter.line(f"{'':{width}}  " + "  ".join(f"{version:>5}" for version in versions))
        for row, by_version in sorted(cells.items()):
            signs = "  ".join(f"{by_version.get(version, '-'):>5}" for version in versions)
            terminalreporter.line(f"{row:{width}}  {signs}")


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No thread, descriptor, mapping or child more than before."""
    gc.collect()
    before = leftovers()
    yield
    gc.collect()
    more = {kind: list((Counter(names) - Counter(before[kind])).elements()) for kind, names in leftovers().items()}
    assert not any(more.values()), more
