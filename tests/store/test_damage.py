# SPDX-License-Identifier: AGPL-3.0-or-later
"""A flipped bit in any file of a store is found by a verification, and located; what does not need the file stays good.

Which points a damaged grain belongs to is worked out here from what was pushed, not from the store.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio.testing

from receiver.store.admission import PushRefusedHereError
from receiver.store.verify import FINDINGS_MAX, VerifyResult, verify_point
from receiver.store.vm_store import VmStore
from replicator.domain.model import PointDisk, PushKind
from replicator.domain.views import point_info
from replicator.errors import DamageError
from replicator.imagemap import ImageMap
from replicator.imagemap.layout import REGIONS
from replicator.phcbt.format import Codec, Kind
from replicator.phcbt.read import StoredDelta
from tests.limits import HANG_S
from tests.receiver.store_lab import Image, StoreFixture, open_store

GRAIN = 4096
#: More than one page of digests, so that there are nodes above them; the disk ends inside a grain.
GRAINS = 300
SIZE = GRAINS * GRAIN - 1000
POINTS = (1, 2, 3, 4, 5)
OTHER = {"disk-1": b"another disk" * 1000}


def contents() -> Iterator[bytes]:
    """The disk at each point: grains of noise, of text, of zeros; runs of a few grains change."""
    source = random.Random(11)
    disk = bytearray(source.randbytes(GRAINS * GRAIN))
    disk[40 * GRAIN : 60 * GRAIN] = bytes(20 * GRAIN)
    for number in POINTS:
        for first in (3 * number, 90, 257) if number > 1 else ():
            disk[first * GRAIN : (first + 4) * GRAIN] = source.randbytes(4 * GRAIN)
        disk[120 * GRAIN : 130 * GRAIN] = (b"%d, some text, " % number * GRAIN)[: 10 * GRAIN]
        disk[41 * GRAIN : 46 * GRAIN] = (
            bytes(5 * GRAIN) if number % 2 else source.randbytes(5 * GRAIN)
        )
        # A long run that goes back to zeros becomes a zero record.
        at = (140 + 10 * number) * GRAIN
        disk[at : at + 8 * GRAIN] = bytes(8 * GRAIN)
        yield bytes(disk[:SIZE])


async def fill(fixture: StoreFixture) -> None:
    for content in contents():
        await fixture.push({"disk-0": content} | OTHER)
    await fixture.settle()


def changed_at(fixture: StoreFixture, number: int) -> set[int]:
    """Grains that differ between a point and the one before."""
    images = fixture.expected
    return set(images[number]["disk-0"].changed_since(images[number - 1]["disk-0"]))


def disk_of(store: VmStore, number: int) -> PointDisk:
    disk = store.vm.points[number].disk("disk-0")
    assert disk is not None
    return disk


def taken_from(fixture: StoreFixture, path: Path, grain: int) -> set[int]:
    """The points whose content of a grain comes from this file."""
    store = fixture.store
    applied = store.vm.applied
    for number in POINTS:
        if path == store.paths.reverse(number, disk_of(store, number)):
            # Holds what point number + 1 overwrote: for this point and those below, if they have it from no other.
            return {
                point
                for point in POINTS
                if point <= number
                and grain in changed_at(fixture, number + 1)
                and not any(grain in changed_at(fixture, n) for n in range(point + 1, number + 1))
            }
        if path == store.paths.forward(number, disk_of(store, number)):
            return {
                point
                for point in POINTS
                if point >= number
                and grain in changed_at(fixture, number)
                and not any(grain in changed_at(fixture, n) for n in range(number + 1, point + 1))
            }
    assert path == store.paths.replica(disk_of(store, 1))
    between = {p: range(min(p, applied) + 1, max(p, applied) + 1) for p in POINTS}
    return {p for p in POINTS if not any(grain in changed_at(fixture, n) for n in between[p])}


def in_stack_of(fixture: StoreFixture, path: Path) -> set[int]:
    """The points that cannot be opened without this delta."""
    store = fixture.store
    for number in POINTS:
        if path == store.paths.reverse(number, disk_of(store, number)):
            return {point for point in POINTS if point <= number}
        if path == store.paths.forward(number, disk_of(store, number)):
            return {point for point in POINTS if point >= number}
    raise AssertionError(path)


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """One bit of a file is another one inside."""
    flip(path, byte, bit)
    try:
        yield
    finally:
        flip(path, byte, bit)


def flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)
        file.seek(byte)
        file.write(bytes([(old[0] if old else 0) ^ 1 << bit]))


def grains_of(result: VerifyResult) -> set[int]:
    """The grains that a result calls damaged."""
    return {
        grain
        for damage in result.damages
        for grain in range(damage.offset // GRAIN, -(-(damage.offset + damage.length) // GRAIN))
    }


async def expect(
    fixture: StoreFixture, damaged: Mapping[int, set[int]], file: Path, *, part: bool = False
) -> list[VerifyResult]:
    """Verify every point: these have damage in these grains (or a part of them), in this file; all others are good."""
    results = []
    name = str(file.relative_to(fixture.store.paths.root))
    for number in POINTS:
        result = await verify_point(fixture.store, number)
        results.append(result)
        expected = damaged.get(number, set())
        found = grains_of(result)
        assert found == expected or (part and found and found < expected), f"point {number}"
        for damage in result.damages:
            assert damage.disk == "disk-0"
            assert name in (damage.file, damage.reason[: len(name)]) or name in damage.reason
        known = [d for d in fixture.store.vm.damages if d.point == number]
        assert all(damage in known for damage in result.damages)
        assert bool(known) == bool(expected)
        state = point_info(fixture.store.vm, fixture.store.vm.points[number])["state"]
        assert state == ("damaged" if expected else "verified")
    return results


@dataclass(frozen=True)
class Region:
    """A stretch of a delta's file, and the grains that it costs; None: all, for it cannot be opened."""

    name: str
    start: int
    end: int
    grains: set[int] | None
    exact: bool = True


