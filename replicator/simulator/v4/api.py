# SPDX-License-Identifier: AGPL-3.0-or-later
"""What every call of v4 shares: the window of minors, If-Match, request ids, bodies against their schema, lists in pages."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlencode

from replicator.simulator.model import Entity, Task
from replicator.simulator.v4 import filters, models_iam, models_rest, models_vmm, tags
from replicator.simulator.v4.envelope import (
    InvalidBodyError,
    link,
    metadata,
    task_id,
    task_link,
    wrap,
)
from replicator.simulator.v4.knobs import Knobs
from replicator.simulator.v4.schema import Schema
from replicator.simulator.web import HttpError, Reply, Request, Router

if TYPE_CHECKING:
    from replicator.simulator.core import Core

SCHEMA = Schema(
    models_vmm.VMS,
    models_vmm.RECOVERY_POINTS,
    models_vmm.IMAGES,
    models_rest.COMMON,
    models_rest.DATAPROTECTION,
    models_rest.VOLUMES,
    models_rest.PRISM,
    models_rest.CLUSTERMGMT,
    models_rest.NETWORKING,
    models_iam.IAM,
)
LIMIT, LIMIT_MAX = 50, 100
_ID_LENGTH = 128
_IDS_KEPT = 20_000
_TASK = "prism.v4.config.TaskReference"

#: How a call is answered: the call, then the path's arguments by name.
Handler = Callable[..., Awaitable[Reply]]


class Extract(Protocol):
    """Makes what a list shows of an entity."""

    def __call__(self, entity: Any, /) -> dict[str, Any]:
        """The fields of the entity's model."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """What one endpoint asks for. ``query``: the ``$`` parameters that it takes. ``request_id``: it does nothing without one."""

    response: str
    since: int = 0
    query: tuple[str, ...] = ()
    request_id: bool = False


class Api:
    """v4 of one simulator."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.knobs = Knobs(core)
        self._seen: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def claim(self, request: Request, request_id: str) -> None:
        """A request id is for one request. Raises HttpError 400 for the id of another one."""
        text = f"{request.method}\0{request.path}\0".encode() + request.body
        digest = hashlib.sha256(text).digest()
        key = (request.user.name, request_id)
        known = self._seen.setdefault(key, digest)
        if known != digest:
            raise HttpError(400, f"NTNX-Request-Id {request_id} was used for another request")
        while len(self._seen) > _IDS_KEPT:
            self._seen.popitem(last=False)


class Namespace:
    """The endpoints of one namespace, on one router."""

    def __init__(self, api: Api, router: Router, name: str) -> None:
        self.api = api
        self.core = api.core
        self.name = name
        self._router = router

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        response: str,
        *,
        permission: str | None = None,
        since: int = 0,
        query: Iterable[str] = (),
        request_id: bool = False,
    ) -> None:
        """``path`` is what follows ``/api/<namespace>/v4.<minor>``; ``response`` the answer's type in full."""
        options = Options(response, since, tuple(query), request_id)

        async def answer(request: Request, minor: str, **arguments: str) -> Reply:
            low, high = self.api.knobs.window.get(self.name, (1, 0))
            number = int(minor) if minor.isdecimal() and len(minor) < 4 else -1
            if not low <= number <= high or number < options.since:
                return unknown_path()
            call = Call(self.api, request, self.name, number, options)
            known = call.repeated()
            return known if known is not None else await handler(call, **arguments)

        self._router.add(
            method, f"/api/{self.name}/v4.{{minor}}{path}", answer, permission=permission
        )

    def get(self, path: str, handler: Handler, response: str, **options: Any) -> None:
        """``add`` for GET."""
        self.add("GET", path, handler, response, **options)

    def post(self, path: str, handler: Handler, response: str, **options: Any) -> None:
        """``add`` for POST."""
        self.add("POST", path, handler, response, **options)

    def put(self, path: str, handler: Handler, response: str, **options: Any) -> None:
        """``add`` for PUT."""
        self.add("PUT", path, handler, response, **options)

    def delete(self, path: str, handler: Handler, response: str, **options: Any) -> None:
        """``add`` for DELETE."""
        self.add("DELETE", path, handler, response, **options)


def unknown_path() -> Reply:
    """What a path that is not there is told: nothing in v4's form."""
    return Reply(
        404, raw=b"<html><body><h1>404 Not Found</h1></body></html>\n", content_type="text/html"
    )


