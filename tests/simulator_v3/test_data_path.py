# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Full and an Incremental by plain calls of v3 and v2.0, as a client makes them, for each way to expose a snapshot; what an
initiator that is not ours reads over iSCSI is compared with the snapshot's content.
"""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulator_v3.lab_v3 import INITIATOR, MIB, SECRET, Lab, running

BLOCK = 65536


@dataclass(frozen=True, slots=True)
class Exposed:
    """A volume group of one disk: its id, its target, and the image that it was made from."""

    group: str
    target: str
    image: str | None = None


def _group_body(lab: Lab, source: dict[str, Any]) -> dict[str, Any]:
    resources = {
        "sharing_status": "NOT_SHARED",
        "usage_type": "TEMPORARY",
        "created_by": "drx-1a2b3c4d",
        "iscsi_target_prefix": "drx-1a2b3c4d-7",
        "load_balance_vm_attachments": False,
        "target_secret": SECRET,
        "disk_list": [{"index": 0, "data_source_reference": source}],
        "attachment_list": [{"iscsi_initiator_name": INITIATOR, "client_secret": "Zb7mW4kPq9Xy"}],
    }
    spec = {
        "name": "drx-1a2b3c4d-7-vg-20260102T030405Z",
        "cluster_reference": {"kind": "cluster", "uuid": lab.cluster.uuid},
        "resources": resources,
    }
    return {"api_version": "3.1", "metadata": {"kind": "volume_group"}, "spec": spec}


async def _make_group(lab: Lab, source: dict[str, Any], image: str | None = None) -> Exposed:
    made = await lab.v3(
        lab.pc, "POST", "/volume_groups", _group_body(lab, source), "accepted_volume_group", 202
    )
    await lab.task(made)
    uuid = made["metadata"]["uuid"]
    found = await lab.v3(
        lab.pc, "GET", f"/volume_groups/{uuid}", kind="volume_group_intent_response"
    )
    resources = found["status"]["resources"]
    assert resources["enabled_authentications"] == "CHAP"
    assert SECRET not in str(found)
    return Exposed(uuid, resources["iscsi_target_name"], image)


async def expose_image(lab: Lab, path: str) -> Exposed:
    resources = {"image_type": "DISK_IMAGE", "source_uri": f"nfs://{lab.cluster.address}{path}"}
    body = {
        "metadata": {"kind": "image"},
        "spec": {"name": "drx-1a2b3c4d-7-img", "resources": resources},
    }
    made = await lab.v3(lab.pc, "POST", "/images", body, "accepted_image", 202)
    await lab.task(made)
    uuid = made["metadata"]["uuid"]
    found = await lab.v3(lab.pc, "GET", f"/images/{uuid}", kind="image_intent_response")
    assert found["status"]["resources"]["size_bytes"] > 0
    return await _make_group(lab, {"kind": "image", "uuid": uuid}, uuid)


async def expose_url(lab: Lab, path: str) -> Exposed:
    return await _make_group(lab, {"kind": "vm_disk", "url": f"nfs://{lab.cluster.address}{path}"})


async def expose_clone(lab: Lab, path: str) -> Exposed:
    body = {
        "name": "drx-1a2b3c4d-7-vg",
        "enabled_authentications": [{"auth_type": "CHAP", "password": SECRET}],
        "disk_list": [{"index": 0, "clone_spec": {"ndfs_filepath": path}}],
    }
    task = await lab.task(await lab.v2("POST", "/volume_groups", body, 201), lab.pe)
    [uuid] = [e["uuid"] for e in task["entity_reference_list"] if e["kind"] == "volume_group"]
    client = {"iscsi_client": {"client_address": INITIATOR}, "operation": "ATTACH"}
    await lab.task(await lab.v2("POST", f"/volume_groups/{uuid}/open", client, 201), lab.pe)
    return Exposed(uuid, (await lab.v2("GET", f"/volume_groups/{uuid}"))["iscsi_target"])


async def hide(lab: Lab, exposed: Exposed) -> None:
    """Detach, delete, and the image."""
    path = f"/volume_groups/{exposed.group}"
    await lab.refused(lab.pc, "DELETE", path, None, 422, "ENTITY_DELETION_FAILED")
    found = await lab.v3(lab.pc, "GET", path, kind="volume_group_intent_response")
    body = {name: found[name] for name in ("metadata", "spec")}
    body["spec"]["resources"]["attachment_list"] = []
    await lab.task(await lab.v3(lab.pc, "PUT", path, body, "accepted_volume_group", 202))
    await lab.task(await lab.v3(lab.pc, "DELETE", path, kind="deleted", status=202))
    if exposed.image is not None:
        path = f"/images/{exposed.image}"
        await lab.task(await lab.v3(lab.pc, "DELETE", path, kind="deleted", status=202))


async def hide_clone(lab: Lab, exposed: Exposed) -> None:
    path = f"/volume_groups/{exposed.group}"
    await lab.v2("DELETE", path, status=422)
    client = {"iscsi_client": {"client_address": INITIATOR}, "operation": "DETACH"}
    await lab.task(await lab.v2("POST", f"{path}/close", client, 201), lab.pe)
    await lab.task(await lab.v2("DELETE", path, status=201), lab.pe)


async def read(lab: Lab, exposed: Exposed, copy: Path) -> bytes:
    """The whole disk, through the portal's redirect and CHAP."""
    source = (
        f"driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={lab.cluster.data_services}:3260,"
        f"file.target=iqn.2010-06.com.nutanix:{exposed.target}-tgt0,file.lun=1,file.user={INITIATOR},"
        f"file.password-secret=s,file.initiator-name={INITIATOR}"
    )
    words = [
        "qemu-img",
        "convert",
        "--object",
        f"secret,id=s,data={SECRET}",
        "--image-opts",
        source,
        "-O",
        "raw",
    ]
    run = partial(subprocess.run, [*words, str(copy)], capture_output=True, check=False)
    finished = await trio.to_thread.run_sync(run)
    assert finished.returncode == 0, finished.stderr
    return await trio.to_thread.run_sync(copy.read_bytes)


