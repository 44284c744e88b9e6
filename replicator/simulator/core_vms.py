# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs: made, changed, cloned, powered, removed; their disks and NICs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from uuid import uuid4

import msgspec
import trio

from replicator.simulator.base import CoreBase
from replicator.simulator.engine import FailedTask
from replicator.simulator.model import AffectedEntity, Disk, Nic, PowerState, Task, Vm
from replicator.simulator.sources import DiskSource
from replicator.simulator.web import HttpError

How = Literal["hard", "acpi", "guest", "cycle", "reset"]
DISK_SIZE_MAX = 1 << 50
NewDisk = tuple[Disk, DiskSource | None]


class VmActions(CoreBase):
    """See ``Core``."""

    def create_vm(self, vm: Vm, disks: Sequence[NewDisk], **common: Any) -> Task:
        """A VM that is off. ``vm.uuid`` is its id; a disk without a source is an empty CD-ROM or a volume group's."""
        self.check_name(vm.name, 80)
        if vm.cluster not in self.world.clusters:
            raise HttpError(404, f"no cluster {vm.cluster}", "not_found")
        for nic in vm.nics:
            self._check_nic(nic, vm.cluster)
        self._check_disks([disk for disk, _ in disks], vm.cluster)

        async def work(task: Task) -> None:
            await self._make_vm(vm, disks)
            task.entities += [AffectedEntity(kind="disk", uuid=d.uuid) for d, _ in disks]

        affected = [AffectedEntity(kind="vm", uuid=vm.uuid, name=vm.name)]
        return self.engine.start("CreateVm", affected, work, **{"cluster": vm.cluster, **common})

    async def _make_vm(self, vm: Vm, disks: Sequence[NewDisk]) -> None:
        vm.disks = []
        for disk, source in disks:
            await self._make_disk(vm, disk, source)
        for nic in vm.nics:
            nic.mac = nic.mac or self._next_mac()
        self.touch(vm)
        self.world.vms[vm.uuid] = vm

    async def _make_disk(self, vm: Vm, disk: Disk, source: DiskSource | None) -> None:
        if source is not None:
            disk.size = max(disk.size, source.size)
            if not 0 < disk.size <= DISK_SIZE_MAX:
                raise FailedTask("VMM-40000", "INVALID_ARGUMENT", f"a disk of {disk.size} bytes")
            disk.backing = str(uuid4())
            disk.container = disk.container or self.default_container(vm.cluster)
            await source.write(self.storage.disk(disk.backing), disk.size)
        vm.disks.append(disk)

    def default_container(self, cluster: str) -> str:
        """The container that disks go to where none is named. Raises HttpError 404."""
        for container in self.world.containers.values():
            if container.cluster == cluster and not container.internal:
                return container.uuid
        raise HttpError(404, f"cluster {cluster} has no storage container", "not_found")

    def _check_nic(self, nic: Nic, cluster: str) -> None:
        subnet = self.world.subnets.get(nic.subnet)
        if subnet is None:
            raise HttpError(404, f"no subnet {nic.subnet}", "not_found")
        if subnet.cluster != cluster:
            raise HttpError(422, f"subnet {subnet.name} is on another cluster", "invalid")
        for vm in self.world.vms.values():
            for each in vm.nics:
                if nic.mac and each.mac.lower() == nic.mac.lower() and each.uuid != nic.uuid:
                    raise HttpError(
                        422, f"the MAC address {nic.mac} is in use by {vm.name}", "invalid"
                    )

    def _check_disks(self, disks: Sequence[Disk], cluster: str) -> None:
        addresses = [(disk.bus, disk.index) for disk in disks]
        if len(set(addresses)) != len(addresses):
            raise HttpError(422, "two disks have the same address", "invalid")
        for disk in disks:
            container = self.world.containers.get(disk.container)
            if container is not None and container.cluster != cluster:
                raise HttpError(
                    422, f"storage container {container.name} is on another cluster", "invalid"
                )

    def _next_mac(self) -> str:
        number = sum(len(vm.nics) for vm in self.world.vms.values()) + len(self.world.tasks)
        return "50:6b:8d:" + ":".join(f"{(number >> shift) & 255:02x}" for shift in (16, 8, 0))

    def update_vm(self, uuid: str, changed: Vm, **common: Any) -> Task:
        """Take over everything but disks, NICs and power."""
        vm: Vm = self.get("vms", uuid)
        self.check_name(changed.name, 80)

        async def work(task: Task) -> None:
            del task
            for name in (
                "name", "description", "sockets", "cores", "threads", "memory", "machine", "boot", "categories", "v4", "v3",
            ):  # fmt: skip
                setattr(vm, name, getattr(changed, name))
            self.touch(vm)
            await trio.lowlevel.checkpoint()

        return self.engine.start("UpdateVm", [_affected(vm)], work, **common)

    def delete_vm(self, uuid: str, **common: Any) -> Task:
        """Remove a VM and its disks; its snapshots stay."""
        vm: Vm = self.get("vms", uuid)

        async def work(task: Task) -> None:
            del task
            self.world.vms.pop(uuid, None)
            for disk in vm.disks:
                if disk.backing is not None:
                    await self.remove(self.storage.disk(disk.backing))
            await self.remove(self.storage.lock_path(uuid))
            self.save()

        return self.engine.start("DeleteVm", [_affected(vm)], work, **common)

    def clone_vm(self, uuid: str, name: str, changed: Vm | None = None, **common: Any) -> Task:
        """A VM with copies of another's disks, taken while nobody writes; ``changed`` overrides its size and NICs."""
        vm: Vm = self.get("vms", uuid)
        self.check_name(name, 80)
        clone = msgspec.structs.replace(
            changed or vm,
            uuid=str(uuid4()),
            name=name,
            cluster=vm.cluster,
            power="OFF",
            version=0,
            disks=[],
        )
        clone.nics = [msgspec.structs.replace(n, uuid=str(uuid4()), mac="") for n in clone.nics]

        async def work(task: Task) -> None:
            del task
            disks: list[NewDisk] = []
            for old in vm.disks:
                new = msgspec.structs.replace(old, uuid=str(uuid4()))
                source = self.sources.vm_disk(old.backing) if old.backing else None
                disks.append((new, source))
            await self._make_vm(clone, disks)

        affected = [AffectedEntity(kind="vm", uuid=clone.uuid, name=name)]
        return self.engine.start("CloneVm", affected, work, **{"cluster": vm.cluster, **common})

    def set_power(self, uuid: str, state: PowerState, how: How, **common: Any) -> Task:
        """Turn a VM on or off. acpi and guest end well at once; the guest obeys afterwards, or never (``Vm.acpi``)."""
        vm: Vm = self.get("vms", uuid)
        if how == "guest" and not vm.tools:
            raise HttpError(422, "guest tools are not installed or not reachable", "not_supported")

        async def work(task: Task) -> None:
            del task
            if how in ("acpi", "guest") and vm.power != "ON":
                raise FailedTask("VMM-30101", "VM_POWER_STATE", "the VM is not running")
            if how not in ("acpi", "guest") or vm.acpi:
                vm.power = state
            self.touch(vm)
            await trio.lowlevel.checkpoint()

        return self.engine.start(f"VmPower{state.title()}", [_affected(vm)], work, **common)

    # Disks and NICs

    def add_disk(self, vm: str, disk: Disk, source: DiskSource | None, **common: Any) -> Task:
        """One more disk."""
        found: Vm = self.get("vms", vm)
        self._check_disks([*found.disks, disk], found.cluster)

        async def work(task: Task) -> None:
            del task
            await self._make_disk(found, disk, source)
            self.touch(found)

        affected = [AffectedEntity(kind="disk", uuid=disk.uuid), _affected(found)]
        return self.engine.start("CreateDisk", affected, work, **common)

    def find_disk(self, vm: str, disk: str) -> tuple[Vm, Disk]:
        """A disk by device or backing. Raises HttpError 404."""
        found: Vm = self.get("vms", vm)
        for each in found.disks:
            if disk in (each.uuid, each.backing):
                return found, each
        raise HttpError(404, f"VM {vm} has no disk {disk}", "not_found")

    def remove_disk(self, vm: str, disk: str, **common: Any) -> Task:
        """Remove a disk and its bytes."""
        found, gone = self.find_disk(vm, disk)

        async def work(task: Task) -> None:
            del task
            found.disks = [each for each in found.disks if each.uuid != gone.uuid]
            if gone.backing is not None:
                await self.remove(self.storage.disk(gone.backing))
            self.touch(found)

        affected = [AffectedEntity(kind="disk", uuid=gone.uuid), _affected(found)]
        return self.engine.start("DeleteDisk", affected, work, **common)

    def resize_disk(self, vm: str, disk: str, size: int, **common: Any) -> Task:
        """Grow a disk; the new part is zeros. Raises HttpError 422 for a size that is smaller."""
        found, grown = self.find_disk(vm, disk)
        if size < grown.size or size > DISK_SIZE_MAX:
            raise HttpError(422, f"a disk of {grown.size} bytes cannot become one of {size}")

        async def work(task: Task) -> None:
            del task
            grown.size = size
            if grown.backing is not None:
                path = self.storage.disk(grown.backing)
                await trio.to_thread.run_sync(_grow, path, size)
            self.touch(found)

        affected = [AffectedEntity(kind="disk", uuid=grown.uuid), _affected(found)]
        return self.engine.start("UpdateDisk", affected, work, **common)

    def add_nic(self, vm: str, nic: Nic, **common: Any) -> Task:
        """One more NIC."""
        found: Vm = self.get("vms", vm)
        self._check_nic(nic, found.cluster)
        return self._change_nics(found, [*found.nics, nic], nic.uuid, "CreateNic", common)

    def update_nic(self, vm: str, nic: Nic, **common: Any) -> Task:
        """Replace a NIC by one with the same id."""
        found: Vm = self.get("vms", vm)
        self._check_nic(nic, found.cluster)
        nics = [nic if each.uuid == nic.uuid else each for each in found.nics]
        return self._change_nics(found, nics, nic.uuid, "UpdateNic", common)

    def remove_nic(self, vm: str, nic: str, **common: Any) -> Task:
        """Remove a NIC."""
        found: Vm = self.get("vms", vm)
        nics = [each for each in found.nics if each.uuid != nic]
        if len(nics) == len(found.nics):
            raise HttpError(404, f"VM {vm} has no NIC {nic}", "not_found")
        return self._change_nics(found, nics, nic, "DeleteNic", common)

    def _change_nics(
        self, vm: Vm, nics: list[Nic], nic: str, what: str, common: dict[str, Any]
    ) -> Task:
        async def work(task: Task) -> None:
            del task
            vm.nics = nics
            for each in nics:
                each.mac = each.mac or self._next_mac()
            self.touch(vm)
            await trio.lowlevel.checkpoint()

        affected = [AffectedEntity(kind="nic", uuid=nic), _affected(vm)]
        return self.engine.start(what, affected, work, **common)


def _grow(path: Any, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _affected(vm: Vm) -> AffectedEntity:
    return AffectedEntity(kind="vm", uuid=vm.uuid, name=vm.name)
