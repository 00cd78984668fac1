"""Prometheus metrics of an agent: what it carries now and has carried. The API has those of the migrations themselves.

A running session has series of its own, per channel; they go away with it. Nothing here holds up a session.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from virtmig.agent.config import Address
from virtmig.agent.session import Session
from virtmig.errors import ChannelError, RequestError
from virtmig.link.responder import Responder

if TYPE_CHECKING:
    from virtmig.agent.server import Agent

#: of each kind; a host runs a few at once
MOST_SESSIONS = 100
#: scrapers at once; each takes a thread of the process that carries guests
MOST_CONNECTIONS = 8


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


class _Handler(WSGIRequestHandler):
    """Of prometheus_client's application; a peer that does not go on is not waited for."""

    timeout = 5.0  # socketserver: of each read and write

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class _Server(WSGIServer):
    """A thread for each connection, MOST_CONNECTIONS at most: beyond, the oldest makes room for the new one."""

    request_queue_size = 64

    def __init__(self, address: Address) -> None:
        """Raises OSError."""
        self.address_family, where = _resolved(address)
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._lock = threading.Lock()
        self._connections: dict[Any, None] = {}
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        """Without asking DNS for a name of this host, as http.server does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._connections), None)
                if oldest is not None:
                    del self._connections[oldest]
                    with contextlib.suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)
            if not self._room.acquire(timeout=1.0):
                self.shutdown_request(request)
                return
        with self._lock:
            self._connections[request] = None
        threading.Thread(target=self._answer, args=(request, client_address), name="virtmig-metrics",
                         daemon=True).start()  # fmt: skip

    def _answer(self, request: Any, client_address: Any) -> None:
        try:
            with contextlib.suppress(OSError):
                self.finish_request(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(request, None)
            self.shutdown_request(request)
            self._room.release()


def _resolved(address: Address) -> tuple[socket.AddressFamily, tuple[str, int]]:
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = found[0]
    return family, (str(where[0]), int(where[1]))


class MetricsServer:
    """HTTP on an address of its own, plain: it has numbers and names of guests, and takes nothing."""

    def __init__(self, metrics: AgentMetrics, address: Address) -> None:
        """Raises RequestError without prometheus_client, ChannelError when the address is taken."""
        try:
            from prometheus_client import CollectorRegistry, make_wsgi_app
        except ImportError:
            raise RequestError("metrics.listen needs prometheus_client, which is not installed",
                               option="metrics.listen", hint="pip install 'virtmig[api]'") from None  # fmt: skip
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        try:
            self._server = _Server(address)
        except OSError as error:
            raise ChannelError(f"metrics.listen: {address}: {error.strerror or error}") from None
        self._server.set_app(make_wsgi_app(registry))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="virtmig-metrics-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
