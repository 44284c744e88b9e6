# SPDX-License-Identifier: AGPL-3.0-or-later
"""``NutanixSource`` over the simulator: the clients of v3 and v4, HTTPS, and targets that are real."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from replicator.prism.discovery import open_prism
from replicator.prism.settings import Account, PrismSettings, Waits
from replicator.simulator.guest import Guest
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from replicator.sources.nutanix import NutanixSettings, NutanixSite, NutanixSource, open_site
from replicator.sources.nutanix.ledger import JournalStore
from tests.nutanix.fake import MemoryStore
from tests.sources.conformance import GRAIN
from tests.sources.nutanix_lab import fake_settings

SIZES = (128 * GRAIN, 129 * GRAIN + 512)
#: Nothing is waited for longer than it takes.
WAITS = Waits(poll_s=(0.01, 0.02, 0.05), conflict_s=0.01, settle_s=10.0)
Api = Literal["v3", "v4"]


def scenario(disks: int, sizes: tuple[int, ...] = SIZES) -> Scenario:
    """One VM with empty disks and a CD-ROM."""
    specs = [DiskSpec(size=sizes[i], data=0) for i in range(disks)]
    return Scenario(vms=[VmSpec(name="app01", disks=specs, cdrom=True)])


def prism_of(simulator: Simulator, api: Api, **changes: Any) -> PrismSettings:
    """How to reach it."""
    whole = PrismSettings(
        host=simulator.address,
        port=simulator.port,
        api_version=api,
        account=Account("admin", simulator.password("admin")),
        ca=simulator.ca_path,
        rate_rpm=0,
        waits=WAITS,
    )
    return dataclasses.replace(whole, **changes)


class SimulatedLab:
    """One VM of a simulator, as the conformance checks want it."""

    tracks = True
    live = True
    reference_takes_room = True

    def __init__(self, simulator: Simulator, site: NutanixSite) -> None:
        self.simulator = simulator
        self.site = site
        self.vm = simulator.vm("app01").uuid

    def _guests(self) -> dict[str, Guest]:
        count = sum(not disk.cdrom for disk in self.simulator.world.vms[self.vm].disks)
        guests = [self.simulator.guest(self.vm, index) for index in range(count)]
        return {guest.disk.uuid: guest for guest in guests}

    @property
    def disks(self) -> list[str]:
        return list(self._guests())

    def source(self) -> NutanixSource:
        return NutanixSource(self.site, self.vm)

    async def write(self, disk: str, offset: int, data: bytes) -> None:
        await self._guests()[disk].write(offset, data)

    async def zero(self, disk: str, offset: int, length: int) -> None:
        await self._guests()[disk].zero(offset, length)

    async def grow(self, disk: str, by: int) -> None:
        await self._guests()[disk].grow(by)

    async def content(self, disk: str) -> bytes:
        return await self._guests()[disk].content()

    async def leftovers(self) -> list[str]:
        return objects(self.simulator)


def objects(simulator: Simulator) -> list[str]:
    """Names of everything of this product that is there."""
    world = simulator.world
    every = [*world.snapshots.values(), *world.volume_groups.values(), *world.images.values()]
    return [each.name for each in every if each.name.startswith("drx-")]


@asynccontextmanager
async def site_on(
    simulator: Simulator,
    api: Api,
    store: JournalStore,
    working_dir: Path,
    *,
    waits: Waits = WAITS,
    **settings: Any,
) -> AsyncGenerator[NutanixSite, None]:
    """A process of a source's host."""
    with_these: NutanixSettings = fake_settings(working_dir, data_path="iscsi", **settings)
    async with (
        open_prism(prism_of(simulator, api, waits=waits)) as prism,
        open_site(prism, store, with_these) as site,
    ):
        yield site


@asynccontextmanager
async def simulated_lab(folder: Path, api: Api, disks: int) -> AsyncGenerator[SimulatedLab, None]:
    work = folder / "work"
    work.mkdir()
    async with (
        running_simulator(folder / "simulator", scenario(disks)) as simulator,
        site_on(simulator, api, MemoryStore(), work) as site,
    ):
        yield SimulatedLab(simulator, site)
