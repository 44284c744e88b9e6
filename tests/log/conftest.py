# SPDX-License-Identifier: AGPL-3.0-or-later
"""A calendar that is turned by hand, for the log and its events alike, and a log that is made with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from replicator.log import EventLog
from tests.cli.conftest import replctl
from tests.log.support import Calendar, copy_log, three_months

__all__ = ["by_hand", "calendar", "copied", "made", "replctl"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of three months, two of them sealed: ``web`` in all, ``db`` from the second, ``mail`` in the third."""
    folder = tmp_path_factory.mktemp("made") / "log"
    with pytest.MonkeyPatch.context() as patch:
        turned = Calendar()
        turned.install(patch)
        trio.run(three_months, folder, turned)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return copy_log(made, tmp_path / "log")


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    """January 2026, until a test turns it."""
    turned = Calendar()
    turned.install(monkeypatch)
    return turned


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Books are closed and sealed only where a test says so."""

    async def never(_: EventLog) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(EventLog, "keep_periods", never)
