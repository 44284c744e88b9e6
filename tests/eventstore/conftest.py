# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eventstore import LMDBEnvironment


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[LMDBEnvironment]:
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        yield opened
