# SPDX-License-Identifier: AGPL-3.0-or-later
"""A bit that flips in a replica is met by the next read, and is not made right by the next apply.

Damage that one point meets is that of every point which takes the grain from the same file.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from receiver.store import apply
from receiver.store.verify import verify_point
from receiver.store.vm_store import VmStore
from replicator.domain.views import point_info
from replicator.errors import DamageError
from replicator.imagemap.layout import REGIONS
from tests.limits import HANG_S
from tests.receiver.store_lab import StoreFixture, open_store

GRAIN = 65536
#: The disk ends inside its last grain.
SIZE = 40 * GRAIN - 3000
BASE = random.Random(3).randbytes(SIZE)
REPLICA = "replica/disk-0.raw"
REVERSE = "points/{}/disk-0.rev.phcbt"


def wide(fixture: StoreFixture) -> None:
    """The grain that sources use."""
    fixture.grain, fixture.chunk = GRAIN, 16 * GRAIN


def changed(content: bytes, grains: Mapping[int, bytes]) -> bytes:
    result = bytearray(content)
    for grain, data in grains.items():
        length = min(GRAIN, len(content) - grain * GRAIN)
        result[grain * GRAIN : grain * GRAIN + length] = (data * GRAIN)[:length]
    return bytes(result)


def flip(store: VmStore, grain: int) -> None:
    with (store.paths.root / REPLICA).open("r+b") as file:
        file.seek(grain * GRAIN + 777)
        byte = file.read(1)[0]
        file.seek(grain * GRAIN + 777)
        file.write(bytes([byte ^ 4]))


def known(store: VmStore) -> set[tuple[int, int, int, str]]:
    return {(d.point, d.offset, d.length, d.file) for d in store.vm.damages}


def states(store: VmStore) -> list[str]:
    return [str(point_info(store.vm, point)["state"]) for point in store.vm.points.values()]


def length_of(grain: int) -> int:
    return min(GRAIN, SIZE - grain * GRAIN)


@pytest.mark.parametrize("grain", [0, 7, 39])
async def test_a_read_of_a_rotten_grain_fails_whatever_part_it_wants(
    tmp_path: Path, grain: int
) -> None:
    """The last grain is a short one. All other grains are readable."""
    async with open_store(tmp_path, prepare=wide) as fixture:
        await fixture.push({"disk-0": BASE})
        await fixture.settle()
        store = fixture.store
        flip(store, grain)
        start, end = grain * GRAIN, min((grain + 1) * GRAIN, SIZE)
        async with store.hold(1) as point, store.open_disk(point, point.disks[0]) as view:
            for at, length in ((start, 1), (end - 1, 1), (start + 700, 100), (start, end - start)):
                with pytest.raises(DamageError) as failure:
                    await view.read(at, length)
                assert f"{REPLICA}: {end - start} bytes at disk byte {start} " in str(failure.value)
            with pytest.raises(DamageError):
                await view.read(0, SIZE)
            for at, length in ((0, start), (end, SIZE - end)):
                assert await view.read(at, length) == BASE[at : at + length]
            flip(store, grain)
            assert await view.read(0, SIZE) == BASE


async def test_a_wrong_digest_in_the_map_costs_no_read_and_no_point(tmp_path: Path) -> None:
    """The map's own nodes say which of the two is right; so does an apply that overwrites the grain."""
    async with open_store(tmp_path, prepare=wide) as fixture:
        await fixture.push({"disk-0": BASE})
        await fixture.settle()
        store = fixture.store
        path = store.paths.replica_map(store.vm.points[1].disks[0])
        for start, count in ((5 * 16 + 3, 1), (0, 40 * 16)):  # a bit; then all of the page
            with path.open("r+b") as file:
                file.seek(REGIONS[0] + start)
                old = file.read(count)
                file.seek(REGIONS[0] + start)
                file.write(bytes(byte ^ 1 for byte in old))
            await fixture.check_point(1)
        await fixture.push({"disk-0": changed(BASE, {5: b"n", 6: b"m"})})
        await fixture.settle()
        assert store.vm.damages == []
        for number in (1, 2):
            await fixture.check_point(number)
            assert (await verify_point(store, number)).good
        # One digest of the map is wrong, and another grain is rotten: each is told for what it is.
        with path.open("r+b") as file:
            file.seek(REGIONS[0] + 9 * 16)
            file.write(bytes(16))
        flip(store, 11)
        async with store.hold(2) as point, store.open_disk(point, point.disks[0]) as view:
            assert await view.read(9 * GRAIN, GRAIN) == BASE[9 * GRAIN : 10 * GRAIN]
            with pytest.raises(DamageError):
                await view.read(11 * GRAIN, GRAIN)


