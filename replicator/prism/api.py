# SPDX-License-Identifier: AGPL-3.0-or-later
"""The one interface that hides v3 from v4. Every method raises PrismError; cancelled, what was asked may still happen.

Methods that make something take a ``request_id``: given again after a crash or a lost answer, Prism does not do it twice.
They return once Prism's task has ended well. Methods that remove something are done also where it is gone already.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Protocol
from uuid import UUID

from replicator.hardware import Hardware
from replicator.prism.types import (
    Access,
    Attachment,
    Capability,
    Cluster,
    Consistency,
    Container,
    DiskSnapshot,
    Found,
    NewVm,
    RegionPage,
    Secrets,
    Subnet,
    Vm,
    VmSnapshot,
    VmSummary,
    VolumeGroup,
)


class Prism(Protocol):
    """One Prism Central (or Element) and the clusters behind it."""

    @property
    def capability(self) -> Capability:
        """Which interface is spoken."""
        ...

    @property
    def requests(self) -> int:
        """How many HTTP requests were sent so far, to all hosts."""
        ...

    async def clusters(self) -> Sequence[Cluster]:
        """Every AHV cluster, Prism Central itself left out."""
        ...

    async def vms(self) -> Sequence[VmSummary]:
        """Every VM of every cluster."""
        ...

    async def vm(self, uuid: str) -> Vm:
        """One VM with its disks. Raises PrismNotFoundError."""
        ...

    async def hardware(self, vm: str | Vm) -> Hardware:
        """What a VM is made of: by its id, or from what ``vm`` has told, which saves the requests for it. Disks of volume groups
        are left out. Names of subnets, containers and clusters are asked for once; what the account may not see is empty.
        """
        ...

    async def access(self) -> Sequence[Access]:
        """What the account may do, for the three duties: backup, VM administration, clusters read-only."""
        ...

    # Snapshots

    async def create_snapshot(
        self,
        vm: Vm,
        name: str,
        consistency: Consistency,
        expires_at_us: int,
        request_id: UUID,
    ) -> VmSnapshot:
        """All disks of ``vm`` at one instant. The ``consistency`` of what comes back is what Prism says that it is."""
        ...

    async def snapshot(self, uuid: str, vm: Vm) -> VmSnapshot:
        """One that was made earlier, its disks matched with the VM's. Raises PrismNotFoundError."""
        ...

    async def extend_snapshot(self, snapshot: VmSnapshot, expires_at_us: int) -> None:
        """Have it expire later."""
        ...

    async def delete_snapshot(self, uuid: str, cluster: str) -> None:
        """Delete it; fine where it is gone."""
        ...

    def regions(
        self,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        since: tuple[VmSnapshot, DiskSnapshot] | None,
    ) -> AsyncGenerator[RegionPage, None]:
        """What changed since the older snapshot of the same disk; without one, what was ever written.

        Ranges left out are unchanged (without ``since``: zeros). Raises RegionsLostError where the reference cannot serve,
        PrismAnswerError where pages do not advance or contradict each other.
        """
        ...

    # Reading: a volume group of one disk, cloned from a snapshot's disk

    @property
    def clones_by_image(self) -> bool:
        """Whether ``create_volume_group`` needs an image of the disk first (v3, by configuration)."""
        ...

    async def create_image(
        self, snapshot: VmSnapshot, disk: DiskSnapshot, name: str, request_id: UUID
    ) -> str:
        """An image of a snapshot's disk; returns its id."""
        ...

    async def delete_image(self, uuid: str) -> None:
        """Delete it; fine where it is gone."""
        ...

    def image_file(self, uuid: str) -> AsyncGenerator[bytes, None]:
        """An image's bytes from its beginning to its end, in one sequential answer, in pieces of any size.

        Ends early, with an error, where the answer does. Close it (``aclosing``) if it is left before its end.
        """
        ...

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
        """A volume group with this disk alone, as number 0; the clone does not change with the VM.

        Raises ImageNeededError where v3 found out just now that an image is needed first (``clones_by_image`` is true then): make
        one, and call again with the same request id. Nothing is left of what was tried.
        """
        ...

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None, request_id: UUID
    ) -> Attachment:
        """Let an initiator log in."""
        ...

    async def detach(self, group_uuid: str, attachment: Attachment | None) -> None:
        """Take that back; with None, of every initiator. Fine where it is not attached."""
        ...

    async def delete_volume_group(self, uuid: str) -> None:
        """Detach whoever is attached, and delete it; fine where it is gone."""
        ...

    # What is ours

    async def find(self, prefix: str) -> Sequence[Found]:
        """Every snapshot, volume group, image and VM whose name begins with ``prefix``, on every cluster."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


class RestorePrism(Prism, Protocol):
    """What is asked of Prism besides, to make a VM of images."""

    async def subnets(self, cluster: str) -> Sequence[Subnet]:
        """The subnets that a VM on that cluster can be in."""
        ...

    async def containers(self, cluster: str) -> Sequence[Container]:
        """The storage containers of a cluster, its own ones among them."""
        ...

    async def macs(self) -> frozenset[str]:
        """MAC addresses of the NICs of all VMs, in lower case."""
        ...

    async def check_upload(self) -> None:
        """Raises PrismRefusedError where images cannot be uploaded here, and says what to do."""
        ...

    async def create_empty_image(self, name: str, cluster: str, description: str) -> str:
        """An image without bytes, to be placed on ``cluster``; returns its id. The name stands for the request."""
        ...

    async def upload_image(self, uuid: str, path: Path, size: int) -> None:
        """Give an image the bytes of a file, all ``size`` of them, holes as zeros; Prism checks their SHA-256.

        Once: an upload that failed or was cancelled cannot be gone on with, nor repeated for the same image. Raises RefusedError
        for a file that is of another size.
        """
        ...

    async def create_vm(self, new: NewVm, request_id: UUID) -> str:
        """A VM that is off; returns its id. Name and request id stand for the request."""
        ...

    async def rename_vm(self, uuid: str, name: str) -> None:
        """Give it another name."""
        ...

    async def power_on(self, uuid: str) -> None:
        """Have it run; fine where it does."""
        ...

    async def delete_vm(self, uuid: str) -> None:
        """Delete it with its disks, whether it runs or not; fine where it is gone."""
        ...
