# SPDX-License-Identifier: AGPL-3.0-or-later
"""Bacula's own metaplugins drive the backend too: their dialogue as it is written, byte by byte (P: plugin, B: backend)."""

from __future__ import annotations

import logging

import pytest
import trio

from bacula_adapter.backend.interface import Answer, BackupOutput, FileEntry
from tests.bacula_adapter.fakes import IMAGE, Fakes, small_backup
from tests.bacula_adapter.plugin import BackendFailedError, SavedFile, inner_backend

BACKUP = """
P C Hello nutanix 3
B C Hello Bacula
P C Job
P C Name=Backup.2026-11-25_10.00.00_03
P C JobID=5
P C Type=B
P C Level=F
P C Since=0
P C Replace=a
P C Namespace=@nutanix
P C WorkingDir=/var/lib/bacula
P C SysconfigPath=/etc/bacula
P C ExePath=/usr/sbin
P F
B F
P C Params
P C vm=web
P C abort_on_error=1
P C Accurate=1
P F
B F
P C BackupStart
B F
B C FNAME:@image/web/disk
B C STAT:F 8 0 0 100600 1
B C TSTAMP:5 5 5
B F
B C DATA
B I at the disk
B D ....
B D 4567
B F
B C FNAME:@image/web/note
B C STAT:F 0 0 0 100600 1
B C TSTAMP:6 6 6
B F
B F
B C RESTOREOBJ:replicator/web
B C RESTOREOBJ_LEN:6
B D object
B F
B F
P C END
B F
P T
"""
RESTORE = """
P C Hello nutanix 3
B C Hello Bacula
P C Job
P C Name=Restore.2026-11-25_11.00.00_09
P C JobID=9
P C Type=R
P C Where=/r
P C Replace=a
P F
B F
P C Params
P C vm=web
P F
B F
P C RestoreStart
B F
P C RESTOREOBJ:replicator/web
P C RESTOREOBJ_LEN:6
P D object
P F
B C OK
P C FNAME:/r/@image/web/disk
P C STAT:F 8 0 0 100600 1 1
P C TSTAMP:5 5 5
P F
B C OK
P C DATA
P D ....
P D 4567
P F
B C OK
P C FNAME:/r/@image/web/empty
P C STAT:E 0 0 0 100600 1 2
P C TSTAMP:6 6 6
P F
B C OK
P C FNAME:/r/@image/web/skipped
P C STAT:F 8 0 0 100600 1 3
P C TSTAMP:6 6 6
P F
B C SKIP
P C FNAME:/r/@image/web/last
P C STAT:E 0 0 0 100600 1 4
P C TSTAMP:6 6 6
P F
B C OK
P C FINISH
B F
P C END
B F
P T
"""


async def play(fakes: Fakes, script: str) -> int | None:
    """Say and hear exactly this; ``.`` among data is a zero byte."""
    async with inner_backend(fakes, ext=False) as plugin:
        for line in script.strip().splitlines():
            who, status, *rest = line.split(" ", 2)
            payload = "".join(rest).encode()
            payload = (
                payload.replace(b".", b"\0") if status == "D" else payload + b"\n" * bool(rest)
            )
            if who == "P":
                await plugin.send(status, payload)
            else:
                packet = await plugin.packet()
                assert (packet.status, packet.payload) == (status, payload)
    return plugin.exit_code


async def with_a_gap(output: BackupOutput) -> None:
    await output.begin(FileEntry(name="@image/web/disk", size=8, mtime_s=5, addressed=True))
    logging.getLogger("replicator.test").info("at the disk")
    await output.data(4, b"4567")
    await output.end()
    await output.begin(FileEntry(name="@image/web/note", size=0, mtime_s=6))
    await output.end()
    await output.restore_object("replicator/web", b"object")
    await output.plugin_options("RestoreOptions", "not for a stock plugin")


async def test_a_backup_to_the_letter() -> None:
    fakes = Fakes(run_backup=with_a_gap)
    script = BACKUP.replace("B C DATA\nB I at the disk\n", "B I at the disk\nB C DATA\n")
    assert await play(fakes, script) == 0
    # There is no verdict: the end has to do.
    assert fakes.log[1:] == ["opened", "ran", "concluded T", "kept"]
    assert fakes.work is not None
    assert fakes.work.job.addressed is False


async def test_a_restore_to_the_letter() -> None:
    fakes = Fakes(answers={"/r/@image/web/skipped": Answer.SKIP})
    assert await play(fakes, RESTORE) == 0
    assert fakes.objects == [("replicator/web", 25, 0, b"object")]
    assert fakes.restored["/r/@image/web/disk"] == [(None, bytes(4)), (None, b"4567")]
    assert fakes.log[2:] == [
        "created /r/@image/web/disk 8 5 1",
        "closed /r/@image/web/disk True",
        "created /r/@image/web/empty 0 6 2",
        "closed /r/@image/web/empty True",
        "created /r/@image/web/skipped 8 6 3",
        "created /r/@image/web/last 0 6 4",
        "closed /r/@image/web/last True",
        "finished",
        "concluded T",
        "kept",
    ]


async def test_a_query_ends_without_end() -> None:
    head = BACKUP[: BACKUP.index("P C BackupStart")].replace("Type=B", "Type=E")
    script = f"{head}P C QueryStart\nB F\nB C vm=web\nB C vm=two lines\nB F\nP T\n"
    assert await play(Fakes(), script) == 0


async def test_a_failure_is_fatal_with_a_stock_plugin_too() -> None:
    """E would be an error of one file, and the job well."""

    async def half(output: BackupOutput) -> None:
        await output.begin(FileEntry(name=IMAGE, size=8, mtime_s=5))
        await output.data(0, b"0123")
        raise OSError(5, "Input/output error")

    fakes = Fakes(run_backup=half)
    async with inner_backend(fakes, ext=False) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("vm=web")
        with pytest.raises(BackendFailedError, match="Input/output error") as caught:
            await plugin.backup()
        assert caught.value.status == "A"
        await plugin.end()
    assert fakes.log[-1] == "undone"


async def test_a_reference_that_cannot_move_is_said_at_the_end() -> None:
    async def fail() -> None:
        raise OSError(5, "Input/output error")

    async with inner_backend(Fakes(concluding=fail), ext=False) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("vm=web")
        await plugin.backup()
        with pytest.raises(BackendFailedError, match="Input/output error"):
            await plugin.end()


async def test_the_end_in_the_middle_keeps_nothing() -> None:
    async def endless(output: BackupOutput) -> None:
        await small_backup(output)
        await trio.sleep_forever()

    fakes = Fakes(run_backup=endless)
    async with inner_backend(fakes, ext=False) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("vm=web")
        await plugin.start("BackupStart")
        await plugin.command("END")
        while (await plugin.receive()).status != "F" or fakes.log[-1] != "undone":
            pass
    assert fakes.log[-1] == "undone"


async def test_large_gaps_are_zeros() -> None:
    size = 40 << 20

    async def sparse(output: BackupOutput) -> None:
        await output.begin(FileEntry(name=IMAGE, size=size, mtime_s=5, addressed=True))
        await output.data(33 << 20, b"x")
        await output.end()

    async with inner_backend(Fakes(run_backup=sparse), ext=False) as plugin:
        saved = await plugin.backup_job("vm=web")
    expected = bytearray(size)
    expected[33 << 20] = ord("x")
    assert saved.files[IMAGE].content() == expected
    assert isinstance(saved.files[IMAGE], SavedFile)
