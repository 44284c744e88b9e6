# SPDX-License-Identifier: AGPL-3.0-or-later
"""Snapshots: points in time of VMs, changed regions between them, restore and replication."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from uuid import uuid4

import trio

from replicator.simulator import storage as files
from replicator.simulator.core_vms import NewDisk, VmActions
from replicator.simulator.engine import FailedTask
from replicator.simulator.model import (
    AffectedEntity,
    Disk,
    Snapshot,
    SnapshotDisk,
    SnapshotVm,
    Task,
    Vm,
)
from replicator.simulator.qemu_guest import stopped
from replicator.simulator.sources import find_snapshot_disk, snapshot_path
from replicator.simulator.web import HttpError

#: How many VMs one recovery point may hold.
VMS_MAX = 32
BLOCKS = (32768, 65536, 131072, 262144)
REGIONS_PER_PAGE = 1000


class SnapshotActions(VmActions):
    """See ``Core``."""

    def create_snapshot(
        self,
        name: str,
        vms: Sequence[str],
        *,
        application_consistent: bool,
        expires_at: float | None,
        element: bool,
        uuid: str | None = None,
        **common: Any,
    ) -> Task:
        """All disks of these VMs at one instant: nobody who keeps to the VMs' locks writes meanwhile."""
        known = self.engine.known(
            str(common.get("request_id", "")), str(common.get("owner", "admin"))
        )
        if known is not None:
            return known
        self.check_name(name, 64 if element else 256)
        if not 1 <= len(vms) <= VMS_MAX or len(set(vms)) != len(vms):
            raise HttpError(400, f"a recovery point holds 1 to {VMS_MAX} VMs")
        found: list[Vm] = [self.get("vms", vm) for vm in vms]
        clusters = {vm.cluster for vm in found}
        if len(clusters) > 1:
            raise HttpError(400, "the VMs are on several clusters")
        if expires_at is not None and expires_at <= time.time():
            raise HttpError(400, "the expiration time is in the past")
        if uuid is not None and uuid in self.world.snapshots:
            raise HttpError(409, f"there is a snapshot {uuid} already", "exists")
        self.world.snapshot_number += 1
        snapshot = Snapshot(
            uuid=uuid or str(uuid4()),
            name=name,
            cluster=found[0].cluster,
            vms=[],
            application_consistent=application_consistent,
            expires_at=expires_at,
            element=element,
            number=self.world.snapshot_number,
        )

        async def work(task: Task) -> None:
            if application_consistent and not all(vm.tools and vm.power == "ON" for vm in found):
                if self.faults.take("application-downgraded", task.name) is None:
                    raise FailedTask("DP-10010", "VSS_FAILED", "guest tools cannot quiesce the VM")
                snapshot.application_consistent = False
            await trio.to_thread.run_sync(self._copy_disks, snapshot, found)
            self.touch(snapshot)
            self.world.snapshots[snapshot.uuid] = snapshot
            task.details["recoveryPointExtId"] = snapshot.uuid
            task.entities += [
                AffectedEntity(kind="snapshot_vm", uuid=part.uuid) for part in snapshot.vms
            ]

        affected = [AffectedEntity(kind="snapshot", uuid=snapshot.uuid, name=name)]
        affected += [AffectedEntity(kind="vm", uuid=vm.uuid, name=vm.name) for vm in found]
        return self.engine.start(
            "CreateRecoveryPoint", affected, work, **{"cluster": snapshot.cluster, **common}
        )

    def _copy_disks(self, snapshot: Snapshot, vms: list[Vm]) -> None:
        """Blocks."""
        with ExitStack() as still:
            still.enter_context(self.storage.held([vm.uuid for vm in vms]))
            for vm in vms:
                if vm.qmp:
                    still.enter_context(stopped(vm.qmp))
            snapshot.created_at = time.time()
            for vm in vms:
                disks = []
                for disk in vm.disks:
                    if disk.volume_group is not None:
                        continue
                    kept = SnapshotDisk(
                        uuid=str(uuid4()),
                        disk=disk.uuid,
                        backing=disk.backing or str(uuid4()),
                        size=disk.size,
                        container=disk.container,
                        cdrom=disk.cdrom,
                    )
                    if disk.backing is not None:
                        files.copy(
                            self.storage.disk(disk.backing),
                            self.storage.snapshot(kept.uuid),
                            disk.size,
                        )
                    disks.append(kept)
                snapshot.vms.append(
                    SnapshotVm(uuid=str(uuid4()), vm=vm.uuid, disks=disks, config=copy.deepcopy(vm))
                )

    async def forget_snapshot(self, snapshot: Snapshot) -> None:
        """Remove it and its bytes, at once."""
        self.world.snapshots.pop(snapshot.uuid, None)
        self.save()
        for part in snapshot.vms:
            for disk in part.disks:
                await self.remove(self.storage.snapshot(disk.uuid))

    async def find_snapshot(self, uuid: str) -> Snapshot:
        """A snapshot that has not expired. Raises HttpError 404."""
        snapshot: Snapshot = self.get("snapshots", uuid)
        struck = self.faults.take("snapshot-expired", snapshot.name)
        due = snapshot.expires_at is not None and snapshot.expires_at <= time.time()
        if struck is not None or due:
            await self.forget_snapshot(snapshot)
            raise HttpError(404, f"no snapshot with the id {uuid}", "not_found")
        return snapshot

    def delete_snapshot(self, uuid: str, **common: Any) -> Task:
        """Remove a snapshot; clones of its disks stay."""
        snapshot: Snapshot = self.get("snapshots", uuid)

        async def work(task: Task) -> None:
            del task
            await self.forget_snapshot(snapshot)

        affected = [AffectedEntity(kind="snapshot", uuid=uuid, name=snapshot.name)]
        return self.engine.start("DeleteRecoveryPoint", affected, work, **common)

    def set_expiration(self, uuid: str, expires_at: float | None, **common: Any) -> Task:
        """Have it expire at another time."""
        snapshot: Snapshot = self.get("snapshots", uuid)

        async def work(task: Task) -> None:
            del task
            snapshot.expires_at = expires_at
            self.touch(snapshot)
            await trio.lowlevel.checkpoint()

        affected = [AffectedEntity(kind="snapshot", uuid=uuid, name=snapshot.name)]
        return self.engine.start("SetExpirationTime", affected, work, **common)

    def restore_snapshot(
        self,
        snapshot: str,
        snapshot_vm: str,
        name: str | None,
        *,
        adjust: Callable[[Vm], None] | None = None,
        **common: Any,
    ) -> Task:
        """A new VM, off, with the disks of a snapshot. ``adjust`` changes the configuration; NICs have their old ids then."""
        part = self.find_part(snapshot, snapshot_vm)
        vm = copy.deepcopy(part.config)
        if adjust is not None:
            adjust(vm)
        vm.uuid, vm.name, vm.power, vm.version = str(uuid4()), name or part.config.name, "OFF", 0
        for nic in vm.nics:
            nic.uuid, nic.mac = str(uuid4()), ""

        async def work(task: Task) -> None:
            by_device = {disk.disk: disk for disk in part.disks}
            disks: list[NewDisk] = []
            for old in part.config.disks:
                kept = by_device.get(old.uuid)
                new = Disk(
                    uuid=str(uuid4()), backing=None, bus=old.bus, index=old.index, cdrom=old.cdrom
                )
                with_data = kept is not None and old.backing is not None
                source = self.sources.snapshot_disk(kept.uuid) if kept and with_data else None
                disks.append((new, source))
            await self._make_vm(vm, disks)
            task.details["vmExtIds"] = [vm.uuid]
            task.entities.append(AffectedEntity(kind="vm", uuid=vm.uuid, name=vm.name))
            if self.faults.take("restore-orphan", task.name) is not None:
                raise FailedTask(
                    "DP-10000", "RESTORE_FAILED", "the restore failed after the VM was made"
                )

        affected = [AffectedEntity(kind="snapshot", uuid=snapshot)]
        return self.engine.start("RestoreRecoveryPoint", affected, work, **common)

    def find_part(self, snapshot: str, part: str) -> SnapshotVm:
        """A VM in a snapshot. Raises HttpError 404."""
        found: Snapshot = self.get("snapshots", snapshot)
        for each in found.vms:
            if each.uuid == part:
                return each
        raise HttpError(404, f"no VM recovery point {part} in {snapshot}", "not_found")

    def replicate_snapshot(self, uuid: str, cluster: str, **common: Any) -> Task:
        """A copy of a snapshot on another cluster, with ids of its own."""
        snapshot: Snapshot = self.get("snapshots", uuid)
        self.get("clusters", cluster)
        twin = copy.deepcopy(snapshot)
        twin.uuid, twin.cluster, twin.version = str(uuid4()), cluster, 0

        async def work(task: Task) -> None:
            for part in twin.vms:
                part.uuid = str(uuid4())
                for disk in part.disks:
                    old, disk.uuid = disk.uuid, str(uuid4())
                    source = self.storage.snapshot(old)
                    if source.is_file():
                        await trio.to_thread.run_sync(
                            files.copy, source, self.storage.snapshot(disk.uuid)
                        )
            self.touch(twin)
            self.world.snapshots[twin.uuid] = twin
            task.entities.append(AffectedEntity(kind="snapshot", uuid=twin.uuid, name=twin.name))

        affected = [AffectedEntity(kind="snapshot", uuid=uuid, name=snapshot.name)]
        return self.engine.start("ReplicateRecoveryPoint", affected, work, **common)

    def snapshot_path(self, snapshot_disk: str) -> str:
        """v3's path of the file of a disk in a snapshot."""
        return snapshot_path(self.world, snapshot_disk)

    async def changed_regions(
        self, disk: str, reference: str | None, start: int, end: int | None, block: int
    ) -> tuple[list[files.Region], int | None, int]:
        """Regions (offset, length, zeroed), where to go on (None: done) and the file's size; of two disks in snapshots.

        Raises HttpError (not_found) for one that is gone, (invalid) for two of different disks.
        """
        if block not in BLOCKS or start < 0 or (end is not None and end < start):
            raise HttpError(400, f"the block size is one of {BLOCKS}, offsets are not negative")
        _, kept = find_snapshot_disk(self.world, disk)
        if self.faults.take("regions-not-found", disk) is not None:
            raise HttpError(404, f"no disk recovery point {disk}", "not_found")
        path, old = self.storage.snapshot(disk), None
        if reference is not None:
            _, before = find_snapshot_disk(self.world, reference)
            if (
                before.backing != kept.backing
                or self.faults.take("reference-invalid", disk) is not None
            ):
                raise HttpError(400, "kInvalidValue: the reference is of another disk", "invalid")
            old = self.storage.snapshot(reference)
        size = kept.size
        if not path.is_file():
            return [], None, size
        limit = int(self.knobs.get("regions_page", REGIONS_PER_PAGE))
        stop = size if end is None else min(end, size)
        regions, going_on = await trio.to_thread.run_sync(
            partial(files.changed, block=block, limit=limit), path, old, start, stop
        )
        if self.faults.take("regions-wrong", disk) is not None:
            regions = regions[1:]
        if self.faults.take("regions-stuck", disk) is not None:
            going_on = start
        return regions, going_on, size
