# SPDX-License-Identifier: AGPL-3.0-or-later
"""How projections lie in the database ``projections`` of their environment, and the view that one
of them gets of its own rows. Knows bytes and transactions, not when they are used.

All integers are big-endian. A name is its length u8 and ASCII; no name's rows are within another's.

state   key: 1 u8, name; value: format u8 = 1, check u64, msgpack of `State` as an array
row     key: 2 u8, name, generation u32, the projection's own key; value: check u64, the
        projection's own value
check   xxh3-64 of: length of the key u16, key, the value's part behind the check
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import msgspec
import xxhash
from eventsourcing.persistence import DataError, InternalError, NotSupportedError, ProgrammingError

if TYPE_CHECKING:
    from eventstore.environment import Database, Transaction

DATABASE = "projections"
FORMAT = 1
KEY_BYTES_MAX = 400
VALUE_BYTES_MAX = 1 << 20
#: What is kept of the error of a parked event.
ERROR_CHARACTERS_MAX = 2000
REVISION_MAX = (1 << 31) - 1
GENERATION_MAX = (1 << 32) - 1
#: Old generations that wait for their rows' deletion. The next rebuild waits for them.
DROPPING_MAX = 8

_NAME = re.compile(r"[A-Za-z0-9-]{1,60}")
_STATE = b"\x01"
_ROW = b"\x02"
_CHECK_BYTES = 8

_Number = Annotated[int, msgspec.Meta(ge=0)]
_Generation = Annotated[int, msgspec.Meta(ge=1, le=GENERATION_MAX)]


class Parked(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Why a generation stands still: an event (``nid`` 0: the start, before any event) that failed
    ``tries`` times, last with ``error``.
    """

    nid: _Number
    topic: str
    error: str
    tries: _Number


