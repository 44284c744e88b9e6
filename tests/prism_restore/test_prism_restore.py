# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images are uploaded, VMs made of them, changed and removed: by v3 and by v4, against the simulator over HTTPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import trio
from msgspec.structs import replace

from replicator.hardware import Firmware
from replicator.prism.errors import PrismPermissionError, PrismRefusedError, PrismUnreachableError
from replicator.prism.types import Kind, NewVm
from replicator.prism.upload import UploadFile
from replicator.simulator.running import Simulator
from tests.prism_restore.lab_restore import MIB, NAME, SIZE, VM_NAME, restore_lab, sparse_file
from tests.sources.simulated import Api

APIS = pytest.mark.parametrize("api", ["v3", "v4"])
REQUEST = UUID(int=5)


@APIS
async def test_a_vm_of_an_image(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api) as lab:
        image, content = await lab.image()
        new = await lab.new_vm(image, firmware=Firmware.UEFI, timezone="Europe/Zurich", cdroms=1)
        uuid = await lab.prism.create_vm(new, REQUEST)
        made = lab.simulator.vm(VM_NAME)
        assert (made.uuid, made.power, made.description) == (uuid, "OFF", "made by a test")
        assert (made.sockets, made.cores, made.memory) == (2, 1, 512 * MIB)
        assert made.boot["type"] == "UEFI"
        assert lab.simulator.world.vms[uuid].cluster == lab.cluster
        (disk,) = [each for each in made.disks if not each.cdrom]
        assert (disk.bus, disk.index, disk.size) == ("SATA", 1, SIZE)
        assert lab.simulator.world.containers[disk.container].name == "archive"
        assert disk.backing is not None
        assert lab.simulator.core.storage.disk(disk.backing).read_bytes() == content
        assert [(each.bus, each.index) for each in made.disks if each.cdrom] == [("IDE", 0)]
        (nic,) = made.nics
        assert (nic.mac, nic.model, nic.connected) == ("50:6b:8d:0a:0b:0c", "E1000", True)
        assert lab.simulator.world.subnets[nic.subnet].name == "isolated"
        found = await lab.prism.find("drx-1a2b3c4d-")
        assert {(each.kind, each.uuid) for each in found} == {(Kind.IMAGE, image), (Kind.VM, uuid)}
        hardware = await lab.prism.hardware(uuid)
        assert hardware.timezone == "Europe/Zurich"
        assert hardware.firmware is Firmware.UEFI

        await lab.prism.delete_image(image)
        await lab.prism.power_on(uuid)
        assert made.power == "ON"
        await lab.prism.power_on(uuid)
        lab.simulator.faults.add("etag-stale", f"PUT .*{uuid}")
        await lab.prism.rename_vm(uuid, "app01-restored")
        assert lab.simulator.vm("app01-restored").uuid == uuid
        await lab.prism.rename_vm(uuid, "app01-restored")
        assert disk.backing is not None
        await lab.prism.delete_vm(uuid)
        await lab.prism.delete_vm(uuid)
        assert uuid not in lab.simulator.world.vms


@APIS
async def test_secure_boot_has_one_machine_type(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api) as lab:
        image, _ = await lab.image()
        new = await lab.new_vm(image, firmware=Firmware.UEFI, secure_boot=True, cdroms=1)
        await lab.prism.create_vm(new, REQUEST)
        made = lab.simulator.vm(VM_NAME)
        assert (made.machine, made.boot["type"]) == ("Q35", "SECURE_BOOT")
        assert [(each.bus, each.index) for each in made.disks if each.cdrom] == [("SATA", 0)]
        hardware = await lab.prism.hardware(made.uuid)
        assert (hardware.secure_boot, hardware.machine_type, hardware.cdroms) == (True, "Q35", 1)


