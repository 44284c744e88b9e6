# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the handles of one process share: the environments that are open, and who is using them.

The garbage collector may run at any moment, also while a thread holds one of the locks here, and
close a forgotten handle in that very thread. Such a handle must not wait for a lock or for a
transaction: it is put in a list, and closed when the thread has left. Knows nothing of LMDB's files.
"""

from __future__ import annotations

import os
import threading  # noqa: TID251 -- guards what the callers' worker threads share; starts none
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import lmdb
from eventsourcing.persistence import InterfaceError

if TYPE_CHECKING:
    Database = lmdb._Database


class Closable(Protocol):
    """A handle, as far as this module knows it."""

    def close(self) -> None:
        """Give it up."""


class _Inside(threading.local):
    """What the current thread is in the middle of."""

    def __init__(self) -> None:
        #: Locks of this module that it holds or waits for.
        self.locks = 0
        #: The handles whose transactions it runs, the innermost last.
        self.handles: list[Closable] = []


inside = _Inside()
_late: list[Closable] = []


def close_late() -> None:
    """Close what the garbage collector gave up meanwhile, unless this thread is still inside."""
    while _late and not inside.locks and not inside.handles:
        try:
            handle = _late.pop()
        except IndexError:  # pragma: no cover -- another thread was faster
            return
        handle.close()


def put_off(handle: Closable) -> bool:
    """True if this thread cannot close a handle now; then it is closed later."""
    if inside.locks or inside.handles:
        _late.append(handle)
        return True
    return False


class Guarded:
    """A condition; while a thread holds it or waits for it, nothing is closed in that thread."""

    __slots__ = ("_condition",)

    def __init__(self) -> None:
        self._condition = threading.Condition()

    def __enter__(self) -> threading.Condition:
        inside.locks += 1
        try:
            self._condition.acquire()
        except BaseException:
            inside.locks -= 1
            raise
        return self._condition

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._condition.release()
        inside.locks -= 1


class Shared:
    """What all handles on one path share, under ``guard``. LMDB serialises the writers."""

    __slots__ = (
        "databases",
        "growing",
        "guard",
        "handles",
        "key",
        "listeners",
        "lmdb",
        "map_size",
        "opening",
        "pid",
        "readonly",
        "threads",
        "writer",
    )

    def __init__(
        self, key: str, environment: lmdb.Environment, map_size: int, *, readonly: bool
    ) -> None:
        self.key = key
        self.lmdb = environment
        self.map_size = map_size
        self.readonly = readonly
        self.pid = os.getpid()
        self.handles = 0
        self.databases: dict[bytes, Database] = {}
        self.guard = Guarded()
        self.opening = Guarded()
        #: Transactions in flight by thread, and the thread that is writing.
        self.threads: dict[int, int] = {}
        self.writer: int | None = None
        #: True while a thread waits for the transactions in flight to end, to change the map.
        self.growing = False
        #: A dictionary for its order; changed and copied in single steps, so without a lock: the
        #: garbage collector removes listeners too.
        self.listeners: dict[Callable[[], None], None] = {}

    def check_owner(self) -> None:
        """Raises InterfaceError in a forked child: there an inherited environment seems to work,
        and shares the parent's lock slots.
        """
        if self.pid != os.getpid():
            raise InterfaceError(
                f"event store {self.key} was opened before this process was forked: "
                "start processes by spawn"
            )


class Registry:
    """The environments that are open in this process, by real path; only to be used while it is
    ``held``.
    """

    __slots__ = ("_guard", "shared")

    def __init__(self) -> None:
        self.shared: dict[str, Shared] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a forked child: another thread may have held the lock, and nobody would release it."""
        self._guard = Guarded()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, and close afterwards what was given up meanwhile."""
        try:
            with self._guard:
                yield
        finally:
            close_late()


registry = Registry()
os.register_at_fork(after_in_child=registry.renew_lock)
