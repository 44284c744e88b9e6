# SPDX-License-Identifier: AGPL-3.0-or-later
"""One LMDB environment per path and process: opened once, shared, counted, closed by its last user.

LMDB must not be opened twice in a process and must not be used across a fork, and neither fault
shows itself before it does damage. So every user goes through `LMDBEnvironment.open`, which hands
out handles on one shared environment and refuses a child process. This module knows databases and
transactions, not what is stored in them.

Everything here blocks (disk, and the wait for the one writer): trio programs call it through
`trio.to_thread.run_sync`, never with ``abandon_on_cancel=True`` for a write, because the outcome of
an abandoned commit is unknown. Each call is one complete transaction, begun and ended on the
calling thread.

The map grows by itself: whoever finds it full aborts, waits until no transaction is open in the
process (new ones wait meanwhile), doubles it, and runs its request again.
"""

from __future__ import annotations

import logging
import os
import threading  # noqa: TID251 -- guards what the callers' worker threads share; starts none
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import lmdb
from eventsourcing.persistence import (
    InterfaceError,
    OperationalError,
    ProgrammingError,
)

from eventstore import mapping
from eventstore.errors import library_error
from eventstore.group import Group, NothingToCommitError, Operation, PutError
from eventstore.mapping import MAX_READERS_DEFAULT, StrPath
from eventstore.shared import Shared, close_late, inside, put_off, registry

if TYPE_CHECKING:
    Database = lmdb._Database
    Transaction = lmdb.Transaction[bytes]
    Cursor = lmdb.Cursor[bytes]

__all__ = ["LMDBEnvironment", "Operation"]

T = TypeVar("T")

#: How often a request is run again for a map that grew under it, here or in another process.
ATTEMPTS_MAX = 100

_log = logging.getLogger(__name__)


def _nothing(step: str, path: str) -> None:
    del step, path


#: Called as ``observe_commit(step, path)`` with step ``before-commit`` and then ``after-commit``
#: around every commit; replaced only by tests, which kill the process there.
observe_commit: Callable[[str, str], None] = _nothing


