# SPDX-License-Identifier: AGPL-3.0-or-later
"""Prism by v3: ``api.Prism`` put together from its parts. VMs and volume groups on Prism Central, snapshots on the Elements."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Final
from uuid import UUID

from replicator.hardware import Hardware
from replicator.prism.endpoint import Hosts, segment
from replicator.prism.errors import (
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
)
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
from replicator.prism.v3_access import read_access
from replicator.prism.v3_calls import V3, V3Host
from replicator.prism.v3_expose import Exposing, named_v2
from replicator.prism.v3_groups import Groups
from replicator.prism.v3_hardware import read_hardware
from replicator.prism.v3_images import Uploads
from replicator.prism.v3_read import (
    name_of,
    read_cluster,
    read_cluster_v2,
    read_found,
    read_vm,
    read_vm_summary,
    reference_uuid,
)
from replicator.prism.v3_regions import region_pages
from replicator.prism.v3_restore import Restoring
from replicator.prism.v3_snapshots import Snapshots

_LISTS: Final = (
    (Kind.VOLUME_GROUP, "volume_groups", "volume_group"),
    (Kind.IMAGE, "images", "image"),
    (Kind.VM, "vms", "vm"),
)
_DISKS: Final = {"include_vm_disk_config": "true", "include_vm_nic_config": "true"}
#: What says that an Element does not have a call at all.
_NO_SUCH_CALL: Final = (PrismNotFoundError, PrismRefusedError, PrismPermissionError)


class PrismV3:
    """One Prism Central, or one Element, by v3. Closes ``hosts`` when it is closed."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._waits = hosts.settings.waits
        self._central = V3Host(hosts.central, self._waits)
        self._groups = Groups(self._central, self._elements, self._waits)
        self._exposing = Exposing(self._central, self._groups, hosts.settings.expose, self._waits)
        self._uploads = Uploads(self._central)
        self._restoring = Restoring(self._central, self._element, self._waits)
        self._clusters: dict[str, Cluster] = {}
        self._hosts_by_cluster: dict[str, V3Host] = {}
        self._snapshots: dict[str, Snapshots] = {}

    @property
    def capability(self) -> Capability:
        """Which interface is spoken: v3."""
        return Capability.V3

    @property
    def requests(self) -> int:
        """How many HTTP requests were sent so far, to all hosts."""
        return self._hosts.meters.requests

    async def clusters(self) -> Sequence[Cluster]:
        """As ``Prism.clusters``."""
        try:
            async with aclosing(self._central.pages("clusters", "cluster")) as items:
                read = [read_cluster(item) async for item in items]
        except PrismNotFoundError:
            # An Element lists no clusters: it is one.
            read = [read_cluster_v2(await self._central.get_v2("cluster"))]
        found = [cluster for cluster in read if cluster is not None]
        self._clusters = {cluster.uuid: cluster for cluster in found}
        return found

    async def _element(self, cluster: str) -> V3Host:
        """The Element of a cluster. Raises PrismError where it is not known."""
        if cluster not in self._hosts_by_cluster:
            if cluster not in self._clusters:
                await self.clusters()
            known = self._clusters.get(cluster)
            if known is None:
                raise PrismNotFoundError(
                    f"{self._central.where}: there is no cluster {cluster} (any more)"
                )
            endpoint = self._hosts.element(known)
            same = (endpoint.host, endpoint.port) == (
                self._central.endpoint.host,
                self._central.endpoint.port,
            )
            self._hosts_by_cluster[cluster] = (
                self._central if same else V3Host(endpoint, self._waits)
            )
        return self._hosts_by_cluster[cluster]

    async def _elements(self, cluster: str) -> Sequence[V3Host]:
        """The Elements to look at for something: of that cluster, or of all that are of interest where it is empty."""
        if cluster:
            return [await self._element(cluster)]
        wanted = self._hosts.settings.cluster
        every = await self.clusters()
        chosen = [each for each in every if not wanted or wanted in {each.uuid, each.name}]
        return [await self._element(each.uuid) for each in chosen or every]

    async def _snapshots_of(self, cluster: str) -> Snapshots:
        if cluster not in self._snapshots:
            self._snapshots[cluster] = Snapshots(await self._element(cluster), self._central)
        return self._snapshots[cluster]

    async def vms(self) -> Sequence[VmSummary]:
        """As ``Prism.vms``."""
        async with aclosing(self._central.pages("vms", "vm")) as items:
            return [read_vm_summary(item) async for item in items]

    async def vm(self, uuid: str) -> Vm:
        """As ``Prism.vm``. What holds a disk's bytes is known to its Element only, which is asked as well."""
        node = await self._central.get(f"vms/{segment(uuid)}")
        element = await self._element(reference_uuid(node.node("status"), "cluster_reference"))
        return read_vm(node, await element.get_v2(f"vms/{segment(uuid)}", _DISKS))

    async def hardware(self, vm: str | Vm) -> Hardware:
        """As ``Prism.hardware``."""
        return read_hardware(vm if isinstance(vm, Vm) else await self.vm(vm), self._central.where)

    async def access(self) -> Sequence[Access]:
        """As ``Prism.access``. The Element is that of the cluster of interest, else of the first one."""
        element: V3Host | None = None
        with suppress(PrismPermissionError):
            elements = await self._elements("")
            element = elements[0] if elements else None
        return await read_access(self._central, element)

    async def create_snapshot(
        self,
        vm: Vm,
        name: str,
        consistency: Consistency,
        expires_at_us: int,
        request_id: UUID,
    ) -> VmSnapshot:
        """As ``Prism.create_snapshot``."""
        snapshots = await self._snapshots_of(vm.cluster)
        return await snapshots.create(vm, name, consistency, expires_at_us, request_id)

    async def snapshot(self, uuid: str, vm: Vm) -> VmSnapshot:
        """As ``Prism.snapshot``. Sizes are those of now: the pages of ``regions`` tell those of then."""
        return await (await self._snapshots_of(vm.cluster)).get(uuid, vm)

    async def extend_snapshot(self, snapshot: VmSnapshot, expires_at_us: int) -> None:
        """As ``Prism.extend_snapshot``. Not every Element can: PrismRefusedError."""
        await (await self._snapshots_of(snapshot.cluster)).extend(snapshot.uuid, expires_at_us)

    async def delete_snapshot(self, uuid: str, cluster: str) -> None:
        """As ``Prism.delete_snapshot``; where ``cluster`` is empty, on every one."""
        clusters = [cluster] if cluster else [each.uuid for each in await self.clusters()]
        for each in clusters:
            with suppress(PrismNotFoundError):
                await (await self._snapshots_of(each)).delete(uuid)

    async def regions(
        self,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        since: tuple[VmSnapshot, DiskSnapshot] | None,
    ) -> AsyncGenerator[RegionPage, None]:
        """As ``Prism.regions``."""
        element = await self._element(snapshot.cluster)
        snapshots = await self._snapshots_of(snapshot.cluster)
        async with aclosing(region_pages(element, snapshots, snapshot, disk, since)) as pages:
            async for page in pages:
                yield page

    @property
    def clones_by_image(self) -> bool:
        """Whether an image is needed first: by configuration, or as ``auto`` has found."""
        return self._exposing.by_image

    async def create_image(
        self, snapshot: VmSnapshot, disk: DiskSnapshot, name: str, request_id: UUID
    ) -> str:
        """As ``Prism.create_image``: the name stands for the request."""
        del request_id
        element = await self._element(snapshot.cluster)
        return await self._exposing.create_image(element, snapshot, disk, name)

    async def delete_image(self, uuid: str) -> None:
        """As ``Prism.delete_image``."""
        with suppress(PrismNotFoundError):
            await self._central.delete(f"images/{segment(uuid)}", "delete an image")

    async def image_file(self, uuid: str) -> AsyncGenerator[bytes, None]:
        """As ``Prism.image_file``."""
        path = f"{V3}/images/{segment(uuid)}/file"
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
        """As ``Prism.create_volume_group``: the name stands for the request. Raises ImageNeededError as well."""
        del request_id
        element = await self._element(snapshot.cluster)
        snapshots = await self._snapshots_of(snapshot.cluster)
        return await self._exposing.create(
            element,
            snapshot,
            disk,
            name,
            secrets,
            image=image,
            is_gone=lambda: snapshots.is_gone(snapshot.uuid),
        )

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None, request_id: UUID
    ) -> Attachment:
        """As ``Prism.attach``: an initiator is attached once, whatever the request."""
        del request_id
        return await self._groups.attach(group, initiator, secrets)

    async def detach(self, group_uuid: str, attachment: Attachment | None) -> None:
        """As ``Prism.detach``."""
        await self._groups.detach(group_uuid, None if attachment is None else attachment.initiator)

    async def delete_volume_group(self, uuid: str) -> None:
        """As ``Prism.delete_volume_group``."""
        await self._groups.delete(uuid)

    async def find(self, prefix: str) -> Sequence[Found]:
        """As ``Prism.find``, on Prism Central and on each Element of interest; all of them must answer.

        Lists are read whole: not every version's filters know how a name begins, and what is missed would stay for ever.
        """
        found: dict[tuple[Kind, str], Found] = {}
        for kind, path, name in _LISTS:
            for one in await self._listed(kind, path, name, prefix):
                found[kind, one.uuid] = one
        await self.clusters()
        wanted = self._hosts.settings.cluster
        for cluster in list(self._clusters.values()):
            if wanted and wanted not in {cluster.uuid, cluster.name}:
                continue
            element = await self._element(cluster.uuid)
            for node in await element.listed(
                "vm_snapshots", "vm_snapshot", lambda node: name_of(node).startswith(prefix)
            ):
                one = read_found(Kind.SNAPSHOT, node, cluster.uuid)
                found[Kind.SNAPSHOT, one.uuid] = one
            for one in await _groups_of(element, cluster, prefix):
                # Prism Central knows more of it, if it knows it.
                found.setdefault((Kind.VOLUME_GROUP, one.uuid), one)
        return list(found.values())

    async def _listed(self, kind: Kind, path: str, name: str, prefix: str) -> list[Found]:
        try:
            nodes = await self._central.listed(
                path, name, lambda node: name_of(node).startswith(prefix)
            )
        except PrismNotFoundError:
            if kind is not Kind.VOLUME_GROUP:
                raise
            return []  # an Element knows them by v2.0 alone
        return [read_found(kind, node) for node in nodes]

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
        """As ``RestorePrism.check_upload``. An Element cannot change the VMs that it makes: it is refused as well."""
        try:
            await self._central.call("POST", "clusters/list", {"kind": "cluster", "length": 1})
        except PrismNotFoundError:
            raise PrismRefusedError(
                f"{self._central.where}: this is a Prism Element; VMs are restored through Prism Central: set prism_central to it"
            ) from None
        await self._uploads.check()

    async def create_empty_image(self, name: str, cluster: str, description: str) -> str:
        """As ``RestorePrism.create_empty_image``."""
        return await self._uploads.create(name, cluster, description)

    async def upload_image(self, uuid: str, path: Path, size: int) -> None:
        """As ``RestorePrism.upload_image``."""
        await self._uploads.upload(uuid, path, size)

    async def create_vm(self, new: NewVm, request_id: UUID) -> str:
        """As ``RestorePrism.create_vm``: the name stands for the request."""
        del request_id
        return await self._restoring.create(new)

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


async def _groups_of(element: V3Host, cluster: Cluster, prefix: str) -> list[Found]:
    """The Element's own volume groups, as an Element's v2.0 makes them."""
    try:
        nodes = await named_v2(element, prefix, begins=True)
    except _NO_SUCH_CALL:
        return []
    return [
        Found(Kind.VOLUME_GROUP, node.uuid("uuid"), node.text("name", ""), cluster.uuid)
        for node in nodes
    ]


__all__ = ["PrismV3"]
