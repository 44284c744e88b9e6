# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whole conversations with our plugin: what reaches the handler, what reaches Bacula, and when a reference may move."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bacula_adapter.backend.interface import Answer, BackupOutput, FileEntry
from bacula_adapter.backend.packets import Packet
from replicator.errors import RefusedError
from tests.bacula_adapter.fakes import IMAGE, NOTE, Fakes, small_backup
from tests.bacula_adapter.plugin import (
    JOB,
    BackendFailedError,
    Plugin,
    RestoreObject,
    Saved,
    SavedFile,
    inner_backend,
)

STRING = "vm=web"


async def begun(plugin: Plugin, *, kind: str = "B", level: str = "F") -> None:
    """Up to the start."""
    await plugin.hello()
    await plugin.job(kind=kind, level=level)
    await plugin.params(STRING)


async def saved_small() -> Saved:
    """What ``small_backup`` comes to."""
    async with inner_backend(Fakes()) as plugin:
        return await plugin.backup_job(STRING)


async def test_a_backup_and_its_verdict() -> None:
    fakes = Fakes()
    async with inner_backend(fakes) as plugin:
        await begun(plugin)
        saved = await plugin.backup()
        assert fakes.log == ["prepared PluginString=vm=web", "opened", "ran"]
        await plugin.result("T")
        assert fakes.log[3:] == ["concluded T", "kept"]
        await plugin.end()
    assert (plugin.exit_code, plugin.timeout_s, plugin.claims) == (0, 120, ["@image/"])
    assert saved.order == [IMAGE, NOTE, "replicator/web", "RestoreOptions"]
    image = saved.files[IMAGE]
    assert (image.stat, image.tstamp) == ("F 300000 0 0 100600 1", "5 5 5")
    assert image.pieces == [(65_536, b"a" * 1000), (200_000, b"b" * 10)]
    assert saved.files[NOTE].addressed is False
    assert saved.files[NOTE].content() == b"note"
    assert saved.objects == {"replicator/web": b"object"}
    assert fakes.work is not None
    assert fakes.work.job.job == "Backup"


@pytest.mark.parametrize("status", ["A", "E", "f", "e", "W", "t", "TT"])
async def test_only_t_counts(status: str) -> None:
    fakes = Fakes()
    async with inner_backend(fakes) as plugin:
        await plugin.backup_job(STRING, status=status)
    assert fakes.log[3:] == [f"concluded {status}", "undone"]
    assert plugin.exit_code == 0


async def test_the_verdict_is_answered_when_all_is_undone(autojump_clock: MockClock) -> None:
    began = autojump_clock.current_time()

    async def slowly() -> None:
        await trio.sleep(35)

    fakes = Fakes(undoing=slowly)
    async with inner_backend(fakes) as plugin:
        await begun(plugin)
        await plugin.backup()
        await plugin.result("f")
        assert fakes.log[-1] == "undone"
        assert autojump_clock.current_time() - began == pytest.approx(35)
        assert plugin.alive == 3  # the plugin heard of us every 10 s
        await plugin.end()


async def test_names_of_the_job_before() -> None:
    async with inner_backend(Fakes()) as plugin:
        await begun(plugin, level="I")
        await plugin.backup()
        assert await plugin.check_file(IMAGE)
        assert not await plugin.check_file("@image/gone")
        await plugin.result()
        await plugin.end()


async def test_an_error_fails_the_job_at_once_and_is_undone(autojump_clock: MockClock) -> None:
    del autojump_clock

    async def half(output: BackupOutput) -> None:
        await output.begin(FileEntry(name=IMAGE, size=10, mtime_s=0))
        raise RefusedError("the reference is gone")

    async def slowly() -> None:
        await trio.sleep(25)

    fakes = Fakes(run_backup=half, undoing=slowly)
    async with inner_backend(fakes) as plugin:
        await begun(plugin)
        with pytest.raises(BackendFailedError, match=r"^the reference is gone$") as caught:
            await plugin.backup()
        assert caught.value.status == "A"
        assert fakes.log[-1] == "opened"  # it is still being undone
        await plugin.result("f")
        assert fakes.log[-1] == "undone"
        assert plugin.alive == 2
        await plugin.end()
    assert plugin.exit_code == 0


async def test_a_job_that_failed_here_is_not_well_there() -> None:
    async def fail(output: BackupOutput) -> None:
        del output
        raise OSError(28, "No space left on device")

    async with inner_backend(Fakes(run_backup=fail)) as plugin:
        await begun(plugin)
        with pytest.raises(BackendFailedError):
            await plugin.backup()
        with pytest.raises(BackendFailedError, match=r"^No space left on device$") as caught:
            await plugin.result("T")
        assert caught.value.status == "E"
        await plugin.end()


