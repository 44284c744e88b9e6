# SPDX-License-Identifier: AGPL-3.0-or-later
"""A process that forks for each job, so that a test can kill -9 one after the other without paying for a start each time."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio


def serve(kind: type[Any], run: Callable[[Any], Awaitable[None]]) -> None:
    """Take jobs of ``kind``, a line of JSON each, until the input ends; answers with the pid, then with the exit code, of each."""
    for line in sys.stdin:
        job = msgspec.json.decode(line, type=kind)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                trio.run(run, job)
                code = 0
            except BaseException:  # noqa: BLE001 - told, and then it is over with this process
                traceback.print_exc()
            finally:
                os._exit(code)
        _answer({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _answer({"code": os.waitstatus_to_exitcode(status)})


def _answer(what: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


__all__ = ["serve"]
