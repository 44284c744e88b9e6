# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cycles against every peer that can take over changes only, and on disks of very different sizes. All daemons run."""

from __future__ import annotations

import random
import statistics
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import trio

from bench.contender import Contender, Lab, Pair
from bench.images import BLOCK, GIB, MIB, Content, mixed, scattered, spread
from bench.meter import Meter, Spent
from bench.ours import COMMITTED, Ours
from bench.peers_qemu import Backup
from bench.peers_repositories import Borg, Restic
from bench.peers_streams import Btrfs, Rsync
from bench.programs import ProgramError
from bench.report import Result, paired_ratio

#: The parts of the disk that change, and how many rounds there are of each for one pair that was asked for.
PARTS: Final = ((0.01, 3), (0.05, 1))
SIZES: Final = (2 * GIB, 64 * GIB, 1024 * GIB)
#: What the disks of all sizes hold, and what changes of it, bytes.
DATA: Final = 256 * MIB
CHANGED: Final = 328
FLAT_MAX: Final = 1.3
#: Five times the change may cost no more than that.
LINEAR_MAX: Final = 5.0
RSYNC_MAX: Final = 1 / 20
_SETTLE_S: Final = 0.2
_DONE: Final = "done"
_COLUMNS: Final = ("wall, s", "CPU, s", "machine, s", "wall/ours", "CPU/ours")


@dataclass(slots=True)
class _Running:
    """A contender that has seeded. ``limit``: of our time by its own, None: no verdict. ``rounds``: None: all."""

    name: str
    pair: Pair
    limit: float | None = None
    rounds: int | None = None
    times: list[dict[str, Spent]] = field(default_factory=list)


