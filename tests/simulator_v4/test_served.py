# SPDX-License-Identifier: AGPL-3.0-or-later
"""What only a whole simulator shows: v4 behind real connections, accounts and their permissions."""

from __future__ import annotations

from pathlib import Path

from tests.simulator.lab import Client, small_simulator

CONTENT = (
    "/api/dataprotection/v4.0/content/recovery-points/{0}/vm-recovery-points/{0}"
    "/disk-recovery-points/{0}/$actions/compute-changed-regions"
).format("11111111-1111-4111-8111-111111111111")


async def test_an_element_answers_content_only_and_wants_a_cookie(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        element = simulator.cluster("cluster-a").address
        async with Client(simulator, "admin", element) as client:
            assert (await client.ask("POST", CONTENT, {})).status == 403
            assert (await client.ask("GET", "/api/vmm/v4.0/ahv/config/vms")).status == 404
            assert (await client.ask("OPTIONS", "/api/vmm/unversioned/info")).status == 404
        async with Client(simulator, None, element) as client:
            bearer = {"Authorization": "Bearer a.b.c"}
            assert (await client.ask("POST", CONTENT, {}, bearer)).status == 403
            assert (await client.ask("POST", CONTENT, {})).status == 401


async def test_a_viewer_may_look_and_no_more(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator, "viewer") as client:
        groups = "/api/volumes/v4.0/config/volume-groups"
        assert (await client.ask("GET", groups + "?%24limit=1")).status == 200
        refused = await client.ask("POST", groups, {"name": "x"})
        assert refused.status == 403
        error = refused.json["data"]["error"][0]
        assert error["errorGroup"] == "FORBIDDEN"
        assert error["argumentsMap"] == {"permission": "Create_Volume_Group"}
        assert (await client.ask("GET", groups + "?%24limit=101")).json["data"]["error"][0]
        assert (await client.ask("GET", "/api/volumes/v4.9/config/volume-groups")).status == 404


async def test_the_account_of_a_backup_may_do_what_a_backup_does(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator, "backup") as client:
        vm = simulator.vm("app01").uuid
        body = {"name": "x", "vmRecoveryPoints": [{"vmExtId": vm}]}
        made = await client.ask(
            "POST",
            "/api/dataprotection/v4.0/config/recovery-points",
            body,
            {"NTNX-Request-Id": "one"},
        )
        assert made.status == 202
        task = made.json["metadata"]["links"][0]["href"].partition(":9440")[2]
        assert (await client.ask("GET", task)).json["data"]["ownedBy"]["name"] == "backup"
        roles = {"displayName": "mine"}
        assert (await client.ask("POST", "/api/iam/v4.0/authz/roles", roles)).status == 403
