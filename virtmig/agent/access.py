"""Who the peer is, and what it may do here. A refusal names the peer, the right and the row of agent.toml to add.

tls    the names in its certificate, checked against our CA (certificates.py)
key    it proved the pre-shared key in the handshake (link/proofs.py); there are no names
unix   the user and groups of the process at the other end, by the kernel's word; also the caller of --stdio
ssh    a host that this host has dialled by ssh, which has checked its key (known_hosts)
plain  nothing was proved, which the owner of this host has allowed
"""

from __future__ import annotations

import contextlib
import fnmatch
import grp
import os
import pwd
import socket
import stat
import string
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from virtmig.agent.config import AllowRow, QemuSection, Right
from virtmig.errors import ChannelError, RequestError
from virtmig.link.proofs import KEY_SHORTEST_BYTES

ALL_RIGHTS: frozenset[Right] = frozenset(("send", "receive", "manage"))
_RIGHT_WORDS: dict[Right, str] = {
    "send": "bring guests to this host",
    "receive": "be given guests of this host",
    "manage": "manage this host's agent",
}
#: asm-generic/socket.h; Python has no name for it
_SO_PEERGROUPS = 59
#: the most that Python's getsockopt takes: 256 groups
_GROUPS_BYTES = 1024
_KEY_FILE_LONGEST_BYTES = 4096


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who is at the other end of a connection. Equal for all connections of one peer, whatever port they come from."""

    kind: Literal["tls", "key", "unix", "ssh", "plain"]
    names: tuple[str, ...] = ()  # tls: of the certificate, host names first; unix: the user's name; ssh: [USER@]HOST
    uid: int | None = None
    gids: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """For people and logs: `host-b.example.org`, `user alice (uid 1000)`."""
        if self.kind == "tls":
            return self.names[0] if self.names else "a certificate without a name"
        if self.kind == "unix":
            return f"user {self.names[0]} (uid {self.uid})" if self.names else f"uid {self.uid}"
        if self.kind == "ssh":
            return f"ssh {self.names[0]}"
        return "a holder of the pre-shared key" if self.kind == "key" else "an unproven peer"

    @property
    def peer(self) -> str:
        """For comparing, as link/ does: alike for all connections of one peer, different for two peers."""
        if self.kind == "unix":
            return f"unix:{self.uid}"
        return f"{self.kind}:{','.join(self.names)}" if self.names else self.kind


KEY_HOLDER = Identity(kind="key")
ANYBODY = Identity(kind="plain")


def unix_identity(connection: socket.socket) -> Identity:
    """The process that connected (SO_PEERCRED, SO_PEERGROUPS: as it was when it called connect). Raises OSError."""
    _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        gids = list(struct.unpack(f"{len(raw) // 4}I", raw))
    except OSError:  # more groups than fit, or a kernel that numbers it otherwise: those of /etc/group
        try:
            gids = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:
            gids = []
    return _user_identity(uid, [gid, *gids])


def own_identity() -> Identity:
    """Whoever started this process: the peer of `virtmig agent --stdio`, which ssh or sudo has let in."""
    return _user_identity(os.getuid(), [os.getgid(), *os.getgroups()])


def _user_identity(uid: int, gids: Iterable[int]) -> Identity:
    try:
        names: tuple[str, ...] = (pwd.getpwuid(uid).pw_name,)
    except KeyError:
        names = ()
    return Identity(kind="unix", names=names, uid=uid, gids=tuple(sorted(set(gids))))


class AllowList:
    """What each peer may do: the rows of `allow`. Root and the agent's own user may do everything on a unix socket."""

    def __init__(self, rows: Iterable[AllowRow], *, own_uid: int | None = None) -> None:
        self._rows = tuple(rows)
        self._own_uid = os.geteuid() if own_uid is None else own_uid

    def owns(self, identity: Identity) -> bool:
        """Whether that is root or the agent's own user on a unix socket: who may do everything here anyway."""
        return identity.kind == "unix" and identity.uid in (0, self._own_uid)

    def rights(self, identity: Identity) -> frozenset[Right]:
        """Those of all rows that fit."""
        if self.owns(identity):
            return ALL_RIGHTS
        return frozenset(right for row in self._rows if _fits(row, identity) for right in row.rights)

    def check(self, identity: Identity, right: Right) -> None:
        """Raises ChannelError when `identity` does not have `right`."""
        rights = self.rights(identity)
        if right in rights:
            return
        has = f"it has {', '.join(sorted(rights))}" if rights else "it has no rights here"
        raise ChannelError(
            f"{identity.label} may not {_RIGHT_WORDS[right]}: the right {right!r} is missing, {has}",
            hint=f"in agent.toml of this host ({socket.gethostname()}): {row_for(identity, right)}",
        )


