# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which part a job goes on from: Bacula's verdicts, levels and names of earlier jobs, as they come in real life."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID

import pytest
import trio

from bacula_adapter.backend.interface import Level
from bacula_adapter.backup import base, machines
from bacula_adapter.backup.vm import VmBackup
from bacula_adapter.state import folder_of
from replicator.errors import RefusedError, ReplicatorError, SourceError
from replicator.log import open_log
from replicator.sources.image import ImageSource
from tests.bacula_backup.lab import GRAIN, Catalogue, ImageVm, Volume, image_vm
from tests.limits import HANG_S

FULL, INCREMENTAL, DIFFERENTIAL = Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL


def one(tmp_path: Path, **options: str) -> ImageVm:
    vm = image_vm(tmp_path, {"disk-0": 64 * GRAIN}, **options)
    vm.write("disk-0", 0, os.urandom(3 * GRAIN))
    return vm


async def events(vm: ImageVm) -> list[str]:
    """Kinds of the chain's events, the first (registered) left out."""
    folder = folder_of(vm.catalogue.config, "jobs", vm.catalogue.job, vm.uuid)
    async with open_log(folder / "events", readonly=True) as log:
        (known,) = log.vms
        found = await log.history(UUID(known.vm))
    return [type(event).__name__ for event in found][1:]


@pytest.mark.parametrize("status", ["A", "f", "E", "I", "W"])
async def test_only_t_counts(status: str, tmp_path: Path) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    vm.write("disk-0", 0, b"lost")
    await vm.catalogue.run(INCREMENTAL, status=status)
    vm.write("disk-0", 9 * GRAIN, b"kept")
    delta = await vm.catalogue.run(INCREMENTAL)
    assert delta.description().number == 2
    assert vm.catalogue.images() == vm.contents
    assert await events(vm) == ["BackupCommitted", "BackupFailed", "BackupCommitted"]
    known = vm.catalogue.known(vm.uuid)
    assert (known.failed, known.failure) == (1, None)


async def test_a_handler_that_is_left_without_a_verdict_undoes_all(tmp_path: Path) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    async with vm.catalogue.opened(vm.catalogue.info(INCREMENTAL)) as handler:
        await handler.run(Volume())
    assert await events(vm) == ["BackupCommitted", "BackupFailed"]
    vm.write("disk-0", 0, b"on")
    await vm.catalogue.run(INCREMENTAL)
    assert vm.catalogue.images() == vm.contents


async def test_a_job_that_was_cancelled_in_the_middle(tmp_path: Path) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    reached = trio.Event()

    async def gate(volume: Volume) -> None:
        del volume
        reached.set()
        await trio.sleep_forever()

    vm.write("disk-0", 0, os.urandom(GRAIN))
    async with vm.catalogue.opened(vm.catalogue.info(INCREMENTAL)) as handler:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler.run, Volume(gate=gate))
            with trio.fail_after(HANG_S):
                await reached.wait()
            nursery.cancel_scope.cancel()
        await handler.conclude("A")
    failure = vm.catalogue.known(vm.uuid).failure
    assert failure is not None
    assert (failure.reason, failure.level) == ("the job was cancelled", "I")
    await vm.catalogue.run(INCREMENTAL)
    assert vm.catalogue.images() == vm.contents


async def test_output_that_fails_is_the_reason_that_is_kept(tmp_path: Path) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)

    async def gate(_: Volume) -> None:
        await trio.lowlevel.checkpoint()
        raise ReplicatorError("the plugin hung up")

    vm.write("disk-0", 0, b"on")
    async with vm.catalogue.opened(vm.catalogue.info(INCREMENTAL)) as handler:
        with pytest.raises(ReplicatorError, match="web: the plugin hung up"):
            await handler.run(Volume(gate=gate))
        await handler.conclude("f")
    failure = vm.catalogue.known(vm.uuid).failure
    assert failure is not None
    assert failure.reason == "the plugin hung up"


async def test_a_good_verdict_over_a_backup_that_failed_counts_nothing(tmp_path: Path) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)

    async def gate(_: Volume) -> None:
        await trio.lowlevel.checkpoint()
        raise SourceError("gone")

    vm.write("disk-0", 0, b"on")
    info = vm.catalogue.info(INCREMENTAL)
    async with vm.catalogue.opened(info) as handler:
        with pytest.raises(ReplicatorError, match="gone"):
            await handler.run(Volume(gate=gate))
        with pytest.raises(ReplicatorError, match="nothing of it counts"):
            await handler.conclude("T")
    assert await events(vm) == ["BackupCommitted", "BackupFailed"]


