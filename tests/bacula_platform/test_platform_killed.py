# SPDX-License-Identifier: AGPL-3.0-or-later
"""A restoring process is killed -9 after each single request that a restore makes: the next one leaves no orphan, and takes away
no VM that was its operator's already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from replicator.log import open_log
from replicator.sources.nutanix.ledger import Entry, read_entries
from tests.bacula_platform.child import VERDICT, Job
from tests.bacula_platform.lab import contents, disks_of, platform_lab
from tests.nutanix.test_kill_simulator import children
from tests.sources.simulated import Api

CHILD = "tests.bacula_platform.child"


async def _entries(folder: Path) -> list[Entry]:
    """What the ledger holds of what is or may be there."""
    async with open_log(folder / "events", readonly=True) as log:
        entries = read_entries(await log.journal_items("prism/"))
    return [entry for entry in entries if not entry.dropped]


@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_killed_after_every_request(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "host"
    folder.mkdir()
    async with platform_lab(tmp_path, api) as lab, children(lab.simulator, CHILD) as starts:
        world = lab.simulator.world
        hardware = await lab.hardware()

        def job(name: str) -> Any:
            return Job(
                host=lab.simulator.address,
                port=lab.simulator.port,
                password=lab.simulator.password("admin"),
                ca=str(lab.simulator.ca_path),
                api=api,
                folder=str(folder),
                name=name,
                hardware=hardware,
            )

        wanted: dict[tuple[str, int], bytes] = {}
        killed = kept = 0
        while not await starts.run(job(f"r{killed}"), kill_at=killed + 1):
            verdict = folder / VERDICT
            is_kept = verdict.exists() and verdict.read_text() == f"r{killed}"
            assert await starts.run(job(""))
            assert not lab.objects(), f"after request {killed + 1}"
            assert not world.images
            assert not await _entries(folder)
            found = [vm for vm in world.vms.values() if vm.name != "app01"]
            assert [vm.name for vm in found] == ([f"r{killed}"] if is_kept else [])
            kept += len(found)
            for vm in found:
                wanted = wanted or contents(lab.simulator, vm)
                assert contents(lab.simulator, vm) == wanted
                del world.vms[vm.uuid]
            killed += 1
        (vm,) = [vm for vm in world.vms.values() if vm.name != "app01"]
        assert (vm.name, vm.power) == (f"r{killed}", "ON")
        assert contents(lab.simulator, vm) == wanted
        assert len(disks_of(vm)) == len(disks_of(lab.original))
        assert not lab.objects()
    assert killed > 20, "a restore makes more requests than that"
    assert kept > 1, "some were killed after the verdict"
