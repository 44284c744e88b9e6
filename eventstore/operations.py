# SPDX-License-Identifier: AGPL-3.0-or-later
"""The changes to a log that can share a transaction: storing events, and dropping those that have
been moved away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from eventsourcing.persistence import (
    IntegrityError,
    InternalError,
    ProgrammingError,
    StoredEvent,
    Tracking,
)

from eventstore import records
from eventstore.eventlog import EventLog
from eventstore.merkle import leaf_hash
from eventstore.positions import Positions
from eventstore.tree import TreeLog

if TYPE_CHECKING:
    from eventstore.environment import Transaction

#: Leaves that are computed at once for a log that was begun without its tree.
_CATCH_UP_EVENTS = 4096


class _Pending(NamedTuple):
    """An event that has passed the checks and waits for its notification id."""

    event: StoredEvent
    key: bytes


class Insert:
    """Store events, and with them the position that they bring an upstream application to.

    Gives the notification ids, contiguous, in the events' order.
    """

    __slots__ = ("_events", "_log", "_new_topics", "_pending", "_positions", "_tracking")

    def __init__(
        self,
        log: EventLog,
        stored_events: Sequence[StoredEvent],
        positions: Positions | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        self._log = log
        self._events = tuple(stored_events)
        self._positions = positions
        self._tracking = tracking
        self._pending: list[_Pending] = []
        self._new_topics: dict[str, int] = {}

    def check(self, txn: Transaction) -> None:
        """All checks before the first put, so that a conflict costs nothing but itself."""
        self._new_topics = {}
        self._pending = []
        if self._tracking is not None and self._positions is not None:
            self._positions.check(txn, self._tracking)
        seen: set[tuple[bytes, int]] = set()
        with txn.cursor(self._log.places) as cursor:
            for event in self._events:
                version = event.originator_version
                records.check_version(version)
                records.check_state(event.state)
                records.check_topic(event.topic)
                key = records.originator_key(event.originator_id)
                packed = records.pack_u64(version)
                stored = cursor.set_range_dup(key, packed) and cursor.value().startswith(packed)
                if stored or (key, version) in seen:
                    raise IntegrityError(
                        f"version {version} of aggregate {event.originator_id} "
                        f"{'is stored already' if stored else 'comes twice'}"
                    )
                seen.add((key, version))
                self._pending.append(_Pending(event, key))

    def put(self, txn: Transaction) -> list[int]:
        """Number and store them."""
        if self._tracking is not None and self._positions is not None:
            self._positions.put(txn, self._tracking)
        if not self._pending:
            return []
        log = self._log
        first = log.last_nid(txn) + 1
        nids = list(range(first, first + len(self._pending)))
        by_topic: dict[int, list[int]] = {}
        rows: list[tuple[bytes, bytes]] = []
        places: list[tuple[bytes, bytes]] = []
        for nid, (event, key) in zip(nids, self._pending, strict=True):
            version = event.originator_version
            number = log.topics.intern(txn, event.topic, self._new_topics)
            record = records.encode_record(nid, number, version, key, event.state)
            rows.append((records.pack_u64(nid), record))
            places.append((key, records.pack_entry(version, nid)))
            by_topic.setdefault(number, []).append(nid)
        # In key order, so that the log's pages are filled; one that is not after the last is left
        # out silently, which would mean that the log moved under us.
        with txn.cursor(log.log) as cursor:
            stored = cursor.putmulti(rows, append=True)
        with txn.cursor(log.places) as cursor:
            placed = cursor.putmulti(places, dupdata=True)
        if stored != (len(rows), len(rows)) or placed != (len(rows), len(rows)):
            raise InternalError(f"some of the events {nids[0]}..{nids[-1]} are already there")
        if log.by_topic is not None:
            for number, found in by_topic.items():
                log.by_topic.add(txn, number, found)
        if log.tree is not None:
            self._extend_tree(txn, first)
        return nids

    def _extend_tree(self, txn: Transaction, first: int) -> None:
        tree = self._log.tree
        assert tree is not None
        leaves = [
            leaf_hash(
                records.canonical_record(
                    nid, key, event.originator_version, event.topic, event.state
                )
            )
            for nid, (event, key) in enumerate(self._pending, start=first)
        ]
        try:
            tree.extend(txn, first, leaves)
        except InternalError:
            if not self._catch_up(txn, tree, first):
                raise
            tree.extend(txn, first, leaves)

    def _catch_up(self, txn: Transaction, tree: TreeLog, first: int) -> bool:
        """A log that was begun without its tree gives it the leaves that it lacks. False if it
        lacks none.
        """
        size = tree.head(txn).size
        lacking = size + 1 < first
        while size + 1 < first:
            count = min(_CATCH_UP_EVENTS, first - size - 1)
            tree.extend(txn, size + 1, self._log.leaf_hashes(txn, size + 1, count))
            size += count
        return lacking

    def committed(self) -> None:
        """Only now: a number that was given in an aborted transaction will be given again."""
        if self._new_topics:
            self._log.topics.promote(self._new_topics)


class Drop:
    """Raise the floor of a log, and delete some of what is below it. Gives how many were deleted.

    The floor first: after a crash the next one goes on where this one ended.
    """

    __slots__ = ("_limit", "_log", "_through")

    def __init__(self, log: EventLog, through_nid: int, limit: int) -> None:
        if through_nid < 0 or limit < 1:
            raise ProgrammingError(f"cannot drop {limit} events through event {through_nid}")
        self._log = log
        self._through = through_nid
        self._limit = limit

    def check(self, txn: Transaction) -> None:
        """The last event stays: its id is where the numbers go on."""
        last = self._log.last_nid(txn)
        if self._through and self._through >= last:
            raise ProgrammingError(
                f"event {self._through} cannot be dropped from a log that ends at {last}"
            )

    def put(self, txn: Transaction) -> int:
        """Delete the oldest leftovers from log, index and topic index."""
        log = self._log
        floor = log.floor(txn)
        if self._through > floor:
            floor = self._through
            row = records.encode_number(records.FLOOR_KEY, floor)
            txn.put(records.FLOOR_KEY, row, db=log.topic_rows)
        by_topic: dict[int, list[int]] = {}
        count = 0
        with txn.cursor(log.log) as cursor:
            going = cursor.first()
            while going and count < self._limit:
                nid = records.unpack_u64(cursor.key())
                if nid > floor:
                    break
                record = records.decode_record(nid, cursor.value())
                entry = records.pack_entry(record.version, nid)
                if not txn.delete(record.key, entry, db=log.places):
                    raise InternalError(f"event {nid} is missing from the index")
                by_topic.setdefault(record.topic, []).append(nid)
                going = cursor.delete()
                count += 1
        if log.by_topic is not None:
            for number, found in by_topic.items():
                log.by_topic.remove(txn, number, found)
        return count

    def committed(self) -> None:
        """Nothing is cached."""
