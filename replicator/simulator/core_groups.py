# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups: their disks, who may log in to them, and the iSCSI targets that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from replicator.simulator.base import CoreBase
from replicator.simulator.engine import FailedTask
from replicator.simulator.model import AffectedEntity, GroupDisk, IscsiClient, Task, VolumeGroup
from replicator.simulator.sources import DiskSource
from replicator.simulator.targets import Lun, Target
from replicator.simulator.web import HttpError

SIZE_MIN, SIZE_MAX = 524288, 219902325555200
INDEX_MAX = 16383
NewGroupDisk = tuple[GroupDisk, DiskSource]


class GroupActions(CoreBase):
    """See ``Core``."""

    def create_group(
        self, group: VolumeGroup, disks: Sequence[NewGroupDisk], **common: Any
    ) -> Task:
        """A volume group with these disks; ``group.clients`` may log in from the start."""
        self.check_name(group.name, 256)
        if group.cluster not in self.world.clusters:
            raise HttpError(404, f"no cluster {group.cluster}", "not_found")
        if group.load_balanced and group.clients:
            raise HttpError(
                422, "a load balanced volume group takes no external client", "not_supported"
            )
        self._check_indexes([disk for disk, _ in disks])

        async def work(task: Task) -> None:
            for disk, source in disks:
                await self._make_group_disk(group, disk, source)
                task.entities.append(AffectedEntity(kind="group_disk", uuid=disk.uuid))
            self.touch(group)
            self.world.volume_groups[group.uuid] = group
            await self._serve(group)

        affected = [AffectedEntity(kind="volume_group", uuid=group.uuid, name=group.name)]
        return self.engine.start(
            "VolumeGroupCreate", affected, work, **{"cluster": group.cluster, **common}
        )

    def _check_indexes(self, disks: Sequence[GroupDisk]) -> None:
        indexes = [disk.index for disk in disks]
        if len(set(indexes)) != len(indexes) or any(not 0 <= i <= INDEX_MAX for i in indexes):
            raise HttpError(422, f"disk indexes are different numbers from 0 to {INDEX_MAX}")

    async def _make_group_disk(
        self, group: VolumeGroup, disk: GroupDisk, source: DiskSource
    ) -> None:
        disk.size = max(disk.size, source.size)
        if not SIZE_MIN <= disk.size <= SIZE_MAX:
            raise FailedTask("VOL-40000", "INVALID_ARGUMENT", f"a volume disk of {disk.size} bytes")
        await source.write(self.storage.group_disk(disk.uuid), disk.size)
        group.disks.append(disk)

    def update_group(self, uuid: str, changed: VolumeGroup, **common: Any) -> Task:
        """Take over everything but disks and the cluster; ``changed.clients`` are who may log in afterwards."""
        group: VolumeGroup = self.get("volume_groups", uuid)
        self.check_name(changed.name, 256)

        async def work(task: Task) -> None:
            del task
            for name in (
                "name", "description", "secret", "chap", "load_balanced", "shared", "usage", "created_by", "clients", "v4", "v3",
            ):  # fmt: skip
                setattr(group, name, getattr(changed, name))
            self.touch(group)
            await self._serve(group)

        return self.engine.start("VolumeGroupUpdate", [_affected(group)], work, **common)

    def delete_group(self, uuid: str, **common: Any) -> Task:
        """Remove a group and its disks; the task fails while anything is attached."""
        group: VolumeGroup = self.get("volume_groups", uuid)

        async def work(task: Task) -> None:
            del task
            if group.clients or group.vms:
                raise FailedTask(
                    "VOL-40900",
                    "VOLUME_GROUP_IN_USE",
                    f"volume group {group.name} has attachments: detach them first",
                )
            self.world.volume_groups.pop(uuid, None)
            await self._stop_serving(group)
            for disk in group.disks:
                await self.remove(self.storage.group_disk(disk.uuid))
            self.save()

        return self.engine.start("VolumeGroupDelete", [_affected(group)], work, **common)

    def add_group_disk(
        self, group: str, disk: GroupDisk, source: DiskSource, **common: Any
    ) -> Task:
        """One more disk."""
        found: VolumeGroup = self.get("volume_groups", group)
        self._check_indexes([*found.disks, disk])

        async def work(task: Task) -> None:
            del task
            await self._make_group_disk(found, disk, source)
            self.touch(found)
            await self._serve(found)

        affected = [AffectedEntity(kind="group_disk", uuid=disk.uuid), _affected(found)]
        return self.engine.start("VolumeGroupDiskCreate", affected, work, **common)

    def remove_group_disk(self, group: str, disk: str, **common: Any) -> Task:
        """Remove a disk and its bytes."""
        found: VolumeGroup = self.get("volume_groups", group)
        if all(each.uuid != disk for each in found.disks):
            raise HttpError(404, f"volume group {group} has no disk {disk}", "not_found")

        async def work(task: Task) -> None:
            del task
            found.disks = [each for each in found.disks if each.uuid != disk]
            self.touch(found)
            await self._serve(found)
            await self.remove(self.storage.group_disk(disk))

        affected = [AffectedEntity(kind="group_disk", uuid=disk), _affected(found)]
        return self.engine.start("VolumeGroupDiskDelete", affected, work, **common)

    def attach_client(self, group: str, client: IscsiClient, **common: Any) -> Task:
        """Let an initiator log in."""
        found: VolumeGroup = self.get("volume_groups", group)
        if found.load_balanced:
            raise HttpError(
                422, "a load balanced volume group takes no external client", "not_supported"
            )
        known = self.engine.known(
            str(common.get("request_id", "")), str(common.get("owner", "admin"))
        )
        if known is None and any(each.initiator == client.initiator for each in found.clients):
            raise HttpError(409, f"{client.initiator} is attached already", "exists")

        async def work(task: Task) -> None:
            del task
            found.clients = [*found.clients, client]
            self.touch(found)
            await self._serve(found)

        affected = [AffectedEntity(kind="iscsi_client", uuid=client.uuid), _affected(found)]
        return self.engine.start("VolumeGroupAttachExternal", affected, work, **common)

    def detach_client(self, group: str, client: str, **common: Any) -> Task:
        """Let an initiator (by the client's id or the initiator's name) log in no more; its session ends."""
        found: VolumeGroup = self.get("volume_groups", group)
        gone = [each for each in found.clients if client in (each.uuid, each.initiator)]
        if not gone:
            raise HttpError(404, "VG does not have this attachment", "not_found")

        async def work(task: Task) -> None:
            del task
            found.clients = [each for each in found.clients if each not in gone]
            self.touch(found)
            await self._stop_serving(found)
            await self._serve(found)

        affected = [AffectedEntity(kind="iscsi_client", uuid=gone[0].uuid), _affected(found)]
        return self.engine.start("VolumeGroupDetachExternal", affected, work, **common)

    def attach_vm(self, group: str, vm: str, **common: Any) -> Task:
        """Attach the group to a VM of this cluster."""
        found: VolumeGroup = self.get("volume_groups", group)
        self.get("vms", vm)
        return self._change_vms(found, [*found.vms, vm], "VolumeGroupAttachVm", common)

    def detach_vm(self, group: str, vm: str, **common: Any) -> Task:
        """Take that back."""
        found: VolumeGroup = self.get("volume_groups", group)
        if vm not in found.vms:
            raise HttpError(404, "VG does not have VM attachment", "not_found")
        return self._change_vms(
            found, [each for each in found.vms if each != vm], "VolumeGroupDetachVm", common
        )

    def _change_vms(
        self, group: VolumeGroup, vms: list[str], what: str, common: dict[str, Any]
    ) -> Task:
        async def work(task: Task) -> None:
            del task
            group.vms = vms
            self.touch(group)
            await trio.lowlevel.checkpoint()

        return self.engine.start(what, [_affected(group)], work, **common)

    # iSCSI

    async def restore_targets(self) -> None:
        """Serve again what was served when the simulator ended."""
        for group in self.world.volume_groups.values():
            await self._serve(group)

    async def _serve(self, group: VolumeGroup) -> None:
        cluster = self.world.clusters[group.cluster]
        if cluster.data_services is None or not group.clients or not group.disks:
            await self._stop_serving(group)
            return
        count = max(client.targets for client in group.clients)
        luns: dict[int, list[Lun]] = {}
        for position, disk in enumerate(sorted(group.disks, key=lambda each: each.index)):
            lun = Lun(self.storage.group_disk(disk.uuid), disk.uuid)
            luns.setdefault(position % count, []).append(lun)
        mutual = next((c.secret for c in group.clients if c.secret), None)
        targets = [
            Target(
                name=f"iqn.2010-06.com.nutanix:{group.target}-tgt{number}",
                luns=tuple(held),
                initiators=tuple(client.initiator for client in group.clients),
                secret=group.secret if group.chap else None,
                client_secret=mutual if group.chap else None,
            )
            for number, held in luns.items()
        ]
        late = self.faults.take("discovery-delayed", group.name)
        if late is not None:
            await self._stop_serving(group)
            self.engine.later(late.value, partial(self._serve_late, group.uuid))
            return
        await self.targets.serve(
            group.uuid,
            targets,
            cluster.data_services,
            cluster.cvms if self.knobs.get("redirect", True) else [],
        )

    async def _serve_late(self, uuid: str) -> None:
        group = self.world.volume_groups.get(uuid)
        if group is not None:
            await self._serve(group)

    async def _stop_serving(self, group: VolumeGroup) -> None:
        await self.targets.remove(group.uuid)


def _affected(group: VolumeGroup) -> AffectedEntity:
    return AffectedEntity(kind="volume_group", uuid=group.uuid, name=group.name)
