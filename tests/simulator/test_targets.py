# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an initiator that is not ours sees of a volume group: Debian's iscsi-ls and qemu-img."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from replicator.simulator import targets
from replicator.simulator.core import Core
from replicator.simulator.model import GroupDisk, IscsiClient, VolumeGroup
from tests.limits import HANG_S
from tests.simulator.core_lab import MIB, NET, done, failed, guest, make_vm, small_core, snapshot

ME = "iqn.2026-01.org.example:me"
OTHER = "iqn.2026-01.org.example:other"
SECRET = "Tq8sN2vLx5Rz"
PORTAL = f"{NET}.21"


async def seen(initiator: str) -> str:
    """What discovery shows."""
    finished = await trio.run_process(
        ["iscsi-ls", "-i", initiator, f"iscsi://{PORTAL}"], capture_stdout=True, capture_stderr=True, check=False
    )  # fmt: skip
    return finished.stdout.decode()


async def read(
    target: str, secret: str, copy: Path, lun: int = 1
) -> subprocess.CompletedProcess[bytes]:
    """Copy a disk, following the redirect."""
    source = (
        f"driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={PORTAL}:3260,file.target={target},"
        f"file.lun={lun},file.user={ME},file.password-secret=s,file.initiator-name={ME}"
    )
    secret_object = f"secret,id=s,data={secret}"
    return await trio.run_process(
        ["qemu-img", "convert", "--object", secret_object, "--image-opts", source, "-O", "raw", str(copy)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )  # fmt: skip


async def attached(core: Core, **more: object) -> str:
    """A volume group of one disk that ME may log in to; the target's name."""
    await make_vm(core)
    await guest(core).write(MIB, b"data" * 1000)
    (disk, *_) = await snapshot(core, "one")
    group = VolumeGroup(
        uuid="vg", name="vg", cluster="a", target="drx-1-abc", chap=True, secret=SECRET
    )
    for key, value in more.items():
        setattr(group, key, value)
    new = GroupDisk(uuid="gd", index=0, size=0, container="ct-a")
    await done(core.create_group(group, [(new, core.sources.snapshot_disk(disk))]))
    await done(
        core.attach_client("vg", IscsiClient(uuid="ic", initiator=ME, secret="Zb7mW4kPq9Xy"))
    )
    return "iqn.2010-06.com.nutanix:drx-1-abc-tgt0"


async def test_the_disk_is_read_through_the_redirect_by_who_may(tmp_path: Path) -> None:
    async with small_core(tmp_path / "sim") as core:
        target = await attached(core)
        assert target in await seen(ME)
        assert "drx" not in await seen(OTHER)
        copy = tmp_path / "copy"
        wrong = await read(target, "wrongwrong12", copy)
        assert wrong.returncode
        right = await read(target, SECRET, copy)
        assert right.returncode == 0, right.stderr
        assert copy.read_bytes() == core.storage.group_disk("gd").read_bytes()
        await done(core.detach_client("vg", "ic"))
        assert "drx" not in await seen(ME)
        assert (await read(target, SECRET, copy)).returncode


async def test_targets_are_served_again_after_a_restart(tmp_path: Path) -> None:
    async with small_core(tmp_path / "sim") as core:
        target = await attached(core)
    assert target not in await seen(ME)
    async with small_core(tmp_path / "sim"):
        assert target in await seen(ME)


async def test_without_a_redirect_the_disk_is_at_the_portal(tmp_path: Path) -> None:
    async with small_core(tmp_path / "sim") as core:
        core.knobs["redirect"] = False
        target = await attached(core)
        copy = tmp_path / "copy"
        assert (await read(target, SECRET, copy)).returncode == 0
        assert copy.read_bytes() == core.storage.group_disk("gd").read_bytes()


async def test_an_initiator_has_a_secret_for_each_group(tmp_path: Path) -> None:
    async with small_core(tmp_path / "sim") as core:
        first = await attached(core)
        (disk, *_) = await snapshot(core, "two")
        secret = "Another0Secret"
        group = VolumeGroup(
            uuid="vg2", name="vg2", cluster="a", target="drx-2-abc", chap=True, secret=secret
        )
        new = GroupDisk(uuid="gd2", index=0, size=0, container="ct-a")
        await done(core.create_group(group, [(new, core.sources.snapshot_disk(disk))]))
        await done(core.attach_client("vg2", IscsiClient(uuid="ic2", initiator=ME)))
        second = "iqn.2010-06.com.nutanix:drx-2-abc-tgt0"
        for target, good, bad in ((first, SECRET, secret), (second, secret, SECRET)):
            found = await read(target, good, tmp_path / "copy")
            assert found.returncode == 0, found.stderr
            assert (await read(target, bad, tmp_path / "copy")).returncode


async def test_a_target_appears_after_the_task_that_attached_has_ended(tmp_path: Path) -> None:
    async with small_core(tmp_path / "never") as core:
        core.faults.add("discovery-delayed", value=3600)
        assert await attached(core) not in await seen(ME)
    async with small_core(tmp_path / "late") as core:
        core.faults.add("discovery-delayed", value=0.2)
        target = await attached(core)
        with trio.fail_after(HANG_S):
            while target not in await seen(ME):
                await trio.lowlevel.checkpoint()


async def test_disks_are_spread_over_the_targets_and_the_cvms(tmp_path: Path) -> None:
    async with small_core(tmp_path / "sim") as core:
        await attached(core)
        blank = GroupDisk(uuid="gd9", index=1, size=MIB, container="ct-a")
        await done(core.add_group_disk("vg", blank, core.sources.blank(MIB)))
        shown = await seen(ME)
        assert "drx-1-abc-tgt0" in shown
        assert "drx-1-abc-tgt1" in shown
        copy = tmp_path / "copy"
        found = await read("iqn.2010-06.com.nutanix:drx-1-abc-tgt1", SECRET, copy)
        assert found.returncode == 0, found.stderr
        assert copy.read_bytes() == bytes(MIB)


async def test_a_daemon_that_hangs_fails_the_task_and_not_the_simulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_ADM_TIMEOUT_S", 0.05)
    async with small_core(tmp_path / "sim") as core:
        await attached(core)
        daemon = core.targets._daemons[PORTAL, 3260]
        os.kill(daemon._process.pid, signal.SIGSTOP)
        assert "does not answer" in await failed(core.detach_client("vg", "ic"))
        os.kill(daemon._process.pid, signal.SIGCONT)
