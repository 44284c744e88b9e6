# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs of v3: made, got, listed, changed, removed, cloned, powered; the first bytes of their disks."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import trio

from replicator.simulator.core_vms import How
from replicator.simulator.model import AffectedEntity, PowerState, Task, Vm
from replicator.simulator.v3 import vm_spec
from replicator.simulator.v3.checks import InvalidError, check, check_uuid
from replicator.simulator.v3.envelope import V3, Json, Listing, list_reply, spec_version
from replicator.simulator.v3.shapes import intent, power, vm, vm_clone
from replicator.simulator.web import HttpError, Reply, Request

#: What of a disk can be read through v3: the first 32 MiB, 16 at a time.
DATA_OFFSET_MAX = DATA_LENGTH_MAX = 16 << 20
_BODY = intent("vm", vm)
#: Imperative power calls: the state they end in and how they get there.
ACTIONS: dict[str, tuple[PowerState, How]] = {
    "acpi_shutdown": ("OFF", "acpi"),
    "guest_shutdown": ("OFF", "guest"),
    "acpi_reboot": ("ON", "acpi"),
    "guest_reboot": ("ON", "guest"),
    "reset": ("ON", "reset"),
    "power_cycle": ("ON", "cycle"),
}
_MECHANISMS: dict[str, How] = {"HARD": "hard", "ACPI": "acpi", "GUEST": "guest"}


