# SPDX-License-Identifier: AGPL-3.0-or-later
"""The extent algebra against a model that holds one letter for each byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.disk import Extent, normalise, split, widen

SIZE_MAX = 70
bounded = settings(max_examples=400, deadline=None, derandomize=True)

extents_any = st.lists(
    st.builds(
        Extent,
        offset=st.integers(0, SIZE_MAX),
        length=st.integers(1, 30),
        zero=st.booleans(),
    ),
    max_size=8,
)
sizes = st.integers(1, SIZE_MAX)
grains = st.sampled_from([1, 2, 4, 8, 16])


def painted(extents: list[Extent], size: int) -> str:
    """One letter a byte: ``.`` untouched, ``z`` zero, ``d`` data; data wins."""
    letters = ["."] * size
    for extent in extents:
        for at in range(extent.offset, min(extent.end, size)):
            letters[at] = "z" if extent.zero and letters[at] != "d" else "d"
    return "".join(letters)


def assert_ascending_coalesced(extents: list[Extent]) -> None:
    for before, after in itertools.pairwise(extents):
        assert before.end <= after.offset
        assert before.end < after.offset or before.zero != after.zero


@st.composite
def disjoint_extents(draw: st.DrawFn) -> list[Extent]:
    """Ascending and disjoint; neighbours of one kind stay apart, some lie beyond the disk."""
    at = 0
    result: list[Extent] = []
    steps = st.tuples(st.integers(0, 20), st.integers(1, 20), st.booleans())
    for gap, length, zero in draw(st.lists(steps, max_size=10)):
        result.append(Extent(at + gap, length, zero))
        at += gap + length
    return result


@bounded
@given(extents_any, sizes)
def test_normalise_keeps_each_byte_s_claim_and_data_wins(extents: list[Extent], size: int) -> None:
    result = normalise(extents, size)
    assert painted(result, size) == painted(extents, size)
    assert_ascending_coalesced(result)
    assert all(extent.end <= size for extent in result)


@bounded
@given(disjoint_extents(), grains, sizes)
def test_widen_agrees_with_the_byte_model(extents: list[Extent], grain: int, size: int) -> None:
    before = painted(extents, size)
    expected = ""
    for start in range(0, size, grain):
        claims = set(before[start : start + grain])
        letter = "." if claims == {"."} else "z" if claims == {"z"} else "d"
        expected += letter * len(before[start : start + grain])
    result = list(widen(extents, grain, size))
    assert painted(result, size) == expected
    assert_ascending_coalesced(result)
    for extent in result:
        assert extent.offset % grain == 0
        assert extent.end % grain == 0 or extent.end == size


@bounded
@given(extents_any, grains, sizes)
def test_widen_takes_what_normalise_gives(extents: list[Extent], grain: int, size: int) -> None:
    result = painted(list(widen(normalise(extents, size), grain, size)), size)
    for wide, narrow in zip(result, painted(extents, size), strict=True):
        # Covered stays covered, data stays data.
        assert narrow == "." or wide in (narrow, "d")


@bounded
@given(disjoint_extents(), st.integers(1, 32))
def test_split_never_crosses_a_chunk_border(extents: list[Extent], chunk: int) -> None:
    result = list(split(extents, chunk))
    size = max((extent.end for extent in extents), default=1)
    assert painted(result, size) == painted(extents, size)
    assert all(piece.offset // chunk == (piece.end - 1) // chunk for piece in result)
    assert sum(piece.length for piece in result) == sum(extent.length for extent in extents)


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        # A zero extent, then data in the same grain.
        ([Extent(0, 6, zero=True), Extent(6, 1)], [Extent(0, 4, zero=True), Extent(4, 4)]),
        # Several extents in a single grain, zero only if all of it is claimed.
        ([Extent(4, 1, zero=True), Extent(6, 2, zero=True)], [Extent(4, 4)]),
        ([Extent(4, 2, zero=True), Extent(6, 2, zero=True)], [Extent(4, 4, zero=True)]),
        # The last grain ends at the disk's size, and so does the claim that it needs.
        ([Extent(8, 2, zero=True)], [Extent(8, 2, zero=True)]),
        ([Extent(8, 1, zero=True)], [Extent(8, 2)]),
        ([Extent(8, 99)], [Extent(8, 2)]),
        ([Extent(10, 1)], []),
    ],
)
def test_widen_at_its_corners(extents: list[Extent], expected: list[Extent]) -> None:
    assert list(widen(extents, 4, 10)) == expected


def test_widen_holds_one_extent_at_a_time() -> None:
    taken = 0

    def feed() -> Iterator[Extent]:
        nonlocal taken
        for index in range(1000):
            taken += 1
            yield Extent(index * 8, 1)

    first = next(widen(feed(), 4, 8000))
    assert first == Extent(0, 4)
    assert taken <= 3


@pytest.mark.parametrize("second", [Extent(3, 1), Extent(0, 1)])
def test_widen_refuses_what_is_not_ascending(second: Extent) -> None:
    with pytest.raises(ValueError, match="after one that ends at 4"):
        list(widen([Extent(0, 4), second], 4, 100))


def test_sizes_that_cut_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="grain of 0"):
        list(widen([], 0, 10))
    with pytest.raises(ValueError, match="chunk of 0"):
        list(split([], 0))
    with pytest.raises(ValueError, match="extent of 0 bytes"):
        Extent(0, 0)
    with pytest.raises(ValueError, match="at -1"):
        Extent(-1, 1)
