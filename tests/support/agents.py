"""Migrations through the lab's agents: their options, what they leave behind, and a peer between them that meddles."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.lab import LabGuest
from virtmig.engine.agents import ask_sessions
from virtmig.lab.agents import agent_address, agent_socket
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.link.asking import SessionRecord
from virtmig.link.frames import HEADER, PREFACE, FrameType


def through(source: LabHost, destination: LabHost, address: str = "") -> dict[str, Any]:
    """Options for a migration through the agents of these hosts; `address`: of something before the second one."""
    return {"transport": "relay", "agent": str(agent_socket(source)),
            "destination_agent": address or agent_address(destination)}  # fmt: skip


def sessions(host: LabHost, guest: LabGuest | None = None) -> tuple[SessionRecord, ...]:
    """What that host's agent keeps of migrations, or of this guest's."""
    return tuple(known for known in ask_sessions(agent_socket(host)) if guest is None or known.domain == guest.name)


def left_behind(lab: Lab) -> list[str]:
    """What the agents still hold though nothing is on its way: sockets for QEMU, and threads that carry or wait."""
    found = []
    for host in lab.hosts:
        folder = host.folder / "run" / "virtmig" / "qemu"
        found += [str(path) for path in folder.rglob("*")] if folder.is_dir() else []
        if host.state.agent is not None and host.state.agent.alive:
            for task in Path(f"/proc/{host.state.agent.pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    name = (task / "comm").read_text().strip()
                    if name.startswith(("relay", "dial", "accept disks")):
                        found.append(f"{host.hostname}: thread {name}")
    return found


class Frame:
    """One frame that went through the proxy."""

    def __init__(self, kind: int, payload: bytes, *, to_source: bool, connection: Connection) -> None:
        self.kind = kind
        self.payload = payload
        self.to_source = to_source
        self.connection = connection

    def __repr__(self) -> str:
        return f"{'<-' if self.to_source else '->'} {FrameType(self.kind).name} {len(self.payload)}"


class Connection:
    """From the source's agent to the destination's; `control` when it began with HELLO or resumes control."""

    def __init__(self, source: socket.socket, destination: socket.socket) -> None:
        self.source, self.destination = source, destination
        self.control = False
        self.flowing = threading.Event()
        self.flowing.set()

    def cut(self) -> None:
        self.flowing.set()
        for each in (self.source, self.destination):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class LinkProxy:
    """Listens on a unix socket, passes whole frames of the link on to the destination's agent, and asks about each.

    `meddle(frame)` is called before a frame goes on; it may block, cut, or return False to swallow it.
    """

    def __init__(self, path: Path, target: Path, meddle: Callable[[Frame], object] = lambda frame: True) -> None:
        self.address = f"unix:{path}"
        self.meddle = meddle
        self.refusing = threading.Event()
        self.connections: list[Connection] = []
        self.frames: list[Frame] = []
        self._path, self._target = path, target
        self._threads: list[threading.Thread] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(64)
        self._acceptor = threading.Thread(target=self._accept, name="link proxy")

    def __enter__(self) -> LinkProxy:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._path.unlink(missing_ok=True)
        self._acceptor.join()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self, *, refuse: bool = False) -> None:
        """End every connection; with `refuse` also those that come, until `restore`."""
        if refuse:
            self.refusing.set()
        for connection in list(self.connections):
            connection.cut()

    def restore(self) -> None:
        self.refusing.clear()

    def _accept(self) -> None:
        while True:
            try:
                source, _ = self._server.accept()
            except OSError:
                return
            destination = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if self.refusing.is_set():
                    raise OSError("refused")
                destination.connect(str(self._target))
            except OSError:
                source.close()
                destination.close()
                continue
            connection = Connection(source, destination)
            self.connections.append(connection)
            for to_source in (False, True):
                thread = threading.Thread(target=self._pass, args=(connection, to_source), name="link proxy")
                self._threads.append(thread)
                thread.start()

    def _pass(self, connection: Connection, to_source: bool) -> None:
        ends = (connection.destination, connection.source) if to_source else (connection.source, connection.destination)
        try:
            ends[1].sendall(_exactly(ends[0], len(PREFACE)))
            while True:
                header = _exactly(ends[0], HEADER.size)
                kind, _, _, length = HEADER.unpack(header)
                frame = Frame(kind, _exactly(ends[0], length), to_source=to_source, connection=connection)
                resumed = kind == FrameType.RESUME and b"control" in frame.payload
                if resumed or kind in (FrameType.HELLO, FrameType.PING):
                    connection.control = True
                if kind < FrameType.DATA:
                    self.frames.append(frame)
                goes_on = self.meddle(frame)
                connection.flowing.wait()
                if goes_on is not False:
                    ends[1].sendall(header + frame.payload)
        except (OSError, EOFError, struct.error):
            connection.cut()


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def settled(lab: Lab, seconds: float = 20.0) -> list[str]:
    """`left_behind`, after it had time to become nothing."""
    deadline = time.monotonic() + seconds
    while (found := left_behind(lab)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
