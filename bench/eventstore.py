# SPDX-License-Identifier: AGPL-3.0-or-later
"""The event store against the library's SQLite one, all stores open together and taking turns in every round.

A/A: SQLite is there twice, and what its two copies differ by is what a difference is worth.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
import threading  # noqa: TID251 - the library's recorder is called from threads, as it is used
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import trio
from eventsourcing.persistence import StoredEvent

from bench.images import MIB
from bench.proc import Memory, watch
from bench.report import Result
from bench.stores import (
    BATCH,
    RARE_EACH,
    Events,
    OurStore,
    RawStore,
    RecorderStore,
    SqliteStore,
    Store,
)
from eventstore.lane import open_lane

STREAMS = 100
#: Events in each store before anything is measured, and those whose memory and bytes are measured.
EVENTS = 100_000
CLIENTS = 64
CLIENTS_S = 1.0
PAGE = 500
#: Rounds of each measure for one of `--pairs`.
SINGLE, BATCHES, STREAM, LATEST, PAGES, FILTER = 200, 20, 10, 100, 40, 4
KEPT = ("sqlite", "plain", "tree", "raw")
#: How much dearer a write may be for the Merkle tree.
TREE_MAX = 1.15
COLUMNS = ("sqlite", "again", "ours", "tree", "raw")
_ROOT = Path(__file__).parent.parent


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """Every measure for all stores; then 64 clients; then memory and bytes, in a process for each store."""
    events = max(EVENTS // shrink // STREAMS, 10) * STREAMS
    what = (
        f"event stores that hold {events} cycles of {STREAMS} VMs and take turns: the library's SQLite recorder, a second one"
        " (A/A), this one, this one with its Merkle tree, and LMDB without a recorder. Times are of one call; p10 is what"
        " the rest of the machine disturbs least, and what ratios are made of"
    )
    result = Result("eventstore", what, columns=COLUMNS)
    await trio.to_thread.run_sync(_measure, result, folder, events, pairs)
    await _clients(result, folder, pairs)
    await _processes(result, folder, events)
    return result


class Times:
    """What the stores take, turn by turn; the first two are SQLite, the third is ours, the fourth ours with its tree."""

    def __init__(self, result: Result, stores: Sequence[Store]) -> None:
        self._result = result
        self._stores = stores
        self._random = random.Random(len(stores))

    def measure(
        self, name: str, rounds: int, prepare: Callable[[], Callable[[Store], Any]], parts: int = 1
    ) -> list[float]:
        """Call what ``prepare`` gives with each store, in turn, ``rounds`` times; each one's p10 in µs, of one part."""
        taken: list[list[float]] = [[] for _ in self._stores]
        warm_up = max(1, rounds // 20)
        order = list(range(len(self._stores)))
        for number in range(rounds + warm_up):
            call = prepare()
            # Not always behind the same one: what that leaves to the disk would be on another's time.
            self._random.shuffle(order)
            for at in order:
                started = time.perf_counter()
                call(self._stores[at])
                took = time.perf_counter() - started
                if number >= warm_up:
                    taken[at].append(took * 1e6 / parts)
        lows = [quantile(each, 0.1) for each in taken]
        self._result.figures[f"{name}, p10, µs"] = lows
        self._result.figures[f"{name}, p50, µs"] = [quantile(each, 0.5) for each in taken]
        return lows

    def compare(self, name: str, least: float, lows: Sequence[float]) -> None:
        """How many times as fast as SQLite ours is: at least so many. The one with its tree is not held to it."""
        self._result.floors[f"{name}: sqlite / ours"] = (lows[0] / lows[2], least)
        if len(lows) > 3:
            self._result.ratios[f"{name}: sqlite / tree"] = (lows[0] / lows[3], None)
        self._result.ratios[f"{name}: A/A, sqlite / again"] = (lows[0] / lows[1], None)

    def read(self, name: str, least: float, rounds: int, call: Callable[[Store], int]) -> None:
        """Measure and compare something that gives the same number with every store and in every round."""
        expected = call(self._stores[0])

        def once(store: Store) -> None:
            if call(store) != expected:
                raise RuntimeError(f"{name}: {type(store).__name__} gave other than {expected}")

        self.compare(name, least, self.measure(name, rounds, lambda: once))

    def read_streams(
        self,
        name: str,
        least: float,
        rounds: int,
        ids: Sequence[UUID],
        call: Callable[[Store, UUID], int],
    ) -> None:
        """The same of streams of one length, another one in each round."""
        expected = call(self._stores[0], ids[0])
        turn = itertools.cycle(ids)

        def prepare() -> Callable[[Store], None]:
            stream = next(turn)

            def once(store: Store) -> None:
                if call(store, stream) != expected:
                    raise RuntimeError(f"{name}: {type(store).__name__} gave other than {expected}")

            return once

        self.compare(name, least, self.measure(name, rounds, prepare))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def _measure(result: Result, folder: Path, count: int, pairs: int) -> None:
    with ExitStack() as stack:
        stores: list[Store] = [
            SqliteStore(folder / "sqlite"),
            SqliteStore(folder / "again"),
            OurStore(folder / "ours", tree=False),
            OurStore(folder / "tree", tree=True),
            RawStore(folder / "raw"),
        ]
        for store in stores:
            stack.enter_context(closing(store))
        events = Events(STREAMS)
        for batch in events.batches(count):
            for store in stores:
                store.insert(batch)
        _reads(result, stores, events, count, pairs)
        _writes(result, stores, events, pairs)


def _reads(result: Result, stores: Sequence[Store], events: Events, count: int, pairs: int) -> None:
    times = Times(result, stores)
    ids = events.ids
    times.read_streams(
        f"stream of {count // STREAMS} events", 2.0, STREAM * pairs, ids, lambda s, vm: s.stream(vm)
    )
    times.read_streams("latest event", 3.0, LATEST * pairs, ids, lambda s, vm: s.last(vm, 1))
    times.read("max id", 3.0, LATEST * pairs, lambda s: s.max_id())
    middle = max(1, count // 2 - PAGE)
    times.read(f"page of {PAGE}", 1.6, PAGES * pairs, lambda s: s.page(middle, PAGE))

    def filtered(store: Store) -> int:
        assert isinstance(store, RecorderStore)
        return store.filtered(events.rare, count)

    # Bytes alone have no topics.
    Times(result, stores[:4]).read(f"1 topic in {RARE_EACH}", 3.0, FILTER * pairs, filtered)


def _writes(result: Result, stores: Sequence[Store], events: Events, pairs: int) -> None:
    times = Times(result, stores)

    def insert(number: int) -> Callable[[Store], None]:
        batch = events.take(number)
        return lambda store: store.insert(batch)

    name = "one durable insert"
    lows = times.measure(name, SINGLE * pairs, lambda: insert(1))
    times.compare(name, 0.75, lows)
    result.floors[f"{name}: raw / ours"] = (lows[4] / lows[2], 0.9)
    result.ratios[f"{name}: tree / ours"] = (lows[3] / lows[2], TREE_MAX)
    name = f"batch of {BATCH}, an event"
    lows = times.measure(name, BATCHES * pairs, lambda: insert(BATCH), BATCH)
    times.compare(name, 1.0, lows)
    result.ratios[f"{name}: raw / ours"] = (lows[4] / lows[2], None)
    result.ratios[f"{name}: tree / ours"] = (lows[3] / lows[2], TREE_MAX)


# Many clients at a time


async def _clients(result: Result, folder: Path, pairs: int) -> None:
    rates: dict[str, list[float]] = {"sqlite": [], "ours": [], "tree": []}
    events = Events(STREAMS)
    state = events.take(1)[0]
    with (
        closing(SqliteStore(folder / "clients-sqlite")) as sqlite,
        closing(OurStore(folder / "clients-ours", tree=False)) as ours,
        closing(OurStore(folder / "clients-tree", tree=True)) as tree,
    ):
        for _ in range(pairs):
            rates["sqlite"].append(await trio.to_thread.run_sync(_threads, sqlite, state))
            rates["ours"].append(await _tasks(ours, state))
            rates["tree"].append(await _tasks(tree, state))
    for name, found in rates.items():
        result.figures[f"{CLIENTS} clients: {name}, p10 and p50, 1/s"] = [
            quantile(found, 0.1),
            quantile(found, 0.5),
        ]
    middle = {name: quantile(found, 0.5) for name, found in rates.items()}
    result.floors[f"{CLIENTS} clients: ours / sqlite"] = (middle["ours"] / middle["sqlite"], 8.0)
    result.ratios[f"{CLIENTS} clients: tree / sqlite"] = (middle["tree"] / middle["sqlite"], None)


def _fresh(event: StoredEvent) -> StoredEvent:
    return StoredEvent(uuid4(), 1, event.topic, event.state)


def _threads(store: SqliteStore, event: StoredEvent) -> float:
    """Inserts a second by so many threads."""
    done: list[int] = []
    started = time.perf_counter()

    def client() -> None:
        count = 0
        while time.perf_counter() < started + CLIENTS_S:
            store.insert([_fresh(event)])
            count += 1
        done.append(count)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) != CLIENTS:
        raise RuntimeError("a client of SQLite has failed")
    return sum(done) / (time.perf_counter() - started)


async def _tasks(store: OurStore, event: StoredEvent) -> float:
    """Inserts a second by so many tasks through one lane."""
    count = 0
    async with open_lane(store.environment) as lane:
        started = time.perf_counter()

        async def client() -> None:
            nonlocal count
            while time.perf_counter() < started + CLIENTS_S:
                await lane.commit(store.lmdb_recorder.prepare([_fresh(event)]))
                count += 1

        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(client)
        return count / (time.perf_counter() - started)


# Memory and bytes


async def _processes(result: Result, folder: Path, events: int) -> None:
    found: dict[tuple[str, str], tuple[dict[str, int], Memory]] = {}
    for kind in ("none", *KEPT):
        found[kind, "no"] = await _filled(kind, folder, events, "no")
    found["sqlite", "yes"] = await _filled("sqlite", folder, events, "yes")
    memory = [found[kind, "no"][1] for kind in ("none", *KEPT)]
    result.figures["MiB anonymous: no store, then as above"] = [m.anonymous / MIB for m in memory]
    result.figures["MiB resident: no store, then as above"] = [m.peak / MIB for m in memory]
    size = {key: answer["bytes"] / events for key, (answer, _) in found.items()}
    kept = [size["sqlite", "yes"], *(size[kind, "no"] for kind in KEPT)]
    result.figures["bytes an event: sqlite JSON, then as above"] = kept
    result.ratios["bytes an event: ours / sqlite with JSON"] = (kept[2] / kept[0], 0.5)
    result.ratios["bytes an event: tree / sqlite with JSON"] = (kept[3] / kept[0], 0.5)
    result.ratios["bytes an event: ours / sqlite, same states"] = (kept[2] / kept[1], None)


async def _filled(
    kind: str, folder: Path, events: int, as_json: str
) -> tuple[dict[str, int], Memory]:
    memory = Memory()
    target = folder / f"filled-{kind}-{as_json}"
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "bench.stores", kind, str(target), str(events), as_json],
            stdout=subprocess.PIPE,
            cwd=_ROOT,
        )
        nursery.start_soon(watch, process.pid, memory)
        assert process.stdout is not None
        output = b"".join([piece async for piece in process.stdout])
        if await process.wait():
            raise RuntimeError(f"filling {kind} has failed")
        nursery.cancel_scope.cancel()
    answer: dict[str, int] = json.loads(output)
    memory.peak = answer["peak"]
    return answer, memory
