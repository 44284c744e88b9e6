# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the source decides, over a Prism in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
import trio

from replicator.errors import ReferenceLostError, SnapshotGoneError, SourceError
from replicator.iscsi import PortalUnreachableError
from replicator.prism.errors import (
    ImageNeededError,
    PrismAnswerError,
    PrismRefusedError,
    PrismUnreachableError,
)
from replicator.prism.types import Capability, Consistency, Found, Kind
from replicator.sources.base import SnapshotName
from replicator.sources.nutanix import NutanixSite, NutanixSource, rest
from replicator.sources.nutanix.names import ObjectName
from tests.nutanix.cluster import FakeTargets, contents, process, replay
from tests.nutanix.fake import FakeDisk, FakePrism, FakeWorld, failed_task
from tests.sources.nutanix_lab import INITIATOR, fake_world

GRAIN = 64 << 10
FIRST = SnapshotName("p1", None)
SECOND = SnapshotName("p2", "p1")


@pytest.fixture
def world() -> FakeWorld:
    found = fake_world(2)
    for disk in found.disks:
        disk.data[: 2 * GRAIN] = b"a" * 2 * GRAIN
    return found


@pytest.fixture
def targets(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> FakeTargets:
    found = FakeTargets(world)
    found.use(monkeypatch)
    return found


def site_of(source: NutanixSource) -> NutanixSite:
    return source._site


async def _commit(world: FakeWorld, items: dict[str, Any], folder: Path) -> dict[str, bytes]:
    async with process(world, items, folder) as source:
        snapshot = await source.take(FIRST)
        replica = await replay(snapshot, {}, None)
        await snapshot.aclose()
        await source.confirm(FIRST)
    return replica


async def _taken(
    world: FakeWorld, folder: Path, prism: FakePrism | None = None, **settings: Any
) -> Consistency:
    """Take a snapshot; what it is worth."""
    async with process(world, {}, folder, prism=prism, **settings) as source:
        await (await source.take(FIRST)).aclose()
    (snapshot, _, _), *others = world.snapshots.values()
    assert not others
    return snapshot.consistency


async def test_application_consistent_where_it_can_be(world: FakeWorld, tmp_path: Path) -> None:
    assert await _taken(world, tmp_path) is Consistency.APPLICATION


async def test_without_guest_tools_it_says_so(
    world: FakeWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.quiesce = False
    assert await _taken(world, tmp_path) is Consistency.CRASH
    assert "no guest tools" in caplog.text
    world.snapshots.clear()
    with pytest.raises(SourceError, match="application_consistent = try"):
        await _taken(world, tmp_path, application_consistent="true")
    assert not world.snapshots


async def test_a_guest_that_cannot_be_quiesced(
    world: FakeWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prism = FakePrism(world)
    # The task failed, and left a snapshot behind.
    prism.fails_after["create_snapshot"] = failed_task()
    assert await _taken(world, tmp_path, prism) is Consistency.CRASH
    assert "taking a crash-consistent one: the task failed" in caplog.text


async def test_true_does_not_fall_back(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    prism = FakePrism(world)
    prism.fails_after["create_snapshot"] = failed_task()
    async with process(
        world, items, tmp_path, prism=prism, application_consistent="true"
    ) as source:
        with pytest.raises(SourceError, match="the task failed"):
            await source.take(FIRST)
        await source.abandon(FIRST)
    assert not world.snapshots


async def test_a_task_of_unknown_end_is_not_repeated(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    prism = FakePrism(world)
    prism.fails_after["create_snapshot"] = failed_task(timed_out=True)
    async with process(world, items, tmp_path, prism=prism) as source:
        with pytest.raises(SourceError):
            await source.take(FIRST)
        assert len(world.snapshots) == 1
        assert [each.push_id for each in await source.held()] == ["p1"]
        await source.abandon(FIRST)
    assert not world.snapshots


async def test_what_may_still_come_is_looked_for_again(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    prism = FakePrism(world)
    prism.fails["create_snapshot"] = failed_task(timed_out=True)
    async with process(world, items, tmp_path, prism=prism) as source:
        with pytest.raises(SourceError):
            await source.take(FIRST)
        await source.abandon(FIRST)
        assert await source.held() == []
        (key,) = [key for key in items if key.startswith("prism/")]
        # The task comes to its end after all.
        made = await FakePrism(world).create_snapshot(
            world.vm(), items[key]["name"], Consistency.CRASH, 0, UUID(items[key]["request_id"])
        )
        assert await source.sweep(None, None) == [made.name]
        assert not world.snapshots
        assert list(items) == ["installation"]


async def test_migration_is_refused(world: FakeWorld, tmp_path: Path) -> None:
    world.migrating = True
    with pytest.raises(SourceError, match="on its way to another cluster"):
        await _taken(world, tmp_path)


async def test_disks_of_volume_groups_are_left_out_and_named(
    world: FakeWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.disks.append(FakeDisk("shared", "b", 7, bytearray(GRAIN), volume_group="vg-7"))
    async with process(world, {}, tmp_path) as source:
        snapshot = await source.take(FIRST)
        assert "shared" not in [disk.identity for disk in snapshot.disks]
        await snapshot.aclose()
    assert "SCSI.7 of volume group vg-7" in caplog.text


async def test_a_reference_that_is_gone_says_so(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    await _commit(world, items, tmp_path)
    world.snapshots.clear()
    async with process(world, items, tmp_path) as source:
        snapshot = await source.take(SECOND)
        assert snapshot.lost_tracking is not None
        assert "reference_snapshot not found" in snapshot.lost_tracking
        assert "is gone" in snapshot.lost_tracking
        assert await replay(snapshot, {}, None) == contents(world)
        await snapshot.aclose()


async def test_a_vm_on_another_cluster_has_no_reference(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    await _commit(world, items, tmp_path)
    world.cluster = "other"
    async with process(world, items, tmp_path) as source:
        snapshot = await source.take(SECOND)
        assert "the VM on other now" in str(snapshot.lost_tracking)
        await snapshot.aclose()


@pytest.mark.parametrize("pages", ["gone", "contradicting"])
async def test_one_disk_that_was_restored_is_compared_alone(
    pages: str, world: FakeWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items: dict[str, Any] = {}
    before = await _commit(world, items, tmp_path)
    prism = FakePrism(world)
    if pages == "gone":
        world.disks[0].backing = "restored"
        words = "has taken the place"
    else:
        prism.fails[f"regions {world.disks[0].identity}"] = PrismAnswerError(
            "a page that goes back"
        )
        words = "a page that goes back"
    async with process(world, items, tmp_path, prism=prism) as source:
        snapshot = await source.take(SECOND)
        assert snapshot.lost_tracking is None
        assert "reference_snapshot not found" in caplog.text
        assert words in caplog.text
        lost, known = snapshot.disks
        with pytest.raises(ReferenceLostError, match=words):
            await anext(lost.view.extents("p1"))
        assert [extent async for extent in known.view.extents("p1")] == []
        assert await replay(snapshot, {}, None) == contents(world) == before
        await snapshot.aclose()


async def test_disks_are_added_and_removed(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    await _commit(world, items, tmp_path)
    removed, stays = world.disks
    added = FakeDisk("c0f0", "backing-9", 2, bytearray(b"n" * 3 * GRAIN))
    world.disks = [stays, added]
    async with process(world, items, tmp_path) as source:
        snapshot = await source.take(SECOND)
        assert [disk.identity for disk in snapshot.disks] == [stays.identity, "c0f0"]
        assert removed.identity not in [disk.identity for disk in snapshot.disks]
        assert snapshot.lost_tracking is None
        with pytest.raises(ReferenceLostError, match="was added since push p1"):
            await anext(snapshot.disks[1].view.extents("p1"))
        assert await replay(snapshot, {}, None) == contents(world)
        await snapshot.aclose()


async def test_the_size_in_the_snapshot_counts(world: FakeWorld, tmp_path: Path) -> None:
    """The VM was asked for its disks before one of them grew."""
    prism = FakePrism(world)
    stale = world.vm()
    world.disks[0].data.extend(b"z" * GRAIN)

    async def vm(uuid: str) -> Any:
        del uuid
        await trio.lowlevel.checkpoint()
        return stale

    prism.vm = vm  # type: ignore[method-assign]
    items: dict[str, Any] = {}
    created = prism.create_snapshot

    async def create_snapshot(*args: Any) -> Any:
        made = await created(*args)
        sizes = {disk.identity: disk.size for disk in stale.disks}
        disks = [msgspec.structs.replace(d, size=sizes[d.disk]) for d in made.disks]
        return msgspec.structs.replace(made, disks=tuple(disks))

    prism.create_snapshot = create_snapshot  # type: ignore[method-assign, assignment]
    async with process(world, items, tmp_path, prism=prism) as source:
        snapshot = await source.take(FIRST)
        assert snapshot.disks[0].view.size == len(world.disks[0].data)
        assert await replay(snapshot, {}, None) == contents(world)
        await snapshot.aclose()
        again = await source.reopen(FIRST)
        assert again.disks[0].view.size == len(world.disks[0].data)
        await again.aclose()


async def test_without_a_map_all_is_read(
    world: FakeWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prism = FakePrism(world)
    prism.fails[f"regions {world.disks[0].identity}"] = PrismUnreachableError(
        "no route to the Element"
    )
    async with process(world, {}, tmp_path, prism=prism) as source:
        snapshot = await source.take(FIRST)
        first, second = snapshot.disks
        assert sum([e.length async for e in first.view.extents()]) == first.view.size
        assert sum([e.length async for e in second.view.extents()]) == 2 * GRAIN
        await snapshot.aclose()
    assert "all of it is read" in caplog.text
    assert "no route to the Element" in caplog.text


async def test_an_old_reference_is_kept_alive(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    await _commit(world, items, tmp_path)
    (uuid,) = world.snapshots
    until = world.snapshots[uuid][2]
    world.now_us = until - 1_000_000
    async with process(world, items, tmp_path) as source:
        await (await source.take(SECOND)).aclose()
    assert world.snapshots[uuid][2] > until + 3_600_000_000


async def test_the_sweep_leaves_others_alone(world: FakeWorld, tmp_path: Path) -> None:
    items: dict[str, Any] = {}
    await _commit(world, items, tmp_path)
    own = items["installation"]
    made_us = world.now_us - 2 * 3_600_000_000
    old = str(ObjectName(own, "p0", Kind.IMAGE, made_us, 0))
    young = str(ObjectName(own, "p0", Kind.IMAGE, world.now_us, 0))
    theirs = str(ObjectName("ffffffff", "p0", Kind.IMAGE, made_us))
    for number, name in enumerate((old, young, theirs, f"drx-{own}-holiday")):
        world.images[str(number)] = (name, b"")
    world.strangers.append(Found(Kind.VM, "9", str(ObjectName(own, "p0", Kind.VM, made_us))))
    async with process(world, items, tmp_path) as source:
        assert await source.sweep(None, "p1") == [old]
        assert await source.sweep(None, "p1") == []
    assert [name for name, _ in world.images.values()] == [young, theirs, f"drx-{own}-holiday"]


async def test_a_committed_snapshot_is_no_snapshot_any_more(
    world: FakeWorld, tmp_path: Path
) -> None:
    items: dict[str, Any] = {}
    await _commit(world, items, tmp_path)
    async with process(world, items, tmp_path) as source:
        with pytest.raises(SnapshotGoneError, match="is committed"):
            await source.reopen(FIRST)
        await source.abandon(FIRST)
        assert len(world.snapshots) == 1, "a reference is not abandoned"


async def test_giving_up_ends_what_is_being_read(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path
) -> None:
    items: dict[str, Any] = {}
    async with process(world, items, tmp_path, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        assert not world.groups, "nothing is attached before it is read"
        await snapshot.disks[0].view.read(0, 10)
        assert len(world.groups) == len(world.attached) == 1
        await source.abandon(FIRST)
        assert world.objects() == []
        with pytest.raises(SnapshotGoneError):
            await snapshot.disks[0].view.read(0, 10)
        with pytest.raises(SnapshotGoneError):
            await snapshot.disks[1].view.read(0, 10)
        await snapshot.aclose()
    (login,) = targets.logins
    assert login.chap is not None
    assert login.chap.user == INITIATOR
    assert login.chap.mutual


async def test_cancelled_it_is_taken_down_all_the_same(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path
) -> None:
    items: dict[str, Any] = {}
    prism = FakePrism(world)
    with trio.CancelScope() as scope:
        async with process(world, items, tmp_path, prism=prism, data_path="iscsi") as source:
            snapshot = await source.take(FIRST)
            for disk in snapshot.disks:
                await disk.view.read(0, 10)
            scope.cancel()
            await snapshot.disks[0].view.read(0, 10)
    assert scope.cancelled_caught
    assert not world.groups
    last = prism.calls[-4:]
    assert sorted(last) == ["delete_volume_group"] * 2 + ["detach"] * 2
    assert last[0] == "detach"
    assert targets.logins


async def test_what_cannot_be_taken_down_is_left_to_the_sweep(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del targets
    items: dict[str, Any] = {}
    prism = FakePrism(world)
    async with process(world, items, tmp_path, prism=prism, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        await snapshot.disks[0].view.read(0, 10)
        prism.fails["delete_volume_group"] = PrismUnreachableError("no answer")
        await snapshot.aclose()
        assert not world.attached, "what could be undone was"
        assert "no answer; the next sweep tries again" in caplog.text
        assert len(await source.sweep(FIRST, None)) == 1
    assert not world.groups


async def test_a_second_try_within_a_second_has_a_name_of_its_own(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path
) -> None:
    """Else the entry of the first, which may have left something, would be lost."""
    del targets
    items: dict[str, Any] = {}
    prism = FakePrism(world)
    prism.fails_after["create_volume_group"] = failed_task()
    async with process(world, items, tmp_path, prism=prism, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        with pytest.raises(SourceError, match="the task failed"):
            await snapshot.disks[0].view.read(0, 4)
        assert await snapshot.disks[0].view.read(0, 4) == b"aaaa"
        assert len(set(world.objects())) == 3
        await source.abandon(FIRST)
    assert world.objects() == []
    assert list(items) == ["installation"]


async def test_a_target_may_appear_late(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path, autojump_clock: Any
) -> None:
    del autojump_clock
    async with process(world, {}, tmp_path, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        targets.hidden = 12
        assert await snapshot.disks[0].view.read(0, 4) == b"aaaa"
        await snapshot.aclose()


async def test_a_target_that_never_appears(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path, autojump_clock: Any
) -> None:
    del autojump_clock
    async with process(world, {}, tmp_path, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        targets.hidden = 1000
        with pytest.raises(SourceError, match=f"shows {INITIATOR} no target"):
            await snapshot.disks[0].view.read(0, 4)
        assert not world.groups
        await snapshot.aclose()


async def _unreachable(*_: Any) -> Any:
    await trio.lowlevel.checkpoint()
    raise PortalUnreachableError("iSCSI portal 127.0.0.1:3260 does not answer")


async def test_auto_reads_over_rest_where_iscsi_does_not_work(
    world: FakeWorld,
    targets: FakeTargets,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets, "discover", _unreachable)
    targets.use(monkeypatch)
    async with process(world, {}, tmp_path, data_path="auto") as source:
        snapshot = await source.take(FIRST)
        assert await replay(snapshot, {}, None) == contents(world)
        await snapshot.aclose()
    assert caplog.text.count("reading over REST instead") == 1
    assert not world.groups
    assert not world.images


async def test_v4_has_no_other_way(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "discover", _unreachable)
    targets.use(monkeypatch)
    prism = FakePrism(world, capability=Capability.V4)
    async with process(world, {}, tmp_path, prism=prism, data_path="auto") as source:
        snapshot = await source.take(FIRST)
        with pytest.raises(PortalUnreachableError):
            await snapshot.disks[0].view.read(0, 4)
        await snapshot.aclose()


async def test_rest_where_prism_makes_no_image(world: FakeWorld, tmp_path: Path) -> None:
    prism = FakePrism(world)
    prism.fails["create_image"] = PrismRefusedError("use data_path = iscsi")
    async with process(world, {}, tmp_path, prism=prism) as source:
        snapshot = await source.take(FIRST)
        with pytest.raises(PrismRefusedError, match="use data_path = iscsi"):
            await snapshot.disks[0].view.read(0, 4)
        await snapshot.aclose()
        await source.abandon(FIRST)
    assert not world.images


@pytest.mark.parametrize(("cut", "words"), [(-1, "ended after"), (1, "holds more than")])
async def test_an_image_of_another_size(
    cut: int, words: str, world: FakeWorld, tmp_path: Path
) -> None:
    prism = FakePrism(world)
    created = prism.create_image

    async def create_image(*args: Any) -> str:
        uuid = await created(*args)
        name, data = world.images[uuid]
        world.images[uuid] = (name, data[:cut] if cut < 0 else data + b"+")
        return uuid

    prism.create_image = create_image  # type: ignore[method-assign, assignment]
    async with process(world, {}, tmp_path, prism=prism) as source:
        snapshot = await source.take(FIRST)
        with pytest.raises(SourceError, match=words):
            await snapshot.disks[0].view.read(0, 4)
        assert not world.images
        await snapshot.aclose()


def test_zeros_become_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    data = bytes(GRAIN) + b"x" * 10 + bytes(3 * GRAIN) + b"y"
    with path.open("wb+") as file:
        file.truncate(2 + len(data))
        rest.write_sparse(file.fileno(), 1, data)
    assert path.read_bytes() == b"\0" + data + b"\0"
    assert path.stat().st_blocks * 512 < len(data) - 2 * GRAIN


async def test_a_prism_that_clones_images_only(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path
) -> None:
    del targets
    prism = FakePrism(world)
    prism.fails["create_volume_group"] = ImageNeededError("an image first")
    async with process(world, {}, tmp_path, prism=prism, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        assert await snapshot.disks[0].view.read(0, 4) == b"aaaa"
        assert len(world.images) == len(world.groups) == 1
        await snapshot.aclose()
    assert prism.calls[-3:] == ["detach", "delete_volume_group", "delete_image"]
    assert not world.images


async def test_failures_to_attach_are_counted(
    world: FakeWorld, targets: FakeTargets, tmp_path: Path
) -> None:
    del targets
    prism = FakePrism(world)
    prism.fails["attach"] = PrismUnreachableError("no answer")
    async with process(world, {}, tmp_path, prism=prism, data_path="iscsi") as source:
        snapshot = await source.take(FIRST)
        with pytest.raises(PrismUnreachableError):
            await snapshot.disks[0].view.read(0, 4)
        assert site_of(source).attach_failures == 1
        assert not world.groups
        assert await snapshot.disks[0].view.read(0, 4) == b"aaaa", "the next read tries again"
        await snapshot.aclose()
