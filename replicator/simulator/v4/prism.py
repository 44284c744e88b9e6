# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace prism: tasks, categories, domain managers."""

from __future__ import annotations

from typing import Any, Final

from replicator.simulator.model import Category, Task
from replicator.simulator.v4.api import LISTED, PAGED, Api, Call, Namespace
from replicator.simulator.v4.envelope import TASK_PREFIX, task_id, when
from replicator.simulator.v4.parts import categories, category_id
from replicator.simulator.web import HttpError, Reply, Router

_CONFIG = "prism.v4.config."
_TASK = _CONFIG + "Task"
_ENTITY = _CONFIG + "EntityReference"
_CATEGORY = _CONFIG + "Category"
_MANAGER = _CONFIG + "DomainManager"
_RELATIONS: Final = {
    "vm": "vmm:ahv:config:vm",
    "disk": "vmm:ahv:config:vm:disk",
    "nic": "vmm:ahv:config:vm:nic",
    "snapshot": "dataprotection:config:recovery-point",
    "snapshot_vm": "dataprotection:config:vm-recovery-point",
    "volume_group": "volumes:config:volume-group",
    "group_disk": "volumes:config:volume-group:disk",
    "iscsi_client": "volumes:config:iscsi-client",
    "image": "vmm:content:image",
    "subnet": "networking:config:subnet",
    "container": "clustermgmt:config:storage-containers",
}


def _entities(task: Task) -> list[dict[str, Any]]:
    return [
        {
            "extId": entity.uuid,
            "rel": _RELATIONS.get(entity.kind, f"prism:config:{entity.kind}"),
            "name": entity.name or None,
        }
        for entity in task.entities
    ]


def _body(call: Call, task: Task) -> dict[str, Any]:
    owner = next((user for user in call.world.users.values() if user.name == task.owner), None)
    error = None
    if task.error is not None:
        error = {
            "message": task.error.message,
            "severity": "ERROR",
            "code": task.error.code,
            "locale": "en-US",
            "errorGroup": task.error.group,
            "argumentsMap": {},
        }
    return {
        "extId": task_id(task.uuid),
        "operation": task.name,
        "operationDescription": task.name,
        "createdTime": when(task.created_at),
        "startedTime": when(task.started_at),
        "completedTime": when(task.completed_at),
        "lastUpdatedTime": when(task.updated_at),
        "status": task.status,
        "progressPercentage": task.progress,
        "isCancelable": False,
        "isBackgroundTask": False,
        "clusterExtIds": task.clusters,
        "ownedBy": {"extId": owner.uuid, "name": owner.name} if owner is not None else None,
        "entitiesAffected": _entities(task),
        "numberOfEntitiesAffected": len(task.entities),
        "completionDetails": [
            {"name": name, "value": value} for name, value in task.details.items()
        ],
        "errorMessages": [error] if error is not None else None,
        "legacyErrorMessage": task.error.message if task.error is not None else None,
        "subTasks": [],
        "numberOfSubtasks": 0,
    }


def _find(call: Call, task: str) -> Task:
    found = None
    if task.startswith(TASK_PREFIX):
        found = call.world.tasks.get(task.removeprefix(TASK_PREFIX))
    if found is None or call.core.faults.take("task-not-found", found.name) is not None:
        raise HttpError(404, f"no task with the id {task}", "not_found")
    return found


async def _list(call: Call) -> Reply:
    newest = sorted(call.world.tasks.values(), key=lambda task: -task.created_at)
    return call.many(newest, lambda task: _body(call, task), _TASK)


async def _get(call: Call, task: str) -> Reply:
    found = _find(call, task)
    return call.one(_body(call, found), _TASK, found)


async def _task_entities(call: Call, task: str) -> Reply:
    return call.many(_entities(_find(call, task)), lambda entity: entity, _ENTITY)


async def _cancel(call: Call, task: str) -> Reply:
    raise HttpError(400, f"task {_find(call, task).uuid} cannot be cancelled", "not_supported")