@pytest.mark.parametrize(
    ("previous", "why"),
    [
        ("Nightly.2026-01-01_10.00.00_99", "goes on from job Nightly.2026-01-01_10.00.00_99"),
        ("", "does not say from which job"),
    ],
)
async def test_a_job_that_was_never_ran_here(
    previous: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a VirtualFull, whose name no backend has ever seen."""
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    second = await vm.catalogue.run(INCREMENTAL, previous=previous)
    assert second.description().disks[0].kind == "full"
    assert "web: reference_snapshot not found: " in caplog.text
    assert why in caplog.text
    assert "; falling back to Full" in caplog.text
    assert vm.catalogue.images() == vm.contents
    # From there on the chain goes on.
    vm.write("disk-0", 0, b"on")
    assert (await vm.catalogue.run(INCREMENTAL)).bytes < 2 * GRAIN
    assert vm.catalogue.images() == vm.contents


async def test_the_first_job_of_a_vm_that_came_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vm = one(tmp_path)
    first = await vm.catalogue.run(INCREMENTAL, previous="Nightly.2026-01-01_10.00.00_99")
    assert first.description().disks[0].kind == "full"
    assert "no backup of this VM by this job is known here" in caplog.text


async def test_a_job_that_the_catalogue_forgot(tmp_path: Path) -> None:
    """The last job was deleted: Bacula goes on from the Full, and so does the chain."""
    vm = one(tmp_path)
    full = await vm.catalogue.run(FULL)
    vm.write("disk-0", 5 * GRAIN, os.urandom(GRAIN))
    await vm.catalogue.run(INCREMENTAL)
    vm.catalogue.volumes.popitem()
    third = (await vm.catalogue.run(INCREMENTAL)).description()
    assert third.parent == full.description().part
    assert vm.catalogue.images() == vm.contents


async def test_a_job_that_bacula_calls_failed_after_all(tmp_path: Path) -> None:
    """The backend was told T, and the catalogue says otherwise: nothing may go on from that part."""
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    for number in range(3):
        vm.write("disk-0", number * GRAIN, b"on")
        await vm.catalogue.run(INCREMENTAL)
    vm.catalogue.volumes.popitem()
    last = await vm.catalogue.run(INCREMENTAL)
    assert last.description().disks[0].kind == "full"
    assert vm.catalogue.images() == vm.contents


async def test_levels_in_any_order(tmp_path: Path) -> None:
    """Upgraded, run again, Differentials after Incrementals and the other way round."""
    vm = one(tmp_path)
    wanted: dict[str, dict[str, bytes]] = {}
    for number, level in enumerate("FIDIIDDFDIFFID"):
        vm.write("disk-0", (number * 7 % 64) * GRAIN, os.urandom(GRAIN))
        if number % 3 == 2:
            vm.write("disk-0", (number * 5 % 64) * GRAIN, bytes(GRAIN))
        await vm.catalogue.run(Level(level))
        wanted[next(reversed(vm.catalogue.volumes))] = vm.contents
    for job, content in wanted.items():
        assert vm.catalogue.images(job) == content


async def test_two_jobs_on_one_vm_at_once(tmp_path: Path) -> None:
    vm = one(tmp_path)
    other = Catalogue(vm.catalogue.config, job="Weekly")
    for catalogue in (vm.catalogue, other):
        await catalogue.run(FULL)
    vm.write("disk-0", 0, b"on")
    async with AsyncExitStack() as stack:
        handlers = []
        for catalogue in (vm.catalogue, other):
            info, volume = catalogue.info(INCREMENTAL), Volume()
            handler = await stack.enter_async_context(catalogue.opened(info))
            handlers.append((catalogue, info, volume, handler))
        async with trio.open_nursery() as nursery:
            for _, _, volume, handler in handlers:
                nursery.start_soon(handler.run, volume)
        for catalogue, info, volume, handler in handlers:
            await handler.conclude("T")
            catalogue.keep(info, volume)
    assert vm.catalogue.images() == other.images() == vm.contents


async def test_one_job_twice_at_once_is_refused(tmp_path: Path) -> None:
    vm = one(tmp_path)
    async with vm.catalogue.opened(vm.catalogue.info(FULL)):
        said = rf"web: Bacula job Nightly is backing it up already: .*pid {os.getpid()}"
        with pytest.raises(RefusedError, match=said):
            async with vm.catalogue.opened(vm.catalogue.info(FULL)):
                pass


async def test_names_of_earlier_jobs_that_still_count(tmp_path: Path) -> None:
    vm = one(tmp_path)
    full = await vm.catalogue.run(FULL)
    vm.write("disk-0", 0, b"1")
    first = await vm.catalogue.run(INCREMENTAL)
    vm.write("disk-0", 0, b"2")
    info, volume = vm.catalogue.info(INCREMENTAL), Volume()
    async with vm.catalogue.opened(info) as handler:
        assert handler.claims == ["@image/web/"]
        await handler.run(volume)
        for name in [*full.files, *first.files, *volume.files]:
            assert await handler.exists(name), name
        assert not await handler.exists("@image/other/disks/disk-0.raw")
        assert not await handler.exists("@image/web/disks/disk-9.raw")
        assert not await handler.exists("@image/web/disks/disk-0.000002-00000000.phcbt")
        assert not await handler.exists("/etc/passwd")
        await handler.conclude("T")
    vm.catalogue.keep(info, volume)
    async with vm.catalogue.opened(vm.catalogue.info(DIFFERENTIAL)) as handler:
        await handler.run(Volume())
        for name in full.files:
            assert await handler.exists(name)
        for name in first.files:
            assert not await handler.exists(name)


async def test_a_vm_that_was_renamed_keeps_its_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its UUID says who it is; the image below its deltas has the old name."""

    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    monkeypatch.setattr(machines, "folder_name", lambda *_: "web renamed")
    vm.write("disk-0", 0, b"on")
    info, volume = vm.catalogue.info(INCREMENTAL), Volume()
    async with vm.catalogue.opened(info) as handler:
        assert list(handler.claims) == ["@image/web renamed/", "@image/web/"]
        await handler.run(volume)
        assert await handler.exists("@image/web/disks/disk-0.raw")
        assert not await handler.exists("@image/web renamed/disks/disk-0.raw")
        await handler.conclude("T")
    vm.catalogue.keep(info, volume)
    assert volume.description().vm == "web renamed"
    assert volume.description().disks[0].kind == "delta"
    assert vm.catalogue.images() == vm.contents


async def test_what_cannot_be_undone_is_left_to_the_next_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    vm = one(tmp_path)
    await vm.catalogue.run(FULL)

    async def fails(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise SourceError("the platform is away")

    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "abandon", fails)
        await vm.catalogue.run(INCREMENTAL, status="f")
    assert "could not be removed; the next one does that: the platform is away" in caplog.text
    vm.write("disk-0", 0, b"on")
    await vm.catalogue.run(INCREMENTAL)
    assert vm.catalogue.images() == vm.contents
    assert await events(vm) == ["BackupCommitted", "BackupFailed", "BackupCommitted"]
    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "confirm", fails)
        vm.write("disk-0", 0, b"off")
        await vm.catalogue.run(INCREMENTAL)
    assert "part 3 counts, but the older reference could not be let go of" in caplog.text
    vm.write("disk-0", 0, b"on again")
    assert (await vm.catalogue.run(INCREMENTAL)).description().disks[0].kind == "delta"
    assert vm.catalogue.images() == vm.contents


