"""Where a host's QEMU meets its agent: the source's comes to us, to the destination's we go, in the order it needs.

libvirt is told one migrate URI for both hosts. At the source the agent listens there, at the destination QEMU does. A
unix path must lie in the agents' folder on both hosts, and must not be the same file; else it is TCP on loopback, with
another loopback address at the destination where both share a network. No path is taken from a peer but in our folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from virtmig.agent.access import QemuUser, check_qemu, make_sockets_folder, share_socket
from virtmig.agent.config import AgentConfig
from virtmig.agent.logs import get_logger
from virtmig.engine.channels import Arrivals
from virtmig.engine.transport import Address, Listener, Stop
from virtmig.errors import ChannelError, LocalProtocolError, MigrationError
from virtmig.link.messages import Attachment, ChannelName
from virtmig.stream.channel import Expected, Identity, Moment, Role, Step, connection_order
from virtmig.stream.channel_rules import Rule
from virtmig.stream.wire import Dialect

log = get_logger("agent")

MIGRATION_SOCKET, DISKS_SOCKET = "m.sock", "d.sock"
_PLACE = re.compile(r"[0-9a-f]{16}")
#: libvirt's own range (migration_port_min, migration_port_max): a port from it may be given to another migration
_LIBVIRT_PORTS = range(49152, 49216)
_CONNECT_S = 5.0
_LOOK_AGAIN_S = 0.002
_CHANNEL_OF = {Role.MAIN: "main", Role.MULTIFD: "parallel", Role.PREEMPT: "priority"}
_MULTIFD_HELLO_BYTES = 4


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What the agreed channels mean to QEMU."""

    source: Dialect
    destination: Dialect
    channels: tuple[ChannelName, ...]
    postcopy: bool = False
    recovery: bool = False

    def count(self, role: str) -> int:
        return sum(channel.role == role for channel in self.channels)

    @property
    def preempt(self) -> bool:
        return self.count("priority") > 0

    @property
    def early_preempt(self) -> bool:
        """QEMU 7.2 opens it at the start."""
        return self.preempt and self.source is Dialect.QEMU_7_2

    def expected(self) -> Expected:
        """What our own rules make of the source's connections."""
        multifd = 0 if self.recovery else self.count("parallel")
        return Expected(
            Rule.VIRTMIG,
            multifd_channels=multifd,
            postcopy=self.postcopy or self.preempt,
            preempt=self.preempt,
            early_preempt=self.early_preempt and not self.recovery,
            recovery=self.recovery,
        )

    def order(self) -> tuple[Step, ...]:
        """Raises LocalProtocolError for what that destination cannot do."""
        if self.recovery:
            steps = [Step(Role.MAIN, 0, Moment.AT_ONCE, True, "a paused destination takes the first as main")]
            if self.preempt:
                steps.append(Step(Role.PREEMPT, 0, Moment.MAIN_WRITTEN, False, "and the next as preempt"))
            return tuple(steps)
        return connection_order(
            self.destination,
            multifd_channels=self.count("parallel"),
            postcopy=self.postcopy or self.preempt,
            preempt=self.preempt,
            early_preempt=self.early_preempt,
        )


def dialect_of(version: int | None) -> Dialect:
    """Which of the known ages a QEMU is of; the newest where nobody knows."""
    if version is None or version >= 10_001_000:
        return Dialect.QEMU_11_1
    return Dialect.QEMU_10_0 if version >= 8_000_000 else Dialect.QEMU_7_2


def channel_of(identity: Identity) -> ChannelName:
    """QEMU's connection by the link's name."""
    return ChannelName(_CHANNEL_OF[identity.role], identity.index)  # type: ignore[arg-type]


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return secrets.token_hex(8)


def _place_of(path: str) -> str:
    """A file system object of this running kernel, by a name that no other has."""
    status = os.stat(path)
    return f"{_boot_id()} {status.st_dev:x}:{status.st_ino:x}"


class _QemuListener(Listener):
    """Only QEMU's user gets in: the folder's group may have other members, and loopback is open to everybody."""

    def __init__(self, address: Address, stop: Stop, user: QemuUser) -> None:
        super().__init__(address, stop)
        self._user = user

    def accept(self) -> socket.socket | None:
        connection = super().accept()
        if connection is None:
            return None
        try:
            check_qemu(connection, self._user)
        except (ChannelError, OSError) as error:
            log.warning("refused", peer=f"a process of this host at {self.address}", reason=str(error))
            connection.close()
            return None
        return connection


