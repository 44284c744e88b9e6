# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the source writes down of a push before it makes anything, so that a later process can take it up."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import msgspec

from replicator.domain.model import PushKind
from replicator.log import EventLog
from replicator.push.plan import Start, Unfinished
from replicator.sources.base import SnapshotName


class EntryDisk(msgspec.Struct, frozen=True):
    """A disk of the push. ``compare``: its changes are found by comparing digests.

    ``scan_root``: all of it was read already for a resync, and had this root; only what differs is read again and sent.
    """

    disk: str
    identity: str
    size: int
    since: int
    compare: bool
    base_root: bytes
    scan_root: bytes | None = None


class PushEntry(msgspec.Struct, frozen=True):
    """A push that is not settled. Without ``disks`` its snapshot may be half made, and nothing was sent.

    ``resync``: why all disks are compared with the receiver's digests. ``scanned``: the snapshot is there, all disks were
    read, and their maps are durable.
    """

    push_id: str
    kind: PushKind
    point: int
    parent: int
    parent_root: bytes | None
    reference: str | None
    epoch: int
    started_us: int
    taken_at_us: int = 0
    disks: tuple[EntryDisk, ...] | None = None
    resync: str | None = None
    scanned: bool = False

    @classmethod
    def begin(cls, start: Start, reference: str | None, epoch: int, now_us: int) -> PushEntry:
        """The entry of a new push."""
        return cls(
            push_id=secrets.token_hex(8),
            kind=start.kind,
            point=start.point,
            parent=start.parent,
            parent_root=start.parent_root,
            reference=reference,
            epoch=epoch,
            started_us=now_us,
            resync=start.reason if start.resync else None,
        )

    @property
    def snapshot(self) -> SnapshotName:
        """The snapshot's name at the source."""
        return SnapshotName(self.push_id, self.reference)

    @property
    def rests_on_reference(self) -> bool:
        """Whether its changes are those since the reference. Else the reference only goes when it is committed."""
        return self.reference is not None and self.kind is PushKind.CYCLE and self.resync is None

    @property
    def is_compared(self) -> bool:
        """Whether all disks are read in full for it: nothing rests on change tracking."""
        disks = self.disks or ()
        return all(disk.compare or disk.since == self.point for disk in disks)

    def unfinished(self) -> Unfinished:
        """As the plan sees it."""
        return Unfinished(self.push_id, self.kind, self.parent, self.parent_root)

    def folder(self, work: Path) -> Path:
        """Where its spools lie."""
        return work / f"push-{self.push_id}"


def _key(vm: str) -> str:
    return f"push/{vm}"


async def load(log: EventLog, vm: str) -> PushEntry | None:
    """The unsettled push of a VM."""
    found: Any = await log.journal_get(_key(vm))
    return None if found is None else msgspec.convert(found, PushEntry)


async def store(log: EventLog, vm: str, entry: PushEntry) -> None:
    """Write it down; durable on return."""
    await log.journal_put(_key(vm), msgspec.to_builtins(entry, builtin_types=(bytes,)))


async def settle(log: EventLog, vm: str) -> None:
    """It is settled."""
    await log.journal_delete(_key(vm))
