# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far something is, on stderr: bars with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replicator.cli.text import one_line, size

_logger = logging.getLogger(__name__)

#: Called as ``report(what, done, total)``, bytes.
Report = Callable[[str, int, int], None]
#: Lines per item where nobody watches.
_STEPS = 10
#: Less of something that is counted is done before it could be told.
_WORTH_TELLING = 100_000


@contextmanager
def progress() -> Iterator[Report]:
    """A function to report with, while the block runs."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


def counting(what: str, unit: str) -> Callable[[int, int], None]:
    """A function ``report(done, total)`` that logs each tenth of much that is counted, and nothing of little."""
    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        step = done * _STEPS // total if total else _STEPS
        if step > told and total >= _WORTH_TELLING:
            told = step
            _logger.info("%s: %d of %d %s", what, done, total, unit)

    return report


def _lines() -> Report:
    told: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        step = done * _STEPS // total if total else _STEPS
        if step > told.get(what, 0):
            told[what] = step
            _logger.info("%s: %d %% of %s", what, step * 100 // _STEPS, size(total))

    return report


@contextmanager
def _bars() -> Iterator[Report]:
    from rich import progress as bars  # noqa: PLC0415 - only for a person
    from rich.console import Console  # noqa: PLC0415 - the same

    tasks: dict[str, bars.TaskID] = {}
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as display:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(one_line(what), total=total)
            display.update(tasks[what], completed=done, total=total)

        yield report


__all__ = ["Report", "counting", "progress"]
