# SPDX-License-Identifier: AGPL-3.0-or-later
"""From which part a job goes on, and how each disk is backed up. Decides; touches nothing but to ask what changed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from bacula_adapter.backend.interface import Level
from bacula_adapter.backup.machine import Loss
from replicator.disk import DiskView, Extent
from replicator.domain.backup import PARTS_MAX, BackupDisk, BackupPart, Backups
from replicator.errors import ReferenceLostError
from replicator.sources.base import Snapshot

#: What is told, and what an operator looks for, where a job cannot go on from the one before.
REFERENCE_LOST: Final = "reference_snapshot not found"
FALL_BACK: Final = "falling back to Full"
COMPARING: Final = "comparing digests with the last backup's"


@dataclass(frozen=True, slots=True)
class Base:
    """The part that a job goes on from; None: every disk is sent in full. ``why``: though Bacula asked for less."""

    part: BackupPart | None
    why: str | None = None


def choose_base(level: Level, previous: str, known: Backups) -> Base:
    """The kept part that is the job that Bacula goes on from (``previous``, its unique name)."""
    if level is Level.FULL:
        return Base(None)
    kept = [part for part in (known.last, known.full) if part is not None]
    if not kept:
        return Base(None, "no backup of this VM by this job is known here")
    if not previous:
        return Base(None, "Bacula does not say from which job this one goes on")
    for part in kept:
        if part.job == previous:
            if level is Level.DIFFERENTIAL and part.level != Level.FULL:
                # A restore of this job takes the last Full and it alone.
                return Base(None, f"a Differential is to go on from {previous}, which is no Full")
            if len(known.line) >= PARTS_MAX and part is known.last:
                return Base(None, f"{len(known.line)} parts stand on top of each other already")
            return Base(part)
    names = " and ".join(dict.fromkeys(part.job for part in kept))
    return Base(None, f"Bacula goes on from job {previous}, and what is kept here is of {names}")


class Way(Enum):
    """How a disk is backed up."""

    FULL = auto()
    #: What changed since the reference, by the platform's tracking.
    CHANGES = auto()
    #: All is read, and what differs from the map is sent.
    COMPARE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """A disk of a snapshot. ``base``: what it is in the part that the job goes on from, unless it is sent in full.

    ``between``: the disk in the last part, where that is a later one than the base: what differs between the two is sent too.
    ``why``: why it is sent in full, or compared, though Bacula asked for less.
    """

    disk: str
    identity: str
    view: DiskView
    way: Way
    base: BackupDisk | None = None
    between: BackupDisk | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What the disks are planned with. ``misfit`` says why a part's map of a disk cannot be used, or None; it blocks.

    ``loss``: what is done where change tracking cannot answer.
    """

    base: BackupPart | None
    last: BackupPart | None
    loss: Loss
    misfit: Callable[[BackupPart, BackupDisk], str | None]


def plan_disk(chosen: Chosen, disk: str, identity: str, view: DiskView) -> DiskPlan:
    """How to back a disk up, before anything is asked of change tracking. Blocks."""
    base, last = chosen.base, chosen.last

    def full(why: str | None) -> DiskPlan:
        return DiskPlan(disk=disk, identity=identity, view=view, way=Way.FULL, why=why)

    if base is None:
        return full(None)
    old = base.by_identity(identity)
    if old is None:
        return full(f"it is new since job {base.job}")
    if view.size < old.size:
        return full(f"it shrank from {old.size} to {view.size} bytes")
    if (misfit := chosen.misfit(base, old)) is not None:
        return full(misfit)
    between: BackupDisk | None = None
    if chosen.loss is not Loss.ALWAYS and last is not None and last.part != base.part:
        between = last.by_identity(identity)
        if between is None:
            return full(f"it was not in job {last.job}")
        if not old.size <= between.size <= view.size:
            return full(f"it was of another size in job {last.job}")
        if (misfit := chosen.misfit(last, between)) is not None:
            return full(misfit)
    way = Way.COMPARE if chosen.loss is Loss.ALWAYS else Way.CHANGES
    return DiskPlan(disk=disk, identity=identity, view=view, way=way, base=old, between=between)


async def ask_tracking(
    plan: DiskPlan, snapshot: Snapshot, reference: str | None, loss: Loss
) -> DiskPlan:
    """The plan, once change tracking was asked: where it cannot answer, what ``loss`` says is done."""
    if plan.way is not Way.CHANGES:
        return plan
    why = snapshot.lost_tracking
    if why is None and reference is None:
        why = "there is no reference"
    if why is None:
        why = await _why_untracked(plan.view.extents(reference))
    if why is None:
        return plan
    if loss is Loss.COMPARE:
        return replace(plan, way=Way.COMPARE, between=None, why=why)
    return DiskPlan(disk=plan.disk, identity=plan.identity, view=plan.view, way=Way.FULL, why=why)


async def _why_untracked(extents: AsyncGenerator[Extent, None]) -> str | None:
    """Why change tracking cannot answer for a disk; None if it does."""
    async with aclosing(extents):
        try:
            async for _ in extents:
                break
        except ReferenceLostError as error:
            return str(error)
    return None


def told(why: str, *, compared: bool = False) -> str:
    """The message that a Full is made where less was asked for, or that digests are compared."""
    text = why if why.startswith(REFERENCE_LOST) else f"{REFERENCE_LOST}: {why}"
    return f"{text}; {COMPARING if compared else FALL_BACK}"


__all__ = [
    "COMPARING",
    "FALL_BACK",
    "REFERENCE_LOST",
    "Base",
    "Chosen",
    "DiskPlan",
    "Way",
    "ask_tracking",
    "choose_base",
    "plan_disk",
    "told",
]
