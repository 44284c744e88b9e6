# SPDX-License-Identifier: AGPL-3.0-or-later
"""Labs for tests: one a module, removed at its end; what the daemons and the backend said goes into a failure's report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bacula.lab import Lab

_LOGS = ("log/job.log", "log/daemon.log", "log/backend.log")
_TAIL = 12_000

LabFactory = Callable[..., Any]


@contextmanager
def a_lab(**options: Any) -> Iterator[Lab]:
    """A lab with its files in a short path (Unix sockets), stopped and removed at the end. Not started: Jobs come first."""
    folder = Path(tempfile.mkdtemp(prefix="replctl-bacula-"))
    lab = Lab(folder, **options)
    try:
        lab.prepare()
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def empty_lab() -> Iterator[Lab]:
    """A lab without Jobs."""
    with a_lab() as lab:
        yield lab


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the ends of the lab's logs to a failure."""
    report = yield
    if report.failed and call.excinfo is not None:
        for value in getattr(item, "funcargs", {}).values():
            lab = value if isinstance(value, Lab) else getattr(value, "lab", None)
            if isinstance(lab, Lab):
                for name in _LOGS:
                    path = lab.folder / name
                    if path.exists():
                        text = path.read_text(errors="replace")[-_TAIL:]
                        report.sections.append((f"{lab.folder.name}/{name}", text))
                break
    return report
