"""`./dev soak slow`: the tests that are left out of the default run for their time; arguments go to pytest."""

from __future__ import annotations

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-m", "slow", "tests", *sys.argv[1:]]))
