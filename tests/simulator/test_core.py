# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from replicator.simulator.core import Core
from replicator.simulator.model import GroupDisk, Image, IscsiClient, Nic, Vm, VolumeGroup
from replicator.simulator.web import HttpError
from tests.simulator.core_lab import (
    GRAIN,
    MIB,
    done,
    ended,
    failed,
    guest,
    make_vm,
    small_core,
    snapshot,
)

BLOCK = 32768


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[Core]:
    async with small_core(tmp_path) as core:
        yield core


def group(core: Core, name: str = "vg", **more: object) -> VolumeGroup:
    made = VolumeGroup(uuid=name, name=name, cluster="a", target=f"{name}-target")
    for key, value in more.items():
        setattr(made, key, value)
    del core
    return made


def group_disk(name: str = "gd", index: int = 0) -> GroupDisk:
    return GroupDisk(uuid=name, index=index, size=0, container="ct-a")


async def test_a_snapshot_keeps_what_the_disks_held_and_regions_name_the_change(core: Core) -> None:
    await make_vm(core)
    await guest(core).write(MIB, b"a" * MIB)
    await guest(core, 1).write(0, b"b" * 512)
    first = await snapshot(core, "one")
    held = [core.storage.snapshot(uuid).read_bytes() for uuid in first[:2]]
    await guest(core).write(5 * MIB + 100, b"c")
    await guest(core).zero(MIB, GRAIN)
    second = await snapshot(core, "two")
    assert [core.storage.snapshot(uuid).read_bytes() for uuid in first[:2]] == held
    regions, going_on, size = await core.changed_regions(second[0], first[0], 0, None, BLOCK)
    assert regions == [(MIB, GRAIN, True), (5 * MIB, BLOCK, False)]
    assert (going_on, size) == (None, 8 * MIB)
    assert (await core.changed_regions(second[1], first[1], 0, None, BLOCK))[0] == []


