# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backend as a process that dies: each line on stdin is a job, which a forked process does and may not survive.

The volume, as far as Bacula had it when it gave its verdict, is left in a file.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from functools import partial
from typing import Any

import msgspec
import trio

from bacula_adapter.backend.interface import JobInfo, JobKind, Level
from bacula_adapter.backup import open_backup
from eventstore import environment
from replicator import durable, prism_access
from replicator.config import check
from replicator.prism import v3, v4  # noqa: F401 - so that they are loaded
from replicator.prism.settings import PrismSettings
from tests.bacula_backup.lab import Volume
from tests.sources.simulated import WAITS


class Trial(msgspec.Struct, kw_only=True):
    """A job. ``step``: before which durable step the process dies; 0 for none."""

    config: dict[str, str]
    name: str
    job_id: int
    level: str
    previous: str
    volume: str
    step: int = 0


class Steps:
    """Counts the durable steps of files and logs."""

    def __init__(self, last: int) -> None:
        self.done = 0
        self._last = last

    def __call__(self, step: str, path: str) -> None:
        del step, path
        self.done += 1
        if self.done == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


async def run(trial: Trial) -> None:
    info = JobInfo(
        name=trial.name,
        job_id=trial.job_id,
        kind=JobKind.BACKUP,
        level=Level(trial.level),
        previous=trial.previous,
        addressed=True,
    )
    volume = Volume()
    async with open_backup(info, check(trial.config)) as handler:
        await handler.run(volume)
        # Bacula decides: from here on it has the job, whatever becomes of the backend.
        await trio.Path(trial.volume).write_bytes(pickle.dumps(volume))
        await handler.conclude("T")


def main() -> None:
    gc.disable()
    # The simulator's tasks are done at once: the gaps between looks would be most of the time.
    vars(prism_access)["PrismSettings"] = partial(PrismSettings, waits=WAITS)
    for line in sys.stdin:
        trial: Any = msgspec.json.decode(line, type=Trial)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                steps = Steps(trial.step)
                durable.observe = environment.observe_commit = steps
                trio.run(run, trial)
                code = 0
            except BaseException:  # noqa: BLE001 - told, and then it is over with this process
                traceback.print_exc()
            finally:
                os._exit(code)
        _tell(pid)
        _, status = os.waitpid(pid, 0)
        _tell(os.waitstatus_to_exitcode(status))


def _tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
