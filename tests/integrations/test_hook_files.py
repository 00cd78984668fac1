"""The hook's file beside those of others, its log, and `virtmig hooks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from virtmig.cli.hooks_commands import run_hooks
from virtmig.errors import RequestError
from virtmig.integrations import hook_files, hook_log
from virtmig.integrations.hook_files import NAME, chain, install, is_ours, remove, status
from virtmig.integrations.libvirt_hook import SYSTEM_FILE
from virtmig.lab.guest import sample_path

NEW, OLD = (9, 0, 0), (6, 4, 0)


def foreign(path: Path, text: str = "#!/bin/sh\nexit 0\n", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_it_goes_beside_other_hooks_and_leaves_them_alone(tmp_path: Path) -> None:
    main, late = foreign(tmp_path / "qemu"), foreign(tmp_path / "qemu.d" / "90-late")
    foreign(tmp_path / "qemu.d" / "10-off", mode=0o644)
    done = install(tmp_path, libvirt=NEW)
    ours = tmp_path / "qemu.d" / NAME
    assert done == hook_files.Installed(ours, changed=True, reload=False)
    assert chain(tmp_path) == (main, ours, late)
    assert os.access(ours, os.X_OK)
    assert f"\npython='{sys.executable}'\nconfig='{SYSTEM_FILE}'\n" in ours.read_text()
    assert install(tmp_path, libvirt=NEW).changed is False
    assert remove(tmp_path) == (ours,)
    assert remove(tmp_path) == ()
    assert chain(tmp_path) == (main, late)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["10-off", "90-late", "qemu", "qemu.d"]


def test_the_first_hook_of_all_is_told_to_need_a_reload(tmp_path: Path) -> None:
    assert install(tmp_path / "hooks", libvirt=NEW).reload is True
    assert install(tmp_path / "hooks", python="/usr/bin/python3", libvirt=NEW) == hook_files.Installed(
        tmp_path / "hooks" / "qemu.d" / NAME, changed=True, reload=False
    )


def test_a_libvirt_that_runs_one_hook_only(tmp_path: Path) -> None:
    assert install(tmp_path, libvirt=OLD).path == tmp_path / "qemu"
    assert status(tmp_path).path == tmp_path / "qemu"
    assert remove(tmp_path) == (tmp_path / "qemu",)
    foreign(tmp_path / "qemu")
    with pytest.raises(RequestError) as caught:
        install(tmp_path, libvirt=OLD)
    assert str(caught.value) == f"{tmp_path}/qemu is somebody else's, and stays"
    assert caught.value.hint == "libvirt 6.4 runs one hook only: call virtmig's from yours"
    assert chain(tmp_path) == (tmp_path / "qemu",)


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder", "empty"])
def test_what_is_not_ours_is_neither_overwritten_nor_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "qemu.d" / NAME
    path.parent.mkdir()
    ours = foreign(tmp_path / "ours", hook_files.script())
    if kind == "folder":
        path.mkdir()
    elif kind.endswith("link"):
        path.symlink_to(ours if kind == "link" else tmp_path / "absent")
    else:
        path.write_text("" if kind == "empty" else "#!/bin/sh\necho virtmig's hook\n")
    before = path.lstat()
    with pytest.raises(RequestError, match="somebody else's"):
        install(tmp_path, libvirt=NEW)
    assert remove(tmp_path) == ()
    assert path.lstat().st_ino == before.st_ino
    assert is_ours(ours)


def test_names_that_a_shell_would_take_apart(tmp_path: Path) -> None:
    odd = tmp_path / "it's $HOME `here`"
    odd.mkdir()
    (odd / "python").symlink_to(sys.executable)
    (odd / "hook.toml").write_text(f'log = "{tmp_path}/log"\n')
    text = hook_files.script(python=str(odd / "python"), config=str(odd / "hook.toml"))
    ours = foreign(tmp_path / "qemu", text)
    shown = status(tmp_path)
    assert (shown.python, shown.config) == (str(odd / "python"), str(odd / "hook.toml"))
    subprocess.run([ours, "web01", "release", "end", "migrated"], input=b"", check=True)
    # a link to the interpreter alone has no venv beside it: virtmig is not found, and the hook still succeeds
    assert "cannot import virtmig" in shown.problems[0]


def test_status_names_every_problem(tmp_path: Path) -> None:
    assert status(tmp_path).problems == (f"no hook of virtmig in {tmp_path}: virtmig hooks install",)
    config = tmp_path / "hook.toml"
    config.write_text(f'rules = "{tmp_path}/rules.xml"\nrequire = ["rules", "handshake"]\n')
    (tmp_path / "rules.xml").write_text("<rules><bridge from='a' to='b'/><unpin/></rules>")
    ours = install(tmp_path, config=str(config), libvirt=NEW).path
    fine = status(tmp_path)
    assert (fine.problems, fine.rules, fine.require) == ((), 2, ("handshake", "rules"))
    assert fine.start_ms
    ours.chmod(0o644)
    config.write_text("unknown = 1")
    (first, second) = status(tmp_path).problems
    assert first == f"{ours} is not executable: virtmig hooks install"
    assert second.startswith(f"{config}: there is no key unknown")
    install(tmp_path, python="/nonexistent/python", config=str(config), libvirt=NEW)
    assert status(tmp_path).problems[0].startswith("/nonexistent/python cannot be run: No such file")


# -- the log -----------------------------------------------------------------------------------------------------------


def row(operation: str, guest: str = "web01", **more: Any) -> hook_log.Row:
    return {"time": 1.0, "guest": guest, "uuid": f"u-{guest}", "operation": operation, **more}


def test_the_log_is_bounded_and_no_line_is_lost_while_it_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook_log, "KEPT_BYTES", 4000)
    path = str(tmp_path / "new" / "hook.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: hook_log.append(path, row("start", number=number)), range(150)))
    assert sorted(found["number"] for found in hook_log.read(path)) == list(range(150))
    for number in range(150, 1000):
        hook_log.append(path, row("start", number=number))
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["hook.jsonl", "hook.jsonl.1", "hook.jsonl.2", "hook.jsonl.3"]
    assert all(file.stat().st_size <= 4100 for file in files)
    assert [found["number"] for found in hook_log.read(path)][-10:] == list(range(990, 1000))
    assert (tmp_path / "new" / "hook.jsonl").stat().st_mode & 0o7 == 0


def test_a_line_is_bounded_too(tmp_path: Path) -> None:
    path = str(tmp_path / "hook.jsonl")
    hook_log.append(path, row("migrate", reason="x" * 100_000, changes=["y" * 100_000] * 1000))
    (found,) = hook_log.read(path)
    assert len(found["reason"]) == hook_log.LONGEST_TEXT
    assert len(found["changes"]) == hook_log.MOST_CHANGES


def test_a_link_in_the_logs_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "hook.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        hook_log.append(str(tmp_path / "hook.jsonl"), row("start"))
    assert not (tmp_path / "target").exists()


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    good = json.dumps(row("start"))
    (tmp_path / "hook.jsonl").write_text(f'{good}\n{good[:20]}\n[]\n{{}}\n\x00\n{{"time": "x"}}\n{good}\n')
    assert list(hook_log.read(str(tmp_path / "hook.jsonl"))) == [row("start")] * 2
    assert list(hook_log.read(str(tmp_path / "absent"))) == []


CAME = ("migrate", "prepare", "start", "started")
CASES: list[tuple[tuple[str, ...], str]] = [
    (("migrate",), "not begun"),
    (("migrate", "prepare", "start", "stopped", "release"), "not started"),
    (CAME, "came"),
    ((*CAME, "stopped", "release"), "ended"),
    ((*CAME, "reconnect"), "came"),
]


@pytest.mark.parametrize(("phases", "result"), CASES)
def test_phases_become_a_migration(phases: tuple[str, ...], result: str) -> None:
    around = [row("start", "other"), *(row(phase) for phase in phases), row("release", "other", extra="shutdown")]
    (seen,) = hook_log.migrations(around)
    assert (seen.guest, seen.incoming, seen.result) == ("web01", True, result)
    assert result in hook_log.RESULTS


def test_there_and_away_again_and_a_second_time() -> None:
    rows = [row(phase) for phase in CAME] + [row("stopped"), row("release", extra="migrated")]
    rows += [row("migrate", result="vetoed"), *(row(phase) for phase in CAME)]
    results = [(seen.incoming, seen.result) for seen in hook_log.migrations(rows)]
    assert results == [(True, "ended"), (False, "left"), (True, "vetoed"), (True, "came")]


# -- virtmig hooks -----------------------------------------------------------------------------------------------------


def hooks(action: str, folder: Path, **values: Any) -> int:
    return run_hooks({"action": action, "folder": str(folder), **values}, None)  # type: ignore[arg-type]


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "hook.toml"
    config.write_text(f'log = "{tmp_path}/hook.jsonl"\nrules = "{tmp_path}/rules.xml"\n')
    (tmp_path / "rules.xml").write_text(
        "<rules><bridge from='br0' to='br1'/><when source='a*'><bridge from='br9' to='br8'/></when></rules>"
    )
    assert hooks("status", tmp_path) == 1
    assert "virtmig hooks install" in capsys.readouterr().err
    assert hooks("test", tmp_path, file=str(sample_path("plain.xml")), config=str(config)) == 0
    assert "the hook as it would be installed: migrate of plain: rewritten, status 0" in capsys.readouterr().out
    assert hooks("install", tmp_path, config=str(config)) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/qemu.d/{NAME} installed; it runs {sys.executable}" in out
    assert "systemctl reload libvirtd" in out
    assert hooks("install", tmp_path, config=str(config)) == 0
    assert "is installed already" in capsys.readouterr().out
    assert hooks("status", tmp_path) == 0
    out = capsys.readouterr().out
    assert "starts in" in out
    assert "nothing: it never refuses a guest" in out
    assert hooks("status", tmp_path, json=True) == 0
    assert json.loads(capsys.readouterr().out)["rules"] == 2

    assert hooks("test", tmp_path, file=str(sample_path("plain.xml"))) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/qemu.d/{NAME}: migrate of plain: rewritten, status 0" in out
    assert "+      <source bridge='br1'" in out
    assert "1 of 2 rules are for certain sources and left out" in out
    assert not (tmp_path / "hook.jsonl").exists()
    assert hooks("test", tmp_path, file=str(sample_path("plain.xml")), operation="reconnect") == 0
    assert "reconnect of plain: noted, status 0" in capsys.readouterr().out
    config.write_text(f'{config.read_text()}require = "handshake"\n')
    assert hooks("test", tmp_path, file=str(sample_path("plain.xml"))) == 1
    assert "vetoed" in capsys.readouterr().out

    hook_log.append(str(tmp_path / "hook.jsonl"), row("migrate", result="vetoed", reason="because"))
    hook_log.append(str(tmp_path / "hook.jsonl"), row("migrate", "db01", result="unchanged"))
    assert hooks("history", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:5] for line in lines[1:]] == [["web01", "vetoed", "migrate"], ["db01", "not", "begun"]]
    assert lines[1].endswith("because")
    assert hooks("history", tmp_path, json=True, limit=1) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["reason"] == "because"
    assert hooks("remove", tmp_path) == 0
    assert hooks("remove", tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/qemu.d/{NAME} removed",
        f"no hook of virtmig in {tmp_path}",
    ]


def test_what_test_is_given(tmp_path: Path) -> None:
    for file, said in ((None, "needs a domain XML"), ("/nonexistent", "cannot read /nonexistent")):
        with pytest.raises(RequestError, match=said):
            hooks("test", tmp_path, file=file)
