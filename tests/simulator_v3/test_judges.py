# SPDX-License-Identifier: AGPL-3.0-or-later
"""Strangers' clients of v3 and v2.0, unmodified, each in an environment of its own (``scripts/sdk-setup``), judge the simulator."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import trio

from replicator.simulator.running import Simulator
from replicator.simulator.scenario import DiskSpec, VmSpec
from tests.limits import HANG_S
from tests.simulator.lab import MIB, small_scenario, small_simulator
from tests.simulator_v3.lab_v3 import V3, Client

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".cache" / "sdk"


async def drive(simulator: Simulator, environment: str, script: str, *hosts: str) -> None:
    """Run a driver with its client's own interpreter; what it found wrong is what it wrote to standard error."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    words = [str(python), str(HERE / script), *hosts, str(simulator.port), "admin"]
    run = partial(
        trio.run_process,
        words,
        stdin=simulator.password("admin").encode(),
        check=False,
        stderr=sys.stderr,
        # requests takes it even where a client asks for no verification.
        env={**os.environ, "REQUESTS_CA_BUNDLE": str(simulator.ca_path)},
    )
    with trio.fail_after(HANG_S):
        finished = await run()
    assert finished.returncode == 0, f"{script} failed: see its output"


async def test_nutanix_api(tmp_path: Path) -> None:
    [app] = small_scenario().vms
    more = [VmSpec(name=f"vm{n:02}", disks=[DiskSpec(size=MIB, data=0)]) for n in range(24)]
    async with small_simulator(tmp_path, vms=[app, *more]) as simulator:
        async with Client(simulator) as client:
            body = {
                "metadata": {"kind": "image"},
                "spec": {"name": "judge", "resources": {"image_type": "DISK_IMAGE"}},
            }
            made = (await client.ask("POST", f"{V3}/images", body)).json["metadata"]["uuid"]
            with trio.fail_after(HANG_S):
                while made not in simulator.world.images:
                    await trio.lowlevel.checkpoint()
            kind = {"Content-Type": "application/octet-stream"}
            await client.ask("PUT", f"{V3}/images/{made}/file", bytes(MIB), kind)
        await drive(simulator, "nutanix-api", "drive_nutanix_api.py", simulator.address)


async def test_ntnx_api(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        element = simulator.cluster("cluster-a").address
        await drive(simulator, "ntnx-api", "drive_ntnx_api.py", simulator.address, element)
        assert not simulator.world.volume_groups
