"""What a request may hold, and the OpenAPI 3.1 document: both made from the option table and the structs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec

from virtmig.agreement import Plan
from virtmig.integrations.api.migrations import Migration, NovaStatus
from virtmig.integrations.api.problems import KINDS, MEDIA_TYPE, Problem, failure
from virtmig.options import BY_NAME, OPTIONS, Kind, Option
from virtmig.request import MigrationRequest
from virtmig.verbs import UNLIMITED_MIB_S

#: options about a terminal and a command's own output
NOT_HERE = ("verbose", "plan", "progress", "json", "report", "quiet", "exit-codes")
KEY_LONGEST = 200
LIST_MOST = 500
LIST_USUAL = 50
ID_PATTERN = "^[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$"
STATUSES: tuple[str, ...] = get_args(NovaStatus)
_XML_LONGEST = 10 << 20
_LAST_PATTERN = "^[0-9]{1,15}$"
_KEY_PATTERN = r"^[!-~]([ -~]*[!-~])?$"


def _type(option: Option) -> Any:
    """The Python type of an option's value in JSON, with its limits. FILE options hold their content."""
    text = option.help + (f" ({option.unit})" if option.unit else "")
    match option.kind:
        case Kind.BOOL:
            return Annotated[bool, msgspec.Meta(description=text)]
        case Kind.NUMBER:
            return Annotated[int, msgspec.Meta(ge=option.minimum or 0, le=option.maximum, description=text)]
        case Kind.CHOICE:
            return Annotated[Literal[option.choices], msgspec.Meta(description=text)]
        case Kind.LIST:
            word: Any = Literal[option.choices] if option.choices else Annotated[str, msgspec.Meta(min_length=1)]
            return Annotated[list[word], msgspec.Meta(min_length=1, description=text)]
        case Kind.FILE:
            return Annotated[str, msgspec.Meta(min_length=1, max_length=_XML_LONGEST, description=text)]
    return Annotated[str, msgspec.Meta(min_length=1, description=text)]


_SOURCE = Annotated[str, msgspec.Meta(description="libvirt URI of the source host, when it is not the API's own")]
_FIELDS: list[Any] = [(row.field, _type(row)) for row in OPTIONS if row.required]
_FIELDS += [("source_uri", _SOURCE | msgspec.UnsetType, msgspec.UNSET)]
_FIELDS += [
    (row.field, _type(row) | msgspec.UnsetType, msgspec.UNSET)
    for row in OPTIONS
    if not row.required and row.name not in NOT_HERE
]
NewMigration = msgspec.defstruct(
    "NewMigration", _FIELDS, kw_only=True, frozen=True, forbid_unknown_fields=True, module=__name__,
    namespace={"__doc__": "What is asked for: virsh's options with underscores, files as their content."},
)  # fmt: skip


class NewLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is left out stays as it is."""

    bandwidth: Annotated[int, msgspec.Meta(ge=0, le=UNLIMITED_MIB_S, description="MiB/s")] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    postcopy_bandwidth: (
        Annotated[int, msgspec.Meta(ge=0, le=UNLIMITED_MIB_S, description="MiB/s")] | msgspec.UnsetType
    ) = msgspec.UNSET
    max_downtime: Annotated[int, msgspec.Meta(ge=1, le=2_000_000, description="ms")] | msgspec.UnsetType = msgspec.UNSET


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A plan; nothing was started. `virtmig_line` is the command that asks for the same."""

    refused: bool
    plan: Plan
    virtmig_line: str


class MigrationList(msgspec.Struct, frozen=True, kw_only=True):
    """The newest first. `next_marker` is the marker of the next page."""

    migrations: list[Migration]
    next_marker: str | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, in words, and the migration afterwards."""

    message: str
    migration: Migration


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A body that has been read. `files`: option -> content."""

    values: dict[str, Any]
    source_uri: str
    files: dict[str, str]

    def request(self, paths: Mapping[str, str] | None = None) -> MigrationRequest:
        """With the files at `paths`. Raises RequestError with every problem."""
        return MigrationRequest({**self.values, **(paths or {})})