async def test_an_event_that_cannot_be_saved_means_that_nothing_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    info, volume = vm.catalogue.info(INCREMENTAL), Volume()

    async def fails(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(28, "No space left on device")

    async with vm.catalogue.opened(info) as handler:
        await handler.run(volume)
        with monkeypatch.context() as patch:
            patch.setattr(VmBackup, "conclude", fails)
            with pytest.raises(ReplicatorError, match="No space left"):
                await handler.conclude("T")
    vm.catalogue.keep(info, volume)  # Bacula has it
    vm.write("disk-0", 0, b"on")
    third = await vm.catalogue.run(INCREMENTAL)
    assert third.description().disks[0].kind == "full"
    assert vm.catalogue.images() == vm.contents


async def test_a_differential_is_made_from_a_full_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    await vm.catalogue.run(INCREMENTAL)
    last = next(reversed(vm.catalogue.volumes))
    found = await vm.catalogue.run(DIFFERENTIAL, previous=last)
    assert found.description().disks[0].kind == "full"
    assert f"{last}, which is no Full" in caplog.text


async def test_a_chain_goes_on_in_the_next_period_of_its_log(tmp_path: Path) -> None:
    vm = one(tmp_path)
    await vm.catalogue.run(FULL)
    folder = folder_of(vm.catalogue.config, "jobs", "Nightly", vm.uuid)
    vm.write("disk-0", 0, b"1")
    await vm.catalogue.run(INCREMENTAL)
    before = vm.catalogue.known(vm.uuid)
    async with open_log(folder / "events") as log:
        assert await log.close_period() is not None
        await log.seal()
    assert vm.catalogue.known(vm.uuid) == before
    vm.write("disk-0", 5 * GRAIN, b"2")
    assert (await vm.catalogue.run(INCREMENTAL)).description().disks[0].kind == "delta"
    assert vm.catalogue.images() == vm.contents
    await vm.catalogue.run(DIFFERENTIAL)
    assert vm.catalogue.images() == vm.contents


async def test_more_parts_than_a_restore_should_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vm = one(tmp_path)
    monkeypatch.setattr(base, "PARTS_MAX", 3)
    await vm.catalogue.run(FULL)
    kinds = []
    for number in range(4):
        vm.write("disk-0", number, b"x")
        kinds.append((await vm.catalogue.run(INCREMENTAL)).description().disks[0].kind)
    assert kinds == ["delta", "delta", "full", "delta"]
    assert "3 parts stand on top of each other already; falling back to Full" in caplog.text
    assert vm.catalogue.images() == vm.contents