async def test_what_cannot_be_opened_is_refused() -> None:
    async def refuse() -> None:
        raise RefusedError("another job has this VM")

    for command in ("BackupStart", "RestoreStart", "EstimateStart"):
        async with inner_backend(Fakes(opening=refuse)) as plugin:
            await begun(plugin)
            with pytest.raises(BackendFailedError, match=r"^another job has this VM$"):
                await plugin.start(command)
            await plugin.end()


async def test_a_reference_that_cannot_move_fails_the_verdict() -> None:
    async def fail() -> None:
        raise OSError(5, "Input/output error")

    fakes = Fakes(concluding=fail)
    async with inner_backend(fakes) as plugin:
        await begun(plugin)
        await plugin.backup()
        with pytest.raises(BackendFailedError, match=r"^Input/output error$"):
            await plugin.result("T")
        await plugin.end()
    assert fakes.log[-1] == "undone"


async def test_an_error_while_undoing_is_a_warning() -> None:
    async def fail() -> None:
        raise RefusedError("the snapshot stays")

    async def half(output: BackupOutput) -> None:
        del output
        raise RefusedError("the reference is gone")

    async with inner_backend(Fakes(run_backup=half, undoing=fail)) as plugin:
        await begun(plugin)
        with pytest.raises(BackendFailedError, match=r"^the reference is gone$"):
            await plugin.backup()
        await plugin.result("f")
        await plugin.end()
    assert ("W", "after that: the snapshot stays") in plugin.messages


async def test_an_estimate_a_listing_and_a_query() -> None:
    entries = [
        FileEntry(name="@image/web/", size=0, mtime_s=1),
        FileEntry(name=IMAGE, size=7, mtime_s=2),
    ]
    fakes = Fakes(entries=entries)
    async with inner_backend(fakes) as plugin:
        await begun(plugin, kind="E")
        found = await plugin.entries()
        await plugin.result("T")
        await plugin.end()
    assert [(file.name, file.stat) for file in found] == [
        ("@image/web/", "D 0 0 0 40700 1"),
        (IMAGE, "F 7 0 0 100600 1"),
    ]
    async with inner_backend(fakes) as plugin:
        await begun(plugin, kind="E")
        assert len(await plugin.entries("ListingStart")) == 2
        await plugin.end()
    assert fakes.log[-2:] == ["listed /", "undone"]
    async with inner_backend(fakes) as plugin:
        await begun(plugin, kind="E")
        assert await plugin.query() == ["vm=web", "vm=two lines"]
        await plugin.send("T")
    assert plugin.exit_code == 0


async def test_a_restore() -> None:
    saved = await saved_small()
    fakes = Fakes(answers={"/r/skipped": Answer.SKIP, "/r/plain": Answer.CORE})
    files = [
        ("image", saved.files[IMAGE]),
        ("skipped", saved.files[NOTE]),
        ("plain", saved.files[NOTE]),
        ("note", saved.files[NOTE]),
        ("empty", SavedFile("empty", 0, "F 0 0 0 100600 1", "7 8 9")),
    ]
    objects = [
        RestoreObject("replicator/web", b"o" * 100_000, 3),
        RestoreObject("opt", b"x", 9, 28),
    ]
    async with inner_backend(fakes) as plugin:
        answers = await plugin.restore_job(STRING, files, objects, where="/r")
    assert answers == ["OK", "SKIP", "CORE", "OK", "OK"]
    assert fakes.objects == [("replicator/web", 25, 3, b"o" * 100_000), ("opt", 28, 9, b"x")]
    assert fakes.restored["/r/image"] == [(65_536, b"a" * 1000), (200_000, b"b" * 10)]
    assert fakes.restored["/r/note"] == [(None, b"note")]
    assert fakes.log[2:] == [
        "created /r/image 300000 5 1",
        "closed /r/image True",
        "created /r/skipped 4 6 2",
        "created /r/plain 4 6 3",
        "created /r/note 4 6 4",
        "closed /r/note True",
        "created /r/empty 0 8 5",
        "closed /r/empty True",
        "finished",
        "concluded T",
        "kept",
    ]


async def test_a_file_that_bacula_has_not_finished_is_not_whole() -> None:
    saved = await saved_small()
    fakes = Fakes()
    async with inner_backend(fakes) as plugin:
        await begun(plugin, kind="R")
        await plugin.start("RestoreStart")
        await plugin.restore_file("x", saved.files[IMAGE], whole=False)
        await plugin.result("E")
        await plugin.end()
    assert fakes.log[3:] == ["closed x False", "undone"]


