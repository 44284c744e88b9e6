# SPDX-License-Identifier: AGPL-3.0-or-later
"""One log of events in LMDB: its named databases, and what is read from them in one transaction.

``log`` (notification id → record), ``index`` (aggregate id → version and notification id, sorted
duplicates), ``topics`` (number → text, and the floor); an application's log also has ``by-topic``
(`eventstore.topics`) and ``tree`` (`eventstore.tree`). `eventstore.records` has the bytes. A reader
checks every record. Knows nothing of the library's recorders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn
from uuid import UUID

from eventsourcing.persistence import InternalError, Notification, StoredEvent

from eventstore import records
from eventstore.environment import LMDBEnvironment
from eventstore.merkle import leaf_hash
from eventstore.topics import TopicIndex, Topics, topic_missing
from eventstore.tree import TreeLog

if TYPE_CHECKING:
    from eventstore.environment import Cursor, Database, Transaction

#: Records looked at in one read transaction before a page is given up as it is.
SCAN_MAX = 10_000


class EventLog:
    """The databases of the log ``prefix`` (it ends in a slash), opened; they are made if ``create``.

    A plain log has three. With ``indexed`` or ``tree`` it also gets those, and whoever writes to a
    log that has them keeps them. Raises OperationalError if a database is missing.
    """

    __slots__ = (
        "_index_name",
        "_tree_name",
        "by_topic",
        "environment",
        "log",
        "places",
        "prefix",
        "topic_rows",
        "topics",
        "tree",
    )

    def __init__(
        self,
        environment: LMDBEnvironment,
        prefix: str,
        *,
        create: bool,
        indexed: bool = False,
        tree: bool = False,
    ) -> None:
        self.environment = environment
        self.prefix = prefix
        self.log = environment.database(prefix + "log", create=create)
        self.places = environment.database(prefix + "index", dupsort=True, create=create)
        self.topic_rows = environment.database(prefix + "topics", create=create)
        self.topics = Topics(self.topic_rows)
        self._index_name = prefix + "by-topic"
        self._tree_name = prefix + "tree"
        self.by_topic: TopicIndex | None = None
        self.tree: TreeLog | None = None
        index = environment.find_database(self._index_name)
        if index is not None:
            self.by_topic = TopicIndex(index)
        elif create and indexed:
            self.by_topic = self._make_index()
        if (create and tree) or environment.find_database(self._tree_name) is not None:
            self.tree = TreeLog(environment, prefix, create=create)

    def adopt_companions(self) -> None:
        """Keep the topic index and the tree that another recorder of this process has made since."""
        if self.by_topic is None:
            database = self.environment.opened_database(self._index_name)
            self.by_topic = None if database is None else TopicIndex(database)
        if self.tree is None and self.environment.opened_database(self._tree_name) is not None:
            self.tree = TreeLog(self.environment, self.prefix, create=False)

    def _make_index(self) -> TopicIndex:
        """Make the topic index over what the log has already, in the transaction that makes it."""

        def fill(txn: Transaction, database: Database) -> None:
            numbers: dict[int, list[int]] = {}
            for nid, raw in self.scan(txn, 1, None):
                numbers.setdefault(records.decode_record(nid, raw).topic, []).append(nid)
            index = TopicIndex(database)
            for number, nids in numbers.items():
                index.add(txn, number, nids)

        return TopicIndex(self.environment.database(self._index_name, fill=fill))

    def floor(self, txn: Transaction) -> int:
        """Events up to this one have been moved away. Raises InternalError if the row is damaged."""
        row = txn.get(records.FLOOR_KEY, db=self.topic_rows)
        return 0 if row is None else records.decode_number(records.FLOOR_KEY, row)

    def last_nid(self, txn: Transaction) -> int:
        """The notification id that was given last, 0 if none was."""
        with txn.cursor(self.log) as cursor:
            return records.unpack_u64(cursor.key()) if cursor.last() else self.floor(txn)

    def scan(self, txn: Transaction, low: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
        """(notification id, record) from ``low`` to ``stop``, none below the floor. The log has no
        gaps: one is damage, and raises InternalError.
        """
        with txn.cursor(self.log) as cursor:
            expected = max(low, self.floor(txn) + 1)
            if not cursor.set_range(records.pack_u64(expected)):
                return
            for key, raw in cursor.iternext():
                nid = records.unpack_u64(key)
                if stop is not None and nid > stop:
                    return
                if nid != expected:
                    raise InternalError(f"event {expected} is missing from the log")
                yield nid, raw
                expected += 1

    def raw(self, txn: Transaction, nid: int, where: str) -> bytes:
        """The record stored under ``nid``. Raises InternalError if it is not there."""
        raw = txn.get(records.pack_u64(nid), db=self.log)
        if raw is None:
            raise InternalError(f"event {nid} is missing from the log, but {where} names it")
        return raw

    def events(
        self,
        txn: Transaction,
        originator_id: UUID | str,
        key: bytes,
        bounds: tuple[int, int],
        *,
        desc: bool,
        limit: int | None,
    ) -> list[StoredEvent]:
        """The events of one aggregate with bounds[0] ≤ version ≤ bounds[1]."""
        floor = self.floor(txn)
        with txn.cursor(self.places) as cursor:
            entries = list(_entries(cursor, key, bounds, desc=desc, floor=floor, limit=limit))
        found: list[StoredEvent] = []
        names = self.topics.by_number
        reader = records.Reader(key)
        with txn.cursor(self.log) as cursor:
            rows = cursor.getmulti([entry[8:] for entry in entries])
        if len(rows) != len(entries):
            self._raise_missing(txn, entries)
        for entry, (_, raw) in zip(entries, rows, strict=True):
            number, state = reader.read(entry, raw)
            topic = names.get(number)
            if topic is None:
                topic = self.topics.name(txn, number, int.from_bytes(entry[8:]))
            event = object.__new__(StoredEvent)
            # As the class itself would fill it, without a call for each field that it freezes.
            fields = event.__dict__
            fields["originator_id"] = originator_id
            fields["originator_version"] = int.from_bytes(entry[:8])
            fields["topic"] = topic
            fields["state"] = state
            found.append(event)
        return found

    def _raise_missing(self, txn: Transaction, entries: list[bytes]) -> NoReturn:
        for entry in entries:
            self.raw(txn, int.from_bytes(entry[8:]), "the index")
        raise InternalError(f"damaged log {self.prefix}: it gave other events than were asked for")

    def notifications(
        self, txn: Transaction, low: int, stop: int | None, limit: int, topics: Sequence[str]
    ) -> tuple[list[Notification], int]:
        """At most ``limit`` notifications, and up to where the log has been looked at."""
        if topics and self.by_topic is not None:
            return self._picked(txn, low, stop, limit, topics)
        found = [] if topics else self._plain(txn, low, stop, limit)
        seen = low - 1
        if found:
            seen = found[-1].id
            if len(found) == limit:
                return found, seen
        reader = _NotificationReader(self, txn)
        for nid, raw in self.scan(txn, seen + 1, stop):
            note = reader.read(nid, raw)
            seen = nid
            if not topics or note.topic in topics:
                found.append(note)
                if len(found) == limit:
                    return found, seen
            if nid - low >= SCAN_MAX:
                return found, seen
        return found, self._end(txn, low, stop)

    def _plain(
        self, txn: Transaction, low: int, stop: int | None, limit: int
    ) -> list[Notification]:
        """The notifications from ``low`` on for as long as there is nothing about them but UUIDs: the same as by the reader
        below, in two thirds of its time. It ends before whatever is damaged, missing or of another shape.
        """
        found: list[Notification] = []
        names, ids = self.topics.by_number, dict[bytes, UUID]()
        expected = max(low, self.floor(txn) + 1)
        end = min(limit, SCAN_MAX)
        if stop is not None:
            end = min(end, stop + 1 - expected)
        with txn.cursor(self.log) as cursor:
            if end < 1 or not cursor.set_range(records.pack_u64(expected)):
                return found
            for key, raw in cursor.iternext():
                plain = records.plain_record(key, raw)
                if plain is None or key != records.pack_u64(expected):
                    break
                number, version, body = plain
                topic, identity = names.get(number), body[:16]
                if topic is None:
                    break
                originator_id = ids.get(identity)
                if originator_id is None:
                    originator_id = ids[identity] = UUID(bytes=identity)
                note = object.__new__(Notification)
                fields = note.__dict__
                fields["originator_id"] = originator_id
                fields["originator_version"] = version
                fields["topic"] = topic
                fields["state"] = body[16:]
                fields["id"] = expected
                found.append(note)
                if len(found) == end:
                    break
                expected += 1
        return found

    def _picked(
        self, txn: Transaction, low: int, stop: int | None, limit: int, topics: Sequence[str]
    ) -> tuple[list[Notification], int]:
        """The same by the topic index."""
        assert self.by_topic is not None
        found: list[Notification] = []
        reader = _NotificationReader(self, txn)
        numbers = self.topics.numbers(txn, topics)
        for nid in self.by_topic.select(txn, numbers, max(low, self.floor(txn) + 1)):
            if stop is not None and nid > stop:
                break
            note = reader.read(nid, self.raw(txn, nid, "the topic index"))
            if note.topic not in topics:
                raise InternalError(f"event {nid} does not have the topic that the index names")
            found.append(note)
            if len(found) == limit:
                return found, nid
        return found, self._end(txn, low, stop)

    def _end(self, txn: Transaction, low: int, stop: int | None) -> int:
        last = self.last_nid(txn)
        return max(low - 1, last if stop is None else min(stop, last))

    def verify(self) -> int:
        """Look at every event that is above the floor, in pages; how many there are.

        Records, numbers, index, topics and topic index must all say the same. Raises InternalError
        naming the first event that does not fit. What the tree covers is not looked at.
        """
        low, count = 1, 0
        while True:
            found = self.environment.read(partial(self._verify_page, low=low))
            count += len(found)
            if not found:
                break
            low = found[-1] + 1
        self.environment.read(self._verify_counts)
        return count

    def _verify_page(self, txn: Transaction, low: int) -> list[int]:
        by_topic: dict[int, list[int]] = {}
        found: list[int] = []
        with txn.cursor(self.places) as places:
            for nid, raw in self.scan(txn, low, None):
                record = records.decode_record(nid, raw)
                if not places.set_key_dup(record.key, records.pack_entry(record.version, nid)):
                    raise InternalError(f"event {nid} is missing from the index")
                self.topics.name(txn, record.topic, nid)
                by_topic.setdefault(record.topic, []).append(nid)
                found.append(nid)
                if len(found) == SCAN_MAX:
                    break
        if self.by_topic is not None:
            for number, nids in by_topic.items():
                self.by_topic.check(txn, number, nids)
        return found

    def _verify_counts(self, txn: Transaction) -> None:
        """Each event has its entries, so equal numbers mean that nothing else is there."""
        events = txn.stat(self.log)["entries"]
        counts = {"the index": txn.stat(self.places)["entries"]}
        if self.by_topic is not None:
            counts["the topic index"] = self.by_topic.count(txn)
        for where, count in counts.items():
            if count != events:
                raise InternalError(f"{where} has {count} entries for {events} events")

    def leaf_hashes(self, txn: Transaction, first_nid: int, count: int) -> list[bytes]:
        """The tree's leaves of ``count`` events from ``first_nid`` on, computed from the records.

        Raises InternalError if one is damaged or not there.
        """
        found: list[bytes] = []
        names = self.topics.stored_names(txn)
        for nid, raw in self.scan(txn, first_nid, first_nid + count - 1):
            record = records.decode_record(nid, raw)
            topic = names.get(record.topic)
            if topic is None:
                raise topic_missing(nid, record.topic)
            found.append(
                leaf_hash(
                    records.canonical_record(nid, record.key, record.version, topic, record.state)
                )
            )
        if len(found) != count:
            raise InternalError(f"events {first_nid}..{first_nid + count - 1} are not all there")
        return found


class _NotificationReader:
    """Makes notifications; each aggregate's id once."""

    __slots__ = ("_ids", "_log", "_names", "_txn")

    def __init__(self, log: EventLog, txn: Transaction) -> None:
        self._log = log
        self._txn = txn
        self._names = log.topics.by_number
        self._ids: dict[bytes, UUID | str] = {}

    def read(self, nid: int, raw: bytes) -> Notification:
        number, version, key, state = records.decode_record(nid, raw)
        originator_id = self._ids.get(key)
        if originator_id is None:
            originator_id = self._ids[key] = records.originator_id(key)
        topic = self._names.get(number)
        if topic is None:
            topic = self._log.topics.name(self._txn, number, nid)
        # As the class itself would fill it, without a call for each field that it freezes.
        note = object.__new__(Notification)
        fields = note.__dict__
        fields["originator_id"] = originator_id
        fields["originator_version"] = version
        fields["topic"] = topic
        fields["state"] = state
        fields["id"] = nid
        return note


def _entries(
    cursor: Cursor,
    key: bytes,
    bounds: tuple[int, int],
    *,
    desc: bool,
    floor: int,
    limit: int | None,
) -> Iterator[bytes]:
    """The index values of one aggregate, bounds included, of events above the floor."""
    low, high = records.pack_u64(bounds[0]), records.pack_u64(bounds[1])
    if desc:
        # The last entry up to ``high`` is the one before the first entry above it, or the last of
        # all.
        if cursor.set_range_dup(key, records.pack_u64(bounds[1] + 1)):
            going = cursor.prev_dup()
        else:
            going = cursor.set_key(key) and cursor.last_dup()
        values = cursor.iterprev_dup() if going else iter(())
    else:
        values = cursor.iternext_dup() if cursor.set_range_dup(key, low) else iter(())
    count = 0
    lowest = records.pack_u64(floor)
    for value in values:
        if len(value) != records.ENTRY_BYTES:
            raise InternalError(f"damaged index: an entry of {len(value)} bytes")
        if not low <= value[:8] <= high:
            return
        if value[8:] > lowest:
            yield value
            count += 1
            if count == limit:
                return
