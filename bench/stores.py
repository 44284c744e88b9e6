# SPDX-License-Identifier: AGPL-3.0-or-later
"""Event stores to be compared: the library's over SQLite, ours, and the least that LMDB itself can do; and events for them.

`python -m bench.stores KIND FOLDER EVENTS JSON` fills one in a process of its own. Everything blocks.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import lmdb
import msgspec
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import (
    ApplicationRecorder,
    DatetimeAsISO,
    DecimalAsStr,
    JSONTranscoder,
    Mapper,
    StoredEvent,
    UUIDAsHex,
)
from eventsourcing.sqlite import SQLiteApplicationRecorder, SQLiteDatastore

from bench.proc import read_status
from eventstore import LMDBApplicationRecorder, LMDBEnvironment
from eventstore.mapper import EventMapper
from eventstore.records import encode_record, originator_key, pack_entry, pack_u64
from replicator.domain.model import Point, PointDisk, PushKind, plain, stream_id
from replicator.domain.vm import ProtectedVm
from replicator.log.store import TYPES

BATCH = 100
#: One event in so many has the rare topic.
RARE_EACH = 100
START_US = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1_000_000)
_RAW_MAP = 1 << 36


class Cycle(Aggregate):
    """The same event as whoever uses the library with its defaults would declare it."""

    TOPIC = "bench:cycle"

    class Event(Aggregate.Event):
        """Base."""

        TOPIC = "bench:cycle.event"

    class Committed(Event):
        """Fields by name, digests in hexadecimal: JSON knows no bytes."""

        TOPIC = "bench:cycle.cycle-committed"
        point: dict[str, Any]


def point(number: int, now_us: int) -> Point:
    """A recovery point of one disk, as a push makes it: digests and ids do not repeat."""
    disk = PointDisk("disk-0", "6000c29e-41f7-4f5a-8f65-2d1c5b9e0a01", 64 << 30, os.urandom(16), 1)
    return Point(
        number=number,
        parent=number - 1,
        push_id=secrets.token_hex(8),
        kind=PushKind.CYCLE if number > 1 else PushKind.SEED,
        epoch=1,
        taken_at_us=now_us - 2_300_000,
        committed_at_us=now_us - 9_000,
        duration_us=2_291_000 + now_us % 977_000,
        bytes_pushed=20_000_000 + now_us % 1_048_573,
        root=os.urandom(16),
        disks=(disk,),
    )


class Events:
    """Cycles of ``streams`` VMs in turn, as stored events: the first of each, the second of each, …

    ``as_json``: in the library's own encoding, else in the product's. ``first``: the number of the first VM.
    """

    def __init__(self, streams: int, *, as_json: bool = False, first: int = 0) -> None:
        self.ids = [stream_id(UUID(int=first + number), 1) for number in range(streams)]
        self.rare = ProtectedVm.TrackingLost.TOPIC
        self._count = 0
        self._json = as_json
        self._mapper = EventMapper(types=TYPES)
        transcoder = JSONTranscoder()
        for transcoding in (UUIDAsHex(), DecimalAsStr(), DatetimeAsISO()):
            transcoder.register(transcoding)
        self._library: Mapper[UUID] = Mapper(transcoder)

    def take(self, count: int) -> list[StoredEvent]:
        """The next ones. One in RARE_EACH has the rare topic; only its state is that of a cycle."""
        return [self._next() for _ in range(count)]

    def batches(self, total: int) -> Iterator[list[StoredEvent]]:
        """So many in batches."""
        for _ in range(total // BATCH):
            yield self.take(BATCH)

    def _next(self) -> StoredEvent:

        version, place = divmod(self._count, len(self.ids))
        now_us = START_US + self._count * 60_000
        made = point(version + 1, now_us)
        common: dict[str, Any] = {
            "originator_id": self.ids[place],
            "originator_version": version + 1,
            "timestamp": datetime.fromtimestamp(now_us / 1_000_000, UTC),
        }
        kind: Any
        stored: StoredEvent
        if self._json:
            kind = Cycle.Committed
            stored = self._library.to_stored_event(kind(**common, point=_named(made)))
        else:
            kind = ProtectedVm.CycleCommitted
            stored = self._mapper.to_stored_event(kind(**common, point=plain(made)))
        # Spread over all streams.
        if (self._count + self._count // len(self.ids)) % RARE_EACH == 0:
            stored = StoredEvent(
                stored.originator_id, stored.originator_version, self.rare, stored.state
            )
        self._count += 1
        return stored


def _named(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return value.hex()
    return [_named(each) for each in value] if isinstance(value, tuple) else value


class Store(ABC):
    """What is measured of a store."""

    @abstractmethod
    def insert(self, events: Sequence[StoredEvent]) -> None:
        """Durable on return."""

    @abstractmethod
    def stream(self, originator: UUID) -> int:
        """Read all of one stream; how many events."""

    @abstractmethod
    def last(self, originator: UUID, count: int) -> int:
        """Read the last ones of a stream."""

    @abstractmethod
    def max_id(self) -> int:
        """The last notification id, 0 if there is none."""

    @abstractmethod
    def page(self, start: int, limit: int) -> int:
        """Read notifications in order; how many."""

    @abstractmethod
    def close(self) -> None:
        """All of it is in its files."""

    @abstractmethod
    def bytes_on_disk(self) -> int:
        """Of a closed store."""


class RecorderStore(Store):
    """A store of the library's interface."""

    recorder: ApplicationRecorder

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """By the recorder."""
        self.recorder.insert_events(events)

    def stream(self, originator: UUID) -> int:
        """By the recorder."""
        return len(self.recorder.select_events(originator))

    def last(self, originator: UUID, count: int) -> int:
        """By the recorder."""
        return len(self.recorder.select_events(originator, desc=True, limit=count))

    def max_id(self) -> int:
        """By the recorder."""
        return self.recorder.max_notification_id() or 0

    def page(self, start: int, limit: int) -> int:
        """By the recorder."""
        return len(self.recorder.select_notifications(start, limit))

    def filtered(self, topic: str, stop: int) -> int:
        """Read all notifications of one topic up to ``stop``."""
        return len(self.recorder.select_notifications(1, stop, stop, [topic]))


