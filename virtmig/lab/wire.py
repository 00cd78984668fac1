"""A wire of our own between two network namespaces, with delay, loss and a bandwidth, for kernels without netem.

    wire.py DEVICE FOLDER PID_A PID_B

One TUN device in the network namespace of each process, one thread per direction. FOLDER/wire.json says the shape
({"bytes_per_s", "delay_s", "loss"}; 0 means unlimited or none) and is read again whenever it changes. A packet leaves
at max(its arrival, the wire being free) + its length over the bandwidth + the delay; the queue in front of the
wire is bounded, what does not fit is dropped, as a switch does.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import fcntl
import json
import os
import random
import select
import struct
import sys
import threading
import time
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
#: how long a packet may wait for the wire to be free
LONGEST_QUEUE_S = 0.1


def open_tun(device: str, pid: str) -> int:
    """A TUN device in that process's network namespace. The calling thread moves into it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to the network of process {pid}")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return tun


class Shape:
    """The shape in the file, read again when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = 0
        self.looked = 0.0
        self.bytes_per_s = self.delay_s = self.loss = 0.0
        self.refresh()

    def refresh(self) -> None:
        self.looked = time.monotonic()
        changed = self.path.stat().st_mtime_ns
        if changed != self.seen:
            self.seen = changed
            values = json.loads(self.path.read_text())
            self.bytes_per_s, self.delay_s, self.loss = values["bytes_per_s"], values["delay_s"], values["loss"]


def deliver(destination: int, packet: bytes) -> None:
    """Write it, or lose it as a wire does: the device's queue is full (EAGAIN), or it is not up yet (EIO)."""
    try:
        os.write(destination, packet)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EIO):
            raise


def carry(source: int, destination: int, path: Path) -> None:
    """One direction, until a device goes away."""
    shape = Shape(path)
    on_the_way: collections.deque[tuple[float, bytes]] = collections.deque()
    free_at = 0.0
    while True:
        now = time.monotonic()
        while on_the_way and on_the_way[0][0] <= now:
            packet = on_the_way.popleft()[1]
            deliver(destination, packet)
        wait = on_the_way[0][0] - time.monotonic() if on_the_way else 0.1
        readable = select.select([source], [], [], max(0.0, wait))[0]
        now = time.monotonic()
        if now - shape.looked > 0.05:
            shape.refresh()
        if not readable:
            continue
        try:
            packet = os.read(source, 65536)
        except BlockingIOError:
            continue
        if shape.loss and random.random() < shape.loss:
            continue
        begin = max(now, free_at)
        if begin - now > LONGEST_QUEUE_S:
            continue
        free_at = begin + (len(packet) / shape.bytes_per_s if shape.bytes_per_s else 0.0)
        on_the_way.append((free_at + shape.delay_s, packet))


def main() -> None:
    device, folder, first, second = sys.argv[1:]
    ends: list[int] = []
    for pid in (first, second):
        opener = threading.Thread(target=lambda pid=pid: ends.append(open_tun(device, pid)), name=f"open-{pid}")
        opener.start()  # setns changes a thread's namespace only: each device is opened by a thread of its own
        opener.join()
    if len(ends) != 2:
        sys.exit(1)
    path = Path(folder) / "wire.json"
    directions = [(ends[0], ends[1], "a-to-b"), (ends[1], ends[0], "b-to-a")]
    threads = [threading.Thread(target=carry, args=(s, d, path), name=name, daemon=True) for s, d, name in directions]
    for thread in threads:
        thread.start()
    (Path(folder) / "wire.ready").write_text(str(os.getpid()))
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
