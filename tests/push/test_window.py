# SPDX-License-Identifier: AGPL-3.0-or-later
"""What may be on its way is bounded, and many disks at once do not fill it with records that none of them can end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from replicator.push import connection, sender
from replicator.push.plan import Want
from tests.limits import HANG_S
from tests.sites import receiver_site, source_site

MIB = 1 << 20


async def test_more_disks_at_once_than_records_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of 1 MiB go in messages of 128 KiB: each of eight disks could be half way in one, and wait for the others."""
    monkeypatch.setattr(connection, "ON_THE_WAY_MAX", MIB)
    monkeypatch.setattr(sender, "DATA_MAX", 128 << 10)
    monkeypatch.setattr(sender, "_MESSAGE_TARGET", 128 << 10)
    disks = {f"disk-{n}": tmp_path / f"{n}.raw" for n in range(8)}
    for number, path in enumerate(disks.values()):
        path.write_bytes(random.Random(number).randbytes(2 * MIB))
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks, concurrent_disks="8") as sx,
    ):
        with trio.fail_after(HANG_S):
            await sx.push(Want.SEED)
        for disk in disks:
            assert await rx.read(1, disk) == sx.content(disk)
