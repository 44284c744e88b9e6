# SPDX-License-Identifier: AGPL-3.0-or-later
"""How v4 wraps what it answers: data, type, flags and links; errors in the same form."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from replicator.simulator.v4.schema import Problem, revision
from replicator.simulator.web import HttpError, Reply, Request

#: "ergon" in base64: what stands before a task's UUID.
TASK_PREFIX = "ZXJnb24=:"

_GROUPS = {
    "not_found": ("40400", "RESOURCE_NOT_FOUND"),
    "exists": ("40900", "RESOURCE_ALREADY_EXISTS"),
    "in_use": ("40901", "RESOURCE_IN_USE"),
    "forbidden": ("40300", "FORBIDDEN"),
    "unauthorized": ("40100", "AUTHENTICATION_REQUIRED"),
    "not_supported": ("50100", "NOT_SUPPORTED"),
    "internal": ("50000", "INTERNAL_ERROR"),
    "invalid_query": ("40001", "INVALID_QUERY_PARAMETER"),
    "invalid": ("40000", "INVALID_REQUEST"),
}
_PREFIXES = {
    "vmm": "VMM",
    "volumes": "VOL",
    "dataprotection": "DP",
    "clustermgmt": "CLU",
    "prism": "PRISM",
    "networking": "NET",
    "iam": "IAM",
}
_FIXED = {
    "etag_missing": ("PLAT-10004", "MISSING_ETAG_HEADER"),
    "etag_mismatch": ("PLAT-10005", "INVALID_ETAG_HEADER"),
    "rate_limit": ("PLAT-10029", "RATE_LIMIT_EXCEEDED"),
}


class InvalidBodyError(HttpError):
    """A body that does not keep to its schema: told as a SchemaValidationError."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(400, "; ".join(f"{p.path} {p.message}" for p in problems), "schema")
        self.problems = problems


def when(at: float | None) -> str | None:
    """A time as v4 writes it."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def flag(name: str, value: bool) -> dict[str, Any]:
    """One of the metadata's flags."""
    return {
        "$objectType": "common.v1.config.Flag",
        "$reserved": {"$fv": "v1.r0"},
        "name": name,
        "value": value,
    }


def link(rel: str, href: str) -> dict[str, Any]:
    """One of the metadata's links."""
    return {
        "$objectType": "common.v1.response.ApiLink",
        "$reserved": {"$fv": "v1.r0"},
        "rel": rel,
        "href": href,
    }


def pair(name: str, value: Any) -> dict[str, Any]:
    """A name with a value, as tasks and metadata have it."""
    return {
        "$objectType": "common.v1.config.KVPair",
        "$reserved": {"$fv": "v1.r0"},
        "name": name,
        "value": value,
    }


def metadata(
    links: list[dict[str, Any]],
    *,
    error: bool = False,
    paginated: bool = False,
    truncated: bool = False,
    total: int | None = None,
    extra: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The metadata of every answer."""
    answer: dict[str, Any] = {
        "$objectType": "common.v1.response.ApiResponseMetadata",
        "$reserved": {"$fv": "v1.r0"},
        "flags": [
            flag("hasError", error),
            flag("isPaginated", paginated),
            flag("isTruncated", truncated),
        ],
        "links": links,
    }
    if total is not None:
        answer["totalAvailableResults"] = total
    if extra is not None:
        answer["extraInfo"] = extra
    return answer


def wrap(
    data: Any, item: str, response: str, meta: dict[str, Any], minors: dict[str, int]
) -> dict[str, Any]:
    """The whole answer. ``item`` is the discriminator of the data, ``response`` the answer's own type."""
    namespace = response.partition(".")[0]
    answer = {
        "$objectType": response,
        "$reserved": {"$fv": revision(namespace, minors)},
        "$dataItemDiscriminator": item,
        "metadata": meta,
    }
    if data is not None:
        answer["data"] = data
    return answer


def task_id(uuid: str) -> str:
    """A task's id as v4 has it."""
    return TASK_PREFIX + uuid


def task_link(request: Request, minor: int, uuid: str) -> dict[str, Any]:
    """Where the task can be asked for."""
    return link(
        "task",
        f"{request.base_url}/api/prism/v4.{minor}/config/tasks/{quote(task_id(uuid), safe='')}",
    )


def render_error(request: Request, error: HttpError) -> Reply:
    """An error as v4 words it."""
    parts = request.path.split("/")
    namespace = parts[2] if len(parts) > 3 and parts[2] in _PREFIXES else "prism"
    minor = parts[3].partition(".")[2] if len(parts) > 3 else "0"
    fv = f"v4.r{minor if minor.isdecimal() else 0}"
    reserved = {"$fv": fv}
    body: Any
    if isinstance(error, InvalidBodyError):
        name = f"{namespace}.v4.error.SchemaValidationError"
        item = name
        body = {
            "$objectType": name,
            "$reserved": reserved,
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "statusCode": 400,
            "error": "Bad Request",
            "path": request.path,
            "validationErrorMessages": [
                {
                    "$objectType": f"{namespace}.v4.error.SchemaValidationErrorMessage",
                    "$reserved": reserved,
                    "location": "body",
                    "message": problem.message,
                    "attributePath": problem.path,
                }
                for problem in error.problems
            ],
        }
    else:
        name = f"{namespace}.v4.error.AppMessage"
        item = f"List<{name}>"
        number, group = _GROUPS.get(error.reason, _GROUPS["invalid"])
        code, group = _FIXED.get(error.reason, (f"{_PREFIXES[namespace]}-{number}", group))
        arguments = {"permission": error.permission} if error.permission else {}
        body = [
            {
                "$objectType": name,
                "$reserved": reserved,
                "message": error.message,
                "severity": "ERROR",
                "code": code,
                "locale": "en-US",
                "errorGroup": group,
                "argumentsMap": arguments,
            }
        ]
    return Reply(
        error.status,
        {
            "data": {
                "$objectType": f"{namespace}.v4.error.ErrorResponse",
                "$reserved": reserved,
                "$errorItemDiscriminator": item,
                "error": body,
            },
            "$reserved": reserved,
            "$objectType": f"{namespace}.v4.error.ErrorApiResponse",
            "metadata": metadata([], error=True),
        },
    )