class Call:
    """One request to one endpoint."""

    def __init__(
        self, api: Api, request: Request, namespace: str, minor: int, options: Options
    ) -> None:
        self.api = api
        self.core = api.core
        self.world = api.core.world
        self.request = request
        self.minor = minor
        self.options = options
        # Objects of other namespaces are as new as their own namespace is.
        self.minors = {name: high for name, (_, high) in api.knobs.window.items()}
        self.minors[namespace] = minor
        self.request_id = request.headers.get("ntnx-request-id", "")

    # What is asked

    @property
    def common(self) -> dict[str, Any]:
        """What every action of the core takes."""
        return {"request_id": self.request_id, "owner": self.request.user.name}

    def repeated(self) -> Reply | None:
        """The answer that this request was given before, if it was. Raises HttpError 400 without an id where one is needed."""
        if self.request.method == "GET":
            return None
        if len(self.request_id) > _ID_LENGTH:
            raise HttpError(400, "the NTNX-Request-Id header is too long")
        if not self.request_id:
            if self.options.request_id:
                raise HttpError(400, "the NTNX-Request-Id header is missing")
            return None
        self.api.claim(self.request, self.request_id)
        known = self.core.engine.known(self.request_id, self.request.user.name)
        return self.task(known) if known is not None else None

    def body(self, model: str) -> dict[str, Any]:
        """The body, judged. Raises HttpError 400 with all that is wrong."""
        clean, problems = SCHEMA.check(
            self.request.json(), model, self.minors, strict=self.api.knobs.strict
        )
        if problems:
            raise InvalidBodyError(problems)
        return clean

    def match(self, entity: Entity) -> None:
        """Raises HttpError unless If-Match carries the entity's tag."""
        tags.check(entity, self.request.headers.get("if-match"), self.api.knobs.etag_missing_status)

    # How it is answered

    def one(
        self, value: dict[str, Any], model: str, entity: Entity | None = None, status: int = 200
    ) -> Reply:
        """One object, with the tag of ``entity``."""
        self._check_query()
        text = self.request.query.get("$select")
        chosen = model
        if text:
            value = filters.select(value, text, SCHEMA, model)
        data = SCHEMA.stamp(value, model, self.minors)
        if text and model in models_rest.PROJECTIONS:
            chosen = data["$objectType"] = model + "Projection"
        headers = {}
        if entity is not None:
            headers = {"ETag": tags.tag(entity), "X-Ntnx-Etag": tags.tag(entity)}
        meta = metadata([link("self", self.request.base_url + self.request.path)])
        return Reply(status, wrap(data, chosen, self.options.response, meta, self.minors), headers)

    def task(self, task: Task) -> Reply:
        """The operation was accepted."""
        data = SCHEMA.stamp({"extId": task_id(task.uuid)}, _TASK, self.minors)
        links = [task_link(self.request, self.minors.get("prism", 0), task.uuid)]
        return Reply(202, wrap(data, _TASK, self.options.response, metadata(links), self.minors))

    def none(self) -> Reply:
        """Done, and there is nothing to say."""
        return Reply(204, raw=b"")

    def many(self, entities: Iterable[Any], extract: Extract, model: str) -> Reply:
        """The page of a list that the query asks for. Raises HttpError 400 for a query that cannot be answered."""
        self._check_query()
        page = self._number("$page", 0, 0, None)
        limit = self._number("$limit", LIMIT, 1, LIMIT_MAX)
        query = self.request.query
        rows = [extract(entity) for entity in entities]
        if query.get("$filter"):
            test = filters.compile_filter(query["$filter"], SCHEMA, model)
            rows = [row for row in rows if test(row)]
        if query.get("$orderby"):
            filters.order(rows, query["$orderby"], SCHEMA, model)
        total = len(rows)
        rows = rows[page * limit : (page + 1) * limit]
        chosen = model
        if query.get("$select"):
            rows = [filters.select(row, query["$select"], SCHEMA, model) for row in rows]
        data = [SCHEMA.stamp(row, model, self.minors) for row in rows]
        if query.get("$select") and model in models_rest.PROJECTIONS:
            chosen = model + "Projection"
            for row in data:
                row["$objectType"] = chosen
        meta = metadata(self._links(page, limit, total), paginated=True, total=total)
        return Reply(
            200,
            wrap(data or None, f"List<{chosen}>", self.options.response, meta, self.minors),
        )

    def _links(self, page: int, limit: int, total: int) -> list[dict[str, Any]]:
        last = max(0, (total - 1) // limit)
        pages = {"self": page, "first": 0, "last": last}
        if page > 0:
            pages["prev"] = min(page - 1, last)
        if page < last:
            pages["next"] = page + 1
        base = self.request.base_url + self.request.path
        return [
            link(
                rel,
                f"{base}?{urlencode({**self.request.query, '$page': number, '$limit': limit})}",
            )
            for rel, number in pages.items()
        ]

    def _check_query(self) -> None:
        for name in self.request.query:
            if name.startswith("$") and name not in self.options.query:
                raise HttpError(400, f"{name} is not a parameter of this call", "invalid_query")

    def _number(self, name: str, default: int, low: int, high: int | None) -> int:
        text = self.request.query.get(name)
        if text is None:
            return default
        if not text.isdecimal() or len(text) > 9:
            raise HttpError(400, f"{name} must be a number, not {text[:20]!r}", "invalid_query")
        number = int(text)
        if number < low or (high is not None and number > high):
            raise HttpError(
                400, f"{name} must be at least {low} and at most {high}", "invalid_query"
            )
        return number


PAGED = ("$page", "$limit")
LISTED = (*PAGED, "$filter", "$orderby", "$select")
