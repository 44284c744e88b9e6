# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Prism Central and one Element that speak v3 and v2.0 as the facts pages say, just enough of it, scripted in memory.

The simulator is the judge of the whole; this one is for answers that no simulator gives on demand.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from tests.prism.lab import PC, PE, Asked, Said

CLUSTER = "0005b6f1-0000-0000-0000-0000000000aa"
PC_CLUSTER = "0005b6f1-0000-0000-0000-0000000000cc"
VM = "11111111-1111-4111-8111-111111111111"
DEVICES = ("d0000000-0000-4000-8000-000000000000", "d0000000-0000-4000-8000-000000000001")
VMDISKS = ("5d0f7c1e-0000-4000-8000-000000000001", "5d0f7c1e-0000-4000-8000-000000000002")
CDROM = "5d0f7c1e-0000-4000-8000-0000000000cd"
SIZE = 1 << 30
V3 = "/api/nutanix/v3"
V2 = "/PrismGateway/services/rest/v2.0"

#: The ids of permissions, by name; one that a duty could need is not among them.
PERMISSIONS = {
    name: f"bbbbbbbb-0000-4000-8000-{number:012d}"
    for number, name in enumerate(
        ("Create_Volume_Group", "Delete_Volume_Group", "Create_Virtual_Machine", "Update_Virtual_Machine",
         "Delete_Virtual_Machine", "Create_Image", "Delete_Image", "View_Cluster", "View_Virtual_Machine")
    )
}  # fmt: skip


def refused(status: int, reason: str, message: str = "no") -> Said:
    """An error as v3 words it."""
    messages = [{"message": message, "reason": reason, "details": {}}]
    return Said(
        status, {"api_version": "3.1", "code": status, "state": "ERROR", "message_list": messages}
    )


NOT_FOUND = refused(404, "ENTITY_NOT_FOUND", "not found")