def _fits(row: AllowRow, identity: Identity) -> bool:
    match row.kind:
        case "tls":
            # a name in a certificate is compared without regard to case (RFC 5280, 7.2)
            pattern = row.pattern.lower()
            return identity.kind == "tls" and any(fnmatch.fnmatchcase(name.lower(), pattern) for name in identity.names)
        case "user":
            return identity.kind == "unix" and (row.pattern in identity.names or row.pattern == str(identity.uid))
        case "group":
            return identity.kind == "unix" and group_id(row.pattern) in identity.gids
        case "ssh":
            host = identity.names[0].rpartition("@")[2] if identity.kind == "ssh" else ""
            return bool(host) and any(fnmatch.fnmatchcase(name, row.pattern) for name in (host, *identity.names))
    return identity.kind == row.kind


def row_for(identity: Identity, right: Right) -> str:
    """The row of `allow` that would give it, in one line of TOML."""
    peer: str = identity.kind
    if identity.kind in ("tls", "ssh"):
        peer = f"{identity.kind}:{identity.names[0] if identity.names else '*'}"
    elif identity.kind == "unix":
        peer = f"user:{identity.names[0] if identity.names else identity.uid}"
    return f'allow = [{{ peer = "{peer}", rights = ["{right}"] }}]'


def group_id(name: str) -> int | None:
    """Of a name or a number; None where there is no such group."""
    with contextlib.suppress(KeyError):
        return grp.getgrnam(name).gr_gid
    return int(name) if name.isdecimal() else None


def _user_id(name: str) -> int | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name).pw_uid
    return int(name) if name.isdecimal() else None


# -- the pre-shared key --------------------------------------------------------------------------------------------


def read_key(path: str | Path) -> bytes:
    """The pre-shared key: one line of hexadecimal, 32 digits or more, in a file that others cannot read.

    Raises RequestError that says what is wrong and how to make one; the key stands in no message.
    """
    option, make = "key_file", f"(umask 077; openssl rand -hex 32 > {path}), the same file on both hosts"
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RequestError(f"{path}: not a regular file", option=option, hint=make)
            if status.st_mode & 0o007:
                raise RequestError(
                    f"{path}: a pre-shared key that others can use (mode {stat.S_IMODE(status.st_mode):04o})",
                    option=option,
                    hint=f"chmod o= {path}; and a new key, if somebody may have read this one",
                )
            if status.st_uid not in (0, os.geteuid()):
                raise RequestError(
                    f"{path}: the pre-shared key belongs to uid {status.st_uid}, who can change it",
                    option=option,
                    hint=f"chown it to root or to uid {os.geteuid()}",
                )
            text = file.read(_KEY_FILE_LONGEST_BYTES + 1)
    except OSError as error:
        words = f"{path}: the pre-shared key cannot be read: {error.strerror}"
        raise RequestError(words, option=option, hint=make) from error
    lines = text.decode("ascii", "replace").split()
    if len(lines) != 1 or len(lines[0]) % 2 or not set(lines[0]) <= set(string.hexdigits):
        raise RequestError(f"{path}: the pre-shared key is not one line of hexadecimal", option=option, hint=make)
    key = bytes.fromhex(lines[0])
    if len(key) < KEY_SHORTEST_BYTES:
        raise RequestError(
            f"{path}: a pre-shared key of {len(key)} bytes; {KEY_SHORTEST_BYTES} or more are needed",
            option=option,
            hint=make,
        )
    return key


# -- sockets that QEMU shares with the agent -----------------------------------------------------------------------


_MEMBER_HINT = "make the agent a member of that group (SupplementaryGroups= in its unit), or run it as root"


class QemuUser(msgspec.Struct, frozen=True, kw_only=True):
    """The user that QEMU runs as on this host, and a group that it is in; None: unknown."""

    uid: int | None = None
    gid: int | None = None
    evidence: str = "not configured, and libvirt does not tell"


def qemu_user(section: QemuSection, *, libvirt_uid: int | None = None) -> QemuUser:
    """As configured, else as libvirt says; the group is that user's own when none is named. Raises RequestError."""
    uid, evidence = libvirt_uid, "libvirt's word"
    if section.user:
        uid, evidence = _user_id(section.user), "qemu.user of agent.toml"
        if uid is None:
            raise RequestError(f"qemu.user: this host has no user {section.user}", option="qemu.user")
    gid = group_id(section.group) if section.group else None
    if section.group and gid is None:
        raise RequestError(f"qemu.group: this host has no group {section.group}", option="qemu.group")
    if gid is None and uid is not None:
        with contextlib.suppress(KeyError):
            gid = pwd.getpwuid(uid).pw_gid
    return QemuUser(uid=uid, gid=gid, evidence=evidence) if uid is not None else QemuUser(gid=gid)


