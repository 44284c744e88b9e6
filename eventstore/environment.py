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
"""

from __future__ import annotations

import os
import threading  # noqa: TID251 -- guards what the callers' worker threads share; starts none
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import lmdb
from eventsourcing.persistence import (
    DataError,
    InterfaceError,
    InternalError,
    OperationalError,
    PersistenceError,
    ProgrammingError,
)

if TYPE_CHECKING:
    Database = lmdb._Database
    Transaction = lmdb.Transaction[bytes]
    Cursor = lmdb.Cursor[bytes]

T = TypeVar("T")
StrPath = str | os.PathLike[str]

#: Address space tried in this order. A reserve costs no disk, only address space, and saves growing
#: the map at run time.
MAP_SIZE_RESERVES = tuple(1 << bits for bits in (40, 38, 36, 34, 32, 30, 28, 26))
MAP_SIZE_BYTES_MIN = 1 << 16
MAP_SIZE_BYTES_MAX = 1 << 46
MAX_READERS_DEFAULT = 126
MAX_READERS_LIMIT = 4096
#: Named databases per environment: three for each log of each application, one for each journal.
MAX_DATABASES = 32


def _nothing(step: str, path: str) -> None:
    del step, path


#: Called as ``observe_commit(step, path)`` with step ``before-commit`` and then ``after-commit``
#: around every commit; replaced only by tests, which kill the process there.
observe_commit: Callable[[str, str], None] = _nothing

_OPERATIONAL = (
    lmdb.MapFullError,
    lmdb.MapResizedError,
    lmdb.ReadersFullError,
    lmdb.DiskError,
    lmdb.LockError,
    lmdb.MemoryError,
    lmdb.DbsFullError,
    lmdb.TxnFullError,
    lmdb.TlsFullError,
)
_INTERNAL = (
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
)


def _library_error(error: lmdb.Error, path: str) -> PersistenceError:
    """The `eventsourcing` error that says the same as an LMDB error."""
    text = f"event store {path}: {error}"
    if isinstance(error, lmdb.MapFullError):
        return OperationalError(f"{text} (the map is full: open it with a larger LMDB_MAP_SIZE)")
    if isinstance(error, _OPERATIONAL):
        return OperationalError(text)
    if isinstance(error, lmdb.BadValsizeError):
        return DataError(text)
    if isinstance(error, _INTERNAL):
        return InternalError(text)
    if isinstance(error, (lmdb.ReadonlyError, lmdb.BadTxnError)):
        return ProgrammingError(text)
    if type(error) is lmdb.Error:
        # Without a class of its own, a positive code is an errno of the file system, and 0 is the
        # binding's own refusal: the path is open elsewhere in the process, or an object was used
        # after it was closed.
        code: int = getattr(error, "code", 0)
        return OperationalError(text) if code > 0 else InterfaceError(text)
    return PersistenceError(text)


@contextmanager
def _mapped_errors(path: str) -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise _library_error(error, path) from error


class _Shared:
    """What all handles on one path share, under ``condition``. LMDB serialises the writers."""

    __slots__ = (
        "condition",
        "databases",
        "handles",
        "key",
        "lmdb",
        "opening",
        "pid",
        "readonly",
        "threads",
        "writer",
    )

    def __init__(self, key: str, environment: lmdb.Environment, *, readonly: bool) -> None:
        self.key = key
        self.lmdb = environment
        self.readonly = readonly
        self.pid = os.getpid()
        self.handles = 0
        self.databases: dict[bytes, Database] = {}
        self.condition = threading.Condition()
        self.opening = threading.Lock()
        #: Transactions in flight by thread, and the thread that is writing.
        self.threads: dict[int, int] = {}
        self.writer: int | None = None


class _Registry:
    """The environments that are open in this process, by real path; only to be used while it is
    ``held``.
    """

    __slots__ = ("holder", "late", "lock", "shared")

    def __init__(self) -> None:
        self.shared: dict[str, _Shared] = {}
        self.late: list[LMDBEnvironment] = []
        self.renew_lock()

    def renew_lock(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. The garbage collector may run at any moment, and close a forgotten handle
        in the very thread that holds it: such a handle waits in ``late``, and is closed afterwards.
        """
        with self.lock:
            self.holder = threading.get_ident()
            try:
                yield
            finally:
                self.holder = None
        while self.late:
            self.late.pop().close()


