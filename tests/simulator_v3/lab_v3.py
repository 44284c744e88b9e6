# SPDX-License-Identifier: AGPL-3.0-or-later
"""A simulator with a client of v3 for Prism Central and one for an Element; every answer is held against the schema."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from replicator.simulator.model import Cluster, Vm
from replicator.simulator.running import Simulator
from tests.limits import HANG_S
from tests.simulator.lab import Answer, Client, small_simulator
from tests.simulator_v3 import schema

V3 = "/api/nutanix/v3"
V2 = "/PrismGateway/services/rest/v2.0"
MIB = 1 << 20
INITIATOR = "iqn.2026-01.org.example:dr-service-01"
SECRET = "Tq8sN2vLx5Rz"


@dataclass(frozen=True, slots=True)
class Lab:
    """``pc`` and ``pe`` are clients of Prism Central and of cluster-a's Element."""

    simulator: Simulator
    pc: Client
    pe: Client

    @property
    def vm(self) -> Vm:
        return self.simulator.vm("app01")

    @property
    def cluster(self) -> Cluster:
        return self.simulator.cluster("cluster-a")

    async def v3(  # noqa: PLR0917 - a call reads as one line
        self,
        client: Client,
        method: str,
        path: str,
        body: Any = None,
        kind: str = "",
        status: int = 200,
    ) -> Any:
        """The answer, which must have this status and be of this kind; an error, of the schema's."""
        answer = await client.ask(method, V3 + path, body)
        assert answer.status == status, (answer.status, answer.body[:400])
        schema.check(answer.json, kind if status < 400 else "error")
        if status >= 400:
            assert answer.json["code"] == status
        return answer.json

    async def refused(  # noqa: PLR0917 - the same
        self, client: Client, method: str, path: str, body: Any, status: int, reason: str
    ) -> str:
        """The message of an error with this status and reason."""
        answer = await self.v3(client, method, path, body, status=status)
        [message] = answer["message_list"]
        assert message["reason"] == reason
        return str(message["message"])

    async def v2(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """The answer of the Element's v2.0."""
        answer = await self.pe.ask(method, V2 + path, body)
        assert answer.status == status, (answer.status, answer.body[:400])
        return answer.json

    async def task(
        self, answer: dict[str, Any], client: Client | None = None, status: str = "SUCCEEDED"
    ) -> Any:
        """The task of an accepted change, once it has ended in this way."""
        uuid = (
            answer["status"]["execution_context"]["task_uuid"]
            if "status" in answer
            else answer["task_uuid"]
        )
        with trio.fail_after(HANG_S):
            while True:
                body = {"poll_timeout_seconds": 30, "task_uuid_list": [uuid]}
                polled = await self.v3(
                    client or self.pc, "POST", "/tasks/poll", body, "task_poll_response"
                )
                if not polled["has_poll_timed_out"]:
                    [task] = polled["entities"]
                    assert task["status"] == status, task
                    return task

    async def snapshot(self, name: str, **spec: Any) -> dict[str, Any]:
        """A snapshot on the Element that is COMPLETE."""
        body = {
            "api_version": "3.1",
            "metadata": {"kind": "vm_snapshot"},
            "spec": {"name": name, "resources": {"entity_uuid": self.vm.uuid}, **spec},
        }
        made = await self.v3(self.pe, "POST", "/vm_snapshots", body, "accepted_vm_snapshot", 202)
        await self.task(made, self.pe)
        uuid = made["metadata"]["uuid"]
        found: dict[str, Any] = await self.v3(
            self.pe, "GET", f"/vm_snapshots/{uuid}", kind="vm_snapshot_response"
        )
        assert found["status"]["state"] == "COMPLETE"
        return found

    async def paths(self, snapshot: dict[str, Any]) -> dict[str, str]:
        """The snapshot's files by vmdisk id, of the VM's data disks alone; joined as a client does it, through v2.0."""
        config = await self.v2("GET", f"/vms/{self.vm.uuid}?include_vm_disk_config=true")
        disks = {
            each["disk_address"]["vmdisk_uuid"]
            for each in config["vm_disk_info"]
            if not each["is_cdrom"]
        }
        files = {
            each["file_path"].rpartition("/")[2]: each["snapshot_file_path"]
            for each in snapshot["status"]["snapshot_file_list"]
        }
        return {uuid: path for uuid, path in files.items() if uuid in disks}

    async def regions(
        self, path: str, reference: str | None = None
    ) -> tuple[int, list[tuple[int, int, str]]]:
        """All pages of a file's changed regions, and its size."""
        found, start, size = [], 0, 0
        while True:
            body: dict[str, Any] = {"snapshot_file_path": path, "start_offset": start}
            if reference is not None:
                body["reference_snapshot_file_path"] = reference
            page = await self.v3(self.pe, "POST", "/data/changed_regions", body, "changed_regions")
            found += [(r["offset"], r["length"], r["type"]) for r in page["region_list"]]
            size = page["file_size"]
            if not page.get("next_offset"):
                return size, found
            assert page["next_offset"] > start
            start = page["next_offset"]


@asynccontextmanager
async def running(directory: Path, **changes: Any) -> AsyncIterator[Lab]:
    async with small_simulator(directory, **changes) as simulator:
        element = simulator.cluster("cluster-a").address
        async with Client(simulator) as pc, Client(simulator, host=element) as pe:
            yield Lab(simulator, pc, pe)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = ["INITIATOR", "MIB", "SECRET", "V2", "V3", "Answer", "Client", "Lab", "digest", "running"]
