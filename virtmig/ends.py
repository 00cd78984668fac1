"""Both ends of a migration, opened and asked for facts before anything is decided."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from tenacity import retry_if_exception

from virtmig.attempts import StopRequest, retrying
from virtmig.domain.document import parse_xml
from virtmig.errors import ConnectionFailed, DomainXmlError, RequestError
from virtmig.facts import GuestFacts, HostFacts
from virtmig.request import MigrationRequest, read_file_values
from virtmig.virt.capabilities import gather_guest_facts, gather_host_facts, unreachable_host_facts
from virtmig.virt.connection import lookup_domain
from virtmig.virt.hosts import Host

log = logging.getLogger("virtmig")


class Ends(msgspec.Struct):
    """Both ends of one migration, the domain, and what is known about all three."""

    source: Host
    destination: Host | None
    domain: Any
    uuid: str
    name: str
    source_facts: HostFacts
    destination_facts: HostFacts
    guest: GuestFacts

    @property
    def destination_name(self) -> str:
        return self.destination.name if self.destination else self.destination_facts.hostname


def check_files(request: MigrationRequest) -> None:
    """Read what --xml and --persistent-xml name, before any connection. Raises RequestError for no domain XML."""
    values = read_file_values({name: request[name] for name in request})
    for name in ("xml", "persistent-xml"):
        if name in values:
            try:
                root = parse_xml(str(values[name]))
            except DomainXmlError as error:
                raise RequestError(f"{request[name]}: {error}", option=name, hint="a domain XML") from None
            if root.tag != "domain":
                raise RequestError(f"{request[name]}: the root element is no domain", option=name, hint="a domain XML")


@contextlib.contextmanager
def open_ends(request: MigrationRequest, source_uri: str | None, stop: StopRequest) -> Iterator[Ends]:
    """Open both ends, find the domain, ask both hosts for facts (at the same time), close them afterwards.

    A destination that only the source daemon can reach (p2p through another network) is no error: what only it could
    tell is then unknown, and the plan says so.
    """
    opening = retrying(request, stop, retry_if_exception(lambda e: isinstance(e, ConnectionFailed) and e.retryable))
    source = opening(Host, source_uri)
    destination: Host | None = None
    try:
        domain = lookup_domain(source.connection, request.domain)
        try:
            destination = opening(Host, request.destination_uri)
        except ConnectionFailed as error:
            if "p2p" not in request:
                raise
            log.info("the destination is not reachable from here, only from the source: %s", error)
        query_qemu = "query-qemu" in request
        with ThreadPoolExecutor(max_workers=3, thread_name_prefix="virtmig-facts") as pool:
            guest = pool.submit(gather_guest_facts, domain, query_qemu=query_qemu)
            mine = pool.submit(gather_host_facts, source.connection, source.full_uri())
            if destination is None:
                theirs = unreachable_host_facts(request.destination_uri)
            else:
                theirs = gather_host_facts(destination.connection, request.destination_uri, guest=guest.result())
            ends = Ends(source, destination, domain, domain.UUIDString(), domain.name(), mine.result(), theirs,
                        guest.result())  # fmt: skip
        yield ends
    finally:
        source.close()
        if destination is not None:
            destination.close()
