# SPDX-License-Identifier: AGPL-3.0-or-later
"""A write-ahead journal: what must be undone or finished after a crash, beside the events in the
same environment.

An entry is written before the thing that it names is made, and leaves when that is settled. The
journal knows nothing of what its entries mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import xxhash
from eventsourcing.persistence import DataError, InternalError, OperationalError, ProgrammingError

from eventstore.environment import LMDBEnvironment, Operation
from eventstore.mapping import check_name

if TYPE_CHECKING:
    from eventstore.environment import Database, Transaction

KEY_BYTES_MAX = 400
VALUE_BYTES_MAX = 1 << 20
ENTRIES_MAX = 1 << 16
_CHECK_BYTES = 8


class _Change:
    """Rows of a journal to store, and keys to remove."""

    __slots__ = ("_database", "_gone", "_name", "_rows")

    def __init__(
        self, database: Database, name: str, rows: list[tuple[bytes, bytes]], gone: list[bytes]
    ) -> None:
        self._database = database
        self._name = name
        self._rows = rows
        self._gone = gone

    def check(self, txn: Transaction) -> None:
        """How many entries there are is only known afterwards."""

    def put(self, txn: Transaction) -> None:
        for key in self._gone:
            txn.delete(key, db=self._database)
        for key, value in self._rows:
            txn.put(key, _check(key, value) + value, db=self._database)
        if self._rows and txn.stat(self._database)["entries"] > ENTRIES_MAX:
            raise OperationalError(
                f"journal {self._name!r} has {ENTRIES_MAX} entries that nobody settles"
            )

    def committed(self) -> None:
        """Nothing is cached."""


class Journal:
    """Durable small entries, text key → bytes, under a name in an environment. Usable from any
    thread.

    All calls block; each is one transaction, and a change is durable when its call returns. LMDB's
    errors arrive as the `eventsourcing` library's. In a read-only environment a journal that nobody
    has made is an OperationalError.
    """

    def __init__(self, environment: LMDBEnvironment, name: str) -> None:
        check_name(name, "journal")
        if not name:
            raise ProgrammingError("a journal needs a name")
        self.environment = environment
        self.name = name
        self._database_name = f"journal/{name}"
        if not environment.readonly:
            environment.database(self._database_name)

    def put(self, key: str, value: bytes) -> None:
        """Store an entry, replacing the one under ``key``. Raises as `change`."""
        self.change(puts={key: value})

    def delete(self, key: str) -> None:
        """Remove an entry; a missing one is no error, so that settling can be repeated. Raises as
        `change`.
        """
        self.change(deletes=(key,))

    def change(
        self, puts: Mapping[str, bytes] | None = None, deletes: Collection[str] = ()
    ) -> None:
        """Store and remove several entries: all of it or nothing.

        Raises DataError (key not 1..400 bytes of UTF-8, value over 1 MiB), ProgrammingError (a key
        in both), OperationalError (65 536 entries: nobody settles them).
        """
        if puts or deletes:
            self.environment.commit_one(self.prepare_change(puts, deletes))

    def prepare_change(
        self, puts: Mapping[str, bytes] | None = None, deletes: Collection[str] = ()
    ) -> Operation[None]:
        """What `change` does, as an operation for `LMDBEnvironment.commit`.

        Raises DataError and ProgrammingError as `change`; too many entries is what it fails with.
        """
        puts = puts or {}
        rows = [(_key(key), _checked_value(value)) for key, value in puts.items()]
        gone = [_key(key) for key in deletes]
        if not puts.keys().isdisjoint(deletes):
            raise ProgrammingError("a journal key is both stored and removed in one change")
        return _Change(self.environment.database(self._database_name), self.name, rows, gone)

    def get(self, key: str) -> bytes | None:
        """The entry under ``key`` or None. Raises InternalError if it is damaged, DataError for a
        bad key.
        """
        encoded = _key(key)
        database = self.environment.database(self._database_name)
        row = self.environment.read(lambda txn: txn.get(encoded, db=database))
        return None if row is None else self._value(encoded, row)

    def items(self, prefix: str = "") -> list[tuple[str, bytes]]:
        """All entries whose key begins with ``prefix``, in the order of the keys' bytes, as of one
        moment.

        Raises InternalError if one is damaged, DataError for a bad prefix.
        """
        start = _key(prefix) if prefix else b""
        database = self.environment.database(self._database_name)

        def select(txn: Transaction) -> list[tuple[str, bytes]]:
            found: list[tuple[str, bytes]] = []
            with txn.cursor(database) as cursor:
                going = cursor.set_range(start) if start else cursor.first()
                while going:
                    key, row = cursor.item()
                    if not key.startswith(start):
                        break
                    found.append((key.decode(errors="replace"), self._value(key, row)))
                    going = cursor.next()
            return found

        return self.environment.read(select)

    def _value(self, key: bytes, row: bytes) -> bytes:
        value = row[_CHECK_BYTES:]
        if row[:_CHECK_BYTES] != _check(key, value):
            raise InternalError(
                f"journal {self.name!r}: entry {key.decode(errors='replace')!r} is damaged"
            )
        return value


def _check(key: bytes, value: bytes) -> bytes:
    # The key's length first: no other split of the same bytes has the same check.
    return xxhash.xxh3_64_digest(len(key).to_bytes(2) + key + value)


def _key(key: str) -> bytes:
    try:
        encoded = key.encode()
    except UnicodeEncodeError as error:
        raise DataError("a journal key is not valid text") from error
    if not 1 <= len(encoded) <= KEY_BYTES_MAX:
        raise DataError(f"a journal key has {len(encoded)} bytes, not 1..{KEY_BYTES_MAX}")
    return encoded


def _checked_value(value: bytes) -> bytes:
    if len(value) > VALUE_BYTES_MAX:
        raise DataError(f"a journal entry of {len(value)} bytes is over {VALUE_BYTES_MAX}")
    return bytes(value)
