# SPDX-License-Identifier: AGPL-3.0-or-later
"""A small QMP client: JSON lines over QEMU's Unix socket, one command at a time.

A QMP socket serves one client: connect for an operation, then leave it to others. Source of the
protocol: QEMU's ``docs/interop/qmp-spec.rst``.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from replicator.errors import SourceError

LINE_LENGTH_MAX = 64 << 20
EVENTS_MAX = 1024
CONNECT_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 60.0
#: Linux' limit for the path of a Unix socket, without the zero byte at its end.
SOCKET_PATH_MAX = 107

Event = Mapping[str, Any]


class QmpError(SourceError):
    """QEMU refused a command; ``kind`` is its error class (GenericError, CommandNotFound, …)."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class QmpGoneError(QmpError):
    """Nobody serves the socket, or the connection was lost: the QEMU process has ended."""


class QmpClient:
    """A connection past its greeting. Use it from one task at a time; make it with ``open_qmp``.

    Cancelling a call leaves the connection usable; a command that was sent may still take effect.
    """

    def __init__(self, stream: trio.SocketStream, timeout_s: float) -> None:
        self._stream = stream
        self._timeout_s = timeout_s
        self._buffer = bytearray()
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._id = 0

    async def greet(self) -> None:
        """Read the greeting and leave negotiation mode; raises QmpError."""
        greeting = await self._receive()
        if "QMP" not in greeting:
            raise QmpError("the socket does not speak QMP")
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run ``command`` and return what it returns; underscores in argument names become hyphens.

        Raises QmpError if QEMU refuses or does not answer in time, QmpGoneError if it has ended.
        """
        self._id += 1
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": named, "id": self._id})
        try:
            with trio.fail_after(self._timeout_s):
                await self._send(message.encode() + b"\n")
                while True:
                    reply = await self._receive()
                    if "event" in reply:
                        self._events.append(reply)
                    elif reply.get("id") == self._id:
                        break
        except trio.TooSlowError:
            raise QmpError(f"QEMU did not answer {command} in {self._timeout_s:g} s") from None
        if "error" in reply:
            error = reply["error"]
            text = " ".join(str(error.get("desc", "no reason given")).split())
            raise QmpError(f"QEMU refused {command}: {text}", str(error.get("class", "")))
        return reply.get("return")

    async def wait_event(self, wanted: Callable[[Event], bool], timeout_s: float) -> Event | None:
        """The first event, buffered or to come, that ``wanted`` accepts; None when time is up.

        Buffered are the last EVENTS_MAX events since the connection began; those looked at are
        dropped.
        """
        while self._events:
            event = self._events.popleft()
            if wanted(event):
                return event
        with trio.move_on_after(timeout_s):
            while True:
                message = await self._receive()
                if "event" in message and wanted(message):
                    return message
        return None

    async def _send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise QmpGoneError("QEMU closed its QMP socket") from error

    async def _receive(self) -> dict[str, Any]:
        """The next message. Cancellation keeps what has arrived."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LINE_LENGTH_MAX:
                raise QmpError(f"a QMP message of more than {LINE_LENGTH_MAX} bytes")
            try:
                data = await self._stream.receive_some(64 << 10)
            except trio.BrokenResourceError as error:
                raise QmpGoneError("QEMU closed its QMP socket") from error
            if not data:
                raise QmpGoneError("QEMU closed its QMP socket")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QmpError("QEMU sent something that is not JSON") from error
        if not isinstance(message, dict):
            raise QmpError("QEMU sent something that is not a QMP message")
        return message


def check_socket_path(path: Path, what: str) -> None:
    """Raise SourceError if ``path`` is too long for a Unix socket."""
    length = len(bytes(path))
    if length > SOCKET_PATH_MAX:
        limit = f"a Unix socket's path may have {SOCKET_PATH_MAX}"
        raise SourceError(f"{what} {path} has {length} bytes, {limit}")


@asynccontextmanager
async def open_qmp(path: Path, *, timeout_s: float = COMMAND_TIMEOUT_S) -> AsyncIterator[QmpClient]:
    """Connect to the QMP socket at ``path``; closed at the end of the context.

    Raises QmpGoneError where nobody serves it, QmpError where another client holds it.
    ``timeout_s`` bounds each command.
    """
    check_socket_path(path, "QMP socket")
    try:
        stream = await trio.open_unix_socket(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise QmpGoneError(f"no QEMU at {path}: {error.strerror}") from error
    except OSError as error:
        raise QmpError(f"cannot connect to QEMU at {path}: {error.strerror}") from error
    async with stream:
        client = QmpClient(stream, timeout_s)
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await client.greet()
        except trio.TooSlowError:
            text = f"QEMU at {path} does not greet: is another program connected to its QMP socket?"
            raise QmpError(text) from None
        yield client