def make_sockets_folder(folder: Path, mode: int, user: QemuUser) -> Path:
    """Make or check the folder for sockets between QEMU and the agent. Raises RequestError.

    It belongs to the agent and to QEMU's group; nobody removes the sockets of another (sticky), others have no rights.
    libvirt starts QEMU with umask 002, so QEMU's sockets can be used by its group: an agent without root reaches them
    when it is in that group.
    """
    option = "qemu.sockets_folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise RequestError(f"{folder}: {error.strerror}", option=option) from error
    try:
        status = os.fstat(handle)
        if status.st_uid not in {os.geteuid(), 0, *([] if user.gid is not None else [user.uid])}:
            raise RequestError(f"{folder}: belongs to uid {status.st_uid}, not to this agent", option=option)
        _give_to_group(handle, status, user)
        wanted = mode | (stat.S_ISVTX if mode & 0o020 else 0)
        if stat.S_IMODE(os.fstat(handle).st_mode) != wanted:
            os.chmod(handle, wanted)
    except OSError as error:
        raise RequestError(
            f"{folder}: its rights cannot be set for QEMU (uid {user.uid}, gid {user.gid}): {error.strerror}",
            option="qemu.group",
            hint=_MEMBER_HINT,
        ) from error
    finally:
        os.close(handle)
    return folder


def share_socket(path: Path, user: QemuUser) -> None:
    """Let QEMU connect to a socket that the agent has bound in that folder. Raises RequestError."""
    try:
        _give_to_group(path, path.lstat(), user)
        path.chmod(0o660)
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be shared with QEMU (uid {user.uid}, gid {user.gid}): {error.strerror}",
            option="qemu.group",
            hint=_MEMBER_HINT,
        ) from error


def _give_to_group(what: int | Path, status: os.stat_result, user: QemuUser) -> None:
    """To QEMU's group; where only its user is known, root can give it to that. Raises OSError."""
    if user.gid is not None and user.gid != status.st_gid:
        os.chown(what, -1, user.gid)
    elif user.gid is None and user.uid is not None and user.uid != status.st_uid:
        os.chown(what, user.uid, -1)


# -- who comes to those sockets -------------------------------------------------------------------------------------

#: a socket's state in /proc/net/tcp: TCP_LISTEN of include/net/tcp_states.h
_LISTENS = "0A"


def check_qemu(connection: socket.socket, user: QemuUser) -> None:
    """Raises ChannelError when the process at the other end, on this host, is not QEMU's user, root or our own.

    The folder's group may have other members (on Debian QEMU's group is kvm), and loopback is open to everybody. Where
    QEMU's user is not known, nothing can be said.
    """
    if user.uid is None:
        return
    owner = local_owner(connection)
    if owner not in (user.uid, 0, os.geteuid()):
        whose = "nobody can say who" if owner is None else f"uid {owner}"
        raise ChannelError(
            f"not QEMU at the other end: {whose}, and QEMU's user is uid {user.uid} ({user.evidence})",
            hint="qemu.user in agent.toml, if QEMU runs as somebody else",
        )


def local_owner(connection: socket.socket) -> int | None:
    """The uid of the process at the other end, or of whoever listens there; None when it cannot be found."""
    if connection.family == socket.AF_UNIX:
        return unix_identity(connection).uid
    try:
        ours, theirs = connection.getsockname()[:2], connection.getpeername()[:2]
        rows = [*_tcp_rows("/proc/net/tcp"), *_tcp_rows("/proc/net/tcp6")]
    except OSError:
        return None
    # what a listener has not accepted yet has no owner of its own (net/ipv4/tcp_ipv4.c, get_tcp4_sock)
    for wanted in (theirs, ("0.0.0.0", theirs[1]), ("::", theirs[1])):
        for local, _, state, uid in rows:
            if state == _LISTENS and local == wanted:
                return uid
    return next((uid for local, remote, state, uid in rows if (local, remote) == (theirs, ours)), None)


def _tcp_rows(path: str) -> list[tuple[tuple[str, int], tuple[str, int], str, int]]:
    """(local address, remote address, state, uid) of every TCP socket in this network (proc(5))."""
    with open(path, encoding="ascii") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return [(_tcp_address(row[1]), _tcp_address(row[2]), row[3], int(row[7])) for row in rows]


def _tcp_address(text: str) -> tuple[str, int]:
    """`0100007F:1F90`: words in the host's byte order, the port as a number; a mapped IPv4 address as IPv4."""
    words, _, port = text.partition(":")
    raw = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    if len(raw) == 16 and raw.startswith(bytes(10) + b"\xff\xff"):
        raw = raw[12:]
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw), int(port, 16)