@dataclass
class Fake:
    """The world, and how it misbehaves. ``before``: may answer in place of it."""

    before: Callable[[Asked], Said | None] = lambda _: None
    clones: bool = True  # v2.0 clones snapshot files
    urls: bool = True  # v3 takes files by URL
    central_knows_clones: bool = True
    hands_out: tuple[str, ...] = (PE,)
    page: int = 2  # regions a page
    regions: list[dict[str, Any]] = field(default_factory=list)
    central: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=lambda: {"volume_groups": {}, "images": {}, "vms": {}, "subnets": {}}
    )
    element_groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    snapshots: dict[str, dict[str, Any]] = field(default_factory=dict)
    handed: dict[str, str] = field(default_factory=dict)
    #: The account's roles, with the permissions that each holds; none: the local administrator.
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    user: str = "admin"
    clusters: list[dict[str, Any]] = field(
        default_factory=lambda: [cluster_entity(), central_entity()]
    )
    #: How often a snapshot is looked at until its files are told.
    late_files: int = 0
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.central["vms"][VM] = vm_entity()

    def new_uuid(self) -> str:
        """An id that was never used."""
        return f"aaaaaaaa-0000-4000-8000-{next(self._numbers):012d}"

    async def __call__(self, asked: Asked) -> Said:
        await trio.lowlevel.checkpoint()
        said = self.before(asked)
        if said is not None:
            return said
        if asked.path.startswith(V2):
            return self._v2(asked, asked.path.removeprefix(V2 + "/"))
        path = asked.path.removeprefix(V3 + "/")
        if asked.path.startswith("/api/") and not asked.path.startswith(V3):
            return Said(404, b"<html>no such page</html>", {"content-type": "text/html"})
        first, _, rest = path.partition("/")
        match first:
            case "idempotence_identifiers":
                return self._ids(asked, rest)
            case "tasks":
                return self._tasks(asked, rest)
            case "vm_snapshots" if asked.host == PE:
                return self._snapshots(asked, rest)
            case "data" if asked.host == PE:
                return self._regions(asked)
            case "clusters":
                return listing(asked, self.clusters)
            case "users" if asked.host == PC:
                return self._users(rest)
            case "permissions" if asked.host == PC:
                return listing(asked, [permission_entity(name) for name in PERMISSIONS])
            case _ if first in self.central and asked.host == PC:
                return self._entities(asked, first, rest)
        return NOT_FOUND

    def _ids(self, asked: Asked, client: str) -> Said:
        if asked.host not in self.hands_out:
            return NOT_FOUND
        if asked.method == "POST":
            client = asked.json["client_identifier"]
            self.handed[client] = self.new_uuid()
        if client not in self.handed:
            return NOT_FOUND
        return Said(
            200, {"client_identifier": client, "count": 1, "uuid_list": [self.handed[client]]}
        )

    def _tasks(self, asked: Asked, rest: str) -> Said:
        uuids = asked.json["task_uuid_list"] if rest == "poll" else [rest]
        tasks: list[dict[str, Any]] = [
            {"uuid": uuid, "status": "SUCCEEDED", "entity_reference_list": []} for uuid in uuids
        ]
        return Said(
            200, {"entities": tasks, "has_poll_timed_out": False} if rest == "poll" else tasks[0]
        )

    def _users(self, rest: str) -> Said:
        if rest == "me":
            return Said(200, {"metadata": {"kind": "user"}, "status": {"name": self.user}})
        policies = [
            {"role": {"name": name, "permission_uuid_list": [PERMISSIONS[each] for each in held]}}
            for name, held in self.roles.items()
        ]
        details = {"username": self.user, "user_type": "LOCAL"}
        return Said(200, {"user_details": details, "access_control_policy_list": policies})

    def _snapshots(self, asked: Asked, rest: str) -> Said:
        if asked.method == "POST" and rest == "list":
            return listing(asked, list(self.snapshots.values()))
        if asked.method == "POST":
            uuid = asked.json["metadata"].get("uuid") or self.new_uuid()
            if uuid in self.snapshots:
                return refused(409, "ENTITY_ALREADY_EXISTS")
            self.snapshots[uuid] = snapshot_entity(uuid, asked.json["spec"], len(self.snapshots))
            return accepted(self.snapshots[uuid])
        if rest not in self.snapshots:
            return NOT_FOUND
        if asked.method == "DELETE":
            return accepted(self.snapshots.pop(rest))
        if asked.method == "PUT":
            self.snapshots[rest]["spec"] = asked.json["spec"]
            return accepted(self.snapshots[rest])
        entity = copy.deepcopy(self.snapshots[rest])
        if self.late_files:
            self.late_files -= 1
            entity["status"]["snapshot_file_list"] = []
        return Said(200, entity)

    def _regions(self, asked: Asked) -> Said:
        body = asked.json
        if "snapshot_file_path" not in body:
            return refused(422, "MISSING_ATTRIBUTE")
        known = {
            entry["snapshot_file_path"]
            for snapshot in self.snapshots.values()
            for entry in snapshot["status"]["snapshot_file_list"]
        }
        asked_for = {body["snapshot_file_path"], body.get("reference_snapshot_file_path")} - {None}
        if not asked_for <= known:
            return refused(400, "ENTITY_NOT_FOUND", "kInvalidValue: snapshot file not found")
        left = [each for each in self.regions if each["offset"] >= body["start_offset"]]
        answer = {"api_version": "3.1", "file_size": SIZE, "region_list": left[: self.page]}
        if len(left) > self.page:
            answer["next_offset"] = left[self.page]["offset"]
        return Said(200, answer)

    def _entities(self, asked: Asked, kind: str, rest: str) -> Said:
        held = self.central[kind]
        if asked.method == "POST" and rest == "list":
            return listing(asked, list(held.values()))
        if asked.method == "POST":
            return self._made(asked, kind)
        if rest not in held:
            return NOT_FOUND
        entity = held[rest]
        if asked.method == "GET":
            return Said(200, copy.deepcopy(entity))
        if asked.method == "DELETE":
            if entity["status"]["resources"].get("attachment_list"):
                return refused(422, "ENTITY_DELETION_FAILED", "it is attached")
            self.element_groups.pop(rest, None)
            return accepted(held.pop(rest))
        if asked.json["metadata"]["spec_version"] != entity["metadata"]["spec_version"]:
            return refused(409, "SPEC_UPDATE_ERROR", "not this one")
        entity["metadata"]["spec_version"] += 1
        attached = asked.json["spec"]["resources"]["attachment_list"]
        entity["status"]["resources"]["attachment_list"] = [
            {name: value for name, value in each.items() if name != "client_secret"}
            for each in attached
        ]
        return accepted(entity)

    def _made(self, asked: Asked, kind: str) -> Said:
        spec = asked.json["spec"]
        disks = spec["resources"].get("disk_list", [])
        if not self.urls and any("url" in disk["data_source_reference"] for disk in disks):
            return refused(422, "INVALID_REQUEST", "url was unexpected")
        uuid = self.new_uuid()
        self.central[kind][uuid] = entity_of(kind, uuid, spec)
        return accepted(self.central[kind][uuid])

    def _v2(self, asked: Asked, path: str) -> Said:
        if asked.host != PE:
            return Said(412, {"message": "not on Prism Central"})
        if path.startswith("tasks/"):
            uuid = path.removeprefix("tasks/")
            named = re.fullmatch(r"made-(.*)", uuid)
            entities = [{"entity_id": named[1], "entity_type": "VolumeGroup"}] if named else []
            return Said(
                200, {"uuid": uuid, "progress_status": "Succeeded", "entity_list": entities}
            )
        if path == f"vms/{VM}":
            return Said(200, vm_v2())
        if path.startswith("volume_groups"):
            return self._groups_v2(asked, path.removeprefix("volume_groups").strip("/"))
        return Said(404, {"message": "no such call"})

    def _groups_v2(self, asked: Asked, rest: str) -> Said:
        uuid, _, action = rest.partition("/")
        if not rest and asked.method == "GET":
            return Said(200, {"entities": list(self.element_groups.values())})
        if not rest:
            if not self.clones:
                return Said(400, {"message": "Unrecognized field clone_spec"})
            return self._cloned(asked)
        if uuid not in self.element_groups:
            return Said(404, {"message": "no such volume group"})
        group = self.element_groups[uuid]
        if asked.method == "DELETE":
            if group["attachment_list"]:
                return Said(422, {"message": "attached"})
            del self.element_groups[uuid]
        elif action:
            client = {"iscsi_initiator_name": asked.json["iscsi_client"]["client_address"]}
            others = [each for each in group["attachment_list"] if each != client]
            group["attachment_list"] = [*others, client] if action == "open" else others
        else:
            return Said(200, group)
        return Said(201, {"task_uuid": "plain"})

    def _cloned(self, asked: Asked) -> Said:
        uuid = self.new_uuid()
        name = asked.json["name"]
        disks = [{"index": 0, "vmdisk_uuid": self.new_uuid(), "vmdisk_size_bytes": SIZE}]
        self.element_groups[uuid] = {
            "uuid": uuid,
            "name": name,
            "iscsi_target_name": f"v2-{uuid}",
            "disk_list": disks,
            "attachment_list": [],
        }
        if self.central_knows_clones:
            spec = {"name": name, "resources": {"disk_list": [{"index": 0}]}}
            self.central["volume_groups"][uuid] = entity_of("volume_groups", uuid, spec)
        return Said(201, {"task_uuid": f"made-{uuid}"})


