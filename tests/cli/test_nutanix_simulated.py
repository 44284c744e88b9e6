# SPDX-License-Identifier: AGPL-3.0-or-later
"""The commands of a Nutanix source host against the simulator: HTTPS, tasks, changed regions and iSCSI are real."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator import prism_access
from replicator.prism.settings import PrismSettings, Waits
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import ClusterSpec, DiskSpec, Scenario, VmSpec
from tests.cli.conftest import Done, Replctl
from tests.cli.test_json_contract import keeps_promise
from tests.cli.test_pushing import two_sites
from tests.limits import HANG_S
from tests.sites import GRAIN

MIB = 1 << 20
SCENARIO = Scenario(
    clusters=[ClusterSpec(name="cluster-a"), ClusterSpec(name="cluster-b")],
    vms=[
        VmSpec(
            name="app01",
            disks=[DiskSpec(size=8 * MIB, data=2 * MIB), DiskSpec(size=4 * MIB, data=MIB)],
            cdrom=True,
        ),
        VmSpec(name="app02", disks=[DiskSpec(size=4 * MIB, data=MIB)]),
        VmSpec(name="db", cluster="cluster-b", disks=[DiskSpec(size=4 * MIB, data=MIB)]),
    ],
)


@dataclass
class Lab:
    sim: Simulator
    source: Path
    receiver: Path
    replctl: Replctl

    async def told(self, *words: str, at: Path | None = None) -> Done:
        done = await trio.to_thread.run_sync(
            lambda: self.replctl("--config", at or self.source, *words)
        )
        assert self.sim.password("backup") not in done.out + done.err
        return done

    def ours(self) -> list[str]:
        """What this product has made on the clusters."""
        world = self.sim.world
        named = [*world.snapshots.values(), *world.volume_groups.values(), *world.images.values()]
        return [each.name for each in named if each.name.startswith("drx-")]

    async def restored(self, vm: str, disk: int, folder: Path) -> bytes:
        """A disk of the receiver's newest point."""
        file = folder / f"{vm}-{disk}"
        words = ("export", vm, "--disk", str(disk), "--to", str(file), "--force")
        done = await self.told(*words, at=self.receiver)
        assert done.code == 0, done.err
        return file.read_bytes()


@pytest.fixture(autouse=True)
def _looks_at_tasks_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator's tasks are done at once: the gaps between looks would be most of the time."""
    settings = partial(PrismSettings, waits=Waits(poll_s=(0.02,)))
    monkeypatch.setattr(prism_access, "PrismSettings", settings)


@asynccontextmanager
async def lab(tmp_path: Path, replctl: Replctl, **values: Any) -> AsyncIterator[Lab]:
    async with running_simulator(tmp_path / "sim", SCENARIO) as sim:
        passfile = tmp_path / "pass"
        passfile.write_text(f"password = {sim.password('backup')}\n")
        passfile.chmod(0o600)
        given: dict[str, Any] = {
            "source": "nutanix",
            "image_disks": None,
            "vm": "*",
            "prism_central": f"{sim.address}:{sim.port}",
            "user": "backup",
            "passfile": passfile,
            "prism_ca_cert": sim.ca_path,
            "prism_rate_rpm": 6000,
            "iscsi_initiator": "iqn.2026-01.org.example:dr-service-01",
            **values,
        }
        async with two_sites(tmp_path, **given) as (source, receiver):
            yield Lab(sim, source, receiver, replctl)


async def test_three_vms_of_two_clusters(tmp_path: Path, replctl: Replctl) -> None:
    with trio.fail_after(4 * HANG_S):
        async with lab(tmp_path, replctl, exclude="nobody") as it:
            done = await it.told("--json", "estimate")
            assert done.code == 0, done.err
            for found in done.json:
                keeps_promise("Estimate", found)
            assert [(found["vm"], found["full_bytes"]) for found in done.json] == [
                ("app01", 3 * MIB),
                ("app02", MIB),
                ("db", MIB),
            ]
            assert it.ours() == []

            done = await it.told("--json", "seed")
            assert done.code == 0, done.err
            assert [(each["vm"], each["point"]) for each in done.json] == [
                ("app01", 1),
                ("app02", 1),
                ("db", 1),
            ]
            assert "Prism discovery: PC=" in done.err
            assert "Selected 3 VM(s) for backup" in done.err
            assert len(it.ours()) == 3  # the references, and nothing else

            app01 = it.sim.vm("app01").uuid
            await it.sim.guest(app01, 1).write(MIB + 3, os.urandom(GRAIN))
            done = await it.told("--json", "estimate", "app01")
            assert done.code == 0, done.err
            assert done.json["uuid"] == app01
            changed = [disk["incremental_bytes"] for disk in done.json["disks"]]
            assert changed[0] == 0
            assert GRAIN <= changed[1] <= 3 * GRAIN
            assert len(it.ours()) == 3

            done = await it.told("--json", "push")
            assert done.code == 0, done.err
            assert [each["point"] for each in done.json] == [2, 2, 2]
            assert len(it.ours()) == 3
            for name, disks in (("app01", 2), ("app02", 1), ("db", 1)):
                for disk in range(disks):
                    content = await it.sim.guest(it.sim.vm(name).uuid, disk).content()
                    assert await it.restored(name, disk, tmp_path) == content, (name, disk)


async def test_one_cluster_of_them(tmp_path: Path, replctl: Replctl) -> None:
    with trio.fail_after(4 * HANG_S):
        async with lab(tmp_path, replctl, cluster="cluster-b") as it:
            done = await it.told("--json", "seed")
            assert done.code == 0, done.err
            assert [each["vm"] for each in done.json] == ["db"]
            done = await it.told("push", "app01")
            assert (done.code, done.out) == (2, "")
            assert "VM: this host pushes db, not app01" in done.err
