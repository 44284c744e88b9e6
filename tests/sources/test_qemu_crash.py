# SPDX-License-Identifier: AGPL-3.0-or-later
"""The process is killed at every step of every operation: before and after each QMP command, and at
each file step.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from replicator import durable
from replicator.errors import SourceError
from replicator.sources.base import SnapshotName
from replicator.sources.qemu_inventory import take_inventory
from replicator.sources.qmp import QmpClient
from tests.lab_qemu import StorageDaemon, storage_daemon
from tests.sources.conformance import GRAIN, assert_changes, change, commit, contents, fill
from tests.sources.qemu_lab import QemuLab, own_server


class KilledError(BaseException):
    """The process is dead from here on: no cleanup of ours may catch it and go on."""


class Killer:
    """Dies at the n-th step; counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self._count = 0
        plain = QmpClient.execute

        async def execute(qmp: QmpClient, command: str, /, **arguments: Any) -> Any:
            self._step()
            result = await plain(qmp, command, **arguments)
            self._step()
            return result

        monkeypatch.setattr(QmpClient, "execute", execute)
        monkeypatch.setattr(durable, "observe", lambda _step, _path: self._step())

    def _step(self) -> None:
        if self.at is None:
            return
        self._count += 1
        # Once dead, always dead: the code that unwinds must not reach the platform.
        if self._count > self.at:
            raise KilledError

    def arm(self, at: int) -> None:
        self.at, self._count = at, 0

    def disarm(self) -> None:
        self.at = None


@pytest.fixture
async def lab() -> AsyncIterator[QemuLab]:
    async with storage_daemon(SIZES) as daemon:
        lab = QemuLab(daemon)
        await fill(lab, "crash")
        yield lab


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch)


LEAST_STEPS = 15
SIZES = {"disk-a": 22 * GRAIN, "disk-b": 23 * GRAIN + 512}


@pytest.mark.parametrize("cleaning", ["abandon", "sweep"])
async def test_killed_in_take(lab: QemuLab, killer: Killer, cleaning: str) -> None:
    before = await commit(lab, "base", None)
    clean = await lab.leftovers()
    for step in range(1000):
        name = SnapshotName(f"p{step}", "base")
        killer.arm(step)
        try:
            snapshot = await lab.source().take(name)
        except KilledError:
            pass
        else:
            await snapshot.aclose()
            assert step > LEAST_STEPS
            break
        finally:
            killer.disarm()
        await change(lab, f"while dead {step}")
        if cleaning == "abandon":
            await lab.source().abandon(name)
        else:
            await lab.source().sweep(None, "base")
        assert await lab.leftovers() == clean, step
        if step % 5:
            continue
        # The reference still covers everything since, the time of the dead snapshot included.
        again = SnapshotName(f"q{step}", "base")
        snapshot = await lab.source().take(again)
        assert snapshot.lost_tracking is None, step
        await assert_changes(lab, snapshot, "base", before, await contents(lab))
        await snapshot.aclose()
        await lab.source().abandon(again)
    else:
        pytest.fail("take never came to its end")


@pytest.mark.parametrize("operation", ["confirm", "abandon", "sweep"])
async def test_killed_in_the_end(lab: QemuLab, killer: Killer, operation: str) -> None:
    """Killed in an operation that ends a snapshot: it is done again, and the next cycle is right."""
    reference, before = "base", await commit(lab, "base", None)
    for step in range(1000):
        name = SnapshotName(f"p{step}", reference)
        await change(lab, f"cycle {step}")
        snapshot = await lab.source().take(name)
        assert snapshot.lost_tracking is None, step
        expected = await contents(lab)
        if not step % 5:
            await assert_changes(lab, snapshot, reference, before, expected)
        await snapshot.aclose()
        await change(lab, f"more {step}")
        killer.arm(step)
        finished = False
        try:
            await end(lab, operation, name)
            finished = True
        except KilledError:
            pass
        finally:
            killer.disarm()
        await end(lab, operation, name)
        if operation == "confirm":
            reference, before = name.push_id, expected
        record = f"replctl-{reference}.json"
        bitmaps = [f"replctl-{reference}"] * 2
        assert await lab.leftovers() == [*bitmaps, record], step
        if finished:
            assert step > LEAST_STEPS
            break
    else:
        pytest.fail(f"{operation} never came to its end")


async def end(lab: QemuLab, operation: str, name: SnapshotName) -> None:
    source = lab.source()
    if operation == "confirm":
        await source.confirm(name)
    elif operation == "abandon":
        await source.abandon(name)
    else:
        await source.sweep(None, name.reference)


async def test_killed_in_take_and_the_state_is_lost(killer: Killer) -> None:
    """QEMU's only NBD server was started by a process that left nothing but what is in QEMU."""
    unknown = 0
    async with storage_daemon(SIZES, nbd_server=False) as daemon:
        for step in range(1000):
            killer.arm(step)
            finished = False
            try:
                await (await own_server(daemon).take(SnapshotName(f"p{step}", None))).aclose()
                finished = True
            except KilledError:
                pass
            finally:
                killer.disarm()
            started = any((daemon.root / "work").glob("qemu-*.sock"))
            tells = bool(await exported(daemon))
            lose_state(daemon)
            await own_server(daemon).sweep(None, None)
            if started and not tells:
                unknown += 1
                refused = SnapshotName(f"q{step}", None)
                with pytest.raises(SourceError, match="nbd-server-stop over QMP"):
                    await own_server(daemon).take(refused)
                await own_server(daemon).abandon(refused)
                async with daemon.qmp() as qmp:
                    await qmp.execute("nbd-server-stop")
            await assert_taken_again(daemon, f"r{step}")
            if finished:
                assert step > LEAST_STEPS
                # The server's start, the instant, and the first export: nothing tells before.
                assert unknown <= 5
                return
    pytest.fail("take never came to its end")


async def test_killed_in_the_sweep_after_the_state_was_lost(killer: Killer) -> None:
    """Our NBD server goes with the last export that tells whose it is: no kill leaves it alone."""
    async with storage_daemon(SIZES, nbd_server=False) as daemon:
        for step in range(1000):
            await (await own_server(daemon).take(SnapshotName(f"p{step}", None))).aclose()
            lose_state(daemon)
            killer.arm(step)
            finished = False
            try:
                await own_server(daemon).sweep(None, None)
                finished = True
            except KilledError:
                pass
            finally:
                killer.disarm()
            await own_server(daemon).sweep(None, None)
            await assert_taken_again(daemon, f"r{step}")
            if finished:
                assert step > LEAST_STEPS
                return
    pytest.fail("sweep never came to its end")


def lose_state(daemon: StorageDaemon) -> None:
    shutil.rmtree(daemon.root / "work", ignore_errors=True)


async def exported(daemon: StorageDaemon) -> list[str]:
    async with daemon.qmp() as qmp:
        exports = (await take_inventory(qmp)).exports
    return [export for export in exports if export.startswith("replctl-")]


async def assert_taken_again(daemon: StorageDaemon, push_id: str) -> None:
    name = SnapshotName(push_id, None)
    snapshot = await own_server(daemon).take(name)
    await snapshot.check()
    await snapshot.aclose()
    await own_server(daemon).abandon(name)
    assert await daemon.leftovers() == []
    assert list((daemon.root / "work").iterdir()) == []
