# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace dataprotection: recovery points on Prism Central, changed regions on the Elements."""

from __future__ import annotations

import copy
from typing import Any

from replicator.simulator.model import Snapshot, SnapshotVm, Vm
from replicator.simulator.v4 import jwt
from replicator.simulator.v4.api import LISTED, SCHEMA, Api, Call, Namespace
from replicator.simulator.v4.envelope import link, metadata, pair, when, wrap
from replicator.simulator.v4.filters import seconds
from replicator.simulator.v4.parts import check_cluster, ipv4, snapshot_vm_body
from replicator.simulator.v4.vm_restore import adjust_restored
from replicator.simulator.web import HttpError, Reply, Router

_CONFIG = "dataprotection.v4.config."
_CONTENT = "dataprotection.v4.content."
_POINT = _CONFIG + "RecoveryPoint"
_COOKIE = "NTNX_IGW_SESSION"
_BLOCKS = (32768, 65536, 131072, 262144)
_PATH = (
    "/content/recovery-points/{point}/vm-recovery-points/{part}/disk-recovery-points/{disk}"
    "/$actions/compute-changed-regions"
)


def point_body(call: Call, snapshot: Snapshot) -> dict[str, Any]:
    """A recovery point as v4 shows it."""
    kind = "APPLICATION_CONSISTENT" if snapshot.application_consistent else "CRASH_CONSISTENT"
    return {
        "extId": snapshot.uuid,
        "name": snapshot.name,
        "creationTime": when(snapshot.created_at),
        "expirationTime": when(snapshot.expires_at),
        "status": "COMPLETE",
        "recoveryPointType": kind,
        "locationAgnosticId": snapshot.uuid,
        "ownerExtId": call.request.user.uuid,
        "isSecure": False,
        "locationReferences": [{"locationExtId": snapshot.cluster}],
        "vmRecoveryPoints": [
            {**snapshot_vm_body(snapshot, part), "hypervisorType": "AHV"} for part in snapshot.vms
        ],
        "volumeGroupRecoveryPoints": [],
    }


def _points(call: Call) -> list[Snapshot]:
    return [snapshot for snapshot in call.world.snapshots.values() if not snapshot.element]


async def find_point(call: Call, uuid: str) -> Snapshot:
    """A recovery point of Prism Central. Raises HttpError 404."""
    snapshot = await call.core.find_snapshot(uuid)
    if snapshot.element:
        raise HttpError(404, f"no recovery point with the id {uuid}", "not_found")
    return snapshot


def _part(snapshot: Snapshot, uuid: str) -> SnapshotVm:
    for part in snapshot.vms:
        if part.uuid == uuid:
            return part
    raise HttpError(404, f"no VM recovery point {uuid} in {snapshot.uuid}", "not_found")


async def _list(call: Call) -> Reply:
    return call.many(_points(call), lambda point: point_body(call, point), _POINT)


async def _get(call: Call, point: str) -> Reply:
    found = await find_point(call, point)
    return call.one(point_body(call, found), _POINT, found)


async def _get_part(call: Call, point: str, part: str) -> Reply:
    found = await find_point(call, point)
    body = {**snapshot_vm_body(found, _part(found, part)), "hypervisorType": "AHV"}
    return call.one(body, _CONFIG + "VmRecoveryPoint", found)


async def _create(call: Call) -> Reply:
    body = call.body(_POINT)
    if body.get("volumeGroupRecoveryPoints"):
        raise HttpError(501, "recovery points of volume groups are not simulated", "not_supported")
    vms = [part.get("vmExtId") for part in body.get("vmRecoveryPoints", [])]
    if not vms or None in vms:
        raise HttpError(400, "vmRecoveryPoints needs a vmExtId in each of its entries")
    expires = body.get("expirationTime")
    kind = body.get("recoveryPointType", "CRASH_CONSISTENT")
    task = call.core.create_snapshot(
        body.get("name") or f"recovery-point-{call.world.snapshot_number + 1}",
        vms,
        application_consistent=kind == "APPLICATION_CONSISTENT",
        expires_at=seconds(expires) if expires else None,
        element=False,
        **call.common,
    )
    return call.task(task)


async def _delete(call: Call, point: str) -> Reply:
    found = await find_point(call, point)
    call.match(found)
    return call.task(call.core.delete_snapshot(point, **call.common))


async def _set_expiration(call: Call, point: str) -> Reply:
    found = await find_point(call, point)
    body = call.body(_CONFIG + "ExpirationTimeSpec")
    call.match(found)
    at = seconds(body["expirationTime"])
    return call.task(call.core.set_expiration(point, at, **call.common))


