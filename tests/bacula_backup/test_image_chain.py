# SPDX-License-Identifier: AGPL-3.0-or-later
"""A chain of a VM of plain images: what each level carries, that every point reads back, and what a disk may do meanwhile."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from bacula_adapter.backend.interface import Level
from bacula_adapter.backup.maps import ChainMaps
from bacula_adapter.description import OBJECT
from bacula_adapter.state import folder_of
from replicator.phcbt.format import Algorithm
from tests.bacula_backup.lab import GRAIN, ImageVm, image_vm

FULL, INCREMENTAL, DIFFERENTIAL = Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL


def small(tmp_path: Path, **options: str) -> ImageVm:
    vm = image_vm(tmp_path, {"disk-0": 64 * GRAIN, "disk-1": 9 * GRAIN + 512}, **options)
    vm.write("disk-0", 0, os.urandom(3 * GRAIN))
    vm.write("disk-0", 40 * GRAIN + 7, b"x")
    vm.write("disk-1", 9 * GRAIN, b"end" * 10)
    return vm


async def test_full_incrementals_and_a_differential(tmp_path: Path) -> None:
    vm = small(tmp_path)
    full = await vm.catalogue.run(FULL)
    assert full.bytes == 4 * GRAIN + 512
    points = [vm.contents]
    assert vm.catalogue.images() == points[0]

    vm.write("disk-0", GRAIN, os.urandom(GRAIN))
    vm.write("disk-0", 40 * GRAIN, bytes(GRAIN))
    first = await vm.catalogue.run(INCREMENTAL)
    assert GRAIN < first.bytes < GRAIN + 2000
    points.append(vm.contents)
    assert vm.catalogue.images() == points[1]

    vm.write("disk-1", 5 * GRAIN, b"later")
    second = await vm.catalogue.run(INCREMENTAL)
    assert second.bytes < GRAIN + 2000
    points.append(vm.contents)
    assert vm.catalogue.images() == points[2]

    vm.write("disk-0", 50 * GRAIN, b"last")
    fourth = await vm.catalogue.run(DIFFERENTIAL)
    assert 3 * GRAIN < fourth.bytes < 3 * GRAIN + 3000
    points.append(vm.contents)
    assert fourth.description().parent == full.description().part

    vm.write("disk-0", 51 * GRAIN, b"after")
    await vm.catalogue.run(INCREMENTAL)
    points.append(vm.contents)
    for job, content in zip(vm.catalogue.volumes, points, strict=True):
        assert vm.catalogue.images(job) == content
    known = vm.catalogue.known(vm.uuid)
    assert [name.number for name in known.line] == [1, 4, 5]
    assert [(each.level, each.parts) for each in known.sums] == [("F", 1), ("I", 3), ("D", 1)]


async def test_what_a_part_says_of_itself(tmp_path: Path) -> None:
    vm = small(tmp_path)
    full = await vm.catalogue.run(FULL)
    part = full.description()
    assert list(full.files) == [
        "@image/web/disks/disk-0.raw",
        "@image/web/disks/disk-1.raw",
        f"@image/web/description.000001-{part.part}.json",
    ]
    assert list(full.objects) == [OBJECT + part.uuid]
    assert (part.number, part.parent, part.chain, part.level) == (1, "", part.part, "F")
    vm.write("disk-0", 0, b"y")
    second = (await vm.catalogue.run(INCREMENTAL)).description()
    assert (second.number, second.parent, second.parent_job) == (2, part.part, part.job)
    assert second.chain == part.part
    assert [disk.base_root for disk in second.disks] == [disk.root for disk in part.disks]
    last = vm.catalogue.known(part.uuid).last
    assert last is not None
    assert (last.part, last.job_id, last.vm) == (second.part, second.job_id, "web")
    assert last.bytes_stored == sum(disk.bytes for disk in second.disks)


async def test_a_state_that_was_lost_is_another_chain(tmp_path: Path) -> None:
    """Its parts count from one again: a restore must not take an older one of a higher number for the newest."""
    vm = small(tmp_path)
    first = (await vm.catalogue.run(FULL)).description()
    shutil.rmtree(vm.catalogue.config.state_dir)
    again = (await vm.catalogue.run(FULL)).description()
    assert (again.number, again.uuid) == (first.number, first.uuid)
    assert again.chain != first.chain


async def test_nothing_changed(tmp_path: Path) -> None:
    vm = small(tmp_path)
    await vm.catalogue.run(FULL)
    second = await vm.catalogue.run(INCREMENTAL)
    assert second.bytes < 1000
    assert vm.catalogue.images() == vm.contents


async def test_a_disk_that_grew_one_that_is_new_and_one_that_is_gone(tmp_path: Path) -> None:
    vm = small(tmp_path)
    await vm.catalogue.run(FULL)
    vm.write("disk-0", 70 * GRAIN + 100, b"beyond")
    grown = await vm.catalogue.run(INCREMENTAL)
    assert grown.description().disks[0].kind == "delta"
    assert vm.catalogue.images() == vm.contents

    gone = dict(vm.disks)
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(5 * GRAIN))
    vm.disks = {"disk-0": gone["disk-0"], "disk-7": other}
    vm.configure()
    changed = await vm.catalogue.run(INCREMENTAL)
    kinds = {disk.disk: disk.kind for disk in changed.description().disks}
    assert kinds == {"disk-0": "delta", "disk-7": "full"}
    assert vm.catalogue.images() == vm.contents

    vm.write("disk-7", 0, b"z")
    await vm.catalogue.run(DIFFERENTIAL)
    assert vm.catalogue.images() == vm.contents


async def test_a_disk_that_shrank_is_sent_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vm = small(tmp_path)
    await vm.catalogue.run(FULL)
    os.truncate(vm.disks["disk-0"], 30 * GRAIN)
    second = await vm.catalogue.run(INCREMENTAL)
    assert [disk.kind for disk in second.description().disks] == ["full", "delta"]
    assert "disk-0: reference_snapshot not found: it shrank from" in caplog.text
    assert "falling back to Full" in caplog.text
    assert vm.catalogue.images() == vm.contents
    # And back again: what lies between the last Full and now is not told by the maps.
    os.truncate(vm.disks["disk-0"], 64 * GRAIN)
    vm.write("disk-0", 63 * GRAIN, b"again")
    await vm.catalogue.run(DIFFERENTIAL)
    assert vm.catalogue.images() == vm.contents


async def test_every_disk_in_full_inside_an_incremental_has_no_parent(tmp_path: Path) -> None:
    vm = small(tmp_path)
    await vm.catalogue.run(FULL)
    for disk in vm.disks:
        os.truncate(vm.disks[disk], 4 * GRAIN)
    second = (await vm.catalogue.run(INCREMENTAL)).description()
    assert (second.parent, second.parent_job) == ("", "")
    assert vm.catalogue.images() == vm.contents
    vm.write("disk-0", 0, b"on")
    await vm.catalogue.run(INCREMENTAL)
    assert vm.catalogue.images() == vm.contents
    # Bacula's Full is still what a Differential is made from.
    await vm.catalogue.run(DIFFERENTIAL)
    assert vm.catalogue.images() == vm.contents


async def test_a_map_that_is_damaged_or_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vm = small(tmp_path)
    full = (await vm.catalogue.run(FULL)).description()
    maps = ChainMaps(folder_of(vm.catalogue.config, "jobs", "Nightly", full.uuid) / "maps")
    maps.path(full.part, "disk-0").unlink()
    with maps.path(full.part, "disk-1").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff" * 8)
    second = (await vm.catalogue.run(INCREMENTAL)).description()
    assert [disk.kind for disk in second.disks] == ["full", "full"]
    assert caplog.text.count("falling back to Full") == 2
    vm.write("disk-0", 0, b"on")
    await vm.catalogue.run(INCREMENTAL)
    assert vm.catalogue.images() == vm.contents


async def test_only_maps_that_a_job_may_go_on_from_are_kept(tmp_path: Path) -> None:
    vm = small(tmp_path)
    await vm.catalogue.run(FULL)
    for _ in range(3):
        vm.write("disk-0", 0, os.urandom(10))
        await vm.catalogue.run(INCREMENTAL)
    folder = folder_of(vm.catalogue.config, "jobs", "Nightly", vm.uuid) / "maps"
    known = vm.catalogue.known(vm.uuid)
    assert known.full is not None
    assert known.last is not None
    assert {path.name for path in folder.iterdir()} == {known.full.part, known.last.part}


async def test_another_digest_begins_with_the_next_full(tmp_path: Path) -> None:
    vm = small(tmp_path)
    await vm.catalogue.run(FULL)
    vm.configure(dr_digest="blake3-256")
    vm.write("disk-0", 0, b"on")
    second = (await vm.catalogue.run(INCREMENTAL)).description()
    assert second.algorithm == Algorithm.XXH3_128
    assert vm.catalogue.images() == vm.contents
    assert (await vm.catalogue.run(FULL)).description().algorithm == Algorithm.BLAKE3_256
    vm.write("disk-0", 0, b"off")
    await vm.catalogue.run(INCREMENTAL)
    assert vm.catalogue.images() == vm.contents


@pytest.mark.parametrize("chunk", ["1", "4", "16"])
async def test_chunks_of_any_size(chunk: str, tmp_path: Path) -> None:
    vm = image_vm(tmp_path, {"disk-0": 700 * GRAIN + 3}, chunk_size_mib=chunk)
    for at in range(0, 700, 37):
        vm.write("disk-0", at * GRAIN + at, os.urandom(2 * GRAIN))
    await vm.catalogue.run(FULL)
    assert vm.catalogue.images() == vm.contents
    for at in range(0, 700, 50):
        vm.write("disk-0", at * GRAIN, os.urandom(100))
    delta = await vm.catalogue.run(INCREMENTAL)
    assert delta.bytes < 20 * GRAIN
    assert vm.catalogue.images() == vm.contents


async def test_messages_that_an_operator_looks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    vm = small(tmp_path)
    full = await vm.catalogue.run(FULL)
    assert "Selected 1 VM(s) for backup" in caplog.messages
    assert f"Backup complete: VM=web disks=2 bytes={full.bytes}" in caplog.messages
    assert "falling back" not in caplog.text
