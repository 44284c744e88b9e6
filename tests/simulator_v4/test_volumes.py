# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups as v4 has them, without anybody who logs in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.simulator_v4 import lab
from tests.simulator_v4.lab import DATA_DISK, MIB, Asker, asker, disk_points, entity

GROUPS = "/api/volumes/v4.0/config/volume-groups"
INITIATOR = "iqn.2026-01.org.example:dr-service-01"


def _group(**more: Any) -> dict[str, Any]:
    return {"name": "drx-1", "clusterReference": lab.CLUSTER_A, **more}


def _source(kind: str, uuid: str, **more: Any) -> dict[str, Any]:
    return {"diskDataSourceReference": {"extId": uuid, "entityType": kind}, **more}


async def _make(ask: Asker, **more: Any) -> str:
    task = await ask.done(await ask("POST", GROUPS, _group(**more)))
    return f"{GROUPS}/{entity(task, 'volumes:config:volume-group')}"


async def test_disks_from_everywhere(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        path = await _make(
            ask, disks=[_source("DISK_RECOVERY_POINT", disk_points(point)[DATA_DISK])]
        )
        group = (await ask("GET", path)).data
        assert group["targetName"] == f"drx-1-{group['extId']}"
        blank = _source("STORAGE_CONTAINER", lab.CONTAINER_A, diskSizeBytes=MIB)
        for body in (blank, _source("VM_DISK", DATA_DISK, index=7, diskSizeBytes=4 * MIB)):
            await ask.done(await ask("POST", path + "/disks", body))
        disks = (await ask("GET", path + "/disks", orderby="index")).data
        assert [(d["index"], d["diskSizeBytes"]) for d in disks] == [
            (0, 2 * MIB),
            (1, MIB),
            (7, 4 * MIB),
        ]
        copy = _source("VOLUME_DISK", disks[0]["extId"])
        await ask.done(await ask("POST", path + "/disks", copy))
        newest = (await ask("GET", path + "/disks", filter="index eq 2")).data[0]
        read = ask.core.storage.group_disk(newest["extId"]).read_bytes()
        assert read == ask.core.storage.snapshot(disk_points(point)[DATA_DISK]).read_bytes()
        await ask.done(await ask("DELETE", f"{path}/disks/{newest['extId']}"))
        assert (await ask("GET", f"{path}/disks/{newest['extId']}")).status == 404
        await ask.done(await ask("DELETE", path, match=await ask.tag(path)))
        assert not list((tmp_path / "groups").iterdir())


@pytest.mark.parametrize(
    ("disk", "status"),
    [
        ({}, 400),
        (_source("IMAGE", DATA_DISK), 400),
        (_source("DISK", DATA_DISK), 400),
        (_source("STORAGE_CONTAINER", lab.CONTAINER_A), 400),
        (_source("STORAGE_CONTAINER", lab.CONTAINER_A, diskSizeBytes=512), 400),
        (_source("STORAGE_CONTAINER", lab.CONTAINER_B, diskSizeBytes=MIB), 422),
        (_source("STORAGE_CONTAINER", lab.APP, diskSizeBytes=MIB), 404),
        (_source("VM_DISK", lab.APP), 404),
        (_source("VM_DISK", DATA_DISK, diskSizeBytes=MIB), 422),
        (_source("VM_DISK", DATA_DISK, index=16384), 400),
        (_source("VOLUME_DISK", lab.APP), 404),
        (_source("DISK_RECOVERY_POINT", lab.APP), 404),
    ],
)
async def test_disks_that_cannot_be(tmp_path: Path, disk: dict[str, Any], status: int) -> None:
    async with asker(tmp_path) as ask:
        path = await _make(ask)
        assert (await ask("POST", path + "/disks", disk)).status == status
        assert (await ask("POST", GROUPS, _group(name="drx-2", disks=[disk]))).status == status
        assert len(ask.core.world.volume_groups) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": None},
        {"clusterReference": None},
        {"clusterReference": "cluster-a"},
        {"targetPrefix": "with_underscore"},
        {"targetName": "short"},
        {"enabledAuthentications": "CHAP"},
        {"enabledAuthentications": "KERBEROS"},
        {"enabledAuthentications": "NONE", "iscsiFeatures": {"enabledAuthentications": "CHAP"}},
        {"iscsiFeatures": {"targetSecret": "elevenchars"}},
        {"iscsiFeatures": {"targetSecret": "seventeen-letters"}},
        {"usageType": "LOAN"},
        {"createdBy": "x" * 513},
    ],
)
async def test_groups_that_cannot_be(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async with asker(tmp_path) as ask:
        assert (await ask("POST", GROUPS, _group(**wrong))).status == 400


async def test_who_may_log_in(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        features = {"targetSecret": "Tq8sN2vLx5Rz", "enabledAuthentications": "CHAP"}
        path = await _make(ask, iscsiFeatures=features, targetPrefix="drx-7")
        attach = path + "/$actions/attach-iscsi-client"
        client = {"iscsiInitiatorName": INITIATOR, "clientSecret": "Zb7mW4kPq9Xy"}
        assert (await ask("POST", attach, client)).status == 428
        for wrong in (
            {},
            {"iscsiInitiatorName": "x" * 65},
            {"iscsiInitiatorName": INITIATOR, "clientSecret": "short"},
            {"iscsiInitiatorName": INITIATOR, "numVirtualTargets": 33},
            {**client, "iscsiInitiatorNetworkId": {"ipv4": {"value": "127.0.0.1"}}},
        ):
            assert (await ask("POST", attach, wrong, match=await ask.tag(path))).status == 400
        await ask.done(await ask("POST", attach, client, match=await ask.tag(path)))
        assert (await ask("POST", attach, client, match=await ask.tag(path))).status == 409

        attachment = (await ask("GET", path + "/external-iscsi-attachments")).data[0]
        found = (
            await ask("GET", f"/api/volumes/v4.0/config/iscsi-clients/{attachment['extId']}")
        ).data
        target = (await ask("GET", path)).data["targetName"]
        assert target.startswith("drx-7-")
        assert found["attachedTargets"][0]["iscsiTargetName"] == target
        assert found["iscsiInitiatorName"] == INITIATOR
        # Secrets are never told.
        for shown in (found, (await ask("GET", path)).json, (await ask("GET", GROUPS)).json):
            assert "Tq8sN2vLx5Rz" not in str(shown)
            assert "Zb7mW4kPq9Xy" not in str(shown)

        # A group with attachments is not deleted.
        task = await ask.done(await ask("DELETE", path, match=await ask.tag(path)), "FAILED")
        assert "detach" in task["errorMessages"][0]["message"]
        detach = path + "/$actions/detach-iscsi-client"
        body = {"extId": attachment["extId"]}
        await ask.done(await ask("POST", detach, body, match=await ask.tag(path)))
        assert (await ask("POST", detach, body, match=await ask.tag(path))).code == "VOL-40400"
        assert "data" not in (await ask("GET", path + "/external-iscsi-attachments")).json
        await ask.done(await ask("DELETE", path, match=await ask.tag(path)))


async def test_load_balanced_groups_take_no_client(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = await _make(ask, shouldLoadBalanceVmAttachments=True)
        body = {"iscsiInitiatorName": INITIATOR}
        attach = path + "/$actions/attach-iscsi-client"
        assert (await ask("POST", attach, body, match=await ask.tag(path))).status == 422
        changed = {"name": "drx-renamed", "shouldLoadBalanceVmAttachments": False}
        await ask.done(await ask("PUT", path, changed, match=await ask.tag(path)))
        await ask.done(await ask("POST", attach, body, match=await ask.tag(path)))
        assert (await ask("GET", path)).data["attachmentType"] == "EXTERNAL"


async def test_attached_to_a_vm(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = await _make(ask)
        body = {"extId": lab.APP}
        await ask.done(
            await ask("POST", path + "/$actions/attach-vm", body, match=await ask.tag(path))
        )
        assert (await ask("GET", path + "/vm-attachments")).data[0]["extId"] == lab.APP
        detach = path + "/$actions/detach-vm"
        await ask.done(await ask("POST", detach, body, match=await ask.tag(path)))
        assert (await ask("POST", detach, body, match=await ask.tag(path))).status == 404
        assert (await ask("GET", path + "/metadata")).data["ownerReference"] == lab.ADMIN
