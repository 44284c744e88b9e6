# SPDX-License-Identifier: AGPL-3.0-or-later
"""Work in threads that is begun at once and collected in order, so that digesting overlaps with receiving."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

_cpus: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("restore cpus")


def cpus() -> trio.CapacityLimiter:
    """The limiter of the threads that digest and write images."""
    try:
        return _cpus.get()
    except LookupError:
        limiter = trio.CapacityLimiter(min(4, max(2, os.cpu_count() or 2)))
        _cpus.set(limiter)
        return limiter


class _Slot(Generic[T]):
    __slots__ = ("done", "error", "result")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None
        self.result: T | None = None


class Lane(Generic[T]):
    """Calls in threads, at most ``depth`` under way or not collected; ``collect`` is given their results in the order of the calls.

    An error of a call, or of ``collect``, is raised by the next ``submit`` or by ``drain``. Used by one task at a time; what is
    under way runs in ``nursery``, and ``stop`` waits until none of it is.
    """

    def __init__(
        self, nursery: trio.Nursery, depth: int, collect: Callable[[list[T]], None]
    ) -> None:
        self._nursery = nursery
        self._depth = depth
        self._collect = collect
        self._slots: deque[_Slot[T]] = deque()

    async def submit(self, call: Callable[[], T]) -> None:
        """Begin a call; waits while there are too many."""
        if len(self._slots) >= self._depth:
            await self._take(wait=1)
        slot: _Slot[T] = _Slot()
        self._slots.append(slot)
        self._nursery.start_soon(self._run, call, slot)

    async def drain(self) -> None:
        """Wait for all calls, and collect what they gave."""
        await self._take(wait=len(self._slots))

    async def stop(self) -> None:
        """Wait until no call is under way; what they gave is forgotten. Not cancelled."""
        with trio.CancelScope(shield=True):
            for slot in self._slots:
                await slot.done.wait()
        self._slots.clear()

    async def _take(self, wait: int) -> None:
        """Collect from the front: ``wait`` calls, and those after them that are done already."""
        results: list[T] = []
        while self._slots and (wait > 0 or self._slots[0].done.is_set()):
            slot = self._slots[0]
            await slot.done.wait()
            if slot.error is not None:
                raise slot.error
            self._slots.popleft()
            results.append(slot.result)  # type: ignore[arg-type]
            wait -= 1
        if results:
            await trio.to_thread.run_sync(self._collect, results, limiter=cpus())

    @staticmethod
    async def _run(call: Callable[[], T], slot: _Slot[T]) -> None:
        try:
            # A thread that has begun is waited for: it uses files that are closed afterwards.
            with trio.CancelScope(shield=True):
                slot.result = await trio.to_thread.run_sync(call, limiter=cpus())
        except Exception as error:  # noqa: BLE001 - raised where the result is collected
            slot.error = error
        finally:
            slot.done.set()


__all__ = ["Lane", "cpus"]
