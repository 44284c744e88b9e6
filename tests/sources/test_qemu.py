# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is particular to QEMU: lost and damaged bitmaps, its one NBD server, scratch space, disks
that come.
"""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from replicator.errors import ReferenceLostError, SnapshotGoneError, SourceError
from replicator.nbd.client import open_nbd
from replicator.nbd.protocol import NbdError
from replicator.sources import qemu
from replicator.sources.base import HeldSnapshot, SnapshotName
from replicator.sources.qemu import QemuSource
from tests.lab_qemu import storage_daemon
from tests.sources.conformance import (
    GRAIN,
    assert_changes,
    assert_full,
    change,
    commit,
    contents,
    fill,
    listed,
    pattern,
)
from tests.sources.qemu_lab import QemuLab, own_server


async def assert_lost(lab: QemuLab, reference: str, words: str) -> None:
    """A cycle that finds its reference lost: says so, can be read in full, and the next one is
    incremental.
    """
    name = SnapshotName("after-loss", reference)
    snapshot = await lab.source().take(name)
    assert snapshot.lost_tracking is not None
    assert words in snapshot.lost_tracking
    for disk in snapshot.disks:
        with pytest.raises(ReferenceLostError, match=disk.identity):
            await listed(disk.view, reference)
    before = await contents(lab)
    await assert_full(snapshot, before)
    await snapshot.aclose()
    again = await lab.source().reopen(name)
    assert again.lost_tracking == snapshot.lost_tracking
    await again.aclose()
    await lab.source().confirm(name)
    await change(lab, "after loss")
    snapshot = await lab.source().take(SnapshotName("next", "after-loss"))
    assert snapshot.lost_tracking is None
    await assert_changes(lab, snapshot, "after-loss", before, await contents(lab))
    await snapshot.aclose()


async def test_bitmaps_of_a_raw_disk_die_with_qemu() -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        await commit(lab, "p1", None)
        await daemon.stop()
        await daemon.start()
        await assert_lost(lab, "p1", "were not recorded")


async def test_bitmaps_in_qcow2_outlive_a_clean_stop() -> None:
    async with storage_daemon(QemuLab.SIZES, image_format="qcow2") as daemon:
        lab = QemuLab(daemon)
        await fill(lab, "stop")
        before = await commit(lab, "p1", None)
        await change(lab, "before the stop")
        await daemon.stop()
        await daemon.start()
        await lab.write("disk-a", 33 * GRAIN, pattern("after the start", GRAIN))
        snapshot = await lab.source().take(SnapshotName("p2", "p1"))
        assert snapshot.lost_tracking is None
        await assert_changes(lab, snapshot, "p1", before, await contents(lab))
        await snapshot.aclose()


async def test_bitmaps_in_qcow2_are_inconsistent_after_a_crash() -> None:
    async with storage_daemon(QemuLab.SIZES, image_format="qcow2") as daemon:
        lab = QemuLab(daemon)
        await commit(lab, "p1", None)
        # QEMU puts a bitmap into the file when it stops; only then a crash finds it there.
        await daemon.stop()
        await daemon.start()
        await fill(lab, "crash")
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        await assert_lost(lab, "p1", "not shut down cleanly")


async def test_qemu_stopped_while_a_snapshot_lived() -> None:
    """With qcow2 the bitmaps come back as they were: abandoning still puts them right."""
    async with storage_daemon(QemuLab.SIZES, image_format="qcow2") as daemon:
        lab = QemuLab(daemon)
        await fill(lab, "stop")
        before = await commit(lab, "p1", None)
        name = SnapshotName("p2", "p1")
        snapshot = await lab.source().take(name)
        await change(lab, "during")
        await daemon.stop()
        with pytest.raises(SnapshotGoneError, match="ended with QEMU"):
            await snapshot.check()
        await snapshot.aclose()
        with pytest.raises(SnapshotGoneError):
            await lab.source().reopen(name)
        with pytest.raises(SourceError, match="no QEMU"):
            await lab.source().abandon(name)
        await daemon.start()
        with pytest.raises(SnapshotGoneError):
            await lab.source().reopen(name)
        await lab.source().abandon(name)
        await change(lab, "after")
        snapshot = await lab.source().take(SnapshotName("p3", "p1"))
        assert snapshot.lost_tracking is None
        await assert_changes(lab, snapshot, "p1", before, await contents(lab))
        await snapshot.aclose()


async def test_a_reference_that_stopped_recording_is_not_believed() -> None:
    """p2 was never abandoned; taking p3 against p1 then would miss what p2's bitmap holds."""
    async with storage_daemon(QemuLab.SIZES, image_format="qcow2") as daemon:
        lab = QemuLab(daemon)
        await commit(lab, "p1", None)
        await (await lab.source().take(SnapshotName("p2", "p1"))).aclose()
        with pytest.raises(SourceError, match="push p2 is still there"):
            await lab.source().take(SnapshotName("p3", "p1"))
        await daemon.stop()
        await daemon.start()
        await assert_lost(lab, "p1", "was stopped before")
        assert not [name for name in await lab.leftovers() if name == "replctl-p1"]


