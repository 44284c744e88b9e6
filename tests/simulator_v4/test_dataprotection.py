# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recovery points and changed regions, as v4 has them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.simulator_v4 import lab
from tests.simulator_v4.lab import APP, DATA_DISK, MIB, SYSTEM_DISK, Asker, asker, disk_points

POINTS = "/api/dataprotection/v4.0/config/recovery-points"
CONTENT = "dataprotection.v4.content."


async def test_a_recovery_point(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot("first", expirationTime="2099-01-02T03:04:05Z")
        assert point["$objectType"] == "dataprotection.v4.config.RecoveryPoint"
        assert point["status"] == "COMPLETE"
        assert point["recoveryPointType"] == "CRASH_CONSISTENT"
        assert point["expirationTime"].startswith("2099-01-02T03:04:05")
        assert point["locationReferences"][0]["locationExtId"] == lab.CLUSTER_A
        part = point["vmRecoveryPoints"][0]
        # CD-ROMs are among the disks, and no disk has a size.
        assert set(disk_points(point)) == {SYSTEM_DISK, DATA_DISK, lab.DRIVE}
        names = {name for each in part["diskRecoveryPoints"] for name in each if name[0] != "$"}
        assert names == {"diskExtId", "diskRecoveryPointExtId"}
        assert "hypervisorType" not in part  # v4.0 does not know it
        newer = await ask("GET", f"{POINTS.replace('4.0', '4.1')}/{point['extId']}")
        assert newer.data["vmRecoveryPoints"][0]["hypervisorType"] == "AHV"
        one = await ask("GET", f"{POINTS}/{point['extId']}/vm-recovery-points/{part['extId']}")
        assert one.data["vmExtId"] == APP
        mine = await ask("GET", POINTS, filter=f"vmRecoveryPoints/any(a:a/vmExtId eq '{APP}')")
        assert [each["name"] for each in mine.data] == ["first"]


async def test_its_life(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        path = f"{POINTS}/{point['extId']}"
        later = {"expirationTime": "2099-01-01T00:00:00+00:00"}
        assert (await ask("POST", path + "/$actions/set-expiration-time", later)).status == 428
        await ask.done(
            await ask(
                "POST", path + "/$actions/set-expiration-time", later, match=await ask.tag(path)
            )
        )
        assert (await ask("GET", path)).data["expirationTime"].startswith("2099")
        tag = await ask.tag(path)
        assert (await ask("DELETE", path, match=tag, request_id=None)).status == 400
        answer = await ask("DELETE", path, match=tag, request_id="gone")
        await ask.done(answer)
        # A repetition is told the same, although there is nothing left to delete.
        again = await ask("DELETE", path, match=tag, request_id="gone")
        assert again.data["extId"] == answer.data["extId"]
        assert (await ask("DELETE", path, match=tag)).code == "DP-40400"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "x"}, 400),
        ({"vmRecoveryPoints": []}, 400),
        ({"vmRecoveryPoints": [{}]}, 400),
        ({"vmRecoveryPoints": [{"vmExtId": lab.CENTRAL}]}, 404),
        ({"vmRecoveryPoints": [{"vmExtId": APP}] * 2}, 400),
        ({"vmRecoveryPoints": [{"vmExtId": APP}], "expirationTime": "2001-01-01T00:00:00Z"}, 400),
        ({"vmRecoveryPoints": [{"vmExtId": APP}], "expirationTime": "tomorrow"}, 400),
        ({"vmRecoveryPoints": [{"vmExtId": APP}], "name": "x" * 257}, 400),
        ({"vmRecoveryPoints": [{"vmExtId": APP}], "recoveryPointType": "CONSISTENT"}, 400),
    ],
)
async def test_recovery_points_that_cannot_be(tmp_path: Path, body: Any, status: int) -> None:
    async with asker(tmp_path) as ask:
        answer = await ask("POST", POINTS, body)
        assert answer.status == status, answer.json
        assert not ask.core.world.snapshots
        assert (await ask("POST", POINTS, body, request_id=None)).status == 400


