# SPDX-License-Identifier: AGPL-3.0-or-later
"""A small HTTP/1.1 server (h11) on a Unix socket, or on TCP for metrics: JSON in; JSON, a stream of JSON lines or a page of
text out.

It knows routes only as a callable; errors of the tree become status codes with the command's exit code inside.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h11
import trio
from eventsourcing.persistence import PersistenceError

from replicator.errors import RefusedError, ReplicatorError, StateError, UsageError
from replicator.log.archive import SegmentAwayError
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

_BODY_MAX = 64 << 10
#: How long a client may take for its request, and for any piece of the answer that it is to read. Seconds.
_REQUEST_S = 30.0
_CONNECTIONS_MAX = 64
_SOCKET_NAME_MAX = 107


@dataclass(frozen=True, slots=True)
class Page:
    """An answer that is no JSON."""

    content_type: str
    body: bytes


#: A handler gives one object, a stream of them, or a page.
Answer = dict[str, Any] | AsyncGenerator[dict[str, Any], None] | Page
Handler = Callable[[str, str, dict[str, Any]], Awaitable[Answer]]


class NotFoundError(UsageError):
    """No such route."""


async def serve_http(
    path: Path,
    handler: Handler,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on a Unix socket until cancelled. ``handler(method, target, body)``; a stream is closed when its client goes away.

    Raises UsageError for a path that is too long, StateError if the socket cannot be made, RefusedError if another process
    answers there.
    """
    listener = _listen(path)
    try:
        await _serve([listener], handler, "control", task_status.started)
    finally:
        listener.socket.close()
        with suppress(FileNotFoundError):
            os.unlink(path)


async def serve_tcp(
    host: str,
    port: int,
    handler: Handler,
    name: str,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on TCP until cancelled; reports started with the port. ``name`` is the key that says so, for messages.

    Raises StateError if it cannot listen there.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StateError(f"{name}: cannot listen on {host}:{port}: {reason}") from error
    port = listeners[0].socket.getsockname()[1]
    await _serve(listeners, handler, name, partial(task_status.started, port))


async def _serve(
    listeners: list[trio.SocketListener], handler: Handler, name: str, started: Callable[[], None]
) -> None:
    places = trio.CapacityLimiter(_CONNECTIONS_MAX)

    async def connection(stream: trio.SocketStream) -> None:
        async with places, stream:
            try:
                await _Connection(stream, handler).run()
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                _logger.debug("%s client: %s", name, error)
            except _UnreadError:
                _logger.warning("a %s client did not read its answer in time", name)
            except h11.LocalProtocolError as error:
                # What was asked for cannot be said in HTTP, such as a body in answer to HEAD.
                _logger.warning("a %s client cannot be answered: %s", name, error)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, connection, listeners)
        started()


def check_path(path: Path) -> None:
    """Raise UsageError for a control socket whose name is too long to be one."""
    if len(os.fsencode(path)) > _SOCKET_NAME_MAX:
        raise UsageError(
            f"control_socket: {path} is longer than a socket's name may be ({_SOCKET_NAME_MAX} bytes)"
        )


def _listen(path: Path) -> trio.SocketListener:
    """The socket, for its owner only."""
    check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket():
            _check_stale(path)
            path.unlink()
        sock.bind(os.fspath(path))
        # Nobody can connect before it listens, and then it is private: no need to touch the process's umask.
        path.chmod(0o600)
        sock.listen(_CONNECTIONS_MAX)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except OSError as error:
        sock.close()
        raise StateError(f"control socket {path}: {error.strerror}") from error
    except RefusedError:
        sock.close()
        raise


