"""One function a request. What may block (libvirt, the disk) runs in threads; nothing here holds a migration up."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import tempfile
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import virtmig.report
from virtmig.errors import MigrationError
from virtmig.integrations.api import actions, problems, schema
from virtmig.integrations.api.events import EventStream, begins_at
from virtmig.integrations.api.history import Head, History, Looks, whole_record
from virtmig.integrations.api.jobs import Job, Jobs
from virtmig.integrations.api.migrations import Found, Migrations, shown, shown_all
from virtmig.integrations.api.problems import Failure, failure
from virtmig.integrations.metrics import CONTENT_TYPE, Metrics
from virtmig.migrate import plan_only
from virtmig.report.explain import explain, log_lines
from virtmig.report.html import report_html
from virtmig.request import MigrationRequest
from virtmig.virt.hosts import NoAnswerError, answer_within

log = logging.getLogger("virtmig.api")

#: hosts that are asked for facts at once; each takes a thread until libvirt gives up
MOST_PLANS = 4
PLAN_S = 90.0
MOST_STREAMS = 100
BODY_LONGEST_BYTES = 24 << 20
BODY_S = 30.0
_PAGE = Path(__file__).parent / "page"
_ASSETS = Path(virtmig.report.__file__).parent / "assets"
#: file of the page -> (where it is, its type)
PAGE_FILES = {
    "page.js": (_PAGE, "text/javascript; charset=utf-8"),
    "page.css": (_PAGE, "text/css; charset=utf-8"),
    "uPlot.iife.min.js": (_ASSETS, "text/javascript; charset=utf-8"),
    "uPlot.min.css": (_ASSETS, "text/css; charset=utf-8"),
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: a report's scripts stand in it; the sandbox keeps them from speaking to the API
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

T = TypeVar("T")


def version() -> str:
    try:
        return importlib.metadata.version("virtmig")
    except importlib.metadata.PackageNotFoundError:
        return "0"


async def _in_thread(call: Callable[..., T], *args: Any, **more: Any) -> T:
    return await anyio.to_thread.run_sync(partial(call, *args, **more), abandon_on_cancel=True)


class Api:
    """What the requests share. `source_uri` is the source host when a request names none; `readonly`: only looking."""

    def __init__(self, jobs: Jobs, *, source_uri: str = "", readonly: bool = False) -> None:
        self.history = History(
            jobs.records, exit_code=jobs.exit_code, looks=Looks(actions.look), readonly=readonly
        )  # fmt: skip
        self.migrations = Migrations(jobs, self.history)
        self.jobs = jobs
        self.metrics = Metrics(self.history)
        self.source_uri = source_uri
        self.readonly = readonly
        self._plans = threading.BoundedSemaphore(MOST_PLANS)
        self._streams = 0
        self._document = msgspec.json.encode(schema.openapi(version()))

    # -- plan and start ---------------------------------------------------------------------------------------------

    async def plan(self, request: Request) -> Response:
        asked = schema.read_migration(await _body(request))
        answer = await _in_thread(self._plan, asked)
        return _json(answer)

    def _plan(self, asked: schema.Asked) -> schema.PlanAnswer:
        """Raises what plan_only raises, and Failure when it takes too long."""
        source_uri = asked.source_uri or self.source_uri
        with tempfile.TemporaryDirectory(prefix="virtmig-") as folder:
            paths = {}
            for name, content in asked.files.items():
                paths[name] = str(Path(folder) / f"{name}.xml")
                Path(paths[name]).write_text(content, encoding="utf-8")
            wanted = asked.request(paths)
            if not self._plans.acquire(blocking=False):
                raise failure(
                    "busy", f"{MOST_PLANS} plans are being made", hint="try again in a moment",
                    headers={"retry-after": "2"}, retryable=True,
                )  # fmt: skip

            def look() -> schema.PlanAnswer:
                try:
                    plan, _, _ = plan_only(wanted, source_uri=source_uri or None)
                finally:
                    self._plans.release()
                return schema.PlanAnswer(refused=plan.refused, plan=plan, virtmig_line=wanted.virtmig_line(source_uri))

            try:
                return answer_within(PLAN_S, look, "virtmig-plan", own=True)
            except NoAnswerError:
                raise failure(
                    "late", f"the hosts have not told what they can do within {PLAN_S:g} s; nothing was started",
                    hint="virtmig doctor DESTURI", retryable=True,
                ) from None  # fmt: skip

    async def start(self, request: Request) -> Response:
        key = schema.check_key(request.headers.get("idempotency-key", ""))
        asked = schema.read_migration(await _body(request))
        job, fresh = await _in_thread(self._start, asked, key)
        return await self._started(job, fresh)

    def _start(self, asked: schema.Asked, key: str) -> tuple[Job, bool]:
        body = schema.canonical(asked)
        if (job := self.jobs.known(key, body)) is not None:
            return job, False
        answer = self._plan(asked)
        if answer.refused:
            self.metrics.refused(tuple(row.feature for row in answer.plan.refusals))
            answer.plan.raise_if_refused()
        wanted: MigrationRequest = asked.request()
        return self.jobs.start(
            wanted, source_uri=asked.source_uri or self.source_uri, key=key, body=body, files=asked.files
        )

    async def _started(self, job: Job, fresh: bool) -> Response:
        found = await _in_thread(self.migrations.find, job.ticket.id)
        if fresh:
            log.info("started migration %s of %s", found.id, found.request.get("domain"))
        return _json(shown(found), 201 if fresh else 200, {"location": f"/v1/migrations/{found.id}"})

    # -- look -------------------------------------------------------------------------------------------------------

    async def list(self, request: Request) -> Response:
        query = request.query_params
        limit, marker = query.get("limit", str(schema.LIST_USUAL)), query.get("marker", "")
        if not limit.isascii() or not limit.isdecimal() or len(limit) > 4 or not 1 <= int(limit) <= schema.LIST_MOST:
            raise failure("malformed", f"limit: 1 to {schema.LIST_MOST}")
        if "marker" in query and not schema.is_id(marker):
            raise failure("malformed", "marker: an id of a migration")
        status, domain = query.get("status"), query.get("domain")
        if status is not None and status not in schema.STATUSES:
            raise failure("malformed", f"status: one of {', '.join(schema.STATUSES)}")
        if domain == "":
            raise failure("malformed", "domain: a name")
        every = await _in_thread(self.migrations.all)
        fitting = (
            each
            for each in every
            if (not marker or each.id < marker)
            and (status is None or each.status == status)
            and (domain is None or each.request.get("domain") == domain)
        )
        page = [each for each, _ in zip(fitting, range(int(limit) + 1), strict=False)]
        kept = page[: int(limit)]
        more = kept[-1].id if len(page) > len(kept) else None
        return _json(schema.MigrationList(migrations=shown_all(kept), next_marker=more))

    async def show(self, request: Request) -> Response:
        return _json(shown(await self._find(request)))

    async def events(self, request: Request) -> Response | EventStream:
        last = schema.check_last_event(request.headers.get("last-event-id"))
        found = await self._find(request)
        path = found.head.path if found.head is not None else None
        offset = begins_at(path, last)
        over = not found.running and not found.queued
        if path is not None and over and offset and offset == path.stat().st_size:
            return Response(status_code=204)
        if self._streams >= MOST_STREAMS:
            raise failure("busy", f"{MOST_STREAMS} readers follow migrations", headers={"retry-after": "10"},
                          hint="close a page", retryable=True)  # fmt: skip
        self._streams += 1
        return EventStream(found, self.migrations.again, offset, self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def log(self, request: Request) -> Response:
        head = await self._head(request)
        return _text("\n".join(await _in_thread(lambda: list(log_lines(whole_record(head))))) + "\n")

    async def explain(self, request: Request) -> Response:
        head = await self._head(request)
        return _text("\n".join(await _in_thread(lambda: explain(whole_record(head)))) + "\n")

    async def report(self, request: Request) -> Response:
        head = await self._head(request)
        text = await _in_thread(lambda: report_html(whole_record(head)))
        return Response(text, media_type="text/html", headers={"content-security-policy": _REPORT_POLICY})

    async def prometheus(self, request: Request) -> Response:
        return Response(await _in_thread(self.metrics.exposition), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return Response(self._document, media_type="application/json")

    # -- act --------------------------------------------------------------------------------------------------------

    async def abort(self, request: Request) -> Response:
        found = await self._find(request)
        return await self._done(found, await _in_thread(actions.abort, found, self.migrations), 202)

    async def postcopy(self, request: Request) -> Response:
        found = await self._find(request)
        await _in_thread(actions.start_postcopy, found, self.migrations)
        return await self._done(found, "switching to postcopy", 202)

    async def limits(self, request: Request) -> Response:
        given = msgspec.structs.asdict(schema.read(await _body(request), schema.NewLimits))
        values = {name: value for name, value in given.items() if value is not msgspec.UNSET}
        if not values:
            raise failure("malformed", f"at least one of {', '.join(given)}")
        found = await self._find(request)
        await _in_thread(actions.set_limits, found, actions.Limits(**values), self.migrations)
        words = ", ".join(f"{name} {value}" for name, value in values.items())
        return await self._done(found, f"set: {words}")

    async def recover(self, request: Request) -> Response:
        key = schema.check_key(request.headers.get("idempotency-key", ""))
        found = await self._find(request)
        return await self._started(*await _in_thread(actions.recover, found, self.migrations, key=key))

    async def _done(self, found: Found, message: str, status: int = 200) -> Response:
        again = await _in_thread(self.migrations.again, found)
        log.info("migration %s of %s: %s", found.id, found.request.get("domain"), message)
        return _json(schema.Done(message=message, migration=shown(again)), status)

    async def _find(self, request: Request) -> Found:
        return await _in_thread(self.migrations.find, request.path_params["id"])

    async def _head(self, request: Request) -> Head:
        found = await self._find(request)
        if found.head is None:
            raise failure(
                "state", "it has no record" if not found.running else "its record has not begun yet",
                hint=shown(found).error or "try again in a moment",
            )  # fmt: skip
        return found.head

    # -- the page ---------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        text = (_PAGE / "index.html").read_bytes()
        return Response(text, media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})

    async def page_file(self, request: Request) -> Response:
        known = PAGE_FILES.get(request.path_params["name"])
        if known is None:
            raise HTTPException(404)
        return Response((known[0] / request.path_params["name"]).read_bytes(), headers={"content-type": known[1]})

    # -- together ---------------------------------------------------------------------------------------------------

    def application(self) -> ASGIApp:
        one = "/v1/migrations/{id}"

        def route(path: str, method: str, call: Callable[[Request], Awaitable[Any]]) -> Route:
            return Route(path, call, methods=[method])

        routes = [
            route("/", "GET", self.page),
            route("/page/{name}", "GET", self.page_file),
            route("/openapi.json", "GET", self.openapi),
            route("/metrics", "GET", self.prometheus),
            route("/v1/plans", "POST", self.plan),
            _Methods("/v1/migrations", {"GET": self.list, "POST": self.start}),
            route(one, "GET", self.show),
            route(f"{one}/abort", "POST", self.abort),
            route(f"{one}/postcopy", "POST", self.postcopy),
            route(f"{one}/limits", "PATCH", self.limits),
            route(f"{one}/recover", "POST", self.recover),
            route(f"{one}/events", "GET", self.events),
            route(f"{one}/log", "GET", self.log),
            route(f"{one}/explain", "GET", self.explain),
            route(f"{one}/report", "GET", self.report),
        ]
        handlers: Any = {HTTPException: _http_problem, Failure: _failed, MigrationError: _migration_problem,
                         Exception: _internal}  # fmt: skip
        return _Guarded(Starlette(routes=routes, exception_handlers=handlers), readonly=self.readonly)


class _Methods(Route):
    """One path with a function for each method, so that 405 names them all."""

    def __init__(self, path: str, calls: dict[str, Callable[[Request], Awaitable[Any]]]) -> None:
        async def call(request: Request) -> Any:
            return await calls["GET" if request.method == "HEAD" else request.method](request)

        super().__init__(path, call, methods=list(calls))


class _Guarded:
    """Headers that every response has; what another site's page sends here is refused."""

    def __init__(self, app: ASGIApp, *, readonly: bool) -> None:
        self._app = app
        self._readonly = readonly

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                more = {name.encode(): value.encode() for name, value in _HEADERS.items()}
                missing = [(name, value) for name, value in more.items() if name not in present]
                message["headers"] = [*message["headers"], *missing]
            await send(message)

        reason = _refusal(scope)
        if self._readonly and scope["method"] not in ("GET", "HEAD"):
            reason = reason or "this API only shows; it was started with --readonly"
        app = self._app if not reason else _answer(problems.problem("forbidden", reason))
        await app(scope, receive, with_headers)


