# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backend is killed -9 after each single request to the cluster: nothing stays there that the next job does not remove."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from bacula_adapter.backend.interface import Level
from replicator.simulator.web import Request
from tests.bacula_backup.child import Trial
from tests.bacula_backup.lab import GRAIN
from tests.bacula_backup.nutanix_lab import NutanixLab, nutanix_lab
from tests.limits import HANG_S

#: Every request would take minutes: each run of the tests visits those, of one level and interface each.
_STRIDE = 3


class Children:
    """Runs jobs in processes of their own; each may be killed after a number of requests."""

    def __init__(self, it: NutanixLab, process: trio.Process, folder: Path) -> None:
        self._it = it
        self._process = process
        self._volume = folder / "volume"
        self._pid = 0
        self._known = trio.Event()
        self._kill_at = 0
        self.requests = 0
        it.sim.server.on_request = self._on_request

    async def _on_request(self, request: Request) -> None:
        del request
        self.requests += 1
        if self.requests == self._kill_at:
            await self._known.wait()
            os.kill(self._pid, signal.SIGKILL)
        await trio.lowlevel.checkpoint()

    async def _number(self) -> int:
        assert self._process.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            piece = await self._process.stdout.receive_some(1)
            assert piece, "the process that forks has ended"
            text += piece
        return int(text)

    async def run(self, level: Level, kill_at: int = 0) -> bool:
        """A job; whether it came to its end. What Bacula has of it then is in the catalogue."""
        info = self._it.catalogue.info(level)
        self._volume.unlink(missing_ok=True)
        trial = Trial(
            config=self._it.values,
            name=info.name,
            job_id=info.job_id,
            level=info.level,
            previous=info.previous,
            volume=str(self._volume),
        )
        self.requests, self._kill_at, self._known = 0, kill_at, trio.Event()
        assert self._process.stdin is not None
        with trio.fail_after(HANG_S):
            await self._process.stdin.send_all(msgspec.json.encode(trial) + b"\n")
            self._pid = await self._number()
            self._known.set()
            code = await self._number()
            tasks = self._it.sim.world.tasks
            while any(task.completed_at is None for task in tasks.values()):
                await trio.lowlevel.checkpoint()
        assert code in (0, -signal.SIGKILL), "the job failed: see what it printed"
        if self._volume.exists():
            data = self._volume.read_bytes()
            self._it.catalogue.keep(info, pickle.loads(data))  # noqa: S301 - our own
        return code == 0


@asynccontextmanager
async def children(it: NutanixLab, folder: Path) -> AsyncIterator[Children]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.bacula_backup.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield Children(it, process, folder)
    finally:
        assert process.stdin is not None
        await process.stdin.aclose()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.mark.parametrize(("api", "level"), [("v3", Level.FULL), ("v4", Level.INCREMENTAL)])
async def test_killed_after_each_request(api: str, level: Level, tmp_path: Path) -> None:
    rng = random.Random(5)
    async with nutanix_lab(tmp_path, api, vm="app02") as it, children(it, tmp_path) as host:

        async def change() -> None:
            await it.write("app02", 0, rng.randrange(60) * GRAIN, rng.randbytes(1000))

        assert await host.run(Level.FULL)
        killed = 0
        for at in range(1, 1000, _STRIDE):
            await change()
            ended = await host.run(level, at)
            killed += not ended
            await change()
            assert await host.run(Level.INCREMENTAL), at
            await it.check("app02")
            assert len(it.ours()) == 1, at
            if ended:
                break
        assert killed * _STRIDE > 20
