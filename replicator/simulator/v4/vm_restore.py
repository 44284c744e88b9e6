# SPDX-License-Identifier: AGPL-3.0-or-later
"""VM recovery points in namespace vmm, from 4.1 on: with the VM's configuration as it was; made, restored, removed."""

from __future__ import annotations

import copy
from typing import Any

from replicator.simulator.model import Snapshot, SnapshotVm, Vm, World
from replicator.simulator.v4.api import LISTED, Api, Call, Namespace
from replicator.simulator.v4.filters import seconds
from replicator.simulator.v4.parts import snapshot_vm_body
from replicator.simulator.v4.vms import chosen_categories, vm_body
from replicator.simulator.web import HttpError, Reply, Router

_AHV = "vmm.v4.ahv.config."
_POINT = _AHV + "VmRecoveryPoint"


def adjust_restored(world: World, vm: Vm, override: dict[str, Any]) -> None:
    """Change the configuration that a restored VM gets. NICs have the ids that they have in the recovery point.

    Raises HttpError for what is not there.
    """
    if "description" in override:
        vm.description = override["description"]
    if "categories" in override:
        ids = [reference.get("extId") for reference in override["categories"]]
        vm.categories = chosen_categories(world, ids)
    spec = override.get("nicSpec") or {}
    removed = set(spec.get("nicRemoveList", []))
    changes = spec.get("nicOverrideList", [])
    known = {nic.uuid: nic for nic in vm.nics}
    for uuid in [*removed, *(change["nicExtId"] for change in changes)]:
        if uuid not in known:
            raise HttpError(404, f"the recovery point has no NIC {uuid}", "not_found")
    for change in changes:
        subnet = ((change.get("nicNetworkInfo") or {}).get("subnet") or {}).get("extId")
        if subnet is not None:
            if subnet not in world.subnets:
                raise HttpError(404, f"no subnet with the id {subnet}", "not_found")
            known[change["nicExtId"]].subnet = subnet
    vm.nics = [nic for nic in vm.nics if nic.uuid not in removed]


def _body(snapshot: Snapshot, part: SnapshotVm) -> dict[str, Any]:
    return {**snapshot_vm_body(snapshot, part), "vm": vm_body(part.config)}


def _find(call: Call, uuid: str) -> tuple[Snapshot, SnapshotVm]:
    for snapshot in call.world.snapshots.values():
        for part in snapshot.vms:
            if part.uuid == uuid and not snapshot.element:
                return snapshot, part
    raise HttpError(404, f"no VM recovery point with the id {uuid}", "not_found")


async def _list(call: Call) -> Reply:
    pairs = [
        (snapshot, part)
        for snapshot in call.world.snapshots.values()
        if not snapshot.element
        for part in snapshot.vms
    ]
    return call.many(pairs, lambda pair: _body(*pair), _POINT)


async def _get(call: Call, part: str) -> Reply:
    snapshot, found = _find(call, part)
    await call.core.find_snapshot(snapshot.uuid)
    return call.one(_body(snapshot, found), _POINT, snapshot)


async def _create(call: Call) -> Reply:
    body = call.body(_POINT)
    if "vmExtId" not in body:
        raise HttpError(400, "vmExtId is needed")
    expires = body.get("expirationTime")
    task = call.core.create_snapshot(
        body.get("name") or f"vm-recovery-point-{call.world.snapshot_number + 1}",
        [body["vmExtId"]],
        application_consistent=body.get("recoveryPointType") == "APPLICATION_CONSISTENT",
        expires_at=seconds(expires) if expires else None,
        element=False,
        **call.common,
    )
    return call.task(task)


async def _delete(call: Call, part: str) -> Reply:
    snapshot, _ = _find(call, part)
    call.match(snapshot)
    if len(snapshot.vms) > 1:
        raise HttpError(
            422, "the recovery point holds other VMs: delete the whole of it", "not_supported"
        )
    return call.task(call.core.delete_snapshot(snapshot.uuid, **call.common))


async def _restore(call: Call, part: str) -> Reply:
    snapshot, found = _find(call, part)
    body = call.body(_AHV + "RestoreVmRecoveryPointParams")
    override = body.get("vmConfigOverrideSpec") or {}
    call.match(snapshot)

    def adjust(vm: Vm) -> None:
        adjust_restored(call.world, vm, override)

    adjust(copy.deepcopy(found.config))  # refused now rather than later
    task = call.core.restore_snapshot(
        snapshot.uuid, part, override.get("name"), adjust=adjust, **call.common
    )
    return call.task(task)


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "vmm")
    points = "/ahv/config/vm-recovery-points"
    view, one = "View_VM_Recovery_Point", points + "/{part}"
    space.get(
        points,
        _list,
        _AHV + "ListVmRecoveryPointsApiResponse",
        permission=view,
        since=1,
        query=LISTED,
    )
    space.get(one, _get, _AHV + "GetVmRecoveryPointApiResponse", permission=view, since=1)
    space.post(
        points,
        _create,
        _AHV + "CreateVmRecoveryPointApiResponse",
        permission="Create_Recovery_Point",
        since=1,
    )
    space.delete(
        one,
        _delete,
        _AHV + "DeleteVmRecoveryPointApiResponse",
        permission="Delete_Recovery_Point",
        since=1,
    )
    space.post(
        one + "/$actions/restore",
        _restore,
        _AHV + "RestoreVmRecoveryPointApiResponse",
        permission="Restore_VM_Recovery_Point",
        since=1,
    )
