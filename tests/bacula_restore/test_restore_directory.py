# SPDX-License-Identifier: AGPL-3.0-or-later
"""Restores to folders: what may be replaced, where files may go, and what a restore that was killed leaves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bacula_adapter.backend.interface import RestoredFile
from bacula_adapter.restore import open_restore
from bacula_adapter.state import folder_of
from replicator import durable
from replicator.errors import RefusedError
from tests.bacula_restore.lab import (
    Bacula,
    Machine,
    Part,
    chain,
    config_in,
    everything_below,
    noise,
    out_of,
    restore,
    restore_job,
)
from tests.limits import HANG_S


def small() -> tuple[Machine, Part]:
    machine = Machine()
    machine.add("disk-0", 300_000)
    return machine, machine.backup("F")


@pytest.mark.parametrize(
    ("replace", "age", "allowed"),
    [
        ("a", 0, True),
        ("n", 0, False),
        ("w", -10, True),
        ("w", 10, False),
        ("o", 10, True),
        ("o", -10, False),
    ],
)
async def test_replace(tmp_path: Path, replace: str, age: int, allowed: bool) -> None:
    machine, part = small()
    final = out_of(tmp_path, part, "disk-0")
    final.parent.mkdir(parents=True)
    final.write_bytes(b"somebody's")
    time_s = part.description.taken_at_us // 1_000_000 + age
    os.utime(final, (time_s, time_s))
    job = restore_job(str(tmp_path / "out"), replace=replace)
    if allowed:
        await restore(tmp_path, machine.parts, job=job)
        assert final.read_bytes() == part.images["disk-0"]
        assert final.stat().st_mtime == part.description.taken_at_us // 1_000_000
        return
    bacula = Bacula(str(tmp_path / "out"))
    async with open_restore(job, config_in(tmp_path)) as handler:
        await handler.restore_object(part.object[0], 25, 1, part.object[1])
        file = next(iter(part.files.values()))
        with pytest.raises(RefusedError, match=r"disk-0\.raw is there, and the job says Replace ="):
            await bacula.file(handler, file)
    assert bacula.answers == {}, "refused before any data are taken"
    assert final.read_bytes() == b"somebody's"
    assert everything_below(tmp_path) == [final]


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
async def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    machine, part = small()
    final = out_of(tmp_path, part, "disk-0")
    final.parent.mkdir(parents=True)
    other = tmp_path / "other"
    if kind == "folder":
        final.mkdir()
    elif kind == "pipe":
        os.mkfifo(final)
    else:
        if kind == "link":
            other.write_bytes(b"x")
        final.symlink_to(other)
    with pytest.raises(RefusedError, match="is no file"):
        await restore(tmp_path, machine.parts)
    assert not other.exists() or other.read_bytes() == b"x"


@pytest.mark.parametrize("place", ["@nutanix", "@nutanix/web", "@nutanix/web/disks"])
@pytest.mark.parametrize("into", ["folder", "nowhere", "file"])
async def test_links_below_the_place_are_not_followed(
    tmp_path: Path, place: str, into: str
) -> None:
    machine, _ = small()
    away = tmp_path / "away"
    if into == "folder":
        away.mkdir()
    elif into == "file":
        away.write_bytes(b"x")
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(away)
    with pytest.raises(RefusedError, match="follows no links below its place"):
        await restore(tmp_path, machine.parts)
    assert not away.is_dir() or list(away.iterdir()) == []


async def test_a_link_in_the_place_of_the_unfinished_image_is_not_followed(tmp_path: Path) -> None:
    machine, part = small()
    partial = out_of(tmp_path, part, "disk-0").with_name(".disk-0.raw.partial")
    partial.parent.mkdir(parents=True)
    other = tmp_path / "other"
    other.write_bytes(b"x")
    partial.symlink_to(other)
    with pytest.raises(RefusedError, match="cannot be written"):
        await restore(tmp_path, machine.parts)
    assert other.read_bytes() == b"x"


async def test_the_place_itself_may_be_a_link(tmp_path: Path) -> None:
    machine, part = small()
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to(real)
    await restore(tmp_path, machine.parts)
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]
    assert (real / "@nutanix/web/disks/disk-0.raw").is_file()


BAD_NAMES = (
    "@nutanix/web/disks/disk-0.raw",
    "{out}/x/@nutanix/web/disks/disk-0.raw",
    "{out}/@nutanix/../disks/disk-0.raw",
    "{out}/@nutanix/web/disks/../disks/disk-0.raw",
    "{out}/@nutanix/web/disks/disk-0.raw.old",
    "{out}/@other/web/disks/disk-0.raw",
    "{out}/../@nutanix/web/disks/disk-0.raw",
    "{out}/@nutanix/web/disks/disk-0.000001-0123ABCD.phcbt",
    "{out}/etc/passwd",
)


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_names_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    async with open_restore(restore_job(str(out)), config_in(tmp_path)) as handler:
        file = RestoredFile(name=name.format(out=out), size=4096, mtime_s=0)
        with pytest.raises(RefusedError):
            await handler.create(file)
    assert not out.exists()


@pytest.mark.parametrize("where", ["out/", "out//x/.."])
async def test_the_place_may_be_written_in_any_way(tmp_path: Path, where: str) -> None:
    machine, part = small()
    job = restore_job(f"{tmp_path}/{where}")
    await restore(tmp_path, machine.parts, job=job, bacula=Bacula(str(tmp_path / "out")))
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


async def test_a_regular_expression_says_where(tmp_path: Path) -> None:
    machine = chain()
    part = machine.parts[-1]
    bacula = Bacula(f"{tmp_path}/out/any where")
    await restore(tmp_path, machine.parts, job=restore_job(None), bacula=bacula)
    found = tmp_path / "out/any where/@nutanix/web/disks/disk-0.raw"
    assert found.read_bytes() == part.images["disk-0"]


async def test_the_configuration_may_say_where(tmp_path: Path) -> None:
    machine, part = small()
    config = config_in(tmp_path, where=str(tmp_path / "out"))
    await restore(tmp_path, machine.parts, job=restore_job(""), config=config, bacula=Bacula(""))
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]


@pytest.mark.parametrize("where", ["relative", "/tmp/../etc"])
async def test_the_configurations_place_is_checked(tmp_path: Path, where: str) -> None:
    machine, _ = small()
    config = config_in(tmp_path, where=where)
    with pytest.raises(RefusedError, match="is not an absolute path without"):
        await restore(
            tmp_path, machine.parts, job=restore_job("/"), config=config, bacula=Bacula("")
        )


@pytest.mark.parametrize("prefix", ["", "some/where"])
async def test_a_regular_expression_must_lead_to_a_place(tmp_path: Path, prefix: str) -> None:
    machine, _ = small()
    with pytest.raises(RefusedError, match="expected an absolute path"):
        await restore(tmp_path, machine.parts, job=restore_job(None), bacula=Bacula(prefix))


async def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    machine, _ = small()
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(RefusedError, match=r"where: .*out.* cannot be made: Not a directory"):
        await restore(tmp_path, machine.parts)


async def test_a_full_file_system_ends_the_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = chain()

    def full(self: durable.DurableFile, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", self.path)

    bacula = Bacula(str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        async with open_restore(restore_job(bacula.where), config_in(tmp_path)) as handler:
            for part in machine.parts:
                await handler.restore_object(part.object[0], 25, 1, part.object[1])
            await bacula.give(handler, machine.parts[:1], objects=False)
            patched.setattr(durable.DurableFile, "_write", full)
            with pytest.raises(OSError, match="No space left"):
                await bacula.give(handler, machine.parts[1:], objects=False)
    assert everything_below(tmp_path) == []


KILLED = """
import os, sys, trio
from pathlib import Path
from replicator import durable
from tests.bacula_restore.lab import chain, restore
at = int(sys.argv[2])
steps = 0
def observe(step, path):
    global steps
    if "/out" in path:
        steps += 1
        if steps == at:
            os._exit(9)