class Track(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A generation of a projection: rows that come from all events up to ``position``."""

    generation: _Generation
    revision: _Number
    position: _Number = 0
    #: False until `Projection.begin` was committed.
    started: bool = False
    parked: Parked | None = None


class State(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A projection's state row. ``dropping``: generations whose rows are to be deleted."""

    live: Track
    building: Track | None = None
    #: A rebuild was asked for and has not begun.
    requested: bool = False
    dropping: Annotated[tuple[_Generation, ...], msgspec.Meta(max_length=DROPPING_MAX)] = ()

    def track(self, generation: int) -> Track | None:
        """The live or building generation of that number."""
        for track in (self.live, self.building):
            if track is not None and track.generation == generation:
                return track
        return None

    def with_track(self, track: Track) -> State:
        """The same with the generation of that number replaced."""
        if track.generation == self.live.generation:
            return msgspec.structs.replace(self, live=track)
        assert self.building is not None
        assert self.building.generation == track.generation
        return msgspec.structs.replace(self, building=track)

    def next_generation(self) -> int:
        """A number that no generation with rows has."""
        used = [self.live.generation, *self.dropping]
        if self.building is not None:
            used.append(self.building.generation)
        return max(used) + 1


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(State)


def check_projection_name(name: str) -> None:
    """Raises ProgrammingError unless a projection can be called so."""
    if not _NAME.fullmatch(name):
        raise ProgrammingError(f"projection name {name!r}: 1..60 letters, digits and dashes only")


def load_state(txn: Transaction, database: Database, name: str) -> State | None:
    """The state row, None if the projection has never run. Raises InternalError if it is damaged,
    NotSupportedError if a later version wrote it.
    """
    key = _STATE + _packed(name)
    raw = txn.get(key, db=database)
    return None if raw is None else _decode_state(key, raw)


def all_states(txn: Transaction, database: Database) -> Iterator[tuple[str, State]]:
    """(name, state) of all projections. Raises as `load_state`."""
    with txn.cursor(database) as cursor:
        going = cursor.set_range(_STATE)
        while going and cursor.key().startswith(_STATE):
            key, raw = cursor.item()
            yield key[2:].decode("ascii", "replace"), _decode_state(key, raw)
            going = cursor.next()


def store_state(txn: Transaction, database: Database, name: str, state: State) -> None:
    """Write the state row."""
    key = _STATE + _packed(name)
    body = _encoder.encode(state)
    txn.put(key, bytes([FORMAT]) + _check(key, body) + body, db=database)


def delete_rows(
    txn: Transaction, database: Database, name: str, generation: int, limit: int
) -> int:
    """Delete up to ``limit`` rows of a generation; returns how many there were."""
    prefix = _row_prefix(name, generation)
    deleted = 0
    with txn.cursor(database) as cursor:
        going = cursor.set_range(prefix)
        while going and deleted < limit and cursor.key().startswith(prefix):
            cursor.delete()
            deleted += 1
            # Deleting has moved the cursor to the row behind.
            going = bool(cursor.key())
    return deleted


class View:
    """What a projection sees of the store: its own rows of one generation, bytes to bytes, in one
    transaction. Of no use after the call that it was given to.

    Keys have 1..400 bytes, values up to 1 MiB: DataError otherwise. A damaged row is an
    InternalError, use after the end or writing where only reading is allowed a ProgrammingError.
    """

    __slots__ = ("_database", "_prefix", "_txn", "_writable")

    def __init__(
        self,
        txn: Transaction,
        database: Database,
        name: str,
        generation: int,
        *,
        writable: bool,
    ) -> None:
        self._txn: Transaction | None = txn
        self._database = database
        self._prefix = _row_prefix(name, generation)
        self._writable = writable

    def close(self) -> None:
        """Make any later use an error."""
        self._txn = None

    def get(self, key: bytes) -> bytes | None:
        """The value under ``key``, None if there is none."""
        full = self._key(key)
        raw = self._transaction().get(full, db=self._database)
        return None if raw is None else _checked(full, raw)

    def put(self, key: bytes, value: bytes) -> None:
        """Store a row, replacing the one under ``key``."""
        if len(value) > VALUE_BYTES_MAX:
            raise DataError(f"a projection's value of {len(value)} bytes is over {VALUE_BYTES_MAX}")
        full = self._key(key)
        self._transaction(write=True).put(full, _check(full, value) + value, db=self._database)

    def delete(self, key: bytes) -> bool:
        """Remove a row; False if it was not there."""
        full = self._key(key)
        return bool(self._transaction(write=True).delete(full, db=self._database))

    def items(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of the rows whose key begins with ``prefix``, in the order of the bytes.

        Rows may be put and deleted meanwhile; what is changed ahead is seen.
        """
        if len(prefix) > KEY_BYTES_MAX:
            raise DataError(f"a prefix of {len(prefix)} bytes is over {KEY_BYTES_MAX}")
        start = self._prefix + prefix
        seek = start
        while True:
            with self._transaction().cursor(self._database) as cursor:
                if not cursor.set_range(seek):
                    return
                full, raw = cursor.item()
            if not full.startswith(start):
                return
            yield full[len(self._prefix) :], _checked(full, raw)
            # By key and not by cursor: the row may be gone when the next one is asked for.
            seek = full + b"\0"

    def _key(self, key: bytes) -> bytes:
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise DataError(f"a projection's key has {len(key)} bytes, not 1..{KEY_BYTES_MAX}")
        return self._prefix + key

    def _transaction(self, *, write: bool = False) -> Transaction:
        if self._txn is None:
            raise ProgrammingError("a projection's view was used after its transaction")
        if write and not self._writable:
            raise ProgrammingError("this view of a projection is for reading only")
        return self._txn


def _packed(name: str) -> bytes:
    check_projection_name(name)
    return bytes([len(name)]) + name.encode("ascii")


def _row_prefix(name: str, generation: int) -> bytes:
    return _ROW + _packed(name) + generation.to_bytes(4)


def _check(key: bytes, body: bytes) -> bytes:
    return xxhash.xxh3_64_digest(len(key).to_bytes(2) + key + body)


def _checked(key: bytes, raw: bytes) -> bytes:
    value = raw[_CHECK_BYTES:]
    if raw[:_CHECK_BYTES] != _check(key, value):
        raise InternalError(f"row {key!r} of a projection is damaged")
    return value


def _decode_state(key: bytes, raw: bytes) -> State:
    if raw[:1] != bytes([FORMAT]):
        raise NotSupportedError(f"state {key!r} of a projection has another format: {raw[:1]!r}")
    try:
        return _decoder.decode(_checked(key, raw[1:]))
    except msgspec.DecodeError as error:
        raise InternalError(f"state {key!r} of a projection is damaged: {error}") from error