@pytest.mark.parametrize("filling", [random.Random(8).randbytes(99), b"text", b"\0"])
async def test_an_apply_does_not_launder_rot(tmp_path: Path, filling: bytes) -> None:
    """A rotten grain that is overwritten stays damaged in the points below, and only there, and only that grain."""
    second = changed(BASE, {5: b"a", 12: b"old", 13: filling, 14: b"old", 39: b"end"})
    third = changed(second, dict.fromkeys((11, 12, 13, 14, 15, 39), b"fresh"))
    async with open_store(tmp_path, prepare=wide) as fixture:
        store = fixture.store
        await fixture.push({"disk-0": BASE})
        await fixture.push({"disk-0": second})
        await fixture.settle()
        flip(store, 11)  # points 1 and 2 have this grain from the replica
        flip(store, 13)  # point 1 has it from a reverse delta
        flip(store, 39)
        await fixture.push({"disk-0": third})
        await fixture.settle()
        name = REVERSE.format(2)
        expected = {(2, grain * GRAIN, length_of(grain), name) for grain in (11, 13, 39)}
        expected.add((1, 11 * GRAIN, GRAIN, name))
        assert known(store) == expected
        assert states(store) == ["damaged", "damaged", "ok"]
        await fixture.check_point(3)
        assert (await verify_point(store, 3)).good
        for number, bad, content in ((1, {11}, BASE), (2, {11, 13, 39}, second)):
            result = await verify_point(store, number)
            found = {(d.disk, d.offset, d.length, d.file) for d in result.damages}
            assert found == {("disk-0", g * GRAIN, length_of(g), name) for g in bad}
            async with store.hold(number) as point, store.open_disk(point, point.disks[0]) as view:
                for grain in range(40):
                    at, length = grain * GRAIN, length_of(grain)
                    if grain in bad:
                        with pytest.raises(DamageError):
                            await view.read(at, length)
                    else:
                        assert await view.read(at, length) == content[at : at + length]


async def test_rot_is_found_when_an_apply_is_repeated_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replica and map are ahead of the log, which the reverse delta makes up for: only real rot is damage."""
    second = changed(BASE, {3: b"x", 20: b"y"})
    real = apply.write_replica
    cut = trio.Event()

    def write_replica(*args: object) -> int:
        real(*args)  # type: ignore[arg-type]
        if args[-1] == 2:
            trio.from_thread.run_sync(cut.set)
            raise OSError(5, "cut here")
        return 0

    async with open_store(tmp_path, prepare=wide) as fixture:
        await fixture.push({"disk-0": BASE})
        await fixture.settle()
        with monkeypatch.context() as patch:
            patch.setattr(apply, "write_replica", write_replica)
            await fixture.push({"disk-0": second})
            with trio.fail_after(HANG_S):
                await cut.wait()
            assert fixture.store.vm.applied == 1
            await fixture.check_point(1)
            await fixture.check_point(2)
            flip(fixture.store, 20)  # will be written again
            await fixture.check_point(1)
            await fixture.check_point(2)
        expected = fixture.expected
    async with open_store(tmp_path, expected=expected, prepare=wide) as fixture:
        await fixture.settle()
        assert fixture.store.vm.applied == 2
        assert fixture.store.vm.damages == []
        for number in (1, 2):
            await fixture.check_point(number)
            assert (await verify_point(fixture.store, number)).good


async def test_damage_is_that_of_every_point_that_reads_it(tmp_path: Path) -> None:
    """Verified points do not stay so when another one meets the damage; those with other content do."""
    contents = [BASE]
    for number in (2, 3, 4):
        contents.append(changed(contents[-1], {9: b"%d" % number} if number == 3 else {20: b"z"}))
    async with open_store(tmp_path, prepare=wide) as fixture:
        store = fixture.store
        for content in contents:
            await fixture.push({"disk-0": content})
        await fixture.settle()
        for number in (1, 2, 3, 4):
            assert (await verify_point(store, number)).good
        flip(store, 9)
        assert not (await verify_point(store, 4)).good
        assert known(store) == {(number, 9 * GRAIN, GRAIN, REPLICA) for number in (3, 4)}
        assert states(store) == ["verified", "verified", "damaged", "damaged"]
        flip(store, 9)
        for number in (3, 4):
            assert (await verify_point(store, number)).good
        # A delta that cannot be opened costs all that need it.
        delta = store.paths.root / REVERSE.format(2)
        delta.write_bytes(delta.read_bytes()[:-9])
        assert not (await verify_point(store, 1)).good
        assert states(store) == ["damaged", "damaged", "verified", "verified"]
