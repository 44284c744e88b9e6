# SPDX-License-Identifier: AGPL-3.0-or-later
"""A simulated world without its server, for tests of what the world does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from replicator.simulator.core import Core, open_core
from replicator.simulator.guest import Guest
from replicator.simulator.model import Cluster, Container, Disk, Subnet, Task, Vm, World
from tests.limits import HANG_S

MIB = 1 << 20
GRAIN = 64 << 10
#: Two runs of the tests at once do not meet.
NET = f"127.77.{os.getpid() % 250 + 1}"


def small_world(net: str = NET) -> World:
    """Two clusters with a container and a subnet each, and no VM."""
    world = World(central="central", address=f"{net}.1")
    for number, name in enumerate(("a", "b")):
        base = 20 + 20 * number
        world.clusters[name] = Cluster(
            uuid=name,
            name=f"cluster-{name}",
            address=f"{net}.{base}",
            data_services=f"{net}.{base + 1}",
            cvms=[f"{net}.{base + 2}", f"{net}.{base + 3}"],
        )
        world.containers[f"ct-{name}"] = Container(uuid=f"ct-{name}", name="default", cluster=name)
        world.subnets[f"sn-{name}"] = Subnet(uuid=f"sn-{name}", name="vlan10", cluster=name)
    return world


@asynccontextmanager
async def small_core(directory: Path, port: int = 3260) -> AsyncIterator[Core]:
    async with open_core(directory, small_world, iscsi_port=port) as core:
        yield core


async def ended(task: Task) -> Task:
    """The task, once it has ended."""
    with trio.fail_after(HANG_S):
        while task.completed_at is None:
            await trio.lowlevel.checkpoint()
    return task


async def done(task: Task) -> Task:
    """The task, which must have ended well."""
    await ended(task)
    assert task.status == "SUCCEEDED", task.error
    return task


async def failed(task: Task) -> str:
    """Why the task failed."""
    await ended(task)
    assert task.status == "FAILED"
    assert task.error is not None
    return task.error.message


async def make_vm(
    core: Core, name: str = "app", sizes: tuple[int, ...] = (8 * MIB, 4 * MIB + 512), **more: Any
) -> Vm:
    """A VM on cluster a with blank disks and an empty CD-ROM."""
    disks = [
        (Disk(uuid=f"{name}-d{n}", backing=None, index=n), core.sources.blank(size))
        for n, size in enumerate(sizes)
    ]
    cdrom = Disk(uuid=f"{name}-cd", backing=None, bus="IDE", cdrom=True)
    vm = Vm(uuid=name, name=name, cluster="a", **more)
    await done(core.create_vm(vm, [*disks, (cdrom, None)]))
    return core.world.vms[name]


async def snapshot(core: Core, name: str, vm: str = "app", **more: Any) -> list[str]:
    """Take one; the ids of its disk recovery points."""
    options = {"application_consistent": False, "expires_at": None, "element": False, **more}
    await done(core.create_snapshot(name, [vm], **options))
    found = next(s for s in core.world.snapshots.values() if s.name == name)
    return [disk.uuid for disk in found.vms[0].disks]


def guest(core: Core, index: int = 0, vm: str = "app") -> Guest:
    return Guest(core, vm, index)
