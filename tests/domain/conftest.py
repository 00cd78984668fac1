"""libvirt's own schema and its QEMU driver, where they are installed."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from tests.domain.libvirt_oracle import Oracle

SAMPLES = Path(__file__).resolve().parents[2] / "xml" / "domains"


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    if importlib.util.find_spec("libvirt") is None:
        pytest.skip("libvirt-python is not installed")
    missing = "libvirt's embedded QEMU driver cannot be had here"
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            oracle = Oracle(Path(folder))
        except RuntimeError as error:
            pytest.skip(f"{missing}: {error}")
        with contextlib.closing(oracle):
            said = oracle.define((SAMPLES / "plain.xml").read_text())
            if said != "":
                pytest.skip(f"{missing}: {said or 'it died'}")
            yield oracle


@pytest.fixture(scope="session")
def libvirt_schema() -> etree.RelaxNG:
    path = Path("/usr/share/libvirt/schemas/domain.rng")
    if not path.exists():
        pytest.skip(f"libvirt's schema is not installed ({path})")
    return etree.RelaxNG(etree.parse(str(path)))
