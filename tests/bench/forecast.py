"""`./dev bench forecast`: what was foretold and what came true, for guests that write at a share of the link's rate.

Precopy in the lab at a limited bandwidth; a guest that writes faster than that is given up after a while, as foretold.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from virtmig.lab.guest import GuestSettings
from virtmig.lab.lab import Lab
from virtmig.migrate import migrate
from virtmig.report.records import find_record
from virtmig.request import MigrationRequest

RATIOS = (0.0, 0.25, 0.5, 0.8, 1.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="the guest's memory")
    parser.add_argument("--bandwidth", type=int, default=48, help="MiB/s of the migration")
    parser.add_argument("--give-up", type=int, default=40, help="seconds after which a migration is aborted")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vmf-", dir="/tmp"))
    folder.rmdir()
    lab = Lab.up(folder)
    rows = []
    try:
        with tempfile.TemporaryDirectory() as records:
            os.environ["VIRTMIG_RECORDS"] = records
            for ratio in RATIOS:
                rows.append(_one(lab, ratio, options))
                print(rows[-1][0], file=sys.stderr, flush=True)
    finally:
        lab.down()
    print(f"{options.mib} MiB at {options.bandwidth} MiB/s, downtime limit 300 ms\n")
    head = ("writes/rate", "sampled", "foretold s", "took s", "foretold ms", "was ms", "chance", "ended by itself")
    print("  ".join(f"{text:>12}" for text in head))
    for row in rows:
        print("  ".join(f"{text:>12}" for text in row))
    return 0


def _one(lab: Lab, ratio: float, options: argparse.Namespace) -> tuple[str, ...]:
    guest = GuestSettings(name="guest", memory_mib=options.mib, dirty_mib_s=ratio * options.bandwidth)
    lab.start_guest(guest)
    try:
        request = MigrationRequest(
            {"domain": "guest", "desturi": lab.b.uri, "live": True, "bandwidth": options.bandwidth, "estimate": True,
             "timeout": options.give_up, "timeout-abort": True, "transport": "direct"}
        )  # fmt: skip
        outcome = migrate(request, source_uri=lab.a.uri)
        found = find_record(outcome.report_id).began.estimate
        assert found is not None, "nothing was foretold"
        end = f"{found.high_s:.1f}" if found.high_s is not None else "no end"
        return (
            f"{ratio:g}",
            f"{found.dirty_bytes_per_s / found.rate_bytes_per_s:.2f}",
            f"{found.low_s:.1f}..{end}",
            f"{outcome.elapsed_s:.1f}",
            f"{found.downtime_ms:.0f}",
            f"{outcome.downtime_ms}" if outcome.downtime_ms is not None else "-",
            f"{found.chance:.2f}",
            "yes" if outcome.status == "completed" else f"no: {outcome.status}",
        )
    finally:
        lab.remove_guest("guest")


if __name__ == "__main__":
    sys.exit(main())
