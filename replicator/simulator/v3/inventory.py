# SPDX-License-Identifier: AGPL-3.0-or-later
"""What v3 tells of clusters, hosts, subnets, storage containers (through ``groups``), categories and its own version."""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from replicator.simulator.model import Cluster, Container, Entity, Subnet
from replicator.simulator.v3 import fiql
from replicator.simulator.v3.checks import InvalidError, check, check_uuid
from replicator.simulator.v3.envelope import API_VERSION, V3, Json, Listing, list_reply, now_usecs
from replicator.simulator.v3.shapes import groups, list_body
from replicator.simulator.web import HttpError, Reply, Request

PC_VERSION = "pc.7.3.1.9"
_CLUSTER_ATTRIBUTES = frozenset({"name", "uuid"})
_SUBNET_ATTRIBUTES = frozenset({"name", "uuid", "vlan_id", "subnet_type", "cluster_uuid"})
_HOST_ATTRIBUTES = frozenset({"name", "uuid", "cluster"})
_COMMIT = "0" * 40
#: Attributes of a storage container that ``groups`` gives.
_CONTAINER = frozenset(
    {
        "container_name", "name", "cluster", "cluster_uuid", "cluster_name", "max_capacity", "is_internal",
        "storage.user_capacity_bytes", "storage.user_usage_bytes", "storage.user_free_bytes",
    }
)  # fmt: skip
_GROUP_MEMBERS = 60


