# SPDX-License-Identifier: AGPL-3.0-or-later
"""A nursery whose failure is one error, not a group: callers catch the error that they know."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def flat_nursery() -> AsyncIterator[trio.Nursery]:
    """As ``trio.open_nursery``; the first error inside ends all of it and is raised as it is.

    Further errors are named in its notes. An error that is no Exception (a cancellation, an interrupt) goes first.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        first, *others = sorted(_leaves(group), key=lambda error: isinstance(error, Exception))
        for other in others:
            if (type(other), str(other)) == (type(first), str(first)):
                continue  # several tasks met the same thing
            first.add_note(f"also: {type(other).__name__}: {other}")
        raise first from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
