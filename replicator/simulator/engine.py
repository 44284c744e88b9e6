# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tasks: what was accepted is done later, by one task of trio each, and told as QUEUED, RUNNING, then how it ended."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from uuid import uuid4

import trio

from replicator.errors import ReplicatorError
from replicator.simulator.faults import Faults
from replicator.simulator.model import AffectedEntity, Task, TaskError, World
from replicator.simulator.web import HttpError

#: How many tasks are kept; of those that have ended the oldest go first.
KEPT_MAX = 20_000

Work = Callable[[Task], Awaitable[None]]


class FailedTask(Exception):  # noqa: N818 - it is how a task ends, not how the simulator fails
    """Raised by a task's work: the task ends as FAILED with this error."""

    def __init__(self, code: str, group: str, message: str) -> None:
        super().__init__(message)
        self.error = TaskError(code=code, group=group, message=message)


class Engine:
    """Runs tasks in a nursery. ``delay_s``: how long each of them takes at the least."""

    def __init__(
        self, world: World, nursery: trio.Nursery, faults: Faults, save: Callable[[], None]
    ) -> None:
        self._world = world
        self._nursery = nursery
        self._faults = faults
        self._save = save
        self.delay_s = 0.0
        self._by_request = {
            (task.owner, task.request_id): task.uuid
            for task in world.tasks.values()
            if task.request_id
        }

    def start(
        self,
        operation: str,
        entities: Sequence[AffectedEntity],
        work: Work,
        *,
        request_id: str = "",
        owner: str = "admin",
        cluster: str | None = None,
        task_uuid: str | None = None,
    ) -> Task:
        """Accept an operation. The same request id of the same owner gives the task that it gave before."""
        known = self.known(request_id, owner)
        if known is not None:
            return known
        now = time.time()
        task = Task(
            uuid=task_uuid or str(uuid4()),
            name=operation,
            created_at=now,
            updated_at=now,
            entities=list(entities),
            clusters=[cluster] if cluster else [],
            owner=owner,
            request_id=request_id,
        )
        self._world.tasks[task.uuid] = task
        if request_id:
            self._by_request[owner, request_id] = task.uuid
        self._forget_old()
        self._save()
        self._nursery.start_soon(self._run, task, work)
        return task

    def known(self, request_id: str, owner: str = "admin") -> Task | None:
        """The task that a request with this id was given."""
        uuid = self._by_request.get((owner, request_id)) if request_id else None
        return self._world.tasks.get(uuid) if uuid is not None else None

    def later(self, delay_s: float, work: Callable[[], Awaitable[None]]) -> None:
        """Have something done that no task tells of, such as a target that appears late."""

        async def run() -> None:
            await trio.sleep(delay_s)
            await work()

        self._nursery.start_soon(run)

    async def _run(self, task: Task, work: Work) -> None:
        await trio.lowlevel.checkpoint()
        task.status, task.started_at = "RUNNING", time.time()
        self._touch(task, 10)
        if self._faults.take("task-stuck", task.name) is not None:
            return
        delay = self._faults.take("task-slow", task.name)
        await trio.sleep(max(self.delay_s, delay.value if delay is not None else 0.0))
        fault = self._faults.take("task-failed", task.name)
        stale = self._faults.take("etag-stale-in-task", task.name)
        half = self._faults.take("half-created", task.name)
        try:
            if stale is not None:
                raise FailedTask(
                    "VMM-30303", "VM_ETAG_MISMATCH", "etag of the entity does not match"
                )
            if fault is not None:
                raise FailedTask(
                    "VMM-10000",
                    "INTERNAL_ERROR",
                    "the operation failed (as asked of the simulator)",
                )
            await work(task)
            if half is not None:
                raise FailedTask(
                    "VMM-10000", "INTERNAL_ERROR", "it failed half way (as asked of the simulator)"
                )
        except FailedTask as error:
            self._end(task, error.error)
        except HttpError as error:
            self._end(
                task, TaskError(code="VMM-40000", group=error.reason.upper(), message=error.message)
            )
        except (OSError, ReplicatorError) as error:
            self._end(task, TaskError(code="VMM-10000", group="INTERNAL_ERROR", message=str(error)))
        else:
            self._end(task, None)

    def _end(self, task: Task, error: TaskError | None) -> None:
        task.status = "SUCCEEDED" if error is None else "FAILED"
        task.error = error
        task.completed_at = time.time()
        self._touch(task, 100)

    def _touch(self, task: Task, progress: int) -> None:
        task.progress = progress
        task.version += 1
        task.updated_at = time.time()
        self._save()

    def _forget_old(self) -> None:
        tasks = self._world.tasks
        if len(tasks) <= KEPT_MAX:
            return
        for uuid in [u for u, t in tasks.items() if t.completed_at is not None][: KEPT_MAX // 10]:
            del tasks[uuid]
