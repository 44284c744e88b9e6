# SPDX-License-Identifier: AGPL-3.0-or-later
"""No image that is not what was backed up comes to its name: every kind of damage, in every place, ends the restore."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bacula_adapter.backend.interface import RestoredFile
from bacula_adapter.description import encode_file, encode_object
from bacula_adapter.restore import open_restore
from bacula_adapter.restore.plan import make_plan
from replicator.errors import DamageError, RefusedError, ReplicatorError
from tests.bacula_restore.lab import (
    Bacula,
    Machine,
    Part,
    Stored,
    chain,
    config_in,
    everything_below,
    noise,
    out_of,
    restore,
    restore_job,
    without,
)

BOTH = pytest.mark.parametrize("objects", [True, False], ids=["catalogue", "bootstrap"])


async def refused(
    folder: Path, parts: list[Part], why: str, *, objects: bool = True, **more: object
) -> ReplicatorError:
    """A restore that fails, says why in one line, and leaves nothing."""
    with pytest.raises(ReplicatorError) as caught:
        await restore(folder, parts, objects=objects, **more)  # type: ignore[arg-type]
    text = str(caught.value)
    assert re.search(why, text), text
    assert "\n" not in text
    assert len(text.encode()) <= 1900
    assert everything_below(folder) == []
    assert [p for p in (folder / "state/work").rglob("*") if p.is_file()] == []
    return caught.value


def stored(part: Part, ending: str) -> Stored:
    (file,) = (file for name, file in part.files.items() if name.endswith(ending))
    return file


def size_of(file: Stored) -> int:
    return sum(len(data) for _, data in file.blocks)


@BOTH
@pytest.mark.parametrize("where", [0, 0.3, 0.7, 0.999])
async def test_a_flipped_byte_in_a_full_image(tmp_path: Path, where: float, objects: bool) -> None:
    machine = chain()
    file = stored(machine.parts[0], "disk-0.raw")
    file.flip(int(size_of(file) * where))
    error = await refused(
        tmp_path, machine.parts, r"disk-0\.raw is damaged.* job Nightly", objects=objects
    )
    assert isinstance(error, DamageError)


@BOTH
async def test_a_flipped_byte_anywhere_in_a_delta(tmp_path: Path, objects: bool) -> None:
    length = size_of(stored(_small().parts[1], ".phcbt"))
    for at in range(0, length, max(1, length // 20)):
        machine = _small()
        stored(machine.parts[1], ".phcbt").flip(at)
        await refused(
            tmp_path,
            machine.parts,
            r"disk-0\.000002-[0-9a-f]{8}\.phcbt of job Nightly.* is damaged",
            objects=objects,
        )


def _small() -> Machine:
    machine = Machine(grain=4096)
    machine.add("disk-0", 200_000)
    machine.backup("F")
    machine.write("disk-0", 50_000, noise(1, 5000))
    machine.write("disk-0", 150_000, bytes(20_000))
    machine.backup()
    return machine


@BOTH
async def test_a_delta_that_ends_early(tmp_path: Path, objects: bool) -> None:
    machine = _small()
    file = stored(machine.parts[1], ".phcbt")
    ((offset, data),) = file.blocks
    for length in (0, 50, 140, len(data) - 1):
        file.blocks = [(offset, data[:length])]
        await refused(tmp_path, machine.parts, "phcbt of job .* is damaged", objects=objects)


@BOTH
async def test_an_image_that_ends_early(tmp_path: Path, objects: bool) -> None:
    machine = chain()
    stored(machine.parts[0], "disk-0.raw").blocks.pop()
    await refused(tmp_path, machine.parts, r"disk-0\.raw is damaged", objects=objects)


@BOTH
@pytest.mark.parametrize("ending", ["disk-0.raw", ".phcbt", ".json"])
async def test_a_file_that_bacula_could_not_read(
    tmp_path: Path, ending: str, objects: bool
) -> None:
    machine = _small()
    name = stored(machine.parts[0 if ending == "disk-0.raw" else 1], ending).name
    if objects and ending == ".json":
        return  # nobody reads it: the catalogue has the same
    await refused(tmp_path, machine.parts, "could not read all of it", objects=objects, broken=name)


@BOTH
async def test_data_that_are_not_in_order(tmp_path: Path, objects: bool) -> None:
    machine = chain()
    stored(machine.parts[0], "disk-0.raw").blocks.reverse()
    await refused(tmp_path, machine.parts, r"disk-0\.raw: data for bytes", objects=objects)


@BOTH
async def test_data_behind_the_end_of_the_disk(tmp_path: Path, objects: bool) -> None:
    machine = chain()
    file = stored(machine.parts[0], "disk-0.raw")
    file.blocks.append((file.size - 1, b"ab"))
    await refused(tmp_path, machine.parts, "of a disk of", objects=objects)


@BOTH
@pytest.mark.parametrize("gone", [0, 1])
async def test_a_job_that_is_missing_is_named(tmp_path: Path, gone: int, objects: bool) -> None:
    machine = chain()
    parts = [part for number, part in enumerate(machine.parts) if number != gone]
    job = machine.parts[gone].description.job
    await refused(tmp_path, parts, f"lacks part .* of Bacula job {job}", objects=objects)


@BOTH
@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_file_that_is_missing_is_named(tmp_path: Path, number: int, objects: bool) -> None:
    machine = chain()
    part = machine.parts[number]
    name = next(iter(part.files))
    parts = [without(each, name) if each is part else each for each in machine.parts]
    await refused(
        tmp_path, parts, f"{name} of job {part.description.job}.*select all files", objects=objects
    )


async def test_data_without_any_description(tmp_path: Path) -> None:
    machine = chain()
    await refused(
        tmp_path,
        [without(part, ".json") for part in machine.parts],
        "nothing says what .* is made of: restore the description file",
        objects=False,
    )


async def test_the_image_of_another_job_under_the_same_name(tmp_path: Path) -> None:
    """As Bacula gives it, where an older job's file is all that is left of the name."""
    machine = chain()
    machine.write("disk-0", 0, noise(9, 9999))
    later = machine.backup("F")
    files = {**later.files, **_raws(machine.parts[0])}
    mixed = Part(later.description, files, later.images)
    await refused(tmp_path, [mixed], r"disk-1\.raw is damaged", objects=True)
    await refused(tmp_path, [mixed], r"disk-0\.raw is damaged", objects=False)
    # With the older job's description, its image is known, and what is missing is the newer one.
    await refused(tmp_path, [without(machine.parts[0], ""), mixed], "did not come")


