"""Nova comes in an environment of its own: `python3 -m venv DIR; DIR/bin/pip install nova CHECKOUT`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nova_python() -> Path:
    """The interpreter of that environment."""
    folder = os.environ.get("VIRTMIG_NOVA", "")
    if not folder:
        pytest.skip("needs Nova in an environment of its own: VIRTMIG_NOVA=DIR (tests/integrations/nova/conftest.py)")
    return Path(folder) / "bin" / "python"
