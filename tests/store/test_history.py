# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whatever happens to a VM, every point that is kept reads as its disks were, on both sides the log says the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from receiver.store.verify import verify_point
from replicator.domain.model import PushKind
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError
from replicator.log import EventLog, open_log
from replicator.push.plan import Want
from tests.sites import GRAIN, ReceiverSite, SourceSite, receiver_site, source_site
from tests.store.random_vm import RandomVm, image_root

CYCLES = 20


def lose_maps(source: SourceSite) -> None:
    for path in (source.config.state_dir / "maps" / str(source.uuid)).iterdir():
        path.unlink()


#: What happens before a push, beside what the VM writes. The sizes end inside a grain.
STORY: dict[int, Callable[[RandomVm], None]] = {
    3: lambda vm: vm.grow("disk-0", vm.size("disk-0") + 1000),
    4: lambda vm: vm.grow("disk-0", vm.size("disk-0") + 3 * GRAIN + 123),
    6: lambda vm: vm.add("disk-2", 4 * GRAIN + 1),
    8: lambda vm: vm.remove("disk-1"),
    11: lambda vm: vm.add("disk-1", 5 * GRAIN),
    14: lambda vm: vm.grow("disk-1", 300 * GRAIN + 9),  # a second level of nodes
    18: lambda vm: vm.remove("disk-1"),
    19: lambda vm: vm.add("disk-1", 2 * GRAIN),
}
SEED_AGAIN = 16
#: Here the source has lost its maps, and compares: while disks grow and come, and after a seed.
RESYNCS = {4, 6, 17}
SHRINK = 13


async def check_points(receiver: ReceiverSite, vm: RandomVm) -> None:
    """Every point kept reads back, by its bytes and by a verification."""
    for number in list(receiver.store.vm.points):
        for disk, content in vm.expected[number].items():
            assert await receiver.read(number, disk) == content, f"point {number}, {disk}"
        result = await verify_point(receiver.store, number)
        assert result.damages == []
        assert result.map_faults == []


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".map" and path.parent.name != "events"
    }


def state(vm: ProtectedVm) -> dict[str, Any]:
    """All that a VM is in memory."""
    return {name: value for name, value in vars(vm).items() if name != "_pending_events"}


async def check_shrink_refused(receiver: ReceiverSite, source: SourceSite, vm: RandomVm) -> None:
    size, content = vm.size("disk-0"), vm.contents()["disk-0"]
    before = (files(receiver.config.state_dir), state(receiver.store.vm), state(source.log.vms[0]))
    vm.grow("disk-0", size - GRAIN)
    with pytest.raises(RefusedError, match=rf"disk-0 .*shrank from {size} to {size - GRAIN} bytes"):
        await source.push()
    assert before == (
        files(receiver.config.state_dir),
        state(receiver.store.vm),
        state(source.log.vms[0]),
    )
    vm.disks["disk-0"].write_bytes(content)


async def live(folder: Path, receiver: ReceiverSite, vm: RandomVm, keep: int) -> dict[str, Any]:
    """The whole story; returns the source's state at its end."""
    vm.add("disk-0", 10 * GRAIN + 777)
    vm.add("disk-1", 6 * GRAIN)
    last: dict[str, Any] = {}
    for number in range(1, CYCLES + 2):
        if number > 1:
            vm.work()
        if number in STORY:
            STORY[number](vm)
        async with source_site(folder / "source", receiver.port, vm.disks) as source:
            if number in RESYNCS:
                lose_maps(source)
            if number == SHRINK:
                await check_shrink_refused(receiver, source, vm)
            outcome = await source.push(Want.SEED_AGAIN if number == SEED_AGAIN else Want.RUN)
            assert outcome.point.number == number
            assert (outcome.compared is not None) == (number in RESYNCS)
            assert (outcome.point.kind is PushKind.SEED) == (number in (1, SEED_AGAIN))
            vm.committed(outcome.point)
            last = state(source.log.vms[0])
        store = await receiver.settled()
        assert store.vm.points[number].disks == outcome.point.disks
        assert store.vm.points[number].root == outcome.point.root
        assert len(store.vm.points) == min(keep, number)
        if number % 4 == 0:
            await check_points(receiver, vm)
    return last


async def folded(log_folder: Path) -> dict[str, Any]:
    async with open_log(log_folder) as log:
        return state(only(log))


def only(log: EventLog) -> ProtectedVm:
    (vm,) = log.vms
    return vm


@pytest.mark.parametrize(
    ("seed", "apply", "keep"), [(1, "yes", 40), (2, "no", 40), (3, "yes", 5), (4, "no", 5)]
)
async def test_every_point_kept_reads_back(
    tmp_path: Path, seed: int, apply: str, keep: int
) -> None:
    vm = RandomVm(tmp_path, seed)
    async with receiver_site(
        tmp_path / "receiver", push_apply_remote=apply, dr_restore_points=str(keep)
    ) as receiver:
        at_source = await live(tmp_path, receiver, vm, keep)
        await check_points(receiver, vm)
        at_receiver = state(receiver.store.vm)
    assert await folded(tmp_path / "receiver" / "events") == at_receiver
    assert await folded(tmp_path / "source" / "events") == at_source
    # The other setting takes over what it finds; nothing needs to be sent for that.
    other = "no" if apply == "yes" else "yes"
    async with receiver_site(
        tmp_path / "receiver", push_apply_remote=other, dr_restore_points=str(keep)
    ) as receiver:
        await receiver.settled()
        await check_points(receiver, vm)


async def test_one_image_has_one_root_by_whatever_cycles_it_came(tmp_path: Path) -> None:
    """The same final disks, by one seed, by small cycles and by a detour over other content and a growth."""
    final = RandomVm(tmp_path, 7)
    final.add("disk-0", 12 * GRAIN + 5)
    final.add("disk-1", 3 * GRAIN)
    target = final.contents()

    def at_once(_: int) -> dict[str, bytes]:
        return target

    def by_pieces(step: int) -> dict[str, bytes]:
        return {n: c[: step * GRAIN * 4].ljust(len(c), b"\0") for n, c in target.items()}

    def by_detour(step: int) -> dict[str, bytes]:
        if step == 4:
            return target
        size = {1: GRAIN // 2, 2: 2 * GRAIN + 1, 3: 3 * GRAIN}[step]
        return {n: bytes([step]) * min(size, len(c)) for n, c in target.items()}

    roots: set[tuple[bytes, ...]] = set()
    vm_roots: set[bytes] = set()
    source_root = b""
    for way, course, steps in (("a", at_once, 1), ("b", by_pieces, 4), ("c", by_detour, 4)):
        folder = tmp_path / way
        folder.mkdir()
        disks = {name: folder / f"{name}.raw" for name in target}
        async with receiver_site(folder / "receiver") as receiver:
            for step in range(1, steps + 1):
                for name, content in course(step).items():
                    disks[name].write_bytes(content)
                async with source_site(folder / "source", receiver.port, disks) as source:
                    outcome = await source.push()
                    assert outcome.point.number == step
                    source_root = outcome.point.root
            store = await receiver.settled()
            newest = store.vm.newest
            assert newest is not None
            assert source_root == newest.root
            roots.add(tuple(disk.root for disk in newest.disks))
            vm_roots.add(newest.root)
            assert {name: await receiver.read(None, name) for name in target} == target
    (disk_roots,) = roots
    assert disk_roots == tuple(image_root(target[name]) for name in sorted(target))
    assert len(vm_roots) == 1