def _raws(part: Part) -> dict[str, Stored]:
    return {
        name: Stored(name, file.size, list(file.blocks))
        for name, file in part.files.items()
        if name.endswith(".raw")
    }


@BOTH
async def test_a_delta_of_another_part_under_the_right_name(tmp_path: Path, objects: bool) -> None:
    """What numbers of Bacula's own would do after a VirtualFull: here the header tells."""
    machine = chain()
    second = next(f for n, f in machine.parts[1].files.items() if "disk-0" in n)
    third = next(f for n, f in machine.parts[2].files.items() if "disk-0" in n)
    third.blocks = list(second.blocks)
    await refused(tmp_path, machine.parts, "its (part|disk size) is", objects=objects)


@BOTH
async def test_a_delta_that_starts_from_another_image(tmp_path: Path, objects: bool) -> None:
    """Two chains of one VM put together: each part is good, and they do not belong together."""
    machine, other = _small(), _small()
    other.chain = machine.chain
    other.parts.pop()
    other.parts[0].images["disk-0"] = noise(5, 200_000)
    other.disks["disk-0"] = bytearray(noise(6, 200_000))
    stranger = other.backup()
    name = stored(machine.parts[1], ".phcbt").name
    stored(machine.parts[1], ".phcbt").blocks = stored(stranger, ".phcbt").blocks
    await refused(
        tmp_path, machine.parts, f"{name}.* does not start from what the image is", objects=objects
    )


@BOTH
async def test_a_delta_of_another_vm(tmp_path: Path, objects: bool) -> None:
    machine, other = _small(), Machine("db", grain=4096)
    other.add("disk-0", 200_000)
    other.backup("F")
    stranger = other.backup()
    stored(machine.parts[1], ".phcbt").blocks = stored(stranger, ".phcbt").blocks
    await refused(tmp_path, machine.parts, "its VM is", objects=objects)


@BOTH
async def test_a_part_whose_root_is_not_what_its_delta_leads_to(
    tmp_path: Path, objects: bool
) -> None:
    machine = _small()
    part = machine.parts[1]
    disk = msgspec.structs.replace(part.description.disks[0], root=bytes(32))
    lying = msgspec.structs.replace(part.description, disks=(disk,))
    files = dict(part.files)
    text = encode_file(lying)
    files[part.described] = Stored(part.described, len(text), [(None, text)])
    await refused(
        tmp_path,
        [machine.parts[0], Part(lying, files, part.images)],
        "is damaged.*does not come to the root",
        objects=objects,
    )


