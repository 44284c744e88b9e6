# SPDX-License-Identifier: AGPL-3.0-or-later
"""A whole QEMU, paused before its first instruction: which of its drives are disks, and who the VM
is.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
import trio

from replicator.disk import Extent
from replicator.sources.base import Snapshot, SnapshotName
from replicator.sources.qemu import QemuSource
from replicator.sources.qmp import QmpGoneError, open_qmp
from tests.lab_qemu import require
from tests.limits import HANG_S
from tests.sources.conformance import GRAIN, listed

VM_UUID = UUID("11111111-2222-3333-4444-555555555555")
SIZE = 64 * GRAIN


@pytest.fixture
async def root() -> AsyncIterator[Path]:
    """A running QEMU's directory: two writable disks, a read-only one, a CD, an empty drive, flash."""
    with tempfile.TemporaryDirectory(prefix="rq", dir="/tmp") as folder:
        root = Path(folder)
        for name in ("named", "plain", "cd", "fixed"):
            (root / f"{name}.raw").write_bytes(bytes(SIZE))
        command = [require("qemu-system-x86_64"), "-accel", "tcg", "-M", "q35", "-m", "64", "-S"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-name", "the-vm", "-uuid", str(VM_UUID)]
        command += ["-qmp", f"unix:{root}/qmp,server=on,wait=off"]
        blockdev = "driver=raw,node-name=named-node,file.driver=file,file.filename"
        command += ["-blockdev", f"{blockdev}={root}/named.raw"]
        command += ["-device", "virtio-blk-pci,drive=named-node,id=vda"]
        command += ["-drive", f"if=virtio,format=raw,file={root}/plain.raw"]
        command += ["-drive", f"if=virtio,format=raw,readonly=on,file={root}/fixed.raw"]
        command += ["-drive", f"if=ide,media=cdrom,format=raw,file={root}/cd.raw"]
        command += ["-device", "ide-cd,id=empty"]
        process = subprocess.Popen(command)  # noqa: ASYNC220 - starts at once
        try:
            with trio.fail_after(HANG_S):
                while True:
                    assert process.poll() is None, "qemu-system-x86_64 ended at its start"
                    try:
                        async with open_qmp(root / "qmp") as qmp:
                            await qmp.execute("query-status")
                    except QmpGoneError:
                        await trio.sleep(0.01)
                    else:
                        break
            yield root
        finally:
            process.kill()
            process.wait()


def source(root: Path, name: str | None = None) -> QemuSource:
    return QemuSource(root / "qmp", root / "work", name=name, grain=GRAIN, scratch_free_min=1)


async def guest_writes(root: Path, drive: str, what: str) -> None:
    async with open_qmp(root / "qmp") as qmp:
        line = f'qemu-io {drive} "write {what}"'
        said = await qmp.execute("human-monitor-command", command_line=line)
        assert "error" not in said.lower(), said


async def test_identity(root: Path) -> None:
    identity = await source(root).identify()
    assert (identity.uuid, identity.name) == (VM_UUID, "the-vm")
    assert (await source(root, "configured").identify()).name == "configured"


async def test_writable_disks_only_and_a_whole_cycle(root: Path) -> None:
    await guest_writes(root, "-d /machine/peripheral/vda/virtio-backend", "-P 7 64k 64k")
    snapshot = await source(root).take(SnapshotName("p1", None))
    await guest_writes(root, "-d /machine/peripheral/vda/virtio-backend", "-P 9 64k 128k")
    views = {disk.identity: disk.view for disk in snapshot.disks}
    assert sorted(views) == ["named-node", "virtio0"]
    assert await views["named-node"].read(0, SIZE) == (
        bytes(GRAIN) + b"\7" * GRAIN + bytes(SIZE - 2 * GRAIN)
    )
    await snapshot.check()
    await snapshot.aclose()
    # In the machine's order: the first is what it boots from.
    assert [d.identity for d in (await again(root, "p1")).disks] == ["virtio0", "named-node"]
    await source(root).confirm(SnapshotName("p1", None))
    snapshot = await source(root).take(SnapshotName("p2", "p1"))
    views = {disk.identity: disk.view for disk in snapshot.disks}
    assert await listed(views["named-node"], "p1") == [Extent(GRAIN, 2 * GRAIN)]
    assert await listed(views["virtio0"], "p1") == []
    await snapshot.aclose()
    await source(root).sweep(None, None)
    assert list((root / "work").iterdir()) == []


async def again(root: Path, push_id: str) -> Snapshot:
    snapshot = await source(root).reopen(SnapshotName(push_id, None))
    await snapshot.aclose()
    return snapshot
