# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.receiver.store_lab import StoreFixture, open_store


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """An empty state directory with a short path, because Unix sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="rr", dir="/tmp") as root:
        yield Path(root)


@pytest.fixture
async def store_fixture(state_dir: Path) -> AsyncIterator[StoreFixture]:
    """A running store without points."""
    async with open_store(state_dir) as fixture:
        yield fixture