def regions(path: Path) -> Iterator[Region]:
    with StoredDelta(path) as delta:
        header = len(delta.header.encode())
        yield Region("header", 0, header, None)
        size, position = delta.header.digest_size, header
        for entry in delta.entries():
            first, count = entry.offset // GRAIN, -(-entry.length // GRAIN)
            grains = set(range(first, first + count))
            kind = "zero" if entry.kind is Kind.ZERO else entry.codec.name.lower()
            digests = entry.position + 40
            yield Region(f"{kind} head", entry.position, digests, grains)
            record = delta.record(entry)
            position = digests + len(record.digests)
            if entry.kind is Kind.DATA:
                yield Region(f"{kind} digests", digests, position, grains)
                end = position + record.head.payload_length
                if entry.codec is Codec.NONE:
                    for index in range(count):
                        at = position + index * GRAIN
                        yield Region("grain", at, min(at + GRAIN, end), {first + index})
                else:
                    yield Region("zstd payload", position, end, grains, exact=False)
                position = end
            assert len(record.digests) == (size * count if entry.kind is Kind.DATA else 0)
        yield Region("index", position, delta.size - 120, set())
        yield Region("end", delta.size - 16, delta.size, None)


def sampled(path: Path, seed: int) -> list[tuple[Region, int, int]]:
    """A few bits of each kind of region."""
    source = random.Random(seed)
    by_name: dict[str, list[Region]] = {}
    for region in regions(path):
        by_name.setdefault(region.name, []).append(region)
    samples = []
    for name in sorted(by_name):
        region = source.choice(by_name[name])
        samples += [
            (region, byte, source.randrange(8))
            for byte in (region.start, source.randrange(region.start, region.end))
        ]
    return samples


