"""Clients of this host, friendly and hostile; a destination that answers with places of its own; who comes as QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.two_agents import (
    GUEST,
    MAIN_HEADER,
    PATIENCE_S,
    REQUEST,
    Host,
    Migration,
    dial,
    ends,
    eventually,
    exactly,
)
from virtmig.agent import clients
from virtmig.agent.access import QemuUser, check_qemu, local_owner
from virtmig.agent.config import QemuSection
from virtmig.engine.agents import AgentConnection, ask_facts, ask_sessions, shake_hands
from virtmig.errors import ChannelError, MigrationError, PlanRefused, RemoteProtocolError
from virtmig.link.asking import LINE_LONGEST_BYTES, Facts, Lines, decode_asked, encode_line
from virtmig.link.frames import FIRST, ON_CONTROL, PREFACE, Control, FrameDecoder
from virtmig.link.messages import Answer, Attachment, ChannelCount, Proposal
from virtmig.link.responder import Responder
from virtmig.link.side import Send, Terms

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes users")
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with Host(place / "a") as host:
        yield host


def said_to(host: Host, *data: bytes) -> list[Any]:
    """Everything the agent answers until it closes."""
    with dial(f"unix:{host.socket}") as client:
        for piece in data:
            client.sendall(piece)
        answer = bytearray()
        try:
            while piece := client.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return [json.loads(line) for line in answer.splitlines()]


# -- on the local socket -------------------------------------------------------------------------------------------


def test_facts_and_sessions(host: Host) -> None:
    said = ask_facts(host.socket)
    assert said.facts.hostname == socket.gethostname()
    assert said.implementation.startswith("virtmig ")
    assert ask_sessions(host.socket) == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"ask":"teleport"}\n', "not a question to an agent"),
        (b"{}\n", "not a question to an agent"),
        (b'{"ask":"begin"}\n', "not a question to an agent"),
        (b'{"ask":"begin","destination":"' + b"x" * 5000 + b'","request":{},"guest":{"name":"x"}}\n', "not a question"),
        (b'{"ask":"facts","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "not a question to an agent"),
        (b'{"ask":"facts"\xff}\n', "not a question to an agent"),
        (b'{"ask":"giveup"}\n', "no session to give up"),
        (b'{"ask":"begin","destination":"","request":{},"guest":{"name":"x"}}\n', "no address of a destination"),
    ],
)
def test_a_question_that_is_none(host: Host, data: bytes, words: str) -> None:
    [answer] = said_to(host, data)
    assert answer["said"] == "error"
    assert words in answer["text"]
    assert ask_sessions(host.socket) == ()


def test_a_line_without_an_end(host: Host) -> None:
    piece = b"{" + b"x" * 65535
    taken = 0
    with dial(f"unix:{host.socket}") as client:
        with contextlib.suppress(OSError):  # it hangs up in the middle
            while taken < 3 * LINE_LONGEST_BYTES:
                taken += client.send(piece)
        assert ends(client)
    assert taken < 3 * LINE_LONGEST_BYTES
    eventually(lambda: not len(host.agent.greetings))
    assert ask_sessions(host.socket) == ()


def test_lines_are_bounded_and_put_together() -> None:
    lines = Lines()
    assert lines.feed(b'{"ask":') == []
    assert lines.feed(b'"facts"}\n\n  \n{"a') == [b'{"ask":"facts"}']
    assert isinstance(decode_asked(encode_line(Facts())), Facts)
    with pytest.raises(RemoteProtocolError, match="a line of more than"):
        lines.feed(b"x" * LINE_LONGEST_BYTES)


def test_half_a_question_is_waited_for_no_longer_than_allowed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "QUESTION_S", 0.3)
    begun = time.monotonic()
    [answer] = said_to(host, b'{"ask":"fa')
    assert "asks nothing within 0.3 s" in answer["text"]
    with dial(f"unix:{host.socket}") as client:  # one that never stops saying something does not get longer
        client.sendall(b"{")
        feeding = threading.Event()

        def feed() -> None:
            with contextlib.suppress(OSError):
                while not feeding.wait(0.01):
                    client.sendall(b" ")

        thread = threading.Thread(target=feed)
        thread.start()
        assert b"asks nothing" in client.recv(65536)
        assert ends(client)
        feeding.set()
        thread.join()
    assert time.monotonic() - begun < PATIENCE_S


def test_many_clients_at_once(host: Host) -> None:
    crowd = [dial(f"unix:{host.socket}") for _ in range(300)]
    for each in crowd:
        with_some = each.send(b"{", socket.MSG_NOSIGNAL) if not ends_now(each) else 0
        assert with_some in (0, 1)
    assert len(host.agent.greetings) <= host.agent.greetings.most
    assert ask_facts(host.socket).facts.hostname == socket.gethostname()
    for each in crowd:
        each.close()
    eventually(lambda: not len(host.agent.greetings))


def ends_now(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_garbage_in_the_middle_of_a_session(place: Path, host: Host) -> None:
    """The session does not go on without its slot, and nothing is left of it."""
    with Host(place / "b") as other:
        connection, _ = shake_hands(host.socket, other.address, request=REQUEST, guest=GUEST)
        connection._socket.sendall(b'{"ask":"everything"}\n')
        assert not ends_or_says(connection)
        eventually(lambda: not host.agent.sessions(), "the end of the session")
        eventually(lambda: not other.agent.sessions())
        eventually(lambda: host.agent.limits.usage.migrations_out == 0)
        connection.close()


def ends_or_says(connection: AgentConnection) -> list[Any]:
    said = []
    try:
        while True:
            said.append(connection.hear(PATIENCE_S))
    except MigrationError:
        return [each for each in said if type(each).__name__ not in ("Changed", "Ended")]


def test_a_client_that_goes_takes_its_session_along_while_nothing_has_moved(place: Path, host: Host) -> None:
    with Host(place / "b") as other:
        connection, agreed = shake_hands(host.socket, other.address, request=REQUEST, guest=GUEST)
        assert agreed.attachment is not None
        connection.close()
        eventually(lambda: not host.agent.sessions() and not other.agent.sessions())
        eventually(lambda: host.agent.limits.usage.migrations_out == other.agent.limits.usage.migrations_in == 0)
        migration = Migration(host, other.address).connect()
        migration.session._connection.close()  # this one has begun: it goes on by itself
        migration.echo(b"without its client")
        migration.source.close()  # type: ignore[union-attr]
        migration.destination.close()  # type: ignore[union-attr]


@needs_root
def test_a_user_without_the_right(place: Path, logs: list[Any]) -> None:
    place.chmod(0o755)
    with Host(place / "a") as host:
        host.socket.chmod(0o666)
        code = (
            "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n"
            's.sendall(b\'{"ask":"facts"}\\n\')\nprint(s.recv(65536).decode())'
        )
        done = subprocess.run([sys.executable, "-c", code, str(host.socket)], user="nobody", group="nogroup",
                              extra_groups=[], capture_output=True, text=True, check=True)  # fmt: skip
    [answer] = [json.loads(line) for line in done.stdout.splitlines() if line]
    assert answer["said"] == "error"
    assert "user nobody" in answer["text"]
    assert "may not manage this host's agent" in answer["text"]
    assert 'peer = "user:nobody", rights = ["manage"]' in answer["hint"]


# -- a hostile destination -----------------------------------------------------------------------------------------


class FalseDestination:
    """Speaks the protocol, and answers what it likes."""

    def __init__(self, path: Path, answer: Callable[[Proposal], Answer]) -> None:
        self.address = f"unix:{path}"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listening.accept()
        sock.settimeout(PATIENCE_S)
        self._control = sock
        host = Terms(
            facts=msgspec.convert({"uri": "false", "hostname": "false"}, type=ask_facts_type()), random=os.urandom
        )
        side = Responder(
            host, "control", time.monotonic(), judge=lambda proposal, hosts: self._answer(proposal), peer="x"
        )
        decoder = FrameDecoder("control", FIRST | ON_CONTROL)
        with sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whom we do not please hangs up
            sock.sendall(PREFACE)
            while data := sock.recv(65536):
                decoder.feed(data)
                for event in decoder.events():
                    assert isinstance(event, Control)
                    for action in side.receive(event, time.monotonic()):
                        if isinstance(action, Send):
                            sock.sendall(action.frame)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._listening.close()


def ask_facts_type() -> Any:
    from virtmig.facts import HostFacts

    return HostFacts


def says(**attachment: str) -> Callable[[Proposal], Answer]:
    """Everything as asked, with the first place that was offered, changed so."""

    def answer(proposal: Proposal) -> Answer:
        place = msgspec.structs.replace(proposal.attachments[0], **attachment)
        return Answer(verdicts=(), settled=proposal.request, channels=(ChannelCount("main", 1),), attachment=place)

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(uri="unix:///etc/passwd"), "unix:///etc/passwd is none of those offered"),
        (says(uri="tcp://203.0.113.9:4444"), "tcp://203.0.113.9:4444 is none of those offered"),
        (says(disks_uri="tcp://203.0.113.9:10809"), "203.0.113.9:10809 is none of those offered"),
        (says(disks_uri="unix:///run/libvirt/libvirt-sock"), "is none of those offered"),
        (says(listen_address="0.0.0.0"), "has QEMU listen on 0.0.0.0"),
        (says(listen_address="127.0.0.1,tls-creds=x"), "has QEMU listen on 127.0.0.1,tls"),
        (says(uri="exec:touch /tmp/x"), "exec:touch /tmp/x is none of those offered"),
    ],
)
def test_a_destination_that_names_other_places(
    place: Path, host: Host, answer: Callable[[Proposal], Answer], words: str
) -> None:
    false = FalseDestination(place / "false.sock", answer)
    with pytest.raises(PlanRefused) as refused:
        shake_hands(host.socket, false.address, request=REQUEST, guest=GUEST)
    [(feature, reason, _)] = refused.value.reasons
    assert feature == "attachment"
    assert words in reason
    eventually(lambda: not host.agent.sessions())
    eventually(lambda: not list((host.folder / "qemu").glob("*")), "the folder for QEMU's sockets being gone")
    false.close()


@pytest.mark.parametrize(
    ("attachment", "words"),
    [
        (Attachment(uri="unix:///etc/0123456789abcdef/m.sock"), "not in this host's folder for sockets"),
        (Attachment(uri="unix:///{qemu}/../../0123456789abcdef/m.sock"), "not in this host's folder for sockets"),
        (Attachment(uri="unix:///{qemu}/0123456789abcdef/x.sock"), "not a path that an agent offers"),
        (Attachment(uri="tcp://10.0.0.1:4444"), "not an address that an agent offers"),
        (Attachment(uri="tcp://127.0.0.1:99999"), "not an address that an agent offers"),
        (Attachment(uri="tcp://127.0.0.1:22"), "not an address that an agent offers"),
        (Attachment(uri="tcp://127.0.0.1:4444", disks_uri="unix:///etc/x"), "not an address that an agent offers"),
        (Attachment(uri="fd:3"), "not an address that an agent offers"),
    ],
)
def test_a_source_that_offers_other_places(place: Path, attachment: Attachment, words: str) -> None:
    from virtmig.agent.meeting import DestinationPlace

    host = Host(place / "b")
    folder = str(host.config.sockets_folder).lstrip("/")
    given = msgspec.structs.replace(attachment, uri=attachment.uri.replace("{qemu}", folder))
    with pytest.raises(ChannelError, match=words):
        DestinationPlace((given,), host.config, QemuUser(uid=0, gid=0))
    assert not list(Path(host.config.sockets_folder).glob("*"))


# -- who comes as QEMU ---------------------------------------------------------------------------------------------


@needs_root
def test_only_qemus_user_gets_to_the_sockets(place: Path, logs: list[Any]) -> None:
    """QEMU runs as nobody here; a third user is turned away, on the unix socket and on loopback."""
    for folder in (place, place / "a"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    qemu = QemuSection(sockets_folder=str(place / "a" / "qemu"), libvirt_uri="none", user="nobody")
    other = QemuSection(sockets_folder=str(place / "b" / "qemu"), libvirt_uri="none", user="nobody")
    with Host(place / "a", qemu=qemu) as source, Host(place / "b", qemu=other) as destination:
        migration = Migration(source, destination.address)
        assert migration.agreed.attachment is not None
        assert migration.agreed.attachment.uri.startswith("tcp://127.0.0.1:")  # both share this network
        port = int(migration.agreed.attachment.uri.rpartition(":")[2])
        stranger = 4711
        assert as_user(stranger, port) == "refused"
        [event] = [event for event in logs if event["event"] == "refused"]
        assert f"not QEMU at the other end: uid {stranger}, and QEMU's user is uid {NOBODY.pw_uid}" in event["reason"]
        assert not migration.session.over.is_set()
        as_user(NOBODY.pw_uid, port)
        assert migration.session.over.wait(PATIENCE_S)  # it got through: no QEMU is there on the other side
        assert migration.session.ended is not None
        assert "QEMU of the destination does not take the connection" in migration.session.ended.reasons[0].reason
        migration.close()


def as_user(uid: int, port: int) -> str:
    code = (
        "import socket, sys\ns = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        f"s.sendall({MAIN_HEADER!r})\ns.settimeout(1.5)\n"
        "try: print('refused' if not s.recv(1) else 'answered')\n"
        "except TimeoutError: print('taken')\nexcept OSError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(port)], user=uid, group=uid, extra_groups=[],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.strip()


@needs_root
def test_a_destination_does_not_give_the_guest_to_whoever_listens(place: Path) -> None:
    """Somebody took QEMU's port before QEMU: the agent sees whose it is and sends nothing."""
    with Host(place / "a") as source, Host(place / "b", qemu=nobodys(place / "b")) as destination:
        migration = Migration(source, destination.address)
        attachment = migration.agreed.attachment
        assert attachment is not None
        port = int(attachment.uri.rpartition(":")[2])
        code = (
            "import socket, sys\ns = socket.create_server((sys.argv[1], int(sys.argv[2])))\n"
            "print('listening', flush=True)\n"
            "c, _ = s.accept()\nprint(c.recv(100), flush=True)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, attachment.listen_address, str(port)], user=4711, group=4711, extra_groups=[],
            stdout=subprocess.PIPE, text=True,
        ) as thief:  # fmt: skip
            assert thief.stdout is not None
            assert thief.stdout.readline() == "listening\n"
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as guest:
                guest.sendall(MAIN_HEADER)
                assert migration.session.over.wait(PATIENCE_S)
            assert thief.stdout.readline() == "b''\n"
        assert migration.session.ended is not None
        assert "not QEMU at the other end: uid 4711" in migration.session.ended.reasons[0].reason
        migration.close()


def nobodys(folder: Path) -> QemuSection:
    return QemuSection(sockets_folder=str(folder / "qemu"), libvirt_uri="none", user="nobody")


def test_whose_end_it_is(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        with socket.create_connection(address) as one:
            two, _ = listening.accept()
            assert local_owner(two) == local_owner(one) == os.geteuid()
            check_qemu(two, QemuUser(uid=4711))  # our own
            check_qemu(two, QemuUser())  # nobody knows QEMU's user
            two.close()
    if socket.has_dualstack_ipv6():
        with (
            socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both,
            socket.create_connection(("127.0.0.1", both.getsockname()[1])) as mapped,
        ):
            assert local_owner(mapped) == os.geteuid()
    left, right = socket.socketpair()
    assert local_owner(left) == os.geteuid()
    right.close()
    assert exactly(left, 0) == b""
    left.close()
