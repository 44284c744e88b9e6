# SPDX-License-Identifier: AGPL-3.0-or-later
"""Calls of v3 (and v2.0, which only Elements answer): lists, objects that are made once, changed and deleted, and their tasks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import trio

from replicator.prism.answers import Node
from replicator.prism.endpoint import Answer, Endpoint, segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismConflictError,
    PrismError,
    PrismNotFoundError,
    PrismRefusedError,
    PrismTaskError,
    PrismUnreachableError,
)
from replicator.prism.settings import Waits
from replicator.prism.tasks import TaskState, TaskWatcher
from replicator.prism.v3_read import name_of, read_messages, read_task, read_task_v2, task_of

_logger = logging.getLogger(__name__)

V3: Final = "/api/nutanix/v3"
V2: Final = "/PrismGateway/services/rest/v2.0"
PAGE: Final = 100
_PAGES_MAX: Final = 10_000
_TASKS_MAX: Final = 100
#: How long Prism may hold an answer about tasks: whoever comes meanwhile waits for it.
_POLL_S: Final = 5
_FIRST_LOOK_S: Final = 0.2
#: After so many answers in a row that it knows no such call, tasks are looked at one by one.
_POLLS_FAILED_MAX: Final = 3
_CONFLICTS_MAX: Final = 10
_CREATES_MAX: Final = 3
_BROKEN: Final = frozenset({"ERROR", "FAILED", "KERROR"})

#: Changes a spec in place; False: it is as wanted already.
Edit = Callable[[dict[str, Any], Node], bool]


class V3Host:
    """Prism Central, or an Element, as v3 speaks with it. Paths are relative to the API's own."""

    def __init__(self, endpoint: Endpoint, waits: Waits) -> None:
        self.endpoint = endpoint
        self.waits = waits
        self.where = endpoint.where
        first_s = min(_FIRST_LOOK_S, waits.poll_s[0])
        self._tasks = TaskWatcher(self._look, (first_s, *waits.poll_s), endpoint.where)
        self._tasks_v2 = TaskWatcher(self._look_v2, (first_s, *waits.poll_s), endpoint.where)
        self._polls_failed = 0

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        repeat: bool = True,
        query: Mapping[str, str | int] | None = None,
        api: str = V3,
    ) -> Answer:
        """One call, as ``Endpoint.call``."""
        return await self.endpoint.call(method, f"{api}/{path}", body, query=query, repeat=repeat)

    async def get(self, path: str) -> Node:
        """An object."""
        return (await self.call("GET", path)).node()

    async def pages(
        self, path: str, kind: str, wanted: str = "", page: int = PAGE
    ) -> AsyncGenerator[Node, None]:
        """Every object of a list, each id once. ``wanted``: a filter, in FIQL."""
        seen: set[str] = set()
        offset = 0
        for _ in range(_PAGES_MAX):
            body: dict[str, Any] = {"kind": kind, "offset": offset, "length": page}
            if wanted:
                body["filter"] = wanted
            root = (await self.call("POST", f"{path}/list", body)).node()
            items = root.nodes("entities")
            offset += len(items)
            for item in items:
                # Lists shift while they are read.
                uuid = item.node("metadata").text("uuid", "")
                if uuid in seen:
                    continue
                seen.add(uuid)
                yield item
            metadata = root.maybe("metadata")
            total = offset if metadata is None else metadata.number("total_matches", offset)
            if not items or offset >= total:
                return
        raise PrismAnswerError(f"{self.where}: the list {path} has no end")

    async def listed(
        self, path: str, kind: str, keep: Callable[[Node], bool], wanted: str = ""
    ) -> list[Node]:
        """Every object that ``keep`` takes. ``wanted``: the same as a filter for Prism, which may refuse it."""
        for each in dict.fromkeys((wanted, "")):
            try:
                async with aclosing(self.pages(path, kind, each)) as items:
                    return [item async for item in items if keep(item)]
            except PrismRefusedError:
                if not each:
                    raise
        raise AssertionError

    async def create(
        self,
        path: str,
        kind: str,
        spec: dict[str, Any],
        *,
        what: str,
        timeout_s: float,
        wanted: str | None = None,
    ) -> Node:
        """The object, complete. v3 knows no request ids: one of that name that is there already is the one. ``wanted``: the filter
        for the name, where it is not ``name``.

        Raises PrismTaskError where it failed; what may have been made of it is removed then, unless the task has no end.
        """
        name = spec["name"]
        body = {"api_version": "3.1", "metadata": {"kind": kind}, "spec": spec}
        for number in itertools.count(1):
            found = await self.listed(
                path, kind, lambda node: name_of(node) == name, wanted or f"name=={name}"
            )
            if found:
                uuid = found[0].node("metadata").uuid("uuid")
                _logger.info("%s: %s is there already: %s %s", self.where, name, kind, uuid)
                return await self.settled(f"{path}/{segment(uuid)}", what, timeout_s)
            try:
                answer = (await self.call("POST", path, body, repeat=False)).node()
            except PrismUnreachableError as error:
                if number >= _CREATES_MAX:
                    raise
                # It may be under way: the next look at the list says.
                _logger.info("%s; looking whether it was done", error)
                await trio.sleep(self.waits.poll_s[-1])
                continue
            uuid = answer.node("metadata").uuid("uuid")
            own = f"{path}/{segment(uuid)}"
            try:
                await self.finish(answer, what, timeout_s)
                return await self.settled(own, what, timeout_s)
            except PrismTaskError as error:
                if not error.timed_out:
                    await self._remove_rest(own, what)
                raise
        raise AssertionError

    async def _remove_rest(self, own: str, what: str) -> None:
        try:
            await self.delete(own, f"{what}: remove the rest")
        except PrismError as error:
            _logger.warning("%s; the next sweep will try again", error)

    async def settled(self, path: str, what: str, timeout_s: float) -> Node:
        """The object, once it is complete. Raises PrismTaskError where it is broken, or not complete in time."""
        deadline = trio.current_time() + timeout_s
        for gap_s in itertools.chain(self.waits.poll_s, itertools.repeat(self.waits.poll_s[-1])):
            node = await self.get(path)
            status = node.node("status")
            state = status.text("state", "COMPLETE").upper()
            if state == "COMPLETE":
                return node
            if state in _BROKEN:
                raise PrismTaskError(f"{node.where}: {what}: {read_messages(status)}")
            if trio.current_time() + gap_s > deadline:
                raise PrismTaskError(
                    f"{node.where}: {what}: still {state} after {timeout_s:g} s", timed_out=True
                )
            await trio.sleep(gap_s)
        raise AssertionError

    async def finish(self, answer: Node, what: str, timeout_s: float) -> None:
        """Wait for the good end of the task that an answer started, if it did. Raises PrismTaskError."""
        task = task_of(answer)
        if task is not None:
            await self._tasks.wait(task, what, timeout_s)

    async def change(self, path: str, edit: Edit, *, what: str, timeout_s: float) -> None:
        """PUT the object as ``edit`` leaves its spec, read again where it was changed meanwhile.

        Raises PrismNotFoundError where it is gone, PrismConflictError after ten tries.
        """
        for _ in range(_CONFLICTS_MAX):
            node = await self.get(path)
            spec = dict(node.node("spec").raw)
            if not edit(spec, node):
                return
            body = {
                "api_version": node.text("api_version", "3.1"),
                "metadata": node.node("metadata").raw,
                "spec": spec,
            }
            try:
                answer = (await self.call("PUT", path, body)).node()
            except (PrismConflictError, PrismRefusedError) as error:
                if isinstance(error, PrismRefusedError) and error.status != 409:
                    raise
                await trio.sleep(self.waits.conflict_s)
                continue
            await self.finish(answer, what, timeout_s)
            return
        raise PrismConflictError(
            f"{self.where}: {what}: it was changed meanwhile, {_CONFLICTS_MAX} times in a row"
        )

    async def delete(self, path: str, what: str) -> None:
        """Delete an object and wait for the end of that. Raises PrismNotFoundError where it is gone already."""
        answer = await self.call("DELETE", path)
        if isinstance(answer.body, dict):
            await self.finish(answer.node(), what, self.waits.delete_s)

    async def submit_v2(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        what: str,
        timeout_s: float,
        repeat: bool = True,
    ) -> TaskState | None:
        """One call of v2.0 that is a task, and its good end; None where the answer names no task. Raises PrismTaskError."""
        answer = await self.call(method, path, body, repeat=repeat, api=V2)
        task = task_of(answer.node()) if isinstance(answer.body, dict) else None
        return None if task is None else await self._tasks_v2.wait(task, what, timeout_s)

    async def get_v2(self, path: str, query: Mapping[str, str | int] | None = None) -> Node:
        """An object of v2.0."""
        return (await self.call("GET", path, query=query, api=V2)).node()

    async def _look(self, uuids: Sequence[str]) -> Mapping[str, TaskState | None]:
        states: dict[str, TaskState | None] = {}
        for start in range(0, len(uuids), _TASKS_MAX):
            part = uuids[start : start + _TASKS_MAX]
            if self._polls_failed < _POLLS_FAILED_MAX:
                try:
                    states.update(await self._poll(part))
                except (PrismNotFoundError, PrismRefusedError):
                    # It does not know this call; or one of the tasks (yet).
                    self._polls_failed += 1
                else:
                    self._polls_failed = 0
                    continue
            for uuid in part:
                try:
                    states[uuid] = read_task(await self.get(f"tasks/{segment(uuid)}"))
                except PrismNotFoundError:
                    states[uuid] = None
        return states

    async def _poll(self, uuids: Sequence[str]) -> dict[str, TaskState | None]:
        body = {"poll_timeout_seconds": _POLL_S, "task_uuid_list": list(uuids)}
        root = (await self.call("POST", "tasks/poll", body)).node()
        found = {state.uuid: state for state in map(read_task, root.nodes("entities"))}
        # What is not told of goes on: a task that Prism does not know ends by its deadline.
        return {uuid: found.get(uuid) or TaskState(uuid, "waiting") for uuid in uuids}

    async def _look_v2(self, uuids: Sequence[str]) -> Mapping[str, TaskState | None]:
        states: dict[str, TaskState | None] = {}
        for uuid in uuids:
            try:
                states[uuid] = read_task_v2(await self.get_v2(f"tasks/{segment(uuid)}"))
            except PrismNotFoundError:
                states[uuid] = None
        return states
