# SPDX-License-Identifier: AGPL-3.0-or-later
"""The recorders of the `eventsourcing` library over LMDB: aggregate sequences and an application's
notification log.

Layout of one log, three named databases: ``log`` (notification id → record), ``index`` (aggregate
id → version and notification id, sorted duplicates), ``topics`` (number → topic).
`eventstore.records` has the bytes.

All calls block and each is one complete transaction; see `eventstore.environment` for use from
trio. Every record's checksum is verified when it is read. LMDB's errors arrive as the library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    IntegrityError,
    InternalError,
    Notification,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    StoredEvent,
    Subscription,
)

from eventstore import records
from eventstore.environment import LMDBEnvironment

if TYPE_CHECKING:
    from eventstore.environment import Cursor, Database, Transaction

NAME_BYTES_MAX = 100
TOPICS_MAX = 1 << 16


class _Databases(NamedTuple):
    log: Database
    places: Database
    topics: Database


class _Pending(NamedTuple):
    """An event that has passed the checks and waits for its notification id."""

    event: StoredEvent
    key: bytes


class _Topics:
    """The interned topics as far as they are known to be committed."""

    __slots__ = ("by_name", "by_number")

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}
        self.by_number: dict[int, str] = {}

    def add(self, number: int, topic: str) -> None:
        # By number first: whoever finds the name in another thread can find the number too.
        self.by_number[number] = topic
        self.by_name[topic] = number


class LMDBAggregateRecorder(AggregateRecorder):
    """Stores and selects the events of aggregates.

    ``application`` and ``purpose`` name the log inside the environment: applications never see each
    other's events. With ``create`` false, or a read-only environment, a missing log is an
    OperationalError at first use.
    """

    def __init__(
        self,
        environment: LMDBEnvironment,
        application: str = "",
        purpose: str = "events",
        *,
        create: bool = True,
    ) -> None:
        check_name(application, "application")
        check_name(purpose, "purpose")
        self.environment = environment
        self._prefix = f"events/{application}/{purpose}/"
        self._create = create and not environment.readonly
        self._opened: _Databases | None = None
        self._topics = _Topics()
        if self._create:
            self._databases()

    def insert_events(
        self, stored_events: Sequence[StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        """Store all events durably, or none. Returns None, as the library demands of an aggregate
        recorder.

        Raises IntegrityError if an (aggregate id, version) is stored already or comes twice,
        DataError for an id, version, topic or state out of bounds, NotSupportedError if asked to
        store a tracking position.
        """
        self._insert(stored_events, **kwargs)
        return None

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """The events of one aggregate by version, ascending or (``desc``) descending.

        ``gt`` is exclusive, ``lte`` inclusive; a ``limit`` below 1 selects nothing. A UUID and the
        text of it are two different aggregates. Raises InternalError naming the notification id of
        a damaged record.
        """
        key = records.originator_key(originator_id)
        low = 0 if gt is None else max(gt + 1, 0)
        high = records.VERSION_MAX if lte is None else min(lte, records.VERSION_MAX)
        if low > high or (limit is not None and limit < 1):
            return []
        databases = self._databases()

        def select(txn: Transaction) -> list[StoredEvent]:
            with txn.cursor(databases.places) as cursor:
                entries = _entries(cursor, key, low, high, desc=desc)
                return [
                    self._event_at(txn, databases, (originator_id, key, version), nid)
                    for _, (version, nid) in zip(_counter(limit), entries, strict=False)
                ]

        return self.environment.read(select)

    def _event_at(
        self,
        txn: Transaction,
        databases: _Databases,
        place: tuple[UUID | str, bytes, int],
        nid: int,
    ) -> StoredEvent:
        """The event that the index says is at ``place``: (id, its key, version)."""
        originator_id, key, version = place
        raw = txn.get(records.pack_u64(nid), db=databases.log)
        if raw is None:
            raise InternalError(f"event {nid} is missing from the log, but the index names it")
        record = records.decode_record(nid, raw)
        if record.key != key or record.version != version:
            raise InternalError(f"event {nid} is not the one that the index names")
        topic = self._topic(txn, databases, record.topic, nid)
        return StoredEvent(originator_id, version, topic, record.state)

    def _insert(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> list[int]:
        if kwargs.get("tracking") is not None:
            # Storing the events without their position would process them twice after a restart.
            raise NotSupportedError(f"{type(self).__qualname__} does not record tracking positions")
        if not stored_events:
            return []
        databases = self._databases()
        new_topics: dict[str, int] = {}

        def insert(txn: Transaction) -> list[int]:
            pending = _check_unique(txn, databases, stored_events)
            first = _last_nid(txn, databases) + 1
            nids = list(range(first, first + len(pending)))
            for nid, (event, key) in zip(nids, pending, strict=True):
                number = self._topic_number(txn, databases, event.topic, new_topics)
                record = records.encode_record(
                    nid, number, event.originator_version, key, event.state
                )
                entry = records.pack_entry(event.originator_version, nid)
                # In key order, so that the log's pages are filled; False would mean that the log
                # moved under us.
                stored = txn.put(records.pack_u64(nid), record, append=True, db=databases.log)
                if not stored or not txn.put(key, entry, db=databases.places):
                    raise InternalError(f"event {nid} is already there")
            return nids

        nids = self.environment.write(insert)
        # Only now: a number that was given in an aborted transaction will be given to another
        # topic.
        for topic, number in new_topics.items():
            self._topics.add(number, topic)
        return nids

    def _topic_number(
        self, txn: Transaction, databases: _Databases, topic: str, new: dict[str, int]
    ) -> int:
        number = self._topics.by_name.get(topic, new.get(topic))
        if number is not None:
            return number
        if not new:
            # Another recorder or process may have added it; once this transaction writes rows, they
            # are not committed.
            self._load_topics(txn, databases)
            number = self._topics.by_name.get(topic)
            if number is not None:
                return number
        number = len(self._topics.by_number) + len(new)
        if number >= TOPICS_MAX:
            raise OperationalError(f"{number} topics are in use, and no more are allowed")
        key, value = records.encode_topic(number, topic)
        if not txn.put(key, value, overwrite=False, db=databases.topics):
            raise InternalError(f"topic {number} is already there")
        new[topic] = number
        return number

    def _topic(self, txn: Transaction, databases: _Databases, number: int, nid: int) -> str:
        topic = self._topics.by_number.get(number)
        if topic is None:
            self._load_topics(txn, databases)
            topic = self._topics.by_number.get(number)
            if topic is None:
                raise InternalError(f"event {nid} has topic number {number}, which is not there")
        return topic

    def _load_topics(self, txn: Transaction, databases: _Databases) -> None:
        with txn.cursor(databases.topics) as cursor:
            for key, value in cursor:
                self._topics.add(*records.decode_topic(key, value))

    def _databases(self) -> _Databases:
        if self._opened is None:
            self._opened = _Databases(
                log=self.environment.database(self._prefix + "log", create=self._create),
                places=self.environment.database(
                    self._prefix + "index", dupsort=True, create=self._create
                ),
                topics=self.environment.database(self._prefix + "topics", create=self._create),
            )
        return self._opened


class LMDBApplicationRecorder(LMDBAggregateRecorder, ApplicationRecorder):
    """Also gives the events of all aggregates in the order in which they were stored, numbered 1,
    2, 3, …
    """

    def insert_events(
        self, stored_events: Sequence[StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        """As `LMDBAggregateRecorder.insert_events`; returns the notification ids, contiguous, in
        the events' order.
        """
        return self._insert(stored_events, **kwargs)

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        """At most ``limit`` notifications from ``start`` (None: the first) to ``stop`` (inclusive),
        ascending.

        With ``topics`` only those are selected and counted. Raises InternalError naming a damaged
        or missing record.
        """
        low = 1 if start is None else start
        if start is not None and not inclusive_of_start:
            low += 1
        low = max(low, 1)
        if limit < 1 or low > records.VERSION_MAX or (stop is not None and stop < low):
            return []
        databases = self._databases()

        def select(txn: Transaction) -> list[Notification]:
            found: list[Notification] = []
            for nid, raw in _log(txn, databases, low, stop):
                record = records.decode_record(nid, raw)
                topic = self._topic(txn, databases, record.topic, nid)
                if topics and topic not in topics:
                    continue
                originator_id = records.originator_id(record.key)
                found.append(
                    Notification(originator_id, record.version, topic, record.state, id=nid)
                )
                if len(found) == limit:
                    break
            return found

        return self.environment.read(select)

    def max_notification_id(self) -> int | None:
        """The last notification id, None if nothing is stored."""
        databases = self._databases()
        return self.environment.read(lambda txn: _last_nid(txn, databases)) or None

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[ApplicationRecorder]:
        """Not supported: raises NotImplementedError, as the library's SQLite recorder does."""
        raise NotImplementedError(f"{type(self).__qualname__} does not support subscriptions")