def read_migration(body: bytes) -> Asked:
    """Raises Failure (400) for what the schema does not allow."""
    given = msgspec.structs.asdict(read(body, NewMigration))
    source_uri = given.pop("source_uri")
    values = {}
    files = {}
    for option in OPTIONS:
        value = given.get(option.field, msgspec.UNSET)
        if value is msgspec.UNSET or value is False:
            continue
        if option.kind is Kind.FILE:
            files[option.name] = value
        else:
            values[option.name] = tuple(value) if isinstance(value, list) else value
    return Asked(values=values, source_uri="" if source_uri is msgspec.UNSET else source_uri, files=files)


def read(body: bytes, kind: type[Any]) -> Any:
    """Raises Failure (400). 9.0 is a whole number to JSON Schema."""
    try:
        given = msgspec.json.decode(body)
        if isinstance(given, dict):
            given = {
                name: int(value) if isinstance(value, float) and value.is_integer() else value
                for name, value in given.items()
            }
        return msgspec.convert(given, kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        words, _, where = str(error).partition(" - at `$")
        field = ".".join(re.findall(r"\w+", where))
        raise failure("malformed", f"{field}: {words}" if field else words, hint="see /openapi.json") from None


def canonical(asked: Asked) -> bytes:
    """Alike for requests that ask for the same, however they are written."""
    return msgspec.json.encode([asked.source_uri, asked.values, asked.files], order="sorted")


def check_last_event(given: str | None) -> str:
    """A Last-Event-ID header's value. Raises Failure (400)."""
    if given is not None and not re.fullmatch(_LAST_PATTERN, given):
        raise failure("malformed", "Last-Event-ID: an id of an event of this migration")
    return given or ""


def is_id(text: str) -> bool:
    return re.fullmatch(ID_PATTERN, text) is not None


def check_key(key: str) -> str:
    """An Idempotency-Key header's value. Raises Failure (400)."""
    if key and (len(key) > KEY_LONGEST or not re.fullmatch(_KEY_PATTERN, key)):
        raise failure("malformed", f"Idempotency-Key: 1 to {KEY_LONGEST} printable ASCII characters")
    return key


# -- the document --------------------------------------------------------------------------------------------------

_TEMPLATE = "#/components/schemas/{name}"
_ID = {
    "name": "id", "in": "path", "required": True, "description": "of the migration, or of its record",
    "schema": {"type": "string", "pattern": ID_PATTERN},
}  # fmt: skip
_KEY = {
    "name": "Idempotency-Key", "in": "header", "required": False,
    "description": "The same key with the same body never starts a second migration, also after a crash of the API.",
    "schema": {"type": "string", "minLength": 1, "maxLength": KEY_LONGEST, "pattern": _KEY_PATTERN},
}  # fmt: skip
_LAST = {
    "name": "Last-Event-ID", "in": "header", "required": False, "description": "goes on behind that event",
    "schema": {"type": "string", "pattern": _LAST_PATTERN},
}  # fmt: skip
_QUERY = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": LIST_MOST,
                                                "default": LIST_USUAL}},
    {"name": "marker", "in": "query", "description": "the last id of the page before",
     "schema": {"type": "string", "pattern": ID_PATTERN}},
    {"name": "domain", "in": "query", "schema": {"type": "string", "minLength": 1}},
    {"name": "status", "in": "query", "schema": {"type": "string", "enum": list(STATUSES)}},
]  # fmt: skip


def _reply(name: str, words: str) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": {"$ref": _TEMPLATE.format(name=name)}}}}


def _text(media_type: str, words: str) -> dict[str, Any]:
    return {"description": words, "content": {media_type: {"schema": {"type": "string"}}}}


def _body(name: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": {"$ref": _TEMPLATE.format(name=name)}}}}


def _operation(name: str, summary: str, good: dict[str, Any], bad: str, **more: Any) -> dict[str, Any]:
    """`bad`: the statuses of problems that it may answer with."""
    found: dict[str, Any] = {}
    for status in bad.split():
        titles = [title for number, title in KINDS.values() if str(number) == status]
        schema = {"$ref": _TEMPLATE.format(name="Problem")}
        found[status] = {"description": "; or: ".join(titles), "content": {MEDIA_TYPE: {"schema": schema}}}
    return {"operationId": name, "summary": summary, "responses": good | found, **more}


_LOCATION = {"Location": {"description": "where the migration is", "required": True, "schema": {"type": "string"}}}
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["migration", "sample", "decision", "message", "dropped", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string", "pattern": "^[0-9]+$"},
    },
}  # fmt: skip
_EVENTS = {"description": "Server-sent events", "content": {"text/event-stream": {"schema": _EVENT}}}
_ACT = "403 404 409 500 504"


