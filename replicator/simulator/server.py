# SPDX-License-Identifier: AGPL-3.0-or-later
"""HTTPS for Prism Central and each Element: who asks, which handler answers, and the faults of the transport.

Each host has an address of its own and all have the same port. What v3 and v4 mean is their routers' business.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import formatdate
from urllib.parse import parse_qsl, unquote

import h11
import trio

from replicator.errors import StateError
from replicator.simulator.auth import Caller, Gate, RateLimitedError, UnauthorizedError
from replicator.simulator.certificates import Authority
from replicator.simulator.connection import Connection, Head
from replicator.simulator.controls import Logged, build_controls
from replicator.simulator.core import Core
from replicator.simulator.model import User
from replicator.simulator.v3 import routes as v3
from replicator.simulator.v4 import routes as v4
from replicator.simulator.web import HttpError, Reply, Request, Router

_logger = logging.getLogger(__name__)

_CONNECTIONS_MAX = 512
_LOG_MAX = 20_000
_QUERY_MAX = 100
_V3_PATHS = ("/api/nutanix/", "/PrismGateway/")
_OWN_PATHS = "/simulator/"
_UNAUTHORIZED = Reply(
    401,
    raw=b"<!DOCTYPE html><html><body><h1>HTTP Status 401 - Unauthorized</h1></body></html>\n",
    content_type="text/html;charset=utf-8",
    headers={"WWW-Authenticate": 'Basic realm="Prism"'},
)
#: Who asks where nobody was found out yet: for how an error looks.
_NOBODY = User(uuid="", name="")
_UNKNOWN = Reply(
    404, raw=b"<html><body><h1>404 Not Found</h1></body></html>\n", content_type="text/html"
)
#: Called when a request was carried out, before its answer goes out.
OnRequest = Callable[[Request], Awaitable[None]]


class _CutError(Exception):
    """The connection is to be reset."""


@dataclass(frozen=True, slots=True)
class _Host:
    """Prism Central (``cluster`` None) or an Element."""

    address: str
    cluster: str | None
    v3: Router
    v4: Router
    own: Router | None

    def router(self, path: str) -> Router | None:
        """Which routes a path belongs to."""
        if path.startswith(_OWN_PATHS):
            return self.own
        return self.v3 if path.startswith(_V3_PATHS) else self.v4


class Server:
    """All hosts of a simulator. ``log`` holds the newest requests; ``on_request`` may be set at any time."""

    def __init__(self, core: Core, authority: Authority, port: int) -> None:
        self._core = core
        self._authority = authority
        self.port = port
        self.log: deque[Logged] = deque(maxlen=_LOG_MAX)
        self.on_request: OnRequest | None = None
        self.gate = Gate(
            core, lambda path, token, cluster: v4.authenticate_jwt(core, path, token, cluster)
        )
        routers3, routers4 = v3.build_v3(core), v4.build_v4(core)
        own = build_controls(core, self.log)
        self._hosts = [_Host(core.world.address, None, routers3["pc"], routers4["pc"], own)]
        self._hosts += [
            _Host(cluster.address, cluster.uuid, routers3["element"], routers4["element"], None)
            for cluster in core.world.clusters.values()
        ]

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on every address until cancelled; started once all of them listen. Raises StateError if one cannot."""
        async with trio.open_nursery() as nursery:
            for host in self._hosts:
                names = ["localhost"] if host.cluster is None else []
                context = await trio.to_thread.run_sync(
                    self._authority.context, host.address, names
                )
                try:
                    plain = await trio.open_tcp_listeners(self.port, host=host.address)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise StateError(
                        f"cannot listen on {host.address}:{self.port}: {reason}"
                    ) from error
                secure = [trio.SSLListener(each, context, https_compatible=True) for each in plain]
                nursery.start_soon(self._listen, host, secure)
            task_status.started()

    async def _listen(
        self, host: _Host, listeners: list[trio.SSLListener[trio.SocketStream]]
    ) -> None:
        places = trio.CapacityLimiter(_CONNECTIONS_MAX)

        async def connection(stream: trio.SSLStream[trio.SocketStream]) -> None:
            async with places, stream:
                try:
                    await self._converse(host, Connection(stream))
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    _logger.debug("a client of %s: %s", host.address, error)
                except (h11.ProtocolError, trio.TooSlowError) as error:
                    _logger.warning("a client of %s cannot be answered: %s", host.address, error)

        await trio.serve_listeners(connection, listeners)

    async def _converse(self, host: _Host, connection: Connection) -> None:
        while (head := await self._head(connection)) is not None:
            path, _ = _split(head.target)
            subject = f"{head.method} {path}"
            cookie: tuple[str, str] | None = None
            try:
                caller = await self._before(host, head, path, subject)
                cookie = caller.cookie
                reply = await self._carry_out(host, connection, head, caller)
                if self._core.faults.take("reset-after", subject) is not None:
                    raise _CutError
            except UnauthorizedError:
                reply = _UNAUTHORIZED
            except HttpError as error:
                reply = self._refuse(host, head, path, error)
            except _CutError:
                self.log.append(Logged(head.method, path, 0, host.cluster))
                await connection.cut()
                return
            self.log.append(Logged(head.method, path, reply.status, host.cluster))
            await connection.skip()
            await connection.send(head.method, reply, _more_headers(host, cookie))

    async def _head(self, connection: Connection) -> Head | None:
        try:
            return await connection.head()
        except h11.RemoteProtocolError as error:
            refused = Reply(
                error.error_status_hint, raw=b"bad request\n", content_type="text/plain"
            )
            await connection.send("GET", refused, [("Connection", "close")])
            return None

    async def _before(self, host: _Host, head: Head, path: str, subject: str) -> Caller:
        """Faults that strike before anything is done, then who asks."""
        take = self._core.faults.take
        late = take("latency", subject)
        if late is not None:
            await trio.sleep(late.value)
        if take("reset-before", subject) is not None:
            raise _CutError
        if take("forget-sessions", subject) is not None:
            self.gate.forget_sessions()
        if take("unauthorized", subject) is not None:
            raise UnauthorizedError
        limited = take("rate-limit", subject)
        if limited is not None:
            raise RateLimitedError(int(limited.value) or None)
        if take("rate-limit-400", subject) is not None:
            raise RateLimitedError(None, 400)
        broken = take("server-error", subject)
        if broken is not None:
            raise HttpError(int(broken.value) or 503, "the service is not available", "internal")
        caller = self.gate.admit(head.headers, path, host.cluster)
        if not path.startswith(_OWN_PATHS):
            self.gate.limit(caller.user, host.cluster)
        elif not self.gate.is_super(caller.user):
            raise HttpError(
                403, "the simulator's own paths are for who may do everything", "forbidden"
            )
        if take("etag-stale", subject) is not None:
            if path.startswith(_V3_PATHS):
                raise HttpError(409, "Edit conflict: spec_version mismatch", "spec_version")
            raise HttpError(412, "the entity has changed", "etag_mismatch")
        return caller

    async def _carry_out(
        self, host: _Host, connection: Connection, head: Head, caller: Caller
    ) -> Reply:
        path, query = _split(head.target)
        subject = f"{head.method} {path}"
        router = host.router(path)
        if path.startswith(_V3_PATHS) and not host.cluster and not self._core.knobs.get("v3", True):
            return _UNKNOWN
        found = router.find(head.method, path) if router is not None else None
        if found is None:
            if path.startswith(_V3_PATHS):
                raise HttpError(404, f"no such path: {path}", "not_found")
            return _UNKNOWN
        route, arguments = found
        self.gate.check(caller.user, route)
        body = b"" if route.streams else await connection.body()
        request = Request(
            method=head.method,
            path=path,
            query=_query(query),
            headers=head.headers,
            body=body,
            cluster=host.cluster,
            user=caller.user,
            base_url=f"https://{host.address}:{self.port}",
            stream=self._streamed(connection, subject) if route.streams else None,
        )
        try:
            return await route.handler(request, **arguments)
        except HttpError as error:
            return self._refuse(host, head, path, error)
        except _CutError:
            raise
        except Exception:
            _logger.exception("%s %s", head.method, path)
            return self._refuse(
                host, head, path, HttpError(500, "an error of the simulator", "internal")
            )
        finally:
            if self.on_request is not None:
                await self.on_request(request)

    def _streamed(self, connection: Connection, subject: str) -> AsyncIterator[bytes]:
        """The body of an upload, which a fault may cut."""
        cut = self._core.faults.take("upload-cut", subject)
        return connection.pieces() if cut is None else _cut_after(connection, int(cut.value))

    def _refuse(self, host: _Host, head: Head, path: str, error: HttpError) -> Reply:
        request = Request(
            method=head.method,
            path=path,
            query={},
            headers=head.headers,
            body=b"",
            cluster=host.cluster,
            user=_NOBODY,
            base_url=f"https://{host.address}:{self.port}",
        )
        if path.startswith(_OWN_PATHS):
            reply = Reply(error.status, {"error": error.message})
        elif path.startswith(_V3_PATHS):
            reply = v3.render_error(request, error)
        else:
            reply = v4.render_error(request, error)
        if isinstance(error, RateLimitedError) and error.retry_after_s is not None:
            reply.headers["Retry-After"] = str(error.retry_after_s)
        return reply


