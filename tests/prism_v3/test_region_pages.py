# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pages of regions, however they are cut, come to what one page of all of them would be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.disk import Extent, normalise
from replicator.prism.errors import PrismAnswerError
from replicator.prism.region_pages import RegionPages

UNIT = 4096
UNITS = 256
SIZE = UNIT * UNITS

regions = st.lists(
    st.builds(
        lambda at, length, zero: Extent(at * UNIT, length * UNIT, zero=zero),
        st.integers(0, UNITS - 1),
        st.integers(1, 40),
        st.booleans(),
    ),
    max_size=12,
)


def spread(
    pages: RegionPages, given_regions: list[Extent], cuts: list[int]
) -> list[tuple[int, Extent]]:
    """What comes out, with the page's number; each page holds whole regions that touch it, as servers that widen send them."""
    found = []
    borders = [0, *cuts, SIZE]
    for number, (start, end) in enumerate(pairwise(borders)):
        inside = [each for each in given_regions if each.offset < end and each.end > start]
        clipped = [
            Extent(max(each.offset, start), each.end - max(each.offset, start), each.zero)
            for each in inside
        ]
        following = end if end < SIZE else None
        found += [(number, each) for each in pages.take(clipped, following, SIZE)]
    assert pages.done
    return found


def joined(extents: list[Extent]) -> list[Extent]:
    return normalise(extents, SIZE)


@given(regions, st.lists(st.integers(1, UNITS - 1), unique=True, max_size=5))
def test_pages_do_not_change_what_changed(given_regions: list[Extent], cuts: list[int]) -> None:
    pages = RegionPages("it", None)
    found = [each for _, each in spread(pages, given_regions, sorted(cut * UNIT for cut in cuts))]
    for first, second in pairwise(found):
        assert first.end <= second.offset
    assert joined(found) == normalise(given_regions, SIZE)


@given(
    regions,
    st.lists(st.integers(1, UNITS - 1), unique=True, max_size=5),
    st.integers(0, UNITS),
)
def test_what_a_disk_grew_by_is_changed_told_or_not(
    given_regions: list[Extent], cuts: list[int], old_units: int
) -> None:
    old_size = old_units * UNIT
    pages = RegionPages("it", old_size)
    found = [each for _, each in spread(pages, given_regions, sorted(cut * UNIT for cut in cuts))]
    for first, second in pairwise(found):
        assert first.end <= second.offset
    told = normalise(given_regions, SIZE)
    covered = normalise([Extent(each.offset, each.length) for each in found], SIZE)
    wanted = [Extent(each.offset, each.length) for each in told]
    if old_size < SIZE:
        wanted.append(Extent(old_size, SIZE - old_size))
    assert covered == normalise(wanted, SIZE)
    # And what is told to be zeros stays zeros.
    zeros = [each for each in told if each.zero]
    assert all(any(out.zero and out.offset <= each.offset and each.end <= out.end
                   for out in joined(found)) for each in zeros)  # fmt: skip


@pytest.mark.parametrize(
    ("page", "match"),
    [
        (([], 8191, SIZE), "is to begin at 8191"),
        (([], 8192 + 511, SIZE), "is to begin at"),
        (([], 16384, SIZE + 1), "after one of"),
        (([Extent(SIZE + 262144, 1)], None, SIZE), "outside what was asked"),
    ],
)
def test_pages_that_contradict_each_other(
    page: tuple[list[Extent], int | None, int], match: str
) -> None:
    pages = RegionPages("disk 1", None)
    pages.take([], 8192, SIZE)
    with pytest.raises(PrismAnswerError, match=match):
        pages.take(*page)


def test_a_region_behind_the_page_is_not_of_it() -> None:
    pages = RegionPages("disk 1", None)
    pages.take([], 600000, SIZE)
    with pytest.raises(PrismAnswerError, match="region at 0"):
        pages.take([Extent(0, 4096)], None, SIZE)
