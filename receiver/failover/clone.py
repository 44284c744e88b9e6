# SPDX-License-Identifier: AGPL-3.0-or-later
"""Test clones: a recovery point booted beside the protected VM, without a copy and without touching the point.

A clone is an NBD export of each disk, a qcow2 overlay on each that takes the guest's writes, and QEMU on the overlays.
What is about to be made or removed stands in the journal first (``clone/<vm uuid>``), so that a crash leaves nothing
that the next start does not settle; whether a VM is under test is what its events say.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import trio
from eventsourcing.persistence import PersistenceError

from receiver.export.point_export import make_run_dir, serve_disk, socket_path
from receiver.failover import machine, overlay
from receiver.failover.machine import BootResult, Drive, Machine
from receiver.store.stores import Stores
from receiver.store.vm_store import VmStore
from replicator import durable
from replicator.config import Config
from replicator.domain.failover import Command, decide
from replicator.domain.model import Point, PointDisk, TestClone
from replicator.domain.views import instant
from replicator.errors import ReplicatorError
from replicator.log import EventLog
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

#: How long a test waits for the guest's first console line.
CONSOLE_WAIT_S = 60.0
_RESTARTED = "the receiver was restarted: undo, or undo and test again"
_SOCKET_PREFIXES = ("c-", "e-")
_FAILURES = (OSError, ReplicatorError, PersistenceError)

Step = Callable[[str], None]


@dataclass(slots=True)
class _Clone:
    """A clone that this process serves."""

    clone_id: str
    point: Point
    folder: Path
    sockets: dict[str, Path]
    qmp: Path
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    gone: trio.Event = field(default_factory=trio.Event)
    nursery: trio.Nursery | None = None
    machine: Machine | None = None
    boot: BootResult = field(default_factory=lambda: BootResult(reason=_RESTARTED))

    def overlay(self, disk: PointDisk) -> Path:
        return self.folder / f"{disk.disk}.qcow2"

    @property
    def running(self) -> bool:
        """Whether its machine was started and has not ended."""
        return self.machine is not None and not self.machine.ended

    def result(self, vm: str) -> dict[str, Any]:
        """What /failover/test answers."""
        disks = [
            {
                "disk": disk.disk,
                "size": disk.size,
                "nbd": str(self.sockets[disk.disk]),
                "overlay": str(self.overlay(disk)),
            }
            for disk in self.point.disks
        ]
        return {
            "vm": vm,
            "point": self.point.number,
            "clone": self.clone_id,
            "disks": disks,
            "running": self.running,
            "booted": self.boot.booted,
            "console": self.boot.console,
            "console_s": self.boot.console_s,
            "reason": self.boot.reason,
            "console_file": str(self.machine.console_file) if self.machine else None,
        }


class CloneManager:
    """All test clones of a receiver; their exports and machines are tasks in ``nursery``.

    ``recover`` once before anything else. At the end of the nursery machines are stopped; clones stay in the log.
    """

    def __init__(
        self,
        config: Config,
        log: EventLog,
        stores: Stores,
        nursery: trio.Nursery,
        *,
        console_wait_s: float = CONSOLE_WAIT_S,
    ) -> None:
        self._run_dir = config.state_dir / "run"
        self._log = log
        self._stores = stores
        self._nursery = nursery
        self._console_wait_s = console_wait_s
        self._clones: dict[UUID, _Clone] = {}
        self._locks: dict[UUID, trio.Lock] = {}

    def report(self, store: VmStore) -> dict[str, Any] | None:
        """The clone of a VM that is served now, as ``start_test`` reported it; None if there is none."""
        clone = self._clones.get(store.uuid)
        return None if clone is None else clone.result(store.vm.name)

    def warnings(self, store: VmStore) -> list[str]:
        """What status says of a VM under test: what the clone costs, and whether it still is of use."""
        test = store.vm.test
        if test is None:
            return []
        since = instant(test.started_at_us)
        what = f"test clone {test.clone_id} of point {test.point} since {since}"
        found = [f"{what}: it keeps point {test.point} and all later ones from being released"]
        clone = self._clones.get(store.uuid)
        if self._lock(store).locked():
            return found  # it is being booted or removed
        if clone is None or not clone.running:
            found.append("the clone's machine is not running: undo, or undo and test again")
        return found

    # Test

    async def start_test(self, store: VmStore, point: int | None, step: Step) -> dict[str, Any]:
        """Clone a point (None: the newest) and boot the clone; it runs until ``undo_test``.

        ``step`` is told what is done. Raises RefusedError before anything is made; DamageError, StateError or OSError
        when a step failed, and then what was made is gone again. A guest that does not speak is no error: the result
        says so. Cancelled before the test is recorded it leaves nothing; afterwards the clone runs on.
        """
        async with self._lock(store):
            decide(store.vm.state, Command.TEST)
            chosen = store.vm.get_point(point)
            overlay.check_qemu_img()
            clone = self._plan(store, secrets.token_hex(4), chosen)
            await self._journal(store, clone.clone_id, "start")
            try:
                await self._create(store, clone, step)
            except BaseException:
                with trio.CancelScope(shield=True):  # local files and one journal entry
                    await self._take_back(store, clone)
                raise
        step("the test is recorded")
        await self._boot(store, clone, step)
        return clone.result(store.vm.name)

    def _plan(self, store: VmStore, clone_id: str, point: Point) -> _Clone:
        """Names only. Raises StateError if a socket's path would be too long."""
        sockets = {
            disk.disk: socket_path(self._run_dir, f"c-{clone_id}-{index}.sock")
            for index, disk in enumerate(point.disks)
        }
        qmp = socket_path(self._run_dir, f"c-{clone_id}.qmp")
        return _Clone(clone_id, point, store.paths.clones / clone_id, sockets, qmp)

    async def _create(self, store: VmStore, clone: _Clone, step: Step) -> None:
        await trio.to_thread.run_sync(make_run_dir, self._run_dir)
        await trio.to_thread.run_sync(overlay.make_folder, store.paths, clone.clone_id)
        await self._nursery.start(self._serve, store, clone)
        step(f"point {clone.point.number} is served")
        for disk in clone.point.disks:
            await overlay.make_overlay(
                clone.overlay(disk), disk.size, clone.sockets[disk.disk], disk.disk
            )
        await trio.to_thread.run_sync(durable.sync_dir, clone.folder)
        step("overlays are made")
        recorded = TestClone(clone.clone_id, clone.point.number, time.time_ns() // 1000)
        with trio.CancelScope(shield=True):  # two commits: recorded and settled, or neither
            async with store.changing() as vm:
                vm.start_test(recorded)
            await self._log.journal_delete(_key(store))

    async def _take_back(self, store: VmStore, clone: _Clone) -> None:
        """Undo a creation that failed, unless the test is recorded all the same: then it can be undone as any."""
        if store.vm.test is not None and store.vm.test.clone_id == clone.clone_id:
            return
        try:
            await self._stop(store, clone)
            await trio.to_thread.run_sync(overlay.remove_clone, store.paths, clone.clone_id)
            await self._log.journal_delete(_key(store))
        except _FAILURES as error:
            # The journal entry stays: the next start removes what is left.
            _logger.error("%s: clone %s is left: %s", store.vm.name, clone.clone_id, error)

    async def _serve(
        self,
        store: VmStore,
        clone: _Clone,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """The clone's task: exports, and the machine on top of them, until the clone is stopped."""
        self._clones[store.uuid] = clone
        started = False
        try:
            with clone.scope:
                async with AsyncExitStack() as stack:
                    point = await stack.enter_async_context(store.hold(clone.point.number))
                    for disk in point.disks:
                        socket = clone.sockets[disk.disk]
                        await stack.enter_async_context(serve_disk(store, point, disk, socket))
                    # Innermost, so that the machine has ended before its disks go.
                    async with flat_nursery() as nursery:
                        clone.nursery = nursery
                        started = True
                        task_status.started()
                        try:
                            await trio.sleep_forever()
                        finally:
                            clone.nursery = None
        except _FAILURES as error:
            if not started:
                raise
            _logger.error("%s: clone %s has failed: %s", store.vm.name, clone.clone_id, error)
        finally:
            if self._clones.get(store.uuid) is clone:
                del self._clones[store.uuid]
            clone.gone.set()

    async def _boot(self, store: VmStore, clone: _Clone, step: Step) -> None:
        reason = machine.missing_programs()
        if reason is None and clone.nursery is None:
            reason = "the clone was stopped"
        if reason is not None:
            clone.boot = BootResult(reason=reason)
            return
        drives = [Drive(disk.disk, clone.overlay(disk)) for disk in clone.point.disks]
        name = f"replctl test of {store.vm.name}"
        clone.machine = Machine(
            machine.command_line(drives, name, clone.qmp), clone.qmp, clone.folder / "console.log"
        )
        assert clone.nursery is not None
        clone.boot = BootResult(reason="the machine is booting")
        clone.nursery.start_soon(clone.machine.run)
        step("the machine is booting")
        clone.boot = await clone.machine.wait_console(self._console_wait_s)

    # Undo

    async def undo_test(self, store: VmStore, step: Step) -> dict[str, Any]:
        """Stop the clone and remove all of it. Can be repeated after a failure or a crash.

        Raises RefusedError if no test is running, OSError or an event log's error where a step failed.
        """
        async with self._lock(store):
            decide(store.vm.state, Command.UNDO_TEST)
            assert store.vm.test is not None
            clone_id = store.vm.test.clone_id
            await self._journal(store, clone_id, "undo")
            clone = self._clones.get(store.uuid)
            if clone is not None:
                await self._stop(store, clone)
                step("the machine is stopped")
            await self._finish_undo(store, clone_id)
        step("the clone is removed")
        return {"vm": store.vm.name, "clone": clone_id}

    async def _stop(self, store: VmStore, clone: _Clone) -> None:
        """End machine and exports; returns when both are gone."""
        clone.scope.cancel()
        if self._clones.get(store.uuid) is clone:
            await clone.gone.wait()
        await trio.to_thread.run_sync(durable.unlink, clone.qmp)

    async def _finish_undo(self, store: VmStore, clone_id: str) -> None:
        """Files first, then the event: until it is recorded, the undo can be asked for again."""
        await trio.to_thread.run_sync(overlay.remove_clone, store.paths, clone_id)
        with trio.CancelScope(shield=True):
            async with store.changing() as vm:
                vm.end_test()
            await self._log.journal_delete(_key(store))
        store.wake()  # retention may let go of the point now

    # Start of the receiver

    async def recover(self) -> None:
        """Settle what an earlier run left: finish or take back what the journal names, serve running clones again.

        What fails for one VM is logged and leaves the others alone; a clone that cannot be served can still be undone.
        """
        await self._clear_sockets()
        for store in self._stores.all:
            try:
                await self._recover_vm(store)
            except _FAILURES as error:
                _logger.error("%s: test clone: %s", store.vm.name, error)

    async def _clear_sockets(self) -> None:
        """End machines that outlived their receiver, and remove sockets that nobody serves."""
        await trio.to_thread.run_sync(make_run_dir, self._run_dir)
        for path in await trio.to_thread.run_sync(_sockets, self._run_dir):
            if path.suffix == ".qmp" and await machine.quit_qemu(path):
                _logger.warning("%s: a machine of an earlier run was still there, ended", path.name)
            await trio.to_thread.run_sync(durable.unlink, path)

    async def _recover_vm(self, store: VmStore) -> None:
        entry = await self._log.journal_get(_key(store))
        test = store.vm.test
        if entry is not None and entry["act"] == "undo" and test is not None:
            _logger.warning(
                "%s: the undo of clone %s is finished now", store.vm.name, test.clone_id
            )
            await self._finish_undo(store, test.clone_id)
            test = None
        keep = None if test is None else test.clone_id
        for name in await trio.to_thread.run_sync(overlay.sweep_clones, store.paths, keep):
            _logger.warning("%s: removed clone %s, left by an earlier run", store.vm.name, name)
        if entry is not None:
            await self._log.journal_delete(_key(store))
        if test is not None:
            clone = self._plan(store, test.clone_id, store.vm.get_point(test.point))
            await self._nursery.start(self._serve, store, clone)

    async def _journal(self, store: VmStore, clone_id: str, act: str) -> None:
        await self._log.journal_put(_key(store), {"clone": clone_id, "act": act})

    def _lock(self, store: VmStore) -> trio.Lock:
        return self._locks.setdefault(store.uuid, trio.Lock())


def _key(store: VmStore) -> str:
    return f"clone/{store.uuid}"


def _sockets(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.iterdir() if path.name.startswith(_SOCKET_PREFIXES))


__all__ = ["CONSOLE_WAIT_S", "CloneManager"]
