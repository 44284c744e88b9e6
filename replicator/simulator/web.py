# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a request and its answer are to the handlers of both APIs, and how paths find their handler.

Handlers know nothing of sockets, TLS, accounts' passwords, rate limits or faults of the transport: ``server`` does.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from replicator.simulator.model import User


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``path`` is decoded; header names are lower case; ``cluster`` is the Element that was asked, None on
    Prism Central. ``body``: read whole, up to the server's limit; ``stream`` in its place where the route asked for it.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    cluster: str | None
    user: User
    base_url: str
    stream: AsyncIterator[bytes] | None = None

    def json(self) -> Any:
        """The body. Raises HttpError 400 where it is no JSON; {} where there is none."""
        if not self.body:
            return {}
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError as error:
            raise HttpError(400, f"the body is not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: ``body`` is what becomes JSON, or ``raw`` bytes, or a ``stream`` of ``length`` bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    content_type: str = "application/json"
    stream: AsyncIterator[bytes] | None = None
    length: int | None = None


class HttpError(Exception):
    """A request is refused. ``reason`` is a word both APIs know how to spell: not_found, invalid, etag_missing, etag_mismatch,
    spec_version, forbidden, rate_limit, exists, in_use, not_supported, internal. ``permission``: what the account lacks.
    """

    def __init__(
        self, status: int, message: str, reason: str = "invalid", permission: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.permission = permission


Handler = Callable[..., Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    """``template`` as ``/config/vms/{vm}``: what is in braces becomes the handler's arguments by name (one path segment).

    ``permission``: the operation that the account's role must hold, or None. ``streams``: the body is not read first.
    """

    method: str
    template: str
    handler: Handler
    permission: str | None = None
    streams: bool = False


class Router:
    """Routes by method and path."""

    def __init__(self) -> None:
        self._routes: list[tuple[re.Pattern[str], Route]] = []

    def add(
        self,
        method: str,
        template: str,
        handler: Handler,
        *,
        permission: str | None = None,
        streams: bool = False,
    ) -> None:
        """Add a route; the first that fits wins."""
        pieces = re.split(r"(\{\w+\})", template)
        pattern = "".join(
            f"(?P<{piece[1:-1]}>[^/]+)" if piece.startswith("{") else re.escape(piece)
            for piece in pieces
        )
        route = Route(method, template, handler, permission, streams)
        self._routes.append((re.compile(pattern), route))

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route and its arguments; None if the path is unknown. Raises HttpError 405 for a known path."""
        known = False
        for pattern, route in self._routes:
            match = pattern.fullmatch(path)
            if match is not None and route.method == method:
                return route, match.groupdict()
            known = known or match is not None
        if known:
            raise HttpError(405, f"{method} is not for {path}", "not_supported")
        return None
