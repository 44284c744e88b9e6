# SPDX-License-Identifier: AGPL-3.0-or-later
"""v3's envelope: ``metadata``, ``spec`` and ``status`` of every entity, lists, and what became of what clients asked for.

An accepted change is an intent: it has a task, and until that ends the entity says PENDING. The world holds only what is
there; what is still to be made, or could not be made, is answered from the intents.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import trio

from replicator.simulator.core import Core
from replicator.simulator.engine import FailedTask
from replicator.simulator.model import AffectedEntity, Entity, Task
from replicator.simulator.v3 import fiql
from replicator.simulator.v3.checks import InvalidError, check
from replicator.simulator.v3.shapes import list_body
from replicator.simulator.web import HttpError, Reply, Request

API_VERSION: Final = "3.1"
NO_USER: Final = "00000000-0000-0000-0000-000000000000"
SPEC_HASH: Final = "0" * 50
#: Entities in one answer of a list: where none is said, and at the most.
LENGTH, LENGTH_MAX = 20, 500
_INTENTS_MAX = 20_000
_LOOK_S = 0.01
_PART_TIMEOUT_S = 3600

Json = dict[str, Any]


def stamp(seconds: float) -> str:
    """A time as v3 writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_of(text: str) -> float:
    """A time out of a body. Raises InvalidError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidError(f"{text!r} is not a date-time") from None
    return found.timestamp()


@dataclass(slots=True)
class Intent:
    """What a client asked for: the spec as given, and the task that does it. ``what``: create, update or delete."""

    kind: str
    uuid: str
    what: str
    spec: Json
    task: Task
    more: Json = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Not ended."""
        return self.task.completed_at is None

    @property
    def failed(self) -> bool:
        """It could not be done."""
        return self.task.status in ("FAILED", "CANCELED")


class V3:
    """What every handler works with: the core, and the intents of this run."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.world = core.world
        self._intents: OrderedDict[str, Intent] = OrderedDict()
        self.identifiers: OrderedDict[str, Json] = OrderedDict()

    def knob(self, name: str, default: Any) -> Any:
        """How this simulator is set; ``docs/simulator.md`` lists the names."""
        return self.core.knobs.get(name, default)

    def common(self, request: Request, **more: Any) -> dict[str, Any]:
        """What every action of the core is given."""
        return {"owner": request.user.name, **more}

    # Intents

    def remember(
        self, kind: str, uuid: str, what: str, spec: Json, task: Task, **more: Any
    ) -> Intent:
        """An accepted change."""
        made = self._intents[uuid] = Intent(kind, uuid, what, spec, task, dict(more))
        self._intents.move_to_end(uuid)
        while len(self._intents) > _INTENTS_MAX:
            self._intents.popitem(last=False)
        return made

    def intent(self, kind: str, uuid: str) -> Intent | None:
        """The last change that was asked for of this entity."""
        found = self._intents.get(uuid)
        return found if found is not None and found.kind == kind else None

    def accepted(self, intent: Intent, version: int = 0) -> Reply:
        """202 of a POST or PUT: the spec as it was given, PENDING, the task's id as a string."""
        body = {
            "api_version": API_VERSION,
            "metadata": {
                "kind": intent.kind,
                "uuid": intent.uuid,
                "spec_version": version,
                "use_categories_mapping": False,
            },
            "spec": without_secrets(intent.spec),
            "status": {"state": "PENDING", "execution_context": {"task_uuid": intent.task.uuid}},
        }
        return Reply(202, body)

    def deleted(self, kind: str, uuid: str, task: Task) -> Reply:
        """202 of a DELETE."""
        self.remember(kind, uuid, "delete", {}, task)
        status = {"state": "DELETE_PENDING", "execution_context": {"task_uuid": task.uuid}}
        metadata = {"kind": kind, "uuid": uuid}
        return Reply(
            202, {"api_version": API_VERSION, "metadata": metadata, "status": status, "spec": {}}
        )

    def unmade(self, kind: str, uuid: str) -> Json:
        """An entity that is not there: still to be made, or failed. Raises HttpError 404 for one never asked for, or gone."""
        intent = self.intent(kind, uuid)
        if intent is None or intent.what != "create" or not (intent.open or intent.failed):
            raise HttpError(404, f"the {kind} {uuid} was not found", "not_found")
        status: Json = {
            "name": intent.spec.get("name", ""),
            "state": "PENDING" if intent.open else "ERROR",
            "execution_context": {"task_uuid": [intent.task.uuid]},
            "resources": {},
        }
        if not intent.open:
            status["message_list"] = [message(intent.task)]
        metadata = {"kind": kind, "uuid": uuid, "spec_version": 0, "categories": {}}
        spec = without_secrets(intent.spec)
        return {"api_version": API_VERSION, "metadata": metadata, "spec": spec, "status": status}

    def state(self, kind: str, uuid: str) -> str:
        """The state of an entity that is there."""
        intent = self.intent(kind, uuid)
        if intent is None or not intent.open:
            return "COMPLETE"
        return "DELETE_PENDING" if intent.what == "delete" else "PENDING"

    def check_version(self, kind: str, entity: Entity, metadata: Json) -> None:
        """The optimistic lock of PUT. Raises HttpError 409 for another version, or while a change is under way."""
        if "spec_version" not in metadata:
            raise InvalidError(
                "metadata: 'spec_version' is a required property", "MISSING_ATTRIBUTE"
            )
        if metadata.get("uuid", entity.uuid) != entity.uuid:
            raise InvalidError(
                "metadata.uuid is not the id in the path", "ENTITY_NAME_UUID_MISMATCH"
            )
        if metadata["spec_version"] != spec_version(entity):
            raise HttpError(
                409,
                f"Edit conflict: spec_version mismatch, {metadata['spec_version']} given,"
                f" {spec_version(entity)} stored",
                "spec_version",
            )
        intent = self.intent(kind, entity.uuid)
        if intent is not None and intent.open:
            raise HttpError(409, "Edit conflict: another change is under way", "spec_version")

    # Answers

    def metadata(self, kind: str, entity: Entity, categories: dict[str, str] | None = None) -> Json:
        """Metadata of an entity that is there."""
        owner = next((u for u in self.world.users.values() if u.name == "admin"), None)
        given = categories or {}
        return {
            "kind": kind,
            "uuid": entity.uuid,
            "spec_version": spec_version(entity),
            "spec_hash": SPEC_HASH,
            "entity_version": str(entity.version),
            "categories": given,
            "categories_mapping": {name: [value] for name, value in given.items()},
            "owner_reference": {
                "kind": "user",
                "uuid": owner.uuid if owner is not None else NO_USER,
                "name": owner.name if owner is not None else "admin",
            },
            "creation_time": stamp(entity.created_at),
            "last_update_time": stamp(entity.updated_at),
        }

    def execution_context(self, uuid: str) -> Json:
        """In a GET or a list the task's id is a list of strings."""
        intent = self._intents.get(uuid)
        return (
            {"execution_context": {"task_uuid": [intent.task.uuid]}} if intent is not None else {}
        )

    def cluster_reference(self, uuid: str) -> Json:
        """A cluster by id and name."""
        cluster = self.world.clusters.get(uuid)
        return {
            "kind": "cluster",
            "uuid": uuid,
            "name": cluster.name if cluster is not None else "",
        }

    def entity_reply(self, body: Json) -> Reply:
        """200 of a GET."""
        return Reply(200, {"api_version": API_VERSION, **body})

    # Changes of several parts under one task

    def together(
        self, name: str, entity: AffectedEntity, parts: Sequence[Callable[[], Task]], **common: Any
    ) -> Task:
        """One task that has these done one after the other; the first that fails ends it as FAILED. One part is its own task."""
        if len(parts) == 1:
            return parts[0]()

        async def work(task: Task) -> None:
            for part in parts:
                made = part()
                await any_ended([made], _PART_TIMEOUT_S)
                if made.error is not None or made.status != "SUCCEEDED":
                    error = made.error
                    raise FailedTask(
                        error.code if error is not None else "VMM-10000",
                        error.group if error is not None else "INTERNAL_ERROR",
                        error.message if error is not None else f"{made.name} did not end",
                    )
                task.entities += [e for e in made.entities if e not in task.entities]

        return self.core.engine.start(name, [entity], work, **common)


