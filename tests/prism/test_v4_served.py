# SPDX-License-Identifier: AGPL-3.0-or-later
"""v4 over real sockets and TLS, with accounts and sessions, against the whole simulator: a cycle, and its budget."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from uuid import uuid4

import trio

from replicator.prism.discovery import open_prism
from replicator.prism.meters import Meters
from replicator.prism.settings import Account, PrismSettings, Waits
from replicator.prism.types import Capability, Consistency, Secrets
from replicator.simulator.running import running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from tests.limits import HANG_S

MIB = 1 << 20
LATER_US = 4_000_000_000_000_000
REQUESTS_MAX = 25
"""Of a disk's incremental cycle, to Prism Central, looks at tasks included (nutanix-data-path.md, part E)."""


async def test_a_cycle_stays_in_its_budget(tmp_path: Path) -> None:
    scenario = Scenario(vms=[VmSpec(name="app", disks=[DiskSpec(size=8 * MIB, data=MIB)])])
    meters = Meters()
    with trio.fail_after(HANG_S):
        async with running_simulator(tmp_path / "sim", scenario) as sim:
            settings = PrismSettings(
                host=sim.address,
                port=sim.port,
                account=Account("admin", sim.password("admin")),
                ca=sim.ca_path,
                waits=Waits(poll_s=(0.1, 0.2, 0.4)),
            )
            async with open_prism(settings, meters) as prism:
                assert prism.capability is Capability.V4
                uuid = sim.vm("app").uuid
                vm = await prism.vm(uuid)
                old = await prism.create_snapshot(vm, "one", Consistency.CRASH, LATER_US, uuid4())
                await sim.guest(uuid).write(3 * MIB, b"changed")

                before = meters.by_host[sim.address]
                vm = await prism.vm(uuid)
                new = await prism.create_snapshot(vm, "two", Consistency.CRASH, LATER_US, uuid4())
                since = (old, old.disks[0])
                async with aclosing(prism.regions(new, new.disks[0], since)) as pages:
                    found = [extent async for page in pages for extent in page.regions]
                assert [(one.offset, one.length) for one in found] == [(3 * MIB, 65536)]
                secrets = Secrets("Tq8sN2vLx5Rz", "Zb7mW4kPq9Xy")
                group = await prism.create_volume_group(
                    new, new.disks[0], "group", secrets, uuid4()
                )
                initiator = "iqn.2026-01.org.example:dr-service-01"
                attachment = await prism.attach(group, initiator, secrets, uuid4())
                await prism.detach(group.uuid, attachment)
                await prism.delete_volume_group(group.uuid)
                await prism.delete_snapshot(old.uuid, vm.cluster)
                spent = meters.by_host[sim.address] - before
            assert spent <= REQUESTS_MAX
            assert not meters.errors
            assert sim.world.volume_groups == {}
            assert list(sim.world.snapshots) == [new.uuid]
