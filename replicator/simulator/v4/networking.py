# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace networking: subnets."""

from __future__ import annotations

import copy
from typing import Any
from uuid import uuid4

from replicator.simulator.model import Subnet
from replicator.simulator.v4.api import LISTED, Api, Call, Namespace
from replicator.simulator.v4.parts import check_cluster
from replicator.simulator.web import HttpError, Reply, Router

_CONFIG = "networking.v4.config."
_SUBNET = _CONFIG + "Subnet"


def _body(call: Call, subnet: Subnet) -> dict[str, Any]:
    cluster = call.world.clusters[subnet.cluster]
    return {
        "extId": subnet.uuid,
        "name": subnet.name,
        "description": subnet.description or None,
        "subnetType": "VLAN",
        "networkId": subnet.vlan,
        "clusterReference": cluster.uuid,
        "clusterName": cluster.name,
        "clusterReferenceList": [cluster.uuid],
        "clusterNameList": [cluster.name],
        "isExternal": False,
        "isNatEnabled": False,
        "isAdvancedNetworking": False,
        "bridgeName": "br0" if subnet.uplink else "br-isolated",
        "hypervisorType": "acropolis",
        "ipConfig": subnet.v4.get("ipConfig"),
        "isConnected": subnet.uplink,
    }


def _find(call: Call, uuid: str) -> Subnet:
    found: Subnet = call.core.get("subnets", uuid)
    return found


async def _list(call: Call) -> Reply:
    return call.many(call.world.subnets.values(), lambda each: _body(call, each), _SUBNET)


async def _get(call: Call, subnet: str) -> Reply:
    found = _find(call, subnet)
    return call.one(_body(call, found), _SUBNET, found)


async def _create(call: Call) -> Reply:
    body = call.body(_SUBNET)
    if body["subnetType"] != "VLAN":
        raise HttpError(501, "only VLAN subnets are simulated", "not_supported")
    cluster = check_cluster(call.world, body.get("clusterReference", ""))
    subnet = Subnet(
        uuid=str(uuid4()),
        name=body["name"],
        cluster=cluster.uuid,
        vlan=body.get("networkId", 0),
        description=body.get("description", ""),
    )
    subnet.v4 = {"ipConfig": body["ipConfig"]} if "ipConfig" in body else {}
    return call.task(call.core.put_entity("subnets", subnet, **call.common))


async def _update(call: Call, subnet: str) -> Reply:
    found = _find(call, subnet)
    body = call.body(_SUBNET)
    call.match(found)
    changed = copy.deepcopy(found)
    changed.name = body["name"]
    changed.description = body.get("description", "")
    changed.vlan = body.get("networkId", found.vlan)
    return call.task(call.core.put_entity("subnets", changed, **call.common))


async def _delete(call: Call, subnet: str) -> Reply:
    call.match(_find(call, subnet))
    if any(nic.subnet == subnet for vm in call.world.vms.values() for nic in vm.nics):
        raise HttpError(409, "VMs have NICs in the subnet", "in_use")
    return call.task(call.core.delete_entity("subnets", subnet, **call.common))


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "networking")
    subnets, one = "/config/subnets", "/config/subnets/{subnet}"
    listed = (*LISTED, "$expand")
    response = _CONFIG + "ListSubnetsApiResponse"
    space.get(subnets, _list, response, permission="View_Subnet", query=listed)
    for method, path, handler, verb in (
        ("GET", one, _get, "Get"),
        ("POST", subnets, _create, "Create"),
        ("PUT", one, _update, "Update"),
        ("DELETE", one, _delete, "Delete"),
    ):
        permission = f"{'View' if verb == 'Get' else verb}_Subnet"
        response = f"{_CONFIG}{verb}SubnetApiResponse"
        space.add(method, path, handler, response, permission=permission)