_registry = _Registry()
# Another thread may hold the lock at the moment of a fork; in the child nobody would release it.
os.register_at_fork(after_in_child=_registry.renew_lock)


class LMDBEnvironment:
    """A handle on the LMDB environment at a path. Made by `open` only; usable from any thread.

    All methods block. Any use after `close`, or in a process forked after `open`, raises
    InterfaceError.
    """

    __slots__ = ("_closed", "_readonly", "_shared", "path")

    def __init__(self, shared: _Shared, *, readonly: bool) -> None:
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
    ) -> LMDBEnvironment:
        """Open the environment in directory ``path``, or share the one that is open already.

        The directory is made (mode 0700) if it is missing; its parent must exist. Files have mode
        0600. Every commit is fully synced. ``map_size`` is the most bytes that the data file may
        ever take; None reserves 1 TiB of address space, or less where that is limited. When the
        environment is shared, ``map_size`` and ``max_readers`` of whoever opened it first hold.
        ``readonly`` is for other processes than the writer's: it makes nothing and refuses writes.
        Slots of readers that died are cleared.

        Raises OperationalError (nothing there to read, file system, address space), InternalError
        (not an LMDB file), InterfaceError (forked process; open here read-only and wanted for
        writing), ProgrammingError (bad size).
        """
        _check_limits(map_size, max_readers)
        key = os.path.realpath(path)
        with _registry.held():
            shared = _registry.shared.get(key)
            if shared is not None:
                _check_owner(shared)
                if shared.readonly and not readonly:
                    raise InterfaceError(f"event store {key} is open read-only in this process")
            else:
                try:
                    with _mapped_errors(key):
                        shared = _open_shared(key, map_size, max_readers, readonly=readonly)
                except OSError as error:
                    raise OperationalError(f"event store {key}: {error.strerror}") from error
                _registry.shared[key] = shared
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
        environment). Raises InterfaceError if called from inside one of its own transactions.
        """
        shared = self._shared
        if shared.pid != os.getpid():
            self._closed = True
        if self._is_closed():
            return
        if _registry.holder == threading.get_ident():
            _registry.late.append(self)
            return
        # The registry's lock to the end: nobody may open the path again before it is really closed.
        with _registry.held(), shared.condition:
            if self._is_closed():
                return
            if threading.get_ident() in shared.threads:
                raise InterfaceError(f"event store {self.path} closed inside a transaction")
            self._closed = True
            shared.handles -= 1
            if shared.handles == 0:
                shared.condition.wait_for(lambda: not shared.threads)
                shared.lmdb.close()
                del _registry.shared[shared.key]

    def _is_closed(self) -> bool:
        """Asked again under the lock: another thread may have closed it meanwhile."""
        return self._closed

    def read(self, function: Callable[[Transaction], T]) -> T:
        """Run ``function`` in one read transaction and return its result.

        It must not keep the transaction, nor open or close environments. It sees one committed
        state and never waits for the writer. Keep it short: pages that it may still see cannot be
        reused. Raises what ``function`` raises, LMDB's errors as the library's.
        """
        with self._in_flight(), _mapped_errors(self.path), self._shared.lmdb.begin() as txn:
            return function(txn)

    def write(self, function: Callable[[Transaction], T]) -> T:
        """Run ``function`` in one write transaction; when this returns, its changes are durable.

        It must not keep the transaction, nor open or close environments. Waits, without time limit,
        for other writers of any process. If ``function`` raises, nothing is stored and the error
        passes through. OperationalError from the commit itself (full disk, input/output error):
        nothing of it is seen by later reads, but after a failed sync what a restart finds is only
        known by looking. Raises ProgrammingError for a read-only handle and for a write inside a
        write.
        """
        if self._readonly:
            raise ProgrammingError(f"event store {self.path} is open read-only")
        shared = self._shared
        thread = threading.get_ident()
        with self._in_flight(), _mapped_errors(self.path):
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

    def database(self, name: str, *, dupsort: bool = False, create: bool = True) -> Database:
        """The named database. A missing one is made if ``create`` and the handle may write.

        Raises OperationalError if it is missing and not to be made, or if there are too many,
        ProgrammingError if called for the first time inside a write.
        """
        shared = self._shared
        _check_owner(shared)
        key = name.encode()
        found = shared.databases.get(key)
        if found is not None:
            return found
        if shared.writer == threading.get_ident():
            raise ProgrammingError(f"{name!r} must be opened before the write that uses it")

        # LMDB forbids two transactions of a process to open databases at the same time.
        with shared.opening:
            # Without a transaction of ours: the binding recycles its read transactions, and a
            # database opened in one of those is lost again.
            with self._in_flight(), _mapped_errors(self.path), suppress(lmdb.NotFoundError):
                found = shared.lmdb.open_db(key, dupsort=dupsort, create=False)
            if found is None and create and not self._readonly:
                found = self.write(lambda txn: shared.lmdb.open_db(key, txn=txn, dupsort=dupsort))
            if found is None:
                raise OperationalError(f"event store {self.path} has no {name!r}")
            shared.databases[key] = found
        return found

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        shared = self._shared
        _check_owner(shared)
        thread = threading.get_ident()
        with shared.condition:
            if self._closed:
                raise InterfaceError(f"event store {self.path} is closed")
            shared.threads[thread] = shared.threads.get(thread, 0) + 1
        try:
            yield
        finally:
            with shared.condition:
                shared.threads[thread] -= 1
                if not shared.threads[thread]:
                    del shared.threads[thread]
                    shared.condition.notify_all()


def _check_limits(map_size: int | None, max_readers: int) -> None:
    if map_size is not None and not MAP_SIZE_BYTES_MIN <= map_size <= MAP_SIZE_BYTES_MAX:
        raise ProgrammingError(
            f"LMDB map size {map_size} is not within "
            f"{MAP_SIZE_BYTES_MIN}..{MAP_SIZE_BYTES_MAX} bytes"
        )
    if not 1 <= max_readers <= MAX_READERS_LIMIT:
        raise ProgrammingError(
            f"LMDB max readers {max_readers} is not within 1..{MAX_READERS_LIMIT}"
        )


def _check_owner(shared: _Shared) -> None:
    """An inherited environment seems to work in a child, and shares the parent's lock slots: refuse
    it.
    """
    if shared.pid != os.getpid():
        raise InterfaceError(
            f"event store {shared.key} was opened before this process was forked: "
            "start processes by spawn"
        )


def _open_shared(key: str, map_size: int | None, max_readers: int, *, readonly: bool) -> _Shared:
    if readonly:
        data = Path(key) / "data.mdb"
        # LMDB makes the file before it writes its first pages: an empty one is no environment yet.
        if not data.is_file() or data.stat().st_size == 0:
            raise OperationalError(f"there is no event store in {key}")
    elif not os.path.isdir(key):
        os.mkdir(key, 0o700)
    environment = _open_lmdb(key, map_size, max_readers, readonly=readonly)
    try:
        if not readonly:
            # LMDB syncs what is in its files but not their names.
            _sync_directory(key)
            _sync_directory(os.path.dirname(key))
        environment.reader_check()
    except BaseException:
        environment.close()
        raise
    return _Shared(key, environment, readonly=readonly)


def _open_lmdb(
    key: str, map_size: int | None, max_readers: int, *, readonly: bool
) -> lmdb.Environment:
    sizes = MAP_SIZE_RESERVES if map_size is None else (map_size,)
    for attempt, size in enumerate(sizes, start=1):
        try:
            return lmdb.Environment(
                key,
                map_size=size + -size % os.sysconf("SC_PAGE_SIZE"),
                readonly=readonly,
                create=False,
                mode=0o600,
                max_readers=max_readers,
                max_dbs=MAX_DATABASES,
                # A replay touches pages all over the file: reading ahead of each fault only delays
                # it.
                readahead=False,
            )
        except lmdb.MemoryError:
            if attempt == len(sizes):
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
