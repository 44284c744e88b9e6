# SPDX-License-Identifier: AGPL-3.0-or-later
"""Chains through the backend's own process and its pipes: backed up, restored to files, compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from tests.bacula_adapter.plugin import RestoreObject, Saved, SavedFile, started_backend
from tests.bacula_backup.lab import GRAIN, ImageVm, image_vm
from tests.limits import HANG_S


def string(vm: ImageVm) -> str:
    config = vm.folder / "replicator.conf"
    config.write_text("".join(f"{key} = {value}\n" for key, value in vm.values.items()))
    return f"config={config}"


def images_below(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(folder.rglob("*.raw"))}


class Director:
    """Runs jobs of one chain, each in a backend of its own."""

    def __init__(self, vm: ImageVm, **values: str) -> None:
        self.vm = vm
        self.values = " ".join(f"{key}={value}" for key, value in values.items())
        self.saved: dict[str, Saved] = {}

    async def run(self, level: str, *, status: str = "T", accurate: bool = False) -> Saved:
        number = len(self.saved) + 1
        name = f"Nightly.2026-11-25_10.00.00_{number:02}"
        previous = next(reversed(self.saved), "") if level != "F" else ""
        async with started_backend() as plugin:
            saved = await plugin.backup_job(
                f"{string(self.vm)} {self.values}",
                name=name,
                level=level,
                job_id=number,
                previous=previous,
                more=["Accurate=1"] if accurate else [],
                status=status,
            )
        self.said = plugin.text
        if status == "T":
            self.saved[name] = saved
        return saved

    def line(self) -> tuple[list[tuple[str, SavedFile]], list[RestoreObject]]:
        """All files of all jobs, and all objects, as Bacula hands them over."""
        files = [pair for saved in self.saved.values() for pair in saved.files.items()]
        objects = [
            RestoreObject(name, data, job_id)
            for job_id, saved in enumerate(self.saved.values(), 1)
            for name, data in saved.objects.items()
        ]
        return files, objects

    async def restored(self, where: Path) -> Mapping[str, bytes]:
        files, objects = self.line()
        async with started_backend() as plugin:
            await plugin.restore_job(
                f"{string(self.vm)} {self.values}", files, objects, where=str(where)
            )
        self.said = plugin.text
        return images_below(where)


@pytest.mark.parametrize("streams", ["addressed", "plain"])
async def test_a_chain_through_the_backend(streams: str, tmp_path: Path) -> None:
    vm = image_vm(tmp_path, {"disk-0": 64 * GRAIN, "disk-1": 9 * GRAIN + 512})
    vm.write("disk-0", 3 * GRAIN, os.urandom(2 * GRAIN))
    director = Director(vm, bacula_streams=streams)
    with trio.fail_after(HANG_S):
        full = await director.run("F")
        raw = full.files["@image/web/disks/disk-0.raw"]
        assert (raw.addressed, raw.size) == (streams == "addressed", 64 * GRAIN)
        assert raw.sent == (2 if streams == "addressed" else 64) * GRAIN
        assert list(full.options) == ["RestoreOptions"]
        assert "Selected 1 VM(s) for backup" in director.said
        assert await director.restored(tmp_path / "r1") == vm.contents
        vm.write("disk-0", 4 * GRAIN, os.urandom(GRAIN))
        vm.write("disk-1", 9 * GRAIN, b"end")
        await director.run("I", status="A")
        await director.run("I")
        assert "falling back" not in director.said
        vm.write("disk-0", 60 * GRAIN, b"x")
        delta = await director.run("I")
        assert sum(file.sent for file in delta.files.values()) < 2 * GRAIN
        assert await director.restored(tmp_path / "r3") == vm.contents


async def test_a_backend_of_a_large_disk_stays_small(tmp_path: Path) -> None:
    """However fast Bacula takes the data: 96 MiB at most."""
    vm = image_vm(tmp_path, {f"disk-{n}": 4096 * GRAIN for n in range(5)})
    block = os.urandom(16 * GRAIN)
    for disk in vm.disks:
        for at in range(0, 1024, 16):
            vm.write(disk, at * GRAIN, block)
    with trio.fail_after(HANG_S):
        async with started_backend() as plugin:
            await plugin.hello()
            await plugin.job("Nightly.2026-11-25_10.00.00_01")
            await plugin.params(string(vm))
            await plugin.backup()
            await plugin.result()
            assert plugin.process is not None
            status = await trio.Path(f"/proc/{plugin.process.pid}/status").read_text()
            await plugin.end()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak) < 96 << 10
