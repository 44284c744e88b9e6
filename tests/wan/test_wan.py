# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pushes over a long, lossy line that is cut: the right content in the end, however long it takes (`scripts/bench wan`)."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from uuid import UUID

import pytest
import trio

from tests.limits import HANG_S
from tests.sites import receiver_site
from tests.wan.forwarder import SOURCE
from tests.wan.lab import Line, NoLabError, wan
from tests.wan.sites import WanSite, wan_site

MIB = 1 << 20


async def read_point(folder: Path, number: int) -> bytes:
    """A point's disk as the receiver's state has it, and nothing but that point in the log."""
    async with receiver_site(folder) as rx:
        events = [type(e).__name__ for e in await rx.log.history(UUID(rx.log.vms[0].vm))]
        assert sum(name in ("SeedCommitted", "CycleCommitted") for name in events) == number
        return await rx.read(number)


@pytest.mark.parametrize("reset", [False, True], ids=["silence", "reset"])
async def test_a_push_outlives_a_partition(tmp_path: Path, reset: bool) -> None:
    """Cut in the middle of the data until the source has tried twice, by sending again or by connecting."""
    content = random.Random(7).randbytes(4 * MIB)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(content)
    async with wan() as line, wan_site(line, tmp_path, {"disk-0": disk}) as site:
        await line.cut(reset=reset, after=MIB, heal_after=2)
        assert (await push(site, "seed"))["point"] == 1
        state = await line.state()
    assert (state.cut, state.cuts, len(state.pauses)) == (False, 1, 1)
    assert state.carried[SOURCE] > len(content)
    if reset:
        assert "trying again" in site.source_log
    assert await read_point(tmp_path / "receiver", 1) == content


async def push(site: WanSite, command: str) -> dict[str, object]:
    with trio.fail_after(HANG_S):
        return await site.push(command)


async def test_what_runs_at_an_end_goes_with_the_line() -> None:
    """Also when whoever made the line is killed: the line ends with its standard input, which is that."""
    async with wan() as line:
        left = await trio.lowlevel.open_process(line.at_receiver("sleep", "infinity"))
        # Only what has entered the namespace can be killed with it.
        with trio.fail_after(HANG_S):
            while await trio.Path(f"/proc/{left.pid}/comm").read_text() != "sleep\n":
                await trio.lowlevel.checkpoint()
    with trio.fail_after(HANG_S):
        assert await left.wait() == -signal.SIGKILL


async def test_a_machine_that_cannot_have_a_line_says_why() -> None:
    with pytest.raises(
        NoLabError, match=r"made here: ip route .*congctl nonsense: .*\(it needs root"
    ):
        async with wan(Line(congestion="nonsense")):
            pass
