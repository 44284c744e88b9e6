# SPDX-License-Identifier: AGPL-3.0-or-later
"""v4 from beginning to end against the simulator: inventory, recovery points, volume groups, what is ours, the budget."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import trio

from replicator.prism.errors import (
    PrismAnswerError,
    PrismConflictError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismTaskError,
)
from replicator.prism.types import (
    Capability,
    Consistency,
    DiskSnapshot,
    Kind,
    Secrets,
    Vm,
    VmSnapshot,
)
from replicator.prism.v4_access import NEEDS
from tests.limits import HANG_S
from tests.prism.lab import PC, Asked, Said
from tests.prism.sim import APP, CLUSTER_A, Lab, once, simulated, v4_error
from tests.simulator_v4.lab import CLUSTER_B, DATA_DISK, MIB, SYSTEM_DISK, VIEWER

LATER_US = 4_000_000_000_000_000
NAME = "drx-1a2b3c4d-7-{}-20260102T030405Z"
INITIATOR = "iqn.2026-01.org.example:dr-service-01"
SECRETS = Secrets("Tq8sN2vLx5Rz", "Zb7mW4kPq9Xy")
GONE = str(UUID(int=1 << 100 | 4 << 76 | 8 << 60))


async def taken(lab: Lab, name: str = "rp", request_id: UUID | None = None) -> VmSnapshot:
    vm = await lab.prism.vm(APP)
    return await lab.prism.create_snapshot(
        vm, NAME.format(name), Consistency.CRASH, LATER_US, request_id or uuid4()
    )


async def test_what_is_there(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            clusters = {cluster.name: cluster for cluster in await lab.prism.clusters()}
            vms = await lab.prism.vms()
            vm = await lab.prism.vm(APP)
            assert lab.prism.capability is Capability.V4
            assert set(clusters) == {"cluster-a", "cluster-b"}
            assert clusters["cluster-a"].address == "127.9.9.20"
            assert clusters["cluster-a"].data_services == "127.9.9.21"
            assert clusters["cluster-a"].cvms == ("127.9.9.31", "127.9.9.32")
            assert clusters["cluster-a"].version == "7.3.1.5"
            assert clusters["cluster-a"].available
            assert clusters["cluster-b"].data_services is None
            assert len(vms) == 6
            assert {(one.name, one.cluster) for one in vms} >= {
                ("app01", CLUSTER_A),
                ("small00", CLUSTER_B),
            }
            assert [(d.identity, d.size, d.bus, d.index) for d in vm.disks] == [
                (SYSTEM_DISK, 4 * MIB, "SCSI", 0),
                (DATA_DISK, 2 * MIB, "SCSI", 1),
            ]
            assert vm.cluster == CLUSTER_A
            assert vm.power == "ON"
            assert vm.quiesce
            assert not vm.migrating
            assert vm.config["machineType"] == "Q35"
            with pytest.raises(PrismNotFoundError):
                await lab.prism.vm(GONE)
            assert lab.prism.requests == len(lab.script.asked)


async def test_a_list_of_many_pages_is_whole(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            model = lab.core.world.vms[APP]
            for number in range(230):
                uuid = f"33333333-3333-4333-8333-{number:012d}"
                lab.core.world.vms[uuid] = type(model)(
                    uuid=uuid, name=f"n{number}", cluster=CLUSTER_A
                )
            assert len(await lab.prism.vms()) == 236
            assert lab.script.count("GET /api/vmm/v4.3/ahv/config/vms") == 3


async def test_a_recovery_point_of_all_data_disks(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            assert [disk.disk for disk in snapshot.disks] == [SYSTEM_DISK, DATA_DISK]
            assert [disk.size for disk in snapshot.disks] == [4 * MIB, 2 * MIB]
            assert snapshot.vm == APP
            assert snapshot.cluster == CLUSTER_A
            assert snapshot.consistency is Consistency.CRASH
            assert len({disk.handle for disk in snapshot.disks}) == 2
            assert len({disk.part for disk in snapshot.disks}) == 1
            again = await lab.prism.snapshot(snapshot.uuid, await lab.prism.vm(APP))
            assert again == snapshot
            await lab.prism.extend_snapshot(snapshot, LATER_US + 1_000_000)
            (held,) = lab.core.world.snapshots.values()
            assert held.expires_at == LATER_US / 1e6 + 1
            for _ in range(2):
                await lab.prism.delete_snapshot(snapshot.uuid, CLUSTER_A)
            assert lab.core.world.snapshots == {}
            with pytest.raises(PrismNotFoundError):
                await lab.prism.snapshot(snapshot.uuid, await lab.prism.vm(APP))


async def test_an_older_recovery_point_tells_the_disks_of_then(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            old = await taken(lab)
            await lab.guest(0).grow(MIB)
            vm = await lab.prism.vm(APP)
            assert vm.disks[0].size == 5 * MIB
            assert (await lab.prism.snapshot(old.uuid, vm)).disks == old.disks


async def test_application_consistent_is_asked_for_and_believed_only_if_told(
    tmp_path: Path,
) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            vm = await lab.prism.vm(APP)

            async def take(name: str) -> VmSnapshot:
                return await lab.prism.create_snapshot(
                    vm, name, Consistency.APPLICATION, LATER_US, uuid4()
                )

            assert (await take("a")).consistency is Consistency.APPLICATION
            (body,) = [a.json for a in lab.script.asked if a.method == "POST"]
            part = body["vmRecoveryPoints"][0]
            assert part["applicationConsistentProperties"]["backupType"] == "COPY_BACKUP"
            lab.core.world.vms[APP].tools = False
            lab.core.faults.add("application-downgraded")
            assert (await take("b")).consistency is Consistency.CRASH
            with pytest.raises(PrismTaskError):
                await take("c")


async def test_the_same_request_twice_makes_one(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            first = await taken(lab, request_id=UUID(int=5))
            second = await taken(lab, request_id=UUID(int=5))
            assert first == second
            assert len(lab.core.world.snapshots) == 1
            groups = [
                await lab.prism.create_volume_group(
                    first, first.disks[0], NAME.format("vg"), SECRETS, UUID(int=6)
                )
                for _ in range(2)
            ]
            assert groups[0] == groups[1]
            assert len(lab.core.world.volume_groups) == 1


async def test_a_data_disk_that_is_not_in_the_recovery_point_is_an_error(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            vm = await lab.prism.vm(APP)
            extra = type(vm.disks[0])(GONE, GONE, "SCSI", 5, MIB, None)
            more = Vm(vm.uuid, vm.name, vm.cluster, vm.power, (*vm.disks, extra), True, False, {})
            with pytest.raises(PrismAnswerError, match=r"scsi\.5"):
                await lab.prism.create_snapshot(more, "x", Consistency.CRASH, LATER_US, uuid4())


async def expose(lab: Lab, snapshot: VmSnapshot, disk: DiskSnapshot) -> str:
    group = await lab.prism.create_volume_group(snapshot, disk, NAME.format("vg"), SECRETS, uuid4())
    assert group.disk_sizes == {0: disk.size}
    attachment = await lab.prism.attach(group, INITIATOR, SECRETS, uuid4())
    (held,) = lab.core.world.volume_groups.values()
    assert [client.uuid for client in held.clients] == [attachment.uuid]
    assert held.clients[0].initiator == attachment.initiator == INITIATOR
    assert held.target == group.target
    assert held.chap
    assert held.secret == SECRETS.target
    assert held.clients[0].secret == SECRETS.client
    await lab.prism.detach(group.uuid, attachment)
    await lab.prism.detach(group.uuid, attachment)
    assert held.clients == []
    await lab.prism.delete_volume_group(group.uuid)
    assert lab.core.world.volume_groups == {}
    return group.uuid


async def test_a_disk_is_exposed_and_put_away(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            uuid = await expose(lab, snapshot, snapshot.disks[1])
            # The disk came with the group.
            assert not any(
                a.method == "POST" and a.path.endswith("/disks") for a in lab.script.asked
            )
            await lab.prism.delete_volume_group(uuid)
            await lab.prism.detach(uuid, None)


async def test_a_disk_is_added_where_a_group_does_not_take_one(tmp_path: Path) -> None:
    refused = Said(400, v4_error("VOL-1", "INVALID_INPUT", "disks"))
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            lab.between = once("POST /api/volumes/v4.3/config/volume-groups", refused)
            await expose(lab, snapshot, snapshot.disks[0])
            assert (
                lab.script.count("POST") == 1 + 2 + 1 + 1 + 2
            )  # rp, vg twice, disk, attach, detach twice
            await expose(lab, snapshot, snapshot.disks[0])
            with_disk = [a for a in lab.script.asked if a.method == "POST" and b'"disks"' in a.raw]
            assert len(with_disk) == 1  # it has learnt


async def test_what_a_failed_creation_left_is_cleared_before_the_next(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            lab.core.faults.add("half-created")
            await expose(lab, snapshot, snapshot.disks[0])


async def test_deleting_detaches_whoever_is_attached(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            for whole in (True, False):
                group = await lab.prism.create_volume_group(
                    snapshot, snapshot.disks[0], NAME.format("vg"), None, uuid4()
                )
                for number in range(2):
                    await lab.prism.attach(group, f"{INITIATOR}-{number}", None, uuid4())
                if whole:
                    await lab.prism.delete_volume_group(group.uuid)
                else:
                    await lab.prism.detach(group.uuid, None)
                    assert lab.core.world.volume_groups[group.uuid].clients == []
                    await lab.prism.delete_volume_group(group.uuid)
                assert lab.core.world.volume_groups == {}


@pytest.mark.parametrize("kind", ["etag-stale", "etag-stale-in-task"])
async def test_a_stale_etag_is_read_again(tmp_path: Path, kind: str) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            if kind == "etag-stale":
                stale = Said(412, v4_error("PLAT-10005", "ETAG_MISMATCH", "invalid eTag"))
                lab.between = once("DELETE", stale, times=3)
                await lab.prism.delete_snapshot(snapshot.uuid, CLUSTER_A)
                ids = [
                    a.headers["ntnx-request-id"] for a in lab.script.asked if a.method == "DELETE"
                ]
                assert len(ids) == len(set(ids)) == 4
            else:
                lab.core.faults.add("etag-stale-in-task", count=3)
                await lab.prism.delete_snapshot(snapshot.uuid, CLUSTER_A)
            assert lab.core.world.snapshots == {}


async def test_a_conflict_without_end_is_an_error(tmp_path: Path) -> None:
    stale = Said(412, v4_error("PLAT-10005", "ETAG_MISMATCH", "invalid eTag"))
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            lab.between = once("DELETE", stale, times=100)
            with pytest.raises(PrismConflictError, match="10 times"):
                await lab.prism.delete_snapshot(snapshot.uuid, CLUSTER_A)
            assert lab.script.count("DELETE") == 10


async def test_what_is_ours_is_found_by_its_name(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            other = await lab.prism.create_snapshot(
                await lab.prism.vm(APP), "somebody-elses", Consistency.CRASH, LATER_US, uuid4()
            )
            group = await lab.prism.create_volume_group(
                snapshot, snapshot.disks[0], NAME.format("vg"), None, uuid4()
            )
            by_filter = await lab.prism.find("drx-1a2b3c4d-")
            refused = Said(400, v4_error("X", "INVALID_FILTER"))

            async def between(asked: Asked) -> Said | None:
                await trio.lowlevel.checkpoint()
                return refused if "$filter" in asked.query else None

            lab.between = between
            by_hand = await lab.prism.find("drx-1a2b3c4d-")
            assert by_filter == by_hand
            assert {(found.kind, found.uuid) for found in by_filter} == {
                (Kind.SNAPSHOT, snapshot.uuid),
                (Kind.VOLUME_GROUP, group.uuid),
            }
            (point,) = [found for found in by_filter if found.kind is Kind.SNAPSHOT]
            assert (point.vm, point.cluster) == (APP, CLUSTER_A)
            assert point.created_at_us == snapshot.taken_at_us
            assert await lab.prism.find("drx-ffffffff-") == []
            assert other.uuid not in {found.uuid for found in by_filter}


async def test_a_prism_that_is_upgraded_under_way(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            lab.core.knobs["v4_window"] = "pc.7.3"
            await lab.prism.vms()
            assert lab.script.count("/v4.1/ahv") == 1
            window = dict.fromkeys(("vmm", "clustermgmt", "prism", "volumes"), (2, 2))
            lab.core.knobs["v4_window"] = window
            assert len(await lab.prism.vms()) == 6
            assert lab.script.count("/v4.2/ahv") == 1
            with pytest.raises(PrismNotFoundError):
                await lab.prism.vm(GONE)  # one that is not there is no reason to look again
            assert lab.script.count("OPTIONS") == 2


async def test_an_image_of_a_recovery_point_is_not_to_be_had(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab)
            assert not lab.prism.clones_by_image
            with pytest.raises(PrismRefusedError, match="data_path"):
                await lab.prism.create_image(snapshot, snapshot.disks[0], "x", uuid4())
            await lab.prism.delete_image(GONE)


async def test_rights_are_seen_by_reading_and_by_role(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            lab.core.world.users[lab.user.uuid].name = "svc-dr"
            rights = await lab.prism.access()
            assert {right.duty for right in rights} == {
                "backup",
                "VM administration",
                "clusters read-only",
            }
            assert all(right.granted for right in rights)


async def test_a_viewer_may_read_and_lacks_what_is_named(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            lab.user = lab.core.world.users[VIEWER]
            lab.user.name = "svc-dr"
            rights = await lab.prism.access()
            lacking = {right.duty: right.lacks for right in rights if right.granted is False}
            assert {duty: str(lacks).split(", ") for duty, lacks in lacking.items()} == {
                duty: list(NEEDS[duty]) for duty in ("backup", "VM administration")
            }
            with pytest.raises(PrismPermissionError) as caught:
                await taken(lab)
            assert caught.value.permission == "Create_Recovery_Point"


async def test_roles_that_cannot_be_seen_are_unknown(tmp_path: Path) -> None:
    forbidden = Said(403, v4_error("IAM-1", "FORBIDDEN"))
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            lab.between = once("/api/iam/", forbidden, times=100)
            rights = await lab.prism.access()
            assert [right.granted for right in rights].count(None) == 3
            assert not any(right.granted is False for right in rights)


async def test_the_budget_of_a_cycle(tmp_path: Path) -> None:
    """nutanix-data-path.md, part E: at most 25 requests to Prism Central, polls included, for a disk's incremental cycle."""
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            prism = lab.prism
            old = await taken(lab, "one")
            before = lab.hosts.meters.by_host[PC]
            vm = await prism.vm(APP)
            new = await prism.create_snapshot(
                vm, NAME.format("two"), Consistency.CRASH, LATER_US, uuid4()
            )
            async with aclosing(prism.regions(new, new.disks[0], (old, old.disks[0]))) as pages:
                assert [page async for page in pages]
            await expose_once(lab, new)
            await prism.delete_snapshot(old.uuid, CLUSTER_A)
            spent = lab.hosts.meters.by_host[PC] - before
            polls = sum("config/tasks/" in a.path for a in lab.script.asked[-spent:])
    print(f"requests to Prism Central in a cycle: {spent}, of these looks at tasks: {polls}")  # noqa: T201
    assert spent - polls <= 16
    assert spent <= 25


async def expose_once(lab: Lab, snapshot: VmSnapshot) -> None:
    group = await lab.prism.create_volume_group(
        snapshot, snapshot.disks[0], NAME.format("vg"), SECRETS, uuid4()
    )
    attachment = await lab.prism.attach(group, INITIATOR, SECRETS, uuid4())
    await lab.prism.detach(group.uuid, attachment)
    await lab.prism.delete_volume_group(group.uuid)
