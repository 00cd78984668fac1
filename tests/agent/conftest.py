"""Agents in short folders, since a unix socket's path has at most 107 bytes; and what they log."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """Every event as a dictionary, as it is logged."""
    structlog.reset_defaults()
    with structlog.testing.capture_logs() as events:
        yield events
