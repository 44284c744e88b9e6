# SPDX-License-Identifier: AGPL-3.0-or-later
"""LMDB's errors as the classes of the `eventsourcing` library. Pure: no environment here."""

from __future__ import annotations

import lmdb
from eventsourcing.persistence import (
    DataError,
    InterfaceError,
    InternalError,
    OperationalError,
    PersistenceError,
    ProgrammingError,
)

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
    lmdb.IncompatibleError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
)


def library_error(error: lmdb.Error, path: str) -> PersistenceError:
    """The `eventsourcing` error that says the same as an LMDB error about the store at ``path``."""
    text = f"event store {path}: {error}"
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
