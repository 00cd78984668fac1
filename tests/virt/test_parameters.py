"""A request becomes libvirt's flags and typed parameters, by the table alone."""

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest

from virtmig.errors import RequestError
from virtmig.options import OPTIONS, Kind, Option
from virtmig.request import MigrationRequest
from virtmig.virt.parameters import migrate_call

BASE = {"domain": "web", "desturi": "qemu+ssh://b/system"}

#: what else must be given for one option to stand alone without a conflict
COMPANIONS: dict[str, dict[str, object]] = {
    "offline": {"persistent": True},
    "tunnelled": {"p2p": True},
    "copy-storage-synchronous-writes": {"copy-storage-all": True},
    "migrate-disks": {"copy-storage-all": True},
    "migrate-disks-detect-zeroes": {"copy-storage-all": True},
    "migrate-disks-target-zero": {"copy-storage-all": True},
    "postcopy": {"live": True},
    "postcopy-preempt": {"postcopy": True, "live": True},
    "postcopy-resume": {"postcopy": True, "live": True},
    "postcopy-after-precopy": {"postcopy": True, "live": True},
    "postcopy-after-passes": {"postcopy": True, "live": True},
    "zerocopy": {"parallel": True},
    "parallel-connections": {"parallel": True},
    "comp-mt-level": {"comp-methods": "mt"},
    "comp-mt-threads": {"comp-methods": "mt"},
    "comp-mt-dthreads": {"comp-methods": "mt"},
    "comp-xbzrle-cache": {"comp-methods": "xbzrle"},
    "comp-zlib-level": {"comp-methods": "zlib", "parallel": True},
    "comp-zstd-level": {"comp-methods": "zstd", "parallel": True},
    "auto-converge-initial": {"auto-converge": True},
    "auto-converge-increment": {"auto-converge": True},
    "persistent-xml": {"persistent": True},
    "tls-destination": {"tls": True},
    "timeout": {"live": True},
    "timeout-suspend": {"live": True, "timeout": 5},
    "timeout-postcopy": {"live": True, "timeout": 5, "postcopy": True},
    "timeout-abort": {"live": True, "timeout": 5},
}


def example(option: Option, folder: Path) -> object:
    match option.kind:
        case Kind.BOOL:
            return True
        case Kind.NUMBER:
            return 8192 if option.name == "comp-xbzrle-cache" else max(option.minimum or 0, 7)
        case Kind.LIST:
            return "mt" if option.name == "comp-methods" else "vda,vdb"
        case Kind.FILE:
            (folder / "x.xml").write_text("<domain/>")
            return str(folder / "x.xml")
        case Kind.CHOICE:
            return option.choices[0]
    return "tcp://b:1" if option.name == "migrateuri" else "text"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_each_row(option: Option, tmp_path: Path) -> None:
    if option.required:
        return
    values = {**BASE, **COMPANIONS.get(option.name, {}), option.name: example(option, tmp_path)}
    request = MigrationRequest(values)
    if option.since > libvirt.getVersion():
        with pytest.raises(RequestError, match=f"this libvirt is too old for --{option.name}"):
            migrate_call(request)
        return
    without = migrate_call(MigrationRequest({**BASE, **COMPANIONS.get(option.name, {})}))
    call = migrate_call(request)
    if option.flag:
        assert call.flags == without.flags | getattr(libvirt, option.flag)
        assert call.flags != without.flags
    if option.param:
        expected = request[option.name]
        if option.kind is Kind.FILE:
            expected = "<domain/>"
        assert call.params[option.param] == (list(expected) if isinstance(expected, tuple) else expected)
    if not option.flag and not option.param and option.name not in ("threads",):
        assert (call.flags, call.params) == (without.flags, without.params)
    assert call.to_uri == ("p2p" in request or "direct" in request)


def test_threads_is_parallel_with_a_count() -> None:
    call = migrate_call(MigrationRequest({**BASE, "threads": 6}))
    assert call.flags == libvirt.VIR_MIGRATE_PARALLEL
    assert call.params == {"parallel.connections": 6}


def test_a_flag_the_binding_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(libvirt, "VIR_MIGRATE_ZEROCOPY")
    with pytest.raises(RequestError, match="this libvirt is too old for --zerocopy"):
        migrate_call(MigrationRequest({**BASE, "zerocopy": True, "parallel": True}))


def test_an_unreadable_file(tmp_path: Path) -> None:
    request = MigrationRequest({**BASE, "xml": str(tmp_path / "absent.xml")})
    with pytest.raises(RequestError, match="cannot read file") as caught:
        migrate_call(request)
    assert "No such file" in str(caught.value)