@pytest.mark.parametrize("apply", [True, False])
async def test_every_bit_of_a_delta(tmp_path: Path, apply: bool) -> None:
    async with open_store(tmp_path, apply=apply) as fixture:
        await fill(fixture)
        store = fixture.store
        number = 3
        disk = disk_of(store, number)
        path = store.paths.reverse(number, disk) if apply else store.paths.forward(number, disk)
        seen = set()
        for region, byte, bit in sampled(path, 5):
            seen.add(region.name)
            with flipped(path, byte, bit):
                if region.grains is None:
                    damaged = {point: set(range(GRAINS)) for point in in_stack_of(fixture, path)}
                else:
                    damaged = {
                        point: {g for g in region.grains if point in taken_from(fixture, path, g)}
                        for point in POINTS
                    }
                    if region.name == "grain":
                        assert any(damaged.values()) == bool(
                            taken_from(fixture, path, min(region.grains))
                        )
                results = await expect(fixture, damaged, path, part=not region.exact)
                if region.name == "index":
                    faults = [r.point for r in results if any(path.name in f for f in r.map_faults)]
                    assert set(faults) == in_stack_of(fixture, path)
                else:
                    assert any(damaged.values())
        assert seen >= {"header", "none head", "none digests", "grain", "zero head", "index", "end"}
        assert seen >= {"zstd head", "zstd digests", "zstd payload"}
        # Everything is as it was: so it verifies.
        await expect(fixture, {}, path)


@pytest.mark.parametrize("apply", [True, False])
async def test_every_kind_of_grain_of_a_replica(tmp_path: Path, apply: bool) -> None:
    """In data and in what was zeros, in grains that changed and in others, at the end; and content that became a hole."""
    async with open_store(tmp_path, apply=apply) as fixture:
        await fill(fixture)
        path = fixture.store.paths.replica(disk_of(fixture.store, 1))
        source = random.Random(6)
        for grain in (0, 12, 50, 91, 125, 150, 160, 190, 256, 258, GRAINS - 1):
            at = grain * GRAIN + source.randrange(GRAIN - 1000)
            points = taken_from(fixture, path, grain)
            with flipped(path, at, source.randrange(8)):
                await expect(fixture, {point: {grain} for point in points}, path)
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(0)
            file.truncate(SIZE)
            file.write(content[: 280 * GRAIN])  # the end has become a hole
        lost = {
            point: {g for g in range(280, GRAINS) if point in taken_from(fixture, path, g)}
            for point in POINTS
        }
        assert any(lost.values())
        await expect(fixture, lost, path)
        path.write_bytes(content)
        await expect(fixture, {}, path)


MAP_PLACES = {
    "magic": 3,
    "version": 9,
    "top node": 45,
    "check": 70,
    "rest of the header": 3000,
    "node": REGIONS[1] + 7,
    "node of a page of zeros": REGIONS[1] + 32 * 5,
    "digest of the first page": REGIONS[0] + 16 * 7 + 3,
    "digest of the last page": REGIONS[0] + 16 * 290,
    "digest of zeros": REGIONS[0] + 16 * 50,
    "outside": REGIONS[0] + 16 * (GRAINS + 2),
}


@pytest.mark.parametrize("which", ["head", "replica"])
async def test_every_part_of_a_map(tmp_path: Path, which: str) -> None:
    """No content is damaged, so no point is; the map is made again, and the next cycles build on it."""
    async with open_store(tmp_path) as fixture:
        await fill(fixture)
        store, disk = fixture.store, disk_of(fixture.store, 5)
        path = store.paths.head_map(disk) if which == "head" else store.paths.replica_map(disk)
        name, whole = str(path.relative_to(store.paths.root)), path.stat().st_size
        for place, byte in MAP_PLACES.items():
            flip(path, byte, 4)
            results = await expect(fixture, {}, path)
            found = {r.point: [f for f in r.map_faults if f.startswith(name)] for r in results}
            assert [p for p in POINTS if found[p]] == ([5] if which == "head" else list(POINTS))
            if which == "replica" and place == "digest of the first page":
                assert f"{name}: the digest of {GRAIN} bytes at {7 * GRAIN} is wrong" in found[5]
            assert (await verify_point(store, 5)).map_faults == [], place
            assert path.stat().st_size == whole
        changed = next(contents())
        for push in (changed, changed[:GRAIN] + bytes(SIZE - GRAIN)):
            await fixture.push({"disk-0": push} | OTHER)
        await fixture.settle()
        await fixture.check_point(7)
        assert (await verify_point(store, 7)).map_faults == []