class SourcePlaces:
    """The sockets that this host's QEMU may come to: offered both ways, until the peer has chosen."""

    def __init__(self, config: AgentConfig, user: QemuUser, stop: Stop, *, disks: bool) -> None:
        self._stop = stop
        self._listeners: dict[str, tuple[Listener, Listener | None]] = {}
        self._folder: Path | None = None
        #: why a way is not offered
        self.problems: list[str] = []
        offers: list[Attachment] = []
        for offer in (self._offer_unix, self._offer_tcp):
            try:
                offers.append(offer(config, user, disks))
            except (MigrationError, OSError) as error:
                self.problems.append(str(error))
        self.offers = tuple(offers)
        if not offers:
            self.close()
            raise ChannelError("no place where QEMU could meet the agent: " + "; ".join(self.problems))

    def choose(self, uri: str) -> tuple[Listener, Listener | None]:
        """The listeners of the chosen one, for migration and for disks; all others are closed."""
        chosen = self._listeners.pop(uri)
        for listener in (each for pair in self._listeners.values() for each in pair):
            if listener is not None:
                listener.close()
        self._listeners = {uri: chosen}
        return chosen

    def close(self) -> None:
        for listener in (each for pair in self._listeners.values() for each in pair):
            if listener is not None:
                listener.close()
        self._listeners.clear()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _offer_unix(self, config: AgentConfig, user: QemuUser, disks: bool) -> Attachment:
        root = make_sockets_folder(config.sockets_folder, int(config.qemu.sockets_mode, 8), user)
        folder = root / secrets.token_hex(8)
        self._folder = make_sockets_folder(folder, int(config.qemu.sockets_mode, 8), user)
        paths = [folder / MIGRATION_SOCKET, *([folder / DISKS_SOCKET] if disks else [])]
        listeners = []
        for path in paths:
            listeners.append(_QemuListener(Address.parse(f"unix:{path}"), self._stop, user))
            share_socket(path, user)
        uri = f"unix://{paths[0]}"
        self._listeners[uri] = listeners[0], listeners[1] if disks else None
        return Attachment(uri=uri, disks_uri=f"unix://{paths[1]}" if disks else "", place=_place_of(str(root)))

    def _offer_tcp(self, config: AgentConfig, user: QemuUser, disks: bool) -> Attachment:
        listeners = [_on_loopback(self._stop, user) for _ in range(2 if disks else 1)]
        uris = [f"tcp://{listener.address.host}:{listener.address.port}" for listener in listeners]
        self._listeners[uris[0]] = listeners[0], listeners[1] if disks else None
        return Attachment(uri=uris[0], disks_uri=uris[1] if disks else "", place=_place_of("/proc/self/ns/net"))


def _on_loopback(stop: Stop, user: QemuUser) -> Listener:
    refused: list[Listener] = []
    try:
        while True:
            listener = _QemuListener(Address("127.0.0.1", 0), stop, user)
            if listener.address.port not in _LIBVIRT_PORTS:
                return listener
            refused.append(listener)  # kept until another one is found, or the kernel would give it again
    finally:
        for each in refused:
            each.close()


class SourceMeeting:
    """This host's QEMU comes: every connection is named by our rules and handed over. Disks come in their own order."""

    def __init__(
        self,
        listeners: tuple[Listener, Listener | None],
        shape: Shape,
        stop: Stop,
        deliver: Callable[[ChannelName, socket.socket], None],
    ) -> None:
        self._deliver = deliver
        self._stop = stop
        self.arrivals = Arrivals(listeners[0], shape.expected(), stop, self._named)
        self._disks = listeners[1]
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if self._disks is not None and shape.count("storage"):
            self._thread = threading.Thread(target=self._accept_disks, args=(shape.count("storage"),), daemon=True,
                                            name="accept disks")  # fmt: skip
            self._thread.start()
        self.arrivals.start()

    def close(self) -> None:
        self._closing.set()
        self.arrivals.close()
        if self._thread is not None:
            self._thread.join()

    def _named(self, identity: Identity, connection: socket.socket) -> None:
        self._deliver(channel_of(identity), connection)

    def _accept_disks(self, count: int) -> None:
        assert self._disks is not None
        taken = 0
        while not self._closing.is_set() and not self._stop.requested.is_set():
            readable, _, _ = select.select([self._disks.socket], [], [], 0.2)
            connection = self._disks.accept() if readable else None
            if connection is None:
                continue
            if taken >= count:
                connection.close()
                continue
            self._deliver(ChannelName("storage", taken), connection)
            taken += 1


