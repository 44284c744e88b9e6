# SPDX-License-Identifier: AGPL-3.0-or-later
"""Values that events carry and that the state of a protected VM is made of. Pure, immutable, small on disk."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid5

import msgspec

from replicator.domain.backup import Backups

#: Namespace of the ids of VM streams; fixed for ever, because logs hold ids made with it.
STREAMS = UUID("6f0a3c1e-2c55-5c7e-9d5e-7b1f0f3a9d21")


def stream_id(vm: UUID, period: int) -> UUID:
    """The id of the event stream of a VM in one period of the log (1, 2, 3 …)."""
    return uuid5(STREAMS, f"/vm/{vm}/{period}")


class PushKind(StrEnum):
    """What a push brings: everything, or what changed."""

    SEED = "seed"
    CYCLE = "cycle"


class PointDisk(msgspec.Struct, frozen=True, array_like=True):
    """One disk of a recovery point.

    ``since`` is the point at which this disk's chain of deltas began (its base is nothing): two points share a chain
    only if it is the same in both. ``root`` names the content (docs/image-root.md).
    """

    disk: str
    identity: str
    size: int
    root: bytes
    since: int


class Point(msgspec.Struct, frozen=True, array_like=True):
    """A recovery point: all disks of a VM at one instant. Times in microseconds since the epoch, UTC."""

    number: int
    parent: int
    push_id: str
    kind: PushKind
    epoch: int
    taken_at_us: int
    committed_at_us: int
    duration_us: int
    bytes_pushed: int
    root: bytes
    disks: tuple[PointDisk, ...]
    #: Grains that change tracking called unchanged, and that were read all the same and were.
    sampled: int = 0
    #: Every disk was read in full for it: nothing rests on change tracking.
    compared: bool = False

    @property
    def is_sure(self) -> bool:
        """Whether it is the source's content whatever change tracking said of it."""
        return self.compared or self.kind is PushKind.SEED

    def disk(self, name: str) -> PointDisk | None:
        """The disk of that name in this point."""
        return next((disk for disk in self.disks if disk.disk == name), None)


class Damage(msgspec.Struct, frozen=True, array_like=True):
    """Where a point does not read back as it was: the file, and the range of the disk in bytes."""

    point: int
    disk: str
    offset: int
    length: int
    file: str
    reason: str


class TestClone(msgspec.Struct, frozen=True, array_like=True):
    """A clone of a point made by ``failover test``."""

    clone_id: str
    point: int
    started_at_us: int


class Suspicion(msgspec.Struct, frozen=True, array_like=True):
    """Where change tracking missed a change: the disk, the byte, and the newest point when it was found."""

    disk: str
    offset: int
    point: int


class RpoBreach(msgspec.Struct, frozen=True, array_like=True):
    """The newest point was older than the recovery point objective.

    ``age_s``: how old ``point`` was when that was seen; ``began_at_us``: when it came to be older than ``target_s``.
    """

    point: int
    age_s: int
    target_s: int
    began_at_us: int


class Balance(msgspec.Struct, frozen=True, array_like=True):
    """All that the events of a VM have added up to. A period of its log begins with one, so that nothing older is needed."""

    vm: str
    name: str
    role: str
    created_us: int
    period: int
    epoch: int
    state: str
    points: tuple[Point, ...]
    newest: Point | None
    applied: int
    damages: tuple[Damage, ...]
    verified: dict[int, int]
    test: TestClone | None
    tracking_lost: str | None
    abandoned: str | None
    abandoned_point: int
    abandoned_push: str | None
    peer_broken: str | None
    suspect: Suspicion | None = None
    doubtful: tuple[int, ...] = ()
    breach: RpoBreach | None = None
    verified_at_us: int = 0
    backups: Backups | None = None


def file_stem(disk: str, since: int) -> str:
    """What a disk's files are called on either side: each chain of deltas has a name of its own."""
    return disk if since == 1 else f"{disk}@{since}"


def next_disk_name(taken: Sequence[str]) -> str:
    """The name ``disk-<N>`` after the highest of ``taken``."""
    numbers = [int(name[5:]) for name in taken if name.startswith("disk-") and name[5:].isdigit()]
    return f"disk-{max(numbers, default=-1) + 1}"


def plain(value: Any) -> Any:
    """What an event stores for ``value``, as it comes back from the log: lists, maps, numbers, text and bytes only.

    Trailing fields that have their defaults are left out, so that a field that is added changes no event that lacks it.
    """
    return msgspec.msgpack.decode(msgspec.msgpack.encode(_trimmed(value)))


def _trimmed(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        fields = list(msgspec.structs.fields(value))
        while fields and not fields[-1].required and _is_default(value, fields[-1]):
            fields.pop()
        return [_trimmed(getattr(value, field.name)) for field in fields]
    if isinstance(value, list | tuple):
        return [_trimmed(item) for item in value]
    return value


def _is_default(value: msgspec.Struct, field: msgspec.structs.FieldInfo) -> bool:
    return bool(getattr(value, field.name) == field.default)