async def any_ended(tasks: Sequence[Task], timeout_s: float) -> bool:
    """Whether one of these has ended, within ``timeout_s``; none at all has nothing to wait for."""
    with trio.move_on_after(timeout_s):
        while tasks and all(task.completed_at is None for task in tasks):  # noqa: ASYNC110 - tasks tell nobody
            await trio.sleep(_LOOK_S)
    return any(task.completed_at is not None for task in tasks)


def spec_version(entity: Entity) -> int:
    """0 when made, one more with every change."""
    return max(entity.version - 1, 0)


def message(task: Task) -> Json:
    """Why a task failed, as a message."""
    text = task.error.message if task.error is not None else f"{task.name} was aborted"
    return {"message": text, "reason": "INTERNAL_ERROR", "details": {}}


def without_secrets(spec: Any) -> Any:
    """What a client gave, without what is never read back."""
    if isinstance(spec, dict):
        hidden = ("client_secret", "target_secret", "password", "basic_auth")
        return {name: without_secrets(value) for name, value in spec.items() if name not in hidden}
    if isinstance(spec, list):
        return [without_secrets(value) for value in spec]
    return spec


@dataclass(frozen=True, slots=True)
class Listing:
    """How a kind is listed: what can be filtered and sorted by, and how one is written down."""

    kind: str
    attributes: frozenset[str]
    describe: Callable[[Any], Json]
    render: Callable[[Any], Json | Awaitable[Json]]
    #: Whether the answer's metadata holds only the kind and the total where the body asked for no page (clusters).
    terse: bool = False


async def list_reply(request: Request, items: Iterable[Any], listing: Listing) -> Reply:
    """The answer of POST /…s/list. Raises HttpError 422 for a body, a filter or an attribute that is none."""
    body = check(request.json(), list_body(listing.kind))
    passes = fiql.parse(body.get("filter", ""), listing.attributes)
    found = [item for item in items if passes(listing.describe(item))]
    by = body.get("sort_attribute")
    if by:
        if by not in listing.attributes:
            raise InvalidError(f"sort_attribute: {by} cannot be sorted by")
        found.sort(
            key=lambda item: str(listing.describe(item).get(by, "")),
            reverse=body.get("sort_order") == "DESCENDING",
        )
    offset, length = body.get("offset", 0), min(body.get("length", LENGTH), LENGTH_MAX)
    entities = []
    for item in found[offset : offset + length]:
        made = listing.render(item)
        entities.append(made if isinstance(made, dict) else await made)
    metadata: Json = {"kind": listing.kind, "total_matches": len(found)}
    if not listing.terse or body.keys() & {"offset", "length"}:
        metadata |= {"offset": offset, "length": len(entities)}
    metadata |= {
        name: body[name] for name in ("filter", "sort_attribute", "sort_order") if name in body
    }
    return Reply(200, {"api_version": API_VERSION, "metadata": metadata, "entities": entities})


def now_usecs() -> int:
    """The time in microseconds."""
    return int(time.time() * 1e6)