async def test_application_consistency(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        kind = {"recoveryPointType": "APPLICATION_CONSISTENT"}
        assert (await ask.snapshot(**kind))["recoveryPointType"] == kind["recoveryPointType"]
        ask.core.world.vms[APP].tools = False
        body = {"vmRecoveryPoints": [{"vmExtId": APP}], **kind}
        await ask.done(await ask("POST", POINTS, body), "FAILED")


def _reference(point: dict[str, Any], disk: str) -> dict[str, Any]:
    return {
        "$objectType": CONTENT + "VmDiskRecoveryPointReference",
        "recoveryPointExtId": point["extId"],
        "vmRecoveryPointExtId": point["vmRecoveryPoints"][0]["extId"],
        "diskRecoveryPointExtId": disk_points(point)[disk],
    }


def _discover(point: dict[str, Any], disk: str) -> dict[str, Any]:
    spec = {
        "$objectType": CONTENT + "ComputeChangedRegionsClusterDiscoverSpec",
        "diskRecoveryPoint": _reference(point, disk),
    }
    return {"operation": "COMPUTE_CHANGED_REGIONS", "spec": spec}


async def _token(ask: Asker, point: dict[str, Any], element: str = "127.9.9.20") -> str:
    path = f"{POINTS}/{point['extId']}/$actions/discover-cluster"
    answer = await ask("POST", path, _discover(point, DATA_DISK))
    assert answer.status == 200, answer.json
    assert answer.data["$objectType"] == "dataprotection.v4.common.ClusterInfo"
    assert answer.data["clusterIp"]["ipv4"]["value"] == element
    assert f"{element}:9440/" in answer.json["metadata"]["links"][0]["href"]
    return str(answer.data["jwtToken"])


def _compute(point: dict[str, Any], disk: str, minor: int = 0) -> str:
    reference = _reference(point, disk)
    return (
        f"/api/dataprotection/v4.{minor}/content/recovery-points/{reference['recoveryPointExtId']}"
        f"/vm-recovery-points/{reference['vmRecoveryPointExtId']}"
        f"/disk-recovery-points/{reference['diskRecoveryPointExtId']}"
        "/$actions/compute-changed-regions"
    )


def _against(point: dict[str, Any], disk: str) -> dict[str, Any]:
    reference = _reference(point, disk)
    return {
        "referenceRecoveryPointExtId": reference["recoveryPointExtId"],
        "referenceVmRecoveryPointExtId": reference["vmRecoveryPointExtId"],
        "referenceDiskRecoveryPointExtId": reference["diskRecoveryPointExtId"],
    }


def _write(ask: Asker, disk: str, offset: int, data: bytes) -> None:
    found = next(each for each in ask.core.world.vms[APP].disks if each.uuid == disk)
    assert found.backing is not None
    with ask.core.storage.writing(APP), ask.core.storage.disk(found.backing).open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def test_changed_regions(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        first = await ask.snapshot("first")
        _write(ask, DATA_DISK, 0, b"B" * 512)
        _write(ask, DATA_DISK, MIB, bytes(65536))
        second = await ask.snapshot("second")
        token = await _token(ask, second)
        path = _compute(second, DATA_DISK)
        answer = await ask.element(
            path, {"blockSizeByte": 65536, **_against(first, DATA_DISK)}, token
        )
        regions = [(r["offset"], r["length"], r["regionType"]) for r in answer.data]
        assert regions == [(0, 65536, "REGULAR"), (MIB, 65536, "ZEROED")]
        assert answer.data[0]["$objectType"] == CONTENT + "ChangedRegion"
        assert answer.extra == {"fileSize": 2 * MIB}
        # Page by page: one region each.
        ask.core.knobs["regions_page"] = 1
        found, offset = [], 0
        while True:
            body = {"offset": offset, **_against(first, DATA_DISK)}
            page = await ask.element(path, body, token)
            found += [(r["offset"], r["regionType"]) for r in page.data or []]
            if "nextOffset" not in page.extra:
                break
            assert page.extra["nextOffset"] > offset
            offset = page.extra["nextOffset"]
        assert {kind for at, kind in found if at >= MIB} == {"ZEROED"}
        assert found[0] == (0, "REGULAR")
        # A window says where to go on, as long as it ends before the disk does.
        del ask.core.knobs["regions_page"]
        page = await ask.element(path, {"offset": 0, "length": MIB}, token)
        assert page.extra == {"nextOffset": MIB, "fileSize": 2 * MIB}


async def test_no_reference_gives_the_allocation_map(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        token = await _token(ask, point)
        answer = await ask.element(_compute(point, DATA_DISK), {}, token)
        kinds = {region["regionType"] for region in answer.data}
        assert kinds == {"REGULAR", "ZEROED"}
        assert sum(region["length"] for region in answer.data) == 2 * MIB
        empty = await ask("POST", f"{POINTS}/{point['extId']}/$actions/discover-cluster", {})
        assert empty.code == "SCHEMA"


async def test_content_is_the_elements_business(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        token = await _token(ask, point)
        path = _compute(point, DATA_DISK)
        assert (await ask("POST", path, {})).status == 501
        assert (await ask("GET", POINTS, cluster=lab.CLUSTER_A)).status == 404
        other = await ask.element(path, {}, token, lab.CLUSTER_B)
        assert other.status == 401
        wrong = await ask.element(_compute(point, DATA_DISK, 1), {}, token)
        assert wrong.status == 401
        assert wrong.json["message"] == "Scope claim value does not match API base path"
        assert (await ask.element(path, {}, "session-cookie")).status == 401
        # Basic authentication gets one in, but not to the content.
        assert (await ask("POST", path, {}, cluster=lab.CLUSTER_A)).status == 403
        head, payload, _ = token.split(".")
        assert (await ask.element(path, {}, f"{head}.{payload}.AAAA")).status == 401
        claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=="))
        assert claims["scope"] == "/api/dataprotection/v4.0/content"
        ask.core.knobs["v4_jwt_lifetime_s"] = 0
        assert (await ask.element(path, {}, await _token(ask, point))).status == 401
        ask.core.knobs.update(v4_jwt_lifetime_s=900, v4_content_minor=4)
        newer = await _token(ask, point)
        assert (await ask.element(_compute(point, DATA_DISK, 4), {}, newer)).status == 200


async def test_references_that_do_not_fit(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        first, second = await ask.snapshot("first"), await ask.snapshot("second")
        token = await _token(ask, second)
        path = _compute(second, DATA_DISK)
        partial = {"referenceRecoveryPointExtId": first["extId"]}
        for body, status in (
            (partial, 400),
            (_against(first, SYSTEM_DISK), 400),
            ({"blockSizeByte": 4096}, 400),
            ({"blockSizeByte": 40000}, 400),
            ({"offset": -1}, 400),
            ({"offset": 3 * MIB}, 400),
            ({"length": 0}, 400),
        ):
            answer = await ask.element(path, body, token)
            assert answer.status == status, (body, answer.json)
        # The older one against the newer one makes no sense.
        backwards = await ask.element(
            _compute(first, DATA_DISK), _against(second, DATA_DISK), token
        )
        assert backwards.status == 400
        gone = f"{POINTS}/{first['extId']}"
        await ask.done(await ask("DELETE", gone, match=await ask.tag(gone)))
        assert (await ask.element(path, _against(first, DATA_DISK), token)).status == 404
        # A token for cluster B is good there, but the recovery point is on A.
        ask.core.world.snapshots[second["extId"]].cluster = lab.CLUSTER_B
        elsewhere = await _token(ask, second, "127.9.9.40")
        ask.core.world.snapshots[second["extId"]].cluster = lab.CLUSTER_A
        assert (await ask.element(path, {}, elsewhere, lab.CLUSTER_B)).status == 404


async def test_discovery_wants_types(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        path = f"{POINTS}/{point['extId']}/$actions/discover-cluster"
        body = _discover(point, DATA_DISK)
        untyped = {**body, "spec": {**body["spec"]}}
        del untyped["spec"]["$objectType"]
        assert (await ask("POST", path, untyped)).code == "SCHEMA"
        body["spec"]["diskRecoveryPoint"].pop("$objectType")
        assert (await ask("POST", path, body)).code == "SCHEMA"
        other = await ask.snapshot("other")
        assert (await ask("POST", path, _discover(other, DATA_DISK))).status == 400


async def test_restore_with_overrides(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        part = point["vmRecoveryPoints"][0]["extId"]
        override = {
            "$objectType": "dataprotection.v4.config.AhvVmOverrideSpec",
            "name": "app01-restored",
            "description": "back",
            "nicSpec": {
                "nicOverrideList": [
                    {
                        "nicExtId": lab.NIC,
                        "nicNetworkInfo": {
                            "$objectType": "vmm.v4.ahv.config.VmRestoreVirtualEthernetNicNetworkInfoOverrideSpec",
                            "subnet": {"extId": lab.ISOLATED},
                        },
                    }
                ]
            },
        }
        body = {
            "clusterExtId": lab.CLUSTER_A,
            "vmRecoveryPointRestoreOverrides": [
                {"vmRecoveryPointExtId": part, "vmOverrideSpec": override}
            ],
        }
        path = f"{POINTS.replace('4.0', '4.1')}/{point['extId']}"
        restore = path + "/$actions/restore"
        assert (await ask("POST", restore, body)).status == 428
        task = await ask.done(await ask("POST", restore, body, match=await ask.tag(path)))
        details = {pair["name"]: pair["value"] for pair in task["completionDetails"]}
        vm = ask.core.world.vms[details["vmExtIds"][0]]
        assert (vm.name, vm.description, vm.power) == ("app01-restored", "back", "OFF")
        assert [nic.subnet for nic in vm.nics] == [lab.ISOLATED]
        assert ask.core.world.vms[APP].nics[0].subnet == lab.VLAN10
        # The recovery point keeps what it had.
        kept = ask.core.world.snapshots[point["extId"]].vms[0].config
        assert kept.nics[0].subnet == lab.VLAN10
        # v4.0 knows no overrides: the VM comes back under its old name.
        old = f"{POINTS}/{point['extId']}"
        task = await ask.done(
            await ask("POST", old + "/$actions/restore", body, match=await ask.tag(old))
        )
        assert sum(each.name == "app01" for each in ask.core.world.vms.values()) == 2


async def test_a_failed_restore_leaves_a_vm(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        ask.core.faults.add("restore-orphan")
        path = f"{POINTS}/{point['extId']}"
        answer = await ask("POST", path + "/$actions/restore", {}, match=await ask.tag(path))
        task = await ask.done(answer, "FAILED")
        assert task["errorMessages"][0]["code"] == "DP-10000"
        left = [vm for vm in ask.core.world.vms.values() if vm.name == "app01" and vm.uuid != APP]
        assert [vm.power for vm in left] == ["OFF"]


async def test_replication_to_the_other_cluster(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        path = f"{POINTS}/{point['extId']}/$actions/replicate"
        assert (await ask("POST", path, {"clusterExtId": lab.CLUSTER_B})).code == "SCHEMA"
        body = {"pcExtId": lab.CENTRAL, "clusterExtId": lab.CLUSTER_B}
        task = await ask.done(await ask("POST", path, body))
        assert task["status"] == "SUCCEEDED"
        homes = sorted(s.cluster for s in ask.core.world.snapshots.values())
        assert homes == [lab.CLUSTER_A, lab.CLUSTER_B]
        assert (await ask("POST", path, {**body, "pcExtId": APP})).status == 404


async def test_vm_recovery_points_hold_the_configuration(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        point = await ask.snapshot()
        ask.core.world.vms[APP].name = "renamed"
        part = point["vmRecoveryPoints"][0]["extId"]
        vmm = "/api/vmm/v4.1/ahv/config/vm-recovery-points"
        assert (await ask("GET", vmm.replace("4.1", "4.0") + f"/{part}")).json is None
        found = (await ask("GET", f"{vmm}/{part}")).data
        assert found["vm"]["name"] == "app01"
        assert found["vm"]["$objectType"] == "vmm.v4.ahv.config.Vm"
        assert found["diskRecoveryPoints"][0]["$reserved"] == {"$fv": "v4.r4"}
        body = {"vmConfigOverrideSpec": {"name": "again", "nicSpec": {"nicRemoveList": [lab.NIC]}}}
        restore = f"{vmm}/{part}/$actions/restore"
        await ask.done(await ask("POST", restore, body, match=await ask.tag(f"{vmm}/{part}")))
        again = next(vm for vm in ask.core.world.vms.values() if vm.name == "again")
        assert (again.nics, len(again.disks)) == ([], 3)
        wrong = {"vmConfigOverrideSpec": {"nicSpec": {"nicRemoveList": [APP]}}}
        tag = await ask.tag(f"{vmm}/{part}")
        assert (await ask("POST", restore, wrong, match=tag)).status == 404
        await ask.done(await ask("POST", vmm, {"vmExtId": APP, "name": "mine"}))
        assert (await ask("GET", vmm)).json["metadata"]["totalAvailableResults"] == 2
        await ask.done(await ask("DELETE", f"{vmm}/{part}", match=tag))
        assert (await ask("GET", f"{vmm}/{part}")).status == 404
