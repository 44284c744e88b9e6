# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs on a simulated cluster, backed up by Bacula in memory: HTTPS, tasks, changed regions and iSCSI are real."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from replicator.config import check
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import ClusterSpec, DiskSpec, Scenario, VmSpec
from tests.bacula_backup.lab import Catalogue
from tests.sources.simulated import objects

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
class NutanixLab:
    """A cluster and the catalogue of its VMs' backups."""

    sim: Simulator
    values: dict[str, str]
    catalogue: Catalogue

    def ours(self) -> list[str]:
        """What this product has on the clusters."""
        return objects(self.sim)

    async def write(self, vm: str, disk: int, offset: int, data: bytes) -> None:
        await self.sim.guest(self.sim.vm(vm).uuid, disk).write(offset, data)

    async def contents(self, vm: str) -> dict[str, bytes]:
        found = self.sim.vm(vm)
        count = sum(not disk.cdrom for disk in found.disks)
        return {f"disk-{n}": await self.sim.guest(found.uuid, n).content() for n in range(count)}

    async def check(self, *vms: str) -> None:
        """The last job reads back as the VMs are now."""
        for vm in vms:
            assert self.catalogue.images(vm=vm) == await self.contents(vm), vm


@asynccontextmanager
async def nutanix_lab(tmp_path: Path, api: str, **values: Any) -> AsyncIterator[NutanixLab]:
    await trio.Path(tmp_path).mkdir(exist_ok=True)
    async with running_simulator(tmp_path / "sim", SCENARIO) as sim:
        passfile = tmp_path / "pass"
        passfile.write_text(f"password = {sim.password('backup')}\n")
        passfile.chmod(0o600)
        given = {
            "prism_central": f"{sim.address}:{sim.port}",
            "prism_api_version": api,
            "user": "backup",
            "passfile": str(passfile),
            "prism_ca_cert": str(sim.ca_path),
            "prism_rate_rpm": "6000",
            "iscsi_initiator": "iqn.2026-01.org.example:dr-service-01",
            "state_dir": str(tmp_path / "state"),
            **values,
        }
        yield NutanixLab(sim, given, Catalogue(check(given)))
