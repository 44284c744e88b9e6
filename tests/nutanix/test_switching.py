# SPDX-License-Identifier: AGPL-3.0-or-later
"""Prism's interface is switched between two processes: neither knows the snapshots of the other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from replicator.errors import SnapshotGoneError
from replicator.prism.types import Capability, Kind
from replicator.simulator.running import running_simulator
from replicator.sources.base import SnapshotName
from replicator.sources.nutanix.ledger import Entry, read_entries
from replicator.sources.nutanix.removal import Remover
from replicator.sources.nutanix.sweep import Why, judge, sweep_clusters
from tests.nutanix.cluster import contents, process, replay
from tests.nutanix.fake import VM, FakePrism, FakeWorld, MemoryStore
from tests.sources.nutanix_lab import fake_world
from tests.sources.simulated import Api, SimulatedLab, objects, scenario, site_on

FIRST = SnapshotName("p1", None)
SECOND = SnapshotName("p2", "p1")
BOTH_WAYS = pytest.mark.parametrize(
    ("old", "new"), [(Capability.V3, Capability.V4), (Capability.V4, Capability.V3)]
)


class Switched:
    """A VM whose first point was made through ``old``."""

    def __init__(self, folder: Path, old: Capability) -> None:
        self.world: FakeWorld = fake_world(1)
        self.items: dict[str, Any] = {}
        self.folder = folder
        self.old = old

    def process(self, spoken: Capability) -> Any:
        prism = FakePrism(self.world, capability=spoken)
        return process(self.world, self.items, self.folder, prism=prism)

    async def commit_first(self) -> None:
        async with self.process(self.old) as source:
            await (await source.take(FIRST)).aclose()
            await source.confirm(FIRST)

    def pushes(self) -> list[str]:
        """Whose snapshots are on the cluster."""
        return sorted(name.split("-")[2] for name in self.world.objects())

    def entries(self) -> dict[str, Entry]:
        return {entry.push_id: entry for entry in read_entries(self.items)}


@BOTH_WAYS
async def test_there_and_back_nothing_is_left(
    old: Capability, new: Capability, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = Switched(tmp_path, old)
    await run.commit_first()
    async with run.process(new) as source:
        snapshot = await source.take(SECOND)
        assert snapshot.lost_tracking == (
            f"reference_snapshot not found: it was made through {old}, and Prism is spoken to by {new} now"
        )
        assert await replay(snapshot, {}, None) == contents(run.world)
        await snapshot.aclose()
        await source.confirm(SECOND)
        assert await source.sweep(None, "p2") == []
        assert [held.push_id for held in await source.held()] == ["p2"]
    assert "removed" not in caplog.text.replace("It is removed when", "")
    warned = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    (text,) = [each for each in warned if "prism_api_version" in each]
    assert f"made through {old}" in text
    assert f"when prism_api_version speaks {old} again, and expires by itself on 20" in text
    assert run.pushes() == ["p1", "p2"]
    assert run.entries()["p1"].dropped
    async with run.process(old) as source:
        assert len(await source.sweep(None, "p2")) == 1
    assert run.pushes() == ["p2"]
    assert list(run.entries()) == ["p2"]


@BOTH_WAYS
async def test_it_leaves_the_ledger_when_it_has_expired(
    old: Capability, new: Capability, tmp_path: Path
) -> None:
    run = Switched(tmp_path, old)
    await run.commit_first()
    until = run.entries()["p1"].expires_at_us
    async with run.process(new) as source:
        run.world.now_us = until - 1
        await source.sweep(None, None)
        assert list(run.entries()) == ["p1"]
        run.world.now_us = until
        assert await source.sweep(None, None) == []
        assert run.entries() == {}


@BOTH_WAYS
async def test_it_is_not_opened_again(old: Capability, new: Capability, tmp_path: Path) -> None:
    run = Switched(tmp_path, old)
    async with run.process(old) as source:
        await (await source.take(FIRST)).aclose()
    async with run.process(new) as source:
        with pytest.raises(
            SnapshotGoneError, match=f"made through {old}, and Prism is spoken to by {new}"
        ):
            await source.reopen(FIRST)
        await source.abandon(FIRST)
        assert await source.held() == []
    assert run.pushes() == ["p1"]
    async with run.process(old) as source:
        await source.sweep(None, None)
    assert run.pushes() == []
    assert run.entries() == {}


@BOTH_WAYS
async def test_a_reference_out_of_reach_is_not_extended(
    old: Capability, new: Capability, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Switched(tmp_path, old)
    await run.commit_first()
    run.world.now_us = run.entries()["p1"].expires_at_us - 1_000_000
    async with run.process(new) as source:
        await (await source.take(SECOND)).aclose()
    assert "live longer" not in caplog.text


@BOTH_WAYS
async def test_it_is_told_from_the_ledger_and_survives_a_sweep(
    old: Capability, new: Capability, tmp_path: Path
) -> None:
    run = Switched(tmp_path, old)
    await run.commit_first()
    prism = FakePrism(run.world, capability=new)
    async with run.process(new) as source:
        site = source._site
        now, own = run.world.now_us, site.ledger.installation
        for live in ({VM: {"p1"}}, {}):
            (each,) = judge([], run.entries().values(), own, live, now, spoken=new)
            assert each.why is (Why.BY_V3 if old is Capability.V3 else Why.BY_V4)
            assert not each.is_removed
            assert await sweep_clusters(prism, site.ledger, live, now) == []
            assert run.pushes() == list(run.entries()) == ["p1"]
        until = run.entries()["p1"].expires_at_us
        assert judge([], run.entries().values(), own, {}, until, spoken=new) == []
        await sweep_clusters(prism, site.ledger, {}, until)
        assert run.entries() == {}


async def test_an_entry_of_an_older_version_is_taken_for_the_interface_that_is_spoken(
    tmp_path: Path,
) -> None:
    run = Switched(tmp_path, Capability.V4)
    await run.commit_first()
    for key, value in run.items.items():
        if key.startswith("prism/"):
            assert value.pop("capability") == "v4"
            assert msgspec.convert(run.items[key], Entry).capability is None
    async with run.process(Capability.V4) as source:
        snapshot = await source.take(SECOND)
        assert snapshot.lost_tracking is None
        await snapshot.aclose()
        await source.confirm(SECOND)
    assert run.pushes() == ["p2"]


@pytest.mark.parametrize(("old", "new"), [("v3", "v4"), ("v4", "v3")])
async def test_on_a_simulated_cluster(old: Api, new: Api, tmp_path: Path) -> None:
    """Neither interface removes a snapshot of the other; of volume groups each removes what the other made."""
    work = tmp_path / "work"
    work.mkdir()
    store = MemoryStore()

    def pushes() -> list[str]:
        return sorted(name.split("-")[2] for name in objects(simulator))

    async with running_simulator(tmp_path / "simulator", scenario(1)) as simulator:
        async with site_on(simulator, old, store, work) as site:
            source = SimulatedLab(simulator, site).source()
            snapshot = await source.take(FIRST)
            assert await snapshot.disks[0].view.read(0, 4) == bytes(4)
            async with site_on(simulator, new, store, work) as other:
                entries = await other.ledger.entries()
                groups = [entry for entry in entries if entry.kind is Kind.VOLUME_GROUP]
                assert len(groups) == 1
                await Remover(other.prism, other.ledger).remove(groups, 0, why="a test")
                assert not simulator.world.volume_groups
            await snapshot.aclose()
            await source.confirm(FIRST)
        async with site_on(simulator, new, store, work) as site:
            source = SimulatedLab(simulator, site).source()
            snapshot = await source.take(SECOND)
            assert f"made through {old}" in str(snapshot.lost_tracking)
            await snapshot.aclose()
            await source.confirm(SECOND)
            await source.sweep(None, "p2")
            assert pushes() == ["p1", "p2"]
        async with site_on(simulator, old, store, work) as site:
            await SimulatedLab(simulator, site).source().sweep(None, "p2")
            assert pushes() == ["p2"]
