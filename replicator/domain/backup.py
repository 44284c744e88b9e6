# SPDX-License-Identifier: AGPL-3.0-or-later
"""Values of backups that Bacula keeps: what a job's part of a VM was, and what of it the next one goes on from. Pure.

A chain is the backups of one VM by one Bacula job; its log holds these events alone. The bytes are on Bacula's volumes: here
stands what must be known to go on, and what an operator asks for.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

#: Bacula's levels, as metrics and lists call them.
LEVELS: Final = {"F": "full", "D": "differential", "I": "incremental"}
#: What Bacula adds to a job's name to make it unique: a time and a number.
_UNIQUE: Final = len(".0000-00-00_00.00.00_00")
#: Parts that one restore may have to put on top of each other; then a full one begins anew.
PARTS_MAX: Final = 1000


def director_name(job: str) -> str:
    """The name that a job has in the Director's configuration, of its unique one."""
    return job[:-_UNIQUE] or job


class BackupDisk(msgspec.Struct, frozen=True, array_like=True):
    """A disk in a part. ``root`` names the content that it leads to (docs/image-root.md); size in bytes.

    ``image``: the file, of this part or an earlier one, that holds the disk in full, below the deltas.
    """

    disk: str
    identity: str
    size: int
    root: bytes
    kind: Literal["full", "delta"]
    image: str


class BackupPart(msgspec.Struct, frozen=True, array_like=True):
    """What one job has of the VM, which was called ``vm`` then. Times in microseconds since the epoch, UTC.

    ``number`` counts the parts of the chain, ``part`` is its id, ``parent`` that of the part that its deltas start from, empty
    if every disk is full. ``job``: Bacula's unique name; ``level``: what it asked for. ``push_id`` names the snapshot that is the
    reference from then on. ``bytes_stored``: data in the files. ``root`` is the VM's. ``point``: the recovery point that was
    read, 0 for a source.
    """

    number: int
    part: str
    parent: str
    vm: str
    chain: str
    job: str
    job_id: int
    level: str
    push_id: str
    taken_at_us: int
    committed_at_us: int
    duration_us: int
    bytes_stored: int
    root: bytes
    algorithm: int
    disks: tuple[BackupDisk, ...]
    point: int = 0

    @property
    def kind(self) -> str:
        """Full, or delta if any disk is one."""
        return "delta" if self.parent else "full"

    @property
    def name(self) -> PartName:
        """How it is told from others of its chain."""
        return PartName(self.number, self.part)

    def by_identity(self, identity: str) -> BackupDisk | None:
        """The disk that the platform calls so."""
        return next((disk for disk in self.disks if disk.identity == identity), None)


class PartName(msgspec.Struct, frozen=True, array_like=True):
    """A part's number and id."""

    number: int
    part: str


class BackupFailure(msgspec.Struct, frozen=True, array_like=True):
    """A job that came to nothing."""

    job: str
    job_id: int
    level: str
    reason: str
    at_us: int


class LevelSum(msgspec.Struct, frozen=True, array_like=True):
    """What the parts of one level add up to."""

    level: str
    parts: int
    bytes_stored: int


class Backups(msgspec.Struct, frozen=True, array_like=True):
    """All that the events of a chain add up to.

    ``last`` is the newest part, ``full`` the newest of level F: what a job may go on from. ``line``: the parts that ``last``
    needs, the oldest first, itself at the end.
    """

    last: BackupPart | None = None
    full: BackupPart | None = None
    line: tuple[PartName, ...] = ()
    sums: tuple[LevelSum, ...] = ()
    failed: int = 0
    failure: BackupFailure | None = None
    restored: int = 0
    restores_failed: int = 0

    def committed(self, part: BackupPart) -> Backups:
        """With one more part."""
        sums = {each.level: each for each in self.sums}
        known = sums.get(part.level, LevelSum(part.level, 0, 0))
        sums[part.level] = LevelSum(
            part.level, known.parts + 1, known.bytes_stored + part.bytes_stored
        )
        return msgspec.structs.replace(
            self,
            last=part,
            full=part if part.level == "F" else self.full,
            line=self.line_of(part),
            sums=tuple(sums.values()),
            failure=None,
        )

    def line_of(self, part: BackupPart) -> tuple[PartName, ...]:
        """The parts that this one, of which it is the newest, needs: its parent's, and itself."""
        if not part.parent:
            return (part.name,)
        names = [name.part for name in self.line]
        if part.parent in names:
            return (*self.line[: names.index(part.parent) + 1], part.name)
        # Of level F: it needs no other.
        assert self.full is not None
        assert self.full.part == part.parent
        return (self.full.name, part.name)

    def failing(self, failure: BackupFailure) -> Backups:
        """With one more job that failed."""
        return msgspec.structs.replace(self, failed=self.failed + 1, failure=failure)

    @property
    def disk_names(self) -> dict[str, str]:
        """What disks are called, by identity: those of both parts that a job may go on from."""
        names: dict[str, str] = {}
        for part in (self.full, self.last):
            if part is not None:
                names |= {disk.identity: disk.disk for disk in part.disks}
        return names

    @property
    def next_number(self) -> int:
        """What the next part is counted as."""
        return self.last.number + 1 if self.last is not None else 1


__all__ = [
    "LEVELS",
    "PARTS_MAX",
    "BackupDisk",
    "BackupFailure",
    "BackupPart",
    "Backups",
    "LevelSum",
    "PartName",
    "director_name",
]
