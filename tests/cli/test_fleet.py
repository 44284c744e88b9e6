# SPDX-License-Identifier: AGPL-3.0-or-later
"""The loops of many VMs by a clock of their own: how many at once, who comes and goes, what a failover ends."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import UUID

import pytest
import trio
import trio.testing

from receiver.store.admission import PushRefusedHereError
from receiver.store.stores import Stores
from replicator.cli import fleet as fleets
from replicator.cli.fleet import Fleet
from replicator.cli.source import ChosenVm
from replicator.config import Config, check
from replicator.errors import FencedError, PeerRefusedError, RefusedError, SourceError, UsageError
from replicator.push.plan import Want

Push = Callable[[str], Awaitable[None]]
INTERVAL_S = 300


class FakePusher:
    """Pushes as the test says. ``most``: how many of all VMs ever ran at the same time."""

    body: Push
    made: ClassVar[Counter[str]] = Counter()
    running: ClassVar[Counter[str]] = Counter()
    most = 0

    def __init__(self, *_: Any, vm: UUID, **__: Any) -> None:
        self.name = f"vm{vm.int}"
        self.under_way = None
        self.reconnects: dict[str, int] = {}
        FakePusher.made[self.name] += 1

    async def push(self, want: Want) -> None:
        assert want is Want.RUN
        FakePusher.running[self.name] += 1
        FakePusher.most = max(FakePusher.most, FakePusher.running.total())
        assert FakePusher.running[self.name] == 1, "two pushes of one VM at once"
        try:
            await FakePusher.body(self.name)
        finally:
            FakePusher.running[self.name] -= 1


class Listed:
    """``OpenSources`` that a test changes."""

    def __init__(self, config: Config, *numbers: int) -> None:
        self.config = config
        self.numbers = list(numbers)
        self.error: Exception | None = None

    async def select(self) -> list[ChosenVm]:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return [
            ChosenVm(f"vm{number}", f"vm{number}", UUID(int=number), None, self.config)  # type: ignore[arg-type]
            for number in self.numbers
        ]


async def without_threads(*_: Config) -> None:
    """The clock would jump ahead of them."""
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def protecting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: Push,
    *numbers: int,
    at_once: int = 2,
) -> AsyncIterator[tuple[Listed, trio.Event, list[BaseException]]]:
    """A fleet that runs: its VMs, when it has ended, and of what."""
    monkeypatch.setattr(fleets, "Pusher", FakePusher)
    monkeypatch.setattr(fleets, "make_work_dir", without_threads)
    monkeypatch.setattr(random, "random", lambda: 0.0)
    FakePusher.body, FakePusher.most = staticmethod(body), 0
    FakePusher.made.clear()
    FakePusher.running.clear()
    values = {"state_dir": str(tmp_path), "push_interval": str(INTERVAL_S)}
    config = check({**values, "concurrent_vms": str(at_once), "source": "nutanix"})
    listed = Listed(config, *numbers)
    fleet = Fleet(config, None, None, listed, 1.0)  # type: ignore[arg-type]
    ended, errors = trio.Event(), list[BaseException]()

    async def protect() -> None:
        try:
            await fleet.protect()
        except (RefusedError, UsageError) as error:
            errors.append(error)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(protect)
        yield listed, ended, errors
        nursery.cancel_scope.cancel()


async def test_no_more_at_once_than_allowed_and_every_one_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    done: Counter[str] = Counter()

    async def body(name: str) -> None:
        await trio.sleep(10)
        done[name] += 1
        if name == "vm3":
            raise SourceError("of no use")

    async with protecting(tmp_path, monkeypatch, body, *range(1, 8), at_once=3):
        await trio.sleep(2 * INTERVAL_S + 100)
    assert FakePusher.most == 3
    assert done == {f"vm{number}": 3 for number in range(1, 8)}
    assert set(FakePusher.made.values()) == {1}


async def test_a_slow_one_keeps_no_other_waiting_past_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    done: Counter[str] = Counter()

    async def body(name: str) -> None:
        await trio.sleep(100_000 if name == "vm1" else 1)
        done[name] += 1

    async with protecting(tmp_path, monkeypatch, body, 1, 2):
        await trio.sleep(10 * INTERVAL_S + 100)
    assert done == {"vm2": 11}


async def test_one_that_is_gone_ends_its_push_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    done: Counter[str] = Counter()

    async def body(name: str) -> None:
        await trio.sleep(500 if name == "vm1" else 1)
        done[name] += 1

    async with protecting(tmp_path, monkeypatch, body, 1, 2) as (listed, _, _):
        await trio.sleep(100)
        listed.numbers = []
        await trio.sleep(2 * INTERVAL_S)
        # vm1 was in the middle of a push when that was seen; vm2 may just have begun one.
        assert done["vm1"] == 1
        seen = done["vm2"]
        await trio.sleep(10 * INTERVAL_S)
        assert done == {"vm1": 1, "vm2": seen}
        listed.numbers = [2]
        await trio.sleep(INTERVAL_S)
        assert done == {"vm1": 1, "vm2": seen + 1}


async def test_one_that_comes_back_in_the_middle_of_its_push_has_no_second_pusher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    done: Counter[str] = Counter()

    async def body(name: str) -> None:
        await trio.sleep(1000)
        done[name] += 1

    async with protecting(tmp_path, monkeypatch, body, 1) as (listed, _, _):
        await trio.sleep(100)
        listed.numbers = []
        await trio.sleep(INTERVAL_S)
        listed.numbers = [1]
        await trio.sleep(10 * INTERVAL_S)
    assert FakePusher.made == {"vm1": 1}
    assert done["vm1"] >= 3


async def test_a_fenced_one_stops_alone_and_only_when_all_are_it_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del autojump_clock
    tried: Counter[str] = Counter()
    failed_over = {"vm1"}

    async def body(name: str) -> None:
        await trio.lowlevel.checkpoint()
        tried[name] += 1
        if name in failed_over:
            raise FencedError(f"{name} is in epoch 2")

    async with protecting(tmp_path, monkeypatch, body, 1, 2) as (_, ended, errors):
        await trio.sleep(3 * INTERVAL_S + 1)
        assert tried == {"vm1": 1, "vm2": 4}
        assert "it is not pushed any more: vm1 is in epoch 2" in caplog.text
        assert not ended.is_set()
        failed_over.add("vm2")
        await ended.wait()
        assert [str(error) for error in errors] == ["vm2 is in epoch 2"]


async def test_a_refusal_begins_with_whose_it_is_and_says_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where its text, which is the receiver's own, names the VM in passing."""
    del autojump_clock
    there: Any = SimpleNamespace(_log=SimpleNamespace(vms=[SimpleNamespace(name="vm1", vm="5504")]))

    async def body(name: str) -> None:
        await trio.lowlevel.checkpoint()
        with pytest.raises(PushRefusedHereError) as refused:
            Stores._check_name(there, UUID(int=1), name)
        raise PeerRefusedError(refused.value.code, refused.value.reason)

    async with protecting(tmp_path, monkeypatch, body, 1):
        await trio.sleep(1)
    (line,) = [text for text in caplog.messages if "this cycle failed" in text]
    assert line == (
        "vm1: this cycle failed: the receiver refused: another VM (5504) is called vm1 here already:"
        " rename one of them on the platform, or leave this one out (exclude)"
    )


async def test_that_nobody_can_say_which_there_are_ends_it_only_at_first_and_if_it_is_a_mistake(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del autojump_clock
    done: Counter[str] = Counter()

    async def body(name: str) -> None:
        await trio.lowlevel.checkpoint()
        done[name] += 1

    async with protecting(tmp_path, monkeypatch, body, 1) as (listed, ended, errors):
        listed.error = SourceError("Prism is away")
        await trio.sleep(INTERVAL_S - 1)
        assert (done, ended.is_set()) == ({}, False)
        listed.error = None
        await trio.sleep(2)
        assert done == {"vm1": 1}
        listed.error = UsageError("vm: two of them")
        await trio.sleep(2 * INTERVAL_S)
        assert (done, ended.is_set(), errors) == ({"vm1": 3}, False, [])
    assert caplog.text.count("which VMs there are cannot be seen: ") == 3

    async with protecting(tmp_path, monkeypatch, body, 1) as (listed, ended, errors):
        listed.error = UsageError("vm: chooses none")
        await ended.wait()
        assert [str(error) for error in errors] == ["vm: chooses none"]
