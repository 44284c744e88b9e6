# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs of a simulated Prism through a real Bacula: a whole chain, back to files and onto the cluster, and what goes wrong there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from replicator.simulator.guest import Guest
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from tests.bacula.chains import LEVELS, PARTS, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.director import Job
from tests.bacula.lab import MIB, Lab
from tests.limits import HANG_S

_T = TypeVar("_T")

VM = "app01"
SIZES = (12 * MIB, 6 * MIB + 512 * 8)
#: Number of restore_vm_name in the menu of plugin options (``bacula_adapter/restore/options.py``).
VM_NAME = "1"


@dataclass
class Site:
    """A lab whose file daemon's host backs up a simulated Prism. Labs are not async: ``run`` calls them in a thread."""

    lab: Lab
    simulator: Simulator

    async def run(self, function: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        return await trio.to_thread.run_sync(lambda: function(*arguments, **named))

    def guests(self, name: str = VM) -> list[Guest]:
        vm = self.simulator.vm(name)
        count = sum(not disk.cdrom for disk in vm.disks)
        return [self.simulator.guest(vm.uuid, index) for index in range(count)]

    async def sums(self, name: str = VM) -> dict[str, str]:
        return {
            f"disk-{number}": hashlib.sha256(await guest.content()).hexdigest()
            for number, guest in enumerate(self.guests(name))
        }

    async def change(self, step: int) -> None:
        noise = random.Random(step)
        for guest in self.guests():
            size = guest.disk.size
            for _ in range(4):
                await guest.write(noise.randrange(0, size - 60_000), noise.randbytes(50_003))
            await guest.zero(noise.randrange(0, size - MIB, 4096), 65536)

    def ours(self) -> list[str]:
        world = self.simulator.world
        every = [*world.snapshots.values(), *world.volume_groups.values(), *world.images.values()]
        return [each.name for each in every if each.name.startswith("drx-")]

    def configure(self, name: str, **keys: str) -> None:
        passfile = self.lab.folder / "etc" / "prism.pass"
        passfile.unlink(missing_ok=True)
        passfile.touch(mode=0o600)
        passfile.write_text(f"password = {self.simulator.password('admin')}\n")
        values = {
            "source": "nutanix",
            "prism_central": f"{self.simulator.address}:{self.simulator.port}",
            "prism_ca_cert": str(self.simulator.ca_path),
            "prism_rate_rpm": "6000",
            "user": "admin",
            "passfile": str(passfile),
            "iscsi_initiator": "iqn.2026-01.org.example:lab",
            "vm": VM,
        }
        self.lab.configure(name, values | keys)
        self.lab.add_job(name, self.lab.plugin(name))


@asynccontextmanager
async def a_site(tmp_path: Path) -> AsyncGenerator[Site, None]:
    disks = [DiskSpec(size=size, data=MIB) for size in SIZES]
    scenario = Scenario(vms=[VmSpec(name=VM, disks=disks, cdrom=True)])
    with trio.fail_after(2 * HANG_S), a_lab() as lab:
        async with running_simulator(tmp_path / "prism", scenario) as simulator:
            yield Site(lab, simulator)


async def test_a_chain_comes_back_to_files_and_onto_the_cluster(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        lab, director = site.lab, site.lab.director
        site.configure("nightly")
        await site.run(lab.start)
        jobs: list[Job] = []
        sums: list[dict[str, str]] = []
        for step, level in enumerate(LEVELS):
            if step:
                await site.change(step)
            sums.append(await site.sums())
            jobs.append(await site.run(director.run, "nightly", level))
            assert jobs[-1].ok, jobs[-1].log
            assert "falling back" not in jobs[-1].log
            # The reference, and nothing else.
            assert len(site.ours()) == 1
        assert all(job.size < jobs[0].size for job in jobs if job.level == "I")
        assert "Prism discovery: PC=" in jobs[0].log
        for point, parts in enumerate(PARTS):
            ids = [jobs[part].id for part in parts]
            # To files each point comes back the same way for all sources (test_core.py): the last one is enough here.
            if point == len(PARTS) - 1:
                where = lab.folder / f"point-{point}"
                done = await site.run(director.restore, ids, where=str(where))
                assert done.ok, done.log
                assert sums_of(where) == sums[point]
            name = f"back-{point}"
            done = await site.run(director.restore, ids, options={VM_NAME: name})
            assert done.ok, done.log
            assert await site.sums(name) == sums[point]
            assert site.simulator.vm(name).power == "OFF"
        assert len(site.ours()) == 1
        assert site.simulator.vm(VM).power == "ON"


async def test_what_goes_wrong_at_prism_is_said_and_fails_the_job(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        lab, director = site.lab, site.lab.director
        wrong = lab.folder / "etc" / "wrong.pass"
        wrong.touch(mode=0o600)
        wrong.write_text("password = not-this-one\n")
        site.configure("wrong-password", passfile=str(wrong))
        site.configure("nobody", vm="nosuchvm")
        site.configure("lost-reference")
        await site.run(lab.start)
        jobs = await site.run(director.run_all, "wrong-password", "nobody", "lost-reference")
        assert jobs["wrong-password"].status == "f"
        assert "401" in jobs["wrong-password"].log
        assert "not-this-one" not in jobs["wrong-password"].log
        assert jobs["nobody"].status == "f"
        assert "nosuchvm" in jobs["nobody"].log
        assert jobs["lost-reference"].ok, jobs["lost-reference"].log
        world = site.simulator.world
        for uuid in [each.uuid for each in world.snapshots.values() if each.name[:4] == "drx-"]:
            del world.snapshots[uuid]
        await site.change(1)
        job = await site.run(director.run, "lost-reference", "Incremental")
        # Guard: never silent. The Incremental holds full images, and comes back beside the Full.
        assert job.status == "T", job.log
        assert "reference_snapshot not found" in job.log
        where = lab.folder / "back"
        ids = [jobs["lost-reference"].id, job.id]
        done = await site.run(director.restore, ids, where=str(where))
        assert done.ok, done.log
        assert sums_of(where) == await site.sums()
        assert len(site.ours()) == 1
