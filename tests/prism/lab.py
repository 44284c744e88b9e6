# SPDX-License-Identifier: AGPL-3.0-or-later
"""A scripted HTTPS server for the client's tests: over pipes in memory, where time can be jumped, or over sockets."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import h11
import msgspec
import trio
import trio.testing
import trustme

from replicator.prism.endpoint import Hosts
from replicator.prism.settings import Account, PrismSettings, Waits

PC = "prism.example.test"
PE = "198.51.100.20"


@dataclass(frozen=True)
class Asked:
    """A request as the server saw it. ``path`` is decoded; ``target`` is not."""

    host: str
    method: str
    target: str
    headers: dict[str, str]
    raw: bytes

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.raw)


@dataclass(frozen=True)
class Said:
    """An answer. ``cut``: the connection ends in its place; ``body``: what becomes JSON, or bytes as they are."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    cookies: tuple[str, ...] = ()
    close: bool = False


Handler = Callable[[Asked], Awaitable[Said]]


@lru_cache
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(*names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert(*names).configure_cert(context)
    return context


def ca_file(folder: Path) -> Path:
    path = folder / "ca.pem"
    authority().cert_pem.write_to_path(path)
    return path


class Script:
    """A server that answers as ``handler`` says, and remembers what it was asked. ``dial`` is for the client."""

    def __init__(self, nursery: trio.Nursery, handler: Handler, *names: str) -> None:
        self._nursery = nursery
        self._tls = server_tls(*(names or (PC, PE)))
        self.handler = handler
        self.asked: list[Asked] = []
        self.connections = 0

    async def dial(self, host: str, port: int) -> trio.abc.Stream:
        assert port == 9440
        self.connections += 1
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self.serve, theirs, host)
        return ours

    async def serve(self, plain: trio.abc.Stream, host: str) -> None:
        stream = trio.SSLStream(plain, self._tls, server_side=True, https_compatible=True)
        try:
            await self._serve(stream, host)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has gone
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.abc.Stream, host: str) -> None:
        http = h11.Connection(h11.SERVER)
        while True:
            asked = await _receive(http, stream, host)
            if asked is None:
                return
            self.asked.append(asked)
            said = await self.handler(asked)
            if said.cut:
                return
            await stream.send_all(_answer(http, said))
            if said.close or http.our_state is not h11.DONE:
                return
            http.start_next_cycle()

    def count(self, text: str) -> int:
        """How many requests had this in their line."""
        return sum(text in f"{asked.method} {asked.path}" for asked in self.asked)


async def _receive(http: h11.Connection, stream: trio.abc.Stream, host: str) -> Asked | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {name.decode(): value.decode() for name, value in head.headers}
            return Asked(host, head.method.decode(), head.target.decode(), headers, bytes(body))
        else:
            return None


def _answer(http: h11.Connection, said: Said) -> bytes:
    body = said.body if isinstance(said.body, bytes) else msgspec.json.encode(said.body)
    if said.body is None:
        body = b""
    headers = {"content-type": "application/json", "content-length": str(len(body)), **said.headers}
    if said.close:
        headers["connection"] = "close"
    fields = [*headers.items(), *(("set-cookie", cookie) for cookie in said.cookies)]
    data = http.send(h11.Response(status_code=said.status, headers=fields)) or b""
    data += http.send(h11.Data(data=body)) or b""
    return data + (http.send(h11.EndOfMessage()) or b"")


@asynccontextmanager
async def scripted(
    tmp_path: Path, handler: Handler, **changes: Any
) -> AsyncGenerator[tuple[Script, Hosts], None]:
    """A server, and a client's hosts that reach it in memory. ``changes``: of the settings."""
    async with trio.open_nursery() as nursery:
        script = Script(nursery, handler)
        hosts = Hosts(settings(tmp_path, **changes), dial=script.dial)
        try:
            yield script, hosts
        finally:
            await hosts.aclose()
            nursery.cancel_scope.cancel()


def settings(tmp_path: Path, **changes: Any) -> PrismSettings:
    given: dict[str, Any] = {
        "host": PC,
        "account": Account("svc-dr", "pass:word-of-svc"),
        "ca": ca_file(tmp_path),
        "rate_rpm": 6000,
        "waits": Waits(),
        **changes,
    }
    return PrismSettings(**given)


def in_turn(*answers: Said) -> Handler:
    """Answers one after the other, the last one again and again."""
    left = list(answers)

    async def handler(_: Asked) -> Said:
        await trio.lowlevel.checkpoint()
        return left.pop(0) if len(left) > 1 else left[0]

    return handler
