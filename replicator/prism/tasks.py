# SPDX-License-Identifier: AGPL-3.0-or-later
"""Waiting for Prism's tasks: one loop looks at all that somebody waits for, with growing gaps.

Whoever waits looks for all who wait, and hands that duty on when its own task has ended: so there is no task in the background,
and a cancelled wait harms nobody. What a look is, is the API's (v3: ``/tasks/poll``; v4: ``/config/tasks``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from replicator.prism.errors import PrismTaskError

#: A task that was just started may be unknown for so long.
UNKNOWN_S = 10.0
#: Tasks that are due within this time of each other are looked at together.
_TOGETHER_S = 0.5
#: How a first gap that was long enough shrinks the next time.
_SHRINK = 0.75
_USUAL_MAX = 100
_GAP_MAX_S = 8.0
#: The first look at a task of a kind that was not seen yet comes after this at the latest.
_GUESS_MAX_S = 4.0


@dataclass(frozen=True, slots=True)
class TaskState:
    """A task as it was seen. ``entities``: (kind, id) as Prism calls them; ``details``: by name. The rest: why it failed."""

    uuid: str
    status: Literal["waiting", "done", "failed"]
    entities: tuple[tuple[str, str], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None
    words: frozenset[str] = frozenset()
    message: str = ""

    def entity(self, kind: str) -> str | None:
        """The id of the entity of that kind, None unless there is just one."""
        found = {uuid for rel, uuid in self.entities if rel == kind}
        return found.pop() if len(found) == 1 else None


#: Looks at tasks: their states, None for one that Prism does not know. Raises PrismError.
Look = Callable[[Sequence[str]], Awaitable[Mapping[str, TaskState | None]]]


@dataclass(slots=True, eq=False)
class _Waiting:
    uuid: str
    since: float
    due: float
    first_s: float
    looks: int = 0
    state: TaskState | None = None
    wake: trio.Event = field(default_factory=trio.Event)


class TaskWatcher:
    """Waits for tasks of one host. ``gaps_s``: between looks, the last again and again. ``where``: for messages."""

    def __init__(self, look: Look, gaps_s: Sequence[float], where: str) -> None:
        self._look = look
        self._gaps_s = tuple(gaps_s)
        self._where = where
        self._waiting: list[_Waiting] = []
        self._leader: _Waiting | None = None
        self._more = trio.Event()  # set when somebody joins who is due earlier
        self._usual_s: dict[str, float] = {}
        self._last_s = 0.0  # what the last task took, of whatever kind

    async def wait(self, uuid: str, what: str, timeout_s: float) -> TaskState:
        """The task's last state, once it has ended well. ``what``: the kind of work, as in "create a snapshot".

        Raises PrismTaskError: failed (with Prism's code), or not ended within ``timeout_s`` (``timed_out``); and what looks
        raise. Cancelled, the task itself goes on.
        """
        now = trio.current_time()
        usual_s = self._usual_s.get(what, min(self._last_s, _GUESS_MAX_S))
        first_s = max(self._gaps_s[0], min(usual_s, _GAP_MAX_S))
        waiting = _Waiting(uuid, now, now + first_s, first_s)
        self._waiting.append(waiting)
        self._more.set()
        try:
            with trio.move_on_at(now + timeout_s):
                await self._until_ended(waiting)
        finally:
            self._waiting.remove(waiting)
            self._hand_on()
        state = waiting.state
        if state is None:
            raise PrismTaskError(
                f"{self._where}: {what}: task {uuid} did not end within {timeout_s:g} s;"
                " what became of it is not known",
                timed_out=True,
            )
        self._learn(what, waiting)
        if state.status == "failed":
            error = PrismTaskError(
                f"{self._where}: {what}: task {uuid} failed: {state.message or 'no reason given'}",
                state.code,
            )
            error.words = state.words
            raise error
        return state

    async def _until_ended(self, waiting: _Waiting) -> None:
        while waiting.state is None:
            if self._leader is not None:
                waiting.wake = trio.Event()
                await waiting.wake.wait()
                continue
            self._leader = waiting
            try:
                while waiting.state is None:
                    await self._round()
            finally:
                self._leader = None

    def _hand_on(self) -> None:
        """Whoever leaves, led or was about to: somebody else must look."""
        if self._leader is None:
            heir = next((one for one in self._waiting if one.state is None), None)
            if heir is not None:
                heir.wake.set()

    async def _round(self) -> None:
        """Sleep until a task is due, and look at all that are due by then."""
        open_ones = [one for one in self._waiting if one.state is None]
        due = min(one.due for one in open_ones)
        if due > trio.current_time():
            self._more = trio.Event()
            with trio.move_on_at(due):
                await self._more.wait()
            return
        now = trio.current_time()
        together = [one for one in open_ones if one.due <= now + _TOGETHER_S]
        states = await self._look(sorted({one.uuid for one in together}))
        now = trio.current_time()
        for one in together:
            self._take(one, states.get(one.uuid), now)

    def _take(self, one: _Waiting, state: TaskState | None, now: float) -> None:
        if state is not None and state.status != "waiting":
            one.state = state
            one.wake.set()
            return
        if state is None and now - one.since > UNKNOWN_S:
            one.state = TaskState(one.uuid, "failed", message="Prism does not know the task")
            one.wake.set()
            return
        one.due = now + self._gaps_s[min(one.looks, len(self._gaps_s) - 1)]
        one.looks += 1

    def _learn(self, what: str, waiting: _Waiting) -> None:
        """Tasks of a kind take much the same time: the first look comes when the last one had ended."""
        took_s = waiting.first_s * _SHRINK
        if waiting.looks:
            took_s = trio.current_time() - waiting.since
        self._last_s = took_s
        if what in self._usual_s or len(self._usual_s) < _USUAL_MAX:
            self._usual_s[what] = took_s

    @property
    def waiting(self) -> int:
        """How many are waited for."""
        return len(self._waiting)