async def test_a_lost_record_of_sizes_is_a_lost_reference() -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        await commit(lab, "p1", None)
        (lab.work / "replctl-p1.json").write_text("{")
        await assert_lost(lab, "p1", "size is missing")


async def test_a_disk_that_came_has_no_reference_and_the_others_have() -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        await fill(lab, "come")
        await commit(lab, "p1", None)
        path = daemon.root / "disk-c.raw"
        path.write_bytes(pattern("disk-c", GRAIN))
        file = {"driver": "file", "filename": str(path)}
        async with daemon.qmp() as qmp:
            await qmp.execute("blockdev-add", driver="raw", node_name="disk-c", file=file)
            export = {"type": "nbd", "id": "w-c", "node_name": "disk-c", "writable": True}
            await qmp.execute("block-export-add", **export)
        snapshot = await lab.source().take(SnapshotName("p2", "p1"))
        views = {disk.identity: disk.view for disk in snapshot.disks}
        assert sorted(views) == ["disk-a", "disk-b", "disk-c"]
        assert snapshot.lost_tracking is not None
        assert "disk-c" in snapshot.lost_tracking
        assert "disk-a" not in snapshot.lost_tracking
        assert await listed(views["disk-a"], "p1") == []
        with pytest.raises(ReferenceLostError, match="disk-c"):
            await listed(views["disk-c"], "p1")
        await snapshot.aclose()


async def test_the_snapshot_ends_before_scratch_space_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise QEMU would fail the guest's writes. The reference still covers what came since."""
    monkeypatch.setattr(qemu, "_GUARD_INTERVAL_S", 0.0)
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        await fill(lab, "full")
        before = await commit(lab, "p1", None)
        clean = await lab.leftovers()
        name = SnapshotName("p2", "p1")
        snapshot = await lab.source().take(name)
        view = snapshot.disks[0].view
        await view.read(0, 512)
        with monkeypatch.context() as full:
            full.setattr(
                "replicator.sources.qemu.os.statvfs",
                lambda _path: SimpleNamespace(f_bavail=1, f_frsize=9),
            )
            with pytest.raises(SnapshotGoneError, match="no room for what the guest overwrites"):
                await view.read(0, 512)
            with pytest.raises(SourceError, match="no room"):
                await lab.source().take(SnapshotName("p3", "p1"))
        with pytest.raises(SnapshotGoneError, match="no room"):
            await view.read(0, 512)
        with pytest.raises(SnapshotGoneError):
            await snapshot.check()
        await snapshot.aclose()
        await change(lab, "the guest goes on")
        await lab.source().abandon(name)
        assert await lab.leftovers() == clean
        snapshot = await lab.source().take(SnapshotName("p3", "p1"))
        await assert_changes(lab, snapshot, "p1", before, await contents(lab))
        await snapshot.aclose()