def sweep_places(config: AgentConfig) -> list[str]:
    """Remove what an agent that was killed has left of its places; their names. For an agent that serves nobody yet."""
    swept = []
    for folder in config.sockets_folder.glob("*"):
        if _PLACE.fullmatch(folder.name) and not folder.is_symlink():
            _remove_place(folder)
            swept.append(folder.name)
    return swept


def _remove_place(folder: Path) -> None:
    for name in (MIGRATION_SOCKET, DISKS_SOCKET):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


class DestinationPlace:
    """The place that was chosen on this host, where QEMU will listen; made and removed by us, but for QEMU's socket."""

    def __init__(self, offers: tuple[Attachment, ...], config: AgentConfig, user: QemuUser) -> None:
        """Raises ChannelError with what speaks against each offer."""
        self.user = user
        self._folder: Path | None = None
        problems: list[str] = []
        for offer in offers:
            try:
                self.attachment = self._take(offer, config, user)
                return
            except (MigrationError, OSError) as error:
                problems.append(f"{offer.uri}: {error}")
        raise ChannelError("no place where QEMU could meet the agent of the destination: " + "; ".join(problems))

    def address(self, channel: ChannelName) -> Address:
        """Where QEMU listens for that channel."""
        uri = self.attachment.disks_uri if channel.role == "storage" else self.attachment.uri
        if uri.startswith("unix://"):
            return Address(path=uri.removeprefix("unix://"))
        port = int(uri.rpartition(":")[2])
        return Address(host=self.attachment.listen_address or "127.0.0.1", port=port)

    def close(self) -> None:
        if self._folder is not None:
            _remove_place(self._folder)

    def _take(self, offer: Attachment, config: AgentConfig, user: QemuUser) -> Attachment:
        if offer.uri.startswith("unix://"):
            return self._take_unix(offer, config, user)
        return self._take_tcp(offer)

    def _take_unix(self, offer: Attachment, config: AgentConfig, user: QemuUser) -> Attachment:
        root = config.sockets_folder
        folder = Path(offer.uri.removeprefix("unix://")).parent
        names = {offer.uri: MIGRATION_SOCKET} | ({offer.disks_uri: DISKS_SOCKET} if offer.disks_uri else {})
        if folder.parent != root or not _PLACE.fullmatch(folder.name):
            raise ChannelError(f"not in this host's folder for sockets, {root}")
        if any(uri != f"unix://{folder / name}" for uri, name in names.items()):
            raise ChannelError("not a path that an agent offers")
        made = make_sockets_folder(root, int(config.qemu.sockets_mode, 8), user)
        if _place_of(str(made)) == offer.place:
            raise ChannelError("both hosts share this file system")
        self._folder = make_sockets_folder(folder, int(config.qemu.sockets_mode, 8), user)
        return offer

    def _take_tcp(self, offer: Attachment) -> Attachment:
        shared = _place_of("/proc/self/ns/net") == offer.place
        listen = "127.0.0.2" if shared else "127.0.0.1"
        if shared and offer.disks_uri:
            raise ChannelError("both hosts share this network, and libvirt's --disks-uri has one address for both")
        for uri in filter(None, (offer.uri, offer.disks_uri)):
            match = re.fullmatch(r"tcp://127\.0\.0\.1:(\d{1,5})", uri)
            if match is None or not 1024 <= int(match[1]) <= 65535:
                raise ChannelError("not an address that an agent offers")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((listen, int(match[1])))
        return msgspec.structs.replace(offer, listen_address=listen)


class Place(Protocol):
    """Where QEMU listens, and who it is to be."""

    @property
    def user(self) -> QemuUser: ...
    def address(self, channel: ChannelName) -> Address: ...


class Carries(Protocol):
    """Who carries one channel to QEMU and back: engine/relay.py's Carrier, ordering.py's Pipe."""

    bytes_to_qemu: int
    bytes_from_qemu: int

    def attach(self, qemu: socket.socket, /) -> None: ...


