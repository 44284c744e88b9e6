# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the log says while Prism is away or holds requests back. In memory; time is jumped."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio
import trio.testing

from replicator.prism.endpoint import Hosts
from replicator.prism.errors import PrismAuthError, PrismUnreachableError
from tests.prism.lab import Said, in_turn, scripted, settings

WHERE = "Prism prism.example.test:9440"
VMS = "/api/vmm/v4.3/ahv/config/vms"


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "replicator.prism.outage" and record.levelno >= logging.INFO
    ]


async def test_an_outage_is_told_at_once_and_once_a_minute_until_it_ends(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    caplog.set_level(logging.INFO)
    down = True
    async with scripted(tmp_path, in_turn(Said(200, {}))) as (script, _):

        async def dial(host: str, port: int) -> trio.abc.Stream:
            if down:
                raise ConnectionRefusedError(111, "Connection refused")
            return await script.dial(host, port)

        hosts = Hosts(settings(tmp_path), dial=dial)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(PrismUnreachableError):
                    await hosts.central.call("GET", VMS)

            for _ in range(3):
                nursery.start_soon(ask)
        minutes = (trio.current_time() - began) // 60
        lines = told(caplog)
        assert 2 <= len(lines) <= 1 + minutes
        assert {level for level, _ in lines} == {"WARNING"}
        for _, text in lines:
            assert text.startswith(f"cannot reach {WHERE}: trying again (")
            assert "Connection refused" in text
        caplog.clear()
        down = False
        for _ in range(2):
            await hosts.central.call("GET", VMS)
        assert told(caplog) == [("INFO", f"{WHERE} answers again")]
        caplog.clear()
        down = True
        with pytest.raises(PrismUnreachableError):
            await hosts.central.call(
                "POST", VMS, {}, repeat=False, retry_s=10
            )  # by a new connection
        assert len(told(caplog)) == 1, "a new outage is told of at once"
        await hosts.aclose()


async def test_a_host_that_is_asked_too_much_is_told_of_and_not_each_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    caplog.set_level(logging.INFO)
    busy = Said(429, None, {"retry-after": "3"})
    good = Said(200, {})
    async with scripted(tmp_path, in_turn(busy, busy, good, busy, good)) as (_, hosts):
        for _ in range(2):
            await hosts.central.call("GET", VMS)
    (first, second) = told(caplog)
    assert first[0] == "WARNING"
    assert first[1].startswith(f"{WHERE} takes no more requests now: trying again (")
    assert "lower prism_rate_rpm" in first[1]
    assert second == ("INFO", f"{WHERE} takes requests again")


async def test_what_is_not_tried_again_is_no_outage(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    caplog.set_level(logging.INFO)
    html = Said(401, b"<html>no</html>", {"content-type": "text/html"})
    async with scripted(tmp_path, in_turn(Said(cut=True), html)) as (_, hosts):
        with pytest.raises(PrismUnreachableError):
            await hosts.central.call("GET", VMS, retry_s=0)
        with pytest.raises(PrismAuthError) as caught:
            await hosts.central.call("GET", VMS)
    assert told(caplog) == []
    assert "not signed in: 401: check user and passfile" in str(caught.value)
    assert "JSON" not in str(caught.value)
