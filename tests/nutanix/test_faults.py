# SPDX-License-Identifier: AGPL-3.0-or-later
"""Many cycles on a Prism that fails at random, before or after it has done what it was asked: the seeds are fixed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from replicator.errors import SourceError
from replicator.prism.errors import PrismRefusedError, PrismTaskError, PrismUnreachableError
from replicator.sources.base import SnapshotName
from tests.nutanix.cluster import FakeTargets, process
from tests.nutanix.fake import FakePrism
from tests.nutanix.protected import HOUR_US, Protected, come_back
from tests.sources.nutanix_lab import fake_world

CYCLES = 4


def _error(dice: random.Random, call: str) -> Exception | None:
    if dice.random() > 0.06:
        return None
    return dice.choice(
        [
            PrismUnreachableError(f"{call}: no answer"),
            PrismRefusedError(f"{call}: refused"),
            PrismTaskError(f"{call}: failed"),
            PrismTaskError(f"{call}: no end", timed_out=True),
        ]
    )


@pytest.mark.parametrize("data_path", ["iscsi", "rest"])
async def test_random_faults(
    data_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = FakeTargets(fake_world(2))
    targets.use(monkeypatch)
    failed = 0
    for seed in range(50):
        dice = random.Random(f"{data_path} {seed}")
        run = Protected(tmp_path, data_path)
        targets.world = run.world
        for number in range(1, CYCLES + 1):
            run.write(number)
            name = SnapshotName(f"s{seed}c{number}", run.newest)
            prism = FakePrism(run.world)
            prism.chance = lambda call, dice=dice: _error(dice, call)
            try:
                await run.cycle(name, prism)
            except SourceError:
                failed += 1
                await come_back(run, name, goes_on=dice.random() < 0.5)
        run.world.now_us += 2 * HOUR_US
        async with process(run.world, run.items, tmp_path, data_path=data_path) as source:
            await source.sweep(None, run.newest)
        run.assert_clean()
    assert 50 < failed < 50 * CYCLES, "some fail and some do not"
