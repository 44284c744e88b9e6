# SPDX-License-Identifier: AGPL-3.0-or-later
"""The map against a dictionary of digests and the definition written down plainly."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replicator import durable
from replicator.durable import DurableFile
from replicator.errors import DamageError, ReplicatorError, StateError
from replicator.imagemap import HEADER_LEVEL, Finding, ImageMap, RootBuilder, layout, vm_root
from replicator.imagemap.layout import REGION_ENDS, REGIONS, page_offset
from replicator.phcbt.format import Algorithm, GrainRun

XXH3, BLAKE3 = Algorithm.XXH3_128, Algorithm.BLAKE3_256
GRAIN = 4096
Model = dict[int, bytes]
both = pytest.mark.parametrize("algorithm", [XXH3, BLAKE3])


class Killed(BaseException):
    """What a crash test raises in place of the process's death."""


def plain_root(algorithm: Algorithm, grain: int, disk_size: int, digests: Model) -> bytes:
    """The definition, with no care for cost in the number of levels."""
    grains = -(-disk_size // grain)
    height = next(h for h in range(1, 6) if 256**h >= grains)
    nodes = {index: digest for index, digest in digests.items() if any(digest)}
    width, tag = algorithm.digest_size, b"replctl image leaf v1\0"
    for _ in range(height):
        above: Model = {}
        for index in {index // 256 for index in nodes}:
            page = b"".join(nodes.get(index * 256 + slot, bytes(width)) for slot in range(256))
            above[index] = hashlib.sha256(tag + page).digest()
        nodes, width, tag = above, 32, b"replctl image node v1\0"
    return hashlib.sha256(
        b"replctl image root v1\0"
        + bytes([algorithm])
        + grain.to_bytes(4, "big")
        + disk_size.to_bytes(8, "big")
        + bytes([height])
        + nodes.get(0, bytes(32))
    ).digest()


def digest(seed: object, algorithm: Algorithm = XXH3) -> bytes:
    return hashlib.sha256(repr(seed).encode()).digest()[: algorithm.digest_size]


def run_of(first: int, count: int, seed: object, algorithm: Algorithm = XXH3) -> GrainRun:
    digests = b"".join(digest((seed, first + n), algorithm) for n in range(count))
    return GrainRun(first, count, digests)


def put(model: Model, runs: list[GrainRun], algorithm: Algorithm = XXH3) -> None:
    size = algorithm.digest_size
    for run in runs:
        for n in range(run.count):
            if run.digests is None:
                model.pop(run.first + n, None)
            else:
                model[run.first + n] = run.digests[n * size : (n + 1) * size]


def fresh(path: Path, grains: int, algorithm: Algorithm = XXH3) -> ImageMap:
    path.unlink(missing_ok=True)
    return ImageMap.create(path, algorithm, GRAIN, grains * GRAIN, 0)


def content(path: Path) -> list[tuple[int, bytes]]:
    """Every block of the file that is not zeros."""
    result = []
    with path.open("rb") as file:
        at, end = 0, file.seek(0, os.SEEK_END)
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // 4096 * 4096
            except OSError:
                break
            if any(block := os.pread(file.fileno(), 4096, at)):
                result.append((at, block))
            at += 4096
    return result


# -- what the root is ---------------------------------------------------------------------


@both
def test_an_empty_map_is_a_disk_of_zeros(tmp_path: Path, algorithm: Algorithm) -> None:
    with ImageMap.create(tmp_path / "map", algorithm, GRAIN, 10 * GRAIN + 1, 7) as created:
        assert (created.algorithm, created.grain, created.disk_size) == (algorithm, GRAIN, 40961)
        assert (created.point, created.grains) == (7, 11)
        assert created.root() == plain_root(algorithm, GRAIN, 40961, {})
        assert created.digests(0, 11) == bytes(11 * algorithm.digest_size)
        assert list(created.iter_nonzero_runs()) == []
        assert list(created.check()) == []
    assert os.listdir(tmp_path) == ["map"]


def test_the_root_tells_shape_and_content_apart() -> None:
    def root(algorithm: Algorithm, grain: int, size: int, slot: int) -> bytes:
        builder = RootBuilder(algorithm, grain, size)
        builder.add(slot, b"\1" * algorithm.digest_size, 1)
        return builder.root()

    roots = {
        root(XXH3, 4096, 1 << 20, 3),
        root(BLAKE3, 4096, 1 << 20, 3),
        root(XXH3, 8192, 1 << 20, 3),
        root(XXH3, 4096, (1 << 20) - 1, 3),
        root(XXH3, 4096, 1 << 20, 4),
    }
    assert len(roots) == 5


@pytest.mark.parametrize("grains", [1, 255, 256, 257, 65535, 65536, 65537])
@both
def test_roots_at_the_borders_of_a_height(
    tmp_path: Path, grains: int, algorithm: Algorithm
) -> None:
    runs = [run_of(first, 1, "border", algorithm) for first in sorted({0, grains // 2, grains - 1})]
    model: Model = {}
    put(model, runs, algorithm)
    expected = plain_root(algorithm, GRAIN, grains * GRAIN, model)
    builder = RootBuilder(algorithm, GRAIN, grains * GRAIN)
    for run in runs:
        builder.add(run.first, run.digests, run.count)
    assert builder.root() == expected
    with fresh(tmp_path / "map", grains, algorithm) as image:
        assert image.preview(runs, grains * GRAIN) == expected
        assert image.point == 0
        assert image.apply(runs, grains * GRAIN, 1, expected_root=expected) == expected
        assert image.root() == expected
        assert list(image.check()) == []


def test_the_largest_disk_in_the_smallest_grains_fits(tmp_path: Path) -> None:
    last = (1 << 38) - 1
    runs = [run_of(0, 1, "x", BLAKE3), run_of(last, 1, "x", BLAKE3)]
    model: Model = {}
    put(model, runs, BLAKE3)
    with fresh(tmp_path / "map", 1 << 38, BLAKE3) as image:
        root = image.apply(runs, 1 << 50, 1)
        assert root == plain_root(BLAKE3, GRAIN, 1 << 50, model)
        assert list(image.check()) == []
        assert list(image.iter_nonzero_runs()) == runs
        # Zeros over all of it cost a few steps, not 2^30 pages.
        zeros = [GrainRun(0, 1 << 38, None)]
        assert image.preview(zeros, 1 << 50) == plain_root(BLAKE3, GRAIN, 1 << 50, {})
        image.apply(zeros, 1 << 50, 2)
        assert list(image.check()) == []
        assert [at for at, _ in content(tmp_path / "map")] == [0]


# -- however it was reached ---------------------------------------------------------------

change = st.tuples(
    st.sampled_from([0, 1, 254, 255, 256, 257, 511, 512, 700, 65279, 65280, 65535, 65536, 65600]),
    st.sampled_from([1, 2, 3, 255, 256, 257, 600]),
    st.one_of(st.none(), st.integers(0, 3)),
)
cycles = st.lists(
    st.tuples(st.lists(change, max_size=5), st.sampled_from([0, 1, 256, 65536])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cycles, st.sampled_from([1, 255, 256, 257, 800, 65536]), st.sampled_from([XXH3, BLAKE3]))
@example([([(0, 1, 1)], 256), ([], 65536), ([], 1)], 256, XXH3)
def test_the_root_does_not_depend_on_the_cycles(
    tmp_path_factory: pytest.TempPathFactory,
    story: list[tuple[list[tuple[int, int, int | None]], int]],
    grains: int,
    algorithm: Algorithm,
) -> None:
    path = tmp_path_factory.getbasetemp() / "cycles-map"
    model: Model = {}
    expected = b""
    with fresh(path, grains, algorithm) as image:
        for point, (changes, growth) in enumerate(story, start=1):
            grains += growth
            runs: list[GrainRun] = []
            for first, count, seed in sorted(changes, key=lambda item: item[0]):
                start = max(first, runs[-1].first + runs[-1].count if runs else 0)
                end = min(first + count, grains)
                if start >= end:
                    continue
                zeros = GrainRun(start, end - start, None)
                runs.append(zeros if seed is None else run_of(start, end - start, seed, algorithm))
            put(model, runs, algorithm)
            expected = plain_root(algorithm, GRAIN, grains * GRAIN, model)
            assert image.preview(iter(runs), grains * GRAIN) == expected
            assert image.apply(iter(runs), grains * GRAIN, point) == expected
    with ImageMap.open(path) as image:
        assert image.root() == expected
        assert (image.point, image.grains) == (len(story), grains)
        assert list(image.check()) == []
        found: Model = {}
        put(found, list(image.iter_nonzero_runs()), algorithm)
        assert found == model
        # In one cut, from nothing, the file is the same as well, but for the point.
        builder = RootBuilder(algorithm, GRAIN, grains * GRAIN)
        for run in image.iter_nonzero_runs():
            builder.add(run.first, run.digests, run.count)
        assert builder.root() == expected
        with fresh(path.with_name("cycles-once"), grains, algorithm) as once:
            once.apply(image.iter_nonzero_runs(), grains * GRAIN, image.point)
        assert content(path.with_name("cycles-once")) == content(path)


def test_digests_may_themselves_be_zero(tmp_path: Path) -> None:
    mixed = GrainRun(0, 300, digest("a") + bytes(16 * 298) + digest("b"))
    with fresh(tmp_path / "map", 1000) as image:
        image.apply([run_of(0, 1000, "old")], 1000 * GRAIN, 1)
        image.apply([mixed, GrainRun(300, 700, None)], 1000 * GRAIN, 2)
        assert list(image.iter_nonzero_runs()) == [
            GrainRun(0, 1, digest("a")),
            GrainRun(299, 1, digest("b")),
        ]
        assert image.root() == plain_root(
            XXH3, GRAIN, 1000 * GRAIN, {0: digest("a"), 299: digest("b")}
        )


def test_a_page_of_zeros_is_a_hole(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 1024) as image, DurableFile(tmp_path / "map") as file:

        def pages() -> list[int]:
            return [n for n in range(4) if file.has_data(page_offset(XXH3, 0, n), 4096)]

        image.apply([run_of(0, 1024, "x")], 1024 * GRAIN, 1)
        assert pages() == [0, 1, 2, 3]
        # By a run of zeros, by digests that are zeros, and grain by grain.
        image.apply([GrainRun(256, 256, None), GrainRun(512, 256, bytes(4096))], 1024 * GRAIN, 2)
        assert pages() == [0, 3]
        image.apply([GrainRun(n, 1, None) for n in range(256)], 1024 * GRAIN, 3)
        assert pages() == [3]
        assert [run.first for run in image.iter_nonzero_runs()] == [768]


def test_zeros_over_a_hole_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh(tmp_path / "map", 70000) as image:
        seen: list[str] = []
        monkeypatch.setattr(durable, "observe", lambda step, _: seen.append(step))
        image.apply([GrainRun(1, 69000, None)], 70000 * GRAIN, 1)
        assert seen == ["fsync", "write", "fsync"]


def test_nonzero_runs_from_the_middle(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 20000) as image:
        runs = [run_of(10, 10, "x"), run_of(9000, 5000, "x")]
        image.apply(runs, 20000 * GRAIN, 1)
        seen = list(image.iter_nonzero_runs(start=15))
        model: Model = {}
        put(model, [run_of(15, 5, "x"), runs[1]])
        found: Model = {}
        put(found, seen)
        assert found == model
        assert all(run.count <= 4096 for run in seen)
        assert list(image.iter_nonzero_runs(start=14000)) == []
        assert image.digests(9000, 2) == digest(("x", 9000)) + digest(("x", 9001))


# -- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs",
    [
        [run_of(5, 2, "x"), run_of(6, 1, "x")],
        [run_of(5, 2, "x"), GrainRun(0, 1, None)],
        [GrainRun(999, 2, None)],
        [GrainRun(0, 0, None)],
        [GrainRun(-1, 1, None)],
        [GrainRun(0, 2, digest("x"))],
    ],
)
def test_runs_out_of_order_or_range_are_refused(tmp_path: Path, runs: list[GrainRun]) -> None:
    with fresh(tmp_path / "map", 1000) as image:
        root = image.root()
        for act in (image.preview, lambda r, size: image.apply(r, size, 1)):
            with pytest.raises(ValueError, match="are not"):
                act(runs, 1000 * GRAIN)
        assert (image.point, image.root()) == (0, root)
    builder = RootBuilder(XXH3, GRAIN, 1000 * GRAIN)
    *fine, wrong = runs
    for run in fine:
        builder.add(run.first, run.digests, run.count)
    with pytest.raises(ValueError, match="are not"):
        builder.add(wrong.first, wrong.digests, wrong.count)


def test_a_disk_never_shrinks(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 1000) as image:
        for act in (image.preview, lambda r, size: image.apply(r, size, 1)):
            with pytest.raises(StateError, match="cannot shrink"):
                act([], 1000 * GRAIN - 1)


def test_a_root_that_was_not_expected_leaves_the_header_alone(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 1000) as image:
        root = image.root()
        with pytest.raises(DamageError, match="root expected"):
            image.apply([run_of(0, 1, "x")], 1000 * GRAIN, 1, expected_root=bytes(32))
        assert (image.point, image.root()) == (0, root)
    with ImageMap.open(tmp_path / "map") as image:
        assert (image.point, image.root()) == (0, root)


@pytest.mark.parametrize(
    ("grain", "size", "point"),
    [
        (2048, 1, 0),
        (5000, 1, 0),
        (1 << 21, 1, 0),
        (4096, 0, 0),
        (4096, (1 << 50) + 1, 0),
        (4096, 1, -1),
        (4096, 1, 1 << 64),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, grain: int, size: int, point: int) -> None:
    with pytest.raises(ValueError, match=r"grain|disk|point"):
        ImageMap.create(tmp_path / "map", XXH3, grain, size, point)
    assert os.listdir(tmp_path) == []


def test_digests_outside_the_disk_are_refused(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 10) as image:
        for first, count in [(-1, 1), (0, 0), (9, 2)]:
            with pytest.raises(ValueError, match="are not within"):
                image.digests(first, count)


def test_a_map_is_not_made_twice(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 10) as image:
        image.apply([run_of(0, 1, "x")], 10 * GRAIN, 1)
    with pytest.raises(StateError, match="already"):
        ImageMap.create(tmp_path / "map", XXH3, GRAIN, GRAIN, 0)
    with ImageMap.open(tmp_path / "map") as image:
        assert image.point == 1


def test_what_is_no_map_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "map"
    with pytest.raises(StateError, match="No such file"):
        ImageMap.open(path)
    for data in (b"", b"RCTLMAP\n", bytes(4096)):
        path.write_bytes(data)
        with pytest.raises(StateError, match="not an image map"):
            ImageMap.open(path)


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (8, b"\0\2", StateError),  # version
        (10, b"\3", DamageError),  # algorithm
        (12, b"\0\0\0\1", DamageError),  # grain
        (16, bytes(8), DamageError),  # disk size
    ],
)
def test_headers_with_impossible_values_are_refused(
    tmp_path: Path, at: int, value: bytes, error: type[ReplicatorError]
) -> None:
    path = tmp_path / "map"
    fresh(path, 10).close()
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    end = layout._FIELDS.size
    data[end : end + 8] = xxhash.xxh3_64_digest(bytes(data[:end]))
    path.write_bytes(data)
    with pytest.raises(error):
        ImageMap.open(path)


# -- crashes ------------------------------------------------------------------------------


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    left = step

    def count_down(name: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed(name, path)

    monkeypatch.setattr(durable, "observe", count_down)


SCATTERED = [run_of(3, 2, "n"), GrainRun(256, 512, None), run_of(65500, 100, "n")]
STORIES: list[tuple[int, list[GrainRun], int, list[GrainRun]]] = [
    # (grains before, what they held, grains after, the apply that is cut short)
    (66000, [run_of(0, 900, "o"), run_of(65000, 1000, "o")], 66000, SCATTERED),
    (256, [run_of(0, 256, "o")], 257, [run_of(256, 1, "n")]),
    (256, [run_of(0, 256, "o")], 257, []),
    (300, [run_of(0, 300, "o")], 65537, [run_of(70, 1, "n"), run_of(65536, 1, "n")]),
    (256, [run_of(0, 256, "o")], 65537, [GrainRun(0, 65537, None)]),
]


@pytest.mark.parametrize("story", STORIES)
def test_an_apply_cut_short_anywhere_is_mended_by_repeating_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    story: tuple[int, list[GrainRun], int, list[GrainRun]],
) -> None:
    before, held, after, runs = story
    path = tmp_path / "map"
    with fresh(path, before) as image:
        old = image.apply(held, before * GRAIN, 1)
        new = image.apply(runs, after * GRAIN, 2)
    expected = content(path)
    step = 0
    while True:
        step += 1
        with fresh(path, before) as image:
            image.apply(held, before * GRAIN, 1)
            kill_at(monkeypatch, step)
            try:
                image.apply(runs, after * GRAIN, 2)
                finished = True
            except Killed:
                finished = False
            monkeypatch.undo()
        with ImageMap.open(path) as image:
            # Killed before the last sync, the header may stand at the new point already.
            assert (image.point, image.root()) in ((1, old), (2, new))
            try:
                assert image.preview(runs, after * GRAIN) == new
            except DamageError as error:
                assert "must be repeated" in str(error)  # noqa: PT017 - either is right
            assert image.apply(runs, after * GRAIN, 2) == new
            assert list(image.check()) == []
        assert content(path) == expected
        if finished:
            break
    assert step >= 4  # at least: a page or none, sync, header, sync, and one that did not die


def test_the_header_is_written_between_two_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(tmp_path / "map", 10) as image:
        seen: list[str] = []
        monkeypatch.setattr(durable, "observe", lambda step, _: seen.append(step))
        image.apply([run_of(0, 1, "x")], 10 * GRAIN, 1)
        assert seen == ["write", "fsync", "write", "fsync"]
        seen.clear()
        image.preview([run_of(0, 10, "x")], 10 * GRAIN)
        assert seen == []


def test_creation_cut_short_leaves_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map"
    for step in range(1, 6):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            ImageMap.create(path, XXH3, GRAIN, GRAIN, 0)
        assert not path.exists()
    monkeypatch.undo()
    ImageMap.create(path, XXH3, GRAIN, GRAIN, 0).close()
    assert os.listdir(tmp_path) == ["map"]


# -- damage -------------------------------------------------------------------------------

DAMAGED_GRAINS = 65536 + 600


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[ImageMap]:
    """Three levels; the second page of level 1 holds little, most of the rest is zeros."""
    runs = [run_of(0, 600, "x"), run_of(65000, 1, "x"), run_of(65700, 400, "x")]
    with fresh(tmp_path / "map", DAMAGED_GRAINS) as image:
        image.apply(runs, DAMAGED_GRAINS * GRAIN, 1)
        assert list(image.check()) == []
        yield image


def flip(path: Path, at: int, bit: int = 0) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        value = os.pread(fd, 1, at) or b"\0"
        os.pwrite(fd, bytes([value[0] ^ (1 << bit)]), at)
    finally:
        os.close(fd)


def test_a_flipped_bit_in_any_page_is_located(whole: ImageMap, tmp_path: Path) -> None:
    path = tmp_path / "map"
    random_bits = random.Random(1)
    places = [(0, 0), (0, 2), (0, 253), (0, 256), (0, 258), (1, 0), (1, 1), (2, 0)]
    for level, index in places:
        size = 8192 if level else 4096
        span = 256 ** (level + 1)
        for _ in range(6):
            at = page_offset(XXH3, level, index) + random_bits.randrange(size)
            bit = random_bits.randrange(8)
            flip(path, at, bit)
            found = list(whole.check())
            assert [(f.level, f.index, f.first, f.count) for f in found] == [
                (level, index, index * span, min(span, DAMAGED_GRAINS - index * span))
            ]
            flip(path, at, bit)
    assert list(whole.check()) == []


def test_a_flipped_bit_anywhere_in_the_header_is_found(whole: ImageMap, tmp_path: Path) -> None:
    for at in [*range(80), 511, 4095]:
        flip(tmp_path / "map", at)
        assert [f.level for f in whole.check()] == [HEADER_LEVEL]
        with pytest.raises(ReplicatorError):
            ImageMap.open(tmp_path / "map")
        flip(tmp_path / "map", at)
    assert list(whole.check()) == []


def test_another_map_s_header_is_found(whole: ImageMap, tmp_path: Path) -> None:
    fresh(tmp_path / "other", 10).close()
    with (tmp_path / "map").open("r+b") as file:
        file.write((tmp_path / "other").read_bytes())
    assert [f.reason for f in whole.check()] == ["changed since it was opened"]


def test_data_where_zeros_should_be_is_found(whole: ImageMap, tmp_path: Path) -> None:
    path = tmp_path / "map"
    flip(path, page_offset(XXH3, 0, 100) + 17)
    assert list(whole.check()) == [Finding(0, 100, 25600, 256, "not zeros, as the node above says")]
    flip(path, page_offset(XXH3, 0, 100) + 17)
    flip(path, page_offset(XXH3, 0, 5000))
    flip(path, page_offset(XXH3, 1, 3))
    assert list(whole.check()) == [
        Finding(1, 3, DAMAGED_GRAINS, 0, "data outside the map"),
        Finding(0, 5000, DAMAGED_GRAINS, 0, "data outside the map"),
    ]
    with fresh(tmp_path / "empty", 300) as image:
        flip(tmp_path / "empty", page_offset(XXH3, 0, 1))
        assert [(f.level, f.index, f.first, f.count) for f in image.check()] == [(0, 1, 256, 44)]


def test_data_outside_the_map_gives_no_runs(tmp_path: Path) -> None:
    with fresh(tmp_path / "map", 300) as image:
        flip(tmp_path / "map", page_offset(XXH3, 0, 5000))
        assert list(image.iter_nonzero_runs()) == []


def test_damage_at_two_levels_is_found_at_both(whole: ImageMap, tmp_path: Path) -> None:
    flip(tmp_path / "map", page_offset(XXH3, 0, 1))
    flip(tmp_path / "map", page_offset(XXH3, 1, 0) + 32)
    assert [(f.level, f.index) for f in whole.check()] == [(1, 0), (0, 1)]


def test_a_preview_does_not_build_on_a_damaged_page(whole: ImageMap, tmp_path: Path) -> None:
    size = DAMAGED_GRAINS * GRAIN
    for level, index in [(0, 1), (1, 0), (2, 0)]:
        flip(tmp_path / "map", page_offset(XXH3, level, index) + 4000)
        with pytest.raises(DamageError, match=f"page {index} of level {level} .* does not fit"):
            whole.preview([run_of(256, 1, "n")], size)
        # A run over the whole page needs nothing of what was there.
        if level == 0:
            whole.preview([run_of(256, 256, "n")], size)
        flip(tmp_path / "map", page_offset(XXH3, level, index) + 4000)
    # So it is for the last page, of which only 88 grains are inside the disk.
    flip(tmp_path / "map", page_offset(XXH3, 0, 258))
    whole.preview([run_of(66048, 88, "n")], size)
    with pytest.raises(DamageError, match="page 258 of level 0"):
        whole.preview([run_of(66048, 87, "n")], size)


def test_damaged_pages_can_be_mended(whole: ImageMap, tmp_path: Path) -> None:
    path = tmp_path / "map"
    root, before = whole.root(), content(path)
    flip(path, page_offset(XXH3, 0, 1) + 5)
    assert not whole.rebuild_nodes()
    whole.apply([run_of(256, 256, "x")], whole.disk_size, whole.point, expected_root=root)
    assert list(whole.check()) == []
    flip(path, page_offset(XXH3, 1, 1) + 5)
    flip(path, page_offset(XXH3, 2, 0) + 5)
    flip(path, page_offset(XXH3, 2, 0) + 3005)
    assert whole.rebuild_nodes()
    assert list(whole.check()) == []
    assert content(path) == before


# -- cost ---------------------------------------------------------------------------------


def test_cost_follows_the_pages_touched_and_not_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grains = 1 << 34  # 1 PiB in grains of 64 KiB
    runs = [run_of(n << 30, 1, "x") for n in range(16)]
    with ImageMap.create(tmp_path / "map", XXH3, 1 << 16, grains << 16, 0) as image:
        seen: list[str] = []
        monkeypatch.setattr(durable, "observe", lambda step, _: seen.append(step))
        image.apply(runs, grains << 16, 1)
        # Levels 0 to 2 have a page for each run, level 3 one for four of them, level 4 one for all.
        assert seen == ["write"] * (3 * 16 + 4 + 1) + ["fsync", "write", "fsync"]


def test_a_full_seed_holds_one_page_a_level() -> None:
    def seed() -> Iterator[GrainRun]:
        for first in range(0, 1 << 18, 1024):
            yield GrainRun(first, 1024, block)

    block = os.urandom(1024 * 16)
    builder = RootBuilder(XXH3, 1 << 16, 1 << 34)
    tracemalloc.start()
    try:
        for run in seed():
            builder.add(run.first, run.digests, run.count)
        builder.root()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 10  # the digests alone are 4 MiB


# -- the whole VM, and the page that defines it all ---------------------------------------


def test_vm_root_is_by_disk_id() -> None:
    disks = [("sdb", 10, b"b" * 32), ("sda", 20, b"a" * 32)]
    expected = hashlib.sha256(
        b"replctl vm root v1\0\0\0\0\2\0\3sda"
        + (20).to_bytes(8, "big")
        + b"a" * 32
        + b"\0\3sdb"
        + (10).to_bytes(8, "big")
        + b"b" * 32
    ).digest()
    assert vm_root(disks) == vm_root(reversed(disks)) == expected
    with pytest.raises(ValueError, match="twice"):
        vm_root([*disks, disks[0]])
    with pytest.raises(ValueError, match="31 bytes"):
        vm_root([("sda", 1, bytes(31))])


def test_the_worked_example_of_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "image-root.md").read_text()
    stated = dict(re.findall(r"^\| (\w[\w ]*?) \| `([0-9a-f]+)` \|$", page, re.MULTILINE))
    plain = b"A" * 65536 + bytes(65536) + b"B" * 100
    digests = XXH3.digest_grains(plain, 65536)
    leaf = hashlib.sha256(b"replctl image leaf v1\0" + digests.ljust(4096, b"\0")).digest()
    builder = RootBuilder(XXH3, 65536, len(plain))
    builder.add(0, digests, 3)
    root = builder.root()
    assert stated == {
        "digest of grain 0": digests[:16].hex(),
        "digest of grain 1": digests[16:32].hex(),
        "digest of grain 2": digests[32:].hex(),
        "top node": leaf.hex(),
        "disk root": root.hex(),
        "VM root": vm_root([("sda", len(plain), root)]).hex(),
    }
    assert root == plain_root(
        XXH3, 65536, len(plain), {n: digests[n * 16 : n * 16 + 16] for n in range(3)}
    )


def test_regions_do_not_overlap() -> None:
    spans = sorted(zip(REGIONS, REGION_ENDS, strict=True))
    assert spans[0][0] >= 4096
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    for level, (start, end) in enumerate(zip(REGIONS, REGION_ENDS, strict=True)):
        last = -(-(1 << 38) // 256 ** (level + 1))
        assert page_offset(BLAKE3, level, last) <= end
        assert start % 8192 == 0
