# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import errno
import random
import stat
from pathlib import Path

import pytest
import trio

from receiver.export.point_export import export_disk
from replicator.errors import RefusedError, StateError
from replicator.nbd.client import open_nbd
from replicator.nbd.protocol import NbdError
from tests.limits import HANG_S
from tests.receiver.store_lab import StoreFixture, open_store

GRAIN = 4096


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


async def test_an_export_is_the_point_and_is_gone_afterwards(store_fixture: StoreFixture) -> None:
    old, new = noise(30 * GRAIN, 1), noise(31 * GRAIN, 2)
    await store_fixture.push({"disk-0": old})
    await store_fixture.push({"disk-0": new})
    run_dir = store_fixture.state_dir / "run"
    async with export_disk(store_fixture.store, 1, "disk-0", run_dir) as export:
        socket = Path(export["socket"])
        async with open_nbd(socket, export["name"]) as client:
            assert client.read_only
            assert await client.read(0, client.size) == old
        assert store_fixture.store.is_held(1)
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert (export["size"], export["point"]) == (len(old), 1)
        disk = store_fixture.store.vm.points[1].disk("disk-0")
        assert disk is not None
        assert export["root"] == disk.root.hex()
    assert not list(run_dir.iterdir())
    assert not store_fixture.store.is_held(1)
    async with export_disk(store_fixture.store, None, "disk-0", run_dir) as export:
        assert (export["size"], export["point"]) == (len(new), 2)


async def test_what_there_is_not_is_refused_by_name(store_fixture: StoreFixture) -> None:
    await store_fixture.push({"disk-0": noise(GRAIN, 1), "disk-1": noise(GRAIN, 2)})
    run_dir = store_fixture.state_dir / "run"
    with pytest.raises(RefusedError, match=r"no disk 'disk-7' \(disks: disk-0, disk-1\)"):
        async with export_disk(store_fixture.store, None, "disk-7", run_dir):
            pass
    with pytest.raises(RefusedError, match="no recovery point 9"):
        async with export_disk(store_fixture.store, 9, "disk-0", run_dir):
            pass
    with pytest.raises(StateError, match="use a shorter state_dir"):
        async with export_disk(store_fixture.store, 1, "disk-0", run_dir / ("x" * 90)):
            pass
    assert not run_dir.exists()


async def test_an_export_stays_exact_while_pushes_are_applied_and_retention_lets_go(
    state_dir: Path,
) -> None:
    contents = [noise(16 * GRAIN, seed) for seed in range(6)]
    async with open_store(state_dir, keep=2) as fixture:
        await fixture.push({"disk-0": contents[0]})
        await fixture.settle()
        async with (
            export_disk(fixture.store, 1, "disk-0", state_dir / "run") as export,
            open_nbd(Path(export["socket"]), "disk-0") as client,
        ):
            for content in contents[1:]:
                await fixture.push({"disk-0": content})
                await fixture.settle()
                assert await client.read(0, client.size) == contents[0]
            assert fixture.store.vm.applied == 6
        await fixture.settle()
        assert sorted(fixture.store.vm.points) == [5, 6]


async def test_a_read_that_fails_is_an_error_to_the_client_and_damage_in_the_log(
    state_dir: Path,
) -> None:
    content = noise(64 * GRAIN, 3)
    async with open_store(state_dir, apply=False) as fixture:
        await fixture.push({"disk-0": bytes(64 * GRAIN)})
        await fixture.push({"disk-0": content})
        await fixture.settle()
        path = fixture.store.paths.point(2) / "disk-0.phcbt"
        raw = bytearray(path.read_bytes())
        for grain in (3, 40):
            raw[raw.index(content[grain * GRAIN :][:64])] ^= 1
        path.write_bytes(raw)
        async with (
            export_disk(fixture.store, 2, "disk-0", state_dir / "run") as export,
            open_nbd(Path(export["socket"]), "disk-0") as client,
        ):
            assert await client.read(20 * GRAIN, GRAIN) == content[20 * GRAIN : 21 * GRAIN]
            # The same damage met twice is one finding, and a long read names only the grain that is bad.
            for offset, length in (
                (2 * GRAIN, 4 * GRAIN),
                (3 * GRAIN, 7),
                (32 * GRAIN, 16 * GRAIN),
            ):
                with pytest.raises(NbdError) as failure:
                    await client.read(offset, length)
                assert failure.value.code == errno.EIO
            with trio.fail_after(HANG_S):
                while len(fixture.store.vm.damages) < 2:
                    await fixture.log.wait_change()
            found = [
                (d.point, d.disk, d.offset, d.length, d.file) for d in fixture.store.vm.damages
            ]
            name = "points/2/disk-0.phcbt"
            assert found == [(2, "disk-0", g * GRAIN, GRAIN, name) for g in (3, 40)]
        await fixture.check_point(1)


async def test_a_client_that_gives_up_at_once_does_not_hide_the_damage(state_dir: Path) -> None:
    """In the replica, which both points read, and in a delta of which only one is made; nothing is waited for."""
    first = noise(64 * GRAIN, 4)
    second = noise(GRAIN, 5) + first[GRAIN:]
    async with open_store(state_dir) as fixture:
        store = fixture.store
        await fixture.push({"disk-0": first})
        await fixture.push({"disk-0": second})
        await fixture.settle()
        root = store.paths.root
        for name, data in (
            ("replica/disk-0.raw", first[30 * GRAIN :][:64]),
            ("points/1/disk-0.rev.phcbt", first[:64]),
        ):
            raw = bytearray((root / name).read_bytes())
            raw[raw.index(data)] ^= 1
            (root / name).write_bytes(raw)
        for point, offset in ((2, 30 * GRAIN + 512), (1, 0)):
            async with (
                export_disk(store, point, "disk-0", state_dir / "run") as export,
                open_nbd(Path(export["socket"]), "disk-0") as client,
            ):
                with pytest.raises(NbdError) as failure:
                    await client.read(offset, 512)
                assert failure.value.code == errno.EIO
        found = {(d.point, d.offset, d.length, d.file) for d in store.vm.damages}
        assert found == {
            (2, 30 * GRAIN, GRAIN, "replica/disk-0.raw"),
            (1, 30 * GRAIN, GRAIN, "replica/disk-0.raw"),
            (1, 0, GRAIN, "points/1/disk-0.rev.phcbt"),
        }
