"""One domain XML -> the one that fits the other host. Text in, text out.

Used for the destination XML, for the persistent XML, and by libvirt's hook on the destination: each may rewrite what
another has rewritten, so doing it twice must be the same as doing it once, and rules for which it is not are refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from virtmig.domain import guest_abi
from virtmig.domain.document import Change, DomainDocument, text_of
from virtmig.domain.rules import Rule, Rules
from virtmig.domain.transforms import Settled
from virtmig.errors import DomainXmlError


class Rewritten(msgspec.Struct, frozen=True):
    """The new text, and what was changed in order. No change leaves the text as it was, byte for byte."""

    xml: str
    changes: tuple[Change, ...] = ()


def rewrite(xml_text: str, rules: Rules, *, source: str, destination: str, what: str = "domain XML") -> Rewritten:
    """Apply the rules for this pair of hosts and this guest.

    `source` or `destination` is "" where it is not known; rules that ask for a certain host are then left out.
    Raises DomainXmlError for an XML that cannot be read, for rules that undo or repeat each other, and, with
    .differences, when what the guest sees would change.
    """
    document = DomainDocument(xml_text, what=what)
    name, uuid = text_of(document.root, "name"), text_of(document.root, "uuid")
    chosen = rules.select(source=source, destination=destination, domain=name, uuid=uuid)
    _apply(document, chosen)
    if not document.changes:
        return Rewritten(xml_text)
    xml = document.text
    guest_abi.refuse(guest_abi.compare(xml_text, xml), what=f"the rewritten {what} of {name}")
    again = DomainDocument(xml, what=what)
    _apply(again, chosen)
    if again.changes:
        raise _unstable(document.changes, again.changes[0])
    return Rewritten(xml, tuple(document.changes))


def _apply(document: DomainDocument, rules: Iterable[Rule]) -> None:
    settled = Settled()
    for rule in rules:
        rule.transform.apply(document, str(rule), settled)


def _unstable(first: list[Change], second: Change) -> DomainXmlError:
    earlier = next((change for change in first if change.path == second.path), first[0])
    return DomainXmlError(
        f"the rules would change their own result: {earlier} by rule {earlier.rule}, "
        f"then {second} by rule {second.rule}",
        hint="the XML is rewritten by virtmig and again by the hook on the destination: "
        "let no rule's `from` match what another rule has made",
    )
