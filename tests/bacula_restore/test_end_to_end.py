# SPDX-License-Identifier: AGPL-3.0-or-later
"""Backups and restores through the real backend process, as the plugin drives it: what went in comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bacula_adapter.description import decode_object
from tests.bacula_adapter.plugin import (
    BackendFailedError,
    RestoreObject,
    Saved,
    SavedFile,
    started_backend,
)
from tests.bacula_restore.lab import GRAIN, noise

SIZES = {"disk-0": 40 * GRAIN, "disk-1": 3 * GRAIN + 512}
JOBS = tuple(f"Nightly.2026-11-{day}_10.00.00_03" for day in (21, 22, 23, 24))


class Story:
    """A VM of two images, its jobs, and what its disks were at each."""

    def __init__(self, folder: Path, *, ext: bool) -> None:
        self.folder = folder
        self.ext = ext
        self.jobs: list[Saved] = []
        self.points: list[dict[str, bytes]] = []
        (folder / "state").mkdir()
        disks = ",".join(f"{disk}={folder}/{disk}" for disk in SIZES)
        self.string = (
            f"source=image vm=web image_disks={disks} state_dir={folder}/state"
            f" debug_log={folder}/backend.log"
        )
        for disk, size in SIZES.items():
            (folder / disk).write_bytes(bytes(size))
            self.write(disk, GRAIN + 5, noise(size, 90_000))

    def write(self, disk: str, offset: int, data: bytes) -> None:
        with (self.folder / disk).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    async def backup(self, level: str, previous: int | None = None) -> None:
        number = len(self.jobs)
        async with started_backend(ext=self.ext) as plugin:
            saved = await plugin.backup_job(
                self.string,
                name=JOBS[number],
                level=level,
                job_id=number + 1,
                previous="" if previous is None else JOBS[previous],
            )
        self.jobs.append(saved)
        self.points.append({disk: (self.folder / disk).read_bytes() for disk in SIZES})

    def given(self, *numbers: int) -> tuple[list[tuple[str, SavedFile]], list[RestoreObject]]:
        """Files and objects of some jobs, as Bacula hands them back."""
        files = [pair for number in numbers for pair in self.jobs[number].files.items()]
        objects = [
            RestoreObject(name, data, number + 1)
            for number in numbers
            for name, data in self.jobs[number].objects.items()
        ]
        return files, objects

    def restored(self, point: int, suffix: str = "raw") -> None:
        for disk, image in self.points[point].items():
            path = self.folder / f"out/@image/web/disks/{disk}.{suffix}"
            assert path.read_bytes() == image, disk


@pytest.fixture(params=[True, False], ids=["ours", "stock"])
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Story:
    return Story(tmp_path, ext=request.param)


async def told(story: Story) -> None:
    """Full, two Incrementals, and a Differential on the Full."""
    await story.backup("F")
    story.write("disk-0", 10 * GRAIN, noise(1, GRAIN))
    await story.backup("I", 0)
    story.write("disk-0", GRAIN, bytes(GRAIN))
    story.write("disk-1", 3 * GRAIN, b"end")
    await story.backup("I", 1)
    story.write("disk-1", 0, b"later")
    await story.backup("D", 0)


async def test_every_point_comes_back(story: Story) -> None:
    await told(story)
    for numbers in ((0,), (0, 1), (0, 1, 2), (0, 3)):
        files, objects = story.given(*numbers)
        for kept in (objects, []):  # by the catalogue, and by a bootstrap file alone
            async with started_backend(ext=story.ext) as plugin:
                await plugin.restore_job(story.string, files, kept, where=str(story.folder / "out"))
            story.restored(numbers[-1])
            assert "Restore complete: VM=web" in plugin.text
    deltas = [name for name in story.jobs[3].files if name.endswith(".phcbt")]
    assert len(deltas) == 2
    part = decode_object(next(iter(story.jobs[3].objects.values())))
    assert part.parent_job == JOBS[0]


async def test_a_damaged_restore_is_said_to_be_one(story: Story) -> None:
    await told(story)
    files, objects = story.given(0, 1, 2)
    (name,) = [each for each in story.jobs[1].files if "disk-0.000002" in each]
    offset, data = story.jobs[1].files[name].pieces[0]
    story.jobs[1].files[name].pieces[0] = (offset, data[:300] + b"x" + data[301:])
    async with started_backend(ext=story.ext) as plugin:
        with pytest.raises(BackendFailedError, match="is damaged"):
            await plugin.restore_job(story.string, files, objects, where=f"{story.folder}/out")
    assert not (story.folder / "out").exists()


async def test_a_job_that_is_missing(story: Story) -> None:
    await told(story)
    files, objects = story.given(0, 2)
    async with started_backend(ext=story.ext) as plugin:
        with pytest.raises(BackendFailedError, match=f"of Bacula job {JOBS[1]}"):
            await plugin.restore_job(story.string, files, objects, where=f"{story.folder}/out")
    assert not (story.folder / "out").exists()


async def test_bacula_ends_the_restore_as_failed(tmp_path: Path) -> None:
    story = Story(tmp_path, ext=True)
    await told(story)
    files, objects = story.given(0, 1)
    async with started_backend() as plugin:
        await plugin.restore_job(
            story.string, files, objects, where=f"{story.folder}/out", status="E"
        )
    assert not (story.folder / "out").exists()


async def test_another_format(tmp_path: Path) -> None:
    story = Story(tmp_path, ext=True)
    await told(story)
    files, objects = story.given(0, 1)
    options = RestoreObject("RestoreOptions", b"# x\ntarget_format=qcow2\n", 9, 28)
    async with started_backend() as plugin:
        await plugin.restore_job(
            story.string, files, [*objects, options], where=f"{story.folder}/out"
        )
    found = tmp_path / "out/@image/web/disks/disk-0.qcow2"
    assert found.read_bytes()[:4] == b"QFI\xfb"
    assert "converted to qcow2, checked" in plugin.text
