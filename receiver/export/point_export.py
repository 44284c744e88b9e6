# SPDX-License-Identifier: AGPL-3.0-or-later
"""A recovery point's disks as NBD exports on Unix sockets, for as long as a block is open.

Reads that fail answer the client with an error, and become damage in the log: a point that a guest cannot read is a
point that an operator must hear of.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from eventsourcing.persistence import PersistenceError

from receiver.export.nbd_server import serve_nbd
from receiver.store.view import PointView
from receiver.store.vm_store import VmStore
from replicator import durable
from replicator.domain.model import Damage, Point, PointDisk
from replicator.errors import DamageError, PhcbtError, RefusedError, ReplicatorError, StateError
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

#: Linux' limit for the path of a Unix socket, without the zero byte at its end.
SOCKET_PATH_MAX = 107
#: Failed reads waiting to be looked into; more are dropped, because the same damage will be met again.
_FAILURES_MAX = 64
#: Grains reported by one export; after that the disk is simply bad.
_REPORTS_MAX = 1000
#: For failed reads that are left to look into when an export ends. Seconds.
_FINISH_S = 10


def socket_path(run_dir: Path, name: str) -> Path:
    """Where a socket of that name goes. Raises StateError if the path is too long for a Unix socket."""
    path = run_dir / name
    length = len(bytes(path))
    if length > SOCKET_PATH_MAX:
        raise StateError(
            f"socket {path} has a path of {length} bytes, a Unix socket's may have {SOCKET_PATH_MAX}:"
            " use a shorter state_dir"
        )
    return path


def make_run_dir(run_dir: Path) -> None:
    """Make the folder of sockets, for its owner only. Blocks. Raises OSError."""
    durable.make_dir(run_dir)
    run_dir.chmod(0o700)


@asynccontextmanager
async def export_disk(
    store: VmStore, point: int | None, disk: str, run_dir: Path
) -> AsyncIterator[dict[str, Any]]:
    """Serve one disk of a point (None: the newest) while the block is open; yields what /export answers.

    The point stays held. Raises RefusedError for an unknown point or disk, DamageError, StateError; leaves no socket.
    """
    async with store.hold(point) as held:
        chosen = held.disk(disk)
        if chosen is None:
            have = ", ".join(other.disk for other in held.disks)
            raise RefusedError(
                f"point {held.number} of VM {store.vm.name} has no disk {disk!r} (disks: {have})"
            )
        socket = socket_path(run_dir, f"e-{secrets.token_hex(4)}.sock")
        await trio.to_thread.run_sync(make_run_dir, run_dir)
        async with serve_disk(store, held, chosen, socket):
            yield {
                "socket": str(socket),
                "name": chosen.disk,
                "size": chosen.size,
                "point": held.number,
                "root": chosen.root.hex(),
            }


@asynccontextmanager
async def serve_disk(
    store: VmStore, point: Point, disk: PointDisk, socket: Path
) -> AsyncIterator[None]:
    """Serve one disk of a held point at ``socket``, under the disk's name, while the block is open.

    Raises DamageError if the disk cannot be opened, StateError if the socket cannot be made.
    """
    async with (
        store.open_disk(point, disk) as view,
        _Reporter(store, point, disk, view).finishing() as reporter,
        flat_nursery() as nursery,
    ):
        nursery.start_soon(reporter.run)
        await nursery.start(partial(serve_nbd, socket, {disk.disk: view}, on_error=reporter.failed))
        yield
        nursery.cancel_scope.cancel()


class _Reporter:
    """Looks into failed reads, grain by grain, and has the damaged ones recorded."""

    def __init__(self, store: VmStore, point: Point, disk: PointDisk, view: PointView) -> None:
        self._store = store
        self._point = point
        self._disk = disk
        self._view = view
        self._reported: set[int] = set()
        self._current: tuple[int, int] | None = None  # being looked into
        self._send, self._receive = trio.open_memory_channel[tuple[int, int]](_FAILURES_MAX)

    def failed(self, export: str, offset: int, length: int, error: Exception) -> None:
        """A read failed; does not wait."""
        if not isinstance(error, DamageError | PhcbtError | OSError):
            _logger.error("%s: NBD export %s failed", self._where, export, exc_info=error)
            return
        _logger.error("%s: %d bytes at %d: %s", self._where, length, offset, error)
        try:
            self._send.send_nowait((offset, length))
        except trio.WouldBlock:
            _logger.warning("%s: too many failed reads to look into each", self._where)

    @property
    def _where(self) -> str:
        return f"{self._store.vm.name}, point {self._point.number}, {self._disk.disk}"

    async def run(self) -> None:
        """Until cancelled. What cannot be recorded is logged."""
        async for failure in self._receive:
            self._current = failure
            await self._look_into(failure)
            self._current = None

    @asynccontextmanager
    async def finishing(self) -> AsyncIterator[_Reporter]:
        """Looks into what is left at the end: a client that gives up at the first error must not hide it."""
        try:
            yield self
        finally:
            with trio.move_on_after(_FINISH_S, shield=True), self._receive:
                if self._current is not None:
                    await self._look_into(self._current)
                with suppress(trio.WouldBlock):
                    while True:
                        await self._look_into(self._receive.receive_nowait())

    async def _look_into(self, failure: tuple[int, int]) -> None:
        try:
            damages = await self._damages(*failure)
            await self._store.report_shared_damage(damages)
            self._reported.update(damage.offset // self._view.grain for damage in damages)
        except (OSError, ReplicatorError, PersistenceError) as error:
            _logger.error("%s: damage could not be recorded: %s", self._where, error)

    async def _damages(self, offset: int, length: int) -> list[Damage]:
        grain = self._view.grain
        found: list[Damage] = []
        for number in range(offset // grain, (offset + length - 1) // grain + 1):
            if number in self._reported or len(self._reported) >= _REPORTS_MAX:
                continue
            at = number * grain
            count = min(grain, self._disk.size - at)
            try:
                await self._view.read(at, count)
            except (DamageError, PhcbtError, OSError) as error:
                name = await self._holder(number)
                found.append(
                    Damage(self._point.number, self._disk.disk, at, count, name, str(error))
                )
        return found

    async def _holder(self, grain: int) -> str:
        """The file that holds a grain, as an operator finds it below the VM's folder."""
        try:
            file = await trio.to_thread.run_sync(self._view.holder, grain)
        except (DamageError, PhcbtError, OSError):
            return "?"  # the index that would say so is what is damaged
        return str(file.relative_to(self._store.paths.root)) if file.name else "?"


__all__ = ["SOCKET_PATH_MAX", "export_disk", "make_run_dir", "serve_disk", "socket_path"]
