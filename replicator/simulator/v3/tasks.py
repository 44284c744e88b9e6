# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tasks of v3: got, listed, waited for and aborted."""

from __future__ import annotations

import re
import time
from typing import Any

from replicator.simulator.model import Task
from replicator.simulator.v3.checks import check, check_uuid
from replicator.simulator.v3.envelope import (
    API_VERSION,
    V3,
    Json,
    Listing,
    any_ended,
    list_reply,
    stamp,
)
from replicator.simulator.v3.shapes import tasks_poll
from replicator.simulator.web import HttpError, Reply, Request

_STATUS = {"CANCELED": "ABORTED"}
#: How v3 calls what a task works on; what is not here is not told.
_KINDS = {
    "vm": "vm",
    "snapshot": "vm_recovery_point",
    "volume_group": "volume_group",
    "image": "image",
    "subnet": "subnet",
    "cluster": "cluster",
    "user": "user",
    "role": "role",
}
_ATTRIBUTES = frozenset({"status", "operation_type", "entity_uuid", "uuid"})


def operation_of(task: Task) -> str:
    """The name of an operation as v3 spells it: create_vm for CreateVm."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", task.name).lower()


class Tasks:
    """Handlers."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    def body(self, task: Task) -> Json:
        """A task as v3 writes it down."""
        body: Json = {
            "api_version": API_VERSION,
            "uuid": task.uuid,
            "status": _STATUS.get(task.status, task.status),
            "operation_type": operation_of(task),
            "progress_message": operation_of(task),
            "percentage_complete": task.progress,
            "logical_timestamp": task.version,
            "entity_reference_list": self._references(task),
            "subtask_reference_list": [],
            **_times("creation", task.created_at),
            "last_update_time": stamp(task.updated_at),
        }
        if task.started_at is not None:
            body |= _times("start", task.started_at)
        if task.completed_at is not None:
            body |= _times("completion", task.completed_at)
        for cluster in task.clusters[:1]:
            body["cluster_reference"] = self._v3.cluster_reference(cluster)
        if task.error is not None:
            body["error_code"] = task.error.code
            body["error_detail"] = f"{task.error.group}: {task.error.message}"
        return body

    def _references(self, task: Task) -> list[Json]:
        found = []
        for each in task.entities:
            kind = _KINDS.get(each.kind)
            if each.kind == "snapshot" and self._v3.intent("vm_snapshot", each.uuid) is not None:
                kind = "vm_snapshot"
            if kind is not None:
                reference = {"kind": kind, "uuid": each.uuid}
                found.append(reference | ({"name": each.name} if each.name else {}))
        return found

    def _get(self, request: Request, uuid: str) -> Task:
        task = self._v3.world.tasks.get(check_uuid(uuid))
        hidden = self._v3.core.faults.take("task-not-found", f"{request.method} {request.path}")
        if task is None or hidden is not None:
            raise HttpError(404, f"the task {uuid} was not found", "not_found")
        return task

    async def get(self, request: Request, uuid: str) -> Reply:
        """GET /tasks/{uuid}."""
        return Reply(200, self.body(self._get(request, uuid)))

    async def list_all(self, request: Request) -> Reply:
        """POST /tasks/list."""
        listing = Listing("task", _ATTRIBUTES, _describe, self.body)
        newest_first = list(reversed(self._v3.world.tasks.values()))
        return await list_reply(request, newest_first, listing)

    async def poll(self, request: Request) -> Reply:
        """POST /tasks/poll: answers once any of the tasks has ended, or when the time is over; with all of them."""
        asked = check(request.json(), tasks_poll)
        tasks = [self._get(request, uuid) for uuid in dict.fromkeys(asked["task_uuid_list"])]
        done = await any_ended(tasks, asked["poll_timeout_seconds"])
        body: dict[str, Any] = {
            "entities": [self.body(task) for task in tasks],
            "has_poll_timed_out": not done,
        }
        return Reply(200, body)

    async def abort(self, request: Request, uuid: str) -> Reply:
        """POST /tasks/{uuid}/abort: one that has not ended is ABORTED; what it did until then stays."""
        task = self._get(request, uuid)
        if task.completed_at is not None:
            raise HttpError(422, f"the task {uuid} has ended", "not_supported")
        task.status, task.completed_at, task.updated_at = "CANCELED", time.time(), time.time()
        self._v3.core.save()
        return Reply(200, {})


def _describe(task: Task) -> Json:
    return {
        "uuid": task.uuid,
        "status": _STATUS.get(task.status, task.status),
        "operation_type": operation_of(task),
        "entity_uuid": [each.uuid for each in task.entities],
    }


def _times(what: str, seconds: float) -> Json:
    return {f"{what}_time": stamp(seconds), f"{what}_time_usecs": int(seconds * 1e6)}