async def _replicate(call: Call, point: str) -> Reply:
    await find_point(call, point)
    body = call.body(_CONFIG + "RecoveryPointReplicationSpec")
    if body["pcExtId"] != call.world.central:
        raise HttpError(404, f"no Prism Central with the id {body['pcExtId']}", "not_found")
    cluster = body.get("clusterExtId")
    if cluster is None:
        raise HttpError(400, "clusterExtId is needed where Prism Central has several clusters")
    check_cluster(call.world, cluster)
    return call.task(call.core.replicate_snapshot(point, cluster, **call.common))


async def _restore(call: Call, point: str) -> Reply:
    found = await find_point(call, point)
    body = call.body(_CONFIG + "RecoveryPointRestorationSpec")
    call.match(found)
    if body.get("clusterExtId") not in (None, found.cluster):
        raise HttpError(400, f"the recovery point is not on cluster {body['clusterExtId']}")
    wanted = body.get("vmRecoveryPointRestoreOverrides") or [
        {"vmRecoveryPointExtId": part.uuid} for part in found.vms
    ]
    if len(wanted) != 1:
        raise HttpError(501, "only one VM can be restored at a time here", "not_supported")
    part = _part(found, wanted[0].get("vmRecoveryPointExtId") or found.vms[0].uuid)
    override = wanted[0].get("vmOverrideSpec") or {}

    def adjust(vm: Vm) -> None:
        adjust_restored(call.world, vm, override)

    adjust(copy.deepcopy(part.config))  # refused now rather than later
    task = call.core.restore_snapshot(
        point, part.uuid, override.get("name"), adjust=adjust, **call.common
    )
    return call.task(task)


# Where changed regions are to be asked for, and the answer there


def _disk_of(reference: dict[str, Any], snapshot: Snapshot) -> None:
    part = _part(snapshot, reference["vmRecoveryPointExtId"])
    if reference["diskRecoveryPointExtId"] not in {disk.uuid for disk in part.disks}:
        raise HttpError(
            404, f"no disk recovery point {reference['diskRecoveryPointExtId']}", "not_found"
        )


async def _discover(call: Call, point: str) -> Reply:
    found = await find_point(call, point)
    body = call.body(_CONTENT + "ClusterDiscoverSpec")
    spec = body["spec"]
    if not spec["$objectType"].endswith("ComputeChangedRegionsClusterDiscoverSpec"):
        raise HttpError(501, "VSS metadata is not simulated", "not_supported")
    if body["operation"] != "COMPUTE_CHANGED_REGIONS":
        raise HttpError(400, f"operation {body['operation']} does not go with this spec")
    for name in ("diskRecoveryPoint", "referenceDiskRecoveryPoint"):
        reference = spec.get(name)
        if reference is None:
            continue
        if reference["$objectType"] != _CONTENT + "VmDiskRecoveryPointReference":
            raise HttpError(
                501, "recovery points of volume groups are not simulated", "not_supported"
            )
        if name == "diskRecoveryPoint" and reference["recoveryPointExtId"] != point:
            raise HttpError(400, "diskRecoveryPoint is of another recovery point")
        _disk_of(reference, await find_point(call, reference["recoveryPointExtId"]))
    cluster = call.world.clusters[found.cluster]
    knobs = call.api.knobs
    token = jwt.issue(
        knobs.key, call.request.user, cluster.uuid, knobs.content_minor, knobs.jwt_lifetime_s
    )
    model = "dataprotection.v4.common.ClusterInfo"
    data = SCHEMA.stamp({"clusterIp": ipv4(cluster.address), "jwtToken": token}, model, call.minors)
    port = call.request.base_url.rpartition(":")[2]
    there = f"https://{cluster.address}:{port}/api/dataprotection/v4.{knobs.content_minor}/content"
    meta = metadata([link("redirect", f"{there}/recovery-points/{point}")])
    return Reply(200, wrap(data, model, call.options.response, meta, call.minors))


def _check_token(call: Call) -> None:
    """Content is opened by a token as a cookie, and by nothing else that proves who asks. Raises HttpError 401, 403."""
    request = call.request
    for part in request.headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        key, path = call.api.knobs.key, request.path
        if name == _COOKIE and jwt.open_token(call.core, key, path, value, request.cluster):
            return
    raise HttpError(403, "content is opened by the token of discover-cluster only", "forbidden")


