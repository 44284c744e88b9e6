# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where two maps differ, against dictionaries of digests; pages, and maps that are written as digests come."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replicator.errors import DamageError, StateError
from replicator.imagemap import ImageMap
from replicator.imagemap.compare import Difference, differences, differing_slots
from replicator.imagemap.layout import REGIONS
from replicator.imagemap.tree import node_of
from replicator.phcbt.format import Algorithm, GrainRun

GRAIN = 4096
XXH3 = Algorithm.XXH3_128
Model = dict[int, int]
numbers = itertools.count()


def make(folder: Path, grains: int, model: Model) -> ImageMap:
    """A map whose grains have these digests, by a number; the others are zeros."""
    path = folder / f"{next(numbers)}.map"
    image = ImageMap.create(path, XXH3, GRAIN, grains * GRAIN, 0)
    runs = [GrainRun(at, 1, number.to_bytes(16)) for at, number in sorted(model.items())]
    image.apply(runs, image.disk_size, 1)
    return image


#: Places around the borders of pages of two levels.
_PLACES = st.sampled_from([0, 1, 254, 255, 256, 257, 511, 512, 65535, 65536, 65791, 65792, 70000])
_MODELS = st.dictionaries(_PLACES, st.integers(1, 2), max_size=8)


@settings(max_examples=60, deadline=None)
@given(_MODELS, _MODELS, st.sampled_from([1, 2, 255, 256, 257, 65536, 65537, 70001]), _PLACES)
@example({0: 1}, {0: 1, 70000: 2}, 1, 0)
@example({}, {}, 70001, 0)
def test_differences_are_those_of_the_dictionaries(
    tmp_path_factory: pytest.TempPathFactory, before: Model, now: Model, old_grains: int, start: int
) -> None:
    """Also of a disk that has grown, whose old map may have fewer levels."""
    folder = tmp_path_factory.mktemp("maps")
    before = {at: number for at, number in before.items() if at < old_grains}
    expected = [
        Difference(at, now.get(at, 0) == 0)
        for at in sorted(before.keys() | now.keys())
        if before.get(at, 0) != now.get(at, 0) and at >= start
    ]
    with make(folder, old_grains, before) as old, make(folder, 70001, now) as new:
        assert list(differences(old, new, start)) == expected
        assert list(differences(new, new)) == []


def test_the_cost_follows_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[tuple[int, int]] = []
    page = ImageMap.page

    def noted(image: ImageMap, level: int, index: int) -> bytes:
        pages.append((level, index))
        return page(image, level, index)

    everywhere = dict.fromkeys(range(0, 70001, 100), 1)
    with (
        make(tmp_path, 70001, everywhere) as old,
        make(tmp_path, 70001, everywhere | {66000: 5}) as new,
    ):
        monkeypatch.setattr(ImageMap, "page", noted)
        assert list(differences(old, new)) == [Difference(66000, False)]
        assert sorted(set(pages)) == [(0, 66000 // 256), (1, 1), (2, 0)]


def test_maps_that_cannot_be_compared(tmp_path: Path) -> None:
    with make(tmp_path, 5, {}) as small, make(tmp_path, 6, {}) as large:
        with pytest.raises(ValueError, match="of 5 grains is compared with one of 6"):
            list(differences(large, small))
        with (
            ImageMap.create(tmp_path / "o", XXH3, 2 * GRAIN, 5 * GRAIN, 0) as other,
            pytest.raises(ValueError, match="other grains or digests"),
        ):
            list(differences(small, other))


def test_runs_of_slots() -> None:
    one, other = b"aabbccdd", b"aaxxyydd"
    assert list(differing_slots(one, other, 2, 4)) == [(1, 3)]
    assert list(differing_slots(one, other, 2, 2)) == [(1, 2)]
    assert list(differing_slots(one, b"x" * 8, 2, 4)) == [(0, 4)]
    assert list(differing_slots(one, one, 2, 4)) == []


def test_pages(tmp_path: Path) -> None:
    with make(tmp_path, 300, {0: 1, 299: 2}) as image:
        assert image.height == 2
        first, second, top = image.page(0, 0), image.page(0, 1), image.page(1, 0)
        assert first == (1).to_bytes(16).ljust(4096, b"\0")
        assert second[43 * 16 : 44 * 16] == (2).to_bytes(16)
        assert top == (node_of(0, first) + node_of(0, second)).ljust(8192, b"\0")
        # What it would hold if it grew; and outside nothing.
        assert image.page(2, 0) == node_of(1, top).ljust(8192, b"\0")
        assert image.page(3, 0) == node_of(2, image.page(2, 0)).ljust(8192, b"\0")
        assert image.page(0, 2) == bytes(4096)
        assert image.page(1, 1) == image.page(2, 1) == bytes(8192)
        for level, index in ((5, 0), (-1, 0), (0, -1)):
            with pytest.raises(ValueError, match=f"page {index} of level {level}"):
                image.page(level, index)


@pytest.mark.parametrize("level", [0, 1])
def test_a_damaged_page_is_not_handed_out(tmp_path: Path, level: int) -> None:
    with make(tmp_path, 300, {0: 1}) as image:
        path = tmp_path / f"{next(numbers) - 1}.map"
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"damage", REGIONS[level])
        with pytest.raises(DamageError, match=f"page 0 of level {level} .* does not fit"):
            image.page(level, 0)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_map_written_as_digests_come_is_an_apply(tmp_path: Path, after: int) -> None:
    """Cut short it stands where it stood, and can be repeated."""
    runs = [GrainRun(0, 1, b"\1" * 16), GrainRun(256, 2, b"\2" * 32), GrainRun(300, 20, None)]
    with make(tmp_path, 400, {305: 7}) as one, make(tmp_path, 400, {305: 7}) as other:
        root = one.apply(runs, 500 * GRAIN, 9)
        begun, before = other.write(500 * GRAIN, 9), other.root()
        for run in runs[:after]:
            begun.put(run)
        assert (other.root(), other.point) == (before, 1)
        again = other.write(500 * GRAIN, 9)
        for run in runs:
            again.put(run)
        assert again.finish(root) == other.root() == root
        assert (other.point, other.disk_size) == (9, 500 * GRAIN)
        assert list(other.check()) == []


def test_a_map_that_comes_to_another_root_stays(tmp_path: Path) -> None:
    with make(tmp_path, 4, {1: 1}) as image:
        before = image.root()
        writer = image.write(4 * GRAIN, 2)
        writer.put(GrainRun(2, 1, b"\3" * 16))
        with pytest.raises(ValueError, match="not within 3 to 4"):
            writer.put(GrainRun(2, 1, b"\3" * 16))
        with pytest.raises(DamageError, match="root expected"):
            writer.finish(before)
        assert (image.root(), image.point) == (before, 1)
        with pytest.raises(StateError, match="cannot shrink"):
            image.write(3 * GRAIN, 2)