class Vms:
    """Handlers."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    def _find(self, request: Request, uuid: str) -> Vm:
        found = self._v3.world.vms.get(check_uuid(uuid))
        if found is None or request.cluster not in (None, found.cluster):
            raise HttpError(404, f"the vm {uuid} was not found", "not_found")
        return found

    def body(self, found: Vm) -> Json:
        """A VM as v3 writes it down."""
        return {
            "status": vm_spec.status_body(self._v3, found),
            "spec": vm_spec.spec_body(self._v3, found),
            "metadata": self._v3.metadata("vm", found, found.categories),
        }

    async def get(self, request: Request, uuid: str) -> Reply:
        """GET /vms/{uuid}."""
        if check_uuid(uuid) not in self._v3.world.vms:
            return Reply(200, self._v3.unmade("vm", uuid))
        return self._v3.entity_reply(self.body(self._find(request, uuid)))

    async def list_all(self, request: Request) -> Reply:
        """POST /vms/list."""
        here = [v for v in self._v3.world.vms.values() if request.cluster in (None, v.cluster)]
        listing = Listing("vm", vm_spec.ATTRIBUTES, vm_spec.describe, self.body)
        return await list_reply(request, here, listing)

    async def create(self, request: Request) -> Reply:
        """POST /vms: a VM that is off, unless its spec says ON."""
        body = check(request.json(), _BODY)
        spec = body["spec"]
        cluster = spec.get("cluster_reference", {}).get("uuid") or request.cluster
        if cluster is None:
            raise InvalidError(
                "spec: 'cluster_reference' is a required property", "MISSING_ATTRIBUTE"
            )
        if cluster not in self._v3.world.clusters:
            raise HttpError(404, f"the cluster {cluster} was not found", "not_found")
        uuid = body["metadata"].get("uuid") or str(uuid4())
        if uuid in self._v3.world.vms:
            raise HttpError(409, f"there is a vm {uuid} already", "exists")
        made, disks = vm_spec.vm_from(self._v3, uuid, body, cluster)
        common = self._v3.common(request)
        if spec["resources"].get("power_state") == "ON":
            affected = AffectedEntity(kind="vm", uuid=uuid, name=made.name)
            parts = [
                partial(self._v3.core.create_vm, made, disks, **common),
                partial(self._v3.core.set_power, uuid, "ON", "hard", **common),
            ]
            task = self._v3.together("CreateVm", affected, parts, **common)
        else:
            task = self._v3.core.create_vm(made, disks, **common)
        return self._v3.accepted(self._v3.remember("vm", uuid, "create", spec, task))

    async def update(self, request: Request, uuid: str) -> Reply:
        """PUT /vms/{uuid}: the VM becomes what the spec says."""
        found = self._find(request, uuid)
        body = check(request.json(), _BODY)
        self._v3.check_version("vm", found, body["metadata"])
        spec = body["spec"]
        cluster = spec.get("cluster_reference", {}).get("uuid", found.cluster)
        if cluster != found.cluster:
            raise InvalidError(
                "spec.cluster_reference: a VM's cluster cannot be changed", "SPEC_UPDATE_ERROR"
            )
        parts = self._changes(found, body, self._v3.common(request))
        affected = AffectedEntity(kind="vm", uuid=uuid, name=found.name)
        version = spec_version(found)
        task = self._v3.together("UpdateVm", affected, parts, **self._v3.common(request))
        return self._v3.accepted(self._v3.remember("vm", uuid, "update", spec, task), version)

    def _changes(self, found: Vm, body: Json, common: dict[str, Any]) -> list[Callable[[], Task]]:
        """What has to be done, the power last where it turns on, first where it turns off."""
        core, resources = self._v3.core, body["spec"]["resources"]
        parts: list[Callable[[], Task]] = []
        changed = vm_spec.copy_of(found)
        vm_spec.apply(changed, body)
        if changed != found:
            parts.append(partial(core.update_vm, found.uuid, changed, **common))
        if "disk_list" in resources:
            parts += self._disk_changes(found, resources["disk_list"], common)
        if "nic_list" in resources:
            parts += self._nic_changes(found, resources["nic_list"], common)
        wanted = resources.get("power_state")
        if wanted is not None and wanted != ("OFF" if found.power == "OFF" else "ON"):
            mechanism = resources.get("power_state_mechanism", {}).get("mechanism", "HARD")
            # Turned on, a VM has no guest yet that could be asked.
            how = _MECHANISMS[mechanism] if wanted == "OFF" else "hard"
            change = partial(core.set_power, found.uuid, wanted, how, **common)
            parts.insert(0 if wanted == "OFF" else len(parts), change)
        return parts

    def _disk_changes(
        self, found: Vm, given: list[Json], common: dict[str, Any]
    ) -> list[Callable[[], Task]]:
        core = self._v3.core
        known = {disk.uuid: disk for disk in found.disks}
        kept = {each["uuid"] for each in given if "uuid" in each}
        if kept - known.keys():
            raise InvalidError(f"disk_list: the disk {min(kept - known.keys())} does not exist")
        parts: list[Callable[[], Task]] = [
            partial(core.remove_disk, found.uuid, uuid, **common)
            for uuid in known
            if uuid not in kept
        ]
        taken = {(disk.bus, disk.index) for disk in found.disks if disk.uuid in kept}
        for each in given:
            if "uuid" not in each:
                disk, source = vm_spec.disk_from(self._v3, each, taken)
                parts.append(partial(core.add_disk, found.uuid, disk, source, **common))
                continue
            old = known[each["uuid"]]
            size = each.get("disk_size_bytes", each.get("disk_size_mib", 0) * vm_spec.MIB)
            if 0 < size < old.size and each.get("disk_size_mib") != -(-old.size // vm_spec.MIB):
                raise InvalidError(f"disk_list: the disk {old.uuid} cannot shrink")
            if size > old.size and -(-size // vm_spec.MIB) != -(-old.size // vm_spec.MIB):
                parts.append(partial(core.resize_disk, found.uuid, old.uuid, size, **common))
        return parts

    def _nic_changes(
        self, found: Vm, given: list[Json], common: dict[str, Any]
    ) -> list[Callable[[], Task]]:
        core = self._v3.core
        known = {nic.uuid: nic for nic in found.nics}
        wanted = [vm_spec.nic_from(self._v3, each, set(known)) for each in given]
        kept = {nic.uuid for nic in wanted}
        parts: list[Callable[[], Task]] = [
            partial(core.remove_nic, found.uuid, uuid, **common)
            for uuid in known
            if uuid not in kept
        ]
        for nic in wanted:
            old = known.get(nic.uuid)
            if old is None:
                parts.append(partial(core.add_nic, found.uuid, nic, **common))
            elif (old.subnet, old.connected, old.model) != (nic.subnet, nic.connected, nic.model):
                nic.mac = nic.mac or old.mac
                parts.append(partial(core.update_nic, found.uuid, nic, **common))
        return parts

    async def delete(self, request: Request, uuid: str) -> Reply:
        """DELETE /vms/{uuid}."""
        found = self._find(request, uuid)
        task = self._v3.core.delete_vm(found.uuid, **self._v3.common(request))
        return self._v3.deleted("vm", uuid, task)

    async def clone(self, request: Request, uuid: str) -> Reply:
        """POST /vms/{uuid}/clone: answers with the task alone."""
        found = self._find(request, uuid)
        body = check(request.json(), vm_clone)
        given = body.get("override_spec", {})
        changed = vm_spec.copy_of(found)
        changed.sockets = given.get("num_sockets", found.sockets)
        changed.cores = given.get("num_vcpus_per_socket", found.cores)
        changed.memory = given.get("memory_size_mib", found.memory // vm_spec.MIB) * vm_spec.MIB
        if "nic_list" in given:
            changed.nics = [vm_spec.nic_from(self._v3, nic, set()) for nic in given["nic_list"]]
        name = given.get("name", f"{found.name}-clone")
        task = self._v3.core.clone_vm(found.uuid, name, changed, **self._v3.common(request))
        return Reply(202, {"task_uuid": task.uuid})

    async def act(self, request: Request, uuid: str, action: str) -> Reply:
        """POST /vms/{uuid}/acpi_shutdown and the like; the same task_uuid twice is the same task."""
        found = self._find(request, uuid)
        if action not in ACTIONS:
            raise HttpError(404, f"no action {action} of a vm", "not_found")
        state, how = ACTIONS[action]
        chosen = check(request.json(), power).get("task_uuid")
        if chosen in self._v3.world.tasks:
            return Reply(202, {"task_uuid": chosen})
        common = self._v3.common(request, task_uuid=chosen)
        task = self._v3.core.set_power(found.uuid, state, how, **common)
        return Reply(202, {"task_uuid": task.uuid})

    async def data(self, request: Request, uuid: str, disk: str) -> Reply:
        """GET /vms/{uuid}/vm_disk/{disk}/data: reaches no further than the first 32 MiB."""
        found = self._find(request, uuid)
        offset, length = (_number(request, name) for name in ("offset", "length"))
        if offset > DATA_OFFSET_MAX or not 0 < length <= DATA_LENGTH_MAX:
            raise InvalidError(
                f"offset is at most {DATA_OFFSET_MAX}, length at most {DATA_LENGTH_MAX}"
            )
        _, each = self._v3.core.find_disk(found.uuid, disk)
        if each.backing is None:
            raise HttpError(404, f"the vm_disk {disk} has no data", "not_found")
        path = self._v3.core.storage.disk(each.backing)

        def read() -> bytes:
            with path.open("rb") as file:
                return os.pread(file.fileno(), length, offset)

        raw = await trio.to_thread.run_sync(read)
        return Reply(200, raw=raw, content_type="application/octet-stream")


def _number(request: Request, name: str) -> int:
    given = request.query.get(name, "")
    if not given.isascii() or not given.isdigit() or len(given) > 19:
        raise InvalidError(f"the query needs {name}, a number of bytes")
    return int(given)
