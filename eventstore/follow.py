# SPDX-License-Identifier: AGPL-3.0-or-later
"""Following a log from a trio task: every notification once, in order, as soon as it is committed.

Commits of this process wake by a listener, those of other processes are seen by asking LMDB for its
last transaction, which costs some microseconds and no input or output. Knows notifications, not
what they mean.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Self

import trio
from eventsourcing.persistence import Notification, ProgrammingError

from eventstore.environment import LMDBEnvironment
from eventstore.lane import Lane, LaneClosedError
from eventstore.recorders import LMDBApplicationRecorder

PAGE_DEFAULT = 500
POLL_S_DEFAULT = 0.05


class Commits:
    """Wakes one trio task when anything was committed to an environment, by whatever process.

    A context manager, to be entered in the trio thread. Nothing is missed: call `look`, then read,
    then `wait`, which returns if there was a commit since `look`.
    """

    def __init__(self, environment: LMDBEnvironment, poll_s: float = POLL_S_DEFAULT) -> None:
        if not poll_s > 0:
            raise ProgrammingError(f"a poll every {poll_s} s is not possible")
        self._environment = environment
        #: Infinity: other processes' commits are seen only when this one commits.
        self._poll_s = poll_s
        self._token: trio.lowlevel.TrioToken | None = None
        self._changed = trio.Event()
        self._last = -1

    def __enter__(self) -> Self:
        self._token = trio.lowlevel.current_trio_token()
        self._environment.add_listener(self._committed)
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.remove_listener(self._committed)

    def look(self) -> None:
        """From this moment on a commit ends the next `wait`."""
        if self._changed.is_set():
            self._changed = trio.Event()
        self._last = self._environment.last_transaction()

    async def wait(self, timeout_s: float = math.inf, lane: Lane | None = None) -> None:
        """Return when something was committed since the last `look`, or after ``timeout_s``
        seconds.

        Raises LaneClosedError once ``lane`` is closed, which is noticed at a poll. May return
        without a cause. Cancellation leaves it as it was.
        """
        deadline = trio.current_time() + timeout_s
        while True:
            if lane is not None and lane.closed:
                raise LaneClosedError("the lane was closed under its follower")
            left_s = deadline - trio.current_time()
            with trio.move_on_after(max(min(left_s, self._poll_s), 0)):
                await self._changed.wait()
                return
            if left_s <= self._poll_s or self._environment.last_transaction() != self._last:
                return

    def _committed(self) -> None:
        """Called on the committing thread."""
        assert self._token is not None
        # The program's end may come between a commit and its listeners.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        self._changed.set()


class Follower:
    """A place in a log that moves on. A context manager, to be entered in the trio thread; for one
    task at a time.

    Arguments as of `follow`.
    """

    def __init__(
        self,
        lane: Lane,
        recorder: LMDBApplicationRecorder,
        *,
        gt: int | None = None,
        topics: Sequence[str] = (),
        page: int = PAGE_DEFAULT,
        poll_s: float = POLL_S_DEFAULT,
    ) -> None:
        if page < 1:
            raise ProgrammingError(f"a page of {page} notifications is not possible")
        self._lane = lane
        self._recorder = recorder
        self._topics = tuple(topics)
        self._page = page
        self._commits = Commits(recorder.environment, poll_s)
        self._position = max(gt or 0, 0)

    def __enter__(self) -> Self:
        self._commits.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._commits.__exit__()

    @property
    def position(self) -> int:
        """All that is to be had up to this notification id was given out; the next `receive` looks
        behind it. It also moves over notifications of other topics.
        """
        return self._position

    async def receive(self) -> list[Notification]:
        """The next notifications: at least one, at most a page. Waits for them for ever.

        Raises what the recorder raises, and LaneClosedError. Cancellation loses none: the position
        moves only when they are returned.
        """
        while True:
            self._commits.look()
            found, position, head = await self._lane.read(
                read_page, self._recorder, self._position, self._topics, self._page
            )
            self._position = position
            if found:
                return found
            if position >= head:
                await self._commits.wait(lane=self._lane)


def read_page(
    recorder: LMDBApplicationRecorder, position: int, topics: Sequence[str], limit: int
) -> tuple[list[Notification], int, int]:
    """Up to ``limit`` notifications of ``topics`` (empty: all) after ``position``, the position up
    to which that is all there is, and the last notification id before it was looked.

    Blocks, for a bounded number of records. Raises what the recorder raises.
    """
    head = recorder.max_notification_id() or 0
    if head <= position:
        return [], position, head
    found, seen = recorder.select_page(position, limit, topics)
    return found, max(seen, position), head


async def follow(
    lane: Lane,
    recorder: LMDBApplicationRecorder,
    *,
    gt: int | None = None,
    topics: Sequence[str] = (),
    page: int = PAGE_DEFAULT,
    poll_s: float = POLL_S_DEFAULT,
) -> AsyncGenerator[list[Notification], None]:
    """All notifications after ``gt`` (None: from the first there is), in order, as lists of at most
    ``page``, for ever; to be used with `contextlib.aclosing`.

    ``topics``: only those. Another process's commit is seen within ``poll_s`` seconds. Raises what
    the recorder raises, ProgrammingError for bad arguments, and LaneClosedError when the lane
    closes. Cancelled or closed, it leaves no listener behind. What has been moved away from the
    log's beginning is passed over.
    """
    follower = Follower(lane, recorder, gt=gt, topics=topics, page=page, poll_s=poll_s)
    with follower:
        while True:
            yield await follower.receive()