@APIS
async def test_answers_that_are_lost_make_nothing_twice(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api) as lab:
        lab.simulator.faults.add("reset-after", "POST .*/images$")
        image, _ = await lab.image()
        assert list(lab.simulator.world.images) == [image]
        new = await lab.new_vm(image)
        lab.simulator.faults.add("reset-after", "POST .*/vms$")
        uuid = await lab.prism.create_vm(new, REQUEST)
        assert await lab.prism.create_vm(new, REQUEST) == uuid
        assert [each.name for each in lab.simulator.world.vms.values()] == ["app01", VM_NAME]


@pytest.mark.parametrize("minor", [0, 1])
async def test_older_minors_of_v4(minor: int, tmp_path: Path) -> None:
    """4.0 knows NICs in their first form only."""
    names = ("vmm", "volumes", "dataprotection", "clustermgmt", "prism", "networking")
    window = {name: [minor, minor] for name in names}

    def older(simulator: Simulator) -> None:
        simulator.core.knobs |= {"v4_window": window, "v4_strict": True}

    async with restore_lab(tmp_path, "v4", before=older) as lab:
        image, _ = await lab.image()
        uuid = await lab.prism.create_vm(await lab.new_vm(image), REQUEST)
        (nic,) = lab.simulator.world.vms[uuid].nics
        assert (nic.mac, nic.model) == ("50:6b:8d:0a:0b:0c", "E1000")
        assert lab.simulator.world.subnets[nic.subnet].name == "isolated"
        await lab.prism.rename_vm(uuid, "app01-restored")
        assert (await lab.prism.hardware(uuid)).nics[0].subnet_name == "isolated"


@APIS
async def test_hardware_in_few_requests(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api) as lab:
        vm = await lab.prism.vm(lab.simulator.vm("app01").uuid)
        first = await lab.prism.hardware(vm)
        assert first.cluster_name == "cluster-a"
        assert [(each.bus, each.index, each.container_name) for each in first.disks] == [
            ("scsi", 0, "default-container"),
            ("scsi", 1, "default-container"),
        ]
        assert [each.identity for each in first.disks] == [each.identity for each in vm.disks]
        (nic,) = first.nics
        assert nic.subnet_name == "vlan10"
        assert first.cdroms == 1
        assert {nic.mac} == await lab.prism.macs()
        asked = lab.prism.requests
        assert await lab.prism.hardware(vm) == first
        assert lab.prism.requests == asked


async def test_v3_and_v4_tell_the_same_hardware(tmp_path: Path) -> None:
    found: list[Any] = []
    for api in ("v3", "v4"):
        folder = tmp_path / "both"
        async with restore_lab(folder, api) as lab:
            hardware = await lab.prism.hardware(lab.simulator.vm("app01").uuid)
            found.append([hardware, *(each.mac for each in hardware.nics)])
    (three, mac_three), (four, mac_four) = found
    assert mac_three == mac_four
    assert three.disks == four.disks
    assert (three.sockets, three.memory_mib, three.machine_type, three.timezone) == (
        four.sockets,
        four.memory_mib,
        four.machine_type,
        four.timezone,
    )


async def test_names_that_the_account_may_not_see_do_not_fail_a_backup(tmp_path: Path) -> None:
    async with restore_lab(tmp_path, "v4") as lab:
        lab.simulator.faults.add(
            "server-error", "/subnets|/storage-containers", count=None, value=403
        )
        hardware = await lab.prism.hardware(lab.simulator.vm("app01").uuid)
        assert hardware.nics[0].subnet
        assert not hardware.nics[0].subnet_name
        assert not hardware.disks[0].container_name


@APIS
async def test_what_there_is_on_a_cluster(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api) as lab:
        own = next(
            each
            for each in lab.simulator.world.containers.values()
            if (each.cluster, each.name) == (lab.cluster, "archive")
        )
        own.internal = True
        containers = {each.name: each for each in await lab.prism.containers(lab.cluster)}
        assert sorted(containers) == ["archive", "default-container"]
        assert [each.name for each in containers.values() if each.internal] == ["archive"]
        assert {each.cluster for each in containers.values()} == {lab.cluster}
        subnets = await lab.prism.subnets(lab.cluster)
        assert sorted(each.name for each in subnets) == ["isolated", "vlan10"]
        assert {each.clusters for each in subnets} == {(lab.cluster,)}


