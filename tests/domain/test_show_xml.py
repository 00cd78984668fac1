"""The view behind `virtmig show-xml`: changes and a diff, and the reading of rules from files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.domain.triple_files import FOLDER, GRAMMAR, triple
from virtmig import rule_files
from virtmig.cli.show_xml import diff_lines, print_rewritten
from virtmig.domain.document import MAX_XML_BYTES
from virtmig.domain.rules import Rules, rules_from_texts
from virtmig.errors import DomainXmlError, RequestError
from virtmig.rule_files import grammar, read_rules


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(name: str, stream: io.StringIO, **options: bool) -> str:
    before, rules, _ = triple(name)
    print_rewritten(
        before, rules, source="alpha", destination="beta.example.org", domain=name, stream=stream, **options
    )
    return stream.getvalue()


def test_changes_and_diff_are_plain_without_a_terminal() -> None:
    lines = shown("plain-by-uuid", io.StringIO()).splitlines()
    assert lines[0] == "plain-by-uuid: alpha -> beta.example.org: 7 changes"
    assert lines[1] == (
        "  devices/disk/source/@file: /srv/images/plain.qcow2 -> /dev/vg/plain  [path (plain-by-uuid-rules.xml:3)]"
    )
    assert lines[8:11] == ["", "--- plain-by-uuid on alpha", "+++ plain-by-uuid on beta.example.org"]
    assert "+    <vcpupin vcpu='0' cpuset='12-15'/>" in lines
    assert "\033" not in "".join(lines)


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown("windows-line-ends", Terminal())
    assert re.search(r"\033\[32m\+\s.*bridge=\"br1\"", text)
    assert re.search(r"\033\[31m-\s.*bridge=\"br0\"", text)
    assert re.search(r"\033\[36m@@", text)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[3" not in shown("windows-line-ends", Terminal())


def test_what_a_guest_has_in_its_xml_does_not_steer_the_terminal() -> None:
    before = "<domain><name>x</name><!-- \u202e\u009b31m -->\n<vcpu>1</vcpu></domain>"
    rules = rules_from_texts({"r": "<rules><vcpupin vcpu='0' cpuset='1'/></rules>"}, GRAMMAR)
    stream = Terminal()
    print_rewritten(before, rules, source="", destination="b", domain="x\x1b[2J", stream=stream)
    assert "\u202e" not in stream.getvalue()
    assert "\u009b" not in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
    assert "\\u202e\\u009b31m" in stream.getvalue()
    assert "x\\u001b[2J: ? -> b: 2 changes" in stream.getvalue()


@pytest.mark.parametrize("terminal", [Terminal, io.StringIO])
def test_passwords_are_not_shown_to_people(terminal: type[io.StringIO]) -> None:
    xml = "<domain><name>x</name><vcpu>1</vcpu>\n<graphics type='vnc' passwd = \"it's secret\" port='1'/></domain>"
    rules = rules_from_texts({"r": "<rules><vcpupin vcpu='0' cpuset='1'/></rules>"}, GRAMMAR)
    stream = terminal()
    result = print_rewritten(xml, rules, source="a", destination="b", domain="x", stream=stream)
    assert "secret" not in stream.getvalue()
    assert "passwd = \"***\" port='1'" in stream.getvalue()
    assert "it's secret" in result.xml


def test_no_change_is_said_in_one_line() -> None:
    assert (
        shown("plain-other-hosts", io.StringIO())
        == "plain-other-hosts: alpha -> beta.example.org: no rule changes anything\n"
    )
    assert len(shown("plain-other-hosts", Terminal()).splitlines()) == 1


def test_json_has_the_changes_and_the_text() -> None:
    said = json.loads(shown("plain", io.StringIO(), json=True))
    assert said["changed"] is True
    assert said["xml"] == triple("plain").after
    assert said["changes"][0] == {
        "rule": "bridge (plain-rules.xml:3)",
        "path": "devices/interface/source/@bridge",
        "before": "br0",
        "after": "br-prod",
    }
    assert json.loads(shown("plain-other-hosts", io.StringIO(), json=True))["changed"] is False


@pytest.mark.skipif(not shutil.which("patch"), reason="patch is not installed")
@pytest.mark.parametrize("name", ["plain", "one-line", "windows-line-ends", "unknown-namespaces"])
def test_patch_takes_the_diff(name: str, tmp_path: Path) -> None:
    before, _, after = triple(name)
    file = tmp_path / "guest.xml"
    file.write_bytes(before.encode())
    diff = "\n".join(diff_lines(before, after, "a", "b")) + "\n"
    subprocess.run(["patch", "--binary", str(file)], input=diff.encode(), check=True, capture_output=True)
    assert file.read_bytes().decode() == after


def test_rules_are_read_from_files_and_folders_in_order(tmp_path: Path) -> None:
    (tmp_path / "20.xml").write_text("<rules><unpin/></rules>")
    (tmp_path / "10.xml").write_text("<rules><unbind/></rules>")
    (tmp_path / "note.txt").write_text("no rules")
    single = FOLDER / "plain-rules.xml"
    found = read_rules([single, tmp_path])
    assert [rule.name for rule in found.rules] == ["bridge", "path", "address", "unbind", "unpin"]
    assert found.rules[0].file == str(single)


def test_without_the_administrators_folder_there_are_no_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rule_files, "RULES_FOLDER", tmp_path / "rules.d")
    assert read_rules() == Rules()
    (tmp_path / "rules.d").mkdir()
    (tmp_path / "rules.d" / "a.xml").write_text("<rules><unpin/></rules>")
    assert len(read_rules()) == 1


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot read .*/none\.xml: No such file"):
        read_rules([tmp_path / "none.xml"])
    (tmp_path / "latin.xml").write_bytes(b"<rules>\xe4</rules>")
    with pytest.raises(RequestError, match=r"cannot read .*/latin\.xml: byte 7 is not UTF-8"):
        read_rules([tmp_path / "latin.xml"])
    (tmp_path / "wrong.xml").write_text("<rules>\n<unpinn/></rules>")
    with pytest.raises(DomainXmlError, match=r"/wrong\.xml:2: there is no rule <unpinn>"):
        read_rules([tmp_path / "wrong.xml"])


def test_no_file_is_read_without_an_end(tmp_path: Path) -> None:
    large = tmp_path / "large.xml"
    large.write_bytes(b"<rules>")
    os.truncate(large, 1 << 40)
    with pytest.raises(DomainXmlError, match=f"is larger than {MAX_XML_BYTES} bytes"):
        read_rules([large])


def test_the_grammar_is_in_the_package() -> None:
    assert grammar() == GRAMMAR