async def _changed_regions(call: Call, point: str, part: str, disk: str) -> Reply:
    _check_token(call)
    body = call.body(_CONTENT + "VmRecoveryPointChangedRegionsComputeSpec")
    names = (
        "referenceRecoveryPointExtId",
        "referenceVmRecoveryPointExtId",
        "referenceDiskRecoveryPointExtId",
    )
    given = [body.get(name) for name in names]
    if any(given) and not all(given):
        raise HttpError(400, "either all three reference ids are given, or none")
    block = body.get("blockSizeByte", _BLOCKS[0])
    if block not in _BLOCKS:
        raise HttpError(400, f"blockSizeByte must be one of {', '.join(map(str, _BLOCKS))}")
    await _located(call, point, part, disk)
    if given[0] is not None:
        older = await _located(call, str(given[0]), str(given[1]), str(given[2]))
        if older.created_at > (await find_point(call, point)).created_at:
            raise HttpError(400, "the reference is newer than the recovery point")
    offset = body.get("offset", 0)
    end = offset + body["length"] if "length" in body else None
    regions, going_on, size = await call.core.changed_regions(
        disk, str(given[2]) if given[2] else None, offset, end, block
    )
    if offset > size:
        raise HttpError(400, f"offset {offset} is behind the end, {size}")
    model = _CONTENT + "ChangedRegion"
    data = [
        SCHEMA.stamp(
            {"offset": at, "length": length, "regionType": "ZEROED" if zeroed else "REGULAR"},
            model,
            call.minors,
        )
        for at, length, zeroed in regions
    ]
    extra = [pair("fileSize", size)]
    if going_on is None and end is not None and end < size:
        going_on = end
    if going_on is not None:
        extra.insert(0, pair("nextOffset", going_on))
    meta = metadata([], extra=extra)
    return Reply(200, wrap(data, f"List<{model}>", call.options.response, meta, call.minors))


async def _located(call: Call, point: str, part: str, disk: str) -> Snapshot:
    """The recovery point, if it is on this Element and has this disk. Raises HttpError 404."""
    snapshot = await find_point(call, point)
    if snapshot.cluster != call.request.cluster:
        raise HttpError(404, f"recovery point {point} is not on this cluster", "not_found")
    reference = {"vmRecoveryPointExtId": part, "diskRecoveryPointExtId": disk}
    _disk_of(reference, snapshot)
    return snapshot


async def _not_here(call: Call, **_: str) -> Reply:
    del call
    raise HttpError(501, "content is served by the cluster's Element", "not_supported")


def add_central(api: Api, router: Router) -> None:
    """What Prism Central answers."""
    space = Namespace(api, router, "dataprotection")
    points = "/config/recovery-points"
    view, one = "View_Recovery_Point", points + "/{point}"
    space.get(
        points, _list, _CONFIG + "ListRecoveryPointsApiResponse", permission=view, query=LISTED
    )
    space.get(
        one, _get, _CONFIG + "GetRecoveryPointApiResponse", permission=view, query=("$select",)
    )
    space.get(
        one + "/vm-recovery-points/{part}",
        _get_part,
        _CONFIG + "GetVmRecoveryPointApiResponse",
        permission="View_VM_Recovery_Point",
    )
    space.post(
        points,
        _create,
        _CONFIG + "CreateRecoveryPointApiResponse",
        permission="Create_Recovery_Point",
        request_id=True,
    )
    space.delete(
        one,
        _delete,
        _CONFIG + "DeleteRecoveryPointApiResponse",
        permission="Delete_Recovery_Point",
        request_id=True,
    )
    space.post(
        one + "/$actions/set-expiration-time",
        _set_expiration,
        _CONFIG + "UpdateRecoveryPointExpirationTimeApiResponse",
        permission="Set_Expiration_Time_Recovery_Point",
    )
    space.post(
        one + "/$actions/replicate",
        _replicate,
        _CONFIG + "RecoveryPointReplicateApiResponse",
        permission="Replicate_Recovery_Point",
    )
    space.post(
        one + "/$actions/restore",
        _restore,
        _CONFIG + "RecoveryPointRestoreApiResponse",
        permission="Restore_VM_Recovery_Point",
    )
    space.post(
        one + "/$actions/discover-cluster",
        _discover,
        _CONFIG + "ClusterInfoApiResponse",
        permission=view,
    )
    space.post(_PATH, _not_here, _CONTENT + "ChangedVmRegionsApiResponse")


def add_element(api: Api, router: Router) -> None:
    """What an Element answers; who asks has been found by the token."""
    space = Namespace(api, router, "dataprotection")
    space.post(_PATH, _changed_regions, _CONTENT + "ChangedVmRegionsApiResponse")