class SqliteStore(RecorderStore):
    """The library's own, as its defaults have it: WAL, one flush for a commit."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._path = folder / "events.sqlite"
        # Enough for 64 threads that write: the defaults would refuse them.
        self._datastore = SQLiteDatastore(
            str(self._path), lock_timeout=60, max_overflow=64, pool_timeout=60.0
        )
        recorder = SQLiteApplicationRecorder(self._datastore)
        recorder.create_table()
        self.recorder = recorder

    def close(self) -> None:
        """Bring the write-ahead log home."""
        self._datastore.close()
        connection = sqlite3.connect(self._path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()

    def bytes_on_disk(self) -> int:
        """One file."""
        return _allocated(self._path)


class OurStore(RecorderStore):
    """This event store, with its topic index as by default."""

    def __init__(self, folder: Path, *, tree: bool) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.environment = LMDBEnvironment.open(folder)
        self.lmdb_recorder = LMDBApplicationRecorder(self.environment, "bench", tree=tree)
        self.recorder = self.lmdb_recorder

    def close(self) -> None:
        """Nothing is left to be written."""
        self.environment.close()

    def bytes_on_disk(self) -> int:
        """One file."""
        return _allocated(self._folder / "data.mdb")


class RawStore(Store):
    """LMDB without a recorder: a log and an index of the same sizes, puts and gets of bytes, nothing checked."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._environment = lmdb.open(str(folder), map_size=_RAW_MAP, max_dbs=2, readahead=False)
        self._log = self._environment.open_db(b"log")
        self._index = self._environment.open_db(b"index", dupsort=True)

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """In one transaction."""
        with self._environment.begin(write=True) as txn:
            with txn.cursor(self._log) as cursor:
                last = int.from_bytes(cursor.key()) if cursor.last() else 0
            rows, places = [], []
            for nid, event in enumerate(events, start=last + 1):
                key, version = originator_key(event.originator_id), event.originator_version
                rows.append((pack_u64(nid), encode_record(nid, 0, version, key, event.state)))
                places.append((key, pack_entry(version, nid)))
            with txn.cursor(self._log) as cursor:
                cursor.putmulti(rows, append=True)
            with txn.cursor(self._index) as cursor:
                cursor.putmulti(places)

    def stream(self, originator: UUID) -> int:
        """Bytes only."""
        with self._environment.begin() as txn:
            with txn.cursor(self._index) as cursor:
                cursor.set_key(originator_key(originator))
                keys = [entry[8:] for entry in cursor.iternext_dup()]
            with txn.cursor(self._log) as cursor:
                return len(cursor.getmulti(keys))

    def last(self, originator: UUID, count: int) -> int:
        """Bytes only."""
        keys: list[bytes] = []
        with self._environment.begin() as txn:
            with txn.cursor(self._index) as cursor:
                going = cursor.set_key(originator_key(originator)) and cursor.last_dup()
                while going and len(keys) < count:
                    keys.append(cursor.value()[8:])
                    going = cursor.prev_dup()
            with txn.cursor(self._log) as cursor:
                return len(cursor.getmulti(keys))

    def max_id(self) -> int:
        """The log's last key."""
        with self._environment.begin() as txn, txn.cursor(self._log) as cursor:
            return int.from_bytes(cursor.key()) if cursor.last() else 0

    def page(self, start: int, limit: int) -> int:
        """Bytes only."""
        with self._environment.begin() as txn, txn.cursor(self._log) as cursor:
            cursor.set_range(pack_u64(start))
            return sum(1 for _ in zip(range(limit), cursor, strict=False))

    def close(self) -> None:
        """Nothing is left to be written."""
        self._environment.close()

    def bytes_on_disk(self) -> int:
        """One file."""
        return _allocated(self._folder / "data.mdb")


