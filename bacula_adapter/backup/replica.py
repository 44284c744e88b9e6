# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recovery points of the receiver on this host as a source: production is not touched.

The running receiver exports a point's disks (NBD over a Unix socket) and says what changed between two points. A reference is
the number of a point: it takes nothing of its own, and where the receiver does not keep it any more, digests are compared.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import trio

from bacula_adapter.backup.machine import Loss, Machine, Machines
from bacula_adapter.backup.machines import folder_name
from replicator.cli.control import ControlClient, vm_path
from replicator.config import Config
from replicator.disk import Extent
from replicator.errors import (
    ReferenceLostError,
    RefusedError,
    SnapshotGoneError,
    SourceError,
    UsageError,
    WireError,
)
from replicator.log import EventLog
from replicator.nbd.client import NbdClient, open_nbd
from replicator.nbd.protocol import BASE_ALLOCATION
from replicator.nursery import flat_nursery
from replicator.sources.base import HeldSnapshot, SnapshotName, Source, SourceDisk, VmIdentity
from replicator.sources.qemu_view import QemuDiskView
from replicator.sources.selection import entries, is_chosen, is_one_vm, matches

_logger = logging.getLogger(__name__)

#: Reads of one disk that are under way at once.
_DEPTH: Final = 16
_PUSH: Final = re.compile(r"p([1-9][0-9]{0,18})x([0-9a-f]{16})x[0-9a-f]{8}")
_SIZE_MAX: Final = 1 << 50
_DISKS_MAX: Final = 10_000
_DISK: Final = re.compile(r"disk-[0-9]{1,4}")
_CLOSE_S: Final = 10.0


class PointDisk:
    """A disk of a point, as the receiver says. Raises WireError for what cannot be one."""

    def __init__(self, said: Any) -> None:
        try:
            self.disk, self.identity = said["disk"], said["identity"]
            self.size = said["size"]
        except (KeyError, TypeError) as error:
            raise WireError("the receiver describes a disk otherwise than it should") from error
        good = isinstance(self.size, int) and 0 < self.size <= _SIZE_MAX
        texts = isinstance(self.disk, str) and isinstance(self.identity, str)
        if not good or not texts or not _DISK.fullmatch(self.disk) or len(self.identity) > 255:
            raise WireError("the receiver describes a disk that cannot be")


async def read_point(
    client: ControlClient, vm: UUID, number: int
) -> tuple[str, int, list[PointDisk]]:
    """The push that made a point, when it was taken, and its disks. Raises RefusedError where it is not kept, WireError."""
    said = await client.get(vm_path(str(vm), "points", str(number)))
    push, taken, disks = said.get("push_id"), said.get("taken_at_us"), said.get("disks")
    if not isinstance(push, str) or not isinstance(taken, int) or not isinstance(disks, list):
        raise WireError("the receiver describes a point otherwise than it should")
    if len(disks) > _DISKS_MAX:
        raise WireError(f"the receiver describes a point of {len(disks)} disks")
    return push, taken, [PointDisk(disk) for disk in disks]


@asynccontextmanager
async def open_replicas(config: Config) -> AsyncIterator[Machines]:
    """The VMs of the receiver on this host."""
    await trio.lowlevel.checkpoint()
    yield Replicas(config)


