# SPDX-License-Identifier: AGPL-3.0-or-later
"""A month of a source with many VMs, on a clock that nobody waits for: what its event log grows to, and what a restart costs.

Only the clock is not the real one: the log, its lane, its projections and its sealing are those of a running source. It
knows nothing of disks and pushes: a cycle is its one event.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

import trio

from bench.images import MIB
from bench.proc import Memory, read_status, watch
from bench.report import Result
from bench.stores import START_US, point
from replicator.domain.model import stream_id
from replicator.domain.vm import EPOCH, ProtectedVm
from replicator.log import event_log, open_log, periods, states
from replicator.log.event_log import EventLog
from replicator.nursery import flat_nursery

VMS = 1000
CYCLE_S = 60
#: Cycles of one VM in 30 days.
CYCLES = 30 * 86_400 // CYCLE_S
#: Unless `--shrink` says how much of the month: half a day.
SHRINK = 60
#: A shortened month has as many periods as the whole one, unless they would be smaller than this.
PERIOD_EVENTS_MIN = 20_000
REOPEN_S_MAX = 2.0
#: The greatest size of the live environment in the last three quarters of the month, over that in the first.
GROWTH_MAX = 1.1
#: With fewer sealed, the first quarter says nothing of the others.
PERIODS_MIN = 8
SAMPLES = 200
#: So many cycles of all VMs the projections may be behind; in use it is the events of a second.
LAG_CYCLES = 3

_ROOT = Path(__file__).parent.parent


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """One month, then ``pairs`` restarts of each kind, each in a process of its own."""
    cycles = max(2, CYCLES // shrink)
    period = max(min(PERIOD_EVENTS_MIN, periods.EVENTS_MAX), periods.EVENTS_MAX // shrink)
    what = (
        f"{VMS} VMs with a cycle every {CYCLE_S} s for {cycles * CYCLE_S / 86_400:.2f} days (1/{shrink} of a month):"
        f" {VMS * cycles} cycles, periods of {period} events (in use: {periods.EVENTS_MAX})"
    )
    result = Result("month", what)
    done, memory = await _simulate(folder, cycles, period)
    _show_growth(result, done)
    result.figures["memory, resident with files and anonymous, MiB"] = [
        memory.peak / MIB,
        memory.anonymous / MIB,
    ]
    log = folder / "events"
    cold = [await _child("reopen", str(log), "cold") for _ in range(pairs)]
    warm = [await _child("reopen", str(log), "warm") for _ in range(pairs)]
    result.figures["restart: open_log, cold page cache, s"] = [each["open_s"] for each in cold]
    result.figures["restart: open_log, warm, s"] = [each["open_s"] for each in warm]
    fold = [await _child("reopen", str(log), "fold") for _ in range(pairs)]
    # Where the rows cannot be used, all of the live log is folded: in use up to a whole period, here less.
    result.figures["restart without the rows of states, s"] = [each["open_s"] for each in fold]
    result.figures["live events that it folds"] = float(fold[0]["live"])
    if any(each["vms"] != VMS for each in (*cold, *warm, *fold)):
        raise RuntimeError(f"a restart found {cold[0]['vms']} VMs, not {VMS}")
    worst = max(each["open_s"] for each in cold)
    result.ratios[f"slowest restart / {REOPEN_S_MAX:.0f} s"] = (worst / REOPEN_S_MAX, 1.0)
    for name, part in (("in the middle", 0.5), ("at the end", 1.0)):
        took = await _status_at(folder, START_US + int(cycles * CYCLE_S * part * 1_000_000))
        result.figures[f"replctl status --at, {name}, s"] = took
    return result


def _show_growth(result: Result, done: dict[str, Any]) -> None:
    figures = result.figures
    live = [size for _, size, _ in done["samples"]]
    first = live[: max(1, len(live) // 4)]
    figures["events in the log"] = done["events"]
    figures["seconds of simulation"] = done["took_s"]
    figures["events a second"] = done["events"] / done["took_s"]
    figures["seconds of that for sealing and dropping"] = done["seal_s"]
    figures["the whole month would take, h"] = (
        VMS * CYCLES / (done["events"] / done["took_s"]) / 3600
    )
    step = max(1, len(live) // 8)
    figures["live environment over time, MiB"] = [size / MIB for size in live[step - 1 :: step]]
    figures["live environment, most, MiB"] = max(live) / MIB
    figures["live events, most"] = max(count for _, _, count in done["samples"])
    figures["live environment, bytes per live event"] = max(live) / max(
        count for _, _, count in done["samples"]
    )
    sizes = done["segments"]
    figures["segments"] = len(sizes)
    if sizes:
        figures["segments, smallest and largest, MiB"] = [min(sizes) / MIB, max(sizes) / MIB]
        figures["sealed, bytes per event"] = sum(sizes) / done["sealed_events"]
    if len(sizes) >= PERIODS_MIN:
        growth = max(live) / max(first)
        result.ratios["live environment, later / first quarter"] = (growth, GROWTH_MAX)


async def _simulate(folder: Path, cycles: int, period: int) -> tuple[dict[str, Any], Memory]:
    memory = Memory()
    answer = await _child(
        "simulate", str(folder / "events"), str(cycles), str(period), memory=memory
    )
    memory.peak = answer["peak"]
    return answer, memory


async def _child(*arguments: str, memory: Memory | None = None) -> Any:
    """What `python -m bench.month` answers to these arguments."""
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "bench.month", *arguments], stdout=subprocess.PIPE, cwd=_ROOT
        )
        try:
            if memory is not None:
                nursery.start_soon(watch, process.pid, memory)
            assert process.stdout is not None
            output = b"".join([piece async for piece in process.stdout])
            code = await process.wait()
        finally:
            if process.poll() is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        nursery.cancel_scope.cancel()
    if code:
        raise RuntimeError(f"bench.month {arguments[0]} ended with {code}")
    return json.loads(output)


async def _status_at(folder: Path, time_us: int) -> float:
    """Seconds of the whole command."""
    config = folder / "source.conf"
    config.touch(mode=0o600)
    values = {
        "state_dir": str(folder),
        "dr_host": "127.0.0.1",
        "dr_auth_token": secrets.token_hex(32),
        "vm": "vm-0",
        "source": "image",
        "image_disks": "disk-0=/dev/null",
    }
    config.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), "utf-8")
    at = (EPOCH + timedelta(microseconds=time_us)).isoformat()
    command = ["--config", str(config), "--json", "status", "--at", at]
    started = time.perf_counter()
    done = await trio.run_process(
        [sys.executable, "-m", "bench.measured", str(folder / "peak"), *command],
        capture_stdout=True,
        cwd=_ROOT,
    )
    took = time.perf_counter() - started
    if len(json.loads(done.stdout)) != VMS:
        raise RuntimeError(f"status at {at} does not show {VMS} VMs")
    return took


# In processes of their own


class Clock:
    """Microseconds since the epoch, as whoever holds it has set them."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us

    def __call__(self) -> int:
        """The time."""
        return self.now_us

    @contextmanager
    def of_events(self) -> Iterator[None]:
        """Events are recorded at this clock's time."""

        def stamp() -> datetime:
            return EPOCH + timedelta(microseconds=self.now_us)

        with patch.object(ProtectedVm.Event, "create_timestamp", staticmethod(stamp)):
            yield


