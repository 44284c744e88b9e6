# SPDX-License-Identifier: AGPL-3.0-or-later
"""Memory of both sides: the peaks in seeds of disks of two sizes that hold the same amount of data, and between cycles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio

from bench.images import GIB, MIB, spread
from bench.meter import descendants_cpu_s
from bench.proc import Memory, read_status
from bench.report import Result
from bench.site import site

SIZES = (1 * GIB, 64 * GIB)
DATA = 512 * MIB
#: How much more the large disk may cost, bytes of anonymous memory.
GROWTH_MAX = 24 * MIB
#: What each side may have resident in a seed, and when it waits, bytes.
PEAK_MAX = 96 * MIB
IDLE_MAX = 48 * MIB
#: A side that has used no processor time for so long, or hardly any, waits; seconds.
_STILL_S = 1
_STILL_CPU_S = 0.02


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one seed, with its application to the replica."""

    source: Memory
    receiver: Memory


async def measure(folder: Path, size: int, data: int) -> Peaks:
    """Seed a sparse image of ``size`` bytes with ``data`` bytes spread over it."""
    image = await trio.to_thread.run_sync(spread, folder / f"{size}.raw", size, data)
    options = {"source": "image", "image_disks": f"disk-0={image.path}"}
    async with site(folder / f"site-{size}", options) as pair:
        pushed = await pair.push("seed", sample=True)
        await pair.applied(pushed.point)
        pair.receiver_memory.peak = pair.receiver_peak()
    image.path.unlink()
    return Peaks(pushed.memory, pair.receiver_memory)


async def idle(folder: Path, data: int) -> tuple[int, int]:
    """Resident bytes of `replctl run` and of its receiver, when both have done a seed and wait for the next cycle."""
    image = await trio.to_thread.run_sync(spread, folder / "idle.raw", SIZES[0], data)
    options = {"source": "image", "image_disks": f"disk-0={image.path}", "push_interval": "86400"}
    async with site(folder / "site-idle", options) as pair, pair.protecting() as source:
        await pair.applied(1)
        before, now = -1.0, descendants_cpu_s()
        while now - before > _STILL_CPU_S:
            await trio.sleep(_STILL_S)
            before, now = now, descendants_cpu_s()
        found = tuple(read_status(pid)["VmRSS"] for pid in (source.pid, pair.receiver.pid))
    image.path.unlink()
    return found[0], found[1]


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """One seed of each size: memory does not vary from run to run as time does."""
    del pairs
    small, large = [await measure(folder, size, DATA // shrink) for size in SIZES]
    what = (
        f"peak memory, MiB, of seeds of sparse disks of {SIZES[0] // GIB} and {SIZES[1] // GIB} GiB"
    )
    result = Result("memory", f"{what}, both with {DATA // shrink // MIB} MiB of data")
    for side in ("source", "receiver"):
        both: tuple[Memory, Memory] = (getattr(small, side), getattr(large, side))
        result.figures[f"{side}, resident with files, MiB"] = [each.peak / MIB for each in both]
        result.figures[f"{side}, anonymous, MiB"] = [each.anonymous / MIB for each in both]
        growth = (both[1].anonymous - both[0].anonymous) / GROWTH_MAX
        peak = max(each.peak for each in both)
        result.ratios[f"{side}: peak / {PEAK_MAX // MIB} MiB"] = (peak / PEAK_MAX, 1.0)
        result.ratios[f"{side}: growth / {GROWTH_MAX // MIB} MiB"] = (growth, 1.0)
    for side, resident in zip(
        ("source", "receiver"), await idle(folder, DATA // shrink), strict=True
    ):
        result.figures[f"{side}, resident between cycles, MiB"] = resident / MIB
        ratio = resident / IDLE_MAX
        result.ratios[f"{side}: between cycles / {IDLE_MAX // MIB} MiB"] = (ratio, 1.0)
    return result


__all__ = ["GROWTH_MAX", "Peaks", "idle", "measure", "run"]
