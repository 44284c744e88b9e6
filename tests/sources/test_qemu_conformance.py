# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import pytest

from tests.lab_qemu import storage_daemon
from tests.sources.conformance import CHECKS, Check
from tests.sources.qemu_lab import QemuLab


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, image_format: str) -> None:
    async with storage_daemon(QemuLab.SIZES, image_format=image_format) as daemon:
        await check(QemuLab(daemon))
