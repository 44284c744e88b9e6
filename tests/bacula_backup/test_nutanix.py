# SPDX-License-Identifier: AGPL-3.0-or-later
"""Chains of VMs on a cluster, through v3 and v4: what the cluster holds, what is read, and what happens to references."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import pytest
import trio

from bacula_adapter.backend.interface import Level
from replicator import prism_access
from replicator.errors import ReplicatorError, UsageError
from replicator.prism.errors import PrismPermissionError
from replicator.prism.settings import PrismSettings, Waits
from replicator.prism.v4 import PrismV4
from tests.bacula_backup.lab import GRAIN, Catalogue, Volume
from tests.bacula_backup.nutanix_lab import MIB, nutanix_lab
from tests.limits import HANG_S

FULL, INCREMENTAL, DIFFERENTIAL = Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL
APIS = pytest.mark.parametrize("api", ["v3", "v4"])


@pytest.fixture(autouse=True)
def _looks_at_tasks_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator's tasks are done at once: the gaps between looks would be most of the time."""
    settings = partial(PrismSettings, waits=Waits(poll_s=(0.02,)))
    monkeypatch.setattr(prism_access, "PrismSettings", settings)


@APIS
async def test_full_incrementals_and_a_differential(
    api: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with nutanix_lab(tmp_path, api, vm="app*") as it:
        full = await it.catalogue.run(FULL)
        assert [each.vm for each in full.descriptions] == ["app01", "app02"]
        assert full.bytes == 4 * MIB
        await it.check("app01", "app02")
        assert len(it.ours()) == 2  # the references, and nothing else
        assert f"capability={api}" in caplog.text
        assert "Selected 2 VM(s) for backup" in caplog.text
        assert f"Backup complete: VM=app01 disks=2 bytes={3 * MIB}" in caplog.messages
        first = it.ours()

        await it.write("app01", 0, 5 * MIB + 5, os.urandom(1000))
        one = await it.catalogue.run(INCREMENTAL)
        assert GRAIN < one.bytes < 3 * GRAIN
        await it.check("app01", "app02")
        assert len(it.ours()) == 2
        assert not set(first) & set(it.ours())

        await it.write("app01", 1, 3 * MIB, os.urandom(GRAIN))
        await it.write("app01", 0, 0, bytes(GRAIN))
        await it.catalogue.run(INCREMENTAL)
        await it.check("app01", "app02")

        await it.write("app01", 0, 7 * MIB, os.urandom(10))
        await it.write("app02", 0, 3 * MIB, b"here")
        since = await it.catalogue.run(DIFFERENTIAL)
        await it.check("app01", "app02")
        parts = {each.vm: each for each in full.descriptions}
        assert {each.vm: each.parent for each in since.descriptions} == {
            name: part.part for name, part in parts.items()
        }
        # app01: the grains of all three changes since the Full; app02: its own.
        assert 4 * GRAIN < since.bytes < 8 * GRAIN
        assert {disk.kind for each in since.descriptions for disk in each.disks} == {"delta"}

        await it.write("app01", 0, 6 * MIB, b"on")
        assert (await it.catalogue.run(INCREMENTAL)).bytes < 2 * GRAIN
        await it.check("app01", "app02")
        assert len(it.ours()) == 2
        assert "falling back" not in caplog.text
        assert it.sim.password("backup") not in caplog.text


@APIS
async def test_what_the_vm_is_made_of_is_kept(api: str, tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, api, vm="app01") as it:
        hardware = (await it.catalogue.run(FULL)).description().hardware
        assert hardware is not None
        assert (hardware.name, hardware.platform) == ("app01", "nutanix")
        assert [slot.size for slot in hardware.disks] == [8 * MIB, 4 * MIB]


@APIS
async def test_a_reference_that_was_deleted_behind_our_back(
    api: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with nutanix_lab(tmp_path, api, vm="app01") as it:
        await it.catalogue.run(FULL)
        (reference,) = it.ours()
        (snapshot,) = (s for s in it.sim.world.snapshots.values() if s.name == reference)
        await it.sim.core.forget_snapshot(snapshot)
        await it.write("app01", 0, 0, b"on")
        second = await it.catalogue.run(INCREMENTAL)
        assert [disk.kind for disk in second.description().disks] == ["full", "full"]
        assert "app01: disk-0: reference_snapshot not found" in caplog.text
        assert "falling back to Full" in caplog.text
        await it.check("app01")
        assert len(it.ours()) == 1
        caplog.clear()
        await it.write("app01", 0, 0, b"and on")
        assert (await it.catalogue.run(INCREMENTAL)).bytes < 2 * GRAIN
        assert "falling back" not in caplog.text
        await it.check("app01")


@APIS
async def test_a_job_that_failed_leaves_the_reference(api: str, tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, api, vm="app01") as it:
        await it.catalogue.run(FULL)
        reference = it.ours()
        await it.write("app01", 0, 0, os.urandom(GRAIN))
        await it.catalogue.run(INCREMENTAL, status="f")
        assert it.ours() == reference
        await it.write("app01", 0, 2 * GRAIN, os.urandom(GRAIN))
        assert (await it.catalogue.run(INCREMENTAL)).bytes < 4 * GRAIN
        await it.check("app01")


@APIS
async def test_a_job_that_was_cancelled_leaves_nothing(api: str, tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, api) as it:
        await it.catalogue.run(FULL)
        reference = sorted(it.ours())
        reached = trio.Event()

        async def gate(volume: Volume) -> None:
            if len(volume.files) == 2:
                reached.set()
                await trio.sleep_forever()

        async with it.catalogue.opened(it.catalogue.info(FULL)) as handler:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(handler.run, Volume(gate=gate))
                with trio.fail_after(HANG_S):
                    await reached.wait()
                nursery.cancel_scope.cancel()
            await handler.conclude("A")
        assert sorted(it.ours()) == reference
        await it.catalogue.run(INCREMENTAL)
        await it.check("app01", "app02", "db")


async def test_two_jobs_on_one_vm_have_a_reference_each(tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, "v4", vm="app01") as it:
        other = Catalogue(it.catalogue.config, job="Weekly")
        async with trio.open_nursery() as nursery:
            for catalogue in (it.catalogue, other):
                nursery.start_soon(catalogue.run, FULL)
        assert len(it.ours()) == 2
        for number in range(2):
            await it.write("app01", 0, number * MIB, os.urandom(100))
            for catalogue in (it.catalogue, other):
                assert (await catalogue.run(INCREMENTAL)).bytes < 4 * GRAIN
                assert catalogue.images() == await it.contents("app01")
        assert len(it.ours()) == 2


async def test_selection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with nutanix_lab(tmp_path, "v4", vm="app*,nobody", exclude="app02") as it:
        full = await it.catalogue.run(FULL)
        assert [each.vm for each in full.descriptions] == ["app01"]
        assert "vm: Prism lists no VM nobody" in caplog.text
    async with (
        nutanix_lab(tmp_path / "b", "v4", cluster="cluster-b") as it,
        it.catalogue.opened(it.catalogue.info(FULL)) as handler,
    ):
        assert handler.claims == ["@nutanix/db/"]
    async with nutanix_lab(tmp_path / "c", "v4", vm="nobody") as it:
        with pytest.raises(UsageError, match="vm: "):
            async with it.catalogue.opened(it.catalogue.info(FULL)):
                pass
        assert not (tmp_path / "c" / "state" / "bacula").exists()


async def test_the_next_vm_is_prepared_while_one_is_written(tmp_path: Path) -> None:
    """And not the one after that, with concurrent_vms = 2."""
    async with nutanix_lab(tmp_path, "v4", concurrent_vms="2") as it:
        waited = trio.Event()
        seen: list[int] = []

        async def gate(volume: Volume) -> None:
            del volume
            if not waited.is_set():
                with trio.fail_after(HANG_S):
                    while len([name for name in it.ours() if "-rp-" in name]) < 2:
                        await trio.lowlevel.checkpoint()
                    while len(it.sim.world.volume_groups) < 3:
                        await trio.lowlevel.checkpoint()
                seen.append(len([name for name in it.ours() if "-rp-" in name]))
                waited.set()

        await it.catalogue.run(FULL, gate=gate)
        assert seen == [2]
        await it.check("app01", "app02", "db")


async def test_one_vm_that_fails_fails_the_job(tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, "v4") as it:
        async with it.catalogue.opened(it.catalogue.info(FULL)) as handler:
            del it.sim.world.vms[it.sim.vm("app02").uuid]
            with pytest.raises(ReplicatorError, match="app02: "):
                await handler.run(Volume())
            await handler.conclude("f")
        assert it.ours() == []
        for name in ("app01", "db"):
            failure = it.catalogue.known(it.sim.vm(name).uuid).failure
            assert failure is None or "Bacula ended the job" in failure.reason


async def test_hardware_that_cannot_be_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise PrismPermissionError("no right to see it")

    async with nutanix_lab(tmp_path, "v4", vm="app02") as it:
        monkeypatch.setattr(PrismV4, "hardware", fails)
        assert (await it.catalogue.run(FULL)).description().hardware is None
        assert "app02: its hardware cannot be described" in caplog.text
        await it.check("app02")
