"""`./dev demo`: two hosts with agents, a guest that writes all the time, there and back, every byte checked.

There by parallel precopy through the agents, back by postcopy where this user can have it. Bandwidth is limited so that
there is something to see; the numbers say so. Nothing is left running.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from virtmig.attempts import StopRequest
from virtmig.cli.display import make_display, resolve_mode
from virtmig.cli.signals import stop_on_signals
from virtmig.errors import MigrationError
from virtmig.lab.agents import agent_address, agent_socket, start_agents
from virtmig.lab.guest import GuestSettings
from virtmig.lab.hosts import LabHost
from virtmig.lab.lab import Lab
from virtmig.lab.memory_check import check_domain
from virtmig.migrate import migrate
from virtmig.progress import Outcome, Status
from virtmig.request import MigrationRequest
from virtmig.virt.connection import connected, lookup_domain

GUEST = GuestSettings(name="demo", memory_mib=192, dirty_mib_s=12.0)
BANDWIDTH_MIB_S = 64


def demo() -> int:
    folder = Path(tempfile.mkdtemp(prefix="vmdemo-", dir="/tmp"))
    folder.rmdir()
    stop = StopRequest()
    with stop_on_signals(stop):
        try:
            return _demo(folder, stop)
        except MigrationError as error:
            print(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}", file=sys.stderr)
            return 1


def _demo(folder: Path, stop: StopRequest) -> int:
    begin = time.monotonic()
    form = "two libvirt hosts in network namespaces of their own" if os.getuid() == 0 else "two session libvirt daemons"
    print(f"virtmig demo: {form}, one guest of {GUEST.memory_mib} MiB that writes {GUEST.dirty_mib_s:g} MiB/s (TCG)")
    lab = Lab.up(folder)
    try:
        start_agents(lab)
        lab.start_guest(GUEST)
        print(f"  up in {time.monotonic() - begin:.1f} s; {GUEST.name} runs on {lab.a.hostname}", flush=True)
        print("  an agent on each host: they shake hands first, and carry QEMU's channels\n", flush=True)
        there = {"parallel": True, "parallel-connections": 2, "bandwidth": BANDWIDTH_MIB_S}
        back = {"bandwidth": BANDWIDTH_MIB_S}
        if lab.full:
            back |= {"postcopy": True, "postcopy-after-precopy": True}
        outcome = _leg(lab, lab.a, lab.b, there, stop)
        if outcome is None or outcome.status is not Status.COMPLETED:
            return 1
        outcome = _leg(lab, lab.b, lab.a, back, stop)
        if outcome is None or outcome.status is not Status.COMPLETED:
            return 1
    finally:
        lab.down()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{GUEST.name} went there and back: {outcome.sentence}. The lab is taken down, nothing is left running.")
    return 0


def _leg(
    lab: Lab, source: LabHost, destination: LabHost, options: dict[str, int | bool], stop: StopRequest
) -> Outcome | None:
    request = MigrationRequest(
        {"domain": GUEST.name, "desturi": destination.uri, "live": True, **options, "transport": "relay",
         "agent": str(agent_socket(source)), "destination-agent": agent_address(destination)}
    )  # fmt: skip
    words = " ".join(
        f"--{name}" if request[name] is True else f"--{name} {request[name]}"
        for name in request
        if name not in ("domain", "desturi", "agent", "destination-agent")
    )
    print(f"$ virtmig migrate {GUEST.name} {destination.hostname} {words}", flush=True)
    with make_display(resolve_mode(request, sys.stderr.isatty())) as display:
        outcome = migrate(request, source_uri=source.uri, watcher=display, stop=stop)
    if outcome.status is not Status.COMPLETED:
        return outcome
    with connected(destination.uri) as connection:
        check = check_domain(lookup_domain(connection, GUEST.name), GUEST.pages)
    seen = f", {outcome.observed_downtime_ms} ms away as both hosts saw it" if outcome.observed_downtime_ms else ""
    print(f"  memory: {check.checked_bytes >> 20} MiB checked byte for byte, all as it must be{seen}\n", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(demo())
