# SPDX-License-Identifier: AGPL-3.0-or-later
"""The crash test: either side is killed before every one of its durable steps, in every phase, and started again.

What must hold afterwards stands in ``tests/crash/sides.py`` (each side) and in ``child.py`` (between the two).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from tests.crash.child import Answer, Request
from tests.crash.scenario import PHASES, Phase

ROOT = Path(__file__).resolve().parents[2]
#: Trials at once: each is two processes that take turns.
WORKERS = 2
#: More failures than this say no more.
FAILURES_MAX = 4
#: Steps that a side may be killed before in one phase; more would be a loop.
STEPS_MAX = 1000
_COMMAND = [sys.executable, "-m", "tests.crash.child"]
#: Thousands of short processes are not what coverage is measured by.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}


@dataclass
class Tally:
    """What an enumeration came by."""

    steps: Counter[Phase] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    resumed: int = 0

    def add(self, phase: Phase, step: int, answer: Answer) -> None:
        if answer.killed is not None:
            self.steps[phase] += 1
            self.kinds[answer.killed.split()[0]] += 1
            # Not the first session of the process that began it, and not from the start.
            self.resumed += any(any(positions) for positions in answer.resumed)
        if answer.error is not None:
            self.failures.append(f"{phase}, step {step} ({answer.killed}):\n{answer.error}")


class Worker:
    """A process that runs one trial at a time."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = bytearray()

    async def ask(self, request: Request) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        await self._process.stdin.send_all(msgspec.json.encode(request) + b"\n")
        while (end := self._buffer.find(b"\n")) < 0:
            more = await self._process.stdout.receive_some()
            assert more, "a worker of the crash test died"
            self._buffer += more
        answer = msgspec.json.decode(self._buffer[:end], type=Answer)
        del self._buffer[: end + 1]
        return answer


@asynccontextmanager
async def worker() -> AsyncIterator[Worker]:
    process = await trio.lowlevel.open_process(
        _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=_ENVIRONMENT
    )
    try:
        yield Worker(process)
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            await process.wait()


@dataclass(frozen=True)
class Templates:
    """Folders with images and templates, one for each setting of ``push_apply_remote``."""

    root: Path

    def base(self, apply: bool) -> Path:
        return self.root / ("apply" if apply else "keep")


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    with tempfile.TemporaryDirectory(prefix="replctl-crash-") as folder:
        made = Templates(Path(folder))
        requests = []
        for apply in (True, False):
            made.base(apply).mkdir()
            work = str(made.base(apply) / "work")
            requests.append(Request(base=str(made.base(apply)), work=work, apply=apply))
        lines = b"".join(msgspec.json.encode(request) + b"\n" for request in requests)
        done = subprocess.run(
            _COMMAND, input=lines, stdout=subprocess.PIPE, cwd=ROOT, env=_ENVIRONMENT, check=True
        )
        for line in done.stdout.splitlines():
            answer = msgspec.json.decode(line, type=Answer)
            assert answer.error is None, answer.error
        yield made


async def enumerate_steps(
    base: Path,
    side: str,
    *,
    apply: bool = True,
    clones: bool = False,
    phases: tuple[Phase, ...] = PHASES,
) -> Tally:
    """Kill a side before its 1st, 2nd, … step in each phase, until it comes to the end."""
    tally = Tally()
    ended: set[Phase] = set()

    def trials() -> Iterator[tuple[Phase, int]]:
        for phase in phases:
            for step in range(1, STEPS_MAX):
                if phase in ended:
                    break
                yield phase, step
            else:
                raise AssertionError(f"{phase} does not end")

    async def work(left: Iterator[tuple[Phase, int]]) -> None:
        async with worker() as running:
            for phase, step in left:
                folder = str(base / f"{side}-{clones}-{phase}-{step}")
                request = Request(str(base), folder, phase, side, step, apply, clones)
                answer = await running.ask(request)
                tally.add(phase, step, answer)
                if answer.killed is None:
                    ended.add(phase)
                if len(tally.failures) >= FAILURES_MAX:
                    return

    left = trials()
    async with trio.open_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(work, left)
    assert not tally.failures, "\n\n".join(tally.failures)
    assert ended == set(phases)
    return tally


#: What a side does that a crash can cut; a kind that is not met would mean that the test no longer comes by it.
_EVERY_KIND = {
    "before-commit",
    "after-commit",
    "create",
    "write",
    "fsync",
    "truncate",
    "rename",
    "unlink",
    "mkdir",
}


async def test_the_receiver_is_killed_at_every_durable_step(templates: Templates) -> None:
    tally = await enumerate_steps(templates.base(True), "receiver")
    assert tally.kinds.keys() >= _EVERY_KIND | {"punch", "rmdir"}
    assert tally.resumed > 50


async def test_the_receiver_is_killed_at_every_durable_step_where_deltas_are_kept(
    templates: Templates,
) -> None:
    # What differs comes after the commit, and begins with the second point.
    phases = (Phase.CYCLE, Phase.GROW, Phase.ADD, Phase.RESEED)
    tally = await enumerate_steps(templates.base(False), "receiver", apply=False, phases=phases)
    assert tally.kinds.keys() >= _EVERY_KIND | {"punch", "rmdir"}
    assert tally.resumed > 10


async def test_the_source_is_killed_at_every_durable_step(templates: Templates) -> None:
    tally = await enumerate_steps(templates.base(True), "source")
    assert tally.kinds.keys() >= _EVERY_KIND | {"clone", "rmdir"}
    assert tally.resumed > 10


async def test_the_source_is_killed_at_every_durable_step_where_images_are_cloned(
    templates: Templates,
) -> None:
    # What differs is how a snapshot is made and removed; seed and cycle come by all of that.
    phases = (Phase.SEED, Phase.CYCLE)
    tally = await enumerate_steps(templates.base(True), "source", clones=True, phases=phases)
    assert tally.kinds.keys() >= _EVERY_KIND | {"clone", "rmdir"}
