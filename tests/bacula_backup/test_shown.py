# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an operator is shown of backups: `replctl backups`, metrics, estimates, listings and queries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bacula_adapter.backend.interface import FileEntry, JobInfo, JobKind, Level
from bacula_adapter.backup import open_listing
from replicator.cli.backups import backup_info
from replicator.cli.main import main
from replicator.config import Config
from replicator.control.metrics import Live, Metrics
from replicator.errors import UsageError
from replicator.log import open_log
from replicator.log.chains import read_chains
from tests.bacula_backup.lab import GRAIN, Catalogue, ImageVm, image_vm
from tests.bacula_backup.nutanix_lab import MIB, nutanix_lab
from tests.bacula_backup.test_nutanix import _looks_at_tasks_soon
from tests.bacula_backup.test_qemu import SIZES, catalogue
from tests.cli.test_json_contract import keeps_promise
from tests.lab_qemu import storage_daemon

FULL, INCREMENTAL, DIFFERENTIAL = Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL
__all__ = ["_looks_at_tasks_soon"]


def configured(vm: ImageVm) -> str:
    path = vm.folder / "replicator.conf"
    path.write_text("".join(f"{key} = {value}\n" for key, value in vm.values.items()))
    return str(path)


async def backed_up(tmp_path: Path) -> ImageVm:
    """A Full, an Incremental, and a job that failed."""
    vm = image_vm(tmp_path, {"disk-0": 64 * GRAIN})
    vm.write("disk-0", 0, os.urandom(2 * GRAIN))
    await vm.catalogue.run(FULL)
    vm.write("disk-0", 0, b"x")
    await vm.catalogue.run(INCREMENTAL)
    await vm.catalogue.run(INCREMENTAL, status="A")
    return vm


