# SPDX-License-Identifier: AGPL-3.0-or-later
"""The recorders of the `eventsourcing` library over LMDB: aggregate sequences, an application's
notification log, and a log that also tracks what it has processed.

All calls block and each is one complete transaction; see `eventstore.environment` for use from
trio. Every record's checksum is verified when it is read. LMDB's errors arrive as the library's.
`eventstore.eventlog` has the layout of a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    Notification,
    NotSupportedError,
    ProcessRecorder,
    StoredEvent,
    Subscription,
    Tracking,
)

from eventstore import records
from eventstore.environment import LMDBEnvironment, Operation
from eventstore.eventlog import EventLog
from eventstore.mapping import check_name
from eventstore.operations import Drop, Insert
from eventstore.subscription import LMDBSubscription
from eventstore.tracking import LMDBTrackingRecorder
from eventstore.tree import TreeLog

if TYPE_CHECKING:
    from eventstore.environment import Transaction


class LMDBAggregateRecorder(AggregateRecorder):
    """Stores and selects the events of aggregates.

    ``application`` and ``purpose`` name the log inside the environment: applications never see each
    other's events. With ``tree`` the log gets a Merkle tree over its events, with ``topic_index``
    an index by topic. With ``create`` false, or a read-only environment, a missing log is an
    OperationalError at first use. A log that has a tree or a topic index keeps it, whoever writes.
    """

    def __init__(
        self,
        environment: LMDBEnvironment,
        application: str = "",
        purpose: str = "events",
        *,
        create: bool = True,
        tree: bool = False,
        topic_index: bool = False,
    ) -> None:
        check_name(application, "application")
        check_name(purpose, "purpose")
        self.environment = environment
        self._prefix = f"events/{application}/{purpose}/"
        self._create = create and not environment.readonly
        self._with_tree = tree
        self._with_topic_index = topic_index
        self._opened: EventLog | None = None
        if self._create:
            self._log()

    def prepare(
        self, stored_events: Sequence[StoredEvent], tracking: Tracking | None = None
    ) -> Operation[list[int]]:
        """An operation that stores all events, or none, for `LMDBEnvironment.commit`; it gives
        their notification ids.

        It fails as `insert_events` raises. Raises NotSupportedError if asked to store a tracking
        position, OperationalError if the log is not there.
        """
        if tracking is not None:
            # Storing the events without their position would process them twice after a restart.
            raise NotSupportedError(f"{type(self).__qualname__} does not record tracking positions")
        return Insert(self._log(), stored_events)

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

    def _insert(
        self, stored_events: Sequence[StoredEvent], tracking: Tracking | None = None, **_: Any
    ) -> list[int]:
        operation = self.prepare(stored_events, tracking)
        if not stored_events and tracking is None:
            return []
        return self.environment.commit_one(operation)

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
        text of it are two different aggregates. Events at or below the log's floor have been moved
        away. Raises InternalError naming the notification id of a damaged record.
        """
        key = records.originator_key(originator_id)
        low = 0 if gt is None else max(gt + 1, 0)
        high = records.VERSION_MAX if lte is None else min(lte, records.VERSION_MAX)
        if low > high or (limit is not None and limit < 1):
            return []
        log = self._log()
        return self.environment.read(
            lambda txn: log.events(txn, originator_id, key, (low, high), desc=desc, limit=limit)
        )

    @property
    def tree(self) -> TreeLog | None:
        """The Merkle tree over the log, None if it has none. Raises OperationalError if there is
        no log.
        """
        return self._log().tree

    def leaf_hashes(self, txn: Transaction, first_nid: int, count: int) -> list[bytes]:
        """The tree's leaves of ``count`` events from ``first_nid`` on, computed from the records,
        in the caller's read transaction.

        Raises InternalError naming an event that is damaged or not there.
        """
        return self._log().leaf_hashes(txn, first_nid, count)

    def verify(self) -> int:
        """Look at every event that is above the floor; how many there are.

        Raises InternalError naming the first whose record, index entry, topic or topic index entry
        is damaged or missing: a damaged index can otherwise only hide events. The tree is verified
        by `TreeLog.verify`.
        """
        return self._log().verify()

    def first_nid(self) -> int:
        """The first notification id that is not below the floor, whether it is stored or not."""
        log = self._log()
        return self.environment.read(log.floor) + 1

    def _log(self) -> EventLog:
        if self._opened is None:
            self._opened = EventLog(
                self.environment,
                self._prefix,
                create=self._create,
                indexed=self._with_topic_index,
                tree=self._with_tree,
            )
        elif self._opened.by_topic is None or self._opened.tree is None:
            self._opened.adopt_companions()
        return self._opened


