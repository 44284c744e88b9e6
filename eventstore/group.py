# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations that share one write transaction, each with its own result or its own error.

Knows nothing of how the transaction is begun and committed; `LMDBEnvironment.commit` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import lmdb

from eventstore.errors import library_error

if TYPE_CHECKING:
    from eventstore.environment import Transaction

T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """A change that can share a transaction with others, see `LMDBEnvironment.commit`.

    All of it may be run again from `check` on: what it remembers, `check` must set anew.
    """

    def check(self, txn: Transaction) -> None:
        """May raise, then only this operation fails. Must not write anything."""

    def put(self, txn: Transaction) -> T_co:
        """Writes. If it raises, the transaction is aborted, this operation gets the error, and the
        others are run again without it.
        """

    def committed(self) -> None:
        """Called after the durable commit, to promote what is cached. Must not raise."""


class PutError(Exception):
    """An operation failed after it may have written: the others start again without it."""


class NothingToCommitError(Exception):
    """Every operation has failed."""


class Group:
    """Operations, and what has become of them."""

    __slots__ = ("_done", "_failed", "_operations", "_path", "_results")

    def __init__(self, operations: Sequence[Operation[Any]], path: str) -> None:
        self._operations = operations
        self._path = path
        self._results: list[Any] = [None] * len(operations)
        #: Errors of those that are left out when the others are run again, by place.
        self._failed: dict[int, Exception] = {}
        self._done: list[Operation[Any]] = []

    def run(self, txn: Transaction) -> None:
        """Run all that have not failed. May be called again, in another transaction.

        Raises PutError or NothingToCommitError, with which the transaction must be aborted, and
        LMDB's errors about the size of the map, which are nobody's fault.
        """
        self._done.clear()
        for place, operation in enumerate(self._operations):
            if place not in self._failed and self._run_one(txn, operation, place):
                self._done.append(operation)
        if not self._done:
            raise NothingToCommitError

    def _run_one(self, txn: Transaction, operation: Operation[Any], place: int) -> bool:
        """True if it has written, False if its check refused it."""
        try:
            try:
                operation.check(txn)
            except lmdb.Error:
                # Some of them spoil the transaction: as if it had written.
                raise
            except Exception as error:  # noqa: BLE001 -- handed to whoever asked for the operation
                self._results[place] = error
                return False
            self._results[place] = operation.put(txn)
        except (lmdb.MapFullError, lmdb.MapResizedError):
            raise
        except Exception as error:
            self._failed[place] = (
                library_error(error, self._path) if isinstance(error, lmdb.Error) else error
            )
            raise PutError from error
        return True

    def committed(self) -> None:
        """The transaction is durable."""
        for operation in self._done:
            operation.committed()

    def results(self) -> list[Any]:
        """For each operation its result, or the exception that it failed with."""
        for place, error in self._failed.items():
            self._results[place] = error
        return self._results
