# SPDX-License-Identifier: AGPL-3.0-or-later
"""A push ends in one point with the right content wherever its line is cut, from the first byte of the session to its last,
and whichever side begins anew meanwhile; and little is sent twice.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
import trio

from receiver.service import sessions
from replicator.push import connection, patience, sender
from replicator.push.plan import Want
from replicator.push.pusher import Outcome
from tests.limits import HANG_S
from tests.push.proxy import Cut, Line, proxied
from tests.sites import GRAIN, ReceiverSite, SourceSite, receiver_site, source_site

SIZE = 32 * GRAIN
#: Cuts of one way and one kind of restart; each is a cycle.
PLACES = 12
#: What a line may cost that is cut: what was on its way, and the record that it was cut in.
RESENT_MAX = connection.ON_THE_WAY_MAX + (1 << 20) + GRAIN


class Sites:
    """A source and a receiver that can be begun anew, on a line that can be cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "a.raw"
        self.disk.write_bytes(os.urandom(SIZE))
        self.rx: ReceiverSite
        self.line: Line
        self._rng = random.Random(1)
        self._restart = trio.Event()
        self._restarted = trio.Event()

    async def receivers(self, task_status: trio.TaskStatus[int]) -> None:
        """One receiver after the other, on one port. Each stops as a crash would leave it."""
        port = 0
        while True:
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            async with receiver_site(
                self.folder / "rx", listeners=listeners, dr_restore_points="1000"
            ) as self.rx:
                self._restarted.set()
                if not port:
                    port = self.rx.port
                    task_status.started(port)
                await self._restart.wait()

    async def restart_receiver(self) -> None:
        self._restarted = trio.Event()
        previous, self._restart = self._restart, trio.Event()
        previous.set()
        await self._restarted.wait()

    @asynccontextmanager
    async def source(self) -> AsyncIterator[SourceSite]:
        """A source as a process has it that never gives up."""
        disks = {"disk-0": self.disk}
        async with source_site(self.folder / "sx", self.line.port, disks) as sx:
            sx.pusher.patience.limit_s = math.inf
            yield sx

    def change(self) -> None:
        """Write to ten grains, each of them apart."""
        with self.disk.open("r+b") as file:
            for at in range(0, 30, 3):
                file.seek((at + self._rng.randrange(2)) * GRAIN)
                file.write(self._rng.randbytes(GRAIN))

    async def push(self, restart: str) -> Outcome:
        """A push over a line that may be cut. Who is named begins anew when the line is made for the second time."""
        connections = count(1)
        scope = trio.CancelScope()

        async def accepted() -> None:
            if next(connections) == 2:
                if restart in ("receiver", "both"):
                    await self.restart_receiver()
                if restart in ("source", "both"):
                    scope.cancel()

        self.line.accepted = accepted
        with trio.fail_after(HANG_S):
            with scope:
                async with self.source() as sx:
                    return await sx.push(Want.RUN)
            async with self.source() as again:
                return await again.push(Want.RUN)


@asynccontextmanager
async def both(folder: Path) -> AsyncIterator[Sites]:
    sites = Sites(folder)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(sites.receivers)
        async with proxied(port) as sites.line:
            yield sites
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "pause_s", lambda *_: 0.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acknowledgements and messages are as small as these disks."""
    monkeypatch.setattr(sessions, "ACK_BYTES", 3 * GRAIN)
    monkeypatch.setattr(sender, "_MESSAGE_TARGET", GRAIN)


def places(total: int) -> list[int]:
    """From the first byte to the last: in the handshake, in the question and the answer, evenly in the data, at the commit and
    while the heads of the logs are compared.
    """
    ends = [1, 60, 150, 400, total - 900, total - 200, total - 60, total - 1]
    between = PLACES - len(ends)
    even = [total * n // (between + 1) for n in range(1, between + 1)]
    return sorted({at for at in (*ends, *even) if 0 < at < total})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["to_receiver", "to_source"])
@pytest.mark.parametrize("restart", ["nobody", "source", "receiver", "both"])
async def test_a_cut_anywhere_ends_in_one_point(tmp_path: Path, way: str, restart: str) -> None:
    async with both(tmp_path) as sites:
        await sites.push("nobody")
        sites.change()
        sites.line.passed.clear()
        await sites.push("nobody")
        ((there, back),) = sites.line.passed
        for number, at in enumerate(places(there if way == "to_receiver" else back), 3):
            sites.change()
            sites.line.passed.clear()
            sites.line.cuts = [Cut(to_receiver=at) if way == "to_receiver" else Cut(to_source=at)]
            outcome = await sites.push(restart)
            assert outcome.point.number == number
            newest = sites.rx.store.vm.newest
            assert newest is not None
            assert (newest.number, newest.root) == (number, outcome.point.root)
            assert len(sites.rx.store.vm.points) == number
            assert await sites.rx.read(None) == sites.disk.read_bytes()
            assert await sites.rx.store.unfinished() is None
            if restart == "nobody":
                sent = sum(passed[0] for passed in sites.line.passed)
                # What a session costs beside its data is far less than a grain.
                assert sent <= there + len(sites.line.passed) * 5 * GRAIN


@pytest.mark.parametrize("restart", ["nobody", "source", "receiver", "both"])
async def test_what_was_on_its_way_is_all_that_is_sent_again(tmp_path: Path, restart: str) -> None:
    """A seed of 40 MiB, cut four times, by bytes of either direction."""
    size = 40 << 20
    async with both(tmp_path) as sites:
        sites.disk.write_bytes(random.Random(7).randbytes(size))
        cuts = [
            Cut(to_receiver=9 << 20),
            Cut(to_source=600),
            Cut(to_receiver=5 << 20),
            Cut(to_receiver=3 << 20),
        ]
        sites.line.cuts = list(cuts)
        outcome = await sites.push(restart)
        assert outcome.point.number == 1
        assert await sites.rx.read(None) == sites.disk.read_bytes()
        assert len(sites.line.passed) >= len(cuts) + 1
        assert sites.line.cuts == []
        sent = sum(passed[0] for passed in sites.line.passed)
        overhead = size // 100
        assert sent <= size + len(cuts) * RESENT_MAX + overhead
        assert outcome.resent_bytes <= len(cuts) * RESENT_MAX
