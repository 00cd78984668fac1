"""What a relay of two processes can do at all on this machine, over the same sockets: bytes spliced, and copied.

writer -> unix -> first hop -> tcp -> second hop -> unix -> reader, four processes; nobody looks at a byte.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

_GIB = 2**30
#: interpreters have started by then; their start is in their CPU time, 10 ms each
_READY_S = 0.3
_WRITE = """
import os, socket, sys
out, left = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
data = memoryview(os.urandom(1 << 20))
sys.stdin.readline()
while left: left -= out.send(data[:left])
out.shutdown(socket.SHUT_WR)
"""
_READ = """
import socket, sys
into, left = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
buffer = memoryview(bytearray(1 << 19))
while left: left -= into.recv_into(buffer)
into.recv(1)
"""
_SPLICE = """
import os, sys
into, out = int(sys.argv[1]), int(sys.argv[2])
read, write = os.pipe()
import fcntl
fcntl.fcntl(write, 1031, 1 << 20)  # F_SETPIPE_SZ
while (count := os.splice(into, write, 1 << 19)):
    while count: count -= os.splice(read, out, count)
"""
_COPY = """
import socket, sys
into, out = (socket.socket(fileno=int(word)) for word in sys.argv[1:3])
buffer = memoryview(bytearray(1 << 19))
while (count := into.recv_into(buffer)):
    view = buffer[:count]
    while len(view): view = view[out.send(view):]
"""


def measure(mib: int = 1024) -> dict[str, float]:
    """GiB/s by name, and CPU-seconds per GiB of a hop."""
    found: dict[str, float] = {}
    for name, hop in (("two hops, splice", _SPLICE), ("two hops, copied", _COPY)):
        seconds, cpu_s = _run(hop, mib << 20)
        found[name] = (mib << 20) / _GIB / seconds
        found[f"{name}: CPU-s per GiB of a hop"] = cpu_s / 2 / (mib / 1024)
    return found


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname())
        return dialled, server.accept()[0]


def _run(hop: str, length: int) -> tuple[float, float]:
    source, first = socket.socketpair()
    near, far = _tcp_pair()
    second, sink = socket.socketpair()
    processes = [
        _start(hop, first, near), _start(hop, far, second), _start(_READ, sink, length), _start(_WRITE, source, length),
    ]  # fmt: skip
    for sock in (first, near, far, second, sink, source):
        sock.close()
    time.sleep(_READY_S)
    began = time.monotonic()
    processes[3].communicate(b"\n")
    hops = processes[:2]
    processes[2].wait()
    seconds = time.monotonic() - began
    cpu_s = 0.0
    for process in hops:
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        cpu_s += usage.ru_utime + usage.ru_stime
    return seconds, cpu_s


def _start(script: str, *words: socket.socket | int) -> subprocess.Popen[bytes]:
    fds = [word.fileno() for word in words if isinstance(word, socket.socket)]
    arguments = [str(word.fileno()) if isinstance(word, socket.socket) else str(word) for word in words]
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", script, *arguments], pass_fds=fds, stdin=subprocess.PIPE)