@pytest.mark.parametrize("also", [None, "digest of the last page", "magic"])
async def test_a_head_map_is_made_again_for_the_next_push(tmp_path: Path, also: str | None) -> None:
    """Found by the push, not by a verification; ``also``: the replica's map is damaged too, so the content is read."""
    async with open_store(tmp_path) as fixture:
        await fill(fixture)
        store, disk = fixture.store, disk_of(fixture.store, 5)
        head = store.paths.head_map(disk)
        changed = bytearray(next(contents()))
        for place in ("magic", "top node", "node", "digest of the first page", "file"):
            if place == "file":
                head.unlink()
            else:
                flip(head, MAP_PLACES[place], 2)
            if also is not None:
                flip(store.paths.replica_map(disk), MAP_PLACES[also], 2)
            changed[:100] = place.ljust(100).encode()
            point = await fixture.push({"disk-0": bytes(changed)} | OTHER)
            await fixture.settle()
            assert store.trouble is None
            assert store.vm.damages == []
            result = await verify_point(store, point.number)
            assert result.damages == []
            # A digest that no cycle has touched is found, and mended, by a verification.
            assert (await verify_point(store, point.number)).map_faults == []
            await fixture.check_point(point.number - 1)


async def test_no_cycle_builds_on_a_point_of_which_nothing_is_certain(tmp_path: Path) -> None:
    """Head map, replica map and content are damaged: a cycle is refused, so that the source seeds, and a seed is taken."""
    async with open_store(tmp_path) as fixture:
        await fill(fixture)
        store, disk = fixture.store, disk_of(fixture.store, 5)
        for path in (store.paths.head_map(disk), store.paths.replica_map(disk)):
            flip(path, MAP_PLACES["digest of the first page"], 0)
            flip(path, MAP_PLACES["magic"], 0)
        flip(store.paths.replica(disk), 200 * GRAIN, 0)
        push = fixture.prepare({"disk-0": next(contents())} | OTHER)
        with pytest.raises(PushRefusedHereError, match="seed --again") as refused:
            await fixture.land(push)
        assert refused.value.code == "root-mismatch"
        assert [(d.point, d.file) for d in store.vm.damages] == [(5, "head/disk-0.map")]
        await fixture.push({"disk-0": next(contents())} | OTHER, kind=PushKind.SEED)
        await fixture.settle()
        await fixture.check_point(6)
        assert (await verify_point(store, 6)).good


@pytest.mark.parametrize("lost", ["replica", "replica map", "head map", "delta", "folder"])
@pytest.mark.parametrize("apply", [True, False])
async def test_a_missing_file_costs_the_points_that_need_it(
    tmp_path: Path, lost: str, apply: bool
) -> None:
    async with open_store(tmp_path, apply=apply) as fixture:
        await fill(fixture)
        expected, store = fixture.expected, fixture.store
        paths, disk = store.paths, disk_of(store, 3)
        delta = paths.reverse(3, disk) if apply else paths.forward(3, disk)
        path = {
            "replica": paths.replica(disk),
            "replica map": paths.replica_map(disk),
            "head map": paths.head_map(disk),
            "delta": delta,
            "folder": delta,
        }[lost]
        costs = {"replica": set(POINTS), "replica map": set(), "head map": set()}
        damaged = costs.get(lost, in_stack_of(fixture, delta))
    path.unlink()
    if lost == "folder":
        for rest in path.parent.iterdir():
            rest.unlink()
        path.parent.rmdir()
    async with open_store(tmp_path, apply=apply, expected=expected) as fixture:
        store = fixture.store
        assert {damage.point for damage in store.vm.damages} == damaged
        for damage in store.vm.damages:
            assert damage.reason == "the file is missing"
            assert damage.file.endswith(path.name) or lost == "folder"
        for number in POINTS:
            if number not in damaged:
                await fixture.check_point(number)
                continue
            with pytest.raises(DamageError, match="No such file"):
                await fixture.check_point(number)
            result = await verify_point(store, number)
            assert not result.good
        await verify_point(store, 1)  # where nothing is applied at once, this makes the map again
        faults = [(await verify_point(store, n)).map_faults for n in POINTS if n not in damaged]
        assert not any(faults)


def trouble(store: VmStore) -> str:
    return store.trouble or ""


