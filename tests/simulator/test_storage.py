# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.simulator.storage import Region, changed, copy, make_blank

BLOCK = 32768
SIZE = 40 * BLOCK + 512
Writes = list[tuple[int, bytes]]
PIECES = st.tuples(
    st.integers(0, SIZE - 1),
    st.one_of(
        st.binary(min_size=1, max_size=600),
        st.integers(1, 5 * BLOCK).map(bytes),
        st.integers(1, 3 * BLOCK).map(lambda n: b"x" * n),
    ),
)


def write(path: Path, writes: Writes) -> None:
    with path.open("r+b") as file:
        for offset, data in writes:
            file.seek(offset)
            file.write(data[: SIZE - offset])


def all_regions(
    path: Path, reference: Path | None, limit: int = 1000, block: int = BLOCK
) -> list[Region]:
    found: list[Region] = []
    at: int | None = 0
    while at is not None:
        page, going_on = changed(path, reference, at, SIZE, block=block, limit=limit)
        assert len(page) <= limit
        assert going_on is None or going_on > at
        found += page
        at = going_on
    return found


@settings(deadline=None, max_examples=60)
@given(
    first=st.lists(PIECES, max_size=8), second=st.lists(PIECES, max_size=8), limit=st.integers(1, 4)
)
def test_regions_name_every_difference_and_nothing_else(
    first: Writes, second: Writes, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("storage")
    old, new = folder / "old", folder / "new"
    make_blank(old, SIZE)
    write(old, first)
    copy(old, new)
    write(new, second)
    before, after = old.read_bytes(), new.read_bytes()
    regions = all_regions(new, old, limit)
    said: dict[int, bool] = {}
    for offset, length, zeroed in regions:
        assert offset % BLOCK == 0
        for block in range(offset, min(offset + length, SIZE), BLOCK):
            assert block not in said
            said[block] = zeroed
    for block in range(0, SIZE, BLOCK):
        now = after[block : block + BLOCK]
        assert (block in said) == (now != before[block : block + BLOCK])
        if block in said:
            assert said[block] == (not any(now))


@settings(deadline=None, max_examples=40)
@given(writes=st.lists(PIECES, max_size=6), limit=st.integers(1, 3))
def test_a_full_map_leaves_out_no_data(
    writes: Writes, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("storage") / "disk"
    make_blank(path, SIZE)
    write(path, writes)
    content = path.read_bytes()
    at = 0
    for offset, length, zeroed in all_regions(path, None, limit):
        assert offset == at, "the map has gaps"
        at = offset + length
        if zeroed:
            assert not any(content[offset:at])
    assert at >= SIZE


def test_a_copy_is_exact_and_sparse(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make_blank(old, 1 << 30)
    with old.open("r+b") as file:
        for offset in (0, 123 << 20, (1 << 30) - 512):
            file.seek(offset)
            file.write(os.urandom(512))
    copy(old, new, (1 << 30) + 4096)
    assert new.stat().st_size == (1 << 30) + 4096
    assert new.stat().st_blocks * 512 < 1 << 20
    for offset in (0, 123 << 20, (1 << 30) - 512):
        with old.open("rb") as one, new.open("rb") as two:
            assert os.pread(one.fileno(), 512, offset) == os.pread(two.fileno(), 512, offset)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()
