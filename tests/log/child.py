# SPDX-License-Identifier: AGPL-3.0-or-later
"""What needs a process of its own: a writer beside a reader (``write FOLDER``), and one that is killed (``crash FOLDER``).

``crash`` closes and seals a log again and again, killed before the 1st, 2nd, … durable step, until it comes to the end.
Each trial is forked from this process, which opens no log itself. A line of JSON says where each was killed, and what did
not hold afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from eventstore import environment
from replicator import durable
from replicator.log import EventLog, event_log, open_log, sealing
from tests.limits import HANG_S
from tests.log.support import (
    DB,
    MAIL,
    NAMES,
    WEB,
    Calendar,
    caught_up,
    check_log,
    copy_log,
    live,
    live_rows,
    opened,
    states,
)

STEPS_MAX = 500
#: What durable steps a segment's writer takes by itself.
_OS_STEPS = ("write", "fsync", "rename", "unlink", "ftruncate")


# A writer


async def _write(folder: Path) -> None:
    calendar = Calendar()
    rng = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        calendar.install(patch)
        async with open_log(folder, clock=calendar) as log:
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                what, number = line.split()
                await _step(log, calendar, rng, what, int(number))
                print("done", flush=True)  # noqa: T201 -- it is what the reader waits for


async def _step(
    log: EventLog, calendar: Calendar, rng: random.Random, what: str, number: int
) -> None:
    """``months N``: months that are closed and not sealed; ``events N``; ``seal N``: seal so many of them."""
    for _ in range(number):
        if what == "months":
            await log.register(WEB, "web", "receiver")
            await live(log, WEB, rng, 4)
            calendar.next_month()
            await log.close_period()
        elif what == "events":
            await live(log, WEB, rng)
        else:
            await log.seal()


# A crash


def _template(folder: Path) -> None:
    """A log of one open month."""

    async def make() -> None:
        rng = random.Random(3)
        with pytest.MonkeyPatch.context() as patch:
            calendar = Calendar()
            calendar.install(patch)
            async with open_log(folder, clock=calendar) as log:
                for vm in (WEB, DB):
                    await log.register(vm, NAMES[vm], "receiver")
                    await live(log, vm, rng, 5)
                await caught_up(log)

    trio.run(make)


def _trial(folder: Path, at: int, note: Path) -> None:
    """Close and seal, and die before step ``at``. The order of steps is the same in every trial."""

    async def never(_: EventLog) -> None:
        await trio.sleep_forever()

    async def run() -> None:
        steps = _Steps(at, note, folder)
        calendar = Calendar(2026, 2)
        with pytest.MonkeyPatch.context() as patch:
            calendar.install(patch)
            patch.setattr(EventLog, "keep_periods", never)
            patch.setattr(sealing, "DROP_ROWS", 5)
            with patch.context() as alone:
                # Their commits may share a transaction or not.
                alone.setattr(event_log, "PROJECTIONS", ())
                async with open_log(folder, clock=calendar) as log:
                    steps.counting = True
                    await live(log, WEB, random.Random(4))
                    await log.close_period()
                    steps.counting = False
            async with open_log(folder, clock=calendar) as log:
                await caught_up(log)
                steps.counting = True
                await log.seal()

    trio.run(run)


class _Steps:
    """Counts durable steps of this process, and kills it before one of them."""

    def __init__(self, at: int, note: Path, folder: Path) -> None:
        self._left = at
        self._note = note
        self._folder = folder
        self.counting = False
        durable.observe = self.step
        environment.observe_commit = self.step
        for name in _OS_STEPS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def step(self, what: str, path: str) -> None:
        """One step, in any thread."""
        if self.counting:
            self._left -= 1
            if self._left == 0:
                self.counting = False
                self._note.write_text(f"{what} {os.path.relpath(path, self._folder)}")
                os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.step(name, os.fspath(self._folder / "os"))
            return real(*args, **options)

        return call


def _look(folder: Path, before: list[Any]) -> None:
    """What must hold after the crash, then after the next start, and after one more month."""
    with opened(folder) as store:
        events = check_log(store)
    assert events[: len(before)] == before
    # An event of its own, then the opening events of both VMs together.
    assert len(events) - len(before) in (0, 1, 3)

    async def go_on() -> None:
        calendar = Calendar(2026, 4)
        with pytest.MonkeyPatch.context() as patch:
            calendar.install(patch)
            async with open_log(folder, clock=calendar) as log:
                await log.seal()
                assert check_log(log.store)[: len(events)] == events
                await log.register(MAIL, "mail", "receiver")
                await live(log, MAIL, random.Random(5), 3)
                await live(log, WEB, random.Random(6), 3)
                await log.close_period()
                await log.seal()
                memory = states(log.vms)
                assert all(p.dropped for p in log.periods[:-1])
                assert live_rows(log.store)[0] == log.periods[-1].first
                assert check_log(log.store)[: len(events)] == events
            async with open_log(folder, clock=calendar) as log:
                assert states(log.vms) == memory
        kept = sorted(path.name for path in (folder / "segments").iterdir())
        assert kept == [f"{p.label}.segment" for p in log.periods[:-1]], kept

    trio.run(go_on)


def _forked(run: Callable[[], None], log: Path) -> int:
    """How a forked process ended that does this."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(HANG_S)
        try:
            run()
            code = 0
        except BaseException:  # noqa: BLE001 -- whatever it is, it is what did not hold
            log.write_text(traceback.format_exc())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _crash(base: Path) -> int:
    template, work = base / "template", base / "work"
    error, note = base / "error", base / "note"
    assert _forked(lambda: _template(template), error) == 0, error.read_text()
    with opened(template) as store:
        before = check_log(store)
    for number in range(1, STEPS_MAX):
        for path in (error, note):
            path.unlink(missing_ok=True)
        copy_log(template, work)
        code = _forked(lambda number=number: _trial(work, number, note), error)  # type: ignore[misc]
        killed = note.read_text() if note.exists() else None
        if code == (0 if killed is None else -signal.SIGKILL):
            _forked(lambda: _look(work, before), error)
        said = error.read_text() if error.exists() else None
        print(json.dumps({"step": number, "killed": killed, "error": said}), flush=True)  # noqa: T201
        if killed is None:
            return 0
    return 1


if __name__ == "__main__":
    if sys.argv[1] == "write":
        trio.run(_write, Path(sys.argv[2]))
    else:
        sys.exit(_crash(Path(sys.argv[2])))
