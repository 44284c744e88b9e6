# SPDX-License-Identifier: AGPL-3.0-or-later
"""A subscription to a log: notifications in order, without end, as soon as they are committed.

No thread of its own: whoever asks for the next notification reads or waits. trio programs follow a
log without it, see `eventstore.follow`.
"""

from __future__ import annotations

import threading  # noqa: TID251 -- the library's consumers are threads; none is started here
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eventsourcing.persistence import ApplicationRecorder, Notification, Subscription

if TYPE_CHECKING:
    from eventstore.recorders import LMDBApplicationRecorder

PAGE = 500
#: How late a commit of another process may be seen.
POLL_S = 0.05


class LMDBSubscription(Subscription[ApplicationRecorder]):
    """Notifications after ``gt``, of all topics or of ``topics``. Use it as a context manager.

    `__next__` blocks until there is one; commits of this process wake it at once, those of others
    within 50 ms. It raises what the recorder raises, and StopIteration after `stop`, which may be
    called from any thread. One thread at a time may iterate.
    """

    def __init__(
        self, recorder: LMDBApplicationRecorder, gt: int | None = None, topics: Sequence[str] = ()
    ) -> None:
        super().__init__(recorder, gt, topics)
        self._log = recorder
        self._position = gt or 0
        self._found: deque[Notification] = deque()
        self._wake = threading.Event()
        # Before the first read, so that no commit falls between the two. It holds nothing of this
        # object, which can be forgotten without being stopped.
        environment = recorder.environment
        environment.add_listener(self._wake.set)
        self._unlisten = weakref.finalize(self, environment.remove_listener, self._wake.set)

    def __exit__(self, *args: object, **kwargs: Any) -> None:
        super().__exit__(*args, **kwargs)
        self._found.clear()

    def stop(self) -> None:
        """End it: whoever waits for the next notification gets StopIteration. Again is no error."""
        super().stop()
        self._unlisten()
        self._wake.set()

    def __next__(self) -> Notification:
        """The next notification; blocks, see the class."""
        while not self._has_been_stopped:
            if self._found:
                return self._found.popleft()
            # Cleared before the reads: a commit after this wakes the wait below.
            self._wake.clear()
            transaction = self._log.environment.last_transaction()
            before = self._position
            notifications, self._position = self._log.select_page(before, PAGE, self._topics)
            if notifications:
                self._found.extend(notifications)
                self._last_notification_id = notifications[-1].id
            elif self._position == before:
                self._wait(transaction)
        raise StopIteration

    def _wait(self, transaction: int) -> None:
        """Until this process or another one commits, or `stop`."""
        while not self._has_been_stopped and not self._wake.wait(POLL_S):
            if self._log.environment.last_transaction() != transaction:
                return
