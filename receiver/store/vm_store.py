# SPDX-License-Identifier: AGPL-3.0-or-later
"""One VM on the receiver: lands pushes, commits points, applies them to the replica, keeps and lets go of points, opens views.

The order of steps is the architecture page's: data durable, then the event, then what follows from the event. Every
step that a crash may cut is repeated or swept by ``recover``.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import trio
from eventsourcing.persistence import PersistenceError

from receiver.store import apply, maps, recovery, sharing
from receiver.store.admission import PushRefusedHereError, check_push, new_disks, new_point, no_base
from receiver.store.changes import change_files, changed
from receiver.store.files import stack_files
from receiver.store.landing import Landing, remove_folder
from receiver.store.layout import VmPaths, stem
from receiver.store.view import Gate, PointView, Replica, Shape
from replicator import durable
from replicator.disk import Extent
from replicator.domain.model import Damage, Point, PointDisk, PushKind
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError, PhcbtError, RefusedError, ReplicatorError, StateError
from replicator.log import EventLog
from replicator.phcbt.read import StoredDelta
from replicator.wire.messages import Finish, Open, PointRef

_logger = logging.getLogger(__name__)
#: Pause before an apply that failed is tried again, unless something happens earlier. Seconds.
RETRY_S = 30
_ROTTEN = "not what was recorded when the replica was read to be overwritten"


@dataclass(frozen=True, slots=True)
class Retention:
    """``dr_restore_points`` and ``push_apply_remote``."""

    keep: int
    apply: bool


@dataclass(slots=True)
class _OpenView:
    view: PointView
    point: int
    chain: str
    deepest: int


class VmStore:
    """The points of one VM. ``recover`` first, then ``run`` in a nursery for as long as it is used."""

    def __init__(self, state_dir: Path, log: EventLog, vm: UUID, retention: Retention) -> None:
        self.uuid = vm
        self.paths = VmPaths.of(state_dir, vm)
        self._log = log
        self._retention = retention
        self._gate = Gate()
        self._stacks = trio.Lock()  # building a stack, or adding to open ones
        self._applying = trio.Lock()  # writing to the replica; taken before _files and _stacks
        self._files = trio.Lock()  # opening or committing a push, or a sweep
        self._views: list[_OpenView] = []
        self._held: Counter[int] = Counter()
        self._leaving: frozenset[int] = frozenset()  # points whose release is being recorded
        self._wake = trio.Event()
        # Its session's, which lets go of it and its buffers.
        self._landing: weakref.ref[Landing] | None = None
        #: Why deltas are not being applied, or None.
        self.trouble: str | None = None
        self.settled = trio.Event()  # set while there is nothing left to apply or let go of
        self.resting = (
            trio.Event()
        )  # set while nothing more will be done by itself: settled, or in trouble

    @property
    def vm(self) -> ProtectedVm:
        """The VM as the log says."""
        found = self._log.get(self.uuid)
        assert found is not None
        return found

    @property
    def _journal_key(self) -> str:
        return f"push/{self.uuid}"

    # Start

    async def recover(self) -> list[Path]:
        """Make the folder agree with the log; returns what was swept. Damage becomes events."""
        for folder in self.paths.folders:
            await trio.to_thread.run_sync(durable.make_dir, folder)
        landing = await self._settle_push()
        removed = await trio.to_thread.run_sync(recovery.sweep, self.vm, self.paths, landing)
        damages = await trio.to_thread.run_sync(recovery.missing_files, self.vm, self.paths)
        damages += await trio.to_thread.run_sync(maps.mend_heads, self.vm, self.paths)
        await trio.to_thread.run_sync(maps.mend_replica_maps, self.vm, self.paths)
        await self.report_damage(damages)
        return removed

    async def _settle_push(self) -> int | None:
        """The point of a journalled push that is still to be finished, if there is one."""
        entry = await self._log.journal_get(self._journal_key)
        if entry is None:
            return None
        if await trio.to_thread.run_sync(
            recovery.settle_landing, self.vm, self.paths, entry["push_id"], entry["point"]
        ):
            return int(entry["point"])
        await self._log.journal_delete(self._journal_key)
        return None

    def changing(self) -> AbstractAsyncContextManager[ProtectedVm]:
        """The VM alone, to trigger events on; see EventLog.change."""
        return self._log.change(self.uuid)

    async def report_damage(self, damages: list[Damage]) -> None:
        """Make each damage an event, once."""
        if damages:
            async with self._log.change(self.uuid) as vm:
                for damage in damages:
                    vm.damaged(damage)

    async def report_shared_damage(self, damages: list[Damage]) -> None:
        """The same, for every point that takes what is damaged from the same file, or that cannot be opened either."""
        if not damages:
            return
        async with self._stacks:
            shared = await trio.to_thread.run_sync(
                sharing.find_shared, self.vm, self._open_view_only, self.paths.root, damages
            )
        async with self._log.change(self.uuid) as vm:
            for damage in damages + shared:
                if damage.point in vm.points:  # others are not held, and may have gone meanwhile
                    vm.damaged(damage)

    def _open_view_only(self, point: Point, disk: PointDisk) -> PointView:
        return self._open_view(point, disk).view

    # Pushes

    def newest(self) -> PointRef | None:
        """The newest point, as the protocol names it."""
        point = self.vm.newest
        return PointRef(point.number, point.root, point.push_id) if point else None

    @property
    def landing(self) -> Landing | None:
        """The push that is landing, if one is."""
        landing = None if self._landing is None else self._landing()
        return None if landing is None or landing.closed else landing

    async def unfinished(self) -> str | None:
        """The push that could be gone on with."""
        entry = await self._log.journal_get(self._journal_key)
        return None if entry is None else str(entry["push_id"])

    async def open_push(self, opened: Open) -> Landing:
        """Begin or go on with a push. Raises PushRefusedHereError, WireError, PhcbtError; nothing has changed then."""
        await self.ensure_heads()
        async with self._files:
            expected = await trio.to_thread.run_sync(check_push, self.vm, self.paths, opened)
            entry = await self._log.journal_get(self._journal_key)
            if entry is not None and entry["push_id"] != opened.push_id:
                await self._drop_push(entry)
                entry = None
            watermarks = [0] * len(opened.disks)
            if entry is not None and len(entry["durable"]) == len(watermarks):
                watermarks = list(entry["durable"])
            else:
                await self._journal(opened, watermarks)
            folder = self.paths.partial(opened.point)
            landing = await trio.to_thread.run_sync(Landing, folder, opened, expected, watermarks)
            self._landing = weakref.ref(landing)
            if list(landing.positions) != watermarks:
                # What was cut off is not durable any more: other bytes will come in its place.
                try:
                    await self._journal(opened, list(landing.positions))
                except BaseException:
                    landing.close()
                    raise
            return landing

    async def ensure_heads(self, *, thorough: bool = False) -> None:
        """Have the maps of the newest point, as far as they can be made again. ``thorough`` reads all of them."""
        good = not thorough and await trio.to_thread.run_sync(maps.heads_good, self.vm, self.paths)
        if not good:
            await self._mend_heads(thorough=thorough)

    @asynccontextmanager
    async def no_commit(self) -> AsyncIterator[None]:
        """While inside, no push is opened or committed: the maps of the newest point stand still."""
        async with self._files:
            yield

    async def _mend_heads(self, *, thorough: bool) -> None:
        async with self.still():
            mend = partial(maps.mend_heads, thorough=thorough)
            damages = await trio.to_thread.run_sync(mend, self.vm, self.paths)
        await self.report_damage(damages)

    async def _journal(self, opened: Open, watermarks: list[int]) -> None:
        await self._log.journal_put(
            self._journal_key,
            {"push_id": opened.push_id, "point": opened.point, "durable": watermarks},
        )

    async def sync(self, landing: Landing) -> list[int]:
        """Make what has landed durable and journal it; then these positions may be acknowledged."""
        positions = await trio.to_thread.run_sync(landing.sync)
        await self._journal(landing.opened, positions)
        return positions

    async def drop_push(self) -> None:
        """Forget an unfinished push: its journal entry first, then its files."""
        async with self._files:
            entry = await self._log.journal_get(self._journal_key)
            if entry is not None:
                await self._drop_push(entry)

    async def _drop_push(self, entry: Any) -> None:
        await self._log.journal_delete(self._journal_key)
        await trio.to_thread.run_sync(remove_folder, self.paths.partial(int(entry["point"])))

    async def commit(self, landing: Landing, finish: Finish, now_us: int) -> Point:
        """Make a landed push a recovery point. Raises PushRefusedHereError if it is not what the source says it is."""
        await trio.to_thread.run_sync(landing.finish)
        if len(finish.disks) != len(landing.disks):
            raise PushRefusedHereError("bad-request", "the push ends with another number of disks")
        for landed, final in zip(landing.disks, finish.disks, strict=True):
            if await trio.to_thread.run_sync(landed.stream_root) != final.stream_root:
                raise PushRefusedHereError(
                    "root-mismatch", f"{landed.path.name}: another stream was sent"
                )
        try:
            disks = await trio.to_thread.run_sync(new_disks, self.paths, landing)
        except (DamageError, StateError):
            await self._mend_heads(thorough=True)
            try:
                disks = await trio.to_thread.run_sync(new_disks, self.paths, landing)
            except (DamageError, StateError) as error:
                raise no_base(error) from error
        point = new_point(landing, finish, disks, now_us)
        # Bounded: local disk only; a half commit is never left to chance.
        with trio.CancelScope(shield=True):
            await self._commit(landing, point)
        return point

    async def _commit(self, landing: Landing, point: Point) -> None:
        landing.close()
        async with self._files:
            folder, final = landing.folder, self.paths.point(point.number)
            await trio.to_thread.run_sync(remove_folder, final)
            await trio.to_thread.run_sync(durable.rename, folder, final)
            try:
                async with self._log.change(self.uuid) as vm:
                    vm.commit(point)
            except BaseException:
                # An error in saving does not mean that nothing was saved: memory was read from the log again.
                if point.number not in self.vm.points:
                    await trio.to_thread.run_sync(durable.rename, final, folder)
                raise
            try:
                await trio.to_thread.run_sync(maps.advance_heads, self.vm, self.paths)
            except maps.UNUSABLE as error:
                # The point stands. The next push, or the next start, makes the map again.
                _logger.error("%s: point %d: %s", self.vm.name, point.number, error)
            await self._log.journal_delete(self._journal_key)
        self.wake()

    # After the commit

    def wake(self) -> None:
        """There may be something to apply or to let go of."""
        if self.settled.is_set():  # who waits for it already goes on waiting for the same event
            self.settled = trio.Event()
        if self.resting.is_set():
            self.resting = trio.Event()
        self._wake.set()

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """While inside, nothing is committed, applied or swept: maps stand still."""
        async with self._applying, self._files:
            yield

    async def run(self) -> None:
        """Apply deltas and let go of points, until cancelled.

        What fails (a full disk, damage) is kept in ``trouble`` for status and tried again; points stay readable.
        """
        while True:
            self._wake = trio.Event()
            try:
                while await self._step():
                    pass
            except (OSError, ReplicatorError, PersistenceError) as error:
                self.trouble = f"applying deltas has stopped: {error}"
                _logger.error("%s: %s", self.vm.name, self.trouble)
                self._rest()
                with trio.move_on_after(RETRY_S):
                    await self._wake.wait()
                continue
            self.trouble = None
            if not self._wake.is_set():
                self.settled.set()
            self._rest()
            await self._wake.wait()

    def _rest(self) -> None:
        if not self._wake.is_set():
            self.resting.set()

    async def _step(self) -> bool:
        """One apply or one release; False if there is nothing to do."""
        async with (
            self._files
        ):  # a commit under way is over when it has brought the head maps forward
            vm = self.vm
        if not vm.points:
            return False
        oldest = min(vm.points)
        target = max(vm.points) if self._retention.apply else oldest
        if vm.applied < target:
            number = min(number for number in vm.points if number > vm.applied)
            try:
                async with self._applying:
                    await self._apply(number)
            except (DamageError, PhcbtError) as error:
                await self._give_up_chain(number, error)
            return True
        return await self._release()

    async def _release(self) -> bool:
        vm = self.vm
        numbers = sorted(vm.points)
        surplus = numbers[: max(0, len(numbers) - self._retention.keep)]
        gone: list[int] = []
        for number in surplus:
            # The oldest may go once the replica needs nothing below it; a held point keeps what comes after it.
            if self._held[number] or number > vm.applied or (vm.test and vm.test.point == number):
                break
            gone.append(number)
        if not gone:
            return False
        await self._let_go(gone)
        return True

    async def _let_go(self, gone: list[int]) -> None:
        self._leaving = frozenset(gone)
        try:
            async with self._log.change(self.uuid) as changing:
                changing.release(gone)
        finally:
            self._leaving = frozenset()
        await self._sweep()

    async def _sweep(self) -> None:
        async with self._files:
            landing = await self._log.journal_get(self._journal_key)
            point = int(landing["point"]) if landing is not None else None
            await trio.to_thread.run_sync(recovery.sweep, self.vm, self.paths, point)

    async def _apply(self, number: int) -> None:
        """Bring the replica to point ``number``: save what goes, tell open views, write, record."""
        vm = self.vm
        point = vm.points[number]
        old_point = vm.points.get(vm.applied)
        for disk in point.disks:
            forward = self.paths.forward(number, disk)
            old = old_point.disk(disk.disk) if old_point is not None else None
            if old_point is not None and old is not None and old.since == disk.since:
                going = apply.Overwritten(self.uuid, old, old_point.number, number)
                saved = await trio.to_thread.run_sync(
                    apply.build_reverse, self.paths, forward, going
                )
                await self._deepen(disk, old_point.number, saved.path)
                name = str(saved.path.relative_to(self.paths.root))
                await self.report_shared_damage(
                    [
                        Damage(old_point.number, disk.disk, at.offset, at.length, name, _ROTTEN)
                        for at in saved.damaged
                    ]
                )
            await trio.to_thread.run_sync(apply.write_replica, self.paths, forward, disk, number)
        async with (
            self._stacks
        ):  # a view is opened by the log as it was before, with its files, or as it is after
            async with self._log.change(self.uuid) as changing:
                changing.delta_applied(number)
            await trio.to_thread.run_sync(self._drop_forward, point)

    async def _give_up_chain(self, number: int, error: Exception) -> None:
        """A delta cannot be applied: say so; where a later seed began anew, let go of what lies between.

        Raises DamageError where there is no such seed: the points stay, readable where they are not damaged.
        """
        point = self.vm.points[number]
        reason = f"the delta cannot be applied: {error}"
        await self.report_damage(
            [Damage(number, d.disk, 0, d.size, f"points/{number}", reason) for d in point.disks]
        )
        seeds = [n for n, p in self.vm.points.items() if n > number and p.kind is PushKind.SEED]
        if not seeds:
            raise DamageError(f"point {number}: {error}; run replctl seed --again at the source")
        gone = [n for n in self.vm.points if number <= n < min(seeds)]
        if any(self._held[n] for n in gone):
            raise DamageError(
                f"point {number}: {error}; it is let go of when its readers have ended"
            )
        await self._let_go(gone)

    def _drop_forward(self, point: Point) -> None:
        for disk in point.disks:
            durable.unlink(self.paths.forward(point.number, disk))

    async def _deepen(self, disk: PointDisk, old_point: int, reverse: Path) -> None:
        """Every open view of an older point gains the reverse delta, at a moment when nothing is being read."""
        async with self._stacks, self._gate.alone():
            for opened in self._views:
                if opened.chain == stem(disk) and opened.point <= old_point > opened.deepest:
                    opened.view.stack.append(await trio.to_thread.run_sync(StoredDelta, reverse))
                    opened.deepest = old_point

    async def remake_maps(self, point: Point, disk: PointDisk) -> None:
        """Make the maps again that stand at a point whose content was proven right, as far as they are damaged."""
        async with self.still():
            if self.vm.applied == point.number:
                await trio.to_thread.run_sync(self._remake_replica_map, point, disk)
        await self._mend_heads(thorough=True)

    def _remake_replica_map(self, point: Point, disk: PointDisk) -> None:
        path = self.paths.replica_map(disk)
        if not maps.is_good(path, disk, point.number, thorough=True):
            shape = maps.find_shape(self.paths, disk)
            maps.remake_replica_map(self.paths, disk, point.number, shape)

    # Views

    @asynccontextmanager
    async def hold(self, number: int | None) -> AsyncIterator[Point]:
        """Keep a point from being let go of while inside. Raises RefusedError if it is not kept."""
        point = self.vm.get_point(number)
        if point.number in self._leaving:
            raise RefusedError(f"recovery point {point.number} is being let go of")
        self._held[point.number] += 1
        try:
            yield point
        finally:
            self._held[point.number] -= 1
            if not self._held[point.number]:
                del self._held[point.number]
                self.wake()

    def is_held(self, number: int) -> bool:
        """Whether somebody reads the point."""
        return number in self._held

    @asynccontextmanager
    async def open_disk(self, point: Point, disk: PointDisk) -> AsyncIterator[PointView]:
        """A view of one disk of a held point. Raises DamageError if a file of it is missing or unusable."""
        async with self._stacks:
            opened = await trio.to_thread.run_sync(self._open_view, point, disk)
            self._views.append(opened)
        try:
            yield opened.view
        finally:
            self._views.remove(opened)
            with trio.CancelScope(shield=True):
                async with self._gate.alone():
                    opened.view.close()

    @asynccontextmanager
    async def open_changes(
        self, older: Point, newer: Point, disk: str
    ) -> AsyncIterator[Iterator[Extent]]:
        """What changed of a disk between two held points; going on in it blocks. Raises RefusedError where that is not kept,
        DamageError if a file is missing or unusable.
        """
        async with self._stacks:  # the log and the files say the same
            found = await trio.to_thread.run_sync(self._open_changes, older, newer, disk)
        chosen = newer.disk(disk)
        assert chosen is not None
        try:
            yield changed(found[0], found[1], chosen.size)
        finally:
            for delta in found[0]:
                delta.close()

    def _open_changes(
        self, older: Point, newer: Point, disk: str
    ) -> tuple[list[StoredDelta], tuple[Extent, ...]]:
        files = change_files(self.vm, self.paths, older, newer, disk)
        opened: list[StoredDelta] = []
        try:
            opened.extend(map(StoredDelta, files.deltas))
        except (OSError, PhcbtError, DamageError) as error:
            for delta in opened:
                delta.close()
            raise DamageError(
                f"{disk}, points {older.number} to {newer.number}: {error}"
            ) from error
        return opened, files.grown

    def _open_view(self, point: Point, disk: PointDisk) -> _OpenView:
        files = stack_files(self.vm, self.paths, point, disk)
        stack: list[StoredDelta] = []
        try:
            stack.extend(map(StoredDelta, files.deltas))
            replica = Replica(files.replica, files.replica_map) if files.replica else None
        except (OSError, PhcbtError, DamageError) as error:
            for delta in stack:
                delta.close()
            raise DamageError(f"point {point.number}, {disk.disk}: {error}") from error
        header = stack[0].header if stack else None
        shape = Shape.of(header) if header else maps.find_shape(self.paths, disk)
        view = PointView(disk.size, shape, stack, replica, self._gate)
        return _OpenView(view, point.number, stem(disk), files.deepest)


__all__ = ["PushRefusedHereError", "Retention", "VmStore"]
