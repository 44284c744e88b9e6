# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pushes over a wide-area line (`tests/wan`): how much of it they use, and what a cut costs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from bench.images import MIB
from bench.report import Result
from tests.wan.lab import ROOT, Line, Wan, wan
from tests.wan.sites import WanSite, wan_site

#: A line that loses a packet in a thousand, between systems whose congestion control takes loss for load.
LINE: Final = Line(mbit=100, delay_ms=20, loss=0.001, congestion="cubic")
#: The same without loss: what is lost to the protocol alone.
CLEAN: Final = replace(LINE, loss=0.0)
USE_LEAST: Final = 0.92
CUTS: Final = 20
OUTAGE_S: Final = (0.3, 12.0)
RETURN_MAX_S: Final = 5.0
RESENT_MAX_MIB: Final = 8.0
_PORT: Final = 5201
_LIMIT_S: Final = 1800
_POLL_S: Final = 0.02


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """``pairs`` is not used: each figure is of one long transfer."""
    del pairs
    size = 256 * MIB // shrink
    whole, part = folder / "whole.raw", folder / "part.raw"
    await trio.to_thread.run_sync(_write, whole, size)
    await trio.to_thread.run_sync(_write, part, size // 4)
    result = Result(
        "wan",
        f"replctl seed of {size // MIB} MiB of noise over 100 Mbit/s with 40 ms there and back, 0.1 % of packets lost and cubic as"
        " the systems' congestion control, and without the loss; beside it one plain TCP connection over the same line. With"
        f" dr_congestion = system, and plain TCP with cubic and loss: {size // 4 // MIB} MiB. Then {CUTS} cuts in one push, at"
        f" random places, {OUTAGE_S[0]:g} to {OUTAGE_S[1]:g} s long, every second one with TCP resets",
    )
    figures = result.figures
    for name, line in (("loss", LINE), ("no loss", CLEAN)):
        plain = await _plain(replace(line, congestion="bbr"), size)
        push = await _push(folder, line, whole, size)
        figures[f"plain TCP (bbr, {name}), Mbit/s"] = plain
        figures[f"push ({name}), Mbit/s"] = push
        result.floors[f"push / line ({name})"] = (push / line.mbit, USE_LEAST)
        result.floors[f"push / plain TCP (bbr, {name})"] = (push / plain, USE_LEAST)
    figures["plain TCP (cubic, loss), Mbit/s"] = await _plain(LINE, size // 4)
    push = await _push(folder, LINE, part, size // 4, dr_congestion="system")
    figures["push (system, loss), Mbit/s"] = push
    figures["plain TCP (cubic, no loss), Mbit/s"] = await _plain(CLEAN, size)
    await _cuts(folder, whole, size, result)
    return result


def _write(path: Path, size: int) -> None:
    noise = random.Random(3)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(noise.randbytes(MIB))
        os.fsync(file.fileno())


async def _plain(line: Line, size: int) -> float:
    """Mbit/s of one TCP connection's bytes."""
    module = [sys.executable, "-m", "tests.wan.plain"]
    async with wan(line) as lab:
        taker = await trio.lowlevel.open_process(
            lab.at_receiver(*module, "take", str(_PORT)), stdout=subprocess.PIPE, cwd=ROOT
        )
        assert taker.stdout is not None
        try:
            with trio.fail_after(_LIMIT_S):
                said = await taker.stdout.receive_some(100)
                address = [lab.receiver_address, str(_PORT)]
                await trio.run_process(
                    lab.at_source(*module, "give", *address, str(size)), cwd=ROOT
                )
                said = b"".join([piece async for piece in taker.stdout])
                await taker.wait()
        finally:
            taker.kill()
            with trio.CancelScope(shield=True):
                await taker.wait()
    return size * 8 / 1e6 / float(said)


@asynccontextmanager
async def _site(
    folder: Path, line: Line, disk: Path, **options: str
) -> AsyncIterator[tuple[Wan, WanSite]]:
    own = folder / f"site-{time.monotonic_ns()}"
    own.mkdir()
    async with wan(line) as lab, wan_site(lab, own, {"disk-0": disk}, **options) as site:
        yield lab, site


async def _push(folder: Path, line: Line, disk: Path, size: int, **options: str) -> float:
    """Mbit/s of what was pushed, over the time that the recovery point says that it took."""
    async with _site(folder, line, disk, **options) as (_, site):
        with trio.fail_after(_LIMIT_S):
            pushed = await site.push("seed")
    _check(pushed["bytes_pushed"], size)
    return float(pushed["bytes_pushed"]) * 8 / 1e6 / float(pushed["duration_s"])


def _check(pushed: int, size: int) -> None:
    if pushed < size:
        raise RuntimeError(f"{pushed} bytes were pushed of {size} that cannot be compressed")


async def _cuts(folder: Path, disk: Path, size: int, result: Result) -> None:
    """One push with many cuts. What was sent twice is the push's own count, over its reconnects."""
    dice = random.Random(4)
    async with _site(folder, LINE, disk) as (lab, site):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cut_often, lab, dice, size)
            with trio.fail_after(_LIMIT_S):
                pushed = await site.push("seed")
            nursery.cancel_scope.cancel()
        state = await lab.state()
    _check(pushed["bytes_pushed"], size)
    result.figures["cuts in one push"] = state.cuts
    result.figures["reconnects"] = pushed["reconnects"]
    result.figures["from the line's return to data, s"] = [
        round(s, 2) for s in sorted(state.pauses)
    ]
    result.figures["sent twice in all, MiB"] = pushed["resent_bytes"] / MIB
    result.ratios["the longest from return to data, s"] = (max(state.pauses), RETURN_MAX_S)
    resent = pushed["resent_bytes"] / max(1, pushed["reconnects"]) / MIB
    result.ratios["sent twice for a reconnect, MiB"] = (resent, RESENT_MAX_MIB)
    result.floors["cuts that data came after"] = (len(state.pauses), CUTS)


async def _cut_often(lab: Wan, dice: random.Random, size: int) -> None:
    """All cuts fall into the push: each comes after its share of the data, in the first nine tenths."""
    share = size * 9 // 10 // CUTS
    for number in range(CUTS):
        await lab.cut(reset=bool(number % 2), after=dice.randrange(share // 4, share))
        while not (await lab.state()).cut:  # noqa: ASYNC110  it happens in another process
            await trio.sleep(_POLL_S)
        await trio.sleep(dice.uniform(*OUTAGE_S))
        await lab.heal()
        while len((await lab.state()).pauses) <= number:  # noqa: ASYNC110  the same
            await trio.sleep(_POLL_S)
