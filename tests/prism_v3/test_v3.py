# SPDX-License-Identifier: AGPL-3.0-or-later
"""The v3 client against scripted answers: what is asked where, what repeats do, and what misbehaviour becomes. Time is jumped."""

from __future__ import annotations

import copy
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from replicator.disk import Extent
from replicator.prism.errors import (
    ImageNeededError,
    PrismAnswerError,
    PrismConflictError,
    PrismNotFoundError,
    PrismRefusedError,
    PrismTaskError,
    RegionsLostError,
)
from replicator.prism.types import Attachment, Consistency, Kind, Secrets, Vm, VmSnapshot
from replicator.prism.v3 import PrismV3
from tests.prism.lab import PC, PE, Asked, Said, Script, scripted
from tests.prism_v3.fake import (
    CLUSTER,
    DEVICES,
    SIZE,
    VM,
    VMDISKS,
    Fake,
    disk_v2,
    disk_v3,
    refused,
    vm_entity,
    vm_v2,
)

REQUEST = UUID(int=7)
NAME = "drx-1a2b3c4d-7-rp-20260102T030405Z"
GROUP = "drx-1a2b3c4d-7-vg-20260102T030405Z"
EXPIRES_US = 1_767_927_845_000_001
IQN = "iqn.2026-01.org.example:host"
SECRETS = Secrets("Tq8sN2vLx5Rz", "Zb7mW4kPq9Xy")
MIB = 1 << 20


@asynccontextmanager
async def client(
    tmp_path: Path, fake: Fake, **changes: Any
) -> AsyncGenerator[tuple[PrismV3, Script], None]:
    async with scripted(tmp_path, fake, **changes) as (script, hosts):
        yield PrismV3(hosts), script


async def taken(prism: PrismV3, request: UUID = REQUEST, name: str = NAME) -> tuple[Vm, VmSnapshot]:
    vm = await prism.vm(VM)
    return vm, await prism.create_snapshot(vm, name, Consistency.CRASH, EXPIRES_US, request)


def lines(script: Script) -> list[str]:
    return [f"{asked.host} {asked.method} {asked.path}" for asked in script.asked]


# Inventory


async def test_prism_central_is_not_among_its_clusters(tmp_path: Path) -> None:
    async with client(tmp_path, Fake()) as (prism, _):
        (cluster,) = await prism.clusters()
    assert (cluster.uuid, cluster.name, cluster.address) == (CLUSTER, "cluster-a", PE)
    assert (cluster.data_services, cluster.version, cluster.available) == (
        "198.51.100.21",
        "7.3.1.5",
        True,
    )


async def test_a_vm_has_its_disks_in_order_and_what_its_element_says_of_them(
    tmp_path: Path,
) -> None:
    async with client(tmp_path, Fake()) as (prism, _):
        vm = await prism.vm(VM)
    assert [(disk.identity, disk.backing, disk.size) for disk in vm.disks] == [
        (DEVICES[0], VMDISKS[0], SIZE),
        (DEVICES[1], VMDISKS[1], SIZE),
    ]
    assert (vm.cluster, vm.power, vm.quiesce, sorted(vm.config)) == (
        CLUSTER,
        "ON",
        False,
        ["metadata", "spec", "status"],
    )


def without_device_ids(vm: dict[str, Any]) -> None:
    for item in vm["vm_disk_info"]:
        item["disk_address"].pop("device_uuid", None)


def swapped_places(vm: dict[str, Any]) -> None:
    """The device id says what a disk is, even where the place says another."""
    first, second = vm["vm_disk_info"][1:]
    first["disk_address"]["device_index"], second["disk_address"]["device_index"] = 1, 0


@pytest.mark.parametrize("change", [without_device_ids, swapped_places])
async def test_disks_are_matched_by_device_else_by_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    described = vm_v2()
    change(described)
    async with client(tmp_path, Fake(before=v2_vm(described))) as (prism, _):
        vm = await prism.vm(VM)
    assert [(disk.identity, disk.backing) for disk in vm.disks] == list(
        zip(DEVICES, VMDISKS, strict=True)
    )


def v2_vm(described: dict[str, Any]) -> Callable[[Asked], Said | None]:
    return lambda asked: (
        Said(200, described) if asked.host == PE and asked.path.endswith(f"v2.0/vms/{VM}") else None
    )