class Inventory:
    """Handlers."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    async def versions(self, request: Request) -> Reply:
        """GET /versions."""
        del request
        return Reply(200, {"major_version": "3", "minor_version": "1"})

    async def prism_central(self, request: Request) -> Reply:
        """GET /prism_central."""
        del request
        resources = {
            "version": PC_VERSION,
            "type": "PC",
            "cluster_uuid": self._v3.world.central,
            "virtual_ip": self._v3.world.address,
            "pc_vm_list": [],
        }
        return Reply(200, {"resources": resources})

    # Clusters and hosts

    def _clusters(self) -> list[Cluster]:
        """All clusters; Prism Central is one of them."""
        world = self._v3.world
        central = Cluster(
            uuid=world.central,
            name="prism-central",
            address=world.address,
            data_services=None,
            aos=PC_VERSION,
        )
        return [*world.clusters.values(), central]

    def cluster_body(self, cluster: Cluster) -> Json:
        """A cluster as v3 writes it down."""
        central = cluster.uuid == self._v3.world.central
        network: Json = {
            "external_ip": cluster.address,
            "external_subnet": f"{cluster.address.rpartition('.')[0]}.0/255.255.255.0",
            "internal_subnet": "192.168.5.0/255.255.255.128",
            "name_server_ip_list": [],
            "ntp_server_ip_list": [],
        }
        if cluster.data_services is not None:
            network["external_data_services_ip"] = cluster.data_services
        build = {
            "build_type": "release",
            "version": cluster.aos,
            "full_version": f"el8.5-release-{cluster.aos}-stable",
            "commit_id": _COMMIT,
            "short_commit_id": _COMMIT[:6],
            "is_long_term_support": False,
        }
        config: Json = {
            "service_list": ["PRISM_CENTRAL" if central else "AOS"],
            "build": build,
            "software_map": {
                "NOS": {"software_type": "NOS", "status": "INSTALLED", "version": cluster.aos},
                "NCC": {"software_type": "NCC", "status": "INSTALLED", "version": "ncc-5.2.0"},
            },
            "is_available": cluster.available,
            "operation_mode": "NORMAL",
            "redundancy_factor": 1 if central else 2,
            "timezone": "UTC",
            "cluster_arch": "X86_64",
            "encryption_status": "NOT_SUPPORTED",
        }
        servers = [{"ip": cvm, "type": "AHV", "version": "10.3.1"} for cvm in cluster.cvms]
        resources = {"config": config, "network": network}
        return {
            "status": {
                "name": cluster.name,
                "state": "COMPLETE",
                "resources": {
                    **resources,
                    "nodes": {} if central else {"hypervisor_server_list": servers},
                },
            },
            "spec": {"name": cluster.name, "resources": {"config": {}, "network": network}},
            "metadata": self._v3.metadata("cluster", cluster),
        }

    async def list_clusters(self, request: Request) -> Reply:
        """POST /clusters/list: with an empty body the answer's metadata holds only the total."""
        listing = Listing("cluster", _CLUSTER_ATTRIBUTES, _describe, self.cluster_body, terse=True)
        return await list_reply(request, self._clusters(), listing)

    async def get_cluster(self, request: Request, uuid: str) -> Reply:
        """GET /clusters/{uuid}."""
        del request
        for cluster in self._clusters():
            if cluster.uuid == check_uuid(uuid):
                return self._v3.entity_reply(self.cluster_body(cluster))
        raise HttpError(404, f"the cluster {uuid} was not found", "not_found")

    async def list_hosts(self, request: Request) -> Reply:
        """POST /hosts/list: one host for each CVM."""
        hosts = [
            (host_uuid(cluster.uuid, cvm), number, cvm, cluster)
            for cluster in self._v3.world.clusters.values()
            for number, cvm in enumerate(cluster.cvms, 1)
        ]
        listing = Listing("host", _HOST_ATTRIBUTES, _describe_host, self._host_body)
        return await list_reply(request, hosts, listing)

    def _host_body(self, host: tuple[str, int, str, Cluster]) -> Json:
        uuid, number, cvm, cluster = host
        name = f"{cluster.name}-host-{number}"
        hypervisor = {"ip": cvm, "num_vms": 0, "hypervisor_full_name": "Nutanix 10.3.1"}
        resources = {
            "hypervisor": hypervisor,
            "controller_vm": {"ip": cvm},
            "host_type": "HYPER_CONVERGED",
            "serial_number": f"SIM{number:04d}",
            "num_cpu_sockets": 2,
            "num_cpu_cores": 16,
            "memory_capacity_mib": 262_144,
        }
        metadata = self._v3.metadata("host", Entity(uuid=uuid, created_at=cluster.created_at))
        status = {
            "name": name,
            "state": "COMPLETE",
            "cluster_reference": {"kind": "cluster", "uuid": cluster.uuid},
            "resources": resources,
        }
        return {"status": status, "spec": {"name": name, "resources": {}}, "metadata": metadata}

    # Subnets

    async def list_subnets(self, request: Request) -> Reply:
        """POST /subnets/list."""
        here = [s for s in self._v3.world.subnets.values() if request.cluster in (None, s.cluster)]
        listing = Listing("subnet", _SUBNET_ATTRIBUTES, _describe_subnet, self._subnet_body)
        return await list_reply(request, here, listing)

    async def get_subnet(self, request: Request, uuid: str) -> Reply:
        """GET /subnets/{uuid}."""
        found = self._v3.world.subnets.get(check_uuid(uuid))
        if found is None or request.cluster not in (None, found.cluster):
            raise HttpError(404, f"the subnet {uuid} was not found", "not_found")
        return self._v3.entity_reply(self._subnet_body(found))

    def _subnet_body(self, subnet: Subnet) -> Json:
        resources = {
            "subnet_type": "VLAN",
            "vlan_id": subnet.vlan,
            "vswitch_name": "br0",
            "virtual_switch_uuid": str(uuid5(NAMESPACE_URL, f"switch:{subnet.cluster}")),
            "is_external": False,
        }
        shared = {
            "name": subnet.name,
            "description": subnet.description,
            "cluster_reference": self._v3.cluster_reference(subnet.cluster),
        }
        status = {**shared, "state": "COMPLETE", "resources": resources}
        metadata = self._v3.metadata("subnet", subnet)
        return {"status": status, "spec": {**shared, "resources": resources}, "metadata": metadata}

    # Groups: the only way to storage containers

    async def groups(self, request: Request) -> Reply:
        """POST /groups, for ``storage_container``. Raises HttpError 422 for other types and unknown attributes."""
        body = check(request.json(), groups)
        if body["entity_type"] != "storage_container":
            raise InvalidError(
                f"entity_type {body['entity_type']!r} is not served here", "REQUEST_NOT_SUPPORTED"
            )
        names = [each["attribute"] for each in body.get("group_member_attributes", [])]
        for name in names:
            if name not in _CONTAINER:
                raise InvalidError(
                    f"group_member_attributes: {name!r} is unknown", "INVALID_ARGUMENT"
                )
        passes = fiql.parse(body.get("filter_criteria", ""), _CONTAINER)
        ids = body.get("entity_ids")
        found = [
            container
            for container in self._v3.world.containers.values()
            if (not ids or container.uuid in ids) and passes(self._values(container))
        ]
        offset = body.get("group_member_offset", 0)
        page = found[offset : offset + body.get("group_member_count", _GROUP_MEMBERS)]
        now = now_usecs()
        rows = [
            {
                "entity_id": container.uuid,
                "data": [
                    {"name": name, "values": [{"time": now, "values": [value]}]}
                    for name, value in self._values(container).items()
                    if name in names
                ],
            }
            for container in page
        ]
        group = {
            "entity_results": rows,
            "group_by_column_value": "",
            "total_entity_count": len(found),
        }
        answer = {
            "entity_type": "storage_container",
            "filtered_entity_count": len(found),
            "filtered_group_count": 1,
            "total_entity_count": len(self._v3.world.containers),
            "total_group_count": 1,
            "group_results": [group],
        }
        return Reply(200, answer)

    def _values(self, container: Container) -> dict[str, str]:
        cluster = self._v3.world.clusters.get(container.cluster)
        return {
            "container_name": container.name,
            "name": container.name,
            "cluster": container.cluster,
            "cluster_uuid": container.cluster,
            "cluster_name": cluster.name if cluster is not None else "",
            "max_capacity": str(container.capacity),
            "is_internal": str(container.internal).lower(),
            "storage.user_capacity_bytes": str(container.capacity),
            "storage.user_usage_bytes": "0",
            "storage.user_free_bytes": str(container.capacity),
        }

    # Categories: those that VMs have

    def _categories(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"Environment": {"Production", "Testing"}}
        for vm in self._v3.world.vms.values():
            for name, value in vm.categories.items():
                found.setdefault(name, set()).add(value)
        return found

    async def list_categories(self, request: Request) -> Reply:
        """POST /categories/list."""
        body = check(request.json(), list_body("category"))
        keys = [_category(name) for name in sorted(self._categories())]
        return _simple_list("category", keys, body)

    async def list_category_values(self, request: Request, name: str) -> Reply:
        """POST /categories/{name}/list."""
        body = check(request.json(), list_body("category"))
        values = [_category_value(name, value) for value in sorted(self._values_of(name))]
        return _simple_list("category", values, body)

    async def get_category(self, request: Request, name: str) -> Reply:
        """GET /categories/{name}."""
        del request
        self._values_of(name)
        return Reply(200, {"api_version": API_VERSION, **_category(name)})

    async def get_category_value(self, request: Request, name: str, value: str) -> Reply:
        """GET /categories/{name}/{value}."""
        del request
        if value not in self._values_of(name):
            raise HttpError(404, f"the category {name}:{value} was not found", "not_found")
        return Reply(200, {"api_version": API_VERSION, **_category_value(name, value)})

    def _values_of(self, name: str) -> set[str]:
        found = self._categories().get(name)
        if found is None:
            raise HttpError(404, f"the category {name} was not found", "not_found")
        return found


