# SPDX-License-Identifier: AGPL-3.0-or-later
"""``vm_recovery_points`` of Prism Central: they hold the VM's configuration, and give no file paths."""

from __future__ import annotations

import time

from replicator.simulator.model import Snapshot
from replicator.simulator.v3 import vm_spec
from replicator.simulator.v3.checks import InvalidError, check, check_uuid
from replicator.simulator.v3.envelope import V3, Json, Listing, list_reply, seconds_of, stamp
from replicator.simulator.v3.shapes import recovery_point, recovery_point_restore
from replicator.simulator.web import HttpError, Reply, Request

_ATTRIBUTES = frozenset({"name", "uuid", "parent_vm_uuid"})


class RecoveryPoints:
    """Handlers."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    async def create(self, request: Request, uuid: str) -> Reply:
        """POST /vms/{uuid}/snapshot."""
        if check_uuid(uuid) not in self._v3.world.vms:
            raise HttpError(404, f"the vm {uuid} was not found", "not_found")
        body = check(request.json(), recovery_point)
        expires_at = seconds_of(body["expiration_time"]) if "expiration_time" in body else None
        if expires_at is not None and expires_at <= time.time():
            raise InvalidError("expiration_time is in the past")
        task = self._v3.core.create_snapshot(
            body.get("name", f"{self._v3.world.vms[uuid].name}-{stamp(time.time())}"),
            [uuid],
            application_consistent=body.get("recovery_point_type") == "APPLICATION_CONSISTENT",
            expires_at=expires_at,
            element=False,
            uuid=body.get("vm_recovery_point_uuid"),
            **self._v3.common(request),
        )
        return Reply(202, {"task_uuid": task.uuid})

    async def _find(self, uuid: str) -> Snapshot:
        found = await self._v3.core.find_snapshot(check_uuid(uuid))
        if found.element:
            raise HttpError(404, f"the vm_recovery_point {uuid} was not found", "not_found")
        return found

    def body(self, found: Snapshot) -> Json:
        """A recovery point as v3 writes it down."""
        part = found.vms[0]
        config = part.config
        resources: Json = {
            "source_cluster_reference": self._v3.cluster_reference(found.cluster),
            "parent_vm_reference": {"kind": "vm", "uuid": part.vm, "name": config.name},
            "recovery_point_type": "APPLICATION_CONSISTENT"
            if found.application_consistent
            else "CRASH_CONSISTENT",
            "creation_time": stamp(found.created_at),
            "vm_recovery_point_location_agnostic_uuid": found.uuid,
        }
        if found.expires_at is not None:
            resources["expiration_time"] = stamp(found.expires_at)
        shared = {
            "name": found.name,
            "cluster_reference": self._v3.cluster_reference(found.cluster),
        }
        status = {
            **shared,
            "state": "COMPLETE",
            "resources": {
                **resources,
                "consistency_group_uuid": part.uuid,
                "recoverability": {"status": "RECOVERABLE", "reason": ""},
                "vm_spec": vm_spec.spec_body(self._v3, config),
                "vm_metadata": self._v3.metadata("vm", config, config.categories),
            },
        }
        metadata = self._v3.metadata("vm_recovery_point", found)
        return {"status": status, "spec": {**shared, "resources": resources}, "metadata": metadata}

    async def get(self, request: Request, uuid: str) -> Reply:
        """GET /vm_recovery_points/{uuid}."""
        del request
        return self._v3.entity_reply(self.body(await self._find(uuid)))

    async def list_all(self, request: Request) -> Reply:
        """POST /vm_recovery_points/list: those of one VM each."""
        here = [s for s in self._v3.world.snapshots.values() if not s.element and len(s.vms) == 1]
        listing = Listing("vm_recovery_point", _ATTRIBUTES, _describe, self.body)
        return await list_reply(request, here, listing)

    async def delete(self, request: Request, uuid: str) -> Reply:
        """DELETE /vm_recovery_points/{uuid}."""
        found = await self._find(uuid)
        task = self._v3.core.delete_snapshot(found.uuid, **self._v3.common(request))
        return self._v3.deleted("vm_recovery_point", uuid, task)

    async def restore(self, request: Request, uuid: str) -> Reply:
        """POST /vm_recovery_points/{uuid}/restore: a new VM that is off."""
        found = await self._find(uuid)
        body = check(request.json(), recovery_point_restore)
        name = body.get("vm_override_spec", {}).get("name")
        task = self._v3.core.restore_snapshot(
            found.uuid, found.vms[0].uuid, name, **self._v3.common(request)
        )
        return Reply(202, {"task_uuid": task.uuid})


def _describe(snapshot: Snapshot) -> Json:
    return {"uuid": snapshot.uuid, "name": snapshot.name, "parent_vm_uuid": snapshot.vms[0].vm}
