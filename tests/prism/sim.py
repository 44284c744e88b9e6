# SPDX-License-Identifier: AGPL-3.0-or-later
"""The client by v4 against the simulator's core: its handlers behind the scripted server, so that a test sees every request
and can stand between.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from replicator.prism.endpoint import Hosts
from replicator.prism.settings import Waits
from replicator.prism.v4 import PrismV4
from replicator.simulator.core import Core, open_core
from replicator.simulator.guest import Guest
from replicator.simulator.v4.routes import authenticate_jwt, build_v4, render_error
from replicator.simulator.web import HttpError, Reply, Request
from tests.prism.lab import PC, Asked, Said, Script, settings
from tests.simulator_v4.lab import ADMIN, APP, BASE, CLUSTER_A, fill_disks, make_world

PE_A = "127.9.9.20"
#: Nothing here is slow, but what is waited for must not be waited for long.
QUICK = Waits(poll_s=(0.01, 0.02, 0.05), conflict_s=0.01, settle_s=3.0, retry_s=20.0)

#: Answers in place of the simulator, or None.
Between = Callable[[Asked], Awaitable[Said | None]]


class Lab:
    """A simulated Prism Central with a client of it. ``between`` may answer in its place."""

    def __init__(self, core: Core, script: Script, hosts: Hosts) -> None:
        self.core = core
        self.script = script
        self.hosts = hosts
        self.prism = PrismV4(hosts)
        self.between: Between | None = None
        self.user = core.world.users[ADMIN]
        self._routers = build_v4(core)
        #: The clusters whose Elements have these names.
        self.names = {cluster.address: uuid for uuid, cluster in core.world.clusters.items()}

    def guest(self, index: int) -> Guest:
        return Guest(self.core, APP, index)

    async def answer(self, asked: Asked) -> Said:
        if self.between is not None:
            said = await self.between(asked)
            if said is not None:
                return said
        request = Request(
            method=asked.method,
            path=asked.path,
            query=asked.query,
            headers=asked.headers,
            body=asked.raw,
            cluster=self.names.get(asked.host),
            user=self.user,
            base_url=BASE,
        )
        try:
            reply = await self._reply(request)
        except HttpError as error:
            reply = render_error(request, error)
        body = reply.raw if reply.raw is not None else reply.body
        headers = {key.lower(): value for key, value in reply.headers.items()}
        return Said(reply.status, body, {"content-type": reply.content_type, **headers})

    async def _reply(self, request: Request) -> Reply:
        if request.cluster is not None:
            _, _, token = request.headers["cookie"].partition("=")
            assert "authorization" not in request.headers
            try:
                user = authenticate_jwt(self.core, request.path, token, request.cluster)
            except HttpError as error:
                return Reply(error.status, {"message": error.message})
            assert user is not None
        found = self._routers["element" if request.cluster else "pc"].find(
            request.method, request.path
        )
        if found is None:
            return Reply(404, raw=b"<html>", content_type="text/html")
        route, arguments = found
        roles = self.core.world.roles.values()
        (role,) = (role for role in roles if self.user.role in {role.uuid, role.name})
        if route.permission is not None and not {"*", route.permission} & set(role.operations):
            raise HttpError(403, "not allowed", "forbidden", route.permission)
        return await route.handler(request, **arguments)


@asynccontextmanager
async def simulated(tmp_path: Path, **changes: Any) -> AsyncGenerator[Lab, None]:
    """A Prism Central with two clusters, and a client; ``changes``: of the client's settings."""
    async with (
        open_core(tmp_path / "sim", make_world, prepare=fill_disks) as core,
        trio.open_nursery() as nursery,
    ):
        lab: Lab | None = None

        async def handler(asked: Asked) -> Said:
            assert lab is not None
            return await lab.answer(asked)

        script = Script(nursery, handler, PC, PE_A, "pe.example.test")
        given = {"waits": QUICK, **changes}
        lab = Lab(core, script, Hosts(settings(tmp_path, **given), dial=script.dial))
        try:
            yield lab
        finally:
            await lab.prism.aclose()
            nursery.cancel_scope.cancel()


def once(pattern: str, said: Said, *, times: int = 1) -> Between:
    """Answers the first ``times`` requests whose line has ``pattern`` with ``said``."""
    left = times

    async def between(asked: Asked) -> Said | None:
        nonlocal left
        await trio.lowlevel.checkpoint()
        if left and pattern in f"{asked.method} {asked.path}":
            left -= 1
            return said
        return None

    return between


def v4_error(code: str, group: str, message: str = "no") -> dict[str, Any]:
    """A body that is an error."""
    return {"data": {"error": [{"message": message, "code": code, "errorGroup": group}]}}


__all__ = ["APP", "CLUSTER_A", "QUICK", "Lab", "once", "simulated", "v4_error"]