WAYS = {
    "v3-vg-image": (expose_image, hide),
    "v3-vg-url": (expose_url, hide),
    "v2-vg-clone": (expose_clone, hide_clone),
}


@pytest.mark.parametrize("way", list(WAYS))
async def test_a_full_and_an_incremental(tmp_path: Path, way: str) -> None:
    expose: Callable[[Lab, str], Awaitable[Exposed]]
    expose, undo = WAYS[way]
    async with running(tmp_path / "sim") as lab:
        storage = lab.simulator.core.storage
        clusters = await lab.v3(
            lab.pc, "POST", "/clusters/list", {"kind": "cluster"}, "cluster_list"
        )
        networks = [c["status"]["resources"]["network"] for c in clusters["entities"]]
        assert lab.cluster.address in [network["external_ip"] for network in networks]
        # Full: everything that the map does not call zero, of every disk.
        first = await lab.snapshot("drx-1a2b3c4d-7-rp-1")
        copies: dict[str, bytearray] = {}
        for disk, path in (await lab.paths(first)).items():
            size, regions = await lab.regions(path)
            exposed = await expose(lab, path)
            there = await read(lab, exposed, tmp_path / "full")
            await undo(lab, exposed)
            copies[disk] = bytearray(size)
            for offset, length, kind in regions:
                if kind == "REGULAR":
                    copies[disk][offset : offset + length] = there[offset : offset + length]
            assert bytes(copies[disk]) == storage.disk(disk).read_bytes()
        assert len(copies) == 2
        # The guest goes on.
        guest = lab.simulator.guest(lab.vm.uuid)
        await guest.write(3 * MIB + 123, b"new" * 1000)
        await guest.zero(8 * MIB, 1 * MIB)
        await lab.simulator.guest(lab.vm.uuid, 1).write(0, b"boot")
        # Incremental: only what changed since.
        old = await lab.paths(first)
        second = await lab.snapshot("drx-1a2b3c4d-7-rp-2")
        await guest.write(0, b"after the snapshot")
        for disk, path in (await lab.paths(second)).items():
            _, regions = await lab.regions(path, old[disk])
            assert regions
            assert sum(length for _, length, _ in regions) <= 2 * MIB
            exposed = await expose(lab, path)
            there = await read(lab, exposed, tmp_path / "incremental")
            await undo(lab, exposed)
            for offset, length, kind in regions:
                new = there[offset : offset + length] if kind == "REGULAR" else bytes(length)
                copies[disk][offset : offset + length] = new
            kept = next(
                d.uuid
                for s in lab.simulator.world.snapshots.values()
                if s.uuid == second["metadata"]["uuid"]
                for d in s.vms[0].disks
                if d.backing == disk
            )
            assert bytes(copies[disk]) == storage.snapshot(kept).read_bytes()
        for snapshot in (first, second):
            path = f"/vm_snapshots/{snapshot['metadata']['uuid']}"
            await lab.task(await lab.v3(lab.pe, "DELETE", path, kind="deleted", status=202))
        world = lab.simulator.world
        assert [*world.snapshots, *world.volume_groups, *world.images] == []