def host_uuid(cluster: str, cvm: str) -> str:
    """The id of the host of a CVM: always the same."""
    return str(uuid5(NAMESPACE_URL, f"host:{cluster}:{cvm}"))


def _simple_list(kind: str, entities: list[Json], body: Json) -> Reply:
    offset, length = body.get("offset", 0), body.get("length", len(entities))
    page = entities[offset : offset + length]
    metadata = {"kind": kind, "total_matches": len(entities), "offset": offset, "length": len(page)}
    return Reply(200, {"api_version": API_VERSION, "metadata": metadata, "entities": page})


def _category(name: str) -> Json:
    return {"name": name, "description": "", "system_defined": name == "Environment"}


def _category_value(name: str, value: str) -> Json:
    return {
        "name": name,
        "value": value,
        "description": "",
        "system_defined": name == "Environment",
    }


def _describe(cluster: Cluster) -> Json:
    return {"name": cluster.name, "uuid": cluster.uuid}


def _describe_host(host: tuple[str, int, str, Cluster]) -> Json:
    return {"uuid": host[0], "name": f"{host[3].name}-host-{host[1]}", "cluster": host[3].uuid}


def _describe_subnet(subnet: Subnet) -> Json:
    return {
        "name": subnet.name,
        "uuid": subnet.uuid,
        "vlan_id": subnet.vlan,
        "subnet_type": "VLAN",
        "cluster_uuid": subnet.cluster,
    }
