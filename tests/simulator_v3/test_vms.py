# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs through v3: the envelope, its versions, declared changes, power, clones, lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import trio

from tests.limits import HANG_S
from tests.simulator_v3.lab_v3 import MIB, V3, Lab, running


async def _get(lab: Lab, uuid: str) -> Any:
    return await lab.v3(lab.pc, "GET", f"/vms/{uuid}", kind="vm_intent_response")


def _body(lab: Lab, **resources: Any) -> dict[str, Any]:
    spec = {
        "name": "made",
        "cluster_reference": {"kind": "cluster", "uuid": lab.cluster.uuid},
        "resources": {"num_sockets": 2, "memory_size_mib": 512, **resources},
    }
    return {"api_version": "3.1", "metadata": {"kind": "vm"}, "spec": spec}


async def test_a_vm_is_made_pending_and_then_complete(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        subnet = next(
            s for s in lab.simulator.world.subnets.values() if s.cluster == lab.cluster.uuid
        )
        disks = [{"disk_size_mib": 4}, {"device_properties": {"device_type": "CDROM"}}]
        nics = [{"subnet_reference": {"kind": "subnet", "uuid": subnet.uuid}}]
        lab.simulator.faults.add("task-slow", "CreateVm", value=0.2)
        body = _body(lab, disk_list=disks, nic_list=nics, boot_config={"boot_type": "UEFI"})
        made = await lab.v3(lab.pc, "POST", "/vms", body, "accepted_vm", 202)
        uuid = made["metadata"]["uuid"]
        assert made["metadata"]["spec_version"] == 0
        assert made["status"]["state"] == "PENDING"
        early = (await lab.pc.ask("GET", f"{V3}/vms/{uuid}")).json
        assert early["status"]["state"] == "PENDING"
        task = await lab.task(made)
        assert {"kind": "vm", "uuid": uuid, "name": "made"} in task["entity_reference_list"]
        found = await _get(lab, uuid)
        assert found["metadata"]["spec_version"] == 0
        resources = found["status"]["resources"]
        assert found["status"]["state"] == "COMPLETE"
        # A string in the answer to a POST, a list in the answer to a GET.
        assert found["status"]["execution_context"]["task_uuid"] == [task["uuid"]]
        assert resources["power_state"] == "OFF"
        assert resources["boot_config"]["boot_type"] == "UEFI"
        assert [d["device_properties"]["device_type"] for d in resources["disk_list"]] == [
            "DISK",
            "CDROM",
        ]
        assert resources["disk_list"][0]["disk_size_bytes"] == 4 * MIB
        assert resources["nic_list"][0]["mac_address"]


async def test_what_failed_is_told_as_an_error(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        lab.simulator.faults.add("task-failed", "CreateVm")
        made = await lab.v3(lab.pc, "POST", "/vms", _body(lab), "accepted_vm", 202)
        task = await lab.task(made, status="FAILED")
        assert task["error_detail"]
        found = (await lab.pc.ask("GET", f"{V3}/vms/{made['metadata']['uuid']}")).json
        assert found["status"]["state"] == "ERROR"
        assert found["status"]["message_list"]


async def test_a_put_needs_the_version_and_what_was_got_can_be_put_back(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        uuid = lab.vm.uuid
        found = await _get(lab, uuid)
        body = {name: found[name] for name in ("metadata", "spec")}
        body["spec"]["description"] = "changed"
        changed = await lab.v3(lab.pc, "PUT", f"/vms/{uuid}", body, "accepted_vm", 202)
        await lab.task(changed)
        again = await _get(lab, uuid)
        assert again["spec"]["description"] == "changed"
        assert again["metadata"]["spec_version"] == found["metadata"]["spec_version"] + 1
        assert again["spec"]["resources"]["disk_list"] == found["spec"]["resources"]["disk_list"]
        reason = "CONCURRENT_REQUESTS_NOT_ALLOWED"
        assert "spec_version mismatch" in await lab.refused(
            lab.pc, "PUT", f"/vms/{uuid}", body, 409, reason
        )
        del body["metadata"]["spec_version"]
        await lab.refused(lab.pc, "PUT", f"/vms/{uuid}", body, 422, "MISSING_ATTRIBUTE")


async def test_a_put_adds_removes_and_grows_disks_and_disconnects_a_nic(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        uuid = lab.vm.uuid
        found = await _get(lab, uuid)
        body = {name: found[name] for name in ("metadata", "spec")}
        resources = body["spec"]["resources"]
        first, second = [
            d for d in resources["disk_list"] if d["device_properties"]["device_type"] == "DISK"
        ]
        resources["disk_list"].remove(second)
        first |= {"disk_size_bytes": 32 * MIB, "disk_size_mib": 32}
        resources["disk_list"].append({"disk_size_mib": 2})
        resources["nic_list"][0]["is_connected"] = False
        await lab.task(await lab.v3(lab.pc, "PUT", f"/vms/{uuid}", body, "accepted_vm", 202))
        data = [disk for disk in lab.vm.disks if not disk.cdrom]
        assert [disk.size for disk in data] == [32 * MIB, 2 * MIB]
        assert not lab.vm.nics[0].connected
        assert lab.vm.nics[0].mac == resources["nic_list"][0]["mac_address"]
        found = await _get(lab, uuid)
        body = {name: found[name] for name in ("metadata", "spec")}
        body["spec"]["resources"]["disk_list"][0] |= {
            "disk_size_bytes": 1 * MIB,
            "disk_size_mib": 1,
        }
        await lab.refused(lab.pc, "PUT", f"/vms/{uuid}", body, 422, "INVALID_REQUEST")


async def test_power_declared_and_ordered(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        uuid = lab.vm.uuid
        chosen = str(uuid4())
        path, order = f"/vms/{uuid}/acpi_shutdown", {"task_uuid": chosen}
        for _ in range(2):  # the same task_uuid is the same task
            answer = await lab.v3(lab.pc, "POST", path, order, "procedural_response", 202)
            assert answer["task_uuid"] == chosen
            await lab.task(answer)
        with trio.fail_after(HANG_S):
            while (await _get(lab, uuid))["status"]["resources"]["power_state"] != "OFF":
                await trio.lowlevel.checkpoint()
        found = await _get(lab, uuid)
        body = {name: found[name] for name in ("metadata", "spec")}
        body["spec"]["resources"]["power_state"] = "ON"
        await lab.task(await lab.v3(lab.pc, "PUT", f"/vms/{uuid}", body, "accepted_vm", 202))
        assert lab.vm.power == "ON"
        await lab.refused(lab.pc, "POST", f"/vms/{uuid}/dance", {}, 404, "ENTITY_NOT_FOUND")


async def test_a_clone_has_the_bytes_and_other_ids(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        body = {"override_spec": {"name": "twin"}}
        answer = await lab.v3(
            lab.pc, "POST", f"/vms/{lab.vm.uuid}/clone", body, "procedural_response", 202
        )
        await lab.task(answer)
        twin = lab.simulator.vm("twin")
        storage = lab.simulator.core.storage
        for old, new in zip(lab.vm.disks, twin.disks, strict=True):
            assert old.uuid != new.uuid
            if old.backing and new.backing:
                assert (
                    storage.disk(old.backing).read_bytes() == storage.disk(new.backing).read_bytes()
                )
        deleted = await lab.v3(lab.pc, "DELETE", f"/vms/{twin.uuid}", kind="deleted", status=202)
        await lab.task(deleted)
        await lab.refused(lab.pc, "GET", f"/vms/{twin.uuid}", None, 404, "ENTITY_NOT_FOUND")


async def test_lists_have_pages_filters_and_an_order(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        for name in ("web-1", "web-2", "db-1"):
            body = _body(lab)
            body["spec"]["name"] = name
            await lab.task(await lab.v3(lab.pc, "POST", "/vms", body, "accepted_vm", 202))

        async def names(**body: Any) -> list[str]:
            page = await lab.v3(lab.pc, "POST", "/vms/list", body, "vm_list_intent_response")
            assert page["metadata"]["length"] == len(page["entities"])
            assert all("api_version" not in entity for entity in page["entities"])
            return [entity["status"]["name"] for entity in page["entities"]]

        assert len(await names()) == 4
        assert await names(filter="vm_name==web-1") == ["web-1"]
        assert await names(
            filter="vm_name==web-.*", sort_attribute="name", sort_order="DESCENDING"
        ) == ["web-2", "web-1"]
        assert await names(filter="vm_name==web-1,vm_name==db-1;power_state==ON") == ["web-1"]
        pages = [await names(kind="vm", offset=at, length=3) for at in (0, 3, 6)]
        assert [len(page) for page in pages] == [3, 1, 0]
        assert len({name for page in pages for name in page}) == 4


async def test_only_the_first_32_mib_of_a_disk_can_be_read(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        disk = next(d for d in lab.vm.disks if not d.cdrom)
        path = f"{V3}/vms/{lab.vm.uuid}/vm_disk/{disk.uuid}/data"
        await lab.simulator.guest(lab.vm.uuid).write(4096, b"hello")
        answer = await lab.pc.ask("GET", f"{path}?offset=4096&length=5")
        assert (answer.status, answer.body) == (200, b"hello")
        for query in (
            "offset=16777217&length=1",
            "offset=0&length=16777217",
            "offset=0",
            "offset=-1&length=1",
        ):
            assert (await lab.pc.ask("GET", f"{path}?{query}")).status == 422


async def test_bodies_that_are_wrong_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "MISSING_ATTRIBUTE"),
            (
                {"metadata": {"kind": "image"}, "spec": {"name": "x", "resources": {}}},
                "INVALID_REQUEST",
            ),
            (_body(lab, num_sockets="2"), "INVALID_REQUEST"),
            (_body(lab, num_sockets=True), "INVALID_REQUEST"),
            (_body(lab, machine_type="Q36"), "INVALID_REQUEST"),
            (_body(lab, colour="red"), "INVALID_REQUEST"),
            (_body(lab, disk_list=[{}]), "MISSING_ATTRIBUTE"),
            (_body(lab, nic_list=[{"uuid": str(uuid4())}]), "INVALID_REQUEST"),
            (_body(lab) | {"status": {}}, "INVALID_REQUEST"),
        ]
        for body, reason in cases:
            await lab.refused(lab.pc, "POST", "/vms", body, 422, reason)
        await lab.refused(lab.pc, "GET", "/vms/not-a-uuid", None, 422, "INVALID_UUID")
        await lab.refused(lab.pc, "GET", f"/vms/{uuid4()}", None, 404, "ENTITY_NOT_FOUND")
        await lab.refused(lab.pc, "POST", "/vms/list", {"length": 0}, 422, "INVALID_REQUEST")
        await lab.refused(
            lab.pc, "POST", "/vms/list", {"filter": "shoe==1"}, 422, "INVALID_REQUEST"
        )
