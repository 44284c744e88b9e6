# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the transport benchmark's verdicts rest on: no processor time of a contender's processes is missed."""

from __future__ import annotations

import subprocess
import sys

from bench.meter import descendants_cpu_s

BURNT_S = 0.2
#: What children of children have used is told in ticks of 10 ms, user and system time each.
TICKS_S = 0.02

_BURN = f"import time\nwhile time.process_time() < {BURNT_S}: pass\n"
_BURN_AND_WAIT = _BURN + "print('burnt', flush=True)\ninput()\n"


def test_a_process_that_runs_is_counted() -> None:
    before = descendants_cpu_s()
    command = [sys.executable, "-c", _BURN_AND_WAIT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        running = descendants_cpu_s() - before
        process.communicate(b"\n")
    assert running >= BURNT_S
    # It goes on counting when the process has ended, and does not count it twice.
    assert running <= descendants_cpu_s() - before < 2 * running


def test_a_child_of_a_child_that_has_ended_is_counted() -> None:
    before = descendants_cpu_s()
    starts_another = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_BURN!r}], check=True)\n"
        "print('burnt', flush=True)\ninput()\n"
    )
    command = [sys.executable, "-c", starts_another]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        running = descendants_cpu_s() - before
        process.communicate(b"\n")
    assert running >= BURNT_S - TICKS_S
    assert descendants_cpu_s() - before >= BURNT_S
