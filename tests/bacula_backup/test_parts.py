# SPDX-License-Identifier: AGPL-3.0-or-later
"""The small pieces: rows of extents laid over each other, pieces cut at zeros, copies of maps."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backup.disks import merged
from bacula_adapter.backup.maps import ChainMaps, MapFeed
from bacula_adapter.backup.reading import Piece, data_runs
from replicator.disk import Extent, normalise
from replicator.imagemap import ImageMap
from replicator.phcbt.format import Algorithm, GrainRun
from tests.bacula_backup.lab import GRAIN, root_of

SIZE = 40
ROWS = st.lists(
    st.builds(Extent, st.integers(0, SIZE - 1), st.integers(1, 9), st.booleans()), max_size=8
)


async def row(extents: list[Extent]) -> AsyncGenerator[Extent, None]:
    for extent in extents:
        await trio.lowlevel.checkpoint()
        yield extent


def cells(extents: list[Extent]) -> dict[int, bool]:
    """Zero or not, byte by byte; no byte twice."""
    found: dict[int, bool] = {}
    for extent in extents:
        for at in range(extent.offset, extent.end):
            assert at not in found
            assert not found or at > max(found)
            found[at] = extent.zero
    return found


@given(ROWS, ROWS)
def test_two_rows_as_one(first: list[Extent], second: list[Extent]) -> None:
    one, other = normalise(first, SIZE), normalise(second, SIZE)

    async def run() -> list[Extent]:
        return [extent async for extent in merged(row(one), row(other))]

    assert cells(trio.run(run)) == cells(other) | cells(one)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, GRAIN))
def test_a_piece_is_cut_at_its_zeros(used: list[bool], tail: int) -> None:
    data = b"".join(b"x" * GRAIN if each else bytes(GRAIN) for each in used)
    data = data[: len(data) - GRAIN + tail]
    digests = Algorithm.XXH3_128.digest_grains(data, GRAIN)
    piece = Piece(Extent(GRAIN, len(data)), memoryview(data), digests)
    whole = bytearray(len(data))
    last = -1
    for offset, part in data_runs(piece, GRAIN, 16):
        assert offset > last
        assert any(part)
        last = offset + len(part)  # two stretches never touch
        whole[offset - GRAIN : last - GRAIN] = part
    assert whole == data
    assert sum(len(part) for _, part in data_runs(piece, GRAIN, 16)) == sum(
        (tail if index == len(used) - 1 else GRAIN) for index, each in enumerate(used) if each
    )


@pytest.mark.parametrize("clones", [True, False])
async def test_a_map_is_copied(
    clones: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system cannot clone, hole by hole: a map is 64 GiB long and holds next to nothing."""
    real = fcntl.ioctl

    def ioctl(*words: object) -> object:
        if not clones:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(*words)  # type: ignore[call-overload]

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    image = bytearray(600 * GRAIN)
    image[5 * GRAIN] = image[599 * GRAIN] = 1
    maps = ChainMaps(tmp_path / "maps")
    maps.begin("aaaaaaaa")
    maps.begin("bbbbbbbb")
    made = maps.create("aaaaaaaa", "disk-0", Algorithm.XXH3_128, GRAIN, len(image))
    feed = MapFeed(made, len(image), 1)
    await feed.put(GrainRun(0, 600, Algorithm.XXH3_128.digest_grains(image, GRAIN)))
    root = await feed.finish()
    feed.close()
    assert root == root_of(bytes(image))
    copied = maps.copy("aaaaaaaa", "bbbbbbbb", "disk-0")
    feed = MapFeed(copied, len(image), 2)
    image[300 * GRAIN] = 1
    digests = Algorithm.XXH3_128.digest_grains(image[300 * GRAIN : 301 * GRAIN], GRAIN)
    await feed.put(GrainRun(300, 1, digests))
    assert await feed.finish() == root_of(bytes(image))
    feed.close()
    with ImageMap.open(maps.path("aaaaaaaa", "disk-0")) as old:
        assert old.root() == root
    with ImageMap.open(maps.path("bbbbbbbb", "disk-0")) as new:
        assert list(new.check()) == []
        assert (new.point, new.root()) == (2, root_of(bytes(image)))
    assert maps.path("bbbbbbbb", "disk-0").stat().st_blocks * 512 < 1 << 20
    maps.keep({"bbbbbbbb"})
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["bbbbbbbb"]
