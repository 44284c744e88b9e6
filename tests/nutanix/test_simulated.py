# SPDX-License-Identifier: AGPL-3.0-or-later
"""What only shows with real requests, real logins and a cluster that has its own mind."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from replicator.errors import SourceError
from replicator.iscsi import PortalUnreachableError
from replicator.prism.errors import NoDataServicesError
from replicator.simulator.running import running_simulator
from replicator.simulator.scenario import ClusterSpec, Scenario
from replicator.sources.base import SnapshotName
from replicator.sources.nutanix.sweep import gone_vms, sweep_clusters
from tests.iscsi.lab import free_portal
from tests.nutanix.fake import MemoryStore
from tests.sources.simulated import Api, SimulatedLab, objects, scenario, site_on

GRAIN = 64 << 10
FIRST = SnapshotName("p1", None)
APIS = pytest.mark.parametrize("api", ["v3", "v4"])


@APIS
async def test_many_disks_are_opened_at_once(api: Api, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    sizes = tuple((16 + number) * GRAIN for number in range(6))
    async with (
        running_simulator(tmp_path / "simulator", scenario(6, sizes)) as simulator,
        site_on(simulator, api, MemoryStore(), work, concurrent_disks=4) as site,
    ):
        lab = SimulatedLab(simulator, site)
        for number, disk in enumerate(lab.disks):
            await lab.write(disk, 0, bytes([number + 1]) * 4096)
        snapshot = await lab.source().take(FIRST)
        assert [disk.identity for disk in snapshot.disks] == lab.disks
        read: dict[int, bytes] = {}

        async def one(number: int) -> None:
            read[number] = await snapshot.disks[number].view.read(10, 3)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(one, number)
        assert read == {number: bytes([number + 1]) * 3 for number in range(6)}
        assert len(simulator.world.volume_groups) == 6
        await snapshot.aclose()
        assert not simulator.world.volume_groups
        await lab.source().abandon(FIRST)
        assert objects(simulator) == []


@APIS
@pytest.mark.parametrize("chap", ["mutual", "one-way", "none"])
async def test_every_way_to_prove_oneself(api: Api, chap: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    async with (
        running_simulator(tmp_path / "simulator", scenario(1)) as simulator,
        site_on(simulator, api, MemoryStore(), work, chap=chap) as site,
    ):
        lab = SimulatedLab(simulator, site)
        snapshot = await lab.source().take(FIRST)
        assert await snapshot.disks[0].view.read(0, 4) == bytes(4)
        (group,) = simulator.world.volume_groups.values()
        assert (group.secret is None) == (chap == "none")
        await snapshot.aclose()


@APIS
async def test_a_cluster_without_data_services(api: Api, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    bare = Scenario(
        clusters=[ClusterSpec(name="cluster-a", data_services=False)], vms=scenario(1).vms
    )
    async with (
        running_simulator(tmp_path / "simulator", bare) as simulator,
        site_on(simulator, api, MemoryStore(), work) as site,
    ):
        snapshot = await SimulatedLab(simulator, site).source().take(FIRST)
        with pytest.raises(NoDataServicesError, match=r"has no data services address.*dsip"):
            await snapshot.disks[0].view.read(0, 4)
        assert not simulator.world.volume_groups
        await snapshot.aclose()


async def test_a_portal_that_nobody_answers_at(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    nobody = free_portal()
    async with (
        running_simulator(tmp_path / "simulator", scenario(1)) as simulator,
        site_on(simulator, "v4", MemoryStore(), work, data_services=nobody) as site,
    ):
        lab = SimulatedLab(simulator, site)
        snapshot = await lab.source().take(FIRST)
        with pytest.raises(PortalUnreachableError, match=str(nobody)):
            await snapshot.disks[0].view.read(0, 4)
        assert site.attach_failures == 1
        assert not simulator.world.volume_groups, "it was taken down again"
        await snapshot.aclose()


async def test_a_vm_that_migrates(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    async with (
        running_simulator(tmp_path / "simulator", scenario(1)) as simulator,
        site_on(simulator, "v4", MemoryStore(), work) as site,
    ):
        lab = SimulatedLab(simulator, site)
        simulator.world.vms[lab.vm].migrating = True
        with pytest.raises(SourceError, match="on its way to another cluster"):
            await lab.source().take(FIRST)
        assert objects(simulator) == []


@APIS
async def test_the_reference_of_a_vm_that_was_deleted(api: Api, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    async with (
        running_simulator(tmp_path / "simulator", scenario(1)) as simulator,
        site_on(simulator, api, MemoryStore(), work) as site,
    ):
        lab = SimulatedLab(simulator, site)
        await (await lab.source().take(FIRST)).aclose()
        await lab.source().confirm(FIRST)
        entries = await site.ledger.entries()
        assert await gone_vms(site.prism, entries) == set()
        del simulator.world.vms[lab.vm]
        gone = await gone_vms(site.prism, entries)
        assert gone == {lab.vm}
        assert len(await sweep_clusters(site.prism, site.ledger, {}, site.clock(), gone)) == 1
        assert objects(simulator) == []
        assert await site.ledger.entries() == []
