# SPDX-License-Identifier: AGPL-3.0-or-later
"""Clusters, containers, subnets, tasks, categories, users, roles: what v4 tells of them."""

from __future__ import annotations

from pathlib import Path

from replicator.simulator.v4.routes import render_error
from replicator.simulator.web import HttpError, Request
from tests.simulator_v4 import lab
from tests.simulator_v4.lab import asker

CLUSTERS = "/api/clustermgmt/v4.0/config/clusters"
CONTAINERS = "/api/clustermgmt/v4.0/config/storage-containers"
SUBNETS = "/api/networking/v4.0/config/subnets"
IAM = "/api/iam/v4.0/auth"


async def test_clusters(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        function = "config/clusterFunction/any(t:t eq Clustermgmt.Config.ClusterFunctionRef'{}')"
        real = (await ask("GET", CLUSTERS, filter=function.format("AOS"), orderby="name")).data
        assert [cluster["name"] for cluster in real] == ["cluster-a", "cluster-b"]
        network = real[0]["network"]
        assert network["externalDataServiceIp"]["ipv4"]["value"] == "127.9.9.21"
        assert "externalDataServiceIp" not in real[1]["network"]
        assert real[0]["nodes"]["nodeList"][1]["controllerVmIp"]["ipv4"]["value"] == "127.9.9.32"
        central = (await ask("GET", CLUSTERS, filter=function.format("PRISM_CENTRAL"))).data
        assert [cluster["extId"] for cluster in central] == [lab.CENTRAL]
        assert (await ask("GET", f"{CLUSTERS}/{lab.CLUSTER_A}")).data["config"]["isAvailable"]
        managers = (await ask("GET", "/api/prism/v4.0/config/domain-managers")).data
        assert managers[0]["extId"] == lab.CENTRAL


async def test_containers(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        text = f"clusterExtId eq '{lab.CLUSTER_A}' and startswith(name,'default')"
        found = (await ask("GET", CONTAINERS, filter=text)).data
        assert [(each["extId"], each["containerExtId"]) for each in found] == [
            (lab.CONTAINER_A,) * 2
        ]
        body = {"name": "fast", "clusterExtId": lab.CLUSTER_A}
        task = await ask.done(await ask("POST", CONTAINERS, body))
        path = f"{CONTAINERS}/{lab.entity(task, 'clustermgmt:config:storage-containers')}"
        assert (await ask("POST", CONTAINERS, body)).status == 409
        renamed = {**body, "name": "faster"}
        await ask.done(await ask("PUT", path, renamed, match=await ask.tag(path)))
        await ask.done(await ask("DELETE", path, match=await ask.tag(path)))
        used = f"{CONTAINERS}/{lab.CONTAINER_A}"
        assert (await ask("DELETE", used, match=await ask.tag(used))).status == 409


async def test_subnets(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        found = (await ask("GET", SUBNETS, filter="name eq 'vlan10' and isExternal eq false")).data
        assert [each["networkId"] for each in found] == [10]
        body = {
            "name": "new",
            "subnetType": "VLAN",
            "networkId": 5,
            "clusterReference": lab.CLUSTER_A,
        }
        task = await ask.done(await ask("POST", SUBNETS, body))
        path = f"{SUBNETS}/{lab.entity(task, 'networking:config:subnet')}"
        await ask.done(await ask("DELETE", path, match=await ask.tag(path)))
        used = f"{SUBNETS}/{lab.VLAN10}"
        assert (await ask("DELETE", used, match=await ask.tag(used))).code == "NET-40901"


async def test_tasks(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        tasks = "/api/prism/v4.2/config/tasks"
        text = "status eq Prism.Config.TaskStatus'SUCCEEDED' and operation eq 'CreateRecoveryPoint'"
        found = (await ask("GET", tasks, filter=text)).data
        assert len(found) == 1
        details = {pair["name"]: pair["value"] for pair in found[0]["completionDetails"]}
        assert details == {"recoveryPointExtId": point["extId"]}
        assert found[0]["ownedBy"]["name"] == "admin"
        entities = (await ask("GET", f"{tasks}/{found[0]['extId']}/affected-entities")).data
        assert "vmm:ahv:config:vm" in {each["rel"] for each in entities}
        assert (await ask("POST", f"{tasks}/{found[0]['extId']}/$actions/cancel")).status == 400
        bare = found[0]["extId"].partition(":")[2]
        assert (await ask("GET", f"{tasks}/{bare}")).status == 404
        ask.core.faults.add("task-not-found")
        path = f"{tasks}/{found[0]['extId']}"
        assert [(await ask("GET", path)).status for _ in range(2)] == [404, 200]


async def test_categories(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = "/api/prism/v4.0/config/categories"
        body = {"key": "Tier", "value": "Gold"}
        made = await ask("POST", path, body)
        assert (made.status, made.data["key"]) == (201, "Tier")
        assert (await ask("POST", path, body)).status == 409
        assert (await ask("POST", path, {"key": "a/b", "value": "c"})).code == "SCHEMA"
        uuid = made.data["extId"]
        vm = f"/api/vmm/v4.0/ahv/config/vms/{lab.APP}"
        params = {"categories": [{"extId": uuid}]}
        associate = vm + "/$actions/associate-categories"
        await ask.done(await ask("POST", associate, params, match=await ask.tag(vm)))
        assert (await ask("GET", vm)).data["categories"][0]["extId"] == uuid
        assert (await ask("DELETE", f"{path}/{uuid}")).status == 409
        disassociate = vm + "/$actions/disassociate-categories"
        await ask.done(await ask("POST", disassociate, params, match=await ask.tag(vm)))
        assert (await ask("DELETE", f"{path}/{uuid}")).status == 204
        built_in = (await ask("GET", path, filter="key eq 'Environment'")).data[0]["extId"]
        assert (await ask("DELETE", f"{path}/{built_in}")).status == 403


async def test_who_may_do_what(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        user = (await ask("GET", IAM + "n/users", filter="username eq 'looker'")).data[0]
        policies = (await ask("GET", IAM + "z/authorization-policies")).data
        mine = next(
            each
            for each in policies
            if user["extId"] in each["identities"][0]["identityFilter"]["user"]["uuid"]["anyof"]
        )
        role = (await ask("GET", f"{IAM}z/roles/{mine['role']}")).data
        assert role["displayName"] == "Prism Viewer"
        operations: dict[str, str] = {}
        for page in range(2):
            rows = (await ask("GET", IAM + "z/operations", limit=50, page=page)).data
            operations |= {each["extId"]: each["displayName"] for each in rows}
        names = {operations[uuid] for uuid in role["operations"]}
        assert "View_Cluster" in names
        assert "Create_Volume_Group" not in names
        # Every endpoint asks for a permission that there is, or for none.
        routes = [route for _, route in ask.routers["pc"]._routes]
        assert {route.permission for route in routes} - {None} <= set(operations.values())


async def test_roles_and_service_accounts(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        text = "startswith(displayName, 'Create_Recovery')"
        create = (await ask("GET", IAM + "z/operations", filter=text)).data[0]
        body = {"displayName": "DR Operator", "operations": [create["extId"]]}
        role = (await ask("POST", IAM + "z/roles", body)).data
        assert (await ask("POST", IAM + "z/roles", {**body, "operations": [lab.APP]})).status == 404
        account = {"username": "svc-dr", "userType": "SERVICE_ACCOUNT"}
        made = await ask("POST", IAM + "n/users", account)
        assert made.status == 201
        keys = f"{IAM}n/users/{made.data['extId']}/keys"
        key = (await ask("POST", keys, {"name": "k", "keyType": "API_KEY"})).data
        secret = key["keyDetails"]["apiKey"]
        assert secret in ask.core.world.users[made.data["extId"]].keys.values()
        assert secret not in str((await ask("GET", keys)).json)
        policy = {
            "displayName": "dr",
            "role": role["extId"],
            "identities": [{"identityFilter": {"user": {"uuid": {"anyof": [made.data["extId"]]}}}}],
        }
        assert (await ask("POST", IAM + "z/authorization-policies", policy)).status == 201
        assert ask.core.world.users[made.data["extId"]].role == role["extId"]
        shown = (await ask("GET", f"{keys}/{key['extId']}")).data
        assert (shown["name"], "keyDetails" in shown) == ("k", False)
        path = f"{IAM}z/roles/{role['extId']}"
        renamed = {**body, "displayName": "DR Operators"}
        assert (await ask("PUT", path, renamed)).status == 428
        assert (await ask("PUT", path, renamed, match=await ask.tag(path))).status == 200
        assert (await ask("GET", path)).data["displayName"] == "DR Operators"
        assert (await ask("DELETE", path, match=await ask.tag(path))).status == 409
        assert (await ask("DELETE", f"{keys}/{key['extId']}")).status == 204
        listed = (await ask("GET", IAM + "z/authorization-policies")).data
        given = next(each for each in listed if each["role"] == role["extId"])
        away = f"{IAM}z/authorization-policies/{given['extId']}"
        assert (await ask("DELETE", away, match=await ask.tag(away))).status == 204
        assert (await ask("DELETE", path, match=await ask.tag(path))).status == 204


def test_errors_are_told_in_v4s_form(tmp_path: Path) -> None:
    del tmp_path
    user = next(iter(lab.make_world().users.values()))
    request = Request("GET", "/api/volumes/v4.2/config/x", {}, {}, b"", None, user, lab.BASE)
    error = HttpError(403, "no", "forbidden", "View_Volume_Group_Details")
    reply = render_error(request, error)
    told = reply.body["data"]
    assert reply.status == 403
    assert told["$objectType"] == "volumes.v4.error.ErrorResponse"
    assert told["$errorItemDiscriminator"] == "List<volumes.v4.error.AppMessage>"
    assert told["error"][0]["argumentsMap"] == {"permission": "View_Volume_Group_Details"}
    assert told["error"][0]["$reserved"] == {"$fv": "v4.r2"}
    assert reply.body["metadata"]["flags"][0]["value"] is True
    limited = render_error(request, HttpError(429, "slow", "rate_limit"))
    assert limited.body["data"]["error"][0]["errorGroup"] == "RATE_LIMIT_EXCEEDED"
