# SPDX-License-Identifier: AGPL-3.0-or-later
"""Restored disks back on a Nutanix cluster: an image of each is uploaded, and a VM made of them that is off until it is kept.

Images, VMs, and the order in which they appear and go are in ``platform_objects``; where they go is decided in ``platform_plan``.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import quote

import trio

from bacula_adapter.backend.interface import JobInfo
from bacula_adapter.description import Description
from bacula_adapter.restore.plan import wanted_disks
from bacula_adapter.restore.platform_objects import RestoreObjects, first_of
from bacula_adapter.restore.platform_plan import (
    Place,
    PlannedDisk,
    PlannedVm,
    check_place,
    choose_cluster,
    parse_network_map,
    plan_vm,
)
from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from replicator.config import Config
from replicator.errors import RefusedError, ReplicatorError, StateError
from replicator.hardware import Hardware
from replicator.nursery import flat_nursery
from replicator.prism.api import RestorePrism
from replicator.prism.discovery import open_prism
from replicator.prism.errors import PrismError
from replicator.prism.settings import PrismSettings
from replicator.prism.types import Cluster
from replicator.prism_access import prism_settings
from replicator.sources.nutanix.ledger import Entry, JournalStore, Ledger

_logger = logging.getLogger(__name__)

#: Below the working directory; a folder of one restore at a time.
SCRATCH: Final = "restore"
#: Uploads at once: requests to Prism need connections as well.
_UPLOADS_MAX: Final = 4
#: How long the removal of what was made may take once the restore has failed or was cancelled.
_CLEANUP_S: Final = 120.0
#: Left free on the file system of the working directory.
_RESERVE: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class _Made:
    planned: PlannedVm
    entry: Entry


class PlatformTarget:
    """A restore's target on Nutanix; implements ``Target``. Made by ``open_platform_target``."""

    def __init__(
        self,
        prism: RestorePrism,
        objects: RestoreObjects,
        config: Config,
        clusters: Sequence[Cluster],
        scratch: Path,
    ) -> None:
        self._prism = prism
        self._objects = objects
        self._config = config
        self._clusters = clusters
        self._networks = parse_network_map(config.network_map)
        self._scratch = scratch
        self._places: dict[str, Place] = {}
        self._made: list[_Made] = []
        self._uploads = trio.CapacityLimiter(min(config.concurrent_disks, _UPLOADS_MAX))

    def image_path(self, root: str, vm: str, disk: str) -> Path:
        """As ``Target.image_path``: in the scratch of the working directory. Raises RefusedError where that is full."""
        self.check_room(0)
        path = self._scratch.joinpath(*(quote(part, safe=" @+,=()") for part in (root, vm)))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"working_dir: {path}: {error.strerror}") from None
        return path / f"{quote(disk, safe='')}.raw"

    def check_room(self, needed: int) -> None:
        """Raises RefusedError where the scratch has no room for so many bytes more. Blocks, briefly."""
        status = os.statvfs(self._scratch)
        free = status.f_bavail * status.f_frsize - _RESERVE
        if free < max(needed, 0) or free <= 0:
            raise RefusedError(
                f"working_dir: {self._scratch} has {max(free, 0) >> 20} MiB to spare, and the disks need {needed >> 20} MiB there"
                " before they are uploaded: give a working_dir with more room"
            )

    async def check(self, descriptions: Sequence[Description]) -> None:
        """Whether VMs can be made as these describe them, before any of their bytes are there: cluster, networks, containers,
        names, and room in the scratch for the data of their own part at least. Raises RefusedError as ``finish`` would.
        """
        wanted = wanted_disks(self._config.restore_disks_only)
        chosen = [
            disk
            for each in descriptions
            for disk in each.disks
            if not wanted or disk.disk in wanted
        ]
        self.check_room(sum(min(disk.size, disk.bytes) for disk in chosen))
        vms = [
            RestoredVm(name=each.vm, disks=_described(each), description=each)
            for each in descriptions
        ]
        await self._plan(vms)

    async def finish(self, vms: Sequence[RestoredVm]) -> None:
        """As ``Target.finish``: everything is decided before anything is made. The VMs are off, and bear names of ours."""
        for planned in await self._plan(vms):
            images = await self._upload(planned)
            entry = await self._objects.make_vm(planned, images)
            self._made.append(_Made(planned, entry))
            for image in images:
                try:
                    await self._objects.remove(image)
                except ReplicatorError as error:
                    _logger.warning("%s; it is tried again at the end", error)

    async def keep(self) -> None:
        """As ``Target.keep``: the VMs get their names, and run if power_on says so. Raises PrismError; what was kept stays."""
        kept = [
            (made.planned, await self._objects.keep(made.entry, made.planned.name))
            for made in self._made
        ]
        self._made.clear()
        errors: list[ReplicatorError] = []
        for planned, entry in kept:
            try:
                await self._objects.hand_over(entry, power_on=self._config.power_on)
            except PrismError as error:
                errors.append(
                    PrismError(
                        f"VM {planned.name} is restored and stays ({entry.uuid}; it may still be called {entry.name}), but not all"
                        f" that was asked for is done: {error}"
                    )
                )
            else:
                self._tell(planned)
        if errors:
            raise first_of(errors)

    def _tell(self, planned: PlannedVm) -> None:
        total = sum(disk.image.size for disk in planned.disks)
        _logger.info(
            "Restored VM %s as %s on cluster %s, %d disks, %d bytes, powered %s",
            planned.vm.name,
            planned.name,
            planned.cluster.name,
            len(planned.disks),
            total,
            "on" if self._config.power_on else "off",
        )
        for note in planned.notes:
            _logger.info("VM %s: %s", planned.name, note)

    async def _plan(self, vms: Sequence[RestoredVm]) -> list[PlannedVm]:
        if self._config.restore_vm_name and len(vms) > 1:
            raise RefusedError(
                f"restore_vm_name: one name, and {len(vms)} VMs to restore: restore one at a time, or leave it out"
            )
        there = await self._prism.vms()
        macs = await self._prism.macs()
        planned: list[PlannedVm] = []
        for vm in vms:
            if not vm.disks:
                raise RefusedError(f"VM {vm.name}: none of its disks is restored, so no VM is made")
            place = await self.place(vm.made_of)
            planned.append(
                plan_vm(
                    vm,
                    place,
                    self._config,
                    self._networks,
                    clusters=self._clusters,
                    there=there,
                    macs=macs,
                )
            )
            macs |= {nic.mac for nic in planned[-1].hardware.nics if nic.mac}
        names = [each.name for each in planned]
        for name in names:
            if names.count(name) > 1:
                raise RefusedError(f"two VMs would be restored as {name}: restore one at a time")
        return planned

    async def place(self, hardware: Hardware | None) -> Place:
        """The cluster for a VM and what there is. Raises RefusedError where it cannot be told, or lacks what is configured."""
        cluster = choose_cluster(self._clusters, self._config, hardware)
        if cluster.uuid not in self._places:
            place = Place(
                cluster=cluster,
                subnets=await self._prism.subnets(cluster.uuid),
                containers=await self._prism.containers(cluster.uuid),
            )
            check_place(place, self._config, self._networks)
            self._places[cluster.uuid] = place
        return self._places[cluster.uuid]

    async def _upload(self, planned: PlannedVm) -> list[Entry]:
        images: dict[int, Entry] = {}

        async def upload(number: int, disk: PlannedDisk) -> None:
            async with self._uploads:
                images[number] = await self._objects.make_image(planned, disk, number)

        async with flat_nursery() as nursery:
            for number, disk in enumerate(planned.disks):
                nursery.start_soon(upload, number, disk)
        return [images[number] for number in range(len(planned.disks))]


