# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far each upstream application's log has been processed, kept beside what came of it.

One named database for each application that tracks; `eventstore.records` has the bytes. Takes the
caller's transaction, so that a view's rows and its position are one change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eventsourcing.persistence import IntegrityError, Tracking

from eventstore import records
from eventstore.environment import LMDBEnvironment

if TYPE_CHECKING:
    from eventstore.environment import Transaction


class Positions:
    """The positions of ``application``. Raises OperationalError if there is no database for them
    and ``create`` is false.
    """

    __slots__ = ("_database",)

    def __init__(self, environment: LMDBEnvironment, application: str, *, create: bool) -> None:
        self._database = environment.database(f"tracking/{application}", create=create)

    def get(self, txn: Transaction, application_name: str) -> int | None:
        """The position in the log of ``application_name``. Raises InternalError if it is damaged."""
        key = records.application_key(application_name)
        row = txn.get(key, db=self._database)
        return None if row is None else records.decode_number(key, row)

    def check(self, txn: Transaction, tracking: Tracking) -> None:
        """Raises IntegrityError unless it goes forward, DataError for a name or id out of bounds."""
        records.check_nid(tracking.notification_id)
        stored = self.get(txn, tracking.application_name)
        if stored is not None and stored >= tracking.notification_id:
            raise IntegrityError(
                f"event {tracking.notification_id} of {tracking.application_name!r} is not after "
                f"event {stored}, up to which it has been processed"
            )

    def put(self, txn: Transaction, tracking: Tracking) -> None:
        """Store it; `check` has accepted it."""
        key = records.application_key(tracking.application_name)
        txn.put(key, records.encode_number(key, tracking.notification_id), db=self._database)
