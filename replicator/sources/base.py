# SPDX-License-Identifier: AGPL-3.0-or-later
"""What every source of a VM's disks offers to the push engine.

A source makes a snapshot of all disks of one VM at one instant and keeps a *reference* (the
snapshot of the last committed point), so that it can say what changed since. Names come first: a
snapshot's name is known, and journalled, before anything is made, and every operation works by name
alone, so that a process that starts after a crash can go on with it, confirm it or remove it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from replicator.disk import DiskView


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """Who the VM is: a UUID that never changes and a name for people."""

    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class SnapshotName:
    """Names a snapshot: the push that it is for, and the push whose snapshot is the reference."""

    push_id: str
    reference: str | None


@dataclass(frozen=True, slots=True)
class HeldSnapshot:
    """A snapshot of ours that takes room at the source: the push that it was made for, and when it was taken, in
    microseconds since the epoch, UTC.
    """

    push_id: str
    taken_at_us: int


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """One disk of a snapshot.

    ``identity`` is what the platform calls it, stable over the disk's life.
    ``view.extents(since=reference)`` raises ReferenceLostError where change tracking cannot answer;
    the caller then compares digests and says so.
    """

    identity: str
    view: DiskView


class Snapshot(Protocol):
    """All disks of a VM at one instant, readable until closed."""

    @property
    def taken_at_us(self) -> int:
        """The instant, in microseconds since the epoch, UTC."""
        ...

    @property
    def disks(self) -> Sequence[SourceDisk]:
        """Every disk of the VM, in a stable order."""
        ...

    @property
    def lost_tracking(self) -> str | None:
        """Why changes since the reference are unknown; None if known, or if none was asked for."""
        ...

    async def check(self) -> None:
        """Raise SnapshotGoneError if what was read is no longer one instant.

        Called before a push is finished.
        """
        ...

    async def aclose(self) -> None:
        """Let go of connections and files; the snapshot itself stays."""
        ...


class Source(Protocol):
    """One VM at its source. Every method raises SourceError where the platform fails."""

    async def identify(self) -> VmIdentity:
        """Who the VM is."""
        ...

    async def take(self, name: SnapshotName) -> Snapshot:
        """Make the snapshot, all disks at one instant, and start tracking changes from there."""
        ...

    async def reopen(self, name: SnapshotName) -> Snapshot:
        """Open an earlier snapshot, perhaps of a process that died. Raises SnapshotGoneError."""
        ...

    async def confirm(self, name: SnapshotName) -> None:
        """The point is committed: this snapshot is the reference now, the older one goes.

        Can be repeated.
        """
        ...

    async def abandon(self, name: SnapshotName) -> None:
        """Remove the snapshot; the reference stays and still covers all changes since.

        Can be repeated.
        """
        ...

    async def held(self) -> Sequence[HeldSnapshot]:
        """What of ours takes room on the platform for this VM, the oldest first, whoever made it.

        A reference counts only where it takes room: records and bitmaps do not.
        """
        ...

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        """Remove what earlier runs left on the platform for this VM, other than these two.

        Returns the names of what was removed.
        """
        ...