async def test_qemu_fails_the_guest_when_scratch_space_ends() -> None:
    """The fact behind the guard. Should a newer QEMU spare the guest, this test says so and the
    guard may go.
    """
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        await fill(lab, "limit")
        await (await lab.source().take(SnapshotName("p1", None))).aclose()
        # No file of the daemon may grow beyond this: the next cluster of the scratch image would.
        scratch = lab.work / "replctl-p1-0.qcow2"
        limit = scratch.stat().st_size
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(NbdError, match="ENOSPC"):
            await lab.write("disk-a", 0, pattern("guest", 4096))


async def test_an_nbd_server_of_our_own_comes_and_goes() -> None:
    async with storage_daemon(QemuLab.SIZES, nbd_server=False) as daemon:
        expected = {disk: daemon.image(disk).read_bytes() for disk in daemon.disks}
        reference = None
        for push_id in ("p1", "p2"):
            name = SnapshotName(push_id, reference)
            snapshot = await own_server(daemon).take(name)
            await assert_full(snapshot, expected)
            await snapshot.aclose()
            again = await own_server(daemon).reopen(name)
            await assert_full(again, expected)
            await again.check()
            await again.aclose()
            await own_server(daemon).confirm(name)
            files = sorted(path.name for path in (daemon.root / "work").iterdir())
            assert files == [f"replctl-{push_id}.json"]
            reference = push_id


async def test_an_nbd_server_that_a_dead_process_of_ours_started_is_used() -> None:
    async with storage_daemon(QemuLab.SIZES, nbd_server=False) as daemon:
        source = own_server(daemon)
        await (await source.take(SnapshotName("p1", None))).aclose()
        async with daemon.qmp() as qmp:
            for index in range(2):
                await qmp.execute("block-export-del", id=f"replctl-p1-{index}-own", mode="hard")
        with pytest.raises(SnapshotGoneError, match="not exported"):
            await own_server(daemon).reopen(SnapshotName("p1", None))
        snapshot = await own_server(daemon).take(SnapshotName("p1", None))
        await snapshot.check()
        await snapshot.aclose()


async def test_a_foreign_nbd_server_must_be_named() -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        with pytest.raises(SourceError, match=r"qemu_nbd_socket or, .* nbd-server-stop"):
            await own_server(daemon).take(SnapshotName("p1", None))
        await own_server(daemon).abandon(SnapshotName("p1", None))
        assert await daemon.leftovers() == []
        # The server of others was left alone.
        async with open_nbd(daemon.nbd_socket, "disk-a") as client:
            assert client.size == daemon.disks["disk-a"]


@pytest.mark.parametrize("lost", ["the same directory, emptied", "another directory"])
async def test_our_nbd_server_is_known_without_the_state_that_started_it(lost: str) -> None:
    """A push was killed while it read, and nothing tells of it but what is in QEMU."""
    async with storage_daemon(QemuLab.SIZES, nbd_server=False) as daemon:
        expected = {disk: daemon.image(disk).read_bytes() for disk in daemon.disks}
        killed = await own_server(daemon).take(SnapshotName("p1", None))
        heir = own_server(daemon, "work-2")
        if lost == "the same directory, emptied":
            heir = own_server(daemon)
            shutil.rmtree(daemon.root / "work")
        await heir.sweep(None, None)
        assert await daemon.leftovers() == []
        name = SnapshotName("p2", None)
        snapshot = await heir.take(name)
        await assert_full(snapshot, expected)
        await snapshot.aclose()
        await killed.aclose()
        await heir.confirm(name)


async def test_an_nbd_server_that_was_named_once_is_not_taken_for_ours() -> None:
    """Our exports alone are on it, but it is not we who started it."""
    async with storage_daemon(QemuLab.SIZES, nbd_server=False) as daemon:
        address = {"type": "unix", "data": {"path": str(daemon.nbd_socket)}}
        async with daemon.qmp() as qmp:
            await qmp.execute("nbd-server-start", addr=address)
        named = QemuLab(daemon).source()
        await (await named.take(SnapshotName("p1", None))).aclose()
        unnamed = own_server(daemon, "work-2")
        await unnamed.sweep(None, None)
        with pytest.raises(SourceError, match=r"qemu_nbd_socket or, .* nbd-server-stop"):
            await unnamed.take(SnapshotName("p2", None))
        await unnamed.abandon(SnapshotName("p2", None))
        assert await daemon.leftovers() == []
        # It serves whoever named it as before.
        await (await named.take(SnapshotName("p3", None))).aclose()


