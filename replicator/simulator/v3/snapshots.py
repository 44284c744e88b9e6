# SPDX-License-Identifier: AGPL-3.0-or-later
"""``vm_snapshots`` and ``data/changed_regions`` of an Element, and the identifiers that make a snapshot's creation repeatable."""

from __future__ import annotations

import time
from uuid import uuid4

from replicator.simulator.model import Snapshot
from replicator.simulator.sources import find_path, live_path
from replicator.simulator.v3.checks import InvalidError, check, check_uuid
from replicator.simulator.v3.envelope import (
    API_VERSION,
    V3,
    Intent,
    Json,
    Listing,
    list_reply,
    stamp,
)
from replicator.simulator.v3.shapes import changed_regions, idempotence, intent, vm_snapshot
from replicator.simulator.web import HttpError, Reply, Request

_BODY = intent("vm_snapshot", vm_snapshot)
_ATTRIBUTES = frozenset({"entity_uuid", "name", "uuid"})
_IDENTIFIERS_MAX = 10_000
#: The server's own block of changed regions, in bytes.
BLOCK = 65536


class Snapshots:
    """Handlers; ``request.cluster`` is always an Element's."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    async def create(self, request: Request) -> Reply:
        """POST /vm_snapshots: again with the same id and spec, it is the same snapshot."""
        body = check(request.json(), _BODY)
        spec = body["spec"]
        uuid = body["metadata"].get("uuid") or str(uuid4())
        known = self._v3.intent("vm_snapshot", uuid)
        if known is not None and known.what == "create" and known.spec == spec and not known.failed:
            return self._v3.accepted(known)
        vm = self._v3.world.vms.get(spec["resources"]["entity_uuid"])
        if vm is None or vm.cluster != request.cluster:
            raise HttpError(
                404, f"the vm {spec['resources']['entity_uuid']} was not found", "not_found"
            )
        expires_msecs = spec.get("expiration_time_msecs")
        if expires_msecs is not None and expires_msecs <= time.time() * 1000:
            raise InvalidError("spec.expiration_time_msecs is in the past")
        task = self._v3.core.create_snapshot(
            spec["name"],
            [vm.uuid],
            application_consistent=spec.get("snapshot_type") == "APPLICATION_CONSISTENT",
            expires_at=None if expires_msecs is None else expires_msecs / 1000,
            element=True,
            uuid=uuid,
            **self._v3.common(request),
        )
        return self._v3.accepted(self._v3.remember("vm_snapshot", uuid, "create", spec, task))

    async def _find(self, request: Request, uuid: str) -> Snapshot:
        found = await self._v3.core.find_snapshot(check_uuid(uuid))
        if not found.element or found.cluster != request.cluster:
            raise HttpError(404, f"the vm_snapshot {uuid} was not found", "not_found")
        return found

    async def get(self, request: Request, uuid: str) -> Reply:
        """GET /vm_snapshots/{uuid}: the files are in ``status``, once it is COMPLETE."""
        if check_uuid(uuid) not in self._v3.world.snapshots:
            return Reply(200, self._unmade(uuid))
        return self._v3.entity_reply(self.body(await self._find(request, uuid)))

    def _unmade(self, uuid: str) -> Json:
        body = self._v3.unmade("vm_snapshot", uuid)
        known = self._v3.intent("vm_snapshot", uuid)
        assert isinstance(known, Intent)
        body["status"] |= {
            "resources": known.spec["resources"],
            "snapshot_type": known.spec.get("snapshot_type", "CRASH_CONSISTENT"),
            "snapshot_file_list": [],
        }
        return body

    def body(self, found: Snapshot) -> Json:
        """A snapshot as v3 writes it down: no configuration of the VM, and CD-ROMs are among its files."""
        part = found.vms[0]
        spec: Json = {
            "name": found.name,
            "snapshot_type": "APPLICATION_CONSISTENT"
            if found.application_consistent
            else "CRASH_CONSISTENT",
            "resources": {"entity_uuid": part.vm},
        }
        if found.expires_at is not None:
            spec["expiration_time_msecs"] = round(found.expires_at * 1000)
        files = [
            {
                "file_path": live_path(self._v3.world, disk.backing, disk.container),
                "snapshot_file_path": self._v3.core.snapshot_path(disk.uuid),
            }
            for disk in part.disks
        ]
        status = {
            **spec,
            "state": self._v3.state("vm_snapshot", found.uuid),
            "consistency_group_uuid": part.uuid,
            "location_agnostic_uuid": found.uuid,
            "message_list": [],
            "snapshot_file_list": files,
            **self._v3.execution_context(found.uuid),
        }
        if (
            status["state"] == "PENDING"
        ):  # its expiry is being changed: the snapshot itself is complete
            status["state"] = "COMPLETE"
        metadata = {
            "kind": "vm_snapshot",
            "uuid": found.uuid,
            "spec_version": max(found.version - 1, 0),
            "creation_time": stamp(found.created_at),
            "last_update_time": stamp(found.updated_at),
            "categories": {},
        }
        return {"metadata": metadata, "spec": spec, "status": status}

    async def list_all(self, request: Request) -> Reply:
        """POST /vm_snapshots/list."""
        here = [
            s
            for s in self._v3.world.snapshots.values()
            if s.element and s.cluster == request.cluster
        ]
        listing = Listing("vm_snapshot", _ATTRIBUTES, _describe, self.body)
        return await list_reply(request, here, listing)

    async def update(self, request: Request, uuid: str) -> Reply:
        """PUT /vm_snapshots/{uuid}: only the expiration can be changed."""
        found = await self._find(request, uuid)
        body = check(request.json(), _BODY)
        self._v3.check_version("vm_snapshot", found, body["metadata"])
        expires_msecs = body["spec"].get("expiration_time_msecs")
        if expires_msecs is not None and expires_msecs <= time.time() * 1000:
            raise InvalidError("spec.expiration_time_msecs is in the past")
        expires_at = None if expires_msecs is None else expires_msecs / 1000
        task = self._v3.core.set_expiration(found.uuid, expires_at, **self._v3.common(request))
        made = self._v3.remember("vm_snapshot", uuid, "update", body["spec"], task)
        return self._v3.accepted(made, body["metadata"]["spec_version"])

    async def delete(self, request: Request, uuid: str) -> Reply:
        """DELETE /vm_snapshots/{uuid}."""
        found = await self._find(request, uuid)
        task = self._v3.core.delete_snapshot(found.uuid, **self._v3.common(request))
        return self._v3.deleted("vm_snapshot", uuid, task)

    async def changed_regions(self, request: Request) -> Reply:
        """POST /data/changed_regions: a page of what differs between two files of snapshots, or of what one holds."""
        body = check(request.json(), changed_regions)
        disk = await self._file(request, body["snapshot_file_path"])
        reference = None
        if body.get("reference_snapshot_file_path"):
            reference = await self._file(request, body["reference_snapshot_file_path"])
        block = int(self._v3.knob("v3_block_bytes", BLOCK))
        try:
            found, going_on, size = await self._v3.core.changed_regions(
                disk, reference, body.get("start_offset", 0), body.get("end_offset"), block
            )
        except HttpError as error:
            raise _unknown_file(error.message) from None
        word = str(self._v3.knob("v3_region_type_field", "type"))
        regions = [
            {
                "offset": at,
                "length": min(length, size - at),
                word: "ZEROED" if zeroed else "REGULAR",
            }
            for at, length, zeroed in found
        ]
        answer: Json = {"api_version": API_VERSION, "file_size": size, "region_list": regions}
        if going_on is not None:
            answer["next_offset"] = going_on
        return Reply(200, answer)

    async def _file(self, request: Request, path: str) -> str:
        """The snapshot disk that a path names. Raises HttpError 400, as an Element does."""
        try:
            snapshot, disk = find_path(self._v3.world, path)
            await self._v3.core.find_snapshot(snapshot.uuid)
        except HttpError:
            raise _unknown_file("kInvalidValue: snapshot file not found") from None
        if snapshot.cluster != request.cluster:
            raise _unknown_file("kInvalidValue: snapshot file not found")
        return disk.uuid

    async def new_identifiers(self, request: Request) -> Reply:
        """POST /idempotence_identifiers: ids to be used for what is made next."""
        body = check(request.json(), idempotence)
        minutes = body.get("valid_duration_in_minutes", 527_040)
        answer = {
            "client_identifier": body.get("client_identifier", str(uuid4())),
            "count": body["count"],
            "uuid_list": [str(uuid4()) for _ in range(body["count"])],
            "expiration_time": stamp(time.time() + minutes * 60),
        }
        known = self._v3.identifiers
        known[answer["client_identifier"]] = answer
        while len(known) > _IDENTIFIERS_MAX:
            known.popitem(last=False)
        return Reply(200, answer)

    def _identifiers(self, client: str) -> Json:
        found = self._v3.identifiers.get(client)
        if found is None:
            raise HttpError(404, f"the client identifier {client} was not found", "not_found")
        return found

    async def get_identifiers(self, request: Request, client: str) -> Reply:
        """GET /idempotence_identifiers/{client}."""
        del request
        return Reply(200, self._identifiers(client))

    async def delete_identifiers(self, request: Request, client: str) -> Reply:
        """DELETE /idempotence_identifiers/{client}."""
        del request
        self._identifiers(client)
        del self._v3.identifiers[client]
        return Reply(200, {})


def _unknown_file(message: str) -> HttpError:
    if "kInvalidValue" not in message:
        message = f"kInvalidValue: {message}"
    return HttpError(400, message, "not_found")


def _describe(snapshot: Snapshot) -> Json:
    return {
        "uuid": snapshot.uuid,
        "name": snapshot.name,
        "entity_uuid": [part.vm for part in snapshot.vms],
    }