class NoStore(Store):
    """Keeps nothing: what the events and the modules themselves need."""

    def insert(self, events: Sequence[StoredEvent]) -> None:
        """No."""

    def stream(self, originator: UUID) -> int:
        """Nothing."""
        del originator
        return 0

    def last(self, originator: UUID, count: int) -> int:
        """Nothing."""
        del originator, count
        return 0

    def max_id(self) -> int:
        """Nothing."""
        return 0

    def page(self, start: int, limit: int) -> int:
        """Nothing."""
        del start, limit
        return 0

    def close(self) -> None:
        """Nothing."""

    def bytes_on_disk(self) -> int:
        """Nothing."""
        return 0


KINDS = ("sqlite", "plain", "tree", "raw", "none")


def open_store(kind: str, folder: Path) -> Store:
    """A store of KINDS in a folder, made if it is not there."""
    match kind:
        case "sqlite":
            return SqliteStore(folder)
        case "plain" | "tree":
            return OurStore(folder, tree=kind == "tree")
        case "raw":
            return RawStore(folder)
    return NoStore()


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def fill(kind: str, folder: Path, total: int, *, as_json: bool) -> dict[str, int]:
    """Fill a new store, read all of it in pages, and say what that took."""
    store = open_store(kind, folder)
    for batch in Events(BATCH, as_json=as_json).batches(total):
        store.insert(batch)
    for start in range(1, total + 1, 500):
        store.page(start, 500)
    peak = read_status("self")["VmHWM"]
    store.close()
    return {"bytes": store.bytes_on_disk(), "peak": peak}


if __name__ == "__main__":
    _kind, _folder, _total, _json = sys.argv[1:]
    print(json.dumps(fill(_kind, Path(_folder), int(_total), as_json=_json == "yes")))
