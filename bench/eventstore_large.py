# SPDX-License-Identifier: AGPL-3.0-or-later
"""A million events in the event store and in the library's SQLite one: reads, opening again, and kill -9 at a random commit.

`python -m bench.eventstore_large FOLDER` is the process that is killed: it writes each last id that is durable, line by line.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench.eventstore import Times
from bench.report import Result
from bench.stores import BATCH, Events, OurStore, SqliteStore, Store
from eventstore.merkle import Frontier
from eventstore.recorders import LMDBApplicationRecorder
from eventstore.tree import TreeLog

EVENTS = 1_000_000
STREAM = 500
LAST = 10
PAGE = 500
ROUNDS = 20
#: A process is killed after some number of commits up to this.
COMMITS_MAX = 200
COLUMNS = ("sqlite", "again", "ours")
_VERIFIED_AT_ONCE = 10_000
_ROOT = Path(__file__).parent.parent
_MAKE: dict[str, Callable[[Path], Store]] = {
    "sqlite": SqliteStore,
    "again": SqliteStore,
    "ours": lambda folder: OurStore(folder, tree=True),
}


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """Opening and reads, then ``pairs`` kills of a process that goes on where the log ends."""
    events = max(EVENTS // shrink // (STREAM * BATCH), 1) * STREAM * BATCH
    what = f"{events} events, {STREAM} of each of {events // STREAM} VMs, in turn; ours with its Merkle tree; warm"
    result = Result("eventstore, large", what, columns=COLUMNS)
    await trio.to_thread.run_sync(_reads, result, folder, events, pairs)
    kills = [await trio.to_thread.run_sync(_kill, folder / "ours", turn) for turn in range(pairs)]
    result.figures["kill -9: durable id it had told, each"] = [float(told) for told, _, _ in kills]
    result.figures["kill -9: opened after, s"] = [opened for _, opened, _ in kills]
    result.figures["kill -9: events and tree verified in, s"] = [took for _, _, took in kills]
    return result


def _reads(result: Result, folder: Path, events: int, pairs: int) -> None:
    made = Events(events // STREAM)
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(make(folder / name))) for name, make in _MAKE.items()]
        for batch in made.batches(events):
            for store in stores:
                store.insert(batch)
    opened: dict[str, list[float]] = {name: [] for name in _MAKE}
    for _ in range(pairs):
        for name, make in _MAKE.items():
            started = time.perf_counter()
            store = make(folder / name)
            if store.max_id() != events:
                raise RuntimeError(f"{name} has lost events")
            opened[name].append((time.perf_counter() - started) * 1e6)
            store.close()
    result.figures["opened and last id read, fastest, µs"] = [min(each) for each in opened.values()]
    result.figures["bytes an event"] = [store.bytes_on_disk() / events for store in stores]
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(make(folder / name))) for name, make in _MAKE.items()]
        times = Times(result, stores)
        rounds, ids = ROUNDS * pairs, made.ids
        times.read_streams("latest event", 3.0, 5 * rounds, ids, lambda s, vm: s.last(vm, 1))
        times.read_streams(
            f"last {LAST} events", 2.0, 5 * rounds, ids, lambda s, vm: s.last(vm, LAST)
        )
        times.read_streams(
            f"stream of {STREAM} events", 2.0, rounds, ids, lambda s, vm: s.stream(vm)
        )
        times.read(f"page of {PAGE}", 1.6, 2 * rounds, lambda s: s.page(events // 2, PAGE))


def _kill(folder: Path, turn: int) -> tuple[int, float, float]:
    """The last id that a process had told to be durable when it was killed; seconds to open, and to verify all of it."""
    commits = random.Random(turn).randint(1, COMMITS_MAX)
    with subprocess.Popen(
        [sys.executable, "-m", "bench.eventstore_large", str(folder)],
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = 0
        try:
            for line in itertools.islice(process.stdout, commits):
                told = int(line)
        finally:
            process.kill()
        # What it had told in the pipe counts too; a last line may be cut.
        told = max([told, *(int(line) for line in process.stdout if line.endswith("\n"))])
    started = time.perf_counter()
    store = OurStore(folder, tree=True)
    with closing(store):
        last = store.max_id()
        opened_s = time.perf_counter() - started
        if not 0 < told <= last:
            raise RuntimeError(f"event {told} was durable, and the log ends at {last}")
        started = time.perf_counter()
        if store.lmdb_recorder.verify() != last:
            raise RuntimeError("the log does not have as many events as it says")
        _verify_tree(store.lmdb_recorder, last)
        return told, opened_s, time.perf_counter() - started


def _verify_tree(recorder: LMDBApplicationRecorder, last: int) -> None:
    tree = recorder.tree
    assert tree is not None
    frontier = Frontier()
    while frontier.size < last:
        frontier = recorder.environment.read(
            partial(_verify_part, recorder, tree, last=last, start=frontier)
        )


def _verify_part(
    recorder: LMDBApplicationRecorder, tree: TreeLog, txn: Any, *, last: int, start: Frontier
) -> Frontier:
    first, stop = start.size + 1, min(start.size + _VERIFIED_AT_ONCE, last)
    hashes = recorder.leaf_hashes(txn, first, stop - start.size)
    end = None if stop == last else stop
    return tree.verify(txn, enumerate(hashes, start=first), start, end).frontier


def _append(folder: Path) -> None:
    """Commits of one event, then of a batch, and so on, until killed."""
    store = OurStore(folder, tree=True)
    # Other VMs than are there already, each with one event.
    events = itertools.count(store.max_id())
    for size in itertools.cycle((1, BATCH)):
        made = Events(size, first=next(events) * BATCH)
        store.insert(made.take(size))
        print(store.max_id(), flush=True)


if __name__ == "__main__":
    _append(Path(sys.argv[1]))
