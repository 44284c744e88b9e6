# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups and images of v3: what is refused, what is read back, one upload and no more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.simulator_v3.lab_v3 import INITIATOR, MIB, SECRET, V3, Lab, digest, running


def _group(lab: Lab, **resources: Any) -> dict[str, Any]:
    spec = {
        "name": "VG one",
        "cluster_reference": {"kind": "cluster", "uuid": lab.cluster.uuid},
        "resources": resources,
    }
    return {"metadata": {"kind": "volume_group"}, "spec": spec}


def _container(lab: Lab) -> str:
    return next(
        c.uuid for c in lab.simulator.world.containers.values() if c.cluster == lab.cluster.uuid
    )


async def _get(lab: Lab, uuid: str) -> Any:
    return await lab.v3(
        lab.pc, "GET", f"/volume_groups/{uuid}", kind="volume_group_intent_response"
    )


async def test_a_blank_group_is_changed_and_put_back(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        disk = {"disk_size_mib": 4, "storage_container_uuid": _container(lab)}
        body = _group(
            lab, disk_list=[disk, disk], usage_type="TEMPORARY", created_by="drx-1a2b3c4d"
        )
        made = await lab.v3(lab.pc, "POST", "/volume_groups", body, "accepted_volume_group", 202)
        await lab.task(made)
        uuid = made["metadata"]["uuid"]
        found = await _get(lab, uuid)
        assert found["status"]["resources"]["size_bytes"] == 8 * MIB
        assert [d["index"] for d in found["status"]["resources"]["disk_list"]] == [0, 1]
        assert found["status"]["resources"]["iscsi_target_name"] == f"vg-one-{uuid}"
        body = {name: found[name] for name in ("metadata", "spec")}
        body["spec"]["resources"]["disk_list"] = [
            body["spec"]["resources"]["disk_list"][0],
            {**disk, "index": 7},
        ]
        body["spec"]["resources"]["attachment_list"] = [
            {"iscsi_initiator_name": INITIATOR, "client_secret": SECRET},
            {"vm_reference": {"kind": "vm", "uuid": lab.vm.uuid}},
        ]
        body["spec"]["name"] = "renamed"
        await lab.task(
            await lab.v3(
                lab.pc, "PUT", f"/volume_groups/{uuid}", body, "accepted_volume_group", 202
            )
        )
        found = await _get(lab, uuid)
        assert found["status"]["name"] == "renamed"
        assert [d["index"] for d in found["status"]["resources"]["disk_list"]] == [0, 7]
        assert len(found["status"]["resources"]["attachment_list"]) == 2
        assert SECRET not in str(found)
        await lab.refused(
            lab.pc, "PUT", f"/volume_groups/{uuid}", body, 409, "CONCURRENT_REQUESTS_NOT_ALLOWED"
        )
        # What was got can be put back: nothing of it is an unknown field, and the secret stays.
        body = {name: found[name] for name in ("metadata", "spec")}
        await lab.task(
            await lab.v3(
                lab.pc, "PUT", f"/volume_groups/{uuid}", body, "accepted_volume_group", 202
            )
        )
        [client] = lab.simulator.world.volume_groups[uuid].clients
        assert client.secret == SECRET
        listed = await lab.v3(
            lab.pc, "POST", "/volume_groups/list", {"filter": "name==ren.*"}, "volume_group_list"
        )
        assert listed["metadata"]["total_matches"] == 1


async def test_groups_that_are_wrong_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        container = _container(lab)
        here = lab.cluster.address
        cases: list[tuple[dict[str, Any], int, str]] = [
            (_group(lab, target_secret="short"), 422, "INVALID_REQUEST"),
            (_group(lab, disk_list=[{"index": 0}]), 422, "MISSING_ATTRIBUTE"),
            (_group(lab, disk_list=[{"disk_size_mib": 1}]), 422, "MISSING_ATTRIBUTE"),
            (
                _group(lab, disk_list=[{"data_source_reference": {"kind": "image"}}]),
                422,
                "MISSING_ATTRIBUTE",
            ),
            (
                _group(
                    lab,
                    disk_list=[{"data_source_reference": {"kind": "image", "uuid": str(uuid4())}}],
                ),
                404,
                "ENTITY_NOT_FOUND",
            ),
            (
                _group(
                    lab,
                    disk_list=[
                        {"data_source_reference": {"kind": "vm_disk", "url": "nfs://192.0.2.1/x"}}
                    ],
                ),
                422,
                "INVALID_REQUEST",
            ),
            (
                _group(
                    lab,
                    disk_list=[
                        {"data_source_reference": {"kind": "vm_disk", "url": f"nfs://{here}/x"}}
                    ],
                ),
                404,
                "ENTITY_NOT_FOUND",
            ),
            (
                _group(
                    lab,
                    disk_list=[
                        {"index": 1, "disk_size_mib": 1, "storage_container_uuid": container}
                    ]
                    * 2,
                ),
                422,
                "INVALID_REQUEST",
            ),
            (_group(lab, attachment_list=[{}]), 422, "INVALID_REQUEST"),
            (
                _group(
                    lab,
                    load_balance_vm_attachments=True,
                    attachment_list=[{"iscsi_initiator_name": INITIATOR}],
                ),
                422,
                "REQUEST_NOT_SUPPORTED",
            ),
        ]
        for body, status, reason in cases:
            await lab.refused(lab.pc, "POST", "/volume_groups", body, status, reason)
        assert not lab.simulator.world.volume_groups
        lab.simulator.core.knobs["v3_group_from_url"] = False
        lab.simulator.core.knobs["v3_group_from_path"] = False
        by_path = {"name": "vg", "disk_list": [{"clone_spec": {"ndfs_filepath": "/x"}}]}
        await lab.v2("POST", "/volume_groups", by_path, 422)
        url = {"kind": "vm_disk", "url": f"nfs://{here}/x"}
        body = _group(lab, disk_list=[{"data_source_reference": url}])
        await lab.refused(lab.pc, "POST", "/volume_groups", body, 422, "REQUEST_NOT_SUPPORTED")


async def test_a_group_that_is_made_by_halves_stays_to_be_found(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        lab.simulator.faults.add("half-created", "VolumeGroupCreate")
        disk = {"disk_size_mib": 4, "storage_container_uuid": _container(lab)}
        made = await lab.v3(
            lab.pc,
            "POST",
            "/volume_groups",
            _group(lab, disk_list=[disk]),
            "accepted_volume_group",
            202,
        )
        await lab.task(made, status="FAILED")
        listed = await lab.v3(lab.pc, "POST", "/volume_groups/list", {}, "volume_group_list")
        assert [e["metadata"]["uuid"] for e in listed["entities"]] == [made["metadata"]["uuid"]]


async def test_an_upload_is_checked_and_is_the_only_one(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        placed = [{"kind": "cluster", "uuid": lab.cluster.uuid}]
        resources = {"image_type": "DISK_IMAGE", "initial_placement_ref_list": placed}
        spec = {"name": "img", "resources": resources}
        body: dict[str, Any] = {"metadata": {"kind": "image"}, "spec": spec}
        made = await lab.v3(lab.pc, "POST", "/images", body, "accepted_image", 202)
        await lab.task(made)
        uuid = made["metadata"]["uuid"]
        found = await lab.v3(lab.pc, "GET", f"/images/{uuid}", kind="image_intent_response")
        assert "size_bytes" not in found["status"]["resources"]
        path, data = f"{V3}/images/{uuid}/file", os.urandom(3 * MIB)
        raw = {"Content-Type": "application/octet-stream"}
        wrong = {**raw, "X-Nutanix-Checksum-Type": "SHA_256", "X-Nutanix-Checksum-Bytes": "0" * 64}
        right = {**wrong, "X-Nutanix-Checksum-Bytes": digest(data)}
        assert (await lab.pc.ask("PUT", path, data, wrong)).status == 422
        assert (
            await lab.pc.ask("PUT", path, data, {"Content-Type": "application/json"})
        ).status == 415
        half = {**raw, "X-Nutanix-Checksum-Type": "SHA_256"}
        assert (await lab.pc.ask("PUT", path, data, half)).status == 422
        assert (await lab.pc.ask("PUT", path, data, right)).status == 200
        again = await lab.pc.ask("PUT", path, data, right)
        assert (again.status, again.json["message_list"][0]["reason"]) == (
            422,
            "ENTITY_ALREADY_EXISTS",
        )
        found = await lab.v3(lab.pc, "GET", f"/images/{uuid}", kind="image_intent_response")
        assert found["status"]["resources"]["size_bytes"] == len(data)
        assert found["status"]["resources"]["retrieval_uri_list"]
        # Range is ignored: all of it, with 200.
        whole = await lab.pc.ask("GET", path, headers={"Range": "bytes=0-9"})
        assert (whole.status, digest(whole.body)) == (200, digest(data))
        body = {name: found[name] for name in ("metadata", "spec")}
        body["spec"]["name"] = "renamed"
        await lab.task(await lab.v3(lab.pc, "PUT", f"/images/{uuid}", body, "accepted_image", 202))
        listed = await lab.v3(
            lab.pc, "POST", "/images/list", {"filter": "name==renamed"}, "image_list"
        )
        assert listed["metadata"]["total_matches"] == 1


async def test_a_vm_is_restored_from_an_image(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        disk = next(d for d in lab.vm.disks if not d.cdrom)
        source = {"kind": "vm_disk", "uuid": disk.uuid}
        resources: dict[str, Any] = {"image_type": "DISK_IMAGE", "data_source_reference": source}
        body = {"metadata": {"kind": "image"}, "spec": {"name": "img", "resources": resources}}
        made = await lab.v3(lab.pc, "POST", "/images", body, "accepted_image", 202)
        await lab.task(made)
        image = {"kind": "image", "uuid": made["metadata"]["uuid"]}
        spec = {
            "name": "app01-restored",
            "cluster_reference": {"kind": "cluster", "uuid": lab.cluster.uuid},
            "resources": {"power_state": "ON", "disk_list": [{"data_source_reference": image}]},
        }
        made = await lab.v3(
            lab.pc, "POST", "/vms", {"metadata": {"kind": "vm"}, "spec": spec}, "accepted_vm", 202
        )
        await lab.task(made)
        found = await lab.v3(
            lab.pc, "GET", f"/vms/{made['metadata']['uuid']}", kind="vm_intent_response"
        )
        assert found["status"]["resources"]["power_state"] == "ON"
        assert found["status"]["resources"]["disk_list"][0]["data_source_reference"] == image
        storage = lab.simulator.core.storage
        new = lab.simulator.vm("app01-restored").disks[0].backing
        assert new is not None
        assert disk.backing is not None
        assert storage.disk(new).read_bytes() == storage.disk(disk.backing).read_bytes()


async def test_images_that_are_wrong_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        for resources, reason in (
            ({"source_uri": "ftp://x/y"}, "INVALID_REQUEST"),
            ({"source_uri": "nfs://192.0.2.1/x"}, "INVALID_REQUEST"),
            (
                {"source_uri": "http://x/y", "data_source_reference": {"kind": "image"}},
                "INVALID_REQUEST",
            ),
            ({"image_type": "ISO"}, "INVALID_REQUEST"),
            ({"checksum": {"checksum_algorithm": "SHA_1"}}, "MISSING_ATTRIBUTE"),
        ):
            body = {"metadata": {"kind": "image"}, "spec": {"name": "img", "resources": resources}}
            await lab.refused(lab.pc, "POST", "/images", body, 422, reason)
        lab.simulator.core.knobs["v3_image_from_nfs"] = False
        resources = {"source_uri": f"nfs://{lab.cluster.address}/x"}
        body = {"metadata": {"kind": "image"}, "spec": {"name": "img", "resources": resources}}
        await lab.refused(lab.pc, "POST", "/images", body, 422, "REQUEST_NOT_SUPPORTED")