async def simulate(folder: Path, cycles: int, period: int) -> dict[str, Any]:
    """All VMs' cycles, all of one minute at the same time; what came of it."""
    clock = Clock(START_US)
    samples: list[tuple[int, int, int]] = []
    with clock.of_events(), patch.object(periods, "EVENTS_MAX", period):
        async with open_log(folder, clock=clock) as log:
            names = [stream_id(UUID(int=0), number) for number in range(VMS)]
            async with flat_nursery() as nursery:
                for number, vm in enumerate(names):
                    nursery.start_soon(log.register, vm, f"vm-{number}", "source")
            started, waited_s = time.perf_counter(), 0.0
            heads: list[int] = []
            for cycle in range(1, cycles + 1):
                async with flat_nursery() as nursery:
                    for number, vm in enumerate(names):
                        nursery.start_soon(_cycle, log, clock, vm, cycle, number)
                heads.append(await trio.to_thread.run_sync(log.store.head))
                waited_s += await _keep_up(log, heads[-LAG_CYCLES] if cycle > LAG_CYCLES else 0)
                if cycle * SAMPLES // cycles != (cycle - 1) * SAMPLES // cycles:
                    samples.append(await trio.to_thread.run_sync(_sample, log))
            await _keep_up(log, heads[-1])
            took_s = time.perf_counter() - started
            sealed = [p for p in log.periods if p.segment is not None]
            paths = [log.store.archive.path(p) for p in sealed]
            return {
                "events": log.store.head(),
                "took_s": took_s,
                "seal_s": waited_s,
                "samples": samples,
                "segments": [path.stat().st_size for path in paths],
                "sealed_events": sum(p.last - p.first + 1 for p in sealed),
                "peak": read_status("self")["VmHWM"],
            }


async def _keep_up(log: EventLog, seen: int) -> float:
    """Wait for what takes no time beside a minute that lasts one: projections up to ``seen``, and the sealing of a closed
    period. Seconds of the latter.
    """
    for projection in event_log.PROJECTIONS:
        await log.projections.wait(projection(log.store.event).name, seen)
    started = time.perf_counter()
    if len(log.periods) > 1 and not log.periods[-2].dropped:
        await log.seal()
    return time.perf_counter() - started


async def _cycle(log: EventLog, clock: Clock, vm: UUID, cycle: int, number: int) -> None:
    """One cycle of one VM; the VMs' cycles are spread over the minute."""
    async with log.change(vm) as changing:
        now_us = START_US + (cycle - 1) * CYCLE_S * 1_000_000 + number * CYCLE_S * 1_000_000 // VMS
        clock.now_us = max(clock.now_us, now_us)
        changing.commit(point(cycle, now_us))


def _sample(log: EventLog) -> tuple[int, int, int]:
    """The last event, the bytes of the live environment on disk, and the events in it."""
    head = log.store.head()
    return (
        head,
        (log.store.folder / "data.mdb").stat().st_blocks * 512,
        head + 1 - log.store.recorder.live_first(),
    )


async def reopen(folder: Path, *, rows: bool) -> dict[str, Any]:
    """How long until a log can be used; without ``rows`` as if the projection of states were another program's."""
    revision = states.VmStates.revision + (not rows)
    with patch.object(states.VmStates, "revision", revision):
        started = time.perf_counter()
        # Read only without them, so that none are made.
        async with open_log(folder, readonly=not rows) as log:
            open_s = time.perf_counter() - started
            live = log.store.head() + 1 - log.store.recorder.live_first()
            return {"open_s": open_s, "vms": len(log.vms), "live": live}


def _forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def main(arguments: Sequence[str]) -> None:
    """`simulate FOLDER CYCLES PERIOD_EVENTS` or `reopen FOLDER cold|warm|fold`; the answer on stdout."""
    folder = Path(arguments[1])
    if arguments[0] == "simulate":
        answer = trio.run(simulate, folder, int(arguments[2]), int(arguments[3]))
    else:
        if arguments[2] == "cold":
            _forget(folder)
        answer = trio.run(partial(reopen, folder, rows=arguments[2] != "fold"))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
