# SPDX-License-Identifier: AGPL-3.0-or-later
"""A core with a small world, and v4 asked without any socket: what the server would do, done here."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import msgspec
import trio
import trio.testing

from replicator.simulator.core import Core, open_core
from replicator.simulator.model import (
    Cluster,
    Container,
    Disk,
    Nic,
    Role,
    Subnet,
    User,
    Vm,
    World,
)
from replicator.simulator.v4.permissions import OPERATIONS
from replicator.simulator.v4.routes import authenticate_jwt, build_v4, render_error
from replicator.simulator.web import HttpError, Reply, Request
from tests.limits import HANG_S

MIB = 1 << 20
CLUSTER_A = "0005b6f1-0000-0000-0000-0000000000aa"
CLUSTER_B = "0005b6f1-0000-0000-0000-0000000000bb"
CENTRAL = "0005b6f1-0000-0000-0000-0000000000cc"
APP = "11111111-1111-4111-8111-111111111111"
SYSTEM_DISK = "d0000000-0000-4000-8000-000000000000"
DATA_DISK = "d1000000-0000-4000-8000-000000000000"
DRIVE = "cd000000-0000-4000-8000-000000000000"
CONTAINER_A = "c0000000-0000-4000-8000-00000000000a"
CONTAINER_B = "c0000000-0000-4000-8000-00000000000b"
VLAN10 = "50000000-0000-4000-8000-00000000000a"
ISOLATED = "50000000-0000-4000-8000-00000000000b"
NIC = "90000000-0000-4000-8000-000000000000"
ADMIN = "a0000000-0000-4000-8000-000000000000"
VIEWER = "a1000000-0000-4000-8000-000000000000"
BASE = "https://127.9.9.1:9440"


def make_world() -> World:
    vm = Vm(
        uuid=APP,
        name="app01",
        cluster=CLUSTER_A,
        power="ON",
        version=1,
        machine="Q35",
        boot={"type": "UEFI"},
        tools=True,
        disks=[
            Disk(uuid=SYSTEM_DISK, backing=str(uuid4()), size=4 * MIB, container=CONTAINER_A),
            Disk(
                uuid=DATA_DISK, backing=str(uuid4()), index=1, size=2 * MIB, container=CONTAINER_A
            ),
            Disk(uuid=DRIVE, backing=None, bus="SATA", cdrom=True),
        ],
        nics=[Nic(uuid=NIC, subnet=VLAN10, mac="50:6b:8d:00:00:01")],
    )
    small = {
        uuid: Vm(uuid=uuid, name=f"small{number:02d}", cluster=CLUSTER_B, version=1)
        for number in range(5)
        for uuid in [f"22222222-2222-4222-8222-{number:012d}"]
    }
    super_admin = Role(uuid=str(uuid4()), name="Super Admin", operations=["*"])
    viewing = [name for name in OPERATIONS if name.startswith("View_")]
    viewer = Role(uuid=str(uuid4()), name="Prism Viewer", operations=viewing)
    return World(
        central=CENTRAL,
        address="127.9.9.1",
        clusters={
            CLUSTER_A: Cluster(
                uuid=CLUSTER_A,
                name="cluster-a",
                address="127.9.9.20",
                data_services="127.9.9.21",
                cvms=["127.9.9.31", "127.9.9.32"],
            ),
            CLUSTER_B: Cluster(
                uuid=CLUSTER_B, name="cluster-b", address="127.9.9.40", data_services=None
            ),
        },
        containers={
            uuid: Container(uuid=uuid, name="default-container", cluster=cluster)
            for uuid, cluster in ((CONTAINER_A, CLUSTER_A), (CONTAINER_B, CLUSTER_B))
        },
        subnets={
            VLAN10: Subnet(uuid=VLAN10, name="vlan10", cluster=CLUSTER_A, vlan=10),
            ISOLATED: Subnet(uuid=ISOLATED, name="isolated", cluster=CLUSTER_A, uplink=False),
        },
        vms={APP: vm, **small},
        users={
            ADMIN: User(uuid=ADMIN, name="admin", role=super_admin.uuid),
            VIEWER: User(uuid=VIEWER, name="looker", role=viewer.uuid),
        },
        roles={role.uuid: role for role in (super_admin, viewer)},
    )


def fill_disks(core: Core) -> None:
    for vm in core.world.vms.values():
        for disk in vm.disks:
            if disk.backing is not None:
                path = core.storage.disk(disk.backing)
                with path.open("wb") as file:
                    file.truncate(disk.size)
                    file.seek(MIB)
                    file.write(b"A" * 65536)


@dataclass(frozen=True)
class Answer:
    """What came back; ``json`` is None where the body was no JSON."""

    status: int
    json: Any
    headers: dict[str, str]
    raw: bytes | None = None

    @property
    def data(self) -> Any:
        return self.json.get("data")

    @property
    def code(self) -> str:
        error = self.json["data"]["error"]
        return str(error[0]["code"]) if isinstance(error, list) else "SCHEMA"

    @property
    def extra(self) -> dict[str, Any]:
        return {pair["name"]: pair["value"] for pair in self.json["metadata"]["extraInfo"]}


class Asker:
    """Asks v4 of a core as one user, as the server would."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.routers = build_v4(core)
        self.user = core.world.users[ADMIN]

    async def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        match: str | None = None,
        request_id: str | None = "",
        cluster: str | None = None,
        token: str = "",
        **query: str | int,
    ) -> Answer:
        """``request_id``: "" for a new one, None for none. Names in the query are written without their ``$``."""
        headers = {"if-match": match} if match is not None else {}
        if request_id is not None:
            headers["ntnx-request-id"] = request_id or str(uuid4())
        if token:
            headers["cookie"] = f"NTNX_IGW_SESSION={token}"
        request = Request(
            method=method,
            path=path,
            query={f"${name}": str(value) for name, value in query.items()},
            headers=headers,
            body=msgspec.json.encode(body) if body is not None else b"",
            cluster=cluster,
            user=self.user,
            base_url=BASE,
        )
        try:
            found = self.routers["element" if cluster else "pc"].find(method, path)
            if found is None:
                return Answer(404, None, {})
            route, arguments = found
            reply = await route.handler(request, **arguments)
        except HttpError as error:
            reply = render_error(request, error)
        return _answer(reply)

    async def element(self, path: str, body: Any, token: str, cluster: str = CLUSTER_A) -> Answer:
        """A POST to an Element, with the token that Prism Central gave."""
        try:
            user = authenticate_jwt(self.core, path, token, cluster)
        except HttpError as error:
            return Answer(error.status, {"message": error.message}, {})
        if user is None:
            return Answer(401, None, {})
        return await self("POST", path, body, cluster=cluster, token=token)

    async def tag(self, path: str) -> str:
        """The ETag that a GET of this path gives."""
        answer = await self("GET", path)
        assert answer.status == 200
        return answer.headers["ETag"]

    async def done(self, answer: Answer, status: str = "SUCCEEDED") -> dict[str, Any]:
        """The task of an answer, once it has ended in this way."""
        task = await self.ended(answer)
        assert task["status"] == status, task
        return task

    async def ended(self, answer: Answer) -> dict[str, Any]:
        """The task of an answer, once it has ended."""
        assert answer.status == 202, answer.json
        uuid = answer.data["extId"]
        with trio.fail_after(HANG_S):
            while True:
                task: dict[str, Any] = (
                    await self("GET", f"/api/prism/v4.0/config/tasks/{uuid}")
                ).data
                if task["status"] in {"SUCCEEDED", "FAILED"}:
                    return task
                # Files are copied in threads: let them.
                await trio.testing.wait_all_tasks_blocked(0.001)

    async def snapshot(self, name: str = "rp", **more: Any) -> dict[str, Any]:
        """A recovery point of app01."""
        path = "/api/dataprotection/v4.0/config/recovery-points"
        body = {"name": name, "vmRecoveryPoints": [{"vmExtId": APP}], **more}
        task = await self.done(await self("POST", path, body))
        uuid = entity(task, "dataprotection:config:recovery-point")
        found: dict[str, Any] = (await self("GET", f"{path}/{uuid}")).data
        return found


def entity(task: dict[str, Any], relation: str) -> str:
    """The id of what a task worked on."""
    return next(str(e["extId"]) for e in task["entitiesAffected"] if e["rel"] == relation)


def disk_points(point: dict[str, Any]) -> dict[str, str]:
    """Disk recovery points by disk."""
    parts = point["vmRecoveryPoints"][0]["diskRecoveryPoints"]
    return {part["diskExtId"]: part["diskRecoveryPointExtId"] for part in parts}


def _answer(reply: Reply) -> Answer:
    decoded = None
    if reply.raw is None and reply.body is not None:
        decoded = msgspec.json.decode(msgspec.json.encode(reply.body))
    return Answer(reply.status, decoded, reply.headers, reply.raw)


@asynccontextmanager
async def asker(directory: Path) -> AsyncIterator[Asker]:
    """A core on a directory, and who asks it."""
    async with open_core(directory, make_world, prepare=fill_disks) as core:
        yield Asker(core)


def encoded(path: str) -> str:
    """A path segment as the SDKs write it."""
    return quote(path, safe="")


def is_uuid(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) is not None
