# SPDX-License-Identifier: AGPL-3.0-or-later
"""A client of a simulator by v3 or v4, and what VMs and files are made of in tests of ``RestorePrism``."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from replicator.hardware import Hardware, Nic
from replicator.prism.api import RestorePrism
from replicator.prism.discovery import open_prism
from replicator.prism.settings import Account
from replicator.prism.types import NewDisk, NewVm
from replicator.simulator.running import Simulator, running_simulator
from tests.limits import HANG_S
from tests.sources.simulated import Api, prism_of, scenario

MIB = 1 << 20
SIZE = 3 * MIB + 512
NAME = "drx-1a2b3c4d-r7-img-20260102T030405Z-0"
VM_NAME = "drx-1a2b3c4d-r7-rst-20260102T030405Z"


@dataclass
class Lab:
    simulator: Simulator
    prism: RestorePrism
    folder: Path

    @property
    def cluster(self) -> str:
        return self.simulator.vm("app01").cluster

    async def image(self, name: str = NAME) -> tuple[str, bytes]:
        """An image with bytes, and them."""
        path = sparse_file(self.folder / name, SIZE)
        uuid = await self.prism.create_empty_image(name, self.cluster, "made by a test")
        await self.prism.upload_image(uuid, path, SIZE)
        return uuid, path.read_bytes()

    async def new_vm(self, image: str, **hardware: Any) -> NewVm:
        """One disk on the second place of SATA, one NIC."""
        subnets = {each.name: each.uuid for each in await self.prism.subnets(self.cluster)}
        containers = {each.name: each.uuid for each in await self.prism.containers(self.cluster)}
        made = Hardware(
            platform="nutanix",
            uuid="",
            name="app01",
            sockets=2,
            memory_mib=512,
            nics=(Nic(subnet=subnets["isolated"], mac="50:6b:8d:0a:0b:0c", model="E1000"),),
        )
        return NewVm(
            name=VM_NAME,
            description="made by a test",
            cluster=self.cluster,
            hardware=msgspec.structs.replace(made, **hardware),
            disks=(
                NewDisk(
                    image=image, bus="SATA", index=1, size=SIZE, container=containers["archive"]
                ),
            ),
        )


def sparse_file(path: Path, size: int, seed: int = 1) -> Path:
    """Data, a hole of two pieces, data, and a hole at the end."""
    dice = random.Random(seed)
    with path.open("wb") as file:
        for offset in (0, size - 100_000):
            file.seek(offset)
            file.write(dice.randbytes(70_000))
        file.truncate(size)
    return path


@asynccontextmanager
async def restore_lab(
    folder: Path,
    api: Api,
    *,
    account: str = "admin",
    before: Callable[[Simulator], None] = lambda _: None,
    **settings: Any,
) -> AsyncGenerator[Lab, None]:
    """``before``: what is changed of the simulator before the client asks anything."""
    with trio.fail_after(HANG_S):
        async with running_simulator(folder / "simulator", scenario(2)) as simulator:
            before(simulator)
            given = {"account": Account(account, simulator.password(account)), **settings}
            async with open_prism(prism_of(simulator, api, **given)) as prism:
                yield Lab(simulator, prism, folder)