def _paths() -> dict[str, Any]:
    one = "/v1/migrations/{id}"
    started = {**_reply("Migration", "It was started"), "headers": _LOCATION}
    there = {**_reply("Migration", "It was started before, with the same key"), "headers": _LOCATION}
    start_bad = "400 403 404 408 409 413 415 429 500 504 507"
    return {
        "/v1/plans": {"post": _operation(
            "plan", "What would be done, and why; starts nothing", {"200": _reply("PlanAnswer", "A plan")},
            "400 403 404 408 409 413 415 429 500 504", requestBody=_body("NewMigration"))},
        "/v1/migrations": {
            "get": _operation("list", "Running and past migrations, the newest first",
                              {"200": _reply("MigrationList", "One page")}, "400 403 404 500", parameters=_QUERY),
            "post": _operation("start", "Plan, and start unless the plan is refused", {"201": started, "200": there},
                               start_bad, parameters=[_KEY], requestBody=_body("NewMigration")),
        },
        one: {
            "parameters": [_ID],
            "get": _operation("show", "One migration", {"200": _reply("Migration", "The migration")}, "403 404 500"),
        },
        f"{one}/abort": {
            "parameters": [_ID],
            "post": _operation("abort", "Abort; the guest stays on the source. Refused in postcopy",
                               {"202": _reply("Done", "It aborts")}, _ACT),
        },
        f"{one}/postcopy": {
            "parameters": [_ID],
            "post": _operation("postcopy", "Run the guest on the destination now and fetch the rest of its memory",
                               {"202": _reply("Done", "It switches")}, _ACT),
        },
        f"{one}/limits": {
            "parameters": [_ID],
            "patch": _operation("limits", "Change limits while it runs; not the downtime's in postcopy",
                                {"200": _reply("Done", "They are set")}, f"400 408 413 415 {_ACT}",
                                requestBody=_body("NewLimits")),
        },
        f"{one}/recover": {
            "parameters": [_ID],
            "post": _operation("recover", "Go on with a postcopy that broke, not with one that goes on by itself",
                               {"201": started, "200": there},
                               f"400 507 {_ACT}", parameters=[_KEY]),
        },
        f"{one}/events": {
            "parameters": [_ID],
            "get": _operation("events", "Samples, decisions, messages and the end, as they happen",
                              {"200": _EVENTS,
                               "204": {"description": "Nothing comes after that event"}},
                              "400 403 404 429 500", parameters=[_LAST]),
        },
        f"{one}/log": {
            "parameters": [_ID],
            "get": _operation("log", "What happened, second by second", {"200": _text("text/plain", "Lines")},
                              "403 404 409 500"),
        },
        f"{one}/explain": {
            "parameters": [_ID],
            "get": _operation("explain", "What was decided and why, in sentences",
                              {"200": _text("text/plain", "Sentences")}, "403 404 409 500"),
        },
        f"{one}/report": {
            "parameters": [_ID],
            "get": _operation("report", "One HTML file with charts", {"200": _text("text/html", "The report")},
                              "403 404 409 500"),
        },
        "/metrics": {"get": _operation("metrics", "For Prometheus", {"200": _text("text/plain", "Text format 0.0.4")},
                                       "403 404 500")},
    }  # fmt: skip


def openapi(version: str) -> dict[str, Any]:
    """The whole document."""
    kinds = [NewMigration, NewLimits, PlanAnswer, MigrationList, Migration, Done, Problem]
    _, components = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
    components["NewLimits"]["minProperties"] = 1
    for field, schema in components["NewMigration"]["properties"].items():
        if (row := BY_NAME.get(field.replace("_", "-"))) is not None and row.kind is Kind.LIST:
            schema["uniqueItems"] = True
    licence = {"name": "LGPL-2.1-or-later", "identifier": "LGPL-2.1-or-later"}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "virtmig", "version": version, "license": licence,
                 "description": "Live migration of libvirt guests: plan, start, watch, steer."},
        "servers": [{"url": "/"}],
        "paths": _paths(),
        "components": {"schemas": components},
    }  # fmt: skip
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return found
