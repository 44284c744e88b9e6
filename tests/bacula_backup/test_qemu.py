# SPDX-License-Identifier: AGPL-3.0-or-later
"""Chains of a VM in QEMU, beside each other and beside `replctl run`: nobody touches the bitmaps of others."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from bacula_adapter.backend.interface import Level
from replicator.config import check
from replicator.errors import ReplicatorError, SourceError
from replicator.sources.base import SnapshotName
from tests.bacula_backup.lab import GRAIN, Catalogue, Volume
from tests.lab_qemu import StorageDaemon, storage_daemon
from tests.limits import HANG_S
from tests.sources.conformance import assert_changes, contents
from tests.sources.qemu_lab import QemuLab

FULL, INCREMENTAL, DIFFERENTIAL = Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL
SIZES = {"disk-0": 64 * GRAIN, "disk-1": 20 * GRAIN}


def catalogue(tmp_path: Path, daemon: StorageDaemon, job: str = "Nightly") -> Catalogue:
    values = {
        "source": "qemu",
        "vm": "vm",
        "qemu_socket": str(daemon.qmp_socket),
        "qemu_nbd_socket": str(daemon.nbd_socket),
        "state_dir": str(tmp_path / "state"),
    }
    return Catalogue(check(values), job=job)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_beside_each_other_and_beside_a_push(image_format: str, tmp_path: Path) -> None:
    async with storage_daemon(SIZES, image_format=image_format) as daemon:
        lab = QemuLab(daemon)
        nightly, weekly = catalogue(tmp_path, daemon), catalogue(tmp_path, daemon, "Weekly")
        await lab.write("disk-0", 0, os.urandom(2 * GRAIN))
        await nightly.run(FULL)
        await weekly.run(FULL)
        first = SnapshotName("0123456789abcdef", None)
        await (await lab.source().take(first)).aclose()
        await lab.source().confirm(first)
        base = await contents(lab)

        await lab.write("disk-0", 5 * GRAIN, os.urandom(GRAIN))
        assert (await nightly.run(INCREMENTAL)).bytes < 2 * GRAIN
        assert nightly.images() == await contents(lab)
        await lab.write("disk-1", 7 * GRAIN, os.urandom(GRAIN))
        # The push sweeps as it does at each start, and finds all that changed since its own reference.
        await lab.source().sweep(None, first.push_id)
        second = SnapshotName("fedcba9876543210", first.push_id)
        snapshot = await lab.source().take(second)
        assert snapshot.lost_tracking is None
        await assert_changes(lab, snapshot, first.push_id, base, await contents(lab))
        await snapshot.aclose()
        await lab.source().confirm(second)

        await lab.write("disk-0", 6 * GRAIN, os.urandom(GRAIN))
        for chain in (nightly, weekly):
            delta = await chain.run(INCREMENTAL)
            assert {disk.kind for disk in delta.description().disks} == {"delta"}
            assert chain.images() == await contents(lab)
        since = await nightly.run(DIFFERENTIAL)
        assert 3 * GRAIN < since.bytes < 4 * GRAIN
        assert nightly.images() == await contents(lab)


async def test_a_verdict_that_is_not_t_leaves_the_bitmap_recording(tmp_path: Path) -> None:
    async with storage_daemon(SIZES) as daemon:
        lab = QemuLab(daemon)
        nightly = catalogue(tmp_path, daemon)
        await nightly.run(FULL)
        await lab.write("disk-0", 0, os.urandom(GRAIN))
        await nightly.run(INCREMENTAL, status="A")
        await lab.write("disk-0", 9 * GRAIN, os.urandom(GRAIN))
        delta = await nightly.run(INCREMENTAL)
        assert 2 * GRAIN < delta.bytes < 3 * GRAIN
        assert nightly.images() == await contents(lab)


async def test_qemu_that_died_lost_its_bitmap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage_daemon(SIZES) as daemon:
        lab = QemuLab(daemon)
        nightly = catalogue(tmp_path, daemon)
        await lab.write("disk-0", 0, os.urandom(GRAIN))
        await nightly.run(FULL)
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        second = await nightly.run(INCREMENTAL)
        assert {disk.kind for disk in second.description().disks} == {"full"}
        assert "reference_snapshot not found: changes of disk disk-0" in caplog.text
        assert "were not recorded; falling back to Full" in caplog.text
        assert nightly.images() == await contents(lab)


async def test_the_second_job_waits_for_the_first(tmp_path: Path) -> None:
    """QEMU has one snapshot of a disk at a time."""
    async with storage_daemon(SIZES) as daemon:
        lab = QemuLab(daemon)
        await lab.write("disk-0", 0, os.urandom(GRAIN))
        nightly, weekly = catalogue(tmp_path, daemon), catalogue(tmp_path, daemon, "Weekly")
        reached, go_on = trio.Event(), trio.Event()

        async def gate(volume: Volume) -> None:
            del volume
            reached.set()
            await go_on.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: nightly.run(FULL, gate=gate))
            with trio.fail_after(HANG_S):
                await reached.wait()
            # A push is not kept waiting: it is refused, and tries again at its own time.
            with pytest.raises(SourceError, match="QEMU has one at a time"):
                await lab.source().take(SnapshotName("0123456789abcdef", None))
            nursery.start_soon(weekly.run, FULL)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not weekly.volumes
            go_on.set()
        assert nightly.images() == weekly.images() == await contents(lab)


async def test_a_push_that_reads_is_said_to_be_in_the_way(tmp_path: Path) -> None:
    async with storage_daemon(SIZES) as daemon:
        lab = QemuLab(daemon)
        nightly = catalogue(tmp_path, daemon)
        name = SnapshotName("0123456789abcdef", None)
        snapshot = await lab.source().take(name)
        async with nightly.opened(nightly.info(FULL)) as handler:
            with pytest.raises(ReplicatorError, match="QEMU has one at a time"):
                await handler.run(Volume())
            await handler.conclude("f")
        await snapshot.check()
        await snapshot.aclose()
        await lab.source().abandon(name)
        await nightly.run(FULL)
        assert nightly.images() == await contents(lab)
