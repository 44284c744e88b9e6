# SPDX-License-Identifier: AGPL-3.0-or-later
"""The changes that a running projection makes to its rows: operations, to be committed in groups.

Each says which state it was made for and does nothing in any other: so no event is applied twice,
not even when two processes run the same projection. When to make which is not decided here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lmdb
import msgspec
from eventsourcing.persistence import Notification

from eventstore.projection_rows import State, View, delete_rows, load_state, store_state

if TYPE_CHECKING:
    from eventstore.environment import Database, Transaction


class Projection(ABC):
    """What is told of the events, kept in rows of its own. To be derived from.

    ``name``: 1..60 letters, digits and dashes. ``revision``: raised whenever what `apply` or
    `begin` do changes; the projection is then rebuilt by itself at the next start. ``topics``: only
    notifications of these; empty means all.

    The methods are called in a worker thread inside a write transaction, so they are short, read
    and write nothing but the view, and may be called again for what was then not committed.
    """

    name: str
    revision: int = 1
    topics: Sequence[str] = ()

    def begin(self, view: View) -> None:  # noqa: B027 -- most projections begin with nothing
        """Called once when a generation starts, before its first event. Where the beginning of the
        log has been moved away, this puts what those events came to.
        """

    @abstractmethod
    def apply(self, view: View, notification: Notification) -> None:
        """Bring the rows up to date with the next notification. An exception is the event's fault:
        it is tried again, and in the end parked.
        """

    def finish(self, view: View) -> None:  # noqa: B027 -- most projections write at once
        """Called after the last notification of a transaction, with the view that they got: what was
        gathered for it is written now. An exception is the last event's fault.
        """


class MovedError(Exception):
    """The state is not the one that a change was made for. Nothing was written: look again."""


class ApplyError(Exception):
    """A projection failed at an event, or (``nid`` 0) at the start. Nothing was written. The cause
    is the projection's exception.
    """

    def __init__(self, nid: int, topic: str, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.nid = nid
        self.topic = topic


class Replace:
    """Put one state in another's place. `put` returns the new one."""

    def __init__(self, database: Database, name: str, expected: State | None, state: State) -> None:
        self.database = database
        self.name = name
        self.expected = expected
        self.state = state

    def check(self, txn: Transaction) -> None:
        """Raises MovedError, and as `load_state`."""
        if load_state(txn, self.database, self.name) != self.expected:
            raise MovedError(self.name)

    def put(self, txn: Transaction) -> State:
        """Write the new state."""
        store_state(txn, self.database, self.name, self.state)
        return self.state

    def committed(self) -> None:
        """There is nothing to do."""


class Advance(Replace):
    """Apply notifications to the rows of a generation, and move its position, in one transaction.

    ``begin``: it starts with this.
    """

    def __init__(
        self,
        database: Database,
        projection: Projection,
        expected: State,
        state: State,
        *,
        generation: int,
        begin: bool,
        notifications: Sequence[Notification],
    ) -> None:
        super().__init__(database, projection.name, expected, state)
        self._projection = projection
        self._generation = generation
        self._begin = begin
        self._notifications = notifications

    def put(self, txn: Transaction) -> State:
        """Raises ApplyError. An error of LMDB is no event's fault and passes through."""
        nid, topic = 0, ""
        view = View(txn, self.database, self.name, self._generation, writable=True)
        try:
            if self._begin:
                self._projection.begin(view)
            for notification in self._notifications:
                nid, topic = notification.id, notification.topic
                self._projection.apply(view, notification)
            self._projection.finish(view)
        except lmdb.Error:
            raise
        except Exception as error:
            raise ApplyError(nid, topic, error) from error
        finally:
            view.close()
        return super().put(txn)


class Drop(Replace):
    """Delete some rows of the first generation that is to go, and strike it off with the last."""

    def __init__(self, database: Database, name: str, expected: State, limit: int) -> None:
        super().__init__(database, name, expected, expected)
        self._limit = limit

    def put(self, txn: Transaction) -> State:
        """Delete up to the limit; returns the state after it."""
        assert self.expected is not None
        generation, *others = self.expected.dropping
        deleted = delete_rows(txn, self.database, self.name, generation, self._limit)
        if deleted < self._limit:
            self.state = msgspec.structs.replace(self.expected, dropping=tuple(others))
        else:
            self.state = self.expected
        return super().put(txn)


class Change(ABC):
    """A change that depends on the state that it finds, whatever that is."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.name = name

    @abstractmethod
    def changed(self, state: State | None) -> State:
        """The state afterwards. Raises if it is refused."""

    def check(self, txn: Transaction) -> None:
        """Raises what `changed` does, and as `load_state`."""
        self.changed(load_state(txn, self.database, self.name))

    def put(self, txn: Transaction) -> None:
        """Write the new state."""
        state = self.changed(load_state(txn, self.database, self.name))
        store_state(txn, self.database, self.name, state)

    def committed(self) -> None:  # noqa: B027 -- the rows are all there is
        """There is nothing to do."""
