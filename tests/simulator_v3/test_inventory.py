# SPDX-License-Identifier: AGPL-3.0-or-later
"""What v3 tells of clusters, networks, containers, accounts and tasks; v2.0's view of the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio

from replicator.simulator.scenario import ClusterSpec
from tests.limits import HANG_S
from tests.simulator_v3.lab_v3 import V3, Client, running


async def test_clusters_are_listed_with_their_addresses_and_prism_central_among_them(
    tmp_path: Path,
) -> None:
    clusters = [ClusterSpec(name="cluster-a"), ClusterSpec(name="cluster-b", data_services=False)]
    async with running(tmp_path, clusters=clusters) as lab:
        page = await lab.v3(lab.pc, "POST", "/clusters/list", {}, "cluster_list")
        assert page["metadata"] == {"kind": "cluster", "total_matches": 3}  # no more than that
        services = {
            e["status"]["name"]: (
                e["status"]["resources"]["config"]["service_list"],
                e["status"]["resources"]["network"].get("external_data_services_ip"),
            )
            for e in page["entities"]
        }
        assert services["cluster-a"] == (["AOS"], lab.cluster.data_services)
        assert services["cluster-b"] == (["AOS"], None)
        assert services["prism-central"][0] == ["PRISM_CENTRAL"]
        one = await lab.v3(
            lab.pc, "GET", f"/clusters/{lab.cluster.uuid}", kind="cluster_intent_response"
        )
        assert one["status"]["resources"]["network"]["external_ip"] == lab.cluster.address
        await lab.v3(lab.pc, "POST", "/hosts/list", {"kind": "host"}, "host_list")
        await lab.v3(lab.pc, "GET", "/prism_central", kind="prism_central")
        versions = await lab.v3(lab.pc, "GET", "/versions", kind="versions")
        assert versions["major_version"] == "3"


async def test_subnets_containers_and_categories(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        subnets = await lab.v3(
            lab.pc, "POST", "/subnets/list", {"filter": "name==vlan10"}, "subnet_list"
        )
        assert len(subnets["entities"]) == 2
        uuid = subnets["entities"][0]["metadata"]["uuid"]
        await lab.v3(lab.pc, "GET", f"/subnets/{uuid}", kind="subnet_intent_response")
        body = {
            "entity_type": "storage_container",
            "group_member_attributes": [{"attribute": "container_name"}, {"attribute": "cluster"}],
            "group_member_count": 3,
        }
        groups = await lab.v3(lab.pc, "POST", "/groups", body, "groups_response")
        [group] = groups["group_results"]
        assert (group["total_entity_count"], len(group["entity_results"])) == (4, 3)
        assert [d["name"] for d in group["entity_results"][0]["data"]] == [
            "container_name",
            "cluster",
        ]
        body["group_member_attributes"] = [{"attribute": "shoe_size"}]
        await lab.refused(lab.pc, "POST", "/groups", body, 422, "INVALID_ARGUMENT")
        lab.vm.categories["App"] = "Web"
        await lab.v3(lab.pc, "POST", "/categories/list", {"kind": "category"}, "category_list")
        values = await lab.v3(lab.pc, "POST", "/categories/App/list", {}, "category_value_list")
        assert [v["value"] for v in values["entities"]] == ["Web"]
        await lab.v3(lab.pc, "GET", "/categories/App", kind="category_key_status")
        await lab.v3(lab.pc, "GET", "/categories/App/Web", kind="category_value_status")
        await lab.refused(lab.pc, "GET", "/categories/App/Db", None, 404, "ENTITY_NOT_FOUND")


@pytest.mark.parametrize(
    ("name", "role"), [("admin", None), ("viewer", "Prism Viewer"), ("backup", "Backup Admin")]
)
async def test_who_am_i_and_what_may_i(tmp_path: Path, name: str, role: str | None) -> None:
    async with running(tmp_path) as lab, Client(lab.simulator, name) as client:
        me = await lab.v3(client, "GET", "/users/me", kind="user_intent_response")
        assert me["status"]["name"] == name
        info = await lab.v3(client, "GET", "/users/info", kind="user_info")
        roles = [each["role"]["name"] for each in info["access_control_policy_list"]]
        # The local admin has no policy at all, and all rights.
        assert roles == ([role] if role is not None else [])
        made = await client.ask("POST", f"{V3}/volume_groups", {})
        assert made.status == (403 if name == "viewer" else 422)
        if name == "viewer":
            [message] = made.json["message_list"]
            assert message["reason"] == "ACCESS_DENIED"
            assert message["details"] == {"permission": "Create_Volume_Group"}


async def test_roles_policies_users_and_permissions_fit_together(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        policies = await lab.v3(lab.pc, "POST", "/access_control_policies/list", {}, "acp_list")
        roles = await lab.v3(lab.pc, "POST", "/roles/list", {}, "role_list")
        permissions = await lab.v3(
            lab.pc, "POST", "/permissions/list", {"length": 500}, "permission_list"
        )
        users = await lab.v3(lab.pc, "POST", "/users/list", {}, "user_list")
        known = {e["metadata"]["uuid"] for e in permissions["entities"]}
        for each in roles["entities"]:
            held = each["status"]["resources"]["permission_reference_list"]
            assert {reference["uuid"] for reference in held} <= known
        by_id = {
            e["metadata"]["uuid"]: e["status"]["name"]
            for e in [*roles["entities"], *users["entities"]]
        }
        pairs = {
            by_id[e["status"]["resources"]["user_reference_list"][0]["uuid"]]: by_id[
                e["status"]["resources"]["role_reference"]["uuid"]
            ]
            for e in policies["entities"]
        }
        assert pairs["backup"] == "Backup Admin"
        for path, listed in (
            ("access_control_policies", policies),
            ("roles", roles),
            ("users", users),
        ):
            uuid = listed["entities"][0]["metadata"]["uuid"]
            assert (await lab.pc.ask("GET", f"{V3}/{path}/{uuid}")).json["metadata"]["uuid"] == uuid
        uuid = permissions["entities"][0]["metadata"]["uuid"]
        assert (await lab.pc.ask("GET", f"{V3}/permissions/{uuid}")).status == 200


async def test_tasks_are_waited_for_listed_and_aborted(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        path = f"/vms/{lab.vm.uuid}/reset"
        lab.simulator.faults.add("task-stuck", "VmPower")
        stuck = (await lab.v3(lab.pc, "POST", path, {}, "procedural_response", 202))["task_uuid"]
        body: dict[str, Any] = {"poll_timeout_seconds": 0, "task_uuid_list": [stuck]}
        polled = await lab.v3(lab.pc, "POST", "/tasks/poll", body, "task_poll_response")
        assert polled["has_poll_timed_out"]
        other = (await lab.v3(lab.pc, "POST", path, {}, "procedural_response", 202))["task_uuid"]
        body = {"poll_timeout_seconds": 30, "task_uuid_list": [stuck, other]}
        with trio.fail_after(HANG_S):
            polled = await lab.v3(lab.pc, "POST", "/tasks/poll", body, "task_poll_response")
        assert not polled["has_poll_timed_out"]
        assert {t["uuid"]: t["status"] for t in polled["entities"]} == {
            stuck: "RUNNING",
            other: "SUCCEEDED",
        }
        await lab.v3(lab.pc, "POST", f"/tasks/{stuck}/abort", {}, "empty")
        assert (await lab.v3(lab.pc, "GET", f"/tasks/{stuck}", kind="task"))["status"] == "ABORTED"
        await lab.refused(lab.pc, "POST", f"/tasks/{stuck}/abort", {}, 422, "REQUEST_NOT_SUPPORTED")
        listed = await lab.v3(
            lab.pc, "POST", "/tasks/list", {"filter": "status==SUCCEEDED"}, "task_list"
        )
        assert other in [t["uuid"] for t in listed["entities"]]
        await lab.refused(lab.pc, "GET", f"/tasks/{uuid4()}", None, 404, "ENTITY_NOT_FOUND")
        too_long = {"poll_timeout_seconds": 31, "task_uuid_list": []}
        await lab.refused(lab.pc, "POST", "/tasks/poll", too_long, 422, "INVALID_REQUEST")


async def test_v2_joins_disks_of_v3_by_device_bus_and_index(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        v3 = await lab.v3(lab.pc, "GET", f"/vms/{lab.vm.uuid}", kind="vm_intent_response")
        for base in ("/PrismGateway/services/rest/v2.0", "/api/nutanix/v2.0"):
            path = (
                f"{base}/vms/{lab.vm.uuid}?include_vm_disk_config=true&include_vm_nic_config=true"
            )
            config = (await lab.pe.ask("GET", path)).json
            joined = {
                d["disk_address"]["device_uuid"]: d["disk_address"]["disk_label"]
                for d in config["vm_disk_info"]
            }
            for each in v3["status"]["resources"]["disk_list"]:
                address = each["device_properties"]["disk_address"]
                label = f"{address['adapter_type'].lower()}.{address['device_index']}"
                assert joined[each["uuid"]] == label
        assert "vm_disk_info" not in await lab.v2("GET", f"/vms/{lab.vm.uuid}")
        cluster = await lab.v2("GET", "/cluster")
        assert cluster["cluster_external_data_services_ipaddress"] == lab.cluster.data_services
        power = {"transition": "OFF"}
        await lab.task(
            await lab.v2("POST", f"/vms/{lab.vm.uuid}/set_power_state", power, 201), lab.pe
        )
        assert lab.vm.power == "OFF"
        error = await lab.v2(
            "POST", f"/vms/{lab.vm.uuid}/set_power_state", {"transition": "JUMP"}, 422
        )
        assert error["error_code"]["code"]
        other = lab.simulator.cluster("cluster-b").address
        async with Client(lab.simulator, host=other) as elsewhere:
            path = f"/PrismGateway/services/rest/v2.0/vms/{lab.vm.uuid}"
            assert (await elsewhere.ask("GET", path)).status == 404


async def test_faults_of_the_transport_look_like_v3(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        lab.simulator.faults.add("rate-limit", "/vms/list", value=7)
        answer = await lab.pc.ask("POST", f"{V3}/vms/list", {})
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert answer.json["message_list"][0]["reason"] == "TOO_MANY_REQUESTS"
        lab.simulator.faults.add("server-error", "/vms/list", value=503)
        await lab.refused(lab.pc, "POST", "/vms/list", {}, 503, "SERVICE_UNAVAILABLE")
        lab.simulator.faults.add("unauthorized", "/vms/list")
        answer = await lab.pc.ask("POST", f"{V3}/vms/list", {})
        assert answer.status == 401
        assert b"<html" in answer.body.lower()
        assert (await lab.pc.ask("POST", f"{V3}/vms/list", b"{")).status == 400
