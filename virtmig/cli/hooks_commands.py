"""`virtmig hooks install | remove | status | test | history`: libvirt's hook on this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from virtmig.cli.show_xml import diff_lines
from virtmig.errors import RequestError
from virtmig.integrations import hook_files, hook_log
from virtmig.integrations.libvirt_hook import SYSTEM_FILE, TEST_LOG, TEST_SOURCE, read_settings
from virtmig.rule_files import read_rules

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions

_RELOAD = (
    "libvirt had no hook before and looks for one only when it is told to: "
    "systemctl reload libvirtd (or virtqemud), or SIGHUP to it; guests are not touched"
)
_HEADINGS = ("when", "guest", "result", "phases", "why")


def run_hooks(values: dict[str, Any], options: GlobalOptions) -> int:
    """Exit status 0; 1 where the hook is missing or does not work, and of `test` where it refuses the guest."""
    folder = Path(str(values.get("folder") or hook_files.HOOKS_FOLDER))
    config = str(values.get("config") or SYSTEM_FILE)
    action = str(values["action"])
    if action == "install":
        return _install(folder, config)
    if action == "remove":
        return _remove(folder)
    if action == "status":
        return _status(folder, json_wanted=bool(values.get("json")))
    if action == "history":
        return _history(folder, config, limit=int(values.get("limit") or 20), json_wanted=bool(values.get("json")))
    return _test(values, folder, config)


def _install(folder: Path, config: str) -> int:
    done = hook_files.install(folder, config=config)
    print(f"{done.path} {'installed' if done.changed else 'is installed already'}; it runs {sys.executable}")
    if done.reload:
        print(_RELOAD)
    if problem := read_settings(config).problem:
        print(f"virtmig: warning: {problem}", file=sys.stderr)
    return 0


def _remove(folder: Path) -> int:
    removed = hook_files.remove(folder)
    print("\n".join(f"{path} removed" for path in removed) or f"no hook of virtmig in {folder}")
    return 0


def _status(folder: Path, *, json_wanted: bool) -> int:
    found = hook_files.status(folder)
    if json_wanted:
        print(msgspec.json.encode(found, enc_hook=str).decode())
        return 1 if found.problems else 0
    rows = [("hook", str(found.path) if found.path else "not installed")]
    if found.path:
        start = f"starts in {found.start_ms} ms" if found.start_ms is not None else "does not start"
        rows += [
            ("python", f"{found.python} ({start})"),
            ("settings", found.config + ("" if os.path.exists(found.config) else " (none: the defaults)")),
            ("requires", ", ".join(found.require) or "nothing: it never refuses a guest"),
            ("rules", str(found.rules)),
            ("log", found.log),
        ]
    rows += [("libvirt runs", " then ".join(map(str, found.chain)) or "no hook")]
    print("\n".join(f"{name + ':':<14} {value}" for name, value in rows))
    for problem in found.problems:
        print(f"virtmig: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


def _history(folder: Path, config: str, *, limit: int, json_wanted: bool) -> int:
    """The newest first."""
    log = hook_files.log_file(folder, config)
    try:
        seen = sorted(hook_log.migrations(hook_log.read(log)), key=lambda each: -each.began)[:limit]
    except OSError as error:
        raise RequestError(f"cannot read {log}: {error.strerror}") from None
    if json_wanted:
        for each in seen:
            print(json.dumps({**each._asdict(), "result": each.result}))
        return 0
    table = [_HEADINGS, *(_line(each) for each in seen)]
    widths = [max(len(row[at]) for row in table) for at in range(len(_HEADINGS))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _line(seen: hook_log.Seen) -> tuple[str, ...]:
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen.began)),
        seen.guest,
        seen.result,
        ", ".join(seen.phases),
        str(seen.rows[0].get("reason") or hook_log.RESULTS[seen.result]),
    )


# -- test ------------------------------------------------------------------------------------------------------------


def _test(values: dict[str, Any], folder: Path, config: str) -> int:
    """Run the hook as libvirt does: its arguments, its environment, its folder. Nothing is added to the log."""
    if not values.get("file"):
        raise RequestError("hooks test needs a domain XML", option="file", hint="virsh dumpxml web01 > web01.xml")
    text = _read(str(values["file"]))
    source = str(values.get("source-host") or "")
    operation = str(values.get("operation") or "migrate")
    installed = next((path for path in hook_files.chain(folder) if hook_files.is_ours(path)), None)
    with tempfile.TemporaryDirectory(prefix="virtmig-") as scratch:
        path = installed or Path(scratch, "qemu")
        if installed is None:
            path.write_text(hook_files.script(config=config))
            path.chmod(0o755)
        else:
            config = hook_files.status(folder).config
        log = Path(scratch, "hook.jsonl")
        words = [str(path), _name(text), operation, "begin", "-"]
        began = time.monotonic()
        done = subprocess.run(words, input=text.encode(), capture_output=True, cwd="/", env={
            "LC_ALL": "C", TEST_LOG: str(log), TEST_SOURCE: source,
            **{name: os.environ[name] for name in ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR") if name in os.environ},
        })  # fmt: skip
        took_ms = round((time.monotonic() - began) * 1000)
        row: hook_log.Row = next(iter(hook_log.read(str(log))), {})
    result = row.get("result") or ("refused" if done.returncode else "passed over: libvirt goes on")
    where = str(path) if installed else "the hook as it would be installed"
    print(f"{where}: {operation} of {words[1]}: {result}, status {done.returncode}, {took_ms} ms")
    print("".join(f"  {change}\n" for change in row.get("changes", [])), end="")
    after = done.stdout.decode().rstrip()
    if after:
        print("\n".join(diff_lines(text.rstrip(), after, f"{words[1]} as it comes", f"{words[1]} for this host")))
    print(done.stderr.decode(), end="", file=sys.stderr)
    if not source and operation == "migrate":
        _tell_of_sources(config)
    return 1 if done.returncode else 0


def _tell_of_sources(config: str) -> None:
    rules = read_rules([Path(path) for path in read_settings(config).rules] or None).rules
    left_out = sum(rule.source != "*" for rule in rules)
    if left_out:
        print(f"{left_out} of {len(rules)} rules are for certain sources and left out: libvirt tells no hook who sends "
              "a guest. With virtmig migrate the source applies them; --source-host shows what they do.")  # fmt: skip


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        raise RequestError(f"cannot read {name}: {error.strerror}", option="file") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"cannot read {name}: byte {error.start} is not UTF-8", option="file") from None


def _name(text: str) -> str:
    """Raises DomainXmlError for what is no domain."""
    from virtmig.domain.document import DomainDocument, text_of

    return text_of(DomainDocument(text).root, "name") or "guest"
