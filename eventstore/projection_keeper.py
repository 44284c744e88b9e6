# SPDX-License-Identifier: AGPL-3.0-or-later
"""The task that keeps one projection up to date: what to do next, and what to do about failures.

What is durable is in `eventstore.projection_rows`; everything here can be lost at any moment. Knows
events and rows, not what they mean.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import trio
from eventsourcing.persistence import (
    InterfaceError,
    Notification,
    PersistenceError,
    ProgrammingError,
)
from msgspec.structs import replace

from eventstore.follow import Commits, read_page
from eventstore.lane import Lane
from eventstore.projection_changes import (
    Advance,
    ApplyError,
    Drop,
    MovedError,
    Projection,
    Replace,
)
from eventstore.projection_control import ProjectionParkedError
from eventstore.projection_rows import (
    DATABASE,
    ERROR_CHARACTERS_MAX,
    Parked,
    State,
    Track,
    load_state,
)
from eventstore.recorders import LMDBApplicationRecorder

#: Notifications that share a transaction.
BATCH_MAX = 500
#: How often an event is tried before the projection is parked at it: over about half a minute.
RETRIES_MAX = 10
RETRY_S_FIRST = 0.1
RETRY_S_MAX = 10.0
#: Rows of an old generation that are deleted in one transaction.
DROP_ROWS_MAX = 1000

_logger = logging.getLogger(__name__)


class _Page(NamedTuple):
    """What comes next for a generation: all its notifications in ``start`` < id ≤ ``stop``."""

    start: int
    notifications: list[Notification]
    stop: int
    head: int
    #: All up to this has been moved away from the log.
    floor: int


class _Failing(NamedTuple):
    nid: int
    tries: int
    #: When it may be tried again, in trio's time.
    due: float


class Keeper:
    """Keeps one projection up to date: one task, which gives the live generation and the one that
    is being built a turn each.
    """

    def __init__(
        self,
        recorder: LMDBApplicationRecorder,
        projection: Projection,
        poll_s: float,
        gather_s: float,
    ) -> None:
        self._recorder = recorder
        self._projection = projection
        self._name = projection.name
        self._database = recorder.environment.database(DATABASE)
        self._commits = Commits(recorder.environment, poll_s)
        #: The last state that is known to be durable.
        self._state: State | None = None
        self._failing: dict[int, _Failing] = {}
        self._waiters = trio.lowlevel.ParkingLot()
        self._gather_s = gather_s
        #: Set when somebody waits for what is not there yet.
        self._wanted = trio.Event()
        self._ended = False
        self._lane: Lane | None = None
        self.store_error: str | None = None

    async def run(self, lane: Lane) -> None:
        """As `Projections.run`, for one."""
        self._ended = False
        self._lane = lane
        store_tries = 0
        try:
            with self._commits:
                while True:
                    self._commits.look()
                    try:
                        busy = await self._step(lane)
                    except (InterfaceError, ProgrammingError):
                        raise
                    except PersistenceError as error:
                        await self._show_store_error(error, store_tries)
                        store_tries += 1
                        continue
                    self._store_works()
                    store_tries = 0
                    if not busy:
                        await self._commits.wait(self._due_in_s(), lane)
                        await self._gather()
        finally:
            self._ended = True
            self._waiters.unpark_all()

    async def _gather(self) -> None:
        """Let more events come before they are taken, unless somebody waits for them."""
        if self._gather_s > 0:
            with trio.move_on_after(self._gather_s):
                await self._wanted.wait()
            self._wanted = trio.Event()

    async def wait(self, nid: int) -> None:
        """As `Projections.wait`."""
        await trio.lowlevel.checkpoint()
        while (state := self._state) is None or state.live.position < nid:
            self._wanted.set()
            if self._ended:
                raise InterfaceError(f"projection {self._name!r} does not run any more")
            if state is not None and self._stands(state) is not None:
                assert self._lane is not None, "a state is known once it runs"
                # It may have been resumed by a commit that this task has not come to yet.
                fresh = await self._lane.read(self._load)
                parked = None if fresh is None else self._stands(fresh)
                if parked is not None:
                    raise ProjectionParkedError(
                        f"projection {self._name!r} is parked at event {parked.nid}: {parked.error}"
                    )
                if self._state is not state:
                    continue
            await self._waiters.park()

    def _stands(self, state: State) -> Parked | None:
        """Why the projection stands still until somebody does something; None if it does not."""
        live, building = state.live, state.building
        if state.requested or (live.parked is None and not self._frozen(state)):
            return None
        if building is not None:
            # Without a fault it will take the place of the live one.
            return building.parked
        # One that is frozen and not being built is about to be.
        return None if self._frozen(state) else live.parked

    def _frozen(self, state: State) -> bool:
        """True if the live rows were made by other logic, which this program does not have."""
        return state.live.revision != self._projection.revision

    async def _step(self, lane: Lane) -> bool:
        """Do what there is to do next, if anything. Returns False if there was nothing."""
        now = trio.current_time()
        resting = frozenset(g for g, failing in self._failing.items() if failing.due > now)
        state, pages = await lane.read(self._look, resting)
        self._set(state)
        try:
            prepared = self._prepared(state)
            if prepared is not None:
                await self._commit(lane, Replace(self._database, self._name, state, prepared))
                return True
            assert self._state is not None, "the first thing prepared is a state"
            busy = False
            for generation, page in pages.items():
                busy |= await self._advance(lane, generation, page)
            busy |= await self._switch(lane, pages)
            if self._state.dropping:
                drop = Drop(self._database, self._name, self._state, DROP_ROWS_MAX)
                await self._commit(lane, drop)
                busy = True
            return busy
        except MovedError:
            return True

    def _look(self, resting: frozenset[int]) -> tuple[State | None, dict[int, _Page]]:
        """The state, and a page for each generation that can move; in a worker thread."""
        state = self._load()
        pages: dict[int, _Page] = {}
        if state is not None:
            for track in (state.live, state.building):
                if (
                    track is not None
                    and track.parked is None
                    and track.generation not in resting
                    # Other logic made it: what this program knows must not be mixed into it.
                    and track.revision == self._projection.revision
                ):
                    pages[track.generation] = self._page(track)
        return state, pages

    def _load(self) -> State | None:
        return self._recorder.environment.read(
            lambda txn: load_state(txn, self._database, self._name)
        )

    def _page(self, track: Track) -> _Page:
        start = track.position if track.started else max(track.position, _floor(self._recorder))
        found, stop, head = read_page(self._recorder, start, self._projection.topics, BATCH_MAX)
        # Asked after the page was read: what has not been moved away now was not then.
        return _Page(start, found, stop, head, _floor(self._recorder))

    def _prepared(self, state: State | None) -> State | None:
        """The state to be put before anything is applied; None if it is right as it is."""
        revision = self._projection.revision
        if state is None:
            return State(Track(1, revision))
        building = state.building
        outdated = building is not None and building.revision != revision
        missing = self._frozen(state) and building is None
        if state.dropping or not (state.requested or outdated or missing):
            return None
        gone = () if building is None else (building.generation,)
        begun = (
            Track(state.next_generation(), revision)
            if state.requested or self._frozen(state)
            else None
        )
        return replace(state, building=begun, requested=False, dropping=gone)

    async def _advance(self, lane: Lane, generation: int, page: _Page) -> bool:
        """Apply a page. What is good before a failing event is committed. True if it moved."""
        assert self._state is not None
        track = self._state.track(generation)
        assert track is not None
        if page.floor > page.start:
            text = f"events {page.start + 1} to {page.floor} were moved away unseen: rebuild it"
            await self._park(lane, track, Parked(page.start + 1, "", text, 1))
            return True
        notifications, stop = page.notifications, page.stop
        failed: ApplyError | None = None
        moved = False
        while stop > track.position or not track.started:
            target = replace(track, position=stop, started=True)
            change = Advance(
                self._database,
                self._projection,
                self._state,
                self._state.with_track(target),
                generation=generation,
                begin=not track.started,
                notifications=notifications,
            )
            try:
                await self._commit(lane, change)
            except ApplyError as error:
                failed = error
                if error.nid == 0:
                    break
                stop = error.nid - 1
                notifications = [n for n in notifications if n.id <= stop]
            else:
                moved = True
                break
        if failed is not None:
            await self._note_failure(lane, generation, failed)
        else:
            self._failing.pop(generation, None)
        return moved

    async def _note_failure(self, lane: Lane, generation: int, error: ApplyError) -> None:
        before = self._failing.get(generation)
        tries = before.tries + 1 if before is not None and before.nid == error.nid else 1
        if tries < RETRIES_MAX:
            due = trio.current_time() + _retry_s(tries - 1)
            self._failing[generation] = _Failing(error.nid, tries, due)
            _logger.warning(
                "projection %s failed at event %d, try %d: %s", self._name, error.nid, tries, error
            )
            return
        assert self._state is not None
        track = self._state.track(generation)
        assert track is not None
        text = str(error)[:ERROR_CHARACTERS_MAX].encode(errors="replace").decode()
        await self._park(lane, track, Parked(error.nid, error.topic, text, tries))

    async def _park(self, lane: Lane, track: Track, parked: Parked) -> None:
        assert self._state is not None
        state = self._state.with_track(replace(track, parked=parked))
        await self._commit(lane, Replace(self._database, self._name, self._state, state))
        self._failing.pop(track.generation, None)
        _logger.error(
            "projection %s is parked at event %d (%s) after %d tries: %s",
            self._name,
            parked.nid,
            parked.topic,
            parked.tries,
            parked.error,
        )

    async def _switch(self, lane: Lane, pages: dict[int, _Page]) -> bool:
        """Let the generation that has caught up take the live one's place. True if it did."""
        state = self._state
        assert state is not None
        building = state.building
        if building is None or building.parked is not None or not building.started:
            return False
        page = pages.get(building.generation)
        if page is None or building.position < max(page.head, state.live.position):
            return False
        dropping = (*state.dropping, state.live.generation)
        switched = replace(state, live=building, building=None, dropping=dropping)
        await self._commit(lane, Replace(self._database, self._name, state, switched))
        return True

    async def _commit(self, lane: Lane, change: Replace) -> None:
        self._set(await lane.commit(change))

    def _set(self, state: State | None) -> None:
        if state != self._state:
            self._state = state
            self._waiters.unpark_all()

    def _due_in_s(self) -> float:
        now = trio.current_time()
        due = min((failing.due for failing in self._failing.values()), default=math.inf)
        return max(due - now, 0)

    async def _show_store_error(self, error: PersistenceError, tries: int) -> None:
        """The store's fault is no event's: nothing is parked, and the next try comes by itself."""
        text = f"{type(error).__name__}: {error}"
        if text != self.store_error:
            _logger.error("projection %s waits for the store: %s", self._name, text)
        self.store_error = text
        await trio.sleep(_retry_s(tries))

    def _store_works(self) -> None:
        if self.store_error is not None:
            _logger.warning("projection %s goes on: the store works again", self._name)
            self.store_error = None


def _retry_s(tries: int) -> float:
    return min(RETRY_S_FIRST * (1 << min(tries, 30)), RETRY_S_MAX)


def _floor(recorder: LMDBApplicationRecorder) -> int:
    """The last notification id that cannot be read any more; 0 if all can."""
    return recorder.first_nid() - 1
