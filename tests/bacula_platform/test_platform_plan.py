# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a VM goes and what it is made of, without a cluster: what is chosen, and what is refused with what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bacula_adapter.restore.platform_plan import (
    Place,
    PlannedVm,
    choose_cluster,
    describe,
    parse_network_map,
    plan_vm,
)
from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from replicator.config import Config, check
from replicator.errors import RefusedError, UsageError
from replicator.hardware import DiskSlot, Firmware, Hardware, Nic
from replicator.prism.types import Cluster, Container, Subnet
from tests.bacula_platform import lab

A = Cluster("aaaaaaaa-0000-4000-8000-000000000001", "cluster-a", None, None, "7.3", True)
B = Cluster("bbbbbbbb-0000-4000-8000-000000000002", "cluster-b", None, None, "7.3", True)
LAN = Subnet(uuid="11111111-0000-4000-8000-000000000001", name="lan", clusters=(A.uuid,))
DMZ = Subnet(uuid="11111111-0000-4000-8000-000000000002", name="dmz", clusters=(A.uuid,))
CONTAINER = Container(uuid="22222222-0000-4000-8000-000000000001", name="ct-1", cluster=A.uuid)
OTHER = replace(CONTAINER, uuid="22222222-0000-4000-8000-000000000002", name="ct-2")
DEFAULT = replace(
    CONTAINER, uuid="22222222-0000-4000-8000-000000000003", name="default-container-8813"
)
OWN = replace(CONTAINER, uuid="22222222-0000-4000-8000-000000000004", name="Own", internal=True)
HARDWARE = Hardware(
    platform="nutanix",
    uuid="33333333-0000-4000-8000-000000000001",
    name="app01",
    cluster=A.uuid,
    cluster_name="cluster-a",
)


def config(**options: str) -> Config:
    return check({"state_dir": "/nonexistent", **options})


def slot(number: int, bus: str = "scsi", index: int = 0, **more: str) -> DiskSlot:
    return DiskSlot(identity=f"id-{number}", bus=bus, index=index, size=1 << 20, **more)


def vm_of(hardware: Hardware | None, count: int = 1) -> RestoredVm:
    disks = tuple(
        RestoredDisk(disk=f"disk-{n}", identity=f"id-{n}", path=Path("/none"), size=1 << 20)
        for n in range(count)
    )
    description = None if hardware is None else lab.describe(hardware, disks)
    return RestoredVm(name="app01", disks=disks, description=description)


def plan(hardware: Hardware | None, count: int = 1, **given: Any) -> PlannedVm:
    place = Place(
        cluster=A, subnets=(LAN, DMZ), containers=given.pop("containers", (CONTAINER, OWN))
    )
    options = {
        "networks": {},
        "clusters": (A, B),
        "there": (),
        "macs": frozenset[str](),
        "config": config(),
        **given,
    }
    return plan_vm(vm_of(hardware, count), place, **options)


def test_the_cluster_that_is_chosen() -> None:
    clusters = (A, B)
    assert choose_cluster(clusters, config(), HARDWARE) is A
    assert choose_cluster(clusters, config(target_cluster="cluster-b"), HARDWARE) is B
    assert choose_cluster(clusters, config(target_cluster=B.uuid.upper()), HARDWARE) is B
    moved = replace(HARDWARE, cluster="another Prism's", cluster_name="cluster-b")
    assert choose_cluster(clusters, config(), moved) is B
    assert choose_cluster(clusters, config(cluster="cluster-b"), None) is B
    assert choose_cluster((B,), config(), HARDWARE) is B
    with pytest.raises(
        RefusedError, match=r"give target_cluster; there are: cluster-a .*cluster-b"
    ):
        choose_cluster(clusters, config(), None)
    with pytest.raises(RefusedError, match="cluster-a is not available"):
        choose_cluster((replace(A, available=False), B), config(), HARDWARE)
    with pytest.raises(RefusedError, match="several are called so"):
        choose_cluster((A, replace(A, uuid=B.uuid)), config(target_cluster="cluster-a"), None)


