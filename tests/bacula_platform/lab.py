# SPDX-License-Identifier: AGPL-3.0-or-later
"""Restores onto a simulated cluster: images that a test makes, the description of a VM that is there, and what came of it."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from bacula_adapter.backend.interface import JobInfo, JobKind
from bacula_adapter.description import Description, PartDisk
from bacula_adapter.restore.platform import PlatformTarget, open_platform_target
from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from replicator.config import Config, check
from replicator.hardware import Hardware
from replicator.prism.discovery import open_prism
from replicator.simulator.model import Disk, Vm
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from tests.limits import HANG_S
from tests.nutanix.fake import MemoryStore
from tests.sources.simulated import Api, prism_of

MIB = 1 << 20
SIZES = (8 * MIB, 3 * MIB + 512)
JOB = JobInfo(name="Restore.2026-11-25_10.00.00_03", job_id=7, kind=JobKind.RESTORE)


def scenario() -> Scenario:
    """A VM with two disks on two buses' worth of places, a CD-ROM and a NIC; the lab changes it further."""
    disks = [DiskSpec(size=size, data=0) for size in SIZES]
    return Scenario(vms=[VmSpec(name="app01", disks=disks, cdrom=True)])


@dataclass
class Lab:
    """A simulator, the ledger of this host, and images. ``options``: of the configuration."""

    folder: Path
    simulator: Simulator
    api: Api
    store: MemoryStore = field(default_factory=MemoryStore)
    options: dict[str, str] = field(default_factory=dict)

    @property
    def original(self) -> Vm:
        return self.simulator.vm("app01")

    def config(self, **options: str) -> Config:
        values = {"state_dir": str(self.folder / "state"), **self.options, **options}
        return check(values)

    @asynccontextmanager
    async def target(self, **options: str) -> AsyncGenerator[PlatformTarget, None]:
        settings = prism_of(self.simulator, self.api)
        async with open_platform_target(
            self.config(**options), JOB, self.store, settings=settings
        ) as target:
            yield target

    async def hardware(self) -> Hardware:
        async with open_prism(prism_of(self.simulator, self.api)) as prism:
            return await prism.hardware(self.original.uuid)

    async def restored(self, target: PlatformTarget, **changes: Any) -> RestoredVm:
        """The VM that there is, as if its backup had been put together in the target's scratch. ``changes``: of its hardware."""
        hardware = msgspec.structs.replace(await self.hardware(), **changes)
        return make_vm(target, hardware)

    async def restore(self, *, keep: bool = True, **options: str) -> RestoredVm:
        """All of one restore."""
        async with self.target(**options) as target:
            vm = await self.restored(target)
            await target.finish([vm])
            if keep:
                await target.keep()
        return vm

    def objects(self) -> list[str]:
        """Names of images and of VMs that no operator has."""
        return objects(self.simulator)

    def images(self, name: str) -> dict[tuple[str, int], bytes]:
        """The bytes of a VM's disks, by where they are."""
        return contents(self.simulator, self.simulator.vm(name))


def configuration(lab: Lab, **options: str) -> Config:
    """One that reaches the simulator by itself; ``host.conf`` in the lab's folder says the same."""
    passfile = lab.folder / "passfile"
    passfile.write_text(f"password = {lab.simulator.password('admin')}\n")
    passfile.chmod(0o600)
    values = {
        "state_dir": str(lab.folder / "state"),
        "prism_central": f"{lab.simulator.address}:{lab.simulator.port}",
        "prism_api_version": lab.api,
        "prism_ca_cert": str(lab.simulator.ca_path),
        "prism_rate_rpm": "6000",
        "user": "admin",
        "passfile": str(passfile),
        **options,
    }
    lines = [f"{key} = {value}\n" for key, value in values.items()]
    (lab.folder / "host.conf").write_text("".join(lines))
    return check(values)


def objects(simulator: Simulator) -> list[str]:
    world = simulator.world
    return [
        each.name
        for each in (*world.images.values(), *world.vms.values())
        if each.name.startswith("drx-")
    ]


def contents(simulator: Simulator, vm: Vm) -> dict[tuple[str, int], bytes]:
    found = {}
    for disk in disks_of(vm):
        assert disk.backing is not None
        found[disk.bus, disk.index] = simulator.core.storage.disk(disk.backing).read_bytes()
    return found


def disks_of(vm: Vm) -> list[Disk]:
    return [disk for disk in vm.disks if not disk.cdrom]


def image(path: Path, size: int, seed: int) -> Path:
    """A sparse image: data at its beginning, in its middle and at its end."""
    dice = random.Random(seed)
    with path.open("wb") as file:
        for offset in (0, size // 2, size - 70_000):
            file.seek(offset)
            file.write(dice.randbytes(70_000))
        file.truncate(size)
    return path


def make_vm(target: PlatformTarget, hardware: Hardware) -> RestoredVm:
    """Images in the target's scratch, and a description with this hardware."""
    disks = tuple(
        RestoredDisk(
            disk=f"disk-{number}",
            identity=slot.identity,
            path=image(
                target.image_path("@nutanix", hardware.name, f"disk-{number}"), slot.size, number
            ),
            size=slot.size,
        )
        for number, slot in enumerate(hardware.disks)
    )
    return RestoredVm(name=hardware.name, disks=disks, description=describe(hardware, disks))


def describe(hardware: Hardware, disks: Sequence[RestoredDisk]) -> Description:
    name = hardware.name
    return Description(
        root_name="@nutanix",
        vm=name,
        uuid=hardware.uuid,
        number=1,
        part="0a1b2c3d",
        chain="1f2e3d4c",
        job="Nightly.2026-11-24_22.00.00_01",
        job_id=3,
        level="F",
        taken_at_us=1_800_000_000_000_000,
        grain=65536,
        algorithm=1,
        disks=tuple(
            PartDisk(
                disk=disk.disk,
                identity=disk.identity,
                size=disk.size,
                kind="full",
                file=f"@nutanix/{name}/disks/{disk.disk}.raw",
                root=bytes(32),
            )
            for disk in disks
        ),
        hardware=hardware,
    )


@asynccontextmanager
async def platform_lab(folder: Path, api: Api, **options: str) -> AsyncGenerator[Lab, None]:
    """A simulator with two clusters; ``app01`` is on ``cluster-a``, with disks on SCSI and SATA, UEFI and Q35."""
    with trio.fail_after(HANG_S):
        async with running_simulator(folder / "simulator", scenario()) as simulator:
            vm = simulator.vm("app01")
            disks_of(vm)[1].bus = "SATA"
            disks_of(vm)[1].index = 2
            vm.boot, vm.machine, vm.sockets, vm.cores = {"type": "UEFI"}, "Q35", 2, 3
            yield Lab(folder, simulator, api, options=options)
