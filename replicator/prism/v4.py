# SPDX-License-Identifier: AGPL-3.0-or-later
"""Prism by v4: ``api.Prism`` put together from its parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from uuid import UUID

from replicator.hardware import Hardware
from replicator.prism.endpoint import Hosts, segment
from replicator.prism.errors import PrismNotFoundError, PrismRefusedError
from replicator.prism.types import (
    Access,
    Attachment,
    Capability,
    Cluster,
    Consistency,
    Container,
    DiskSnapshot,
    Found,
    Kind,
    NewVm,
    RegionPage,
    Secrets,
    Subnet,
    Vm,
    VmSnapshot,
    VmSummary,
    VolumeGroup,
)
from replicator.prism.v3_calls import V3Host
from replicator.prism.v3_images import Uploads
from replicator.prism.v4_access import read_access
from replicator.prism.v4_calls import V4Calls, begins, named
from replicator.prism.v4_groups import Groups
from replicator.prism.v4_hardware import Names
from replicator.prism.v4_read import read_cluster, read_found, read_vm, read_vm_summary
from replicator.prism.v4_regions import Regions
from replicator.prism.v4_restore import Restoring
from replicator.prism.v4_snapshots import Snapshots
from replicator.prism.v4_versions import Versions

_AOS = "config/clusterFunction/any(t:t eq Clustermgmt.Config.ClusterFunctionRef'AOS')"
_LISTS = (
    (Kind.SNAPSHOT, "dataprotection", "config/recovery-points"),
    (Kind.VOLUME_GROUP, "volumes", "config/volume-groups"),
    (Kind.IMAGE, "vmm", "content/images"),
    (Kind.VM, "vmm", "ahv/config/vms"),
)


class PrismV4:
    """One Prism Central by v4. Closes ``hosts`` when it is closed."""

    def __init__(self, hosts: Hosts, versions: Versions | None = None) -> None:
        self._hosts = hosts
        self._calls = V4Calls(hosts, versions or Versions(hosts.central))
        self._snapshots = Snapshots(self._calls)
        self._groups = Groups(self._calls)
        self._regions = Regions(self._calls, self._cluster, self._snapshots.is_gone)
        self._names = Names(self._calls)
        self._restoring = Restoring(self._calls, self._names)
        self._uploads = Uploads(V3Host(hosts.central, hosts.settings.waits))
        self._clusters: dict[str, Cluster] = {}

    @property
    def capability(self) -> Capability:
        """Which interface is spoken: v4."""
        return Capability.V4

    @property
    def requests(self) -> int:
        """How many HTTP requests were sent so far, to all hosts."""
        return self._hosts.meters.requests

    async def clusters(self) -> Sequence[Cluster]:
        """As ``Prism.clusters``."""
        nodes = await self._calls.listed("clustermgmt", "config/clusters", _AOS)
        found = [cluster for cluster in map(read_cluster, nodes) if cluster is not None]
        self._clusters = {cluster.uuid: cluster for cluster in found}
        return found

    async def _cluster(self, uuid: str) -> Cluster | None:
        """By id; asked for only where a name is needed to find an Element's address."""
        if not self._clusters and self._hosts.settings.elements:
            await self.clusters()
        return self._clusters.get(uuid)

    async def vms(self) -> Sequence[VmSummary]:
        """As ``Prism.vms``."""
        return [read_vm_summary(node) for node in await self._calls.listed("vmm", "ahv/config/vms")]

    async def vm(self, uuid: str) -> Vm:
        """As ``Prism.vm``."""
        return read_vm(await self._calls.get("vmm", f"ahv/config/vms/{segment(uuid)}"))

    async def hardware(self, vm: str | Vm) -> Hardware:
        """As ``Prism.hardware``."""
        return await self._names.hardware(vm if isinstance(vm, Vm) else await self.vm(vm))

    async def access(self) -> Sequence[Access]:
        """As ``Prism.access``."""
        account = self._hosts.settings.account
        return await read_access(self._calls, "" if account.api_key else account.user)

    async def create_snapshot(
        self,
        vm: Vm,
        name: str,
        consistency: Consistency,
        expires_at_us: int,
        request_id: UUID,
    ) -> VmSnapshot:
        """As ``Prism.create_snapshot``."""
        return await self._snapshots.create(vm, name, consistency, expires_at_us, request_id)

    async def snapshot(self, uuid: str, vm: Vm) -> VmSnapshot:
        """As ``Prism.snapshot``."""
        return await self._snapshots.get(uuid, vm)

    async def extend_snapshot(self, snapshot: VmSnapshot, expires_at_us: int) -> None:
        """As ``Prism.extend_snapshot``."""
        await self._snapshots.extend(snapshot.uuid, expires_at_us)

    async def delete_snapshot(self, uuid: str, cluster: str) -> None:
        """As ``Prism.delete_snapshot``."""
        del cluster  # Prism Central knows where it is
        await self._snapshots.delete(uuid)

    def regions(
        self,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        since: tuple[VmSnapshot, DiskSnapshot] | None,
    ) -> AsyncGenerator[RegionPage, None]:
        """As ``Prism.regions``."""
        return self._regions.pages(snapshot, disk, since)

    @property
    def clones_by_image(self) -> bool:
        """No: a volume group is cloned from a recovery point."""
        return False

    async def create_image(
        self, snapshot: VmSnapshot, disk: DiskSnapshot, name: str, request_id: UUID
    ) -> str:
        """v4 makes images of live disks only: PrismRefusedError."""
        del disk, name, request_id
        raise PrismRefusedError(
            f"{self._calls.central.where}: v4 makes no image of a disk of recovery point {snapshot.uuid}:"
            " use data_path = iscsi, or prism_api_version = v3"
        )

    async def delete_image(self, uuid: str) -> None:
        """As ``Prism.delete_image``."""
        try:
            await self._calls.change(
                "vmm",
                "DELETE",
                f"content/images/{segment(uuid)}",
                what="delete an image",
                timeout_s=self._calls.waits.delete_s,
            )
        except PrismNotFoundError:
            return

    async def image_file(self, uuid: str) -> AsyncGenerator[bytes, None]:
        """As ``Prism.image_file``."""
        path = await self._calls.versions.path("vmm", f"content/images/{segment(uuid)}/file")
        async with aclosing(self._hosts.central.whole_file(path, f"image {uuid}")) as pieces:
            async for piece in pieces:
                yield piece

    async def create_volume_group(
        self,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        name: str,
        secrets: Secrets | None,
        request_id: UUID,
        *,
        image: str | None = None,
    ) -> VolumeGroup:
        """As ``Prism.create_volume_group``; ``image`` is not used."""
        del image
        return await self._groups.create(snapshot, disk, name, secrets, request_id)

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None, request_id: UUID
    ) -> Attachment:
        """As ``Prism.attach``."""
        return await self._groups.attach(group, initiator, secrets, request_id)

    async def detach(self, group_uuid: str, attachment: Attachment | None) -> None:
        """As ``Prism.detach``."""
        await self._groups.detach(group_uuid, attachment)

    async def delete_volume_group(self, uuid: str) -> None:
        """As ``Prism.delete_volume_group``."""
        await self._groups.delete(uuid)

    async def find(self, prefix: str) -> Sequence[Found]:
        """As ``Prism.find``."""
        found: list[Found] = []
        for kind, namespace, path in _LISTS:
            nodes = await self._calls.listed(namespace, path, begins(prefix), named(prefix))
            found.extend(read_found(kind, node) for node in nodes)
        return found

    async def subnets(self, cluster: str) -> Sequence[Subnet]:
        """As ``RestorePrism.subnets``."""
        return await self._restoring.subnets(cluster)

    async def containers(self, cluster: str) -> Sequence[Container]:
        """As ``RestorePrism.containers``."""
        return await self._restoring.containers(cluster)

    async def macs(self) -> frozenset[str]:
        """As ``RestorePrism.macs``."""
        return await self._restoring.macs()

    async def check_upload(self) -> None:
        """As ``RestorePrism.check_upload``."""
        await self._uploads.check()

    async def create_empty_image(self, name: str, cluster: str, description: str) -> str:
        """As ``RestorePrism.create_empty_image``."""
        return await self._uploads.create(name, cluster, description)

    async def upload_image(self, uuid: str, path: Path, size: int) -> None:
        """As ``RestorePrism.upload_image``."""
        await self._uploads.upload(uuid, path, size)

    async def create_vm(self, new: NewVm, request_id: UUID) -> str:
        """As ``RestorePrism.create_vm``."""
        return await self._restoring.create(new, request_id)

    async def rename_vm(self, uuid: str, name: str) -> None:
        """As ``RestorePrism.rename_vm``."""
        await self._restoring.rename(uuid, name)

    async def power_on(self, uuid: str) -> None:
        """As ``RestorePrism.power_on``."""
        await self._restoring.power_on(uuid)

    async def delete_vm(self, uuid: str) -> None:
        """As ``RestorePrism.delete_vm``."""
        await self._restoring.delete(uuid)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._hosts.aclose()
