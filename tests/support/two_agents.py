"""Real agents in this process, with sockets of their own, two ends that play QEMU, and peers that are rude to them."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import trustme

from tests.support.hosts import UUID
from virtmig.agent.config import AgentConfig, AllowRow, LimitsSection, LocalSection, QemuSection, TlsSection
from virtmig.agent.discovery import Discovery
from virtmig.agent.server import Agent
from virtmig.engine.agents import AgentConnection, RelaySession, shake_hands
from virtmig.facts import GuestFacts
from virtmig.link.asking import Agreed, Exchanged
from virtmig.link.frames import HEADER, PREFACE, Control, FrameDecoder, FrameType, encode_message
from virtmig.link.initiator import Initiator
from virtmig.link.messages import Message, OpenChannel
from virtmig.link.side import Dial, Terms
from virtmig.stream.wire import QEMU_VM_FILE_MAGIC

#: QEMU's main channel begins so: magic, version 3
MAIN_HEADER = QEMU_VM_FILE_MAGIC.to_bytes(4, "big") + (3).to_bytes(4, "big")
GUEST = GuestFacts(name="opal", uuid=UUID, state="running", memory_bytes=64 << 20)
REQUEST = {"domain": GUEST.name, "desturi": "qemu+ssh://beryl/system", "live": True, "transport": "relay"}
PATIENCE_S = 20.0


def eventually(true: Callable[[], object], what: str = "it") -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen"
        pause.wait(0.01)


def write_pki(
    folder: Path, authority: trustme.CA, server: trustme.LeafCert, client: trustme.LeafCert | None = None
) -> TlsSection:
    """In QEMU's layout."""
    folder.mkdir(parents=True)
    authority.cert_pem.write_to_path(folder / "ca-cert.pem")
    for role, leaf in (("server", server), ("client", client)):
        if leaf is not None:
            leaf.private_key_pem.write_to_path(folder / f"{role}-key.pem")
            for part in leaf.cert_chain_pems:
                part.write_to_path(folder / f"{role}-cert.pem", append=True)
    return TlsSection(folder=str(folder))


def allow(peer: str, *rights: Any) -> AllowRow:
    return AllowRow(peer=peer, rights=rights)


class Host:
    """One agent. `address` is where others dial it."""

    #: what QEMU binaries of this machine say of themselves is asked once
    _known: ClassVar[dict[Any, Any]] = {}

    def __init__(self, folder: Path, *, link: str = "", **settings: Any) -> None:
        """`link`: what it listens on, `tcp:127.0.0.1:0` or, if left out, a unix socket in its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = folder / "agent.sock"
        listen = link or f"unix:{folder}/link.sock"
        given = {
            "listen": (listen,),
            "security": "plain",
            "local": LocalSection(socket=str(self.socket)),
            "qemu": QemuSection(sockets_folder=str(folder / "qemu"), libvirt_uri="none", user="root"),
        }
        self.config = AgentConfig(**{**given, **settings})
        self.agent = Agent(self.config, sessions_folder=folder / "sessions")
        if not self._known:
            asked = Discovery(self.config)
            asked.emulators()
            self._known.update(asked._known)
        self.agent.discovery._known = dict(self._known)

    @property
    def address(self) -> str:
        found = self.agent.addresses[1]
        return str(found).replace("tcp:0.0.0.0:", "tcp:127.0.0.1:")

    @property
    def port(self) -> int:
        return self.agent.addresses[1].port

    def __enter__(self) -> Host:
        self.agent.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.agent.stop(0.0)


def handshake(
    source: Host, destination: str, *, heard: Callable[[Exchanged], None] = lambda message: None, **options: Any
) -> Agreed:
    """Only a handshake; raises as it does for a client."""
    guest = options.pop("guest", GUEST)
    request = REQUEST | {name.replace("_", "-"): value for name, value in options.items()}
    connection, agreed = shake_hands(
        source.socket, destination, request=request, guest=guest, only_handshake=True, heard=heard
    )
    connection.close()
    return agreed


class Migration:
    """A session between two hosts that are both here, with two sockets that stand for the QEMUs' main channel."""

    def __init__(self, source: Host, destination: str, **options: Any) -> None:
        self.told: list[Any] = []
        request = REQUEST | {name.replace("_", "-"): value for name, value in options.items()}
        connection, self.agreed = shake_hands(source.socket, destination, request=request, guest=GUEST)
        self.session = RelaySession(connection, self.agreed, self.told.append)
        self.source: socket.socket | None = None
        self.destination: socket.socket | None = None

    def connect(self) -> Migration:
        """QEMU of the destination listens, QEMU of the source connects and writes its header."""
        attachment = self.agreed.attachment
        assert attachment is not None
        port = int(attachment.uri.rpartition(":")[2])
        with socket.create_server((attachment.listen_address, port)) as listening:
            listening.settimeout(PATIENCE_S)
            self.source = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
            self.source.sendall(MAIN_HEADER)
            self.destination, _ = listening.accept()
        self.destination.settimeout(PATIENCE_S)
        assert exactly(self.destination, len(MAIN_HEADER)) == MAIN_HEADER
        return self

    def echo(self, data: bytes) -> None:
        """There and back again, unchanged."""
        assert self.source is not None
        assert self.destination is not None
        self.source.sendall(data)
        assert exactly(self.destination, len(data)) == data
        self.destination.sendall(data[::-1])
        assert exactly(self.source, len(data)) == data[::-1]

    def finish(self) -> None:
        """Both QEMUs are done: the session ends well."""
        assert self.source is not None
        assert self.destination is not None
        self.source.shutdown(socket.SHUT_WR)
        assert self.destination.recv(1) == b""
        self.destination.shutdown(socket.SHUT_WR)
        assert self.source.recv(1) == b""
        self.source.close()
        self.destination.close()
        assert self.session.over.wait(PATIENCE_S)
        self.session.close()
        assert self.session.ended is not None
        assert self.session.ended.state == "finished", self.session.ended

    def close(self) -> None:
        for each in (self.source, self.destination):
            if each is not None:
                each.close()
        self.session.close("the test is over", settle_s=PATIENCE_S)


def exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"the end, {count - len(data)} bytes early"
        data += piece
    return bytes(data)


class RudeSource:
    """A source that opens connections by itself and may do everything wrong; its proofs are right when it wants."""

    def __init__(self, address: str, terms: Terms, *, wrap: ssl.SSLContext | None = None, **options: Any) -> None:
        self.address = address
        self.wrap = wrap
        self.sockets: list[socket.socket] = []
        self.control = self.dial()
        self.decoder = FrameDecoder("control", frozenset(FrameType))
        request = REQUEST | {name.replace("_", "-"): value for name, value in options.items()}
        self.side = Initiator(terms, "control", time.monotonic(), request=request, guest=GUEST)
        self.dials: list[Dial] = []

    def dial(self) -> socket.socket:
        sock = dial(self.address)
        if self.wrap is not None:
            sock = self.wrap.wrap_socket(sock, server_hostname="127.0.0.1")
        self.sockets.append(sock)
        return sock

    def agree(self) -> RudeSource:
        """Up to the agreement; no channel is opened."""
        [hello] = self.side.begin(time.monotonic())
        self.control.sendall(PREFACE + hello.frame)  # type: ignore[union-attr]
        while not self.side.channels:
            self.decoder.feed(self.control.recv(65536))
            for event in self.decoder.events():
                assert isinstance(event, Control)
                for action in self.side.receive(event, time.monotonic()):
                    if isinstance(action, Dial):
                        self.dials.append(action)
                    elif hasattr(action, "frame"):
                        self.control.sendall(action.frame)
        return self

    def opening(self, number: int = 0) -> OpenChannel:
        """The right first message for that channel."""
        [send] = self.side.connected(self.dials[number].channel, object(), time.monotonic())
        message = send.message  # type: ignore[union-attr]
        assert isinstance(message, OpenChannel)
        return message

    def ask(self, message: Message) -> tuple[Message, socket.socket]:
        """On a connection of its own: what is answered."""
        sock = self.dial()
        return ask(sock, message), sock

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


def dial(address: str) -> socket.socket:
    kind, _, rest = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(rest)
        return sock
    host, _, port = rest.rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def ask(sock: socket.socket, message: Message) -> Message:
    sock.sendall(PREFACE + encode_message(message))
    return hear(sock)


def hear(sock: socket.socket) -> Message:
    decoder = FrameDecoder("an answer", frozenset(FrameType))
    decoder.feed(exactly(sock, len(PREFACE)))
    assert list(decoder.events()) == []
    header = exactly(sock, HEADER.size)
    decoder.feed(header + exactly(sock, HEADER.unpack(header)[3]))
    [event] = decoder.events()
    assert isinstance(event, Control)
    return event.message


def ends(sock: socket.socket) -> bool:
    """The other side closes it, in whatever way, and says no more."""
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def threads(*names: str) -> list[str]:
    return sorted(each.name for each in threading.enumerate() if not names or each.name.startswith(names))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are as many afterwards as before."""
    before = len(threads()), descriptors()
    yield
    eventually(lambda: len(threads()) <= before[0] and descriptors() <= before[1], f"what was before ({before})")


def limits(**values: int) -> LimitsSection:
    return LimitsSection(**values)


def asking(host: Host) -> AgentConnection:
    return AgentConnection(host.socket)


def replaced(struct: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(struct, **changes)
