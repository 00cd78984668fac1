"""The agent's metrics: what runs, what was carried, what was refused; and that they go away."""

from __future__ import annotations

import socket
import threading
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.two_agents import Host, Migration, dial, ends, eventually, nothing_left
from virtmig.agent.config import MetricsSection, parse_config
from virtmig.agent.metrics import MOST_CONNECTIONS, _Handler
from virtmig.errors import ChannelError, RequestError

Samples = dict[tuple[str, tuple[str, ...]], float]


def scraped(host: Host) -> Samples:
    """(name, values of its labels in the order of their names) -> value, over HTTP."""
    server = host.agent._metrics_server
    assert server is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_a_session_carries(place: Path) -> None:
    metrics = MetricsSection(listen="tcp:127.0.0.1:0")
    with (
        nothing_left(),
        Host(place / "a", metrics=metrics) as source,
        Host(place / "b", metrics=metrics) as destination,
    ):
        migration = Migration(source, destination.address).connect()
        migration.echo(b"x" * 1000)
        eventually(lambda: ("virtmig_agent_sessions", ("destination", "running")) in scraped(destination))
        before = scraped(source)
        assert before["virtmig_agent_channel_bytes_total", ("main", "to_qemu", "opal", "source")] == 1000
        sent = before["virtmig_agent_channel_bytes_total", ("main", "from_qemu", "opal", "source")]
        assert sent > 1000
        assert before["virtmig_agent_carried_bytes_total", ("from_qemu",)] == sent
        migration.finish()
        eventually(lambda: not destination.agent.sessions())
        eventually(lambda: not source.agent.sessions())
        after, theirs = scraped(source), scraped(destination)
        assert after["virtmig_agent_sessions_ended_total", ("source", "finished")] == 1
        assert after["virtmig_agent_carried_bytes_total", ("from_qemu",)] == sent
        assert theirs["virtmig_agent_carried_bytes_total", ("to_qemu",)] == sent
        assert not [name for name, _ in (*after, *theirs) if name == "virtmig_agent_channel_bytes_total"]


def test_who_was_refused(place: Path) -> None:
    with Host(place / "b", metrics=MetricsSection(listen="tcp:127.0.0.1:0")) as host:
        with dial(host.address) as rude:
            rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert ends(rude)
        eventually(lambda: scraped(host)["virtmig_agent_refused_connections_total", ()] == 1)
        eventually(lambda: scraped(host)["virtmig_agent_greetings", ()] == 0)


def test_idle_connections_take_no_threads_without_bound_and_keep_no_scraper_out(place: Path) -> None:
    with Host(place / "b", metrics=MetricsSection(listen="tcp:127.0.0.1:0")) as host, ExitStack() as sockets:
        server = host.agent._metrics_server
        assert server is not None
        before = threading.active_count()
        for _ in range(5 * MOST_CONNECTIONS):
            idle = sockets.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            idle.sendall(b"GET /metr")
            assert threading.active_count() <= before + MOST_CONNECTIONS
        assert scraped(host)["virtmig_agent_greetings", ()] == 0
        assert _Handler.timeout == 5.0


def test_an_address_that_is_taken_is_said_before_the_agent_runs(place: Path) -> None:
    with Host(place / "a", metrics=MetricsSection(listen="tcp:127.0.0.1:0")) as host:
        server = host.agent._metrics_server
        assert server is not None
        second = Host(place / "b", metrics=MetricsSection(listen=f"tcp:127.0.0.1:{server.port}"))
        with nothing_left(), pytest.raises(ChannelError, match=r"metrics\.listen: tcp:127\.0\.0\.1:\d+: .*in use"):
            second.agent.start()
    with pytest.raises(RequestError, match="Prometheus asks over TCP"):
        parse_config('metrics.listen = "unix:/run/x"')
