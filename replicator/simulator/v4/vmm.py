# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace vmm: VMs and what is done to them as a whole."""

from __future__ import annotations

from typing import Any

import msgspec

from replicator.simulator.core_vms import How
from replicator.simulator.model import PowerState, Vm
from replicator.simulator.v4.api import LISTED, Api, Call, Handler, Namespace
from replicator.simulator.v4.vms import (
    VM,
    changed_vm,
    chosen_categories,
    new_nic,
    new_vm,
    tools_body,
    vm_body,
)
from replicator.simulator.web import HttpError, Reply, Router

_AHV = "vmm.v4.ahv.config."
_UPDATE = "Update_Virtual_Machine"
#: Power actions: the state that is wanted, how, and whether the body has options for guest tools.
_POWER: dict[str, tuple[PowerState, How, str]] = {
    "power-on": ("ON", "hard", "PowerOnVmApiResponse"),
    "power-off": ("OFF", "hard", "PowerOffVmApiResponse"),
    "power-cycle": ("ON", "cycle", "PowerCycleVmApiResponse"),
    "reset": ("ON", "reset", "ResetVmApiResponse"),
    "shutdown": ("OFF", "acpi", "ShutdownVmApiResponse"),
    "reboot": ("ON", "acpi", "RebootVmApiResponse"),
    "guest-shutdown": ("OFF", "guest", "GuestShutdownVmApiResponse"),
    "guest-reboot": ("ON", "guest", "GuestRebootVmApiResponse"),
}


def find_vm(call: Call, uuid: str) -> Vm:
    """Raises HttpError 404."""
    found: Vm = call.core.get("vms", uuid)
    return found


async def _list(call: Call) -> Reply:
    return call.many(call.world.vms.values(), vm_body, VM)


async def _get(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    return call.one(vm_body(found), VM, found)


async def _create(call: Call) -> Reply:
    vm, disks = new_vm(call.core, call.body(VM))
    return call.task(call.core.create_vm(vm, disks, **call.common))


async def _update(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(VM)
    call.match(found)
    _refuse_devices_changed(found, body)
    changed = changed_vm(call.world, found, body)
    return call.task(call.core.update_vm(vm, changed, **call.common))


def _refuse_devices_changed(vm: Vm, body: dict[str, Any]) -> None:
    """Devices have endpoints of their own. Raises HttpError 422 where a body would change them, rather than not to look."""
    given = {
        "disks": [disk.get("extId") for disk in body.get("disks", [])],
        "cdRoms": [drive.get("extId") for drive in body.get("cdRoms", [])],
        "nics": [_nic_state(nic) for nic in body.get("nics", [])],
    }
    shown = vm_body(vm)
    known = {
        "disks": [disk["extId"] for disk in shown["disks"]],
        "cdRoms": [drive["extId"] for drive in shown["cdRoms"]],
        "nics": [_nic_state(nic) for nic in shown["nics"]],
    }
    for name, devices in given.items():
        if name in body and devices != known[name]:
            raise HttpError(422, f"{name} are changed by their own endpoints, not with the VM")


def _nic_state(nic: dict[str, Any]) -> tuple[Any, Any]:
    card = nic.get("nicBackingInfo") or nic.get("backingInfo") or {}
    return nic.get("extId"), card.get("isConnected", True)


async def _delete(call: Call, vm: str) -> Reply:
    call.match(find_vm(call, vm))
    return call.task(call.core.delete_vm(vm, **call.common))


async def _clone(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(_AHV + "CloneOverrideParams")
    call.match(found)
    changed = changed_vm(call.world, found, body)
    if "nics" in body:
        changed.nics = [new_nic(call.world, nic) for nic in body["nics"]]
    name = body.get("name") or f"{found.name}-clone"
    return call.task(call.core.clone_vm(vm, name[:80], changed, **call.common))


def _power(action: str) -> Handler:
    state, how, _ = _POWER[action]

    async def act(call: Call, vm: str) -> Reply:
        found = find_vm(call, vm)
        if how == "guest":
            call.body(_AHV + "GuestPowerOptions")
        call.match(found)
        return call.task(call.core.set_power(vm, state, how, **call.common))

    return act


async def _associate(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(_AHV + "AssociateVmCategoriesParams")
    call.match(found)
    changed = msgspec.structs.replace(found)
    chosen = chosen_categories(call.world, [each.get("extId") for each in body["categories"]])
    changed.categories = {**found.categories, **chosen}
    return call.task(call.core.update_vm(vm, changed, **call.common))


async def _disassociate(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    body = call.body(_AHV + "DisassociateVmCategoriesParams")
    call.match(found)
    changed = msgspec.structs.replace(found)
    gone = chosen_categories(call.world, [each.get("extId") for each in body["categories"]])
    changed.categories = {
        key: value for key, value in found.categories.items() if gone.get(key) != value
    }
    return call.task(call.core.update_vm(vm, changed, **call.common))


async def _tools(call: Call, vm: str) -> Reply:
    found = find_vm(call, vm)
    return call.one(tools_body(found), _AHV + "GuestTools", found)


async def _revert(call: Call, vm: str) -> Reply:
    find_vm(call, vm)
    raise HttpError(501, "reverting a VM in place is not simulated", "not_supported")


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "vmm")
    vms, one = "/ahv/config/vms", "/ahv/config/vms/{vm}"
    view = "View_Virtual_Machine"
    space.get(vms, _list, _AHV + "ListVmsApiResponse", permission=view, query=LISTED)
    space.get(one, _get, _AHV + "GetVmApiResponse", permission=view)
    space.post(vms, _create, _AHV + "CreateVmApiResponse", permission="Create_Virtual_Machine")
    space.put(one, _update, _AHV + "UpdateVmApiResponse", permission=_UPDATE)
    space.delete(one, _delete, _AHV + "DeleteVmApiResponse", permission="Delete_Virtual_Machine")
    for action, (_, _, response) in _POWER.items():
        path = f"{one}/$actions/{action}"
        space.post(path, _power(action), _AHV + response, permission=_UPDATE)
    for action, handler, response in (
        ("clone", _clone, "CloneVmApiResponse"),
        ("revert", _revert, "RevertVmApiResponse"),
        ("associate-categories", _associate, "AssociateCategoriesApiResponse"),
        ("disassociate-categories", _disassociate, "DisassociateCategoriesApiResponse"),
    ):
        space.post(f"{one}/$actions/{action}", handler, _AHV + response, permission=_UPDATE)
    space.get(one + "/guest-tools", _tools, _AHV + "GetGuestToolsApiResponse", permission=view)
