"""Who the peer is and what it may do; the key's file; the folder that QEMU shares with the agent."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmig.agent.access import (
    ALL_RIGHTS,
    ANYBODY,
    KEY_HOLDER,
    AllowList,
    Identity,
    QemuUser,
    make_sockets_folder,
    own_identity,
    qemu_user,
    read_key,
    share_socket,
    unix_identity,
)
from virtmig.agent.config import AllowRow, QemuSection, Right
from virtmig.errors import ChannelError, RequestError

NOBODY = pwd.getpwnam("nobody")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes users")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose sockets have short paths."""
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def row(peer: str, *rights: Right) -> AllowRow:
    return AllowRow(peer=peer, rights=rights)


HOST_B = Identity(kind="tls", names=("host-b.example.org", "10.0.0.2"))


@pytest.mark.parametrize(
    ("peer", "identity", "fits"),
    [
        ("tls:host-b.example.org", HOST_B, True),
        ("tls:HOST-B.Example.org", HOST_B, True),
        ("tls:*.example.org", HOST_B, True),
        ("tls:10.0.0.*", HOST_B, True),
        ("tls:host-?.example.org", HOST_B, True),
        ("tls:example.org", HOST_B, False),
        ("tls:host-b", HOST_B, False),
        ("tls:*", ANYBODY, False),
        ("tls:*", KEY_HOLDER, False),
        ("key", KEY_HOLDER, True),
        ("key", ANYBODY, False),
        ("key", Identity(kind="tls", names=("key",)), False),
        ("plain", ANYBODY, True),
        ("plain", HOST_B, False),
        ("user:nobody", Identity(kind="unix", names=("nobody",), uid=NOBODY.pw_uid), True),
        (f"user:{NOBODY.pw_uid}", Identity(kind="unix", names=("nobody",), uid=NOBODY.pw_uid), True),
        ("user:nobody", Identity(kind="tls", names=("nobody",)), False),
        ("user:daemon", Identity(kind="unix", names=("nobody",), uid=NOBODY.pw_uid), False),
        (f"group:{grp.getgrgid(NOBODY.pw_gid).gr_name}", Identity(kind="unix", uid=77, gids=(5, NOBODY.pw_gid)), True),
        ("group:4242", Identity(kind="unix", uid=77, gids=(5, 4242)), True),
        ("group:4242", Identity(kind="unix", uid=4242, gids=(5,)), False),
        ("group:no-such-group", Identity(kind="unix", uid=77, gids=(5,)), False),
    ],
)
def test_which_row_fits_whom(peer: str, identity: Identity, fits: bool) -> None:
    allowed = AllowList([row(peer, "send")], own_uid=1)
    assert allowed.rights(identity) == (frozenset(("send",)) if fits else frozenset())


def test_rights_of_all_rows_that_fit_add_up() -> None:
    allowed = AllowList([row("tls:*.org", "send"), row("tls:host-b*", "receive"), row("tls:host-c*", "manage")])
    assert allowed.rights(HOST_B) == {"send", "receive"}


def test_nobody_may_anything_without_a_row() -> None:
    allowed = AllowList([], own_uid=1)
    assert not any(allowed.rights(peer) for peer in (HOST_B, KEY_HOLDER, ANYBODY, Identity(kind="unix", uid=2)))


def test_root_and_the_own_user_may_everything_over_a_unix_socket_only() -> None:
    allowed = AllowList([], own_uid=77)
    assert allowed.rights(Identity(kind="unix", uid=0)) == ALL_RIGHTS
    assert allowed.rights(Identity(kind="unix", uid=77)) == ALL_RIGHTS
    assert not allowed.rights(Identity(kind="tls", names=("root",), uid=0))


@pytest.mark.parametrize(
    ("identity", "words", "fix"),
    [
        (HOST_B, "host-b.example.org may not bring guests to this host", 'peer = "tls:host-b.example.org"'),
        (KEY_HOLDER, "a holder of the pre-shared key may not bring guests", 'peer = "key"'),
        (ANYBODY, "an unproven peer may not bring guests", 'peer = "plain"'),
        (Identity(kind="unix", names=("alice",), uid=77), "user alice (uid 77) may not", 'peer = "user:alice"'),
        (Identity(kind="unix", uid=77), "uid 77 may not", 'peer = "user:77"'),
    ],
)
def test_a_refusal_names_the_peer_the_right_and_the_row_to_add(identity: Identity, words: str, fix: str) -> None:
    allowed = AllowList([row("tls:host-b*", "receive")], own_uid=1)
    with pytest.raises(ChannelError) as refused:
        allowed.check(identity, "send")
    assert words in str(refused.value)
    assert "'send' is missing" in str(refused.value)
    assert "allow" in refused.value.hint
    assert fix in refused.value.hint
    assert ("it has receive" in str(refused.value)) == (identity is HOST_B)


