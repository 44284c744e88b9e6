# SPDX-License-Identifier: AGPL-3.0-or-later
"""Looking at projections, reading them and asking for changes, from any process, by the rows alone.

The process that runs a projection need not be this one: a request is a durable mark in its state,
which the running process sees as it sees every commit. All calls block and each is one transaction;
trio programs use a lane, with the operations that `rebuild_request` and `resumption` give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
from eventsourcing.persistence import OperationalError, ProgrammingError

from eventstore.environment import LMDBEnvironment
from eventstore.projection_changes import Change
from eventstore.projection_rows import (
    DATABASE,
    State,
    View,
    all_states,
    check_projection_name,
    load_state,
)
from eventstore.recorders import LMDBApplicationRecorder

if TYPE_CHECKING:
    from eventstore.environment import Operation, Transaction

T = TypeVar("T")


class UnknownProjectionError(ProgrammingError):
    """There is no projection of that name in the environment: none has ever run."""


class RebuildUnderWayError(OperationalError):
    """A rebuild of that projection is requested or under way already."""


class ProjectionParkedError(OperationalError):
    """The projection stands still at an event that it cannot apply."""


@dataclass(frozen=True, slots=True)
class ProjectionState:
    """How a projection stands. Numbers of events are notification ids.

    ``lag``: events that the live generation has not seen. ``error``, ``event``, ``topic`` and
    ``tries`` say why it is parked; ``event`` 0 means that it failed before the first.
    """

    name: str
    state: Literal["live", "rebuilding", "parked"]
    revision: int
    generation: int
    position: int
    head: int
    error: str | None = None
    event: int | None = None
    topic: str | None = None
    tries: int = 0
    #: Where the generation that is being built stands; None if none is.
    rebuild_position: int | None = None

    @property
    def lag(self) -> int:
        """Events behind the head of the log."""
        return max(self.head - self.position, 0)

    @property
    def rebuild_progress(self) -> float | None:
        """How far a rebuild is, 0..1; None if none is under way."""
        if self.rebuild_position is None:
            return None
        return min(self.rebuild_position / self.head, 1.0) if self.head else 1.0


class _Request(Change):
    def changed(self, state: State | None) -> State:
        state = _known(self.name, state)
        building = state.building is not None and state.building.parked is None
        if state.requested or building:
            raise RebuildUnderWayError(f"projection {self.name!r} is being rebuilt already")
        return msgspec.structs.replace(state, requested=True)


class _Resumption(Change):
    def changed(self, state: State | None) -> State:
        state = _known(self.name, state)
        for track in (state.live, state.building):
            if track is not None:
                state = state.with_track(msgspec.structs.replace(track, parked=None))
        return state


def rebuild_request(environment: LMDBEnvironment, name: str) -> Operation[None]:
    """The operation behind `request_rebuild`. Blocks at its first call, opening the database."""
    return _Request(environment.database(DATABASE), name)


def resumption(environment: LMDBEnvironment, name: str) -> Operation[None]:
    """The operation behind `resume`. Blocks at its first call, opening the database."""
    return _Resumption(environment.database(DATABASE), name)


def request_rebuild(environment: LMDBEnvironment, name: str) -> None:
    """Ask, durably, for a new generation of a projection's rows, from the first event there is.

    Whichever process runs the projection takes it up, now or when it starts. A rebuild that is
    parked is given up for the new one. Raises RebuildUnderWayError, UnknownProjectionError,
    ProgrammingError (bad name, read-only environment).
    """
    _commit(environment, rebuild_request(environment, name))


def resume(environment: LMDBEnvironment, name: str) -> None:
    """Let a parked projection try again from where it stands. Does nothing to one that is not
    parked. Raises UnknownProjectionError, ProgrammingError (bad name, read-only environment).
    """
    _commit(environment, resumption(environment, name))


def read_projection(environment: LMDBEnvironment, name: str, function: Callable[[View], T]) -> T:
    """Run ``function`` on the live generation's rows in one read transaction and return its result,
    which must not hold on to the view (so no generator).

    The environment may be read-only. Raises UnknownProjectionError, ProgrammingError (bad name),
    OperationalError (no projection of any name), InternalError (damaged row), what ``function``
    raises.
    """
    check_projection_name(name)
    database = environment.database(DATABASE)

    def read(txn: Transaction) -> T:
        live = _known(name, load_state(txn, database, name)).live
        view = View(txn, database, name, live.generation, writable=False)
        try:
            return function(view)
        finally:
            view.close()

    return environment.read(read)


def list_projections(recorder: LMDBApplicationRecorder) -> list[ProjectionState]:
    """How all projections in the recorder's environment stand, by name; ``head`` is its log's.

    The environment may be read-only. Raises OperationalError (no projection of any name),
    InternalError (damaged row).
    """
    environment = recorder.environment
    database = environment.database(DATABASE)
    states = environment.read(lambda txn: list(all_states(txn, database)))
    # After the rows, so that no position is ahead of it.
    head = recorder.max_notification_id() or 0
    return [_shown(name, state, head) for name, state in states]


def _shown(name: str, state: State, head: int) -> ProjectionState:
    live, building = state.live, state.building
    parked = live.parked
    shown: Literal["live", "rebuilding", "parked"] = "live" if parked is None else "parked"
    if building is not None and building.parked is not None:
        parked, shown = building.parked, "parked"
    elif building is not None:
        shown = "rebuilding"
    if state.requested:
        shown = "rebuilding"
    return ProjectionState(
        name=name,
        state=shown,
        revision=live.revision,
        generation=live.generation,
        position=live.position,
        head=head,
        error=None if parked is None else parked.error,
        event=None if parked is None else parked.nid,
        topic=None if parked is None else parked.topic,
        tries=0 if parked is None else parked.tries,
        rebuild_position=None if building is None else building.position,
    )


def _known(name: str, state: State | None) -> State:
    if state is None:
        raise UnknownProjectionError(f"there is no projection {name!r}")
    return state


def _commit(environment: LMDBEnvironment, operation: Operation[Any]) -> None:
    (result,) = environment.commit([operation])
    if isinstance(result, BaseException):
        raise result
