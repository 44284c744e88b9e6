# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pushes of a QEMU disk: real change tracking, sampled; and a bitmap that lost what it had recorded."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from replicator.push.plan import Want
from replicator.push.pusher import Pusher
from replicator.sources.qemu_inventory import take_inventory
from tests.lab_qemu import StorageDaemon, storage_daemon
from tests.sites import GRAIN, ReceiverSite, SourceSite, receiver_site, source_site
from tests.sources.qemu_lab import QemuLab

GRAINS = 64


def grain(seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(GRAIN)


@asynccontextmanager
async def pair(tmp_path: Path) -> AsyncIterator[tuple[ReceiverSite, SourceSite, QemuLab]]:
    async with (
        storage_daemon({"disk-0": GRAINS * GRAIN}) as daemon,
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, {"disk-0": daemon.image("disk-0")}) as sx,
    ):
        lab = QemuLab(daemon)
        await trio.Path(lab.work).mkdir()
        sx.source = lab.source()
        sx.pusher = Pusher(sx.config, sx.log, sx.source, sx.pusher._link)
        yield rx, sx, lab


async def clear_bitmaps(daemon: StorageDaemon) -> None:
    """What a defect would do: the record of what changed is empty."""
    async with daemon.qmp() as qmp:
        for node, found in (await take_inventory(qmp)).nodes.items():
            for name in found.bitmaps:
                await qmp.execute("block-dirty-bitmap-clear", node=node, name=name)


async def test_tracking_by_a_bitmap_is_sampled_and_caught_when_it_lies(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, sx, lab):
        await lab.write("disk-0", 0, grain(0) + grain(1))
        await sx.push(Want.SEED)
        await lab.write("disk-0", 5 * GRAIN, grain("told"))
        point = (await sx.push()).point
        assert (point.sampled, point.compared) == (GRAINS - 1, False)
        await lab.write("disk-0", 9 * GRAIN, grain("not told"))
        await clear_bitmaps(lab.daemon)
        outcome = await sx.push()
        assert outcome.point.compared
        assert outcome.compared is not None
        assert outcome.compared.differing == GRAIN
        assert await rx.read(None) == await lab.content("disk-0")
        assert rx.store.vm.doubtful == {2}
        # The resync's snapshot is the reference now, and nothing else is left.
        await lab.write("disk-0", 7 * GRAIN, grain("later"))
        point = (await sx.push()).point
        assert (point.sampled, point.compared) == (GRAINS - 1, False)
        assert await rx.read(None) == await lab.content("disk-0")
        bitmap, record = await lab.leftovers()
        assert record == f"{bitmap}.json"
