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
    """A disk of the push. ``compare``: its changes are found by comparing digests."""

    disk: str
    identity: str
    size: int
    since: int
    compare: bool
    base_root: bytes


class PushEntry(msgspec.Struct, frozen=True):
    """A push that is not settled. Without ``disks`` its snapshot may be half made, and nothing was sent."""

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
        )

    @property
    def snapshot(self) -> SnapshotName:
        """The snapshot's name at the source."""
        return SnapshotName(self.push_id, self.reference)

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