async def test_regions_hold_every_difference_and_whole_blocks(tmp_path: Path) -> None:
    """The server's regions against a comparison byte by byte of what is exposed."""
    async with running(tmp_path / "sim") as lab:
        storage = lab.simulator.core.storage
        first = await lab.paths(await lab.snapshot("one"))
        guest = lab.simulator.guest(lab.vm.uuid)
        for number in range(20):
            await guest.write((number * 733_331) % (15 * MIB), bytes([number]) * (number * 977 + 1))
        second = await lab.paths(await lab.snapshot("two"))
        disk = guest.disk.backing
        assert disk is not None
        before, after = (
            storage.snapshot(d.uuid).read_bytes()
            for s in lab.simulator.world.snapshots.values()
            for d in s.vms[0].disks
            if d.backing == disk
        )
        _, regions = await lab.regions(second[disk], first[disk])
        assert [r for r in regions if r[0] % BLOCK or r[1] % BLOCK] == []
        inside = {offset + at for offset, length, _ in regions for at in range(0, length, BLOCK)}
        changed = {
            at
            for at in range(0, len(after), BLOCK)
            if before[at : at + BLOCK] != after[at : at + BLOCK]
        }
        assert changed == inside


async def test_hot_add_gives_a_vm_a_clone_of_a_snapshots_disk(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        [path, _] = (await lab.paths(await lab.snapshot("one"))).values()
        uuid = lab.vm.uuid
        clone = {"disk_address": {"device_bus": "SCSI", "ndfs_filepath": path}}
        body = {"uuid": uuid, "vm_disks": [{"vm_disk_clone": clone}]}
        await lab.task(await lab.v2("POST", f"/vms/{uuid}/disks/attach", body, 201), lab.pe)
        config = await lab.v2("GET", f"/vms/{uuid}?include_vm_disk_config=true")
        address = config["vm_disk_info"][-1]["disk_address"]
        assert address["device_index"] == 2
        storage = lab.simulator.core.storage
        assert storage.disk(address["vmdisk_uuid"]).stat().st_size == 16 * MIB
        disk = await lab.v2("GET", f"/virtual_disks/{address['vmdisk_uuid']}")
        assert disk["attached_vm_uuid"] == uuid
        gone = {"vm_disks": [{"disk_address": {"vmdisk_uuid": address["vmdisk_uuid"]}}]}
        await lab.task(await lab.v2("POST", f"/vms/{uuid}/disks/detach", gone, 201), lab.pe)
        assert len([d for d in lab.vm.disks if not d.cdrom]) == 2
