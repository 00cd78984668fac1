"""From one domain XML to the one that fits the other host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.domain.libvirt_oracle import Oracle
from tests.domain.triple_files import DESTINATION, NAMES, SAMPLES, SOURCE, TOP, rules, triple
from virtmig.domain import guest_abi
from virtmig.domain.document import parse_xml
from virtmig.domain.places import PLACES, Place
from virtmig.domain.rewriting import Rewritten, rewrite
from virtmig.domain.rules import Rules
from virtmig.errors import DomainXmlError
from virtmig.progress import Whereabouts


def rewritten(xml: str, rules: Rules) -> Rewritten:
    return rewrite(xml, rules, source=SOURCE, destination=DESTINATION)


def test_there_are_triples_for_every_sample() -> None:
    assert len(NAMES) >= 20
    befores = {triple(name).before for name in NAMES}
    assert [path.name for path in SAMPLES if path.read_text() not in befores] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_make_the_one_of_the_other(name: str) -> None:
    before, rules, after = triple(name)
    result = rewritten(before, rules)
    assert result.xml == after
    assert bool(result.changes) == (before != after)


@pytest.mark.parametrize("name", NAMES)
def test_twice_is_the_same_as_once(name: str) -> None:
    _, rules, after = triple(name)
    assert rewritten(after, rules) == Rewritten(after, ())


@pytest.mark.parametrize("name", NAMES)
def test_the_guest_sees_no_difference(name: str, oracle: Oracle) -> None:
    """In our eyes, and in libvirt's where it reads such a domain: without swtpm or an emulator for ARM it does not."""
    before, _, after = triple(name)
    assert guest_abi.compare(before, after) == []
    assert not oracle.abi(before, after)


@pytest.mark.parametrize("name", NAMES)
def test_both_fit_libvirts_schema(name: str, libvirt_schema: etree.RelaxNG) -> None:
    before, _, after = triple(name)
    for xml in (before, after):
        assert libvirt_schema.validate(parse_xml(xml)), libvirt_schema.error_log


#: what keeps libvirt from defining a domain on this host, although it is right
_NOT_HERE = ("TPM version '2.0' is not supported", "Emulator '/usr/bin/qemu-system-aarch64' does not exist")


@pytest.mark.parametrize("name", NAMES)
def test_libvirt_defines_what_came_of_it(name: str, oracle: Oracle) -> None:
    """An emulator elsewhere would not be found here, so it is put back."""
    after = triple(name).after.replace("/opt/qemu-10.2/bin/", "/usr/bin/")
    said = oracle.define(after)
    if said and any(words in said for words in (*_NOT_HERE, "Cannot check QEMU binary", "does not support arch")):
        pytest.skip(f"libvirt cannot define it on this host: {said}")
    assert said == ""


@pytest.mark.parametrize("name", ["plain", "unknown-namespaces", "lab-guest", "many-disks"])
def test_libvirt_makes_a_command_line_of_it(name: str, oracle: Oracle) -> None:
    assert oracle.to_native(triple(name).after) == ""


# -- errors ----------------------------------------------------------------------------------------------------------

PLAIN = next(path for path in SAMPLES if path.name == "plain.xml").read_text()


@pytest.mark.parametrize(
    "texts",
    [
        "<bridge from='br0' to='br1'/><bridge from='br1' to='br0'/>",
        "<bridge from='br0' to='br1'/><bridge from='br1' to='br2'/>",
        "<path from='/srv' to='/mnt'/><path from='/mnt' to='/srv'/>",
        "<address kind='graphics' from='192.0.2.11' to='::1'/><address kind='graphics' to='::2'/>",
    ],
)
def test_rules_that_change_their_own_result_are_refused(texts: str) -> None:
    with pytest.raises(
        DomainXmlError, match=r"would change their own result: .*rules\.xml:1.*then .*rules\.xml:1"
    ) as caught:
        rewritten(PLAIN, rules(texts))
    assert caught.value.hint
    assert caught.value.guest is Whereabouts.SOURCE