def test_the_container_of_each_disk() -> None:
    slots = (slot(0, container=OTHER.uuid), slot(1, "scsi", 1, container_name="ct-1"))
    hardware = replace(HARDWARE, disks=slots)
    found = plan(hardware, 2, containers=(CONTAINER, OTHER, DEFAULT))
    assert [disk.container for disk in found.disks] == [OTHER.uuid, CONTAINER.uuid]
    (disk,) = plan(HARDWARE, containers=(CONTAINER, OTHER, DEFAULT)).disks
    assert disk.container == DEFAULT.uuid
    (disk,) = plan(HARDWARE, containers=(CONTAINER, OWN)).disks
    assert disk.container == CONTAINER.uuid
    with pytest.raises(RefusedError, match=r"give target_container; there are: ct-1 .*ct-2"):
        plan(HARDWARE, containers=(CONTAINER, OTHER, OWN))
    with pytest.raises(RefusedError, match=r"target_container: .* Own: there is none"):
        plan(HARDWARE, config=config(target_container="Own"))


def test_the_place_of_each_disk() -> None:
    """Of the same place twice the second one moves; what AHV has not becomes SCSI; Q35 has no IDE."""
    slots = (slot(0, "virtio"), slot(1, "nvme", 3), slot(2, "nvme", 3), slot(3, "ide", 1))
    found = plan(replace(HARDWARE, disks=slots), 5)
    assert [(disk.bus, disk.index) for disk in found.disks] == [
        ("PCI", 0),
        ("SCSI", 3),
        ("SCSI", 0),
        ("IDE", 1),
        ("SCSI", 1),
    ]
    secure = replace(HARDWARE, disks=slots, firmware=Firmware.UEFI, secure_boot=True)
    assert [disk.bus for disk in plan(secure, 4).disks] == ["PCI", "SCSI", "SCSI", "SATA"]


def test_networks_and_macs() -> None:
    nics = (
        Nic(subnet=LAN.uuid, mac="50:6b:8d:00:00:01"),
        Nic(subnet="gone", subnet_name="dmz", mac="50:6b:8d:00:00:02"),
        Nic(subnet="gone", subnet_name="old", mac="50:6b:8d:00:00:03", connected=False),
    )
    hardware = replace(HARDWARE, nics=nics)
    networks = parse_network_map(f" old = dmz , , {LAN.uuid}=dmz")
    found = plan(hardware, networks=networks).hardware.nics
    assert [nic.subnet for nic in found] == [DMZ.uuid, DMZ.uuid, DMZ.uuid]
    assert [nic.connected for nic in found] == [True, True, False]
    assert [nic.mac for nic in found] == [nic.mac for nic in nics]
    taken = plan(hardware, networks=networks, macs=frozenset({"50:6b:8d:00:00:03"}))
    assert not any(nic.mac for nic in taken.hardware.nics)
    elsewhere = plan(replace(hardware, cluster="another Prism's"), networks=networks)
    assert not any(nic.mac for nic in elsewhere.hardware.nics), "its original cannot be seen here"
    with pytest.raises(RefusedError, match="NIC 2 is in subnet old"):
        plan(hardware)
    for text, message in (
        ("a", "expected source"),
        ("=b", "expected"),
        ("a=b,a=c", "a is given twice"),
    ):
        with pytest.raises(UsageError, match=f"network_map: .*{message}"):
            parse_network_map(text)


def test_what_nobody_knows_is_prisms_default() -> None:
    found = plan(None, config=config(vcpu="2", memory_mib="4096"))
    assert (found.hardware.sockets, found.hardware.memory_mib) == (2, 4096)
    assert "nothing is known of its hardware: 2 vCPU, 4096 MiB, no NIC" in found.notes
    foreign = replace(HARDWARE, platform="qemu", timezone="localtime")
    assert not plan(foreign).hardware.timezone


def test_names_and_descriptions() -> None:
    assert plan(HARDWARE).name == "app01-restored"
    long = vm_of(replace(HARDWARE, name="n" * 80))
    place = Place(cluster=A, subnets=(), containers=(CONTAINER,))
    found = plan_vm(
        RestoredVm(name="n" * 80, disks=long.disks),
        place,
        config(),
        {},
        clusters=(A,),
        there=(),
        macs=frozenset(),
    )
    assert len(found.name) == 80
    assert found.name.endswith("-restored")
    with pytest.raises(RefusedError, match="restore_vm_name: longer than"):
        plan(HARDWARE, config=config(restore_vm_name="n" * 81))
    told = plan(replace(HARDWARE, description="two\nlines " + "x" * 600))
    text = describe(told, "drx-1a2b3c4d-r7-rst-20260102T030405Z", "Restore.1")
    assert text.startswith("two lines xxx")
    assert text.endswith("job Restore.1 (drx-1a2b3c4d-r7-rst-20260102T030405Z)")
    assert len(text) < 700
