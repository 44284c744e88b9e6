# SPDX-License-Identifier: AGPL-3.0-or-later
"""Test clones with a real guest: it boots from a recovery point, writes, and the point stays what it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.lab import guest
from tests.limits import HANG_S
from tests.receiver.clone_lab import (
    check_clone_content,
    children,
    clone_manager,
    contents,
    disk_sha256,
    leftovers,
    no_steps,
)
from tests.receiver.store_lab import Image, StoreFixture, open_store

pytestmark = pytest.mark.guest

WORD = "beef"
WROTE = "replctl-guest: wrote"


def real_grains(fixture: StoreFixture) -> None:
    """Grain and chunk as sources have them."""
    fixture.grain, fixture.chunk = 65536, 1 << 20


def writing_disk(path: Path) -> None:
    """A boot disk whose guest reads its second disk and writes to both before it says its first word.

    That word: WROTE, the SHA-256 of the second disk as it was, and how many network cards there are.
    """
    guest.boot_disk(path)
    before_ready = (
        "sum=$(checksum /dev/vdb)\n"
        f"write_blocks /dev/vda 4096 16 {WORD}\n"
        f"write_blocks /dev/vdb 0 2 {WORD}\n"
        "cards=$(cat /sys/bus/pci/devices/*/class | grep -c 0x0200)\n"
        f'echo "{WROTE} $sum $cards"\n'
    )
    ready = f'echo "{guest.READY_LINE}"\n'
    init = (guest.HERE / "init.sh").read_text()
    assert ready in init
    # The kernel unpacks a second initramfs over the first.
    extra, config = path.with_name("extra.img"), path.with_name("syslinux.cfg")
    files = {"init": init.replace(ready, before_ready).encode()}
    extra.write_bytes(guest._cpio(files, []))
    config.write_text(guest.SYSLINUX_CONFIG.replace("initrd.gz", "initrd.gz,extra.img"))
    place = f"{path}@@{guest.FAT_START_SECTOR * guest.SECTOR_BYTES}"
    subprocess.run(
        ["mcopy", "-o", "-i", place, extra, config, "::"],
        check=True,
        env={**os.environ, "MTOOLS_SKIP_CHECK": "1"},
    )


async def test_a_guest_boots_from_a_point_and_writes_without_touching_it(
    state_dir: Path, tmp_path: Path
) -> None:
    boot = tmp_path / "boot.raw"
    writing_disk(boot)
    data = random.Random(1).randbytes(1 << 20)
    async with (
        open_store(state_dir, prepare=real_grains) as fixture,
        clone_manager(fixture) as manager,
    ):
        await fixture.push({"disk-0": boot, "disk-1": data})
        await fixture.push({"disk-0": boot, "disk-1": data[:-1] + b"\0"})
        await fixture.settle()

        result = await manager.start_test(fixture.store, 1, no_steps)

        # The guest read the older of the two points, and found a card on a wire that leads nowhere.
        expected = Image.of(data, 65536).sha256()
        assert (result["booted"], result["reason"]) == (True, None)
        assert result["console"] == f"{WROTE} {expected} 1"
        assert 0 < result["console_s"] < 120
        assert WROTE.encode() in contents(result["console_file"])
        for disk in result["disks"]:
            assert f"{WORD}\n".encode() * 1000 in contents(disk["overlay"])
        # What it wrote is in the overlays alone, and neither pushes nor their applying disturb the clone.
        await fixture.push({"disk-0": boot, "disk-1": bytes(1 << 20)})
        await fixture.settle()
        await check_clone_content(fixture, result)

        machines = children()
        assert machines
        await manager.undo_test(fixture.store, no_steps)
        assert not children() & machines
        assert await leftovers(fixture) == []
        for number in (1, 2, 3):
            await fixture.check_point(number)


def is_qemu(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system")


CHILD = """
import sys, trio
from pathlib import Path
from tests.receiver.clone_lab import clone_manager, no_steps
from tests.receiver.store_lab import open_store

async def main():
    async with open_store(Path(sys.argv[1])) as fixture, clone_manager(fixture) as manager:
        await fixture.push({"disk-0": b"not bootable" * 10_000})
        await fixture.settle()
        async with trio.open_nursery() as nursery:
            def step(text):
                print(text, flush=True)
            nursery.start_soon(manager.start_test, fixture.store, 1, step)

trio.run(main)
"""


async def test_the_machine_dies_with_the_receiver_and_a_new_one_takes_up_the_clone(
    state_dir: Path,
) -> None:
    receiver = await trio.lowlevel.open_process(
        [sys.executable, "-c", CHILD, str(state_dir)],
        stdout=subprocess.PIPE,
        cwd=guest.HERE.parent.parent,
    )
    assert receiver.stdout is not None
    said = b""
    with trio.fail_after(HANG_S):
        while b"the machine is booting" not in said:
            said += (piece := await receiver.stdout.receive_some())
            assert piece, "the receiver ended"
        # The machine is started right after it is announced, by a launcher that becomes QEMU.
        while not (machines := [pid for pid in children(receiver.pid) if is_qemu(pid)]):
            await trio.lowlevel.checkpoint()
    pidfds = [os.pidfd_open(pid) for pid in machines]
    receiver.send_signal(signal.SIGKILL)
    with trio.fail_after(HANG_S):
        await receiver.wait()
        for pidfd in pidfds:
            await trio.lowlevel.wait_readable(pidfd)
            os.close(pidfd)
    await receiver.stdout.aclose()

    content = Image.of(b"not bootable" * 10_000, 4096)
    async with (
        open_store(state_dir, expected={1: {"disk-0": content}}) as fixture,
        clone_manager(fixture) as manager,
    ):
        report = manager.report(fixture.store)
        assert report is not None
        assert not report["booted"]
        assert report["reason"] == "the receiver was restarted: undo, or undo and test again"
        disk = report["disks"][0]
        assert await disk_sha256(disk["nbd"], "disk-0") == content.sha256()
        assert contents(disk["overlay"])
        await manager.undo_test(fixture.store, no_steps)
        assert await leftovers(fixture) == []
