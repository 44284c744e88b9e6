# SPDX-License-Identifier: AGPL-3.0-or-later
"""Restores to files: what comes back, in whatever way Bacula hands it over."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest
import trio

from bacula_adapter.backend.interface import Answer
from bacula_adapter.description import decode_file
from bacula_adapter.restore import open_restore
from bacula_adapter.restore.slots import SLOTS
from bacula_adapter.state import open_job_state
from replicator.domain.vm import event_kind
from replicator.errors import RefusedError
from replicator.phcbt.format import Algorithm
from tests.bacula_restore.lab import (
    SIZE,
    Bacula,
    Machine,
    chain,
    config_in,
    everything_below,
    noise,
    out_of,
    restore,
    restore_job,
    without,
)


@pytest.mark.parametrize("objects", [True, False], ids=["catalogue", "bootstrap"])
@pytest.mark.parametrize("addressed", [True, False], ids=["addressed", "plain"])
@pytest.mark.parametrize("count", [1, 2, 3])
async def test_each_point_comes_back(
    tmp_path: Path, objects: bool, addressed: bool, count: int
) -> None:
    machine = chain(addressed=addressed)
    part = machine.parts[count - 1]
    await restore(tmp_path, machine.parts[:count], objects=objects)
    for disk, image in part.images.items():
        assert out_of(tmp_path, part, disk).read_bytes() == image
    described = tmp_path / "out" / part.described
    assert decode_file(described.read_bytes()) == part.description
    assert len(everything_below(tmp_path)) == 3


@pytest.mark.parametrize("piece", [1, 4093, 999_999])
async def test_pieces_may_be_of_any_length(tmp_path: Path, piece: int) -> None:
    machine = Machine(grain=4096)
    machine.add("disk-0", 70_001)
    machine.backup("F")
    machine.write("disk-0", 30_000, noise(1, 9000))
    part = machine.backup()
    await restore(tmp_path, machine.parts, bacula=Bacula(str(tmp_path / "out"), piece))
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


async def test_digests_of_another_kind_are_found_without_the_catalogue(tmp_path: Path) -> None:
    machine = chain(grain=4096, algorithm=Algorithm.BLAKE3_256)
    part = machine.parts[-1]
    await restore(tmp_path, machine.parts, objects=False)
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


async def test_holes_stay_holes(tmp_path: Path) -> None:
    machine = Machine(addressed=False)
    machine.disks["disk-0"] = bytearray(64 << 20)
    machine.write("disk-0", 9 << 20, noise(1, 5000))
    part = machine.backup("F")
    await restore(tmp_path, machine.parts)
    path = out_of(tmp_path, part, "disk-0")
    assert path.stat().st_size == 64 << 20
    assert path.stat().st_blocks * 512 <= 1 << 20
    assert path.read_bytes() == part.images["disk-0"]


async def test_a_differential_skips_the_incrementals_before_it(tmp_path: Path) -> None:
    machine = chain()
    machine.write("disk-0", 0, noise(7, 300_000))
    part = machine.backup("D", base=machine.parts[0])
    bacula = await restore(tmp_path, machine.parts)
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]
    skipped = {name for name, answer in bacula.answers.items() if answer is Answer.SKIP}
    assert {name for name in skipped if name.endswith(".phcbt")} == {
        name for each in machine.parts[1:3] for name in each.files if name.endswith(".phcbt")
    }


async def test_a_differential_without_the_catalogue(tmp_path: Path) -> None:
    machine = chain()
    machine.write("disk-0", 0, noise(7, 300_000))
    part = machine.backup("D", base=machine.parts[0])
    await restore(tmp_path, machine.parts, objects=False)
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


@pytest.mark.parametrize("objects", [True, False], ids=["catalogue", "bootstrap"])
async def test_a_later_full_makes_what_was_before_it_superfluous(
    tmp_path: Path, objects: bool
) -> None:
    machine = chain()
    machine.write("disk-0", 0, noise(8, 300_000))
    machine.backup("F")
    machine.write("disk-0", 0, noise(9, 3000))
    part = machine.backup()
    # Everything of all jobs, also both images under one name: no console would give them, a bootstrap file may.
    await restore(tmp_path, machine.parts, objects=objects)
    for disk, image in part.images.items():
        assert out_of(tmp_path, part, disk).read_bytes() == image
    assert len(everything_below(tmp_path)) == 3


@pytest.mark.parametrize("objects", [True, False], ids=["catalogue", "bootstrap"])
async def test_one_disk_sent_full_inside_an_incremental(tmp_path: Path, objects: bool) -> None:
    machine = chain()
    machine.add("disk-2", 200_000)
    machine.write("disk-1", 1000, noise(5, 1000))
    machine.backup(full=["disk-1"])
    machine.write("disk-2", 1000, noise(6, 1000))
    part = machine.backup()
    first, *others = machine.parts
    # Bacula gives the newest file of a name only.
    given = [without(first, "disk-1.raw"), *others]
    await restore(tmp_path, given, objects=objects)
    for disk, image in part.images.items():
        assert out_of(tmp_path, part, disk).read_bytes() == image


async def test_a_virtual_full_mixes_parts_in_one_job(tmp_path: Path) -> None:
    machine = chain()
    machine.backup("F")
    part = machine.backup()
    whole = Bacula(str(tmp_path / "out"))
    async with open_restore(restore_job(whole.where), config_in(tmp_path)) as handler:
        for each in reversed(machine.parts):  # all of one job now, in any order
            await handler.restore_object(each.object[0], 25, 77, each.object[1])
        files = [file for each in reversed(machine.parts[3:]) for file in each.files.values()]
        files += [file for each in machine.parts[:3] for file in each.files.values()]
        for file in files:
            await whole.file(handler, file)
        await handler.finish()
        await handler.conclude("T")
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


async def test_two_vms_in_one_restore(tmp_path: Path) -> None:
    machine, other = chain(), Machine("db", first_job=1)
    other.add("disk-0", 100_000)
    other.backup("F")
    other.write("disk-0", 0, b"changed")
    other.backup()
    parts = [machine.parts[0], other.parts[0], machine.parts[1], other.parts[1], machine.parts[2]]
    await restore(tmp_path, parts)
    for part in (machine.parts[2], other.parts[1]):
        for disk, image in part.images.items():
            assert out_of(tmp_path, part, disk).read_bytes() == image


async def test_a_chain_that_began_anew_with_its_state_lost(tmp_path: Path) -> None:
    machine = chain()
    again = Machine(chain="other", first_job=20)
    again.disks = {"disk-0": bytearray(noise(3, SIZE))}
    part = again.backup("F")
    await restore(tmp_path, [*machine.parts, part], without=["disk-1"])
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


async def test_a_disk_that_was_not_selected_is_not_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = chain()
    with caplog.at_level(logging.INFO):
        await restore(tmp_path, machine.parts, without=["disk-1"])
    assert not out_of(tmp_path, machine.parts[-1], "disk-1").exists()
    assert "disk-1 not selected" in caplog.text


async def test_restore_disks_only(tmp_path: Path) -> None:
    machine = chain()
    part = machine.parts[-1]
    await restore(tmp_path, machine.parts, config=config_in(tmp_path, restore_disks_only="disk-1"))
    assert not out_of(tmp_path, part, "disk-0").exists()
    assert out_of(tmp_path, part, "disk-1").read_bytes() == part.images["disk-1"]


async def test_restore_disks_only_names_what_there_is(tmp_path: Path) -> None:
    config = config_in(tmp_path, restore_disks_only="disk-7")
    with pytest.raises(RefusedError, match=r"no disk-7 \(there is disk-0, disk-1\)"):
        await restore(tmp_path, chain().parts, config=config)
    assert everything_below(tmp_path) == []


async def test_a_description_alone(tmp_path: Path) -> None:
    machine = chain()
    part = machine.parts[-1]
    await restore(tmp_path, machine.parts, without=["disks/"])
    assert [str(path.relative_to(tmp_path / "out")) for path in everything_below(tmp_path)] == [
        part.described
    ]


async def test_a_vm_that_was_renamed(tmp_path: Path) -> None:
    machine = chain()
    machine.vm = "new name"
    machine.write("disk-0", 7000, noise(5, 7000))
    part = machine.backup()
    bacula = await restore(tmp_path, machine.parts)
    assert set(bacula.answers.values()) == {Answer.SEND, Answer.SKIP}
    for disk, image in part.images.items():
        assert out_of(tmp_path, part, disk).read_bytes() == image
    assert not (tmp_path / "out/@nutanix/web").exists()


async def test_a_vm_that_bears_the_name_of_one_that_is_gone(tmp_path: Path) -> None:
    gone = chain()
    machine = Machine(first_job=10)
    machine.uuid = uuid4()
    machine.add("disk-0", 100_000)
    part = machine.backup("F")
    await restore(tmp_path, [gone.parts[0], part], without=["disk-1"])
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


@pytest.mark.parametrize("status", ["f", "A", "E"])
async def test_without_a_good_verdict_nothing_stays(tmp_path: Path, status: str) -> None:
    await restore(tmp_path, chain().parts, status=status)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "state/work").rglob("*.map")) == []


async def test_a_restore_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    machine = chain()
    bacula = Bacula(str(tmp_path / "out"))
    with trio.CancelScope() as scope:
        async with open_restore(restore_job(bacula.where), config_in(tmp_path)) as handler:
            await bacula.give(handler, machine.parts[:1])
            scope.cancel()
            await bacula.give(handler, machine.parts[1:], objects=False)
    assert scope.cancelled_caught
    assert not (tmp_path / "out").exists()


async def test_how_it_ended_is_in_the_log(tmp_path: Path) -> None:
    machine = chain()
    await restore(tmp_path, machine.parts)
    await restore(tmp_path, machine.parts, status="A")
    async with open_job_state(config_in(tmp_path), "restores", "0") as state:
        (vm,) = state.log.vms
        events = await state.log.history(machine.uuid)
    assert (vm.backups.restored, vm.backups.restores_failed) == (1, 1)
    assert [event_kind(event) for event in events[1:]] == ["restore-done", "restore-failed"]


async def test_restores_run_beside_each_other_and_not_in_one_place(tmp_path: Path) -> None:
    machine, other = chain(), Machine("db")
    other.add("disk-0", 100_000)
    other.backup("F")
    bacula = Bacula(str(tmp_path / "out"))
    async with (
        open_restore(restore_job(bacula.where), config_in(tmp_path)) as first,
        open_restore(restore_job(bacula.where, number=2), config_in(tmp_path)) as second,
    ):
        await bacula.give(first, machine.parts)
        await bacula.give(second, other.parts)
        with pytest.raises(RefusedError, match="another restore is at work"):
            await restore(tmp_path, machine.parts)
        for each in (first, second):
            await each.finish()
            await each.conclude("T")
    for part in (machine.parts[-1], other.parts[-1]):
        for disk, image in part.images.items():
            assert out_of(tmp_path, part, disk).read_bytes() == image


async def test_there_is_a_limit_of_restores(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        for number in range(SLOTS):
            job = restore_job("/nowhere", number=number)
            await stack.enter_async_context(open_restore(job, config_in(tmp_path)))
        with pytest.raises(RefusedError, match="8 restores are at work"):
            await stack.enter_async_context(
                open_restore(restore_job("/nowhere"), config_in(tmp_path))
            )


async def test_nothing_selected_is_nothing_done(tmp_path: Path) -> None:
    await restore(tmp_path, [without(part, "") for part in chain().parts])
    assert not (tmp_path / "out").exists()


async def test_only_what_is_superfluous_was_selected(tmp_path: Path) -> None:
    machine = chain()
    machine.backup("F")
    parts = [*machine.parts[:3], without(machine.parts[3], "")]
    with pytest.raises(RefusedError, match="no disk of any VM was selected"):
        await restore(tmp_path, [without(part, ".json", ".raw") for part in parts])
