"""doctor: each line passes or says what fixes it."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest

from tests.support.hosts import DESTINATION, GUEST, SOURCE
from virtmig.cli.doctor import Check, doctor_lines, print_checks, run_doctor
from virtmig.facts import Finding, GuestArch, HostFacts, version

replace = msgspec.structs.replace


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.what: check.status for check in checks}


def test_two_new_hosts_pass_everything() -> None:
    checks = doctor_lines(SOURCE, DESTINATION, GUEST)
    bad = [check for check in checks if check.status != "PASS"]
    # what is true of QEMU 11 whatever one does
    assert {check.what for check in bad} == {"known trouble: frequent-iterations"}
    assert "a live migration to beryl" in statuses(checks)


@pytest.mark.parametrize(
    ("change", "what", "status"),
    [
        ({"libvirt_version": version(8, 9)}, "libvirt >= 9.0.0", "FAIL"),
        ({"libvirt_version": None}, "libvirt >= 9.0.0", "WARN"),
        ({"driver": "TEST"}, "the QEMU driver", "FAIL"),
        ({"qemu_version": None}, "a QEMU binary", "FAIL"),
        ({"guest_archs": (GuestArch(arch="x86_64", virt_types=("qemu",)),)}, "hardware virtualization (KVM)", "WARN"),
        ({"hostname": "localhost"}, "a host name that others can use", "FAIL"),
        ({"hostname": "localhost", "session": True}, "a host name that others can use", "WARN"),
        ({"userfaultfd": Finding("no", "uid 4242")}, "userfaultfd for QEMU's user (postcopy)", "WARN"),
        ({"userfaultfd": Finding()}, "userfaultfd for QEMU's user (postcopy)", "WARN"),
        (
            {"locked_memory_raisable": False, "locked_memory_limit_bytes": 77 << 10},
            "locked memory for zero-copy",
            "WARN",
        ),
        ({"tls_files": Finding("no", "missing")}, "certificates for --tls", "WARN"),
        ({"unanswered": ("CPUs: no answer",)}, "an answer to every question", "WARN"),
        ({"host_uuid": SOURCE.host_uuid}, "two hosts", "FAIL"),
        ({"arch": "aarch64"}, "the same architecture", "FAIL"),
        ({"security_models": ("selinux",)}, "the same security models", "WARN"),
        ({"qemu_version": version(9)}, "multifd with postcopy", "WARN"),
        ({"libvirt_version": version(9)}, "a priority channel for postcopy", "WARN"),
        ({"cpus": 1}, "cores for parallel connections", "WARN"),
        ({"libvirt_version": version(11, 2)}, "known trouble: resume-crashes-destination", "WARN"),
    ],
)
def test_each_trouble_has_a_line_and_a_fix(change: dict[str, Any], what: str, status: str) -> None:
    found = [check for check in doctor_lines(SOURCE, replace(DESTINATION, **change)) if check.what == what]
    assert [check.status for check in found if check.status != "PASS"] == [status]
    assert all(check.fix for check in found if check.status != "PASS")


def test_vendors_and_machines_are_compared() -> None:
    amd, intel = replace(SOURCE, cpu_vendor="AMD"), replace(DESTINATION, cpu_vendor="Intel")
    assert statuses(doctor_lines(amd, intel))["CPUs of one vendor"] == "WARN"
    old = replace(DESTINATION, guest_archs=(GuestArch(arch="x86_64", virt_types=("kvm",), machines=("pc-q35-7.2",)),))
    [check] = [check for check in doctor_lines(SOURCE, old) if check.what.startswith("machine types")]
    assert check.status == "WARN"
    assert "pc-q35-9.1" in check.detail


def test_a_refused_guest_fails_with_the_plans_words() -> None:
    checks = doctor_lines(SOURCE, DESTINATION, replace(GUEST, snapshots=6))
    [check] = [check for check in checks if check.status == "FAIL"]
    assert check.detail == "cannot migrate domain with 6 snapshots"


def test_one_trouble_of_both_hosts_is_one_line() -> None:
    old = {"qemu_version": version(7, 2), "libvirt_version": version(9)}
    checks = doctor_lines(replace(SOURCE, **old), replace(DESTINATION, **old))
    [check] = [check for check in checks if check.what == "known trouble: multifd-postcopy-loses-guest"]
    assert check.host == "amber and beryl"
    assert "--parallel and --postcopy" in check.detail


def test_a_trouble_of_the_pair_names_the_pair() -> None:
    checks = doctor_lines(
        replace(SOURCE, qemu_version=version(9)),
        replace(DESTINATION, libvirt_version=version(11, 9), qemu_version=version(10)),
    )
    [check] = [check for check in checks if check.what == "known trouble: ht-refused"]
    assert check.host == "amber -> beryl"


def test_a_host_that_is_not_there_adds_no_lines_of_its_own() -> None:
    nobody = HostFacts(uri="qemu+ssh://onyx/system", reachable=False)
    assert {check.host for check in doctor_lines(SOURCE, nobody)} == {"amber"}


def test_lines_look_like_virt_host_validate() -> None:
    stream = io.StringIO()
    print_checks([Check("PASS", "amber", "tea"), Check("WARN", "amber", "biscuits", "none left", "buy some")], stream)
    assert stream.getvalue() == (
        "  amber: Checking for tea      : PASS\n"
        "  amber: Checking for biscuits : WARN (none left)\n"
        "      fix: buy some\n"
    )


def test_the_test_driver_fails_and_so_does_a_dead_destination(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor("test:///default", "qemu+unix:///session?socket=/nonexistent/sock") == 1
    out = capsys.readouterr().out
    assert "a connection to libvirt" in out
    assert "the QEMU driver" in out
    assert run_doctor("test:///default", None, True) == 1
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} >= {"PASS", "FAIL"}