def _described(description: Description) -> tuple[RestoredDisk, ...]:
    """The disks of a description, without images."""
    return tuple(
        RestoredDisk(disk=disk.disk, identity=disk.identity, path=Path(), size=disk.size)
        for disk in description.disks
    )


def now_us() -> int:
    """The wall clock, in microseconds since the epoch."""
    return time.time_ns() // 1000


@asynccontextmanager
async def open_platform_target(
    config: Config,
    job: JobInfo,
    store: JournalStore,
    *,
    settings: PrismSettings | None = None,
    clock: Callable[[], int] = now_us,
) -> AsyncGenerator[PlatformTarget, None]:
    """The Nutanix cluster as the target of a restore. ``store`` holds the ledger of restores, and belongs to this one alone.

    First it removes what an earlier restore left, and checks what the configuration names: cluster, container, subnets, and
    that images can be uploaded at all. Left without ``keep``, cancelled or not, it removes what it made, within two minutes;
    what it cannot stays in the ledger for the next one (job_cleanup_on_abort = no: all of it stays).
    ``settings``: in place of those that ``config`` gives. Raises UsageError, RefusedError, StateError, PrismError.
    """
    settings = settings or prism_settings(config)
    parse_network_map(config.network_map)
    scratch = config.work_path / SCRATCH
    async with open_prism(settings) as prism:
        ledger = await Ledger.open(store)
        objects = RestoreObjects(prism, ledger, job.name, job.job_id, clock)
        if config.job_cleanup_on_abort:
            await objects.clear()
        await prism.check_upload()
        clusters = await prism.clusters()
        target = PlatformTarget(prism, objects, config, clusters, scratch)
        if config.target_cluster or len(clusters) == 1:
            await target.place(None)
        await _fresh(scratch)
        try:
            yield target
        finally:
            with trio.move_on_after(_CLEANUP_S, shield=True) as scope:
                await _clean_up(objects, scratch, remove=config.job_cleanup_on_abort)
            if scope.cancelled_caught:
                _logger.warning(
                    "what the restore made could not be removed within %d s: the next restore does it",
                    int(_CLEANUP_S),
                )


async def _clean_up(objects: RestoreObjects, scratch: Path, *, remove: bool) -> None:
    await trio.to_thread.run_sync(partial(shutil.rmtree, scratch, ignore_errors=True))
    if remove and await objects.open_entries():
        try:
            await objects.clear()
        except ReplicatorError as error:
            _logger.warning("%s; what the restore made is removed by the next one", error)


async def _fresh(scratch: Path) -> None:
    def make() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700, parents=True)

    try:
        await trio.to_thread.run_sync(make)
    except OSError as error:
        raise StateError(f"working_dir: {scratch}: {error.strerror}") from None


async def restore_to_platform(
    config: Config, job: JobInfo, store: JournalStore, vms: Sequence[RestoredVm]
) -> None:
    """Make VMs of images that are there, and keep them: for what no Bacula job brings. Errors and cancellation as
    ``open_platform_target``; the images themselves are only read.
    """
    async with open_platform_target(config, job, store) as target:
        await target.finish(vms)
        await target.keep()


__all__ = ["SCRATCH", "PlatformTarget", "open_platform_target", "restore_to_platform"]