class Replicas:
    """Implements ``Machines``: the VMs that the running receiver has, as far as ``vm`` and ``exclude`` choose them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._client = ControlClient(config.control_path)

    async def select(self) -> Sequence[Machine]:
        """See ``Machines``. Raises RefusedError where a point is not kept, ReplicatorError where no receiver runs."""
        config = self._config
        said = (await self._client.get("/v1/status")).get("vms")
        if not isinstance(said, list):
            raise WireError("the receiver's status is none")
        if not entries(config.vm):
            raise UsageError("vm: names no VM; * takes every one")
        found = []
        for each in said:
            name, uuid, newest = each.get("vm"), UUID(each.get("uuid")), each.get("newest_point")
            if not is_chosen(str(uuid), name, config.vm, config.exclude):
                continue
            if newest is None:
                if is_one_vm(config.vm):
                    raise RefusedError(f"VM {name} has no recovery point yet")
                _logger.warning("%s has no recovery point yet: it is not backed up", name)
                continue
            found.append((name, uuid, config.point or int(newest)))
        for entry in entries(config.vm):
            if not any(matches(entry, str(uuid), name) for name, uuid, _ in found):
                _logger.warning("vm: the receiver has no VM %s with a recovery point", entry)
        if not found:
            raise UsageError(
                f"vm: the receiver has no VM with a recovery point that {config.vm!r} chooses"
            )
        taken: set[str] = set()
        return [
            await self._machine(name, uuid, point, folder_name(name, str(uuid), taken))
            for name, uuid, point in sorted(found, key=lambda each: (each[0], str(each[1])))
        ]

    async def query(self, parameter: str) -> Sequence[tuple[str, str]]:
        """See ``Machines``: ``point`` lists the recovery points of the VMs chosen."""
        if parameter != "point":
            raise UsageError(f"query: {parameter} is not known here (vm, point)")
        found = []
        for machine in await self.select():
            said = await self._client.get(vm_path(str(machine.uuid), "points"))
            found += [
                ("point", f"{machine.folder} {p['point']} {p['taken_at']}") for p in said["points"]
            ]
        return found

    async def _machine(self, name: str, uuid: UUID, point: int, folder: str) -> Machine:
        push, _, disks = await read_point(self._client, uuid, point)
        tail = f"p{point}x{_short(push)}"

        def push_id(own: Config) -> str:
            del own
            return f"{tail}x{secrets.token_hex(4)}"

        async def sizes() -> Sequence[tuple[str, int]]:
            await trio.lowlevel.checkpoint()
            return [(disk.identity, disk.size) for disk in disks]

        return Machine(
            root="@replica",
            folder=folder,
            name=name,
            uuid=uuid,
            open_source=partial(_open_source, self._client, uuid, name),
            loss=Loss.COMPARE,
            point=point,
            push_id=push_id,
            disks=sizes,
        )


def _short(push_id: str) -> str:
    """Sixteen hexadecimal digits that stand for the push that made a point: its number may come again, after a restore say."""
    return hashlib.sha256(push_id.encode()).hexdigest()[:16]


@asynccontextmanager
async def _open_source(
    client: ControlClient, vm: UUID, name: str, own: Config, log: EventLog
) -> AsyncIterator[Source]:
    del own, log
    async with flat_nursery() as nursery:
        yield ReplicaSource(client, vm, name, nursery)
        nursery.cancel_scope.cancel()


class ReplicaSource:
    """Implements ``Source``. A push's id says which point is read: nothing is made, and nothing is to be removed."""

    def __init__(self, client: ControlClient, vm: UUID, name: str, nursery: trio.Nursery) -> None:
        self._client = client
        self._identity = VmIdentity(vm, name)
        self._nursery = nursery

    async def identify(self) -> VmIdentity:
        """The VM as the receiver knows it."""
        await trio.lowlevel.checkpoint()
        return self._identity

    async def take(self, name: SnapshotName) -> ReplicaSnapshot:
        """Open the point; it is held until the snapshot is closed. Raises RefusedError where it is not kept."""
        number, short = _parse(name.push_id)
        push, taken_at_us, disks = await read_point(self._client, self._identity.uuid, number)
        if _short(push) != short:
            raise SnapshotGoneError(
                f"point {number} of VM {self._identity.name} is another one now"
            )
        older, lost = None, None
        if name.reference is not None:
            older, lost = await self._older(name.reference)
        leave = trio.Event()
        views: list[SourceDisk] = []
        ended: list[trio.Event] = []
        for disk in disks:
            over = trio.Event()
            client: NbdClient = await self._nursery.start(self._export, number, disk, leave, over)
            changes = _Changes(self._client, self._identity.uuid, disk.disk, older, number)
            views.append(
                SourceDisk(disk.identity, ReplicaView(client, name.reference, changes, lost))
            )
            ended.append(over)
        return ReplicaSnapshot(taken_at_us, views, leave, ended)

    async def _older(self, reference: str) -> tuple[int | None, str | None]:
        """The point of the reference, or why it is of no use."""
        number, short = _parse(reference)
        try:
            push, _, _ = await read_point(self._client, self._identity.uuid, number)
        except RefusedError as error:
            return None, str(error)
        if _short(push) != short:
            return None, f"point {number} is another one now"
        return number, None

    async def _export(
        self,
        number: int,
        disk: PointDisk,
        leave: trio.Event,
        over: trio.Event,
        *,
        task_status: trio.TaskStatus[NbdClient] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hold one disk readable until ``leave``."""
        body = {"point": number, "disk": disk.disk}
        target = vm_path(str(self._identity.uuid), "export")
        try:
            async with self._client.stream(target, body) as items:
                said: Any = None
                async for item in items:
                    said = item.get("export")
                    break
                if not isinstance(said, dict) or said.get("size") != disk.size:
                    raise WireError(
                        f"the receiver does not export {disk.disk} as it is in the point"
                    )
                socket, export = Path(str(said.get("socket"))), str(said.get("name"))
                async with open_nbd(
                    socket, export, contexts=(BASE_ALLOCATION,), depth=_DEPTH
                ) as client:
                    if client.size != disk.size or BASE_ALLOCATION not in client.contexts:
                        raise SourceError(f"{disk.disk} is exported otherwise than it should be")
                    task_status.started(client)
                    await leave.wait()
        finally:
            over.set()

    async def reopen(self, name: SnapshotName) -> ReplicaSnapshot:
        """As ``take``: it is the same point."""
        return await self.take(name)

    async def confirm(self, name: SnapshotName) -> None:
        """Nothing is kept for a reference."""
        del name
        await trio.lowlevel.checkpoint()

    async def abandon(self, name: SnapshotName) -> None:
        """Nothing was made."""
        del name
        await trio.lowlevel.checkpoint()

    async def held(self) -> list[HeldSnapshot]:
        """Nothing of ours takes room."""
        await trio.lowlevel.checkpoint()
        return []

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        """Nothing is left behind."""
        del keep, reference
        await trio.lowlevel.checkpoint()
        return []


def _parse(push_id: str) -> tuple[int, str]:
    match = _PUSH.fullmatch(push_id)
    if match is None:
        raise SourceError(f"{push_id!r} names no recovery point")
    return int(match[1]), match[2]


class _Changes:
    """Asks the receiver what changed of a disk between two points."""

    def __init__(
        self, client: ControlClient, vm: UUID, disk: str, older: int | None, newer: int
    ) -> None:
        self._client = client
        self._target = vm_path(str(vm), "changes")
        self._body = {"disk": disk, "from": older, "point": newer}
        self.known = older is not None

    async def extents(self, size: int) -> AsyncGenerator[Extent, None]:
        """Raises ReferenceLostError where it is not kept, WireError."""
        at = 0
        try:
            async with self._client.stream(self._target, self._body) as items:
                async for item in items:
                    if "result" in item:
                        return
                    for extent in _rows(item.get("changes"), at, size):
                        yield extent
                        at = extent.end
        except RefusedError as error:
            raise ReferenceLostError(str(error)) from error
        raise WireError("the receiver's answer ended before all changes were told")


def _rows(rows: Any, at: int, size: int) -> list[Extent]:
    """Rows of offset and length, ascending from ``at`` on, inside the disk. Raises WireError."""
    found = []
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, list) or len(row) != 2 or not all(type(n) is int for n in row):
            raise WireError("the receiver tells changes otherwise than it should")
        offset, length = row
        if offset < at or length <= 0 or offset + length > size:
            raise WireError("the receiver tells of changes that cannot be")
        found.append(Extent(offset, length))
        at = offset + length
    return found


class ReplicaView(QemuDiskView):
    """A disk of a point, over NBD; ``changes`` are those since ``reference``, ``lost`` says why they cannot be told."""

    def __init__(
        self, client: NbdClient, reference: str | None, changes: _Changes, lost: str | None
    ) -> None:
        super().__init__(
            client,
            reference=None,
            bitmap=None,
            known_size=client.size,
            lost=None,
            guard=trio.lowlevel.checkpoint,
        )
        self._since = reference
        self._told = changes
        self._why = lost

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        """See ``DiskView``."""
        if since is not None and (since != self._since or not self._told.known):
            raise ReferenceLostError(self._why or f"nothing is known of changes since {since}")
        found = super().extents() if since is None else self._told.extents(self.size)
        async with aclosing(found):
            async for extent in found:
                yield extent


class ReplicaSnapshot:
    """Implements ``Snapshot``: a recovery point that is held."""

    lost_tracking = None

    def __init__(
        self,
        taken_at_us: int,
        disks: Sequence[SourceDisk],
        leave: trio.Event,
        ended: Sequence[trio.Event],
    ) -> None:
        self._taken_at_us = taken_at_us
        self._disks = disks
        self._leave = leave
        self._ended = ended

    @property
    def taken_at_us(self) -> int:
        """When the point was taken at the source, in microseconds since the epoch, UTC."""
        return self._taken_at_us

    @property
    def disks(self) -> Sequence[SourceDisk]:
        """Its disks, in their order."""
        return self._disks

    async def check(self) -> None:
        """A point that is held does not change; one that cannot be held any more fails to be read."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Let go of the point; can be repeated."""
        self._leave.set()
        for over in self._ended:
            await over.wait()
        await trio.lowlevel.checkpoint()


__all__ = ["ReplicaSource", "Replicas", "open_replicas", "read_point"]
