"""The domain's XML, fitted to the destination by the administrator's rules, as libvirt is given it."""

from __future__ import annotations

from typing import Any

import msgspec

from virtmig.domain.document import Change
from virtmig.domain.guest_abi import compare, refuse
from virtmig.domain.rewriting import rewrite
from virtmig.request import MigrationRequest, read_file_values
from virtmig.rule_files import read_rules
from virtmig.virt.parameters import MigrateCall
from virtmig.virt.verbs import migratable_xml


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """None: libvirt takes its own. `changes` are those of both, each once."""

    xml: str | None = None
    persistent_xml: str | None = None
    changes: tuple[Change, ...] = ()

    def into(self, call: MigrateCall) -> MigrateCall:
        params = {"destination_xml": self.xml, "persistent_xml": self.persistent_xml}
        added = {name: value for name, value in params.items() if value is not None}
        return msgspec.structs.replace(call, params={**call.params, **added})


def fit(domain: Any, request: MigrationRequest, *, source: str, destination: str) -> Fitted:
    """What the rules of this host make of it; nothing where there are none.

    Raises DomainXmlError where a rule or --xml would change what the guest sees, RequestError for unreadable rules.
    """
    given = read_file_values({name: request[name] for name in ("xml", "persistent-xml") if name in request})
    rules = read_rules()
    if not len(rules):
        return Fitted()
    changes: list[Change] = []

    def fitted(text: str, what: str) -> str | None:
        rewritten = rewrite(text, rules, source=source, destination=destination, what=what)
        changes.extend(change for change in rewritten.changes if change not in changes)
        return rewritten.xml if rewritten.changes else None

    running = migratable_xml(domain)
    wanted = str(given["xml"]) if "xml" in given else running
    if wanted is not running:
        refuse(compare(running, wanted), what=f"the XML of {request['xml']}")
    xml = fitted(wanted, "domain XML")
    persistent = None
    if "persistent" in request or "persistent-xml" in given:
        kept = str(given["persistent-xml"]) if "persistent-xml" in given else migratable_xml(domain, inactive=True)
        persistent = fitted(kept, "persistent XML") if kept else None
    return Fitted(xml=xml, persistent_xml=persistent, changes=tuple(changes))
