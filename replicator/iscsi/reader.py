# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a disk through the loss of its session: log in anew and read again, a bounded number of times.

Reads change nothing, so that a read that may or may not have happened can be repeated. What must not change is the disk:
after each new login its size, serial number and identifiers are compared with the first ones.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Final

import trio

from replicator.disk import Extent
from replicator.iscsi.disk import IscsiDisk, open_disk
from replicator.iscsi.errors import (
    DiskChangedError,
    IscsiError,
    LoginRefusedError,
    PortalUnreachableError,
    SessionLostError,
    TimedOutError,
)
from replicator.iscsi.settings import IscsiSettings, Portal
from replicator.nursery import flat_nursery

#: New logins in a row without one read that came through.
ATTEMPTS: Final = 5
#: The first pause before a new login, seconds; it doubles up to the last.
PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 8.0
#: What a new login may mend. A portal's addresses move between hosts while one of them restarts.
_PASSING: Final = (SessionLostError, TimedOutError, PortalUnreachableError)


def _may_pass(error: IscsiError) -> bool:
    """Whether another attempt makes sense; a refusal of class 3 is the target's own trouble (RFC 7143, 11.13.5)."""
    of_target = isinstance(error, LoginRefusedError) and error.status >> 8 == 3
    return of_target or isinstance(error, _PASSING)


class DiskReader:
    """A disk that is read in one session after another. Made by ``open_reader``. Any number of tasks may read at once."""

    def __init__(
        self,
        nursery: trio.Nursery,
        connect: Callable[[], AbstractAsyncContextManager[IscsiDisk]],
        *,
        attempts: int,
        pause_s: float,
    ) -> None:
        self._nursery = nursery
        self._connect = connect
        self._attempts = attempts
        self._pause_s = pause_s
        self._disk: IscsiDisk | None = None
        self._leave = trio.Event()
        self._failed = 0
        self._lock = trio.Lock()
        self.logins = 0

    @property
    def disk(self) -> IscsiDisk:
        """The disk in the newest session: for its size, serial number and identifiers."""
        assert self._disk is not None
        return self._disk

    @property
    def size(self) -> int:
        """Size in bytes; it does not change."""
        return self.disk.size

    async def start(self) -> None:
        """The first login; it is not repeated. Raises as ``open_disk``."""
        self._disk = await self._log_in()

    async def close(self) -> None:
        """Log out."""
        self._leave.set()
        await trio.lowlevel.checkpoint()

    async def read_into(self, offset: int, view: memoryview) -> None:
        """As ``IscsiDisk.read_into``; a session that is lost is replaced, and the whole range read again.

        Raises what the last of the attempts did, and DiskChangedError.
        """
        await self._repeat(lambda disk: disk.read_into(offset, view))

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. As ``read_into``."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    async def allocated(self, offset: int = 0) -> AsyncGenerator[Extent, None]:
        """As ``IscsiDisk.allocated``; after a new login it goes on where it was."""
        at = offset
        while at < self.size:
            disk = self.disk
            try:
                async with aclosing(disk.allocated(at)) as extents:
                    async for extent in extents:
                        self._failed = 0
                        yield extent
                        at = extent.end
            except _PASSING as error:
                await self._replace(disk, error)

    async def _repeat(self, read: Callable[[IscsiDisk], Awaitable[None]]) -> None:
        while True:
            disk = self.disk
            try:
                await read(disk)
            except _PASSING as error:
                await self._replace(disk, error)
            else:
                self._failed = 0
                return

    async def _replace(self, disk: IscsiDisk, error: IscsiError) -> None:
        """Have another session than ``disk``'s, or raise: ``error``, what became of the logins, or DiskChangedError."""
        async with self._lock:
            if self._disk is not disk:
                return  # another reader has met the same loss
            self._leave.set()
            reason = error
            while self._failed < self._attempts:
                pause_s = min(self._pause_s * 2**self._failed, PAUSE_MAX_S)
                self._failed += 1
                await trio.sleep(pause_s)
                try:
                    fresh = await self._log_in()
                except IscsiError as again:
                    if not _may_pass(again):
                        raise
                    reason = again
                    continue
                _check_same(disk, fresh)
                self._disk = fresh
                return
            raise reason

    async def _log_in(self) -> IscsiDisk:
        self._leave = trio.Event()
        disk: IscsiDisk = await self._nursery.start(self._hold, self._leave)
        self.logins += 1
        return disk

    async def _hold(
        self, leave: trio.Event, task_status: trio.TaskStatus[IscsiDisk] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with self._connect() as disk:
            task_status.started(disk)
            await leave.wait()


def _check_same(old: IscsiDisk, new: IscsiDisk) -> None:
    for what, before, now in (
        ("size", old.size, new.size),
        ("serial number", old.serial, new.serial),
        ("identifiers", old.identifiers, new.identifiers),
    ):
        if before != now:
            raise DiskChangedError(
                f"{new.where}: after a new login the disk's {what} is {now}, not {before}"
            )


@asynccontextmanager
async def open_reader(
    portal: Portal,
    target_name: str,
    lun: int | None,
    settings: IscsiSettings,
    *,
    attempts: int = ATTEMPTS,
    pause_s: float = PAUSE_S,
) -> AsyncIterator[DiskReader]:
    """``open_disk`` for a reader that survives up to ``attempts`` losses of the session in a row.

    Raises as ``open_disk`` for the first login, which is not repeated: somebody who waits for a target to appear knows for how
    long. Cancellation and the end log out.
    """

    def connect() -> AbstractAsyncContextManager[IscsiDisk]:
        return open_disk(portal, target_name, lun, settings)

    async with flat_nursery() as nursery:
        reader = DiskReader(nursery, connect, attempts=attempts, pause_s=pause_s)
        await reader.start()
        try:
            yield reader
        finally:
            await reader.close()


__all__ = ["ATTEMPTS", "PAUSE_S", "DiskReader", "open_reader"]
