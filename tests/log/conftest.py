# SPDX-License-Identifier: AGPL-3.0-or-later
"""A calendar that is turned by hand, for the log and its events alike."""

from __future__ import annotations

import pytest
import trio

from replicator.log import EventLog
from tests.cli.conftest import _logging_as_before, replctl
from tests.log.support import Calendar

__all__ = ["_logging_as_before", "by_hand", "calendar", "replctl"]


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    """January 2026, until a test turns it."""
    made = Calendar()
    made.install(monkeypatch)
    return made


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Books are closed and sealed only where a test says so."""

    async def never(_: EventLog) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(EventLog, "keep_periods", never)
