# SPDX-License-Identifier: AGPL-3.0-or-later
"""The one way into an LMDB environment for a trio program: writes in groups, reads beside them.

LMDB has one writer, and a durable commit costs the same for one change as for two hundred. So one
task takes what is queued, commits it in one transaction, and gives each waiter its own outcome.
This module knows operations and outcomes, not what they write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast

import trio
from eventsourcing.persistence import InterfaceError, PersistenceError

from eventstore.environment import LMDBEnvironment

if TYPE_CHECKING:
    from eventstore.environment import Operation

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Operations that are queued at most; whoever has one more waits to enter.
QUEUE_MAX = 1024
BATCH_MAX_DEFAULT = 256
READERS_DEFAULT = 4
READER_CHECK_S_DEFAULT = 60.0


class LaneClosedError(InterfaceError):
    """The lane takes nothing more: it is closing or closed."""


class _Request:
    """An operation, the task that waits for it, and what became of it."""

    __slots__ = ("operation", "result", "shared_error", "task")

    def __init__(self, operation: Operation[Any], task: trio.lowlevel.Task) -> None:
        self.operation = operation
        self.task = task
        #: The operation's result, or the exception that it alone failed with.
        self.result: Any = None
        #: Why the whole batch failed.
        self.shared_error: BaseException | None = None


class Lane:
    """Commits and reads for any number of tasks of one trio program. Made by `open_lane` only.

    Its methods belong to the trio thread.
    """

    def __init__(self, environment: LMDBEnvironment, *, readers: int, batch_max: int) -> None:
        if readers < 1 or not 1 <= batch_max <= QUEUE_MAX:
            raise ValueError(f"{readers} readers, batches of {batch_max}: not within bounds")
        self.environment = environment
        self._batch_max = batch_max
        self._writer = trio.CapacityLimiter(1)
        self._readers = trio.CapacityLimiter(readers)
        #: One for each operation that may still be queued.
        self._places = trio.Semaphore(QUEUE_MAX)
        #: In the order of entry; a dictionary, so that a cancelled request leaves at once.
        self._queue: dict[_Request, None] = {}
        self._work = trio.Event()
        self._closed = False
        self._reads = 0
        self._no_reads = trio.Event()

    @property
    def closed(self) -> bool:
        """True as soon as nothing more is taken."""
        return self._closed

    async def commit(self, operation: Operation[T]) -> T:
        """Commit ``operation`` durably, in one transaction with what others commit, and return its
        result.

        Raises what the operation itself failed with (the others of its transaction go on without
        it), what the commit failed with, or LaneClosedError. Cancelled while it is queued, it is
        never written. Once it was taken the call ends with its outcome, cancelled or not, so that a
        Cancelled always means: not written.
        """
        self._check_open()
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            await self._places.acquire()
            if self._closed:
                self._places.release()
                raise LaneClosedError("the lane was closed before this operation entered") from None
        request = _Request(operation, trio.lowlevel.current_task())
        self._queue[request] = None
        self._work.set()

        def abort(_: object) -> trio.lowlevel.Abort:
            if request not in self._queue:
                return trio.lowlevel.Abort.FAILED
            del self._queue[request]
            self._places.release()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if request.shared_error is not None:
            raise _own(request.shared_error)
        if isinstance(request.result, BaseException):
            raise request.result
        return cast("T", request.result)

    async def read(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call the blocking ``function(*args)`` in a worker thread, at most so many at a time as
        the lane has readers, and return its result.

        The function must end its transactions before it returns. Raises what it raises, or
        LaneClosedError. A cancellation is heard before the thread starts; from then on the call
        ends with the function's outcome.
        """
        self._check_open()
        self._reads += 1
        try:
            return await trio.to_thread.run_sync(function, *args, limiter=self._readers)
        finally:
            self._reads -= 1
            if self._closed and not self._reads:
                self._no_reads.set()

    def _check_open(self) -> None:
        if self._closed:
            raise LaneClosedError(f"the lane of event store {self.environment.path} is closed")

    def _close(self) -> None:
        """Take nothing more. The writer ends when the queue is empty."""
        self._closed = True
        self._work.set()
        if not self._reads:
            self._no_reads.set()

    async def _write(self) -> None:
        """The writer task. It ends by `_close` only: what was taken must reach its outcome, and
        what is queued has waiters, whose own cancellation takes it out of the queue.
        """
        with trio.CancelScope(shield=True):
            try:
                while self._queue or not self._closed:
                    if self._queue:
                        await self._commit_batch(self._take())
                    else:
                        self._work = trio.Event()
                        await self._work.wait()
            finally:
                # Only after an error that is no Exception is anything left here.
                self._closed = True
                while self._queue:
                    left = self._take()
                    self._wake(left, LaneClosedError("the lane's writer was stopped"))

    def _take(self) -> list[_Request]:
        batch: list[_Request] = []
        for request in self._queue:
            batch.append(request)
            if len(batch) == self._batch_max:
                break
        for request in batch:
            del self._queue[request]
            self._places.release()
        return batch

    async def _commit_batch(self, batch: Sequence[_Request]) -> None:
        operations = [request.operation for request in batch]
        try:
            results = await trio.to_thread.run_sync(
                self.environment.commit, operations, limiter=self._writer
            )
            assert len(results) == len(batch), "a commit has one result for each operation"
        except BaseException as error:
            self._wake(batch, error)
            if not isinstance(error, Exception):
                raise
            return
        for request, result in zip(batch, results, strict=True):
            request.result = result
        self._wake(batch, None)

    @staticmethod
    def _wake(batch: Sequence[_Request], error: BaseException | None) -> None:
        for request in batch:
            request.shared_error = error
            trio.lowlevel.reschedule(request.task)

    async def _check_readers(self, every_s: float) -> None:
        while True:
            await trio.sleep(every_s)
            # Behind the commits' own limiter: it takes a lock that the writer needs.
            await trio.to_thread.run_sync(self.environment.check_readers, limiter=self._writer)


def _own(error: BaseException) -> BaseException:
    """The error for one of several waiters: an exception object collects the traceback of each task
    that raises it.
    """
    if isinstance(error, PersistenceError):
        own = type(error)(*error.args)
        own.__cause__ = error
        return own
    return error


@asynccontextmanager
async def open_lane(
    environment: LMDBEnvironment,
    *,
    readers: int = READERS_DEFAULT,
    batch_max: int = BATCH_MAX_DEFAULT,
    reader_check_s: float = READER_CHECK_S_DEFAULT,
) -> AsyncIterator[Lane]:
    """A lane into ``environment``, which stays the caller's to close, afterwards.

    ``readers`` reads run at a time, up to ``batch_max`` operations share a transaction, and slots
    of dead readers are cleared at the start and every ``reader_check_s`` seconds. At the end of the
    block, however it ends, intake stops, what is still queued is committed unless its waiter was
    cancelled, and reads under way are waited for: no task is left. Raises ValueError (bounds), and
    what clearing the slots raises. As everywhere in trio, an error of the block arrives in an
    exception group.
    """
    lane = Lane(environment, readers=readers, batch_max=batch_max)
    await trio.to_thread.run_sync(environment.check_readers, limiter=lane._writer)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane._write)
            nursery.start_soon(lane._check_readers, reader_check_s)
            try:
                yield lane
            finally:
                lane._close()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await lane._no_reads.wait()