async def _cut_after(connection: Connection, length: int) -> AsyncIterator[bytes]:
    """The first ``length`` bytes; then the connection is reset."""
    async with aclosing(connection.pieces()) as pieces:
        async for piece in pieces:
            if length < len(piece):
                break
            length -= len(piece)
            yield piece
    raise _CutError


def _split(target: str) -> tuple[str, str]:
    path, _, query = target.partition("?")
    # Prism's front end merges slashes: clients of v3 send "…/v3//vms/list".
    return re.sub("/{2,}", "/", unquote(path)), query


def _query(text: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_QUERY_MAX))
    except ValueError:
        raise HttpError(400, "the query has too many fields") from None


def _more_headers(host: _Host, cookie: tuple[str, str] | None) -> list[tuple[str, str]]:
    central = host.cluster is None
    more = [
        ("Date", formatdate(usegmt=True)),
        ("Server", "envoy"),
        ("X-Ntnx-Env", "pc" if central else "pe"),
        ("X-Ntnx-Product", "pc.7.3.1.9" if central else "AOS 7.3.1.5"),
    ]
    if cookie is not None:
        name, value = cookie
        more.append(("Set-Cookie", f"{name}={value};Path=/;Secure;HttpOnly;SameSite=Lax"))
    return more


__all__ = ["OnRequest", "Server"]