def _refusal(scope: Scope) -> str:
    """Why this request is not heard: the peer's rights (serving.py), or a browser that acts for another site."""
    if scope.get("virtmig.refusal"):
        return str(scope["virtmig.refusal"])
    headers = dict(scope["headers"])
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
    names = scope.get("virtmig.names")
    if names is not None and host.rpartition(":")[0].strip("[]") not in names and host not in names:
        return f"this address is served as {', '.join(names)} only, not as {host!r}"
    if origin and origin.partition("://")[2] != host:
        return f"requests of another site's page ({origin}) are not heard"
    return ""


def _answer(problem: problems.Problem, headers: dict[str, str] | None = None) -> Response:
    more = {**(headers or {}), "content-type": problems.MEDIA_TYPE}
    return Response(msgspec.json.encode(problem), problem.status, more)


def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "not-found", 405: "method"}.get(error.status_code, "malformed")
    words = {"not-found": f"nothing is at {request.url.path}",
             "method": f"{request.method} is not offered at {request.url.path}"}  # fmt: skip
    return _answer(problems.problem(kind, words.get(kind, error.detail)), dict(error.headers or {}))


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    return _answer(msgspec.structs.replace(error.problem, instance=request.url.path), error.headers)


def _migration_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, MigrationError)
    return _answer(msgspec.structs.replace(problems.problem_of(error), instance=request.url.path))


def _internal(request: Request, error: Exception) -> Response:
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return _answer(problems.problem("internal", f"{type(error).__name__}; the API's log has more"))


async def _body(request: Request) -> bytes:
    """Raises Failure for what is no JSON, too much of it, or does not come to its end."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise failure("media-type", "the body is read as application/json only")
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                found += piece
                if len(found) > BODY_LONGEST_BYTES:
                    raise failure("too-large", f"at most {BODY_LONGEST_BYTES} bytes")
    except TimeoutError:
        late = f"{len(found)} bytes came within {BODY_S:g} s, and not the end"
        raise failure("slow", late, headers={"Connection": "close"}) from None
    return bytes(found)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _text(text: str) -> Response:
    return Response(text, media_type="text/plain")
