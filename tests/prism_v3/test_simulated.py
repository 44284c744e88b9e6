# SPDX-License-Identifier: AGPL-3.0-or-later
"""v3 from beginning to end against the simulator, over real sockets, with a real iSCSI target: bytes are compared."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio

from replicator.disk import Extent
from replicator.iscsi import Chap, IscsiSettings, Portal, discover
from replicator.iscsi.reader import open_reader
from replicator.prism.api import Prism
from replicator.prism.discovery import open_prism
from replicator.prism.errors import (
    ImageNeededError,
    PrismNotFoundError,
    PrismTaskError,
    RegionsLostError,
)
from replicator.prism.settings import Account, PrismSettings, Waits
from replicator.prism.types import (
    Capability,
    Consistency,
    Kind,
    Secrets,
    Vm,
    VmSnapshot,
    VolumeGroup,
)
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from tests.limits import HANG_S

MIB = 1 << 20
SIZE = 8 * MIB
PREFIX = "drx-1a2b3c4d-"
IQN = "iqn.2026-01.org.example:dr-service-01"
SECRETS = Secrets("Tq8sN2vLx5Rz", "Zb7mW4kPq9Xy")
QUICK = Waits(poll_s=(0.01, 0.02, 0.05), conflict_s=0.01, settle_s=2.0, retry_s=20.0)


@dataclass
class Lab:
    """A simulator with one VM of two disks, and a client of it."""

    sim: Simulator
    prism: Prism

    async def vm(self) -> Vm:
        return await self.prism.vm(self.sim.vm("app01").uuid)

    async def take(self, number: int) -> VmSnapshot:
        expires_us = (int(time.time()) + 3600) * 1_000_000
        name = f"{PREFIX}7-rp-2026010{number}T030405Z"
        return await self.prism.create_snapshot(
            await self.vm(), name, Consistency.CRASH, expires_us, UUID(int=number)
        )


def settings(sim: Simulator, **changes: Any) -> PrismSettings:
    given: dict[str, Any] = {
        "host": sim.address,
        "port": sim.port,
        "api_version": "v3",
        "account": Account("backup", sim.password("backup")),
        "ca": sim.ca_path,
        "rate_rpm": 0,
        "waits": QUICK,
        **changes,
    }
    return PrismSettings(**given)


@asynccontextmanager
async def simulated(tmp_path: Path, **changes: Any) -> AsyncGenerator[Lab, None]:
    disks = [DiskSpec(size=SIZE, data=MIB), DiskSpec(size=SIZE, data=MIB)]
    scenario = Scenario(vms=[VmSpec(name="app01", disks=disks, cdrom=True)])
    with trio.fail_after(HANG_S):
        async with (
            running_simulator(tmp_path / "sim", scenario) as sim,
            open_prism(settings(sim, **changes)) as prism,
        ):
            yield Lab(sim, prism)


async def regions(
    prism: Prism, new: VmSnapshot, old: VmSnapshot | None = None, number: int = 0
) -> list[Extent]:
    since = None if old is None else (old, old.disks[number])
    found: list[Extent] = []
    async with aclosing(prism.regions(new, new.disks[number], since)) as pages:
        async for page in pages:
            assert page.file_size == SIZE
            found.extend(page.regions)
    return found


async def cloned(lab: Lab, snapshot: VmSnapshot, number: int = 0) -> tuple[VolumeGroup, str | None]:
    """A volume group of a disk, made as the source does it; and the image that it needed."""
    prism, disk = lab.prism, snapshot.disks[number]
    image = None
    for _ in range(2):
        name = f"{PREFIX}7-vg-20260102T03040{number}Z"
        if prism.clones_by_image:
            image = await prism.create_image(snapshot, disk, f"{PREFIX}7-img", UUID(int=20))
        try:
            group = await prism.create_volume_group(
                snapshot, disk, name, SECRETS, UUID(int=21), image=image
            )
        except ImageNeededError:
            continue
        return group, image
    raise AssertionError


async def read(lab: Lab, group: VolumeGroup) -> bytes:
    """The whole disk, over iSCSI."""
    address = lab.sim.cluster("cluster-a").data_services
    assert address is not None
    portal = Portal(address)
    await lab.prism.attach(group, IQN, SECRETS, UUID(int=30))
    proof = Chap(IQN, SECRETS.target, target_secret=SECRETS.client or "")
    offered = [target.name for target in await discover(portal, IscsiSettings(IQN))]
    (name,) = [name for name in offered if group.target.lower() in name]
    async with open_reader(portal, name, None, IscsiSettings(IQN, proof)) as reader:
        assert reader.size == SIZE
        return await reader.read(0, SIZE)


@pytest.mark.parametrize(
    ("expose", "by_image"),
    [("auto", False), ("vg-clone", False), ("vg-url", False), ("vg-image", True)],
)
async def test_a_full_and_an_incremental_by_each_way(
    tmp_path: Path, expose: str, by_image: bool
) -> None:
    async with simulated(tmp_path, expose=expose) as lab:
        prism, guest = lab.prism, lab.sim.guest(lab.sim.vm("app01").uuid, 0)
        assert prism.capability is Capability.V3
        first = await lab.take(1)
        then = await guest.content()
        full = await regions(prism, first)
        covered = bytearray(SIZE)
        for extent in full:
            if not extent.zero:
                covered[extent.offset : extent.end] = then[extent.offset : extent.end]
        assert covered == then  # what the map leaves out is zeros

        await guest.write(5 * MIB + 4096, b"new" * 5000)
        await guest.zero(0, 256 << 10)
        second = await lab.take(2)
        now = await guest.content()
        await guest.write(0, b"after the snapshot" * 1000)
        changed = await regions(prism, second, first)
        merged = bytearray(then)
        for extent in changed:
            merged[extent.offset : extent.end] = (
                bytes(extent.length) if extent.zero else now[extent.offset : extent.end]
            )
        assert merged == now
        assert sum(extent.length for extent in changed) < SIZE // 4

        group, image = await cloned(lab, second)
        assert (group.disk_sizes, prism.clones_by_image) == ({0: SIZE}, by_image)
        assert await read(lab, group) == now
        assert {each.kind for each in await prism.find(PREFIX)} == {
            Kind.SNAPSHOT, Kind.VOLUME_GROUP, *([Kind.IMAGE] if image else [])
        }  # fmt: skip
        await prism.delete_volume_group(group.uuid)
        if image is not None:
            await prism.delete_image(image)
        for snapshot in (first, second):
            await prism.delete_snapshot(snapshot.uuid, snapshot.cluster)
        assert list(await prism.find("drx-")) == []
        assert lab.sim.world.volume_groups == {}


async def test_a_cycle_of_one_disk_stays_within_its_budget(tmp_path: Path) -> None:
    """At 30 requests a minute to a host, polls and all: more than 25 would make cycles wait for tokens."""
    async with simulated(tmp_path) as lab:
        first = await lab.take(1)
        before = lab.prism.requests
        second = await lab.take(2)
        await regions(lab.prism, second, first)
        group, _ = await cloned(lab, second)
        attachment = await lab.prism.attach(group, IQN, SECRETS, UUID(int=30))
        await lab.prism.detach(group.uuid, attachment)
        await lab.prism.delete_volume_group(group.uuid)
        await lab.prism.delete_snapshot(first.uuid, first.cluster)
        assert lab.prism.requests - before <= 25


async def test_disks_and_what_holds_their_bytes(tmp_path: Path) -> None:
    async with simulated(tmp_path) as lab:
        vm = await lab.vm()
        there = [disk for disk in lab.sim.vm("app01").disks if not disk.cdrom]
        assert [(disk.identity, disk.backing, disk.size) for disk in vm.disks] == [
            (disk.uuid, disk.backing, SIZE) for disk in there
        ]
        assert vm.quiesce
        assert {each.name for each in await lab.prism.vms()} == {"app01"}
        clusters = {each.name: each for each in await lab.prism.clusters()}
        assert vm.cluster == clusters["cluster-a"].uuid
        assert clusters["cluster-a"].address == lab.sim.cluster("cluster-a").address


async def test_a_repeated_request_after_a_crash_makes_one_snapshot(tmp_path: Path) -> None:
    async with simulated(tmp_path) as lab:
        first = await lab.take(1)
        async with open_prism(settings(lab.sim)) as other:
            again = await Lab(lab.sim, other).take(1)
        assert again.uuid == first.uuid
        assert len(lab.sim.world.snapshots) == 1


async def test_answers_that_are_lost_change_nothing(tmp_path: Path) -> None:
    """The connection is cut after each change was carried out: nothing is made twice, and nothing stays."""
    async with simulated(tmp_path) as lab:
        lab.sim.faults.add("reset-after", "^(POST|PUT|DELETE) .*/(vm_snapshots|volume_groups)", every=2, count=None)  # fmt: skip
        snapshot = await lab.take(1)
        group, _ = await cloned(lab, snapshot)
        await lab.prism.attach(group, IQN, SECRETS, UUID(int=30))
        assert len(lab.sim.world.snapshots) == len(lab.sim.world.volume_groups) == 1
        await lab.prism.delete_volume_group(group.uuid)
        await lab.prism.delete_snapshot(snapshot.uuid, snapshot.cluster)
        assert lab.sim.world.snapshots == {}
        assert lab.sim.world.volume_groups == {}


async def test_a_reference_that_expired(tmp_path: Path) -> None:
    async with simulated(tmp_path) as lab:
        first, second = await lab.take(1), await lab.take(2)
        await lab.prism.delete_snapshot(first.uuid, first.cluster)
        with pytest.raises(RegionsLostError, match="that snapshot is gone"):
            await regions(lab.prism, second, first)
        with pytest.raises(PrismNotFoundError):
            await lab.prism.snapshot(first.uuid, await lab.vm())


async def test_expiry_can_be_moved(tmp_path: Path) -> None:
    async with simulated(tmp_path) as lab:
        snapshot = await lab.take(1)
        later_us = (int(time.time()) + 7200) * 1_000_000
        await lab.prism.extend_snapshot(snapshot, later_us)
        (there,) = lab.sim.world.snapshots.values()
        assert there.expires_at == later_us / 1_000_000


async def test_a_task_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with simulated(tmp_path, expose="vg-url") as lab:
        snapshot = await lab.take(1)
        lab.sim.faults.add("half-created", "VolumeGroupCreate")
        with pytest.raises(PrismTaskError):
            await cloned(lab, snapshot)
        assert lab.sim.world.volume_groups == {}


async def test_an_image_is_read_from_beginning_to_end(tmp_path: Path) -> None:
    async with simulated(tmp_path, expose="vg-image") as lab:
        snapshot = await lab.take(1)
        content = await lab.sim.guest(lab.sim.vm("app01").uuid, 1).content()
        image = await lab.prism.create_image(
            snapshot, snapshot.disks[1], f"{PREFIX}7-img", UUID(int=3)
        )
        async with aclosing(lab.prism.image_file(image)) as pieces:
            assert b"".join([piece async for piece in pieces]) == content


async def test_an_element_alone_is_enough_without_chap(tmp_path: Path) -> None:
    async with simulated(tmp_path) as lab:
        element = lab.sim.cluster("cluster-a").address
        async with open_prism(settings(lab.sim, host=element)) as prism:
            here = Lab(lab.sim, prism)
            (cluster,) = await prism.clusters()
            assert cluster.name == "cluster-a"
            snapshot = await here.take(1)
            content = await lab.sim.guest(lab.sim.vm("app01").uuid, 0).content()
            disk = snapshot.disks[0]
            group = await prism.create_volume_group(
                snapshot, disk, f"{PREFIX}7-vg", None, UUID(int=21)
            )
            await prism.attach(group, IQN, None, UUID(int=30))
            portal = Portal(cluster.data_services or "")
            plain = IscsiSettings(IQN)
            (name,) = [each.name for each in await discover(portal, plain)]
            async with open_reader(portal, name, None, plain) as reader:
                assert await reader.read(0, SIZE) == content
            await prism.delete_volume_group(group.uuid)
            await prism.delete_snapshot(snapshot.uuid, snapshot.cluster)
            assert list(await prism.find("drx-")) == []
