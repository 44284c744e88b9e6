# SPDX-License-Identifier: AGPL-3.0-or-later
"""One loop for all tasks. Time is jumped; the looks are scripted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import trio
import trio.testing

from replicator.prism.errors import PrismTaskError, PrismUnreachableError
from replicator.prism.tasks import TaskState, TaskWatcher

GAPS = (1.0, 2.0, 4.0, 8.0)


class Prism:
    """Tasks that end at a time of their own; a time before zero is a failure at that time."""

    def __init__(self, **ends_s: float) -> None:
        self.began = trio.current_time()
        self.ends_s = ends_s
        self.looks: list[tuple[float, tuple[str, ...]]] = []
        self.unknown_s = 0.0

    @property
    def now(self) -> float:
        return round(trio.current_time() - self.began, 3)

    async def look(self, uuids: Sequence[str]) -> Mapping[str, TaskState | None]:
        self.looks.append((self.now, tuple(uuids)))
        await trio.lowlevel.checkpoint()
        return {uuid: self._state(uuid) for uuid in uuids}

    def _state(self, uuid: str) -> TaskState | None:
        end_s = self.ends_s[uuid]
        if self.now < self.unknown_s:
            return None
        if self.now < abs(end_s):
            return TaskState(uuid, "waiting")
        if end_s < 0:
            return TaskState(uuid, "failed", code="VMM-30303", message="stale")
        return TaskState(uuid, "done", (("vm", "1"), ("disk", "2"), ("disk", "3")))


async def test_gaps_grow(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    prism = Prism(a=20)
    state = await TaskWatcher(prism.look, GAPS, "Prism").wait("a", "create", 100)
    assert [at for at, _ in prism.looks] == [1, 2, 4, 8, 16, 24]
    assert state.entity("vm") == "1"
    assert state.entity("disk") is None  # two: not for us to choose


async def test_one_look_for_all_who_wait(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    prism = Prism(a=2, b=2, c=11)
    watcher = TaskWatcher(prism.look, GAPS, "Prism")
    ended: dict[str, float] = {}

    async def wait(uuid: str) -> None:
        await watcher.wait(uuid, uuid, 100)
        ended[uuid] = prism.now

    async with trio.open_nursery() as nursery:
        for uuid in "abc":
            nursery.start_soon(wait, uuid)
    assert [asked for _, asked in prism.looks] == [
        ("a", "b", "c"),
        ("a", "b", "c"),
        ("c",),
        ("c",),
        ("c",),
    ]
    assert ended == {"a": 2, "b": 2, "c": 16}
    assert watcher.waiting == 0


async def test_one_who_joins_late_is_looked_at_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    prism = Prism(a=30, b=10)
    watcher = TaskWatcher(prism.look, GAPS, "Prism")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watcher.wait, "a", "a", 100)
        await trio.sleep(9)
        await watcher.wait("b", "b", 100)
        assert prism.now == 10
    assert prism.now == 32


async def test_the_first_look_comes_when_such_tasks_usually_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    prism = Prism(a=3.5, b=7.5, c=11)
    watcher = TaskWatcher(prism.look, GAPS, "Prism")
    for uuid in "abc":
        await watcher.wait(uuid, "create", 100)
    assert [at for at, asked in prism.looks if asked == ("a",)] == [1, 2, 4]
    assert [at for at, asked in prism.looks if asked == ("b",)] == [8]
    assert [at for at, asked in prism.looks if asked == ("c",)] == [11]


async def test_a_leader_that_is_cancelled_hands_on(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    prism = Prism(a=100, b=5, c=6)
    watcher = TaskWatcher(prism.look, GAPS, "Prism")
    ended: list[str] = []

    async def wait(uuid: str, scope: trio.CancelScope) -> None:
        with scope:
            await watcher.wait(uuid, uuid, 100)
            ended.append(uuid)

    scopes = {uuid: trio.CancelScope() for uuid in "abc"}
    async with trio.open_nursery() as nursery:
        for uuid in "abc":
            nursery.start_soon(wait, uuid, scopes[uuid])
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(2.5)
        scopes["a"].cancel()
        scopes["b"].cancel()  # the heir, before it could begin
    assert ended == ["c"]
    assert watcher.waiting == 0


async def test_a_failure_is_told_with_its_code(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    prism = Prism(a=-1)
    with pytest.raises(PrismTaskError, match="create a VM: task a failed: stale") as caught:
        await TaskWatcher(prism.look, GAPS, "Prism").wait("a", "create a VM", 100)
    assert caught.value.code == "VMM-30303"
    assert not caught.value.timed_out


async def test_each_has_a_deadline_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    prism = Prism(a=1e9, b=20)
    watcher = TaskWatcher(prism.look, GAPS, "Prism")

    async def stuck() -> None:
        with pytest.raises(PrismTaskError, match="within 10 s") as caught:
            await watcher.wait("a", "a", 10)
        assert caught.value.timed_out
        assert prism.now == 10

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stuck)
        nursery.start_soon(watcher.wait, "b", "b", 100)


@pytest.mark.parametrize(("unknown_s", "fine"), [(9.0, True), (1000.0, False)])
async def test_a_new_task_may_be_unknown_for_a_moment(
    unknown_s: float, autojump_clock: trio.testing.MockClock, *, fine: bool
) -> None:
    del autojump_clock
    prism = Prism(a=9)
    prism.unknown_s = unknown_s
    wait = TaskWatcher(prism.look, GAPS, "Prism")
    if fine:
        assert (await wait.wait("a", "a", 100)).status == "done"
    else:
        with pytest.raises(PrismTaskError, match="does not know"):
            await wait.wait("a", "a", 100)
        assert prism.now == 16


async def test_an_error_of_a_look_reaches_whoever_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock

    async def look(uuids: Sequence[str]) -> Mapping[str, TaskState | None]:
        await trio.lowlevel.checkpoint()
        raise PrismUnreachableError(f"no {uuids[0]}")

    watcher = TaskWatcher(look, GAPS, "Prism")
    caught: list[str] = []

    async def wait(uuid: str) -> None:
        try:
            await watcher.wait(uuid, uuid, 100)
        except PrismUnreachableError:
            caught.append(uuid)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a")
        nursery.start_soon(wait, "b")
    assert sorted(caught) == ["a", "b"]


async def test_a_kind_that_was_not_seen_yet_is_guessed_from_the_last_task(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    prism = Prism(a=2.5, b=5.9, c=100.0, d=200.0)
    watcher = TaskWatcher(prism.look, GAPS, "Prism")
    await watcher.wait("a", "create", 100)
    await watcher.wait("b", "attach", 100)
    assert [at for at, _ in prism.looks] == [1, 2, 4, 8]  # 4 + at most 4
    prism.looks.clear()
    await watcher.wait("c", "copy", 200)
    prism.looks.clear()
    began = prism.now
    await watcher.wait("d", "delete", 200)
    assert prism.looks[0][0] - began == 4