def _category_body(category: Category) -> dict[str, Any]:
    return {
        "extId": category.uuid,
        "key": category.name,
        "value": category.value,
        "type": "USER" if category.version else "SYSTEM",
        "description": category.description or None,
    }


async def _list_categories(call: Call) -> Reply:
    return call.many(categories(call.world).values(), _category_body, _CATEGORY)


def _category(call: Call, uuid: str) -> Category:
    found = categories(call.world).get(uuid)
    if found is None:
        raise HttpError(404, f"no category with the id {uuid}", "not_found")
    return found


async def _get_category(call: Call, category: str) -> Reply:
    found = _category(call, category)
    return call.one(_category_body(found), _CATEGORY, found)


async def _create_category(call: Call) -> Reply:
    body = call.body(_CATEGORY)
    uuid = category_id(body["key"], body["value"])
    if uuid in categories(call.world):
        raise HttpError(409, f"there is a category {body['key']}: {body['value']}", "exists")
    category = Category(
        uuid=uuid,
        name=body["key"],
        value=body["value"],
        description=body.get("description", ""),
    )
    call.core.touch(category)
    call.world.categories[uuid] = category
    return call.one(_category_body(category), _CATEGORY, category, 201)


async def _delete_category(call: Call, category: str) -> Reply:
    found = _category(call, category)
    pair = (found.name, found.value)
    if any(pair in vm.categories.items() for vm in call.world.vms.values()):
        raise HttpError(409, "the category is in use", "in_use")
    if call.world.categories.pop(category, None) is None:
        raise HttpError(403, "the category is the system's", "forbidden")
    call.core.save()
    return call.none()


def _manager_body(call: Call) -> dict[str, Any]:
    version = {"$objectType": "clustermgmt.v4.config.BuildInfo", "version": "pc.7.3.1.9"}
    return {
        "extId": call.world.central,
        "config": {"name": "prism-central", "buildInfo": version, "size": "SMALL"},
        "isRegisteredWithHostingCluster": True,
        "hostingClusterExtId": next(iter(call.world.clusters), None),
        "shouldEnableHighAvailability": False,
    }


async def _list_managers(call: Call) -> Reply:
    return call.many([None], lambda _: _manager_body(call), _MANAGER)


async def _get_manager(call: Call, manager: str) -> Reply:
    if manager != call.world.central:
        raise HttpError(404, f"no domain manager with the id {manager}", "not_found")
    return call.one(_manager_body(call), _MANAGER)


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "prism")
    tasks, one = "/config/tasks", "/config/tasks/{task}"
    view = "View_Task"
    chosen = ("$select",)
    space.get(tasks, _list, _CONFIG + "ListTasksApiResponse", permission=view, query=LISTED)
    space.get(one, _get, _CONFIG + "GetTaskApiResponse", permission=view, query=chosen)
    space.post(
        one + "/$actions/cancel", _cancel, _CONFIG + "CancelTaskApiResponse", permission=view
    )
    space.get(
        one + "/affected-entities",
        _task_entities,
        _CONFIG + "ListTaskEntitiesApiResponse",
        permission=view,
        since=2,
        query=(*PAGED, "$filter", "$select"),
    )
    path, category = "/config/categories", "/config/categories/{category}"
    view, listed = "View_Category", (*LISTED, "$expand", "$apply")
    response = _CONFIG + "ListCategoriesApiResponse"
    space.get(path, _list_categories, response, permission=view, query=listed)
    for method, where, handler, verb in (
        ("GET", category, _get_category, "Get"),
        ("POST", path, _create_category, "Create"),
        ("DELETE", category, _delete_category, "Delete"),
    ):
        permission = view if verb == "Get" else f"{verb}_Category"
        response = f"{_CONFIG}{verb}CategoryApiResponse"
        space.add(method, where, handler, response, permission=permission, query=("$expand",))
    path = "/config/domain-managers"
    view = "View_Domain_Manager"
    response = _CONFIG + "ListDomainManagerApiResponse"
    space.get(path, _list_managers, response, permission=view, query=chosen)
    response = _CONFIG + "GetDomainManagerApiResponse"
    space.get(path + "/{manager}", _get_manager, response, permission=view)