class LMDBEnvironment:
    """A handle on the LMDB environment at a path. Made by `open` only; usable from any thread.

    All methods block. Any use after `close`, or in a process forked after `open`, raises
    InterfaceError.
    """

    __slots__ = ("_closed", "_readonly", "_shared", "path")

    def __init__(self, shared: Shared, *, readonly: bool) -> None:
        self._shared = shared
        self._readonly = readonly
        self._closed = False
        self.path = shared.key

    @classmethod
    def open(
        cls,
        path: StrPath,
        *,
        map_size: int | None = None,
        max_readers: int = MAX_READERS_DEFAULT,
        readonly: bool = False,
        verify: bool = False,
    ) -> LMDBEnvironment:
        """Open the environment in directory ``path``, or share the one that is open already.

        The directory is made (mode 0700) if it is missing; its parent must exist. Files have mode
        0600. Every commit is fully synced. ``map_size`` is the bytes of address space that the data
        file begins with; it grows by itself. None reserves 1 TiB, or less where that is limited, so
        that growing is the exception. When the environment is shared, ``map_size`` and
        ``max_readers`` of whoever opened it first hold. ``readonly`` is for other processes than
        the writer's: it makes nothing and refuses writes. Slots of readers that died are cleared.
        A file that was cut short is always found; with ``verify`` every page is looked at first, if
        this opens the file and nobody else has it open (see `datafile.check_structure`).

        Raises OperationalError (nothing there to read, file system, address space), InternalError
        (not an LMDB file, or one that is damaged), InterfaceError (forked process; open here
        read-only and wanted for writing), ProgrammingError (bad size).
        """
        mapping.check_limits(map_size, max_readers)
        key = os.path.realpath(path)
        with registry.held():
            shared = registry.shared.get(key)
            if shared is not None:
                shared.check_owner()
                if shared.readonly and not readonly:
                    raise InterfaceError(f"event store {key} is open read-only in this process")
            else:
                shared = _open_shared(key, map_size, max_readers, readonly=readonly, verify=verify)
                registry.shared[key] = shared
            shared.handles += 1
        return cls(shared, readonly=readonly)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def readonly(self) -> bool:
        """True if this handle refuses writes."""
        return self._readonly

    def close(self) -> None:
        """Give up this handle; the last one waits for transactions in flight, then closes.

        Calling it again does nothing, nor does it in a forked child (the parent owns the
        environment). Raises InterfaceError if called from inside one of its own transactions. From
        inside a transaction of another handle it takes effect when that has ended.
        """
        shared = self._shared
        if shared.pid != os.getpid():
            self._closed = True
        if self._is_closed():
            return
        if any(handle is self for handle in inside.handles):
            raise InterfaceError(f"event store {self.path} closed inside a transaction")
        if put_off(self):
            return
        # The registry's lock to the end: nobody may open the path again before it is really closed.
        with registry.held(), shared.guard as condition:
            if self._is_closed():
                return
            self._closed = True
            shared.handles -= 1
            if shared.handles == 0:
                condition.wait_for(lambda: not shared.threads)
                shared.lmdb.close()
                del registry.shared[shared.key]

    def _is_closed(self) -> bool:
        """Asked again under the lock: another thread may have closed it meanwhile."""
        return self._closed

    def read(self, function: Callable[[Transaction], T]) -> T:
        """Run ``function`` in one read transaction and return its result.

        It must not keep the transaction, nor open or close environments. It sees one committed
        state and never waits for the writer. Keep it short: pages that it may still see cannot be
        reused, and a map that must grow waits for it. Raises what ``function`` raises, LMDB's
        errors as the library's.
        """

        def once() -> T:
            with self._shared.lmdb.begin() as txn:
                return function(txn)

        return self._attempt(once)

    def write(self, function: Callable[[Transaction], T]) -> T:
        """Run ``function`` in one write transaction; when this returns, its changes are durable.

        It must not keep the transaction, nor open or close environments. It is run again from the
        start if the map has to grow. Waits, without time limit, for other writers of any process.
        If ``function`` raises, nothing is stored and the error passes through. OperationalError
        from the commit itself (full disk, input/output error, a map that may not grow): nothing of
        it is seen by later reads, but after a failed sync what a restart finds is only known by
        looking. Raises ProgrammingError for a read-only handle and for a write inside a write.
        """
        if self._readonly:
            raise ProgrammingError(f"event store {self.path} is open read-only")
        result = self._attempt(lambda: self._write_once(function))
        self._tell_listeners()
        return result

    def commit(self, operations: Sequence[Operation[Any]]) -> list[Any]:
        """Run all operations in one write transaction; when this returns, they are durable.

        For each its result, or the exception that it failed with, as an instance. An operation sees
        what those before it wrote. One that fails takes no other down. Raises, as `write`, only if
        the commit itself fails; then nothing of any of them is stored.
        """
        if self._readonly:
            raise ProgrammingError(f"event store {self.path} is open read-only")
        group = Group(operations, self.path)
        while True:
            try:
                self._attempt(lambda: self._write_once(group.run))
            except PutError:
                continue
            except NothingToCommitError:
                return group.results()
            group.committed()
            self._tell_listeners()
            return group.results()

    def commit_one(self, operation: Operation[T]) -> T:
        """Commit one operation by itself; what it fails with is raised."""
        (result,) = self.commit([operation])
        if isinstance(result, Exception):
            raise result
        return cast("T", result)

    def _write_once(self, function: Callable[[Transaction], T]) -> T:
        shared = self._shared
        thread = threading.get_ident()
        if shared.writer == thread:
            raise ProgrammingError("a write transaction inside another would wait for itself")
        txn = shared.lmdb.begin(write=True)
        shared.writer = thread
        try:
            try:
                result = function(txn)
                observe_commit("before-commit", self.path)
            except BaseException:
                txn.abort()
                raise
            txn.commit()
        finally:
            # The next writer may have put its own name here already.
            if shared.writer == thread:
                shared.writer = None
        observe_commit("after-commit", self.path)
        return result

    def database(
        self,
        name: str,
        *,
        dupsort: bool = False,
        create: bool = True,
        fill: Callable[[Transaction, Database], None] | None = None,
    ) -> Database:
        """The named database. A missing one is made if ``create`` and the handle may write, and
        filled by ``fill`` in the same transaction.

        Raises OperationalError if it is missing and not to be made, or if there are too many,
        ProgrammingError if called for the first time inside a transaction.
        """
        found = self.find_database(name, dupsort=dupsort)
        if found is not None:
            return found
        if not create or self._readonly:
            raise OperationalError(f"event store {self.path} has no {name!r}")
        shared = self._shared
        key = name.encode()
        with shared.opening:
            found = shared.databases.get(key)
            if found is None:

                def make(txn: Transaction) -> Database:
                    made = shared.lmdb.open_db(key, txn=txn, dupsort=dupsort)
                    if fill is not None:
                        fill(txn, made)
                    return made

                found = shared.databases[key] = self.write(make)
        close_late()
        return found

    def find_database(self, name: str, *, dupsort: bool = False) -> Database | None:
        """The named database, or None if there is none. Raises ProgrammingError as `database`."""
        shared = self._shared
        shared.check_owner()
        key = name.encode()
        found = shared.databases.get(key)
        if found is not None:
            return found
        if threading.get_ident() in shared.threads:
            # It would be lost if that transaction is aborted, and could wait for it for ever.
            raise ProgrammingError(f"{name!r} must be opened before the transaction that uses it")
        # LMDB forbids two transactions of a process to open databases at the same time.
        with shared.opening:
            found = shared.databases.get(key)
            if found is None:
                with suppress(lmdb.NotFoundError):
                    found = self._attempt(
                        lambda: self._open_existing(key, dupsort=dupsort),
                        passing=lmdb.NotFoundError,
                    )
                if found is not None:
                    shared.databases[key] = found
        close_late()
        return found

    def _open_existing(self, key: bytes, *, dupsort: bool) -> Database:
        """In a write transaction, which writes nothing: the binding recycles its read transactions,
        and a database opened in one of those is lost again. It must be one of ours: the binding's
        own would hold the interpreter's lock while it waits for another writer, who needs it.
        """
        opened = self._shared.lmdb
        if self._shared.readonly:
            return opened.open_db(key, dupsort=dupsort, create=False)
        with opened.begin(write=True) as txn:
            return opened.open_db(key, txn=txn, dupsort=dupsort, create=False)

    def opened_database(self, name: str) -> Database | None:
        """The named database if this process has it open already; looks nowhere else."""
        return self._shared.databases.get(name.encode())

    def last_transaction(self) -> int:
        """The id of the last committed transaction of any process: it moves with every commit.

        Costs a few microseconds, so that it can be polled to see other processes' commits.
        """
        number: int = self._attempt(self._shared.lmdb.info)["last_txnid"]
        return number

    def check_readers(self) -> int:
        """Clear the slots of readers that died, whose pages could not be reused; how many."""
        return self._attempt(self._shared.lmdb.reader_check)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every commit that is made in this process on this path.

        It is called on the committing thread, outside of the transaction, and must neither block
        nor raise: what it raises is logged, because the commit is durable. Adding one twice is
        adding it once.
        """
        self._shared.listeners[listener] = None

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Never call ``listener`` again, but for a call that is under way. One that is not there is
        no error, nor is a closed handle.
        """
        self._shared.listeners.pop(listener, None)

    def _tell_listeners(self) -> None:
        for listener in tuple(self._shared.listeners):
            try:
                listener()
            except Exception:  # noqa: BLE001 -- logged with its traceback
                # Raised here it would tell the writer that a durable commit has failed.
                _log.exception("event store %s: a commit listener failed", self.path)

    def _attempt(self, once: Callable[[], T], *, passing: type[lmdb.Error] | tuple[()] = ()) -> T:
        """Run ``once``, which is a whole transaction, again if the map had to change. LMDB's errors
        arrive as the library's, except ``passing``.
        """
        for _ in range(ATTEMPTS_MAX):
            size = self._enter()
            try:
                return once()
            except (lmdb.MapFullError, lmdb.MapResizedError) as error:
                cause = error
            except passing:
                raise
            except lmdb.Error as error:
                raise library_error(error, self.path) from error
            finally:
                self._leave()
            self._change_map(size, cause, grow=isinstance(cause, lmdb.MapFullError))
        raise OperationalError(f"event store {self.path}: the map changes all the time")

    def _enter(self) -> int:
        """A transaction begins on this thread; the size of the map that it finds."""
        shared = self._shared
        shared.check_owner()
        thread = threading.get_ident()
        with shared.guard as condition:
            count = shared.threads.get(thread, 0)
            if shared.growing and not count:
                condition.wait_for(lambda: not shared.growing)
            if self._closed:
                raise InterfaceError(f"event store {self.path} is closed")
            shared.threads[thread] = count + 1
            size = shared.map_size
        inside.handles.append(self)
        return size

    def _leave(self) -> None:
        shared = self._shared
        thread = threading.get_ident()
        inside.handles.pop()
        with shared.guard as condition:
            count = shared.threads[thread] - 1
            if count:
                shared.threads[thread] = count
            else:
                del shared.threads[thread]
                condition.notify_all()
        close_late()

    def _change_map(self, seen: int, cause: lmdb.Error, *, grow: bool) -> None:
        """Give the map another size, with no transaction open in this process.

        Raises OperationalError if it may not grow, or if this thread is inside a transaction that
        it would wait for.
        """
        shared = self._shared
        with shared.guard as condition:
            if threading.get_ident() in shared.threads:
                raise library_error(cause, self.path) from cause
            condition.wait_for(lambda: not shared.growing)
            if shared.map_size == seen:
                shared.growing = True
                try:
                    condition.wait_for(lambda: not shared.threads)
                    if self._closed:
                        raise InterfaceError(f"event store {self.path} is closed")
                    _change_map_now(shared, seen, grow=grow)
                finally:
                    shared.growing = False
                    condition.notify_all()
        close_late()


def _open_shared(
    key: str, map_size: int | None, max_readers: int, *, readonly: bool, verify: bool
) -> Shared:
    try:
        opened = mapping.open_environment(
            key, map_size, max_readers, readonly=readonly, verify=verify
        )
        return Shared(key, opened, mapping.map_size(opened), readonly=readonly)
    except lmdb.Error as error:
        raise library_error(error, key) from error
    except OSError as error:
        raise OperationalError(f"event store {key}: {error.strerror}") from error


def _change_map_now(shared: Shared, seen: int, *, grow: bool) -> None:
    try:
        # Another process may have made it larger already.
        mapping.adopt(shared.lmdb)
        if grow and mapping.map_size(shared.lmdb) <= seen:
            mapping.grow(shared.lmdb, shared.key, seen)
    except lmdb.Error as error:
        raise library_error(error, shared.key) from error
    except OSError as error:
        raise OperationalError(f"event store {shared.key}: {error.strerror}") from error
    finally:
        shared.map_size = mapping.map_size(shared.lmdb)
