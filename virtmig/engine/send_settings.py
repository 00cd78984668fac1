"""How an image is sent, how far that is, and what came of it."""

from __future__ import annotations

import msgspec

from virtmig.engine.transport import STALL_S
from virtmig.errors import RequestError
from virtmig.stream.multifd_compression import METHOD_FLAG
from virtmig.stream.wire import Dialect


class SendSettings(msgspec.Struct, frozen=True):
    """How to send. All must be what the destination was set up for: QEMU's capabilities are not on the wire.

    `bandwidth_bytes_per_s` holds back everything but requested pages. `recover`: the destination has a paused postcopy
    and waits after migrate-recover.
    """

    postcopy: bool = False
    preempt: bool = False
    multifd_channels: int = 0
    compression: str = "none"
    destination: Dialect = Dialect.QEMU_11_1
    recover: bool = False
    bandwidth_bytes_per_s: int | None = None
    stall_s: float = STALL_S

    def __post_init__(self) -> None:
        if self.preempt and not (self.postcopy or self.recover):
            raise RequestError("preempt is a channel of postcopy", option="preempt", hint="add postcopy")
        if not 0 <= self.multifd_channels <= 255:
            raise RequestError(f"{self.multifd_channels} multifd channels", option="multifd", hint="1 to 255")
        if self.compression not in METHOD_FLAG:
            known = ", ".join(METHOD_FLAG)
            raise RequestError(f"no compression '{self.compression}'", option="compression", hint=known)
        if self.compression != "none" and not self.multifd_channels:
            raise RequestError("only multifd compresses", option="compression", hint="add multifd channels")
        if self.bandwidth_bytes_per_s is not None and self.bandwidth_bytes_per_s <= 0:
            raise RequestError("a bandwidth of nothing", option="bandwidth")


class SendProgress(msgspec.Struct, frozen=True):
    """`stage` is connecting, switching, pages, finishing; pages count what was sent here, not by an earlier process."""

    stage: str
    bytes_sent: int
    pages_sent: int
    pages_total: int
    requests_served: int
    guest_runs: bool


class SendResult(msgspec.Struct, frozen=True):
    """What went. `switch_s`: until the guest could run there: RUN in postcopy, the whole stream in precopy."""

    bytes_sent: int
    pages_normal: int
    pages_zero: int
    requests_served: int
    switch_s: float
    elapsed_s: float
