# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which files of which parts make up a disk, decided from the descriptions alone. Pure.

Of each VM the newest part counts. Its disks are followed back from part to parent, up to a full image. What Bacula hands over
beside that (parts before a later Full, everything that a VirtualFull has put together) is not needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from bacula_adapter.description import Description, PartDisk
from bacula_adapter.names import VirtualName, parse_name
from replicator.errors import DamageError, UsageError

#: Files that a message names; there may be thousands.
_NAMED_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One file of a disk, and the part that it belongs to."""

    disk: PartDisk
    part: Description

    @property
    def file(self) -> str:
        """Its name in the backup."""
        return self.disk.file


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """A disk: its files, the full image first. ``lacking``: why that is not all, empty if it is."""

    newest: Description
    disk: str
    steps: tuple[Step, ...]
    lacking: str = ""

    @property
    def target(self) -> PartDisk:
        """The disk as it will be."""
        return self.steps[-1].disk

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.disk} of VM {self.newest.vm}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The newest part of each VM, and its disks. ``needs``: where a file goes; ``fulls``: the roots of all images known by name;
    ``parts`` and ``names``: the ids and the VMs of all parts known.
    """

    vms: tuple[Description, ...] = ()
    disks: tuple[DiskPlan, ...] = ()
    parts: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    needs: dict[str, list[tuple[DiskPlan, int]]] = field(default_factory=dict)
    fulls: dict[str, set[bytes]] = field(default_factory=dict)

    def of(self, part: Description) -> list[DiskPlan]:
        """The disks of a VM, in their order."""
        return [plan for plan in self.disks if plan.newest == part]

    def is_superfluous(self, name: VirtualName) -> bool:
        """Whether all is known that this file could belong to, and it is not needed."""
        if str(name) in self.needs:
            return False
        if name.kind == "delta":
            return name.part_id in self.parts
        whole = all(not plan.lacking for plan in self.disks)
        return whole and name.vm in self.names


def make_plan(descriptions: Iterable[Description]) -> Plan:
    """Put the parts in order. Raises DamageError where they contradict each other."""
    known: dict[tuple[str, str], Description] = {}
    for part in descriptions:
        other = known.setdefault((part.uuid, part.part), part)
        if other != part:
            raise DamageError(f"part {part.part} of VM {part.vm} is described twice, and not alike")
    newest = _newest(known.values())
    disks = [_follow(part, disk, known) for part in newest for disk in part.disks]
    needs: dict[str, list[tuple[DiskPlan, int]]] = defaultdict(list)
    for plan in disks:
        for index, step in enumerate(plan.steps):
            needs[step.file].append((plan, index))
    fulls: dict[str, set[bytes]] = defaultdict(set)
    for part in known.values():
        for disk in part.disks:
            if disk.kind == "full":
                fulls[disk.file].add(disk.root)
    return Plan(
        vms=tuple(newest),
        disks=tuple(disks),
        parts=frozenset(part.part for part in known.values()),
        names=frozenset(part.vm for part in known.values()),
        needs=dict(needs),
        fulls=dict(fulls),
    )


def _newest(parts: Iterable[Description]) -> list[Description]:
    """The newest part of each VM, in the order of their names; of two VMs that bear one name, the later one.

    Within a chain the number decides. A chain that began anew, its state lost, counts from one again: then Bacula's job does.
    """
    chains: dict[tuple[str, str], Description] = {}
    for part in parts:
        last = chains.get((part.uuid, part.chain))
        if last is None or part.number > last.number:
            chains[part.uuid, part.chain] = part
    by_vm: dict[str, Description] = {}
    by_name: dict[tuple[str, str], Description] = {}
    for part in sorted(chains.values(), key=lambda part: (part.job_id, part.taken_at_us)):
        by_vm[part.uuid] = part
    for part in sorted(by_vm.values(), key=lambda part: (part.job_id, part.taken_at_us)):
        by_name[part.root_name, part.vm] = part
    return [by_name[key] for key in sorted(by_name)]


def _follow(
    newest: Description, disk: PartDisk, known: dict[tuple[str, str], Description]
) -> DiskPlan:
    """From the newest part back to a full image."""
    steps = [Step(disk, newest)]
    while steps[0].disk.kind == "delta":
        step = steps[0]
        child = step.part
        parent = known.get((child.uuid, child.parent))
        if parent is None:
            job = f"Bacula job {child.parent_job}" if child.parent_job else "an earlier Bacula job"
            lacking = (
                f"{disk.disk} of VM {newest.vm} lacks part {child.parent} of {job}, which job {child.job} goes on from;"
                " restore that job together with this one"
            )
            return DiskPlan(newest, disk.disk, tuple(steps), lacking)
        below = parent.disk(disk.disk)
        _check_link(step, parent, below)
        assert below is not None
        steps.insert(0, Step(below, parent))
    return DiskPlan(newest, disk.disk, tuple(steps))


def _check_link(step: Step, parent: Description, below: PartDisk | None) -> None:
    """Raise DamageError unless the step's delta fits what the parent leads to."""
    child = step.part
    reason = None
    if parent.number >= child.number:
        reason = "it is not older"
    elif below is None or below.root != step.disk.base_root:
        reason = "it leads to another content than the delta starts from"
    elif below.size > step.disk.size:
        reason = "the disk was larger"
    elif (parent.grain, parent.algorithm) != (child.grain, child.algorithm):
        reason = "its digests are of another kind"
    if reason is not None:
        raise DamageError(
            f"{step.disk.disk} of VM {child.vm}: part {child.part} (job {child.job}) does not go on from part {parent.part}"
            f" (job {parent.job}): {reason}"
        )


def wanted_disks(text: str) -> frozenset[str]:
    """``restore_disks_only``: names of disks between commas; empty for all. Raises UsageError."""
    names = frozenset(filter(None, (piece.strip() for piece in text.split(","))))
    for name in names:
        probe = parse_name(f"@nutanix/vm/disks/{name}.raw")
        if probe is None or probe.disk != name:
            raise UsageError(f"restore_disks_only: expected disk-<N>,disk-<N>, got {name!r}")
    return names


def name_some(things: Iterable[str]) -> str:
    """Some things in words, a few of them by name."""
    names = list(things)
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more


__all__ = ["DiskPlan", "Plan", "Step", "make_plan", "name_some", "wanted_disks"]