async def test_our_nbd_server_stays_while_it_serves_others() -> None:
    async with storage_daemon(QemuLab.SIZES, nbd_server=False) as daemon:
        await (await own_server(daemon).take(SnapshotName("p1", None))).aclose()
        async with daemon.qmp() as qmp:
            await qmp.execute("block-export-add", type="nbd", id="theirs", node_name="disk-a")
        await own_server(daemon, "work-2").sweep(None, None)
        assert await daemon.leftovers() == []
        (socket,) = (daemon.root / "work").glob("qemu-*.sock")
        async with open_nbd(socket, "disk-a") as client:
            assert client.size == daemon.disks["disk-a"]


async def test_what_a_dead_qemu_left_takes_room_until_it_is_removed() -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        name = SnapshotName("p1", None)
        snapshot = await lab.source().take(name)
        await snapshot.aclose()
        await daemon.stop(signal.SIGKILL)
        with pytest.raises(SourceError, match="no QEMU"):
            await lab.source().held()
        await daemon.start()
        assert await lab.source().held() == [HeldSnapshot("p1", snapshot.taken_at_us)]
        (lab.work / "replctl-p1.json").unlink()
        (held,) = await lab.source().held()
        assert held.taken_at_us == (lab.work / "replctl-p1-0.qcow2").stat().st_mtime_ns // 1000
        await lab.source().abandon(name)
        assert await lab.source().held() == []


async def test_a_snapshot_whose_files_are_gone_takes_room_all_the_same() -> None:
    """QEMU has them open; nobody knows when it was taken, so it is as old as can be."""
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        await (await lab.source().take(SnapshotName("p1", None))).aclose()
        for path in lab.work.iterdir():
            path.unlink()
        assert await lab.source().held() == [HeldSnapshot("p1", 0)]
        await lab.source().sweep(None, None)
        assert await lab.source().held() == []


async def test_a_job_that_ended_ends_the_snapshot() -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        name = SnapshotName("p1", None)
        snapshot = await lab.source().take(name)
        async with daemon.qmp() as qmp:
            await qmp.execute("block-job-cancel", device="replctl-p1-1", force=True)
            await qmp.wait_event(lambda e: e["event"] == "BLOCK_JOB_CANCELLED", 20)
        with pytest.raises(SnapshotGoneError, match="disk-b"):
            await snapshot.check()
        await snapshot.aclose()
        with pytest.raises(SnapshotGoneError, match="disk-b"):
            await lab.source().reopen(name)


async def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with storage_daemon(QemuLab.SIZES) as daemon:
        lab = QemuLab(daemon)
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(SourceError, match="qemu-utils"):
            await lab.source().take(SnapshotName("p1", None))
        await lab.source().sweep(None, None)
        assert await lab.leftovers() == []


def test_socket_paths_that_are_too_long() -> None:
    long = Path("/tmp") / ("x" * 120)
    with pytest.raises(SourceError, match="107"):
        QemuSource(long, Path("/tmp/w"), name=None, grain=GRAIN)
    with pytest.raises(SourceError, match="NBD socket"):
        QemuSource(Path("/tmp/qmp"), long, name=None, grain=GRAIN)


@pytest.mark.parametrize("push_id", ["", "../x", "a/b", "-a", "x" * 65, "a b"])
async def test_names_that_cannot_name_a_snapshot(push_id: str, tmp_path: Path) -> None:
    source = QemuSource(Path("/tmp/none"), tmp_path, name="vm", grain=GRAIN)
    with pytest.raises(SourceError, match="cannot name a snapshot"):
        await source.take(SnapshotName(push_id, None))


async def test_nobody_at_the_socket(tmp_path: Path) -> None:
    source = QemuSource(Path("/tmp/no-such-qmp"), tmp_path, name="vm", grain=GRAIN)
    with pytest.raises(SourceError, match="no QEMU at /tmp/no-such-qmp"):
        await source.identify()
