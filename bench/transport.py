# SPDX-License-Identifier: AGPL-3.0-or-later
"""Seeds and cycles against every peer, and against what this machine allows: wall time and processor time of all processes.

In each round all contenders take the same image over, in random order. Each begins with the image in the page cache and
ends with the data durable at the target; the content is compared once.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from bench import model
from bench.contender import Contender, Lab, make_lab
from bench.images import GIB, MIB, Image, mixed, noise, text, zeros
from bench.meter import Meter, Spent
from bench.ours import COMMITTED, Ours
from bench.peers_qemu import Backup, Convert
from bench.peers_repositories import Borg, Restic
from bench.peers_streams import Btrfs, Rsync, Zstd
from bench.programs import ProgramError, warm
from bench.programs import run as command
from bench.report import Result, paired_ratio
from bench.transport_cycles import cycles, scale

PAIRS: Final = 3
SIZE: Final = 2 * GIB
IMAGES: Final[dict[str, Callable[[Path, int], Image]]] = {
    "mixed": mixed,
    "random": noise,
    "text": text,
    "zeros": zeros,
}
PARTS: Final = (*IMAGES, "cycles", "sizes")
#: Ours as it is unless something else is configured: it is held against the peers.
DEFAULT: Final = Ours("AEAD", "auto")
#: The part of the model's limit that ours is to reach.
PART_MIN: Final = 0.75
_SETUP: Final = Path(__file__).parent.parent / "scripts" / "setup"
#: Deleted files are given back before the next contender begins, seconds.
_SETTLE_S: Final = 0.5
_DONE: Final = "done"
_COLUMNS: Final = ("wall, s", "CPU, s", "machine, s", "wall/ours", "CPU/ours")


@dataclass(slots=True)
class Entry:
    """A contender and what it took in each round, by mark. ``rounds``: in how many it takes part."""

    contender: Contender
    rounds: int
    times: list[dict[str, Spent]] = field(default_factory=list)
    checked: bool = False
    missing: str = ""


async def run(folder: Path, shrink: int, pairs: int, part: str = "") -> list[Result]:
    """Seeds of each image, cycles, and cycles on disks of several sizes; or one ``part`` of that."""
    try:
        await command([_SETUP, "--bench"])
    except ProgramError as error:  # peers that are missing are named in the results
        print(f"bench: {error}", file=sys.stderr)
    lab, results = make_lab(folder), list[Result]()
    for each in [part] if part else PARTS:
        if each == "cycles":
            results += await cycles(lab, SIZE // shrink, pairs)
        elif each == "sizes":
            results.append(await scale(lab, shrink, pairs))
        else:
            results.append(await _seeds(lab, each, IMAGES[each], SIZE // shrink, pairs))
    return results


def _entries(pairs: int) -> list[Entry]:
    """The slow ones, and variants that say little that is new, take part in the first round only."""
    always: list[Contender] = [
        DEFAULT,
        Ours("AEAD", "off"),
        Ours("AEAD", "1"),
        Ours("HMAC", "off"),
        Ours("mTLS", "off"),
        Convert(tls=False),
        Btrfs(),
        Rsync(),
        Zstd(),
    ]
    once: list[Contender] = [
        Ours("HMAC", "1"),
        Ours("HMAC", "auto"),
        Ours("mTLS", "1"),
        Ours("mTLS", "auto"),
        Ours("AEAD", "auto", command=True),
        Convert(tls=True),
        Backup(),
        Borg(),
        Restic(),
    ]
    return [Entry(each, pairs) for each in always] + [Entry(each, 1) for each in once]


async def _seeds(
    lab: Lab, kind: str, make: Callable[[Path, int], Image], size: int, pairs: int
) -> Result:
    image = await trio.to_thread.run_sync(make, lab.folder / "image.raw", size)
    entries, limits = _entries(pairs), dict[int | None, list[model.Model]]()
    async with AsyncExitStack() as stack:
        for entry in entries:
            try:
                await stack.enter_async_context(entry.contender.prepared(lab, image))
            except (ProgramError, OSError) as error:
                _set_aside(entry, error)
        for number in range(pairs):
            turns: list[Entry | int | None] = [each for each in entries if number < each.rounds]
            turns += [None, 1]
            random.Random(f"{kind} {number}").shuffle(turns)
            for turn in turns:
                await trio.to_thread.run_sync(warm, image.path)
                if isinstance(turn, Entry):
                    await _seed(lab, image, turn)
                else:
                    await trio.sleep(_SETTLE_S)
                    target = lab.folder / "model.raw"
                    taken = await trio.to_thread.run_sync(model.measure, image, target, turn)
                    limits.setdefault(turn, []).append(taken)
    image.path.unlink()
    return _seed_result(kind, image, entries, limits)


async def _seed(lab: Lab, image: Image, entry: Entry) -> None:
    if entry.missing:
        return
    print(f"bench: {entry.contender.name}", file=sys.stderr)
    try:
        async with entry.contender.pair(lab, image) as pair:
            await pair.arm()
            await trio.sleep(_SETTLE_S)
            meter = Meter()
            meter.start()
            await pair.seed(meter)
            meter.mark(_DONE)
            if not entry.checked:
                await pair.check()
                entry.checked = True
    except (ProgramError, OSError) as error:
        # That a peer cannot run here is a finding; that one has failed half-way, or ours has, is not.
        if entry.times or isinstance(entry.contender, Ours):
            raise
        _set_aside(entry, error)
        return
    entry.times.append(meter.marks)


def _set_aside(entry: Entry, error: Exception) -> None:
    entry.missing = str(error)
    print(f"bench: {entry.contender.name} cannot run here: {error}", file=sys.stderr)


def _seed_result(
    kind: str, image: Image, entries: list[Entry], limits: dict[int | None, list[model.Model]]
) -> Result:
    what = f"seeds of {image.size // MIB} MiB, medians; machine: CPU of all that ran meanwhile, kernel and others included"
    result = Result(f"transport, seed of {kind}", what, columns=_COLUMNS)
    (ours,) = [each for each in entries if each.contender is DEFAULT]
    for entry in entries:
        if entry.missing:
            result.notes.append(f"{entry.contender.name}: not measured: {entry.missing}")
            continue
        if not isinstance(entry.contender, Ours):
            result.notes.append(f"{entry.contender.name}: {entry.contender.detail}")
        for mark in entry.times[0]:
            label = entry.contender.name
            if isinstance(entry.contender, Ours):
                label += f": {'point' if mark == COMMITTED else 'replica'}"
            result.figures[label] = _row([each[mark] for each in entry.times], ours)
        if not isinstance(entry.contender, Ours):
            _add_verdicts(result, entry, ours)
    for level, name in ((None, "zstd off"), (1, "zstd 1")):
        _add_limit(result, name, limits[level], _by_name(entries, f"ours, AEAD, {name}"))
    return result


def _by_name(entries: list[Entry], name: str) -> Entry:
    (found,) = [each for each in entries if each.contender.name == name]
    return found


def _row(times: list[Spent], ours: Entry) -> list[float]:
    own = [each[COMMITTED] for each in ours.times[: len(times)]]
    return [
        statistics.median(each.wall_s for each in times),
        statistics.median(each.cpu_s for each in times),
        statistics.median(each.machine_s for each in times),
        paired_ratio([each.wall_s for each in times], [each.wall_s for each in own]),
        paired_ratio([each.cpu_s for each in times], [each.cpu_s for each in own]),
    ]


def _add_verdicts(result: Result, entry: Entry, ours: Entry) -> None:
    """Ours until the point is durable, by the peer, in the rounds that the peer took part in."""
    theirs = [each[_DONE] for each in entry.times]
    point = [each[COMMITTED] for each in ours.times[: len(theirs)]]
    name = entry.contender.name
    wall = paired_ratio([each.wall_s for each in point], [each.wall_s for each in theirs])
    cpu = paired_ratio([each.cpu_s for each in point], [each.cpu_s for each in theirs])
    result.ratios[f"wall: ours / {name}"] = (wall, 1.0)
    result.ratios[f"CPU: ours / {name}"] = (cpu, 1.0)


def _add_limit(result: Result, name: str, limits: list[model.Model], ours: Entry) -> None:
    costs = limits[0].cpu_s
    medians = {
        step: statistics.median(each.cpu_s.get(step, 0) for each in limits) for step in costs
    }
    steps = ", ".join(f"{step} {cost:.2f}" for step, cost in medians.items())
    disk = statistics.median(each.direct_wall_s for each in limits)
    result.notes.append(f"model, {name}: CPU s: {steps}; the disk alone takes {disk:.2f} s")
    limit = [each.limit_s for each in limits]
    result.figures[f"model, {name}: limit"] = [
        statistics.median(limit),
        statistics.median(each.sum_s for each in limits),
    ]
    walls = [each[COMMITTED].wall_s for each in ours.times]
    part = paired_ratio(limit, walls)
    result.floors[f"model, {name}: limit / ours, AEAD"] = (part, PART_MIN)
    # Other work on the machine makes ours last longer, but takes the processor time of neither.
    cpu = [each[COMMITTED].cpu_s / (os.cpu_count() or 1) for each in ours.times]
    result.ratios[f"model, {name}: CPU: limit / ours, AEAD"] = (paired_ratio(limit, cpu), None)


__all__ = ["run"]
