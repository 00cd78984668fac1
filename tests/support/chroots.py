"""QEMUs of other ages in chroots, and the engine's tests with each of them: what `./dev compat` runs, as root.

The folder is $VIRTMIG_CHROOTS, by default /var/tmp/virtmig-chroots; what is there already is taken as it is. Further
arguments go to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MIRROR = os.environ.get("VIRTMIG_MIRROR", "http://deb.debian.org/debian")
#: Debian suites and the QEMU they carry
SUITES = {"trixie": "10.0", "sid": "11.1"}
_INSTALL = ("apt-get", "install", "-y", "--no-install-recommends")


def make(root: Path, suite: str) -> None:
    """The suite's base system by debootstrap, QEMU by apt inside it. Raises CalledProcessError with the log shown."""
    if not shutil.which("debootstrap"):
        _run([*_INSTALL, "debootstrap"])
    shutil.rmtree(root, ignore_errors=True)
    print(f"compat: making {root} (QEMU {SUITES[suite]}, about a minute)", file=sys.stderr, flush=True)
    _run(["debootstrap", "--variant=minbase", suite, str(root), MIRROR])
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    _run(["chroot", str(root), *_INSTALL, "qemu-system-x86"])


def _run(words: list[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.stderr.buffer.write(done.stdout[-4000:])
        raise SystemExit(f"compat: failed: {' '.join(words)}")


def main(arguments: list[str]) -> int:
    if os.getuid():
        raise SystemExit("compat: needs root: it runs QEMU in chroots")
    folder = Path(os.environ.setdefault("VIRTMIG_CHROOTS", "/var/tmp/virtmig-chroots"))
    folder.mkdir(parents=True, exist_ok=True)
    offline = "--offline" in arguments
    for suite in SUITES:
        if not (folder / suite / "usr/bin/qemu-system-x86_64").exists():
            if offline:
                print(f"compat: no {folder / suite}, and nothing may be fetched", file=sys.stderr)
            else:
                make(folder / suite, suite)
    return int(pytest.main(["tests/engine", *(word for word in arguments if word != "--offline")]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
