"""A served API in a thread, and a client of it; records that look like those of real migrations."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.report.test_records import outcome, recorded
from virtmig.agent.config import Address, AgentConfig
from virtmig.integrations.api.app import Api
from virtmig.integrations.api.jobs import Jobs
from virtmig.integrations.api.serving import Listening


@contextlib.contextmanager
def served(api: Api, address: Address, config: AgentConfig | None = None, *, plain: bool = False) -> Iterator[Address]:
    """Where it listens."""
    with Listening(api.application(), address, config or AgentConfig(), plain=plain) as listening:
        thread = threading.Thread(target=listening.run)
        thread.start()
        try:
            yield listening.address
        finally:
            listening.stop()
            thread.join(15)
            assert not thread.is_alive()


@contextlib.contextmanager
def client_of(records: Path, **more: object) -> Iterator[httpx.Client]:
    """An API over these records on a unix socket."""
    folder = tempfile.mkdtemp(prefix="vma-", dir="/tmp")
    try:
        with served(Api(Jobs(records), **more), Address("unix", path=f"{folder}/s")) as address:  # type: ignore[arg-type]
            transport = httpx.HTTPTransport(uds=address.path)
            with httpx.Client(transport=transport, base_url="http://virtmig", timeout=20) as client:
                yield client
    finally:
        shutil.rmtree(folder)


def ended(folder: Path, *options: str, **values: object) -> str:
    """The id of a record that has ended well."""
    recorder = recorded(folder, *options, **values)
    recorder.message("the agents have lost each other", "warning")
    recorder.finish(outcome(report_id=recorder.id))
    return recorder.id
