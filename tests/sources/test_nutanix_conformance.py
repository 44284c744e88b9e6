# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from tests.iscsi.lab import target_daemon
from tests.sources.conformance import CHECKS, Check
from tests.sources.nutanix_lab import fake_lab, target_lab
from tests.sources.simulated import Api, simulated_lab


@pytest.mark.parametrize("disks", [1, 2])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance_over_rest(check: Check, disks: int, tmp_path: Path) -> None:
    async with fake_lab(tmp_path, disks) as lab:
        await check(lab)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance_over_iscsi(check: Check, tmp_path: Path) -> None:
    async with target_daemon() as daemon, target_lab(tmp_path, daemon) as lab:
        await check(lab)


@pytest.mark.parametrize("disks", [1, 2])
@pytest.mark.parametrize("api", ["v3", "v4"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance_over_the_simulator(
    check: Check, api: Api, disks: int, tmp_path: Path
) -> None:
    async with simulated_lab(tmp_path, api, disks) as lab:
        await check(lab)
