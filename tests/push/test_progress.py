# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far a push is said to be, and how long it is said to go on."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from replicator.cli import underway
from replicator.cli.underway import how_far, watch
from replicator.credentials import SourceCredentials
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.push.progress import Progress, UnderWay, left_s
from replicator.push.pusher import Pusher
from tests.sites import receiver_site, source_site

GIB = 1 << 30


@pytest.mark.parametrize(
    ("done", "total", "gained", "took_s", "left"),
    [
        (50, 100, 50, 10.0, 10.0),
        # Taken up at 50: only what this connection has brought says how fast it is.
        (60, 100, 10, 20.0, 80.0),
        (50, 100, 0, 100.0, None),
        (50, 100, 50, 1.9, None),
        (100, 100, 0, 0.0, 0.0),
        (0, 0, 0, 0.0, 0.0),
    ],
)
def test_what_is_left(
    done: int, total: int, gained: int, took_s: float, left: float | None
) -> None:
    assert left_s(done, total, gained, took_s) == left


def test_the_disks_are_added_up_and_what_was_there_before_is_no_measure() -> None:
    push = UnderWay(3, "cycle", 0, 200)
    assert (push.done, push.ratio, push.eta_s) == (0, 0.0, None)
    push.update(Progress("disk-0", 40, 100, 7), 1000.0)
    push.update(Progress("disk-1", 0, 100, 7), 1000.0)
    assert (push.done, push.eta_s) == (40, None)
    push.update(Progress("disk-0", 60, 100, 27), 1005.0)
    push.update(Progress("disk-1", 20, 100, 47), 1010.0)
    assert (push.done, push.ratio, push.sent) == (80, 0.4, 47)
    assert push.eta_s == pytest.approx((200 - 80) / 40 * 10)


@pytest.mark.parametrize(
    ("eta_s", "text"),
    [
        (0.2, "about 1 s"),
        (119.0, "about 119 s"),
        (120.0, "about 2 min"),
        (7100.0, "about 118 min"),
        (3 * 3600.0, "about 3 h"),
        (9 * 86400.0, "about 9 d"),
    ],
)
def test_in_words(eta_s: float, text: str) -> None:
    push = {"received": None, "done": 56 * GIB, "total": 100 * GIB, "sent": 5 * GIB}
    assert how_far({**push, "eta_s": None}) == "56 % of 100.0 GiB looked at, 5.0 GiB sent"
    assert how_far({**push, "eta_s": eta_s}).endswith(f" sent, {text} left")


async def test_run_logs_each_tenth_and_at_most_once_a_minute(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    caplog.set_level(logging.INFO, underway.__name__)
    now: UnderWay | None = None
    lines: list[int] = []

    async def told_after(minutes: int, push: UnderWay | None, *done: int) -> None:
        nonlocal now
        for each in done:
            assert push is not None
            push.update(Progress("disk-0", each * GIB, 100 * GIB, each * GIB), trio.current_time())
        now = push
        await trio.sleep(60 * minutes)
        lines.append(len(caplog.messages))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, lambda: now)
        await trio.sleep(1)
        slow = UnderWay(1, "seed", 0, 100 * GIB)
        await told_after(10, None)
        await told_after(10, slow, 0, 9)
        await told_after(10, slow, 10)
        await told_after(1, slow, 20, 30, 40, 50)
        await told_after(1, None)
        fast = UnderWay(2, "cycle", 0, 100 * GIB)
        await told_after(1, fast, 0, 10)
        nursery.cancel_scope.cancel()
    assert lines == [0, 0, 1, 2, 2, 3]
    assert caplog.messages[1] == (
        "seed to point 1: 50 % of 100.0 GiB looked at, 50.0 GiB sent, about 20 min left"
    )
    assert caplog.messages[2].startswith("cycle to point 2: 10 % of")


@pytest.mark.parametrize("want", [Want.SEED, Want.RESYNC])
async def test_a_push_says_how_far_it_is(tmp_path: Path, want: Want) -> None:
    disks = {"disk-0": tmp_path / "a.raw", "disk-1": tmp_path / "b.raw"}
    for seed, disk in enumerate(disks.values()):
        disk.write_bytes(random.Random(seed).randbytes(3 << 20))
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as sx,
    ):
        if want is Want.RESYNC:
            await sx.push(Want.SEED)
            sx.write("disk-0", 0, b"changed")
        seen: list[dict[str, Any]] = []

        def note(_: Progress) -> None:
            assert pusher.under_way is not None
            seen.append(pusher.under_way.info())

        link = Link(sx.config, SourceCredentials(sx.config))
        pusher = Pusher(sx.config, sx.log, sx.source, link, report=note)
        outcome = await pusher.push(want)
        assert pusher.under_way is None
    assert {(each["point"], each["total"]) for each in seen} == {(outcome.point.number, 6 << 20)}
    assert {each["kind"] for each in seen} == {str(want.value) if want is Want.SEED else "resync"}
    # A resync goes through the disks twice.
    assert sum(each["done"] == 6 << 20 for each in seen) >= (1 if want is Want.SEED else 2)
    assert seen[-1]["done"] == 6 << 20
    assert 0 < seen[-1]["sent"] <= outcome.point.bytes_pushed
    if want is Want.SEED:
        assert (seen[0]["done"], seen[0]["sent"]) == (0, 0)
        assert seen[-1]["sent"] > 6 << 20