async def test_a_restore_is_never_kept_without_finish() -> None:
    saved = await saved_small()
    fakes = Fakes()
    async with inner_backend(fakes) as plugin:
        await begun(plugin, kind="R")
        await plugin.start("RestoreStart")
        await plugin.restore_file("x", saved.files[IMAGE])
        with pytest.raises(BackendFailedError, match="had not come to its end; it was undone"):
            await plugin.result("T")
        await plugin.end()
    assert fakes.log[-1] == "undone"


async def test_data_that_cannot_be_taken_fail_the_job_while_they_come() -> None:
    async def refuse() -> None:
        raise RefusedError("the disk is full")

    fakes = Fakes(taking=refuse)
    big = SavedFile(
        "x", 8 << 20, f"F {8 << 20} 0 0 100600 1", "1 2 3", pieces=[(0, bytes(8 << 20))]
    )
    async with inner_backend(fakes) as plugin:
        await begun(plugin, kind="R")
        await plugin.start("RestoreStart")
        with pytest.raises(BackendFailedError, match=r"^the disk is full$"):
            await plugin.restore_file("x", big)  # all of it is taken and thrown away
        await plugin.result("f")
        await plugin.end()
    assert plugin.exit_code == 0
    assert fakes.log[-1] == "undone"


async def test_messages_come_in_order_before_packets() -> None:
    logger = logging.getLogger("replicator.test")

    async def talkative(output: BackupOutput) -> None:
        for number in range(40):
            logger.info("begin %d", number)
            await output.begin(FileEntry(name=f"@image/{number}", size=3 << 20, mtime_s=0))
            await output.data(0, bytes(1 << 20))
            logger.warning("middle %d", number)
            await output.data(1 << 20, bytes(2 << 20))
            await output.end()
        logger.error("the last\nword")

    async with inner_backend(Fakes(run_backup=talkative)) as plugin:
        saved = await plugin.backup_job(STRING)
    expected = [line for n in range(40) for line in (("I", f"begin {n}"), ("W", f"middle {n}"))]
    assert plugin.messages == [*expected, ("Q", "the last word")]
    assert all(file.content() == bytes(3 << 20) for file in saved.files.values())


async def test_messages_come_while_nothing_else_does(autojump_clock: MockClock) -> None:
    logger = logging.getLogger("replicator.test")
    began = autojump_clock.current_time()

    async def slow(output: BackupOutput) -> None:
        logger.info("waiting for the snapshot")
        await trio.sleep(34)
        await small_backup(output)

    async with inner_backend(Fakes(run_backup=slow)) as plugin:
        await begun(plugin)
        await plugin.start("BackupStart")
        assert await plugin.packet() == Packet("I", b"waiting for the snapshot\n")
        for beat in (10, 20, 30):
            assert await plugin.packet() == Packet("K")
            assert autojump_clock.current_time() - began == pytest.approx(beat)
        assert (await plugin.packet()).text() == f"FNAME:{IMAGE}"
        await plugin.result("A")
        await plugin.end()


async def test_no_sign_of_life_in_the_plugins_turn(autojump_clock: MockClock) -> None:
    fakes = Fakes()
    async with inner_backend(fakes) as plugin:
        await begun(plugin)
        await plugin.backup()
        await trio.sleep(3600)
        await plugin.result("T")
        await plugin.end()
    assert plugin.alive == 0
    assert autojump_clock.current_time() >= 3600
    assert fakes.log[-1] == "kept"


async def test_data_wait_while_bacula_takes_no_more() -> None:
    written = []

    async def much(output: BackupOutput) -> None:
        await output.begin(FileEntry(name=IMAGE, size=64 << 20, mtime_s=0, addressed=True))
        for at in range(64):
            await output.data(at << 20, bytes(1 << 20))
            written.append(at)
        await output.end()

    async with inner_backend(Fakes(run_backup=much)) as plugin:
        await begun(plugin)
        await plugin.start("BackupStart")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(written) < 4  # what a pipe holds
        await plugin.result("A")
        await plugin.end()


async def test_the_job_as_the_handler_sees_it() -> None:
    fakes = Fakes()
    more = [
        "Since=1700000000",
        "Accurate=1",
        "Client=fd",
        "FDVersion=15.0.3",
        "FDConfig=/etc/x",
        "Foo=1",
    ]
    async with inner_backend(fakes) as plugin:
        await plugin.backup_job(STRING, level="I", job_id=77, previous="Backup.old", more=more)
    assert fakes.work is not None
    job = fakes.work.job
    assert (job.name, job.job_id, job.previous, job.since) == (JOB, 77, "Backup.old", 1_700_000_000)
    assert job == replace(job, accurate=True, client="fd", fd_version="15.0.3", fd_config="/etc/x")