def test_parts_that_contradict_each_other_are_not_used() -> None:
    first, second, third = (part.description for part in chain().parts)

    def changed(part: object, **values: object) -> object:
        return msgspec.structs.replace(part, **values)  # type: ignore[type-var]

    other_root = msgspec.structs.replace(first.disks[0], root=bytes(32))
    cases: list[tuple[list[object], str]] = [
        ([changed(first, disks=(other_root, first.disks[1])), second, third], "another content"),
        ([first, changed(first, level="I"), second], "described twice"),
        ([changed(first, number=5, chain="before"), second], "not older"),
        ([changed(first, grain=4096), second, third], "another kind"),
    ]
    for parts, why in cases:
        with pytest.raises((DamageError, ValueError), match=why):
            make_plan(parts)  # type: ignore[arg-type]


def _sqlite(data: bytes) -> bytes:
    """Garbage of the same length, as SQLite and 9.6.7 make it."""
    return noise(1, len(data))


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 4]) + data[201:]


@pytest.mark.parametrize("harm", [_sqlite, _truncated, _flipped])
async def test_an_object_that_the_catalogue_has_damaged(
    tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    part = chain().parts[0]
    name, data = part.object
    with pytest.raises(DamageError, match=r"damaged in Bacula's catalogue.*bootstrap"):
        async with open_restore(restore_job(str(tmp_path / "out")), config_in(tmp_path)) as handler:
            await handler.restore_object(name, 25, 1, harm(data))
    assert everything_below(tmp_path) == []


async def test_an_object_under_another_name(tmp_path: Path) -> None:
    part = chain().parts[0]
    for name, kind in (("replicator/somebody", 25), ("stranger", 25), ("replicator/x", 26)):
        with pytest.raises(DamageError, match="the catalogue"):
            async with open_restore(restore_job("/tmp"), config_in(tmp_path)) as handler:
                await handler.restore_object(name, kind, 1, encode_object(part.description))


async def test_a_job_that_the_catalogue_has_forgotten_is_read_from_the_volume(
    tmp_path: Path,
) -> None:
    machine = chain()
    bacula = Bacula(str(tmp_path / "out"))
    async with open_restore(restore_job(bacula.where), config_in(tmp_path)) as handler:
        for part in machine.parts[1:]:
            await handler.restore_object(part.object[0], 25, 1, part.object[1])
        await bacula.give(handler, machine.parts, objects=False)
        await handler.finish()
        await handler.conclude("T")
    last = machine.parts[-1]
    assert out_of(tmp_path, last, "disk-0").read_bytes() == last.images["disk-0"]


@pytest.mark.parametrize("then", ["finish", "create"])
async def test_a_file_without_an_end(tmp_path: Path, then: str) -> None:
    part = chain().parts[0]
    name = f"{tmp_path}/out/{next(iter(part.files))}"
    file = RestoredFile(name=name, size=part.description.disks[0].size, mtime_s=0)
    async with open_restore(restore_job(str(tmp_path / "out")), config_in(tmp_path)) as handler:
        await handler.restore_object(part.object[0], 25, 1, part.object[1])
        await handler.create(file)
        await handler.data(0, b"x")
        with pytest.raises(DamageError, match="has no end"):
            await (handler.finish() if then == "finish" else handler.create(file))
    assert everything_below(tmp_path) == []


async def test_too_many_images_of_one_name(tmp_path: Path) -> None:
    machine = Machine()
    machine.add("disk-0", 4096)
    for _ in range(9):
        machine.backup("F")
    with pytest.raises(RefusedError, match="came 8 times"):
        await restore(tmp_path, machine.parts, objects=False)
    assert everything_below(tmp_path) == []


async def test_the_verdict_t_without_the_end_is_no_good_restore(tmp_path: Path) -> None:
    bacula = Bacula(str(tmp_path / "out"))
    async with open_restore(restore_job(bacula.where), config_in(tmp_path)) as handler:
        await bacula.give(handler, chain().parts)
        with pytest.raises(ReplicatorError, match="did not come to its end"):
            await handler.conclude("T")
    assert everything_below(tmp_path) == []
