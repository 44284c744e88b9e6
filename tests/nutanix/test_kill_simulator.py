# SPDX-License-Identifier: AGPL-3.0-or-later
"""A process of a source's host is killed -9 after each single request that a cycle makes, and started again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from replicator.log import open_log
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.web import Request
from replicator.sources.nutanix.ledger import read_entries
from tests.limits import HANG_S
from tests.nutanix.child import Host, Job
from tests.sources.simulated import Api, objects, scenario

GRAIN = 64 << 10
SIZE = 64 * GRAIN


class Children:
    """Processes that do jobs, one after the other; each may be killed after a number of requests."""

    def __init__(self, simulator: Simulator, process: trio.Process) -> None:
        self._simulator = simulator
        self._process = process
        self._pid = 0
        self._known = trio.Event()
        self._kill_at: int | None = None
        self.requests = 0
        simulator.server.on_request = self._on_request

    async def _on_request(self, request: Request) -> None:
        del request
        self.requests += 1
        if self.requests == self._kill_at:
            await self._known.wait()
            os.kill(self._pid, signal.SIGKILL)
        await trio.lowlevel.checkpoint()

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            piece = await self._process.stdout.receive_some(1)
            assert piece, "the process that forks has ended"
            text += piece
        found: dict[str, Any] = msgspec.json.decode(text)
        return found

    async def run(self, job: Job, kill_at: int | None = None) -> bool:
        """Do it; whether it came to its end. What it had begun on the cluster has ended then."""
        self.requests, self._kill_at, self._known = 0, kill_at, trio.Event()
        assert self._process.stdin is not None
        with trio.fail_after(HANG_S):
            await self._process.stdin.send_all(msgspec.json.encode(job) + b"\n")
            self._pid = (await self._line())["pid"]
            self._known.set()
            code = (await self._line())["code"]
            tasks = self._simulator.world.tasks
            while any(task.completed_at is None for task in tasks.values()):
                await trio.lowlevel.checkpoint()
        assert code in (0, -signal.SIGKILL), "the job failed: see what it printed"
        return bool(code == 0)


@asynccontextmanager
async def children(
    simulator: Simulator, module: str = "tests.nutanix.child"
) -> AsyncGenerator[Children, None]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Children(simulator, process)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


async def _entries(host: Host) -> list[str]:
    """What the ledger holds of what is or may be there."""
    async with open_log(host.folder / "events", readonly=True) as log:
        entries = read_entries(await log.journal_items("prism/"))
    return [entry.push_id for entry in entries if not entry.dropped]


@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_killed_after_every_request(api: Api, tmp_path: Path) -> None:
    (tmp_path / "host" / "work").mkdir(parents=True)
    host = Host(tmp_path / "host")
    dice = random.Random(api)
    async with (
        running_simulator(tmp_path / "simulator", scenario(1, (SIZE,))) as simulator,
        children(simulator) as starts,
    ):
        vm = simulator.vm("app01")
        guest = simulator.guest(vm.uuid)

        def job(push_id: str, *, goes_on: bool = False) -> Job:
            return Job(
                host=simulator.address,
                port=simulator.port,
                password=simulator.password("admin"),
                ca=str(simulator.ca_path),
                api=api,
                folder=str(host.folder),
                vm=vm.uuid,
                push_id=push_id,
                goes_on=goes_on,
            )

        async def write() -> None:
            for _ in range(3):
                await guest.write(dice.randrange(0, SIZE - 5000, 512), dice.randbytes(4608))
            await guest.zero(dice.randrange(64) * GRAIN, GRAIN)

        async def check(push_id: str) -> None:
            assert host.noted("newest") == push_id
            assert host.replica(push_id).read_bytes() == await guest.content()
            assert [name.split("-")[2] for name in objects(simulator)] == [push_id]
            assert await _entries(host) == [push_id]

        await write()
        assert await starts.run(job("seed"))
        await check("seed")
        killed = 0
        while True:
            await write()
            if await starts.run(job(f"c{killed}"), kill_at=killed + 1):
                break
            await write()
            assert await starts.run(job(f"n{killed}", goes_on=killed % 2 == 0))
            await check(f"n{killed}")
            killed += 1
        await check(f"c{killed}")
    assert killed > 15, "a cycle makes more requests than that"
