# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs, their devices, images: what v4 answers and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulator_v4 import lab
from tests.simulator_v4.lab import APP, Asker, asker

VMS = "/api/vmm/v4.0/ahv/config/vms"
AHV = "vmm.v4.ahv.config."


def _all_objects(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in _all_objects(item)]
    if not isinstance(value, dict):
        return []
    inside = [
        found for key, item in value.items() if key != "$reserved" for found in _all_objects(item)
    ]
    return [value, *inside]


async def test_a_vm_in_every_minor(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        for minor in range(4):
            answer = await ask("GET", f"/api/vmm/v4.{minor}/ahv/config/vms/{APP}")
            vm = answer.data
            assert answer.json["$objectType"] == AHV + "GetVmApiResponse"
            assert answer.headers["ETag"]
            for found in _all_objects(vm):
                assert found["$objectType"].startswith("vmm.")
                assert found["$reserved"] == {"$fv": f"v4.r{minor}"}
            nic = vm["nics"][0]
            assert ("nicBackingInfo" in nic) is (minor >= 1)
            assert nic["backingInfo"]["macAddress"] == "50:6b:8d:00:00:01"
            assert [disk["extId"] for disk in vm["disks"]] == [lab.SYSTEM_DISK, lab.DATA_DISK]
            assert [drive["extId"] for drive in vm["cdRoms"]] == [lab.DRIVE]
            assert vm["bootConfig"]["$objectType"] == AHV + "UefiBoot"
        for path in ("v4.4", "v4.x", "v3.0", "v4.-1", "v4.01x"):
            answer = await ask("GET", f"/api/vmm/{path}/ahv/config/vms/{APP}")
            assert answer.status == 404
            assert answer.json is None  # nothing in v4's form


async def test_the_window_of_minors_is_a_knob(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        info = "/api/vmm/unversioned/info"
        assert (await ask("OPTIONS", info)).json == {"data": "v4.3"}
        ask.core.knobs["v4_window"] = "pc.7.3"
        assert (await ask("OPTIONS", info)).json == {"data": "v4.1"}
        assert (await ask("GET", "/api/vmm/v4.1/ahv/config/vms")).status == 200
        assert (await ask("GET", "/api/vmm/v4.2/ahv/config/vms")).status == 404
        ask.core.knobs["v4_window"] = {"vmm": [0, 0]}
        assert (await ask("GET", "/api/vmm/v4.0/ahv/config/vm-recovery-points")).status == 404
        assert (await ask("GET", "/api/prism/v4.0/config/tasks")).status == 404
        ask.core.knobs["v4_info"] = "missing"
        assert (await ask("OPTIONS", info)).status == 404
        ask.core.knobs["v4_info"] = "v4.9"
        assert (await ask("OPTIONS", info)).json == {"data": "v4.9"}


async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        names = []
        for page in range(3):
            answer = await ask("GET", VMS, page=page, limit=2, orderby="name desc")
            meta = answer.json["metadata"]
            assert meta["totalAvailableResults"] == 6
            names += [vm["name"] for vm in answer.data]
            rels = {link["rel"] for link in meta["links"]}
            assert rels == {"self", "first", "last"} | ({"prev"} if page else set()) | (
                {"next"} if page < 2 else set()
            )
        assert names == ["small04", "small03", "small02", "small01", "small00", "app01"]
        beyond = await ask("GET", VMS, page=3, limit=2)
        assert "data" not in beyond.json
        for wrong in ({"limit": 101}, {"limit": 0}, {"page": -1}, {"page": "x"}, {"expand": "x"}):
            assert (await ask("GET", VMS, **wrong)).code == "VMM-40001"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("name eq 'app01'", 1),
        ("name ne 'app01'", 5),
        ("startswith(name,'small') and not endswith(name, '04')", 4),
        ("(contains(name,'01') or name eq 'small02') and memorySizeBytes gt 5", 3),
        ("powerState eq Vmm.Ahv.Config.PowerState'ON'", 1),
        ("name in ('app01', 'small03', 'none')", 2),
        (f"cluster/extId eq '{lab.CLUSTER_A}'", 1),
        ("disks/any(d:d/diskAddress/index eq 1)", 1),
        ("nics/all(n:n/networkInfo/nicType eq NicType'NORMAL_NIC')", 6),
        ("createTime gt 2001-01-01T00:00:00Z", 0),
        ("isAgentVm eq null", 6),
        ("name eq 'O''Brien'", 0),
    ],
)
async def test_filters(tmp_path: Path, text: str, count: int) -> None:
    async with asker(tmp_path) as ask:
        answer = await ask("GET", VMS, filter=text)
        assert answer.status == 200, answer.json
        assert answer.json["metadata"]["totalAvailableResults"] == count


