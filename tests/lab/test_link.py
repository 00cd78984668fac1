"""The wire between the hosts: as wide, as long and as lossy as asked, and cut without anybody being told."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.lab import GuestFactory
from virtmig.lab.lab import Lab
from virtmig.lab.link import Shape, has_netem

pytestmark = [pytest.mark.lab, pytest.mark.root]

#: run inside host a: connect to host b's libvirtd, print the milliseconds it took or the error
CONNECT = """
import socket, sys, time
begin = time.monotonic()
try:
    socket.create_connection(("lab-b", 16509), timeout=1).close()
    print((time.monotonic() - begin) * 1000)
except OSError as error:
    print("no:", error)
"""
#: host b counts bytes for a second and a half after the first arrived, host a sends what it can
RECEIVE = """
import socket, time
server = socket.create_server(("0.0.0.0", 5999))
print("listening", flush=True)
peer = server.accept()[0]
received, begin = len(peer.recv(1)), time.monotonic()
while time.monotonic() - begin < 1.5:
    received += len(peer.recv(1 << 20))
print(received * 8 / (time.monotonic() - begin) / 1e6)
"""
#: a kernel (6.18) was seen to reset a SYN that came over TUN to a socket that had just begun to listen: once more then
CONNECT_ONCE_LISTENING = """
import socket, sys, time
deadline = time.monotonic() + 5
while True:
    try:
        peer = socket.create_connection(("lab-b", 5999), timeout=20)
        break
    except ConnectionRefusedError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.02)
"""
SEND = """
try:
    while True:
        peer.sendall(bytes(65536))
except OSError:
    pass
"""


@pytest.fixture
def link_lab(full_lab: Lab) -> Iterator[Lab]:
    yield full_lab
    full_lab.link.restore()
    full_lab.link.change(Shape())


def connect_ms(lab: Lab) -> float | None:
    """None when no connection came about within a second."""
    done = subprocess.run(lab.a.command(["python3", "-c", CONNECT]), capture_output=True, text=True, timeout=20)
    return None if done.stdout.startswith("no:") else float(done.stdout)


def rate_mbit_s(lab: Lab) -> float:
    with subprocess.Popen(lab.b.command(["python3", "-c", RECEIVE]), stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        subprocess.run(lab.a.command(["python3", "-c", CONNECT_ONCE_LISTENING + SEND]), timeout=30, check=True)
        return float(receiver.stdout.readline())


@pytest.mark.parametrize("wire", ["veth", "delayed"])
def test_cut_is_silent_and_restore_mends_it(link_lab: Lab, wire: str) -> None:
    if wire == "delayed":
        link_lab.link.change(Shape(delay_ms=1))
    assert connect_ms(link_lab) is not None
    link_lab.link.cut()
    assert connect_ms(link_lab) is None
    done = subprocess.run(link_lab.a.command(["ip", "-br", "link", "show", "lab0"]), capture_output=True, text=True)
    assert "LOWER_UP" in done.stdout
    link_lab.link.restore()
    assert connect_ms(link_lab) is not None


def test_connection_lives_through_a_short_cut(link_lab: Lab) -> None:
    """No reset, no error: what was sent during the cut arrives after it."""
    program = RECEIVE.split("peer =")[0] + "peer = server.accept()[0]\nprint(peer.recv(6), peer.recv(6), flush=True)"
    sender = (
        CONNECT_ONCE_LISTENING + "peer.send(b'before')\n"
        "print('sent', flush=True)\nsys.stdin.readline()\npeer.send(b'during')\nprint('sent', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with (
        subprocess.Popen(link_lab.b.command(["python3", "-c", program]), stdout=subprocess.PIPE, text=True) as receiver,
        subprocess.Popen(
            link_lab.a.command(["sh", "-c", 'exec python3 -c "$0"', sender]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as sending,
    ):
        assert receiver.stdout is not None
        assert sending.stdin is not None
        assert sending.stdout is not None
        try:
            assert receiver.stdout.readline() == "listening\n"
            assert sending.stdout.readline() == "sent\n"
            link_lab.link.cut()
            sending.stdin.write("\n")
            sending.stdin.flush()
            assert sending.stdout.readline() == "sent\n"
            link_lab.link.restore()
            assert receiver.stdout.readline() == "b'before' b'during'\n"
            sending.stdin.write("\n")
            sending.stdin.flush()
        finally:
            receiver.kill()
            sending.kill()


@pytest.mark.parametrize("delay_ms", [0, 4], ids=["token bucket", "with delay"])
def test_bandwidth(link_lab: Lab, delay_ms: float) -> None:
    link_lab.link.change(Shape(bandwidth_mbit_s=80, delay_ms=delay_ms))
    assert rate_mbit_s(link_lab) == pytest.approx(80, rel=0.25)


def test_delay_is_each_way(link_lab: Lab) -> None:
    link_lab.link.change(Shape(delay_ms=20))
    taken = min(filter(None, (connect_ms(link_lab) for _ in range(3))))
    assert 40 <= taken < 80


def test_loss_of_everything_is_a_cut(link_lab: Lab) -> None:
    link_lab.link.change(Shape(loss_percent=100))
    assert connect_ms(link_lab) is None


def test_cut_outlives_a_change_of_shape(link_lab: Lab) -> None:
    link_lab.link.cut()
    link_lab.link.change(Shape(delay_ms=2))
    assert connect_ms(link_lab) is None


def test_forwarder_only_where_netem_is_missing(link_lab: Lab) -> None:
    link_lab.link.change(Shape(delay_ms=1))
    assert (link_lab.link.state.forwarder is None) == has_netem(link_lab.a)


def test_guest_moves_over_a_slow_long_lossy_wire(link_lab: Lab, guest: GuestFactory) -> None:
    link_lab.link.change(Shape(bandwidth_mbit_s=400, delay_ms=2, loss_percent=0.05))
    made = guest(memory_mib=32)
    link_lab.virsh(link_lab.a, "migrate", "--live", made.name, link_lab.b.uri)
    assert made.only_on(link_lab.b)
    made.check(link_lab.b)


def test_address_is_the_other_hosts_name(full_lab: Lab) -> None:
    for host, other in (full_lab.hosts, full_lab.hosts[::-1]):
        asked = subprocess.run(host.command(["getent", "hosts", other.hostname]), capture_output=True, text=True)
        assert asked.stdout.split()[0] == other.state.address
        socket.inet_aton(other.state.address)
