"""NAME-in.xml, NAME-rules.xml and NAME-out.xml: what the rules make of a domain on its way from alpha to beta."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from virtmig.domain.rules import Rules, rules_from_xml

TOP = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "triples"
SAMPLES = sorted((TOP / "xml" / "domains").glob("*.xml"))
GRAMMAR = (TOP / "xml" / "virtmig-rules.rng").read_text()
NAMES = sorted(path.name.removesuffix("-in.xml") for path in FOLDER.glob("*-in.xml"))
SOURCE, DESTINATION = "alpha.example.org", "beta.example.org"


class Triple(NamedTuple):
    """The texts as they are in the files, line ends included."""

    before: str
    rules: Rules
    after: str


def triple(name: str) -> Triple:
    before, rules, after = ((FOLDER / f"{name}-{part}.xml").read_bytes().decode() for part in ("in", "rules", "out"))
    return Triple(before, rules_from_xml(rules, GRAMMAR, f"{name}-rules.xml"), after)


def rules(text: str, file: str = "rules.xml") -> Rules:
    return rules_from_xml(f"<rules>{text}</rules>", GRAMMAR, file)
