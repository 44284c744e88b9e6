# SPDX-License-Identifier: AGPL-3.0-or-later
"""From the files that Bacula hands over to whole images: which file goes where, and what is missing at the end.

With the restore objects of the jobs everything is known before the first file: images are folded as data come. Without them
(a restore from a bootstrap file alone) the descriptions stand in the stream, behind the data: then deltas wait in scratch.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from bacula_adapter.backend.interface import Answer, RestoredFile
from bacula_adapter.description import Description
from bacula_adapter.names import VirtualName
from bacula_adapter.restore.images import DeltaFold, FullFold, Image, Shape
from bacula_adapter.restore.lane import cpus
from bacula_adapter.restore.plan import DiskPlan, Plan, Step, make_plan, name_some
from bacula_adapter.restore.receivers import (
    DeltaReceiver,
    DescriptionFile,
    FullReceiver,
    Receiver,
    SpoolReceiver,
)
from bacula_adapter.restore.spool import Spool
from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from replicator.errors import DamageError, RefusedError

_logger = logging.getLogger(__name__)

#: Files and parts of one restore: what is kept of each is small, but it is kept.
_FILES_MAX: Final = 500_000
_PARTS_MAX: Final = 100_000
#: Images of one name that wait for what says which is wanted.
_CANDIDATES_MAX: Final = 8
_US: Final = 1_000_000

#: Where to put a disk's image: root, VM and disk, the time of its content in seconds since the epoch, and how many images of it
#: there are already.
Place = Callable[[str, str, str, int, int], Awaitable[Path]]


@dataclass(slots=True)
class _Progress:
    """An image and the steps that are in it."""

    image: Image
    steps: list[Step] = field(default_factory=list)


class Assembly:
    """All images of one restore. Used by one task at a time; ``aclose`` in any case: it removes what ``finish`` did not give."""

    def __init__(
        self, nursery: trio.Nursery, scratch: Path, wanted: frozenset[str], place: Place
    ) -> None:
        self._nursery = nursery
        self._scratch = scratch
        self._wanted = wanted
        self._place = place
        self._parts: list[Description] = []
        self._known: set[tuple[str, str]] = set()
        self._catalogue = False
        self._plan = Plan()
        self._progress: dict[tuple[str, str], _Progress] = {}
        self._candidates: dict[str, list[Image]] = {}
        self._spools: dict[str, Spool] = {}
        self._chosen: dict[str, VirtualName] = {}
        self._open: Receiver | None = None
        self._open_name = ""
        self._count = 0

    @property
    def plan(self) -> Plan:
        """What is known so far."""
        return self._plan

    def learn(self, parts: Sequence[Description]) -> None:
        """The parts that the catalogue knows; before the first file. Raises DamageError, RefusedError."""
        self._catalogue = bool(parts)
        for part in parts:
            self._add(part)
        self._plan = make_plan(self._parts)

    def under_way(self) -> list[Description]:
        """The newest parts of the VMs of which a file came."""
        chosen = {(name.root, name.vm) for name in self._chosen.values()}
        return [
            part
            for part in self._plan.vms
            if (part.root_name, part.vm) in chosen
            or any(step.file in self._chosen for plan in self._plan.of(part) for step in plan.steps)
        ]

    def _add(self, part: Description) -> None:
        if len(self._parts) >= _PARTS_MAX:
            raise RefusedError(f"more than {_PARTS_MAX} parts in one restore")
        self._known.add((part.uuid, part.part))
        self._parts.append(part)

    # Files

    async def create(self, name: VirtualName, file: RestoredFile) -> Answer:
        """What to do with a file; with SEND its data are awaited. Raises ReplicatorError."""
        if self._open is not None:
            raise DamageError(f"{self._open_name} has no end")
        if len(self._chosen) >= _FILES_MAX:
            raise RefusedError(f"more than {_FILES_MAX} files in one restore")
        text = str(name)
        if name.kind == "description":
            self._chosen[text] = name
            if name.part_id in self._plan.parts:
                return Answer.SKIP
            return self._await(text, DescriptionFile(self._take_description))
        if self._wanted and name.disk not in self._wanted:
            return Answer.SKIP
        if self._plan.is_superfluous(name):
            _logger.debug("%s is not needed", text)
            return Answer.SKIP
        self._chosen[text] = name
        needs = self._plan.needs.get(text, [])
        for plan, _ in needs:
            if plan.lacking:
                # Jobs come oldest first: what is not known by now is not in this restore.
                raise RefusedError(plan.lacking)
        if name.kind == "delta":
            return self._await(text, await self._delta(text, needs))
        full = await self._full(name, file, needs)
        return Answer.SKIP if full is None else self._await(text, full)

    async def data(self, offset: int | None, data: bytes) -> None:
        """The next bytes of the file. Raises DamageError, OSError."""
        assert self._open is not None
        await self._open.put(offset, data)

    async def close(self, *, whole: bool) -> None:
        """The file ended. Raises DamageError if it is not what its part says."""
        receiver, self._open = self._open, None
        if receiver is None:
            return
        try:
            if not whole:
                raise DamageError(f"{self._open_name}: Bacula could not read all of it")
            await receiver.finish()
        finally:
            await receiver.close()

    def _await(self, name: str, receiver: Receiver) -> Answer:
        self._open, self._open_name = receiver, name
        return Answer.SEND

    async def _take_description(self, part: Description) -> None:
        if (part.uuid, part.part) in self._known:
            return
        self._add(part)
        if self._catalogue:
            await self._replan()

    async def _replan(self) -> None:
        """The catalogue knew some jobs, and the stream had another one: go on with both."""
        self._plan = make_plan(self._parts)
        for plan in self._plan.disks:
            await self._settle(plan)

    # Full images

    async def _full(
        self, name: VirtualName, file: RestoredFile, needs: list[tuple[DiskPlan, int]]
    ) -> Receiver | None:
        """Where an image's data go; None if it is another one than is wanted."""
        text = str(name)
        if needs:
            free = [
                plan
                for plan, _ in needs
                if _key(plan) not in self._progress and plan.steps[0].disk.size == file.size
            ]
            if not free:
                return None
            shape, newest = Shape.of(free[0].steps[0]), free[0].newest
            where = (newest.root_name, newest.vm, name.disk, newest.taken_at_us // _US)
        else:
            shape, where = Shape(), (name.root, name.vm, name.disk, file.mtime_s)
        if file.size < 1:
            raise DamageError(f"{text} has no size in the backup")
        waiting = self._candidates.setdefault(text, [])
        if len(waiting) >= _CANDIDATES_MAX:
            raise RefusedError(
                f"{text} came {len(waiting)} times: restore fewer jobs at once, or with the catalogue's help"
            )
        path = await self._place(*where, len(waiting))
        image = await trio.to_thread.run_sync(
            Image, path, self._scratch_file("map"), file.size, shape, limiter=cpus()
        )
        return FullReceiver(
            image, FullFold(image, self._nursery, text), partial(self._take_image, text)
        )

    def _scratch_file(self, kind: str) -> Path:
        self._count += 1
        return self._scratch / f"{self._count:06}.{kind}"

    async def _take_image(self, name: str, image: Image) -> None:
        """An image is in its file: it goes where its content belongs."""
        needs = self._plan.needs.get(name)
        if not needs:
            self._candidates[name].append(image)
            return
        for plan, _ in needs:
            step = plan.steps[0]
            if step.disk.root == image.root and _key(plan) not in self._progress:
                self._progress[_key(plan)] = _Progress(image, [step])
                _logger.debug("%s is the full image of job %s", name, step.part.job)
                await self._settle(plan)
                return
        known = image.root in self._plan.fulls.get(name, ())
        await trio.to_thread.run_sync(image.discard, limiter=cpus())
        if not known:
            step = needs[0][0].steps[0]
            raise DamageError(
                f"{name} is damaged: it is not the image that job {step.part.job} backed up (its digests lead to another root);"
                " restore from a copy of the volume, or another point"
            )
        _logger.info("%s of an earlier job is not needed", name)

    # Deltas

    async def _delta(self, text: str, needs: list[tuple[DiskPlan, int]]) -> Receiver:
        for plan, index in needs:
            progress = self._progress.get(_key(plan))
            if progress is not None and len(progress.steps) == index:
                step = plan.steps[index]
                return DeltaReceiver(
                    DeltaFold(progress.image, step, self._nursery),
                    partial(self._applied, plan, progress, step),
                )
        known = self._spools.pop(text, None)
        if known is not None:  # it came twice: the later one counts, and has to fit as well
            known.discard()
        spool = await trio.to_thread.run_sync(Spool, self._scratch_file("phcbt"), limiter=cpus())
        self._spools[text] = spool
        return SpoolReceiver(spool)

    async def _applied(self, plan: DiskPlan, progress: _Progress, step: Step) -> None:
        progress.steps.append(step)
        await self._settle(plan)

    async def _settle(self, plan: DiskPlan) -> None:
        """Do for a disk what can be done with what is there."""
        if plan.lacking:
            return
        progress = self._progress.get(_key(plan))
        if progress is None:
            image = await self._pick(plan.steps[0])
            if image is None:
                return
            progress = self._progress[_key(plan)] = _Progress(image, [plan.steps[0]])
        done = [step.part.part for step in progress.steps]
        if done != [step.part.part for step in plan.steps[: len(done)]]:
            raise DamageError(
                f"{plan.title}: the catalogue knows only some of the jobs, and the volumes others; restore with a bootstrap"
                " file of the jobs that are wanted"
            )
        for step in plan.steps[len(done) :]:
            spool = self._spools.pop(step.file, None)
            if spool is None:
                return
            try:
                await spool.apply(DeltaFold(progress.image, step, self._nursery))
            finally:
                spool.discard()
            progress.steps.append(step)

    async def _pick(self, step: Step) -> Image | None:
        """Of the images that came under the name, the one that the part means."""
        for image in self._candidates.get(step.file, []):
            if image.size != step.disk.size:
                continue
            if image.shape != Shape.of(step):
                await trio.to_thread.run_sync(image.reshape, Shape.of(step), limiter=cpus())
            if image.root == step.disk.root:
                self._candidates[step.file].remove(image)
                return image
        return None

    # The end

    async def finish(self) -> list[RestoredVm]:
        """All files have come: the VMs of which any came, all their images whole and durable. Raises RefusedError, DamageError."""
        if self._open is not None:
            raise DamageError(f"{self._open_name} has no end")
        if not self._catalogue:
            self._plan = make_plan(self._parts)
        disks = self._touched()
        for plan in disks:
            if plan.lacking:
                raise RefusedError(plan.lacking)
        self._check_known()
        for plan in disks:
            await self._settle(plan)
        self._check_whole(disks)
        for plan in disks:
            await trio.to_thread.run_sync(self._progress[_key(plan)].image.sync, limiter=cpus())
        return self._restored(disks)

    def _touched(self) -> list[DiskPlan]:
        """The disks of which a file came; of one whose chain is broken any that bears its name."""
        names = [name for name in self._chosen.values() if name.kind != "description"]
        files = {str(name) for name in names}
        disks = {(name.root, name.vm, name.disk) for name in names}
        return [
            plan
            for plan in self._plan.disks
            if any(step.file in files for step in plan.steps)
            or (plan.lacking and (plan.newest.root_name, plan.newest.vm, plan.disk) in disks)
        ]

    def _check_known(self) -> None:
        """Raise RefusedError if there is a file of which nothing is known, or no disk of a name that is wanted."""
        unknown = [
            text
            for text, name in self._chosen.items()
            if name.kind != "description"
            and text not in self._plan.needs
            and not self._plan.is_superfluous(name)
        ]
        if unknown:
            raise RefusedError(
                f"nothing says what {name_some(unknown)} is made of: restore the description file of each job with it"
            )
        names = {disk.disk for part in self._plan.vms for disk in part.disks}
        absent = sorted(self._wanted - names)
        if absent and self._plan.vms:
            raise RefusedError(
                f"restore_disks_only: there is no {name_some(absent)} (there is {name_some(sorted(names))})"
            )

    def _check_whole(self, disks: list[DiskPlan]) -> None:
        """Raise DamageError, RefusedError unless every step of every disk is done."""
        missing: list[str] = []
        for plan in disks:
            progress = self._progress.get(_key(plan))
            done = len(progress.steps) if progress is not None else 0
            if done == 0 and self._candidates.get(plan.steps[0].file):
                step = plan.steps[0]
                raise DamageError(
                    f"{step.file} is damaged, or of another job: it is not the image that job {step.part.job} backed up"
                )
            missing += [
                f"{step.file} of job {step.part.job}"
                for step in plan.steps[done:]
                if step.file not in self._spools
            ]
        if missing:
            raise RefusedError(
                f"{len(missing)} file(s) that the disks are made of did not come: {name_some(missing)};"
                " select all files of a disk, in all jobs since the Full"
            )

    def _restored(self, disks: list[DiskPlan]) -> list[RestoredVm]:
        described = {
            (name.root, name.vm) for name in self._chosen.values() if name.kind == "description"
        }
        vms = []
        for part in self._plan.vms:
            plans = [plan for plan in disks if plan.newest == part]
            if not plans and (part.root_name, part.vm) not in described:
                continue
            left = [
                plan.disk
                for plan in self._plan.of(part)
                if plan not in plans and not (self._wanted and plan.disk not in self._wanted)
            ]
            if plans and left:
                _logger.info("VM %s: %s not selected, and not restored", part.vm, name_some(left))
            vms.append(
                RestoredVm(name=part.vm, disks=tuple(map(self._give, plans)), description=part)
            )
        return vms

    def _give(self, plan: DiskPlan) -> RestoredDisk:
        """The image is the target's from here on."""
        image = self._progress.pop(_key(plan)).image
        image.close()
        disk = plan.target
        return RestoredDisk(disk=disk.disk, identity=disk.identity, path=image.path, size=disk.size)

    async def aclose(self) -> None:
        """Remove every image that was not given away, and what waits in scratch. Not cancelled."""
        with trio.CancelScope(shield=True):
            receiver, self._open = self._open, None
            if receiver is not None:
                await receiver.close()
            await trio.to_thread.run_sync(self._remove_all, limiter=cpus())

    def _remove_all(self) -> None:
        images = [progress.image for progress in self._progress.values()]
        for waiting in self._candidates.values():
            images += waiting
        removals = [image.discard for image in images]
        removals += [spool.discard for spool in self._spools.values()]
        for remove in removals:
            with suppress(OSError):  # the next restore sweeps what is left
                remove()
        self._progress.clear()
        self._candidates.clear()
        self._spools.clear()


def _key(plan: DiskPlan) -> tuple[str, str]:
    return plan.newest.uuid, plan.disk


__all__ = ["Assembly", "Place"]