async def test_containers_without_an_account_on_the_element(tmp_path: Path) -> None:
    async with restore_lab(tmp_path, "v3", account="central-only") as lab:
        containers = await lab.prism.containers(lab.cluster)
        assert sorted(each.name for each in containers) == ["archive", "default-container"]


@APIS
async def test_rights_that_are_missing_are_named_with_their_role(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api, account="viewer") as lab:
        message = r"lacks the permission Create_Image \(role VM Admin\)"
        with pytest.raises(PrismPermissionError, match=message):
            await lab.image()
        message = r"lacks the permission Create_Virtual_Machine \(role VM Admin\)"
        new = await lab.new_vm("77777777-7777-4777-8777-777777777777")
        with pytest.raises(PrismPermissionError, match=message):
            await lab.prism.create_vm(new, REQUEST)


async def test_an_image_gets_its_bytes_once(tmp_path: Path) -> None:
    async with restore_lab(tmp_path, "v4") as lab:
        image, _ = await lab.image()
        with pytest.raises(PrismRefusedError, match="has data already"):
            await lab.prism.upload_image(image, lab.folder / NAME, SIZE)


async def test_prism_checks_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(_: UploadFile) -> str:
        await trio.lowlevel.checkpoint()
        return "0" * 64

    async with restore_lab(tmp_path, "v3") as lab:
        monkeypatch.setattr(UploadFile, "sha256", wrong)
        with pytest.raises(PrismRefusedError, match="the checksum of the image does not match"):
            await lab.image()


async def test_an_upload_that_is_cut(tmp_path: Path) -> None:
    async with restore_lab(tmp_path, "v3") as lab:
        lab.simulator.faults.add("upload-cut", value=MIB)
        with pytest.raises(PrismUnreachableError, match="the connection broke during PUT"):
            await lab.image()
        (image,) = lab.simulator.world.images.values()
        assert image.size is None
        path = sparse_file(tmp_path / "again", SIZE)
        await lab.prism.upload_image(image.uuid, path, SIZE)  # here nothing was kept of the first


@APIS
async def test_a_prism_without_v3(api: Api, tmp_path: Path) -> None:
    async with restore_lab(tmp_path, api) as lab:
        await lab.prism.check_upload()
        lab.simulator.core.knobs["v3"] = False
        with pytest.raises(PrismRefusedError):
            await lab.prism.check_upload()


@APIS
async def test_what_does_not_fit_the_cluster_is_refused(api: Api, tmp_path: Path) -> None:
    """The rules of the simulator: subnets, containers and MACs are the cluster's business."""
    async with restore_lab(tmp_path, api) as lab:
        world = lab.simulator.world
        image, _ = await lab.image()
        new = await lab.new_vm(image)
        other = next(uuid for uuid in world.clusters if uuid != lab.cluster)
        (nic,) = new.hardware.nics
        (disk,) = new.disks
        mac = lab.simulator.vm("app01").nics[0].mac

        def with_nic(**changes: str) -> NewVm:
            nics = (replace(nic, **changes),)
            return replace(new, hardware=replace(new.hardware, nics=nics))

        subnet = (await lab.prism.subnets(other))[0].uuid
        container = (await lab.prism.containers(other))[0].uuid
        for wrong, message in (
            (with_nic(subnet=subnet), "is on another cluster"),
            (with_nic(mac=mac), "is in use by app01"),
            (replace(new, disks=(replace(disk, container=container),)), "is on another cluster"),
        ):
            with pytest.raises(PrismRefusedError, match=message):
                await lab.prism.create_vm(wrong, uuid4())
        assert [vm.name for vm in world.vms.values()] == ["app01"]