durable.observe = observe
trio.run(restore, Path(sys.argv[1]), chain().parts)
print(steps)
"""


def run_and_kill(folder: Path, at: int) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(at)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


async def test_wherever_a_restore_is_killed_the_next_one_cleans_up(tmp_path: Path) -> None:
    machine, other = chain(), Machine("db")
    other.add("disk-0", 10_000)
    other.backup("F")
    (tmp_path / "whole").mkdir()
    steps = int(run_and_kill(tmp_path / "whole", 0).stdout)
    assert steps > 20
    for at in sorted({1, 5, steps // 2, *range(steps - 9, steps + 1)}):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert run_and_kill(folder, at).returncode == 9
        # Of a name that it has, a file is whole.
        before = [path for path in everything_below(folder) if not path.name.startswith(".")]
        for path in before:
            if path.suffix == ".raw":
                assert path.read_bytes() == machine.parts[-1].images[path.stem]
        await restore(folder, other.parts)
        left = [path for path in everything_below(folder) if "/web/" in str(path)]
        assert [path for path in left if path.name.startswith(".")] == []
        # Once one of them had its name all get theirs; before that, none or all, as far as it had come.
        assert len(left) == 3 or (not before and left == [])


async def test_what_a_killed_restore_left_is_in_nobodys_way(tmp_path: Path) -> None:
    machine, part = small()
    partial = out_of(tmp_path, part, "disk-0").with_name(".disk-0.raw.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(noise(1, 400_000))
    await restore(tmp_path, machine.parts)
    assert out_of(tmp_path, part, "disk-0").read_bytes() == part.images["disk-0"]
    assert not partial.exists()


async def test_the_folder_that_a_killed_restore_left_is_used_first(tmp_path: Path) -> None:
    machine, _ = small()
    config = config_in(tmp_path)
    await restore(tmp_path, machine.parts)
    folder = folder_of(config, "restores", "5")
    folder.mkdir()
    (folder / "at-work").touch()
    await restore(tmp_path, machine.parts)
    assert (folder / "events").is_dir()
    assert not (folder / "at-work").exists()