@pytest.mark.parametrize(
    "disks",
    [
        pytest.param([disk_v2(0)], id="one is missing"),
        pytest.param([disk_v2(0), disk_v2(1), {**disk_v2(1), "disk_address": {
            "device_bus": "scsi", "device_index": 5, "vmdisk_uuid": VMDISKS[1],
            "device_uuid": "d0000000-0000-4000-8000-000000000009"}}], id="one more"),
        pytest.param([disk_v2(0), {**disk_v2(1), "disk_address": {
            "device_bus": "scsi", "device_index": 1, "device_uuid": DEVICES[1]}}], id="no vmdisk"),
    ],
)  # fmt: skip
async def test_disks_that_the_element_tells_otherwise_are_an_error(
    tmp_path: Path, disks: list[dict[str, Any]]
) -> None:
    fake = Fake(before=v2_vm({"uuid": VM, "vm_disk_info": disks}))
    async with client(tmp_path, fake) as (prism, _):
        with pytest.raises(PrismAnswerError):
            await prism.vm(VM)


async def test_a_disk_of_a_volume_group_is_told_apart(tmp_path: Path) -> None:
    fake = Fake()
    fake.central["vms"][VM]["status"]["resources"]["disk_list"].append(
        {**disk_v3(0, "VOLUME_GROUP"), "uuid": "d0000000-0000-4000-8000-000000000005",
         "volume_group_reference": {"kind": "volume_group", "uuid": "vg-1"}}
    )  # fmt: skip
    fake.central["vms"][VM]["status"]["resources"]["disk_list"][-1]["device_properties"][
        "disk_address"
    ]["device_index"] = 7
    async with client(tmp_path, fake) as (prism, _):
        vm, snapshot = await taken(prism)
    assert [disk.volume_group for disk in vm.disks] == [None, None, "vg-1"]
    assert [disk.disk for disk in snapshot.disks] == list(DEVICES)


async def test_a_long_list_is_read_page_by_page_and_each_once(tmp_path: Path) -> None:
    fake = Fake()
    for number in range(150):
        entity = copy.deepcopy(vm_entity())
        entity["metadata"]["uuid"] = f"22222222-0000-4000-8000-{number:012d}"
        fake.central["vms"][entity["metadata"]["uuid"]] = entity
    async with client(tmp_path, fake) as (prism, script):
        vms = await prism.vms()
    assert len({vm.uuid for vm in vms}) == len(vms) == 151
    assert script.count("vms/list") == 2


async def test_a_vm_that_is_gone(tmp_path: Path) -> None:
    async with client(tmp_path, Fake()) as (prism, _):
        with pytest.raises(PrismNotFoundError):
            await prism.vm("11111111-1111-4111-8111-111111111112")


# Snapshots


