# SPDX-License-Identifier: AGPL-3.0-or-later
"""How v4 is called: versions in paths, pages, filters, ETags and tasks. Knows no object of v4 but the task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final
from uuid import UUID, uuid4, uuid5

import trio

from replicator.prism.answers import Node
from replicator.prism.endpoint import Answer, Endpoint, Hosts, segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismConflictError,
    PrismNotFoundError,
    PrismRefusedError,
    PrismTaskError,
)
from replicator.prism.settings import Waits
from replicator.prism.tasks import TaskState, TaskWatcher
from replicator.prism.v4_read import read_task
from replicator.prism.v4_versions import Versions

PAGE: Final = 100
_PAGES_MAX: Final = 10_000
_TAGS_MAX: Final = 256
_CONFLICTS_MAX: Final = 10
#: What a task says of an object that was changed before it began.
STALE_WORDS: Final = frozenset({"VMM-30303", "VM_ETAG_MISMATCH", "PLAT-10005"})
#: Task ids in one filter: it must fit in a line of HTTP.
_TASKS_MAX: Final = 20


class V4Calls:
    """One Prism Central by v4. Methods raise PrismError."""

    def __init__(self, hosts: Hosts, versions: Versions) -> None:
        self.hosts = hosts
        self.versions = versions
        self.central: Endpoint = hosts.central
        self.waits: Waits = hosts.settings.waits
        self.tasks = TaskWatcher(self._look, self.waits.poll_s, self.central.where)
        self._tags: OrderedDict[str, str] = OrderedDict()
        self._filters_tasks = True

    async def call(
        self,
        namespace: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str | int] | None = None,
        etag: str | None = None,
        request_id: UUID | None = None,
    ) -> Answer:
        """One call. A path that Prism does not know at all makes the namespace's version be looked up again, once."""
        request_id = request_id or uuid4()
        for last in (False, True):
            whole = await self.versions.path(namespace, path)
            try:
                return await self.central.call(
                    method, whole, body, query=query, etag=etag, request_id=request_id
                )
            except PrismNotFoundError as error:
                if last or error.words:
                    raise
                self.versions.forget(namespace)
                if await self.versions.path(namespace, path) == whole:
                    raise
        raise AssertionError

    async def get_tagged(self, namespace: str, path: str) -> tuple[Node, str | None]:
        """The object at a path, and its ETag."""
        answer = await self.call(namespace, "GET", path)
        return answer.node().node("data"), answer.etag

    async def get(self, namespace: str, path: str) -> Node:
        """The object at a path; its ETag is remembered for ``change``."""
        answer = await self.call(namespace, "GET", path)
        if answer.etag is not None:
            self._tags[path] = answer.etag
            self._tags.move_to_end(path)
            if len(self._tags) > _TAGS_MAX:
                self._tags.popitem(last=False)
        return answer.node().node("data")

    async def pages(
        self, namespace: str, path: str, query: Mapping[str, str | int] | None = None
    ) -> AsyncGenerator[Node, None]:
        """Every object of a list, each id once."""
        seen: set[str] = set()
        count = 0
        for page in range(_PAGES_MAX):
            answer = await self.call(
                namespace, "GET", path, query={"$page": page, "$limit": PAGE, **(query or {})}
            )
            root = answer.node()
            items = root.nodes("data")
            count += len(items)
            for item in items:
                uuid = item.text("extId", "")
                if uuid and uuid in seen:
                    continue
                seen.add(uuid)
                yield item
            metadata = root.maybe("metadata")
            total = (
                metadata.number("totalAvailableResults")
                if metadata is not None and metadata.has("totalAvailableResults")
                else None
            )
            if not items or (count >= total if total is not None else len(items) < PAGE):
                return
        raise PrismAnswerError(f"{self.central.where}: the list {path} has no end")

    async def listed(
        self,
        namespace: str,
        path: str,
        wanted: str = "",
        keep: Callable[[Node], bool] | None = None,
    ) -> list[Node]:
        """Every object of a list that ``keep`` takes. ``wanted``: the same as a filter for Prism, which may refuse it."""
        found: list[Node] = []
        for query in ({"$filter": wanted}, {}) if wanted else ({},):
            found.clear()
            try:
                async with aclosing(self.pages(namespace, path, query)) as items:
                    found.extend([item async for item in items if keep is None or keep(item)])
            except PrismRefusedError:
                if not query:
                    raise
                continue
            return found
        return found

    async def submit(
        self,
        namespace: str,
        method: str,
        path: str,
        body: Any,
        *,
        what: str,
        timeout_s: float,
        request_id: UUID | None = None,
        etag: str | None = None,
    ) -> TaskState:
        """Ask for something that is a task, and wait for its good end. Raises PrismTaskError as well."""
        answer = await self.call(namespace, method, path, body, etag=etag, request_id=request_id)
        task = answer.node().node("data").text("extId")
        return await self.tasks.wait(task, what, timeout_s)

    async def change(
        self,
        namespace: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        of: str | None = None,
        what: str,
        timeout_s: float,
        request_id: UUID | None = None,
    ) -> TaskState:
        """As ``submit``, with the ETag of the object at ``of`` (``path`` if None), read again where it was changed meanwhile.

        Raises PrismNotFoundError where the object is gone, PrismConflictError after ten tries.
        """
        of = of or path
        base = request_id or uuid4()
        for number in range(_CONFLICTS_MAX):
            known = self._tags.pop(of, None)
            if known is None:
                await self.get(namespace, of)
                known = self._tags.pop(of, None)
            # A try that Prism refused must not be found again under its id; after a crash the same ids come again.
            try_id = base if number == 0 else uuid5(base, f"try {number}")
            try:
                return await self.submit(
                    namespace,
                    method,
                    path,
                    body,
                    what=what,
                    timeout_s=timeout_s,
                    request_id=try_id,
                    etag=known,
                )
            except PrismConflictError:
                # The first one may only mean that the ETag at hand was an old one.
                if number:
                    await trio.sleep(self.waits.conflict_s)
            except PrismTaskError as error:
                if STALE_WORDS.isdisjoint(error.words):
                    raise
                await trio.sleep(self.waits.conflict_s if number else 0)
        raise PrismConflictError(
            f"{self.central.where}: {what}: it was changed meanwhile, {_CONFLICTS_MAX} times in a row"
        )

    async def _look(self, uuids: Sequence[str]) -> Mapping[str, TaskState | None]:
        states: dict[str, TaskState | None] = {}
        if len(uuids) > 1 and self._filters_tasks:
            for start in range(0, len(uuids), _TASKS_MAX):
                states.update(await self._look_together(uuids[start : start + _TASKS_MAX]))
        for uuid in uuids:
            if uuid not in states:
                try:
                    node = await self.call("prism", "GET", f"config/tasks/{segment(uuid)}")
                except PrismNotFoundError:
                    states[uuid] = None
                else:
                    states[uuid] = read_task(node.node().node("data"))
        return states

    async def _look_together(self, uuids: Sequence[str]) -> dict[str, TaskState | None]:
        wanted = " or ".join(f"extId eq {quoted(uuid)}" for uuid in uuids)
        try:
            answer = await self.call(
                "prism", "GET", "config/tasks", query={"$filter": wanted, "$limit": PAGE}
            )
        except PrismRefusedError:
            self._filters_tasks = False
            return {}
        found = (read_task(node) for node in answer.node().nodes("data"))
        return {state.uuid: state for state in found if state.uuid in uuids}


def quoted(text: str) -> str:
    """A text in a filter."""
    return "'" + text.replace("'", "''") + "'"


def begins(prefix: str) -> str:
    """The filter for names that begin so."""
    return f"startswith(name,{quoted(prefix)})"


def named(prefix: str) -> Callable[[Node], bool]:
    """The same as ``begins``, here."""
    return lambda node: node.text("name", "").startswith(prefix)
