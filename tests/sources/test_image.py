# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
from pathlib import Path

import pytest

from replicator.errors import SnapshotGoneError, UsageError
from replicator.sources.base import HeldSnapshot, SnapshotName
from replicator.sources.image import ImageSource
from tests.sources.conformance import CHECKS, GRAIN, Check


class ImageLab:
    tracks = False
    reference_takes_room = False
    live = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / "work"
        for number, disk in enumerate(self.disks):
            with (root / disk).open("wb") as file:
                file.truncate((128 + number) * GRAIN + 512)

    @property
    def disks(self) -> list[str]:
        return ["disk-0", "disk-1"]

    def source(self) -> ImageSource:
        return ImageSource("vm", {d: self.root / d for d in self.disks}, self.work, GRAIN)

    async def write(self, disk: str, offset: int, data: bytes) -> None:
        with (self.root / disk).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    async def zero(self, disk: str, offset: int, length: int) -> None:
        await self.write(disk, offset, bytes(length))

    async def grow(self, disk: str, by: int) -> None:
        path = self.root / disk
        os.truncate(path, path.stat().st_size + by)

    async def content(self, disk: str) -> bytes:
        return (self.root / disk).read_bytes()

    async def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.work.iterdir())


@pytest.fixture
def lab(tmp_path: Path) -> ImageLab:
    return ImageLab(tmp_path)


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for FICLONE, which the test's file system may not have: the clone is a copy."""

    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        data = os.pread(source, os.fstat(source).st_size, 0)
        return os.pwrite(target, data, 0)

    monkeypatch.setattr("replicator.sources.image.fcntl.ioctl", clone)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, lab: ImageLab) -> None:
    await check(lab)


@pytest.mark.parametrize("how", ["write", "same bytes", "grow", "replace", "remove"])
async def test_a_change_ends_the_snapshot(lab: ImageLab, how: str) -> None:
    await lab.write("disk-0", 0, b"before")
    name = SnapshotName("p1", None)
    snapshot = await lab.source().take(name)
    await snapshot.check()
    path = lab.root / "disk-1"
    if how == "write":
        await lab.write("disk-1", 0, b"x")
    elif how == "same bytes":
        await lab.write("disk-1", 0, b"\0")
    elif how == "grow":
        await lab.grow("disk-1", 512)
    elif how == "replace":
        other = lab.root / "other"
        other.write_bytes(path.read_bytes())
        other.rename(path)
    else:
        path.unlink()
    with pytest.raises(SnapshotGoneError, match="stop what writes to it or use source = qemu"):
        await snapshot.check()
    await snapshot.aclose()
    with pytest.raises(SnapshotGoneError, match="image changed while it was being read"):
        await lab.source().reopen(name)


async def test_a_shortened_image_is_noticed_by_the_read(lab: ImageLab) -> None:
    snapshot = await lab.source().take(SnapshotName("p1", None))
    os.truncate(lab.root / "disk-0", GRAIN)
    with pytest.raises(SnapshotGoneError, match="shorter"):
        await snapshot.disks[0].view.read(GRAIN - 10, 20)
    await snapshot.aclose()


async def test_missing_empty_and_strange_images(lab: ImageLab) -> None:
    name = SnapshotName("p1", None)
    for path, words in (
        (lab.root / "absent", "No such file"),
        (lab.root, "neither a file nor a block device"),
    ):
        with pytest.raises(UsageError, match=words):
            await ImageSource("vm", {"d": path}, lab.work, GRAIN).take(name)
    (lab.root / "empty").touch()
    with pytest.raises(UsageError, match="is empty"):
        await ImageSource("vm", {"d": lab.root / "empty"}, lab.work, GRAIN).take(name)
    with pytest.raises(UsageError, match="cannot be a disk's id"):
        ImageSource("vm", {"../x": lab.root / "disk-0"}, lab.work, GRAIN)


@pytest.mark.usefixtures("clones")
async def test_clones_are_read_where_the_file_system_has_them(lab: ImageLab) -> None:
    await lab.write("disk-0", 100, b"at the instant")
    expected = {disk: await lab.content(disk) for disk in lab.disks}
    name = SnapshotName("p1", None)
    snapshot = await lab.source().take(name)
    await lab.write("disk-0", 100, b"afterwards    ")
    await snapshot.check()
    await snapshot.aclose()
    again = await lab.source().reopen(name)
    for disk in again.disks:
        held = expected[disk.identity]
        assert await disk.view.read(0, len(held)) == held
    await again.aclose()
    assert len(await lab.leftovers()) == 3
    await lab.source().confirm(name)
    assert await lab.leftovers() == []


@pytest.mark.usefixtures("clones")
async def test_clones_take_room_also_where_their_record_is_lost(lab: ImageLab) -> None:
    taken_at_us = {}
    for push_id in ("p1", "p2", "p3"):
        snapshot = await lab.source().take(SnapshotName(push_id, None))
        taken_at_us[push_id] = snapshot.taken_at_us
        await snapshot.aclose()
    (lab.work / "replctl-p2.json").write_text("{")
    (lab.work / "replctl-p3.json").unlink()
    # Of these the clones' own time is known.
    for push_id, second in (("p2", 2), ("p3", 1)):
        for index in range(2):
            os.utime(lab.work / f"replctl-{push_id}-{index}.raw", (second, second + index))
    assert await lab.source().held() == [
        HeldSnapshot("p3", 1_000_000),
        HeldSnapshot("p2", 2_000_000),
        HeldSnapshot("p1", taken_at_us["p1"]),
    ]