def accepted(entity: dict[str, Any]) -> Said:
    """The answer to a change: the task is one text."""
    answer = copy.deepcopy(entity)
    answer["status"] = {"state": "PENDING", "execution_context": {"task_uuid": "a-task"}}
    return Said(202, answer)


def listing(asked: Asked, entities: list[dict[str, Any]]) -> Said:
    """A page of a list."""
    body = asked.json
    offset, length = body.get("offset", 0), body.get("length", 20)
    wanted = re.fullmatch(r"name==(.*)", body.get("filter", ""))
    if wanted:
        entities = [each for each in entities if each["status"]["name"] == wanted[1]]
    metadata = {"kind": body.get("kind"), "total_matches": len(entities)}
    return Said(200, {"entities": entities[offset : offset + length], "metadata": metadata})


def entity_of(kind: str, uuid: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A volume group or an image, complete."""
    resources: dict[str, Any] = {}
    if kind == "volume_groups":
        resources = {
            "iscsi_target_name": f"{spec['name']}-{uuid}",
            "disk_list": [
                {"uuid": uuid, "index": disk["index"], "disk_size_bytes": SIZE}
                for disk in spec["resources"]["disk_list"]
            ],
            "attachment_list": [],
        }
    reference = {"kind": "cluster", "uuid": CLUSTER}
    return {
        "api_version": "3.1",
        "metadata": {
            "kind": kind.removesuffix("s"),
            "uuid": uuid,
            "spec_version": 0,
            "creation_time": "2026-01-02T03:04:05Z",
        },
        "spec": copy.deepcopy(spec),
        "status": {
            "state": "COMPLETE",
            "name": spec["name"],
            "cluster_reference": reference,
            "resources": resources,
            "execution_context": {"task_uuid": ["an-old-task"]},
        },
    }


def snapshot_entity(uuid: str, spec: dict[str, Any], number: int) -> dict[str, Any]:
    """A snapshot of the VM's two disks and its CD-ROM."""
    files = [
        {
            "file_path": f"/ct/.acropolis/vmdisk/{vmdisk}",
            "snapshot_file_path": f"/ct/.snapshot/{number:02d}/6547-17-{number}/.acropolis/vmdisk/{vmdisk}",
        }
        for vmdisk in (CDROM, *VMDISKS)
    ]
    return {
        "api_version": "3.1",
        "metadata": {
            "kind": "vm_snapshot",
            "uuid": uuid,
            "spec_version": 0,
            "creation_time": f"2026-01-02T03:{number:02d}:08Z",
        },
        "spec": spec,
        "status": {
            "state": "COMPLETE",
            "name": spec["name"],
            "snapshot_type": "CRASH_CONSISTENT",
            "resources": spec["resources"],
            "snapshot_file_list": files,
        },
    }


def disk_v3(number: int, device_type: str = "DISK") -> dict[str, Any]:
    """A disk as Prism Central describes it."""
    return {
        "uuid": DEVICES[number],
        "disk_size_bytes": SIZE,
        "device_properties": {
            "device_type": device_type,
            "disk_address": {"adapter_type": "SCSI", "device_index": number},
        },
    }


def vm_entity() -> dict[str, Any]:
    """The VM, its disks not in their order."""
    cdrom = {
        "uuid": "cd000000-0000-4000-8000-000000000000",
        "device_properties": {
            "device_type": "CDROM",
            "disk_address": {"adapter_type": "IDE", "device_index": 0},
        },
    }
    resources = {"power_state": "ON", "disk_list": [cdrom, disk_v3(1), disk_v3(0)], "nic_list": []}
    return {
        "api_version": "3.1",
        "metadata": {"kind": "vm", "uuid": VM, "spec_version": 3},
        "spec": {"name": "app01", "resources": resources},
        "status": {
            "name": "app01",
            "state": "COMPLETE",
            "cluster_reference": {"kind": "cluster", "uuid": CLUSTER},
            "resources": resources,
        },
    }


def disk_v2(number: int) -> dict[str, Any]:
    """A disk as its Element describes it."""
    return {
        "disk_address": {
            "device_bus": "scsi",
            "device_index": number,
            "vmdisk_uuid": VMDISKS[number],
            "device_uuid": DEVICES[number],
        },
        "is_cdrom": False,
        "is_empty": False,
        "size": SIZE,
        "storage_container_uuid": "c7000000-0000-4000-8000-000000000000",
    }


def vm_v2() -> dict[str, Any]:
    """The VM by v2.0."""
    cdrom = {
        "disk_address": {"device_bus": "ide", "device_index": 0},
        "is_cdrom": True,
        "is_empty": True,
    }
    return {"uuid": VM, "name": "app01", "vm_disk_info": [cdrom, disk_v2(0), disk_v2(1)]}


def cluster_entity(**network: Any) -> dict[str, Any]:
    """The one AHV cluster."""
    return {
        "metadata": {"kind": "cluster", "uuid": CLUSTER},
        "spec": {"name": "cluster-a"},
        "status": {
            "name": "cluster-a",
            "resources": {
                "network": {
                    "external_ip": PE,
                    "external_data_services_ip": "198.51.100.21",
                    **network,
                },
                "config": {
                    "service_list": ["AOS"],
                    "build": {"version": "7.3.1.5"},
                    "is_available": True,
                },
                "nodes": {"hypervisor_server_list": [{"ip": "198.51.100.41", "type": "AHV"}]},
            },
        },
    }


def central_entity() -> dict[str, Any]:
    """Prism Central itself, which is in the list as well."""
    return {
        "metadata": {"kind": "cluster", "uuid": PC_CLUSTER},
        "spec": {"name": "Unnamed"},
        "status": {
            "name": "Unnamed",
            "resources": {
                "network": {},
                "config": {"service_list": ["PRISM_CENTRAL"]},
                "nodes": {"hypervisor_server_list": [{"ip": "127.0.0.1", "type": "AHV"}]},
            },
        },
    }


def permission_entity(name: str) -> dict[str, Any]:
    """A permission of Prism Central."""
    return {
        "metadata": {"kind": "permission", "uuid": PERMISSIONS[name]},
        "status": {"name": name, "resources": {}},
    }
