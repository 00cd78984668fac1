"""libvirt's own schema and its QEMU driver, where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
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
    folder = tempfile.mkdtemp(prefix="vm-", dir="/tmp")
    try:
        oracle = Oracle(Path(folder))
    except RuntimeError as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"libvirt's embedded QEMU driver cannot be had here: {error}")
    said = oracle.define((SAMPLES / "plain.xml").read_text())
    if said != "":
        oracle.close()
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"libvirt's embedded QEMU driver cannot be had here: {said or 'it died'}")
    yield oracle
    oracle.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def libvirt_schema() -> etree.RelaxNG:
    path = Path("/usr/share/libvirt/schemas/domain.rng")
    if not path.exists():
        pytest.skip(f"libvirt's schema is not installed ({path})")
    return etree.RelaxNG(etree.parse(str(path)))