def test_the_row_that_a_refusal_proposes_helps() -> None:
    for identity in (HOST_B, KEY_HOLDER, ANYBODY, Identity(kind="unix", uid=77)):
        with pytest.raises(ChannelError) as refused:
            AllowList([], own_uid=1).check(identity, "manage")
        proposed = refused.value.hint.split('"')[1]
        AllowList([row(proposed, "manage")], own_uid=1).check(identity, "manage")


def test_peers_are_compared_by_more_than_their_label() -> None:
    other = Identity(kind="tls", names=("host-b.example.org", "10.0.0.3"))
    users = (Identity(kind="unix", uid=1), Identity(kind="unix", uid=2), Identity(kind="tls", names=("unix:1",)))
    everybody = (HOST_B, other, KEY_HOLDER, ANYBODY, *users)
    assert len({identity.peer for identity in everybody}) == len(everybody)
    assert HOST_B.label == other.label
    again = Identity(kind="unix", uid=1, names=("alice",), gids=(1, 7))  # logged in anew, with another group
    assert again.peer == users[0].peer


# -- unix peers ----------------------------------------------------------------------------------------------------


def test_the_peer_of_a_socket_pair_is_oneself() -> None:
    here, there = socket.socketpair()
    with here, there:
        identity = unix_identity(here)
    assert identity.kind == "unix"
    assert identity.uid == os.geteuid()
    assert set(os.getgroups()) | {os.getegid()} == set(identity.gids)
    assert own_identity().uid == os.getuid()


@needs_root
def test_another_users_process_is_known_by_its_user_and_groups(short: Path) -> None:
    path = short / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen()
        script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.recv(1)"
        client = subprocess.Popen(
            [sys.executable, "-c", script], user=NOBODY.pw_uid, group=NOBODY.pw_gid, extra_groups=[4242], cwd="/"
        )
        try:
            listening.settimeout(30)
            connection, _ = listening.accept()
            with connection:
                identity = unix_identity(connection)
        finally:
            client.kill()
            client.wait()
    assert identity == Identity(
        kind="unix", names=("nobody",), uid=NOBODY.pw_uid, gids=tuple(sorted({NOBODY.pw_gid, 4242}))
    )
    assert AllowList([row("group:4242", "manage")]).rights(identity) == {"manage"}


# -- the key -------------------------------------------------------------------------------------------------------


def key_file(folder: Path, text: bytes, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_the_key_is_read(tmp_path: Path) -> None:
    assert read_key(key_file(tmp_path, b"00ff" * 8 + b"\n")) == bytes.fromhex("00ff" * 8)
    assert read_key(key_file(tmp_path, b"AB" * 32, 0o440)) == b"\xab" * 32


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (b"ab" * 32, 0o644, "others can use (mode 0644)"),
        (b"ab" * 32, 0o602, "others can use (mode 0602)"),
        (b"ab" * 15, 0o600, "of 15 bytes; 16 or more"),
        (b"ab" * 32 + b"c", 0o600, "not one line of hexadecimal"),
        (b"correct horse battery staple!", 0o600, "not one line of hexadecimal"),
        (b"ab" * 16 + b"\n" + b"cd" * 16, 0o600, "not one line of hexadecimal"),
        (b"", 0o600, "not one line of hexadecimal"),
        (b"\xff\x00" * 20, 0o600, "not one line of hexadecimal"),
    ],
)
def test_a_bad_key_is_refused_without_being_shown(tmp_path: Path, text: bytes, mode: int, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_key(key_file(tmp_path, text, mode))
    assert words in str(refused.value)
    assert refused.value.hint
    assert not text or text.decode("latin-1") not in f"{refused.value} {refused.value.hint}"


def test_what_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_key(tmp_path / "none")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_key(tmp_path)
    with pytest.raises(RequestError, match="not a regular file"):
        read_key("/dev/null")


@needs_root
def test_a_key_that_another_user_owns_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path, b"ab" * 32)
    os.chown(path, NOBODY.pw_uid, -1)
    with pytest.raises(RequestError, match=f"belongs to uid {NOBODY.pw_uid}"):
        read_key(path)


# -- QEMU's folder -------------------------------------------------------------------------------------------------


def test_qemus_user_is_the_configured_one_else_libvirts() -> None:
    assert qemu_user(QemuSection()) == QemuUser()
    found = qemu_user(QemuSection(user="nobody"), libvirt_uid=4)
    assert (found.uid, found.gid, found.evidence) == (NOBODY.pw_uid, NOBODY.pw_gid, "qemu.user of agent.toml")
    found = qemu_user(QemuSection(user=str(NOBODY.pw_uid), group="4242"))
    assert (found.uid, found.gid) == (NOBODY.pw_uid, 4242)
    found = qemu_user(QemuSection(), libvirt_uid=NOBODY.pw_uid)
    assert (found.uid, found.gid, found.evidence) == (NOBODY.pw_uid, NOBODY.pw_gid, "libvirt's word")
    found = qemu_user(QemuSection(), libvirt_uid=987_654)
    assert (found.uid, found.gid) == (987_654, None)
    for section, words in (
        (QemuSection(user="no-such"), "no user no-such"),
        (QemuSection(group="no-such"), "no group"),
    ):
        with pytest.raises(RequestError, match=words):
            qemu_user(section)


