# SPDX-License-Identifier: AGPL-3.0-or-later
"""The helper that other tests stand on: what it pushes is what it says, and it would notice if it were not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from replicator.domain.model import PushKind
from tests.receiver.store_lab import Image, StoreFixture, open_store

GRAIN = 4096


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


async def test_points_read_back_as_pushed_over_a_restart(state_dir: Path) -> None:
    first = noise(40 * GRAIN + 100, 1)
    second = first[: 3 * GRAIN] + bytes(9 * GRAIN) + first[12 * GRAIN :]
    third = {"disk-0": second + noise(2 * GRAIN, 3), "disk-1": noise(5 * GRAIN, 4)}
    async with open_store(state_dir) as fixture:
        await fixture.push({"disk-0": first})
        point = await fixture.push({"disk-0": second})
        assert point.bytes_pushed < 2 * GRAIN, "nine grains of zeros take no payload"
        await fixture.push(third)
        await fixture.push(third, whole=True)
        reseeded = await fixture.push({"disk-0": first}, kind=PushKind.SEED)
        assert [disk.since for disk in reseeded.disks] == [5]
        for number in range(1, 6):
            await fixture.check_point(number)
        await fixture.settle()
        for number in range(1, 6):
            await fixture.check_point(number)
    async with open_store(state_dir, expected=fixture.expected) as again:
        for number in range(1, 6):
            await again.check_point(number)


async def test_a_push_can_be_gone_on_with(store_fixture: StoreFixture) -> None:
    push = store_fixture.prepare({"disk-0": noise(64 * GRAIN, 5)})
    (await store_fixture.land(push)).close()
    landing = await store_fixture.land(push)
    assert landing.positions == (len(push.streams[0]),)
    await store_fixture.commit(push, landing)
    await store_fixture.check_point(1)


async def test_a_wrong_byte_is_noticed(store_fixture: StoreFixture) -> None:
    content = noise(8 * GRAIN, 6)
    await store_fixture.push({"disk-0": content})
    store_fixture.expected[1]["disk-0"] = Image.of(content[:-1] + b"\0", GRAIN)
    with pytest.raises(AssertionError, match="at byte"):
        await store_fixture.check_point(1)


def test_an_image_file_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(100 * GRAIN + 7)
        os.pwrite(file.fileno(), noise(2 * GRAIN, 7), 10 * GRAIN + 1)
        os.pwrite(file.fileno(), b"end", 100 * GRAIN + 4)
    assert Image.of(path, GRAIN) == Image.of(path.read_bytes(), GRAIN)
    assert Image.of(path, GRAIN).read(100 * GRAIN, 7) == b"\0\0\0\0end"
