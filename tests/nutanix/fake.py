# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Prism in memory that implements ``api.Prism``: for what is decided above it, in its order, without sockets.

It can die before or after any call, as if the process that called were killed there; what had been made stays.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import trio

from replicator.disk import Extent
from replicator.hardware import DiskSlot, Hardware
from replicator.prism.errors import PrismNotFoundError, PrismTaskError, RegionsLostError
from replicator.prism.types import (
    Access,
    Attachment,
    Capability,
    Cluster,
    Consistency,
    DiskSnapshot,
    Found,
    Kind,
    RegionPage,
    Secrets,
    Vm,
    VmDisk,
    VmSnapshot,
    VmSummary,
    VolumeGroup,
)

BLOCK = 64 << 10
CLUSTER = "0005b6f1-0000-0000-0000-0000000000aa"
VM = "11111111-1111-4111-8111-111111111111"


class KilledError(BaseException):
    """The process is dead: nothing that it does from now on has an effect."""


class MemoryStore:
    """A journal in memory, shared by the processes of a test."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}

    async def journal_put(self, key: str, value: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.items[key] = value

    async def journal_get(self, key: str) -> Any:
        await trio.lowlevel.checkpoint()
        return self.items.get(key)

    async def journal_delete(self, key: str) -> None:
        await trio.lowlevel.checkpoint()
        self.items.pop(key, None)

    async def journal_items(self, prefix: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {key: value for key, value in self.items.items() if key.startswith(prefix)}


@dataclass
class FakeDisk:
    identity: str
    backing: str
    index: int
    data: bytearray
    volume_group: str | None = None


@dataclass
class FakeWorld:
    """The cluster: it outlives every client."""

    disks: list[FakeDisk]
    quiesce: bool = True
    migrating: bool = False
    power: str = "ON"
    cluster: str = CLUSTER
    now_us: int = 1_767_323_045_000_000
    snapshots: dict[str, tuple[VmSnapshot, dict[str, bytes], int]] = field(default_factory=dict)
    groups: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    attached: dict[str, str] = field(default_factory=dict)
    images: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: dict[UUID, str] = field(default_factory=dict)
    strangers: list[Found] = field(default_factory=list)
    made_by: dict[str, Capability] = field(default_factory=dict)
    deleted: bool = False

    def objects(self) -> list[str]:
        """Names of everything that is there."""
        names = [snapshot.name for snapshot, _, _ in self.snapshots.values()]
        names += [name for name, _ in self.groups.values()]
        return names + [name for name, _ in self.images.values()]

    def shown(self, spoken: Capability) -> dict[str, tuple[VmSnapshot, dict[str, bytes], int]]:
        """The snapshots that an interface knows of: those that were made through it."""
        return {
            uuid: each
            for uuid, each in self.snapshots.items()
            if self.made_by.get(uuid, spoken) is spoken
        }

    def vm(self) -> Vm:
        disks = tuple(
            VmDisk(
                each.identity,
                each.backing,
                "SCSI",
                each.index,
                len(each.data),
                "ct",
                each.volume_group,
            )
            for each in self.disks
        )
        return Vm(VM, "app01", self.cluster, self.power, disks, self.quiesce, self.migrating, {})


class FakePrism:
    """A client of it. ``dies_at``: the number of the call at which the process dies, counted in halves: 2k before call k
    happens, 2k + 1 after.
    """

    clones_by_image = False

    def __init__(
        self,
        world: FakeWorld,
        *,
        capability: Capability = Capability.V3,
        dies_at: int | None = None,
    ) -> None:
        self.world = world
        self.capability = capability
        self.dies_at = dies_at
        self.calls: list[str] = []
        self.dead = False
        #: Errors to raise instead of, or after, a call: by its name (of one disk: "regions IDENTITY").
        self.fails: dict[str, BaseException] = {}
        self.fails_after: dict[str, BaseException] = {}
        #: Asked before and after each call whether, and with what, it fails.
        self.chance: Callable[[str], BaseException | None] | None = None

    @property
    def requests(self) -> int:
        return len(self.calls)

    async def _begin(self, call: str) -> None:
        await trio.lowlevel.checkpoint()
        self._maybe_die(2 * len(self.calls))
        self.calls.append(call)
        if self.chance is not None and (error := self.chance(call)) is not None:
            raise error
        if call in self.fails:
            raise self.fails.pop(call)

    def _end(self, call: str) -> None:
        self._maybe_die(2 * len(self.calls) - 1)
        if self.chance is not None and (error := self.chance(call)) is not None:
            raise error
        if call in self.fails_after:
            raise self.fails_after.pop(call)

    def check_alive(self) -> None:
        """Nothing that a dead process does has an effect, on its own disk either."""
        if self.dead:
            raise KilledError("dead")

    def _maybe_die(self, at: int) -> None:
        if self.dead or at == self.dies_at:
            self.dead = True
            raise KilledError(at)

    async def clusters(self) -> Sequence[Cluster]:
        await self._begin("clusters")
        self._end("clusters")
        return [Cluster(CLUSTER, "cluster-a", None, "127.0.0.1", "7.3", True)]

    async def vms(self) -> Sequence[VmSummary]:
        await self._begin("vms")
        if self.world.deleted:
            return []
        return [VmSummary(VM, "app01", self.world.cluster, self.world.power)]

    async def vm(self, uuid: str) -> Vm:
        await self._begin("vm")
        assert uuid == VM
        if self.world.deleted:
            raise PrismNotFoundError(f"no VM {uuid}")
        self._end("vm")
        return self.world.vm()

    async def hardware(self, vm: str | Vm) -> Hardware:
        """One of one socket, in no subnet."""
        told = vm if isinstance(vm, Vm) else await self.vm(vm)
        await trio.lowlevel.checkpoint()
        slots = [
            DiskSlot(identity=d.identity, bus="scsi", index=d.index, size=d.size)
            for d in told.disks
        ]
        return Hardware(platform="nutanix", uuid=told.uuid, name=told.name, disks=tuple(slots))

    async def access(self) -> Sequence[Access]:
        await self._begin("access")
        return []

    async def create_snapshot(
        self,
        vm: Vm,
        name: str,
        consistency: Consistency,
        expires_at_us: int,
        request_id: UUID,
    ) -> VmSnapshot:
        await self._begin("create_snapshot")
        world = self.world
        if request_id not in world.requests:
            uuid = str(uuid4())
            disks = tuple(
                DiskSnapshot(
                    each.identity, each.backing, f"{uuid}/{each.identity}", "", len(each.data)
                )
                for each in reversed(world.disks)
                if each.volume_group is None
            )
            world.now_us += 1_000_000
            snapshot = VmSnapshot(uuid, name, vm.uuid, vm.cluster, world.now_us, consistency, disks)
            data = {each.identity: bytes(each.data) for each in world.disks}
            world.snapshots[uuid] = (snapshot, data, expires_at_us)
            world.requests[request_id] = uuid
            world.made_by[uuid] = self.capability
        self._end("create_snapshot")
        return world.snapshots[world.requests[request_id]][0]

    async def snapshot(self, uuid: str, vm: Vm) -> VmSnapshot:
        del vm
        await self._begin("snapshot")
        if uuid not in self.world.shown(self.capability):
            raise PrismNotFoundError(f"no snapshot {uuid}")
        self._end("snapshot")
        return self.world.snapshots[uuid][0]

    async def extend_snapshot(self, snapshot: VmSnapshot, expires_at_us: int) -> None:
        await self._begin("extend_snapshot")
        held, data, _ = self.world.shown(self.capability)[snapshot.uuid]
        self.world.snapshots[snapshot.uuid] = (held, data, expires_at_us)

    async def delete_snapshot(self, uuid: str, cluster: str) -> None:
        await self._begin("delete_snapshot")
        assert cluster
        if uuid in self.world.shown(self.capability):
            del self.world.snapshots[uuid]
        self._end("delete_snapshot")

    async def regions(
        self,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        since: tuple[VmSnapshot, DiskSnapshot] | None,
    ) -> AsyncGenerator[RegionPage, None]:
        await self._begin("regions")
        if f"regions {disk.disk}" in self.fails:
            raise self.fails.pop(f"regions {disk.disk}")
        data = self.world.snapshots[snapshot.uuid][1][disk.disk]
        if since is not None and since[0].uuid not in self.world.shown(self.capability):
            raise RegionsLostError(f"snapshot {since[0].uuid} is gone")
        old = b"" if since is None else self.world.snapshots[since[0].uuid][1][disk.disk]
        page: list[Extent] = []
        for at in range(0, len(data), BLOCK):
            now = data[at : at + BLOCK]
            before = old[at : at + BLOCK].ljust(len(now), b"\0")
            # The grown part is left out where it is zero, as Prism may do it.
            if now != before:
                page.append(Extent(at, len(now), zero=not any(now)))
            if len(page) == 3:
                yield RegionPage(len(data), tuple(page))
                page = []
        self._end("regions")
        yield RegionPage(len(data), tuple(page))

    async def create_image(
        self, snapshot: VmSnapshot, disk: DiskSnapshot, name: str, request_id: UUID
    ) -> str:
        del request_id
        await self._begin("create_image")
        uuid = str(uuid4())
        self.world.images[uuid] = (name, self.world.snapshots[snapshot.uuid][1][disk.disk])
        self._end("create_image")
        return uuid

    async def delete_image(self, uuid: str) -> None:
        await self._begin("delete_image")
        self.world.images.pop(uuid, None)
        self._end("delete_image")

    async def image_file(self, uuid: str) -> AsyncGenerator[bytes, None]:
        await self._begin("image_file")
        data = self.world.images[uuid][1]
        self._end("image_file")
        for at in range(0, len(data), 100_001):
            yield data[at : at + 100_001]

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
        del secrets, request_id, image
        await self._begin("create_volume_group")
        uuid = str(uuid4())
        data = self.world.snapshots[snapshot.uuid][1][disk.disk]
        self.world.groups[uuid] = (name, data)
        self._end("create_volume_group")
        return VolumeGroup(uuid, name, f"{name}-{uuid}", {0: len(data)})

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None, request_id: UUID
    ) -> Attachment:
        del secrets, request_id
        await self._begin("attach")
        self.world.attached[group.uuid] = initiator
        self._end("attach")
        return Attachment(str(uuid4()), initiator)

    async def detach(self, group_uuid: str, attachment: Attachment | None) -> None:
        del attachment
        await self._begin("detach")
        self.world.attached.pop(group_uuid, None)
        self._end("detach")

    async def delete_volume_group(self, uuid: str) -> None:
        await self._begin("delete_volume_group")
        self.world.attached.pop(uuid, None)
        self.world.groups.pop(uuid, None)
        self._end("delete_volume_group")

    async def find(self, prefix: str) -> Sequence[Found]:
        await self._begin("find")
        self._end("find")
        world = self.world
        found = [
            Found(
                Kind.SNAPSHOT,
                uuid,
                snapshot.name,
                snapshot.cluster,
                snapshot.vm,
                snapshot.taken_at_us,
            )
            for uuid, (snapshot, _, _) in world.shown(self.capability).items()
        ]
        found += [Found(Kind.VOLUME_GROUP, uuid, name) for uuid, (name, _) in world.groups.items()]
        found += [Found(Kind.IMAGE, uuid, name) for uuid, (name, _) in world.images.items()]
        return [each for each in [*found, *world.strangers] if each.name.startswith(prefix)]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def failed_task(timed_out: bool = False) -> PrismTaskError:
    return PrismTaskError("the task failed", "kQuiesceError", timed_out=timed_out)
