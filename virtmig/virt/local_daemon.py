"""What this machine's own kernel and files say about a libvirt daemon that runs here: its user, limits, mounts.

Only for connections over a unix socket, where the daemon shares our kernel. Everything is read through the daemon's
own process where that is possible, since it may live in other namespaces than we do. Nothing here raises: what cannot
be read is None.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import struct
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec

from virtmig.facts import Finding, version

#: file systems that libvirt takes for shared (virFileIsSharedFSType), by their name in mountinfo
SHARED_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs4", "gfs2", "ocfs2", "afs", "cifs", "smb3", "smbfs", "ceph", "fuse.ceph", "fuse.glusterfs", "gpfs",
     "fuse.quobyte", "acfs", "lustre", "beegfs", "pvfs2")
)  # fmt: skip


class Endpoint(msgspec.Struct, frozen=True):
    """How a connection URI reaches its daemon."""

    driver: str
    local: bool
    session: bool | None
    socket_path: str  # named in the URI


def read_uri(uri: str) -> Endpoint:
    """Take a libvirt URI apart: qemu+unix:///session?socket=PATH, qemu+ssh://host/system, test:///default, ..."""
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    path = parts.path.rstrip("/")
    return Endpoint(
        driver=driver,
        local=transport in ("", "unix") and not parts.hostname,
        session={"/session": True, "/system": False}.get(path),
        socket_path=(parse_qs(parts.query).get("socket") or [""])[0],
    )


class Daemon(msgspec.Struct, frozen=True):
    """The process behind a local socket."""

    pid: int
    uid: int


def find_daemon(endpoint: Endpoint) -> Daemon | None:
    """The daemon that listens on the socket of a local connection, by the kernel's word (SO_PEERCRED)."""
    if not endpoint.local:
        return None
    for path in [endpoint.socket_path] if endpoint.socket_path else _default_sockets(endpoint.session):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(1.0)
            client.connect(path)
            pid, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return Daemon(pid, uid)
    return None


def _default_sockets(session: bool | None) -> list[str]:
    folder = "/run/libvirt"
    if session:
        folder = f"{os.environ.get('XDG_RUNTIME_DIR') or Path.home() / '.cache'}/libvirt"
    return [f"{folder}/virtqemud-sock", f"{folder}/libvirt-sock"]


def locked_memory_limit_bytes(pid: int) -> int | None:
    """The hard limit of locked memory of a process, -1 for unlimited."""
    text = read_text(f"/proc/{pid}/limits") or ""
    found = re.search(r"^Max locked memory\s+\S+\s+(\S+)", text, re.MULTILINE)
    if found is None:
        return None
    return -1 if found[1] == "unlimited" else int(found[1])


def available_memory_bytes() -> int | None:
    """The kernel's own estimate of memory that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


class DeviceNode(msgspec.Struct, frozen=True):
    """Owner and mode of /dev/userfaultfd."""

    mode: int
    uid: int


def userfaultfd_device(pid: int | None) -> DeviceNode | None:
    for path in ([f"/proc/{pid}/root/dev/userfaultfd"] if pid else []) + ["/dev/userfaultfd"]:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            return DeviceNode(stat.S_IMODE(found.st_mode), found.st_uid)
    return None


#: libvirt that lets QEMU open /dev/userfaultfd (in its default cgroup_device_acl), and QEMU that opens it
_GRANTED_SINCE = version(10, 1)
_OPENED_SINCE = version(8)


def judge_userfaultfd(
    *,
    qemu_uid: int | None,
    uid_evidence: str,
    local: bool,
    session: bool | None,
    libvirt_version: int | None,
    qemu_version: int | None,
    sysctl: str | None,
    device: DeviceNode | None,
) -> Finding:
    """May QEMU's user make a userfaultfd that sees kernel faults too, as postcopy needs? Pure.

    `sysctl` is the content of vm.unprivileged_userfaultfd, `device` the node /dev/userfaultfd: of this kernel, so they
    count only for a local daemon.
    """
    if qemu_uid == 0:
        return Finding("yes", f"QEMU runs as root ({uid_evidence})")
    who = f"QEMU runs as uid {qemu_uid} ({uid_evidence})" if qemu_uid is not None else "QEMU's user is not known"
    if not local:
        return Finding("unknown", f"{who}; vm.unprivileged_userfaultfd of that host cannot be asked through libvirt")
    if sysctl is None:
        return Finding("unknown", f"{who}; this kernel has no vm.unprivileged_userfaultfd to read")
    if sysctl.strip() == "1":
        return Finding("yes", "vm.unprivileged_userfaultfd=1")
    if qemu_uid is None:
        return Finding("unknown", f"{who}, and vm.unprivileged_userfaultfd=0")
    no = f"{who} and vm.unprivileged_userfaultfd=0"
    if device is None or (qemu_version is not None and qemu_version < _OPENED_SINCE):
        return Finding("no", no)
    if device.mode & 0o006 == 0o006 or device.uid == qemu_uid:
        return Finding("yes", f"{who} and may open /dev/userfaultfd (mode {device.mode:04o})")
    if session is False and libvirt_version is not None and libvirt_version >= _GRANTED_SINCE:
        return Finding("yes", f"{who}; libvirt >= 10.1 gives it /dev/userfaultfd unless cgroup_device_acl was changed")
    if device.mode & 0o060:
        return Finding("unknown", f"{no}; /dev/userfaultfd has mode {device.mode:04o} for a group")
    return Finding("no", f"{no}; /dev/userfaultfd has mode {device.mode:04o}")


def same_mounts(pid: int) -> bool:
    """Whether a process sees the same mounts as this one."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False


def file_system_of(path: str, mountinfo: str) -> str | None:
    """The type of the file system that `path` lies on, by a process's mountinfo (proc(5)); None if it is not there."""
    best, found = "", None
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields = left.split()
        if not separator or len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # a later mount at the same place hides the earlier one
            best, found = point, right.split()[0]
    return found


def tls_files(endpoint: Endpoint, pid: int | None) -> Finding:
    """Whether QEMU's certificates lie where a local system daemon looks for them (qemu.conf, else /etc/pki/qemu)."""
    if not endpoint.local or endpoint.session is not False or pid is None:
        return Finding("unknown", "the files of that host cannot be asked through libvirt")
    root = f"/proc/{pid}/root"
    conf = read_text(f"{root}/etc/libvirt/qemu.conf")
    if conf is None:
        return Finding("unknown", "its qemu.conf cannot be read from here")
    folder = conf_value(conf, "migrate_tls_x509_cert_dir") or conf_value(conf, "default_tls_x509_cert_dir")
    folder = folder or "/etc/pki/qemu"
    try:
        os.stat(f"{root}{folder}/ca-cert.pem")
    except FileNotFoundError:
        return Finding("no", f"{folder}/ca-cert.pem is missing")
    except OSError as error:
        return Finding("unknown", f"{folder}/ca-cert.pem: {error.strerror}")
    return Finding("yes", f"{folder}/ca-cert.pem is there")


def conf_value(text: str, name: str) -> str:
    """The value of a string or list setting in libvirt's configuration syntax, empty when it is not set."""
    found = re.search(rf"^\s*{re.escape(name)}\s*=\s*(?:\"([^\"]*)\"|(\[[^\]]*\]))", text, re.MULTILINE)
    return (found[1] or found[2] or "") if found else ""