async def test_a_snapshot_is_made_on_the_element_with_an_id_that_was_handed_out(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    async with client(tmp_path, Fake(late_files=2)) as (prism, script):
        _, snapshot = await taken(prism)
    (made,) = [each for each in script.asked if each.path.endswith("/vm_snapshots")]
    assert made.host == PE
    assert made.json["metadata"]["uuid"] == snapshot.uuid
    # Milliseconds, and not a moment too early.
    assert made.json["spec"]["expiration_time_msecs"] == 1_767_927_845_001
    assert [(disk.disk, disk.backing) for disk in snapshot.disks] == list(
        zip(DEVICES, VMDISKS, strict=True)
    )
    assert all(disk.handle.endswith(disk.backing) for disk in snapshot.disks)
    assert snapshot.consistency is Consistency.CRASH


@pytest.mark.parametrize("hands_out", [(PE,), (PC,), ()])
async def test_a_request_that_is_repeated_makes_no_second_snapshot(
    tmp_path: Path, hands_out: tuple[str, ...]
) -> None:
    fake = Fake(hands_out=hands_out)
    async with client(tmp_path, fake) as (prism, _):
        _, first = await taken(prism)
    async with client(tmp_path, fake) as (again, _):  # another process
        _, second = await taken(again)
    assert first.uuid == second.uuid
    assert list(fake.snapshots) == [first.uuid]


async def test_snapshots_at_once_where_nobody_hands_out_ids(tmp_path: Path) -> None:
    fake = Fake(hands_out=())
    async with client(tmp_path, fake) as (prism, _), trio.open_nursery() as nursery:
        await prism.clusters()
        for number in range(3):
            nursery.start_soon(taken, prism, UUID(int=number), f"{NAME}{number}")
    assert len(fake.snapshots) == 3


@pytest.mark.parametrize("hands_out", [(PE,), ()])
async def test_an_answer_that_is_lost_makes_no_second_snapshot(
    tmp_path: Path, hands_out: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake(hands_out=hands_out)

    def cut_once(asked: Asked) -> Said | None:
        if asked.method == "POST" and asked.path.endswith("/vm_snapshots"):
            fake.before = lambda _: None
            fake._snapshots(asked, "")
            return Said(cut=True)
        return None

    fake.before = cut_once
    async with client(tmp_path, fake) as (prism, _):
        _, snapshot = await taken(prism)
    assert list(fake.snapshots) == [snapshot.uuid]


async def test_a_snapshot_that_lacks_a_disk_is_an_error(tmp_path: Path) -> None:
    fake = Fake()

    def short(_: Asked) -> Said | None:
        for snapshot in fake.snapshots.values():
            del snapshot["status"]["snapshot_file_list"][2:]
        return None

    fake.before = short
    async with client(tmp_path, fake) as (prism, _):
        with pytest.raises(PrismAnswerError, match=r"disk scsi\.1 of VM app01 is not in"):
            await taken(prism)


async def test_a_failed_task_says_why(tmp_path: Path) -> None:
    def failing(asked: Asked) -> Said | None:
        if not asked.path.endswith("/tasks/poll"):
            return None
        task = {"uuid": "a-task", "status": "FAILED", "error_code": "42", "error_detail": "no VSS"}
        return Said(200, {"entities": [task]})

    async with client(tmp_path, Fake(before=failing)) as (prism, _):
        with pytest.raises(PrismTaskError, match="no VSS") as caught:
            await taken(prism)
    assert caught.value.code == "42"


async def test_tasks_are_looked_at_one_by_one_where_they_cannot_be_polled(tmp_path: Path) -> None:
    def no_poll(asked: Asked) -> Said | None:
        return refused(404, "ENTITY_NOT_FOUND") if asked.path.endswith("/tasks/poll") else None

    async with client(tmp_path, Fake(before=no_poll)) as (prism, script):
        await taken(prism)
    assert script.count("GET /api/nutanix/v3/tasks/a-task") == 1


async def test_a_snapshot_that_is_gone_after_its_task_is_not_waited_for_as_long_as_one_may_take(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock

    def gone(asked: Asked) -> Said | None:
        looked = asked.method == "GET" and "/vm_snapshots/" in asked.path
        return refused(404, "ENTITY_NOT_FOUND") if looked else None

    async with client(tmp_path, Fake(before=gone)) as (prism, _):
        started = trio.current_time()
        with pytest.raises(PrismNotFoundError):
            await taken(prism)
        assert trio.current_time() - started < 120


async def test_a_snapshot_can_be_kept_longer_and_deleted_twice(tmp_path: Path) -> None:
    fake = Fake()
    async with client(tmp_path, fake) as (prism, _):
        vm, snapshot = await taken(prism)
        assert await prism.snapshot(snapshot.uuid, vm) == snapshot
        await prism.extend_snapshot(snapshot, EXPIRES_US + 10**9)
        assert fake.snapshots[snapshot.uuid]["spec"]["expiration_time_msecs"] == 1_767_928_845_001
        await prism.delete_snapshot(snapshot.uuid, CLUSTER)
        await prism.delete_snapshot(snapshot.uuid, "")
        assert fake.snapshots == {}
        with pytest.raises(PrismNotFoundError):
            await prism.snapshot(snapshot.uuid, vm)
        with pytest.raises(PrismNotFoundError):
            await prism.extend_snapshot(snapshot, EXPIRES_US)


# Changed regions


def region(offset: int, length: int, kind: str = "REGULAR", name: str = "type") -> dict[str, Any]:
    return {"offset": offset, "length": length, name: kind}


async def all_regions(
    prism: PrismV3, snapshot: VmSnapshot, since: VmSnapshot | None = None
) -> list[Extent]:
    pair = None if since is None else (since, since.disks[0])
    found: list[Extent] = []
    async with aclosing(prism.regions(snapshot, snapshot.disks[0], pair)) as pages:
        async for page in pages:
            assert page.file_size == SIZE
            found.extend(page.regions)
    return found


@pytest.mark.parametrize("name", ["type", "region_type"])
async def test_regions_come_page_by_page_and_in_order(tmp_path: Path, name: str) -> None:
    fake = Fake(
        regions=[
            region(0, MIB, name=name),
            region(MIB, MIB, "ZEROED", name=name),
            region(4 * MIB, MIB, name=name),
            region(8 * MIB, MIB, name=name),
            region(SIZE - MIB, 2 * MIB, name=name),
        ]
    )
    async with client(tmp_path, fake) as (prism, script):
        _, first = await taken(prism)
        _, second = await taken(prism, UUID(int=8), NAME[:-1] + "Y")
        full = await all_regions(prism, second)
        changed = await all_regions(prism, second, first)
    assert full == changed
    assert full == [
        Extent(0, MIB),
        Extent(MIB, MIB, zero=True),
        Extent(4 * MIB, MIB),
        Extent(8 * MIB, MIB),
        Extent(SIZE - MIB, MIB),  # clipped
    ]
    bodies = [asked.json for asked in script.asked if asked.path.endswith("changed_regions")]
    assert [body["start_offset"] for body in bodies] == [0, 4 * MIB, SIZE - MIB] * 2
    # Without a reference there is no such key: an explicit null is refused.
    assert ["reference_snapshot_file_path" in body for body in bodies] == [False] * 3 + [True] * 3


async def test_a_reference_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    fake = Fake()
    async with client(tmp_path, fake) as (prism, _):
        _, first = await taken(prism)
        _, second = await taken(prism, UUID(int=8), NAME[:-1] + "Y")
        await prism.delete_snapshot(first.uuid, CLUSTER)
        with pytest.raises(
            RegionsLostError, match=f"{first.uuid} cannot be had: that snapshot is gone"
        ):
            await all_regions(prism, second, first)
        await prism.delete_snapshot(second.uuid, CLUSTER)
        with pytest.raises(RegionsLostError, match="kInvalidValue"):
            await all_regions(prism, second)


async def test_a_reference_of_another_vmdisk_is_not_even_asked_for(tmp_path: Path) -> None:
    fake = Fake()
    async with client(tmp_path, fake) as (prism, script):
        _, first = await taken(prism)
        since = (first, first.disks[1])
        with pytest.raises(RegionsLostError, match="another vmdisk"):
            async with aclosing(prism.regions(first, first.disks[0], since)) as pages:
                await anext(pages)
    assert script.count("changed_regions") == 0


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"file_size": SIZE, "region_list": [], "next_offset": 100}, id="no step"),
        pytest.param({"file_size": SIZE, "region_list": [region(0, 5, "OTHER")]}, id="kind"),
        pytest.param({"file_size": SIZE, "region_list": [region(-1, 5)]}, id="negative"),
        pytest.param({"file_size": SIZE, "region_list": [region(2 * SIZE, 5)]}, id="outside"),
        pytest.param({"region_list": []}, id="no size"),
    ],
)
async def test_regions_that_make_no_sense_are_an_error(
    tmp_path: Path, answer: dict[str, Any]
) -> None:
    fake = Fake()
    async with client(tmp_path, fake) as (prism, _):
        _, snapshot = await taken(prism)
        fake.before = lambda asked: (
            Said(200, answer) if asked.path.endswith("changed_regions") else None
        )
        with pytest.raises(PrismAnswerError):
            await all_regions(prism, snapshot)