def check_name(name: str, what: str) -> None:
    """Raises ProgrammingError unless ``name`` can be part of a database's name: short, and without
    a slash.
    """
    if "/" in name or "\0" in name or len(name.encode()) > NAME_BYTES_MAX:
        raise ProgrammingError(f"{what} {name!r} has a slash or more than {NAME_BYTES_MAX} bytes")


def _check_unique(
    txn: Transaction, databases: _Databases, stored_events: Sequence[StoredEvent]
) -> list[_Pending]:
    """All checks before the first put, so that a conflict costs nothing but itself."""
    seen: set[tuple[bytes, int]] = set()
    pending: list[_Pending] = []
    with txn.cursor(databases.places) as cursor:
        for event in stored_events:
            records.check_version(event.originator_version)
            key = records.originator_key(event.originator_id)
            version = records.pack_u64(event.originator_version)
            place = (key, event.originator_version)
            stored = cursor.set_range_dup(key, version) and cursor.value().startswith(version)
            if stored or place in seen:
                raise IntegrityError(
                    f"version {event.originator_version} of aggregate {event.originator_id} "
                    f"{'is stored already' if stored else 'comes twice'}"
                )
            seen.add(place)
            pending.append(_Pending(event, key))
    return pending


def _last_nid(txn: Transaction, databases: _Databases) -> int:
    with txn.cursor(databases.log) as cursor:
        return records.unpack_u64(cursor.key()) if cursor.last() else 0


