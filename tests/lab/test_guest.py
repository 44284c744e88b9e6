# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.lab import guest
from tests.lab.console import GuestError, raw_disk, running_guest

pytestmark = pytest.mark.guest


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def check_ext4(path: Path, offset: int = 0) -> None:
    """Have e2fsck look at an image without changing it; raises CalledProcessError on any damage."""
    subprocess.run(
        ["e2fsck", "-fn", f"{path}?offset={offset}"],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
    )


async def test_the_boot_disk_boots_by_itself_and_takes_commands(tmp_path: Path) -> None:
    boot, data, tree = tmp_path / "boot.raw", tmp_path / "data.raw", tmp_path / "tree"
    guest.boot_disk(boot)
    guest.make_tree(tree, count=300, seed=7)
    guest.data_disk(data, tree, 48 * guest.MIB)
    assert boot.stat().st_size == guest.BOOT_DISK_BYTES
    assert used_bytes(boot) < 40 * guest.MIB
    before = hashlib.sha256(data.read_bytes()).hexdigest()

    async with running_guest([*raw_disk(boot), *raw_disk(data)]) as machine:
        assert await machine.run("checksum /dev/vdb") == before + "\n"

        await machine.run("mount /dev/vdb /mnt")
        listing = await machine.run("find /mnt -name 'file-*' | wc -l")
        assert listing.strip() == "300"
        await machine.run("write_files /mnt/new 50 hello")
        inside = await machine.run("checksum_tree /mnt/new")
        await machine.run("umount /mnt")

        # The boot disk's second partition is a file system too, and both can be written to raw.
        await machine.run("mount -o ro /dev/vda2 /mnt && umount /mnt")
        await machine.run("write_blocks /dev/vda 4096 3 beef")

        with pytest.raises(GuestError, match="status 3"):
            await machine.run("(exit 3)")
        await machine.power_off()

    assert re.fullmatch(r"[0-9a-f]{64}\n", inside)
    check_ext4(data)
    with boot.open("rb") as file:
        file.seek(4096 * 65536)
        assert file.read(3 * 65536) == (b"beef\n" * 65536)[: 3 * 65536]


def test_a_data_disk_holds_the_tree_unharmed(tmp_path: Path) -> None:
    disk, tree, back = tmp_path / "data.raw", tmp_path / "tree", tmp_path / "back"
    guest.make_tree(tree, count=100, seed=3)
    guest.data_disk(disk, tree, 64 * guest.MIB)
    check_ext4(disk)
    assert disk.stat().st_size == 64 * guest.MIB
    back.mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump / {back}", disk],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
    )
    (back / "lost+found").rmdir()
    assert contents(back) == contents(tree)
    assert len(contents(tree)) == 100


def test_trees_are_the_same_for_the_same_seed_only(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        guest.make_tree(tmp_path / name, count=20, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_tree_that_does_not_fit_is_said_so(tmp_path: Path) -> None:
    guest.make_tree(tmp_path / "tree", count=100, seed=3)
    with pytest.raises(subprocess.CalledProcessError):
        guest.data_disk(tmp_path / "data.raw", tmp_path / "tree", 2 * guest.MIB)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
