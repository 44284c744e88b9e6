# SPDX-License-Identifier: AGPL-3.0-or-later
"""A writer in a process of its own, that does a step when it is told to, and says when it is done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def writer(folder: Path) -> Iterator[Callable[[str], None]]:
    """Call what is given with a step of ``tests/log/child.py``; it returns when the step is done."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.log.child", "write", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def step(what: str) -> None:
            print(what, file=process.stdin, flush=True)
            answer = process.stdout.readline() if process.stdout is not None else ""
            assert answer == "done\n", f"the writer ended at {what!r}"

        try:
            yield step
        finally:
            process.stdin.close()
            process.wait()


__all__ = ["writer"]
