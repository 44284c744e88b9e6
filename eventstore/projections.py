# SPDX-License-Identifier: AGPL-3.0-or-later
"""Projections kept in the same environment as the events: every event exactly once, whatever
crashes.

A projection's rows and its position move in one transaction, through a `Lane`. An event that it
cannot apply is tried again, then the projection is parked there, durably and loudly, and the others
go on. A rebuild makes a second generation of rows beside the live one and takes its place in one
transaction. Knows events and rows, not what they mean. `eventstore.projection_control` is for other
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import trio
from eventsourcing.persistence import ProgrammingError

from eventstore.environment import LMDBEnvironment
from eventstore.follow import POLL_S_DEFAULT
from eventstore.lane import Lane
from eventstore.projection_changes import Projection
from eventstore.projection_control import (
    ProjectionParkedError,
    ProjectionState,
    RebuildUnderWayError,
    UnknownProjectionError,
    list_projections,
    read_projection,
    rebuild_request,
    request_rebuild,
    resume,
    resumption,
)
from eventstore.projection_keeper import Keeper
from eventstore.projection_rows import DATABASE, REVISION_MAX, View, check_projection_name
from eventstore.recorders import LMDBApplicationRecorder

__all__ = [
    "Projection",
    "ProjectionParkedError",
    "ProjectionState",
    "Projections",
    "RebuildUnderWayError",
    "UnknownProjectionError",
    "View",
    "list_projections",
    "read_projection",
    "rebuild_request",
    "request_rebuild",
    "resume",
    "resumption",
]

T = TypeVar("T")


class Projections:
    """Keeps projections up to date, in a trio program. Made with blocking calls (databases are
    opened), so in a worker thread or before trio runs; its other methods belong to the trio thread,
    unless they say that they block.

    Another process's commit is seen within ``poll_s`` seconds. With ``gather_s`` what is committed
    then is taken in only after so many seconds, or as soon as somebody waits for it: one commit
    for many events, where views may be that old. Raises ProgrammingError for a bad
    name or revision, two projections of one name, a read-only environment or one that is not the
    recorder's.
    """

    def __init__(
        self,
        environment: LMDBEnvironment,
        recorder: LMDBApplicationRecorder,
        projections: Sequence[Projection],
        *,
        poll_s: float = POLL_S_DEFAULT,
        gather_s: float = 0,
    ) -> None:
        if environment.readonly or environment.path != recorder.environment.path:
            raise ProgrammingError("projections need the environment of their log, for writing")
        self._environment = environment
        self._recorder = recorder
        self._keepers: dict[str, Keeper] = {}
        self._running = False
        environment.database(DATABASE)
        for projection in projections:
            check_projection_name(projection.name)
            if not 0 <= projection.revision <= REVISION_MAX:
                raise ProgrammingError(f"projection revision {projection.revision} is out of range")
            if projection.name in self._keepers:
                raise ProgrammingError(f"two projections are called {projection.name!r}")
            self._keepers[projection.name] = Keeper(recorder, projection, poll_s, gather_s)

    async def run(self, lane: Lane) -> None:
        """Keep all of them up to date until cancelled; what is committed by then stays.

        A failing event or a full disk does not end it. Raises LaneClosedError when the lane closes,
        and errors of the program (in an exception group).
        """
        if self._running or lane.environment.path != self._environment.path:
            raise ProgrammingError("these projections run already, or the lane is another store's")
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                for keeper in self._keepers.values():
                    nursery.start_soon(keeper.run, lane)
        finally:
            self._running = False

    async def wait(self, name: str, nid: int) -> None:
        """Return when the live generation has seen the event ``nid`` and that is durable.

        To be used while `run` runs. Raises ProjectionParkedError if it stands still before that
        event, UnknownProjectionError if it is none of these, InterfaceError if `run` ends.
        """
        keeper = self._keepers.get(name)
        if keeper is None:
            raise UnknownProjectionError(f"projection {name!r} is not one of these")
        await keeper.wait(nid)

    def store_error(self, name: str) -> str | None:
        """Why the store refuses what this projection reads or writes, while it does; else None."""
        keeper = self._keepers.get(name)
        if keeper is None:
            raise UnknownProjectionError(f"projection {name!r} is not one of these")
        return keeper.store_error

    def read(self, name: str, function: Callable[[View], T]) -> T:
        """As `read_projection`. Blocks."""
        return read_projection(self._environment, name, function)

    def list(self) -> list[ProjectionState]:
        """As `list_projections`. Blocks."""
        return list_projections(self._recorder)

    def request_rebuild(self, name: str) -> None:
        """As `eventstore.projection_control.request_rebuild`. Blocks."""
        request_rebuild(self._environment, name)

    def resume(self, name: str) -> None:
        """As `eventstore.projection_control.resume`. Blocks."""
        resume(self._environment, name)
