"""libvirt's hook as a file on this host: installed beside those of others, found again, removed.

libvirt 6.5 and later run hooks/qemu and then every executable of hooks/qemu.d in the order of their names; what one
prints is the next one's input. So somebody else's hooks/qemu stays as it is. Whether there is any hook at all libvirt
looks up when it starts and at a reload.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from virtmig.errors import MigrationError, RequestError
from virtmig.integrations import hook_log
from virtmig.integrations.libvirt_hook import SYSTEM_FILE, read_settings
from virtmig.rule_files import read_rules

HOOKS_FOLDER = Path("/etc/libvirt/hooks")
NAME = "50-virtmig"
#: libvirt 6.5: docs/hooks.rst, "executed in alphabetical order"
CHAINING_SINCE = (6, 5)
_MARK = "# virtmig's hook for libvirt's QEMU driver"


class Installed(msgspec.Struct, frozen=True):
    """`changed`: the file is new or another one. `reload`: no hook was there, so libvirt does not look for one yet."""

    path: Path
    changed: bool
    reload: bool


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`problems` are what keeps the hook from working, each with its way out; none means that it works."""

    path: Path | None
    chain: tuple[Path, ...]  # all that libvirt runs, in its order
    python: str = ""
    start_ms: int | None = None
    config: str = SYSTEM_FILE
    require: tuple[str, ...] = ()
    rules: int = 0
    log: str = ""
    problems: tuple[str, ...] = ()


def template() -> str:
    """hooks/qemu, in a checkout or in an installed package."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "hooks", package / "_hooks"):
        if (folder / "qemu").is_file():
            return (folder / "qemu").read_text()
    raise RequestError("hooks/qemu is missing", hint="run from a checkout, or install the package anew")


def script(*, python: str = sys.executable, config: str = SYSTEM_FILE) -> str:
    """The hook for this installation of virtmig. `python` is not resolved: a venv's own name leads to its packages."""
    text = template()
    for name, value in (("python", python), ("config", config)):
        text, count = re.subn(rf"^{name}='.*'$", lambda _: f"{name}={_quoted(value)}", text, flags=re.MULTILINE)  # noqa: B023
        if count != 1:
            raise RequestError(f"hooks/qemu has {count} lines for {name}", hint="install the package anew")
    return text


