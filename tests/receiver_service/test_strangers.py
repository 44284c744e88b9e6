# SPDX-License-Identifier: AGPL-3.0-or-later
"""The lines of the log that connections without a session may cost."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from receiver.service import strangers
from receiver.service.strangers import EVERY_S, Strangers

LOGGER = logging.getLogger("strangers.test")


async def test_an_address_is_told_once_a_minute_with_a_count(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    log = Strangers(LOGGER)
    for _ in range(1000):
        log.say(logging.WARNING, "192.0.2.1", "no session")
    log.say(logging.ERROR, "192.0.2.2", "token mismatch")
    await trio.sleep(EVERY_S)
    log.say(logging.WARNING, "192.0.2.1", "no session")
    await trio.sleep(EVERY_S)
    log.say(logging.WARNING, "192.0.2.1", "no session")
    assert caplog.messages == [
        "192.0.2.1: no session",
        "192.0.2.2: token mismatch",
        "192.0.2.1: no session (and 999 more in the last minutes)",
        "192.0.2.1: no session",
    ]


async def test_many_addresses_are_counted_together(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    monkeypatch.setattr(strangers, "_ADDRESSES_MAX", 3)
    log = Strangers(LOGGER)
    for number in range(100):
        log.say(logging.WARNING, f"192.0.2.{number}", "no session")
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "192.0.2.0", "192.0.2.1", "192.0.2.2", "other addresses",
    ]  # fmt: skip
    await trio.sleep(EVERY_S)
    log.say(logging.WARNING, "198.51.100.1", "no session")
    assert caplog.messages[-1] == "198.51.100.1: no session"