class DestinationMeeting:
    """To this host's QEMU connections are opened when the source's are there, in the order that QEMU names rightly."""

    def __init__(self, place: Place, shape: Shape, carriers: Mapping[ChannelName, Carries]) -> None:
        self._place = place
        self._carriers = carriers
        self._steps = [(ChannelName(_CHANNEL_OF[step.role], step.index), step) for step in shape.order()]  # type: ignore[arg-type]
        self._multifd = [channel for channel, step in self._steps if step.role is Role.MULTIFD]
        self._announced: set[ChannelName] = set()
        self._arrived: set[ChannelName] = set()
        self._connected: set[ChannelName] = set()

    def announced(self, channel: ChannelName) -> None:
        """The source's QEMU has this connection, and may stay silent on it. Raises ChannelError."""
        self._announced.add(channel)
        if channel.role == "storage" and channel not in self._connected:
            self._connect(channel)
        self.go_on()

    def arrived(self, channel: ChannelName) -> None:
        """Its first bytes are here. Raises ChannelError."""
        self._arrived.add(channel)
        self.announced(channel)

    def go_on(self) -> None:
        """Open whatever may be opened now. Raises ChannelError."""
        for channel, step in self._steps:
            if channel in self._connected:
                continue
            here = self._arrived if step.writes_at_once else self._announced
            if channel not in here or not self._may(step, channel):
                if step.role is Role.PREEMPT:
                    continue  # late or never; nothing waits for it
                return
            self._connect(channel)

    def _may(self, step: Step, channel: ChannelName) -> bool:
        main = self._carriers[ChannelName("main")]
        match step.when:
            case Moment.AT_ONCE:
                return True
            case Moment.MAIN_ACCEPTED:
                return ChannelName("main") in self._connected
            case Moment.MAIN_WRITTEN:
                return main.bytes_to_qemu >= 4
            case Moment.PREVIOUS_WRITTEN:
                at = next(number for number, (known, _) in enumerate(self._steps) if known == channel)
                return self._carriers[self._steps[at - 1][0]].bytes_to_qemu >= _MULTIFD_HELLO_BYTES
            case Moment.ALL_MULTIFD_WRITTEN:
                return main.bytes_to_qemu >= 4 and self._all_multifd()
            case Moment.PONG_AND_ALL_MULTIFD:
                return main.bytes_from_qemu > 0 and self._all_multifd()
        raise LocalProtocolError(f"{step.when!r} is not known here")

    def _all_multifd(self) -> bool:
        return all(self._carriers[channel].bytes_to_qemu >= _MULTIFD_HELLO_BYTES for channel in self._multifd)

    def await_recovering_qemu(self, stop: Stop) -> socket.socket | None:
        """A connection as soon as a paused QEMU listens; None when `stop` came first. For a thread of its own.

        libvirt tells the destination to go on as soon as the source's QEMU has connected, and fails when the
        destination's has not by then left postcopy-paused (qemuMigrationJobCheckStatus).
        """
        while not stop.requested.wait(_LOOK_AGAIN_S):
            with contextlib.suppress(OSError):
                return self._dial(ChannelName("main"))
        return None

    def recovering(self, connection: socket.socket) -> None:
        """That connection. Raises ChannelError."""
        main = ChannelName("main")
        if main in self._connected:
            connection.close()
            return
        self._take(main, connection)
        self.go_on()

    def _connect(self, channel: ChannelName) -> None:
        try:
            connection = self._dial(channel)
        except OSError as error:
            raise ChannelError(
                f"{channel}: QEMU of the destination does not take the connection at {self._place.address(channel)}: "
                f"{error.strerror or error}",
                hint="has libvirt been given the agreed migrate URI on that host?",
            ) from None
        self._take(channel, connection)

    def _take(self, channel: ChannelName, connection: socket.socket) -> None:
        try:
            check_qemu(connection, self._place.user)
        except ChannelError as error:
            connection.close()
            raise ChannelError(f"{channel}: {self._place.address(channel)}: {error}", hint=error.hint) from None
        self._connected.add(channel)
        self._carriers[channel].attach(connection)

    def _dial(self, channel: ChannelName) -> socket.socket:
        address = self._place.address(channel)
        connection = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.settimeout(_CONNECT_S)
            connection.connect(address.path or (address.host, address.port))
        except OSError:
            connection.close()
            raise
        return connection