def _check_stale(path: Path) -> None:
    """Raise RefusedError if a process listens there: the state directory's lock keeps out only those with the same one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            pass  # its queue is full: somebody listens
        except OSError:
            return
    raise RefusedError(
        f"another process answers at the control socket {path}: give each its own control_socket"
    )


class _UnreadError(Exception):
    """The client does not read what it asked for."""


class _Connection:
    """One request; the connection is closed after its answer."""

    def __init__(self, stream: trio.SocketStream, handler: Handler) -> None:
        self._stream = stream
        self._handler = handler
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        """One request. Raises what the stream does, and _UnreadError."""
        try:
            with trio.move_on_after(_REQUEST_S) as scope:
                method, target, raw = await self._request()
            if scope.cancelled_caught:
                raise h11.RemoteProtocolError(
                    f"not whole within {_REQUEST_S:.0f} s", error_status_hint=408
                )
            answer = await self._handler(method, target, _parse(raw))
        except h11.RemoteProtocolError as error:
            said = {"error": f"bad request: {error}", "exit_code": 2}
            await self._send_whole(error.error_status_hint, said)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as error:  # noqa: BLE001 - every failure is answered; see _error
            status, said = _error(error)
            await self._send_whole(status, said)
        else:
            if isinstance(answer, dict):
                await self._send_whole(200, answer)
            elif isinstance(answer, Page):
                await self._send_page(200, answer)
            else:
                await self._send_stream(answer)

    async def _request(self) -> tuple[str, str, bytes]:
        method = target = ""
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(_BODY_MAX))
            elif isinstance(event, h11.Request):
                method, target = event.method.decode(), event.target.decode()
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > _BODY_MAX:
                    raise h11.RemoteProtocolError(
                        f"a body of more than {_BODY_MAX} bytes", error_status_hint=413
                    )
            elif isinstance(event, h11.EndOfMessage):
                return method, target, bytes(body)
            else:  # the client closed the connection
                raise trio.BrokenResourceError("no whole request came")

    async def _send_whole(self, status: int, body: dict[str, Any]) -> None:
        await self._send_page(status, Page("application/json", json.dumps(body).encode()))

    async def _send_page(self, status: int, page: Page) -> None:
        headers = [
            ("Content-Type", page.content_type),
            ("Content-Length", str(len(page.body))),
            ("Connection", "close"),
        ]
        head = self._http.send(h11.Response(status_code=status, headers=headers))
        sent = self._http.send(h11.Data(data=page.body))
        end = self._http.send(h11.EndOfMessage())
        await self._put((head or b"") + (sent or b"") + (end or b""))

    async def _send_stream(self, answer: AsyncGenerator[dict[str, Any], None]) -> None:
        headers = [
            ("Content-Type", "application/x-ndjson"),
            ("Transfer-Encoding", "chunked"),
            ("Connection", "close"),
        ]
        await self._send(h11.Response(status_code=200, headers=headers))
        async with flat_nursery() as nursery:
            nursery.start_soon(self._watch_client, nursery.cancel_scope)
            async with aclosing(answer):
                try:
                    async for line in answer:
                        await self._send_line(line)
                except (trio.BrokenResourceError, trio.ClosedResourceError, _UnreadError):
                    raise
                except Exception as error:  # noqa: BLE001 - every failure is answered; see _error
                    _, said = _error(error)
                    await self._send_line(said)
            await self._send(h11.EndOfMessage())
            nursery.cancel_scope.cancel()

    async def _watch_client(self, scope: trio.CancelScope) -> None:
        """End the stream when the client goes away: what it asked for is not wanted any more."""
        while await self._stream.receive_some(4096):
            pass
        scope.cancel()

    async def _send_line(self, line: dict[str, Any]) -> None:
        await self._send(h11.Data(data=json.dumps(line).encode() + b"\n"))

    async def _send(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        await self._put(self._http.send(event) or b"")

    async def _put(self, data: bytes) -> None:
        with trio.move_on_after(_REQUEST_S) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise _UnreadError


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        raise UsageError("the request is not JSON") from None
    if not isinstance(body, dict):
        raise UsageError("the request is not a JSON object")
    return body


def _error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for a failure. What is not of our making is logged with where it came from."""
    if isinstance(error, NotFoundError):
        status, code = 404, error.exit_code
    elif isinstance(error, UsageError):
        status, code = 400, error.exit_code
    elif isinstance(error, RefusedError | SegmentAwayError):
        status, code = 409, error.exit_code
    elif isinstance(error, ReplicatorError | OSError | PersistenceError):
        status, code = 500, 1
        _logger.error("control request failed: %s", error)
    else:
        status, code = 500, 1
        _logger.error("control request failed", exc_info=error)
    return status, {"error": str(error) or type(error).__name__, "exit_code": code}