def test_the_folder_is_for_the_agent_and_qemus_group_only(short: Path) -> None:
    folder = make_sockets_folder(short / "a" / "qemu", 0o770, QemuUser(uid=1, gid=os.getegid()))
    status = folder.stat()
    assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
    assert stat.S_IMODE(status.st_mode) == 0o1770
    folder.chmod(0o777)  # somebody was careless: put right again
    make_sockets_folder(folder, 0o710, QemuUser())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o710


def test_a_folder_that_is_none_is_refused(short: Path) -> None:
    (short / "real").mkdir()
    (short / "link").symlink_to(short / "real")
    (short / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(RequestError, match=name):
            make_sockets_folder(short / name, 0o770, QemuUser())


@needs_root
def test_a_strangers_folder_is_refused(short: Path) -> None:
    folder = short / "qemu"
    folder.mkdir()
    os.chown(folder, NOBODY.pw_uid, -1)
    with pytest.raises(RequestError, match=f"belongs to uid {NOBODY.pw_uid}"):
        make_sockets_folder(folder, 0o770, QemuUser(uid=1, gid=1))


_CONNECT = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(sys.argv[1])
except PermissionError:
    sys.exit(13)
"""
_BIND = """
import os, socket, sys
os.umask(0o002)  # as libvirt starts QEMU
s = socket.socket(socket.AF_UNIX)
try:
    s.bind(sys.argv[1])
    os.unlink(sys.argv[2])
except PermissionError:
    sys.exit(13)
"""


def run_as(uid: int, gids: list[int], script: str, *arguments: str) -> int:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, user=uid, group=gids[0], extra_groups=gids[1:], cwd="/").returncode


@needs_root
def test_qemus_user_reaches_the_socket_and_others_do_not(short: Path) -> None:
    qemu = QemuUser(uid=4001, gid=4002)
    folder = make_sockets_folder(short / "qemu", 0o770, qemu)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "m"))
        share_socket(folder / "m", qemu)
        listening.listen()
        assert run_as(4001, [4002], _CONNECT, str(folder / "m")) == 0
        assert run_as(4001, [4003], _CONNECT, str(folder / "m")) == 13
        assert run_as(4009, [4009], _CONNECT, str(folder / "m")) == 13
    # QEMU binds its own on the destination, and does not remove ours
    assert run_as(4001, [4002], _BIND, str(folder / "n"), str(folder / "m")) == 13
    assert (folder / "m").exists()
    assert stat.S_IMODE((folder / "n").stat().st_mode) & 0o060 == 0o060


@needs_root
def test_an_agent_without_root_needs_only_the_group(short: Path) -> None:
    """Agent 4000 in QEMU's group 4002: it makes the folder, QEMU's user binds there, and each reaches the other."""
    os.chown(short, 4000, 4000)
    agent = f"""
import os, socket, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
from virtmig.agent.access import QemuUser, make_sockets_folder, share_socket
os.umask(0o077)
qemu = QemuUser(uid=4001, gid=4002)
folder = make_sockets_folder(Path(sys.argv[1]) / "qemu", 0o770, qemu)
s = socket.socket(socket.AF_UNIX)
s.bind(str(folder / "m"))
share_socket(folder / "m", qemu)
"""
    assert run_as(4000, [4000, 4002], agent, str(short)) == 0
    assert (short / "qemu").stat().st_gid == 4002
    assert (short / "qemu/m").stat().st_gid == 4002
    assert stat.S_IMODE((short / "qemu/m").stat().st_mode) == 0o660
    bind = _BIND.replace("    os.unlink(sys.argv[2])\n", "")
    assert run_as(4001, [4002], bind, str(short / "qemu/n")) == 0
    assert os.access(short / "qemu/n", os.F_OK)
    reach = "import os, sys; sys.exit(not os.access(sys.argv[1], os.W_OK))"
    assert run_as(4000, [4000, 4002], reach, str(short / "qemu/n")) == 0
    # without the group it is refused, with what to do
    (short / "qemu/m").unlink()
    (short / "qemu").chmod(0o700)
    os.chown(short / "qemu", 4000, 4000)
    refused = subprocess.run(
        [sys.executable, "-c", agent, str(short)], user=4000, group=4000, extra_groups=[], cwd="/", capture_output=True
    )
    assert b"cannot be set for QEMU (uid 4001, gid 4002)" in refused.stderr