def test_a_change_that_the_guest_would_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule of the grammar can do it; so the table of places is given a wrong one."""
    monkeypatch.setitem(
        PLACES, ("bridge", ""), (Place("devices/interface/mac", "address"), Place("os/type", "machine"))
    )
    with pytest.raises(
        DomainXmlError, match="the rewritten domain XML of plain would change what the guest sees"
    ) as caught:
        rewritten(
            PLAIN,
            rules(
                "<bridge from='52:54:00:6a:1f:01' to='52:54:00:00:00:01'/><bridge from='pc-q35-7.2' to='pc-q35-8.0'/>"
            ),
        )
    assert caught.value.differences == (
        "os/type/@machine: pc-q35-7.2 -> pc-q35-8.0",
        "devices/interface[52:54:00:6a:1f:01]/mac/@address: 52:54:00:6a:1f:01 -> 52:54:00:00:00:01",
    )


def test_an_element_that_cannot_be_read_is_named_with_its_rule() -> None:
    xml = PLAIN.replace("<vcpu placement='static'>", "<vcpu cpuset='many'>")
    with pytest.raises(DomainXmlError, match=r"vcpu/@cpuset: 'many' is no list .*\(read for cpus \(rules\.xml:1\)\)"):
        rewritten(xml, rules("<cpus from='0' to='1'/>"))


def test_an_unknown_source_gets_only_the_rules_for_all() -> None:
    chosen = rules(
        "<when source='*'><bridge from='br0' to='br1'/></when>"
        "<when source='alpha*'><path from='/srv' to='/mnt'/></when>"
    )
    result = rewrite(PLAIN, chosen, source="", destination=DESTINATION)
    assert [str(change) for change in result.changes] == ["devices/interface/source/@bridge: br0 -> br1"]


# -- any rules -------------------------------------------------------------------------------------------------------

BEFORE = [triple(name).before for name in NAMES]
MAPPED = [key for key in PLACES if key[0] not in ("secret", "tls", "cpus", "nodes")]


@st.composite
def mappings(draw: st.DrawFn, *, identity: bool) -> str:
    """A rule for values that are in the samples, and some that are not."""
    rule, kind = draw(st.sampled_from(MAPPED))
    values = _values(rule, kind)
    if rule == "path":
        values = [value for value in values if value.startswith("/")]
        values += [value.rpartition("/")[0] for value in values if value.count("/") > 1] + ["/elsewhere"]
    before = draw(st.sampled_from([*values, "nothing"] if rule != "path" else values))
    after = before if identity else draw(st.sampled_from([*values, f"{before}/x", "/new" if rule == "path" else "new"]))
    word = {"'": "&apos;", "<": "&lt;"}
    given_kind = f" kind='{kind}'" if kind else ""
    return f"<{rule}{given_kind} from='{_escaped(before, word)}' to='{_escaped(after, word)}'/>"


def _escaped(text: str, words: dict[str, str]) -> str:
    text = text.replace("&", "&amp;")
    for character, word in words.items():
        text = text.replace(character, word)
    return text


def _values(rule: str, kind: str) -> list[str]:
    found = set()
    for root in (parse_xml(xml) for xml in BEFORE):
        for place in PLACES[rule, kind]:
            for element in root.iterfind(place.path):
                value = element.get(place.attribute) if place.attribute else element.text
                found.add((value or "").strip())
    return sorted(found - {""})


OTHERS = st.sampled_from(
    [
        "<cpus from='0-7' to='8-15'/>",
        "<cpus from='1,5' to='5,6'/>",
        "<nodes from='0' to='1'/>",
        "<nodes from='0,1' to='1,0'/>",
        "<vcpupin vcpu='0-3' cpuset='3'/>",
        "<emulatorpin cpuset='0-1'/>",
        "<iothreadpin iothread='1' cpuset='0-1'/>",
        "<numatune mode='preferred' nodeset='1'/>",
        "<memnode cellid='0' nodeset='1'/>",
        "<unpin/>",
        "<unbind/>",
        "<hugepages to='2048'/>",
        "<hugepages from='1048576' to='524288'/>",
        "<device from='3b:00.4' to='3b:00.5'/>",
        "<tls kind='character' to='yes'/>",
        "<metadata uri='http://example.org/site/1'/>",
        "<metadata uri='urn:x'><x xmlns='urn:x'>1</x></metadata>",
    ]
)
XMLS = st.sampled_from(BEFORE)


@given(XMLS, st.lists(mappings(identity=True), max_size=6))
def test_rules_that_map_all_to_itself_change_no_byte(xml: str, texts: list[str]) -> None:
    assert rewritten(xml, rules("".join(texts))) == Rewritten(xml, ())


@given(XMLS, st.lists(mappings(identity=False) | OTHERS, max_size=5))
def test_rewriting_again_changes_nothing_or_the_rules_are_refused(xml: str, texts: list[str]) -> None:
    chosen = rules("".join(texts))
    try:
        first = rewritten(xml, chosen)
    except DomainXmlError as error:
        assert "change their own result" in str(error)
        return
    assert rewritten(first.xml, chosen) == Rewritten(first.xml, ())
    assert guest_abi.compare(xml, first.xml) == []


@given(XMLS, st.lists(mappings(identity=False) | OTHERS, max_size=5))
def test_every_change_is_listed(xml: str, texts: list[str]) -> None:
    try:
        result = rewritten(xml, rules("".join(texts)))
    except DomainXmlError:
        return
    before, after = _leaves(xml), _leaves(result.xml)
    different = {where for where in before.keys() | after.keys() if before.get(where) != after.get(where)}
    listed = {change.path for change in result.changes}
    structural = {change.path for change in result.changes if (change.before or change.after or "").startswith("<")}
    if not structural:
        assert different == listed
        last = {change.path: change.after for change in result.changes}
        assert {where: after.get(where) for where in different} == last
    else:
        parents = {path.rpartition("[")[0] or path for path in structural} | structural
        assert all(where in listed or any(where.startswith(path) for path in parents) for where in different)


def _leaves(xml: str) -> dict[str, str]:
    """Each attribute and each text by its path."""
    root = parse_xml(xml)
    tree = root.getroottree()
    found: dict[str, str] = {}
    for element in root.iter("*"):
        path = tree.getelementpath(element)
        found |= {f"{path}/@{name}".removeprefix("./"): str(value) for name, value in element.attrib.items()}
        text = str(element.xpath("string()")).strip()
        if text and not any(isinstance(child.tag, str) for child in element):
            found[path] = text
    return found


# -- speed -----------------------------------------------------------------------------------------------------------

_PROGRAM = """
import sys, time
from pathlib import Path
begin = time.process_time()
from virtmig.domain.rewriting import rewrite
from virtmig.domain.rules import rules_from_xml
folder, grammar = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
rules = rules_from_xml((folder / "tpm-rules.xml").read_text(), grammar)
result = rewrite((folder / "tpm-in.xml").read_text(), rules, source="alpha", destination="beta")
took = time.process_time() - begin
assert result.changes
heavy = {"numpy", "libvirt", "rich", "click", "asyncio", "http"} & set(sys.modules)
print(f"{took * 1000:.0f} {' '.join(sorted(heavy))}")
"""


def test_importing_and_rewriting_are_quick_and_import_nothing_heavy() -> None:
    """A hook is started anew for each migration. Processor time, best of three: a busy machine is no failure."""
    folder = Path(__file__).parent / "triples"
    arguments = [sys.executable, "-c", _PROGRAM, str(folder), str(TOP / "xml" / "virtmig-rules.rng")]
    runs = [subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=TOP).stdout for _ in range(3)]
    assert all(run.split()[1:] == [] for run in runs)
    assert min(int(run.split()[0]) for run in runs) < 100