def _log(
    txn: Transaction, databases: _Databases, low: int, stop: int | None
) -> Iterator[tuple[int, bytes]]:
    """(notification id, record) from ``low`` to ``stop``. The log has no gaps: one is damage."""
    with txn.cursor(databases.log) as cursor:
        going = cursor.set_range(records.pack_u64(low))
        expected = low
        while going:
            nid = records.unpack_u64(cursor.key())
            if stop is not None and nid > stop:
                return
            if nid != expected:
                raise InternalError(f"event {expected} is missing from the log")
            yield nid, cursor.value()
            expected += 1
            going = cursor.next()


def _entries(
    cursor: Cursor, key: bytes, low: int, high: int, *, desc: bool
) -> Iterator[tuple[int, int]]:
    """(version, notification id) of one aggregate with low ≤ version ≤ high."""
    if desc:
        # The last entry up to ``high`` is the one before the first entry above it, or the last of
        # all.
        if cursor.set_range_dup(key, records.pack_u64(high + 1)):
            going = cursor.prev_dup()
        else:
            going = cursor.set_key(key) and cursor.last_dup()
    else:
        going = cursor.set_range_dup(key, records.pack_u64(low))
    while going:
        version, nid = records.unpack_entry(cursor.value())
        if not low <= version <= high:
            return
        yield version, nid
        going = cursor.prev_dup() if desc else cursor.next_dup()


def _counter(limit: int | None) -> Iterator[int]:
    count = 0
    while limit is None or count < limit:
        yield count
        count += 1
