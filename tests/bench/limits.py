"""What this machine can do at all, measured in each round: memcpy, tcp over loopback, placing pages with userfaultfd.

All in GiB/s, about 3 s in total. Both ends of tcp run, so that its figures are for two busy processors.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from virtmig.engine.memory import nonzero_pages
from virtmig.engine.userfault import UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, Userfault
from virtmig.errors import MigrationError
from virtmig.pages import PAGE_BYTES

_GIB = 2**30
_SINK = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
peer, _ = sock.accept()
buffer = memoryview(bytearray(int(sys.argv[2])))
while peer.recv_into(buffer): pass
peer.send(b"x")
"""


def measure(mib: int = 128) -> dict[str, float]:
    """By name. What the machine does not let us do is left out."""
    size = mib << 20
    fd = os.memfd_create("bench-limits", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        source = np.frombuffer(mmap.mmap(fd, size), np.uint8)  # unmapped with the last array over it
        source[:] = np.random.default_rng(5).integers(0, 256, size, np.uint8)
        found = _measure(size, fd, source)
        with contextlib.suppress(MigrationError, OSError):
            found |= _userfault(size, fd, source)
    finally:
        os.close(fd)
    return found


def _measure(size: int, fd: int, source: np.ndarray) -> dict[str, float]:
    target = np.ones(size, np.uint8)
    zeros = np.zeros(size, np.uint8)
    zeros[:] = 0
    view = source.data
    parts = [view[at : at + PAGE_BYTES] for at in range(0, size, PAGE_BYTES)]
    return {
        "memcpy warm": _rate(size, lambda: np.copyto(target, source)),
        "zero scan of random pages": _rate(size, lambda: nonzero_pages(source)),
        "zero scan of zero pages": _rate(size, lambda: nonzero_pages(zeros)),
        "tcp writev 128 x 4 KiB": _tcp(size, lambda sock: _writev(sock, parts, 128)),
        "tcp writev 1 x 512 KiB": _tcp(size, lambda sock: _sendall(sock, view)),
        "tcp sendfile from memfd": _tcp(size, lambda sock: _sendfile(sock, fd, size)),
    }


def _rate(size: int, work: Callable[[], object], times: int = 3) -> float:
    best = 0.0
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = max(best, size / (time.perf_counter() - began) / _GIB)
    return best


@contextmanager
def _sink() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        words = [sys.executable, "-S", "-c", _SINK, str(server.fileno()), str(1 << 20)]
        with subprocess.Popen(words, pass_fds=[server.fileno()]) as process:
            try:
                with socket.create_connection(server.getsockname()) as sock:
                    yield sock
            finally:
                process.kill()


def _tcp(size: int, send: Callable[[socket.socket], None], times: int = 3) -> float:
    with _sink() as sock:
        send(sock)
        began = time.perf_counter()
        for _ in range(times):
            send(sock)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        return times * size / (time.perf_counter() - began) / _GIB


def _writev(sock: socket.socket, parts: list[memoryview], count: int) -> None:
    for at in range(0, len(parts), count):
        pending = parts[at : at + count]
        sent = sock.sendmsg(pending)
        wanted = sum(map(len, pending))
        if sent < wanted:
            sock.sendall(b"".join(pending)[sent:])


def _sendall(sock: socket.socket, view: memoryview) -> None:
    for at in range(0, len(view), 512 << 10):
        sock.sendall(view[at : at + (512 << 10)])


def _sendfile(sock: socket.socket, fd: int, size: int) -> None:
    at = 0
    while at < size:
        at += os.sendfile(sock.fileno(), fd, at, min(size - at, 512 << 10))


def _userfault(size: int, fd: int, source: np.ndarray) -> dict[str, float]:
    found: dict[str, float] = {}
    for step, name in ((PAGE_BYTES, "4 KiB"), (512 << 10, "512 KiB")):
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as target, Userfault.open() as userfault:
            address = _address(target)
            userfault.register(address, size, missing=True)
            began = time.perf_counter()
            for at in range(0, size, step):
                userfault.copy(address + at, int(source.ctypes.data) + at, step)
            found[f"UFFDIO_COPY {name}"] = size / (time.perf_counter() - began) / _GIB
        features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM
        with mmap.mmap(fd, size) as target, Userfault.open(features) as userfault:
            address = _address(target)
            userfault.register(address, size, missing=True, minor=True)
            began = time.perf_counter()
            for at in range(0, size, step):
                userfault.continue_(address + at, step)
            found[f"UFFDIO_CONTINUE {name}"] = size / (time.perf_counter() - began) / _GIB
    return found


def _address(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)