@pytest.mark.parametrize(
    "text",
    [
        "colour eq 'red'",
        "name",
        "name eq",
        "name eq 5",
        "powerState eq 'ON'",
        "powerState eq Vmm.Ahv.Config.MachineType'PC'",
        "powerState eq Vmm.Ahv.Config.PowerState'UP'",
        "name eq 'a' and",
        "(name eq 'a'",
        "name eq 'a' 'b'",
        "name/any(d:d eq 'x')",
        "disks/any(d:d/colour eq 1)",
        "createTime lt yesterday",
        "(" * 40 + "name eq 'a'" + ")" * 40,
        "not " * 40 + "isAgentVm",
        "name eq 'unended",
        "name eq 'a' or " * 1000 + "name eq 'a'",
    ],
)
async def test_filters_that_are_refused(tmp_path: Path, text: str) -> None:
    async with asker(tmp_path) as ask:
        assert (await ask("GET", VMS, filter=text)).code == "VMM-40001"


async def test_selected_fields(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        vm = (await ask("GET", VMS, select="name,powerState", filter="name eq 'app01'")).data[0]
        assert {key for key in vm if key[0] != "$"} == {"name", "powerState", "extId"}
        group = "/api/clustermgmt/v4.0/config/storage-containers"
        answer = await ask("GET", group, select="name", limit=1)
        assert answer.data[0]["$objectType"].endswith("StorageContainerProjection")
        assert (await ask("GET", VMS, select="colour")).status == 400


async def test_tags_are_demanded_and_change_with_the_vm(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = f"{VMS}/{APP}"
        off = path + "/$actions/power-off"
        missing = await ask("POST", off)
        assert (missing.status, missing.code) == (428, "PLAT-10004")
        assert missing.data["error"][0]["errorGroup"] == "MISSING_ETAG_HEADER"
        old = await ask.tag(path)
        for wrong in ("*", "AQ==", old + "x"):
            refused = await ask("POST", off, match=wrong)
            assert (refused.status, refused.code) == (412, "PLAT-10005")
        await ask.done(await ask("POST", off, match=old))
        assert (await ask("GET", path)).data["powerState"] == "OFF"
        assert await ask.tag(path) != old
        assert (await ask("POST", path + "/$actions/power-on", match=old)).status == 412
        await ask.done(
            await ask("POST", path + "/$actions/power-on", match=f'"{await ask.tag(path)}"')
        )
        ask.core.knobs["v4_etag_missing_status"] = 400
        assert (await ask("DELETE", path)).status == 400
        gone = path.replace(APP, lab.CENTRAL)
        assert (await ask("POST", gone + "/$actions/power-on")).code == "VMM-40400"


async def test_a_stale_tag_in_the_queue(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        ask.core.faults.add("etag-stale-in-task")
        path = f"{VMS}/{APP}"
        answer = await ask("POST", path + "/$actions/power-off", match=await ask.tag(path))
        task = await ask.done(answer, "FAILED")
        assert task["errorMessages"][0]["code"] == "VMM-30303"
        assert task["errorMessages"][0]["$objectType"] == "prism.v4.error.AppMessage"
        assert task["completedTime"]


async def test_the_same_request_id_is_the_same_request(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = f"{VMS}/{APP}"
        tag = await ask.tag(path)
        first = await ask("POST", path + "/$actions/power-off", match=tag, request_id="one")
        await ask.done(first)
        # The tag is stale by now, and the VM is off: neither matters to a repetition.
        again = await ask("POST", path + "/$actions/power-off", match=tag, request_id="one")
        assert again.data["extId"] == first.data["extId"]
        other = await ask("DELETE", path, match=await ask.tag(path), request_id="one")
        assert other.status == 400
        assert APP in ask.core.world.vms


async def test_guest_shutdown_needs_guest_tools(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = f"{VMS}/{APP}"
        body = {
            "$objectType": AHV + "GuestPowerOptions",
            "guestPowerStateTransitionConfig": {"shouldEnableScriptExec": True},
        }
        ask.core.world.vms[APP].tools = False
        shutdown = path + "/$actions/guest-shutdown"
        assert (await ask("POST", shutdown, body, match=await ask.tag(path))).status == 422
        ask.core.world.vms[APP].tools = True
        tools = (await ask("GET", path + "/guest-tools")).data
        assert tools["isReachable"] is True
        await ask.done(await ask("POST", shutdown, body, match=await ask.tag(path)))
        assert (await ask("GET", path)).data["powerState"] == "OFF"


def _vm(**more: Any) -> dict[str, Any]:
    return {"name": "new", "cluster": {"extId": lab.CLUSTER_A}, "memorySizeBytes": 1 << 30, **more}


def _disk(reference: dict[str, Any] | None = None, **backing: Any) -> dict[str, Any]:
    source = {"dataSource": {"reference": reference}} if reference else {}
    return {"backingInfo": {"$objectType": AHV + "VmDisk", **backing, **source}}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (_vm(name="x" * 81), "/name"),
        (_vm(name=5), "/name"),
        (_vm(numSockets=0), "/numSockets"),
        (_vm(numSockets="2"), "/numSockets"),
        (_vm(numSockets=True), "/numSockets"),
        (_vm(isAgentVm=1), "/isAgentVm"),
        (_vm(machineType="PC98"), "/machineType"),
        (_vm(cluster={"extId": "cluster-a"}), "/cluster/extId"),
        (_vm(disks={}), "/disks"),
        (_vm(disks=[{"backingInfo": {"diskSizeBytes": 5}}]), "/disks/0/backingInfo"),
        (_vm(bootConfig={"bootOrder": []}), "/bootConfig"),
        (_vm(bootConfig={"$objectType": AHV + "Vm"}), "/bootConfig"),
        (_vm(disks=[_disk({"$objectType": AHV + "ImageReference"})]), "/disks/0/backingInfo/dataSource/reference/imageExtId"),
        (_vm(**{"$objectType": AHV + "Disk"}), "/"),
        ([], "/"),
    ],
)  # fmt: skip
async def test_bodies_are_held_against_their_schema(tmp_path: Path, body: Any, path: str) -> None:
    async with asker(tmp_path) as ask:
        answer = await ask("POST", VMS, body)
        assert (answer.status, answer.code) == (400, "SCHEMA")
        error = answer.data["error"]
        assert error["$objectType"] == "vmm.v4.error.SchemaValidationError"
        assert path in [each["attributePath"] for each in error["validationErrorMessages"]]
        assert len(ask.core.world.vms) == 6


async def test_what_a_minor_does_not_know_is_no_part_of_it(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        reference = {
            "$objectType": AHV + "VolumeDiskReference",
            "diskExtId": lab.DATA_DISK,
            "volumeGroupExtId": lab.APP,
        }
        body = _vm(disks=[_disk(reference)])
        assert (await ask("POST", VMS, body)).code == "SCHEMA"
        assert (await ask("POST", VMS.replace("4.0", "4.1"), body)).code == "VMM-40400"
        plain = _vm(customAttributes=["x"], colour="red", **{"$unknownFields": {}})
        ask.core.knobs["v4_strict"] = True
        assert (await ask("POST", VMS, plain)).code == "SCHEMA"
        ask.core.knobs["v4_strict"] = False
        task = await ask.done(await ask("POST", VMS, plain))
        uuid = lab.entity(task, "vmm:ahv:config:vm")
        newest = await ask("GET", f"{VMS.replace('4.0', '4.3')}/{uuid}")
        assert "customAttributes" not in newest.data


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (_vm(name=""), 400),
        (_vm(cluster=None), 400),
        (_vm(memorySizeBytes=None), 400),
        (_vm(cluster={"extId": lab.APP}), 404),
        (_vm(disks=[{}]), 400),
        (_vm(disks=[_disk()]), 400),
        (_vm(disks=[_disk(diskSizeBytes=5, storageContainer={"extId": lab.CONTAINER_B})]), 422),
        (_vm(disks=[_disk({"$objectType": AHV + "ImageReference", "imageExtId": APP})]), 404),
        (_vm(disks=[_disk({"$objectType": AHV + "VmDiskReference", "diskExtId": lab.DATA_DISK}, diskSizeBytes=512)]), 422),
        (_vm(nics=[{"networkInfo": {"subnet": {"extId": APP}}}]), 404),
        (_vm(categories=[{"extId": APP}]), 404),
        (_vm(gpus=[{"name": "x"}]), 501),
        (_vm(bootConfig={"$objectType": AHV + "UefiBoot", "isSecureBootEnabled": True}), 422),
    ],
)  # fmt: skip
async def test_vms_that_cannot_be(tmp_path: Path, body: Any, status: int) -> None:
    async with asker(tmp_path) as ask:
        answer = await ask("POST", VMS, body)
        assert answer.status == status, answer.json
        assert answer.code.startswith("VMM-")


async def test_a_vm_with_everything(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        source = {
            "$objectType": AHV + "VmDiskReference",
            "diskAddress": {"busType": "SCSI", "index": 1},
            "vmReference": {"extId": APP},
        }
        categories = (await ask("GET", "/api/prism/v4.0/config/categories")).data
        body = _vm(
            numSockets=2,
            machineType="Q35",
            hardwareClockTimezone="Europe/Vienna",
            bootConfig={"$objectType": AHV + "UefiBoot", "isSecureBootEnabled": True},
            vtpmConfig={"isVtpmEnabled": True},
            categories=[{"extId": categories[0]["extId"]}],
            disks=[_disk(source), _disk(diskSizeBytes=8 << 20, storageContainer={"extId": lab.CONTAINER_A})],
            cdRoms=[{"diskAddress": {"busType": "SATA", "index": 0}}],
            nics=[
                {
                    "nicBackingInfo": {"$objectType": AHV + "VirtualEthernetNic", "isConnected": False},
                    "nicNetworkInfo": {
                        "$objectType": AHV + "VirtualEthernetNicNetworkInfo",
                        "subnet": {"extId": lab.ISOLATED},
                    },
                }
            ],
        )  # fmt: skip
        vms = VMS.replace("4.0", "4.1")
        task = await ask.done(await ask("POST", vms, body))
        vm = (await ask("GET", f"{vms}/{lab.entity(task, 'vmm:ahv:config:vm')}")).data
        assert vm["powerState"] == "OFF"
        assert vm["hardwareClockTimezone"] == "Europe/Vienna"
        assert vm["bootConfig"]["isSecureBootEnabled"] is True
        assert vm["vtpmConfig"]["isVtpmEnabled"] is True
        assert vm["categories"][0]["extId"] == categories[0]["extId"]
        assert [d["diskAddress"]["index"] for d in vm["disks"]] == [0, 1]
        sizes = [d["backingInfo"]["diskSizeBytes"] for d in vm["disks"]]
        assert sizes == [2 << 20, 8 << 20]
        assert vm["nics"][0]["nicBackingInfo"]["isConnected"] is False
        backing = vm["disks"][0]["backingInfo"]["diskExtId"]
        original = ask.core.world.vms[APP].disks[1].backing
        assert original is not None
        copied = ask.core.storage.disk(backing).read_bytes()
        assert copied == ask.core.storage.disk(original).read_bytes()


async def test_devices(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = f"{VMS}/{APP}"
        disk = f"{path}/disks/{lab.DATA_DISK}"
        grown = {**(await ask("GET", disk)).data}
        grown["backingInfo"]["diskSizeBytes"] = 3 << 20
        await ask.done(await ask("PUT", disk, grown, match=await ask.tag(disk)))
        assert (await ask("GET", disk)).data["backingInfo"]["diskSizeBytes"] == 3 << 20
        grown["backingInfo"]["diskSizeBytes"] = 1 << 20
        assert (await ask("PUT", disk, grown, match=await ask.tag(disk))).status == 422
        assert (await ask("GET", f"{path}/disks/{lab.DRIVE}")).status == 404
        assert (await ask("GET", f"{path}/cd-roms/{lab.DRIVE}")).data["diskAddress"][
            "busType"
        ] == "SATA"

        new = _disk(diskSizeBytes=1 << 20)
        assert (await ask("POST", path + "/disks", new)).status == 428
        task = await ask.done(await ask("POST", path + "/disks", new, match=await ask.tag(path)))
        uuid = lab.entity(task, "vmm:ahv:config:vm:disk")
        assert (await ask("GET", path + "/disks")).json["metadata"]["totalAvailableResults"] == 3
        await ask.done(await ask("DELETE", f"{path}/disks/{uuid}", match=await ask.tag(path)))
        assert (await ask("GET", f"{path}/disks/{uuid}")).status == 404

        nic = f"{path}/nics/{lab.NIC}"
        body = (await ask("GET", nic)).data
        body["backingInfo"]["isConnected"] = False
        body.pop("nicBackingInfo", None)
        await ask.done(await ask("PUT", nic, body, match=await ask.tag(nic)))
        changed = (await ask("GET", nic)).data["backingInfo"]
        assert (changed["isConnected"], changed["macAddress"]) == (False, "50:6b:8d:00:00:01")
        await ask.done(await ask("DELETE", nic, match=await ask.tag(nic)))
        assert "data" not in (await ask("GET", path + "/nics")).json


async def test_updates_clones_and_deletes(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        path = f"{VMS}/{APP}"
        vm = (await ask("GET", path)).data
        vm["name"] = "app01-failed-over"
        await ask.done(await ask("PUT", path, vm, match=await ask.tag(path)))
        assert (await ask("GET", path)).data["name"] == "app01-failed-over"
        # What is not done is not accepted in silence: a NIC is cut off by its own endpoint.
        vm["nics"][0]["backingInfo"]["isConnected"] = False
        assert (await ask("PUT", path, vm, match=await ask.tag(path))).status == 422
        vm["nics"][0]["backingInfo"]["isConnected"] = True
        del vm["disks"][0]
        assert (await ask("PUT", path, vm, match=await ask.tag(path))).status == 422
        body = {"name": "twin", "numSockets": 4}
        task = await ask.done(
            await ask("POST", path + "/$actions/clone", body, match=await ask.tag(path))
        )
        names = {e["name"] for e in task["entitiesAffected"]}
        twin = next(vm for vm in ask.core.world.vms.values() if vm.name == "twin")
        assert (names, twin.sockets, len(twin.disks)) == ({"twin"}, 4, 3)
        await ask.done(await ask("DELETE", path, match=await ask.tag(path)))
        assert (await ask("GET", path)).code == "VMM-40400"


async def test_images(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask:
        await _images(ask)


async def _images(ask: Asker) -> None:
    images = "/api/vmm/v4.0/content/images"
    kind = "vmm.v4.content."
    source = {"$objectType": kind + "VmDiskSource", "extId": lab.DATA_DISK}
    body = {"name": "data", "type": "DISK_IMAGE", "source": source}
    task = await ask.done(await ask("POST", images, body))
    path = f"{images}/{lab.entity(task, 'vmm:content:image')}"
    image = (await ask("GET", path)).data
    assert image["sizeBytes"] == 2 << 20
    assert image["source"]["$objectType"] == kind + "VmDiskSource"
    image["name"] = "renamed"
    await ask.done(await ask("PUT", path, image, match=await ask.tag(path)))
    assert (await ask("GET", images, filter="name eq 'renamed'")).data[0]["extId"] == image["extId"]
    assert (await ask("DELETE", path)).status == 428
    await ask.done(await ask("DELETE", path, match=await ask.tag(path)))
    for wrong, status in (
        ({"name": "x", "type": "DISK_IMAGE"}, 400),
        ({**body, "type": "TAPE"}, 400),
        ({**body, "source": {"$objectType": kind + "UrlSource", "url": "ftp://x/y"}}, 400),
        ({**body, "source": {"$objectType": kind + "ObjectsLiteSource", "key": "k"}}, 501),
        ({**body, "clusterLocationExtIds": [APP]}, 404),
        (
            {**body, "checksum": {"$objectType": kind + "ImageSha256Checksum", "hexDigest": "ab"}},
            400,
        ),
    ):
        assert (await ask("POST", images, wrong)).status == status


async def _serve_file(stream: trio.SocketStream) -> None:
    """One answer: 512 bytes to whoever logs in as export, 401 to others."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += await stream.receive_some(4096)
    if b"basic ZXhwb3J0Om9uZS10aW1lLXdvcmQ=" in asked.replace(b"Basic", b"basic"):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 512\r\nConnection: close\r\n\r\n"
        await stream.send_all(head + b"x" * 512)
    else:
        await stream.send_all(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    await stream.aclose()


async def test_an_image_from_a_url(tmp_path: Path) -> None:
    async with asker(tmp_path) as ask, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, _serve_file, listeners)
        images = "/api/vmm/v4.0/content/images"
        source: dict[str, Any] = {
            "$objectType": "vmm.v4.content.UrlSource",
            "url": f"http://127.0.0.1:{port}/disk.raw",
            "basicAuth": {"username": "export", "password": "one-time-word"},
        }
        body: dict[str, Any] = {"name": "x", "type": "DISK_IMAGE", "source": source}
        task = await ask.done(await ask("POST", images, body))
        image = (await ask("GET", f"{images}/{lab.entity(task, 'vmm:content:image')}")).data
        assert image["sizeBytes"] == 512
        # Where it logs in is nobody's business who reads the image.
        assert set(image["source"]) == {"$objectType", "$reserved", "url"}
        source["basicAuth"]["password"] = "another"
        await ask.done(await ask("POST", images, body), "FAILED")
        del source["basicAuth"]
        digest = {"$objectType": "vmm.v4.content.ImageSha256Checksum", "hexDigest": "0" * 64}
        task = await ask.done(await ask("POST", images, {**body, "checksum": digest}), "FAILED")
        assert task["errorMessages"][0]["message"]
        assert len(ask.core.world.images) == 1
        nursery.cancel_scope.cancel()
