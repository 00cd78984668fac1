"""schemathesis against the served API: requests made from the OpenAPI document, right and wrong ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.integrations.api.serving import ended, served
from virtmig.agent.config import Address
from virtmig.integrations.api.app import Api
from virtmig.integrations.api.jobs import Jobs

pytest.importorskip("schemathesis", reason="schemathesis is not installed")


#: what takes a minute and more runs when VIRTMIG_SCHEMATHESIS is set
FULL = ("--phases", "examples,coverage,fuzzing", "--max-examples", "30")
QUICK = ("--phases", "fuzzing", "--max-examples", "3")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(FULL, id="full", marks=pytest.mark.skipif(
            not os.environ.get("VIRTMIG_SCHEMATHESIS"), reason="takes minutes: set VIRTMIG_SCHEMATHESIS=1")),
    ],
)  # fmt: skip
def test_it_finds_no_fault(tmp_path: Path, words: tuple[str, ...]) -> None:
    one = ended(tmp_path)
    program = shutil.which("st", path=str(Path(sys.executable).parent))
    assert program
    with served(Api(Jobs(tmp_path), source_uri="test:///default"), Address("tcp", host="127.0.0.1"), plain=True) as at:
        base = f"http://127.0.0.1:{at.port}"
        done = subprocess.run(
            [program, "run", f"{base}/openapi.json", "--seed", "1", "--request-timeout", "20", "--no-color", *words],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert httpx.get(f"{base}/v1/migrations/{one}").status_code == 200
