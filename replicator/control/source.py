# SPDX-License-Identifier: AGPL-3.0-or-later
"""The control API of a process that pushes (docs/json.md): the throttle, shown and set, how far the push is, and the
metrics page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import trio

from replicator.config import Config
from replicator.control.bandwidth import Regulator, parse_limit
from replicator.control.metrics import PATH, Metrics, start_metrics
from replicator.control.server import Answer, NotFoundError, serve_http
from replicator.domain.views import instant
from replicator.errors import UsageError

#: What takes back what was set by hand.
RESET = "reset"


#: What is under way, as ``GET /v1/push`` answers (docs/json.md).
Push = Callable[[], dict[str, Any]]


def _nothing() -> dict[str, Any]:
    return {"vm": "", "push": None}


class SourceApi:
    """Answers control requests. Every method may raise an error of the tree, which the client gets in one line."""

    def __init__(self, regulator: Regulator, metrics: Metrics, push: Push = _nothing) -> None:
        self._regulator = regulator
        self._metrics = metrics
        self._push = push

    async def handle(self, method: str, target: str, body: dict[str, Any]) -> Answer:
        """One request; see docs/json.md for the routes."""
        try:
            path = urlsplit(target).path
        except ValueError:
            raise UsageError(f"not a request's target: {target}") from None
        match (method, path):
            case ("GET", "/v1/throttle"):
                return throttle_status(self._regulator)
            case ("GET", "/v1/push"):
                return self._push()
            case ("POST", "/v1/throttle"):
                return self._set(body.get("limit"))
            case ("GET", _) if path == PATH:
                return await self._metrics.page()
        raise NotFoundError(f"no such request to a source: {method} {path}")

    def _set(self, limit: Any) -> dict[str, Any]:
        if not isinstance(limit, str):
            raise UsageError("limit: expected a rate, a timetable, off or reset")
        reset = limit.strip() == RESET
        try:
            parsed = None if reset else parse_limit(limit, self._regulator.configured_mbps)
        except UsageError as error:
            raise UsageError(f"limit: {error}") from None
        self._regulator.set_limit(parsed)
        return throttle_status(self._regulator)


async def serve_source(
    nursery: trio.Nursery,
    config: Config,
    regulator: Regulator,
    metrics: Metrics,
    push: Push = _nothing,
) -> None:
    """Answer on the control socket, follow the timetable and show metrics, in tasks of ``nursery``.

    Raises UsageError, StateError and RefusedError where one of the sockets cannot be had.
    """
    api = SourceApi(regulator, metrics, push)
    await nursery.start(serve_http, config.control_path, api.handle)
    await start_metrics(nursery, config.metrics_address, metrics)
    nursery.start_soon(regulator.run)


def throttle_status(regulator: Regulator) -> dict[str, Any]:
    """ThrottleStatus of docs/json.md."""
    rate = regulator.rate()
    at, mbps = rate.next_change or (None, None)
    hand = regulator.by_hand
    return {
        "mbps": rate.mbps,
        "origin": rate.origin,
        "entry": rate.entry,
        "next_change": None if at is None else instant(at * 1_000_000),
        "next_mbps": mbps,
        "set_by_hand": None if hand is None else hand.text,
    }


__all__ = ["RESET", "Push", "SourceApi", "serve_source", "throttle_status"]
