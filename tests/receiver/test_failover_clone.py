# SPDX-License-Identifier: AGPL-3.0-or-later
"""Test clones: what they are made of, what is refused, and that nothing is left whatever fails."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from eventstore import environment
from receiver.failover.clone import CloneManager
from receiver.failover.machine import Machine
from replicator import durable
from replicator.domain.failover import State
from replicator.errors import RefusedError, StateError
from replicator.sources.qmp import QmpGoneError, open_qmp
from tests.limits import HANG_S
from tests.receiver.clone_lab import (
    check_clone_content,
    children,
    clone_manager,
    contents,
    leftovers,
    no_steps,
    only_programs,
    script,
)
from tests.receiver.store_lab import Image, StoreFixture, open_store

GRAIN = 4096


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with qemu-img alone: clones are made and not booted."""
    return only_programs(monkeypatch, tmp_path / "bin", "qemu-img")


async def test_overlays_take_the_writes_and_read_the_point_wherever_it_lies(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_programs(monkeypatch, tmp_path / "bin", "qemu-img", "qemu-io")
    odd = state_dir / "a b,c&d%20"
    odd.mkdir()
    content = b"x" * GRAIN + b"y" * GRAIN + noise(5 * GRAIN + 512, 1)
    async with open_store(odd) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": content})
        steps: list[str] = []
        result = await manager.start_test(fixture.store, None, steps.append)
        assert steps == ["point 1 is served", "overlays are made", "the test is recorded"]
        assert (result["vm"], result["point"], result["booted"]) == ("vm-a", 1, False)
        assert "install the package qemu-system-x86" in result["reason"]
        assert manager.report(fixture.store) == result
        overlay = result["disks"][0]["overlay"]
        commands = ["write -P 0xaa 4096 4096", "read -P 0x78 0 4096", "read -P 0xaa 4096 4096"]
        for command in commands:
            done = await trio.run_process(
                ["qemu-io", "-f", "qcow2", "-c", command, overlay], capture_stdout=True
            )
            assert b"verification failed" not in done.stdout
        await check_clone_content(fixture, result)
        undone = await manager.undo_test(fixture.store, no_steps)
        assert undone == {"vm": "vm-a", "clone": result["clone"]}
        assert await leftovers(fixture) == []
        await fixture.check_point(1)


@pytest.mark.usefixtures("no_qemu")
async def test_a_running_clone_holds_its_point_against_retention(state_dir: Path) -> None:
    versions = [noise(8 * GRAIN, seed) for seed in range(5)]
    async with open_store(state_dir, keep=2) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": versions[0]})
        result = await manager.start_test(fixture.store, 1, no_steps)
        for content in versions[1:]:
            await fixture.push({"disk-0": content})
            await fixture.settle()
            await check_clone_content(fixture, result)
    async with (
        open_store(state_dir, keep=2, expected=fixture.expected) as fixture,
        clone_manager(fixture) as manager,
    ):
        await fixture.settle()
        await check_clone_content(fixture, result)
        await manager.undo_test(fixture.store, no_steps)
        await fixture.settle()
        assert sorted(fixture.store.vm.points) == [4, 5]


async def refused(
    fixture: StoreFixture, act: Callable[[], Awaitable[object]], reason: str, error: type[Exception]
) -> None:
    """The act is refused, and not a single step was taken: nothing was made and removed again."""
    steps: list[str] = []
    before = await leftovers(fixture)
    durable.observe = lambda step, path: steps.append(f"{step} {path}")
    environment.observe_commit = lambda step, path: steps.append(f"{step} {path}")
    try:
        with pytest.raises(error, match=reason):
            await act()
    finally:
        durable.observe, environment.observe_commit = durable._nothing, environment._nothing
    assert steps == []
    assert await leftovers(fixture) == before


async def test_what_the_state_or_the_machine_forbids_is_refused_before_anything_is_made(
    no_qemu: Path, state_dir: Path
) -> None:
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:

        async def start(point: int | None = None) -> None:
            await manager.start_test(fixture.store, point, no_steps)

        async def undo() -> None:
            await manager.undo_test(fixture.store, no_steps)

        await refused(fixture, start, "no recovery point yet", RefusedError)
        await refused(fixture, undo, "no test clone is running", RefusedError)
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        await fixture.settle()
        await refused(fixture, lambda: start(7), "no recovery point 7", RefusedError)
        (no_qemu / "qemu-img").rename(no_qemu / "away")
        await refused(fixture, start, "install the package qemu-utils", RefusedError)
        (no_qemu / "away").rename(no_qemu / "qemu-img")
        await start()
        await refused(fixture, start, "a test clone is running: undo it first", RefusedError)
        await undo()
    deep = state_dir / ("d" * 90)
    deep.mkdir()
    async with open_store(deep) as fixture:
        manager = CloneManager(fixture.config, fixture.log, fixture.stores, fixture.nursery)
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        await fixture.settle()
        await refused(fixture, start, "use a shorter state_dir", StateError)


async def test_an_overlay_that_cannot_be_made_leaves_nothing(
    no_qemu: Path, state_dir: Path
) -> None:
    script(no_qemu / "qemu-img", ["echo first >&2", "echo 'No space left on device' >&2", "exit 1"])
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        with pytest.raises(StateError, match="No space left on device"):
            await manager.start_test(fixture.store, None, no_steps)
        assert await leftovers(fixture) == []
        assert manager.report(fixture.store) is None
        assert not fixture.store.is_held(1)


async def test_a_test_cancelled_before_it_is_recorded_leaves_nothing(
    no_qemu: Path, state_dir: Path
) -> None:
    script(no_qemu / "qemu-img", ["exec /bin/sleep 600"])
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        with trio.CancelScope() as scope:
            await manager.start_test(fixture.store, None, lambda _: scope.cancel())
        assert scope.cancelled_caught
        assert await leftovers(fixture) == []
        assert fixture.store.vm.state is State.PROTECTED


async def test_a_guest_that_does_not_speak_is_reported_and_ends_with_the_undo(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Idle worker threads end at once: a machine bound to the life of one would not live to be silent.
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0.001)
    odd = state_dir / "a b,c"
    odd.mkdir()
    async with open_store(odd) as fixture, clone_manager(fixture, console_wait_s=2) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        before = children()
        result = await manager.start_test(fixture.store, None, no_steps)
        assert (result["booted"], result["console"], result["console_s"]) == (False, None, None)
        assert result["reason"] == "nothing on its serial console within 2 s"
        assert children() - before, "the machine runs on, to be looked at"
        await manager.undo_test(fixture.store, no_steps)
        assert children() == before
        assert await leftovers(fixture) == []


async def test_a_machine_that_ends_says_why(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = only_programs(monkeypatch, tmp_path / "bin", "qemu-img", "setpriv")
    script(programs / "qemu-system-x86_64", ["echo warning >&2", "echo 'no memory' >&2", "exit 3"])
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        result = await manager.start_test(fixture.store, None, no_steps)
        assert result["reason"] == "QEMU ended with status 3: no memory"
        assert not result["booted"]
        await manager.undo_test(fixture.store, no_steps)
        assert await leftovers(fixture) == []


async def test_a_guest_that_never_stops_talking_fills_no_disk_and_can_be_killed(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = only_programs(monkeypatch, tmp_path / "bin", "qemu-img", "setpriv")
    script(programs / "qemu-system-x86_64", ["exec /usr/bin/yes 'again and again'"])
    monkeypatch.setattr("receiver.failover.machine.CONSOLE_BYTES_MAX", 100_001)
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        result = await manager.start_test(fixture.store, None, no_steps)
        assert result["console"] == "again and again"
        with trio.fail_after(HANG_S):
            while len(contents(result["console_file"])) < 100_001:
                await trio.lowlevel.checkpoint()
        monkeypatch.setattr("receiver.failover.machine.QUIT_S", 0.1)
        await manager.undo_test(fixture.store, no_steps)
        assert await leftovers(fixture) == []


async def test_an_undo_ends_a_boot_that_is_waited_for(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = only_programs(monkeypatch, tmp_path / "bin", "qemu-img", "setpriv")
    script(programs / "qemu-system-x86_64", ["exec /bin/sleep 600"])
    monkeypatch.setattr("receiver.failover.machine.QUIT_S", 0.1)
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        results = []
        booting = trio.Event()

        async def start() -> None:
            def step(text: str) -> None:
                if text == "the machine is booting":
                    booting.set()

            results.append(await manager.start_test(fixture.store, None, step))

        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(start)
                await booting.wait()
                await manager.undo_test(fixture.store, no_steps)
        assert results[0]["reason"] == "the clone was stopped"
        assert await leftovers(fixture) == []


@pytest.mark.usefixtures("no_qemu")
async def test_a_start_sweeps_what_no_event_knows_and_survives_a_damaged_clone(
    state_dir: Path,
) -> None:
    async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": noise(GRAIN, 1)})
        await fixture.settle()
        running = await manager.start_test(fixture.store, None, no_steps)
    clones, run = fixture.store.paths.clones, state_dir / "run"
    (clones / "beef").mkdir()
    (clones / "beef" / "disk-0.qcow2").write_bytes(b"old")
    (clones / "stray").write_bytes(b"old")
    (run / "c-beef.qmp").write_bytes(b"")
    (run / "e-beef.sock").write_bytes(b"")
    replica = fixture.store.paths.root / "replica" / "disk-0.raw"
    replica.rename(state_dir / "away")
    async with (
        open_store(state_dir, expected=fixture.expected) as fixture,
        clone_manager(fixture) as manager,
    ):
        assert [path.name for path in clones.iterdir()] == [running["clone"]]
        assert list(run.iterdir()) == []
        assert manager.report(fixture.store) is None
        assert fixture.store.vm.state is State.TESTING
        await manager.undo_test(fixture.store, no_steps)
        assert await leftovers(fixture) == []


async def reachable(socket: Path) -> None:
    """Wait until a QEMU that was started answers."""
    while True:
        try:
            async with open_qmp(socket):
                return
        except QmpGoneError:
            await trio.lowlevel.checkpoint()


async def test_a_start_ends_a_machine_that_outlived_its_receiver(state_dir: Path) -> None:
    async with open_store(state_dir):
        pass
    (state_dir / "run").mkdir()
    socket = state_dir / "run" / "c-beef.qmp"
    words = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"]
    left = await trio.lowlevel.open_process([*words, "-qmp", f"unix:{socket},server=on,wait=off"])
    try:
        with trio.fail_after(HANG_S):
            await reachable(socket)
            async with open_store(state_dir) as fixture, clone_manager(fixture):
                assert await leftovers(fixture) == []
            assert await left.wait() == 0
    finally:
        left.kill()


async def test_a_machine_stopped_before_it_began_is_not_waited_for(tmp_path: Path) -> None:
    machine = Machine(["false"], tmp_path / "qmp", tmp_path / "console.log")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run)
        nursery.cancel_scope.cancel()
    with trio.fail_after(HANG_S):
        result = await machine.wait_console(60)
    assert result.reason == "the clone was stopped"


async def test_a_machine_without_a_place_for_its_console_says_so(tmp_path: Path) -> None:
    machine = Machine(["true"], tmp_path / "qmp", tmp_path / "missing" / "console.log")
    await machine.run()
    result = await machine.wait_console(60)
    assert result.reason is not None
    assert "No such file or directory" in result.reason


class Crash(BaseException):
    """Stands for the end of the process; nothing catches it, and no step after it takes effect."""


class Crasher:
    """From step number ``at`` on every durable step fails. Counts the steps."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.steps: list[str] = []

    def __call__(self, step: str, path: str) -> None:
        self.steps.append(f"{step} {Path(path).name}")
        if len(self.steps) > self._at:
            raise Crash(self.steps[self._at])


async def crash_in(
    state_dir: Path, expected: dict[int, dict[str, Image]], act: str, at: int
) -> Crasher:
    """Run ``start_test`` or ``undo_test`` until its step number ``at``, and no further."""
    crasher = Crasher(at)
    try:
        async with open_store(state_dir, expected=expected) as fixture, clone_manager(fixture) as m:
            await fixture.settle()
            durable.observe = environment.observe_commit = crasher
            if act == "start":
                await m.start_test(fixture.store, 1, no_steps)
            else:
                await m.undo_test(fixture.store, no_steps)
            # The stop of the receiver is no part of what is being tested.
            durable.observe, environment.observe_commit = durable._nothing, environment._nothing
    except* Crash:
        pass
    finally:
        durable.observe, environment.observe_commit = durable._nothing, environment._nothing
    return crasher


@pytest.mark.usefixtures("no_qemu")
@pytest.mark.parametrize("act", ["start", "undo"])
async def test_a_crash_at_any_step_leaves_a_clone_that_runs_or_none(
    state_dir: Path, act: str
) -> None:
    async with open_store(state_dir) as fixture:
        await fixture.push({"disk-0": noise(3 * GRAIN, 1), "disk-1": noise(GRAIN, 2)})
        await fixture.settle()
    expected = fixture.expected
    states: set[State] = set()
    for at in range(200):
        if act == "undo":
            async with open_store(state_dir) as fixture, clone_manager(fixture) as manager:
                await manager.start_test(fixture.store, 1, no_steps)
        crasher = await crash_in(state_dir, expected, act, at)
        async with (
            open_store(state_dir, expected=expected) as fixture,
            clone_manager(fixture) as manager,
        ):
            states.add(fixture.store.vm.state)
            report = manager.report(fixture.store)
            if fixture.store.vm.state is State.TESTING:
                assert report is not None
                await check_clone_content(fixture, report)
                assert all(contents(disk["overlay"]) for disk in report["disks"])
                await manager.undo_test(fixture.store, no_steps)
            else:
                assert report is None
            assert await leftovers(fixture) == [], crasher.steps
            await fixture.check_point(1)
        if len(crasher.steps) <= at:
            break
    else:
        pytest.fail("the steps have no end")
    assert at > 10
    # Both outcomes were met: before the record of the act, and after it.
    assert states == {State.TESTING, State.PROTECTED}