def _quoted(text: str) -> str:
    """Always in quotes, so that it is found again."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def install(
    folder: Path = HOOKS_FOLDER,
    *,
    python: str = sys.executable,
    config: str = SYSTEM_FILE,
    libvirt: tuple[int, ...] | None = None,
) -> Installed:
    """Put the hook into `folder`/qemu.d, or to `folder`/qemu for a `libvirt` before 6.5 (None: this host's is asked).

    Safe to repeat. Raises RequestError where somebody else's file is in the place, or the folder cannot be written.
    """
    version = installed_libvirt() if libvirt is None else libvirt
    old = bool(version) and version < CHAINING_SINCE
    path = folder / "qemu" if old else folder / "qemu.d" / NAME
    text = script(python=python, config=config)
    if os.path.lexists(path) and not is_ours(path):
        only_one = f"libvirt {'.'.join(map(str, version[:2]))} runs one hook only: call virtmig's from yours"
        raise RequestError(f"{path} is somebody else's, and stays", hint=only_one if old else "move it")
    reload = not chain(folder)
    try:
        if is_ours(path) and path.read_text() == text and os.access(path, os.X_OK):
            return Installed(path, changed=False, reload=False)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        part = folder / f".{NAME}.part"  # not in qemu.d: libvirt would run it
        part.unlink(missing_ok=True)
        part.write_text(text)
        part.chmod(0o755)
        part.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    return Installed(path, changed=True, reload=reload)


def remove(folder: Path = HOOKS_FOLDER) -> tuple[Path, ...]:
    """Take away what `install` has put there, and nothing else. Raises RequestError."""
    ours = tuple(path for path in _places(folder) if is_ours(path))
    for path in ours:
        try:
            path.unlink()
        except OSError as error:
            raise _unwritable(path, error) from None
    return ours


def is_ours(path: Path) -> bool:
    """A file, not a link, that begins as hooks/qemu does."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return path.read_text(errors="replace")[:200].splitlines()[1:2][0].startswith(_MARK)
    except (OSError, IndexError):
        return False


def chain(folder: Path = HOOKS_FOLDER) -> tuple[Path, ...]:
    """Every hook that libvirt runs for its QEMU driver, in its order (src/util/virhook.c virHookCall)."""
    folders = [folder / "qemu", *_listed(folder / "qemu.d")]
    return tuple(path for path in folders if path.is_file() and os.access(path, os.X_OK))


def status(folder: Path = HOOKS_FOLDER) -> Status:
    """What is installed, and whether it would work: its Python is started once, its settings and rules are read."""
    ours = [path for path in _places(folder) if is_ours(path)]
    running = chain(folder)
    if not ours:
        problem = f"no hook of virtmig in {folder}: virtmig hooks install"
        return Status(path=None, chain=running, problems=(problem,))
    problems = [] if ours[0] in running else [f"{ours[0]} is not executable: virtmig hooks install"]
    python, config = (_filled_in(ours[0], name) for name in ("python", "config"))
    start_ms, trouble = _started(python)
    problems += [trouble] if trouble else []
    settings = read_settings(config)
    problems += [settings.problem] if settings.problem else []
    count = 0
    try:
        count = len(read_rules([Path(path) for path in settings.rules] or None))
    except MigrationError as error:
        problems.append(f"{error}")
    return Status(
        path=ours[0], chain=running, python=python, start_ms=start_ms, config=config, rules=count,
        require=tuple(sorted(settings.require)), log=settings.log or hook_log.default_log(), problems=tuple(problems),
    )  # fmt: skip


def log_file(folder: Path = HOOKS_FOLDER, config: str = SYSTEM_FILE) -> str:
    """Where the hook of `folder` notes what it sees; of the one that `config` would give where none is installed."""
    ours = next((path for path in _places(folder) if is_ours(path)), None)
    return read_settings(_filled_in(ours, "config") if ours else config).log or hook_log.default_log()


def installed_libvirt() -> tuple[int, ...]:
    """The version of this host's daemon, by its program; () where there is none or it says something else."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    for name in ("libvirtd", "virtqemud"):
        if program := shutil.which(name, path=folders):
            try:
                done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                continue
            if found := re.search(r"\b(\d+)\.(\d+)\.(\d+)", done.stdout):
                return tuple(int(part) for part in found.groups())
    return ()


def _started(python: str) -> tuple[int | None, str]:
    """How many ms it takes to come as far as an answer, and why it does not."""
    words = [python, "-I", "-c", "import virtmig.integrations.libvirt_hook"]
    began = time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, cwd="/", env={"LC_ALL": "C"})
    except OSError as error:
        return None, f"{python} cannot be run: {error.strerror}: virtmig hooks install"
    except subprocess.TimeoutExpired:
        return None, f"{python} does not answer"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return None, f"{python} cannot import virtmig: {last}: virtmig hooks install"
    return round((time.monotonic() - began) * 1000), ""


def _filled_in(path: Path, name: str) -> str:
    found = re.search(rf"^{name}=(.*)$", path.read_text(), re.MULTILINE)
    return " ".join(shlex.split(found[1])) if found else ""


def _places(folder: Path) -> tuple[Path, ...]:
    return (folder / "qemu.d" / NAME, folder / "qemu")


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _unwritable(path: Path, error: OSError) -> RequestError:
    hint = "as root: sudo virtmig hooks install" if isinstance(error, PermissionError) else ""
    return RequestError(f"cannot write {path}: {error.strerror}", hint=hint)
