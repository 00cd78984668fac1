"""A real migration whose record's disk is frozen and whose output nobody reads: it can still be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import libvirt
import pytest

from tests.report.test_recorder import drain, full_pipe, mounted
from tests.support.lab import GuestFactory, eventually
from virtmig.lab.lab import Lab
from virtmig.progress import Phase
from virtmig.report.records import all_records

pytestmark = [pytest.mark.lab, pytest.mark.root]


def test_a_signal_aborts_whoever_does_not_read(lab: Lab, guest: GuestFactory, tmp_path: Path) -> None:
    fresh = guest()
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    source = libvirt.open(lab.a.uri)
    domain = source.lookupByName(fresh.name)
    reading, writing = full_pipe()
    with mounted(tmp_path / "frozen", "-o", "loop", str(image)) as folder:
        words = ["-c", lab.a.uri, "migrate", "--live", "--json", "--bandwidth", "3", fresh.name, lab.b.uri]
        process = subprocess.Popen([sys.executable, "-m", "virtmig.cli.main", *words], stdout=writing, stderr=writing,
                                   env={**os.environ, "VIRTMIG_RECORDS": str(folder)})  # fmt: skip
        os.close(writing)

        def moving() -> bool:
            return any(row.progress.phase is Phase.PRECOPY for record in all_records(folder) for row in record.samples)

        try:
            eventually(moving, "memory on its way", 60)
            subprocess.run(["fsfreeze", "-f", folder], check=True)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            eventually(lambda: domain.jobStats(0).get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE, "the abort", 30)
            assert time.monotonic() - began < 20
        finally:
            subprocess.run(["fsfreeze", "-u", folder], check=False)
            text, ends = b"", time.monotonic() + 20
            while process.poll() is None:
                text += drain(reading, 0.1)
                if time.monotonic() > ends:
                    process.kill()
            text += drain(reading)
        assert process.returncode == 1
        assert all_records(folder)[0].status == "aborted"
        assert b'"type":"result"' in text.replace(b": ", b":")
        assert fresh.only_on(lab.a)
    os.close(reading)
    source.close()
