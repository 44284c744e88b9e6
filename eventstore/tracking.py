# SPDX-License-Identifier: AGPL-3.0-or-later
"""The recorder of a projection's view: its own rows and its position in one transaction.

A view is a subclass that opens its databases in its constructor and changes them with `write`.
Everything blocks.
"""

from __future__ import annotations

import threading  # noqa: TID251 -- the library's callers are threads; none is started here
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar

from eventsourcing.persistence import Tracking, TrackingRecorder, WaitInterruptedError

from eventstore.environment import LMDBEnvironment, Operation
from eventstore.mapping import check_name
from eventstore.positions import Positions

if TYPE_CHECKING:
    from eventstore.environment import Transaction

T = TypeVar("T")
#: How late a commit of another process, or an interruption, may be seen.
POLL_S = 0.02


class Tracked(Generic[T]):
    """An operation: a function in a write transaction, and the position that it brings us to."""

    __slots__ = ("_function", "_positions", "_tracking")

    def __init__(
        self,
        positions: Positions,
        tracking: Tracking | None,
        function: Callable[[Transaction], T],
    ) -> None:
        self._positions = positions
        self._tracking = tracking
        self._function = function

    def check(self, txn: Transaction) -> None:
        """The position must go forward."""
        if self._tracking is not None:
            self._positions.check(txn, self._tracking)

    def put(self, txn: Transaction) -> T:
        """Position and rows."""
        if self._tracking is not None:
            self._positions.put(txn, self._tracking)
        return self._function(txn)

    def committed(self) -> None:
        """Nothing is cached."""


class LMDBTrackingRecorder(TrackingRecorder):
    """How far the logs of other applications have been processed, by ``application``.

    With ``create`` false, or a read-only environment, positions that nobody has stored are an
    OperationalError at first use. Views extend the constructor, and pass these arguments on.
    """

    def __init__(
        self, environment: LMDBEnvironment, application: str = "", *, create: bool = True
    ) -> None:
        check_name(application, "application")
        self.environment = environment
        self._application = application
        self._create_positions = create and not environment.readonly
        self._opened_positions: Positions | None = None
        if self._create_positions:
            self._positions()

    def read(self, function: Callable[[Transaction], T]) -> T:
        """As `LMDBEnvironment.read`."""
        return self.environment.read(function)

    def write(self, function: Callable[[Transaction], T], tracking: Tracking | None = None) -> T:
        """Run ``function`` in one write transaction, with ``tracking`` in it if given, and return
        its result when all of it is durable.

        It must not keep the transaction, nor open databases in it; it may be run again. Raises
        IntegrityError, without running it, if the position is not after the one that is stored;
        what it raises itself, and then nothing is stored; and as `LMDBEnvironment.write`.
        """
        return self.environment.commit_one(self.prepare_write(function, tracking))

    def prepare_write(
        self, function: Callable[[Transaction], T], tracking: Tracking | None = None
    ) -> Operation[T]:
        """What `write` does, as an operation for `LMDBEnvironment.commit`."""
        return Tracked(self._positions(), tracking, function)

    def insert_tracking(self, tracking: Tracking) -> None:
        """Store a position. Raises IntegrityError unless it is after the one that is stored."""
        self.write(lambda _: None, tracking)

    def max_tracking_id(self, application_name: str) -> int | None:
        """The position in the log of that application, None if nothing of it was processed."""
        positions = self._positions()
        return self.environment.read(lambda txn: positions.get(txn, application_name))

    def wait(
        self,
        application_name: str,
        notification_id: int | None,
        timeout: float = 1.0,
        interrupt: threading.Event | None = None,
    ) -> None:
        """Block until the position is at ``notification_id`` or after it.

        Woken by commits of this process at once, by those of others within 20 ms. ``timeout`` is
        seconds. Raises TimeoutError, WaitInterruptedError if ``interrupt`` is set meanwhile.
        """
        deadline = monotonic() + timeout
        wake = threading.Event()
        # Before the first look, so that no commit falls between the two.
        self.environment.add_listener(wake.set)
        try:
            while True:
                wake.clear()
                transaction = self.environment.last_transaction()
                if self.has_tracking_id(application_name, notification_id):
                    return
                while not wake.is_set():
                    if interrupt is not None and interrupt.is_set():
                        raise WaitInterruptedError
                    remaining = deadline - monotonic()
                    if remaining <= 0:
                        raise TimeoutError(
                            f"event {notification_id} of {application_name!r} was not processed "
                            f"within {timeout} s"
                        )
                    wake.wait(min(remaining, POLL_S))
                    if self.environment.last_transaction() != transaction:
                        break
        finally:
            self.environment.remove_listener(wake.set)

    def _positions(self) -> Positions:
        if self._opened_positions is None:
            self._opened_positions = Positions(
                self.environment, self._application, create=self._create_positions
            )
        return self._opened_positions
