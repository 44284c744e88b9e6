# SPDX-License-Identifier: AGPL-3.0-or-later
"""A whole simulator for tests, small and quick to start, and a client that speaks HTTPS to it."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h11
import trio

from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from tests.limits import HANG_S

MIB = 1 << 20


def small_scenario(**changes: Any) -> Scenario:
    """``app01`` with disks of 16 and 8 MiB, of which 2 MiB are written, and a CD-ROM."""
    disks = [DiskSpec(size=16 * MIB, data=2 * MIB), DiskSpec(size=8 * MIB, data=2 * MIB)]
    values: dict[str, Any] = {"vms": [VmSpec(name="app01", disks=disks, cdrom=True)]}
    return Scenario(**(values | changes))


@asynccontextmanager
async def small_simulator(directory: Path, **changes: Any) -> AsyncIterator[Simulator]:
    async with running_simulator(directory, small_scenario(**changes)) as simulator:
        yield simulator


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, kept alive. ``user`` None: no basic authentication."""

    def __init__(
        self, simulator: Simulator, user: str | None = "admin", host: str | None = None
    ) -> None:
        self._simulator = simulator
        self._host = host or simulator.address
        self._headers = [("Host", f"{self._host}:{simulator.port}")]
        if user is not None:
            pair = f"{user}:{simulator.password(user)}".encode()
            self._headers.append(("Authorization", "Basic " + base64.b64encode(pair).decode()))
        self._stream: trio.SSLStream[trio.SocketStream] | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context(cafile=str(self._simulator.ca_path))
        tcp = await trio.open_tcp_stream(self._host, self._simulator.port)
        self._stream = trio.SSLStream(
            tcp, context, server_hostname=self._host, https_compatible=True
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._stream is not None
        await trio.aclose_forcefully(self._stream)

    async def ask(
        self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a request and read its answer. Raises trio.BrokenResourceError where the connection was cut."""
        assert self._stream is not None
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        given = [*self._headers, *(headers or {}).items(), ("Content-Length", str(len(data)))]
        http = self._http
        with trio.fail_after(HANG_S):
            for event in (
                h11.Request(method=method, target=target, headers=given),
                h11.Data(data=data),
                h11.EndOfMessage(),
            ):
                await self._stream.send_all(http.send(event) or b"")
            answer = await self._answer()
        if http.our_state is h11.DONE and http.their_state is h11.DONE:
            http.start_next_cycle()
        return answer

    async def _answer(self) -> Answer:
        assert self._stream is not None
        status, headers, body = 0, {}, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                data = await self._stream.receive_some(65536)
                if not data and not status:
                    raise trio.BrokenResourceError("closed without an answer")
                self._http.receive_data(bytes(data))
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, headers, body)
