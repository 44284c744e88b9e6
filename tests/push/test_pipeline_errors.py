# SPDX-License-Identifier: AGPL-3.0-or-later
"""An error while a disk is read must never look like the disk's end: the push would be committed without the rest."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import trio

from replicator.errors import SourceError
from replicator.push.pipeline import ordered


async def _items(count: int, pause: bool) -> AsyncGenerator[int, None]:
    for number in range(count):
        yield number
        if pause:
            await trio.lowlevel.checkpoint()
    raise SourceError("the extents cannot be told")


async def _same(item: int) -> int:
    await trio.lowlevel.checkpoint()
    return item


async def _read_all(
    items: AsyncGenerator[int, None], work: Callable[[int], Awaitable[int]]
) -> list[int]:
    async with ordered(items, work, 6) as results:
        return [item async for item in results]


@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
async def test_an_error_of_the_extents_is_raised(count: int, pause: bool) -> None:
    for _ in range(20):  # trio runs tasks of one moment in an order of its own
        with pytest.raises(SourceError, match="cannot be told"):
            await _read_all(_items(count, pause), _same)


async def test_an_error_of_the_work_is_raised() -> None:
    async def fail_at_two(item: int) -> int:
        await trio.lowlevel.checkpoint()
        if item == 2:
            raise SourceError("a bad sector")
        return item

    async def endless() -> AsyncGenerator[int, None]:
        number = 0
        while True:
            yield number
            number += 1

    with pytest.raises(SourceError, match="a bad sector"):
        await _read_all(endless(), fail_at_two)