# Volume groups


async def grouped(prism: PrismV3, image: str | None = None) -> tuple[VmSnapshot, str]:
    _, snapshot = await taken(prism)
    group = await prism.create_volume_group(
        snapshot, snapshot.disks[0], GROUP, SECRETS, REQUEST, image=image
    )
    assert group.name == GROUP
    assert group.disk_sizes == {0: SIZE}
    return snapshot, group.uuid


@pytest.mark.parametrize(("clones", "works"), [(True, "vg-clone"), (False, "vg-url")])
async def test_auto_takes_the_first_way_that_works_and_says_so_once(
    tmp_path: Path,
    clones: bool,
    works: str,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    caplog.set_level(logging.INFO)
    fake = Fake(clones=clones)
    async with client(tmp_path, fake) as (prism, script):
        snapshot, uuid = await grouped(prism)
        await prism.delete_volume_group(uuid)
        tries = script.count("POST /PrismGateway/services/rest/v2.0/volume_groups")
        await prism.create_volume_group(snapshot, snapshot.disks[1], GROUP, SECRETS, REQUEST)
        assert script.count("POST /PrismGateway/services/rest/v2.0/volume_groups") == tries + clones
        assert not prism.clones_by_image
    assert sum(f"auto: {works} works" in line for line in caplog.messages) == 1


async def test_auto_ends_with_images_and_then_needs_them_from_the_start(tmp_path: Path) -> None:
    fake = Fake(clones=False, urls=False)
    async with client(tmp_path, fake) as (prism, _):
        _, snapshot = await taken(prism)
        with pytest.raises(ImageNeededError):
            await prism.create_volume_group(snapshot, snapshot.disks[0], GROUP, None, REQUEST)
        assert prism.clones_by_image
        assert fake.central["volume_groups"] == {}
        image = await prism.create_image(snapshot, snapshot.disks[0], "drx-img", REQUEST)
        source = fake.central["images"][image]["spec"]["resources"]["source_uri"]
        assert source == f"nfs://{PE}{snapshot.disks[0].handle}"
        _, uuid = await grouped(prism, image)
        (disk,) = fake.central["volume_groups"][uuid]["spec"]["resources"]["disk_list"]
        assert disk["data_source_reference"] == {"kind": "image", "uuid": image}
        await prism.delete_image(image)
        await prism.delete_image(image)
    assert fake.central["images"] == {}


async def test_a_snapshot_that_is_gone_settles_no_way(tmp_path: Path) -> None:
    """Else every later disk would be copied into an image first."""
    async with client(tmp_path, Fake(clones=False, urls=False)) as (prism, _):
        _, snapshot = await taken(prism)
        await prism.delete_snapshot(snapshot.uuid, CLUSTER)
        with pytest.raises(PrismRefusedError, match="clone_spec"):
            await prism.create_volume_group(snapshot, snapshot.disks[0], GROUP, None, REQUEST)
        assert not prism.clones_by_image


async def test_a_way_that_is_configured_is_the_only_one(tmp_path: Path) -> None:
    async with client(tmp_path, Fake(clones=False), expose="vg-clone") as (prism, script):
        with pytest.raises(PrismRefusedError, match="clone_spec"):
            await grouped(prism)
    assert script.count("POST /api/nutanix/v3/volume_groups") == 0
    async with client(tmp_path, Fake(), expose="vg-image") as (prism, _):
        assert prism.clones_by_image


async def test_a_lost_answer_or_a_repeat_makes_no_second_group(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake()

    def cut_once(asked: Asked) -> Said | None:
        if asked.method == "POST" and asked.path.endswith("v3/volume_groups"):
            fake.before = lambda _: None
            fake._made(asked, "volume_groups")
            return Said(cut=True)
        return None

    fake.before = cut_once
    async with client(tmp_path, fake, expose="vg-url") as (prism, _):
        _, first = await grouped(prism)
    async with client(tmp_path, fake, expose="vg-url") as (again, _):
        _, second = await grouped(again)
    assert [first] == [second] == list(fake.central["volume_groups"])


async def test_what_a_failed_task_left_is_removed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake()

    def failing(asked: Asked) -> Said | None:
        if asked.path.endswith("/tasks/poll") and fake.central["volume_groups"]:
            fake.before = lambda _: None
            return Said(200, {"entities": [{"uuid": "a-task", "status": "FAILED"}]})
        return None

    fake.before = failing
    async with client(tmp_path, fake, expose="vg-url") as (prism, _):
        with pytest.raises(PrismTaskError):
            await grouped(prism)
    assert fake.central["volume_groups"] == {}


async def test_attaching_meets_a_newer_version_and_tries_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake()
    async with client(tmp_path, fake) as (prism, script):
        snapshot, uuid = await grouped(prism)
        group = await prism.create_volume_group(snapshot, snapshot.disks[0], GROUP, None, REQUEST)

        def newer(asked: Asked) -> Said | None:
            if asked.method == "PUT":
                fake.before = lambda _: None
                fake.central["volume_groups"][uuid]["metadata"]["spec_version"] += 1
            return None

        fake.before = newer
        attachment = await prism.attach(group, IQN, SECRETS, REQUEST)
        attached = fake.central["volume_groups"][uuid]["status"]["resources"]["attachment_list"]
        assert attached == [{"iscsi_initiator_name": IQN}]
        puts = [asked.json for asked in script.asked if asked.method == "PUT"]
        assert [put["metadata"]["spec_version"] for put in puts] == [0, 1]
        resources = puts[-1]["spec"]["resources"]
        assert resources["target_secret"] == SECRETS.target
        assert resources["attachment_list"][0]["client_secret"] == SECRETS.client
        await prism.detach(uuid, attachment)
        await prism.detach(uuid, attachment)
        assert len([asked for asked in script.asked if asked.method == "PUT"]) == 3


async def test_a_group_that_others_change_all_the_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake()
    async with client(tmp_path, fake) as (prism, script):
        snapshot, _ = await grouped(prism)
        group = await prism.create_volume_group(snapshot, snapshot.disks[0], GROUP, None, REQUEST)
        fake.before = lambda asked: (
            refused(409, "SPEC_UPDATE_ERROR") if asked.method == "PUT" else None
        )
        with pytest.raises(PrismConflictError):
            await prism.attach(group, IQN, SECRETS, REQUEST)
    assert len([asked for asked in script.asked if asked.method == "PUT"]) == 10


async def test_deleting_detaches_whoever_is_attached_and_can_be_repeated(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake()
    async with client(tmp_path, fake) as (prism, _):
        snapshot, uuid = await grouped(prism)
        group = await prism.create_volume_group(snapshot, snapshot.disks[0], GROUP, None, REQUEST)
        await prism.attach(group, IQN, None, REQUEST)
        await prism.attach(group, "iqn.2026-01.org.example:other", None, REQUEST)
        await prism.delete_volume_group(uuid)
        await prism.delete_volume_group(uuid)
        await prism.detach(uuid, None)
    assert fake.central["volume_groups"] == fake.element_groups == {}


async def test_a_group_that_only_its_element_knows(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake(central_knows_clones=False)
    async with client(tmp_path, fake) as (prism, _):
        snapshot, uuid = await grouped(prism)
        group = await prism.create_volume_group(snapshot, snapshot.disks[0], GROUP, None, REQUEST)
        with pytest.raises(PrismRefusedError, match="iscsi_chap = none"):
            await prism.attach(group, IQN, SECRETS, REQUEST)
        await prism.attach(group, IQN, None, REQUEST)
        await prism.attach(group, IQN, None, REQUEST)
        clients = fake.element_groups[uuid]["attachment_list"]
        assert clients == [{"iscsi_initiator_name": IQN}]
        await prism.detach(uuid, Attachment(IQN, IQN))
        assert fake.element_groups[uuid]["attachment_list"] == []
        await prism.attach(group, IQN, None, REQUEST)
    async with client(tmp_path, fake) as (sweeper, _):  # which knows no cluster of it
        await sweeper.delete_volume_group(uuid)
    assert fake.element_groups == {}


# What is ours


async def test_everything_of_ours_is_found_on_every_host(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    fake = Fake(central_knows_clones=False)
    async with client(tmp_path, fake) as (prism, _):
        snapshot, group = await grouped(prism)
        image = await prism.create_image(snapshot, snapshot.disks[0], "drx-1a2b3c4d-7-img", REQUEST)
        other = await prism.create_image(snapshot, snapshot.disks[0], "drx-99999999-1-img", REQUEST)
        found = await prism.find("drx-1a2b3c4d-")
    assert {(each.kind, each.uuid) for each in found} == {
        (Kind.SNAPSHOT, snapshot.uuid),
        (Kind.VOLUME_GROUP, group),
        (Kind.IMAGE, image),
    }
    assert other not in {each.uuid for each in found}
    (one,) = [each for each in found if each.kind is Kind.SNAPSHOT]
    assert (one.cluster, one.vm, one.name) == (CLUSTER, VM, NAME)
    assert one.created_at_us == snapshot.taken_at_us


async def test_an_element_that_cannot_be_asked_makes_finding_fail(tmp_path: Path) -> None:
    """Else what is there would be taken for gone."""
    fake = Fake()
    fake.before = lambda asked: (
        refused(403, "ACCESS_DENIED") if asked.path.endswith("vm_snapshots/list") else None
    )
    async with client(tmp_path, fake) as (prism, _):
        with pytest.raises(Exception, match="lacks the permission"):
            await prism.find("drx-")
