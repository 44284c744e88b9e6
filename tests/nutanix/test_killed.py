# SPDX-License-Identifier: AGPL-3.0-or-later
"""A process that is killed before or after any one call: the next one leaves nothing behind, and its cycle is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicator.sources.base import SnapshotName
from tests.nutanix.cluster import FakeTargets
from tests.nutanix.fake import FakePrism, KilledError
from tests.nutanix.protected import Protected, come_back
from tests.sources.nutanix_lab import fake_world

SECOND = SnapshotName("p2", "p1")


@pytest.mark.parametrize("data_path", ["iscsi", "rest"])
async def test_killed_at_any_call(
    data_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = FakeTargets(fake_world(2))
    targets.use(monkeypatch)

    def begin() -> Protected:
        run = Protected(tmp_path, data_path)
        targets.world = run.world
        return run

    probe = begin()
    probe.write(1)
    await probe.cycle(SnapshotName("p1", None))
    probe.write(2)
    counted = FakePrism(probe.world)
    await probe.cycle(SECOND, counted)
    probe.assert_clean()
    halves = 2 * len(counted.calls)
    assert halves > 20
    for at in range(halves):
        for goes_on in (False, True):
            run = begin()
            run.write(1)
            await run.cycle(SnapshotName("p1", None))
            run.write(2)
            with pytest.raises(KilledError):
                await run.cycle(SECOND, FakePrism(run.world, dies_at=at))
            await come_back(run, SECOND, goes_on=goes_on)
            run.assert_clean()
            run.write(3)
            await run.cycle(SnapshotName("p3", run.newest))
            run.assert_clean()