async def cycles(lab: Lab, size: int, pairs: int) -> list[Result]:
    """Cycles of 1 % and 5 % of a mixed image."""
    field_: list[tuple[Contender, float | None, int | None]] = [
        (Ours("AEAD", "auto"), None, None),
        (Ours("HMAC", "auto"), None, None),
        (Ours("mTLS", "auto"), None, None),
        (Ours("AEAD", "auto", samples=False), None, None),
        (Backup(), 1.0, None),
        (Btrfs(), 1.0, None),
        (Rsync(), RSYNC_MAX, None),
        (Borg(), 1.0, 2),
        (Restic(), 1.0, 2),
    ]
    image = await trio.to_thread.run_sync(mixed, lab.folder / "image.raw", size)
    missing, results = dict[str, str](), list[Result]()
    async with AsyncExitStack() as stack:
        running = list[_Running]()
        for contender, limit, rounds in field_:
            try:
                pair = await stack.enter_async_context(contender.pair(lab, image, cycles=True))
                await _first(pair)
            except (ProgramError, OSError) as error:
                if isinstance(contender, Ours):
                    raise
                missing[contender.name] = str(error)
                print(f"bench: {contender.name} cannot run here: {error}", file=sys.stderr)
            else:
                running.append(_Running(contender.name, pair, limit, rounds))
        for part, times in PARTS:
            count = max(1, int(size * part) // BLOCK)
            await _rounds(running, size, count, pairs * times)
            what = f"{part:.0%} of {size // MIB} MiB"
            results.append(_result(what, count, running, missing, is_first=not results))
    image.path.unlink()
    first, more = results
    ours = running[0].name
    _add_linear(more, first, ours)
    return results


async def _first(pair: Pair) -> None:
    await pair.arm()
    await pair.seed(Meter())
    await pair.check()


async def _rounds(running: list[_Running], size: int, count: int, rounds: int) -> None:
    """The first round is not counted: caches and maps are warm after it. Content is compared after the last one."""
    for each in running:
        each.times.clear()
    content = Content(count)
    for number in range(rounds + 1):
        offsets = scattered(size, count, number * 1000 + count)
        pieces = [content.noise(BLOCK) for _ in offsets]
        turns = [each for each in running if each.rounds is None or number < each.rounds]
        random.Random(f"{count} {number}").shuffle(turns)
        for each in turns:
            await each.pair.write(offsets, pieces)
            await each.pair.warm()
            await each.pair.arm()
            await trio.sleep(_SETTLE_S)
            meter = Meter()
            meter.start()
            await each.pair.cycle(meter)
            meter.mark(_DONE)
            if number:
                each.times.append(meter.marks)
            await each.pair.settle()
            last = number == rounds or (each.rounds is not None and number == each.rounds - 1)
            if last:
                await each.pair.check()


def _result(
    what: str, count: int, running: list[_Running], missing: dict[str, str], *, is_first: bool
) -> Result:
    """Limits hold for the first part only."""
    ours = running[0]
    result = Result(
        f"transport, cycle of {what}",
        f"{count} blocks of 64 KiB were overwritten with noise, scattered; daemons run; medians",
        columns=_COLUMNS,
    )
    result.notes += [f"{name}: not measured: {why}" for name, why in missing.items()]
    for each in running:
        if not each.times:
            continue
        own = [spent[COMMITTED] for spent in ours.times[: len(each.times)]]
        for mark in each.times[0]:
            label = each.name
            if COMMITTED in each.times[0]:
                label += f": {'point' if mark == COMMITTED else 'replica'}"
            result.figures[label] = _row([spent[mark] for spent in each.times], own)
        theirs = [spent[_DONE] for spent in each.times]
        if each.limit is None:
            continue
        limit = each.limit if is_first else None
        for kind in ("wall", "CPU"):
            ratio = paired_ratio(_seconds(own, kind), _seconds(theirs, kind))
            result.ratios[f"{kind}: ours / {each.name}"] = (
                ratio,
                limit if kind == "wall" else None,
            )
    return result


def _seconds(times: list[Spent], what: str) -> list[float]:
    return [each.wall_s if what == "wall" else each.cpu_s for each in times]


def _row(times: list[Spent], own: list[Spent]) -> list[float]:
    return [
        statistics.median(each.wall_s for each in times),
        statistics.median(each.cpu_s for each in times),
        statistics.median(each.machine_s for each in times),
        paired_ratio([each.wall_s for each in times], [each.wall_s for each in own]),
        paired_ratio([each.cpu_s for each in times], [each.cpu_s for each in own]),
    ]


def _add_linear(more: Result, first: Result, ours: str) -> None:
    """Ours with five times the change, by ours with one."""
    for number, what in enumerate(("wall", "CPU")):
        figures = [each.figures[f"{ours}: point"] for each in (more, first)]
        values = [each[number] for each in figures if isinstance(each, list)]
        name = f"{what}: ours, 5 times the change / once"
        more.ratios[name] = (values[0] / values[1], LINEAR_MAX)


async def scale(lab: Lab, shrink: int, pairs: int) -> Result:
    """The same change on disks of 2 GiB, 64 GiB and 1 TiB that hold the same amount of data."""
    count, data = max(1, CHANGED // shrink), max(4 * MIB, DATA // shrink)
    result = Result(
        "transport, cycle on disks of all sizes",
        f"{count} blocks of 64 KiB changed on sparse disks with {data // MIB} MiB of data; medians",
        columns=_COLUMNS,
    )
    contender, running = Ours("AEAD", "auto"), list[tuple[int, _Running]]()
    async with AsyncExitStack() as stack:
        for size in SIZES:
            image = await trio.to_thread.run_sync(spread, lab.folder / f"{size}.raw", size, data)
            stack.callback(image.path.unlink)
            pair = await stack.enter_async_context(
                contender.pair(lab, image, cycles=True, copy=False)
            )
            await pair.seed(Meter())
            running.append((size, _Running(f"ours, {size // GIB} GiB", pair)))
        for number in range(pairs * 3 + 1):
            random.Random(number).shuffle(running)
            for size, each in running:
                content = Content(number)
                offsets = scattered(size, count, number)
                await each.pair.write(offsets, [content.noise(BLOCK) for _ in offsets])
                await trio.sleep(_SETTLE_S)
                meter = Meter()
                meter.start()
                await each.pair.cycle(meter)
                meter.mark(_DONE)
                if number:
                    each.times.append(meter.marks)
    running.sort(key=lambda each: each[0])
    own = [spent[COMMITTED] for spent in running[0][1].times]
    for _, each in running:
        for mark in each.times[0]:
            label = f"{each.name}: {'point' if mark == COMMITTED else 'replica'}"
            result.figures[label] = _row([spent[mark] for spent in each.times], own)
    for _, each in running[1:]:
        points = [spent[COMMITTED] for spent in each.times]
        wall = paired_ratio([p.wall_s for p in points], [o.wall_s for o in own])
        cpu = paired_ratio([p.cpu_s for p in points], [o.cpu_s for o in own])
        result.ratios[f"wall: {each.name} / {running[0][1].name}"] = (wall, FLAT_MAX)
        result.ratios[f"CPU: {each.name} / {running[0][1].name}"] = (cpu, FLAT_MAX)
    return result


__all__ = ["cycles", "scale"]
