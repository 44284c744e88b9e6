# SPDX-License-Identifier: AGPL-3.0-or-later
"""Kills itself at every commit step of a projection's life, in forked children: FOLDER. For each
step one line that says what its successors found.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from uuid import UUID

import trio
from eventsourcing.persistence import Notification, StoredEvent

from eventstore import LMDBApplicationRecorder, LMDBEnvironment, environment, projection_keeper
from eventstore.follow import Commits
from eventstore.lane import open_lane
from eventstore.projections import (
    Projection,
    Projections,
    View,
    list_projections,
    read_projection,
    request_rebuild,
)

EVENTS = 7
STEPS_MAX = 1000


class Sum(Projection):
    """Adds up the events' numbers: one that is missing or comes twice shows."""

    name = "sum"

    def apply(self, view: View, notification: Notification) -> None:
        total = int(view.get(b"sum") or b"0") + notification.id
        view.put(b"sum", b"%d" % total)
        view.put(b"e%d" % notification.id, b"")


def check(path: Path) -> None:
    """The live rows are those of exactly the events up to the position."""
    with LMDBEnvironment.open(path) as opened:
        opened.database("projections")
        for state in list_projections(LMDBApplicationRecorder(opened)):
            rows = read_projection(opened, "sum", lambda view: dict(view.items()))
            assert int(rows.pop(b"sum", b"0")) == sum(range(1, state.position + 1)), state
            assert len(rows) == state.position, state


async def live(path: Path) -> None:
    """The whole life, from wherever an earlier one was cut off."""
    with LMDBEnvironment.open(path) as opened:
        recorder = LMDBApplicationRecorder(opened)
        keeping = Projections(opened, recorder, [Sum()])
        async with open_lane(opened) as lane, trio.open_nursery() as nursery:
            nursery.start_soon(keeping.run, lane)
            while (count := recorder.max_notification_id() or 0) < EVENTS:
                event = StoredEvent(UUID(int=7), count + 1, "topic", b"state")
                await lane.commit(recorder.prepare([event]))
            await keeping.wait("sum", EVENTS)
            (state,) = list_projections(recorder)
            if state.generation == 1 and state.state == "live":
                request_rebuild(opened, "sum")
            with Commits(opened) as commits:
                while True:
                    commits.look()
                    (state,) = list_projections(recorder)
                    if state.generation == 2 and not dropping(opened):
                        break
                    await commits.wait()
            nursery.cancel_scope.cancel()


def dropping(opened: LMDBEnvironment) -> bool:
    database = opened.database("projections")
    # The rows of generation 1.
    return opened.read(
        lambda txn: any(
            b"sum\x00\x00\x00\x01" in key for key in txn.cursor(database).iternext(values=False)
        )
    )


def killed_at(path: Path, steps: int) -> bool:
    """Live until the step; False if life ended before it."""
    left = steps

    def observe(step: str, where: str) -> None:
        nonlocal left
        del step, where
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        environment.observe_commit = observe
        trio.run(live, path)

    status = in_child(run)
    assert status in {0, signal.SIGKILL}, status
    return status != 0


def in_child(function: object) -> int:
    """The wait status of a child that calls the function. This process has no thread and nothing
    open, so a fork is sound, and saves importing everything each time.
    """
    assert callable(function)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:  # noqa: BLE001 -- shown; a fork must not return into its parent's life
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main(folder: str) -> None:
    projection_keeper.BATCH_MAX = 2
    projection_keeper.DROP_ROWS_MAX = 3
    for steps in range(1, STEPS_MAX):
        path = Path(folder) / str(steps)
        killed = killed_at(path, steps)
        assert in_child(lambda path=path: check(path)) == 0
        if not killed:
            os.write(1, b"finished without a kill\n")
            return
        assert in_child(lambda path=path: trio.run(live, path)) == 0
        assert in_child(lambda path=path: check(path)) == 0
        os.write(1, b"killed, consistent, finished\n")
    raise AssertionError("it never comes to an end")


if __name__ == "__main__":
    main(sys.argv[1])