@pytest.mark.parametrize("place", ["grain", "zero head", "zstd payload", "end"])
async def test_a_damaged_delta_stops_the_apply_until_a_seed(tmp_path: Path, place: str) -> None:
    """It is shown, the points below stay; a seed lets go of the points that cannot be reached."""
    async with open_store(tmp_path, apply=False) as fixture:
        await fill(fixture)
        expected = fixture.expected
        path = fixture.store.paths.forward(3, disk_of(fixture.store, 3))
    (region, *_) = [region for region in regions(path) if region.name == place]
    flip(path, region.end - 1, 0)
    async with open_store(tmp_path, apply=True, expected=expected) as fixture:
        store = fixture.store
        with trio.fail_after(HANG_S):
            await store.resting.wait()
        assert "point 3" in trouble(store)
        assert "seed --again" in trouble(store)
        assert not store.settled.is_set()
        assert store.vm.applied == 2
        assert {(d.point, d.disk) for d in store.vm.damages} == {(3, "disk-0"), (3, "disk-1")}
        await fixture.check_point(1)
        await fixture.check_point(2)
        # A cycle does not help, and loses nothing either.
        await fixture.push({"disk-0": next(contents())} | OTHER)
        events = store.vm.version
        store.wake()
        with trio.fail_after(HANG_S):
            await store.resting.wait()
        assert store.vm.version == events
        async with store.hold(4):  # a reader of a point that must go
            await fixture.push({"disk-0": next(contents())} | OTHER, kind=PushKind.SEED)
            with trio.fail_after(HANG_S):
                await store.resting.wait()
            assert "its readers have ended" in trouble(store)
            assert 4 in store.vm.points
        await fixture.settle()
        assert not trouble(store)
        assert list(store.vm.points) == [1, 2, 7]
        assert store.vm.damages == []
        for number in (1, 2, 7):
            await fixture.check_point(number)
            assert (await verify_point(store, number)).good


async def test_much_damage_is_a_bounded_number_of_findings(tmp_path: Path) -> None:
    """Every second grain: the last finding stands for the rest, and verifying again records nothing new."""
    async with open_store(tmp_path) as fixture:
        await fill(fixture)
        path = fixture.store.paths.replica(disk_of(fixture.store, 5))
        for grain in range(0, GRAINS, 2):
            flip(path, grain * GRAIN, 0)
        result = await verify_point(fixture.store, 5)
        assert len(result.damages) == FINDINGS_MAX
        assert result.damages[0].length == GRAIN
        last = result.damages[-1]
        assert last.offset + last.length == SIZE
        events = fixture.store.vm.version
        assert (await verify_point(fixture.store, 5)).damages == result.damages
        assert fixture.store.vm.version == events


async def test_neighbouring_grains_are_one_finding(tmp_path: Path) -> None:
    async with open_store(tmp_path) as fixture:
        await fill(fixture)
        path = fixture.store.paths.replica(disk_of(fixture.store, 5))
        for grain in (70, 71, 72, 80):
            flip(path, grain * GRAIN, 0)
        result = await verify_point(fixture.store, 5)
        assert [(d.offset, d.length) for d in result.damages] == [
            (70 * GRAIN, 3 * GRAIN),
            (80 * GRAIN, GRAIN),
        ]


async def test_content_and_map_changed_alike_are_not_the_recorded_disk(tmp_path: Path) -> None:
    """Somebody wrote to the replica and made its map fit: only the root in the log knows."""
    async with open_store(tmp_path) as fixture:
        await fill(fixture)
        store, disk = fixture.store, disk_of(fixture.store, 5)
        path = store.paths.replica(disk)
        flip(path, 250 * GRAIN, 0)
        image = Image.of(path, GRAIN)
        with ImageMap.open(store.paths.replica_map(disk)) as digests:
            digest = digests.algorithm.digest_grains(image.grains[250], GRAIN)
        with store.paths.replica_map(disk).open("r+b") as file:
            file.seek(REGIONS[0] + 16 * 250)
            file.write(digest)
        result = await verify_point(store, 5)
        (damage,) = result.damages
        assert (damage.offset, damage.length) == (0, SIZE)
        assert damage.reason == "the disk does not have the recorded root"
        assert any(fault.startswith("replica/disk-0.map: ") for fault in result.map_faults)
