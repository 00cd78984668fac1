"""libvirt's own opinion of a domain XML, from its QEMU driver embedded in a child process (qemu:///embed).

No daemon, no guest: XMLs are parsed, validated and completed by the real driver. Its check of the guest's ABI is
reached by redefining an inactive snapshot (virDomainSnapshotRedefinePrep calls virDomainDefCheckABIStability). The
child has a folder of its own; should libvirt crash, only the child dies, and the next one begins with an empty
folder: what killed the first may lie in the old one. Run as a program it is that child.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

#: so that QEMU's capabilities are probed once, as whoever runs the tests (see virQEMUCapsIsValid)
_QEMU_CONF = 'user = "+{uid}"\ngroup = "+{gid}"\nsecurity_driver = "none"\n'

#: the first line of a child whose driver answers
_READY = "ready\n"

#: what the checks of src/conf/domain_conf.c, cpu_conf.c, numa_conf.c and qemu_domain.c say
_ABI = re.compile(r"does not match|doesn't match|differs|would change default|count .* does")


class Oracle:
    """Asks the child. An answer is "" for yes, or libvirt's words; None when libvirt died of the question."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children = 0
        self._child = self._start()

    def _start(self) -> subprocess.Popen[str]:
        """Raises RuntimeError with the child's words when the driver cannot be had."""
        self._children += 1
        root = self._folder / str(self._children)
        (root / "etc").mkdir(parents=True)
        (root / "etc/qemu.conf").write_text(_QEMU_CONF.format(uid=os.getuid(), gid=os.getgid()))
        said = root / "stderr"
        with said.open("w") as stderr:
            child = subprocess.Popen(
                [sys.executable, __file__, str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "LIBVIRT_LOG_OUTPUTS": "4:stderr"},
            )
        assert child.stdout is not None
        if child.stdout.readline() != _READY:
            status = child.wait(30)
            raise RuntimeError(f"the embedded driver did not start (status {status}): {said.read_text()[-2000:]}")
        return child

    def define(self, xml: str) -> str | None:
        """Can this be defined, with validation against the schema?"""
        return self._ask("define", emulated(xml))

    def to_native(self, xml: str) -> str | None:
        """Can it be turned into a command line of QEMU (virsh domxml-to-native)?"""
        return self._ask("to_native", emulated(xml))

    def abi(self, before: str, after: str) -> str | None:
        """What libvirt has against `after` in the place of `before`; None when it does not even read `after`."""
        said = self._ask("abi", emulated(before), emulated(after))
        return said if said is not None and (not said or _ABI.search(said)) else None

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the end of a child that is dead already
            self._child.stdin.close()
        self._child.wait(30)
        self._child.stdout.close()

    def _ask(self, *words: str) -> str | None:
        """Asked again when the child is gone or sick: that may come of earlier questions. Twice dead is an answer."""
        said = self._ask_once(words)
        if said is None or "Unable to parse RNG" in said:  # libxml2 has lost its type libraries: no opinion
            self._start_again()
            said = self._ask_once(words)
            if said is None:
                self._start_again()
        return said

    def _ask_once(self, words: tuple[str, ...]) -> str | None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(words) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._child.stdout.readline()
        return str(json.loads(answer)) if answer else None

    def _start_again(self) -> None:
        self.close()
        self._child = self._start()


def emulated(xml: str) -> str:
    """The same domain without KVM, which the machine need not have."""
    return re.sub(r"(<domain\s[^>]*?type=['\"])kvm", r"\1qemu", xml, count=1)


def _snapshot(xml: str) -> str:
    body = re.sub(r"^(\s|<\?.*?\?>|<!--.*?-->)*", "", xml, flags=re.DOTALL)
    body = body[: body.rindex("</domain>") + len("</domain>")]
    return (
        "<domainsnapshot><name>before</name><state>shutoff</state><creationTime>1</creationTime>"
        f"{body}</domainsnapshot>"
    )


def _serve(folder: str) -> None:
    import threading

    import libvirt

    libvirt.registerErrorHandler(lambda context, error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=loop, daemon=True).start()
    connection = libvirt.open(f"qemu:///embed?root={folder}")
    print(_READY, end="", flush=True)
    known: dict[str, Any] = {}

    def define(xml: str) -> Any:
        return connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

    def undefine(domain: Any) -> None:
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)

    def forget() -> None:
        for domain in known.values():
            undefine(domain)
        known.clear()

    def abi(before: str, after: str) -> None:
        if before not in known:
            forget()
            known[before] = connection.defineXML(before)
        domain = known[before]
        given = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE)
        uuid = re.search(r"<uuid>.*?</uuid>", given)
        if uuid and "<uuid>" not in after:
            before, after = (re.sub(r"</name>", f"</name>{uuid[0]}", xml, count=1) for xml in (before, after))
        redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        snapshot = domain.snapshotCreateXML(_snapshot(before), redefine)
        try:
            domain.snapshotCreateXML(_snapshot(after), redefine)
        finally:
            snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)

    for line in sys.stdin:
        what, *texts = json.loads(line)
        try:
            if what == "define":
                forget()
                undefine(define(*texts))
            elif what == "to_native":
                connection.domainXMLToNative("qemu-argv", *texts, 0)
            else:
                abi(*texts)
            answer = ""
        except libvirt.libvirtError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