async def test_a_snapshot_is_one_instant_over_all_disks(core: Core) -> None:
    """A writer that counts on both disks is caught between two steps at most."""
    await make_vm(core)
    number = 0
    stop = trio.Event()

    async def count() -> None:
        nonlocal number
        while not stop.is_set():
            number += 1
            for index in (0, 1):
                await guest(core, index).write(0, number.to_bytes(512, "big"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        while number < 4:  # three whole steps are over
            await trio.lowlevel.checkpoint()
        taken = await snapshot(core, "while written")
        stop.set()
    one, two = (
        int.from_bytes(core.storage.snapshot(uuid).read_bytes()[:512], "big") for uuid in taken[:2]
    )
    assert one - two in (0, 1)
    assert one >= 3


async def test_the_list_of_a_snapshots_disks_holds_the_cdrom_too(core: Core) -> None:
    await make_vm(core)
    taken = await snapshot(core, "one")
    assert len(taken) == 3
    regions, _, size = await core.changed_regions(taken[2], None, 0, None, BLOCK)
    assert (regions, size) == ([], 0)


async def test_regions_come_in_pages(core: Core) -> None:
    core.knobs["regions_page"] = 2
    await make_vm(core)
    for number in range(5):
        await guest(core).write(2 * number * BLOCK, b"x")
    (disk, *_) = await snapshot(core, "one")
    found, at = [], 0
    pages = 0
    while True:
        regions, going_on, _ = await core.changed_regions(disk, None, at, None, BLOCK)
        found += [region for region in regions if not region[2]]
        pages += 1
        if going_on is None:
            break
        at = going_on
    assert [offset for offset, _, _ in found] == [2 * n * BLOCK for n in range(5)]
    assert pages == 5


async def test_regions_against_another_disk_or_one_that_is_gone_are_refused(core: Core) -> None:
    await make_vm(core)
    first = await snapshot(core, "one")
    second = await snapshot(core, "two")
    with pytest.raises(HttpError) as wrong:
        await core.changed_regions(second[0], first[1], 0, None, BLOCK)
    assert wrong.value.reason == "invalid"
    (one,) = (s for s in core.world.snapshots.values() if s.name == "one")
    await done(core.delete_snapshot(one.uuid))
    with pytest.raises(HttpError) as gone:
        await core.changed_regions(second[0], first[0], 0, None, BLOCK)
    assert gone.value.reason == "not_found"
    assert not core.storage.snapshot(first[0]).exists()
    with pytest.raises(HttpError):
        await core.changed_regions(second[0], None, 0, None, 1000)


async def test_snapshots_expire(core: Core) -> None:
    await make_vm(core)
    (disk, *_) = await snapshot(core, "one", expires_at=time.time() + 3600)
    (one,) = core.world.snapshots.values()
    assert await core.find_snapshot(one.uuid) is one
    one.expires_at = time.time() - 1
    with pytest.raises(HttpError):
        await core.find_snapshot(one.uuid)
    assert not core.storage.snapshot(disk).exists()
    with pytest.raises(HttpError):
        core.create_snapshot(
            "late", ["app"], application_consistent=False, expires_at=time.time() - 1, element=False
        )


async def test_application_consistency_needs_guest_tools(core: Core) -> None:
    vm = await make_vm(core)

    def take(name: str, request_id: str) -> object:
        return core.create_snapshot(
            name, ["app"], application_consistent=True, expires_at=None, element=False, request_id=request_id
        )  # fmt: skip

    assert "quiesce" in await failed(take("one", "r1"))  # type: ignore[arg-type]
    assert not core.world.snapshots
    core.faults.add("application-downgraded")
    await done(take("two", "r2"))  # type: ignore[arg-type]
    vm.tools, vm.power = True, "ON"
    await done(take("three", "r3"))  # type: ignore[arg-type]
    assert {s.name: s.application_consistent for s in core.world.snapshots.values()} == {
        "two": False,
        "three": True,
    }


async def test_the_same_request_id_does_it_once(core: Core) -> None:
    await make_vm(core)
    options = {"application_consistent": False, "expires_at": None, "element": False}
    one = core.create_snapshot("s", ["app"], request_id="r", owner="u", **options)  # type: ignore[arg-type]
    again = core.create_snapshot("s", ["app"], request_id="r", owner="u", **options)  # type: ignore[arg-type]
    other = core.create_snapshot("s", ["app"], request_id="r", owner="v", **options)  # type: ignore[arg-type]
    assert one is again
    assert one is not other
    await done(one)
    await done(other)
    assert len(core.world.snapshots) == 2


async def test_a_volume_group_serves_a_clone_that_does_not_follow_the_vm(core: Core) -> None:
    await make_vm(core)
    await guest(core).write(0, b"a" * GRAIN)
    (disk, *_) = await snapshot(core, "one")
    await done(core.create_group(group(core), [(group_disk(), core.sources.snapshot_disk(disk))]))
    with core.storage.group_disk("gd").open("r+b") as file:
        file.write(b"z" * 512)
    assert core.storage.snapshot(disk).read_bytes()[:512] == b"a" * 512
    (one,) = core.world.snapshots.values()
    await done(core.delete_snapshot(one.uuid))
    assert core.storage.group_disk("gd").stat().st_size == 8 * MIB


async def test_a_volume_group_in_use_is_not_deleted(core: Core) -> None:
    await make_vm(core)
    made = group(core, clients=[IscsiClient(uuid="ic", initiator="iqn.2026-01.org.example:me")])
    made.disks = []
    await done(core.create_group(made, []))
    assert "detach" in await failed(core.delete_group("vg"))
    await done(core.detach_client("vg", "iqn.2026-01.org.example:me"))
    with pytest.raises(HttpError):
        core.detach_client("vg", "ic")
    await done(core.delete_group("vg"))
    assert not core.world.volume_groups


async def test_a_load_balanced_group_takes_no_initiator(core: Core) -> None:
    await done(core.create_group(group(core, load_balanced=True), []))
    with pytest.raises(HttpError):
        core.attach_client("vg", IscsiClient(uuid="ic", initiator="iqn.2026-01.org.example:me"))


async def test_a_vm_from_a_group_disk_an_image_and_a_clone(core: Core) -> None:
    vm = await make_vm(core, nics=[Nic(uuid="n", subnet="sn-a", mac="")])
    assert vm.nics[0].mac
    await guest(core).write(100, b"hello")
    await done(core.clone_vm("app", "twin"))
    (twin,) = (each for each in core.world.vms.values() if each.name == "twin")
    assert await guest(core, 0, twin.uuid).content() == await guest(core).content()
    assert twin.disks[0].uuid != vm.disks[0].uuid
    await done(core.create_image(Image(uuid="i", name="i"), core.sources.vm_disk("app-d0")))
    assert core.image_file("i").read_bytes() == await guest(core).content()
    await done(core.delete_vm(twin.uuid))
    assert not any(core.storage.disk(d.backing).exists() for d in twin.disks if d.backing)


async def test_an_image_is_put_once_and_checked(core: Core) -> None:
    await done(core.create_image(Image(uuid="i", name="i"), None))

    async def body() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"def"

    with pytest.raises(HttpError):
        await core.put_image("i", body(), "SHA_256", "00" * 32)
    assert not list(core.storage.image("i").parent.iterdir())
    digest = "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"
    await core.put_image("i", body(), "SHA_256", digest)
    assert core.world.images["i"].size == 6
    with pytest.raises(HttpError):
        await core.put_image("i", body(), None, None)


async def test_restore_gives_a_vm_that_is_off(core: Core) -> None:
    await make_vm(core, power="ON")
    await guest(core, 1).write(512, b"kept")
    await snapshot(core, "one")
    await guest(core, 1).write(512, b"lost")
    (one,) = core.world.snapshots.values()
    task = await done(core.restore_snapshot(one.uuid, one.vms[0].uuid, "back"))
    vm: Vm = core.world.vms[task.details["vmExtIds"][0]]
    assert (vm.name, vm.power) == ("back", "OFF")
    assert (await guest(core, 1, vm.uuid).content())[512:516] == b"kept"
    core.faults.add("restore-orphan")
    await failed(core.restore_snapshot(one.uuid, one.vms[0].uuid, "orphan"))
    assert "orphan" in {each.name for each in core.world.vms.values()}


async def test_power_and_a_guest_that_obeys_or_not(core: Core) -> None:
    vm = await make_vm(core)
    await done(core.set_power("app", "ON", "hard"))
    states: list[str] = []
    for obeys in (False, True):
        vm.acpi = obeys
        await done(core.set_power("app", "OFF", "acpi"))
        states.append(vm.power)
    assert states == ["ON", "OFF"]
    assert "not running" in await failed(core.set_power("app", "OFF", "acpi"))
    with pytest.raises(HttpError):
        core.set_power("app", "OFF", "guest")


async def test_tasks_fail_half_way_or_hang_as_asked(core: Core) -> None:
    core.faults.add("task-failed", "VolumeGroupCreate")
    await failed(core.create_group(group(core, "one"), []))
    core.faults.add("half-created", "VolumeGroupCreate")
    await failed(core.create_group(group(core, "two"), []))
    assert set(core.world.volume_groups) == {"two"}
    core.faults.add("task-stuck", "VolumeGroupCreate")
    stuck = core.create_group(group(core, "three"), [])
    while not core.faults.all[-1].struck:
        await trio.lowlevel.checkpoint()
    await done(core.create_group(group(core, "four"), []))
    assert stuck.status == "RUNNING"
    core.faults.add("etag-stale-in-task", "VolumeGroupDelete")
    task = await ended(core.delete_group("two"))
    assert task.error is not None
    assert task.error.code == "VMM-30303"
    assert "two" in core.world.volume_groups


async def test_the_world_outlives_the_process(tmp_path: Path) -> None:
    async with small_core(tmp_path) as core:
        await make_vm(core)
        await guest(core).write(0, b"kept")
        await snapshot(core, "one")
        core.faults.add("task-stuck")
        stuck = core.delete_vm("app")
        while stuck.status != "RUNNING":
            await trio.lowlevel.checkpoint()
    async with small_core(tmp_path) as core:
        assert (await guest(core).content())[:4] == b"kept"
        assert [s.name for s in core.world.snapshots.values()] == ["one"]
        assert core.world.tasks[stuck.uuid].status == "FAILED"