class LMDBApplicationRecorder(LMDBAggregateRecorder, ApplicationRecorder):
    """Also gives the events of all aggregates in the order in which they were stored, numbered 1,
    2, 3, …

    By default with a topic index: without one, notifications of few topics are found by reading
    all.
    """

    def __init__(
        self,
        environment: LMDBEnvironment,
        application: str = "",
        purpose: str = "events",
        *,
        create: bool = True,
        tree: bool = False,
        topic_index: bool = True,
    ) -> None:
        super().__init__(
            environment, application, purpose, create=create, tree=tree, topic_index=topic_index
        )

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

        With ``topics`` only those are selected and counted. What is at or below the log's floor has
        been moved away, and asking for it is no error. Raises InternalError naming a damaged or
        missing record.
        """
        low = 1 if start is None else start
        if start is not None and not inclusive_of_start:
            low += 1
        low = max(low, 1)
        found: list[Notification] = []
        while len(found) < limit and low <= records.VERSION_MAX and (stop is None or low <= stop):
            page, seen = self._page(low, stop, limit - len(found), topics)
            found += page
            if seen < low:
                break
            low = seen + 1
        return found

    def select_page(
        self, gt: int, limit: int, topics: Sequence[str] = ()
    ) -> tuple[list[Notification], int]:
        """At most ``limit`` notifications after ``gt``, and the notification id up to which the log
        has been looked at: what a follower goes on from, also if nothing matched.

        One read transaction, which looks at a bounded number of records. Raises as
        `select_notifications`.
        """
        return self._page(max(gt, 0) + 1, None, limit, topics)

    def _page(
        self, low: int, stop: int | None, limit: int, topics: Sequence[str]
    ) -> tuple[list[Notification], int]:
        if limit < 1 or low > records.VERSION_MAX:
            return [], low - 1
        log = self._log()
        return self.environment.read(lambda txn: log.notifications(txn, low, stop, limit, topics))

    def max_notification_id(self) -> int | None:
        """The last notification id, None if nothing was ever stored."""
        log = self._log()
        return self.environment.read(log.last_nid) or None

    def prepare_drop(self, through_nid: int, limit: int) -> Operation[int]:
        """An operation for events that have been moved away: it raises the floor to
        ``through_nid``, then deletes up to ``limit`` events at or below the floor and gives how
        many it deleted. To be repeated, also after a crash, until that is 0.

        The tree and the last notification id stay. The versions of dropped events are free again:
        only streams that have ended may be dropped whole. Fails with ProgrammingError unless
        ``through_nid`` is below the last notification id, InternalError for a damaged record.
        """
        return Drop(self._log(), through_nid, limit)

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[ApplicationRecorder]:
        """An iterator over the notifications after ``gt``, which waits for new ones of any process;
        see `LMDBSubscription`.
        """
        return LMDBSubscription(self, gt, topics)


class LMDBProcessRecorder(LMDBApplicationRecorder, LMDBTrackingRecorder, ProcessRecorder):
    """Stores events together with the position in an upstream log that they were made from."""

    def __init__(
        self,
        environment: LMDBEnvironment,
        application: str = "",
        purpose: str = "events",
        *,
        create: bool = True,
        tree: bool = False,
        topic_index: bool = True,
    ) -> None:
        # Each by name: the two bases do not share their arguments.
        LMDBAggregateRecorder.__init__(
            self,
            environment,
            application,
            purpose,
            create=create,
            tree=tree,
            topic_index=topic_index,
        )
        LMDBTrackingRecorder.__init__(self, environment, application, create=create)

    def prepare(
        self, stored_events: Sequence[StoredEvent], tracking: Tracking | None = None
    ) -> Operation[list[int]]:
        """As `LMDBAggregateRecorder.prepare`, with ``tracking`` in the same transaction; without
        events it stores only that.

        It fails with IntegrityError if the position is not after the one that is stored.
        """
        return Insert(self._log(), stored_events, self._positions(), tracking)
