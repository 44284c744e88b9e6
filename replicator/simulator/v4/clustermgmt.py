# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace clustermgmt: clusters (Prism Central is one of them) and storage containers."""

from __future__ import annotations

import copy
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

from replicator.simulator.model import Cluster, Container
from replicator.simulator.v4.api import LISTED, Api, Call, Namespace
from replicator.simulator.v4.parts import check_cluster, ipv4
from replicator.simulator.web import HttpError, Reply, Router

_CONFIG = "clustermgmt.v4.config."
_CLUSTER = _CONFIG + "Cluster"
_CONTAINER = _CONFIG + "StorageContainer"
_CENTRAL_VERSION = "pc.7.3.1.9"


def _cluster_body(call: Call, cluster: Cluster) -> dict[str, Any]:
    services = cluster.data_services
    return {
        "extId": cluster.uuid,
        "name": cluster.name,
        "vmCount": sum(vm.cluster == cluster.uuid for vm in call.world.vms.values()),
        "nodes": {
            "numberOfNodes": len(cluster.cvms),
            "nodeList": [
                {
                    "controllerVmIp": ipv4(address),
                    "hostIp": ipv4(address),
                    "nodeUuid": str(uuid5(NAMESPACE_URL, f"replctl:node:{cluster.uuid}:{address}")),
                }
                for address in cluster.cvms
            ],
        },
        "config": {
            "buildInfo": {"version": cluster.aos, "fullVersion": f"el8-release-{cluster.aos}"},
            "hypervisorTypes": ["AHV"],
            "clusterFunction": ["AOS"],
            "timezone": "UTC",
            "redundancyFactor": 2,
            "clusterSoftwareMap": [{"softwareType": "NOS", "version": cluster.aos}],
            "operationMode": "NORMAL",
            "isLts": False,
            "isAvailable": cluster.available,
        },
        "network": {
            "externalAddress": ipv4(cluster.address),
            "externalDataServiceIp": ipv4(services) if services else None,
        },
    }


def _central_body(call: Call) -> dict[str, Any]:
    return {
        "extId": call.world.central,
        "name": "prism-central",
        "config": {
            "buildInfo": {"version": _CENTRAL_VERSION},
            "clusterFunction": ["PRISM_CENTRAL"],
            "operationMode": "NORMAL",
            "isAvailable": True,
        },
        "network": {"externalAddress": ipv4(call.world.address)},
    }


async def _list(call: Call) -> Reply:
    def show(cluster: Cluster | None) -> dict[str, Any]:
        return _central_body(call) if cluster is None else _cluster_body(call, cluster)

    return call.many([*call.world.clusters.values(), None], show, _CLUSTER)


async def _get(call: Call, cluster: str) -> Reply:
    if cluster == call.world.central:
        return call.one(_central_body(call), _CLUSTER)
    found = check_cluster(call.world, cluster)
    return call.one(_cluster_body(call, found), _CLUSTER, found)


def _container_body(call: Call, container: Container) -> dict[str, Any]:
    return {
        "extId": container.uuid,
        "containerExtId": container.uuid,
        "name": container.name,
        "clusterExtId": container.cluster,
        "clusterName": call.world.clusters[container.cluster].name,
        "isMarkedForRemoval": False,
        "maxCapacityBytes": container.capacity,
        "replicationFactor": 2,
        "isCompressionEnabled": True,
        "isInternal": container.internal,
        "isEncrypted": False,
        "isShared": False,
    }


def _container(call: Call, uuid: str) -> Container:
    found: Container = call.core.get("containers", uuid)
    return found


async def _list_containers(call: Call) -> Reply:
    return call.many(
        call.world.containers.values(), lambda each: _container_body(call, each), _CONTAINER
    )


async def _get_container(call: Call, container: str) -> Reply:
    found = _container(call, container)
    return call.one(_container_body(call, found), _CONTAINER, found)


async def _create_container(call: Call) -> Reply:
    body = call.body(_CONTAINER)
    cluster = body.get("clusterExtId") or call.request.headers.get("x-cluster-id", "")
    check_cluster(call.world, cluster)
    if any(c.name == body["name"] and c.cluster == cluster for c in call.world.containers.values()):
        raise HttpError(409, f"there is a storage container {body['name']} already", "exists")
    container = Container(uuid=str(uuid4()), name=body["name"], cluster=cluster)
    container.capacity = body.get("maxCapacityBytes", container.capacity)
    return call.task(call.core.put_entity("containers", container, **call.common))


async def _update_container(call: Call, container: str) -> Reply:
    found = _container(call, container)
    body = call.body(_CONTAINER)
    call.match(found)
    changed = copy.deepcopy(found)
    changed.name = body["name"]
    changed.capacity = body.get("maxCapacityBytes", found.capacity)
    return call.task(call.core.put_entity("containers", changed, **call.common))


async def _delete_container(call: Call, container: str) -> Reply:
    call.match(_container(call, container))
    disks = [disk for vm in call.world.vms.values() for disk in vm.disks]
    if any(disk.container == container for disk in disks):
        raise HttpError(409, "the storage container holds disks of VMs", "in_use")
    return call.task(call.core.delete_entity("containers", container, **call.common))


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "clustermgmt")
    view = "View_Cluster"
    listed = (*LISTED, "$expand", "$apply")
    clusters = "/config/clusters"
    space.get(clusters, _list, _CONFIG + "ListClustersApiResponse", permission=view, query=listed)
    space.get(
        clusters + "/{cluster}",
        _get,
        _CONFIG + "GetClusterApiResponse",
        permission=view,
        query=("$expand",),
    )
    path, one = "/config/storage-containers", "/config/storage-containers/{container}"
    response = _CONFIG + "{}StorageContainer{}ApiResponse"
    view = "View_Storage_Container"
    space.get(path, _list_containers, response.format("List", "s"), permission=view, query=LISTED)
    space.get(one, _get_container, response.format("Get", ""), permission=view)
    for method, where, handler, verb in (
        ("POST", path, _create_container, "Create"),
        ("PUT", one, _update_container, "Update"),
        ("DELETE", one, _delete_container, "Delete"),
    ):
        permission = f"{verb}_Storage_Container"
        space.add(method, where, handler, response.format(verb, ""), permission=permission)
