"""Prometheus metrics of an agent: what it carries now and has carried. The API has those of the migrations themselves.

A running session has series of its own, per channel; they go away with it. Nothing here holds up a session.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from virtmig.agent.config import Address
from virtmig.agent.session import Session
from virtmig.errors import ChannelError, RequestError
from virtmig.link.responder import Responder

if TYPE_CHECKING:
    from virtmig.agent.server import Agent

#: of each kind; a host runs a few at once
MOST_SESSIONS = 100


class AgentMetrics:
    """A collector in prometheus_client's sense. Thread-safe."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._ended: Counter[tuple[str, str]] = Counter()
        self._carried: Counter[str] = Counter()

    @contextlib.contextmanager
    def ending(self, session: Session) -> Iterator[None]:
        """It is over, and is forgotten inside; what it carried stays counted, and is counted once."""
        with self._lock:
            self._ended[_role(session), str(session.side.state)] += 1
            for from_qemu, to_qemu in session.carried().values():
                self._carried["from_qemu"] += from_qemu
                self._carried["to_qemu"] += to_qemu
            yield

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        agent = self._agent
        with self._lock:
            sessions = agent.sessions()[:MOST_SESSIONS]
            ended, carried = dict(self._ended), self._carried.copy()
            bytes_of = [(session, session.carried()) for session in sessions]
        running = GaugeMetricFamily("virtmig_agent_sessions", "Sessions in this state", labels=["role", "state"])
        for (role, state), count in Counter((_role(each), str(each.side.state)) for each in sessions).items():
            running.add_metric([role, state], count)
        over = CounterMetricFamily("virtmig_agent_sessions_ended", "Sessions that are over", labels=["role", "state"])
        for (role, state), count in sorted(ended.items()):
            over.add_metric([role, state], count)
        channels = CounterMetricFamily("virtmig_agent_channel_bytes", "Bytes of a running session's channel",
                                       labels=["domain", "role", "channel", "direction"])  # fmt: skip
        for session, counts in bytes_of:
            proposal = session.side.proposal
            for name, both in counts.items():
                for direction, count in zip(("from_qemu", "to_qemu"), both, strict=True):
                    carried[direction] += count
                    domain = proposal.guest.name if proposal is not None else ""
                    channels.add_metric([domain, _role(session), name, direction], count)
        total = CounterMetricFamily("virtmig_agent_carried_bytes", "Bytes of all sessions", labels=["direction"])
        for direction in ("from_qemu", "to_qemu"):
            total.add_metric([direction], carried[direction])
        yield from (running, over, channels, total)
        yield CounterMetricFamily("virtmig_agent_refused_connections", "Connections that were refused",
                                  value=agent.refusals.total)  # fmt: skip
        yield GaugeMetricFamily("virtmig_agent_greetings", "Connections that have not proved yet what they are",
                                value=len(agent.greetings))  # fmt: skip


def _role(session: Session) -> str:
    return "destination" if isinstance(session.side, Responder) else "source"


class MetricsServer:
    """HTTP on an address of its own, plain: it has numbers and names of guests, and takes nothing."""

    def __init__(self, metrics: AgentMetrics, address: Address) -> None:
        """Raises RequestError without prometheus_client, ChannelError when the address is taken."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise RequestError("metrics.listen needs prometheus_client, which is not installed",
                               option="metrics.listen", hint="pip install 'virtmig[api]'") from None  # fmt: skip
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry)
        except OSError as error:
            raise ChannelError(f"metrics.listen: {address}: {error.strerror or error}") from None
        self.port: int = self._server.server_address[1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
