"""One QEMU under QMP, for tests and recordings that need the binary itself and no libvirt.

QMP and the serial console are inherited socket pairs, so that a QEMU inside a chroot needs neither a port nor a path.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ANSWER_S = 30.0


class QemuError(Exception):
    """A QMP error, a QEMU that ended, or an event that did not come in time."""


class Qmp:
    """A QMP connection. One reader thread keeps events; `events` only grows, in arrival order."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self._file = connection.makefile("rb")
        self._connection = connection
        self._changed = threading.Condition()
        self._greeting: dict[str, Any] | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._next_id = 0
        self._closed = False
        self._reader = threading.Thread(target=self._read, name=f"qmp-{name}", daemon=True)
        self._reader.start()

    def greet(self) -> dict[str, Any]:
        """Negotiate; the QMP greeting (its `QMP.version`) is returned."""
        with self._changed:
            self._wait(lambda: self._greeting is not None, "the QMP greeting", _ANSWER_S)
        self.execute("qmp_capabilities")
        assert self._greeting is not None
        return self._greeting

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command (`_` in argument names stands for `-`) and return its answer. Raises QemuError."""
        with self._changed:
            self._next_id += 1
            number = self._next_id
        message = {
            "execute": command,
            "id": number,
            "arguments": {k.replace("_", "-"): v for k, v in arguments.items()},
        }
        self._connection.sendall(json.dumps(message).encode() + b"\n")
        with self._changed:
            self._wait(lambda: number in self._answers, f"an answer to {command}", _ANSWER_S)
            answer = self._answers.pop(number)
        if "error" in answer:
            raise QemuError(f"{self.name}: {command}: {answer['error']['desc']}")
        return answer["return"]

    def monitor(self, line: str) -> str:
        """A human monitor command's text."""
        return str(self.execute("human-monitor-command", command_line=line))

    def wait_event(
        self, matches: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The first event, past or to come, that matches."""
        with self._changed:
            self._wait(lambda: any(matches(e) for e in self.events), what, timeout_s)
            return next(e for e in self.events if matches(e))

    def wait_status(self, *wanted: str, since: int = 0, timeout_s: float = 90.0) -> str:
        """Wait for a MIGRATION event with one of these states, past or to come (from event `since` on).

        Raises QemuError at once when the migration fails and that was not asked for.
        """
        last = (*wanted, "failed")

        def status() -> str | None:
            seen = (e["data"]["status"] for e in self.events[since:] if e["event"] == "MIGRATION")
            return next((s for s in seen if s in last), None)

        with self._changed:
            self._wait(lambda: status() is not None, f"migration state {' or '.join(wanted)}", timeout_s)
            found = status()
        if found not in wanted:
            raise QemuError(f"{self.name}: {self.statuses()}, {self.execute('query-migrate')}")
        assert found is not None
        return found

    def wait_pass(self, number: int, timeout_s: float = 60.0) -> None:
        """Wait until the source begins its `number`th pass over RAM (needs the capability `events`)."""
        self.wait_event(
            lambda e: e["event"] == "MIGRATION_PASS" and e["data"]["pass"] >= number, f"pass {number}", timeout_s
        )

    def statuses(self) -> list[str]:
        """All migration states seen so far, in order."""
        return [e["data"]["status"] for e in self.events if e["event"] == "MIGRATION"]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._file.close()
        self._connection.close()

    def _wait(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            left = deadline - time.monotonic()
            if self._closed or left <= 0:
                reason = "QEMU has gone" if self._closed else f"not within {timeout_s} s"
                raise QemuError(f"{self.name}: waiting for {what}: {reason}")
            self._changed.wait(left)

    def _read(self) -> None:
        try:
            for line in self._file:
                message = json.loads(line)
                with self._changed:
                    if "QMP" in message:
                        self._greeting = message
                    elif "event" in message:
                        self.events.append(message)
                    elif "id" in message:
                        self._answers[message["id"]] = message
                    self._changed.notify_all()
        except OSError:
            pass
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Qemu:
    """A QEMU process, possibly inside a chroot.

    `command` is the emulator with whatever must stand before it; `root` is the folder that it sees as `/`. Use it as a
    context manager: leaving kills the process.
    """

    def __init__(self, command: Sequence[str], arguments: Sequence[str], *, name: str, stderr: Path) -> None:
        qmp_here, qmp_there = socket.socketpair()
        serial_here, serial_there = socket.socketpair()
        self.arguments = [*arguments, "-chardev", f"socket,id=qmp,fd={qmp_there.fileno()}", "-mon",
                          "chardev=qmp,mode=control", "-chardev", f"socket,id=serial,fd={serial_there.fileno()}",
                          "-serial", "chardev:serial"]  # fmt: skip
        self.name = name
        self._stderr = stderr
        with stderr.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(qmp_there.fileno(), serial_there.fileno()),
            )
        qmp_there.close()
        serial_there.close()
        self._serial = serial_here
        self.qmp = Qmp(qmp_here, name)

    def __enter__(self) -> Qemu:
        try:
            version = self.qmp.greet()["QMP"]["version"]["qemu"]
        except QemuError as error:
            self.close()
            raise QemuError(f"{error}: {self._stderr.read_text()}") from error
        self.version = f"{version['major']}.{version['minor']}.{version['micro']}"
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.qmp.close()
        self._serial.close()

    def wait_heartbeat(self, count: int = 1, timeout_s: float = 60.0) -> None:
        """Wait until the lab guest has printed `count` more lines."""
        deadline = time.monotonic() + timeout_s
        while count > 0:
            self._serial.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                text = self._serial.recv(4096)
            except TimeoutError:
                raise QemuError(f"{self.name}: the guest prints nothing") from None
            if not text:
                raise QemuError(f"{self.name}: QEMU ended: {self._stderr.read_text()}")
            count -= text.count(b"\n")

    def set_capabilities(self, names: Sequence[str]) -> None:
        switched = [{"capability": name, "state": True} for name in names]
        self.qmp.execute("migrate-set-capabilities", capabilities=switched)

    def set_parameters(self, parameters: Mapping[str, int | str]) -> None:
        if parameters:
            self.qmp.execute("migrate-set-parameters", **parameters)

    def ram_blocks(self) -> dict[str, int]:
        """Name -> used length in bytes, in the order of `info ramblock`."""
        rows = re.findall(r"^\s*(\S+)\s+\d+ [KMG]iB\s+0x\w+\s+(0x\w+)\s+0x\w+", self.qmp.monitor("info ramblock"), re.M)
        return {name: int(used, 16) for name, used in rows}

    def read_guest_block(self, guest_address: int, length: int) -> tuple[str, bytes]:
        """(block name, content) of the RAM block whose first byte the guest sees at this physical address.

        Read from the process itself: what the guest sees through QMP is hidden in places by ROMs and devices.
        """
        text = self.qmp.monitor(f"gpa2hva {guest_address:#x}")
        match = re.search(r"\((.+)\) is (0x[0-9a-f]+)", text)
        if match is None:
            raise QemuError(f"{self.name}: gpa2hva: {text}")
        memory = os.open(f"/proc/{self.process.pid}/mem", os.O_RDONLY)
        try:
            parts = []
            at = int(match[2], 16)
            while length > 0:
                parts.append(os.pread(memory, min(length, 1 << 20), at))
                at += len(parts[-1])
                length -= len(parts[-1])
        finally:
            os.close(memory)
        return match[1], b"".join(parts)
