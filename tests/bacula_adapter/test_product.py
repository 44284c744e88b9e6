# SPDX-License-Identifier: AGPL-3.0-or-later
"""The whole backend as a process, driven by either kind of plugin: a chain of an image, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.bacula_adapter.plugin import RestoreObject, SavedFile, started_backend
from tests.cli.conftest import write_config

SIZE = 3 << 20
IMAGE = "@image/web/disks/disk-0.raw"


def job(number: int) -> str:
    return f"Backup.2026-11-25_10.00.00_0{number}"


@pytest.mark.parametrize("ext", [True, False], ids=["ours", "stock"])
async def test_a_chain_there_and_back(tmp_path: Path, ext: bool) -> None:
    image = tmp_path / "a.raw"
    data = bytearray(SIZE)
    data[1 << 20 : (1 << 20) + 70_000] = b"x" * 70_000
    image.write_bytes(data)
    values = {
        "source": "image", "vm": "web", "image_disks": f"disk-0={image}", "state_dir": tmp_path / "state",
        "debug_log": tmp_path / "log",
    }  # fmt: skip
    config = write_config(tmp_path / "backend.conf", values)
    streams = "bacula_streams=addressed" if ext else ""
    files: list[tuple[str, SavedFile]] = []
    objects: list[RestoreObject] = []
    for number, level in ((1, "F"), (2, "I")):
        async with started_backend(ext=ext, config=config) as plugin:
            previous = job(1) if number > 1 else ""
            saved = await plugin.backup_job(
                streams, name=job(number), level=level, job_id=number, previous=previous
            )
        assert plugin.messages[0][1].endswith(f"phase=F{number + 1} mode=backup vm=web")
        files += saved.files.items()
        objects += [RestoreObject(name, text, number) for name, text in saved.objects.items()]
        if number == 1:
            full = saved.files[IMAGE]
            assert full.content() == data
            assert (full.sent < SIZE) == full.addressed == ext
            data[2 << 20 : (2 << 20) + 5] = b"later"
            image.write_bytes(data)
        else:
            assert 0 < sum(file.sent for file in saved.files.values()) < 200_000
    async with started_backend(ext=ext, config=config) as plugin:
        answers = await plugin.restore_job("", files, objects, where=str(tmp_path / "out"))
    assert answers.count("OK") == 2
    restored = trio.Path(tmp_path / "out" / IMAGE)
    assert await restored.read_bytes() == data


async def test_estimate_and_listing(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(b"x" * SIZE)
    string = f"source=image vm=web image_disks=disk-0={image} state_dir={tmp_path}/state debug_log={tmp_path}/log"
    for more, expected in (("", IMAGE), (" listing=/", "@image/web/")):
        async with started_backend() as plugin:
            await plugin.hello()
            await plugin.job(kind="E")
            await plugin.params(string + more)
            assert [entry.name for entry in await plugin.entries()] == [expected]
            await plugin.end()
        assert plugin.exit_code == 0