async def test_backups_of_a_vm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vm = await backed_up(tmp_path)
    config = configured(vm)
    assert main(["--config", config, "--json", "backups", "web"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    keeps_promise("BackupInfo", found)
    for part in (found["last"], found["full"]):
        keeps_promise("BackupPart", part)
    keeps_promise("BackupFailure", found["failure"])
    assert (found["vm"], found["job"], found["parts"], found["failed"]) == ("web", "Nightly", 2, 1)
    assert (found["last"]["level"], found["last"]["kind"]) == ("incremental", "delta")
    assert (found["full"]["bytes"], found["full"]["job_id"]) == (2 * GRAIN, 1)
    assert found["failure"]["reason"] == "the job was cancelled"
    assert main(["--config", config, "backups"]) == 0
    out = capsys.readouterr().out
    assert "Nightly" in out
    assert "failed at" in out
    assert "the job was cancelled" in out
    assert main(["--config", config, "backups", "nobody"]) == 3
    assert "(known: web)" in capsys.readouterr().err


async def test_no_backups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(image_vm(tmp_path, {"disk-0": GRAIN}))
    assert main(["--config", config, "--json", "backups"]) == 0
    assert json.loads(capsys.readouterr().out) == []


async def test_metrics_add_up_all_jobs_of_a_vm(tmp_path: Path) -> None:
    vm = await backed_up(tmp_path)
    other = Catalogue(vm.catalogue.config, job="Weekly")
    weekly = await other.run(FULL)
    async with open_log(tmp_path / "state" / "events") as log:
        page = (await Metrics(log, Live()).page()).body.decode()
    rows = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    full = 'replicator_backup_bytes_total{type="full",vm="web"}'
    assert float(rows[full]) == 2 * GRAIN + weekly.bytes
    assert float(rows['replicator_backup_bytes_total{type="incremental",vm="web"}']) > GRAIN
    assert 0 < float(rows['replicator_backup_duration_seconds{vm="web"}']) < 100
    assert float(rows['replicator_backups_failed_total{vm="web"}']) == 1
    last = read_chains(tmp_path / "state")[1].backups.last
    assert last is not None
    shown = float(rows['replicator_backup_last_success_timestamp_seconds{vm="web"}'])
    assert shown == pytest.approx(last.taken_at_us / 1e6, abs=1e-3)


async def test_the_reference_on_a_cluster_is_named(tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, "v4", vm="app01") as it:
        await it.catalogue.run(FULL)
        (chain,) = read_chains(it.catalogue.config.state_dir)
        info = backup_info(chain, 0)
        assert [info["snapshot"]] == it.ours()
        assert info["expires"] is not None


# Estimate, listing, query


def asked(level: Level = FULL, previous: str = "") -> JobInfo:
    return JobInfo(
        name="Nightly.2026-11-25_12.00.00_04",
        job_id=0,
        kind=JobKind.ESTIMATE,
        level=level,
        previous=previous,
    )


async def estimated(config: Config, level: Level) -> dict[str, int]:
    """Size by the end of the name."""
    async with open_listing(asked(level), config) as handler:
        found = [entry async for entry in handler.estimate()]
    return {entry.name.rpartition("/")[2].partition(".")[0]: entry.size for entry in found}


async def listed(config: Config, path: str) -> list[FileEntry]:
    async with open_listing(asked(), config) as handler:
        return [entry async for entry in handler.listing(path)]


async def queried(config: Config, parameter: str) -> list[tuple[str, str]]:
    async with open_listing(asked(), config) as handler:
        return [pair async for pair in handler.query(parameter)]


@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_estimates_of_vms_on_a_cluster(api: str, tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, api, vm="app01") as it:
        config = it.catalogue.config
        assert await estimated(config, FULL) == {"disk-0": 2 * MIB, "disk-1": MIB}
        assert it.ours() == []
        await it.catalogue.run(FULL)
        await it.write("app01", 0, 0, os.urandom(GRAIN))
        await it.catalogue.run(INCREMENTAL)
        await it.write("app01", 0, 5 * MIB, os.urandom(GRAIN))
        held = it.ours()
        assert await estimated(config, INCREMENTAL) == {"disk-0": GRAIN, "disk-1": 0}
        assert await estimated(config, DIFFERENTIAL) == {"disk-0": 2 * GRAIN, "disk-1": 0}
        assert await estimated(config, FULL) == {"disk-0": 2 * MIB + GRAIN, "disk-1": MIB}
        assert it.ours() == held
        # Nothing of it is in the way of the next job, and nothing of it is recorded.
        assert (await it.catalogue.run(INCREMENTAL)).bytes < 2 * GRAIN
        await it.check("app01")
        assert it.catalogue.known(it.sim.vm("app01").uuid).failed == 0


async def test_listings_and_queries_of_a_cluster(tmp_path: Path) -> None:
    async with nutanix_lab(tmp_path, "v4") as it:
        config = it.catalogue.config
        folders = ["@nutanix/app01/", "@nutanix/app02/", "@nutanix/db/"]
        assert [entry.name for entry in await listed(config, "/")] == folders
        for path in ("app01", "/app01/", "/@nutanix/app01", "/@nutanix/app01/disks"):
            found = [(entry.name, entry.size) for entry in await listed(config, path)]
            assert found == [
                ("@nutanix/app01/disks/disk-0.raw", 8 * MIB),
                ("@nutanix/app01/disks/disk-1.raw", 4 * MIB),
            ]
        with pytest.raises(UsageError, match="no VM nobody is chosen"):
            await listed(config, "/nobody")
        with pytest.raises(UsageError, match="nothing below"):
            await listed(config, "/app01/disks/disk-0.raw")
        assert await queried(config, "vm") == [("vm", "app01"), ("vm", "app02"), ("vm", "db")]
        clusters = await queried(config, "cluster")
        assert sorted(value.split()[0] for _, value in clusters) == ["cluster-a", "cluster-b"]
        with pytest.raises(UsageError, match="query: point is not known"):
            await queried(config, "point")
        assert it.ours() == []


async def test_estimates_and_listings_of_images_and_qemu(tmp_path: Path) -> None:
    vm = image_vm(tmp_path, {"disk-0": 8 * GRAIN, "disk-3": GRAIN})
    vm.write("disk-0", 0, b"x" * GRAIN)
    config = vm.catalogue.config
    assert await estimated(config, FULL) == {"disk-0": GRAIN, "disk-3": 0}
    assert [entry.size for entry in await listed(config, "web")] == [8 * GRAIN, GRAIN]
    assert await queried(config, "vm") == [("vm", "web")]
    async with storage_daemon(SIZES) as daemon:
        config = catalogue(tmp_path / "q", daemon).config
        os.mkdir(tmp_path / "q")
        assert max((await estimated(config, FULL)).values()) <= 4096  # the first block is allocated
        sizes: Any = [entry.size for entry in await listed(config, "vm")]
        assert sizes == list(SIZES.values())
        assert await daemon.leftovers() == []
